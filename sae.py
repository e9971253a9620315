"""A frozen JumpReLU sparse autoencoder (SAE): features of the residual stream and back.

    f = JumpReLU_θ(x W_enc + b_enc),  JumpReLU_θ(z) = z · 1[z > θ]      x [T, d] -> f [T, F]
    x̂ = f W_dec + b_dec                                                 f [T, F] -> x̂ [T, d]

It is read from GemmaScope's params.npz, Gemma Scope 2's params.safetensors or SAELens's folders.
"""

import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from runtime.output import replacing
from runtime.sae_ids import only_id
from runtime.sources import UserError, fetch, local, read_json, sha256
from runtime.weights import read_npz, read_weights

ARRAYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


class JumpReLUSAE(nn.Module):
    """Frozen weights W_enc [d, F], W_dec [F, d], b_enc [F], b_dec [d], threshold [F].

    source, sae_id, digest: where they were read from, and the sha256 of the file. Raises UserError
    for arrays whose shapes do not fit together.
    """

    def __init__(
        self,
        arrays: dict[str, Tensor],
        source: str = "",
        sae_id: str | None = None,
        digest: str = "",
    ):
        super().__init__()
        if arrays["W_enc"].ndim != 2:
            shape = tuple(arrays["W_enc"].shape)
            raise UserError(f"{source}: W_enc has shape {shape}, (d, F) was expected.")
        d, F = arrays["W_enc"].shape
        self.d_model, self.d_sae = d, F
        shapes = {"W_enc": (d, F), "W_dec": (F, d), "b_enc": (F,), "b_dec": (d,), "threshold": (F,)}
        for name, shape in shapes.items():
            found = tuple(arrays[name].shape)
            if found != shape:
                raise UserError(f"{source}: {name} has shape {found}, {shape} was expected.")
            self.register_buffer(name, arrays[name])
        self.source, self.sae_id, self.sha256 = source, sae_id, digest
        self.revision = None  # commit of a Hub download, set by from_pretrained
        self.file = None  # path of the weights within the source, set by from_pretrained

    def encode(self, x: Tensor) -> Tensor:
        """x [T, d] -> features f [T, F]. As in GemmaScope, b_dec is not subtracted from x."""
        z = x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc
        return z * (z > self.threshold)

    def decode(self, f: Tensor) -> Tensor:
        """f [T, F] -> x̂ [T, d]."""
        return f.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        sae_id: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> "JumpReLUSAE":
        """Load from `tiny`, a file, a folder, or a Hub repository.

        sae_id: the folder of the SAE within the source; not used for a file. Raises UserError for
        an unknown id, a pickled object, a wrong shape, or anything but a JumpReLU SAE of the
        residual stream.
        """
        if sae_id is not None and (Path(sae_id).is_absolute() or ".." in Path(sae_id).parts):
            raise UserError(f"--sae-id {sae_id}: must be a path inside the SAE repository.")
        if str(source) == "tiny":
            sae_id = sae_id or only_id(local(source, "sae"))
        prefix = f"{sae_id}/" if sae_id else ""
        names = [name for files in READERS for name in files]
        root, commit = fetch(source, "sae", [prefix + name for name in names])
        if root.is_file():
            file = root
            files = next((files for files in READERS if files[0] == root.name), ("params.npz",))
        else:
            folder = root / sae_id if sae_id else root
            files = next((files for files in READERS if (folder / files[-1]).is_file()), None)
            if files is None:
                named = f"--sae-id {sae_id}" if sae_id else "the folder"
                known = ", ".join(" + ".join(reversed(files)) for files in READERS)
                raise UserError(f"--sae {source}: {named} holds none of {known}.")
            file = folder / files[0]
        arrays = READERS[files](file)
        arrays = {name: array.to(device=device, dtype=dtype) for name, array in arrays.items()}
        sae = cls(arrays, str(source), sae_id, sha256(file))
        sae.revision, sae.file = (
            commit,
            os.path.relpath(file, root.parent if file == root else root),
        )
        return sae


def read_saelens(path: Path) -> dict[str, Tensor]:
    """The five arrays of SAELens's sae_weights.safetensors, with the cfg.json beside it.

    Raises UserError for any setting under which SAELens computes something else than this class.
    """
    cfg = _settings(path.parent / "cfg.json", architecture="jumprelu")
    for key in ("normalize_activations", "reshape_activations"):
        if cfg.get(key, "none") != "none":
            raise UserError(f"{path.parent}/cfg.json: {key} is {cfg[key]!r}, 'none' was expected.")
    arrays = _tensors(path, {name: name for name in ARRAYS})
    if cfg.get("apply_b_dec_to_input", True):  # SAELens's default: (x - b_dec) W_enc + b_enc
        arrays["b_enc"] = arrays["b_enc"] - arrays["b_dec"] @ arrays["W_enc"]
    return arrays


def read_gemmascope2(path: Path) -> dict[str, Tensor]:
    """The five arrays of Gemma Scope 2's params.safetensors, with the config.json beside it.

    Raises UserError for transcoders and for SAEs of attention or MLP outputs.
    """
    cfg = _settings(path.parent / "config.json", architecture="jump_relu")
    place = cfg.get("hf_hook_point_in")
    if not re.fullmatch(r"model\.layers\.\d+\.output", str(place)) or cfg.get("hf_hook_point_out"):
        raise UserError(f"{path.parent}/config.json: reads {place!r}, not a block's output.")
    return _tensors(path, {name: name.lower() for name in ARRAYS})


READERS = {  # (weights, settings beside them) -> the function that reads them
    ("params.npz",): partial(read_npz, names=ARRAYS),
    ("sae_weights.safetensors", "cfg.json"): read_saelens,
    ("params.safetensors", "config.json"): read_gemmascope2,
}


def _settings(path: Path, architecture: str) -> dict:
    try:
        cfg = read_json(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable ({e}).") from e
    if (found := cfg.get("architecture")) != architecture:
        raise UserError(f"{path}: architecture is {found!r}, {architecture} was expected.")
    return cfg


def _tensors(path: Path, names: dict[str, str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file under our names. names: our name -> the file's."""
    found = read_weights(path)
    missing = sorted(set(names.values()) - set(found))
    if missing:
        raise UserError(f"{path}: tensor {missing[0]} is missing.")
    return {ours: found[theirs] for ours, theirs in names.items()}


def save_gemmascope(path: Path, arrays: dict[str, Tensor]) -> None:
    """Write the five arrays as GemmaScope's params.npz, float32 and uncompressed."""
    held = {name: arrays[name].detach().float().cpu().numpy() for name in ARRAYS}
    with replacing(path) as part, open(part, "wb") as file:  # savez would rename a path
        np.savez(file, **held)
