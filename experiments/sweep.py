"""Sweeps of layer, SAE width, penalty, kind of adapter and seed: each configuration is a normal run
of train.py in its own folder.

    python -m experiments.sweep --layers 6 12 18 24 --seeds 0 1 2 -- --epochs 1
    python -m experiments.sweep --widths 16k 65k --l1 0.01 0.02 0.04
    python -m experiments.sweep --l1 0.005 0.01 0.02 0.04 --out runs/l1 -- --model tiny
    python -m experiments.sweep --adapters relu jumprelu --l1 0.01 0.02 --l0 0.001 0.01 --dry-run

Flags after `--` go to every train.py unchanged. --l1 are the penalties of relu and soft-threshold,
--l0 those of both jumprelu kinds. For each of --widths, the SAE of lowest average L0 is looked up
in train.py's --sae, which must have GemmaScope's folders.

The same command continues a sweep that was interrupted: a finished run is skipped, an unfinished
one resumed from its last checkpoint (without one, moved aside and started again). A crashed run is
reported and the others go on. One run at a time is on each of --devices. On a cluster, --list
prints the commands for its scheduler; the same command without it draws, once all jobs have ended.
It would start runs that have not finished, and refuses while another process writes to one.

OUT/layer12-relu-l1_0.02-seed0/   a run as train.py leaves it; its output is in ….log beside it
OUT/sweep.csv, OUT/sweep.png      a row per finished run; Figure 4: loss and L0 against each axis
OUT/sweep.json                    the elbow of each penalty curve, or why it has none

Runs of the paper's model and SAE width have the authors' own sweeps beside them, which hold the
penalty: they compare with `total`, not with `loss`. The same grids:

    python -m experiments.sweep --l1 0.006 0.008 0.01 0.02 0.04
    python -m experiments.sweep --layers 6 12 18 24 --l1 0.01 -- --epochs 1

Deviation from the paper: its elbow was chosen by eye. Here it is the point farthest below the
straight line between the curve's ends, in (log L0, log loss) scaled to the unit square, after means
over seeds.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import train
from audit.published import alike, published
from fsrl import KINDS
from runtime import cli, folder, sae_ids
from runtime.cli import flag
from runtime.device import dtype_on, resolve_device
from runtime.folder import read_log
from runtime.output import replacing, write_whole
from runtime.progress import progress_bar
from runtime.sources import UserError, read_json, sha256
from runtime.tables import csv_text

# Flags of train.py that the sweep gives to each run -> its own flag for them.
ALWAYS = dict(adapter="adapters", seed="seeds", out="out", device="devices")
AXIS = dict(layer="layers", sae_id="widths", l1="l1", l0="l0")  # where that flag is given

HERE = Path(__file__).resolve().parents[1]
WEIGHTS = (".safetensors", ".npz")
TIMED_STEPS = 3
POLL = 0.2  # seconds between two looks at the runs under way


@dataclass(frozen=True)
class Settings:
    layers: tuple[int, ...] = flag((), "layers to steer (default: train.py's)")
    widths: tuple[str, ...] = flag((), "widths of the SAE, as its folders say: 16k 65k")
    adapters: tuple[str, ...] = flag(("relu",), "kinds of adapter")
    l1: tuple[float, ...] = flag((), "weights α of the L1 penalty (default: train.py's)")
    l0: tuple[float, ...] = flag((), "weights λ of the L0 penalty, for jumprelu")
    seeds: tuple[int, ...] = flag((0,), "seeds")
    devices: tuple[str, ...] = flag((), "where runs go (default: every CUDA device, or cpu)")
    out: str = flag("runs/sweep", "folder of the sweep")
    dry_run: bool = flag(
        False, "print the plan and how long it would take; run a short timing only"
    )
    list: bool = flag(False, "print the commands that are still to run, one a line; run nothing")

    def __post_init__(self):
        for name in set(self.adapters) - set(KINDS):
            raise UserError(f"--adapters {name}: one of {', '.join(KINDS)} was expected.")
        has_l0 = "l0" in map(penalty_of, self.adapters)
        if has_l0 and not self.l0:
            raise UserError("--adapters jumprelu: give its penalties with --l0.")
        if self.l0 and not has_l0:
            raise UserError("--l0: only --adapters jumprelu has a gradient for the L0 penalty.")
        for name in ("layers", "widths", "adapters", "l1", "l0", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"--{name} {' '.join(map(str, values))}: a value stands twice.")
        for width in self.widths:
            if not re.fullmatch(r"\d+[km]?", width):
                raise UserError(f"--widths {width}: as in width_16k, 16k was expected.")
        for name in self.devices:
            if name != "cpu" and not (name.startswith("cuda:") and name[5:].isdigit()):
                raise UserError(f"--devices {name}: cpu or cuda:N was expected.")


def penalty_of(adapter: str) -> str:
    return "l0" if adapter.startswith("jumprelu") else "l1"


# --- the plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One configuration: its folder, its flags for train.py, and the settings that those make."""

    out: Path
    flags: tuple[str, ...]
    settings: train.Settings
    width: str  # of the SAE, as the sweep was asked for it; "" where it was not

    @property
    def resume(self) -> list[str]:
        """The flag that goes on from the last checkpoint, where there is one."""
        return ["--resume"] if any(self.out.glob("checkpoints/step-*")) else []

    def command(self, *more: str) -> list[str]:
        start = [sys.executable, str(HERE / "train.py"), "--samples", "0"]  # nobody would see them
        return [*start, *self.flags, "--out", str(self.out), *more]

    @property
    def penalty(self) -> str:
        return penalty_of(self.settings.adapter)

    @property
    def weight(self) -> float:
        return getattr(self.settings, self.penalty)

    @property
    def finished(self) -> bool:
        """train.py writes the adapter last.

        Raises UserError where the folder holds a run with other settings, and where a file that it
        read is still there with other content. Weights are not compared: they are large.
        """
        if not folder.finished(self.out):
            return False
        config = read_json(self.out / "config.json")
        theirs = config["settings"]
        ours = dataclasses.asdict(self.settings)
        ours["dtype"] = dtype_on(theirs["device"], ours["dtype"])
        for name, value in ours.items():
            if name not in train.FREE and theirs.get(name, value) != value:
                differs = f"{name} {theirs[name]}, not {value}"
                raise UserError(f"--out {self.out}: holds a run with {differs}.")
        for path, digest in config.get("sha256", {}).items():
            compared = Path(path).suffix not in WEIGHTS and Path(path).is_file()
            if compared and sha256_once(path) != digest:
                raise UserError(f"--out {self.out}: holds a run that read another {path}.")
        return True


sha256_once = functools.cache(lambda path: sha256(Path(path)))


def exact(x: float) -> str:
    """A penalty as short as `:g` shows it, or longer where that would round it."""
    return f"{x:g}" if float(f"{x:g}") == x else repr(x)


def plan(s: Settings, rest: list[str]) -> list[Run]:
    """Every configuration. rest: the flags for every train.py, checked here by its own parser.

    Raises UserError for a mistake in them, for one that the sweep sets itself, and for a width that
    the SAE's repository does not hold.
    """
    ours = ALWAYS | {name: own for name, own in AXIS.items() if getattr(s, own)}
    for word in rest:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and (own := ours.get(name.replace("-", "_"))):
            raise UserError(f"--{name} after `--`: the sweep sets it itself, by its own --{own}.")
    runs = []
    for layer, width in itertools.product(s.layers or (None,), s.widths or ("",)):
        place = ["--layer", str(layer)] if layer is not None else []
        if width:
            place += ["--sae-id", sae_of_width(parsed([*rest, *place]), width)]
        for adapter in s.adapters:
            kind = penalty_of(adapter)
            for penalty, seed in itertools.product(getattr(s, kind) or (None,), s.seeds):
                flags = [*rest, *place, "--adapter", adapter, "--seed", str(seed)]
                flags += [f"--{kind}", exact(penalty)] if penalty is not None else []
                settings = parsed(flags)
                where = f"layer{settings.layer}" + (f"-width{width}" if width else "")
                name = f"{where}-{adapter}-{kind}_{exact(getattr(settings, kind))}-seed{seed}"
                runs.append(Run(Path(s.out) / name, tuple(flags), settings, width))
    return runs


def parsed(flags: list[str]) -> train.Settings:
    settings = cli.parse(train.Settings, flags, presets=train.PRESETS)
    if settings.full:
        raise UserError("--full: a sweep is over adapters.")
    return settings


def sae_of_width(s: train.Settings, width: str) -> str:
    """The SAE id of lowest average L0 at this layer and width. Raises UserError without any."""
    found = sae_ids.default_id(s.sae, s.layer, width)
    if found is None:
        raise UserError(f"--widths {width}: {s.sae} holds no layer_{s.layer}/width_{width}.")
    return found


# --- running --------------------------------------------------------------------------------------


class Started(NamedTuple):
    run: Run
    device: str
    process: subprocess.Popen
    log: Path


def execute(runs: list[Run], devices: list[str]) -> list[Run]:
    """Run them, one a device at a time; returns those that failed."""
    waiting, free, failed = list(runs), list(devices), []
    under_way: list[Started] = []
    line = "{desc}{n:.1f} of {total} runs, {elapsed} so far, {remaining} to go"
    with progress_bar(total=len(runs), bar_format=line, smoothing=0, mininterval=1) as bar:
        try:
            while waiting or under_way:
                while waiting and free:
                    run, device = waiting.pop(0), free.pop(0)
                    try:
                        under_way.append(start(run, device, len(devices)))
                    except (OSError, UserError) as e:
                        bar.write(f"{run.out.name} could not start: {e}", file=sys.stderr)
                        failed.append(run)
                        free.append(device)
                time.sleep(POLL)
                for started in list(under_way):
                    code = started.process.poll()
                    if code is None:
                        continue
                    under_way.remove(started)
                    free.append(started.device)
                    # One that was told to stop saves and ends with 0, before its last step.
                    if code or not folder.finished(started.run.out):
                        why = f"failed ({code})" if code else "ended before it was finished"
                        why += f": {last_line(started.log)}"
                        bar.write(f"{started.run.out.name} {why}", file=sys.stderr)
                        failed.append(started.run)
                names = ", ".join(started.run.out.name for started in under_way)
                bar.set_description_str(f"{names}: " if names else "", refresh=False)
                ended = len(runs) - len(waiting) - len(under_way)
                bar.update(ended + sum(share_done(started.run) for started in under_way) - bar.n)
        except BaseException as e:  # Ctrl-C, SIGTERM (cli.run), an error: no run outlives the sweep
            for started in under_way:
                # Ctrl-C reaches the runs too; a second signal would end them before they save.
                if not isinstance(e, KeyboardInterrupt):
                    started.process.terminate()
            for started in under_way:
                started.process.wait()
            raise
    return failed


def start(run: Run, device: str, at_once: int) -> Started:
    """Start a run, or go on with it from its last checkpoint."""
    refuse_live(run)
    resume = run.resume
    if run.out.exists() and not resume:  # kept beside, so that nothing of the user's is deleted
        aside = (run.out.with_name(f"{run.out.name}.unfinished-{i}") for i in itertools.count(1))
        run.out.rename(next(path for path in aside if not path.exists()))

    environment = dict(os.environ)
    if device.startswith("cuda:"):
        environment["CUDA_VISIBLE_DEVICES"] = visible(int(device[5:]))
    elif at_once > 1:
        threads = max(1, (os.cpu_count() or 1) // at_once)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    command = run.command("--device", device.partition(":")[0], *resume)
    log = run.out.with_name(run.out.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    return Started(run, device, process, log)


def refuse_live(run: Run) -> None:
    """Raises UserError where another process writes to the run's folder."""
    if run.out.exists():
        folder.choose_out(str(run.out), run.out.name, resume=True)


def visible(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls this process's device `index`."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[index].strip() if named else str(index)


def last_line(log: Path) -> str:
    lines = log.read_text().replace("\r", "\n").strip().splitlines()
    return lines[-1][:200] if lines else "no output"


def share_done(run: Run) -> float:
    """Share of a run's steps that its log holds."""
    try:
        with open(run.out / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            rows = [json.loads(line) for line in file.read().splitlines() if b'"train"' in line]
        return rows[-1]["step"] / steps_of(run, rows[-1])
    except (OSError, ValueError, IndexError):  # not there yet, or its last line is not whole
        return 0.0


def steps_of(run: Run, row: dict) -> int:
    """The optimiser steps of a run, from any of its rows."""
    s = run.settings
    return s.max_steps or s.epochs * round(row["step"] / row["epoch"])


def estimate(runs: list[Run], devices: list[str]) -> tuple[float, str]:
    """Seconds that a run takes, and how that is known: from finished ones here, or else from a few
    timed steps.
    """
    walls = [wall(run.out) for run in runs if run.finished]
    if walls:
        return statistics.mean(walls), f"mean of the {len(walls)} finished here, steps alone"

    with tempfile.TemporaryDirectory() as place:
        probe = dataclasses.replace(runs[0], out=Path(place) / "run")
        short = ("--max-steps", str(TIMED_STEPS), "--device", devices[0])
        started = time.perf_counter()
        result = subprocess.run(probe.command(*short), capture_output=True, text=True)
        total = time.perf_counter() - started
        if result.returncode:
            raise UserError(f"The timing failed: {result.stderr.strip().splitlines()[-1]}")
        rows = read_log(probe.out / "metrics.jsonl")

    steps = [row for row in rows if row["split"] == "train"]
    planned = steps_of(runs[0], steps[-1])
    once = total - sum(row["seconds"] for row in steps)  # loading, and evaluation before and after
    every = runs[0].settings.eval_every
    between = planned // every * once / 2 if every else 0.0  # at most half of that each
    step = statistics.median(row["seconds"] for row in steps)
    return once + between + planned * step, f"{TIMED_STEPS} steps of {runs[0].out.name} were timed"


def wall(out: Path) -> float:
    """Seconds of a run's steps: loading, evaluations and pauses before --resume are left out."""
    rows = read_log(out / "metrics.jsonl")
    return sum(row["seconds"] for row in rows if row["split"] == "train")


# --- what came out --------------------------------------------------------------------------------


class Row(NamedTuple):
    """A finished run: what it was, and its last evaluation (without evaluation data, its last
    step).
    """

    run: str
    layer: int
    width: str
    adapter: str
    penalty: str  # l1 or l0
    weight: float  # of the penalty
    seed: int
    loss: float
    accuracy: float
    margin: float
    l0: float
    l1: float
    step: int
    split: str
    seconds: float
    total: float | None = None  # loss with the penalty; rows of an earlier version lack it


def collect(runs: list[Run]) -> list[Row]:
    """The runs that have finished."""
    rows = []
    for run in (run for run in runs if run.finished):
        log, s = read_log(run.out / "metrics.jsonl"), run.settings
        last = ([row for row in log if row["split"] == "eval"] or log)[-1]
        what = (run.out.name, s.layer, run.width, s.adapter, run.penalty, run.weight, s.seed)
        names = ("loss", "accuracy", "margin", "l0", "l1", "step", "split")
        numbers = [last[name] for name in names]
        rows.append(Row(*what, *numbers, round(wall(run.out), 1), last.get("total")))
    return rows


class Point(NamedTuple):
    """Runs that differ in their seed alone: means over them."""

    layer: int
    width: str
    adapter: str
    penalty: str
    weight: float
    loss: float
    l0: float
    seeds: int
    spread: float | None  # greatest minus least loss; None of one seed
    total: float | None = None  # loss with the penalty
    theirs: float | None = None  # the authors' total

    def title(self, axis: str = "weight") -> str:
        """What it shares with the other points of a line along this axis."""
        parts = dict(layer=f"layer {self.layer}", width=self.width and f"width {self.width}")
        parts |= dict(
            adapter=self.adapter, weight=f"{self.penalty.upper()} weight {exact(self.weight)}"
        )
        return ", ".join(part for name, part in parts.items() if part and name != axis)

    def at(self, axis: str) -> float:
        """Where it stands on this axis: weight, layer, or features of the SAE (16k: 16,000)."""
        if axis != "width":
            return getattr(self, axis)
        unit = {"k": 1e3, "m": 1e6}.get(self.width[-1:], 1.0)
        return float(self.width.rstrip("km") or 0) * unit


def over_seeds(rows: Sequence[Row], beside: bool = False) -> dict[Point, list[Row]]:
    """Points in the order of the plan, each with its runs. beside: with the authors' totals."""
    found = {}
    for what in dict.fromkeys(row[1:6] for row in rows):
        same = [row for row in rows if row[1:6] == what]
        losses = [row.loss for row in same]
        spread = max(losses) - min(losses) if len(same) > 1 else None
        l0 = statistics.mean(row.l0 for row in same)
        totals = [row.total for row in same]
        total = None if None in totals else statistics.mean(totals)
        means = (statistics.mean(losses), l0, len(same), spread, total)
        theirs = their_total(*what) if beside else None
        found[Point(*what, *means, theirs)] = same
    return found


def are_alike(runs: Sequence[Run]) -> bool:
    """Whether all that have finished steer a model and an SAE of the published run's shape."""
    done = [run.out / "adapter" / "adapter_config.json" for run in runs if run.finished]
    return all(alike(read_json(path), ("d_model", "d_sae")) for path in done)


def their_total(layer: int, width: str, adapter: str, penalty: str, weight: float) -> float | None:
    """The authors' evaluation loss, penalty included, of such a run; None where they have none."""
    if (adapter, penalty) != ("relu", "l1"):
        return None
    alphas, layers = published()["alpha_sweep"], published()["layer_sweep"]
    if layer == alphas["layer"]:
        return next((row["total"] for row in alphas["rows"] if row["alpha"] == weight), None)
    if weight == layers["alpha"]:
        return next((row["total"] for row in layers["rows"] if row["layer"] == layer), None)
    return None


def lines(points: Iterable[Point], axis: str = "weight") -> dict[str, list[Point]]:
    """title -> the points that differ along this axis alone."""
    found = {}
    for point in sorted(points, key=lambda p: p.at(axis)):
        found.setdefault(point.title(axis), []).append(point)
    return found


class Elbow(NamedTuple):
    point: Point | None
    why_none: str = ""


def elbow(points: Sequence[Point]) -> Elbow:
    """The point farthest below the line between the curve's ends, by the rule above."""
    if len(points) < 3:
        return Elbow(None, f"it takes three penalties and there are {len(points)}")
    if any(p.l0 <= 0 or p.loss <= 0 for p in points):
        return Elbow(None, "an L0 or a loss of 0 has no logarithm")
    points = sorted(points, key=lambda p: p.l0)
    x = [math.log(p.l0) for p in points]
    y = [math.log(p.loss) for p in points]
    if x[-1] == x[0] or max(y) == min(y):
        return Elbow(None, "L0 or loss is the same at all penalties")

    x = [(a - x[0]) / (x[-1] - x[0]) for a in x]
    y = [(b - min(y)) / (max(y) - min(y)) for b in y]
    # Vertical distances, which are proportional to those from the line.
    below = [y[0] + (y[-1] - y[0]) * a - b for a, b in zip(x, y, strict=True)]
    best = max(range(len(points)), key=below.__getitem__)
    if below[best] <= 1e-9:
        return Elbow(None, "no point lies below the straight line between the ends")
    return Elbow(points[best])


# axis -> the authors' sweep along it in published.json, and where its points stand there
THEIRS = dict(weight=("alpha_sweep", "alpha"), layer=("layer_sweep", "layer"))
AXES = dict(weight="weight of the penalty", layer="layer", width="features of the SAE")


def draw(points: dict[Point, list[Row]], path: Path, beside: bool = False) -> None:
    """Figure 4 of the paper: loss and L0 against each axis that varies.

    Dots are runs, lines go through means over seeds, a ring marks the elbow. beside: with the
    authors' sweeps, as crosses, and the totals that they compare with, dashed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {axis: lines(points, axis) for axis in AXES}
    varying = [
        axis for axis, some in panels.items() if any(len(line) > 1 for line in some.values())
    ]
    varying = varying or ["weight"]
    size = (11, 3.6 * len(varying))
    figure, axes = plt.subplots(len(varying), 2, figsize=size, squeeze=False, layout="constrained")
    for axis, pair in zip(varying, axes, strict=True):
        for panel, name in zip(pair, ("loss", "l0"), strict=True):
            for color, (title, line) in enumerate(panels[axis].items()):
                where, means = [p.at(axis) for p in line], [getattr(p, name) for p in line]
                panel.plot(where, means, color=f"C{color}", label=title)
                for p in line:
                    values = [getattr(row, name) for row in points[p]]
                    panel.plot([p.at(axis)] * len(values), values, f"C{color}o", alpha=0.5, ms=4)
                best = elbow(line).point if axis == "weight" else None
                if best:
                    ring = dict(ms=13, mfc="none", mec=f"C{color}")
                    panel.plot(best.weight, getattr(best, name), "o", **ring)
            if beside and axis in THEIRS:
                draw_theirs(panel, axis, name, panels[axis].values())
            set_scales(panel, sorted({p.at(axis) for p in points}), axis != "layer")
            panel.set_xlabel(AXES[axis])
        pair[0].set_ylabel("SimPO loss (evaluation)")
        pair[1].set_ylabel("L0: features steered per position")
        pair[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    with replacing(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)


def draw_theirs(panel, axis: str, name: str, ours: Iterable[list[Point]]) -> None:
    """Crosses of the authors' sweep along an axis; among losses also our totals, which compare."""
    sweep, key = THEIRS[axis]
    if name == "loss":
        for color, line in enumerate(ours):
            if all(p.total is not None for p in line):
                where, totals = [p.at(axis) for p in line], [p.total for p in line]
                panel.plot(where, totals, "--", color=f"C{color}", lw=1)
    value = "total" if name == "loss" else name
    rows = [row for row in published()[sweep]["rows"] if row.get(value) is not None]
    label = "the authors' total; dashed: ours" if name == "loss" else "the authors'"
    panel.plot([row[key] for row in rows], [row[value] for row in rows], "kx", ms=6, label=label)
    if name == "loss":
        panel.legend(handles=[panel.lines[-1]], frameon=False, fontsize=8)


def set_scales(panel, ticks: Sequence[float], logarithmic: bool) -> None:
    from matplotlib.ticker import LogFormatter, NullLocator

    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    if logarithmic and ticks[0] > 0:
        panel.set_xscale("log")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.spines[["top", "right"]].set_visible(False)


RULE = "farthest below the straight line between the ends, in (log L0, log loss) scaled to the unit"
RULE += " square, means over seeds"


def report(runs: list[Run], out: Path) -> None:
    """sweep.csv, sweep.json, sweep.png, and a table: means over seeds."""
    rows = collect(runs)
    if not rows:
        raise UserError(f"--out {out}: no run of this sweep has finished.")
    beside = are_alike(runs)
    points = over_seeds(rows, beside)
    elbows = {title: elbow(line) for title, line in lines(points).items()}
    found = dict(
        elbow_rule=RULE,
        elbows={title: e.point._asdict() if e.point else None for title, e in elbows.items()},
        no_elbow={title: e.why_none for title, e in elbows.items() if e.why_none},
    )
    write_whole(out / "sweep.csv", csv_text([row._asdict() for row in rows]))
    write_whole(out / "sweep.json", json.dumps(found, indent=2) + "\n")
    draw(points, out / "sweep.png", beside)

    heads = f"{'penalty':>12} {'seeds':>5} {'loss':>9} {'spread':>8} {'L0':>9}"
    heads += f" {'total':>9} {'theirs':>9}" if beside else ""
    print(f"\n{'layer':>5} {'width':>6} {'adapter':>15} {heads}")
    for p in points:
        spread = "-" if p.spread is None else f"{p.spread:.4f}"
        mark = "  elbow" if p is elbows[p.title()].point else ""
        what = f"{p.layer:5} {p.width or '-':>6} {p.adapter:>15} {p.penalty} {p.weight:>9g}"
        totals = ["-" if x is None else f"{x:.3f}" for x in (p.total, p.theirs)]
        more = " {:>9} {:>9}".format(*totals) if beside else ""
        print(f"{what} {p.seeds:5} {p.loss:9.4f} {spread:>8} {p.l0:9.2f}{more}{mark}")
    print("spread: greatest minus least loss over the seeds, - where there is one seed.")
    if beside:
        print("total: the loss with the penalty; theirs: the authors' total at these settings.")
    for title, why in found["no_elbow"].items():
        print(f"{title}: no elbow, because {why}.")
    print(f"Written to {out}: sweep.csv, sweep.json, sweep.png")


def main() -> None:
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    s = cli.parse(Settings, arguments[:cut], doc=__doc__)
    runs = plan(s, arguments[cut + 1 :])
    todo = [run for run in runs if not run.finished]
    if s.list:
        print("\n".join(shlex.join(run.command(*run.resume)) for run in todo))
        return
    for name in s.devices:  # UserError where one is not there
        resolve_device(name, runs[0].settings.dtype)
    devices = list(s.devices) or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    if s.dry_run:
        for run in runs:
            print(f"{'to run' if run in todo else 'finished':<9} {run.out}")
        seconds, how = estimate(runs, devices) if todo else (0.0, "nothing is left to run")
        hours = math.ceil(len(todo) / len(devices)) * seconds / 3600
        each = f"{len(devices)} at a time, {seconds:.0f} s each: {hours:.2f} hours"
        print(f"{len(todo)} of {len(runs)} to run, {each}.\nSeconds: {how}.")
        return

    for run in todo:  # before any is started
        refuse_live(run)
    failed = execute(todo, devices) if todo else []
    report(runs, Path(s.out))
    if failed:
        names = ", ".join(run.out.name for run in failed)
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {names}.")


if __name__ == "__main__":
    cli.run(main)
