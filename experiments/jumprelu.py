"""Does a JumpReLU adapter beat ReLU? The question that Appendix C leaves open, on the small world.

    python -m experiments.jumprelu --out runs/jumprelu

Three methods: ReLU with an L1 penalty; JumpReLU with an L0 penalty whose thresholds train as they
are (direct), or as their logarithm with ε = 0.001, as in the authors' code (log). Each has the same
budget: first four settings at one penalty and seed 0. Of those that at least halve the unsteered
model's loss, one is kept: the least loss times L0 among those that steer at most 50 features a
position, or where none does, the sparsest. Then, with that setting, three penalties and three
seeds.

OUT/runs.jsonl     one row a run; a run that stands here already is not made again
OUT/tables.md      tuning, comparison, and single runs beyond the budget, which show how much its
                   choices decide
OUT/jumprelu.png   evaluation loss against L0: runs, and each method's Pareto front over means
"""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import train
from experiments.fitting import fit, fresh, scorer_of, tiny_policy
from policy import load_preferences
from runtime import cli, rows
from runtime.cli import flag
from runtime.messages import brief
from runtime.output import replacing, writable, write_whole
from runtime.progress import parts
from runtime.sources import UserError

STEPS, PAIRS = 48, 16  # optimiser steps, and pairs in each
SEEDS = (0, 1, 2)
DENSE = 50  # features a position, of 1,024: beyond it the comparison has no interest
UNSTEERED = 4.2  # evaluation loss of the small world's model


class Setting(NamedTuple):
    """What is tuned."""

    name: str
    adapter: str
    lr: float = 0.002  # of the adapter's weights
    threshold_lr: float | None = None
    bandwidth: float | None = None


class Method(NamedTuple):
    penalty: str  # l1 or l0
    tuning: float  # the penalty's weight while tuning
    weights: tuple[float, ...]  # those of the comparison
    settings: tuple[Setting, ...]  # to choose from


METHODS = {
    "ReLU + L1": Method(
        "l1",
        0.02,
        (0.005, 0.02, 0.1),
        tuple(Setting(f"learning rate {lr}", "relu", lr) for lr in (0.001, 0.002, 0.004, 0.008)),
    ),
    "JumpReLU + L0, direct": Method(
        "l0",
        0.1,
        (0.1, 1.0, 10.0),
        tuple(
            Setting(
                f"ε {bandwidth}, threshold rate {lr}",
                "jumprelu",
                threshold_lr=lr,
                bandwidth=bandwidth,
            )
            for bandwidth in (0.05, 0.5)
            for lr in (0.02, 0.2)
        ),
    ),
    "JumpReLU + L0, log": Method(
        "l0",
        0.1,
        (0.1, 1.0, 10.0),
        tuple(  # 1, 100, 300 and 1,000 times the adapter's learning rate
            Setting(f"ε 0.001, threshold rate {lr}", "jumprelu-log", threshold_lr=lr)
            for lr in (0.002, 0.2, 0.6, 2.0)
        ),
    ),
}


class Plan(NamedTuple):
    """One run."""

    method: str
    setting: Setting
    weight: float  # of the penalty
    seed: int


def beyond() -> tuple[Plan, ...]:
    """Single runs: rates outside the budget, and ε and the parametrisation apart."""
    relu = Setting("learning rate 0.016", "relu", 0.016)
    fast = Setting("ε 0.5, threshold rate 0.2, learning rate 0.008", "jumprelu", 0.008, 0.2, 0.5)
    narrow = Setting("ε 0.001, threshold rate 0.2", "jumprelu", 0.002, 0.2, 0.001)
    wide = [
        Setting(f"ε {bandwidth}, threshold rate 0.6", "jumprelu-log", 0.002, 0.6, bandwidth)
        for bandwidth in (0.05, 0.5)
    ]
    first, direct, log = METHODS
    return (
        Plan(first, relu, 0.02, 0),
        Plan(first, relu, 0.005, 0),
        Plan(direct, fast, 1.0, 0),
        Plan(direct, narrow, 1.0, 0),
        *(Plan(log, setting, 1.0, 0) for setting in wide),
    )


class Result(NamedTuple):
    """A row of runs.jsonl; loss, l0 and l1 on all pairs of evaluation."""

    method: str
    setting: str
    weight: float
    seed: int
    loss: float
    accuracy: float
    l0: float
    l1: float
    threshold: float | None  # median θ

    def of(self, plan: Plan) -> bool:
        return self[:4] == (plan.method, plan.setting.name, plan.weight, plan.seed)


@dataclass(frozen=True)
class Settings:
    out: str = flag("runs/jumprelu", "folder to write")


# --- runs -----------------------------------------------------------------------------------------


def runner() -> Callable[[Plan], Result]:
    """Load the world once; returns what makes a run in it."""
    policy = tiny_policy()
    pairs, eval_pairs, *_ = load_preferences(policy.recorded, policy.tokenizer)

    def run(plan: Plan) -> Result:
        adapter, lr, threshold_lr, bandwidth = plan.setting[1:]
        settings = train.Settings(
            adapter=adapter,
            lr=lr,
            threshold_lr=threshold_lr,
            seed=plan.seed,
            max_steps=STEPS,
            batch_size=PAIRS,
            **{METHODS[plan.method].penalty: plan.weight},
        )
        trained = fresh(policy, adapter, bandwidth, plan.seed)
        fit(trained, pairs, settings)
        found = train.evaluate(trained.model, eval_pairs, scorer_of(trained, settings))
        threshold = None
        if adapter != "relu":
            threshold = trained.steered.adapter.threshold.median().item()
        measured = (found[name] for name in ("loss", "accuracy", "l0", "l1"))
        return Result(plan.method, plan.setting.name, *plan[2:], *measured, threshold)

    return run


def name_of(plan: Plan) -> str:
    return f"{plan.method}, {plan.setting.name}"


class Runs:
    """OUT/runs.jsonl: what is there is read, what is missing is made."""

    def __init__(self, out: Path):
        self.path = writable(out) / "runs.jsonl"
        found = rows.read(self.path) if self.path.exists() else []
        try:
            self.results = [Result(**row) for row in found]
        except TypeError as e:
            raise UserError(f"{self.path}: not the runs of this experiment ({brief(e)}).") from e
        self.run = None

    def __call__(self, plans: Sequence[Plan], what: str) -> list[Result]:
        return [self.one(plan) for plan in parts(plans, what, "runs", name_of)]

    def one(self, plan: Plan) -> Result:
        found = next((result for result in self.results if result.of(plan)), None)
        if found is not None:
            return found
        self.run = self.run or runner()
        found = self.run(plan)
        self.results.append(found)
        lines = (json.dumps(result._asdict(), ensure_ascii=False) for result in self.results)
        write_whole(self.path, "".join(f"{line}\n" for line in lines))
        return found


# --- choosing and averaging -----------------------------------------------------------------------


def choose(results: Sequence[Result]) -> Result:
    """The setting that is kept, by the rule above."""

    def order(r: Result):
        dense = r.l0 > DENSE
        return r.loss > UNSTEERED / 2, dense, r.l0 if dense else r.loss * r.l0

    return min(results, key=order)


class Mean(NamedTuple):
    """A method at one penalty, over seeds."""

    method: str
    weight: float
    loss: float
    least: float
    most: float
    l0: float
    l1: float
    threshold: float | None


def means(results: Sequence[Result]) -> Iterator[Mean]:
    for method, weight in dict.fromkeys((r.method, r.weight) for r in results):
        group = [r for r in results if (r.method, r.weight) == (method, weight)]
        loss = [r.loss for r in group]
        l0, l1 = (statistics.mean(getattr(r, name) for r in group) for name in ("l0", "l1"))
        thresholds = [r.threshold for r in group if r.threshold is not None]
        threshold = statistics.mean(thresholds) if thresholds else None
        spread = min(loss), max(loss)
        yield Mean(method, weight, statistics.mean(loss), *spread, l0, l1, threshold)


def front(points: Sequence[Mean]) -> list[Mean]:
    """Those that no other point beats in both loss and L0, from sparse to dense."""
    best, kept = math.inf, []
    for point in sorted(points, key=lambda p: (p.l0, p.loss)):
        if point.loss < best:
            best = point.loss
            kept.append(point)
    return kept


# --- what is written ------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def theta(threshold: float | None) -> str:
    return "" if threshold is None else f"{threshold:.3g}"


def tuning_table(results: Sequence[Result], kept: Sequence[Result]) -> str:
    head = ("method", "setting", "loss", "L0", "median θ", "")
    rows = []
    for r in results:
        mark = "**kept**" if r in kept else ""
        rows.append((r.method, r.setting, f"{r.loss:.5f}", f"{r.l0:.2f}", theta(r.threshold), mark))
    return markdown(head, rows)


def comparison_table(points: Sequence[Mean]) -> str:
    head = ("method", "weight", "loss (mean)", "over the seeds", "L0", "L1", "median θ", "")
    overall, rows = front(points), []
    for p in points:
        spread = f"{p.least:.5f} to {p.most:.5f}"
        sizes = f"{p.l0:.2f}", f"{p.l1:.2f}", theta(p.threshold)
        mark = "front" if p in overall else ""
        rows.append((p.method, f"{p.weight:g}", f"{p.loss:.5f}", spread, *sizes, mark))
    return markdown(head, rows)


def beyond_table(results: Sequence[Result]) -> str:
    head = ("method", "setting", "weight", "loss", "L0", "L1", "median θ")
    rows = []
    for r in results:
        sizes = f"{r.l0:.2f}", f"{r.l1:.2f}", theta(r.threshold)
        rows.append((r.method, r.setting, f"{r.weight:g}", f"{r.loss:.5f}", *sizes))
    return markdown(head, rows)


def draw(results: Sequence[Result], points: Sequence[Mean], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for color, marker, method in zip(("C0", "C1", "C2"), "os^", METHODS, strict=True):
        mine = [r for r in results if r.method == method]
        style = dict(color=color, marker=marker)
        axis.plot([r.l0 for r in mine], [r.loss for r in mine], ls="", alpha=0.4, ms=5, **style)
        line = front([p for p in points if p.method == method])
        axis.plot([p.l0 for p in line], [p.loss for p in line], ms=7, label=method, **style)

    axis.set(xscale="log", yscale="log")
    axis.set(xlabel="L0: features steered per position", ylabel="SimPO loss (evaluation)")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    runs = Runs(Path(s.out))
    tuning = [
        Plan(name, setting, method.tuning, 0)
        for name, method in METHODS.items()
        for setting in method.settings
    ]
    tuned = runs(tuning, "tuning")
    kept = [choose([r for r in tuned if r.method == name]) for name in METHODS]

    compared = []
    for (name, method), chosen in zip(METHODS.items(), kept, strict=True):
        setting = next(setting for setting in method.settings if setting.name == chosen.setting)
        plans = [Plan(name, setting, weight, seed) for weight in method.weights for seed in SEEDS]
        compared += runs(plans, name)

    points = list(means(compared))
    tables = [tuning_table(tuned, kept), comparison_table(points)]
    tables = "\n".join([*tables, beyond_table(runs(beyond(), "beyond the budget"))])
    write_whole(Path(s.out) / "tables.md", tables)
    draw(compared, points, Path(s.out) / "jumprelu.png")
    print(tables)
    print(f"Written to {s.out}: runs.jsonl, tables.md, jumprelu.png")


if __name__ == "__main__":
    cli.run(main)
