"""Static steering: what one vector, added at every position whatever stands there, recovers of the
policy's gain.

    mean v        c times the mean of v over training positions
    top features  its m largest entries alone
    contrastive   c times the mean over chosen response positions less that over rejected ones
                  (contrastive activation addition, arXiv 2312.06681), of the residual stream or of
                  the SAE's features, decoded

A c or m that is best on the evaluation pairs was chosen on them, which favours these baselines.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from audit.counting import Counts
from eval_ablation import pair_losses
from fsrl import SteeredModel
from policy import Policy
from runtime.tables import interval


class Means(NamedTuple):
    """Averages over the positions of the unshared sequences but their first ones."""

    v: Tensor  # float64 [F]
    stream_gap: Tensor  # float64 [d], mean residual stream over chosen responses - over rejected
    f_gap: Tensor  # float64 [F], the same of the SAE's features


def means(counts: Counts) -> Means:
    def gap(sums: Tensor) -> Tensor:
        """[3 contexts, N] -> [N]; a response is its context without the prompt."""
        responses = (sums[1:] - sums[0]) / (counts.positions[1:] - counts.positions[0])[:, None]
        return responses[0] - responses[1]

    v = counts.sums[0, 1:].sum(0) / counts.positions[1:].sum()
    return Means(v, gap(counts.stream), gap(counts.sums[1]))


class Vector(NamedTuple):
    """A condition: what is added at every position."""

    steering: str
    coefficient: float  # c
    features: int | None  # m
    x: Tensor  # [d]


def vectors(
    found: Means, steered: SteeredModel, coefficients: tuple[float, ...], most: tuple[int, ...]
) -> list[Vector]:
    """coefficients: each c. most: each m."""
    W_dec = steered.sae.W_dec.double().cpu()
    directions = {
        "mean v": found.v @ W_dec,
        "contrastive, residual stream": found.stream_gap,
        "contrastive, SAE features": found.f_gap @ W_dec,
    }
    conditions = [
        Vector(name, float(c), None, c * x)
        for (name, x), c in product(directions.items(), coefficients)
    ]
    order = found.v.abs().argsort(descending=True, stable=True)
    for m in dict.fromkeys(min(m, len(order)) for m in most):
        top = order[:m]
        conditions.append(Vector("top features", 1.0, m, found.v[top] @ W_dec[top]))
    return conditions


def losses(policy: Policy, pairs: list, conditions: list[Vector]) -> Tensor:
    """Of the base model, the policy, then each condition: float64 [2 + conditions, P]."""

    def streams(x: Tensor):
        yield x
        yield policy.steered.steer(x)[0]
        for condition in conditions:
            yield x + condition.x.to(x)

    return pair_losses(policy, pairs, streams, "static steering")


class Static(NamedTuple):
    """A row, with 95 % intervals over pairs."""

    steering: str
    coefficient: float | None
    features: int | None
    loss: float
    low: float
    high: float
    delta: float  # the loss less the policy's, pair by pair
    delta_low: float
    delta_high: float
    recovered: float  # of the policy's gain over the base model; nan without a gain


def static_rows(
    conditions: list[Vector], losses: Tensor, resamples: int, seed: int
) -> list[Static]:
    """losses [2 + conditions, P], as above."""
    base, policy = losses[:2].mean(1)
    deltas = losses - losses[1]
    mean = losses.mean(1)
    columns = (mean, *interval(losses, resamples, seed))
    columns += (deltas.mean(1), *interval(deltas, resamples, seed))
    gain = base - policy
    columns += ((base - mean) / gain.where(gain > 0, torch.nan),)
    names = [("base model", None, None), ("policy", None, None)]
    names += [(x.steering, x.coefficient, x.features) for x in conditions]
    numbers = torch.stack(columns, 1).tolist()
    return [Static(*name, *row) for name, row in zip(names, numbers, strict=True)]
