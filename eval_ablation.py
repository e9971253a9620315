"""Measure which features a policy's loss depends on, by zeroing features in its steering.

    python eval_ablation.py --run runs/tiny
    python eval_ablation.py --run OUT --labels LABELS.jsonl

Every number is the SimPO loss of train.py over the evaluation pairs. The residual stream below the
adapter is computed once; each condition then takes one pass through the blocks above. Results are
written to OUT/eval/ as csv and json (`python -m audit` draws them):

    topk      at each position only the k % of the dictionary with the largest |v| is kept
              (Figure 2); 0 % is the base model, 100 % the policy
    ablation  the features of each category are zeroed, and those of controls for comparison
    masks/    the sets of features in `ablation`, as train.py --mask-features reads them

The authors' published curve keeps 0.01 to 10 % in doubling steps, rounded down:

    --rounding down --keep 0.01 0.02 0.04 0.08 0.16 0.32 0.64 1.28 2.56 5.12 10

Each category has two kinds of controls. `random` zeroes as many features, drawn from all outside
the category, used or not. `matched` zeroes as many *used* features outside it: for each feature of
the category that the policy uses, in order of falling usage, the one of nearest usage that is still
free. Features that never steer need no match, because zeroing them changes nothing. A control is
missing where too few features are outside.

Intervals are 95 % percentile intervals over pairs, which are drawn with replacement. A difference
between two conditions is resampled as a difference, pair by pair.
"""

import hashlib
import json
import math
import os
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # see train.py

import numpy as np
import torch
from torch import Tensor

import data
from data import Pair
from fsrl import SteeredModel
from labels import Labels, described, load_labels
from policy import Policy, Stream, adapter_sha256, open_policy
from runtime import cli
from runtime.cli import flag
from runtime.device import DTYPES
from runtime.folder import code_revision
from runtime.messages import shown
from runtime.output import publish, writable
from runtime.sources import TINY, UserError
from runtime.tables import interval, write_table
from simpo import preference_losses

TINY_LABELS = tuple(str(TINY / "labels" / name) for name in ("fires.jsonl", "promotes.jsonl"))
MOST = 0.9  # of the gain, for the summary
UNLIKE = 0.1  # share of a category's usage by which that of its control may differ
MASKS_AT_ONCE = 8  # steered streams [T, d] that are in memory together


@dataclass(frozen=True)
class Settings:
    run: str | None = flag(None, "run folder written by train.py, adapter folder, or Hub id")
    data: str | None = flag(None, "data to evaluate on (default: the run's evaluation data)")
    labels: tuple[str, ...] = flag((), "label files of the run's SAE (default for tiny: its own)")
    assume_labels_match: bool = flag(False, "take label files that name no SAE for the run's")
    keep: tuple[float, ...] = flag(
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10), "percentages of the dictionary to keep"
    )
    rounding: str = flag(
        "up", "how to round the number of features kept; the authors round down", ("up", "down")
    )
    random_sets: int = flag(2, "random controls for each category")
    bootstrap: int = flag(1000, "resamples of the pairs for each interval")
    seed: int = flag(0, "seed of the resamples and of the random controls")
    pairs: int | None = flag(None, "evaluate on this many pairs only, the first ones")
    tokens_per_microbatch: int = flag(
        8192, "tokens in a forward pass; changes memory and speed only"
    )
    model: str | None = flag(None, "base model, if no longer where the run recorded it")
    sae: str | None = flag(None, "SAE, if no longer where the run recorded it")
    sae_id: str | None = flag(None, "folder of the SAE in --sae")
    dtype: str = flag("auto", "dtype of products; auto: bfloat16 on CUDA, else float32", DTYPES)
    device: str = flag("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is a GPU")
    out: str | None = flag(None, "folder for the results (default: that of --run)")

    def __post_init__(self):
        if self.run is None:
            raise UserError("--run: a run's folder, an adapter folder or a Hub id was expected.")
        cli.at_least(self, 1, "bootstrap", "pairs", "tokens_per_microbatch")
        cli.at_least(self, 0, "seed", "random_sets")
        if not all(0 <= percent <= 100 for percent in self.keep):
            raise UserError("--keep: percentages from 0 to 100 were expected.")


# --- what is evaluated ----------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """A run that is opened for evaluation."""

    policy: Policy
    pairs: list[Pair]
    labels: list[Labels]
    about: dict  # run, data, SAE, labels, code: the `about` of each table
    out: Path  # the folder that holds eval/


def open_evaluation(s: Settings) -> Evaluation:
    """Open what the flags name. Raises UserError, before anything is computed, for wrong flags."""
    out = out_folder(s.run, s.out)
    tokens = s.tokens_per_microbatch
    policy = open_policy(s.run, s.model, s.sae, s.sae_id, s.device, s.dtype, tokens)
    paths = s.labels or (TINY_LABELS if policy.recorded.sae == "tiny" else ())
    sae = policy.steered.sae
    labels = [load_labels(path, sae, s.assume_labels_match) for path in paths]
    if len({table.name for table in labels}) < len(labels):
        raise UserError("--labels: two files have the same name, by which tables tell them apart.")

    pairs, source = policy.eval_pairs(s.data, s.pairs)
    if len(pairs) < 2:
        raise UserError(f"--data {source}: 1 pair to evaluate on; an interval needs two.")
    about = described_run(policy, source, pairs, [described(table) for table in labels])
    about |= dict(beta=policy.recorded.beta, gamma_ratio=policy.recorded.gamma_ratio)
    return Evaluation(policy, pairs, labels, about | dict(bootstrap=s.bootstrap, seed=s.seed), out)


def out_folder(run: str, out: str | None) -> Path:
    """The folder for results: --out, or the folder that --run names.

    Raises UserError where it could not be written, and for a Hub id without --out.
    """
    if out:
        return writable(Path(out))
    if not Path(run).is_dir():
        raise UserError(
            f"--run {run}: no such folder; for a Hub id, --out must say where the results go."
        )
    return writable(Path(run), "run")


def described_run(policy: Policy, source: str, pairs: list[Pair], labels: list[dict]) -> dict:
    """The `about` of a table. source: name of the data. labels: labels.described of each file."""
    sae = policy.steered.sae
    return dict(
        run=policy.name,
        adapter_sha256=adapter_sha256(policy.folder),
        data=source,
        pairs=len(pairs),
        pairs_sha256=hashlib.sha256(repr(pairs).encode()).hexdigest(),  # of their token ids
        base_model=policy.recorded.model,
        layer=policy.steered.layer,
        d_model=sae.d_model,
        d_sae=sae.d_sae,
        sae=sae.source,
        sae_id=sae.sae_id,
        sae_sha256=sae.sha256,
        dtype=policy.device.dtype_name,
        labels=labels,
        code=code_revision(),
    )


def seconds_per_condition(policy: Policy, pairs: list[Pair], timed: int = 8) -> float:
    """Estimated seconds of all pairs under one condition, from the first `timed` pairs."""
    some, conditions = pairs[:timed], 4
    for _ in range(2):  # the first time also allocates memory
        start = time.perf_counter()
        pair_losses(policy, some, lambda x: [x] * conditions)
        seconds = time.perf_counter() - start
    return seconds / conditions * data.positions(pairs) / data.positions(some)


# --- losses under a change ------------------------------------------------------------------------


def loss_above(policy: Policy, stream: Stream, x: Tensor) -> Tensor:
    """SimPO loss [P] of the pairs of a micro-batch. x [T, d]: their stream above the adapter."""
    hidden = policy.steered.above(x, stream.plan)
    logps = policy.base.logps(hidden, stream.packed)
    return preference_losses(
        logps, stream.packed, policy.recorded.beta, policy.recorded.gamma_ratio
    ).loss


@torch.inference_mode()
def pair_losses(
    policy: Policy,
    pairs: list[Pair],
    conditions: Callable[[Tensor], Iterable[Tensor]],
    what: str | None = None,
) -> Tensor:
    """SimPO loss of each pair under each condition: float64 [conditions, P], on the CPU.

    conditions: given the stream x [T, d] that the adapter reads, yields the stream x' [T, d] above
    it for each condition. what: title of the progress bar.
    """
    losses: list[Tensor] = [torch.empty(0)] * len(pairs)
    for stream in policy.streams(pairs, what):
        with policy.autocast():
            found = [loss_above(policy, stream, x) for x in conditions(stream.x)]
        for i, column in zip(stream.pairs, torch.stack(found, 1).cpu(), strict=True):
            losses[i] = column
    return torch.stack(losses, 1)


Variants = Callable[[Tensor], Iterator[Tensor]]  # v [rows, F] -> v [rows, F] for each condition


def steer_variants(steered: SteeredModel, x: Tensor, variants: Variants) -> list[Tensor]:
    """x [T, d] -> x' [T, d] for each condition; the adapter runs once."""
    pieces = []
    for rows in steered.pieces(x):
        v = steered.acting(rows)  # [rows, d] -> [rows, F]
        pieces.append([steered.add(rows, changed) for changed in variants(v)])
    return [torch.cat(condition) for condition in zip(*pieces, strict=True)]


def keep_top(counts: list[int]) -> Variants:
    """For each n of counts, v with all but the n largest |v| of each position zeroed."""

    def variants(v: Tensor) -> Iterator[Tensor]:
        largest = max((n for n in counts if n < v.shape[1]), default=0)
        order = v.abs().topk(largest).indices  # [rows, largest]; one sort serves all counts
        for n in counts:
            top = order[:, :n]
            whole = n >= v.shape[1]
            yield v if whole else torch.zeros_like(v).scatter_(1, top, v.gather(1, top))

    return variants


def without(masks: Tensor) -> Variants:
    """For each mask of bool [conditions, F], v with the mask's features zeroed."""
    return lambda v: (v * kept for kept in (~masks).to(v.dtype))


def ablated_streams(steered: SteeredModel, x: Tensor, masks: Tensor) -> Iterator[Tensor]:
    """x [T, d], masks bool [conditions, F] -> x' [T, d] with each mask's features zeroed.

    MASKS_AT_ONCE of them are in memory together.
    """
    groups = masks.to(x.device).split(MASKS_AT_ONCE) if len(masks) else ()
    return chain(*(steer_variants(steered, x, without(group)) for group in groups))


def ablate(policy: Policy, pairs: list[Pair], masks: Tensor) -> Tensor:
    """Losses with each mask's features zeroed: bool [conditions, F] -> float64 [conditions, P]."""
    return pair_losses(policy, pairs, lambda x: ablated_streams(policy.steered, x, masks))


class Losses(NamedTuple):
    """Float64 [conditions, P] each."""

    topk: Tensor  # conditions: the base model, each number of features kept, the policy
    ablation: Tensor  # conditions: each set of features zeroed


def all_losses(policy: Policy, pairs: list[Pair], counts: list[int], masks: Tensor) -> Losses:
    """The losses of both tables from one pass through the blocks below the adapter.

    counts: numbers of features to keep. masks: bool [conditions, F], features to zero.
    """
    distinct = sorted({*counts, policy.steered.sae.d_sae})

    def conditions(x: Tensor) -> Iterator[Tensor]:
        yield x
        yield from steer_variants(policy.steered, x, keep_top(distinct))
        yield from ablated_streams(policy.steered, x, masks)

    losses = pair_losses(policy, pairs, conditions, "ablating")
    curve, ablation = losses.split([1 + len(distinct), len(masks)])
    order = [0, *(1 + distinct.index(n) for n in counts), -1]
    return Losses(curve[order], ablation)


@torch.inference_mode()
def feature_usage(policy: Policy, pairs: list[Pair]) -> np.ndarray:
    """Share of positions at which each feature steers (v is not 0), float64 [F].

    Positions are those of all p + w and p + l, without the first one, which is <bos> unless the
    prompt was truncated.
    """
    used = torch.zeros(policy.steered.sae.d_sae, dtype=torch.float64, device=policy.device.name)
    positions = 0.0
    for stream in policy.streams(pairs, "usage"):
        weight = stream.packed.copies * (stream.packed.position > 0)
        positions += weight.sum().item()
        pieces = zip(policy.steered.pieces(stream.x), policy.steered.pieces(weight), strict=True)
        for rows, copies in pieces:
            with policy.autocast():
                active = policy.steered.acting(rows) != 0
            used += copies @ active.to(copies.dtype)
    return (used / positions).cpu().numpy()


# --- controls -------------------------------------------------------------------------------------


class FeatureSet(NamedTuple):
    """The features of a category, or of a control for it."""

    labels: Labels
    category: str
    name: str  # "category", "matched", "random 0", ...
    mask: np.ndarray  # bool [F]


def random_set(mask: np.ndarray, seed: tuple[int, ...]) -> np.ndarray | None:
    """As many features as in mask (bool [F]), drawn from those outside; None where too few are."""
    outside = np.flatnonzero(~mask)
    if len(outside) < mask.sum():
        return None
    drawn = np.random.default_rng(seed).choice(outside, mask.sum(), replace=False)
    return np.isin(np.arange(len(mask)), drawn)


def matched_set(mask: np.ndarray, usage: np.ndarray) -> np.ndarray | None:
    """For each used feature in mask, in order of falling usage, the free one outside of nearest
    usage: bool [F].

    mask bool [F], usage [F]. None where no feature of mask is used, or too few outside are.
    """
    outside = [k for k in np.argsort(usage, kind="stable").tolist() if not mask[k] and usage[k] > 0]
    inside = np.sort(usage[mask & (usage > 0)])[::-1].tolist()
    if not inside or len(inside) > len(outside):
        return None
    values = usage[outside].tolist()
    taken = np.zeros(len(mask), dtype=bool)
    for wanted in inside:
        i = bisect_left(values, wanted)
        if i == len(values) or (i > 0 and wanted - values[i - 1] <= values[i] - wanted):
            i -= 1
        taken[outside.pop(i)] = True
        values.pop(i)
    return taken


def feature_sets(
    labels: list[Labels], usage: np.ndarray, random_sets: int, seed: int
) -> list[FeatureSet]:
    """Every category that has a feature, each followed by its controls."""
    sets = []
    for table in labels:
        for category, mask in table.categories.items():
            if not mask.any():
                continue
            found = {"category": mask, "matched": matched_set(mask, usage)}
            found |= {f"random {i}": random_set(mask, (seed, i)) for i in range(random_sets)}
            sets += [FeatureSet(table, category, n, m) for n, m in found.items() if m is not None]
    return sets


# --- tables ---------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A row of the table topk."""

    percent: float
    features: int
    loss: float
    low: float
    high: float
    recovered: float  # share of the policy's gain over the base model; nan without a gain


class Ablated(NamedTuple):
    """A row of the table ablation. low, high: a 95 % interval of the difference before them."""

    labels: str
    kind: str
    matched: bool  # whether the label file states the run's SAE
    category: str
    set: str  # "category", or the name of the control
    features: int  # how many are zeroed
    used: int  # how many of these steer anywhere
    usage: float  # the sum of their usage
    loss: float  # SimPO loss with them zeroed
    delta: float  # that loss less the policy's
    low: float
    high: float
    delta_per_feature: float
    delta_per_used: float | None
    excess: float | None  # of a control: the category's delta less this one
    excess_low: float | None
    excess_high: float | None


def kept(percent: float, features: int, rounding: str = "up") -> int:
    """How many of so many features a percentage is."""
    exact = round(percent / 100 * features, 9)  # undoes float errors such as 7.000000000000001
    return math.ceil(exact) if rounding == "up" else math.floor(exact)


def topk_rows(percents: list[float], features: int, losses: Tensor, s: Settings) -> list[Kept]:
    """losses [conditions, P]: the base model's (0 %) first, the policy's (100 %) last."""
    low, high = interval(losses, s.bootstrap, s.seed)
    mean = losses.mean(1)
    gain = mean[0] - mean[-1]
    recovered = (mean[0] - mean) / gain.where(gain > 0, torch.nan)
    counts = [kept(percent, features, s.rounding) for percent in percents]
    columns = (column.tolist() for column in (mean, low, high, recovered))
    return [Kept(*row) for row in zip(percents, counts, *columns, strict=True)]


def ablation_rows(
    sets: list[FeatureSet], losses: Tensor, policy_losses: Tensor, usage: np.ndarray, s: Settings
) -> list[Ablated]:
    """losses [sets, P], policy_losses [P], usage [F]."""
    deltas = losses - policy_losses
    own = [i for i, x in enumerate(sets) if x.name == "category"]
    excess = torch.stack([deltas[max(j for j in own if j <= i)] for i in range(len(sets))]) - deltas
    columns = (deltas.mean(1), *interval(deltas, s.bootstrap, s.seed))
    columns += (excess.mean(1), *interval(excess, s.bootstrap, s.seed))
    numbers = torch.stack(columns, 1).tolist()

    rows = []
    for x, loss, (delta, low, high, *beyond) in zip(
        sets, losses.mean(1).tolist(), numbers, strict=True
    ):
        features, used = int(x.mask.sum()), int((usage[x.mask] > 0).sum())
        about = (x.labels.name, x.labels.kind, x.labels.matched, x.category, x.name)
        size = (features, used, float(usage[x.mask].sum()))
        each = (delta / features, delta / used if used else None)
        beyond = (None, None, None) if x.name == "category" else beyond
        rows.append(Ablated(*about, *size, loss, delta, low, high, *each, *beyond))
    return rows


# --- the evaluation -------------------------------------------------------------------------------


class Results(NamedTuple):
    topk: list[Kept]
    ablation: list[Ablated]  # empty where there are no categories
    sets: list[FeatureSet]  # behind `ablation`


def evaluate(e: Evaluation, s: Settings) -> Results:
    usage = feature_usage(e.policy, e.pairs)
    sets = feature_sets(e.labels, usage, s.random_sets, s.seed)
    masks = np.array([x.mask for x in sets]).reshape(len(sets), len(usage))
    percents = sorted({percent for percent in s.keep if 0 < percent < 100})
    counts = [kept(percent, len(usage), s.rounding) for percent in percents]
    losses = all_losses(e.policy, e.pairs, counts, torch.from_numpy(masks))
    curve = topk_rows([0.0, *percents, 100.0], len(usage), losses.topk, s)
    ablation = ablation_rows(sets, losses.ablation, losses.topk[-1], usage, s) if sets else []
    return Results(curve, ablation, sets)


def conditions(e: Evaluation, s: Settings) -> int:
    """An upper bound on the number of conditions that evaluate measures."""
    categories = sum(int(mask.any()) for t in e.labels for mask in t.categories.values())
    return 3 + len(s.keep) + categories * (2 + s.random_sets)


def about_tables(e: Evaluation, s: Settings) -> dict:
    """The `about` of topk and ablation."""
    return e.about | dict(keep=s.keep, rounding=s.rounding, random_sets=s.random_sets)


def write(e: Evaluation, s: Settings, found: Results, folder: Path, masks: Path) -> None:
    """Write the tables topk and ablation into `folder` and the sets of features into `masks`."""
    about = about_tables(e, s)
    write_table(folder, "topk", about | dict(labels=[]), [row._asdict() for row in found.topk])
    if found.ablation:
        write_table(folder, "ablation", about, [row._asdict() for row in found.ablation])
    for x in found.sets:
        write_mask(masks, x)


def write_mask(folder: Path, x: FeatureSet) -> None:
    """Write the indices of a set as a json list, under a name that every file system accepts."""
    name = re.sub(r"[^\w.-]+", "_", f"{x.labels.name}-{x.category}-{x.name}")
    while (folder / f"{name}.json").exists():  # of another category, spelled alike
        name += "_"
    (folder / f"{name}.json").write_text(json.dumps(np.flatnonzero(x.mask).tolist()) + "\n")


def of_usage(usage: float, wanted: float) -> str:
    """What to call the usage of a matched control, because the nearest may be far."""
    if abs(usage - wanted) <= UNLIKE * wanted:
        return "of like usage"
    return f"of {'less' if usage < wanted else 'more'} usage ({usage:.3g} against {wanted:.3g})"


def summary(found: Results) -> str:
    """Three lines for the terminal: the gain, how few features carry it, the costliest category."""
    base, *curve, policy = found.topk
    lines = [f"SimPO loss {base.loss:.3f} with the base model, {policy.loss:.3f} with the policy."]
    enough = next((row for row in curve if row.recovered >= MOST), None)
    if enough:
        lines.append(
            f"With only the {enough.features:,} strongest features at each position (of the rows "
            f"of topk) it keeps {enough.recovered:.0%} of that gain."
        )
    own = [row for row in found.ablation if row.set == "category"]
    if own:
        top = max(own, key=lambda row: row.delta)
        here = [r for r in found.ablation if (r.labels, r.category) == (top.labels, top.category)]
        control = next((row for row in here if row.set == "matched"), None)
        beside = ""
        if control:
            like = of_usage(control.usage, top.usage)
            beside = f"; as many others {like} cost {control.delta:+.3f}"
        lines.append(
            f"Of {len(own)} categories, {top.labels}: {top.category} costs most when its features "
            f"are zeroed, {top.delta:+.3f}{beside}."
        )
    return "\n".join(lines)


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    evaluation = open_evaluation(s)
    seconds = seconds_per_condition(evaluation.policy, evaluation.pairs)
    seconds *= conditions(evaluation, s)
    print(f"{len(evaluation.pairs):,} pairs, about {seconds:.0f} s.", file=sys.stderr)
    found = evaluate(evaluation, s)
    eval_folder = evaluation.out / "eval"
    with publish(eval_folder) as folder, publish(eval_folder / "masks") as masks:
        write(evaluation, s, found, folder, masks)
    print(f"\n{shown(summary(found))}\nThe rest: topk, ablation and masks/ in {eval_folder}.")


if __name__ == "__main__":
    cli.run(main)
