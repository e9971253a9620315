"""The tables of what the policy does: shift, behaviour, carriers, carried_by."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from audit.behaviour import Behaviour
from audit.ranking import Curve
from audit.rules import Rules
from audit.shift import Shift
from labels import Labels, categories, explain
from runtime.tables import interval, percentiles, resampled

TOKENS = 6  # that a row of behaviour shows as most gained, and as most lost
FEATURES = 20  # in carried_by


class Shifted(NamedTuple):
    """A row: one class of tokens on one set of texts. Means over response positions, then texts."""

    texts: str  # "responses", "base model's answers" or "policy's answers"
    labels: str  # the label file, or the file of rules
    kind: str
    matched: bool  # whether the label file states the run's SAE; rules need not
    tokens: str  # the class
    before: float  # probability of the class, base model
    after: float  # policy
    low: float  # of after - before, 95 % over texts
    high: float
    share: float  # of KL(policy ‖ base), nats per position; the classes' sum to it
    divergence: float  # of KL(policy ‖ base) + KL(base ‖ policy)
    divergence_low: float
    divergence_high: float
    null_divergence: float | None  # with the steering permuted over positions, at equal KL
    named: bool  # the category that changed most


def shift_rows(
    texts: str,
    found: Shift,
    null: Shift | None,
    table: Labels | Rules,
    resamples: int,
    seed: int,
) -> list[Shifted]:
    change = interval((found.after - found.before).T, resamples, seed)
    bounds = interval(found.divergence.T, resamples, seed)
    named, rows = found.named(), []
    for i, name in enumerate(found.names):
        about = (texts, table.name, table.kind, table.matched, name)
        before, after, share, divergence = (column[:, i].mean().item() for column in found[1:])
        spread = [end[i].item() for end in (*change, *bounds)]
        permuted = None if null is None else null.divergence[:, i].mean().item()
        numbers = (before, after, *spread[:2], share, divergence, *spread[2:], permuted)
        rows.append(Shifted(*about, *numbers, name == named))
    return rows


class Behaved(NamedTuple):
    """A row: one class of tokens in the two models' answers; "(all)": the length of an answer."""

    labels: str
    kind: str
    matched: bool
    tokens: str
    before: float  # tokens of the class in an answer of the base model, mean over prompts
    after: float  # of the policy
    change: float
    low: float  # 95 % over prompts
    high: float
    gained: float | None  # Σ over tokens of the class that became more frequent
    lost: float | None  # less frequent
    excess: float | None  # gained + lost, beyond what swapping the models' answers gives
    p_value: float | None
    named: bool
    more: str  # the tokens gained most, as text, each quoted
    less: str


def behaviour_rows(
    found: Behaviour, table: Labels | Rules, tokenizer: Tokenizer, resamples: int, seed: int
) -> list[Behaved]:
    before = torch.cat([found.before, found.before.sum(1, keepdim=True)], 1)
    after = torch.cat([found.after, found.after.sum(1, keepdim=True)], 1)
    low, high = interval((after - before).T, resamples, seed)
    named, rows = found.named(), []
    for i, name in enumerate((*found.names, "(all)")):
        a, b = before[:, i].mean().item(), after[:, i].mean().item()
        about = (table.name, table.kind, table.matched, name)
        change = (a, b, b - a, low[i].item(), high[i].item())
        moved: tuple = (None,) * 4
        words = ("", "")
        if i < len(found.names):
            moved = tuple(x[i].item() for x in (found.gained, found.lost, found.excess))
            moved += (found.p_values[i].item(),)
            words = tuple(most(found, i, sign, tokenizer) for sign in (1, -1))
        rows.append(Behaved(*about, *change, *moved, name == named, *words))
    return rows


def most(found: Behaviour, kind: int, sign: int, tokenizer: Tokenizer) -> str:
    """The tokens of a class whose mean count rose (sign 1) or fell (-1) most."""
    here = {t: sign * d for (k, t), d in found.tokens.items() if k == kind and sign * d > 0}
    first = sorted(here, key=lambda token: (-here[token], token))[:TOKENS]
    texts = (tokenizer.decode([token], skip_special_tokens=False) for token in first)
    return ", ".join(f"{text!r}" for text in texts)


class Carrier(NamedTuple):
    """A row: the first n features of a ranking, kept alone."""

    labels: str
    category: str  # whose tokens they are to carry
    ranking: str
    n: int
    kept: float  # share of the policy's divergence in the category
    low: float  # 95 % over texts
    high: float
    area: float  # of the ranking: mean of kept over all n, at most 1 each
    wins: bool
    answers: int | None  # share of the change in answers is measured on so many prompts
    answers_kept: float | None  # excess of the category's tokens in them, over the policy's


def carrier_rows(
    curves: Sequence[Curve],
    numbers: Sequence[int],
    table: Labels | Rules,
    category: str,
    in_answers: dict[tuple[str, int], float],
    prompts: int,
    resamples: int,
    seed: int,
) -> list[Carrier]:
    """in_answers: (ranking, n) -> answers_kept, where it was measured."""
    best = max(curves, key=lambda c: c.area).ranking
    rows = []
    for curve in sorted(curves, key=lambda c: -c.area):
        low, high = ratio_interval(curve.kept, curve.whole, resamples, seed)
        for i, n in enumerate(numbers):
            measured = in_answers.get((curve.ranking, n))
            numbers_here = (curve.shares[i].item(), low[i].item(), high[i].item(), curve.area)
            answered = (None if measured is None else prompts, measured)
            about = (table.name, category, curve.ranking, n)
            rows.append(Carrier(*about, *numbers_here, curve.ranking == best, *answered))
    return rows


def ratio_interval(part: Tensor, whole: Tensor, resamples: int, seed: int) -> tuple:
    """95 % of mean part / mean whole over texts drawn with replacement: [n, S], [S] -> [n] each."""
    drawn = resampled(torch.cat([part, whole[None]]), resamples, seed)
    return percentiles(drawn[:, :-1] / drawn[:, -1:].clamp(min=1e-30))


class Carried(NamedTuple):
    """A row: one feature, in the order of the ranking that keeps most."""

    rank: int
    feature: int
    usage: float
    mean_v: float
    explanation: str
    categories: str


def carried_rows(order: Tensor, usage, mean_v, labels: list[Labels]) -> list[Carried]:
    """usage, mean_v: [F]. Features that never steer are left out."""
    rows = []
    for rank, k in enumerate(order[:FEATURES].tolist(), start=1):
        if usage[k]:
            numbers = (float(usage[k]), float(mean_v[k]))
            rows.append(Carried(rank, k, *numbers, explain(labels, k), categories(labels, k)))
    return rows
