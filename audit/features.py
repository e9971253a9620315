"""Tables of usage: which features a policy turns up, how far, and beside what the SAE finds.

Written to OUT/eval/ from one pass over the evaluation pairs (counting.py):

    features.parquet     a row a feature: usage and mean of v and f by context, ranks, labels
    composition_paper    share of each category among active features, as Table 2 measures it
    composition          the same pooled over positions (counting.py defines both)
    top_usage, top_value the most used features and those of largest mean value (Tables 3 and 4)
    value_difference     how many features have which mean v - f (Figure 3)
    usage_rank           usage against rank, with a log-linear fit (Figure 5)
    l0, l0_by_position   how many features are active at a position, in all and by place
    examples.json        the first pairs, token by token, and cards of features, for report.html

"Promoted" and "suppressed" order features by mean v - f, as the paper does. An adapter with a ReLU
turns nothing down: a suppressed feature is one to which the adapter adds less than the SAE finds.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from audit.counting import (
    CONTEXTS,
    FIRST,
    SIDES,
    Counts,
    composition,
    paper_composition,
    relative_change,
    resampled_composition,
    resampled_paper_composition,
)
from audit.label_noise import Judged, noisy_changes
from data import Pair
from labels import Labels, categories, explain
from policy import Policy
from runtime.tables import Row, percentiles

TOP = 10  # features in Tables 3 and 4
EXAMPLES = 4  # pairs that are shown token by token
EXAMPLE_TOKENS = 400  # of each text, at most
EXAMPLE_FEATURES = 4  # at each token


def sides_and_contexts() -> Iterator[tuple[int, str, int, str]]:
    """(side, its name, context, its name), in the order of all tables."""
    for side, of in enumerate(SIDES):
        for i, context in enumerate(CONTEXTS):
            yield side, of, i, context


def usage_tables(counts: Counts, labels: list[Labels]) -> dict[str, list]:
    """Rows of every table of usage but composition."""
    return {
        "top_usage": top_rows(counts, "usage", labels),
        "top_value": top_rows(counts, "value", labels),
        "value_difference": difference_rows(counts.mean[0] - counts.mean[1]),
        "usage_rank": rank_rows(counts.usage, labels),
        "l0": l0_rows(counts),
        "l0_by_position": place_rows(counts),
    }


# --- composition (Table 2) ------------------------------------------------------------------------


class Composition(NamedTuple):
    """A row: one category in one context. Intervals are 95 % percentile intervals over pairs."""

    labels: str
    kind: str
    matched: bool  # whether the label file states the run's SAE
    category: str
    features: int
    first: str  # whether the first position is left out, or counted (FIRST)
    context: str
    sae: float  # the category's share
    adapter: float
    change: float  # (adapter - sae) / sae
    low: float
    high: float
    # The same with label noise: both errors, taken to be independent, are added draw by draw. None
    # where no person judged the category.
    noisy_change: float | None
    noisy_low: float | None
    noisy_high: float | None
    mcc: float | None
    judged: int | None  # features that a person judged


Human = dict[tuple[str, str], Judged]  # by label file and category


class Estimate(NamedTuple):
    """A category's composition by one estimator."""

    first: str
    share: Tensor  # [2, 3]
    drawn: Tensor  # [B, 2, 3], over pairs drawn with replacement
    weights: Tensor  # [2, 3, F]: the share is weights @ labels / whole
    whole: Tensor  # [2, 3]


def composition_rows(
    counts: Counts, labels: list[Labels], human: Human, resamples: int, seed: int
) -> list[Composition]:
    """Pooled shares. counts has the categories of all files, in order, as below."""
    drawn = resampled_composition(counts.pair_events, resamples, seed)  # [B, C, 2, 3]
    rows = []
    for c, (table, category, mask) in enumerate(all_categories(labels)):
        share = composition(counts, torch.from_numpy(mask))
        whole = counts.events.sum(-1)
        estimate = Estimate(FIRST[0], share, drawn[:, c], counts.events, whole)
        rows += _rows(estimate, table, category, human, resamples, seed)
    return rows


def paper_composition_rows(
    counts: Counts, labels: list[Labels], human: Human, resamples: int, seed: int
) -> list[Composition]:
    """Shares as the paper measures them, without and with the first position."""
    shares, found = counts.shares, paper_composition(counts)  # [C, 2, 2, 3]
    drawn = resampled_paper_composition(counts, resamples, seed)  # [B, C, 2, 2, 3]
    rows = []
    for i, first in enumerate(FIRST):
        for c, (table, category, _) in enumerate(all_categories(labels)):
            g = shares.group[c]
            sums = shares.weights[g, i], shares.positions[g, i]
            estimate = Estimate(first, found[c, i], drawn[:, c, i], *sums)
            rows += _rows(estimate, table, category, human, resamples, seed)
    return rows


def all_categories(labels: list[Labels]) -> list[tuple[Labels, str, np.ndarray]]:
    return [(table, name, mask) for table in labels for name, mask in table.categories.items()]


def _rows(
    of: Estimate, table: Labels, category: str, human: Human, resamples: int, seed: int
) -> list[Composition]:
    """A row for each context."""
    mask = table.categories[category]
    change, drawn = relative_change(of.share), relative_change(of.drawn)  # [3], [B, 3]
    noise = [(None,) * 5] * 3
    judged = human.get((table.name, category))
    if judged is not None:
        sums, given = (of.weights, of.whole), (judged, resamples, seed)
        draws = noisy_changes(*sums, mask, table.has_label(category), *given) + drawn - change
        noisy = torch.stack([draws.nanmedian(0).values, *percentiles(draws)], 1).tolist()
        noise = [(*row, judged.mcc, int(judged.confusion.sum())) for row in noisy]
    about = (table.name, table.kind, table.matched, category, int(mask.sum()), of.first)
    columns = (of.share[1], of.share[0], change, *percentiles(drawn))
    contexts = zip(CONTEXTS, *(column.tolist() for column in columns), noise, strict=True)
    return [
        Composition(*about, context, *numbers, *its_noise)
        for context, *numbers, its_noise in contexts
    ]


# --- Tables 3 and 4, Figures 3 and 5 --------------------------------------------------------------


def top_rows(counts: Counts, name: str, labels: list[Labels]) -> list[Row]:
    """The TOP features of each side in each context; none of value 0.

    name: "usage", the share of positions at which a feature is active, beside its share of all
    events; or "value", its mean.
    """
    values = counts.usage if name == "usage" else counts.mean  # [2, 3, F]
    of_events = counts.events / counts.events.sum(-1, keepdim=True).double()
    rows = []
    for side, of, i, context in sides_and_contexts():
        top = values[side, i].topk(min(TOP, values.shape[-1]))
        found = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        for rank, (value, k) in enumerate(found, start=1):
            if value:
                row = {"of": of, "context": context, "rank": rank, "feature": k, name: value}
                if name == "usage":
                    row["share_of_events"] = of_events[side, i, k].item()
                said = {"explanation": explain(labels, k), "categories": categories(labels, k)}
                rows.append(row | said)
    return rows


class Difference(NamedTuple):
    """A row: features by their mean v - f, in bins of equal width, the same for all contexts."""

    context: str
    low: float
    high: float
    features: int
    promoted: int  # in all bins: features with v - f above 0
    suppressed: int  # below 0
    mean: float


def difference_rows(difference: Tensor, bins: int = 81) -> list[Difference]:
    """Figure 3. difference: mean v - f of each feature, [3, F]."""
    edges = np.histogram_bin_edges(difference.numpy(), bins)
    rows = []
    for context, values in zip(CONTEXTS, difference.numpy(), strict=True):
        totals = int((values > 0).sum()), int((values < 0).sum()), float(values.mean())
        features = np.histogram(values, edges)[0].tolist()
        for low, high, n in zip(edges[:-1].tolist(), edges[1:].tolist(), features, strict=True):
            rows.append(Difference(context, low, high, n, *totals))
    return rows


class Rank(NamedTuple):
    """A row: the usage at one rank, among all features or those of a category."""

    of: str
    context: str
    labels: str  # "" for all features
    category: str
    rank: int
    usage: float
    fit: float  # of the line below, at this rank
    active: int
    slope: float  # of log10 usage on rank, by least squares over every active feature
    intercept: float
    r2: float


def rank_rows(usage: Tensor, labels: list[Labels]) -> list[Rank]:
    """Figure 5: usage [2, 3, F] against rank, at some 100 ranks."""
    masks = {("", "all"): np.ones(usage.shape[-1], dtype=bool)}
    masks |= {(table.name, c): mask for table in labels for c, mask in table.categories.items()}
    rows = []
    for side, of, i, context in sides_and_contexts():
        for (name, category), mask in masks.items():
            values = np.sort(usage[side, i].numpy()[mask])[::-1]
            values = values[values > 0]
            n = len(values)
            fit = log_linear_fit(values)
            spread = np.r_[np.linspace(1, n, 80), np.geomspace(1, n, 40)] if n else np.array([])
            for rank in np.unique(spread.round().astype(int)).tolist():
                line = 10 ** (fit[1] + fit[0] * rank)
                where = (of, context, name, category, rank)
                rows.append(Rank(*where, float(values[rank - 1]), line, n, *fit))
    return rows


def log_linear_fit(values: np.ndarray) -> tuple[float, float, float]:
    """log10 of falling values on their ranks 1.. n: slope, intercept, R²; nan for fewer than three
    values or constant ones.
    """
    if len(values) < 3 or values[0] == values[-1]:
        return (float("nan"),) * 3
    ranks, y = np.arange(1, len(values) + 1), np.log10(values)
    slope, intercept = np.polyfit(ranks, y, 1)
    residual = y - (intercept + slope * ranks)
    return float(slope), float(intercept), float(1 - residual.var() / y.var())


# --- L0 -------------------------------------------------------------------------------------------


class L0(NamedTuple):
    """A row: positions at which from low to high features are active, both included."""

    of: str
    context: str
    low: int
    high: int
    positions: int
    # Of the whole context, the same in each of its rows:
    mean: float  # over all positions, as are the next three
    p5: int
    p50: int
    p95: int
    some: float  # share of positions at which any feature is active
    some_p50: int | None  # over those positions alone
    some_p95: int | None


def l0_rows(counts: Counts, bins: int = 50) -> list[L0]:
    """Bins widen geometrically, because an adapter's L0 may reach from 0 to thousands."""
    number = torch.arange(counts.l0.shape[-1])
    largest = int(counts.l0.sum((0, 1)).nonzero().max())
    edges = [0, *np.unique(np.geomspace(1, largest + 1, bins).round().astype(int)).tolist()]
    rows = []
    for side, of, i, context in sides_and_contexts():
        here = counts.l0[side, i]
        mean = (here * number).sum().item() / here.sum().item()
        spread = [percentile(here, q) for q in (5, 50, 95)]
        some = here.clone()
        some[0] = 0
        share = (some.sum() / here.sum()).item()
        spread += [share, *(percentile(some, q) for q in (50, 95))]
        for low, end in pairwise(edges):
            positions = int(here[low:end].sum())
            rows.append(L0(of, context, low, end - 1, positions, mean, *spread))
    return rows


def percentile(histogram: Tensor, q: float) -> int | None:
    """The smallest number that q % of the counts do not exceed: int64 [N] of counts by number."""
    below = histogram.cumsum(0)
    total = int(below[-1])
    return int((below >= total * q / 100).nonzero()[0]) if total else None


class Place(NamedTuple):
    """A row: mean L0 over positions that stand from low to high in their sequence; <bos> is 0."""

    of: str
    context: str
    low: int
    high: int
    positions: int
    mean_l0: float


def place_rows(counts: Counts, bins: int = 100, least: float = 0.005) -> list[Place]:
    """Bins of equal width, of which those that hold less than the share `least` of the positions
    are joined with the ones after them: a mean over a few long sequences is noise.
    """
    L = counts.place.shape[-1]
    width = -(-L // bins)
    rows = []
    for side, of, i, context in sides_and_contexts():
        places, sums = counts.place[i], counts.place_l0[side, i]
        for low, end in _joined(places, width, int(least * places.sum())):
            positions = int(places[low:end].sum())
            mean = sums[low:end].sum().item() / positions
            rows.append(Place(of, context, low, end - 1, positions, mean))
    return rows


def _joined(places: Tensor, width: int, least: int) -> list[tuple[int, int]]:
    """(first, end) of bins with more than `least` positions each; the last takes what is left."""
    found, low = [], 1
    last = int(places.nonzero().max()) + 1 if places.any() else 1
    for end in range(1 + width, last + width, width):
        end = min(end, last)
        if int(places[low:end].sum()) > least:
            found.append((low, end))
            low = end
    if low < last:
        found = [*found[:-1], (found[-1][0] if found else 1, last)]
    return found


# --- every feature, and some tokens ---------------------------------------------------------------


def label_columns(labels: list[Labels], features: int) -> dict[str, object]:
    """Of each label file its explanations (explanation_NAME) and categories (NAME:CATEGORY)."""
    columns = {}
    for table in labels:
        columns[f"explanation_{table.name}"] = [table.explanations.get(k) for k in range(features)]
        columns |= {f"{table.name}:{category}": mask for category, mask in table.categories.items()}
    return columns


def feature_table(counts: Counts, labels: list[Labels]) -> pa.Table:
    """features.parquet: a row a feature. By context, with _ for the + in its name:
    {adapter,sae}_{usage,mean}_CONTEXT, difference_CONTEXT (mean v - f), promoted_rank_CONTEXT and
    suppressed_rank_CONTEXT (1: largest, smallest difference).
    """
    n = counts.events.shape[-1]
    columns = {"feature": np.arange(n, dtype=np.int32)} | label_columns(labels, n)
    difference = counts.mean[0] - counts.mean[1]
    for i, context in enumerate(CONTEXTS):
        suffix = context.replace("+", "_")
        for side, of in enumerate(SIDES):
            columns[f"{of}_usage_{suffix}"] = counts.usage[side, i].numpy()
            columns[f"{of}_mean_{suffix}"] = counts.mean[side, i].numpy()
        columns[f"difference_{suffix}"] = difference[i].numpy()
        for name, descending in (("promoted", True), ("suppressed", False)):
            order = difference[i].argsort(descending=descending, stable=True)
            rank = torch.empty(n, dtype=torch.int32)
            rank[order] = torch.arange(1, n + 1, dtype=torch.int32)
            columns[f"{name}_rank_{suffix}"] = rank.numpy()
    return pa.table(columns)


@torch.inference_mode()
def examples(policy: Policy, pairs: Sequence[Pair], labels: list[Labels]) -> dict:
    """The first EXAMPLES pairs: of prompt, chosen and rejected the tokens, ‖v‖₁ at each, and the
    features with the largest |v| there as [feature, v]; and the explanations of those features.
    """
    shown = {}
    for stream in policy.streams(pairs[:EXAMPLES]):
        packed = stream.packed
        for tree, pair in enumerate(stream.pairs):
            shown[pair] = {}
            for branch, name in enumerate(("prompt", "chosen", "rejected")):
                rows = ((packed.tree == tree) & (packed.branch == branch)).nonzero()[:, 0]
                rows = rows[-EXAMPLE_TOKENS:] if name == "prompt" else rows[:EXAMPLE_TOKENS]
                with policy.autocast():
                    v = policy.steered.acting(stream.x[rows]).float()
                # Every average leaves the first position out; shown, it would outshine the rest.
                v[packed.position[rows] == 0] = 0
                shown[pair][name] = _example(policy, packed.tokens[rows], v)
    found = [shown[pair] for pair in sorted(shown)]
    named = Counter(
        k for pair in found for part in pair.values() for at in part["top"] for k, _ in at
    )
    explanations = {str(k): explain(labels, k) for k in sorted(named)}
    return dict(pairs=found, explanations=explanations, often=[k for k, _ in named.most_common()])


def _example(policy: Policy, tokens: Tensor, v: Tensor) -> dict:
    """tokens [n], v [n, F]"""
    indices = v.abs().topk(min(EXAMPLE_FEATURES, v.shape[1])).indices
    largest = zip(indices.tolist(), v.gather(1, indices).tolist(), strict=True)
    return dict(
        tokens=token_texts(policy, tokens),
        l1=[round(size, 4) for size in v.abs().sum(1).tolist()],
        top=[[[k, round(x, 4)] for k, x in zip(*at, strict=True) if x] for at in largest],
    )


def token_texts(policy: Policy, tokens: Tensor) -> list[str]:
    return [policy.tokenizer.decode([t], skip_special_tokens=False) for t in tokens.tolist()]
