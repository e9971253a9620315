"""SimPO on log-probabilities, and the log-probabilities themselves without the full logits tensor.

    ℓ(y) = (1/|y|) Σ_t log π(y_t | p, y_<t)                      mean over the response's tokens
    L    = -log σ( β (ℓ(w) - ℓ(l) - ρ) ),  ρ = γ/β               SimPO, arXiv 2405.14734
    total = mean over pairs of L + α · mean over positions of ‖v‖₁            (METHOD section 3)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 26  # logits alive at once: 256 MB in float32, 262 tokens at a vocabulary of 256,000


def token_logps(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """Exact log-probability of each target token.

    hidden [N, d] (after the final norm), weight [V, d] (the tied head), target int64 [N] -> float32 [N].
    Logits are float32 before the log-softmax whatever the inputs' dtype: bfloat16 logits misjudge a mean
    log-probability by up to 0.07, which β = 10 turns into a loss error of 0.2.
    """
    return _TokenLogps.apply(hidden, weight, target, softcap)


class _TokenLogps(torch.autograd.Function):
    """log softmax(c tanh(h Wᵀ / c))[target], a chunk of tokens at a time.

    A token's log-probability depends on its own hidden state alone, so its gradient with respect to h is found
    in the forward pass, while the chunk's logits are at hand, and only scaled in the backward. A head that
    trains (full fine-tuning) needs the incoming gradient inside its own, so there the logits are made again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, softcap):
        ctx.softcap, ctx.trains_head = softcap, ctx.needs_input_grad[1]
        keep_gradient = ctx.needs_input_grad[0] and not ctx.trains_head
        gradient = torch.empty_like(hidden) if keep_gradient else None
        logps = torch.empty(len(hidden), dtype=_precise(hidden.dtype), device=hidden.device)
        for rows in _chunks(hidden, weight):
            logits, slope = _logits(hidden[rows], weight, softcap, keep_gradient)
            logps[rows], dlogits = _logps(logits, target[rows], keep_gradient)
            if keep_gradient:
                gradient[rows] = _matmul(_times_slope(dlogits, slope).to(weight.dtype), weight)
        if ctx.trains_head:
            ctx.save_for_backward(hidden, weight, target)
        elif keep_gradient:
            ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if not ctx.trains_head:
            (gradient,) = ctx.saved_tensors
            return (gradient * grad[:, None]).to(gradient.dtype), None, None, None
        hidden, weight, target = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in _chunks(hidden, weight):
            logits, slope = _logits(hidden[rows], weight, ctx.softcap, True)
            _, dlogits = _logps(logits, target[rows], True)
            dlogits = _times_slope(dlogits, slope).mul_(grad[rows, None]).to(weight.dtype)
            grad_hidden[rows] = _matmul(dlogits, weight)
            grad_weight += _matmul(dlogits.T, hidden[rows].to(weight.dtype))
        return grad_hidden, grad_weight, None, None


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)  # float64 stays float64, for tests


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [slice(i, i + step) for i in range(0, len(hidden), step)]


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in float32 at least; bfloat16 inputs are not rounded on the way out."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == b.dtype == torch.bfloat16 and a.is_cuda:
            return torch.mm(a, b, out_dtype=torch.float32)
        dtype = _precise(torch.promote_types(a.dtype, b.dtype))
        return a.to(dtype) @ b.to(dtype)


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None, want_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Softcapped logits [n, V] and the softcap's derivative there, 1 - tanh²."""
    logits = _matmul(hidden.to(weight.dtype), weight.T)
    if not softcap:
        return logits, None
    t = logits.div_(softcap).tanh_()
    slope = 1 - t.square() if want_slope else None
    return t.mul_(softcap), slope


def _logps(logits: Tensor, target: Tensor, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [n] and, written over the logits, their gradient onehot - softmax [n, V]."""
    logsumexp = logits.logsumexp(dim=-1, keepdim=True)
    logps = (logits.gather(1, target[:, None]) - logsumexp).squeeze(1)
    if not want_gradient:
        return logps, None
    minus_p = logits.sub_(logsumexp).exp_().neg_()
    return logps, minus_p.scatter_add_(1, target[:, None], torch.ones_like(minus_p[:, :1]))


def _times_slope(dlogits: Tensor, slope: Tensor | None) -> Tensor:
    return dlogits if slope is None else dlogits.mul_(slope)


def mean_logps(logps: Tensor, sequence: Tensor, lengths: Tensor) -> Tensor:
    """Token log-probabilities [N] -> their mean over each response, float64 [C]: the ℓ of the equations above.

    float64 because a float32 sum over a response near -160 steps by 1.5e-5, which β then multiplies.
    """
    total = torch.zeros(len(lengths), dtype=torch.float64, device=logps.device)
    return total.index_add(0, sequence, logps.double()) / lengths


def simpo_loss(logp_chosen: Tensor, logp_rejected: Tensor, beta: float, gamma_ratio: float) -> Tensor:
    """-log σ(β (ℓ_w - ℓ_l - γ/β)): [P], [P] -> [P]. The logsigmoid does not overflow for any margin."""
    return -F.logsigmoid(beta * (logp_chosen - logp_rejected - gamma_ratio))


class Sparsity(NamedTuple):
    l1: Tensor  # Σ over positions of ‖v‖₁, each position weighted by its copies; divide by their total
    l0: Tensor  # the same for the number of v ≠ 0


def sparsity(v: Tensor, copies: Tensor) -> Sparsity:
    """Sums over the positions of the unshared sequences: v [T, F], copies [T] as in packed.Packed."""
    l1 = torch.linalg.vector_norm(v, ord=1, dim=-1, dtype=_precise(v.dtype))
    return Sparsity(l1 @ copies.to(l1.dtype), (v != 0).sum(-1).to(l1.dtype) @ copies.to(l1.dtype))
