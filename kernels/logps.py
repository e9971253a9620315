"""Log-probabilities of tokens without the full logits tensor.

    z = c tanh(h Wᵀ / c),   log p(y) = z_y - log Σ_j exp z_j          h [N, d], W [V, d], y [N]

A chunk of tokens at a time, exact, with a backward of its own. Logits are float32 before the
log-softmax whatever the inputs' dtype: bfloat16 logits misjudge a mean log-probability by up to
0.07, which SimPO's β = 10 turns into a loss error of 0.2.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.pointwise import at_least_float32, linear

# Logits alive at once. On a GPU 256 MB in float32, 262 tokens at a vocabulary of 256,000; on a CPU
# what stays in cache.
CHUNK_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 22}
CHUNK_ROWS = 64  # but at least so many tokens: each chunk reads the whole head
EXACT = 256  # likeliest tokens whose logits no rounding to bfloat16 may put out of order


def token_logps(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """Log-probability of each target token.

    hidden [N, d] (after the final norm), weight [V, d] (the tied head), target int64 [N] -> float32
    [N].
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
    """token_logps for evaluation, which also says whether each target is the likeliest token at its
    place.
    """
    logps = torch.empty(len(hidden), dtype=at_least_float32(hidden.dtype), device=hidden.device)
    greedy = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    with _head_for_products(weight) as weight:
        buffers = _buffers(hidden, weight)
        for rows in chunks(hidden, weight):
            chunk = _chunk(hidden[rows], weight, target[rows], softcap, buffers, want_greedy=True)
            logps[rows], greedy[rows] = chunk.logp, chunk.greedy
    return TokenScores(logps, greedy)


def all_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """h Wᵀ without a softcap: hidden [N, d], weight [V, d] -> float32 [N, V]."""
    if weight.dtype != torch.bfloat16:
        dtype = at_least_float32(weight.dtype)
        return linear(hidden.to(dtype), weight.to(dtype))
    if weight.is_cuda:
        return torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    # A CPU has no such product. One that rounds its results to bfloat16 takes a fifteenth of the
    # time of casting a head of 256,000 rows; those of the largest logits are then computed again.
    logits = F.linear(hidden.to(weight.dtype), weight).float()  # off by 2^-8 of a logit at most
    top = logits.topk(min(EXACT, len(weight))).indices  # [N, k]
    exact = torch.bmm(weight[top].float(), hidden.float()[:, :, None]).squeeze(2)  # [N, k]
    return logits.scatter_(1, top, exact)


def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Rows of hidden [N, d] whose logits [n, V] are alive together."""
    step = max(CHUNK_ROWS, CHUNK_ELEMENTS[hidden.device.type] // len(weight))
    return [slice(i, min(i + step, len(hidden))) for i in range(0, len(hidden), step)]


class _TokenLogps(torch.autograd.Function):
    """d log p(y) / dh = (1 - tanh²_y) W_y - Σ_j softmax(z)_j (1 - tanh²_j) W_j

    A token's log-probability depends on its own hidden state alone. Its gradient with respect to h
    is therefore found in the forward pass, while the chunk's logits are at hand, and only scaled in
    the backward. A head that trains (full fine-tuning) needs the incoming gradient inside its own,
    so there the backward computes the logits again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, softcap):
        ctx.softcap, ctx.trains_head = softcap, ctx.needs_input_grad[1]
        if ctx.trains_head:
            ctx.save_for_backward(hidden, weight, target)
        keep_gradient = ctx.needs_input_grad[0] and not ctx.trains_head
        gradient = torch.empty_like(hidden) if keep_gradient else None
        logps = torch.empty(len(hidden), dtype=at_least_float32(hidden.dtype), device=hidden.device)
        with _head_for_products(weight) as weight:
            buffers = _buffers(hidden, weight)
            gradient_dtype = weight.dtype if keep_gradient else None
            for rows in chunks(hidden, weight):
                chunk = _chunk(hidden[rows], weight, target[rows], softcap, buffers, gradient_dtype)
                logps[rows] = chunk.logp
                if keep_gradient:
                    gradient[rows] = _matmul(chunk.gradient, weight)
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
        wide = at_least_float32(weight.dtype)
        # Chunks add up in float32; autograd rounds the sum to the weight's dtype, once.
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide)
        with _head_for_products(weight) as weight:
            buffers = _buffers(hidden, weight)
            for rows in chunks(hidden, weight):
                chunk = _chunk(hidden[rows], weight, target[rows], ctx.softcap, buffers, wide)
                dlogits = chunk.gradient.mul_(grad[rows, None])
                grad_hidden[rows] = _matmul(dlogits, weight)
                grad_weight += _matmul(dlogits.T, hidden[rows].to(weight.dtype))
        return grad_hidden, grad_weight, None, None


class _Chunk(NamedTuple):
    logp: Tensor  # [n]
    greedy: Tensor | None  # bool [n], if wanted
    gradient: Tensor | None  # [n, V], of logp with respect to the products h Wᵀ, if wanted


def _chunk(
    hidden, weight, target, softcap, buffers, gradient_dtype=None, want_greedy=False
) -> _Chunk:
    """_log_softmax of a chunk's logits; on a CPU within the two buffers."""
    if weight.is_cuda:
        products = _matmul(hidden, weight.T)
        return _compiled_log_softmax()(products, target, softcap, gradient_dtype, want_greedy)
    z, products = (buffer[: len(hidden)] for buffer in buffers)
    _matmul(hidden, weight.T, out=products)
    return _log_softmax(products, target, softcap, gradient_dtype, want_greedy, (products, z))


def _log_softmax(
    products, target, softcap, gradient_dtype, want_greedy, out=(None, None)
) -> _Chunk:
    """Products h Wᵀ [n, V] -> the chunk's results. gradient_dtype: None where no gradient is
    wanted.

    out: two buffers of the products' shape to work in, the first of which may be the products'.
    """
    one, two = out
    if softcap:
        tanh = torch.mul(products, 1 / softcap, out=one).tanh_()
        z, shift = torch.mul(tanh, softcap, out=two), 0.0
    else:  # without a cap the exponentials need the maximum taken off first
        z, shift = products, products.amax(1, keepdim=True)
    z_target = z.gather(1, target[:, None])
    greedy = z_target.squeeze(1) == z.amax(1) if want_greedy else None

    e = z.exp_() if softcap else torch.sub(z, shift, out=one).exp_()
    total = e.sum(1, keepdim=True)
    logps = (z_target - shift - total.log()).squeeze(1)
    if gradient_dtype is None:
        return _Chunk(logps, greedy, None)

    gradient = e.div_(-total)  # -softmax; at the target 1 - softmax
    at_target = -torch.expm1(logps)[:, None]
    if softcap:
        gradient.addcmul_(gradient, tanh.square_(), value=-1)  # times 1 - tanh²
        at_target.mul_(1 - (z_target / softcap).square_())
    gradient = gradient.to(gradient_dtype)
    return _Chunk(
        logps, greedy, gradient.scatter_(1, target[:, None], at_target.to(gradient_dtype))
    )


@functools.cache
def _compiled_log_softmax() -> Callable:
    """_log_softmax on a GPU in a few kernels: each of its operations alone would read and write all
    logits.
    """
    return torch.compile(_log_softmax)


def _buffers(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Two buffers of a chunk's size on a CPU, where fresh memory for every chunk costs a page fault
    every 4 KB.
    """
    if weight.is_cuda:
        return ()
    rows = max((s.stop - s.start for s in chunks(hidden, weight)), default=0)
    shape = rows, len(weight)
    return tuple(torch.empty(shape, dtype=at_least_float32(weight.dtype)) for _ in range(2))


@contextmanager
def _head_for_products(weight: Tensor) -> Iterator[Tensor]:
    """Yield the head in the dtype that its matmul needs.

    A GPU multiplies bfloat16 matrices into float32. A CPU does not, but its library can be told to
    round float32 factors to bfloat16 as it reads them: exact for a head that is bfloat16, and fast.
    """
    if weight.is_cuda or weight.dtype != torch.bfloat16:
        yield weight.to(weight.dtype if weight.is_cuda else at_least_float32(weight.dtype))
        return
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield weight.float()
    finally:
        settings.fp32_precision = before


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32 at least: a takes b's dtype for the product, but its result is not rounded
    to it.
    """
    with torch.autocast(a.device.type, enabled=False):
        if b.dtype == torch.bfloat16:  # on CUDA; this product takes no `out`
            return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
        return torch.mm(a.to(b.dtype), b, out=out)
