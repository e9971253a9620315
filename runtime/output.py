"""Write files so that a failure leaves either the old file or the new one, never half of it."""

import fcntl
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from runtime.sources import UserError


def writable(folder: Path, flag: str = "out") -> Path:
    """The folder, which need not exist yet. Raises UserError where it could not be written."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = f"{there} is not a folder, or you may not write in it"
        raise UserError(f"--{flag} {folder}: cannot be written ({why}).")
    return folder


def writable_file(path: str | Path, flag: str = "out") -> Path:
    """The file, which need not exist yet. Raises UserError where it could not be written."""
    file = Path(path)
    if not str(path) or (file.exists() and not file.is_file()):
        raise UserError(f"--{flag} {path}: the name of a file to write was expected.")
    writable(file.parent, flag)
    return file


@contextmanager
def writing(path: Path, flag: str = "") -> Iterator[None]:
    """Turn a failure to write, such as a full disk, into a UserError that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as e:  # the second is what safetensors makes of the first
        named = f"--{flag} {path}" if flag else path
        why = getattr(e, "strerror", None) or e
        raise UserError(f"{named}: cannot be written ({why}).") from e


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path for a file or folder to write, which replaces `path` at the end of the block.

    If the block fails, `path` is unchanged and nothing else is left. Raises UserError where it
    cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        _remove(part)  # left by a script that was killed
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            if part.is_dir():
                _remove(path)
            os.replace(part, path)
        except BaseException:
            _remove(part)
            raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file, by replacing. Raises UserError where it cannot be written."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder; at the end of the block its files are moved into `folder`.

    They replace files of the same name there. If the block fails, nothing in `folder` has changed.
    Raises UserError where it cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
            yield Path(part)
            for path in sorted(Path(part).iterdir()):
                os.replace(path, folder / path.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- the cache of arrays --------------------------------------------------------------------------

Arrays = dict[str, np.ndarray]


def cached_arrays(name: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that make() returns, from $FSRL_CACHE if an earlier call stored them there.

    Without this variable the folder is fsrl/ in the user's cache folder. Processes that ask at the
    same time wait for the first of them. Where the folder cannot be written, every call makes them.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fsrl"
    path = Path(os.environ.get("FSRL_CACHE") or default) / f"{name}.npz"
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        damaged = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
        with suppress(*damaged), np.load(path, allow_pickle=False) as stored:
            return dict(stored)
        arrays = make()  # the file is absent or damaged
        try:
            with replacing(path) as part, open(part, "wb") as file:
                np.savez(file, **arrays)
        except UserError as e:  # go on without a cache
            print(f"Tokens were not cached: {e}", file=sys.stderr)
    return arrays
