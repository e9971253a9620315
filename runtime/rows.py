"""Read rows from files: those of a data set one at a time, those of a label file all at once."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from runtime.messages import brief
from runtime.sources import UserError, fetch

# --- a data set: parquet and jsonl ----------------------------------------------------------------

SPLITS = ("train", "test")  # train_prefs and the like count as these: see split_name
# The split in a file's path: train-00000.parquet, data/test/0.jsonl.
NAMED_SPLIT = re.compile(r"(?:^|[/._-])(train|test|validation)(?=[/._-])", re.IGNORECASE)
SUFFIXES = (".parquet", ".jsonl")
LONGEST_LINE = 1 << 24  # limit on the bytes of one line of jsonl


class DataFile(NamedTuple):
    path: Path
    split: str | None  # the split that its path names, for rows without a `split` of their own


def data_files(source: str | Path) -> tuple[list[DataFile], str | None]:
    """The parquet and jsonl files of a source, sorted, and the commit of a Hub data set (or None).

    Folders are searched at any depth. Names that begin with a dot or an underscore are left out,
    because Spark and the Hub's client mark their own files so. Raises UserError for no files.
    """
    root, commit = fetch(source, "data", [f"*{suffix}" for suffix in SUFFIXES])
    # Spark writes a folder that is itself called NAME.parquet, and its name may state the split.
    above = root.parent if root.suffix in SUFFIXES else root
    files = []
    for path in sorted([root, *root.rglob("*")]):
        inside = path.relative_to(root).parts
        if any(part.startswith((".", "_")) for part in inside):
            continue
        if path.suffix in SUFFIXES and path.is_file():
            named = NAMED_SPLIT.findall(path.relative_to(above).as_posix())
            files.append(DataFile(path, split_name(named[-1]) if named else None))
    if not files:
        raise UserError(f"{root}: holds no {' or '.join(SUFFIXES)} file.")
    return files, commit


def split_name(given: object) -> str:
    """A split's name in lower case; train_prefs becomes train, and test_prefs becomes test."""
    name = brief(given).strip().lower()
    return next((split for split in SPLITS if re.match(rf"{split}(_|$)", name)), name)


def split_of(row: dict, file: DataFile) -> str:
    """The row's own `split`; without one, the split in the file's path; without both, train."""
    own = row.get("split")
    return split_name(own) if own is not None else file.split or "train"


def read_rows(path: Path) -> Iterator[tuple[str, dict | bytes]]:
    """Yield (where, row) for each row of a file; `where` names file and row in messages.

    A row of parquet is a dict. A row of jsonl is its line, still to be decoded by decode_row, and
    cut off after LONGEST_LINE + 1 bytes. Raises UserError for a file that cannot be read.
    """
    try:
        rows = _parquet(path) if path.suffix == ".parquet" else _lines(path)
        for number, row in enumerate(rows):
            yield f"{path.name} row {number}", row
    except (OSError, ValueError, pa.ArrowException) as e:  # ValueError: text that is not UTF-8
        raise UserError(f"{path}: not a readable {path.suffix[1:]} file ({brief(e)}).") from e


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            rest = line  # skip the rest of a line that is too long
            while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST_LINE + 1)
            if line.strip():
                yield line


def _parquet(path: Path) -> Iterator[dict]:
    with pq.ParquetFile(path) as file:
        columns = ("prompt", "chosen", "rejected", "split")
        there = [column for column in columns if column in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=1024, columns=there):
            yield from batch.to_pylist()


def decode_row(where: str, row: dict | bytes) -> dict:
    """A row of read_rows as a dict. Raises UserError naming a row that is not a json object."""
    if isinstance(row, bytes):
        if len(row) > LONGEST_LINE:
            raise UserError(f"{where}: the line is longer than {LONGEST_LINE >> 20} MB.")
        try:
            row = json.loads(row.decode("utf-8-sig"))
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: not a line of json ({brief(e)}).") from e
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a json object.")
    return row


# --- labels and explanations: jsonl, json and csv, gzipped or not ---------------------------------

KINDS = ("jsonl.gz", "json.gz", "csv.gz", "jsonl", "json", "csv")  # suffixes that read understands
LARGEST = 1 << 30  # bytes of an unpacked file; a million explanations take about 0.2 GB


def read(path: str | Path, file: BinaryIO | None = None) -> list[dict]:
    """The rows of a file as dicts; its name says how to read it.

    file: an open stream, to be read in place of the path. A json file holds a list of objects, or
    an object of objects, each of which is a row with its key as `category`. Raises UserError naming
    the file and the line that cannot be read.
    """
    text = read_text(path, file)
    name = str(path).removesuffix(".gz")
    number = 0
    try:
        if name.endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(text)))
        elif name.endswith(".json"):
            rows = json.loads(text)
            if isinstance(rows, dict) and all(isinstance(v, dict | None) for v in rows.values()):
                rows = [{"category": key, **value} for key, value in rows.items() if value]
        else:
            rows = []
            # Not splitlines, which also splits at U+2028: json allows that inside a string.
            for line in text.split("\n"):
                number += 1
                if line.strip():
                    rows.append(json.loads(line))
    except (ValueError, csv.Error, RecursionError) as e:
        where = f"line {number}" if number else "the file"
        raise UserError(f"{path}: {where} cannot be parsed ({e}).") from e
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: a list of objects was expected.")
    return rows


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file. Raises UserError for anything else: a named pipe, say, would block."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot be read (it is not a regular file).")
        return open(path, "rb")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}).") from e


def read_text(path: str | Path, file: BinaryIO | None = None) -> str:
    """A file's text, unpacked; file: as in read. Raises UserError naming the file."""
    try:
        with file or open_file(path) as packed:
            unpacked = gzip.open(packed) if str(path).endswith(".gz") else packed
            data = unpacked.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"{path}: unpacks to more than {LARGEST >> 20:,} MB.")
        return data.decode("utf-8-sig")  # spreadsheets begin a csv file with a byte order mark
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e}).") from e
