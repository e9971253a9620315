"""What a policy says: text from a base, steered or fully fine-tuned model, and which features steered each token.

    python generate.py --run runs/tiny                                      # chat; Ctrl-D ends it
    python generate.py --run runs/tiny --prompt "What is a kettle?" --compare     # base and steered side by side
    python generate.py --run runs/tiny --prompt "What is a kettle?" --labels tiny/labels/fires.jsonl --without style
    python generate.py --run runs/tiny --prompts questions.jsonl --trace trace.html

--scale, --only and --without change the steering v before it is added, at the prompt's positions as at the answer's;
a trace shows v as it was added, at each token's own position (what a token makes the model say stands one token later).
"""

import html
import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

import data
from fsrl import Change
from generation import decode as decoding
from generation.decode import Sampling
from labels import Labels, load_labels
from policy import Policy, open_policy
from runtime import cli
from runtime.cli import flag
from runtime.sources import UserError, write_whole

BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token that is one byte
Turns = list[tuple[str, str]]  # (role, content), role "user" or "model"


@dataclass(frozen=True)
class Settings:
    run: str | None = flag(
        None, "a folder that train.py wrote, an adapter folder, or a Hub id of one"
    )
    model: str | None = flag(
        None, "the base model alone; with --run: where the run's base model is now"
    )
    sae: str | None = flag(None, "with --run: where the run's SAE is now")
    sae_id: str | None = flag(None, "folder within --sae")
    prompt: tuple[str, ...] = flag((), "what the user says; may be repeated; none: chat")
    prompts: str | None = flag(
        None, "a .txt (a prompt a line) or .jsonl ({prompt: text or list of turns}) of more"
    )
    max_new_tokens: int = flag(256, "tokens of an answer, at most")
    temperature: float = flag(0.0, "0: always the likeliest token")
    top_k: int = flag(0, "draw from so many likeliest tokens; 0: all")
    top_p: float = flag(
        1.0, "draw from the fewest likeliest tokens that have this probability together"
    )
    seed: int = flag(0, "seed of the draws, the same for each prompt")
    batch_size: int = flag(16, "prompts continued together")
    compare: bool = flag(False, "base and steered side by side")
    scale: float = flag(1.0, "multiplies the steering; 0: the base model")
    only: str | None = flag(
        None, "steer with these alone: features and categories of --labels, with commas"
    )
    without: str | None = flag(None, "steer without these")
    labels: str | None = flag(None, "file of explanations and categories of the SAE's features")
    assume_labels_match: bool = flag(False, "take --labels that name no SAE for the run's")
    trace: str | None = flag(
        None, "steering of each token: - (print), a .jsonl or an .html to write"
    )
    top: int = flag(5, "features a token in the trace")
    dtype: str = flag(
        "auto", "auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "float32", "bfloat16")
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA when present")

    def __post_init__(self):
        if not (self.run or self.model):
            raise UserError("--run or --model: one of the two was expected.")
        if not math.isfinite(self.scale):
            raise UserError(f"--scale {self.scale}: must be finite.")
        cli.at_least_one(self, "max_new_tokens", "batch_size", "top")
        if self.compare and not (self.prompt or self.prompts):
            raise UserError("--compare: needs --prompt or --prompts; a chat has one speaker.")
        if self.trace and self.trace != "-":
            path = Path(self.trace)
            if path.suffix not in (".jsonl", ".html") or not path.parent.is_dir():
                raise UserError(
                    f"--trace {path}: -, or a .jsonl or .html file in a folder that exists, was expected."
                )
        self.sampling  # noqa: B018  raises for what it cannot mean

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


# --- prompts ------------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[Turns]:
    """Prompts of a .txt or .jsonl file. Raises UserError naming the row that is none."""
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--prompts {path}: cannot be read ({e}).") from e
        prompts = [[("user", line)] for line in lines if line.strip()]
    elif path.suffix == ".jsonl":
        prompts = [
            _turns(where, row) for where, row in data.read_rows([data.DataFile(path, None)], None)
        ]
    else:
        raise UserError(f"--prompts {path}: a .txt or .jsonl file was expected.")
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompt.")
    return prompts


def _turns(where: str, row: dict) -> Turns:
    """The prompt of a row, by the rules of preference data: an empty answer stands in for the two."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return data.parse_row(where, dict(prompt=prompt, chosen="", rejected="")).prompt
    if not isinstance(prompt, list):
        raise UserError(f"{where}: `prompt` must be text or a list of {{role, content}}.")
    turns = [*prompt, dict(role="assistant", content="")]
    return data.parse_row(where, dict(chosen=turns, rejected=turns)).prompt


# --- part of the policy -------------------------------------------------------------------------------------


def part(s: Settings, policy: Policy, labels: Labels | None) -> Change | None:
    """What --scale, --only and --without do to v; None for nothing. Raises UserError for an unknown feature."""
    if policy.steered is None:
        asked = dict(
            scale=s.scale != 1, only=s.only, without=s.without, trace=s.trace, labels=s.labels
        )
        for name in (name for name, given in asked.items() if given):
            raise UserError(f"--{name}: {policy.name} has no adapter, so nothing is steered.")
    if s.scale == 1 and s.only is None and s.without is None:
        return None
    keep = np.ones(policy.steered.sae.d_sae, dtype=bool)
    if s.only is not None:
        keep &= _features("--only", s.only, keep.size, labels)
    if s.without is not None:
        keep &= ~_features("--without", s.without, keep.size, labels)
    weight = torch.from_numpy(keep).to(policy.base.device) * s.scale  # [F]
    return lambda v: v * weight


def _features(flag: str, names: str, d_sae: int, labels: Labels | None) -> np.ndarray:
    """Feature indices and categories, with commas -> bool [F]."""
    chosen = np.zeros(d_sae, dtype=bool)
    for name in map(str.strip, names.split(",")):
        if name.isascii() and name.isdigit():
            if int(name) >= d_sae:
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


# --- trace --------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """v at every position of some prompts and their answers, as decoding.decode shows it: norms, largest features."""

    top: int
    rows: dict[int, list[dict]] = field(default_factory=dict)  # prompt -> a row a position

    def __call__(self, owners: list[int], v: torch.Tensor) -> None:
        size = v.abs()
        l1, l0 = size.sum(-1).tolist(), v.count_nonzero(-1).tolist()
        largest = size.topk(min(self.top, v.shape[1])).indices
        values = v.gather(1, largest).tolist()
        for owner, *norms, indices, of in zip(
            owners, l1, l0, largest.tolist(), values, strict=True
        ):
            features = [(k, x) for k, x in zip(indices, of, strict=True) if x]
            self.rows.setdefault(owner, []).append(
                dict(l1=norms[0], l0=norms[1], features=features)
            )

    def spell(
        self,
        owner: int,
        prompt: list[int],
        new: list[int],
        tokenizer: Tokenizer,
        labels: Labels | None,
    ) -> list:
        """Rows of one prompt with their tokens and explanations: every position but the first (<bos>)."""
        rows, explained = [], labels.explanations if labels else {}
        for i, (token, row) in enumerate(zip(prompt + new, self.rows[owner], strict=True)):
            features = [
                dict(feature=k, value=x, explanation=explained.get(k)) for k, x in row["features"]
            ]
            where = dict(
                position=i,
                part="prompt" if i < len(prompt) else "answer",
                token=piece(tokenizer, token),
            )
            rows.append(where | row | dict(features=features))
        return rows[1:]


def piece(tokenizer: Tokenizer, token: int) -> str:
    """A single token's text; for markup and parts of characters, its name."""
    text = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else tokenizer.id_to_token(token) or f"<{token}>"


def feature_line(f: dict) -> str:
    return f"{f['feature']}: {f['value']:.3g}" + (
        f" {f['explanation']}" if f["explanation"] else ""
    )


def print_trace(rows: list[dict]) -> None:
    print(
        f"\n{'token':>16}  {'L1':>7}  {'L0':>5}  features steered most (feature: value explanation)"
    )
    for row in rows:
        if row["part"] == "answer":
            features = "; ".join(map(feature_line, row["features"]))
            print(f"{row['token'][-14:]!r:>16}  {row['l1']:7.2f}  {row['l0']:5d}  {features}")


def write_trace(path: Path, traces: list[list[dict]], title: str) -> None:
    """One row a token (jsonl), or a page that shades each token by ‖v‖₁ and names the features where one points."""
    if path.suffix == ".jsonl":
        lines = (dict(prompt=i) | row for i, rows in enumerate(traces) for row in rows)
        write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return
    full = (
        float(np.quantile([row["l1"] for rows in traces for row in rows], 0.98)) or 1.0
    )  # the darkest shade
    body = []
    for i, rows in enumerate(traces):
        spans = []
        for row in rows:
            shade = min(9, int(10 * row["l1"] / full))
            lines = [
                f"‖v‖₁ {row['l1']:.3g}, {row['l0']} features",
                *map(feature_line, row["features"]),
            ]
            shown = html.escape(row["token"]).replace("\n", "↵\n")
            kind = " p" if row["part"] == "prompt" else ""
            spans.append(
                f'<span class="s{shade}{kind}" title="{html.escape(chr(10).join(lines))}">{shown}</span>'
            )
        body.append(f"<h2>Prompt {i}</h2>\n<p>{''.join(spans)}</p>")
    shades = "".join(f".s{i}{{background:rgba(214,69,80,{i * 0.075:.3f})}}" for i in range(10))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{html.escape(title)}</title>
<style>body{{font:16px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}}
p{{white-space:pre-wrap;overflow-wrap:anywhere}}.p{{color:#666}}{shades}</style>
<h1>{html.escape(title)}</h1>
<p>Each token is shaded by how strongly its own position was steered: ‖v‖₁ from 0 to {full:.3g} and above. Point at one
for the features steered most there. The prompt is grey.</p>
{chr(10).join(body)}
"""
    write_whole(path, page)


# --- text ---------------------------------------------------------------------------------------------------


def stable(tokenizer: Tokenizer, new: list[int]) -> str:
    """The text of new tokens that no further token changes: without the bytes at its end, which may be part of a
    character. A whole run of them waits, since one that turns out to be no text unmakes all of it.
    """
    end = len(new)
    while end and BYTE.fullmatch(tokenizer.id_to_token(new[end - 1]) or ""):
        end -= 1
    return tokenizer.decode(new[:end]).rstrip("\ufffd")


def answers(
    model,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    s: Settings,
    change: Change | None = None,
    watch: Callable | None = None,
    show: Callable[[int, str], None] = lambda i, text: None,
) -> list[list[int]]:
    """New tokens of each prompt. show: takes each prompt's text piece by piece, prompt after prompt in order."""
    new: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(prompts), s.batch_size):
        batch = prompts[first : first + s.batch_size]
        seen = (
            (lambda owners, v, first=first: watch([first + i for i in owners], v))
            if watch
            else None
        )
        ended, current, shown = decoding.end_of_turn(tokenizer), first, 0
        for chosen in decoding.decode(
            model, batch, s.max_new_tokens, ended, s.sampling, change, seen
        ):
            for i, token in chosen.items():
                new[first + i].append(token)
            while True:  # whoever is being shown, and, once that answer is over, those behind it
                going = current - first in chosen and not ended(new[current])
                text = stable(tokenizer, new[current])
                show(current, text[shown:])
                shown = len(text)
                if going or current + 1 == first + len(batch):
                    break
                show(current, tokenizer.decode(new[current])[shown:])
                current, shown = current + 1, 0
        for i in range(current, first + len(batch)):
            show(i, tokenizer.decode(new[i])[shown:])
            shown = 0
    return new


def ways(
    s: Settings, policy: Policy, change: Change | None
) -> Iterator[tuple[str, object, Change | None]]:
    """(name, model, change) of what --compare shows, left and right."""
    if policy.steered:
        yield "base", policy.base, None
        yield "steered", policy.steered, change
    elif policy.folder:
        own, revision = policy.settings, None if s.model else policy.settings.model_revision
        base = open_policy(None, s.model or own.model, None, None, s.device, s.dtype, revision).base
        yield "base", base, None
        yield "fine-tuned", policy.base, None
    else:
        raise UserError(
            f"--compare: {policy.name} is a base model; there is nothing to compare it with."
        )


def side_by_side(left: str, right: str, width: int) -> str:
    """Two texts in two columns of a terminal so wide."""
    column = max(20, (width - 3) // 2)

    def lines(text):
        return [line for long in text.split("\n") for line in textwrap.wrap(long, column) or [""]]

    left, right = lines(left), lines(right)
    pairs = (
        (x[i] if i < len(x) else "" for x in (left, right))
        for i in range(max(len(left), len(right)))
    )
    return "\n".join(f"{a:<{column}} | {b}".rstrip() for a, b in pairs)


def say(text: str) -> None:
    print(text, end="", flush=True)


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    conversations = [_turns("--prompt", dict(prompt=text)) for text in s.prompt]
    conversations += read_prompts(Path(s.prompts)) if s.prompts else []
    policy = open_policy(s.run, s.model, s.sae, s.sae_id, s.device, s.dtype)
    labels = None
    if s.labels and policy.steered:
        labels = load_labels(s.labels, policy.steered.sae, s.assume_labels_match)
    change, tokenizer, traces = part(s, policy, labels), policy.tokenizer, []
    head = decoding.header(tokenizer)

    def answer(model, conversations, change, show=lambda i, text: None):
        """Texts of the answers; what is steered goes into the trace."""
        prompts = [data.prompt_ids(tokenizer, turns) + head for turns in conversations]
        trace = Trace(s.top) if s.trace and model is policy.steered else None
        new = answers(model, tokenizer, prompts, s, change, trace, show)
        if trace:
            traces.extend(
                trace.spell(i, prompts[i], new[i], tokenizer, labels) for i in range(len(prompts))
            )
        return [tokenizer.decode(n) for n in new]

    def leave_trace(latest):
        if s.trace == "-":
            for rows in latest:
                print_trace(rows)
        elif s.trace:
            try:
                write_trace(Path(s.trace), traces, f"What steered {policy.name}")
            except OSError as e:
                raise UserError(f"--trace {s.trace}: cannot be written ({e}).") from e

    if not conversations:
        chat(answer, policy.model, change, lambda: leave_trace(traces[-1:]))
        return
    if s.compare:
        columns = [
            (name, answer(model, conversations, change))
            for name, model, change in ways(s, policy, change)
        ]
        width = shutil.get_terminal_size().columns
        for i, turns in enumerate(conversations):
            print(f"\n--- prompt\n{turns[-1][1]}\n")
            print(side_by_side(*(f"--- {name}\n{texts[i]}" for name, texts in columns), width))
    else:
        shown = []

        def show(i, text):
            if i not in shown:
                shown.append(i)
                say(
                    f"\n--- prompt\n{conversations[i][-1][1]}\n--- answer\n"
                    if len(conversations) > 1
                    else ""
                )
            say(text)

        answer(policy.model, conversations, change, show)
        print()
    leave_trace(traces)
    if s.trace and s.trace != "-":
        print(f"Written to {s.trace}", file=sys.stderr)


def chat(answer: Callable, model, change: Change | None, leave_trace: Callable[[], None]) -> None:
    """Turns from stdin until it ends; the whole conversation is the prompt of each answer."""
    turns: Turns = []
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            continue
        turns.append(("user", line))
        (text,) = answer(model, [turns], change, lambda i, text: say(text))
        print()
        leave_trace()
        turns.append(("model", text))


if __name__ == "__main__":
    cli.run(main)
