"""How the policy's distribution over the next token differs from the base model's, by class of
tokens. It needs texts and no preference.

With π the base model's distribution at a response position and π' the policy's,

    mass        p'(c) - p(c),                  p(c) = Σ_{y ∈ c} π(y)
    share       Σ_{y ∈ c} π'(y) log π'(y)/π(y)            sums to KL(π' ‖ π)
    divergence  Σ_{y ∈ c} (π'(y) - π(y)) log π'(y)/π(y)   sums to KL(π' ‖ π) + KL(π ‖ π')

Classes partition the vocabulary, so the sums are exact. A class's share of KL(π' ‖ π) may be
negative: it is, where the policy takes mass away from the class. Its divergence never is, because
both factors of a term have the same sign; a class that loses mass shows there as one that gains it
does, and so does a class within which one token replaces another. The class of the largest
divergence is therefore the one that the policy changed most.

The null is the same steering at the wrong places: what the adapter adds to the stream is permuted
over positions and scaled until KL(π' ‖ π) is the policy's. What it moves says what steering of this
size and these directions does anywhere; the policy's own divergence in a class beyond it is what
reading the context adds.

Exact over the vocabulary, a chunk of positions at a time; nothing of size [T, V] is kept.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from audit.choices import Classes, Compared, Conditions, as_trained, compared
from data import Pair
from policy import Policy, Stream

LEAST = 0.003  # nats per position, for saying that a class changed (experiments/PLANTED.md)
SEARCH_PAIRS = 8  # that the null's scale is found on
SEARCH = (4.0, 1.4)  # widths of the two rounds of that search, as ratios of neighbouring scales


class Shift(NamedTuple):
    """By text and class, means over the text's positions. Texts: chosen 0, rejected 0, chosen 1,
    ... of the pairs, S in all. On the CPU, float64 [S, C].
    """

    names: tuple[str, ...]  # of the classes
    before: Tensor  # p(c), the base model's
    after: Tensor  # p'(c), the policy's
    share: Tensor  # of KL(π' ‖ π)
    divergence: Tensor  # of KL(π' ‖ π) + KL(π ‖ π')

    @property
    def kl(self) -> Tensor:
        """KL(π' ‖ π) per position: float64 [S]."""
        return self.share.sum(1)

    def named(self) -> str | None:
        """The category of the largest divergence; None where the lower end of its 95 % interval
        over texts is less than LEAST. It is never one of the last two classes, the end of the
        answer and the rest.
        """
        values = self.divergence[:, :-2]
        top = int(values.mean(0).argmax())
        error = values[:, top].std() / math.sqrt(len(values))
        return self.names[top] if values[:, top].mean() - 1.96 * error >= LEAST else None

    def of(self, texts: slice) -> "Shift":
        """slice(0, None, 2): the chosen responses; slice(1, None, 2): the rejected ones."""
        return Shift(self.names, *(column[texts] for column in self[1:]))


class ShiftSums:
    """Adds up Shifts of S texts under each partition."""

    def __init__(self, policy: Policy, texts: int, partitions: Sequence[Classes]):
        self.partitions = partitions
        member = [torch.eye(len(c.names))[c.of_token] for c in partitions]
        self.member = torch.cat(member, 1).to(policy.device.name)  # [V, ΣC]
        self.sums = torch.zeros(4, texts, self.member.shape[1], dtype=torch.float64)
        self.positions = torch.zeros(texts, dtype=torch.float64)

    def add(self, c: Compared) -> None:
        p0, p1 = c.p
        member = self.member.to(p0.dtype)
        ratio = c.logp[1] - c.logp[0]
        share = (p1 * ratio) @ member  # [n, V] @ [V, ΣC]
        back = (p0 * ratio) @ member
        terms = torch.stack([p0 @ member, p1 @ member, share, share - back])
        self.sums.index_add_(1, c.text, terms.double().cpu())
        self.positions.index_add_(0, c.text, torch.ones_like(c.weight))

    def result(self) -> list[Shift]:
        means = self.sums / self.positions[:, None].clamp(min=1)
        parts = means.split([len(c.names) for c in self.partitions], dim=2)
        return [Shift(c.names, *part) for c, part in zip(self.partitions, parts, strict=True)]


def shift(
    policy: Policy, pairs: Sequence[Pair], partitions: Sequence[Classes], what: str | None = None
) -> list[Shift]:
    """The policy against its base model on both responses of each pair, under each partition."""
    return shifts(policy, pairs, partitions, as_trained(policy), what)[0]


def shifts(
    policy: Policy,
    pairs: Sequence[Pair],
    partitions: Sequence[Classes],
    conditions: Conditions,
    what: str | None = None,
) -> list[list[Shift]]:
    """The same of every condition: [conditions][partitions]."""
    sums: list[ShiftSums] = []
    for some in compared(policy, pairs, conditions, what):
        if some.condition == len(sums):
            sums.append(ShiftSums(policy, 2 * len(pairs), partitions))
        sums[some.condition].add(some)
    return [s.result() for s in sums]


# --- the null -------------------------------------------------------------------------------------


def permuted(policy: Policy, scale: float, seed: int = 0) -> Conditions:
    """What the adapter adds, times `scale`, at positions drawn without replacement: those of
    prompts among prompts, those of responses among responses. The first position keeps its own.
    """
    return lambda stream: [stream.x + scale * shuffled(policy, stream, seed)]


def shuffled(policy: Policy, stream: Stream, seed: int) -> Tensor:
    """x' - x with its rows permuted: [T, d]."""
    packed = stream.packed
    push = policy.steered.steer(stream.x)[0] - stream.x
    generator = torch.Generator().manual_seed(seed + stream.pairs[0])
    for rows in (packed.branch == 0, packed.branch > 0):
        places = (rows & (packed.position > 0)).nonzero()[:, 0]
        order = torch.randperm(len(places), generator=generator).to(places.device)
        push[places] = push[places[order]]
    return push


def null(
    policy: Policy,
    pairs: Sequence[Pair],
    partitions: Sequence[Classes],
    seed: int = 0,
    what: str | None = None,
) -> list[Shift]:
    """The shift of permuted steering that has the policy's mean KL(π' ‖ π), about.

    The scale is found on few pairs, and corrected once by the KL that it gives on all of them.
    """
    scale, slope = equal_scale(policy, pairs[:SEARCH_PAIRS], partitions[:1], seed)

    def both(stream: Stream) -> Iterator[Tensor]:
        yield from as_trained(policy)(stream)
        yield from permuted(policy, scale, seed)(stream)

    own, found = (s[0].kl.mean().item() for s in shifts(policy, pairs, partitions[:1], both, what))
    if min(own, found) > 0:
        scale *= (own / found) ** slope
    return shifts(policy, pairs, partitions, permuted(policy, scale, seed), what)[0]


def equal_scale(
    policy: Policy, pairs: Sequence[Pair], partitions: Sequence[Classes], seed: int
) -> tuple[float, float]:
    """The scale at which permuted steering has the policy's mean KL on these pairs, about, and
    d log scale / d log KL there.

    Two rounds of five scales, the second between those of the first, and a line through the last
    five in logarithms. (1, 0) where the policy steers nothing.
    """
    middle, slope = 1.0, 0.0
    for width in SEARCH:
        scales = [middle * width**i for i in (-2, -1, 0, 1, 2)]

        def conditions(stream: Stream, scales: list[float] = scales) -> Iterator[Tensor]:
            yield from as_trained(policy)(stream)
            push = shuffled(policy, stream, seed)
            for scale in scales:
                yield stream.x + scale * push

        found = [s[0].kl.mean().item() for s in shifts(policy, pairs, partitions, conditions)]
        wanted, *found = found
        if min(wanted, *found) <= 0:
            return 1.0, 0.0
        x, y = torch.tensor(found).log(), torch.tensor(scales).log()
        order = (x - math.log(wanted)).abs().argsort()[:2]  # the two that are nearest
        (x0, x1), (y0, y1) = x[order].tolist(), y[order].tolist()
        slope = (y1 - y0) / (x1 - x0) if x1 != x0 else 0.0
        middle = math.exp(y0 + slope * (math.log(wanted) - x0))
    return middle, slope
