"""Sweeps of layer, penalty, kind of adapter and seed: every configuration a normal run of train.py in its own folder.

    python sweep.py --layers 6 12 18 24 --seeds 0 1 2 -- --epochs 1
    python sweep.py --l1 0.005 0.01 0.02 0.04 0.08 --out runs/l1 -- --model tiny --max-steps 64
    python sweep.py --adapters relu jumprelu --l1 0.01 0.02 --l0 0.001 0.01 --dry-run

What stands after `--` goes to every train.py unchanged. --l1 are the penalties of relu and soft-threshold, --l0 those
of jumprelu. A finished run is skipped, an unfinished one resumed from its last checkpoint (without one, moved aside and
started again), a crashed one reported while the rest goes on; so the same command continues a sweep that was
interrupted. One configuration runs on each of --devices at a time; on a cluster, --list prints the commands for its
scheduler, and the same command without it then finds them finished and draws.

OUT/layer12-relu-l1_0.02-seed0/   a run as train.py leaves it, its output in OUT/layer12-relu-l1_0.02-seed0.log
OUT/sweep.csv, OUT/sweep.png      a row per finished run; Figure 4: loss and L0 against the penalty and the layer
OUT/sweep.json                    the elbow of each penalty curve

Deviation from the paper: its elbow was chosen by eye. Here it is the point farthest below the straight line between the
curve's ends, in (log L0, log loss) scaled to the unit square, means over seeds.
"""

import csv
import dataclasses
import io
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import train
from fsrl import ACTIVATIONS
from runtime import cli
from runtime.cli import flag
from runtime.sources import UserError, write_whole

HERE = Path(__file__).resolve().parents[1]
ELSEWHERE = (  # settings that may differ in a run that is taken for finished: they do not change what it finds
    *("out", "device", "cache_activations", "tokens_per_microbatch"),
    *("checkpoint_every", "resume", "timeout", "zero", "shard"),
)
TIMED_STEPS = 3


@dataclass(frozen=True)
class Settings:
    layers: tuple[int, ...] = flag((), "layers to steer (default: train.py's)")
    adapters: tuple[str, ...] = flag(("relu",), "kinds of adapter")
    l1: tuple[float, ...] = flag(
        (), "weights α of the L1 penalty, for relu and soft-threshold (default: train.py's)"
    )
    l0: tuple[float, ...] = flag((), "weights λ of the L0 penalty, for jumprelu")
    seeds: tuple[int, ...] = flag((0,), "seeds")
    cache: bool = flag(
        True, "runs on a layer share their residual streams below the adapter, in OUT/activations"
    )
    devices: tuple[str, ...] = flag(
        (), "one configuration runs on each (default: every CUDA device, or cpu)"
    )
    out: str = flag("runs/sweep", "folder of the sweep")
    dry_run: bool = flag(
        False, "print the plan and the time it would take; run nothing but a short timing"
    )
    list: bool = flag(
        False, "print the commands that are still to run, one a line, and run nothing"
    )

    def __post_init__(self):
        for name in set(self.adapters) - set(ACTIVATIONS):
            raise UserError(f"--adapters {name}: one of {', '.join(ACTIVATIONS)} was expected.")
        if "jumprelu" in self.adapters and not self.l0:
            raise UserError("--adapters jumprelu: give its penalties with --l0.")
        if self.l0 and "jumprelu" not in self.adapters:
            raise UserError("--l0: only --adapters jumprelu has a gradient for the L0 penalty.")
        for name in ("layers", "adapters", "l1", "l0", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"--{name} {' '.join(map(str, values))}: a value stands twice.")
        for name in set(self.devices):
            if not (name == "cpu" or name.startswith("cuda:") and name[5:].isdigit()):
                raise UserError(f"--devices {name}: cpu or cuda:N was expected.")


@dataclass(frozen=True)
class Run:
    """One configuration: its folder, its flags for train.py, and the settings that those make."""

    out: Path
    flags: tuple[str, ...]
    settings: train.Settings
    cache: tuple[str, ...]  # --cache-activations and its folder, or nothing

    def command(self, *more: str) -> list[str]:
        return [
            sys.executable,
            str(HERE / "train.py"),
            *self.flags,
            *self.cache,
            "--out",
            str(self.out),
            *more,
        ]

    @property
    def finished(self) -> bool:
        """train.py writes the adapter last. Raises UserError where the folder holds a run with other settings."""
        if not (self.out / "adapter" / "adapter.safetensors").is_file():
            return False
        theirs, ours = (
            json.loads((self.out / "config.json").read_text())["settings"],
            dataclasses.asdict(self.settings),
        )
        ours["dtype"] = train.dtype_on(theirs["device"], ours["dtype"])
        for name, value in ours.items():
            if name not in ELSEWHERE and name in theirs and value != theirs[name]:
                raise UserError(
                    f"--out {self.out}: holds a run with {name} {theirs[name]}, not {value}."
                )
        if not train.same_stream(ours, theirs):
            raise UserError(
                f"--out {self.out}: under bfloat16 a run with cached activations is not one without."
            )
        return True


def plan(s: Settings, rest: list[str]) -> list[Run]:
    """Every configuration, a layer at a time. rest: the flags for every train.py, checked here by its own parser."""
    runs = []
    for layer, adapter in itertools.product(s.layers or (None,), s.adapters):
        kind = "l0" if adapter == "jumprelu" else "l1"
        for penalty, seed in itertools.product(getattr(s, kind) or (None,), s.seeds):
            flags = [*rest, "--adapter", adapter, "--seed", str(seed)]
            flags += ["--layer", str(layer)] if layer is not None else []
            flags += [f"--{kind}", f"{penalty:g}"] if penalty is not None else []
            cache = ("--cache-activations", str(Path(s.out) / "activations")) if s.cache else ()
            settings = cli.parse(train.Settings, flags, presets=train.PRESETS)
            if settings.full:
                raise UserError("--full: a sweep is over adapters.")
            weight = getattr(settings, kind)
            name = f"layer{settings.layer}-{adapter}-{kind}_{weight:g}-seed{seed}"
            runs.append(Run(Path(s.out) / name, tuple(flags), settings, cache))
    return runs


# --- running ------------------------------------------------------------------------------------------------


def execute(runs: list[Run], devices: list[str]) -> list[Run]:
    """Run them, one a device at a time; returns those that failed.

    The first run on a layer writes the residual streams that the others read, and so they wait for it.
    """
    waiting, failed, first = (
        list(runs),
        [],
        {},
    )  # first: layer -> the run that writes its streams, None once one has
    change = threading.Condition()

    def next_run() -> Run | None:
        with change:
            while waiting:
                for run in waiting:
                    if not run.cache or first.setdefault(run.settings.layer, run) in (run, None):
                        waiting.remove(run)
                        return run
                change.wait()
            return None

    def work(device: str) -> None:
        while run := next_run():
            try:
                ok = start(run, device)
            except OSError as e:
                ok = False
                bar.write(f"{run.out.name} could not start: {e}", file=sys.stderr)
            with change:
                if ok:
                    first[run.settings.layer] = None
                else:
                    failed.append(run)
                    if first.get(run.settings.layer) is run:  # another writes them, then
                        del first[run.settings.layer]
                change.notify_all()
                bar.update()

    def start(run: Run, device: str) -> bool:
        resume = ["--resume"] if any(run.out.glob("checkpoints/step-*")) else []
        if run.out.exists() and not resume:  # kept beside, so that nothing of the user's is deleted
            aside = (
                run.out.with_name(f"{run.out.name}.unfinished-{i}") for i in itertools.count(1)
            )
            run.out.rename(next(path for path in aside if not path.exists()))
        environment = dict(os.environ)
        if device.startswith("cuda:"):
            environment["CUDA_VISIBLE_DEVICES"] = visible(int(device[5:]))
        elif len(devices) > 1:
            environment.setdefault(
                "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(devices)))
            )
        log = run.out.with_name(run.out.name + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            command = run.command("--device", device.partition(":")[0], *resume)
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            ).returncode
        if code:
            last = (log.read_text().replace("\r", "\n").strip().splitlines() or ["no output"])[-1]
            bar.write(f"{run.out.name} failed ({code}): {last}", file=sys.stderr)
        return not code

    with tqdm(total=len(runs), desc="runs", unit="run") as bar:
        workers = [threading.Thread(target=work, args=(device,)) for device in devices]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:  # the runs under way hear of it themselves
            waiting.clear()
            raise
    return failed


def visible(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls this process's device `index`."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[index].strip() if named else str(index)


def estimate(runs: list[Run], devices: list[str]) -> tuple[float, str]:
    """Seconds that a run takes, and how that is known: from finished ones here, or else from a few timed steps."""
    walls = [wall(run.out) for run in runs if run.finished]
    if walls:
        return statistics.mean(walls), f"mean of the {len(walls)} finished here"
    with tempfile.TemporaryDirectory() as folder:
        probe = dataclasses.replace(runs[0], out=Path(folder) / "run", cache=())
        short = ("--max-steps", str(TIMED_STEPS), "--device", devices[0])
        started = time.perf_counter()
        result = subprocess.run(probe.command(*short), capture_output=True, text=True)
        total = time.perf_counter() - started
        if result.returncode:
            raise UserError(f"The timing failed: {result.stderr.strip().splitlines()[-1]}")
        rows = [json.loads(row) for row in (probe.out / "metrics.jsonl").open()]
    steps = [row for row in rows if row["split"] == "train"]
    step = statistics.median(row["seconds"] for row in steps)
    s = runs[0].settings
    planned = s.max_steps or s.epochs * round(steps[-1]["step"] / steps[-1]["epoch"])
    once = total - sum(row["seconds"] for row in steps)  # loading, and evaluation before and after
    between = (
        planned // s.eval_every * once / 2 if s.eval_every else 0.0
    )  # at most half of that each
    how = f"{TIMED_STEPS} steps of {runs[0].out.name} were timed, without cached activations"
    return once + between + planned * step, how


def wall(out: Path) -> float:
    """Seconds of a finished run from its config.json to its adapter: loading is left out."""
    return (out / "adapter" / "adapter.safetensors").stat().st_mtime - (
        out / "config.json"
    ).stat().st_mtime


# --- what came out ------------------------------------------------------------------------------------------


def collect(runs: list[Run]) -> list[dict]:
    """A row per finished run: what it was, and its last evaluation (or, without evaluation data, its last step)."""
    rows = []
    for run in runs:
        if not run.finished:
            continue
        s, log = run.settings, [json.loads(row) for row in (run.out / "metrics.jsonl").open()]
        last = [row for row in log if row["split"] == "eval"] or log
        kind = "l0" if s.adapter == "jumprelu" else "l1"
        kept = {name: last[-1][name] for name in ("loss", "accuracy", "margin", "l0", "l1", "step")}
        what = dict(
            run=run.out.name,
            layer=s.layer,
            adapter=s.adapter,
            penalty=kind,
            weight=getattr(s, kind),
        )
        rows.append(
            what
            | dict(seed=s.seed)
            | kept
            | dict(split=last[-1]["split"], seconds=round(wall(run.out), 1))
        )
    return rows


def over_seeds(rows: list[dict]) -> Iterator[tuple[dict, list[dict]]]:
    """Rows that differ in their seed alone, together: (what they share, they)."""

    def key(row):
        return row["layer"], row["adapter"], row["weight"]

    for _, group in itertools.groupby(sorted(rows, key=key), key=key):
        group = list(group)
        yield {name: group[0][name] for name in ("layer", "adapter", "penalty", "weight")}, group


def curves(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(layer, adapter) -> points of rising penalty, each with mean, least and greatest loss and l0 over seeds."""
    found = {}
    for what, group in over_seeds(rows):
        point = dict(what)
        for name in ("loss", "l0"):
            values = [row[name] for row in group]
            point |= {
                name: statistics.mean(values),
                f"{name}_range": (min(values), max(values)),
                "seeds": len(values),
            }
        found.setdefault((what["layer"], what["adapter"]), []).append(point)
    return found


def elbow(points: list[dict]) -> dict | None:
    """The point farthest below the line between the curve's ends, in (log L0, log loss) scaled to the unit square.

    None for fewer than three points, a curve that is not above zero, or one that nowhere lies below its line.
    """
    if len(points) < 3 or any(p["l0"] <= 0 or p["loss"] <= 0 for p in points):
        return None
    points = sorted(points, key=lambda p: p["l0"])
    x, y = ([math.log(p[name]) for p in points] for name in ("l0", "loss"))
    if x[-1] == x[0] or max(y) == min(y):
        return None
    x = [(a - x[0]) / (x[-1] - x[0]) for a in x]
    y = [(b - min(y)) / (max(y) - min(y)) for b in y]
    below = [
        y[0] + (y[-1] - y[0]) * a - b for a, b in zip(x, y, strict=True)
    ]  # vertical: proportional to the distance
    best = max(range(len(points)), key=below.__getitem__)
    return points[best] if below[best] > 1e-9 else None


def draw(rows: list[dict], path: Path) -> None:
    """Figure 4 of the paper: loss and L0 against the penalty's weight (where it varies) and the layer (likewise).

    Points are runs, lines go through means over seeds, a ring marks the elbow.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter, NullLocator

    by_curve = curves(rows)
    panels = [("weight", points, key) for key, points in by_curve.items() if len(points) > 1]
    by_layer = {}
    for points in by_curve.values():
        for p in points:
            by_layer.setdefault((p["adapter"], p["penalty"], p["weight"]), []).append(p)
    panels += [("layer", points, key) for key, points in by_layer.items() if len(points) > 1]
    kinds = [kind for kind in ("weight", "layer") if any(panel[0] == kind for panel in panels)] or [
        "weight"
    ]
    panels = panels or [("weight", points, key) for key, points in by_curve.items()]
    figure, axes = plt.subplots(
        len(kinds), 2, figsize=(11, 3.6 * len(kinds)), squeeze=False, layout="constrained"
    )
    for kind, (left, right) in zip(kinds, axes, strict=True):
        for i, (_, points, key) in enumerate(panel for panel in panels if panel[0] == kind):
            points = sorted(points, key=lambda p: p[kind])
            label = (
                f"layer {key[0]}, {key[1]}"
                if kind == "weight"
                else f"{key[0]}, {key[1].upper()} weight {key[2]:g}"
            )
            for axis, name in ((left, "loss"), (right, "l0")):
                axis.plot(
                    [p[kind] for p in points], [p[name] for p in points], color=f"C{i}", label=label
                )
                for p in points:
                    same = [
                        r for r in rows if all(r[n] == p[n] for n in ("layer", "adapter", "weight"))
                    ]
                    axis.plot(
                        [p[kind]] * len(same),
                        [r[name] for r in same],
                        "o",
                        color=f"C{i}",
                        alpha=0.5,
                        ms=4,
                    )
                best = elbow(points) if kind == "weight" else None
                if best:
                    axis.plot(best[kind], best[name], "o", ms=13, mfc="none", mec=f"C{i}")
        left.set(ylabel="SimPO loss (evaluation)")
        right.set(ylabel="L0: features steered per position")
        for axis in (left, right):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
            ticks = sorted({p[kind] for panel in panels if panel[0] == kind for p in panel[1]})
            if kind == "weight" and ticks[0] > 0:
                axis.set_xscale("log")
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_xlabel("weight of the penalty" if kind == "weight" else "layer")
            axis.spines[["top", "right"]].set_visible(False)
        right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(runs: list[Run], out: Path) -> None:
    """sweep.csv, sweep.json, sweep.png, and a table: means over seeds."""
    rows = collect(runs)
    if not rows:
        raise UserError(f"--out {out}: no run of this sweep has finished.")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(out / "sweep.csv", text.getvalue())
    by_curve = curves(rows)
    rule = "farthest below the line between the ends, in (log L0, log loss) scaled to the unit square, means over seeds"
    elbows = {
        f"layer {layer}, {adapter}": elbow(points) for (layer, adapter), points in by_curve.items()
    }
    write_whole(
        out / "sweep.json", json.dumps(dict(elbow_rule=rule, elbows=elbows), indent=2) + "\n"
    )
    draw(rows, out / "sweep.png")
    print(
        f"\n{'layer':>5} {'adapter':>15} {'penalty':>12} {'seeds':>5} {'loss':>9} {'spread':>8} {'L0':>9}"
    )
    for key, points in by_curve.items():
        for p in points:
            low, high = p["loss_range"]
            mark = "  elbow" if p is elbows[f"layer {key[0]}, {key[1]}"] else ""
            what = (
                f"{p['layer']:5} {p['adapter']:>15} {p['penalty']} {p['weight']:>9g} {p['seeds']:5}"
            )
            print(f"{what} {p['loss']:9.4f} {high - low:8.4f} {p['l0']:9.2f}{mark}")
    print(f"Written to {out}: sweep.csv, sweep.json, sweep.png")


def main() -> None:
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    s = cli.parse(Settings, arguments[:cut], doc=__doc__)
    runs = plan(s, arguments[cut + 1 :])
    todo = [run for run in runs if not run.finished]
    if s.list:
        print("\n".join(shlex.join(run.command()) for run in todo))
        return
    for name in s.devices:
        train.resolve_device(
            dataclasses.replace(runs[0].settings, device=name)
        )  # UserError where it is not there
    devices = list(s.devices) or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    if s.dry_run:
        for run in runs:
            print(f"{'finished' if run not in todo else 'to run':<9} {run.out}")
        seconds, how = estimate(runs, devices) if todo else (0.0, "nothing is left to run")
        hours = math.ceil(len(todo) / len(devices)) * seconds / 3600
        print(
            f"{len(todo)} of {len(runs)} to run, {len(devices)} at a time, {seconds:.0f} s each: {hours:.2f} hours."
        )
        print(f"Seconds: {how}.")
        return
    failed = execute(todo, devices) if todo else []
    report(runs, Path(s.out))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(run.out.name for run in failed)}."
        )


if __name__ == "__main__":
    cli.run(main)
