"""A script of ours, run once, with a fault at every file that it writes and at its first output.

Whenever the script opens a file to write, it forks: the child meets the fault there and goes on to
its end; the parent waits, puts the folder back as it was, and goes on without the fault. So each
file is in turn the one that does not fit, at the cost of little more than one run.
"""

import builtins
import errno
import importlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from forked import server

FAULTS = {  # name -> what happens in the child, given the path or None for the standard output
    "full": None,  # the file is /dev/full: every write to it says that the disk is full
    "ctrl-c": signal.SIGINT,
    "terminate": signal.SIGTERM,
}
PATIENCE = 60  # seconds for what follows a fault
MEMORY = 1 << 30  # bytes that a refused input may take


class Forks:
    """Where a running script forks, and what became of the children."""

    def __init__(self, folder: Path):
        self.folder, self.ends, self.child, self.seen = folder, [], False, set()

    def opening(self, path: object) -> bool:
        """Called before a file is opened to write; true in the child for which the disk is full."""
        if self.child or not isinstance(path, str | os.PathLike):
            return False
        path = Path(os.path.abspath(os.fspath(path)))
        inside = path.is_relative_to(self.folder)
        name = str(path.relative_to(self.folder)) if inside else ""
        if not inside or name in self.seen:
            return False
        self.seen.add(name)
        return any(self.fork(fault, name) for fault in FAULTS)

    def fork(self, fault: str, name: str) -> bool:
        """True in the child of a full disk, false in the others' and in the parent."""
        sys.stdout.flush()
        before, started = _snapshot(self.folder), time.monotonic()
        child = os.fork()
        if child == 0:
            self.child = True
            _redirect(self.folder.parent / "child")
            if FAULTS.get(fault):
                os.kill(os.getpid(), FAULTS[fault])
            return fault == "full"
        code, _ = _wait(child)
        after = _snapshot(self.folder)
        self.ends.append(
            dict(
                fault=fault,
                name=name,
                code=code,
                seconds=time.monotonic() - started,
                said=_said(self.folder.parent / "child"),
                new=sorted(set(after) - set(before)),
                changed=sorted(n for n in before if after.get(n) != before[n]),
            )
        )
        _restore(self.folder, before)
        return False

    def printing(self) -> None:
        """Called before the first output: children whose output is full, or has no reader."""
        if self.child:
            return
        for fault in ("full output", "no reader"):
            if self.fork(fault, "stdout") or self.child:
                if fault == "full output":
                    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
                else:
                    reader, writer = os.pipe()
                    os.close(reader)
                    os.dup2(writer, 1)
                return


class Output(io.TextIOWrapper):
    """Standard output that says when it is written to for the first time."""

    def write(self, text: str) -> int:
        if text and self.first is not None:
            first, self.first = self.first, None
            first()
        return super().write(text)

    first: Callable | None = None


class Full(io.FileIO):
    """A file on a disk that is full."""

    def write(self, content) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)


def run(module: str, argv: list[str], folder: Path, faulty: bool) -> dict:
    """The script in this process, which ends with it: its exit code and its children's ends."""
    forks = Forks(folder)
    os.chdir(folder)
    _redirect(folder.parent / "run")
    _streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if faulty:
        _watch(forks)
        sys.stdout.first = forks.printing
    code = call(module, argv)
    if forks.child:
        sys.stdout.flush()
        os._exit(code)
    said = _said(folder.parent / "run")
    return dict(code=code, said=said, ends=forks.ends, files=sorted(_snapshot(folder)))


def call(module: str, argv: list[str]) -> int:
    """The exit code of a script that is run as from the command line."""
    from runtime import cli

    sys.argv = [module, *argv]
    try:
        cli.run(_module(module).main)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
            return 1
        return e.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def refused(module: str, cases: list[list[str]], folder: Path) -> list[dict]:
    """The script with each of these arguments, in a fork of its own."""
    _module(module)
    ends = []
    for argv in cases:
        before, started = _snapshot(folder), time.monotonic()
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            _redirect(folder.parent / "child")
            _streams()
            os._exit(call(module, argv))
        code, peak = _wait(child)
        end = dict(code=code, peak=peak, seconds=time.monotonic() - started)
        end["said"] = _said(folder.parent / "child")
        end["new"] = sorted(set(_snapshot(folder)) - set(before))
        ends.append(end)
        _restore(folder, before)
    return ends


def _module(name: str):
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def _watch(forks: Forks) -> None:
    """Ask `forks` before every file that Python, or safetensors, opens to write."""
    import safetensors.torch

    really_open, really_os_open = io.open, os.open
    really_save = safetensors.torch.save_file

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

    def saved(tensors, filename, *rest, **named):
        if forks.opening(filename):
            raise safetensors.SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)}")
        return really_save(tensors, filename, *rest, **named)

    io.open = builtins.open = opened
    os.open = os_opened
    for module in list(sys.modules.values()):
        if getattr(module, "save_file", None) is really_save:
            module.save_file = saved


def _redirect(stem: Path) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        opened = os.open(f"{stem}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)


def _streams() -> None:
    sys.stdout = Output(os.fdopen(1, "wb", closefd=False), line_buffering=True)
    sys.stderr = open(2, "w", buffering=1, closefd=False)


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


def job(what: Callable, arguments: tuple, env: dict, answer: str) -> None:
    """Target of a process: write what(*arguments) to the file `answer` as json."""
    os.environ.update(env)
    Path(answer).write_text(json.dumps(what(*arguments)))
    os._exit(0)  # a script may have left threads


def start(what: Callable, *arguments, folder: Path):
    """A process, forked from one that has imported torch, that answers what(*arguments)."""
    answer = str(folder.parent / f"{folder.name}.json")
    env = dict(FSRL_CACHE=os.environ["FSRL_CACHE"], HF_HUB_OFFLINE="1")
    process = server().Process(target=job, args=(what, arguments, env, answer), daemon=True)
    process.start()
    return process, Path(answer)


def answer(process, path: Path, seconds: float = 300):
    process.join(seconds)
    assert process.exitcode == 0 and path.exists(), f"{path.stem}: {process.exitcode}"
    return json.loads(path.read_text())
