"""Checkpoints by torch.distributed.checkpoint, from which a run goes on to the same bytes.

    OUT/checkpoints/step-00000200/     progress.json, and safetensors that each process writes a
                                       share of

A checkpoint holds the trained weights, the optimiser's state of each, and the number of steps done.
A run has no other state: the learning rate follows from the step, the order of the pairs from seed
and epoch, the initial weights from the seed, and a step draws no random numbers. A checkpoint of
any number of processes, sharded or not, loads into any other number: each reads the slices that it
needs.

The files are safetensors, so that nothing is unpickled. A checkpoint is written under another name,
fsynced and then renamed, so that a folder with the final name is complete. Before it is used, its
files are compared with the sha256 in progress.json.
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
from torch import Tensor, nn

from runtime.messages import first_line
from runtime.output import writing
from runtime.ranks import Ranks, forget_gathered, on_first, together
from runtime.sources import UserError, read_json, sha256

# Saving without a process group is intended.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)

FORMAT, OLD_FORMATS = "fsrl-checkpoint-2", ("fsrl-checkpoint-1",)
EARLIER = "was written by another version of this code, and only that version can resume it."
KEPT = 2  # how many checkpoints a run keeps
NAME = re.compile(r"step-(\d{8})")
FLAT = dict(flatten_optimizer_state_dict=True)


def save(
    folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> None:
    """Write OUT/checkpoints/step-STEP and remove all but the newest two.

    module: what trains, and nothing else. Raises UserError where it cannot be written; the older
    checkpoints are then unchanged.
    """
    final = folder / f"step-{step:08d}"
    part = final.with_name(final.name + ".part")
    on_first(ranks, lambda: _make(folder, part))
    together(ranks, lambda: _check_shared(part, ranks))
    together(ranks, lambda: _write(part, module, optimizer, ranks))
    on_first(ranks, lambda: _publish(folder, part, final, step, ranks))


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> int:
    """Read a checkpoint into a module and its optimiser; returns its step.

    Raises UserError where it does not fit them.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    weights, state = _state(module, optimizer)
    try:
        reader = dcp.HuggingFaceStorageReader(str(path))
        dcp.load(_tensors(weights, state), storage_reader=reader, no_dist=ranks.world == 1)
    except (OSError, CheckpointException, ValueError, RuntimeError, AssertionError) as e:
        raise UserError(f"{path}: does not fit this run ({_cause(e)}).") from e
    held = dict(model_state_dict=weights, optim_state_dict=state)
    set_state_dict(module, optimizer, **held, options=StateDictOptions(**FLAT))
    forget_gathered(module)
    return int(NAME.fullmatch(path.name)[1])


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """A module's weights and its optimiser's state as two flat dicts of views and plain numbers."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    return get_state_dict(module, optimizer, options=StateDictOptions(**FLAT))


def _tensors(weights: dict, state: dict) -> dict[str, Tensor]:
    """The tensors to store. Numbers are the optimiser's settings, which the run sets again."""
    held = {f"trained.{name}": value for name, value in weights.items()}
    kept = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return held | {f"optimizer.{name}": value for name, value in kept.items()}


def _make(folder: Path, part: Path) -> None:
    with writing(part):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.part"):  # of a save that was killed
            shutil.rmtree(leftover)
        part.mkdir()


def _check_shared(part: Path, ranks: Ranks) -> None:
    if not part.is_dir():
        unseen = f"rank {ranks.rank} does not see {part}"
        raise UserError(f"--out: {unseen}; all hosts must share the folder.")


def _write(part: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)  # fsyncs its files
    held = _tensors(*_state(module, optimizer))
    try:
        dcp.save(held, storage_writer=writer, no_dist=ranks.world == 1)
    except (OSError, CheckpointException) as e:  # on every process, when it happens to one
        if ranks.first:
            shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{part}: the checkpoint cannot be written ({_cause(e)}).") from e


def _publish(folder: Path, part: Path, final: Path, step: int, ranks: Ranks) -> None:
    try:
        files = {path.name: sha256(path) for path in sorted(part.iterdir())}
        progress = dict(format=FORMAT, step=step, processes=ranks.world, files=files)
        (part / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
        _sync(part / "progress.json")
        _sync(part)
        if final.exists():  # of the same step, but damaged
            shutil.rmtree(final)
        os.replace(part, final)
        _sync(folder)
    except OSError as e:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{part}: the checkpoint cannot be written ({e}).") from e
    with suppress(OSError):  # the next save tries again
        for old in saved(folder)[KEPT:]:
            # Renamed first: a deletion that is interrupted must not leave half a checkpoint.
            dead = old.with_name(old.name + ".part")
            os.replace(old, dead)
            shutil.rmtree(dead)


def _sync(path: Path) -> None:
    """Flush a file to disk, or a folder, and with it the renames in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name)), reverse=True)


def newest(folder: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint that is complete, or None where there is no checkpoint.

    Damaged checkpoints are skipped with a message, and marked so that the next save removes them.
    Raises UserError where all are damaged.
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
            print(f"{path}: {problem}; the checkpoint before it is tried.", file=sys.stderr)
        if damaged:
            found = f"no checkpoint in {folder} is whole"
            raise UserError(f"--resume: {found}; remove them to start again.")
        return None

    return on_first(ranks, find)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing. Raises UserError for an old format."""
    try:
        progress = read_json(path / "progress.json")
        if progress["format"] in OLD_FORMATS:
            raise UserError(f"--resume: {path} {EARLIER}")
        if progress["format"] != FORMAT or progress["step"] != int(NAME.fullmatch(path.name)[1]):
            return "progress.json is of another format"
        here = {file.name for file in path.iterdir()} - {"progress.json"}
        if here != set(progress["files"]):
            return "its files are not those that progress.json lists"
        for name, digest in progress["files"].items():
            if sha256(path / name) != digest:
                return f"{name} is damaged"
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"progress.json is unreadable ({e!r})"


def _cause(error: BaseException) -> str:
    """The error on the first process that failed, without torch's wrapping."""
    failures = getattr(error, "failures", None)  # of a CheckpointException, by process
    return first_line(next(iter(failures.values()))[0] if failures else error)
