"""Sources: a name (`tiny`, a local path, or a Hugging Face Hub id) becomes a local folder of files.

Everything this project reads comes through `fetch`. `tiny` is the embedded world, a local path wins over
the Hub; downloads are pinned to the commit they resolved to, which the caller records.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

TINY = Path(__file__).resolve().parents[1] / "tiny"
LARGEST_JSON = 64 << 20  # bytes; a 27B model's index has 50 thousand
FILES = (".jsonl", ".json", ".parquet", ".npz", ".safetensors")  # no Hub repository's name ends so
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
REPO_TYPE = {
    "model": "model",
    "sae": "model",
    "data": "dataset",
    "init-adapter": "model",
    "run": "model",
    "explanations": "dataset",
}


class UserError(Exception):
    """A person's mistake: one sentence naming the file, row or flag. Scripts print it and exit with 2."""


class Source(NamedTuple):
    path: Path  # a local folder, or one local file when the name was a file's path
    revision: str | None  # commit of a Hub download, None for local files


def fetch(name: str | Path, kind: str, patterns: list[str], revision: str | None = None) -> Source:
    """Make the files of `name` that match `patterns` available locally.

    kind: a key of REPO_TYPE; it is the flag's name, and picks the folder of the embedded `tiny`.
    revision: branch, tag or commit on the Hub; ignored for local paths.
    Raises UserError when the name is neither a path nor a Hub id, or when the Hub cannot serve it.
    """
    path = Path(name).expanduser()
    if path.suffix in FILES and not path.exists():
        raise UserError(f"--{kind} {name}: there is no such file.")
    if str(name) == "tiny" and (TINY / kind).is_dir():
        return Source(TINY / kind, None)
    if path.exists():
        return Source(path, None)
    if not HUB_ID.fullmatch(str(name)) or ".." in str(name):
        raise UserError(
            f"--{kind} {name}: no such file or folder, and not a Hub id of the form owner/name."
        )
    return _download(str(name), kind, patterns, revision)


def _download(repo: str, kind: str, patterns: list[str], revision: str | None) -> Source:
    from huggingface_hub import snapshot_download

    with _hub_errors(repo, kind, revision):
        # A dead network falls back on the cached snapshot inside snapshot_download itself.
        folder = snapshot_download(
            repo, repo_type=REPO_TYPE[kind], revision=revision, allow_patterns=patterns
        )
    return Source(Path(folder), Path(folder).name)  # snapshots are stored under their commit hash


def list_files(repo: str, kind: str, revision: str | None = None) -> list[str]:
    """Paths of all files in a Hub repository; from the cache when the Hub is down and a download left them there.

    Raises UserError when it cannot be listed.
    """
    from huggingface_hub import errors, get_cached_repo_tree, list_repo_files, resolve_revision

    with _hub_errors(repo, kind, revision):
        commit = resolve_revision(repo, repo_type=REPO_TYPE[kind], revision=revision)
        try:
            return [
                f.path
                for f in get_cached_repo_tree(repo, repo_type=REPO_TYPE[kind], revision=commit)
            ]
        except errors.CachedRepoTreeNotFoundError:
            return list_repo_files(repo, repo_type=REPO_TYPE[kind], revision=commit)


@contextmanager
def _hub_errors(repo: str, kind: str, revision: str | None) -> Iterator[None]:
    """What the Hub's client raises, as a UserError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as e:
        raise UserError(
            f"--{kind} {repo}: gated on the Hub; accept its licence there and run `hf auth login`."
        ) from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"--{kind} {repo}: the Hub has no revision {revision!r} of it.") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(
            f"--{kind} {repo}: no such {REPO_TYPE[kind]} on the Hub, nor a local path."
        ) from e
    except (errors.LocalEntryNotFoundError, errors.RevisionResolutionError) as e:
        why = _first_line(e)
        raise UserError(
            f"--{kind} {repo}: the Hub did not answer and no whole copy is cached ({why})."
        ) from e
    except (
        errors.HTTPError,
        OSError,
        ValueError,
    ) as e:  # a connection lost on the way, no Hub id, not a Hub's answer
        raise UserError(f"--{kind} {repo}: the Hub could not serve it ({_first_line(e)}).") from e


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_json(path: Path) -> dict:
    """The object in a small json file. Raises OSError, or ValueError for anything else: what comes from others may be
    nested without end, or too large to be what it says.
    """
    with open(path, "rb") as f:
        text = f.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"larger than {LARGEST_JSON >> 20} MB")
    try:
        value = json.loads(text.decode())
    except UnicodeDecodeError as e:
        raise ValueError(str(e)) from e  # its repr holds the whole text
    except RecursionError as e:
        raise ValueError("nested too deeply") from e
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def writable(folder: Path, flag: str = "out") -> Path:
    """The folder, which need not exist yet. Raises UserError, before any work, where it could not be written."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"--{flag} {folder}: cannot be written ({there} is no folder, or not yours to write)."
        )
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: under another name, then renamed."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """A new empty folder to write files into; at the end they are renamed into `folder`, over their namesakes there.

    When the block raises, nothing in `folder` has changed. Raises UserError where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
            yield Path(part)
            for path in sorted(Path(part).iterdir()):
                os.replace(path, folder / path.name)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e}).") from e
