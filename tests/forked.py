"""train.py in one process or several, forked from one that has imported torch already."""

import faulthandler
import functools
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import GOLDEN, ROOT, SAE_ID

GOLDEN_FLAGS = (
    "--model",
    GOLDEN / "model",
    "--sae",
    GOLDEN / "sae",
    "--sae-id",
    SAE_ID,
    "--layer",
    1,
)
GOLDEN_FLAGS += ("--data", GOLDEN / "dataset", "--batch-size", 4, "--eval-every", 0)


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Run:
    """Processes that were started, as torchrun would start them when there are several."""

    def __init__(self, argv, processes: int = 1, env: dict | None = None, call=None):
        context = server()
        self.folder, self.processes = Path(tempfile.mkdtemp()), []
        env = dict(env or {}, FSRL_CACHE=os.environ["FSRL_CACHE"])
        if processes > 1:
            env |= dict(
                WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
            )
        for rank in range(processes):
            own = env | (dict(RANK=str(rank), LOCAL_RANK=str(rank)) if processes > 1 else {})
            arguments = ([*map(str, argv)], own, str(self.folder / str(rank)), call)
            self.processes.append(context.Process(target=_main, args=arguments, daemon=True))
            self.processes[-1].start()

    def kill(self, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()

    def text(self, rank: int = 0) -> str:
        return self._read(rank, "err") + self._read(rank, "out")

    def _read(self, rank: int, kind: str) -> str:
        path = self.folder / f"{rank}.{kind}"
        return path.read_text() if path.exists() else ""

    def wait(self, timeout: float = 120) -> list[Ended]:
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in self.processes if process.exitcode is None]
        for process in late:
            os.kill(process.pid, signal.SIGABRT)  # faulthandler says where it waits
            process.join(5)
            process.kill()
            process.join()
        ended = [
            Ended(process.exitcode, self._read(rank, "out"), self._read(rank, "err"))
            for rank, process in enumerate(self.processes)
        ]
        shutil.rmtree(self.folder)
        assert not late, f"did not end in {timeout} s: {ended}"
        return ended


def golden(out: Path, *flags, processes: int = 1, timeout: float = 120, **options) -> list[Ended]:
    """A run of train.py on the golden model to its end, by rank."""
    return Run([*GOLDEN_FLAGS, "--out", out, *flags], processes, **options).wait(timeout)


def good(ended: list[Ended]) -> Ended:
    """What rank 0 said, after all went well."""
    assert all(end.returncode == 0 for end in ended), ended
    return ended[0]


@functools.cache
def server():
    """The process that all are forked from, started with one thread each in mind; nothing of it
    stays in ours.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train", "torch.distributed.checkpoint", "matplotlib.pyplot", "forked"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _main(argv: list[str], env: dict, files: str, call) -> None:
    os.environ.update(env)
    for number, kind in ((1, "out"), (2, "err")):
        opened = os.open(f"{files}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
    sys.stdout, sys.stderr = (
        open(1, "w", buffering=1, closefd=False),
        open(2, "w", buffering=1, closefd=False),
    )
    faulthandler.enable(open(2, "w", closefd=False))
    sys.argv = ["train.py", *argv]
    import train
    from runtime import cli, device

    train.greedy = lambda *_: "(not sampled)"  # most of a short run's time
    # Every processor has an architecture: bfloat16 is tested where it is emulated, too.
    device.BFLOAT16_PRODUCTS = ("architecture",)
    if call is not None:  # to change something in this process first
        call()
    cli.run(train.main)
