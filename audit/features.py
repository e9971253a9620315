"""What a policy does to features: every figure and table about usage, from one pass over an evaluation set.

    python eval_features.py --run runs/tiny
    python eval_features.py --run OUT --labels alignment.jsonl style.jsonl --human agreement.csv

Writes OUT/eval/ (each table as csv, json and png with the same numbers) and OUT/report.html:

    features.parquet     a row a feature: usage and mean value of v and f by context, mean difference, ranks, labels
    composition          share of each category among active features, SAE and adapter (Table 2), with intervals
    top_usage, top_value the most used features and those of largest mean value (Tables 3 and 4)
    value_difference     distribution of mean v - f over features (Figure 3)
    usage_rank           usage against rank with a log-linear fit (Figure 5)
    l0, l0_by_position   how many features are active at a position, and how that depends on where it stands
    examples.json        the first pairs, token by token, for report.html

v is what the adapter adds, f = sae.encode(x) what the SAE itself finds in the same residual stream x. A feature is
active where v ≠ 0, or f > 0. The contexts are those of the unshared sequences: a prompt's position counts once in
each of `prompt`, `prompt+chosen` and `prompt+rejected`. The first position is left out of everything: it is <bos>, or
what stands first in a truncated prompt, and its residual stream is an outlier.

"Promoted" and "suppressed" order features by mean v - f, as the paper does. An adapter with a ReLU turns nothing
down: a suppressed feature is one to which the adapter adds less than the SAE finds there by itself.
"""

import csv
import hashlib
import io
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import tiny
import train
from audit import card, figures, report
from data import Pair
from fsrl import STEER_ELEMENTS, STEER_ROWS, SteeredModel
from labelling import judges
from labels import Labels, feature_index, load_labels, read_rows
from policy import Policy, eval_pairs, open_policy
from runtime import cli
from runtime.cli import flag
from runtime.sources import UserError, publish, sha256, writable

TINY_LABELS = tuple(str(tiny.LABELS_DIR / name) for name in ("fires.jsonl", "promotes.jsonl"))
SIDES = ("adapter", "sae")  # v and f; the first axis of what is counted
CONTEXTS = ("prompt", "prompt+chosen", "prompt+rejected")
TOP = 10  # features in Tables 3 and 4
EXAMPLES, EXAMPLE_TOKENS, EXAMPLE_FEATURES = (
    4,
    400,
    4,
)  # pairs shown, tokens of each text, features at each token


@dataclass(frozen=True)
class Settings:
    run: str | None = flag(None, "a folder that train.py wrote, an adapter folder, or its Hub id")
    model: str | None = flag(None, "where the base model is now; unset: where the run says")
    sae: str | None = flag(None, "where the SAE is now; unset: where the run says")
    sae_id: str | None = flag(None, "folder within --sae")
    data: str | None = flag(
        None, "tiny, a parquet or jsonl file, a folder, a Hub id; unset: the run's evaluation data"
    )
    labels: tuple[str, ...] = flag(
        (), "label files of the run's SAE; unset: those of tiny for tiny, else none"
    )
    assume_labels_match: bool = flag(
        False, "take label files that do not say so to be of the run's SAE"
    )
    human: str | None = flag(
        None, "what a person says of some features, csv or jsonl: feature, category, label"
    )
    bootstrap: int = flag(1000, "resamples of the pairs behind each interval")
    seed: int = flag(0, "seed of the resamples")
    pairs: int | None = flag(None, "only so many pairs, the first ones")
    tokens_per_microbatch: int = flag(
        8192, "tokens per forward pass, the memory knob; no effect on the result"
    )
    dtype: str = flag(
        "auto", "auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "float32", "bfloat16")
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA when present")
    out: str | None = flag(None, "where eval/ and report.html go; unset: the folder of --run")

    def __post_init__(self):
        if self.run is None:
            raise UserError(
                "--run: a folder that train.py wrote, an adapter folder, or its Hub id was expected."
            )
        cli.at_least_one(self, "bootstrap", "pairs", "tokens_per_microbatch")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must not be negative.")


# --- counting -----------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """What one pass counts. First axis: adapter (v), SAE (f). Contexts as in CONTEXTS. An event is a feature active at
    a position. Only pair_events grows with the number of pairs, by 48 (C + 1) bytes each.
    """

    positions: Tensor  # int64 [3]
    events: Tensor  # int64 [2, 3, F]
    sums: Tensor  # float64 [2, 3, F], Σ v and Σ f over positions
    l0: Tensor  # int64 [2, 3, F + 1], positions by how many features are active there
    place: Tensor  # int64 [3, L], positions by where they stand in their sequence
    place_l0: Tensor  # int64 [2, 3, L], Σ L0 over those
    pair_events: (
        Tensor  # int64 [P, 2, 3, C + 1], events of each pair by category, then of all features
    )

    @property
    def usage(self) -> Tensor:
        """Share of positions at which each feature is active, float64 [2, 3, F]."""
        return self.events / self.positions[:, None].double()

    @property
    def mean(self) -> Tensor:
        """Mean value over all positions, active or not, float64 [2, 3, F]."""
        return self.sums / self.positions[:, None].double()


@torch.inference_mode()
def usage(
    steered: SteeredModel,
    pairs: Sequence[Pair],
    s: train.Settings,
    masks: Tensor | None = None,
    progress: bool = True,
) -> Counts:
    """Count over pairs, in memory that does not depend on how many they are. s: device, dtype and
    tokens_per_microbatch. masks: bool [C, F], the categories that pair_events tells apart.
    """
    n, P, device = steered.sae.d_sae, len(pairs), s.device
    masks = torch.zeros(0, n, dtype=torch.bool) if masks is None else masks
    groups = torch.cat([masks, torch.ones(1, n, dtype=torch.bool)]).T.to(
        device, torch.float32
    )  # [F, C + 1]
    C1, L = groups.shape[1], max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)

    # By segment first: 0 the prompt, 1 the chosen response, 2 the rejected one. A context is a sum of segments.
    def zeros(*shape, dtype=torch.int64):
        return torch.zeros(shape, dtype=dtype, device=device)

    events, sums, l0s = zeros(2, 3, n), zeros(2, 3, n, dtype=torch.float64), zeros(2, 3 * (n + 1))
    place, place_l0, pair_events = zeros(3 * L), zeros(2, 3 * L), zeros(2, 3 * P, C1)
    piece = max(STEER_ROWS, STEER_ELEMENTS[torch.device(device).type] // n)
    bar = tqdm(total=P, desc="counting", unit="pair", disable=not progress, leave=False)
    for micro in data.microbatches(pairs, s.tokens_per_microbatch):
        packed = data.pack_pairs([pairs[i] for i in micro]).to(device)
        with train.autocast(s):
            x = steered.residual(packed, steered.model.plan(packed))
        real = (packed.position > 0).nonzero().squeeze(1)
        which = torch.tensor(micro, device=device)[packed.tree]  # [T], the pair in `pairs`
        for rows in real.split(piece):
            segment, at = packed.branch[rows], packed.position[rows]
            onehot = F.one_hot(segment, 3).T.float()  # [3, rows]
            place.index_add_(0, segment * L + at, torch.ones_like(at))
            with train.autocast(s):
                v, f = (
                    steered.adapter(x[rows]),
                    steered.sae.encode(x[rows]),
                )  # [rows, d] -> [rows, F]
            for side, value in enumerate((v, f)):
                value = value.float()
                active = (value != 0).float()
                # Sums of 0 and 1 below 2^24: exact in float32.
                events[side] += (onehot @ active).long()
                sums[side] += onehot @ value
                by_group = (active @ groups).long()  # [rows, F] -> [rows, C + 1]
                l0 = by_group[:, -1]
                pair_events[side].index_add_(0, which[rows] * 3 + segment, by_group)
                l0s[side].index_add_(0, segment * (n + 1) + l0, torch.ones_like(l0))
                place_l0[side].index_add_(0, segment * L + at, l0)
        bar.update(len(micro))
    bar.close()

    def contexts(x: Tensor) -> Tensor:
        """[..., 3 segments, N] -> [..., 3 contexts, N], on the CPU."""
        prompt, chosen, rejected = x.cpu().unbind(-2)
        return torch.stack([prompt, prompt + chosen, prompt + rejected], -2)

    place = contexts(place.view(3, L))
    by_pair = contexts(pair_events.view(2, P, 3, C1)).transpose(0, 1)  # [P, 2, 3, C + 1]
    l0s, place_l0 = contexts(l0s.view(2, 3, n + 1)), contexts(place_l0.view(2, 3, L))
    return Counts(place.sum(1), contexts(events), contexts(sums), l0s, place, place_l0, by_pair)


def composition(counts: Counts, mask: Tensor) -> Tensor:
    """Share of all events whose feature is in the mask: bool [F] -> float64 [2, 3] (adapter and SAE, by context).

    nan where there is no event at all.
    """
    return counts.events[..., mask].sum(-1).double() / counts.events.sum(-1)


def relative_change(share: Tensor) -> Tensor:
    """Composition [..., 2, 3] -> (adapter - SAE) / SAE, [..., 3]: the figure of Table 2."""
    adapter, sae = share.unbind(-2)
    return (adapter - sae) / sae


# --- how sure -----------------------------------------------------------------------------------------------


def bootstrap(pair_events: Tensor, resamples: int, seed: int) -> Tensor:
    """Composition of every category under resampling of pairs with replacement: [P, 2, 3, C + 1] -> [B, C, 2, 3].

    Pairs and not tokens, because the positions of one text are anything but independent.
    """
    rng = np.random.default_rng(seed)
    P, table = len(pair_events), pair_events.double().flatten(1)
    drawn = torch.empty(resamples, *pair_events.shape[1:], dtype=torch.float64)
    for b in range(resamples):
        times = torch.from_numpy(np.bincount(rng.integers(P, size=P), minlength=P)).double()
        drawn[b] = (times @ table).view_as(drawn[b])
    return (drawn[..., :-1] / drawn[..., -1:]).permute(0, 3, 1, 2)


class Agreement(NamedTuple):
    """What a person says of features that the machine labelled, for one category."""

    confusion: np.ndarray  # int64 [2, 2], features by (machine's label, person's label)
    known: dict[int, bool]  # feature -> the person's label, where it is told feature by feature

    @property
    def mcc(self) -> float:
        (tn, fn), (fp, tp) = self.confusion.astype(float)  # first axis: the machine's
        return float(judges.mcc(np.array([tp, fp, fn, tn])))


def noisy_changes(
    counts: Counts, machine: np.ndarray, agreement: Agreement, draws: int, seed: int
) -> Tensor:
    """Relative changes [draws, 3] under labels as a person might have given them.

    Each draw takes P(person says yes | machine's label m) from its posterior Beta(yes_m + 1/2, no_m + 1/2), then
    every feature's label from that probability, independently; features the person did judge keep the person's label.
    That the machine errs on a feature is taken to be independent of how much the feature is used. Such errors dilute
    a category towards no change, so that the draws need not lie around the change under the machine's own labels.
    """
    rng = np.random.default_rng((seed, 1))
    yes = rng.beta(
        agreement.confusion[:, 1] + 0.5, agreement.confusion[:, 0] + 0.5, size=(draws, 2)
    )
    known = np.array(list(agreement.known), dtype=np.int64)
    events, out = counts.events.double(), torch.empty(draws, 3, dtype=torch.float64)
    for i in range(draws):
        labels = rng.random(len(machine)) < yes[i][machine.astype(int)]
        labels[known] = list(agreement.known.values())
        share = events @ torch.from_numpy(labels).double() / events.sum(-1)  # [2, 3, F] -> [2, 3]
        out[i] = relative_change(share)
    return out


def read_human(path: str, labels: list[Labels]) -> dict[tuple[str, str], Agreement]:
    """A person's labels -> agreement with each label file of kind `fires`, by (labels' name, category).

    Rows of feature, category, label; or counts of features, rows of category, machine, human, count. A person reads
    explanations, so labels by what a feature promotes are not judged. Raises UserError naming the row.
    """
    judged = [table for table in labels if table.kind == "fires"]
    if not judged:
        raise UserError(
            f"--human {path}: no label file of kind fires was given that a person could have judged."
        )
    found: dict[tuple[str, str], Agreement] = {}
    _, rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        where = f"{path} row {number}"
        tables = [table for table in judged if row.get("category") in table.categories]
        if not tables:
            raise UserError(
                f"{where}: category {row.get('category')!r} is in none of the label files."
            )
        for table in tables:
            machine = table.categories[row["category"]]
            key = (table.name, row["category"])
            entry = found.setdefault(key, Agreement(np.zeros((2, 2), dtype=np.int64), {}))
            if "count" in row:
                cell = int(_truth(where, "machine", row)), int(_truth(where, "human", row))
                try:
                    entry.confusion[cell] += int(row["count"])
                except (TypeError, ValueError) as e:
                    raise UserError(
                        f"{where}: count is {row['count']!r}, a whole number was expected."
                    ) from e
            else:
                k, says = feature_index(Path(path), number, row), _truth(where, "label", row)
                if k >= len(machine):
                    raise UserError(
                        f"{where}: feature {k}; the SAE has features 0 to {len(machine) - 1}."
                    )
                if entry.known.setdefault(k, says) is not says:
                    raise UserError(f"{where}: feature {k} is labelled both ways.")
                entry.confusion[int(machine[k]), int(says)] += 1
    return found


def _truth(where: str, column: str, row: dict) -> bool:
    """true/false, 1/0 or yes/no, as csv and json have them."""
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
        str(row.get(column)).strip().lower()
    )
    if value is None:
        raise UserError(f"{where}: {column} is {row.get(column)!r}, true or false was expected.")
    return value


# --- tables -------------------------------------------------------------------------------------------------

Row = dict[str, object]


def composition_rows(
    counts: Counts, labels: list[Labels], human: dict, resamples: int, seed: int
) -> list[Row]:
    """Table 2. change, low, high: relative change of the share and its 95 % percentile interval over pairs; noisy_*:
    the same with label noise, where a person has judged the category: the two errors, taken to be independent, are
    added draw by draw.
    """
    rows, c = [], 0
    drawn = bootstrap(counts.pair_events, resamples, seed)
    for table in labels:
        for category, mask in table.categories.items():
            share = composition(counts, torch.from_numpy(mask))
            change, changes = relative_change(share), relative_change(drawn[:, c])  # [3], [B, 3]
            low, high = _interval(changes)
            row = dict(labels=table.name, kind=table.kind, matched=table.matched, category=category)
            row |= dict(features=int(mask.sum()))
            agreement = human.get((table.name, category))
            noisy = None
            if agreement is not None:
                noisy = noisy_changes(counts, mask, agreement, resamples, seed) + changes - change
                noisy_low, noisy_high = _interval(noisy)
            for i, context in enumerate(CONTEXTS):
                entry = row | dict(context=context, sae=share[1, i], adapter=share[0, i])
                entry |= dict(change=change[i], low=low[i], high=high[i])
                if noisy is not None:
                    entry |= dict(noisy_change=noisy[:, i].nanmedian())
                    entry |= dict(noisy_low=noisy_low[i], noisy_high=noisy_high[i])
                    entry |= dict(mcc=agreement.mcc, judged=int(agreement.confusion.sum()))
                rows.append(entry)
            c += 1
    return rows


def _interval(draws: Tensor) -> Tensor:
    """[B, 3] -> 2.5 and 97.5 percentiles, [2, 3]."""
    return torch.nanquantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype), dim=0)


def top_rows(values: Tensor, name: str, labels: list[Labels]) -> list[Row]:
    """The TOP features by a value [2, 3, F], of each side in each context; features of value 0 are not among them."""
    rows = []
    for (side, of), (i, context) in ((a, b) for a in enumerate(SIDES) for b in enumerate(CONTEXTS)):
        top = values[side, i].topk(min(TOP, values.shape[-1]))
        for rank, (value, k) in enumerate(
            zip(top.values.tolist(), top.indices.tolist(), strict=True), start=1
        ):
            if value:
                row = dict(of=of, context=context, rank=rank, feature=k) | {name: value}
                rows.append(
                    row | dict(explanation=explain(labels, k), categories=categories(labels, k))
                )
    return rows


def explain(labels: list[Labels], k: int) -> str:
    """The first explanation of a feature that a label file has."""
    return next((table.explanations[k] for table in labels if k in table.explanations), "")


def categories(labels: list[Labels], k: int) -> str:
    """A feature's categories by every label file: "fires: style; promotes: content"."""
    named = {table.name: [c for c, mask in table.categories.items() if mask[k]] for table in labels}
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in named.items() if found)


def difference_rows(difference: Tensor, bins: int = 81) -> list[Row]:
    """Figure 3: features by mean v - f [3, F], in bins of equal width, the same for all contexts."""
    edges = np.histogram_bin_edges(difference.numpy(), bins)
    rows = []
    for context, values in zip(CONTEXTS, difference.numpy(), strict=True):
        features = np.histogram(values, edges)[0]
        totals = dict(
            promoted=int((values > 0).sum()), suppressed=int((values < 0).sum()), mean=values.mean()
        )
        for low, high, n in zip(edges[:-1], edges[1:], features, strict=True):
            rows.append(dict(context=context, low=low, high=high, features=int(n)) | totals)
    return rows


def rank_rows(usage: Tensor, labels: list[Labels]) -> list[Row]:
    """Figure 5: usage [2, 3, F] against rank, over all features and within each category, and the least-squares line of
    log10 usage on rank with its R². The fit is over every active feature, the rows are of some 100 of their ranks.
    """
    masks = {("", "all"): np.ones(usage.shape[-1], dtype=bool)}
    masks |= {(table.name, c): mask for table in labels for c, mask in table.categories.items()}
    rows = []
    for (side, of), (i, context) in ((a, b) for a in enumerate(SIDES) for b in enumerate(CONTEXTS)):
        for (name, category), mask in masks.items():
            values = np.sort(usage[side, i].numpy()[mask])[::-1]
            values = values[values > 0]
            n = len(values)
            slope, intercept, r2 = log_linear_fit(values)
            ranks = (
                np.unique(np.r_[np.linspace(1, n, 80), np.geomspace(1, n, 40)].round().astype(int))
                if n
                else []
            )
            fit = dict(active=n, slope=slope, intercept=intercept, r2=r2)
            for rank in ranks:
                line = 10 ** (intercept + slope * rank)
                row = dict(of=of, context=context, labels=name, category=category, rank=int(rank))
                rows.append(row | dict(usage=values[rank - 1], fit=line) | fit)
    return rows


def log_linear_fit(values: np.ndarray) -> tuple[float, float, float]:
    """log10 of falling values on their ranks 1.. n: slope, intercept, R²; nan for fewer than three or constant ones."""
    if len(values) < 3 or values[0] == values[-1]:
        return (float("nan"),) * 3
    ranks, y = np.arange(1, len(values) + 1), np.log10(values)
    slope, intercept = np.polyfit(ranks, y, 1)
    residual = y - (intercept + slope * ranks)
    return float(slope), float(intercept), float(1 - residual.var() / y.var())


def l0_rows(counts: Counts, bins: int = 50) -> list[Row]:
    """Positions by how many features are active there. A bin holds the counts from low to high, both included; bins
    widen geometrically, because an adapter's L0 may reach from 0 to thousands.
    """
    number, rows = torch.arange(counts.l0.shape[-1]), []
    largest = int(counts.l0.sum((0, 1)).nonzero().max())
    edges = [0, *np.unique(np.geomspace(1, largest + 1, bins).round().astype(int)).tolist()]
    for (side, of), (i, context) in ((a, b) for a in enumerate(SIDES) for b in enumerate(CONTEXTS)):
        here = counts.l0[side, i]
        totals = dict(mean=(here * number).sum().item() / here.sum().item())
        totals |= {
            f"p{q}": int((here.cumsum(0) >= here.sum() * q / 100).nonzero()[0]) for q in (5, 50, 95)
        }
        for low, end in pairwise(edges):
            row = dict(
                of=of, context=context, low=low, high=end - 1, positions=int(here[low:end].sum())
            )
            rows.append(row | totals)
    return rows


def place_rows(counts: Counts, bins: int = 100) -> list[Row]:
    """Mean L0 by where a position stands in its sequence (<bos> is 0), in bins of equal width, low to high included."""
    L, rows = counts.place.shape[-1], []
    width = -(-L // bins)
    for (side, of), (i, context) in ((a, b) for a in enumerate(SIDES) for b in enumerate(CONTEXTS)):
        for low in range(1, L, width):
            at = slice(low, low + width)
            positions = int(counts.place[i, at].sum())
            if positions:
                row = dict(
                    of=of, context=context, low=low, high=low + width - 1, positions=positions
                )
                rows.append(
                    row | dict(mean_l0=counts.place_l0[side, i, at].sum().item() / positions)
                )
    return rows


def feature_table(counts: Counts, labels: list[Labels]) -> pa.Table:
    """features.parquet: a row a feature. Columns {adapter,sae}_{usage,mean}_CONTEXT, difference_CONTEXT (mean v - f),
    promoted_rank_CONTEXT and suppressed_rank_CONTEXT (1: largest, smallest difference), and of each label file its
    explanation (explanation_NAME) and its categories (NAME:CATEGORY, true or false). + in a context's name becomes _.
    """
    n = counts.events.shape[-1]
    columns = {"feature": np.arange(n, dtype=np.int32)}
    for table in labels:
        columns[f"explanation_{table.name}"] = [table.explanations.get(k) for k in range(n)]
        columns |= {f"{table.name}:{category}": mask for category, mask in table.categories.items()}
    difference = counts.mean[0] - counts.mean[1]
    for i, context in enumerate(CONTEXTS):
        suffix = context.replace("+", "_")
        for side, of in enumerate(SIDES):
            columns[f"{of}_usage_{suffix}"] = counts.usage[side, i].numpy()
            columns[f"{of}_mean_{suffix}"] = counts.mean[side, i].numpy()
        columns[f"difference_{suffix}"] = difference[i].numpy()
        for name, order in (("promoted", True), ("suppressed", False)):
            rank = torch.empty(n, dtype=torch.int32)
            rank[difference[i].argsort(descending=order, stable=True)] = torch.arange(
                1, n + 1, dtype=torch.int32
            )
            columns[f"{name}_rank_{suffix}"] = rank.numpy()
    return pa.table(columns)


@torch.inference_mode()
def examples(policy: Policy, pairs: Sequence[Pair], labels: list[Labels]) -> dict:
    """The first EXAMPLES pairs: of prompt, chosen and rejected the tokens, ‖v‖₁ at each, and the features with the
    largest |v| there as [feature, v]; and what is said of those features.
    """
    steered, s, named = policy.steered, policy.settings, set()

    def part(tokens: Tensor, v: Tensor) -> dict:
        """tokens [n], v [n, F]"""
        indices = v.abs().topk(min(EXAMPLE_FEATURES, v.shape[1])).indices
        top = zip(indices.tolist(), v.gather(1, indices).tolist(), strict=True)
        top = [[[k, round(x, 4)] for k, x in zip(*at, strict=True) if x] for at in top]
        named.update(k for at in top for k, _ in at)
        words = [policy.tokenizer.decode([t], skip_special_tokens=False) for t in tokens.tolist()]
        return dict(tokens=words, l1=[round(x, 4) for x in v.abs().sum(1).tolist()], top=top)

    shown = []
    for pair in pairs[:EXAMPLES]:
        packed = data.pack_pairs([pair]).to(s.device)
        with train.autocast(s):
            x = steered.residual(packed, steered.model.plan(packed))
        parts = {}
        for branch, name in enumerate(("prompt", "chosen", "rejected")):
            rows = (packed.branch == branch).nonzero().squeeze(1)
            rows = rows[-EXAMPLE_TOKENS:] if name == "prompt" else rows[:EXAMPLE_TOKENS]
            with train.autocast(s):
                v = steered.adapter(x[rows]).float()
            v[packed.position[rows] == 0] = (
                0  # left out of every average, and it would outshine the rest
            )
            parts[name] = part(packed.tokens[rows], v)
        shown.append(parts)
    return dict(pairs=shown, explanations={str(k): explain(labels, k) for k in sorted(named)})


def described_run(policy: Policy, source: str, pairs: Sequence[Pair], labels: list[Labels]) -> dict:
    """What was evaluated on what, for a table's `about`."""
    s, sae = policy.settings, policy.steered.sae
    return dict(
        **dict(run=policy.name, data=source, pairs=len(pairs)),
        **dict(base_model=s.model, layer=policy.steered.layer, d_sae=sae.d_sae),
        **dict(sae=sae.source, sae_id=sae.sae_id, sae_sha256=sae.sha256, dtype=s.dtype),
        labels=[described(table) for table in labels],
        code=train.code_revision(),
    )


def described(table: Labels) -> dict:
    """Which labels a table was made with, for its `about`; text says it in words."""
    by = {"fires": "by what a feature fires on", "promotes": "by what a feature promotes"}.get(
        table.kind, table.kind
    )
    match = "of this SAE" if table.matched else "ASSUMED to be of this SAE, the file does not say"
    text = f"{table.name}: {by}; judge: {table.judge or 'not stated'}; {match}"
    own = dict(
        name=table.name,
        kind=table.kind,
        judge=table.judge,
        matched=table.matched,
        sha256=table.sha256,
    )
    return own | dict(table.sae, text=text)


# --- files --------------------------------------------------------------------------------------------------


def write_table(folder: Path, name: str, about: dict, rows: list[Row], draw) -> None:
    """name.csv, name.json and name.png of the same rows; the png states the csv's sha256 in its `Source`.

    draw(rows, about) -> matplotlib Figure. A number that is not there (nan) is null in json and empty in csv.
    """
    rows = [{key: _plain(value) for key, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / f"{name}.csv").write_text(text.getvalue())
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    (folder / f"{name}.json").write_text(
        f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n'
    )
    digest = hashlib.sha256(text.getvalue().encode()).hexdigest()
    with plt.rc_context(figures.STYLE), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from"
        )  # explanations come in every script
        draw(rows, about).savefig(
            folder / f"{name}.png", dpi=150, metadata={"Source": f"{name}.csv sha256 {digest}"}
        )


def _plain(value):
    """Tensors and numpy numbers as Python's; nan as None."""
    value = value.item() if isinstance(value, Tensor | np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


# --- the audit ----------------------------------------------------------------------------------------------


def out_folder(s: Settings) -> Path:
    """--out, or the folder that --run is; a Hub id has none. Raises UserError."""
    if s.out:
        return writable(Path(s.out))
    if not Path(s.run).is_dir():
        raise UserError(
            f"--run {s.run}: no such folder; of a Hub id, say with --out where the results should go."
        )
    return writable(Path(s.run), "run")


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    out = out_folder(s)
    policy = open_policy(s.run, s.model, s.sae, s.sae_id, s.device, s.dtype)
    if policy.steered is None:
        raise UserError(
            f"--run {s.run}: has no adapter; there is no steering to read in a model trained whole."
        )
    sae = policy.steered.sae
    files = s.labels or (TINY_LABELS if sae.source == "tiny" else ())
    labels = [load_labels(path, sae, s.assume_labels_match) for path in files]
    if len({table.name for table in labels}) < len(labels):
        raise UserError("--labels: two files of the same name; their names tell the tables apart.")
    human = read_human(s.human, labels) if s.human else {}
    pairs, source = eval_pairs(policy, s.data, s.pairs)
    policy = policy._replace(
        settings=replace(policy.settings, tokens_per_microbatch=s.tokens_per_microbatch)
    )

    masks = [torch.from_numpy(mask) for table in labels for mask in table.categories.values()]
    counts = usage(policy.steered, pairs, policy.settings, torch.stack(masks) if masks else None)
    about = described_run(policy, source, pairs, labels) | dict(
        positions=dict(zip(CONTEXTS, counts.positions.tolist(), strict=True)),
        **dict(
            bootstrap=s.bootstrap, seed=s.seed, human=sha256(Path(s.human)) if s.human else None
        ),
    )
    tables = {
        "composition": (
            composition_rows(counts, labels, human, s.bootstrap, s.seed),
            figures.composition,
        ),
        "top_usage": (
            top_rows(counts.usage, "usage", labels),
            figures.top("usage", "Most used features (Table 3)"),
        ),
        "top_value": (
            top_rows(counts.mean, "value", labels),
            figures.top("value", "Features of largest mean value (Table 4)"),
        ),
        "value_difference": (
            difference_rows(counts.mean[0] - counts.mean[1]),
            figures.value_difference,
        ),
        "usage_rank": (rank_rows(counts.usage, labels), figures.usage_rank),
        "l0": (l0_rows(counts), figures.l0),
        "l0_by_position": (place_rows(counts), figures.l0_by_position),
    }
    if not masks:
        del tables["composition"]
        print("No --labels with categories: no composition (Table 2).", file=sys.stderr)
    with publish(out / "eval") as folder:
        for name, (rows, draw) in tqdm(tables.items(), desc="tables", unit="table", leave=False):
            write_table(folder, name, about, rows, draw)
        pq.write_table(feature_table(counts, labels), folder / "features.parquet")
        shown = dict(about=about) | examples(policy, pairs, labels)
        (folder / "examples.json").write_text(json.dumps(shown) + "\n")
    page = report.write_report(out)
    if (out / "adapter").is_dir() or (out / "adapter_config.json").is_file():
        card.write_card(out)
    print_composition(tables["composition"][0] if masks else [])
    print(
        f"Written to {out / 'eval'}: {', '.join(tables)} (csv, json, png), features.parquet; and {page}"
    )


def print_composition(rows: list[Row]) -> None:
    """Table 2, for the terminal."""
    if rows:
        print(
            f"{'category':<24}{'context':<17}{'SAE':>8}{'adapter':>9}{'change':>10}  95 % over pairs"
        )
    for row in rows:
        name = f"{row['labels']}: {row['category']}"
        change = (
            f"{100 * row['change']:+9.1f}%  {100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
        )
        if "noisy_low" in row:
            change += f"; with label noise {100 * row['noisy_low']:+.1f} to {100 * row['noisy_high']:+.1f}"
        print(
            f"{name:<24}{row['context']:<17}{100 * row['sae']:7.2f}%{100 * row['adapter']:8.2f}% {change}"
        )


if __name__ == "__main__":
    cli.run(main)
