"""Gemma-2, written by hand: published weights in, nothing hidden.

Hidden states are [T, d], one packed stream without a batch axis (see packed.py). Module names mirror those
of the Hugging Face checkpoints, so loading is a plain, strict load_state_dict. Against other implementations
there is one deliberate difference: the residual stream is float32 whatever the weights' dtype, because a
steering vector smaller than a bfloat16 step of the stream would otherwise be rounded away.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from generation.cache import Cache
from packed import Bucket, Packed, pack
from runtime.sources import UserError, fetch, read_json

SLIDING, FULL = "sliding_attention", "full_attention"
FEW = 16  # rows: fewer are a step of generation, which waits for weights and for single operations, not for arithmetic


@dataclass(frozen=True)
class Gemma2Config:
    """Names as in config.json. layer_types: SLIDING or FULL per block; None means SLIDING on even blocks."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    sliding_window: int = 4096
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    layer_types: tuple[str, ...] | None = None
    initializer_range: float = 0.02

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, number = getattr(self, field.name), int if field.type is int else int | float
            if field.name == "layer_types" or (value is None and field.type == float | None):
                continue
            if not isinstance(value, number) or isinstance(value, bool) or not 0 < value < math.inf:
                raise UserError(
                    f"config: {field.name} is {value!r}, a positive number was expected."
                )
            if number is int and value > (1024 if field.name == "num_hidden_layers" else 1 << 24):
                raise UserError(
                    f"config: {field.name} is {value}, more than any Gemma-2 has; not loaded."
                )
        if self.head_dim % 2:
            raise UserError(
                f"config: head_dim is {self.head_dim}; rotary embedding turns pairs of components."
            )
        # Attention and loss exponentiate capped scores as they are: exp(80) times any length still fits float32.
        if any(
            cap and cap > 80 for cap in (self.attn_logit_softcapping, self.final_logit_softcapping)
        ):
            raise UserError("config: a softcap beyond 80; Gemma-2 has 50 and 30.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                "config: num_attention_heads must be a multiple of num_key_value_heads."
            )
        types = self.layer_types or [(SLIDING, FULL)[i % 2] for i in range(self.num_hidden_layers)]
        object.__setattr__(self, "layer_types", tuple(types))
        if len(types) != self.num_hidden_layers or any(t not in (SLIDING, FULL) for t in types):
            raise UserError(
                f"config: layer_types must name {self.num_hidden_layers} blocks as {SLIDING} or {FULL}."
            )

    @classmethod
    def from_json(cls, path: Path) -> "Gemma2Config":
        """Read config.json as transformers 4 or 5 writes it. Raises UserError for any other architecture."""
        try:
            raw = read_json(path)
            rope = raw.get("rope_parameters") or {}
            rope_type = rope.get("rope_type", "default")
        except (OSError, ValueError, AttributeError) as e:
            raise UserError(f"{path}: a config.json was expected ({e}).") from e
        only = {  # what this forward implements, key by key
            "model_type": {"gemma2"},
            "hidden_activation": {"gelu_pytorch_tanh", None},
            "attention_bias": {False, None},
            "tie_word_embeddings": {True, None},
            "use_bidirectional_attention": {False, None},
            "rope_scaling": {None},
        }
        for key, allowed in only.items():
            if not isinstance(raw.get(key), str | bool | None) or raw.get(key) not in allowed:
                raise UserError(
                    f"{path}: {key} is {raw.get(key)!r}; this forward knows only Gemma-2's."
                )
        if rope_type != "default":
            raise UserError(
                f"{path}: rope_type is {rope_type!r}; this forward knows only 'default'."
            )
        known = {f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw}
        if "rope_theta" in rope:
            known["rope_theta"] = rope["rope_theta"]
        try:
            return cls(**known)
        except TypeError as e:
            raise UserError(f"{path}: a required key is missing ({e}).") from e

    def to_json(self, path: Path, dtype: torch.dtype) -> None:
        """Write config.json with the keys of both transformers styles."""
        name = str(dtype).removeprefix("torch.")
        raw = dataclasses.asdict(self) | {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "dtype": name,
            "torch_dtype": name,
        }
        path.write_text(json.dumps(raw, indent=2) + "\n")


_SHARED = dict(vocab_size=256_000, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256)
PUBLISHED = {  # google/gemma-2-{2b,9b,27b}[-it]
    "gemma-2-2b": Gemma2Config(
        **_SHARED | dict(num_key_value_heads=4),
        **dict(
            hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8
        ),
    ),
    "gemma-2-9b": Gemma2Config(
        **_SHARED,
        **dict(
            hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16
        ),
    ),
    "gemma-2-27b": Gemma2Config(
        **_SHARED | dict(num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144),
        **dict(
            hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32
        ),
    ),
}


class Plan(NamedTuple):
    """What every block needs to know of a packed stream; made once per forward by Gemma2.plan."""

    cos: Tensor  # float32 [T, 1, head_dim / 2]
    sin: Tensor  # float32 [T, 1, head_dim / 2]
    packed: Packed
    masks: dict[str, BlockMask]  # by layer type; empty where the plain attention is used
    cache: Cache | None = (
        None  # in generation: keys and values are kept, and a step attends to them
    )


class RMSNorm(nn.Module):
    """y = x / rms(x) * (1 + weight), in float32; the product is cast to the weights' dtype last, as Gemma does."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < FEW and not torch.is_grad_enabled():  # one operation instead of ten
            dtype = torch.promote_types(x.dtype, torch.float32)
            y = F.rms_norm(x.to(dtype), self.weight.shape, 1 + self.weight.to(dtype), self.eps)
            return y.to(self.weight.dtype)
        return _RMSNorm.apply(x, self.weight, self.eps).to(self.weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """With its own backward: a third of the passes over memory that the composed operations make.

    r = (mean x² + eps)^(-1/2),  y = r x (1 + w);   with g = dy (1 + w):  dx = r g - x r³ (g · x) / d
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        r = torch.rsqrt(norm.square_() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, r)
        return torch.mul(x, r).mul_(1 + weight.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        grad_weight = (grad * x * r).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = grad * (1 + weight.to(grad.dtype))
        along = torch.linalg.vecdot(g, x.to(g.dtype))[..., None] * r.pow(3) / x.shape[-1]
        return g.mul_(r).addcmul_(x.to(g.dtype), along, value=-1).to(x.dtype), grad_weight, None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] @ weightᵀ [in, out] -> [T, out]. On a CPU, MKL takes a few rows through a slow kernel, and is up to 2.5
    times as fast on the same product as a batch of small ones, 64 outputs each.
    """
    if len(x) >= FEW or weight.dtype != torch.float32 or weight.is_cuda or len(weight) % 64:
        return F.linear(x, weight)
    blocks = weight.view(-1, 64, weight.shape[1]).mT
    return torch.bmm(x.expand(len(blocks), *x.shape), blocks).transpose(0, 1).reshape(len(x), -1)


class Linear(nn.Linear):
    """Without a bias."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, head_dim]; component i turns with component i + head_dim / 2."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def plain_attention(
    q, k, v, packed: Packed, window: int | None, scale: float, softcap: float | None
) -> Tensor:
    """Softcapped attention over the tree, bucket by bucket: CPU and reference.

    q [T, H, hd], k and v [T, KV, hd] -> [T, H, hd]. A query sees keys of its own prompt and continuation at
    positions up to its own and, under a window, fewer than `window` back.
    """
    return _PlainAttention.apply(q, k, v, packed.buckets, window, scale, softcap)


class _PlainAttention(torch.autograd.Function):
    """With its own backward, so that each bucket's scores stay in cache and are worked on in place.

        e = visible · exp(c tanh(s q kᵀ / c)),   n = Σ_keys e,   o = e v / n
        δ = do / n;   dv = eᵀ δ;   dS = e (δ vᵀ - Σ δ o) (1 - tanh²);   dq = s dS k;   dk = s dSᵀ q

    A capped score is at most c, so the exponentials need no maximum taken off; without a cap they do.
    """

    @staticmethod
    def forward(ctx, q, k, v, buckets, window, scale, softcap):
        ctx.buckets, ctx.scale, ctx.softcap = buckets, scale, softcap
        keep = any(ctx.needs_input_grad[:3])
        out, kept = torch.empty_like(q), [q, k, v]
        for bucket in buckets:
            qb, kb, vb = _gather(q, bucket.queries, k.shape[1]), _keys(k, bucket), _keys(v, bucket)
            t = (qb * (scale / (softcap or 1.0))) @ kb.mT  # [S, KV, G Lq, Lk]
            hidden = ~_visible(bucket, window).repeat(1, q.shape[1] // k.shape[1], 1)[
                :, None
            ]  # [S, 1, G Lq, Lk]
            if softcap:
                t.tanh_()
                e = (t * softcap if keep else t.mul_(softcap)).exp_().masked_fill_(hidden, 0)
            else:
                t.masked_fill_(hidden, -torch.inf)
                e = t.sub_(t.amax(-1, keepdim=True)).exp_()
            n = e.sum(-1, keepdim=True, dtype=torch.promote_types(e.dtype, torch.float32))
            o = (e @ vb).div_(n)
            out[bucket.queries] = _ungather(
                o, bucket.queries
            )  # padding repeats a query and its output
            if keep:
                kept += [e, n] + ([t.square_()] if softcap else [])
        if keep:
            ctx.save_for_backward(out, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        out, q, k, v, *kept = ctx.saved_tensors
        dq, dk, dv, kept = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), iter(kept)
        for bucket in ctx.buckets:
            e, n = next(kept), next(kept)
            KV = k.shape[1]
            qb, kb, vb = _gather(q, bucket.queries, KV), _keys(k, bucket), _keys(v, bucket)
            real = bucket.real.repeat(1, q.shape[1] // KV)[
                :, None, :, None
            ]  # a repeated query counts once
            delta = (_gather(grad, bucket.queries, KV) * (real / n)).to(q.dtype)
            dS = delta @ vb.mT
            dS.sub_((delta * _gather(out, bucket.queries, KV)).sum(-1, keepdim=True)).mul_(e)
            if ctx.softcap:
                dS.addcmul_(dS, next(kept), value=-1)  # times 1 - tanh²
            queries, keys = bucket.queries.flatten(), bucket.keys.flatten()
            dq.index_add_(
                0, queries, _ungather((dS @ kb).mul_(ctx.scale), bucket.queries).flatten(0, 1)
            )
            dk.index_add_(0, keys, (dS.mT @ qb).mul_(ctx.scale).transpose(1, 2).flatten(0, 1))
            dv.index_add_(0, keys, (e.mT @ delta).transpose(1, 2).flatten(0, 1))
        return dq, dk, dv, None, None, None, None


def _gather(x: Tensor, queries: Tensor, KV: int) -> Tensor:
    """[T, H, hd] at queries [S, Lq] -> [S, KV, G Lq, hd]: the G query heads that share a key head stand together."""
    (S, Lq), (_, H, hd) = queries.shape, x.shape
    return (
        x[queries]
        .view(S, Lq, KV, H // KV, hd)
        .permute(0, 2, 3, 1, 4)
        .reshape(S, KV, H // KV * Lq, hd)
    )


def _ungather(x: Tensor, queries: Tensor) -> Tensor:
    """[S, KV, G Lq, hd] -> [S, Lq, H, hd]."""
    (S, Lq), (_, KV, _, hd) = queries.shape, x.shape
    return x.view(S, KV, -1, Lq, hd).permute(0, 3, 1, 2, 4).reshape(S, Lq, -1, hd)


def _keys(x: Tensor, bucket: Bucket) -> Tensor:
    return x[bucket.keys].transpose(1, 2)  # [T, KV, hd] -> [S, KV, Lk, hd]


def _visible(bucket: Bucket, window: int | None) -> Tensor:
    """bool [S, Lq, Lk]: which keys each query of a bucket sees."""
    distance = bucket.query_position[:, :, None] - bucket.key_position[:, None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def tree_mask(packed: Packed, window: int | None):
    """The same visibility as a FlexAttention mask_mod over the whole stream."""
    tree, branch, position = packed.tree, packed.branch, packed.position

    def visible(b, h, q, k):
        ok = (
            (tree[q] == tree[k])
            & ((branch[k] == 0) | (branch[k] == branch[q]))
            & (position[q] >= position[k])
        )
        return ok if window is None else ok & (position[q] - position[k] < window)

    return visible


def flexible_attention(q, k, v, mask: BlockMask, scale: float, softcap: float | None) -> Tensor:
    """plain_attention by FlexAttention: the tree is the block mask, the softcap a score_mod. Same shapes."""

    def cap(score, b, h, q_index, k_index):
        return softcap * torch.tanh(score / softcap)

    options = _tiles(q.device, q.dtype) if q.is_cuda else None
    # Fused by itself, where it is not within a fused block.
    kernel = (
        _compiled().flex_attention
        if q.is_cuda and not torch.compiler.is_compiling()
        else flex_attention
    )
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [T, H, hd] -> [1, H, T, hd]
    how = dict(score_mod=cap if softcap else None, block_mask=mask, scale=scale, enable_gqa=True)
    return kernel(q, k, v, **how, kernel_options=options)[0].transpose(0, 1)


def _tiles(device: torch.device, dtype: torch.dtype) -> dict | None:
    """FlexAttention's tile sizes, where its own do not fit. With heads of 256, as Gemma-2-2B and 9B have, they take
    115,000 to 155,000 bytes of shared memory; an RTX 3090, 4090 or 5090 offers 101,376, an A100 166,912.
    """
    if _shared_memory(device) > 150_000:
        return None
    if dtype == torch.float32:
        return dict(fwd_BLOCK_M=32, fwd_BLOCK_N=16, fwd_num_stages=2)
    backward = {f"bwd_BLOCK_{name}": 32 for name in ("M1", "N1", "M2", "N2")}
    return dict(fwd_BLOCK_M=32, fwd_BLOCK_N=64, fwd_num_stages=2, **backward, bwd_num_stages=2)


def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class Attention(nn.Module):
    def __init__(self, config: Gemma2Config, block: int):
        super().__init__()
        c, layer_type = config, config.layer_types[block]
        self.block = block
        self.heads, self.kv_heads, self.head_dim = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
        )
        self.scale, self.softcap = c.query_pre_attn_scalar**-0.5, c.attn_logit_softcapping
        self.layer_type, self.window = (
            layer_type,
            c.sliding_window if layer_type == SLIDING else None,
        )
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        T = x.shape[0]
        q = rotate(self.q_proj(x).view(T, self.heads, self.head_dim), plan.cos, plan.sin)
        k = rotate(self.k_proj(x).view(T, self.kv_heads, self.head_dim), plan.cos, plan.sin)
        v = self.v_proj(x).view(T, self.kv_heads, self.head_dim)
        if plan.cache:
            plan.cache.write(self.block, k, v)
        if plan.cache and plan.cache.stepping:
            out = plan.cache.attend(self.block, q, self.window, self.scale, self.softcap)
        elif plan.masks:
            out = flexible_attention(q, k, v, plan.masks[self.layer_type], self.scale, self.softcap)
        else:
            out = plain_attention(q, k, v, plan.packed, self.window, self.scale, self.softcap)
        return self.o_proj(out.reshape(T, -1))


class MLP(nn.Module):
    """GeGLU with the tanh approximation of GELU."""

    def __init__(self, config: Gemma2Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_GeGLU.apply(self.gate_proj(x), self.up_proj(x)))


class _GeGLU(torch.autograd.Function):
    """gelu(a) b, keeping a and b alone, of the widest tensors in a block: gelu(a) is made again in the backward.

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
        return torch.ops.aten.gelu_backward(grad * b, a, approximate="tanh"), F.gelu(
            a, approximate="tanh"
        ).mul_(grad)


class Block(nn.Module):
    def __init__(self, config: Gemma2Config, block: int):
        super().__init__()
        self.self_attn = Attention(config, block)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        # On a GPU a block's many small operations, which each read and write all of x, run in few kernels.
        return (_compiled().block if plan.masks and not plan.cache else Block.run)(self, x, plan)

    def run(self, x: Tensor, plan: Plan) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), plan))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Body(nn.Module):
    def __init__(self, config: Gemma2Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Gemma2(nn.Module):
    """The model, in the pieces that steering takes apart: embed, blocks, final_norm, head."""

    def __init__(self, config: Gemma2Config):
        super().__init__()
        self.config = config
        self.source, self.revision = (
            None,
            None,
        )  # where the weights came from, set by from_pretrained
        self.folder = None  # Path of the loaded checkpoint, for its tokenizer
        self.recompute = False  # activation checkpointing: a block keeps only its input and runs again in the backward
        self.model = Body(config)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights as in pre-training: normal matrices, norms at 1 + 0."""
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)

    def plan(self, packed: Packed, cache: Cache | None = None) -> Plan:
        """Rotary angles and, on CUDA, the block masks of a stream; shared by all blocks. With a cache, of what it is
        about to take: a stream of prompts, or a decoding.Newest.
        """
        c, device = self.config, packed.tokens.device
        frequency = c.rope_theta ** -(
            torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32) / c.head_dim
        )
        angle = packed.position[:, None, None] * frequency  # [T, 1, hd / 2]
        # Angles in float32 always; float64 weights (tests) take the cosines of those same angles.
        dtype = torch.promote_types(self.model.norm.weight.dtype, torch.float32)
        masks = {}
        if device.type == "cuda" and not (cache and cache.stepping):
            T = len(packed.tokens)
            for layer_type, window in ((SLIDING, c.sliding_window), (FULL, None)):
                masks[layer_type] = _compiled().block_mask(tree_mask(packed, window), T, device)
        return Plan(angle.to(dtype).cos(), angle.to(dtype).sin(), packed, masks, cache)

    def cache(self, lengths: list[int], room: int) -> Cache:
        """Keys and values for prompts of these lengths and, at first, `room` new tokens of each."""
        return Cache(self.config.num_hidden_layers, lengths, room, self.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [T] -> residual stream [T, d]. The scale sqrt(d) is rounded to the weights' dtype, as Gemma's is."""
        weight = self.model.embed_tokens.weight
        scale = torch.tensor(
            math.sqrt(self.config.hidden_size), dtype=weight.dtype
        ).item()  # on the CPU: no GPU waits
        x = self.model.embed_tokens(tokens) * scale
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def blocks(self, x: Tensor, plan: Plan, start: int = 0, stop: int | None = None) -> Tensor:
        """Run blocks start..stop-1 on the residual stream [T, d]."""
        for block in self.model.layers[start:stop]:
            x = (
                checkpoint(block, x, plan, use_reentrant=False)
                if self.recompute
                else block(x, plan)
            )
        return x

    def final_norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    def head(self, x: Tensor) -> Tensor:
        """Normed states [N, d] -> softcapped logits [N, V] in float32 (all of V: for training see simpo.py)."""
        weight = self.model.embed_tokens.weight
        if weight.dtype == torch.bfloat16 and weight.is_cuda:
            logits = torch.mm(x.to(weight.dtype), weight.T, out_dtype=torch.float32)
        else:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            logits = linear(x.to(dtype), weight.to(dtype))
        return softcap(logits, self.config.final_logit_softcapping)

    def forward(self, packed: Packed, cache: Cache | None = None) -> Tensor:
        """Normed final states [T, d] of a packed stream."""
        plan = self.plan(packed, cache)
        return self.final_norm(self.blocks(self.embed(packed.tokens), plan))

    def hidden(self, tokens: Tensor) -> Tensor:
        """Normed final states of one sequence: int64 [T] at positions 0..T-1 -> [T, d]."""
        return self(pack([(tokens.tolist(), [])]).to(self.device))

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of one sequence: int64 [T] at positions 0..T-1 -> float32 [T, V]."""
        return self.head(self.hidden(tokens))

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        revision: str | None = None,
    ) -> "Gemma2":
        """Load an HF folder or Hub repository: config.json and safetensors, sharded or single, strictly.

        The weights come frozen (requires_grad False). Raises UserError naming the file for a missing or
        truncated shard, and the tensor for a wrong name or shape.
        """
        patterns = [
            "config.json",
            "*.safetensors",
            "model.safetensors.index.json",
            "tokenizer*.json",
        ]
        folder, commit = fetch(source, "model", patterns, revision)
        config = Gemma2Config.from_json(folder / "config.json")
        with torch.device("meta"):
            model = cls(config)
        state = {}
        for shard in _shards(folder):
            state.update(_read(shard, dtype, device))
        head = state.pop(
            "lm_head.weight", None
        )  # tied: published checkpoints leave it out, some others repeat it
        if head is not None and not torch.equal(
            head, state.get("model.embed_tokens.weight", head[:0])
        ):
            raise UserError(
                f"{folder}: lm_head.weight differs from the embedding; Gemma-2 ties the two."
            )
        expected = model.state_dict()
        for name in sorted(expected.keys() | state.keys()):
            ours = tuple(expected[name].shape) if name in expected else "nothing"
            theirs = tuple(state[name].shape) if name in state else "nothing"
            if ours != theirs:
                raise UserError(
                    f"{folder}: tensor {name}: config.json calls for {ours}, the weights hold {theirs}."
                )
        model.load_state_dict(state, strict=True, assign=True)
        model.source, model.revision, model.folder = str(source), commit, folder
        return model.requires_grad_(False)

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors as transformers reads them (the tied head is not repeated).

        state: the weights where the model's own are spread over processes (distributed.gather).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.to_json(folder / "config.json", self.model.norm.weight.dtype)
        state = self.state_dict() if state is None else state
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    return cap * torch.tanh(logits / cap) if cap else logits


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{index}: not an index of safetensors shards ({e!r}).") from e
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: shard name {name!r} leaves the folder.")
    return [folder / name for name in names]


def _read(shard: Path, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    if not shard.exists():
        raise UserError(f"{shard}: this safetensors file is missing.")
    try:
        with safe_open(shard, framework="pt", device="cpu") as f:
            return {name: f.get_tensor(name).to(device=device, dtype=dtype) for name in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{shard}: not a whole safetensors file ({e}).") from e


class Compiled(NamedTuple):
    flex_attention: Callable
    block_mask: Callable  # a function of tree_mask's and a length -> BlockMask
    block: Callable  # Block.run


@functools.cache
def _compiled() -> Compiled:
    """What torch.compile fuses on a GPU. Run as they are, the first two write out all T x T scores.

    One graph each for a window or none, with gradients or without, under autocast or not; lengths become symbolic the
    second time they differ. Past the limit torch would quietly go back to the unfused form, so it is told to fail.
    """
    torch.compiler.assume_constant_result(
        _shared_memory
    )  # it asks what torch.compile cannot look into
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    def block_mask(
        visible, T: int, device: torch.device
    ) -> BlockMask:  # its block size is no symbol, as T is
        return create_block_mask(visible, None, None, T, T, device=device)

    return Compiled(
        torch.compile(flex_attention),
        torch.compile(block_mask, dynamic=True),
        torch.compile(Block.run),
    )
