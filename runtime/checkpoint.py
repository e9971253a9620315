"""Checkpoints: everything a run needs to go on to the same bytes, by torch.distributed.checkpoint.

    OUT/checkpoints/step-00000200/     progress.json and safetensors, each process its share

A checkpoint is the trained weights, the optimiser's two moments of each, and the number of steps done. Nothing else has
state: the learning rate is a function of the step, the order of the pairs of (seed, epoch), initial weights of the
seed, and nothing random happens within a step. What was saved by any number of processes, sharded or not, loads into
any other number: each reads the slices it needs.

The files are safetensors, so that nothing is unpickled. A checkpoint is written under another name, fsynced and
renamed: what has its final name is whole. It is checked against its own sha256 before it is believed.
"""

import json
import os
import re
import shutil
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from runtime.ranks import Ranks, on_first, together
from runtime.sources import UserError, sha256

# What it says to a run of one process is what is meant.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)

FORMAT = "fsrl-checkpoint-1"
KEPT = 2
NAME = re.compile(r"step-(\d{8})")


def state(
    trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> dict[str, Tensor]:
    """What a checkpoint holds, by name, as views: loading writes into them. Makes the moments where Adam has not yet.

    Under ZeroRedundancyOptimizer each process has the moments of its own part of the weights only.
    """
    optimizer = getattr(optimizer, "optim", optimizer)  # of this process
    names = {id(p): name for name, p in trained.items()}
    held = {f"trained.{name}": p.detach() for name, p in trained.items()}
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if not optimizer.state[p]:
            moments = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            optimizer.state[p] = dict(
                step=torch.zeros((), dtype=torch.float32, device=p.device), **moments
            )
        optimizer.state[p]["step"].fill_(step)
        for moment in ("exp_avg", "exp_avg_sq"):
            held[f"optimizer.{names[id(p)]}.{moment}"] = optimizer.state[p][moment]
    return held


def save(folder: Path, step: int, held: dict[str, Tensor], ranks: Ranks) -> None:
    """Write OUT/checkpoints/step-STEP, keep the newest two. Raises UserError where the disk refuses; the older
    checkpoints are then as they were.
    """
    final = folder / f"step-{step:08d}"
    part = final.with_name(final.name + ".part")
    on_first(ranks, lambda: _make(folder, part))
    together(ranks, lambda: _see(part, ranks))
    together(ranks, lambda: _write(part, held, ranks))
    on_first(ranks, lambda: _publish(folder, part, final, step, ranks))


def _make(folder: Path, part: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.part"):  # of a save that was killed
            shutil.rmtree(leftover)
        part.mkdir()
    except OSError as e:
        raise UserError(f"{part}: the checkpoint cannot be written ({e}).") from e


def _see(part: Path, ranks: Ranks) -> None:
    if not part.is_dir():
        raise UserError(
            f"--out: rank {ranks.rank} does not see {part}; all hosts must share the folder."
        )


def _write(part: Path, held: dict[str, Tensor], ranks: Ranks) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)  # fsyncs its files
    try:
        dcp.save(held, storage_writer=writer, no_dist=ranks.world == 1)
    except (OSError, CheckpointException) as e:
        if ranks.first:
            shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{part}: the checkpoint cannot be written ({_cause(e)}).") from e


def _publish(folder: Path, part: Path, final: Path, step: int, ranks: Ranks) -> None:
    try:
        files = {path.name: sha256(path) for path in sorted(part.iterdir())}
        progress = dict(format=FORMAT, step=step, processes=ranks.world, files=files)
        with open(part / "progress.json", "w") as f:
            f.write(json.dumps(progress, indent=2) + "\n")
            f.flush()
            os.fsync(f.fileno())
        _sync(part)
        if final.exists():  # an earlier one of the same step, found damaged on resuming
            shutil.rmtree(final)
        os.replace(part, final)
        _sync(folder)
        for old in saved(folder)[KEPT:]:
            dead = old.with_name(
                old.name + ".part"
            )  # half a deletion must not look like a checkpoint
            os.replace(old, dead)
            shutil.rmtree(dead)
    except OSError as e:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{part}: the checkpoint cannot be written ({e}).") from e


def _sync(folder: Path) -> None:
    """A rename is on disk when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def saved(folder: Path) -> list[Path]:
    """Checkpoints by falling step."""
    return sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name)), reverse=True)


def newest(folder: Path, ranks: Ranks) -> Path | None:
    """The newest whole checkpoint, or None where none was ever saved. A damaged one is passed over, with a line, and
    goes with the next save, so that the two kept are whole ones.

    Raises UserError when there are some and all are damaged.
    """

    def find() -> Path | None:
        damaged = []
        for path in saved(folder):
            problem = _damage(path)
            if problem is None:
                for other in damaged:
                    with suppress(OSError):
                        os.replace(other, other.with_name(other.name + ".part"))
                return path
            damaged.append(path)
            print(f"{path}: {problem}; the one before it is taken.", file=sys.stderr)
        if damaged:
            raise UserError(
                f"--resume: no checkpoint in {folder} is whole; remove them to start again."
            )
        return None

    return on_first(ranks, find)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is what was written."""
    try:
        progress = json.loads((path / "progress.json").read_text())
        if progress["format"] != FORMAT or progress["step"] != int(NAME.fullmatch(path.name)[1]):
            return "progress.json is of another format"
        here = {file.name for file in path.iterdir()} - {"progress.json"}
        if here != set(progress["files"]):
            return "it misses files, or has others"
        damaged = [
            name for name, digest in progress["files"].items() if sha256(path / name) != digest
        ]
        return f"{damaged[0]} is damaged" if damaged else None
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"progress.json is unreadable ({e!r})"


def load(path: Path, held: dict[str, Tensor], ranks: Ranks) -> int:
    """Read a checkpoint into the tensors of state(); returns its step. Raises UserError where it does not fit them."""

    def read() -> int:
        try:
            dcp.load(
                held,
                storage_reader=dcp.HuggingFaceStorageReader(str(path)),
                no_dist=ranks.world == 1,
            )
        except (OSError, CheckpointException, ValueError, RuntimeError, AssertionError) as e:
            raise UserError(f"{path}: does not fit this run ({_cause(e)}).") from e
        return int(NAME.fullmatch(path.name)[1])

    return together(ranks, read)


def _cause(error: BaseException) -> str:
    """The first line of what went wrong on the first process, out of torch's wrapping."""
    inner = (
        next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    )
    return (str(inner).strip().splitlines() or [type(inner).__name__])[0]
