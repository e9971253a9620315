"""Read rows from a jsonl, json or csv file, gzipped or not."""

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import BinaryIO

from runtime.sources import UserError

KINDS = ("jsonl.gz", "json.gz", "csv.gz", "jsonl", "json", "csv")  # suffixes of files we read
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
