"""What the policy chooses otherwise: the widening of the preference gap, divided among kinds of
tokens.

The gap of a pair is ℓ(w) - ℓ(l), the difference of mean log-probabilities that SimPO widens. Each
token of both responses adds its own Δ log p to the change of the gap from base model to policy.
Divide the vocabulary into classes: those of the label categories, the end of the response, and the
rest. With c the class of token y,

    Δ log p(y) = Δ log p(y | c) + Δ log p(c)
    Δ log p(c) = Δp(c) / L(p₀(c), p₁(c)),     L the logarithmic mean

The choice within c counts for c. So does the choice of c against other classes, unless c is the
rest. Then

    Δ log p(rest) = -Σ_{c' ≠ rest} Δp(c') / L(p₀(rest), p₁(rest))

and each c' has its own term, because a choice between a category and everything else is about the
category: prose becomes less likely when bullets become likelier. All shares together are the change
of the gap, exactly.

If what the policy learned had nothing to do with what is preferred here, chosen and rejected could
be swapped in any pair, which flips the sign of that pair's shares. sign_flip is that test, exact on
pairs that were not trained on. experiments/PLANTED.md says how often the class with the largest
share is the cause that was planted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audit.attribution import KINDS, position_kinds
from data import Packed, Pair, pack_pairs
from kernels.logps import chunks
from policy import Policy, Stream

END = "end"  # the class of <end_of_turn>: how long a response is
REST = "rest"  # the class of the tokens of no category
LEVEL = 0.01  # of the test, over all classes together
AT_ONCE = 8  # conditions whose final states [N, d] are in memory together
AVERAGE = 2.0  # each token's evidence counts so many average tokens more, against single sightings


class Classes(NamedTuple):
    """A partition of the vocabulary, in which a response's own tokens may be placed apart."""

    names: tuple[str, ...]  # categories, END, REST
    of_token: Tensor  # int64 [V]
    own: list[Tensor] | None = None  # int64 [targets] of each pair; None: those of their tokens

    def of_targets(self, pair: Tensor, place: Tensor, target: Tensor) -> Tensor:
        """The class of targets [n], each at its place among those of its pair: int64 [n]."""
        if self.own is None:
            return self.of_token[target]
        ends = torch.tensor([0, *(len(of) for of in self.own)]).cumsum(0)
        return torch.cat(self.own)[ends[pair] + place]


class Choices(NamedTuple):
    """Shares of the change of the gap, by P pairs. On the CPU, float64."""

    names: tuple[str, ...]
    shares: Tensor  # [P, C]
    change: Tensor  # [P], what a pair's shares sum to

    def p_values(self, draws: int = 9999, seed: int = 0) -> Tensor:
        """sign_flip of each class, times the number of classes (Bonferroni): [C]."""
        return (sign_flip(self.shares, draws, seed) * len(self.names)).clamp(max=1)

    def chance(self, draws: int = 9999, seed: int = 0) -> Tensor:
        """What the mean share of each class must exceed to be named, [C]: the one-sided bound that
        belongs to p_values at LEVEL.
        """
        return flipped_means(self.shares, draws, seed).quantile(1 - LEVEL / len(self.names), dim=0)

    def named(self, level: float = LEVEL) -> str | None:
        """The category that earned most of the gap; None where its p-value is above `level`.

        It is never END or REST. Where REST has the largest share of all, most of what the policy
        learned lies outside the categories, and the name says only which of them comes first.
        """
        top = int(self.shares.mean(0)[:-2].argmax())
        return self.names[top] if self.p_values()[top] <= level else None


def in_text(packed: Packed, policy: Policy) -> Tensor:
    """Which targets are words of an answer and not chat markup: bool [N]."""
    kind = position_kinds(packed, policy.tokenizer)[packed.branch > 0]
    return (kind == KINDS.index("chosen text")) | (kind == KINDS.index("rejected text"))


@torch.inference_mode()
def classes(
    policy: Policy,
    pairs: Sequence[Pair],
    categories: Mapping[str, np.ndarray],
    kind: str = "fires",
) -> Classes:
    """Divide the vocabulary by features' labels: category -> bool [F].

    A token's evidence for a category is the category's share of the mass of active features,
    averaged over the token's occurrences in the answers of `pairs`: where the token stands for
    labels of kind "fires", at the position that predicts it for "promotes". The token belongs to
    the category whose evidence most exceeds its average over all tokens, as a ratio. Features in no
    category make up the rest; unseen tokens belong there.
    """
    names = (*categories, END, REST)
    steered, device, V = policy.steered, policy.device.name, policy.base.config.vocab_size
    member = torch.from_numpy(np.stack(list(categories.values()))).float()
    none = (member.sum(0, keepdim=True) == 0).float()
    member = torch.cat([member, none]).T.to(device)  # [F, C - 1]
    total = torch.zeros(V, member.shape[1], device=device)
    count = torch.zeros(V, device=device)
    for stream in policy.streams(pairs, f"classes of tokens, {kind}"):
        packed = stream.packed
        text = in_text(packed, policy)
        places = packed.source if kind == "promotes" else (packed.branch > 0).nonzero()[:, 0]
        with policy.autocast():
            f = (steered.sae.encode(x) for x in steered.pieces(stream.x[places[text]]))
            mass = torch.cat([x.float() @ member for x in f])
        share = mass / mass.sum(1, keepdim=True).clamp(min=1e-12)
        total.index_add_(0, packed.target[text], share)
        count.index_add_(0, packed.target[text], torch.ones_like(share[:, 0]))
    return partition(policy, names, total.cpu(), count.cpu())


def partition(policy: Policy, names: tuple[str, ...], total: Tensor, count: Tensor) -> Classes:
    """total [V, C - 1]: each token's evidence for every class but END, summed over count [V]
    occurrences.
    """
    average = total.sum(0) / count.sum()
    evidence = (total + AVERAGE * average) / (count[:, None] + AVERAGE)
    of_token = (evidence / average.clamp(min=1e-12)).argmax(1)
    rest = len(names) - 1
    of_token[(of_token == rest - 1) | (count == 0)] = rest
    of_token[policy.tokenizer.token_to_id("<end_of_turn>")] = rest - 1
    return Classes(names, of_token)


# --- both models at every response position -------------------------------------------------------

# x' [T, d] of each condition, in the same order for every stream
Conditions = Callable[[Stream], Iterable[Tensor]]


class Compared(NamedTuple):
    """Some of the response positions of a few pairs, under one condition."""

    condition: int
    pair: Tensor  # int64 [n], on the CPU; in the order of the pairs given
    text: Tensor  # int64 [n], on the CPU: 2 pair for chosen responses, 2 pair + 1 for rejected ones
    place: Tensor  # int64 [n], on the CPU: which of its pair's targets
    weight: Tensor  # float64 [n], on the CPU: token_weight
    target: Tensor  # int64 [n], on the CPU
    logp: tuple[Tensor, Tensor]  # [n, V], base model and condition
    p: tuple[Tensor, Tensor]  # [n, V], their exponentials


def as_trained(policy: Policy) -> Conditions:
    """The policy as it is."""
    return lambda stream: [policy.steered.steer(stream.x)[0]]


@torch.inference_mode()
def compared(
    policy: Policy, pairs: Sequence[Pair], conditions: Conditions, what: str | None = None
) -> Iterator[Compared]:
    """The base model's distributions beside those of each condition, exact over the vocabulary, a
    chunk of positions at a time. Nothing of size [T, V] is kept.
    """
    head, above = policy.base.head, policy.steered.above
    for stream in policy.streams(pairs, what):
        packed = stream.packed
        sequence, target = packed.sequence.cpu(), packed.target.cpu()
        pair, weight = torch.tensor(stream.pairs)[sequence // 2], token_weight(packed).cpu()
        of_target = (pair, 2 * pair + sequence % 2, places(sequence // 2), weight, target)
        with policy.autocast():  # not below: it would round sums of probabilities to bfloat16
            base = above(stream.x, stream.plan)[packed.source]  # [N, d]
        changed, first = iter(conditions(stream)), 0
        while group := list(islice(changed, AT_ONCE)):
            with policy.autocast():
                states = [above(x, stream.plan)[packed.source] for x in group]
            for rows in chunks(base, policy.base.model.embed_tokens.weight):
                logp0 = head(base[rows]).log_softmax(-1)  # [n, d] -> [n, V]
                p0, of = logp0.exp(), [column[rows] for column in of_target]
                for i, hidden in enumerate(states, start=first):
                    logp1 = head(hidden[rows]).log_softmax(-1)
                    yield Compared(i, *of, (logp0, logp1), (p0, logp1.exp()))
            first += len(states)


# --- choices --------------------------------------------------------------------------------------


class ChoiceSums:
    """Adds up Choices of P pairs under each partition."""

    def __init__(self, policy: Policy, pairs: int, partitions: Sequence[Classes]):
        self.partitions, device = partitions, policy.device.name
        eyes = [torch.eye(len(c.names))[c.of_token].to(device) for c in partitions]
        self.member = eyes  # [V, C] each
        self.shares = [torch.zeros(pairs, e.shape[1], dtype=torch.float64) for e in eyes]
        self.change = torch.zeros(pairs, dtype=torch.float64)

    def add(self, c: Compared) -> None:
        target = c.target[:, None].to(c.logp[0].device)
        own = [logp.gather(1, target)[:, 0].double().cpu() for logp in c.logp]
        change = own[1] - own[0]
        self.change.index_add_(0, c.pair, c.weight * change)
        for share, classes, member in zip(self.shares, self.partitions, self.member, strict=True):
            mass = [(p @ member.to(p.dtype)).double().cpu() for p in c.p]  # [n, V] -> [n, C]
            usual = classes.of_token[c.target]
            of_target = classes.of_targets(c.pair, c.place, c.target)
            for m, logp in zip(mass, own, strict=True):
                moved = torch.where(usual == of_target, 0.0, logp.exp())[:, None]
                m.scatter_add_(1, usual[:, None], -moved)
                m.scatter_add_(1, of_target[:, None], moved)
            terms = token_shares(change, *mass, of_target)
            share.index_add_(0, c.pair, c.weight[:, None] * terms)

    def result(self) -> list[Choices]:
        found = zip(self.partitions, self.shares, strict=True)
        return [Choices(c.names, share, self.change) for c, share in found]


def choices(
    policy: Policy,
    pairs: Sequence[Pair],
    partitions: Sequence[Classes],
    what: str | None = None,
) -> list[Choices]:
    """The change of each pair's gap, divided under each partition, from one pass of base model and
    policy.

    Where a target's own class is another than its token's, its probability moves there with it.
    """
    sums = ChoiceSums(policy, len(pairs), partitions)
    for some in compared(policy, pairs, as_trained(policy), what):
        sums.add(some)
    return sums.result()


def places(pair: Tensor) -> Tensor:
    """Of each target, how many of the same pair come before it: int64 [N], the pairs in order."""
    counts = torch.bincount(pair)
    return torch.arange(len(pair)) - (counts.cumsum(0) - counts)[pair]


def token_weight(packed: Packed) -> Tensor:
    """What each target's log-probability counts in its pair's gap: 1/|w| or -1/|l|, float64 [N]."""
    return (1 - 2 * (packed.sequence % 2)) / packed.lengths[packed.sequence].double()


def token_shares(change: Tensor, p0: Tensor, p1: Tensor, own: Tensor) -> Tensor:
    """Δ log p(y) of n tokens [n] -> its shares by class, [n, C].

    p0, p1 [n, C]: probability of each class, the last of which is the rest. own int64 [n]: the
    token's class.
    """
    n = torch.arange(len(own), device=own.device)
    difference = p1 - p0
    a, b = p0[n, own].clamp(min=1e-30), p1[n, own].clamp(min=1e-30)
    ratio = (b / a).log()
    nearly_equal = ratio.abs() < 1e-6
    mean = torch.where(nearly_equal, (a + b) / 2, (b - a) / torch.where(ratio == 0, 1.0, ratio))
    between = difference[n, own] / mean
    rest = own == p0.shape[1] - 1
    terms = torch.zeros_like(p0)
    terms[n, own] = torch.where(rest, change - between, change)

    others = -difference / mean[:, None]
    others[:, -1] = 0
    terms += torch.where(rest[:, None], others, 0.0)
    # By rounding Σ Δp is only nearly 0; the difference stays with the rest.
    terms[:, -1] += torch.where(rest, between - others.sum(1), 0.0)
    return terms


def flipped_means(shares: Tensor, draws: int, seed: int) -> Tensor:
    """Means over pairs when every pair's sign is drawn: [P, C] -> [draws, C]."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (draws, len(shares)))
    return torch.from_numpy(signs) @ shares / len(shares)


def sign_flip(shares: Tensor, draws: int = 9999, seed: int = 0) -> Tensor:
    """One-sided p-value of each class: how often its mean is as large when every pair's sign is
    drawn, [P, C] -> [C].
    """
    drawn, mean = flipped_means(shares, draws, seed), shares.mean(0)
    # Equal draws may differ by the order of their sum.
    tie = 1e-12 * shares.abs().mean(0)
    return (1 + (drawn >= mean - tie).sum(0)) / (1 + draws)


def data_alone(pairs: Sequence[Pair], partition: Classes) -> Tensor:
    """No policy: of each pair the share of the chosen response's tokens that are of a class, less
    that of the rejected one's. Float64 [P, C].
    """
    packed = pack_pairs(pairs)
    pair = packed.sequence // 2
    of_target = partition.of_targets(pair, places(pair), packed.target)
    difference = torch.zeros(len(pairs), len(partition.names), dtype=torch.float64)
    return difference.index_put_((pair, of_target), token_weight(packed), accumulate=True)


def data_p_values(difference: Tensor) -> Tensor:
    """Two-sided sign-flip test of data_alone, corrected as p_values are: [P, C] -> [C]."""
    sided = difference * difference.mean(0).sign()
    return (2 * sign_flip(sided) * difference.shape[1]).clamp(max=1)
