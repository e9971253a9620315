"""Preference rows -> rendered text -> token ids -> packed micro-batches, as the authors' code scores them.

    prompt    <bos><start_of_turn>user\\n{content}<end_of_turn>\\n            (earlier turns alike)
    response  <start_of_turn>model\\n{content}<end_of_turn>\\n<eos>           (every token of it is scored)

The markup is put in as token ids and the content between as plain text, so that a literal
"<start_of_turn>" inside a user's words stays words. For all other content the ids equal those of the
whole rendered string, because special tokens split the text in any case.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tqdm import tqdm

from packed import Packed, pack
from runtime.sources import UserError, fetch, sha256

ROLES = {"system": "system", "user": "user", "assistant": "model", "model": "model"}
SPLIT = re.compile(r"(?:^|[/._-])(train|test|validation)(?=[/._-])")
CACHE_FORMAT = "2"  # raise when rendering or tokenising changes, so that old caches are not used


class Pair(NamedTuple):
    """Token ids of one preference: both responses continue the prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Positions the pair takes in a packed stream (the prompt once)."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


class Conversation(NamedTuple):
    """A row after validation: (role, stripped content) turns of the prompt, and the two answers."""

    prompt: list[tuple[str, str]]
    chosen: str
    rejected: str


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of a model folder. Raises UserError when it is missing or lacks Gemma's special tokens."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{path}: not a readable tokenizer.json ({e}).") from e
    for token in ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{path}: has no token {token}; a Gemma-2 chat tokenizer was expected.")
    return tokenizer


# --- rows ---------------------------------------------------------------------------------------------------


class DataFile(NamedTuple):
    path: Path
    split: str | None  # that its name, or a folder's within the source, says all its rows belong to


def data_files(
    source: str, split: str | None = None, revision: str | None = None
) -> tuple[list[DataFile], str | None]:
    """The parquet and jsonl files of a source that may hold rows of `split`, sorted, and the Hub commit.

    A file that names another split (data/test-00000-of-00001.parquet) is left out; one that names none may
    carry a `split` column. Raises UserError when the source holds no such files at all.
    """
    root, commit = fetch(source, "data", ["*.parquet", "*.jsonl"], revision)
    if root.is_file():
        if root.suffix not in (".parquet", ".jsonl"):
            raise UserError(f"{root}: a .parquet or .jsonl file was expected.")
        found = {root: root.name}
    else:
        paths = sorted(p for p in root.rglob("*") if p.suffix in (".parquet", ".jsonl"))
        found = {p: p.relative_to(root).as_posix() for p in paths}
    if not found:
        raise UserError(f"{root}: holds no .parquet or .jsonl file.")
    files = [DataFile(path, (SPLIT.findall(name) or [None])[-1]) for path, name in found.items()]
    return [file for file in files if split is None or file.split in (split, None)], commit


def read_rows(
    files: Iterable[DataFile], split: str | None
) -> Iterator[tuple[str, dict | UserError]]:
    """(where, row) for each row of `split`; `where` names file and row for messages. A row that is no object is the
    mistake to raise.

    Files with neither a split in their name nor a `split` column count as train.
    """
    for path, named in files:
        for number, row in enumerate(_parquet(path) if path.suffix == ".parquet" else _jsonl(path)):
            where = f"{path.name} row {number}"
            if isinstance(row, bytes):
                row = _json_row(where, row)
            itself = row.get("split", "train") if isinstance(row, dict) else "train"
            if split is None or named == split or (named is None and itself == split):
                yield where, row


def _parquet(path: Path) -> Iterator[dict]:
    try:
        with pq.ParquetFile(path) as file:
            wanted = [
                c for c in ("prompt", "chosen", "rejected", "split") if c in file.schema_arrow.names
            ]
            for batch in file.iter_batches(columns=wanted):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as e:  # ValueError: text that is not UTF-8
        raise UserError(f"{path}: not a readable parquet file ({e}).") from e


def _jsonl(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as lines:
            yield from lines
    except OSError as e:
        raise UserError(f"{path}: not a readable jsonl file ({e}).") from e


def _json_row(where: str, line: bytes) -> dict | UserError:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as e:
        return UserError(f"{where}: not a line of json ({e}).")
    return (
        row
        if isinstance(row, dict)
        else UserError(f"{where}: an object with chosen and rejected was expected.")
    )


def parse_row(where: str, row: dict | UserError) -> Conversation:
    """Validate one row. Raises UserError naming it for anything a training run should not guess about."""
    if isinstance(row, UserError):
        raise row
    conversation = _parse(where, row)
    try:
        "".join(
            [*(c for _, c in conversation.prompt), conversation.chosen, conversation.rejected]
        ).encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: holds half of a character (a lone surrogate): {e}.") from e
    return conversation


def _parse(where: str, row: dict) -> Conversation:
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise UserError(f"{where}: has no `{column}`.")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(row.get("prompt"), str):
            raise UserError(
                f"{where}: chosen and rejected are strings, so a string `prompt` was expected."
            )
        return Conversation([("user", row["prompt"].strip())], chosen.strip(), rejected.strip())
    chosen, rejected = _turns(where, "chosen", chosen), _turns(where, "rejected", rejected)
    for column, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1][0] != "model":
            raise UserError(f"{where}: `{column}` does not end with an assistant turn.")
    if chosen[:-1] != rejected[:-1]:
        raise UserError(
            f"{where}: chosen and rejected disagree on the prompt; all turns but the last must agree."
        )
    prompt = chosen[:-1]
    if prompt and prompt[0][0] == "system":
        if len(prompt) < 2 or prompt[1][0] != "user":
            raise UserError(f"{where}: a system message must be followed by a user turn.")
        # Gemma has no system role: it is prefixed to the first user turn.
        prompt = [("user", f"{prompt[0][1].strip()}\n\n{prompt[1][1]}"), *prompt[2:]]
    if not prompt or prompt[-1][0] != "user" or any(role == "system" for role, _ in prompt):
        raise UserError(
            f"{where}: the prompt must end with a user turn, a system message may only come first."
        )
    return Conversation(
        [(r, c.strip()) for r, c in prompt], chosen[-1][1].strip(), rejected[-1][1].strip()
    )


def _turns(where: str, column: str, turns: object) -> list[tuple[str, str]]:
    if not isinstance(turns, list):
        raise UserError(
            f"{where}: `{column}` must be a list of {{role, content}}, or a string beside a `prompt`."
        )
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise UserError(f"{where}: `{column}` holds a turn without text content.")
        if not isinstance(turn.get("role"), str) or turn["role"] not in ROLES:
            raise UserError(
                f"{where}: unknown role {turn.get('role')!r}; one of {', '.join(ROLES)} was expected."
            )
    return [(ROLES[turn["role"]], turn["content"]) for turn in turns]


# --- tokens -------------------------------------------------------------------------------------------------


class _Encoder:
    """Text pieces -> ids in batch calls; special tokens inside a piece are encoded as text."""

    def __init__(self, tokenizer: Tokenizer):
        # A copy, because the switch below would change the caller's tokenizer.
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        ids = {
            name: tokenizer.token_to_id(f"<{name}>")
            for name in ("bos", "eos", "start_of_turn", "end_of_turn")
        }
        self.bos, self.eos, self.start, self.end = ids.values()

    def __call__(self, texts: list[str], progress: bool = False) -> dict[str, list[int]]:
        unique = list(dict.fromkeys(texts))
        bar = tqdm(
            total=len(unique), desc="tokenising", unit="text", disable=not progress, leave=False
        )
        found = {}
        for i in range(0, len(unique), 1000):
            part = unique[i : i + 1000]
            for text, encoding in zip(
                part, self.tokenizer.encode_batch(part, add_special_tokens=False), strict=True
            ):
                found[text] = encoding.ids
            bar.update(len(part))
        bar.close()
        return found

    def prompt(self, turns: list[tuple[str, str]], ids: dict[str, list[int]]) -> list[int]:
        turn_ids = ([self.start, *ids[f"{r}\n{c}"], self.end, *ids["\n"]] for r, c in turns)
        return [self.bos, *chain.from_iterable(turn_ids)]

    def response(self, content: str, ids: dict[str, list[int]]) -> list[int]:
        return [self.start, *ids[f"model\n{content}"], self.end, *ids["\n"], self.eos]


def prompt_ids(tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> list[int]:
    """Token ids of a prompt of (role, content) turns, role "user" or "model": what Conversation.prompt becomes."""
    encoder = _Encoder(tokenizer)
    turns = [(role, content.strip()) for role, content in turns]
    return encoder.prompt(
        turns, encoder(["\n", *(f"{role}\n{content}" for role, content in turns)])
    )


def truncate(pair: Pair, max_length: int, max_prompt_length: int) -> Pair:
    """Where prompt + longer response exceed max_length, the prompt keeps its last max_prompt_length tokens; where
    that is not enough, each response keeps its first max_length - max_prompt_length.
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
    source: str,
    tokenizer: Tokenizer,
    max_length: int = 2048,
    max_prompt_length: int = 1800,
    split: str | None = None,
    revision: str | None = None,
    progress: bool = False,
    on_bad_row: str = "error",
) -> list[Pair]:
    """Preference pairs of a source as token ids, truncated. split: "train", "test", or None for all rows.

    Untruncated ids are cached on disk under the hash of the files' and the tokenizer's content. Raises UserError
    naming the row for anything malformed (on_bad_row "skip": leaves it out, and says how many and where), and for
    limits that leave a response no token.
    """
    if not 0 < max_prompt_length < max_length:
        raise UserError(
            f"--max-prompt-length {max_prompt_length}: must be from 1 to --max-length {max_length} - 1."
        )
    files, _ = data_files(source, split, revision)
    key = hashlib.sha256(repr((CACHE_FORMAT, split, on_bad_row, tokenizer.to_str())).encode())
    for file in files:
        key.update(f"{file.path.name} {file.split} {sha256(file.path)}".encode())
    cache = cache_folder() / f"pairs-{key.hexdigest()[:32]}.npz"
    stored = _read_cache(cache)
    if stored is None:
        stored = _tokenise(files, tokenizer, split, progress, on_bad_row)
        _write_cache(cache, stored)
    if stored["empty"] and progress:
        print(
            f"{source}: {stored['empty']} responses are empty; their markup alone is scored.",
            file=sys.stderr,
        )
    if len(bad := stored["bad"]) and progress:
        where = ", ".join(bad[:10].tolist()) + (", ..." if len(bad) > 10 else "")
        print(f"{source}: {len(bad)} malformed rows are left out: {where}.", file=sys.stderr)
    # Lists of shared int objects: 8 bytes a token, where fresh ones would take 36.
    shared = list(range(tokenizer.get_vocab_size(with_added_tokens=True)))
    ids = [shared[i] for i in stored["ids"]]
    ends = np.cumsum(stored["lengths"]).tolist()
    parts = [ids[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)] if ends else []
    rows = zip(parts[0::3], parts[1::3], parts[2::3], strict=True)
    return [truncate(Pair(*row), max_length, max_prompt_length) for row in rows]


def _tokenise(
    files: list[DataFile], tokenizer: Tokenizer, split: str | None, progress: bool, on_bad_row: str
) -> dict[str, np.ndarray]:
    """All rows as one flat array of ids with the lengths of prompt, chosen, rejected in turn; bad: rows left out."""
    rows, bad = [], []
    for where, row in read_rows(files, split):
        try:
            rows.append(parse_row(where, row))
        except UserError:
            if on_bad_row == "error":
                raise
            bad.append(where)
    encoder = _Encoder(tokenizer)
    texts = ["\n"]
    for row in rows:
        texts += [f"{role}\n{content}" for role, content in row.prompt]
        texts += [f"model\n{row.chosen}", f"model\n{row.rejected}"]
    ids = encoder(texts, progress)
    parts = []
    for row in rows:
        parts.append(encoder.prompt(row.prompt, ids))
        parts += [encoder.response(answer, ids) for answer in (row.chosen, row.rejected)]
    return {
        "ids": np.fromiter(chain.from_iterable(parts), dtype=np.int32),
        "lengths": np.array([len(part) for part in parts], dtype=np.int32),
        "empty": np.array(sum((not r.chosen) + (not r.rejected) for r in rows)),
        "bad": np.array(bad, dtype=np.str_),
    }


def cache_folder() -> Path:
    """$FSRL_CACHE, or fsrl/ in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fsrl"
    return Path(os.environ.get("FSRL_CACHE") or default)


def _read_cache(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as npz:
            stored = {name: npz[name] for name in ("ids", "lengths", "empty", "bad")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged: it is made again
    return stored if stored["lengths"].sum() == len(stored["ids"]) else None


def _write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    part = path.with_name(f"{path.stem}-{os.getpid()}.part.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, **arrays)
        os.replace(part, path)
    except OSError as e:  # a cache is a convenience: training goes on without it
        with contextlib.suppress(OSError):
            part.unlink()
        print(f"Tokens were not cached in {path.parent} ({e}).", file=sys.stderr)


# --- batches ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Which pair comes when: a function of (seed, epoch) alone, whatever the number of processes."""
    return (
        np.random.default_rng((seed, epoch)).permutation(n).tolist() if shuffle else list(range(n))
    )


def microbatches(pairs: list[Pair], tokens_per_microbatch: int) -> list[list[int]]:
    """Distribute pairs, by their indices, over as few micro-batches as first-fit by falling length finds.

    Each holds at most tokens_per_microbatch tokens; a pair longer than that stands alone.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(pairs)), key=lambda i: -pairs[i].tokens):
        tokens = pairs[index].tokens
        fits = next((i for i, r in enumerate(room) if r >= tokens), None)
        if fits is None:
            bins.append([index])
            room.append(tokens_per_microbatch - tokens)
        else:
            bins[fits].append(index)
            room[fits] -= tokens
    return bins


def shares(pairs: list[Pair], processes: int) -> list[list[int]]:
    """Which pairs, by their indices, each process scores: by falling length, each to the one with the fewest tokens.

    Where the pairs are fewer than the processes, some get none.
    """
    shares, tokens = [[] for _ in range(processes)], [0] * processes
    for index in sorted(range(len(pairs)), key=lambda i: -pairs[i].tokens):
        least = tokens.index(min(tokens))
        shares[least].append(index)
        tokens[least] += pairs[index].tokens
    return shares


def pack_pairs(pairs: list[Pair]) -> Packed:
    """Continuations stand in the order chosen 0, rejected 0, chosen 1, rejected 1, ..."""
    return pack([(p.prompt, (p.chosen, p.rejected)) for p in pairs])


def positions(pairs: list[Pair]) -> int:
    """Positions of the unshared sequences: a prompt's count once for each response."""
    return sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
