"""SimPO: log-probabilities of response tokens -> losses, and the metrics that a run reports.

For a prompt p with a chosen response w and a rejected response l:

    ℓ(y)  = (1/|y|) Σ_t log π(y_t | p, y_<t)                mean over the response's tokens
    L     = -log σ( β (ℓ(w) - ℓ(l) - ρ) ),  ρ = γ/β         SimPO, arXiv 2405.14734
    total = mean over pairs of L + α · mean over positions of ‖v‖₁     FSRL, arXiv 2509.12934
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Packed


class Losses(NamedTuple):
    """The losses of P pairs, and the ℓ they are made of."""

    loss: Tensor  # float64 [P], L
    logp_chosen: Tensor  # float64 [P], ℓ(w)
    logp_rejected: Tensor  # float64 [P], ℓ(l)


class Scores(NamedTuple):
    """What one forward pass yields for the P pairs of a packed stream."""

    losses: Losses
    l1: Tensor  # float32 scalar, ‖v‖₁ summed over the positions of all p + w and p + l
    l0: Tensor  # float32 scalar, ‖v‖₀ summed over the same positions


def score(model: nn.Module, packed: Packed, beta: float, gamma_ratio: float) -> Scores:
    """Run a PolicyModel, which DistributedDataParallel may wrap, over packed pairs."""
    logps, l1, l0 = model(packed)  # [N], [T], [T]
    losses = preference_losses(logps, packed, beta, gamma_ratio)
    # A product and a sum instead of a dot product, which autocast would round to bfloat16.
    return Scores(losses, (l1 * packed.copies).sum(), (l0 * packed.copies).sum())


def preference_losses(logps: Tensor, packed: Packed, beta: float, gamma_ratio: float) -> Losses:
    """Log-probabilities [N] of the targets of P packed pairs -> their losses [P]."""
    means = mean_logps(logps, packed.sequence, packed.lengths)  # [N] -> [2 P]
    chosen, rejected = means[0::2], means[1::2]
    return Losses(simpo_loss(chosen, rejected, beta, gamma_ratio), chosen, rejected)


def mean_logps(logps: Tensor, sequence: Tensor, lengths: Tensor) -> Tensor:
    """ℓ: token log-probabilities [N] -> their mean over each response, float64 [C].

    sequence [N]: which response a token belongs to. lengths [C]: tokens of each response. The sum
    is float64: a response's log-probabilities add up to -160 and less, where float32 has steps of
    1.5e-5, and β multiplies the error.
    """
    total = torch.zeros(len(lengths), dtype=torch.float64, device=logps.device)
    return total.index_add(0, sequence, logps.double()) / lengths


def simpo_loss(
    logp_chosen: Tensor, logp_rejected: Tensor, beta: float, gamma_ratio: float
) -> Tensor:
    """L = -log σ(β (ℓ(w) - ℓ(l) - γ/β)): [P], [P] -> [P]; logsigmoid never overflows."""
    return -F.logsigmoid(beta * (logp_chosen - logp_rejected - gamma_ratio))


class Sums(NamedTuple):
    """Sums over pairs or positions, added up over micro-batches and processes: float64 scalars."""

    loss: Tensor
    accuracy: Tensor  # number of pairs with ℓ(w) > ℓ(l)
    logp_chosen: Tensor
    logp_rejected: Tensor
    l1: Tensor  # the sums over positions of Scores
    l0: Tensor

    @classmethod
    def of(cls, scores: Scores) -> "Sums":
        loss, chosen, rejected = scores.losses
        summed = (
            loss.sum(),
            (chosen > rejected).sum(),
            chosen.sum(),
            rejected.sum(),
            scores.l1,
            scores.l0,
        )
        return cls(*(x.detach().double() for x in summed))

    @classmethod
    def zero(cls, device: str) -> "Sums":
        return cls(*torch.zeros(len(cls._fields), dtype=torch.float64, device=device))

    def plus(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))


class Means(NamedTuple):
    """Means over a whole step or evaluation set, named as in metrics.jsonl."""

    loss: float
    l1: float  # ‖v‖₁ of a position
    l0: float  # ‖v‖₀ of a position
    accuracy: float  # share of pairs with ℓ(w) > ℓ(l)
    margin: float  # reward_chosen - reward_rejected
    reward_chosen: float  # β ℓ(w)
    reward_rejected: float  # β ℓ(l)
    logp_chosen: float  # ℓ(w)
    logp_rejected: float  # ℓ(l)


def means(sums: Sums, pairs: int, positions: int, beta: float) -> Means:
    """Divide sums by the number of pairs and the number of positions (data.positions)."""
    totals = torch.stack(sums).tolist()  # one transfer from the GPU for all of them
    loss, accuracy, chosen, rejected = (x / pairs for x in totals[:4])
    l1, l0 = (x / positions for x in totals[4:])
    reward_chosen, reward_rejected = beta * chosen, beta * rejected
    margin = reward_chosen - reward_rejected
    rewards = (reward_chosen, reward_rejected)
    return Means(loss, l1, l0, accuracy, margin, *rewards, chosen, rejected)
