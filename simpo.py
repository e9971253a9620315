"""SimPO: response log-probabilities -> losses, and what is reported of them.

ℓ(y) = (1/|y|) Σ_t log π(y_t | p, y_<t)                      mean over the response's tokens
L    = -log σ( β (ℓ(w) - ℓ(l) - ρ) ),  ρ = γ/β               SimPO, arXiv 2405.14734
total = mean over pairs of L + α · mean over positions of ‖v‖₁            FSRL, arXiv 2509.12934
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Packed


class Losses(NamedTuple):
    """Of P pairs."""

    loss: Tensor  # float64 [P], SimPO
    logp_chosen: Tensor  # float64 [P], mean over the response's tokens
    logp_rejected: Tensor  # float64 [P]


class Scores(NamedTuple):
    """What a forward pass says about the P pairs and the positions of a packed stream."""

    losses: Losses
    l1: Tensor  # sum over the positions of the unshared sequences of ‖v‖₁
    l0: Tensor  # the same of ‖v‖₀


def score(model: nn.Module, packed: Packed, beta: float, gamma_ratio: float) -> Scores:
    """Run a SteeredModel or Unsteered, in whatever it is wrapped, over packed pairs."""
    logps, l1, l0 = model(packed)
    losses = preference_losses(logps, packed, beta, gamma_ratio)
    # Multiplied and summed, not a dot product: autocast would round that to bfloat16.
    return Scores(losses, (l1 * packed.copies).sum(), (l0 * packed.copies).sum())


def preference_losses(logps: Tensor, packed: Packed, beta: float, gamma_ratio: float) -> Losses:
    """Log-probabilities [N] of the targets of packed pairs -> losses and mean log-probabilities,
    each [P].
    """
    means = mean_logps(logps, packed.sequence, packed.lengths)  # [N] -> [2 P]
    chosen, rejected = means[0::2], means[1::2]
    return Losses(simpo_loss(chosen, rejected, beta, gamma_ratio), chosen, rejected)


def mean_logps(logps: Tensor, sequence: Tensor, lengths: Tensor) -> Tensor:
    """Token log-probabilities [N] -> their mean over each response, float64 [C]: the ℓ of the
    equations above.

    float64 because a float32 sum over a response near -160 steps by 1.5e-5, which β then
    multiplies.
    """
    total = torch.zeros(len(lengths), dtype=torch.float64, device=logps.device)
    return total.index_add(0, sequence, logps.double()) / lengths


def simpo_loss(
    logp_chosen: Tensor, logp_rejected: Tensor, beta: float, gamma_ratio: float
) -> Tensor:
    """-log σ(β (ℓ_w - ℓ_l - γ/β)): [P], [P] -> [P]. The logsigmoid does not overflow for any
    margin.
    """
    return -F.logsigmoid(beta * (logp_chosen - logp_rejected - gamma_ratio))


class Sums(NamedTuple):
    """Sums over pairs and positions, which micro-batches and processes add up: float64 scalars."""

    loss: Tensor
    accuracy: Tensor  # pairs whose chosen response is the likelier one
    logp_chosen: Tensor
    logp_rejected: Tensor
    l1: Tensor
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
    """Metrics over a whole step or evaluation set, as metrics.jsonl names them."""

    loss: float
    l1: float
    l0: float
    accuracy: float
    margin: float  # difference of the rewards β ℓ
    reward_chosen: float
    reward_rejected: float
    logp_chosen: float
    logp_rejected: float


def means(sums: Sums, pairs: int, positions: int, beta: float) -> Means:
    """positions: of the unshared sequences (data.positions)."""
    totals = torch.stack(sums).tolist()  # the one place where a step waits for the device
    loss, accuracy, chosen, rejected = (x / pairs for x in totals[:4])
    l1, l0 = (x / positions for x in totals[4:])
    reward_chosen, reward_rejected = beta * chosen, beta * rejected
    margin = reward_chosen - reward_rejected
    rewards = (reward_chosen, reward_rejected)
    return Means(loss, l1, l0, accuracy, margin, *rewards, chosen, rejected)
