"""SimPO on log-probabilities, and the log-probabilities themselves without the full logits tensor.

ℓ(y) = (1/|y|) Σ_t log π(y_t | p, y_<t)                      mean over the response's tokens
L    = -log σ( β (ℓ(w) - ℓ(l) - ρ) ),  ρ = γ/β               SimPO, arXiv 2405.14734
total = mean over pairs of L + α · mean over positions of ‖v‖₁            FSRL, arXiv 2509.12934
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits alive at once. On a GPU 256 MB in float32, 262 tokens at a vocabulary of 256,000; on a CPU what stays in cache.
CHUNK_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 22}


def token_logps(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """Exact log-probability of each target token.

    hidden [N, d] (after the final norm), weight [V, d] (the tied head), target int64 [N] -> float32 [N].
    Logits are float32 before the log-softmax whatever the inputs' dtype: bfloat16 logits misjudge a mean
    log-probability by up to 0.07, which β = 10 turns into a loss error of 0.2.
    """
    return _TokenLogps.apply(hidden, weight, target, softcap)


class TokenScores(NamedTuple):
    logp: Tensor  # float32 [N], as token_logps
    greedy: (
        Tensor  # bool [N], no other token is likelier: greedy decoding would have taken this one
    )


@torch.no_grad()
def token_scores(
    hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None
) -> TokenScores:
    """token_logps for evaluation, which also says whether each target is the likeliest token at its place."""
    logps = torch.empty(len(hidden), dtype=_precise(hidden.dtype), device=hidden.device)
    greedy = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    with _products(weight) as weight:
        spare = _spare(hidden, weight)
        for rows in _chunks(hidden, weight):
            logps[rows], greedy[rows], _ = _chunk(
                hidden[rows], weight, target[rows], softcap, spare, want_greedy=True
            )
    return TokenScores(logps, greedy)


class _TokenLogps(torch.autograd.Function):
    """z = c tanh(h Wᵀ / c),  log softmax(z)[y] = z_y - log Σ exp z, a chunk of tokens at a time.

        d/dh = (1 - tanh²_y) W_y - Σ_j softmax(z)_j (1 - tanh²_j) W_j

    A token's log-probability depends on its own hidden state alone, so its gradient with respect to h is found
    in the forward pass, while the chunk's logits are at hand, and only scaled in the backward. A head that
    trains (full fine-tuning) needs the incoming gradient inside its own, so there the logits are made again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, softcap):
        ctx.softcap, ctx.trains_head = softcap, ctx.needs_input_grad[1]
        if ctx.trains_head:
            ctx.save_for_backward(hidden, weight, target)
        keep_gradient = ctx.needs_input_grad[0] and not ctx.trains_head
        gradient = torch.empty_like(hidden) if keep_gradient else None
        logps = torch.empty(len(hidden), dtype=_precise(hidden.dtype), device=hidden.device)
        with _products(weight) as weight:
            spare, wanted = _spare(hidden, weight), weight.dtype if keep_gradient else None
            for rows in _chunks(hidden, weight):
                logps[rows], _, dlogits = _chunk(
                    hidden[rows], weight, target[rows], softcap, spare, wanted
                )
                if keep_gradient:
                    gradient[rows] = _matmul(dlogits, weight)
        if keep_gradient:
            ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if not ctx.trains_head:
            (gradient,) = ctx.saved_tensors
            return (gradient * grad[:, None]).to(gradient.dtype), None, None, None
        hidden, weight, target = ctx.saved_tensors
        # Chunks add up in float32; autograd rounds the sum to the weight's dtype, once.
        grad_hidden, grad_weight = (
            torch.empty_like(hidden),
            torch.zeros_like(weight, dtype=_precise(weight.dtype)),
        )
        with _products(weight) as weight:
            spare, wanted = _spare(hidden, weight), _precise(weight.dtype)
            for rows in _chunks(hidden, weight):
                *_, dlogits = _chunk(hidden[rows], weight, target[rows], ctx.softcap, spare, wanted)
                dlogits.mul_(grad[rows, None])
                grad_hidden[rows] = _matmul(dlogits, weight)
                grad_weight += _matmul(dlogits.T, hidden[rows].to(weight.dtype))
        return grad_hidden, grad_weight, None, None


def _chunk(hidden, weight, target, softcap, spare, gradient_dtype=None, want_greedy=False) -> tuple:
    """_softmax of a chunk's logits, on a CPU within the buffers of _spare."""
    if weight.is_cuda:
        products = _matmul(hidden, weight.T)
        return _compiled_softmax()(products, target, softcap, gradient_dtype, want_greedy)
    z, products = (buffer[: len(hidden)] for buffer in spare)
    _matmul(hidden, weight.T, out=products)
    return _softmax(products, target, softcap, gradient_dtype, want_greedy, (products, z))


def _softmax(products, target, softcap, gradient_dtype, want_greedy, out=(None, None)):
    """Products h Wᵀ [n, V] -> log-probabilities of the targets [n]; if wanted, whether each target's logit is the
    largest, bool [n]; and, given a dtype for it, the log-probabilities' gradient with respect to the products, [n, V].

    out: two buffers of the products' shape to work in, the first of which may be the products'.
    """
    one, two = out
    if softcap:
        tanh = torch.mul(products, 1 / softcap, out=one).tanh_()
        z, shift = torch.mul(tanh, softcap, out=two), 0.0
    else:  # a capped logit is at most c = 30: only without a cap must its exponential have the maximum taken off first
        z, shift = products, products.amax(1, keepdim=True)
    z_target = z.gather(1, target[:, None])
    greedy = z_target.squeeze(1) == z.amax(1) if want_greedy else None
    e = z.exp_() if softcap else torch.sub(z, shift, out=one).exp_()
    total = e.sum(1, keepdim=True)
    logps = (z_target - shift - total.log()).squeeze(1)
    if gradient_dtype is None:
        return logps, greedy, None
    gradient, at_target = (
        e.div_(-total),
        -torch.expm1(logps)[:, None],
    )  # -softmax; at the target 1 - softmax
    if softcap:
        gradient.addcmul_(gradient, tanh.square_(), value=-1)  # times 1 - tanh²
        at_target.mul_(1 - (z_target / softcap).square_())
    return (
        logps,
        greedy,
        gradient.to(gradient_dtype).scatter_(1, target[:, None], at_target.to(gradient_dtype)),
    )


@functools.cache
def _compiled_softmax() -> Callable:
    """_softmax on a GPU in a few kernels: each of its operations alone would read and write all logits."""
    return torch.compile(_softmax)


def _spare(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Two buffers of a chunk's size, on a CPU: fresh memory for every chunk would cost a page fault for every 4 KB."""
    if weight.is_cuda:
        return ()
    rows = max((s.stop - s.start for s in _chunks(hidden, weight)), default=0)
    return tuple(torch.empty(rows, len(weight), dtype=_precise(weight.dtype)) for _ in range(2))


@contextmanager
def _products(weight: Tensor) -> Iterator[Tensor]:
    """The head as its products take it. A GPU multiplies bfloat16 matrices into float32. A CPU does not, but its
    library can be told to round float32 factors to bfloat16 on the way in: exact for a head that is bfloat16, and fast.
    """
    if weight.is_cuda or weight.dtype != torch.bfloat16:
        yield weight.to(weight.dtype if weight.is_cuda else _precise(weight.dtype))
        return
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield weight.float()
    finally:
        settings.fp32_precision = before


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)  # float64 stays float64, for tests


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS[hidden.device.type] // len(weight))
    return [slice(i, min(i + step, len(hidden))) for i in range(0, len(hidden), step)]


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32 at least: a takes b's dtype for the product, but its result is not rounded to it."""
    with torch.autocast(a.device.type, enabled=False):
        if b.dtype == torch.bfloat16:  # on CUDA; this product takes no `out`
            return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
        return torch.mm(a.to(b.dtype), b, out=out)


def mean_logps(logps: Tensor, sequence: Tensor, lengths: Tensor) -> Tensor:
    """Token log-probabilities [N] -> their mean over each response, float64 [C]: the ℓ of the equations above.

    float64 because a float32 sum over a response near -160 steps by 1.5e-5, which β then multiplies.
    """
    total = torch.zeros(len(lengths), dtype=torch.float64, device=logps.device)
    return total.index_add(0, sequence, logps.double()) / lengths


def simpo_loss(
    logp_chosen: Tensor, logp_rejected: Tensor, beta: float, gamma_ratio: float
) -> Tensor:
    """-log σ(β (ℓ_w - ℓ_l - γ/β)): [P], [P] -> [P]. The logsigmoid does not overflow for any margin."""
    return -F.logsigmoid(beta * (logp_chosen - logp_rejected - gamma_ratio))


class Sparsity(NamedTuple):
    """Norms of the steering at each position."""

    l1: Tensor  # [T], ‖v‖₁
    l0: Tensor  # [T], how many v ≠ 0


def sparsity(v: Tensor) -> Sparsity:
    """v [T, F], not negative (a ReLU's output, so that ‖v‖₁ is its sum) -> norms [T] in float32 at least.

    Means over the unshared sequences weight each position by Packed.copies.
    """
    dtype = _precise(v.dtype)
    return Sparsity(v.sum(-1, dtype=dtype), v.detach().count_nonzero(-1).to(dtype))
