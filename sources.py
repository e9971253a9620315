"""Sources: a name (`tiny`, a local path, or a Hugging Face Hub id) becomes a local folder of files.

Everything this project reads comes through `fetch`. A local path wins, then the embedded `tiny`,
then the Hub; downloads are pinned to the commit they resolved to, which the caller records.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

TINY = Path(__file__).resolve().parent / "tiny"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class UserError(Exception):
    """A person's mistake: one sentence naming the file, row or flag. Scripts print it and exit with 2."""


class Source(NamedTuple):
    path: Path  # a local folder, or one local file when the name was a file's path
    revision: str | None  # commit of a Hub download, None for local files


def fetch(name: str | Path, kind: str, patterns: list[str], revision: str | None = None) -> Source:
    """Make the files of `name` that match `patterns` available locally.

    kind: "model", "sae" or "data"; it picks the folder of the embedded `tiny` and the Hub's repository type.
    revision: branch, tag or commit on the Hub; ignored for local paths.
    Raises UserError when the name is neither a path nor a Hub id, or when the Hub cannot serve it.
    """
    path = Path(name).expanduser()
    if str(name) == "tiny":
        return Source(TINY / kind, None)
    if path.exists():
        return Source(path, None)
    if not HUB_ID.fullmatch(str(name)) or ".." in str(name):
        raise UserError(f"--{kind} {name}: no such file or folder, and not a Hub id of the form owner/name.")
    return _download(str(name), kind, patterns, revision)


def _download(repo: str, kind: str, patterns: list[str], revision: str | None) -> Source:
    from huggingface_hub import errors, snapshot_download

    repo_type = "dataset" if kind == "data" else "model"
    try:
        # A dead network falls back on the cached snapshot inside snapshot_download itself.
        folder = Path(snapshot_download(repo, repo_type=repo_type, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as e:
        raise UserError(f"--{kind} {repo}: gated on the Hub; accept its licence there and run `hf auth login`.") from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"--{kind} {repo}: the Hub has no revision {revision!r} of it.") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(f"--{kind} {repo}: no such {repo_type} on the Hub, nor a local path.") from e
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as e:
        raise UserError(f"--{kind} {repo}: the Hub did not answer and no copy is cached ({_first_line(e)}).") from e
    return Source(folder, folder.name)  # snapshots are stored under their commit hash


def list_files(repo: str, kind: str, revision: str | None = None) -> list[str]:
    """Paths of all files in a Hub repository. Raises UserError when it cannot be listed."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().list_repo_files(repo, repo_type="dataset" if kind == "data" else "model", revision=revision)
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as e:
        raise UserError(f"--{kind} {repo}: the Hub could not list its files ({_first_line(e)}).") from e


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: under another name, then renamed."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
