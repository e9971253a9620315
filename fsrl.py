"""FSRL: the adapter and the steered model (arXiv 2509.12934, section 3).

    v  = ReLU(x W_aᵀ + b_a)                        x [T, d] -> v [T, F], the only trained weights
    x' = decode(f + v) + (x - decode(f))           the long form
       = x + v W_dec                               the same, because decode is affine

Two variants of v, each with a threshold per feature that trains too:

    jumprelu         v = z 1[z > θ],  z = ReLU(x W_aᵀ + b_a)                Appendix C
    soft-threshold   v = sign(z) ReLU(|z| - τ),  z = x W_aᵀ + b_a           signed, the authors' later work
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from generation.cache import Cache
from model import FEW, Gemma2, Plan, linear
from packed import Packed, pack
from runtime.sources import UserError, fetch, read_json
from sae import JumpReLUSAE
from simpo import Sparsity, sparsity

FORMAT = "fsrl-adapter-1"
ADAPTER_FILES = (  # (config, weights): ours, and the authors'
    ("adapter_config.json", "adapter.safetensors"),
    ("fsrl_adapter_config.json", "adapter_weights.safetensors"),
)
STEER_ELEMENTS = {"cuda": 1 << 28, "cpu": 1 << 21}  # of v, computed at once ...
STEER_ROWS = (
    256  # ... but so many positions at least: each piece adds to the whole weight gradient [F, d]
)
INIT_RANGE = (
    1e-9  # of the weight, from the authors' configuration: training starts at the unsteered model
)
ACTIVATIONS = ("relu", "jumprelu", "soft-threshold")
PARAMETRISATIONS = ("direct", "log")  # of the thresholds
BANDWIDTH = 0.05  # ε of the straight-through estimator; the paper's is 0.001, and its thresholds hardly learn


class Adapter(nn.Module):
    """weight [F, d], bias [F] and, except for relu, threshold [F]: float32 whatever the model's dtype.

    parametrisation: raw_threshold, the trained parameter, is the threshold itself ("direct") or its logarithm ("log",
    the paper's). bandwidth: ε of jumprelu's straight-through estimator. Both matter to training alone, not to v.
    identity: what adapter_config.json says of it.
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        activation: str = "relu",
        parametrisation: str = "direct",
        bandwidth: float = BANDWIDTH,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(
                f"--adapter {activation}: one of {', '.join(ACTIVATIONS)} was expected."
            )
        self.activation, self.parametrisation, self.bandwidth = (
            activation,
            parametrisation,
            bandwidth,
        )
        self.identity = {}
        self.weight = nn.Parameter(torch.zeros(d_sae, d_model))
        self.bias = nn.Parameter(torch.zeros(d_sae))
        # float32 like the rest: what Adam adds to a threshold near 1 would be rounded away in bfloat16.
        self.raw_threshold = nn.Parameter(torch.zeros(d_sae)) if activation != "relu" else None

    def init_weights(self, generator: torch.Generator, threshold: float = 0.0) -> None:
        nn.init.uniform_(self.weight, -INIT_RANGE, INIT_RANGE, generator=generator)
        # A jumprelu's z starts at its threshold, as the authors' does: below it nothing would pass, nor any gradient.
        nn.init.constant_(self.bias, threshold if self.activation == "jumprelu" else 0.0)
        if self.raw_threshold is not None:
            self.set_threshold(torch.full_like(self.bias, threshold))

    @property
    def threshold(self) -> Tensor:
        """θ of jumprelu, τ of soft-threshold: [F], not negative."""
        return self.raw_threshold.exp() if self.parametrisation == "log" else self.raw_threshold

    @torch.no_grad()
    def set_threshold(self, threshold: Tensor) -> None:
        """Raises UserError for what cannot be a threshold [F] in this parametrisation."""
        value = threshold.log() if self.parametrisation == "log" else threshold
        if not (value.isfinite() & (threshold >= 0)).all():
            least = "positive" if self.parametrisation == "log" else "not negative"
            raise UserError(
                f"The adapter's thresholds must be finite and {least} (--threshold-init, --init-adapter)."
            )
        self.raw_threshold.copy_(value)

    @torch.no_grad()
    def project(self) -> None:
        """After an optimiser step: a threshold that went below 0 stands at 0."""
        if self.raw_threshold is not None and self.parametrisation == "direct":
            self.raw_threshold.clamp_(min=0)

    @torch.no_grad()
    def silence(self, features: list[int]) -> None:
        """v = 0 for these features, now and under any training: a ReLU that stands at 0 passes no gradient on."""
        self.weight[features] = 0
        self.bias[features] = 0

    def forward(self, x: Tensor, norms: bool = False) -> Tensor | tuple[Tensor, Sparsity]:
        """Residual stream x [T, d] -> steering v [T, F]; with norms, (v, its norms [T]).

        The norms are made here because jumprelu's ‖v‖₀, alone among the three, carries a gradient: to θ, from z.
        """
        x = x.to(self.weight.dtype)
        few = len(x) < FEW  # [T, d] -> [T, F]
        if self.activation == "jumprelu":
            # The bias is added in float32: rounded to bfloat16 it may stand below the threshold it starts at, for good.
            product = linear(x, self.weight) if few else F.linear(x, self.weight)
            z = product + self.bias
        else:
            z = (
                linear(x, self.weight).add_(self.bias)
                if few
                else F.linear(x, self.weight, self.bias)
            )
        l0 = None
        if self.activation == "relu":
            v = z.relu_()
        elif self.activation == "jumprelu":
            v, l0 = _JumpReLU.apply(z.relu_(), self.threshold, self.bandwidth)
            v = v.to(product.dtype)
        else:
            v = z.sign() * F.relu(z.abs() - self.threshold)
        if not norms:
            return v
        sizes = sparsity(v.abs() if self.activation == "soft-threshold" else v)
        return v, sizes if l0 is None else sizes._replace(l0=l0)

    def save_pretrained(self, folder: str | Path, identity: dict) -> None:
        """Write adapter.safetensors and adapter_config.json, each whole or not at all.

        identity: base_model, base_model_revision, layer, sae, sae_id, sae_sha256.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        d_sae, d_model = self.weight.shape
        own = dict(format=FORMAT, activation=self.activation, d_model=d_model, d_sae=d_sae)
        weights = {"weight": self.weight, "bias": self.bias}
        if self.raw_threshold is not None:
            weights["threshold"] = self.threshold
        weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
        save_file(weights, folder / "adapter.safetensors.part")
        (folder / "adapter_config.json.part").write_text(
            json.dumps(own | identity, indent=2) + "\n"
        )
        for name in ADAPTER_FILES[0]:
            os.replace(folder / f"{name}.part", folder / name)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, parametrisation: str = "direct", bandwidth: float = BANDWIDTH
    ) -> "Adapter":
        """Read an adapter folder or Hub repository, ours or the authors' (see ADAPTER_FILES).

        Files hold the thresholds themselves (the authors' jumprelu: their logarithm); how they train on is said here.
        Raises UserError for anything missing or misshapen. Which SAE it belongs to is checked by SteeredModel.
        """
        folder = fetch(
            source, "init-adapter", [name for names in ADAPTER_FILES for name in names]
        ).path
        folder = folder / "adapter" if (folder / "adapter").is_dir() else folder  # of a run
        theirs = (folder / ADAPTER_FILES[1][0]).is_file()
        config_name, weights_name = ADAPTER_FILES[theirs]
        try:
            identity = read_json(folder / config_name)
            weights = load_file(folder / weights_name)
        except (OSError, ValueError, SafetensorError) as e:
            raise UserError(
                f"{folder}: not an adapter folder ({config_name} + {weights_name}: {e})."
            ) from e
        if not theirs and identity.get("format") != FORMAT:
            raise UserError(f"{folder / config_name}: its format is not {FORMAT}.")
        if theirs:
            weights, activation = _from_authors(weights, identity)
            identity = dict(
                format="authors", activation=activation, sae_id=identity.get("base_sae_id")
            )
        activation = identity.get("activation", "relu")
        vectors = ("bias",) if activation == "relu" else ("bias", "threshold")
        shape = weights["weight"].shape if set(weights) == {"weight", *vectors} else ()
        if len(shape) != 2 or any(weights[name].shape != shape[:1] for name in vectors):
            found = {name: tuple(w.shape) for name, w in weights.items()}
            wanted = "weight [F, d], " + ", ".join(f"{name} [F]" for name in vectors)
            raise UserError(
                f"{folder / weights_name}: holds {found}; a {activation} adapter has {wanted}."
            )
        adapter = cls(shape[1], shape[0], activation, parametrisation, bandwidth)
        with torch.no_grad():
            adapter.weight.copy_(weights["weight"])
            adapter.bias.copy_(weights["bias"])
        if "threshold" in weights:
            adapter.set_threshold(weights["threshold"].float())
        adapter.identity = identity
        return adapter


def _from_authors(weights: dict[str, Tensor], config: dict) -> tuple[dict[str, Tensor], str]:
    """Their tensors under our names, and the activation, which earlier files say as use_jump_relu."""
    named = config.get("activation_type") or (
        "jump_relu" if config.get("use_jump_relu") else "relu"
    )
    activation = {"jump_relu": "jumprelu", "soft_threshold": "soft-threshold"}.get(named, named)
    weights = {name.removeprefix("adapter_linear."): w for name, w in weights.items()}
    if "log_threshold" in weights:
        weights["threshold"] = weights.pop("log_threshold").float().exp()
    if "soft_threshold" in weights:
        weights["threshold"] = weights.pop("soft_threshold")
    return weights, activation


class _JumpReLU(torch.autograd.Function):
    """z [T, F] not negative, θ [F], ε -> v = z 1[z > θ] [T, F] and ‖v‖₀ [T], both in one pass.

        ∂v/∂z = 1[z > θ],   ∂v/∂θ = -(θ/ε) K((z - θ)/ε),   ∂‖v‖₀/∂θ = -(1/ε) Σ K((z - θ)/ε),   K(u) = 1[|u| < 1/2]

    The straight-through estimator of arXiv 2407.14435 (equations 11 and 12): what a mean over many z would have for its
    derivative, with their density at θ estimated by a rectangle of width ε. As there, it reaches θ alone, not z.
    """

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        on = z > threshold  # a bfloat16 z is compared in float32
        return z * on, on.sum(-1, dtype=threshold.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_v, grad_l0):
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = ((threshold * grad_v + grad_l0[:, None]) * near).sum(0) / -ctx.bandwidth
        return grad_v * (z > threshold), grad_threshold, None


Change = Callable[[Tensor], Tensor]  # of steering, v [rows, F] -> [rows, F]


class Steered(NamedTuple):
    hidden: Tensor  # [T, d], final states after the last norm
    l1: Tensor  # [T], ‖v‖₁ of the steering at each position
    l0: Tensor  # [T], how many features were steered there


class SteeredModel(nn.Module):
    """A frozen model whose residual stream, after block `layer`, has v W_dec added to it.

    Raises UserError when layer, shapes, or the SAE recorded in the adapter do not fit.
    """

    def __init__(self, model: Gemma2, sae: JumpReLUSAE, adapter: Adapter, layer: int):
        super().__init__()
        n, d = model.config.num_hidden_layers, model.config.hidden_size
        if not 0 <= layer < n:
            raise UserError(
                f"--layer {layer}: {model.source or 'the model'} has blocks 0 to {n - 1}."
            )
        named = re.match(
            r"layer_(\d+)/", sae.sae_id or ""
        )  # GemmaScope ids say which block's output they read
        if named and int(named[1]) != layer:
            raise UserError(f"--layer {layer}: the SAE {sae.sae_id} belongs to another layer.")
        if sae.d_model != d:
            raise UserError(
                f"--sae {sae.source}: made for d_model {sae.d_model}, the model's is {d}."
            )
        if tuple(adapter.weight.shape) != (sae.d_sae, d):
            has = tuple(adapter.weight.shape)
            raise UserError(
                f"--init-adapter: its weight has shape {has}, the SAE calls for {(sae.d_sae, d)}."
            )
        own, its = (
            adapter.identity,
            {"sae_sha256": sae.sha256, "sae_id": sae.sae_id, "layer": layer},
        )
        key = (
            "sae_sha256" if own.get("sae_sha256") else "sae_id"
        )  # the authors' format records only the id
        for name in (key, "layer"):
            if own.get(name) is not None and its[name] is not None and own[name] != its[name]:
                raise UserError(
                    f"The adapter belongs to {name} {own[name]}; this run has {its[name]}."
                )
        self.model, self.sae, self.adapter, self.layer = model, sae, adapter, layer

    @torch.no_grad()  # nothing trainable lies below the adapter
    def residual(self, packed: Packed, plan: Plan) -> Tensor:
        """The residual stream that the adapter reads, [T, d]."""
        return self.model.blocks(self.model.embed(packed.tokens), plan, 0, self.layer + 1)

    def forward(
        self,
        packed: Packed,
        x: Tensor | None = None,
        cache: Cache | None = None,
        change: Change | None = None,
    ) -> Steered:
        """x: the residual stream below the adapter, where it is known already (activations.py). cache: keys and values
        of earlier tokens, in generation. change: see steer.
        """
        plan = self.model.plan(packed, cache)
        x = self.residual(packed, plan) if x is None else x
        x, l1, l0 = self.steer(x, change)
        return Steered(self.above(x, plan), l1, l0)

    def steer(self, x: Tensor, change: Change | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x' [T, d], and ‖v‖₁ and ‖v‖₀ [T]. change: what becomes of v before it is added, piece after piece."""
        parts = []
        for rows in self.pieces(x):
            v, norms = self.adapter(rows, norms=True)  # [rows, d] -> [rows, F]
            v = change(v) if change else v
            parts.append((self.add(rows, v), *norms))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, d], some rows at a time: v [T, F] is wide, and on a CPU a piece that stays in cache is worked on
        faster and needs no fresh pages.
        """
        return x.split(max(STEER_ROWS, STEER_ELEMENTS[x.device.type] // self.sae.d_sae))

    def add(self, x: Tensor, v: Tensor) -> Tensor:
        """x' = x + v W_dec for any steering: x [rows, d], v [rows, F] -> [rows, d].

        A soft-threshold's v may be negative, and there f + v is clamped at 0, since no feature is ever below: then
        x' = decode(ReLU(f + v)) + (x - decode(f)) = x + (ReLU(f + v) - f) W_dec, which needs f.
        """
        if self.adapter.activation == "soft-threshold":
            f = self.sae.encode(x)
            v = F.relu(f + v) - f
        v, W_dec = v.to(self.sae.W_dec.dtype), self.sae.W_dec
        # A step of generation waits for W_dec, most of whose rows are multiplied by 0. Not so under autograd: the
        # gradient at v = 0 counts.
        if len(x) < FEW and not v.is_cuda and not torch.is_grad_enabled():
            active = v.any(0).nonzero()[:, 0]
            if 4 * len(active) < len(W_dec):
                v, W_dec = v[:, active], W_dec[active]
        return x + v @ W_dec

    def above(self, x: Tensor, plan: Plan) -> Tensor:
        """From the residual stream above the adapter, x' [T, d], to final states after the last norm, [T, d]."""
        return self.model.final_norm(self.model.blocks(x, plan, self.layer + 1))

    def hidden(self, tokens: Tensor) -> Tensor:
        """Steered final states of one sequence, after the last norm: int64 [T] -> [T, d]."""
        return self(pack([(tokens.tolist(), [])]).to(self.model.device)).hidden

    def head(self, x: Tensor) -> Tensor:
        return self.model.head(x)

    def logits(self, tokens: Tensor) -> Tensor:
        """Steered logits of one sequence: int64 [T] -> float32 [T, V]."""
        return self.head(self.hidden(tokens))


def steer_long_form(x: Tensor, sae: JumpReLUSAE, v: Tensor) -> Tensor:
    """x' as the paper writes it, SAE error term and all: for tests and analysis. x, x' [T, d], v [T, F]."""
    f = sae.encode(x)
    return sae.decode(f + v) + (x - sae.decode(f))
