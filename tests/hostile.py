"""A script of ours, run with bad input and bad streams, and with a fault at every file it writes.

Bad input: each case in a fork of a process that has imported the script.

Faults: whenever the script opens a file to write, it forks. The child meets the fault there and
goes on to its end; the parent waits, puts the folder back as it was, and goes on without the fault.
So each file is in turn the one that does not fit, at the cost of little more than one run.
"""

import builtins
import dataclasses
import errno
import importlib
import inspect
import io
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

from forked import server

SIGNALS = {"ctrl-c": signal.SIGINT, "terminate": signal.SIGTERM}
FAULTS = ("full", *SIGNALS)  # full: every write to the file says that the disk is
OUTPUT_FAULTS = ("full stdout", "unread stdout", "full stderr")
PATIENCE = 60  # seconds that a child may take
MEMORY = 3 << 29  # bytes that it may hold where its input is refused

# --- scripts in forks -----------------------------------------------------------------------------


def settings(name: str) -> dict[str, tuple[str, bool]]:
    """The flags of a script -> (str, int, float, choice or bool; whether it takes several)."""
    kind = _globals(name)["Settings"]
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        text = str(hints[field.name])
        named = next(t for t in ("str", "int", "float", "bool") if t in text)
        named = "choice" if field.metadata["choices"] else named
        found["--" + field.name.replace("_", "-")] = (named, "tuple" in text)
    return found


def refused(name: str, cases: list[dict], folder: Path, make_short: Callable | None) -> list[dict]:
    """The script with the arguments and streams of each case, in a fork of its own."""
    _module(name)
    os.chdir(folder)
    if make_short:
        make_short(_globals(name))
    ends = []
    for case in cases:
        before = _snapshot(folder)
        end = _forked(folder, lambda case=case: _started(name, folder, **case))
        end["new"] = sorted(set(_snapshot(folder)) - set(before))
        ends.append(end)
        _restore(folder, before)
    return ends


def _started(name: str, folder: Path, arguments: list[str], streams: dict[int, str]) -> int:
    os.chdir(folder)
    for number, kind in streams.items():
        _spoil(number, kind)
    _streams()
    return call(name, arguments)


def call(name: str, arguments: list[str]) -> int:
    """The exit code of a script that is run as from the command line."""
    from runtime import cli

    sys.argv = [name, *arguments]
    try:
        cli.run(_module(name).main)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
            return 1
        return e.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _module(name: str):
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def _globals(name: str) -> dict:
    """Of the module that a script's main stands in."""
    return inspect.unwrap(_module(name).main).__globals__


def _forked(folder: Path, work: Callable[[], int]) -> dict:
    """How a fork that does this work ends, and what it says."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _redirect(folder.parent / f"{folder.name}-child")
        code = 1
        try:
            code = work()
            sys.stdout.flush()
        finally:
            os._exit(code)
    code, peak = _wait(child)
    said = _said(folder.parent / f"{folder.name}-child")
    return dict(code=code, peak=peak, seconds=time.monotonic() - started, said=said)


# --- faults ---------------------------------------------------------------------------------------


class Forks:
    """Where a running script forks, and what became of the children.

    share: of the files, in how many of hundred there are faults, drawn at random.
    """

    def __init__(self, folder: Path, share: int):
        self.folder, self.share = folder, share
        self.ends, self.child, self.seen, self.printed = [], False, set(), False
        self.left: dict[str, dict] = {}  # file that did not fit -> the folder afterwards

    def opening(self, path: object) -> bool:
        """Called before a file is opened to write; true in the child for which the disk is full."""
        if self.child or not isinstance(path, str | os.PathLike):
            return False
        path = Path(os.path.abspath(os.fspath(path)))
        if not path.is_relative_to(self.folder):
            return False
        name = str(path.relative_to(self.folder))
        if name in self.seen:
            return False
        self.seen.add(name)
        if random.Random(name).randrange(100) >= self.share:
            return False
        for fault in FAULTS:
            if self.fork(fault, name) or self.child:
                return fault == "full"
        return False

    def printing(self) -> None:
        """Called before the first output: children whose output is full, or has no reader."""
        if not (self.child or self.printed):
            self.printed = True
            any(self.fork(fault, "") for fault in OUTPUT_FAULTS)

    def fork(self, fault: str, name: str) -> bool:
        """True in the child of a full disk, false in the others' and in the parent."""
        sys.stdout.flush()
        before, started = _snapshot(self.folder), time.monotonic()
        child = os.fork()
        if child == 0:
            self.child = True
            _redirect(self.folder.parent / f"{self.folder.name}-child")
            if fault in SIGNALS:
                os.kill(os.getpid(), SIGNALS[fault])
            if fault in OUTPUT_FAULTS:
                kind, _, stream = fault.partition(" ")
                _spoil(1 if stream == "stdout" else 2, kind)
                return True
            return fault == "full"
        code, _ = _wait(child)
        after = _snapshot(self.folder)
        self.ends.append(
            dict(
                fault=fault,
                name=name,
                code=code,
                seconds=time.monotonic() - started,
                said=_said(self.folder.parent / f"{self.folder.name}-child"),
                new=sorted(set(after) - set(before)),
            )
        )
        if fault == "full":
            self.left[name] = after
        _restore(self.folder, before)
        return False


class Full(io.FileIO):
    """A file on a disk that is full."""

    def write(self, content) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)


def faulty(
    name: str,
    arguments: list[str],
    folder: Path,
    share: int,
    make_short: Callable | None = None,
    again: list[str] | None = None,
) -> dict:
    """The script in this process, which ends with it: its exit code and its children's ends.

    again: arguments that finish what a full disk stopped; each is tried, in a fork.
    """
    forks = Forks(folder, share)
    os.chdir(folder)
    _redirect(folder.parent / f"{folder.name}-run")
    _module(name)
    if make_short:
        make_short(_globals(name))
    _streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _watch(forks)
    code = call(name, arguments)
    if forks.child:
        sys.stdout.flush()
        os._exit(code)
    said = _said(folder.parent / f"{folder.name}-run")
    forks.child = True  # what follows has no faults
    whole, resumed = _snapshot(folder), {}
    for path, files in forks.left.items() if again else ():
        _restore(folder, files)
        end = _forked(folder, lambda: call(name, again))
        resumed[path] = end | dict(whole=_snapshot(folder).keys() == whole.keys())
        resumed[path]["metrics"] = _steps(folder)
    _restore(folder, whole)
    steps = _steps(folder)
    return dict(code=code, said=said, ends=forks.ends, resumed=resumed, metrics=steps)


def _steps(folder: Path) -> list:
    """(split, step, loss) of a training run's rows."""
    found = []
    for path in folder.glob("*/metrics.jsonl"):
        rows = map(json.loads, path.read_text().splitlines())
        found += [[row["split"], row["step"], row["loss"]] for row in rows]
    return found


def _watch(forks: Forks) -> None:
    """Ask `forks` before every file that Python, safetensors or Arrow opens to write, and before
    the first output.
    """
    import pyarrow.parquet
    import safetensors.torch

    from runtime import cli

    really_write = cli._Text.write
    really_open, really_os_open = io.open, os.open

    def opened(file, mode="r", *rest, **named):
        if set(mode) & set("wax+") and forks.opening(file):
            if "+" in mode:  # /dev/full would be read without end
                return io.BufferedRandom(Full(file, mode.replace("b", "")))
            file, mode = "/dev/full", mode.replace("x", "w").replace("a", "w")
        return really_open(file, mode, *rest, **named)

    def os_opened(path, flags, *rest, **named):
        if flags & (os.O_WRONLY | os.O_RDWR) and forks.opening(path):
            path, flags = "/dev/full", os.O_WRONLY
        return really_os_open(path, flags, *rest, **named)

    def written(stream, text):
        if text and stream.fileno() == 1:
            forks.printing()
        return really_write(stream, text)

    def guarded(really: Callable, error: Exception) -> Callable:
        def write(content, where, *rest, **named):
            if forks.opening(where):
                raise error
            return really(content, where, *rest, **named)

        return write

    full = os.strerror(errno.ENOSPC)
    io.open = builtins.open = opened
    os.open = os_opened
    cli._Text.write = written
    writers = {
        safetensors.torch.save_file: safetensors.SafetensorError(f"I/O error: {full}"),
        pyarrow.parquet.write_table: OSError(errno.ENOSPC, full),
    }
    for module in list(sys.modules.values()):
        for name in ("save_file", "write_table"):
            really = getattr(module, name, None)
            if inspect.isfunction(really) and really in writers:
                setattr(module, name, guarded(really, writers[really]))


# --- streams and folders --------------------------------------------------------------------------


def _redirect(stem: Path) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        opened = os.open(f"{stem}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)


def _spoil(number: int, kind: str) -> None:
    """closed, full (like a disk), unread (nobody at the other end of the pipe), empty."""
    if kind == "closed":
        os.close(number)
        return
    if kind == "unread":
        reader, opened = os.pipe()
        os.close(reader)
    else:
        opened = os.open("/dev/null" if kind == "empty" else "/dev/full", os.O_RDWR)
    os.dup2(opened, number)
    os.close(opened)


def _streams() -> None:
    """As Python opens them when it starts."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            setattr(sys, name, None)
            continue
        raw = open(number, "wb" if number else "rb", closefd=False)
        setattr(sys, name, io.TextIOWrapper(raw, "utf-8", line_buffering=number == 2))


def _said(stem: Path) -> str:
    """Standard output, then standard error: a script's last sentence stands at the end."""
    return "".join(Path(f"{stem}.{kind}").read_text(errors="replace") for kind in ("out", "err"))


def _wait(child: int) -> tuple[int | None, int]:
    """Its exit code, negative for a signal, None where it had to be killed; and its peak memory."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, 0


def _snapshot(folder: Path) -> dict[str, bytes | None]:
    """Name and content of every file, and the folders with None."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            found[str(path.relative_to(folder))] = None
        elif path.is_file() and not path.is_symlink():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def _restore(folder: Path, before: dict[str, bytes | None]) -> None:
    """The folder as it was. A file that is still there is written in place: the parent may hold it
    open.
    """
    for name, content in reversed(_snapshot(folder).items()):
        if name not in before:
            (folder / name).rmdir() if content is None else (folder / name).unlink()
    for name, content in before.items():
        path = folder / name
        if content is None:
            path.mkdir(exist_ok=True)
        elif not path.exists() or path.read_bytes() != content:
            with open(path, "r+b" if path.exists() else "wb") as file:
                file.truncate()
                file.write(content)


# --- processes ------------------------------------------------------------------------------------

# Process.start() also reads how other processes ended. If the thread that waits for one of them
# reads that at the same time, it finds nothing and reports exit code 255.
ONE_AT_A_TIME = threading.Lock()


def job(what: Callable, arguments: tuple, env: dict, answer: str) -> None:
    """Target of a process: write what(*arguments) to the file `answer` as json."""
    os.environ.update(env)
    Path(answer).write_text(json.dumps(what(*arguments)))
    os._exit(0)  # a script may have left threads


def answered(folder: Path, what: Callable, *arguments, seconds: float = 1800):
    """What what(*arguments) returns in a process forked from one that has imported torch."""
    path = folder.parent / f"{folder.name}.json"
    env = dict(FSRL_CACHE=os.environ["FSRL_CACHE"], HF_HUB_OFFLINE="1")
    process = server().Process(target=job, args=(what, arguments, env, str(path)), daemon=True)
    with ONE_AT_A_TIME:
        process.start()
    connection.wait([process.sentinel], seconds)
    with ONE_AT_A_TIME:
        process.join(0)
    assert process.exitcode == 0 and path.exists(), f"{path.stem}: {process.exitcode}"
    return json.loads(path.read_text())
