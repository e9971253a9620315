"""Which features earned the policy its loss: integrated gradients along the steering.

Let x be the residual stream below the adapter, v(x) the policy's steering, and L(s) the SimPO loss
of the model steered by s v. L(0) is the base model's loss, L(1) the policy's. The change between
them is divided among features (Sundararajan et al., arXiv 1703.01365, with no steering as the
baseline):

    share_k = Σ_positions v_k ∫₀¹ ∂L(s)/∂(s v_k) ds,      Σ_k share_k = L(1) - L(0)

A negative share lowered the loss. The integral is a sum over nodes (quadrature), so that the
equality holds up to a residual, which is reported. A share says what a feature contributed along
this path, together with all others; ablation (eval_ablation.py) says what the loss would be without
it. The two differ wherever features can stand in for each other.
"""

from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import Packed, Pair
from eval_ablation import loss_above
from policy import Policy, Stream

# Where a feature steered. "first" is the first position: <bos>, or the first token of a truncated
# prompt. Of a response, the header is `<start_of_turn>model` and its line break, the end is all
# from <end_of_turn> on. Steering acts on later tokens: the header's decides how an answer begins.
PARTS = ("header", "text", "end")
KINDS = (
    "first",
    "prompt",
    *(f"{side} {part}" for side in ("chosen", "rejected") for part in PARTS),
)


class Attribution(NamedTuple):
    """Shares of the mean loss change over P pairs, by F features. All float64, on the CPU."""

    shares: Tensor  # [kinds, F], means over pairs, by where a feature steered (KINDS)
    error: Tensor  # [F], standard error over pairs of a feature's share, all kinds together
    pair_category: Tensor  # [P, C], the part of each pair's change that a category's features have
    base: Tensor  # [P], L(0)
    policy: Tensor  # [P], L(1)

    @property
    def change(self) -> float:
        """L(1) - L(0), mean over pairs."""
        return (self.policy - self.base).mean().item()

    @property
    def residual(self) -> float:
        """What the shares sum to, less the change that they should sum to."""
        return self.shares.sum().item() - self.change


class Node(NamedTuple):
    """A node of the integral."""

    s: float
    weight: float
    gradient: Tensor  # [T, d], ∂L/∂x' there


@torch.no_grad()
def attribute(
    policy: Policy,
    pairs: list[Pair],
    nodes: int,
    categories: Tensor | None = None,
    what: str | None = None,
) -> Attribution:
    """nodes: of the integral; each takes a forward and a backward pass through the blocks above.

    categories: bool [C, F], which may overlap. Nothing of size [T, F] is kept: ∂L/∂x' [T, d] comes
    from the blocks above, and ∂L/∂v from it, some rows at a time.
    """
    steered, P, n = policy.steered, len(pairs), policy.steered.sae.d_sae
    device = policy.device.name
    categories = torch.zeros(0, n) if categories is None else categories
    member = categories.to(device, torch.float64).T  # [F, C]
    shares = torch.zeros(len(KINDS), n, dtype=torch.float64)
    squares = torch.zeros(n, dtype=torch.float64)
    pair_category = torch.zeros(P, member.shape[1], dtype=torch.float64)
    base, full = torch.zeros(2, P, dtype=torch.float64)

    for stream in policy.streams(pairs, what):
        x = stream.x
        with policy.autocast():
            whole = steered.steer(x)[0]
            base[stream.pairs] = loss_above(policy, stream, x).cpu()
            full[stream.pairs] = loss_above(policy, stream, whole).cpu()
            path = gradients(policy, stream, whole - x, nodes)

        kind = position_kinds(stream.packed, policy.tokenizer)
        by_kind = torch.zeros(len(KINDS), n, dtype=x.dtype, device=x.device)
        by_pair = torch.zeros(len(stream.pairs), n, dtype=x.dtype, device=x.device)
        for rows in steered.pieces(torch.arange(len(x), device=x.device)):
            with policy.autocast():
                share = integrated(
                    policy, x[rows], [p._replace(gradient=p.gradient[rows]) for p in path]
                )
            by_kind.index_add_(0, kind[rows], share)
            by_pair.index_add_(0, stream.packed.tree[rows], share)
        shares += by_kind.cpu()
        squares += by_pair.double().square().sum(0).cpu()
        pair_category[stream.pairs] = (by_pair.double() @ member).cpu()

    mean = shares.sum(0) / P
    error = ((squares / P - mean.square()).clamp(min=0) / max(1, P - 1)).sqrt()
    return Attribution(shares / P, error, pair_category, base, full)


def gradients(policy: Policy, stream: Stream, push: Tensor, nodes: int) -> list[Node]:
    """∂L/∂x' along the path. push [T, d]: what the whole steering adds to the stream."""
    steered, x = policy.steered, stream.x
    # Else add() is linear in v: x' moves along a line, and ∂x'/∂v is the same at each node.
    clamped = steered.adapter.activation == "soft-threshold"
    path = []
    for s, weight in quadrature(nodes):
        if clamped:
            moved = torch.cat(
                [steered.add(rows, s * v_of(policy, rows)) for rows in steered.pieces(x)]
            )
        else:
            moved = x + s * push
        with torch.enable_grad():
            loss = loss_above(policy, stream, moved.requires_grad_()).sum()
            (gradient,) = torch.autograd.grad(loss, moved)
        path.append(Node(s, weight, gradient))
    if clamped:
        return path
    mean = sum(node.weight * node.gradient for node in path)
    return [Node(1.0, 1.0, mean)]


def quadrature(nodes: int) -> list[tuple[float, float]]:
    """(place, weight) of each node on [0, 1]: Gauss-Legendre on panels of equal width.

    A panel has at most four nodes. L(s) of a strong policy falls within a small part of the path,
    where panels err less than one polynomial over all of it.
    """
    panels = -(-nodes // 4)
    found = []
    for i, part in enumerate(np.array_split(np.arange(nodes), panels)):
        points, weights = np.polynomial.legendre.leggauss(len(part))  # on [-1, 1]
        places = (i + (points + 1) / 2) / panels
        found += zip(places.tolist(), (weights / 2 / panels).tolist(), strict=True)
    return found


def integrated(policy: Policy, x: Tensor, path: list[Node]) -> Tensor:
    """v ∫ ∂L/∂(s v) ds at some rows x [rows, d] -> [rows, F]."""
    v = v_of(policy, x)
    total = torch.zeros_like(v)
    for s, weight, gradient in path:
        with torch.enable_grad():  # through add(), whatever it is for this kind of adapter
            steering = (s * v).requires_grad_()
            (d_v,) = torch.autograd.grad(policy.steered.add(x, steering), steering, gradient)
        total += d_v.mul_(v).mul_(weight)
    return total


def v_of(policy: Policy, x: Tensor) -> Tensor:
    """In the stream's dtype: autocast makes it bfloat16, and s v is to be rounded only once."""
    return policy.steered.adapter(x).to(x.dtype)


def position_kinds(packed: Packed, tokenizer: Tokenizer) -> Tensor:
    """Index into KINDS of every position of packed pairs: int64 [T]."""
    tokens, branch = packed.tokens, packed.branch
    header = 1 + len(tokenizer.encode("model\n", add_special_tokens=False).ids)
    prompts = torch.bincount(packed.tree[branch == 0])  # tokens of each prompt
    offset = packed.position - prompts[packed.tree]  # within the response
    part = torch.where(offset < header, 0, 1)
    # Once in a response, because users' text has no special tokens.
    stop = (tokens == tokenizer.token_to_id("<end_of_turn>")) & (branch > 0)
    sequence = packed.tree * 3 + branch
    for back in range(3):  # <end_of_turn>, a line break, <eos>: as far as truncation left them
        part[stop.roll(back) & (sequence == sequence.roll(back))] = 2
    response = KINDS.index("chosen header") + len(PARTS) * (branch - 1) + part
    kind = torch.where(branch == 0, KINDS.index("prompt"), response)
    return torch.where(packed.position == 0, KINDS.index("first"), kind)
