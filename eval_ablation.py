"""What a policy's loss depends on: features taken away, steering that ignores its context, and each feature's share.

    python eval_ablation.py --run runs/tiny --labels tiny/labels/fires.jsonl tiny/labels/promotes.jsonl
    python eval_ablation.py --run OUT --labels LABELS.jsonl

Everything is the SimPO loss of train.py over the evaluation pairs, the policy's (100 %) and the base model's (0 %)
included. One pass over the blocks below the adapter serves all conditions; each takes one over the blocks above.
Intervals are 95 % percentile intervals over pairs, which are resampled with replacement; a difference between two
conditions is resampled as a difference, pair by pair. Written to OUT/eval/, as csv, json and png of the same numbers:

    topk                  per position only the k % of the dictionary with the largest |v| (Figure 2), rounded up
    ablation              the features of a category zeroed, beside controls of the same number of features
    static                steering that does not read its context, with what it recovers of the policy's gain
    choices               the widened preference gap by kinds of tokens (choices.py): names the category the data taught
    attribution           integrated gradients (attribution.py) by category and by where the steering acts
    attribution_features  the same by feature: the largest shares; all of them in attribution_features.parquet
    masks/                the feature sets behind `ablation`, for train.py --mask-features

Controls of a category. `random`: as many features, drawn among all that are not in it, used or not; one set a seed.
`matched`: for each of its features that the policy uses, the most used ones first, the one of nearest usage that is
outside it and not yet taken; features that never steer are left out, since to zero them changes nothing. Where too few
features are outside, there is no control.

Static steering. `mean v`: v replaced by c times its mean over training positions. `top features`: its m largest entries
alone. `contrastive`: c times the mean difference between chosen and rejected response positions (contrastive activation
addition, arXiv 2312.06681), of the residual stream or of the SAE's features, decoded. All are one vector that is added
at every position, from at most --static-pairs training pairs, none of whose first positions counts. A best c or m is
the best on the evaluation pairs themselves, which favours these baselines.
"""

import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

import data
import train
from audit import choices, figures, report
from audit.attribution import KINDS, Attribution, attribution
from audit.choices import Choices, classes
from audit.features import (
    TINY_LABELS,
    Row,
    categories,
    described_run,
    explain,
    out_folder,
    write_table,
)
from data import Pair
from fsrl import SteeredModel
from labels import Labels, load_labels
from policy import Policy, eval_pairs, open_policy
from runtime import cli
from runtime.cli import flag
from runtime.sources import UserError, publish

MASKS_AT_ONCE = 8  # steered streams [T, d] alive together
CONTROLS = (
    "category",
    "matched",
    "random",
)  # kinds of feature sets: a category itself, then its controls
TOP = 30  # features in attribution_features.csv and .json


@dataclass(frozen=True)
class Settings:
    run: str | None = flag(None, "a folder that train.py wrote, an adapter folder, or its Hub id")
    data: str | None = flag(
        None, "tiny, a parquet or jsonl file, a folder, a Hub id; unset: the run's evaluation data"
    )
    labels: tuple[str, ...] = flag(
        (), "label files of the run's SAE; unset: those of tiny for tiny, else none"
    )
    assume_labels_match: bool = flag(
        False, "take label files that do not say so to be of the run's SAE"
    )
    keep: tuple[float, ...] = flag(
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10), "% of the dictionary kept, for topk"
    )
    random_sets: int = flag(5, "random controls of each category")
    coefficients: tuple[float, ...] = flag((0.25, 0.5, 1, 2, 4, 8), "c of static steering")
    top_features: tuple[int, ...] = flag(
        (1, 4, 16, 64, 256), "m of static steering by the top mean features"
    )
    static_pairs: int = flag(
        1024, "training pairs behind static steering, the first ones; 0: none of it"
    )
    rest: tuple[str, ...] = flag(("content", "chat"), "categories that choices counts as the rest")
    steps: int = flag(
        32,
        "nodes of the attribution's integral, a forward and a backward pass each; 0: no attribution",
    )
    bootstrap: int = flag(1000, "resamples of the pairs behind each interval")
    seed: int = flag(0, "seed of the resamples and of the random controls")
    pairs: int | None = flag(None, "only so many pairs, the first ones")
    tokens_per_microbatch: int = flag(
        8192, "tokens per forward pass, the memory knob; no effect on the result"
    )
    model: str | None = flag(None, "where the base model is now; unset: where the run says")
    sae: str | None = flag(None, "where the SAE is now; unset: where the run says")
    sae_id: str | None = flag(None, "folder within --sae")
    dtype: str = flag(
        "auto", "auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "float32", "bfloat16")
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA when present")
    out: str | None = flag(None, "where eval/ goes; unset: the folder of --run")

    def __post_init__(self):
        if self.run is None:
            raise UserError(
                "--run: a folder that train.py wrote, an adapter folder, or its Hub id was expected."
            )
        cli.at_least_one(self, "bootstrap", "pairs", "tokens_per_microbatch")
        for name in ("seed", "steps", "random_sets", "static_pairs"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative."
                )
        if self.seed >= 2**63:
            raise UserError(f"--seed {self.seed}: too large.")
        if not all(0 <= percent <= 100 for percent in self.keep):
            raise UserError("--keep: percentages from 0 to 100 were expected.")
        if not all(math.isfinite(c) for c in self.coefficients) or not all(
            m >= 1 for m in self.top_features
        ):
            raise UserError(
                "--coefficients and --top-features: finite numbers, and whole ones from 1, were expected."
            )


# --- losses under a change ----------------------------------------------------------------------------------


@torch.inference_mode()
def pair_losses(
    policy: Policy,
    pairs: list[Pair],
    streams: Callable[[Tensor], Iterable[Tensor]],
    s: train.Settings,
) -> Tensor:
    """SimPO loss of every pair under every condition: float64 [conditions, P], on the CPU.

    streams(x) yields one residual stream x' [T, d] a condition, the same conditions each time, given the stream x
    below the adapter, which is computed once for all of them.
    """
    losses: list[Tensor] = [torch.empty(0)] * len(pairs)
    with (
        train.autocast(s),
        tqdm(total=len(pairs), desc="ablating", unit="pair", leave=False) as bar,
    ):
        for micro in data.microbatches(pairs, s.tokens_per_microbatch):
            packed = data.pack_pairs([pairs[i] for i in micro]).to(s.device)
            plan = policy.base.plan(packed)
            x = policy.steered.residual(packed, plan)
            scored = [
                train.preference(policy.base, policy.steered.above(y, plan), packed, s)[0]
                for y in streams(x)
            ]
            for i, column in zip(micro, torch.stack(scored, 1).cpu(), strict=True):
                losses[i] = column
            bar.update(len(micro))
    return torch.stack(losses, 1)


Change = Callable[
    [Tensor], Iterator[Tensor]
]  # v [rows, F] -> what stands in its place, one a condition


def steer(steered: SteeredModel, x: Tensor, change: Change) -> list[Tensor]:
    """x [T, d] -> x' [T, d] of each condition of `change`, from one evaluation of the adapter."""
    parts = []
    for rows in steered.pieces(x):
        parts.append(
            [steered.add(rows, v) for v in change(steered.adapter(rows))]
        )  # [rows, F] -> [rows, d]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def keep_top(counts: list[int]) -> Change:
    """Of each position only the n features with the largest |v|, for each n of counts."""

    def change(v: Tensor) -> Iterator[Tensor]:
        largest = max((n for n in counts if n < v.shape[1]), default=0)
        order = v.abs().topk(largest).indices  # one sort serves all
        for n in counts:
            top = order[:, :n]
            yield v if n >= v.shape[1] else torch.zeros_like(v).scatter_(1, top, v.gather(1, top))

    return change


def without(masks: Tensor) -> Change:
    """The features of each mask zeroed: bool [conditions, F]."""
    return lambda v: (v * kept for kept in (~masks).to(v.dtype))


def ablate(policy: Policy, pairs: list[Pair], masks: Tensor, s: train.Settings) -> Tensor:
    """Losses with each mask's features zeroed: bool [conditions, F] -> float64 [conditions, P]."""
    groups = masks.to(s.device).split(MASKS_AT_ONCE)
    return pair_losses(
        policy, pairs, lambda x: chain(*(steer(policy.steered, x, without(g)) for g in groups)), s
    )


class Means(NamedTuple):
    """Averages over the positions of the unshared sequences, their first ones left out. On the device, float32."""

    usage: Tensor  # [F], share of positions with v ≠ 0
    v: Tensor  # [F]
    x_gap: Tensor  # [d], mean residual stream over chosen responses - over rejected ones
    f_gap: Tensor  # [F], the same of the SAE's features


@torch.inference_mode()
def measure(policy: Policy, pairs: list[Pair], s: train.Settings) -> Means:
    """One pass over the lower blocks, adapter and SAE."""
    steered, (d, F) = policy.steered, policy.steered.sae.W_enc.shape
    sums = [torch.zeros(n, dtype=torch.float64, device=s.device) for n in (F, F)]
    sides = [torch.zeros(2, n, dtype=torch.float64, device=s.device) for n in (d, F)]
    positions, responses = 0.0, torch.zeros(2, dtype=torch.float64, device=s.device)
    with (
        train.autocast(s),
        tqdm(total=len(pairs), desc="measuring", unit="pair", leave=False) as bar,
    ):
        for micro in data.microbatches(pairs, s.tokens_per_microbatch):
            packed = data.pack_pairs([pairs[i] for i in micro]).to(s.device)
            x = steered.residual(packed, policy.base.plan(packed))
            weight = (packed.copies * (packed.position > 0)).to(x.dtype)
            side = torch.stack([packed.branch == 1, packed.branch == 2], 1).to(
                weight.dtype
            )  # [T, 2]
            positions += weight.sum().item()
            responses += side.sum(0)
            for rows, w, on in zip(*(steered.pieces(t) for t in (x, weight, side)), strict=True):
                v, f = (
                    steered.adapter(rows).to(x.dtype),
                    steered.sae.encode(rows).to(x.dtype),
                )  # [rows, F]
                with torch.autocast(
                    x.device.type, enabled=False
                ):  # it would round the sums to bfloat16
                    sums[0] += w @ (v != 0).to(w.dtype)
                    sums[1] += w @ v
                    sides[0] += on.T @ rows
                    sides[1] += on.T @ f
            bar.update(len(micro))
    gaps = [(total / responses[:, None])[0] - (total / responses[:, None])[1] for total in sides]
    return Means(*(t.float() for t in (sums[0] / positions, sums[1] / positions, *gaps)))


# --- how sure -----------------------------------------------------------------------------------------------


def interval(values: Tensor, resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """95 % percentile interval of the mean over pairs: float64 [..., P] -> low [...], high [...].

    The resamples depend on P and seed alone: conditions of the same pairs are resampled alike.
    """
    g, P = torch.Generator().manual_seed(seed), values.shape[-1]
    drawn = []
    for _ in range(resamples):
        times = torch.bincount(torch.randint(P, (P,), generator=g), minlength=P)
        drawn.append(values @ times.to(values.dtype) / P)
    return tuple(
        torch.quantile(torch.stack(drawn), torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)
    )


# --- controls -----------------------------------------------------------------------------------------------


def random_set(mask: np.ndarray, seed: tuple[int, ...]) -> np.ndarray | None:
    """As many features as in mask (bool [F]), drawn among those outside it; None where too few are."""
    outside = np.flatnonzero(~mask)
    if len(outside) < mask.sum():
        return None
    drawn = np.random.default_rng(seed).choice(outside, mask.sum(), replace=False)
    return np.isin(np.arange(len(mask)), drawn)


def matched_set(mask: np.ndarray, usage: np.ndarray) -> np.ndarray | None:
    """One feature outside mask for each used one inside: nearest usage first come, without replacement, the most used
    first; None where none inside is used, or too few outside are.
    """
    outside = [k for k in np.argsort(usage, kind="stable").tolist() if not mask[k] and usage[k] > 0]
    values, taken = usage[outside].tolist(), np.zeros(len(mask), dtype=bool)
    inside = np.sort(usage[mask & (usage > 0)])[::-1].tolist()
    if not inside or len(inside) > len(outside):
        return None
    for wanted in inside:
        i = bisect_left(values, wanted)
        if i == len(values) or i > 0 and wanted - values[i - 1] <= values[i] - wanted:
            i -= 1
        taken[outside.pop(i)] = True
        values.pop(i)
    return taken


class FeatureSet(NamedTuple):
    """A category of a label file, or a control of one."""

    labels: Labels
    category: str
    name: str  # "category", "matched", "random 0", ...
    mask: np.ndarray  # bool [F]


def feature_sets(
    tables: list[Labels], usage: np.ndarray, random_sets: int, seed: int
) -> list[FeatureSet]:
    """Every category that has features, each followed by its controls."""
    sets = []
    for table in tables:
        for category, mask in table.categories.items():
            if not mask.any():
                continue
            controls = {"matched": matched_set(mask, usage)}
            controls |= {f"random {i}": random_set(mask, (seed, i)) for i in range(random_sets)}
            named = {"category": mask} | {name: m for name, m in controls.items() if m is not None}
            sets += [FeatureSet(table, category, name, m) for name, m in named.items()]
    return sets


# --- tables -------------------------------------------------------------------------------------------------


def topk_rows(percents: list[float], features: int, losses: Tensor, s: Settings) -> list[Row]:
    """Figure 2. losses [conditions, P]: the base model's (0 %) first, the policy's (100 %) last."""
    low, high = interval(losses, s.bootstrap, s.seed)
    mean = losses.mean(1)
    recovered = (mean[0] - mean) / (mean[0] - mean[-1])
    counts = [kept(percent, features) for percent in percents]
    columns = zip(
        percents,
        counts,
        mean.tolist(),
        low.tolist(),
        high.tolist(),
        recovered.tolist(),
        strict=True,
    )
    return [
        dict(zip(("percent", "features", "loss", "low", "high", "recovered"), row, strict=True))
        for row in columns
    ]


def ablation_rows(
    sets: list[FeatureSet], losses: Tensor, policy_losses: Tensor, usage: np.ndarray, s: Settings
):
    """A row a set. losses [sets, P], policy_losses [P]. delta: the loss without the set's features less the policy's.
    excess: the category's delta less that of this control.
    """
    deltas = losses - policy_losses
    of_category = torch.stack([deltas[_category_of(sets, i)] for i in range(len(sets))])
    low, high = interval(deltas, s.bootstrap, s.seed)
    excess_low, excess_high = interval(of_category - deltas, s.bootstrap, s.seed)
    rows = []
    for i, (table, category, name, mask) in enumerate(sets):
        used, delta = int((usage[mask] > 0).sum()), deltas[i].mean().item()
        row = dict(
            labels=table.name, kind=table.kind, matched=table.matched, category=category, set=name
        )
        row |= dict(features=int(mask.sum()), used=used, usage=float(usage[mask].sum()))
        row |= dict(
            loss=losses[i].mean().item(), delta=delta, low=low[i].item(), high=high[i].item()
        )
        row |= dict(
            delta_per_feature=delta / mask.sum().item(),
            delta_per_used=delta / used if used else None,
        )
        excess = (
            (of_category[i] - deltas[i]).mean().item(),
            excess_low[i].item(),
            excess_high[i].item(),
        )
        excess = excess if name != "category" else (None, None, None)
        rows.append(row | dict(zip(("excess", "excess_low", "excess_high"), excess, strict=True)))
    return rows


def _category_of(sets: list[FeatureSet], i: int) -> int:
    return max(j for j in range(i + 1) if sets[j].name == "category")


def static_directions(means: Means, steered: SteeredModel, s: Settings) -> tuple[list[Row], Tensor]:
    """What each static condition is called, and the vector it adds: [conditions, d]."""
    W_dec, rows, vectors = steered.sae.W_dec.float(), [], []
    decoded = {"mean v": means.v @ W_dec, "contrastive, residual stream": means.x_gap}
    decoded["contrastive, SAE features"] = means.f_gap @ W_dec
    for (name, direction), c in product(decoded.items(), s.coefficients):
        rows.append(dict(steering=name, coefficient=float(c), features=None))
        vectors.append(c * direction)
    order = means.v.abs().argsort(descending=True, stable=True)
    for m in dict.fromkeys(min(m, len(order)) for m in s.top_features):
        top = order[:m]
        rows.append(dict(steering="top features", coefficient=1.0, features=m))
        vectors.append(means.v[top] @ W_dec[top])
    return rows, torch.stack(vectors) if vectors else W_dec[:0]


def static_rows(
    names: list[Row], losses: Tensor, base: Tensor, policy_losses: Tensor, s: Settings
) -> list[Row]:
    """losses [conditions, P]; base and policy_losses [P]. delta: less the policy's loss, pair by pair."""
    names = [
        dict(steering=name, coefficient=None, features=None) for name in ("base model", "policy")
    ] + names
    losses = torch.cat([torch.stack([base, policy_losses]), losses])
    low, high = interval(losses, s.bootstrap, s.seed)
    delta_low, delta_high = interval(losses - policy_losses, s.bootstrap, s.seed)
    gain = (base - policy_losses).mean()
    rows = []
    for i, name in enumerate(names):
        row = name | dict(loss=losses[i].mean().item(), low=low[i].item(), high=high[i].item())
        row |= dict(delta=(losses[i] - policy_losses).mean().item(), delta_low=delta_low[i].item())
        rows.append(
            row
            | dict(
                delta_high=delta_high[i].item(), recovered=((base - losses[i]).mean() / gain).item()
            )
        )
    return rows


def attribution_rows(
    found: Attribution, tables: list[Labels], used: np.ndarray, s: Settings
) -> list[Row]:
    """Shares by category and by position kind. low and high: of a category's whole share, over pairs.

    Categories of a file may overlap; "(none)" are the features that it puts in no category, "(all)" all of them.
    """
    every = np.ones(found.shares.shape[1], dtype=bool)
    low, high = interval(
        torch.cat([(found.policy - found.base)[None], found.pair_category.T]), s.bootstrap, s.seed
    )
    entries = [
        (
            dict(labels=None, kind=None, matched=None, category="(all)"),
            every,
            low[0].item(),
            high[0].item(),
        )
    ]
    for i, (table, category, mask) in enumerate(category_masks(tables), start=1):
        about = dict(labels=table.name, kind=table.kind, matched=table.matched, category=category)
        entries.append((about, mask, low[i].item(), high[i].item()))
    rows = []
    for about, mask, its_low, its_high in entries:
        by_kind = found.shares[:, torch.from_numpy(mask)].sum(1)
        for where, share in (
            ("(all)", by_kind.sum().item()),
            *zip(KINDS, by_kind.tolist(), strict=True),
        ):
            row = about | dict(
                where=where, features=int(mask.sum()), used=int(used[mask].sum()), share=share
            )
            row |= dict(part_of_change=share / found.change if found.change else None)
            row |= dict(share_per_used=share / int(used[mask].sum()) if used[mask].any() else None)
            whole = where == "(all)"
            rows.append(
                row | dict(low=its_low if whole else None, high=its_high if whole else None)
            )
    return rows


def choice_rows(found: Choices, table: Labels, s: Settings) -> list[Row]:
    """choices.py's shares of the widened preference gap; `named` is true of the category that the data names."""
    low, high = interval(found.shares.T, s.bootstrap, s.seed)  # [C]
    change, p_values, named = found.change.mean().item(), found.p_values(), found.named()
    rows = []
    for c, name in enumerate(found.names):
        share = found.shares[:, c].mean().item()
        row = dict(
            labels=table.name, kind=table.kind, matched=table.matched, tokens=name, share=share
        )
        row |= dict(
            low=low[c].item(),
            high=high[c].item(),
            part_of_change=share / change if change else None,
        )
        rows.append(row | dict(p_value=p_values[c].item(), named=name == named))
    return rows


def category_masks(tables: list[Labels]) -> list[tuple[Labels, str, np.ndarray]]:
    """(file, category, bool [F]) of every category that has features, and "(none)": what a file puts in none."""
    found = []
    for table in tables:
        masks = {name: mask for name, mask in table.categories.items() if mask.any()}
        rest = ~np.any([*masks.values()], axis=0) if masks else np.zeros(0, dtype=bool)
        masks |= {"(none)": rest} if rest.any() else {}
        found += [(table, name, mask) for name, mask in masks.items()]
    return found


def feature_columns(found: Attribution, tables: list[Labels], means: Means) -> dict[str, object]:
    """attribution_features.parquet: a row a feature."""
    F = found.shares.shape[1]
    columns = dict(
        feature=np.arange(F, dtype=np.int32),
        share=found.shares.sum(0).numpy(),
        error=found.error.numpy(),
    )
    columns |= {
        f"share_{kind.replace(' ', '_')}": row.numpy()
        for kind, row in zip(KINDS, found.shares, strict=True)
    }
    columns |= dict(usage=means.usage.cpu().numpy(), mean_v=means.v.cpu().numpy())
    for table in tables:
        columns |= {f"{table.name}:{category}": mask for category, mask in table.categories.items()}
        columns[f"explanation_{table.name}"] = [table.explanations.get(k) for k in range(F)]
    return columns


def top_rows(columns: dict, tables: list[Labels]) -> list[Row]:
    """The TOP features by |share|, with what the label files say of them."""
    rows = []
    for k in np.argsort(-np.abs(columns["share"]), kind="stable")[:TOP].tolist():
        row = {
            name: columns[name][k].item()
            for name in ("feature", "share", "error", "usage", "mean_v")
        }
        rows.append(row | dict(explanation=explain(tables, k), categories=categories(tables, k)))
    return rows


# --- the evaluation -----------------------------------------------------------------------------------------


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    out = out_folder(s)
    policy = open_policy(s.run, s.model, s.sae, s.sae_id, s.device, s.dtype)
    steered, settings = (
        policy.steered,
        replace(policy.settings, tokens_per_microbatch=s.tokens_per_microbatch),
    )
    if steered is None:
        raise UserError(
            f"--run {s.run}: has no adapter; a model trained whole has no features to take away."
        )
    paths = s.labels or (TINY_LABELS if settings.sae == "tiny" else ())
    tables = [load_labels(path, steered.sae, s.assume_labels_match) for path in paths]
    if len({table.name for table in tables}) < len(tables):
        raise UserError("--labels: two files of one name; tables tell them apart by it.")
    pairs, source = eval_pairs(policy, s.data, s.pairs)
    about = described_run(policy, source, pairs, tables) | dict(bootstrap=s.bootstrap, seed=s.seed)
    about |= dict(beta=settings.beta, gamma_ratio=settings.gamma_ratio)
    directions = [], torch.zeros(0, steered.sae.d_model)
    if s.static_pairs:
        recorded = (
            policy.folder / "config.json"
        ).is_file() or not s.data  # a bare adapter does not say
        train_source = settings.data if recorded else s.data
        train_pairs, train_source = eval_pairs(policy, train_source, s.static_pairs, split="train")
        about |= dict(static_data=train_source, static_pairs=len(train_pairs))
        directions = static_directions(measure(policy, train_pairs, settings), steered, s)

    means = measure(policy, pairs, settings)
    usage = means.usage.cpu().numpy()
    sets = feature_sets(tables, usage, s.random_sets, s.seed)
    percents = sorted({percent for percent in s.keep if 0 < percent < 100})
    conditions = all_losses(
        policy, pairs, settings, [kept(p, len(usage)) for p in percents], sets, directions[1]
    )
    base, full = conditions.topk[0], conditions.topk[-1]
    plain = about | dict(labels=[])  # of tables that no label enters
    outputs = [
        (
            "topk",
            plain,
            topk_rows([0.0, *percents, 100.0], len(usage), conditions.topk, s),
            figures.topk,
        )
    ]
    if sets:
        rows = ablation_rows(sets, conditions.ablation, full, usage, s)
        outputs.append(("ablation", about, rows, figures.ablation))
    if s.static_pairs:
        outputs.append(
            (
                "static",
                plain,
                static_rows(directions[0], conditions.static, base, full, s),
                figures.static,
            )
        )
    choice = []
    for table in tables:
        if masks := {
            name: mask
            for name, mask in table.categories.items()
            if name not in s.rest and mask.any()
        }:
            found = choices.choices(
                policy, pairs, settings, [classes(policy, pairs, settings, masks, table.kind)]
            )
            choice += choice_rows(found[0], table, s)
    if choice:
        outputs.append(("choices", about | dict(rest=list(s.rest)), choice, figures.choices))
    columns = None
    if s.steps:
        members = [torch.from_numpy(mask) for _, _, mask in category_masks(tables)]
        members = torch.stack(members) if members else None
        found = attribution(policy, pairs, settings, s.steps, members)
        more = about | dict(steps=s.steps, change=found.change, residual=found.residual)
        columns = feature_columns(found, tables, means)
        outputs.append(
            (
                "attribution",
                more,
                attribution_rows(found, tables, usage > 0, s),
                figures.attribution,
            )
        )
        outputs.append(
            ("attribution_features", more, top_rows(columns, tables), figures.attribution_features)
        )

    with publish(out / "eval") as part, publish(out / "eval" / "masks") as masks:
        for feature_set in sets:
            write_mask(masks, feature_set)
        for name, its_about, rows, draw in outputs:
            write_table(part, name, its_about, rows, draw)
        if columns:
            pq.write_table(pa.table(columns), part / "attribution_features.parquet")
    print_summary(outputs)
    if (out / "report.html").is_file():
        report.write_report(out)
    print(
        f"Written to {out / 'eval'}: {', '.join(name for name, *_ in outputs)} (csv, json, png), masks/"
    )


def kept(percent: float, features: int) -> int:
    """percent of the dictionary, rounded up (the inner rounding undoes float products such as 7.000000000000001)."""
    return math.ceil(round(percent / 100 * features, 9))


class Conditions(NamedTuple):
    """Losses [conditions, P] of each table, from one pass over the lower blocks."""

    topk: Tensor  # the base model first, then each number of features, then the policy
    ablation: Tensor  # a set of features each
    static: Tensor  # a vector each


def all_losses(
    policy, pairs, s: train.Settings, counts: list[int], sets: list[FeatureSet], vectors: Tensor
):
    """counts: features kept at a position. vectors [conditions, d]: added at every position."""
    F = policy.steered.sae.d_sae
    distinct = sorted({*counts, F})
    masks = (
        torch.from_numpy(np.stack([x.mask for x in sets]))
        if sets
        else torch.zeros(0, F, dtype=torch.bool)
    )
    groups = masks.to(s.device).split(MASKS_AT_ONCE) if sets else ()

    def streams(x: Tensor) -> Iterator[Tensor]:
        yield x
        yield from steer(policy.steered, x, keep_top(distinct))
        for group in groups:
            yield from steer(policy.steered, x, without(group))
        yield from (x + vector for vector in vectors)

    losses = pair_losses(policy, pairs, streams, s)
    curve, ablation, static = losses.split([1 + len(distinct), len(masks), len(vectors)])
    return Conditions(curve[[0, *(1 + distinct.index(n) for n in counts), -1]], ablation, static)


def write_mask(folder: Path, feature_set: FeatureSet) -> None:
    """The indices of a set, a json list, under a name safe for files whatever a label file calls its category."""
    table, category, name, mask = feature_set
    file = re.sub(r"[^\w.-]+", "_", f"{table.name}-{category}-{name}")
    (folder / f"{file}.json").write_text(json.dumps(np.flatnonzero(mask).tolist()) + "\n")


def print_summary(outputs: list) -> None:
    tables = {name: (about, rows) for name, about, rows, _ in outputs}
    curve = tables["topk"][1]
    print(
        f"\n{'SimPO loss':<34}{'base':>9} {'policy':>9}\n{'':34}{curve[0]['loss']:9.3f} {curve[-1]['loss']:9.3f}"
    )
    if "choices" in tables:
        rows = tables["choices"][1]
        for name in dict.fromkeys(row["labels"] for row in rows):
            here = [row for row in rows if row["labels"] == name]
            shares = ", ".join(f"{row['tokens']} {row['part_of_change'] or 0:.0%}" for row in here)
            said = next((row["tokens"] for row in here if row["named"]), "no category")
            print(
                f"\nThe policy's choices, by {name}, name: {said} (shares of the widened gap: {shares})"
            )
    if "ablation" in tables:
        print(f"\n{'loss added by zeroing':<34}{'itself':>9} {'matched':>9} {'random':>9}")
        rows = tables["ablation"][1]
        for name, category in dict.fromkeys((row["labels"], row["category"]) for row in rows):
            here = [row for row in rows if (row["labels"], row["category"]) == (name, category)]
            by_kind = {
                kind: [r["delta"] for r in here if r["set"].startswith(kind)] for kind in CONTROLS
            }
            shown = (
                f"{np.mean(deltas):9.3f}" if deltas else f"{'–':>9}" for deltas in by_kind.values()
            )
            print(f"{f'{name}: {category}':<34}{' '.join(shown)}")
    if "static" in tables:
        best = min(tables["static"][1][2:], key=lambda row: row["loss"], default=None)
        if best:
            print(f"\nBest static steering: {best['steering']}, loss {best['loss']:.3f}")
    if "attribution" in tables:
        about, rows = tables["attribution"]
        print(
            f"\nAttribution: shares sum to the change of {about['change']:.4f}, residual {about['residual']:.2g}"
        )
        for row in rows:
            if row["where"] == "(all)" and row["labels"]:
                print(f"{row['labels'] + ': ' + row['category']:<34}{row['share']:9.3f}")


if __name__ == "__main__":
    cli.run(main)
