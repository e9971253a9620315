"""The tables of what features and choices earned: choices, attribution, attribution_features."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audit.attribution import KINDS, Attribution
from audit.choices import LEVEL, Choices, data_p_values
from audit.features import label_columns
from audit.rules import Rules
from labels import Labels, categories, explain
from runtime.tables import interval, percentiles, resampled

TOP = 30  # features in attribution_features


class Choice(NamedTuple):
    """A row: one kind of tokens, and its share of the change of the gap."""

    labels: str  # the label file, or the file of rules
    kind: str
    matched: bool  # whether the label file states the run's SAE; rules need not
    tokens: str
    share: float  # nats per token, mean over pairs
    low: float  # 95 % over pairs
    high: float
    part_of_change: float | None  # the share divided by the whole change, with its interval
    part_low: float | None
    part_high: float | None
    chance: float  # the share that swapping chosen and rejected exceeds with probability LEVEL
    p_value: float  # of that test, one-sided, corrected for the number of kinds
    named: bool  # the category that the measure names
    data: float  # without a policy: share of the chosen response's tokens less the rejected one's
    data_p: float  # sign-flip test of that, two-sided, corrected likewise
    data_named: bool  # the category that the data alone would name


def choice_rows(
    found: Choices, data: Tensor, table: Labels | Rules, resamples: int, seed: int
) -> list[Choice]:
    """data: data_alone of the same pairs and classes, [P, C]."""
    shares, change, named = found.shares, found.change.mean().item(), found.named()
    drawn = resampled(torch.cat([shares.T, found.change[None]]), resamples, seed)  # [B, C + 1]
    parts = percentiles(drawn[:, :-1] / drawn[:, -1:])
    columns = (shares.mean(0), *percentiles(drawn[:, :-1]), shares.mean(0) / change, *parts)
    columns += (found.chance(), found.p_values())
    data_mean, data_p = data.mean(0), data_p_values(data)
    top = int(data_mean[:-2].abs().argmax())
    data_named = found.names[top] if data_p[top] <= LEVEL else None

    rows = []
    numbers = torch.stack(columns, 1).tolist()
    of_data = zip(data_mean.tolist(), data_p.tolist(), strict=True)
    for name, policy, alone in zip(found.names, numbers, of_data, strict=True):
        about = (table.name, table.kind, table.matched, name)
        rows.append(Choice(*about, *policy, name == named, *alone, name == data_named))
    return rows


class Masked(NamedTuple):
    """A category of a label file; "(none)" holds what the file puts in no category."""

    labels: Labels
    category: str
    mask: np.ndarray  # bool [F]


def category_masks(labels: list[Labels]) -> list[Masked]:
    """Every category that has features, and "(none)" of each file."""
    found = []
    for table in labels:
        masks = {name: mask for name, mask in table.categories.items() if mask.any()}
        rest = ~np.any([*masks.values()], axis=0) if masks else np.zeros(0, dtype=bool)
        masks |= {"(none)": rest} if rest.any() else {}
        found += [Masked(table, name, mask) for name, mask in masks.items()]
    return found


class Earned(NamedTuple):
    """A row: what a category's features earned where they stood. Categories may overlap."""

    labels: str | None  # None for all features
    kind: str | None
    matched: bool | None
    category: str  # "(all)": all features; "(none)": those in no category of the file
    where: str  # of KINDS, or "(all)"
    features: int
    used: int  # of them
    share: float  # of the loss, mean over pairs; negative: it lowered the loss
    part_of_change: float | None
    share_per_used: float | None
    low: float | None  # 95 % over pairs, where `where` is "(all)"
    high: float | None


def attribution_rows(
    found: Attribution, labels: list[Labels], used: np.ndarray, resamples: int, seed: int
) -> list[Earned]:
    """found.pair_category has the categories of category_masks. used: bool [F]."""
    whole = (found.policy - found.base)[None]
    low, high = interval(torch.cat([whole, found.pair_category.T]), resamples, seed)
    everything = np.ones(found.shares.shape[1], dtype=bool)
    entries = [((None, None, None, "(all)"), everything)]
    for table, category, mask in category_masks(labels):
        entries.append(((table.name, table.kind, table.matched, category), mask))

    rows = []
    bounds = zip(low.tolist(), high.tolist(), strict=True)
    for (about, mask), interval_of_whole in zip(entries, bounds, strict=True):
        n, n_used = int(mask.sum()), int(used[mask].sum())
        by_kind = found.shares[:, torch.from_numpy(mask)].sum(1).tolist()
        for where, share in [("(all)", sum(by_kind)), *zip(KINDS, by_kind, strict=True)]:
            part = share / found.change if found.change else None
            each = share / n_used if n_used else None
            bounds_here = interval_of_whole if where == "(all)" else (None, None)
            rows.append(Earned(*about, where, n, n_used, share, part, each, *bounds_here))
    return rows


def feature_columns(
    found: Attribution, labels: list[Labels], usage: np.ndarray, mean_v: np.ndarray
) -> dict[str, object]:
    """attribution_features.parquet: a row a feature."""
    features = len(usage)
    columns = dict(feature=np.arange(features, dtype=np.int32))
    columns |= dict(share=found.shares.sum(0).numpy(), error=found.error.numpy())
    for kind, row in zip(KINDS, found.shares, strict=True):
        columns[f"share_{kind.replace(' ', '_')}"] = row.numpy()
    return columns | dict(usage=usage, mean_v=mean_v) | label_columns(labels, features)


class EarnedBy(NamedTuple):
    """A row: one feature."""

    feature: int
    share: float
    error: float  # standard error over pairs
    usage: float
    mean_v: float
    explanation: str
    categories: str


def earned_by_rows(columns: dict, labels: list[Labels]) -> list[EarnedBy]:
    """The TOP features by |share|."""
    rows = []
    for k in np.argsort(-np.abs(columns["share"]), kind="stable")[:TOP].tolist():
        numbers = (columns[name][k].item() for name in EarnedBy._fields[:5])
        rows.append(EarnedBy(*numbers, explain(labels, k), categories(labels, k)))
    return rows
