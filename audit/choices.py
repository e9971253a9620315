"""What the policy chooses otherwise: the change of the preference gap, shared out among kinds of tokens.

The gap of a pair is ℓ(w) - ℓ(l), the difference of mean log-probabilities that SimPO widens. Every token of both
responses adds its own Δ log p to the change of the gap from base model to policy. Let the vocabulary be parted into
classes, those of the label categories, the end of the response, and the rest. With c the class of token y,

    Δ log p(y) = Δ log p(y | c) + Δ log p(c),         Δ log p(c) = Δp(c) / L(p₀(c), p₁(c)),     L the logarithmic mean

The choice within c counts for c. The choice of c against other classes counts for c too, unless c is the rest: then

    Δ log p(rest) = -Σ_{c' ≠ rest} Δp(c') / L(p₀(rest), p₁(rest))

and each c' has its own term, because a choice between a category and everything else is about the category: plain prose
is disfavoured by making bullets likelier. All shares together are the change of the gap, exactly.

Under the hypothesis that what the policy learned has nothing to do with what is preferred here, chosen and rejected may
be swapped in any pair, which flips the sign of that pair's shares: sign_flip is that test, exact on pairs that were not
trained on. tiny/PLANTED.md says how often the class with the largest share is the cause that was planted.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from packed import Packed
from torch import Tensor
from tqdm import tqdm

import data
import simpo
import train
from audit.attribution import KINDS, position_kinds
from data import Pair
from policy import Policy

END, REST = "end", "rest"  # <end_of_turn>: how long a response is; tokens of no category
AVERAGE = (
    2.0  # mean tokens added to what is counted of a token, so that one sighting decides nothing
)


class Classes(NamedTuple):
    """A partition of the vocabulary."""

    names: tuple[str, ...]  # categories, END, REST
    of_token: Tensor  # int64 [V]


class Choices(NamedTuple):
    """Shares of P pairs' change of the gap. On the CPU, float64."""

    names: tuple[str, ...]
    shares: Tensor  # [P, C]
    change: Tensor  # [P], what a pair's shares should sum to

    def p_values(self, draws: int = 9999, seed: int = 0) -> Tensor:
        """sign_flip of each class, times their number (Bonferroni): [C]."""
        return (sign_flip(self.shares, draws, seed) * len(self.names)).clamp(max=1)

    def named(self, level: float = 0.01) -> str | None:
        """The category that earned most of the gap, or None where its p-value is above `level`.

        Neither END nor REST is ever named; where REST has the largest share of all, most of what the policy learned
        lies outside the categories, and a name says only which of them comes first.
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
    s: train.Settings,
    categories: Mapping[str, np.ndarray],
    kind: str = "fires",
) -> Classes:
    """Part the vocabulary by features' labels: category -> bool [F].

    A token's evidence for a category is the share of the active features' mass that the category holds, averaged over
    the token's occurrences in the answers of `pairs`: where the token stands for labels of kind "fires", at the
    position that predicts it for "promotes". It belongs to the category whose share most exceeds its average over all
    tokens, as a ratio; features in no category make up the rest, and unseen tokens belong there.
    """
    names, V, steered = (*categories, END, REST), policy.base.config.vocab_size, policy.steered
    member = torch.from_numpy(np.stack(list(categories.values()))).float()
    member = torch.cat([member, (member.sum(0, keepdim=True) == 0).float()]).T.to(
        s.device
    )  # [F, C - 1]
    total = torch.zeros(V, member.shape[1], device=s.device)
    count = torch.zeros(V, device=s.device)
    for micro in tqdm(
        data.microbatches(pairs, s.tokens_per_microbatch), desc="classes", leave=False
    ):
        packed = data.pack_pairs([pairs[i] for i in micro]).to(s.device)
        with train.autocast(s):
            x = steered.residual(packed, policy.base.plan(packed))
        text = in_text(packed, policy)
        at = (packed.source if kind == "promotes" else (packed.branch > 0).nonzero().squeeze(1))[
            text
        ]
        mass = torch.cat(
            [steered.sae.encode(rows).float() @ member for rows in steered.pieces(x[at])]
        )
        share = mass / mass.sum(1, keepdim=True).clamp(min=1e-12)
        total.index_add_(0, packed.target[text], share)
        count.index_add_(0, packed.target[text], torch.ones_like(share[:, 0]))
    return partition(policy, names, total.cpu(), count.cpu())


def partition(policy: Policy, names: tuple[str, ...], total: Tensor, count: Tensor) -> Classes:
    """total [V, C - 1], evidence of each token for every class but END, summed over count [V] occurrences."""
    average = total.sum(0) / count.sum()
    lift = (total + AVERAGE * average) / (count[:, None] + AVERAGE) / average.clamp(min=1e-12)
    of_token = lift.argmax(1)
    rest = len(names) - 1
    of_token[(of_token == rest - 1) | (count == 0)] = rest
    of_token[policy.tokenizer.token_to_id("<end_of_turn>")] = rest - 1
    return Classes(names, of_token)


@torch.inference_mode()
def choices(
    policy: Policy, pairs: Sequence[Pair], s: train.Settings, partitions: Sequence[Classes]
) -> list[Choices]:
    """The change of every pair's gap, shared out under each partition, from one pass of base model and policy."""
    P, steered = len(pairs), policy.steered
    member = [torch.eye(len(c.names))[c.of_token].to(s.device) for c in partitions]  # [V, C] each
    shares = [torch.zeros(P, len(c.names), dtype=torch.float64) for c in partitions]
    change = torch.zeros(P, dtype=torch.float64)
    with tqdm(total=P, desc="choices", unit="pair", leave=False) as bar:
        for micro in data.microbatches(pairs, s.tokens_per_microbatch):
            packed = data.pack_pairs([pairs[i] for i in micro]).to(s.device)
            plan = policy.base.plan(packed)
            with train.autocast(s):  # not below: it would round sums of probabilities to bfloat16
                x = steered.residual(packed, plan)
                states = [
                    steered.above(y, plan)[packed.source] for y in (x, steered.steer(x)[0])
                ]  # [N, d] each
            pair = torch.tensor(micro)[packed.sequence.cpu() // 2]
            weight = token_weight(packed).cpu()
            for rows in torch.arange(len(pair)).split(rows_at_once(policy)):
                target = packed.target[rows.to(x.device)]
                logp = [
                    policy.base.head(h[rows.to(x.device)]).log_softmax(-1) for h in states
                ]  # [n, V] each
                y0, y1 = (lp.gather(1, target[:, None]).squeeze(1).double().cpu() for lp in logp)
                change.index_add_(0, pair[rows], weight[rows] * (y1 - y0))
                p = [lp.exp_() for lp in logp]
                for share, c, columns in zip(shares, partitions, member, strict=True):
                    p0, p1 = ((prob @ columns).double().cpu() for prob in p)  # [n, V] -> [n, C]
                    terms = token_shares(y1 - y0, p0, p1, c.of_token[target.cpu()])
                    share.index_add_(0, pair[rows], weight[rows, None] * terms)
            bar.update(len(micro))
    return [Choices(c.names, share, change) for c, share in zip(partitions, shares, strict=True)]


@torch.no_grad()
def feature_shares(
    policy: Policy, pairs: Sequence[Pair], s: train.Settings, c: Classes, steps: int = 8
) -> Tensor:
    """Which features earned each class's share: integrated gradients of the shares along the steering, as in
    attribution.py. Means over pairs, float64 [C, F] on the CPU; a row sums to the class's mean share, but for the error
    of the integral. steps: its nodes, each a forward pass and C backward passes through the upper blocks.
    """
    steered, C = policy.steered, len(c.names)
    member, of_token = torch.eye(C)[c.of_token].to(s.device), c.of_token.to(s.device)  # [V, C], [V]
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros(C, steered.sae.d_sae, dtype=torch.float64)
    with tqdm(total=len(pairs), desc="features", unit="pair", leave=False) as bar:
        for micro in data.microbatches(pairs, s.tokens_per_microbatch):
            packed = data.pack_pairs([pairs[i] for i in micro]).to(s.device)
            plan = policy.base.plan(packed)
            with train.autocast(s):
                x = steered.residual(packed, plan)
                base = steered.above(x, plan)[packed.source]  # [N, d]
                steering = [steered.adapter(rows).to(x.dtype) for rows in steered.pieces(x)]
            parts = list(zip(steered.pieces(x), steering, strict=True))
            for node, share_of_path in zip((nodes + 1) / 2, weights / 2, strict=True):
                moved = torch.cat(
                    [steered.add(rows, node * v) for rows, v in parts]
                ).requires_grad_()  # [T, d]
                with torch.enable_grad(), train.autocast(s):
                    states = steered.above(moved, plan)[packed.source]
                by_state = _state_gradients(policy, packed, base, states.detach(), member, of_token)
                for k in range(C):
                    (by_x,) = torch.autograd.grad(
                        states, moved, by_state[k], retain_graph=k + 1 < C
                    )  # [T, d]
                    for (rows, v), d_x in zip(parts, steered.pieces(by_x), strict=True):
                        with (
                            torch.enable_grad()
                        ):  # through `add`, whatever it is for this kind of adapter
                            at = (node * v).requires_grad_()
                            (d_v,) = torch.autograd.grad(
                                steered.add(rows, at), at, d_x
                            )  # [rows, F]
                        total[k] += share_of_path * (d_v * v).sum(0).double().cpu()
            bar.update(len(micro))
    return total / len(pairs)


def _state_gradients(
    policy: Policy, packed: Packed, base: Tensor, states: Tensor, member: Tensor, of_token: Tensor
):
    """Gradient of each class's share, summed over pairs, with respect to the steered final states: [C, N, d]."""
    gradients = torch.zeros(member.shape[1], *states.shape, device=states.device)
    weight = token_weight(packed)
    for rows in torch.arange(len(states), device=states.device).split(rows_at_once(policy)):
        target = packed.target[rows]
        before = policy.base.head(base[rows]).log_softmax(-1)
        with torch.enable_grad():
            h = states[rows].requires_grad_()
            after = policy.base.head(h).log_softmax(-1)
            change = (after - before).gather(1, target[:, None]).squeeze(1).double()
            p0, p1 = (
                (logp.exp() @ member).double() for logp in (before, after)
            )  # [n, V] -> [n, C]
            shares = (weight[rows] @ token_shares(change, p0, p1, of_token[target])).unbind()
        for k, share in enumerate(shares):
            gradients[k, rows] = torch.autograd.grad(share, h, retain_graph=k + 1 < len(shares))[0]
    return gradients


def token_weight(packed: Packed) -> Tensor:
    """What each target's log-probability counts in its pair's gap: 1/|w| or -1/|l|, float64 [N]."""
    return (1 - 2 * (packed.sequence % 2)) / packed.lengths[packed.sequence].double()


def rows_at_once(policy: Policy) -> int:
    return max(1, simpo.CHUNK_ELEMENTS[policy.base.device.type] // policy.base.config.vocab_size)


def token_shares(change: Tensor, p0: Tensor, p1: Tensor, own: Tensor) -> Tensor:
    """Δ log p(y) of n tokens [n] -> [n, C], by class. p0, p1 [n, C]: probability of each class; the last is the rest.
    own [n]: the token's class.
    """
    difference, n = p1 - p0, torch.arange(len(own), device=own.device)
    a, b = p0[n, own].clamp(min=1e-30), p1[n, own].clamp(min=1e-30)
    ratio = (b / a).log()
    mean = torch.where(
        ratio.abs() < 1e-6, (a + b) / 2, (b - a) / torch.where(ratio == 0, 1.0, ratio)
    )
    between = difference[n, own] / mean
    terms = torch.zeros_like(p0)
    rest = own == p0.shape[1] - 1
    terms[n, own] = torch.where(rest, change - between, change)
    others = -difference / mean[:, None]
    others[:, -1] = 0
    # Rounding leaves Σ Δp = 0 only nearly true: what is missing stays with the rest.
    missing = between - others.sum(1)
    terms += torch.where(rest[:, None], others, 0.0)
    terms[:, -1] += torch.where(rest, missing, 0.0)
    return terms


def sign_flip(shares: Tensor, draws: int = 9999, seed: int = 0) -> Tensor:
    """p-value of each class: how often a mean as large appears when the sign of every pair is drawn, [P, C] -> [C]."""
    signs = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], (draws, len(shares))))
    drawn = signs @ shares / len(shares)  # [draws, C]
    mean = shares.mean(0)
    tie = 1e-12 * shares.abs().mean(
        0
    )  # the same pairs under the same signs, but for the order of the sum
    return (1 + (drawn >= mean - tie).sum(0)) / (1 + draws)
