"""Log-probabilities of tokens without all logits [N, V] in memory.

    z = c tanh(h Wᵀ / c),   log p(y) = z_y - log Σ_j exp z_j          h [N, d], W [V, d], y [N]

They are exact and computed for a chunk of tokens at a time, with a backward of their own. Logits
are float32 whatever the inputs' dtype: with bfloat16 logits a mean log-probability is wrong by up
to 0.07, and a SimPO loss with β = 10 by up to 0.2.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import compiled
from kernels.pointwise import at_least_float32, linear

# How many logits are in memory together. On a GPU they take 256 MB in float32, which is 262 tokens
# with a vocabulary of 256,000. On a CPU they fit the cache, but a chunk has at least CHUNK_ROWS
# tokens, because it reads the whole head: chunks of 16 tokens take 1.6 times as long as of 64.
CHUNK_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 22}
CHUNK_ROWS = 64
# On a CPU a bfloat16 head of more than WHOLE_ELEMENTS is cast to float32 PIECE_ELEMENTS at a time,
# because a float32 copy of Gemma-2-2B's head would take 2.4 GB. Chunks then have PIECED_CHUNK
# logits, so that more tokens share each cast.
WHOLE_ELEMENTS, PIECE_ELEMENTS, PIECED_CHUNK = 1 << 28, 1 << 26, 1 << 26
EXACT = 256  # how many of the largest logits all_logits computes without rounding to bfloat16


def token_logps(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """Log-probability of each target token.

    hidden [N, d] (after the final norm), weight [V, d] (the tied head), target int64 [N] -> float32
    [N].
    """
    return _TokenLogps.apply(hidden, weight, target, softcap)


class TokenScores(NamedTuple):
    logp: Tensor  # float32 [N], as token_logps
    greedy: Tensor | None  # bool [N], whether greedy decoding would choose the target, if wanted
    gradient: Tensor | None = None  # [N, V], of logp with respect to the products h Wᵀ, if wanted


@torch.no_grad()
def token_scores(
    hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None
) -> TokenScores:
    """token_logps without gradients, and whether each target is the likeliest token."""
    logps = torch.empty(len(hidden), dtype=at_least_float32(hidden.dtype), device=hidden.device)
    greedy = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    for rows, _, chunk in _walk(hidden, weight, target, softcap, want_greedy=True):
        logps[rows], greedy[rows] = chunk.logp, chunk.greedy
    return TokenScores(logps, greedy)


def all_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """h Wᵀ without a softcap: hidden [N, d], weight [V, d] -> float32 [N, V]."""
    with torch.autocast(hidden.device.type, enabled=False):  # it would round all of this
        if weight.dtype != torch.bfloat16:
            dtype = at_least_float32(weight.dtype)
            return linear(hidden.to(dtype), weight.to(dtype))
        if weight.is_cuda:
            return torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
        # On a CPU torch has no bfloat16 product with a float32 result, and casting a head of
        # 256,000 rows to float32 takes 15 times as long as a product that is rounded to bfloat16.
        # So the product is rounded, and the largest logits are computed again in float32.
        logits = F.linear(hidden.to(weight.dtype), weight).float()  # rounded by up to 2^-8 of each
        top = logits.topk(min(EXACT, len(weight))).indices  # [N, k]
        exact = torch.bmm(weight[top].float(), hidden.float()[:, :, None]).squeeze(2)  # [N, k]
        return logits.scatter_(1, top, exact)


def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Slices of hidden [N, d] whose logits [n, V] are in memory together."""
    elements = PIECED_CHUNK if _in_pieces(weight) else CHUNK_ELEMENTS[hidden.device.type]
    step = max(CHUNK_ROWS, elements // len(weight))
    return [slice(i, min(i + step, len(hidden))) for i in range(0, len(hidden), step)]


class _TokenLogps(torch.autograd.Function):
    """d log p(y) / dh = (1 - tanh²_y) W_y - Σ_j softmax(z)_j (1 - tanh²_j) W_j

    A token's log-probability depends on one hidden state alone. The gradient with respect to h is
    therefore computed in the forward, from the logits of the chunk, and only scaled in the
    backward. The gradient of a head that trains (--full) sums over tokens, each scaled by its own
    incoming gradient, so that the backward has to compute the logits again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, softcap):
        ctx.softcap, ctx.trains_head = softcap, ctx.needs_input_grad[1]
        if ctx.trains_head:
            ctx.save_for_backward(hidden, weight, target)
        keep_gradient = ctx.needs_input_grad[0] and not ctx.trains_head
        gradient = torch.empty_like(hidden) if keep_gradient else None
        logps = torch.empty(len(hidden), dtype=at_least_float32(hidden.dtype), device=hidden.device)
        dtype = _product_dtype(weight) if keep_gradient else None
        for rows, head, chunk in _walk(hidden, weight, target, softcap, dtype):
            logps[rows] = chunk.logp
            if keep_gradient:
                gradient[rows] = head.back(chunk.gradient)
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
        # Chunks are added up in float32; autograd rounds only the sum to the weight's dtype.
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide)
        for rows, head, chunk in _walk(hidden, weight, target, ctx.softcap, wide):
            dlogits = chunk.gradient.mul_(grad[rows, None])
            grad_hidden[rows] = head.back(dlogits)
            grad_weight += head.matmul(dlogits.T, hidden[rows].to(head.dtype))
        return grad_hidden, grad_weight, None, None


def _walk(
    hidden, weight, target, softcap, gradient_dtype=None, want_greedy=False
) -> Iterator[tuple[slice, "_Head", TokenScores]]:
    """Yield (rows, the head, the scores of these rows of hidden), chunk by chunk."""
    slices, head = chunks(hidden, weight), _Head.of(weight)
    options = softcap, gradient_dtype, want_greedy
    if weight.is_cuda:
        # torch.compile fuses it into few kernels; run one by one, its operations would each read
        # and write all logits.
        log_softmax = compiled(_log_softmax)
        for rows in slices:
            yield rows, head, log_softmax(head.products(hidden[rows]), target[rows], *options)
        return
    # All chunks share two buffers, because new memory for each chunk costs many page faults.
    shape = max((rows.stop - rows.start for rows in slices), default=0), len(weight)
    buffers = [torch.empty(shape, dtype=at_least_float32(weight.dtype)) for _ in range(2)]
    for rows in slices:
        z, products = (buffer[: rows.stop - rows.start] for buffer in buffers)
        head.products(hidden[rows], out=products)
        yield rows, head, _log_softmax(products, target[rows], *options, (products, z))


def _log_softmax(
    products, target, softcap, gradient_dtype, want_greedy, out=(None, None)
) -> TokenScores:
    """Products h Wᵀ [n, V] -> their scores. gradient_dtype: None where no gradient is wanted.

    out: two buffers [n, V] for intermediate results; the first may be the products themselves.
    """
    one, two = out
    if softcap:
        tanh = torch.mul(products, 1 / softcap, out=one).tanh_()
        z, shift = torch.mul(tanh, softcap, out=two), 0.0
    else:  # without a cap, subtract the maximum so that exp does not overflow
        z, shift = products, products.amax(1, keepdim=True)
    z_target = z.gather(1, target[:, None])
    greedy = z_target.squeeze(1) == z.amax(1) if want_greedy else None

    e = z.exp_() if softcap else torch.sub(z, shift, out=one).exp_()
    total = e.sum(1, keepdim=True)
    logps = (z_target - shift - total.log()).squeeze(1)
    if gradient_dtype is None:
        return TokenScores(logps, greedy)

    gradient = e.div_(-total)  # -softmax; at the target 1 - softmax
    at_target = -torch.expm1(logps)[:, None]
    if softcap:
        gradient.addcmul_(gradient, tanh.square_(), value=-1)  # times 1 - tanh²
        at_target.mul_(1 - (z_target / softcap).square_())
    gradient = gradient.to(gradient_dtype)
    gradient.scatter_(1, target[:, None], at_target.to(gradient_dtype))
    return TokenScores(logps, greedy, gradient)


def _in_pieces(weight: Tensor) -> bool:
    large = weight.numel() > WHOLE_ELEMENTS
    return large and weight.dtype == torch.bfloat16 and not weight.is_cuda


def _product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the factors of h Wᵀ, whose result is float32. On a GPU torch can multiply
    bfloat16 matrices into float32; on a CPU it cannot.
    """
    return weight.dtype if weight.is_cuda else at_least_float32(weight.dtype)


class _Head(NamedTuple):
    """The head [V, d] in the dtype of its products, as a whole or some rows at a time."""

    weight: Tensor
    dtype: torch.dtype
    rounds: bool  # whether products round float32 factors to bfloat16 while reading them
    buffer: Tensor | None  # [rows, d] to cast pieces into; None: the weight has the dtype already

    @classmethod
    def of(cls, weight: Tensor) -> "_Head":
        """On a CPU a bfloat16 head is cast to float32, but its products round their factors to
        bfloat16 again. This changes no weight, and is as fast as a product of bfloat16 matrices.
        """
        dtype, rounds = _product_dtype(weight), weight.dtype == torch.bfloat16 and weight.is_cpu
        if _in_pieces(weight):
            rows = max(1, PIECE_ELEMENTS // weight.shape[1])
            return cls(weight, dtype, rounds, torch.empty(rows, weight.shape[1]))
        return cls(weight.to(dtype), dtype, rounds, None)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of rows, these rows of the head in its dtype) for the whole head."""
        step = len(self.weight) if self.buffer is None else len(self.buffer)
        for first in range(0, len(self.weight), step):
            rows = slice(first, first + step)
            piece = self.weight[rows]
            yield rows, piece if self.buffer is None else self.buffer[: len(piece)].copy_(piece)

    def products(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [n, d] -> h Wᵀ [n, V]. out: given on a CPU."""
        if out is None:
            return self.matmul(hidden, self.weight.T)
        for rows, piece in self.pieces():
            self.matmul(hidden, piece.T, out[:, rows])
        return out

    def back(self, gradient: Tensor) -> Tensor:
        """Gradient of the products [n, V] -> gradient of the hidden states [n, d]."""
        return sum(self.matmul(gradient[:, rows], piece) for rows, piece in self.pieces())

    def matmul(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a @ b in at least float32. a is first cast to the dtype of b, which is the head's."""
        with torch.autocast(a.device.type, enabled=False):
            if b.dtype == torch.bfloat16:  # on CUDA; this product takes no `out`
                return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
            settings = torch.backends.mkldnn.matmul
            before = settings.fp32_precision
            try:
                settings.fp32_precision = "bf16" if self.rounds else before
                return torch.mm(a.to(b.dtype), b, out=out)
            finally:
                settings.fp32_precision = before
