"""Gemma-2 and Gemma 3 (text) in plain PyTorch, with the published weights.

Hidden states are [T, d]: one packed stream without a batch axis (data.Packed). Modules have the
names of the Hugging Face checkpoints, so that loading is a strict load_state_dict.

One thing differs from other implementations on purpose: the residual stream is float32 whatever
the weights' dtype, because bfloat16 would round small steering vectors away.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import Packed, pack
from kernels import attention
from kernels.attention import Attend
from kernels.logps import all_logits, token_logps
from kernels.pointwise import at_least_float32, geglu, linear, rms_norm, softcap
from runtime import config_json
from runtime.config_json import FULL, SLIDING, TYPE2, TYPE3
from runtime.sources import UserError, fetch
from runtime.weights import check_shapes, read_sharded

# The kernels take exp of capped scores without subtracting their maximum: float32 holds the sum of
# exp(75) over a vocabulary of 256,000, and not that of exp(80).
LARGEST_SOFTCAP = 75.0


@dataclass(frozen=True)
class Gemma2Config:
    """The settings of config.json, under the names that they have there.

    Gemma 3 has the same settings, with other values and model_type TYPE3.

    layer_types: SLIDING or FULL for each block; None means the family's pattern.
    rope_theta: base of the rotary angles in FULL blocks.
    rope_local_base_freq: base in SLIDING blocks; None means rope_theta.
    rope_factor: FULL blocks divide their angles by it; not 1 in Gemma 3 of 4B and larger.
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
    rope_theta: float = 10_000.0
    rope_local_base_freq: float | None = None
    rope_factor: float = 1.0
    max_position_embeddings: int = 8192
    layer_types: tuple[str, ...] | None = None
    initializer_range: float = 0.02
    model_type: str = TYPE2

    def __post_init__(self):
        """Fill in layer_types. Raises UserError for values that no Gemma has."""
        for field in dataclasses.fields(self):
            if field.name not in ("layer_types", "model_type"):
                _check_number(field, getattr(self, field.name))
        if self.head_dim % 2:
            raise UserError(f"config: head_dim is {self.head_dim}, an even number was expected.")
        for cap in (self.attn_logit_softcapping, self.final_logit_softcapping):
            if cap and cap > LARGEST_SOFTCAP:
                raise UserError(
                    f"config: a softcap of {cap}, at most {LARGEST_SOFTCAP} was expected."
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError("config: num_key_value_heads must divide num_attention_heads.")

        n, every = self.num_hidden_layers, 6 if self.qk_norm else 2
        types = self.layer_types or [SLIDING if (i + 1) % every else FULL for i in range(n)]
        if len(types) != n or any(t not in (SLIDING, FULL) for t in types):
            raise UserError(f"config: layer_types must name {n} blocks as {SLIDING} or {FULL}.")
        object.__setattr__(self, "layer_types", tuple(types))

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed per head, as Gemma 3's are."""
        return self.model_type == TYPE3

    @classmethod
    def from_json(cls, path: Path) -> "Gemma2Config":
        """Read config.json as config_json.read does. Raises UserError where a key is missing."""
        raw = config_json.read(path)
        known = {f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw}
        try:
            return cls(**known)
        except TypeError as e:
            raise UserError(f"{path}: a required key is missing ({e}).") from e

    def to_json(self, path: Path, dtype: torch.dtype) -> None:
        """Write config.json with the keys that transformers 4 and 5 read. dtype: of the weights."""
        config_json.write(path, dataclasses.asdict(self), str(dtype).removeprefix("torch."))


def _check_number(field: dataclasses.Field, value: object) -> None:
    if value is None and field.type == float | None:
        return
    number = int if field.type is int else int | float
    if not isinstance(value, number) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"config: {field.name} is {value!r}, a positive number was expected.")
    if number is int and value > (1024 if field.name == "num_hidden_layers" else 1 << 24):
        raise UserError(f"config: {field.name} is {value}, more than any Gemma has; not loaded.")


# --- what the blocks share ------------------------------------------------------------------------


class Plan(NamedTuple):
    """What all blocks need besides the residual stream; Gemma2.plan makes it once per forward."""

    angles: dict[str, tuple[Tensor, Tensor]]  # by layer type: cos and sin, float32 [T, 1, hd / 2]
    attend: Attend


class Flexible(NamedTuple):
    """An Attend for CUDA: FlexAttention. Blocks that use it are compiled whole (Block.forward)."""

    sliding: attention.BlockMask
    full: attention.BlockMask

    def __call__(self, block: "Attention", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.sliding if block.window else self.full
        return attention.flexible(q, k, v, mask, block.scale, block.softcap)


# --- modules --------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """y = x / rms(x) · (1 + weight), in float32; cast to the weights' dtype last, as Gemma does."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps).to(self.weight.dtype)


class Linear(nn.Linear):
    """y = x weightᵀ without a bias: [T, in] -> [T, out]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """No start values: files or init_weights set them. On the meta device torch would import
        code for a second to compute none.
        """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, hd]: rotates the plane of components i and i + hd / 2.

    cos, sin: [T, 1, hd / 2].
    """
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Gemma2Config, index: int):
        super().__init__()
        c = config
        self.index = index  # of the block: the generation cache stores keys and values by it
        self.head_dim = c.head_dim
        self.layer_type = c.layer_types[index]
        self.window = c.sliding_window if self.layer_type == SLIDING else None
        self.scale, self.softcap = c.query_pre_attn_scalar**-0.5, c.attn_logit_softcapping
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.qk_norm = c.qk_norm

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        T, hd = len(x), self.head_dim
        q = self.q_proj(x).view(T, -1, hd)  # [T, d] -> [T, H, hd]
        k = self.k_proj(x).view(T, -1, hd)  # [T, d] -> [T, KV, hd]
        v = self.v_proj(x).view(T, -1, hd)  # [T, d] -> [T, KV, hd]
        if self.qk_norm:  # Gemma 3
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = plan.angles[self.layer_type]
        # Under autocast v is bfloat16, while the norms leave q and k in float32.
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        # softmax(c tanh(s q kᵀ / c)) v over the keys that a position may see, where c is softcap
        # and s is scale. Each key head serves H / KV query heads.
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
        # On a GPU each of a block's many small operations reads and writes all of x; torch.compile
        # fuses them into few kernels.
        fused = isinstance(plan.attend, Flexible)
        run = attention.compiled(Block.run) if fused else Block.run
        return run(self, x, plan)

    def run(self, x: Tensor, plan: Plan) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), plan)
        x = x + self.post_attention_layernorm(attended)
        transformed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(transformed)


class Body(nn.Module):
    def __init__(self, config: Gemma2Config):
        super().__init__()
        V, d = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(V, d, _weight=torch.empty(V, d))  # see Linear
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(d, config.rms_norm_eps)


class Gemma2(nn.Module):
    """The model in pieces that a caller can steer between: embed, blocks, final_norm, head."""

    def __init__(self, config: Gemma2Config):
        super().__init__()
        self.config = config
        # Where the weights came from; set by from_pretrained.
        self.source: str | None = None
        self.revision: str | None = None  # commit of a Hub download
        self.folder: Path | None = None
        # Activation checkpointing: store only each block's input and run the block again in the
        # backward pass.
        self.recompute = False
        self.model = Body(config)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights as before pre-training: normal matrices, and norms that scale by 1."""
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)

    def plan(self, packed: Packed, attend: Attend | None = None) -> Plan:
        """Rotary angles and attention for a forward over a stream.

        attend: how blocks attend; None: to the positions of the stream itself (self.attend).
        """
        c, device = self.config, packed.position.device
        exponent = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float32) / c.head_dim
        # Angles are always rounded to float32, as in transformers; tests with float64 weights take
        # float64 cosines of the same angles.
        dtype = at_least_float32(self.model.norm.weight.dtype)
        angles = {}
        for kind, theta, factor in (
            (FULL, c.rope_theta, c.rope_factor),
            (SLIDING, c.rope_local_base_freq or c.rope_theta, 1.0),
        ):
            frequency = theta**-exponent / factor
            angle = (packed.position[:, None, None] * frequency).to(dtype)  # [T, 1, hd / 2]
            angles[kind] = angle.cos(), angle.sin()
        return Plan(angles, attend or self.attend(packed))

    def attend(self, packed: Packed) -> Attend:
        """Attention among the positions of a stream, by the kernel for its device."""
        if packed.position.device.type == "cpu":
            return lambda block, q, k, v: attention.plain(
                q, k, v, packed.buckets, block.window, block.scale, block.softcap
            )
        tree = packed.tree, packed.branch, packed.position
        window = self.config.sliding_window
        return Flexible(attention.block_mask(*tree, window), attention.block_mask(*tree, None))

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [T] -> residual stream [T, d]."""
        dtype = self.model.embed_tokens.weight.dtype
        # Gemma rounds sqrt(d) to the weights' dtype. This is done on the CPU, because .item() of a
        # tensor on a GPU would wait for the GPU.
        scale = torch.tensor(math.sqrt(self.config.hidden_size), dtype=dtype).item()
        x = self.model.embed_tokens(tokens) * scale
        return x.to(at_least_float32(x.dtype))

    def blocks(self, x: Tensor, plan: Plan, start: int = 0, stop: int | None = None) -> Tensor:
        """Run blocks start to stop - 1: residual stream [T, d] -> [T, d]."""
        for block in self.model.layers[start:stop]:
            if self.recompute:
                x = checkpoint(block, x, plan, use_reentrant=False)
            else:
                x = block(x, plan)
        return x

    def final_norm(self, x: Tensor) -> Tensor:
        """Residual stream after the last block [T, d] -> normed states [T, d]."""
        return self.model.norm(x)

    def logps(self, x: Tensor, packed: Packed) -> Tensor:
        """Normed states [T, d] of a packed stream -> log-probability float32 [N] of each target."""
        head = self.model.embed_tokens.weight
        device = head.device.type
        if torch.is_autocast_enabled(device):
            # Under --full the weights are float32, and autocast does not reach a custom kernel.
            head = head.to(torch.get_autocast_dtype(device))
        cap = self.config.final_logit_softcapping
        return token_logps(x[packed.source], head, packed.target, cap)  # [T, d] -> [N, d] -> [N]

    def head(self, x: Tensor) -> Tensor:
        """Normed states [N, d] -> softcapped logits float32 [N, V]; training takes logps."""
        logits = all_logits(x, self.model.embed_tokens.weight)
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
        """Load config.json and safetensors from a folder or a Hub repository.

        The weights are frozen (requires_grad is False). Raises UserError naming the file for a
        missing or truncated shard, and naming the tensor for a wrong name or shape.
        """
        patterns = ["config.json", "*.safetensors", "*.index.json", "tokenizer*.json", "*.jinja"]
        # Not read here, but copied beside weights that we write, for transformers.
        patterns += ["generation_config.json", "special_tokens_map.json"]
        folder, commit = fetch(source, "model", patterns)
        config = Gemma2Config.from_json(folder / "config.json")
        with torch.device("meta"):
            model = cls(config)

        state = read_sharded(folder, text_name if config.qk_norm else str, dtype, device)
        # The head is the embedding; most checkpoints leave it out, some store it a second time.
        head = state.pop("lm_head.weight", None)
        embedding = state.get("model.embed_tokens.weight")
        if head is not None and (embedding is None or not torch.equal(head, embedding)):
            raise UserError(f"{folder}: lm_head.weight is not equal to the embedding.")
        check_shapes(folder, state, model.state_dict())
        model.load_state_dict(state, strict=True, assign=True)
        model.source, model.revision, model.folder = str(source), commit, folder
        return model.requires_grad_(False)

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors so that transformers can read them.

        state: the whole weights (ranks.gather), for a model whose own are spread over processes.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.to_json(folder / "config.json", self.model.norm.weight.dtype)
        state = self.state_dict() if state is None else state
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def text_name(name: str) -> str:
    """Our name for a tensor of a Gemma 3 checkpoint; "" for those of a vision tower."""
    if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name):
        return ""
    if name.endswith("lm_head.weight"):
        return "lm_head.weight"
    return re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)
