"""FSRL: the adapter and the steered model (arXiv 2509.12934, section 3).

    v  = ReLU(x W_aᵀ + b_a)                        x [T, d] -> v [T, F], the only trained weights
    x' = decode(f + v) + (x - decode(f))           the long form
       = x + v W_dec                               the same, because decode is affine
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import Gemma2, Plan
from packed import Packed, pack
from sae import JumpReLUSAE
from simpo import sparsity
from sources import UserError, fetch

FORMAT = "fsrl-adapter-1"
ADAPTER_FILES = (  # (config, weights): ours, and the authors'
    ("adapter_config.json", "adapter.safetensors"),
    ("fsrl_adapter_config.json", "adapter_weights.safetensors"),
)
STEER_ELEMENTS = {"cuda": 1 << 28, "cpu": 1 << 21}  # of v, computed at once ...
STEER_ROWS = 256  # ... but so many positions at least: each piece adds to the whole weight gradient [F, d]
INIT_RANGE = 1e-9  # of the weight, from the authors' configuration: training starts at the unsteered model


class Adapter(nn.Module):
    """weight [F, d] and bias [F], float32 whatever the model's dtype. identity: what adapter_config.json says of it."""

    def __init__(self, d_model: int, d_sae: int, activation: str = "relu"):
        super().__init__()
        if activation != "relu":
            raise UserError(f"--adapter {activation}: only relu is known.")
        self.activation, self.identity = activation, {}
        self.weight = nn.Parameter(torch.zeros(d_sae, d_model))
        self.bias = nn.Parameter(torch.zeros(d_sae))

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.uniform_(self.weight, -INIT_RANGE, INIT_RANGE, generator=generator)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def silence(self, features: list[int]) -> None:
        """v = 0 for these features, now and under any training: a ReLU that stands at 0 passes no gradient on."""
        self.weight[features] = 0
        self.bias[features] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream x [T, d] -> steering v [T, F]."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).relu_()

    def save_pretrained(self, folder: str | Path, identity: dict) -> None:
        """Write adapter.safetensors and adapter_config.json, each whole or not at all.

        identity: base_model, base_model_revision, layer, sae, sae_id, sae_sha256.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        d_sae, d_model = self.weight.shape
        own = dict(format=FORMAT, activation=self.activation, d_model=d_model, d_sae=d_sae)
        weights = {"weight": self.weight.detach().cpu(), "bias": self.bias.detach().cpu()}
        save_file(weights, folder / "adapter.safetensors.part")
        (folder / "adapter_config.json.part").write_text(json.dumps(own | identity, indent=2) + "\n")
        for name in ADAPTER_FILES[0]:
            os.replace(folder / f"{name}.part", folder / name)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Adapter":
        """Read an adapter folder or Hub repository, ours or the authors' (see ADAPTER_FILES).

        Raises UserError for anything missing or misshapen. Which SAE it belongs to is checked by SteeredModel.
        """
        folder = fetch(source, "init-adapter", [name for names in ADAPTER_FILES for name in names]).path
        theirs = (folder / ADAPTER_FILES[1][0]).is_file()
        config_name, weights_name = ADAPTER_FILES[theirs]
        try:
            identity = json.loads((folder / config_name).read_text())
            weights = load_file(folder / weights_name)
        except (OSError, ValueError, SafetensorError) as e:
            raise UserError(f"{folder}: not an adapter folder ({config_name} + {weights_name}: {e}).") from e
        if not isinstance(identity, dict) or not theirs and identity.get("format") != FORMAT:
            raise UserError(f"{folder / config_name}: its format is not {FORMAT}.")
        if theirs:
            if identity.get("use_jump_relu"):
                raise UserError(f"{folder}: a JumpReLU adapter; only relu is known.")
            weights = {name.removeprefix("adapter_linear."): w for name, w in weights.items()}
            identity = dict(format="authors", activation="relu", sae_id=identity.get("base_sae_id"))
        shape = weights["weight"].shape if set(weights) == {"weight", "bias"} else ()
        if len(shape) != 2 or weights["bias"].shape != shape[:1]:
            found = {name: tuple(w.shape) for name, w in weights.items()}
            raise UserError(f"{folder / weights_name}: holds {found}; weight [F, d] and bias [F] were expected.")
        adapter = cls(shape[1], shape[0], identity.get("activation", "relu"))
        adapter.load_state_dict({name: w.float() for name, w in weights.items()})
        adapter.identity = identity
        return adapter


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
            raise UserError(f"--layer {layer}: {model.source or 'the model'} has blocks 0 to {n - 1}.")
        named = re.match(r"layer_(\d+)/", sae.sae_id or "")  # GemmaScope ids say which block's output they read
        if named and int(named[1]) != layer:
            raise UserError(f"--layer {layer}: the SAE {sae.sae_id} belongs to another layer.")
        if sae.d_model != d:
            raise UserError(f"--sae {sae.source}: made for d_model {sae.d_model}, the model's is {d}.")
        if tuple(adapter.weight.shape) != (sae.d_sae, d):
            has = tuple(adapter.weight.shape)
            raise UserError(f"--init-adapter: its weight has shape {has}, the SAE calls for {(sae.d_sae, d)}.")
        own, its = adapter.identity, {"sae_sha256": sae.sha256, "sae_id": sae.sae_id, "layer": layer}
        key = "sae_sha256" if own.get("sae_sha256") else "sae_id"  # the authors' format records only the id
        for name in (key, "layer"):
            if own.get(name) is not None and its[name] is not None and own[name] != its[name]:
                raise UserError(f"The adapter belongs to {name} {own[name]}; this run has {its[name]}.")
        self.model, self.sae, self.adapter, self.layer = model, sae, adapter, layer

    @torch.no_grad()  # nothing trainable lies below the adapter
    def residual(self, packed: Packed, plan: Plan) -> Tensor:
        """The residual stream that the adapter reads, [T, d]."""
        return self.model.blocks(self.model.embed(packed.tokens), plan, 0, self.layer + 1)

    def forward(self, packed: Packed, x: Tensor | None = None) -> Steered:
        """x: the residual stream below the adapter where it is known already (activations.py)."""
        plan = self.model.plan(packed)
        x = self.residual(packed, plan) if x is None else x
        x, l1, l0 = self.steer(x)
        return Steered(self.above(x, plan), l1, l0)

    def steer(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x' = x + v W_dec [T, d], and ‖v‖₁ and ‖v‖₀ [T]."""
        parts = []
        for rows in self.pieces(x):
            v = self.adapter(rows)  # [rows, d] -> [rows, F]
            parts.append((self.add(rows, v), *sparsity(v)))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, d], some rows at a time: v [T, F] is wide, and on a CPU a piece that stays in cache is worked on
        faster and needs no fresh pages.
        """
        return x.split(max(STEER_ROWS, STEER_ELEMENTS[x.device.type] // self.sae.d_sae))

    def add(self, x: Tensor, v: Tensor) -> Tensor:
        """x' = x + v W_dec for any steering: x [rows, d], v [rows, F] -> [rows, d]."""
        return x + v.to(self.sae.W_dec.dtype) @ self.sae.W_dec

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
