"""What a policy says: text from a base, steered or fully fine-tuned model, and which features
steered each token.

    python -m generation --run runs/tiny                                       # chat; Ctrl-D ends
    python -m generation --run runs/tiny --prompt "What is a kettle?" --compare
    python -m generation --run runs/tiny --prompt "What is a kettle?" --without style
    python -m generation --run runs/tiny --prompts questions.jsonl --trace runs/trace.html

--scale, --only and --without change the steering v before it is added, in the prompt as in the
answer. A trace shows v (of soft-threshold before the clamp), at the token that it was computed at;
it changes what the next token is.
"""

import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

import data
from data import Turns
from fsrl import Change, SteeredModel, Unsteered
from generation import trace
from generation.decode import Sampling, decode, end_of_turn
from generation.trace import Position, Trace
from labels import Labels, load_labels
from policy import Policy, open_policy
from runtime import cli
from runtime.cli import flag
from runtime.device import DTYPES
from runtime.messages import shown
from runtime.output import writable_file
from runtime.rows import decode_row, read_rows
from runtime.sources import UserError
from tiny import LABELS_DIR

TINY_LABELS = LABELS_DIR / "fires.jsonl"
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token that is one byte
Show = Callable[[int, str], None]  # (which prompt, the next piece of its answer)


@dataclass(frozen=True)
class Settings:
    run: str | None = flag(None, "run folder written by train.py, adapter folder, or Hub id")
    model: str | None = flag(
        None, "base model to run alone; with --run: base model, if no longer where recorded"
    )
    sae: str | None = flag(None, "with --run: SAE, if no longer where the run recorded it")
    sae_id: str | None = flag(None, "folder of the SAE in --sae")
    prompt: tuple[str, ...] = flag((), "a user's message; may be repeated; without any: chat")
    prompts: str | None = flag(
        None, "more prompts: .txt with one on each line, or .jsonl with `prompt`, a text or turns"
    )
    max_new_tokens: int = flag(256, "limit on the tokens of an answer")
    temperature: float = flag(0.0, "of sampling; 0: always take the likeliest token")
    top_k: int = flag(0, "draw from this many likeliest tokens; 0: from all")
    top_p: float = flag(
        1.0, "draw from the fewest likeliest tokens that have this probability together"
    )
    seed: int = flag(0, "seed of the draws, the same for each prompt")
    batch_size: int = flag(16, "number of prompts to answer together")
    compare: bool = flag(False, "also answer with the base model, side by side")
    scale: float = flag(1.0, "factor of the steering; 0: the base model")
    only: str | None = flag(
        None, "steer only with these features or categories of --labels, separated by commas"
    )
    without: str | None = flag(None, "do not steer with these features or categories")
    labels: str | None = flag(
        None, "file of explanations and categories of features (default for tiny: its own)"
    )
    assume_labels_match: bool = flag(False, "take --labels that name no SAE for the run's")
    trace: str | None = flag(
        None, "show the steering of each token: - to print it, or a .jsonl or .html to write"
    )
    top: int = flag(5, "features shown for each token of a trace")
    dtype: str = flag("auto", "dtype of products; auto: bfloat16 on CUDA, else float32", DTYPES)
    device: str = flag("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is a GPU")

    def __post_init__(self):
        """Raises UserError for settings that mean nothing."""
        if not (self.run or self.model):
            raise UserError("--run or --model: one of the two was expected.")
        if not math.isfinite(self.scale):
            raise UserError(f"--scale {self.scale}: must be finite.")
        cli.at_least(self, 1, "max_new_tokens", "batch_size", "top")
        if self.compare and not (self.prompt or self.prompts):
            raise UserError("--compare: needs --prompt or --prompts; a chat has one speaker.")
        if self.trace not in (None, "-"):
            path = Path(self.trace)
            named = path.suffix in (".jsonl", ".html")
            if not named or not os.path.isdir(path.parent):
                expected = "-, or a .jsonl or .html file in a folder that exists, was expected."
                raise UserError(f"--trace {path}: {expected}")
            writable_file(path, "trace")
        self.sampling  # noqa: B018  raises for what it cannot mean

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def say(text: str, end: str = "\n") -> None:
    """Print text of a model, a label or a prompt: every print of such text goes through here."""
    print(shown(text), end=end, flush=True)


# --- prompts --------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[Turns]:
    """Prompts of a .txt or .jsonl file. Raises UserError naming the row that is none."""
    if path.suffix not in (".txt", ".jsonl") or not os.path.isfile(path):
        raise UserError(f"--prompts {path}: a .txt or .jsonl file was expected.")
    if path.suffix == ".txt":
        try:
            lines = path.read_bytes().decode().split("\n")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--prompts {path}: cannot be read ({e}).") from e
        numbered = enumerate(lines, start=1)
        prompts = [turns(f"{path.name} line {n}", line) for n, line in numbered if line.strip()]
    else:
        prompts = []
        for where, raw in read_rows(path):
            prompts.append(turns(where, decode_row(where, raw).get("prompt")))
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompt.")
    return prompts


def turns(where: str, prompt: object) -> Turns:
    """A prompt, text or a list of {role, content}, by the rules of preference data.

    Raises UserError naming the row.
    """
    if isinstance(prompt, str):
        row = dict(prompt=prompt, chosen="", rejected="")
    elif isinstance(prompt, list):
        answered = [*prompt, dict(role="assistant", content="")]
        row = dict(chosen=answered, rejected=answered)
    else:
        raise UserError(f"{where}: `prompt` must be text or a list of {{role, content}}.")
    return data.parse_row(where, row).prompt


# --- part of the policy ---------------------------------------------------------------------------


def find_labels(s: Settings, policy: Policy) -> Labels | None:
    """The labels of --labels, or those of the embedded world where its SAE is in use."""
    if isinstance(policy.model, Unsteered):
        return None
    sae = policy.steered.sae
    if s.labels:
        return load_labels(s.labels, sae, s.assume_labels_match)
    return load_labels(TINY_LABELS, sae) if policy.recorded.sae == "tiny" else None


def part(s: Settings, policy: Policy, labels: Labels | None) -> Change | None:
    """What --scale, --only and --without do to v; None for nothing.

    Raises UserError for an unknown feature, and for a policy that has no steering.
    """
    if isinstance(policy.model, Unsteered):
        asked = dict(
            scale=s.scale != 1, only=s.only, without=s.without, trace=s.trace, labels=s.labels
        )
        for name, given in asked.items():
            if given:
                raise UserError(f"--{name}: {policy.name} has no adapter, so nothing is steered.")
    if s.scale == 1 and s.only is None and s.without is None:
        return None

    keep = np.ones(policy.steered.sae.d_sae, dtype=bool)
    if s.only is not None:
        keep &= chosen_features("--only", s.only, keep.size, labels)
    if s.without is not None:
        keep &= ~chosen_features("--without", s.without, keep.size, labels)
    weight = torch.from_numpy(keep).to(policy.base.device) * s.scale  # [F]
    return lambda v: v * weight


def chosen_features(flag: str, names: str, d_sae: int, labels: Labels | None) -> np.ndarray:
    """Feature indices and categories, with commas -> bool [F]."""
    chosen = np.zeros(d_sae, dtype=bool)
    for name in map(str.strip, names.split(",")):
        if name.isascii() and name.isdigit():
            if len(name) > 9 or int(name) >= d_sae:
                raise UserError(f"{flag} {name}: the SAE has features 0 to {d_sae - 1}.")
            chosen[int(name)] = True
        elif labels is None:
            raise UserError(
                f"{flag} {name}: a feature's number was expected; categories need --labels."
            )
        elif name not in labels.categories:
            known = ", ".join(sorted(labels.categories)) or "none"
            raise UserError(f"{flag} {name}: no such category; {labels.path} has {known}.")
        else:
            chosen |= labels.categories[name]
    return chosen


# --- text -----------------------------------------------------------------------------------------


def stable(tokenizer: Tokenizer, new: list[int]) -> str:
    """The text of new tokens that no further token changes.

    Trailing byte tokens are held back until their character is complete. All of a run of them
    waits, because one that turns out to be no text changes the text of the others.
    """
    end = len(new)
    while end and BYTE.fullmatch(tokenizer.id_to_token(new[end - 1]) or ""):
        end -= 1
    return tokenizer.decode(new[:end]).rstrip("\ufffd")


def answers(
    model: SteeredModel | Unsteered,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    s: Settings,
    change: Change | None = None,
    kept: Trace | None = None,
    show: Show | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, in batches of --batch-size.

    kept: where the steering goes. show: takes the text of each answer piece by piece, answer after
    answer in order.
    """
    ended = end_of_turn(tokenizer)
    new: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(prompts), s.batch_size):
        batch = prompts[first : first + s.batch_size]
        current, length = first, 0  # the answer being shown, and how many of its characters were

        def watch(owners: list[int], v: torch.Tensor, first: int = first) -> None:
            kept([first + i for i in owners], v)

        arguments = (model, batch, s.max_new_tokens, ended, s.sampling, change)
        steps = decode(*arguments, watch if kept else None)
        for chosen in chain(steps, [{}]):  # after the last step every answer is complete
            for i, token in chosen.items():
                new[first + i].append(token)
            while show and current < first + len(batch):
                # A prompt that got no token in this step has ended in an earlier one.
                complete = current - first not in chosen or ended(new[current])
                tokens = new[current]
                text = tokenizer.decode(tokens) if complete else stable(tokenizer, tokens)
                show(current, text[length:])
                length = len(text)
                if not complete:
                    break
                current, length = current + 1, 0
    return new


class Way(NamedTuple):
    """One that answers: a column of --compare."""

    name: str
    model: SteeredModel | Unsteered
    change: Change | None = None


def ways(s: Settings, policy: Policy, own: Way) -> Iterator[Way]:
    """The columns of --compare, left and right. Raises UserError for a base model alone."""
    if not isinstance(policy.model, Unsteered):
        yield Way("base", Unsteered(policy.base))
        yield own
    elif policy.folder:
        base = open_policy(None, s.model or policy.recorded.model, device=s.device, dtype=s.dtype)
        yield Way("base", base.model)
        yield own
    else:
        raise UserError(
            f"--compare: {policy.name} is a base model; there is nothing to compare it with."
        )


def side_by_side(left: str, right: str, width: int) -> str:
    """Two texts in two columns of a terminal so wide."""
    column = max(20, (width - 3) // 2)
    columns = []
    for text in (left, right):
        wrapped = [textwrap.wrap(line, column) or [""] for line in shown(text).split("\n")]
        columns.append([line for lines in wrapped for line in lines])
    height = max(map(len, columns))
    rows = zip(*(lines + [""] * (height - len(lines)) for lines in columns), strict=True)
    return "\n".join(f"{a:<{column}} | {b}".rstrip() for a, b in rows)


# --- the three ways to use it ---------------------------------------------------------------------


@dataclass
class Session:
    """A policy that answers, and the traces of all that it answered."""

    s: Settings
    policy: Policy
    labels: Labels | None
    own: Way
    traces: list[list[Position]]

    def answer(self, way: Way, conversations: list[Turns], show: Show | None = None) -> list[str]:
        """Texts of the answers; what is steered goes into the traces."""
        tokenizer = self.policy.tokenizer
        head = data.header_ids(tokenizer)
        encoder = data.Encoder(tokenizer)
        conversations = [[(role, text.strip()) for role, text in c] for c in conversations]
        encoder.learn([turn for turns in conversations for turn in turns])
        prompts = [encoder.prompt(turns) + head for turns in conversations]
        traced = self.s.trace and way.model is self.policy.model
        kept = Trace(self.s.top) if traced else None
        new = answers(way.model, tokenizer, prompts, self.s, way.change, kept, show)
        if kept:
            for i, prompt in enumerate(prompts):
                self.traces.append(kept.positions(i, prompt, new[i], tokenizer, self.labels))
        return [tokenizer.decode(tokens) for tokens in new]

    def about(self) -> dict[str, str]:
        """The settings that a trace depends on."""
        s = self.s
        drawn = f"temperature {s.temperature:g}, top-k {s.top_k}, top-p {s.top_p:g}, seed {s.seed}"
        about = {
            "run": self.policy.name,
            "model": self.policy.recorded.model,
            "layer": str(self.policy.recorded.layer),
            "scale": f"{s.scale:g}",
            "only": s.only,
            "without": s.without,
            "tokens": "the likeliest" if s.temperature == 0 else drawn,
            "labels": str(self.labels.name) if self.labels else "none",
        }
        return {name: value for name, value in about.items() if value is not None}

    def leave_trace(self, latest: list[list[Position]]) -> None:
        """Print the latest traces, or write all to the file of --trace."""
        if self.s.trace == "-":
            for positions in latest:
                say(trace.table(positions, self.about()))
        elif self.s.trace:
            title = f"What steered {self.policy.name}"
            trace.write(Path(self.s.trace), self.traces, title, self.about())


def compare(session: Session, conversations: list[Turns]) -> None:
    columns = []
    for way in ways(session.s, session.policy, session.own):
        columns.append((way.name, session.answer(way, conversations)))
    width = shutil.get_terminal_size().columns
    for i, turns in enumerate(conversations):
        say(f"\n--- prompt\n{turns[-1][1]}\n")
        say(side_by_side(*(f"--- {name}\n{texts[i]}" for name, texts in columns), width))


def answer_all(session: Session, conversations: list[Turns]) -> None:
    begun = set()

    def show(i: int, piece: str) -> None:
        if i not in begun and len(conversations) > 1:
            heading(conversations[i][-1][1])
        begun.add(i)
        say(piece, end="")

    session.answer(session.own, conversations, show)
    say("")


def heading(prompt: str) -> None:
    say(f"\n--- prompt\n{prompt}\n--- answer")


def chat(session: Session) -> None:
    """Turns from stdin until it ends; the whole conversation is the prompt of each answer.

    Raises UserError for a line that is not text.
    """
    terminal = sys.stdin.isatty()
    if session.policy.recorded.model == "tiny":
        print(
            "The tiny world has no second turns: its model knows one question and its answer, and "
            "whatever follows these it answers badly.",
            file=sys.stderr,
        )
    history: Turns = []
    for number in range(1, sys.maxsize):
        where = f"stdin line {number}"
        try:
            line = input("\n> " if terminal else "")
        except EOFError:
            return
        except UnicodeDecodeError as e:
            raise UserError(f"{where}: not UTF-8 text ({e.reason}).") from e
        if not line.strip():
            continue
        history += turns(where, line)
        if not terminal:
            heading(line)
        (text,) = session.answer(session.own, [history], lambda i, piece: say(piece, end=""))
        say("")
        session.leave_trace(session.traces[-1:])
        history.append(("model", text))


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    conversations = [turns("--prompt", text) for text in s.prompt]
    if s.prompts:
        conversations += read_prompts(Path(s.prompts))

    policy = open_policy(s.run, s.model, s.sae, s.sae_id, s.device, s.dtype)
    labels = find_labels(s, policy)
    name = "fine-tuned" if isinstance(policy.model, Unsteered) else "steered"
    own = Way(name, policy.model, part(s, policy, labels))
    session = Session(s, policy, labels, own, traces=[])
    if not conversations:
        chat(session)
        return
    if s.compare:
        compare(session, conversations)
    else:
        answer_all(session, conversations)
    session.leave_trace(session.traces)
    if s.trace and s.trace != "-":
        print(f"Written to {s.trace}", file=sys.stderr)
