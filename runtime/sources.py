"""Find or download the files that a flag names.

A name is `tiny` (the embedded world), a local path, or a Hugging Face Hub id; a path that exists
comes before the Hub. `owner/name@revision` names a branch, tag or commit on the Hub. A download is
returned with its commit, which the caller records.
"""

import errno
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from runtime.messages import brief, first_line

TINY = Path(__file__).resolve().parents[1] / "tiny"
LARGEST_JSON = 64 << 20  # bytes; the index of a 27B model takes 50 thousand
FILES = (".jsonl", ".json", ".parquet", ".npz", ".safetensors")  # no Hub repository's name ends so
PART = r"[A-Za-z0-9][\w.-]*"
HUB_ID = re.compile(rf"{PART}(/{PART})?(@[\w./-]+)?")
REPO_TYPE = {  # flag -> the type of the Hub repository that it names
    "model": "model",
    "sae": "model",
    "data": "dataset",
    "init-adapter": "model",
    "run": "model",
    "explanations": "dataset",
}


class UserError(Exception):
    """A user's mistake. Its message is one sentence that names the file, row or flag; scripts print
    it and exit with code 2.
    """


class Source(NamedTuple):
    path: Path  # a local folder, or a local file if the name was that of a file
    revision: str | None  # commit of a Hub download; None for local files


def fetch(name: str | Path, kind: str, patterns: list[str]) -> Source:
    """The local folder or file for a name; from the Hub, the files that match `patterns`.

    kind: a key of REPO_TYPE, which is also the name of the flag and of a folder in tiny/. Raises
    UserError where the name is neither a path nor a Hub id, or where the Hub cannot serve it.
    """
    path = local(name, kind)
    if path is not None:
        return Source(path, None)
    if not HUB_ID.fullmatch(str(name)) or ".." in str(name) or Path(name).suffix in FILES:
        known = "no such file or folder, and not a Hub id of the form owner/name"
        raise UserError(f"--{kind} {brief(name)}: {known}.")
    from huggingface_hub import snapshot_download

    repo, revision = split_revision(name)
    with _hub_errors(repo, revision, kind):
        # Without a network, snapshot_download itself returns a snapshot from its cache.
        folder = snapshot_download(
            repo, repo_type=REPO_TYPE[kind], revision=revision, allow_patterns=patterns
        )
    return Source(Path(folder), Path(folder).name)  # snapshots are stored under their commit hash


def local(name: str | Path, kind: str) -> Path | None:
    """The local path that a name means, or None where it can only be a Hub id."""
    if str(name) == "tiny" and (TINY / kind).is_dir():
        return TINY / kind
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # a name too long for a file, a home that is not there
        return None


def split_revision(name: str) -> tuple[str, str | None]:
    """owner/name@revision -> (owner/name, revision); a name without one -> (name, None)."""
    repo, at, revision = str(name).partition("@")
    return repo, revision if at else None


def check_upload(repo: str) -> None:
    """Raises UserError for a name that is not OWNER/NAME, and where there is no token."""
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(repo) or repo.count("/") != 1 or "@" in repo:
        raise UserError(f"--push-to {brief(repo)}: OWNER/NAME on the Hub was expected.")
    if not get_token():
        raise UserError(f"--push-to {repo}: needs a token that may write; run `hf auth login`.")


def upload(files: dict[str, Path], repo: str, message: str) -> str:
    """Upload files in one commit to a model repository, which is created if needed.

    files: path in the repository -> local file. Returns the commit's address. Raises UserError
    where the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    added = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
    try:
        HfApi().create_repo(repo, exist_ok=True)
        return HfApi().create_commit(repo, added, commit_message=message).commit_url
    except (errors.HTTPError, OSError, ValueError, LookupError) as e:
        # The last two are raised for an answer that is not the Hub's.
        why = brief(first_line(e))
        raise UserError(f"--push-to {repo}: the Hub did not take it ({why}).") from e


def list_files(name: str, kind: str) -> list[str]:
    """Paths of all files in a Hub repository, from its cache if the Hub does not answer.

    Raises UserError where neither has the list.
    """
    from huggingface_hub import errors, get_cached_repo_tree, list_repo_files, resolve_revision

    repo, revision = split_revision(name)
    with _hub_errors(repo, revision, kind):
        commit = resolve_revision(repo, repo_type=REPO_TYPE[kind], revision=revision)
        try:
            tree = get_cached_repo_tree(repo, repo_type=REPO_TYPE[kind], revision=commit)
            return [file.path for file in tree]
        except errors.CachedRepoTreeNotFoundError:
            return list_repo_files(repo, repo_type=REPO_TYPE[kind], revision=commit)


@contextmanager
def _hub_errors(repo: str, revision: str | None, kind: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a UserError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as e:
        why = "gated on the Hub; accept its licence there and run `hf auth login`"
        raise UserError(f"--{kind} {repo}: {why}.") from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"--{kind} {repo}: the Hub has no revision {revision!r} of it.") from e
    except errors.RepositoryNotFoundError as e:
        why = f"no such {REPO_TYPE[kind]} on the Hub, nor a local path"
        raise UserError(f"--{kind} {repo}: {why}.") from e
    except (errors.LocalEntryNotFoundError, errors.RevisionResolutionError) as e:
        why = f"the Hub did not answer and no whole copy is cached ({first_line(e)})"
        raise UserError(f"--{kind} {repo}: {why}.") from e
    except (errors.HTTPError, OSError, ValueError) as e:
        # A lost connection, a name that is no Hub id, or an answer that is not the Hub's.
        raise UserError(f"--{kind} {repo}: the Hub could not serve it ({first_line(e)}).") from e


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_json(path: str | Path, kind: type = dict):
    """The object (kind dict) or list in a small json file. Raises OSError or ValueError, also for
    files that are too large or nested too deeply.
    """
    if Path(path).exists() and not Path(path).is_file():  # a named pipe would block
        raise OSError(errno.EINVAL, "not a regular file", str(path))
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
    if not isinstance(value, kind):
        raise ValueError(f"not {'an object' if kind is dict else 'a list'}")
    return value
