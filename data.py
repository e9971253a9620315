"""Preference rows -> rendered text -> token ids -> packed micro-batches.

The text is rendered as the authors' code renders it:

    prompt    <bos><start_of_turn>user\\n{content}<end_of_turn>\\n       (earlier turns alike)
    response  <start_of_turn>model\\n{content}<end_of_turn>\\n<eos>      (every token is scored)

The markup is inserted as token ids and the content is encoded as plain text, so that a literal
"<start_of_turn>" in a user's message stays text. For content without such literals the ids equal
those of the whole rendered string, because the tokenizer splits text at special tokens anyway.

A packed stream holds prompts with their continuations, without padding. Every forward pass reads
one, except a cached step of generation, which reads a Newest:

    tokens     p p p p w w w  l l l l  | next prompt ...
    position   0 1 2 3 4 5 6  4 5 6 7  | 0 1 ...
    attends    to its own prompt and its own continuation, causally; never to the other one

A preference pair is a prompt with two continuations, a multiple-choice question a prompt with k,
and text generation starts from a prompt with none. The shared prompt is computed once.
"""

import functools
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from kernels.attention import Bucket, Stretch, buckets
from runtime.messages import brief
from runtime.output import Arrays, cached_arrays
from runtime.progress import progress_bar, say
from runtime.rows import DataFile, data_files, decode_row, read_rows, split_of
from runtime.sources import UserError, sha256

ROLES = {"system": "system", "user": "user", "assistant": "model", "model": "model"}
SPECIAL = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
# Limit on the characters of one message, because the tokenizer needs gigabytes for far longer ones.
LONGEST_TEXT = 1 << 20
CACHE_FORMAT = "5"  # raise it when rendering or tokenising changes, so that old caches are not used


class Pair(NamedTuple):
    """Token ids of one preference: a prompt and its two responses."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """How many positions of a packed stream the pair takes; the prompt counts once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


# --- rows -----------------------------------------------------------------------------------------


Turns = list[tuple[str, str]]  # (role, content), role "user" or "model"


class Conversation(NamedTuple):
    """A valid row: the turns of the prompt and the two answers, all stripped of outer space."""

    prompt: Turns
    chosen: str
    rejected: str


def parse_row(where: str, row: dict) -> Conversation:
    """Validate one row. The usual layouts are three; prompt and answers may mix their forms:

    - `chosen` and `rejected` are whole conversations that agree in all turns but the last; a
      `prompt` beside them is ignored;
    - `prompt` is a list of turns, `chosen` and `rejected` are lists of one message (TRL's layout);
    - `prompt` is a string, which becomes one user turn, and `chosen` and `rejected` are strings.

    Raises UserError naming a row that has no such layout, because training must not guess.
    """
    sides = []
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise UserError(f"{where}: has no `{column}`.")
        sides.append(_turns(where, column, row[column], "model"))
    if isinstance(row["chosen"], str) is not isinstance(row["rejected"], str):
        raise UserError(f"{where}: `chosen` and `rejected` must be two lists or two strings.")
    if all(len(turns) == 1 and turns[0][0] == "model" for turns in sides):
        if row.get("prompt") is None:
            raise UserError(f"{where}: chosen and rejected are answers alone, without a `prompt`.")
        prompt = _turns(where, "prompt", row["prompt"], "user")
        sides = [prompt + turns for turns in sides]
    for column, turns in zip(("chosen", "rejected"), sides, strict=True):
        if not turns or turns[-1][0] != "model":
            raise UserError(f"{where}: `{column}` does not end with an assistant turn.")
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise UserError(f"{where}: chosen and rejected disagree on the prompt.")

    prompt = chosen[:-1]
    if prompt and prompt[0][0] == "system":
        if len(prompt) < 2 or prompt[1][0] != "user":
            raise UserError(f"{where}: a system message must be followed by a user turn.")
        # Gemma has no system role: the message is prefixed to the first user turn.
        prompt = [("user", f"{prompt[0][1].strip()}\n\n{prompt[1][1]}"), *prompt[2:]]
    if not prompt or prompt[-1][0] != "user" or any(role == "system" for role, _ in prompt):
        rule = "must end with a user turn, and only its first message may be a system message"
        raise UserError(f"{where}: the prompt {rule}.")
    prompt = [(role, content.strip()) for role, content in prompt]
    return Conversation(prompt, chosen[-1][1].strip(), rejected[-1][1].strip())


def _turns(where: str, column: str, given: object, role: str) -> Turns:
    """A column as turns; a string becomes one turn of the given role."""
    if isinstance(given, str):
        given = [dict(role=role, content=given)]
    if not isinstance(given, list):
        raise UserError(f"{where}: `{column}` must be a list of {{role, content}} or a string.")
    for turn in given:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise UserError(f"{where}: `{column}` holds a turn without text content.")
        if not isinstance(turn.get("role"), str) or turn["role"] not in ROLES:
            named, known = brief(repr(turn.get("role"))), ", ".join(ROLES)
            raise UserError(f"{where}: unknown role {named}; one of {known} was expected.")
        if len(turn["content"]) > LONGEST_TEXT:
            raise UserError(f"{where}: `{column}` holds more than {LONGEST_TEXT:,} characters.")
        try:
            turn["content"].encode()
        except UnicodeEncodeError as e:
            what = "half a character (a lone surrogate)"
            raise UserError(f"{where}: `{column}` holds {what}.") from e
    return [(ROLES[turn["role"]], turn["content"]) for turn in given]


# --- token ids ------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json of a model folder. Raises UserError where it has no Gemma chat tokens."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{path}: not a readable tokenizer.json ({e}).") from e
    for token in SPECIAL:
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{path}: has no token {token}; a Gemma chat tokenizer was expected.")
    return tokenizer


class Encoder:
    """Turns -> token ids. Markup inside a message is encoded as text.

    `learn` encodes many turns in a few calls, which is fast; the other methods look up what it has
    encoded.
    """

    def __init__(self, tokenizer: Tokenizer):
        # A copy, because the switch below would change the caller's tokenizer.
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.bos, self.eos, self.start, self.end = map(tokenizer.token_to_id, SPECIAL)
        self.newline = self.tokenizer.encode("\n", add_special_tokens=False).ids
        self.ids: dict[tuple[str, str], list[int]] = {}

    def learn(self, turns: Turns, progress: bool = False) -> None:
        """Encode every turn that prompt and response will be asked for."""
        turns = list(dict.fromkeys(turns))
        how = dict(total=len(turns), desc="tokenising", unit="text", leave=False, shown=progress)
        with progress_bar(**how) as bar:
            for i in range(0, len(turns), 1000):
                part = turns[i : i + 1000]
                texts = [f"{role}\n{content}" for role, content in part]
                encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
                self.ids.update((turn, e.ids) for turn, e in zip(part, encodings, strict=True))
                bar.update(len(part))

    def turn(self, turn: tuple[str, str]) -> list[int]:
        return [self.start, *self.ids[turn], self.end, *self.newline]

    def prompt(self, turns: Turns) -> list[int]:
        return [self.bos, *chain.from_iterable(map(self.turn, turns))]

    def response(self, content: str) -> list[int]:
        return [*self.turn(("model", content)), self.eos]


def header_ids(tokenizer: Tokenizer) -> list[int]:
    """Token ids of "<start_of_turn>model\\n", the markup before an answer to generate."""
    start = tokenizer.token_to_id("<start_of_turn>")
    return [start, *tokenizer.encode("model\n", add_special_tokens=False).ids]


def truncate(pair: Pair, max_length: int, max_prompt_length: int) -> Pair:
    """Shorten a pair of which prompt + longer response exceed max_length.

    First the prompt keeps its last max_prompt_length tokens, and so loses <bos>. If that is not
    enough, each response keeps its first max_length - max_prompt_length tokens.
    """
    prompt, chosen, rejected = pair
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer > max_length:
        prompt = prompt[-max_prompt_length:]
    if len(prompt) + longer > max_length:
        limit = max_length - max_prompt_length
        chosen, rejected = chosen[:limit], rejected[:limit]
    return Pair(prompt, chosen, rejected)


def load_pairs(
    source: str | Path,
    tokenizer: Tokenizer,
    max_length: int = 2048,
    max_prompt_length: int = 1800,
    split: str | None = None,
    progress: bool = False,
    on_bad_row: str = "error",
) -> list[Pair]:
    """Preference pairs of a source as token ids, truncated.

    split: "train", "test", or None for all rows. on_bad_row: "error", or "skip" to leave malformed
    rows out. progress: print which rows are used, and show a bar while tokenising. Untruncated ids
    are cached on disk under the hash of the files' and the tokenizer's content.

    Raises UserError naming a malformed row, and for limits that leave a response no token.
    """
    if not 0 < max_prompt_length < max_length:
        most = f"must be less than --max-length {max_length}"
        raise UserError(f"--max-prompt-length {max_prompt_length}: {most}.")
    files, _ = data_files(source)
    key = [CACHE_FORMAT, split, on_bad_row, tokenizer.to_str()]
    key += [f"{file.path.name} {file.split} {sha256(file.path)}" for file in files]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    stored = cached_arrays(
        f"pairs-{digest[:32]}",
        lambda: _tokenise(files, tokenizer, split, progress, on_bad_row),
    )
    if progress:
        for sentence in stored["said"].tolist():
            say(f"{source}: {sentence}", sys.stderr)

    # All lists share one int object for each token id: 8 bytes a token instead of 36.
    shared = list(range(tokenizer.get_vocab_size(with_added_tokens=True)))
    ids = [shared[i] for i in stored["ids"]]
    ends = np.cumsum(stored["lengths"]).tolist()
    parts = [ids[start:end] for start, end in pairwise([0, *ends])]
    pairs = map(Pair, parts[0::3], parts[1::3], parts[2::3])
    return [truncate(pair, max_length, max_prompt_length) for pair in pairs]


def _tokenise(
    files: list[DataFile], tokenizer: Tokenizer, split: str | None, progress: bool, on_bad_row: str
) -> Arrays:
    """The rows of a split as arrays that a cache can hold.

    ids: all token ids. lengths: how many of them belong to the first prompt, its chosen and its
    rejected response, the second prompt, ... said: sentences on the rows used and left out.
    """
    rows, bad, splits = [], [], Counter()
    for file in files:
        for where, raw in read_rows(file.path):
            try:
                row = decode_row(where, raw)
                own = split_of(row, file)
                if split in (None, own):
                    rows.append(parse_row(where, row))
                splits[own] += 1  # not if parse_row has refused it
            except UserError:
                if on_bad_row == "error":
                    raise
                bad.append(where)

    encoder = Encoder(tokenizer)
    turns = [*chain.from_iterable(row.prompt for row in rows)]
    turns += [("model", answer) for row in rows for answer in (row.chosen, row.rejected)]
    encoder.learn(turns, progress)
    parts = []
    for row in rows:
        answers = [encoder.response(answer) for answer in (row.chosen, row.rejected)]
        parts += [encoder.prompt(row.prompt), *answers]
    return {
        "ids": np.fromiter(chain.from_iterable(parts), dtype=np.int32),
        "lengths": np.array([len(part) for part in parts], dtype=np.int32),
        "said": np.array(_said(rows, split, splits, bad), dtype=np.str_),
    }


def _said(rows: list[Conversation], split: str | None, splits: Counter, bad: list[str]) -> list:
    """Sentences on the rows used and left out. splits: rows of each split in the files."""
    used = [f"{n:,} {name}" for name, n in splits.items() if split in (None, name)]
    left = [f"{n:,} {name}" for name, n in splits.items() if split not in (None, name)]
    used = ", ".join(used) or f"0 {split or ''}".strip()
    said = [f"rows used: {used}" + (f"; left out: {', '.join(left)}." if left else ".")]
    empty = sum((not row.chosen) + (not row.rejected) for row in rows)
    if empty:
        said.append(f"{empty} responses are empty; their markup alone is scored.")
    if bad:
        where = ", ".join(bad[:10]) + (", ..." if len(bad) > 10 else "")
        said.append(f"{len(bad)} malformed rows are left out: {where}.")
    return said


# --- batches --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of n pairs in an epoch. It depends on the arguments alone, not on the processes."""
    if not shuffle:
        return list(range(n))
    return np.random.default_rng((seed, epoch)).permutation(n).tolist()


def microbatches(pairs: Sequence[Pair], tokens: int) -> list[list[int]]:
    """Distribute pairs over micro-batches of at most `tokens` tokens; returns indices into pairs.

    First-fit, the longest pair first, which needs few micro-batches. A pair that is longer than
    `tokens` gets one to itself.
    """
    batches: list[list[int]] = []
    free: list[int] = []  # tokens that each batch may still take
    for index in _longest_first(pairs):
        size = pairs[index].tokens
        fits = next((i for i, left in enumerate(free) if left >= size), None)
        if fits is None:
            fits = len(batches)
            batches.append([])
            free.append(tokens)
        batches[fits].append(index)
        free[fits] -= size
    return batches


def shares(pairs: Sequence[Pair], processes: int) -> list[list[int]]:
    """Distribute pairs over processes; returns indices into pairs for each.

    The longest pair first, each pair goes to the process with the fewest tokens so far. With fewer
    pairs than processes, some get none.
    """
    indices, tokens = [[] for _ in range(processes)], [0] * processes
    for index in _longest_first(pairs):
        least = tokens.index(min(tokens))
        indices[least].append(index)
        tokens[least] += pairs[index].tokens
    return indices


def _longest_first(pairs: Sequence[Pair]) -> list[int]:
    return sorted(range(len(pairs)), key=lambda i: -pairs[i].tokens)


def positions(pairs: Sequence[Pair]) -> int:
    """How many positions prompt + chosen and prompt + rejected have: a prompt counts twice."""
    return sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)


class Packed(NamedTuple):
    """One stream of T tokens, with N targets to score in C continuations."""

    tokens: Tensor  # int64 [T]
    position: Tensor  # int64 [T], counted from the prompt's first token
    tree: Tensor  # int64 [T], which prompt
    branch: Tensor  # int64 [T], 0 in a prompt, 1.. in its continuations
    # float32 [T], how many of the unpacked sequences (prompt + one continuation) hold the position
    copies: Tensor
    target: Tensor  # int64 [N], token ids to score: every continuation token, in order
    source: Tensor  # int64 [N], index in the stream whose hidden state predicts the target
    sequence: Tensor  # int64 [N], which continuation the target belongs to, 0..C-1 in packing order
    lengths: Tensor  # int64 [C], tokens of each continuation
    buckets: tuple[Bucket, ...]  # queries with their keys, for attention.plain

    def to(self, device: torch.device | str) -> "Packed":
        """The same layout on another device; on CUDA without buckets, which only the CPU needs."""
        if torch.device(device).type == "cpu":
            return self
        tensors = (x.to(device, non_blocking=True) for x in self[:-1])
        return Packed(*tensors, buckets=())


class Newest(NamedTuple):
    """One new token of each of B sequences: the fields of Packed that a cached forward reads."""

    tokens: Tensor  # int64 [B]
    position: Tensor  # int64 [B]


# A prompt's token ids, and those of each of its continuations.
Tree = tuple[Sequence[int], Sequence[Sequence[int]]]


def pack(trees: Sequence[Tree]) -> Packed:
    """Lay prompts and their continuations into one stream.

    Raises ValueError for a prompt without a token, since nothing would predict its continuations.
    """
    tokens, position, tree, branch, copies, source, lengths = [], [], [], [], [], [], []
    stretches = []
    for index, (prompt, continuations) in enumerate(trees):
        if not len(prompt):
            raise ValueError(f"prompt {index} has no tokens")
        start, p = len(tokens), len(prompt)
        tokens += prompt
        position += range(p)
        branch += [0] * p
        copies += [max(1, len(continuations))] * p
        stretches.append(Stretch(start, p, start, 0))
        for c, continuation in enumerate(continuations, start=1):
            first, n = len(tokens), len(continuation)
            tokens += continuation
            position += range(p, p + n)
            branch += [c] * n
            copies += [1] * n
            # The prompt's last position predicts the first token of each continuation.
            source += [start + p - 1, *range(first, first + n - 1)][:n]
            lengths.append(n)
            if n:
                stretches.append(Stretch(first, n, start, p))
        tree += [index] * (len(tokens) - start)

    tokens, position, branch = map(torch.tensor, (tokens, position, branch))
    lengths = torch.tensor(lengths, dtype=torch.int64)
    return Packed(
        tokens=tokens,
        position=position,
        tree=torch.tensor(tree),
        branch=branch,
        copies=torch.tensor(copies, dtype=torch.float32),
        source=torch.tensor(source, dtype=torch.int64),
        target=tokens[branch > 0],
        sequence=torch.repeat_interleave(lengths),
        lengths=lengths,
        buckets=buckets(stretches),
    )


def pack_pairs(pairs: Sequence[Pair]) -> Packed:
    """Pack pairs; the continuations are chosen 0, rejected 0, chosen 1, rejected 1, ..."""
    return pack([(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs])
