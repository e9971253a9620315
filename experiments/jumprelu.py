"""The open question of the paper's Appendix C, on the small world: does a JumpReLU adapter beat ReLU + L1?

    python -m experiments.jumprelu --out runs/jumprelu

Three methods: ReLU with an L1 penalty; JumpReLU with an L0 penalty and thresholds trained as they are (direct), or as
their logarithm with ε and the initial threshold at 0.001 (log: the paper's). Each has the same budget: first four
settings at one penalty and seed 0. Of those that at least halve the unsteered model's loss, one is kept: the least
loss times L0 among those that steer at most 50 features a position, or where none does, the sparsest. Then, with
that, three penalties and three seeds. Every run is a normal run of train.py in its own folder, found again when the
command is repeated. Writes OUT/jumprelu.png (evaluation loss against L0: runs, and each method's Pareto front over
means) and OUT/jumprelu.csv, and prints both tables.
"""

import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from experiments import sweep
from runtime import cli
from runtime.cli import flag

COMMON = "--model tiny --layer 2 --max-steps 48 --batch-size 16 --eval-every 0"
LOG = "--threshold-parametrisation log --bandwidth 0.001 --threshold-init 0.001"
METHODS = {  # (adapter, penalty while tuning, {settings to choose from}, penalties of the comparison)
    "ReLU + L1": (
        "relu",
        0.02,
        {f"relu-lr{lr}": f"--lr {lr}" for lr in (0.001, 0.002, 0.004, 0.008)},
        (0.005, 0.02, 0.1),
    ),
    "JumpReLU + L0, direct": (
        "jumprelu",
        0.1,
        {
            f"direct-{width}-lr{lr}": f"--threshold-lr {lr} --bandwidth {width}"
            for width in (0.05, 0.5)
            for lr in (0.02, 0.2)
        },
        (0.1, 1.0, 10.0),
    ),
    "JumpReLU + L0, log": (
        "jumprelu",
        0.1,
        # 1, 100, 300 and 1,000 times the adapter's learning rate
        {f"log-0.001-lr{lr}": f"--threshold-lr {lr} {LOG}" for lr in (0.002, 0.2, 0.6, 2)},
        (0.1, 1.0, 10.0),
    ),
}
SEEDS = (0, 1, 2)
DENSE = 50  # features a position, of 1,024: beyond it the comparison has no interest
UNSTEERED = 4.2  # evaluation loss of the small world's model


@dataclass(frozen=True)
class Settings:
    out: str = flag("runs/jumprelu", "folder of the experiment")
    draw_only: bool = flag(False, "run nothing: tabulate and draw what has finished")


def planned(
    out: Path, adapter: str, weights: tuple[float, ...], seeds: tuple[int, ...], flags: str
) -> list[sweep.Run]:
    penalty = dict(l0=weights) if adapter == "jumprelu" else dict(l1=weights)
    s = sweep.Settings(adapters=(adapter,), seeds=seeds, cache=False, out=str(out), **penalty)
    return sweep.plan(s, [*COMMON.split(), *flags.split()])


def run_all(runs: list[sweep.Run], cache: Path) -> None:
    """Run what is not finished, all of it with one cache of activations."""
    todo = [
        sweep.Run(r.out, r.flags, r.settings, ("--cache-activations", str(cache)))
        for r in runs
        if not r.finished
    ]
    if todo and sweep.execute(todo, ["cpu"]):
        raise SystemExit("A run failed.")


def front(points: list[dict]) -> list[dict]:
    """Those that no other point beats in both loss and L0, from sparse to dense."""
    best, kept = math.inf, []
    for p in sorted(points, key=lambda p: (p["l0"], p["loss"])):
        if p["loss"] < best:
            best, kept = p["loss"], [*kept, p]
    return kept


def median_threshold(run: sweep.Run) -> float | None:
    weights = load_file(run.out / "adapter" / "adapter.safetensors")
    return weights["threshold"].median().item() if "threshold" in weights else None


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    out = Path(s.out)
    tuning = {
        method: {
            name: planned(out / "tune" / name, adapter, (weight,), (0,), flags)
            for name, flags in tried.items()
        }
        for method, (adapter, weight, tried, _) in METHODS.items()
    }
    if not s.draw_only:
        run_all(
            [run for tried in tuning.values() for runs in tried.values() for run in runs],
            out / "activations",
        )
    chosen = {}
    print(f"{'tuning':<22} {'loss':>9} {'L0':>8} {'median θ':>9}")
    for method, tried in tuning.items():
        scores = {}
        for name, runs in tried.items():
            for run, row in zip(runs, sweep.collect(runs), strict=False):
                dense = row["l0"] > DENSE
                scores[name] = (
                    row["loss"] > UNSTEERED / 2,
                    dense,
                    row["l0"] * (1.0 if dense else row["loss"]),
                )
                theta = median_threshold(run)
                print(
                    f"{name:<22} {row['loss']:9.5f} {row['l0']:8.2f} {'' if theta is None else f'{theta:9.4f}'}"
                )
        chosen[method] = min(scores, key=scores.get)

    plans = {
        method: planned(out / chosen[method], adapter, weights, SEEDS, tried[chosen[method]])
        for method, (adapter, _, tried, weights) in METHODS.items()
    }
    if not s.draw_only:  # a seed at a time, so that an interrupted experiment can be drawn
        runs = [run for runs in plans.values() for run in runs]
        run_all(sorted(runs, key=lambda run: run.settings.seed), out / "activations")
    rows, means = [], []
    for method, runs in plans.items():
        finished = [run for run in runs if run.finished]
        for run, row in zip(finished, sweep.collect(finished), strict=True):
            rows.append(
                dict(method=method, setting=chosen[method])
                | row
                | dict(theta=median_threshold(run))
            )
    for method, (*_, weights) in METHODS.items():
        for weight in weights:
            group = [row for row in rows if (row["method"], row["weight"]) == (method, weight)]
            if group:
                loss, l0 = ([row[name] for row in group] for name in ("loss", "l0"))
                thetas = [row["theta"] for row in group if row["theta"] is not None]
                p = dict(method=method, weight=weight, seeds=len(group), loss=statistics.mean(loss))
                p |= dict(
                    l0=statistics.mean(l0),
                    losses=loss,
                    l0s=l0,
                    l1=statistics.mean(row["l1"] for row in group),
                )
                means.append(p | dict(theta=statistics.mean(thetas) if thetas else None))
    overall = front(means)
    heads = f"{'loss':>9} {'(least to greatest)':>21} {'L0':>7} {'L1':>8} {'median θ':>9}"
    print(f"\n{'method':<22} {'weight':>7} {'seeds':>5} {heads}")
    for p in means:
        spread = f"{min(p['losses']):.5f} to {max(p['losses']):.5f}"
        theta = "" if p["theta"] is None else f"{p['theta']:9.4f}"
        mark = "  front" if p in overall else ""
        what = f"{p['method']:<22} {p['weight']:7g} {p['seeds']:5} {p['loss']:9.5f} {spread:>21}"
        print(f"{what} {p['l0']:7.2f} {p['l1']:8.2f} {theta:>9}{mark}")
    with open(out / "jumprelu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, means, out / "jumprelu.png")


def draw(rows: list[dict], means: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for color, marker, method in zip(("C0", "C1", "C2"), "os^", METHODS, strict=True):
        mine = [row for row in rows if row["method"] == method]
        axis.plot(
            [r["l0"] for r in mine],
            [r["loss"] for r in mine],
            marker,
            color=color,
            alpha=0.4,
            ms=5,
            ls="",
        )
        line = front([p for p in means if p["method"] == method])
        axis.plot(
            [p["l0"] for p in line],
            [p["loss"] for p in line],
            color=color,
            marker=marker,
            ms=7,
            label=method,
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="L0: features steered per position",
        ylabel="SimPO loss (evaluation)",
    )
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main)
