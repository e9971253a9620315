"""FSRL: the adapter and the steered model (arXiv 2509.12934, section 3).

    v  = ReLU(x W_aᵀ + b_a)                        x [T, d] -> v [T, F]; only W_a and b_a train
    x' = decode(f + v) + (x - decode(f))           as the paper writes it; f: the SAE's features
       = x + v W_dec                               the same, because decode is affine

--adapter has other kinds, which also train a threshold for each feature; jumprelu-log is jumprelu
with log θ as the parameter:

    jumprelu         v = z 1[z > θ],  z = x W_aᵀ + b_a,  θ ≥ 0        Appendix C
    soft-threshold   v = sign(z) ReLU(|z| - τ),  z = x W_aᵀ + b_a     the authors' later work
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data import Packed, pack
from kernels.pointwise import FEW, at_least_float32, jumprelu, linear
from model import Attend, Gemma2, Plan
from runtime.output import publish
from runtime.sae_ids import layer_of
from runtime.sources import UserError, fetch, read_json, sha256
from runtime.weights import read_weights
from sae import JumpReLUSAE

FORMAT = "fsrl-adapter-1"
ADAPTER_FILES = (
    ("adapter_config.json", "adapter.safetensors"),  # (config, weights) as this project writes them
    ("fsrl_adapter_config.json", "adapter_weights.safetensors"),  # as the authors' code does
)
# v [T, F] is computed in pieces of about STEER_ELEMENTS elements, but of STEER_ROWS rows at least,
# because the backward of each piece adds to the whole weight gradient [F, d].
STEER_ELEMENTS = {"cuda": 1 << 28, "cpu": 1 << 21}
STEER_ROWS = 256
INIT_RANGE = 1e-9  # weights start within ± this, as the authors' do: close to the unsteered model

# Values of --adapter. jumprelu-log trains log θ, as the authors' code does. Its file is written as
# jumprelu, because v is the same function of θ.
KINDS = ("relu", "jumprelu", "jumprelu-log", "soft-threshold")
THRESHOLD_INIT = {"jumprelu": 0.001, "jumprelu-log": 0.001, "soft-threshold": 0.0}
# Width ε of the window that estimates θ's gradient. The authors train log θ with ε = 0.001, where θ
# hardly moves under Adam. θ itself with a wider ε does move.
BANDWIDTH = {"jumprelu": 0.05, "jumprelu-log": 0.001}
SILENT = -1e6  # bias of a silenced feature of jumprelu, further below θ than any ε


class Steering(NamedTuple):
    v: Tensor  # [T, F], in the dtype of the matrix products
    l1: Tensor  # [T], ‖v‖₁, float32 at least
    l0: Tensor  # [T], ‖v‖₀: how many features are steered; for jumprelu with a gradient to θ


class Adapter(nn.Module):
    """Trained weights, float32: weight [F, d], bias [F] and, except for relu, raw_threshold [F].

    kind: one of KINDS. bandwidth: ε of jumprelu's straight-through estimator; None: the kind's
    own. It changes the gradient of θ and not v.
    """

    forward_methods = ("steering",)  # called beside forward; FSDP2 must know of them

    def __init__(
        self, d_model: int, d_sae: int, kind: str = "relu", bandwidth: float | None = None
    ):
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"--adapter {kind}: one of {', '.join(KINDS)} was expected.")
        self.kind, self.activation = kind, kind.removesuffix("-log")
        self.bandwidth = BANDWIDTH.get(kind) if bandwidth is None else bandwidth
        self.identity: dict = {}  # content of adapter_config.json
        self.files: dict[str, str] = {}  # path -> sha256 of the weights file it was read from
        self.weight = nn.Parameter(torch.zeros(d_sae, d_model))
        self.bias = nn.Parameter(torch.zeros(d_sae))
        # θ, log θ or τ, in float32 because bfloat16 would round Adam's small updates away.
        self.raw_threshold = nn.Parameter(torch.zeros(d_sae)) if kind != "relu" else None

    def init_weights(self, generator: torch.Generator) -> None:
        threshold = THRESHOLD_INIT.get(self.kind, 0.0)
        nn.init.uniform_(self.weight, -INIT_RANGE, INIT_RANGE, generator=generator)
        # jumprelu's z starts at θ, as in the authors' code. If it started far below θ, no feature
        # would be active, and no gradient would reach the weights.
        nn.init.constant_(self.bias, threshold if self.activation == "jumprelu" else 0.0)
        if self.raw_threshold is not None:
            self.set_threshold(torch.full_like(self.bias, threshold))

    @property
    def threshold(self) -> Tensor:
        """jumprelu's θ or soft-threshold's τ: [F], not negative."""
        return self.raw_threshold.exp() if self.kind == "jumprelu-log" else self.raw_threshold

    @torch.no_grad()
    def set_threshold(self, threshold: Tensor) -> None:
        """threshold [F]. Raises UserError for values that cannot be thresholds of this kind."""
        raw = threshold.log() if self.kind == "jumprelu-log" else threshold
        if not (raw.isfinite() & (threshold >= 0)).all():
            least = "positive" if self.kind == "jumprelu-log" else "not negative"
            wanted = f"thresholds must be finite and {least} for --adapter {self.kind}"
            raise UserError(f"The adapter's {wanted}.")
        self.raw_threshold.copy_(raw)

    @torch.no_grad()
    def project(self) -> None:
        """After an optimiser step, set thresholds that went below 0 to 0."""
        if self.raw_threshold is not None and self.kind != "jumprelu-log":
            self.raw_threshold.clamp_(min=0)

    @torch.no_grad()
    def set_unit(self, unit: float, fresh: bool) -> None:
        """Multiply ε by the unit of steering (--unit), and a fresh adapter's bias and threshold."""
        if self.bandwidth is not None:
            self.bandwidth *= unit
        if fresh:
            self.bias *= unit
            if self.raw_threshold is not None:
                self.set_threshold(self.threshold * unit)

    @torch.no_grad()
    def silence(self, features: list[int]) -> None:
        """Make v = 0 for these features for good: at z = 0 a ReLU passes no gradient."""
        self.weight[features] = 0
        self.bias[features] = 0
        if self.activation == "jumprelu":
            self.bias[features] = SILENT  # outside the window of θ, which then gets no gradient

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream x [T, d] -> steering v [T, F]."""
        return self._activate(x)[0]

    def steering(self, x: Tensor) -> Steering:
        """Residual stream x [T, d] -> v and its norms."""
        v, l0 = self._activate(x)
        size = v.abs() if self.activation == "soft-threshold" else v  # other v are not negative
        dtype = at_least_float32(v.dtype)
        l1 = size.sum(-1, dtype=dtype)
        if l0 is None:
            l0 = v.detach().count_nonzero(-1).to(dtype)
        return Steering(v, l1, l0)

    def _activate(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [T, d] -> v [T, F] and, for jumprelu, ‖v‖₀ [T] with its gradient."""
        x = x.to(self.weight.dtype)
        if self.activation == "jumprelu":
            product = linear(x, self.weight)  # [T, d] -> [T, F]
            # The bias starts at θ and is added in float32, because bfloat16 could round it below θ,
            # where it would never train. The paper applies a ReLU to z first; v is the same
            # without, as θ ≥ 0, but the estimator must not see a ReLU's zeros (see jumprelu).
            v, l0 = jumprelu(product + self.bias, self.threshold, self.bandwidth)
            return v.to(product.dtype), l0

        if len(x) < FEW:
            z = linear(x, self.weight).add_(self.bias)
        else:
            z = F.linear(x, self.weight, self.bias)  # [T, d] -> [T, F]
        if self.activation == "relu":
            return z.relu_(), None
        return z.sign() * F.relu(z.abs() - self.threshold), None

    # --- files ------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, identity: dict) -> None:
        """Write adapter.safetensors and adapter_config.json; after a failure neither has changed.

        identity: base_model, base_model_revision, layer, sae, sae_id, sae_revision, sae_sha256.
        Raises UserError where the folder cannot be written.
        """
        folder = Path(folder)
        d_sae, d_model = self.weight.shape
        own = dict(format=FORMAT, activation=self.activation, d_model=d_model, d_sae=d_sae)
        weights = {"weight": self.weight, "bias": self.bias}
        if self.raw_threshold is not None:
            weights["threshold"] = self.threshold
        weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
        config_name, weights_name = ADAPTER_FILES[0]
        with publish(folder) as part:
            save_file(weights, part / weights_name)
            (part / config_name).write_text(json.dumps(own | identity, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, source: str | Path, kind: str | None = None) -> "Adapter":
        """Read an adapter folder, a run's folder or a Hub repository, ours or the authors'.

        kind: the value of --adapter. A file of activation jumprelu can go on as jumprelu or as
        jumprelu-log; None: as the file's activation. Raises UserError for anything missing or of a
        wrong shape. SteeredModel checks that the adapter belongs to the SAE.
        """
        names = [name for pair in ADAPTER_FILES for name in pair]
        patterns = [*names, *(f"adapter/{name}" for name in names)]
        folder = fetch(source, "init-adapter", patterns).path
        folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
        authors = (folder / ADAPTER_FILES[1][0]).is_file()
        config_name, weights_name = ADAPTER_FILES[authors]
        try:
            identity = read_json(folder / config_name)
        except (OSError, ValueError) as e:
            files = f"{config_name} + {weights_name}"
            raise UserError(f"{folder}: not an adapter folder ({files}: {e}).") from e
        weights = read_weights(folder / weights_name)
        if authors:
            weights, identity = _from_authors(weights, identity)
        elif identity.get("format") != FORMAT:
            raise UserError(f"{folder / config_name}: its format is not {FORMAT}.")

        activation = identity.get("activation", "relu")
        vectors = ("bias",) if activation == "relu" else ("bias", "threshold")
        shape = weights["weight"].shape if set(weights) == {"weight", *vectors} else ()
        if len(shape) != 2 or any(weights[name].shape != shape[:1] for name in vectors):
            found = {name: tuple(w.shape) for name, w in weights.items()}
            wanted = "weight [F, d], " + ", ".join(f"{name} [F]" for name in vectors)
            path = folder / weights_name
            raise UserError(f"{path}: holds {found}; a {activation} adapter has {wanted}.")
        if kind is not None and kind.removesuffix("-log") != activation:
            raise UserError(f"--init-adapter {source}: a {activation} adapter, --adapter {kind}.")

        adapter = cls(shape[1], shape[0], kind or activation)
        with torch.no_grad():
            adapter.weight.copy_(weights["weight"])
            adapter.bias.copy_(weights["bias"])
        if "threshold" in weights:
            adapter.set_threshold(weights["threshold"].float())
        adapter.identity = identity
        adapter.files = {str(folder / weights_name): sha256(folder / weights_name)}
        return adapter


def _from_authors(weights: dict[str, Tensor], config: dict) -> tuple[dict[str, Tensor], dict]:
    """The authors' tensors and config under the names of ours."""
    named = config.get("activation_type")  # their earlier files have use_jump_relu instead
    if not named:
        named = "jump_relu" if config.get("use_jump_relu") else "relu"
    activation = {"jump_relu": "jumprelu", "soft_threshold": "soft-threshold"}.get(named, named)
    weights = {name.removeprefix("adapter_linear."): w for name, w in weights.items()}
    if "log_threshold" in weights:
        weights["threshold"] = weights.pop("log_threshold").float().exp()
    if "soft_threshold" in weights:
        weights["threshold"] = weights.pop("soft_threshold")
    return weights, dict(format="authors", activation=activation, sae_id=config.get("base_sae_id"))


# --- the steered model ----------------------------------------------------------------------------

Change = Callable[[Tensor], Tensor]  # v [rows, F] -> the steering to add in its place [rows, F]


class States(NamedTuple):
    hidden: Tensor  # [T, d], final states after the last norm
    l1: Tensor  # [T], ‖v‖₁ of the steering at each position
    l0: Tensor  # [T], ‖v‖₀: how many features are steered at each position


class Scored(NamedTuple):
    logps: Tensor  # float32 [N], log-probability of each target of the packed stream
    l1: Tensor  # [T], as in States
    l0: Tensor  # [T]


class PolicyModel(nn.Module):
    """A Gemma2, steered or not: the one interface of training, generation and the audit."""

    forward_methods = ("states",)  # called beside forward; FSDP2 must know of them
    model: Gemma2
    trained: nn.Module  # the module whose parameters train, and no others

    def forward(self, packed: Packed) -> Scored:
        """A packed stream of T tokens and N targets -> log-probabilities and steering norms."""
        hidden, l1, l0 = self.states(packed)
        return Scored(self.model.logps(hidden, packed), l1, l0)

    def states(
        self, packed: Packed, attend: Attend | None = None, change: Change | None = None
    ) -> States:
        """A packed stream of T tokens -> final states and steering norms.

        attend: how blocks attend (Gemma2.plan). change: applied to v before it is added.
        """
        raise NotImplementedError

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of one sequence: int64 [T] -> float32 [T, V]."""
        packed = pack([(tokens.tolist(), [])]).to(self.model.device)
        return self.model.head(self.states(packed).hidden)


class SteeredModel(PolicyModel):
    """A frozen model whose residual stream is steered after block `layer` (see add).

    Raises UserError when layer, shapes, or the SAE recorded in the adapter do not fit.
    """

    def __init__(self, model: Gemma2, sae: JumpReLUSAE, adapter: Adapter, layer: int):
        super().__init__()
        _check_fit(model, sae, adapter, layer)
        self.model, self.sae, self.adapter, self.layer = model, sae, adapter, layer

    @property
    def trained(self) -> nn.Module:
        return self.adapter

    @torch.no_grad()  # nothing trainable lies below the adapter
    def residual(self, packed: Packed, plan: Plan) -> Tensor:
        """The residual stream that the adapter reads, [T, d]."""
        return self.model.blocks(self.model.embed(packed.tokens), plan, 0, self.layer + 1)

    def states(
        self, packed: Packed, attend: Attend | None = None, change: Change | None = None
    ) -> States:
        plan = self.model.plan(packed, attend)
        x, l1, l0 = self.steer(self.residual(packed, plan), change)
        return States(self.above(x, plan), l1, l0)

    def steer(self, x: Tensor, change: Change | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, d] -> x' [T, d] and the adapter's ‖v‖₁ and ‖v‖₀ [T]. change: as in states."""
        parts = []
        for rows in self.pieces(x):
            v, l1, l0 = self.adapter.steering(rows)  # [rows, d] -> [rows, F]
            v = change(v) if change else v
            parts.append((self.add(rows, v), l1, l0))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split x [T, ...] by rows, because v [T, F] would be large; on a CPU a piece of v also
        stays in the cache and needs no new memory pages.
        """
        return x.split(max(STEER_ROWS, STEER_ELEMENTS[x.device.type] // self.sae.d_sae))

    def acting(self, x: Tensor) -> Tensor:
        """v as it acts, which the audit counts and ranks: x [rows, d] -> [rows, F]."""
        return self.clamped(x, self.adapter(x))

    def clamped(self, x: Tensor, v: Tensor) -> Tensor:
        """v [rows, F], or what of it acts at x [rows, d] where the authors clamp.

        soft-threshold's v may be negative, but no feature of an SAE is. There the authors clamp
        f + v at 0: x' = decode(ReLU(f + v)) + (x - decode(f)) = x + (ReLU(f + v) - f) W_dec.
        """
        if self.adapter.activation != "soft-threshold":
            return v
        f = self.sae.encode(x)
        return F.relu(f + v) - f

    def add(self, x: Tensor, v: Tensor) -> Tensor:
        """x' = x + v W_dec, v clamped: x [rows, d], v [rows, F] -> x' [rows, d]."""
        v = self.clamped(x, v)
        v, W_dec = v.to(self.sae.W_dec.dtype), self.sae.W_dec
        # Generating on a CPU, reading all of W_dec would take longest, and most of its rows are
        # multiplied by 0: skip those. Not under autograd, which needs the gradient at v = 0.
        if len(x) < FEW and not v.is_cuda and not torch.is_grad_enabled():
            active = v.any(0).nonzero()[:, 0]
            if 4 * len(active) < len(W_dec):
                v, W_dec = v[:, active], W_dec[active]
        return x + v @ W_dec

    def above(self, x: Tensor, plan: Plan) -> Tensor:
        """Steered stream x' [T, d] -> final states after the last norm [T, d]."""
        return self.model.final_norm(self.model.blocks(x, plan, self.layer + 1))


class Unsteered(PolicyModel):
    """A model without steering, v = 0: a base model, or one whose own weights train (--full)."""

    def __init__(self, model: Gemma2):
        super().__init__()
        self.model = model

    @property
    def trained(self) -> nn.Module:
        return self.model

    def states(
        self, packed: Packed, attend: Attend | None = None, change: Change | None = None
    ) -> States:
        hidden = self.model(packed, attend)
        nothing = torch.zeros(len(hidden), device=hidden.device)
        return States(hidden, nothing, nothing)


def _check_fit(model: Gemma2, sae: JumpReLUSAE, adapter: Adapter, layer: int) -> None:
    n, d = model.config.num_hidden_layers, model.config.hidden_size
    if not 0 <= layer < n:
        raise UserError(f"--layer {layer}: {model.source or 'the model'} has blocks 0 to {n - 1}.")
    if layer_of(sae.sae_id) not in (None, layer):
        raise UserError(f"--layer {layer}: the SAE {sae.sae_id} belongs to another layer.")
    if sae.d_model != d:
        raise UserError(f"--sae {sae.source}: made for d_model {sae.d_model}, the model's is {d}.")
    has, wanted = tuple(adapter.weight.shape), (sae.d_sae, d)
    if has != wanted:
        raise UserError(f"The adapter's weight has shape {has}, the SAE calls for {wanted}.")

    recorded = adapter.identity
    # The authors' format records only the id of its SAE.
    which = "sae_sha256" if recorded.get("sae_sha256") else "sae_id"
    here = {"sae_sha256": sae.sha256, "sae_id": sae.sae_id, "layer": layer}
    for name in (which, "layer"):
        theirs, ours = recorded.get(name), here[name]
        if theirs is not None and ours is not None and theirs != ours:
            raise UserError(f"The adapter belongs to {name} {theirs}; this run has {ours}.")
