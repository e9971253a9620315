"""Write the folder of a training run.

    OUT/config.json      settings, versions, hardware, source revision, sha256 of inputs
    OUT/metrics.jsonl    one object per optimiser step and per evaluation
    OUT/checkpoints/     see checkpoint.py

A Run is given plain values and the module that trains; it knows neither train.Settings nor the
model.
"""

import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path

import torch
from torch import nn

from runtime import checkpoint
from runtime.messages import brief
from runtime.output import writable, write_whole, writing
from runtime.progress import progress_bar
from runtime.ranks import TIME_TO_PRINT, Interrupts, Ranks, together
from runtime.sources import UserError, read_json, upload

FORMAT = "fsrl-run-3"  # of config.json; runs without a format are of an earlier version
PACKAGES = ("torch", "safetensors", "huggingface-hub", "tokenizers", "numpy", "pyarrow")

# --- before a run ---------------------------------------------------------------------------------


def choose_out(out: str | None, name: str, resume: bool) -> Path:
    """The folder to write: --out, or runs/NAME, with a number if that is taken.

    Raises UserError where it holds another run or cannot be written.
    """
    if not out:
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
            why = "torchrun --max-restarts needs a named folder, to find the run again"
            raise UserError(f"--out: {why}.")
        folders = (Path("runs") / f"{name}{n}" for n in chain([""], map("-{}".format, count(2))))
        return next(folder for folder in folders if not holds_run(folder))

    folder = writable(Path(out))
    if holds_run(folder) and not resume:
        choice = "choose another folder, remove it, or add --resume"
        raise UserError(f"--out {folder}: holds a run already; {choice}.")
    if (folder / "metrics.jsonl").exists():
        with writing(folder, "out"), open(folder / "metrics.jsonl", "ab") as file:
            _lock(file, folder)
    return folder


def holds_run(folder: Path) -> bool:
    """Whether the folder holds a run that made at least one step."""
    if finished(folder) or any((folder / "checkpoints").glob("step-*")):
        return True
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            return any((row := _row(line)) and row["split"] == "train" for line in file)
    except OSError:
        return False


def finished(folder: Path) -> bool:
    """Whether the folder holds a run that has come to its end: these files are written last."""
    saved = (folder / "adapter" / "adapter_config.json", folder / "model" / "model.safetensors")
    return any(path.is_file() for path in saved)


def describe(settings: Mapping, digests: Mapping[str, str], device: str, processes: int) -> dict:
    """The content of config.json that every run has: settings, versions, hardware, inputs.

    digests: path -> sha256 of every file that the run reads.
    """
    cpu = f"{platform.machine()} CPU"
    versions = {name: version(name) for name in PACKAGES}
    return dict(
        format=FORMAT,
        settings=dict(settings),
        sha256=dict(digests),
        versions=dict(python=platform.python_version(), **versions),
        hardware=cpu if device == "cpu" else torch.cuda.get_device_name(device),
        processes=processes,
        threads=torch.get_num_threads(),
        code=code_revision(),
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def code_revision() -> str | None:
    """Commit of this checkout, with "+" if files differ from it; None outside git."""
    here = str(Path(__file__).resolve().parents[1])
    command = ["git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --- during a run ---------------------------------------------------------------------------------


@dataclass
class Run:
    """The folder of a run in progress: its log, its checkpoints, and requests to stop.

    trained: the module that holds what trains, and nothing else. checkpoint_every, eval_every: in
    steps; 0: none between the first and the last. Only rank 0 writes.
    """

    out: Path
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    checkpoint_every: int
    eval_every: int
    ranks: Ranks

    def __post_init__(self):
        self.rows: list[dict] = []
        self.saved = 0  # the step of the last checkpoint
        self.file = self.bar = None
        self.interrupts = Interrupts(self.ranks)

    def open(self, config: dict, free: Collection[str], resume: bool) -> None:
        """Lock the folder and write config.json, or compare it with that of the run to resume.

        free: settings that may differ from those of the run to resume. Raises UserError where
        another setting or an input file differs.
        """
        if not self.ranks.first:
            return
        with writing(self.out, "out"):
            self.out.mkdir(parents=True, exist_ok=True)
            self.file = open(self.out / "metrics.jsonl", "ab+")
            _lock(self.file, self.out)
        logged = (self.out / "metrics.jsonl").stat().st_size
        if resume and logged and (self.out / "config.json").exists():
            _check_same_run(self.out, config, free)
            return
        with writing(self.out, "out"):
            write_whole(self.out / "config.json", json.dumps(config, indent=2) + "\n")

    def resume(self, wanted: bool) -> int:
        """Load the newest complete checkpoint, if wanted; returns its step, or 0 without one."""
        path = checkpoint.newest(self.out / "checkpoints", self.ranks) if wanted else None
        step, said = 0, f"{self.out} holds no checkpoint; starting at step 0"
        if path is not None:
            held = path, self.trained, self.optimizer, self.ranks
            step = together(self.ranks, lambda: checkpoint.load(*held))
            said = f"going on after step {step} of {self.steps}"
        if wanted and self.ranks.first:
            print(f"--resume: {said}.", file=sys.stderr)
        self.saved = step
        self._keep_rows(step)
        how = dict(total=self.steps, initial=step, unit="step", shown=self.ranks.first)
        self.bar = progress_bar(desc="training", **how)
        return step

    def _keep_rows(self, step: int) -> None:
        """Drop rows logged after this checkpoint, and a torn last line."""
        if self.file is None:
            return
        self.file.seek(0)
        end, again = 0, step == self.steps or self.evaluates(step)
        for line in self.file:
            row = _row(line)
            if row is None or row["step"] > step:
                break
            if row["step"] == step and row["split"] == "eval" and again:
                break  # the resumed run evaluates this step again
            self.rows.append(row)
            end += len(line)
        missing = step - sum(row["split"] == "train" for row in self.rows)
        if missing:
            message = f"the rows of {missing} steps are lost; training goes on without them."
            print(f"{self.out / 'metrics.jsonl'}: {message}", file=sys.stderr)
        with writing(self.out, "out"):
            self.file.truncate(end)

    def evaluates(self, step: int) -> bool:
        """Whether to evaluate after `step` updates: at 0 and at every multiple of eval_every."""
        return step == 0 or (self.eval_every > 0 and step % self.eval_every == 0)

    def log(self, split: str, step: int, row: dict) -> None:
        """Append a row to metrics.jsonl, and show a train row in the progress bar."""
        row = dict(split=split, step=step, **row)
        self.rows.append(row)
        if split == "train":
            shown = dict(loss=f"{row['loss']:.3f}", acc=f"{row['accuracy']:.2f}")
            self.bar.set_postfix(**shown, L0=f"{row['l0']:.0f}", refresh=False)
            self.bar.update()
        if self.file is not None:
            with writing(self.out, "out"):
                self.file.write(json.dumps(row).encode() + b"\n")
                self.file.flush()

    def stop_unless_finite(
        self, step: int, loss: float, grad_norm: float, pairs: Sequence[int]
    ) -> None:
        """End the run if its loss or gradient is not finite, naming the step and its pairs."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        self.close()
        found = f"loss {loss}, gradient norm {grad_norm}"
        if not self.ranks.first:
            time.sleep(TIME_TO_PRINT)
        message = f"Step {step + 1}: {found}, in pairs {list(pairs)}."
        raise SystemExit(message if self.ranks.first else 1)

    def checkpoint(self, step: int) -> None:
        """Save the state after `step` updates if due; on SIGTERM or Ctrl-C, save and exit."""
        asked = self.interrupts.asked()
        # Also after the last step, because what is written after it may fill the disk.
        due = self.checkpoint_every and (step % self.checkpoint_every == 0 or step == self.steps)
        if step > self.saved and (asked or due):
            if self.file is not None:
                with writing(self.out, "out"):
                    os.fsync(self.file.fileno())  # a resumed run needs the rows of its checkpoint
            folder = self.out / "checkpoints"
            checkpoint.save(folder, step, self.trained, self.optimizer, self.ranks)
            self.saved = step
        if asked:
            self.close()
            if self.ranks.first:
                again = f"the same command with --resume --out {self.out} goes on from there."
                saved = f"Saved after step {step} of {self.steps}; {again}"
                print(saved if step else "Ended before the first step; there is nothing to save.")
            raise SystemExit(0)

    def close(self) -> None:
        """End the progress bar, and let SIGTERM and Ctrl-C end the process again."""
        self.bar.close()
        self.interrupts.restore()


def _row(line: bytes) -> dict | None:
    """A line of metrics.jsonl as a row; None for a torn line."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int) and "split" in row
    return row if whole else None


def read_log(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, without a torn last line; [] where there is no file.

    Raises UserError naming a row that lacks split or step, or has other values than numbers.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}).") from e
    found = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None and number == len(lines) and not line.endswith(b"\n"):
            break
        values = [value for name, value in (row or {}).items() if name != "split"]
        if row is None or not all(isinstance(value, int | float) for value in values):
            raise UserError(f"{path}: row {number} is not what a run logs.")
        found.append(row)
    return found


def _lock(file, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"--out {out}: another run is writing there.") from e


# Settings that name inputs: not compared by name but by content, since files may have moved.
INPUTS = {"model", "sae", "data", "eval_data", "init_adapter", "mask_features"}


def started_with(out: Path) -> dict:
    """The config.json of a run to resume. Raises UserError where it cannot be read."""
    try:
        before = read_json(out / "config.json")
        if before.get("format") != FORMAT:
            raise UserError(f"--resume: {out} {checkpoint.EARLIER}")
        return before | dict(settings=dict(before["settings"]), sha256=dict(before["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{out}/config.json: not the config.json of a run ({brief(e)}).") from e


def _check_same_run(out: Path, config: dict, free: Collection[str]) -> None:
    before = started_with(out)
    settings, hashes = before["settings"], before["sha256"]
    for name, value in config["settings"].items():
        theirs = settings.get(name)
        if name not in {*free, *INPUTS} and theirs != value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"--resume: {out} was started with {flag} {theirs}, now it is {value}.")
    known = {(Path(path).name, digest) for path, digest in hashes.items()}
    for path, digest in config["sha256"].items():
        if (Path(path).name, digest) not in known:
            raise UserError(f"--resume: {path} is not the file that {out} was started with.")
    if len(config["sha256"]) != len(hashes):
        now = f"now there are {len(config['sha256'])}"
        raise UserError(f"--resume: {out} was started with {len(hashes)} input files; {now}.")


# --- a finished run -----------------------------------------------------------------------------


def push(out: Path, repo: str) -> None:
    """Upload a run's adapter, its card and its report to the Hub, in one commit.

    Where the run has not been audited, `python -m audit` makes card and report first.
    """
    card, page = out / "adapter" / "README.md", out / "report.html"
    if not (card.is_file() and page.is_file()):
        audit = [sys.executable, "-m", "audit", "--run", str(out.resolve())]
        if subprocess.run(audit, cwd=Path(__file__).resolve().parents[1]).returncode:
            raise UserError(f"--push-to {repo}: nothing was uploaded, because the audit failed.")
    files = {path.name: path for path in (*sorted((out / "adapter").iterdir()), page)}
    print(f"Uploaded to {upload(files, repo, 'FSRL adapter, its card and its report')}")
