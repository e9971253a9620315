"""Operations on single positions: norm, gated activation, linear layer, softcap, JumpReLU."""

import torch
import torch.nn.functional as F
from torch import Tensor

# A forward over fewer rows is a step of generation; its time goes into reading the weights.
FEW = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · (1 + weight): x [T, d], weight [d] -> y [T, d].

    y is float32, or float64 for a float64 x.
    """
    if len(x) < FEW and not torch.is_grad_enabled():  # one operation instead of ten
        dtype = at_least_float32(x.dtype)
        return F.rms_norm(x.to(dtype), weight.shape, 1 + weight.to(dtype), eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """rms_norm with a third of the memory traffic of the same under autograd.

    r = (mean x² + eps)^(-1/2),  y = r x (1 + w)
    g = dy (1 + w),  dx = r g - x r³ (g · x) / d
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        dtype = at_least_float32(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        r = torch.rsqrt(norm.square_() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, r)
        return torch.mul(x, r).mul_(1 + weight.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * x * r).flatten(0, -2).sum(0).to(weight.dtype)

        g = grad * (1 + weight.to(grad.dtype))
        x_wide = x.to(g.dtype)
        # A product and a sum instead of a dot product, which autocast would round to bfloat16.
        along = (g * x_wide).sum(-1, keepdim=True) * r.pow(3) / x.shape[-1]
        grad_x = g.mul_(r).addcmul_(x_wide, along, value=-1)
        return grad_x.to(x.dtype), grad_weight, None


def geglu(a: Tensor, b: Tensor) -> Tensor:
    """gelu(a) b with the tanh approximation of GELU: [T, ffn], [T, ffn] -> [T, ffn]."""
    return _GeGLU.apply(a, b)


class _GeGLU(torch.autograd.Function):
    """geglu that stores only a and b, the widest tensors of a block; gelu(a) is computed again.

    da = gelu'(a) b dy,   db = gelu(a) dy
    """

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.gelu(a, approximate="tanh").mul_(b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad_a = torch.ops.aten.gelu_backward(grad * b, a, approximate="tanh")
        grad_b = F.gelu(a, approximate="tanh").mul_(grad)
        return grad_a, grad_b


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weightᵀ: x [T, in], weight [out, in] -> [T, out].

    On a CPU, MKL multiplies few rows slowly. A batch of small products with 64 outputs each is up
    to 2.5 times as fast.
    """
    if len(x) >= FEW or weight.dtype != torch.float32 or weight.is_cuda or len(weight) % 64:
        return F.linear(x, weight)
    blocks = weight.view(-1, 64, weight.shape[1]).mT  # [out / 64, in, 64]
    products = torch.bmm(x.expand(len(blocks), *x.shape), blocks)  # [out / 64, T, 64]
    return products.transpose(0, 1).reshape(len(x), -1)


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """c tanh(z / c), or z where there is no cap."""
    return cap * torch.tanh(logits / cap) if cap else logits


def jumprelu(z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """v = z 1[z > θ] and ‖v‖₀: z [T, F], threshold [F], not negative -> v [T, F], ‖v‖₀ [T].

    θ gets the straight-through estimator of arXiv 2407.14435 (equations 11 and 12) with bandwidth
    ε. z must be the pre-activation and not its ReLU: v would be the same, but the window around a
    θ < ε/2 would count all negative z, at 0.
    """
    return _JumpReLU.apply(z, threshold, bandwidth)


class _JumpReLU(torch.autograd.Function):
    """∂v/∂z = 1[z > θ],   ∂v/∂θ = -(θ/ε) K((z - θ)/ε),   ∂‖v‖₀/∂θ = -(1/ε) Σ K((z - θ)/ε)

    with K(u) = 1[|u| < 1/2]. This estimates the derivative of a mean over many z: the density of z
    at θ is counted in a window of width ε. As in the paper cited, ‖v‖₀ has no gradient to z.
    """

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        on = z > threshold  # a bfloat16 z is compared in float32
        v = z.relu().mul_(on)  # the ReLU changes no value; without it, v would hold -0
        return v, on.sum(-1, dtype=threshold.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_v, grad_l0):
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = ((threshold * grad_v + grad_l0[:, None]) * near).sum(0) / -ctx.bandwidth
        return grad_v * (z > threshold), grad_threshold, None


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for narrower types; float64, which tests use, stays float64."""
    return torch.promote_types(dtype, torch.float32)
