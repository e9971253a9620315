"""Gemma-2, written by hand: published weights in, nothing hidden.

Hidden states are [T, d]: one packed stream without a batch axis (data.Packed). Module names mirror
those of the Hugging Face checkpoints, so loading is a plain, strict load_state_dict. One thing
differs from other implementations on purpose: the residual stream is float32 whatever the weights'
dtype, because a steering vector smaller than a bfloat16 step of the stream would otherwise be
rounded away.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import Packed, pack
from kernels import attention
from kernels.attention import Bucket
from kernels.logps import token_logps
from kernels.pointwise import at_least_float32, geglu, linear, rms_norm, softcap
from runtime.sources import UserError, fetch, read_json

SLIDING, FULL = "sliding_attention", "full_attention"
LARGEST_SOFTCAP = 80.0  # attention.plain and logps exponentiate capped scores as they are


@dataclass(frozen=True)
class Gemma2Config:
    """Names as in config.json.

    layer_types: SLIDING or FULL per block; None means SLIDING on even blocks.
    """

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
        """Fill in layer_types. Raises UserError for values that no Gemma-2 has."""
        for field in dataclasses.fields(self):
            if field.name != "layer_types":
                _check_number(field, getattr(self, field.name))
        if self.head_dim % 2:
            raise UserError(f"config: head_dim is {self.head_dim}, an even number was expected.")
        for cap in (self.attn_logit_softcapping, self.final_logit_softcapping):
            if cap and cap > LARGEST_SOFTCAP:
                raise UserError(f"config: a softcap of {cap}; Gemma-2 has 50 and 30.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError("config: num_key_value_heads must divide num_attention_heads.")

        n = self.num_hidden_layers
        types = self.layer_types or [(SLIDING, FULL)[i % 2] for i in range(n)]
        if len(types) != n or any(t not in (SLIDING, FULL) for t in types):
            raise UserError(f"config: layer_types must name {n} blocks as {SLIDING} or {FULL}.")
        object.__setattr__(self, "layer_types", tuple(types))

    @classmethod
    def from_json(cls, path: Path) -> "Gemma2Config":
        """Read config.json as transformers 4 or 5 writes it.

        Raises UserError for any other architecture.
        """
        try:
            raw = read_json(path)
            rope = raw.get("rope_parameters") or {}
            rope_type = rope.get("rope_type", "default")
        except (OSError, ValueError, AttributeError) as e:
            raise UserError(f"{path}: a config.json was expected ({e}).") from e
        for key, allowed in ONLY.items():
            if not isinstance(raw.get(key), str | bool | None) or raw.get(key) not in allowed:
                raise UserError(f"{path}: {key} is {raw.get(key)!r}; Gemma-2 alone is known here.")
        if rope_type != "default":
            raise UserError(f"{path}: rope_type is {rope_type!r}; 'default' was expected.")

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


ONLY = {  # keys of config.json -> the values that this forward computes; None: the key is absent
    "model_type": {"gemma2"},
    "hidden_activation": {"gelu_pytorch_tanh", None},
    "attention_bias": {False, None},
    "tie_word_embeddings": {True, None},
    "use_bidirectional_attention": {False, None},
    "rope_scaling": {None},
}


def _check_number(field: dataclasses.Field, value: object) -> None:
    if value is None and field.type == float | None:
        return
    number = int if field.type is int else int | float
    if not isinstance(value, number) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"config: {field.name} is {value!r}, a positive number was expected.")
    if number is int and value > (1024 if field.name == "num_hidden_layers" else 1 << 24):
        raise UserError(f"config: {field.name} is {value}, more than any Gemma-2 has; not loaded.")


def _published(hidden, intermediate, layers, heads, kv_heads, head_dim=256, scalar=256):
    sizes = hidden, intermediate, layers, heads, kv_heads, head_dim, scalar
    return Gemma2Config(256_000, *sizes)


PUBLISHED = {  # google/gemma-2-{2b,9b,27b}[-it]
    "gemma-2-2b": _published(2304, 9216, 26, 8, 4),
    "gemma-2-9b": _published(3584, 14336, 42, 16, 8),
    "gemma-2-27b": _published(4608, 36864, 46, 32, 16, head_dim=128, scalar=144),
}


# --- what the blocks share ------------------------------------------------------------------------

# (block, q, k, v) -> out, all [T, heads, hd]
Attend = Callable[["Attention", Tensor, Tensor, Tensor], Tensor]


class Plan(NamedTuple):
    """What every block needs to know of a stream; made once per forward by Gemma2.plan."""

    cos: Tensor  # float32 [T, 1, head_dim / 2]
    sin: Tensor  # float32 [T, 1, head_dim / 2]
    attend: Attend


class Plain(NamedTuple):
    """Attention by the plain kernel, on a CPU."""

    buckets: tuple[Bucket, ...]

    def __call__(self, block: "Attention", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.plain(q, k, v, self.buckets, block.window, block.scale, block.softcap)


class Flexible(NamedTuple):
    """Attention by FlexAttention, on CUDA; blocks that use it are compiled whole."""

    sliding: attention.BlockMask
    full: attention.BlockMask

    def __call__(self, block: "Attention", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.sliding if block.window else self.full
        return attention.flexible(q, k, v, mask, block.scale, block.softcap)


# --- modules --------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """y = x / rms(x) · (1 + weight) in float32, cast to the weights' dtype last, as Gemma does."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps).to(self.weight.dtype)


class Linear(nn.Linear):
    """y = x weightᵀ: [T, in] -> [T, out], without a bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, hd]: component i turns with component i + hd / 2."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Gemma2Config, index: int):
        super().__init__()
        c = config
        self.index = index  # of the block, where the generation cache keeps its keys and values
        self.head_dim = c.head_dim
        self.window = c.sliding_window if c.layer_types[index] == SLIDING else None
        self.scale, self.softcap = c.query_pre_attn_scalar**-0.5, c.attn_logit_softcapping
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        T, hd = len(x), self.head_dim
        q = self.q_proj(x).view(T, -1, hd)  # [T, d] -> [T, H, hd]
        k = self.k_proj(x).view(T, -1, hd)  # [T, d] -> [T, KV, hd]
        v = self.v_proj(x).view(T, -1, hd)  # [T, d] -> [T, KV, hd]
        q = rotate(q, plan.cos, plan.sin)
        k = rotate(k, plan.cos, plan.sin)
        # softmax(c tanh(s q kᵀ / c)) v over the keys that a position may see; H / KV query heads
        # share a key head
        out = plan.attend(self, q, k, v)  # [T, H, hd]
        return self.o_proj(out.reshape(T, -1))  # [T, H hd] -> [T, d]


class MLP(nn.Module):
    """GeGLU with the tanh approximation of GELU: down(gelu(gate(x)) · up(x))."""

    def __init__(self, config: Gemma2Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gated = geglu(self.gate_proj(x), self.up_proj(x))  # [T, d] -> [T, ffn]
        return self.down_proj(gated)  # [T, ffn] -> [T, d]


class Block(nn.Module):
    def __init__(self, config: Gemma2Config, index: int):
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(d, eps)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.pre_feedforward_layernorm = RMSNorm(d, eps)
        self.post_feedforward_layernorm = RMSNorm(d, eps)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        # On a GPU, a block's many small operations each read and write all of x: compiled, they run
        # in few kernels.
        run = _compiled_block() if isinstance(plan.attend, Flexible) else Block.run
        return run(self, x, plan)

    def run(self, x: Tensor, plan: Plan) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), plan)
        x = x + self.post_attention_layernorm(attended)
        transformed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(transformed)


@functools.cache
def _compiled_block() -> Callable:
    attention.limit_recompiles()
    return torch.compile(Block.run)


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
        # Where the weights came from; from_pretrained sets them.
        self.source: str | None = None
        self.revision: str | None = None  # commit of a Hub download
        self.folder: Path | None = None
        # Activation checkpointing: keep a block's input alone, run the block again in the backward.
        self.recompute = False
        self.model = Body(config)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights as before pre-training: normal matrices, norms at 1 + 0."""
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)

    def plan(self, packed: Packed, attend: Attend | None = None) -> Plan:
        """Rotary angles of a stream, and how its blocks attend: None for within the stream."""
        c, device = self.config, packed.position.device
        exponent = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32) / c.head_dim
        angle = packed.position[:, None, None] * c.rope_theta**-exponent  # [T, 1, hd / 2]
        # Angles are float32 always; float64 weights (tests) take the cosines of those same angles.
        angle = angle.to(at_least_float32(self.model.norm.weight.dtype))
        return Plan(angle.cos(), angle.sin(), attend or self.attend(packed))

    def attend(self, packed: Packed) -> Attend:
        """Attention among the positions of a stream, by the kernel that its device runs best."""
        if packed.position.device.type == "cpu":
            return Plain(packed.buckets)
        tree = packed.tree, packed.branch, packed.position
        window = self.config.sliding_window
        return Flexible(attention.block_mask(*tree, window), attention.block_mask(*tree, None))

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [T] -> residual stream [T, d]."""
        dtype = self.model.embed_tokens.weight.dtype
        # Gemma rounds sqrt(d) to the weights' dtype. On the CPU, so that no GPU is waited for.
        scale = torch.tensor(math.sqrt(self.config.hidden_size), dtype=dtype).item()
        x = self.model.embed_tokens(tokens) * scale
        return x.to(at_least_float32(x.dtype))

    def blocks(self, x: Tensor, plan: Plan, start: int = 0, stop: int | None = None) -> Tensor:
        """Run blocks start..stop-1 on the residual stream [T, d]."""
        for block in self.model.layers[start:stop]:
            if self.recompute:
                x = checkpoint(block, x, plan, use_reentrant=False)
            else:
                x = block(x, plan)
        return x

    def final_norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    def logps(self, x: Tensor, packed: Packed) -> Tensor:
        """Normed states [T, d] of a packed stream -> log-probability of each target [N]."""
        head = self.model.embed_tokens.weight
        device = head.device.type
        if torch.is_autocast_enabled(device):  # float32 masters (--full) multiply in bfloat16 here
            head = head.to(torch.get_autocast_dtype(device))
        cap = self.config.final_logit_softcapping
        return token_logps(x[packed.source], head, packed.target, cap)  # [T, d] -> [N, d] -> [N]

    def head(self, x: Tensor) -> Tensor:
        """Normed states [N, d] -> softcapped logits float32 [N, V]; training takes logps."""
        weight = self.model.embed_tokens.weight
        if weight.dtype == torch.bfloat16 and weight.is_cuda:
            logits = torch.mm(x.to(weight.dtype), weight.T, out_dtype=torch.float32)
        else:
            dtype = at_least_float32(weight.dtype)
            logits = linear(x.to(dtype), weight.to(dtype))
        return softcap(logits, self.config.final_logit_softcapping)

    def forward(self, packed: Packed, attend: Attend | None = None) -> Tensor:
        """Normed final states [T, d] of a packed stream. attend: see plan."""
        plan = self.plan(packed, attend)
        return self.final_norm(self.blocks(self.embed(packed.tokens), plan))

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of one sequence: int64 [T] at positions 0..T-1 -> float32 [T, V]."""
        return self.head(self(pack([(tokens.tolist(), [])]).to(self.device)))

    # --- files ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, source: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> "Gemma2":
        """Load a Hugging Face folder or Hub repository, config.json and safetensors, strictly.

        The weights come frozen (requires_grad False). Raises UserError naming the file for a
        missing or truncated shard, and the tensor for a wrong name or shape.
        """
        patterns = ["config.json", "*.safetensors", "*.index.json", "tokenizer*.json"]
        folder, commit = fetch(source, "model", patterns)
        config = Gemma2Config.from_json(folder / "config.json")
        with torch.device("meta"):
            model = cls(config)

        state = {}
        for shard in _shards(folder):
            state.update(_read(shard, dtype, device))
        # The head is tied to the embedding: published checkpoints leave it out, some repeat it.
        head = state.pop("lm_head.weight", None)
        embedding = state.get("model.embed_tokens.weight")
        if head is not None and (embedding is None or not torch.equal(head, embedding)):
            raise UserError(f"{folder}: lm_head.weight differs from the embedding, its twin.")

        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        held = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in sorted(expected.keys() | held.keys()):
            ours, theirs = expected.get(name, "nothing"), held.get(name, "nothing")
            if ours != theirs:
                found = f"config.json asks for {ours}, the file has {theirs}"
                raise UserError(f"{folder}: tensor {name}: {found}.")
        model.load_state_dict(state, strict=True, assign=True)
        model.source, model.revision, model.folder = str(source), commit, folder
        return model.requires_grad_(False)

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors as transformers reads them.

        state: the weights, where the model's own are spread over processes (ranks.gather).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.to_json(folder / "config.json", self.model.norm.weight.dtype)
        state = self.state_dict() if state is None else state
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


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
            names = list(f.keys())
            return {name: f.get_tensor(name).to(device=device, dtype=dtype) for name in names}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{shard}: not a whole safetensors file ({e}).") from e
