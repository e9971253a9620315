"""Which features carry a class of tokens, tested by doing: keep only the n that a ranking names
first, and measure again what the policy does.

    usage                  share of positions at which a feature steers
    mean v                 mean of |v| over positions
    attribution            integrated gradients of the SimPO loss (attribution.py)
    attribution, LABELS    the same, features with the class's label in that file first
    v · gradient           Σ_t v_k ∂D/∂v_k, with D the divergence in the class (shift.py)
    random                 features that steer somewhere, in random order: what any n of them keep

A ranking is good where few features keep much. Its score is the mean over NUMBERS of the share of
the policy's divergence in the class that remains, at most 1 each.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audit.attribution import Attribution, Node, integrated
from audit.behaviour import answers_of
from audit.choices import Classes, Conditions, as_trained
from audit.shift import shifts
from data import Pair
from eval_ablation import ablated_streams
from kernels.logps import chunks
from labels import Labels
from policy import Policy, Stream

NUMBERS = (4, 16, 64, 256)  # of features kept


class Curve(NamedTuple):
    """One ranking, and what its first features keep."""

    ranking: str
    order: Tensor  # int64 [F], the feature named first at the front
    kept: Tensor  # float64 [numbers, S], divergence in the class with the first n features alone
    whole: Tensor  # float64 [S], of the policy

    @property
    def shares(self) -> Tensor:
        """Share of the policy's divergence that the first n features keep: [numbers]."""
        return self.kept.mean(1) / self.whole.mean().clamp(min=1e-30)

    @property
    def area(self) -> float:
        return self.shares.clamp(max=1).mean().item()


def rankings(
    category: str,
    labels: Sequence[Labels],
    usage: np.ndarray,
    mean_v: np.ndarray,
    found: Attribution | None,
    gradient: Tensor,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Ranking -> int64 [F], features in its order. usage, mean_v, gradient: [F]; category: the
    class. Without an attribution, the rankings by it are left out.
    """
    usage, mean_v = torch.from_numpy(usage), torch.from_numpy(mean_v)
    scores = {"usage": usage, "mean v": mean_v.abs()}
    if found is not None:
        earned = -found.shares.sum(0)
        scores["attribution"] = earned
        for table in labels:
            if category in table.categories:
                member = torch.from_numpy(table.categories[category])
                first = earned - earned.min() + earned.max() + 1  # above all others
                scores[f"attribution, {table.name}"] = torch.where(member, first, earned)
    scores["v · gradient"] = gradient
    drawn = torch.rand(len(usage), generator=torch.Generator().manual_seed(seed))
    scores["random"] = torch.where(usage > 0, drawn.double(), -1.0)
    return {name: score.argsort(descending=True, stable=True) for name, score in scores.items()}


def curves(
    policy: Policy,
    pairs: Sequence[Pair],
    classes: Classes,
    category: str,
    orders: dict[str, Tensor],
    numbers: Sequence[int] = NUMBERS,
    what: str | None = None,
) -> list[Curve]:
    """Both responses of each pair are texts to measure on."""
    masks = torch.stack([kept(order, n) for order in orders.values() for n in numbers])
    conditions = keeping(policy, masks)
    whole, *rest = shifts(policy, pairs, [classes], conditions, what)
    c = classes.names.index(category)
    result = []
    for i, (name, order) in enumerate(orders.items()):
        part = [found[0] for found in rest[i * len(numbers) : (i + 1) * len(numbers)]]
        divergence = torch.stack([s.divergence[:, c] for s in part])
        result.append(Curve(name, order, divergence, whole[0].divergence[:, c]))
    return result


def kept(order: Tensor, n: int) -> Tensor:
    """The first n features of an order: bool [F]."""
    return torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[:n], True)


def keeping(policy: Policy, masks: Tensor) -> Conditions:
    """The policy, then with each mask's features alone: bool [conditions, F]."""

    def conditions(stream: Stream):
        yield from as_trained(policy)(stream)
        yield from ablated_streams(policy.steered, stream.x, ~masks)

    return conditions


def answers_keeping(
    policy: Policy, mask: Tensor, prompts: Sequence[list[int]], tokens: int, seed: int
) -> list[list[int]]:
    """The policy's answers as behaviour.answers_of gives them, where only the mask's features
    steer: bool [F].
    """
    only = functools.partial(torch.mul, mask.to(policy.device.name))
    return answers_of(policy, policy.steered, prompts, tokens, seed, change=only)


@torch.no_grad()
def gradient_scores(
    policy: Policy, pairs: Sequence[Pair], classes: Classes, category: str, what: str | None = None
) -> Tensor:
    """Σ_t v_k ∂D/∂v_k at the policy's steering, D the divergence in the category summed over the
    response positions of `pairs`: float64 [F].
    """
    member = (classes.of_token == classes.names.index(category)).to(policy.device.name)  # [V]
    total = torch.zeros(policy.steered.sae.d_sae, dtype=torch.float64)
    for stream in policy.streams(pairs, what):
        with policy.autocast():
            x1 = policy.steered.steer(stream.x)[0].requires_grad_()
            base = policy.steered.above(stream.x, stream.plan)[stream.packed.source]
            with torch.enable_grad():
                states = policy.steered.above(x1, stream.plan)[stream.packed.source]
        states_gradient = divergence_gradient(policy, base, states.detach(), member)
        (gradient,) = torch.autograd.grad(states, x1, states_gradient)
        for rows in policy.steered.pieces(torch.arange(len(x1), device=x1.device)):
            with policy.autocast():
                node = Node(1.0, 1.0, gradient[rows])
                total += integrated(policy, stream.x[rows], [node]).sum(0).double().cpu()
    return total


def divergence_gradient(policy: Policy, base: Tensor, states: Tensor, member: Tensor) -> Tensor:
    """∂D/∂states: final states [N, d] of base model and policy, bool [V] -> [N, d]."""
    parts = []
    for rows in chunks(states, policy.base.model.embed_tokens.weight):
        logp0 = policy.base.head(base[rows]).log_softmax(-1)[:, member]
        with torch.enable_grad():
            hidden = states[rows].requires_grad_()
            logp1 = policy.base.head(hidden).log_softmax(-1)[:, member]
            inside = ((logp1.exp() - logp0.exp()) * (logp1 - logp0)).sum()
            parts += torch.autograd.grad(inside, hidden)
    return torch.cat(parts)
