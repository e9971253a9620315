"""Which features earned the policy its loss: integrated gradients along the steering, complete by construction.

With x the residual stream below the adapter, fixed, and v(x) the policy's steering, let L(s) be the SimPO loss of the
model steered by s v. L(0) is the base model's loss, L(1) the policy's, and the change between them is shared out
(Sundararajan et al., arXiv 1703.01365, with the steering as input and no steering as baseline):

    share_k = Σ_positions v_k ∫₀¹ ∂L(s)/∂(s v_k) ds,      Σ_k share_k = L(1) - L(0)

A negative share lowered the loss. The integral is a Gauss-Legendre sum, so the equality holds up to a residual, which
is reported (a soft-threshold adapter's clamp puts kinks into L, and takes more nodes). A share says what a feature
contributed along this path, together with all the others; ablation (eval_ablation.py) says what the loss would be
without it. The two differ wherever features stand in for each other.
"""

from typing import NamedTuple

import numpy as np
import torch
from packed import Packed
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import data
import train
from data import Pair
from policy import Policy

# Where a feature steered. "first" is the first position: <bos>, or what stands first in a truncated prompt. Of a
# response, the header is `<start_of_turn>model` and its line break, the end all from <end_of_turn> on. A position's
# steering acts on the tokens after it: the header decides how an answer begins.
PARTS = ("header", "text", "end")
KINDS = (
    "first",
    "prompt",
    *(f"{response} {part}" for response in ("chosen", "rejected") for part in PARTS),
)


class Attribution(NamedTuple):
    """Shares of P pairs' mean loss change, by F features and by where they steered (KINDS). All float64, on the CPU."""

    shares: Tensor  # [kinds, F], means over pairs
    error: Tensor  # [F], standard error over pairs of a feature's share (all kinds together)
    pair_category: Tensor  # [P, C], each pair's change that falls to the features of each category
    base: Tensor  # [P], L(0) of each pair
    policy: Tensor  # [P], L(1)

    @property
    def change(self) -> float:
        """L(1) - L(0), mean over pairs."""
        return (self.policy - self.base).mean().item()

    @property
    def residual(self) -> float:
        """What the shares sum to, less the change they should sum to."""
        return self.shares.sum().item() - self.change


def attribution(
    policy: Policy,
    pairs: list[Pair],
    s: train.Settings,
    steps: int = 16,
    categories: Tensor | None = None,
) -> Attribution:
    """Share the change of the loss out among features. steps: nodes of the integral, a forward and a backward each.

    categories: bool [C, F], may overlap. Nothing of size [T, F] is kept: ∂L/∂x' [T, d] comes from the upper blocks,
    and ∂L/∂v from it, some rows at a time.
    """
    steered, (P, F_) = policy.steered, (len(pairs), policy.steered.sae.d_sae)
    member = (
        (torch.zeros(0, F_) if categories is None else categories).to(s.device, torch.float64).T
    )  # [F, C]
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]
    shares, squares = (
        torch.zeros(len(KINDS), F_, dtype=torch.float64),
        torch.zeros(F_, dtype=torch.float64),
    )
    pair_category = torch.zeros(P, member.shape[1], dtype=torch.float64)
    base, full = torch.zeros(P, dtype=torch.float64), torch.zeros(P, dtype=torch.float64)
    with (
        train.autocast(s),
        torch.no_grad(),
        tqdm(total=P, desc="attributing", unit="pair", leave=False) as bar,
    ):
        for micro in data.microbatches(pairs, s.tokens_per_microbatch):
            packed = data.pack_pairs([pairs[i] for i in micro]).to(s.device)
            plan = policy.base.plan(packed)
            x = steered.residual(packed, plan)
            kind = position_kinds(packed, policy.tokenizer)

            def loss(x):
                return train.preference(policy.base, steered.above(x, plan), packed, s)[0]  # noqa: B023 (called here)

            base[micro], full[micro] = loss(x).cpu(), loss(steered.steer(x)[0]).cpu()
            by_kind = torch.zeros(len(KINDS), F_, dtype=x.dtype, device=x.device)
            by_pair = torch.zeros(len(micro), F_, dtype=x.dtype, device=x.device)
            for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                x_node = torch.cat(
                    [steered.add(rows, node * _v(steered, rows)) for rows in steered.pieces(x)]
                )
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(
                        loss(x_node.requires_grad_()).sum(), x_node
                    )  # [T, d]
                pieces = (steered.pieces(t) for t in (x, gradient, kind, packed.tree))
                for rows, d_x, kinds, trees in zip(*pieces, strict=True):
                    v = _v(steered, rows)
                    with (
                        torch.enable_grad()
                    ):  # through `add`, whatever it is for this kind of adapter
                        steering = (node * v).requires_grad_()
                        (d_v,) = torch.autograd.grad(
                            steered.add(rows, steering), steering, d_x
                        )  # [rows, F]
                    share = d_v.mul_(v).mul_(weight)
                    by_kind.index_add_(0, kinds, share)
                    by_pair.index_add_(0, trees, share)
            shares += by_kind.cpu()
            squares += by_pair.double().square().sum(0).cpu()
            pair_category[micro] = (by_pair.double() @ member).cpu()
            bar.update(len(micro))
    mean = shares.sum(0) / P
    error = ((squares / P - mean.square()).clamp(min=0) / max(1, P - 1)).sqrt()
    return Attribution(shares / P, error, pair_category, base, full)


def _v(steered, rows: Tensor) -> Tensor:
    return steered.adapter(rows).to(
        rows.dtype
    )  # autocast makes it bfloat16; s v is rounded only once, by the product


def position_kinds(packed: Packed, tokenizer: Tokenizer) -> Tensor:
    """Index into KINDS of every position of packed pairs: int64 [T]."""
    tokens, branch = packed.tokens, packed.branch
    header = 1 + len(tokenizer.encode("model\n", add_special_tokens=False).ids)
    prompts = torch.bincount(packed.tree[branch == 0])  # tokens of each prompt
    offset = packed.position - prompts[packed.tree]  # within the response
    part = torch.where(offset < header, 0, 1)
    stop = (tokens == tokenizer.token_to_id("<end_of_turn>")) & (
        branch > 0
    )  # once in a response: users' text has none
    sequence = packed.tree * 3 + branch
    for back in range(3):  # <end_of_turn>, a line break, <eos>: what truncation left of them
        part[(stop.roll(back)) & (sequence == sequence.roll(back))] = 2
    kind = torch.where(
        branch == 0, KINDS.index("prompt"), KINDS.index("chosen header") + 3 * (branch - 1) + part
    )
    return torch.where(packed.position == 0, KINDS.index("first"), kind)
