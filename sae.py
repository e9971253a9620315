"""A frozen JumpReLU sparse autoencoder (SAE): features of the residual stream and back.

    f = JumpReLU_θ(x W_enc + b_enc),  JumpReLU_θ(z) = z · 1[z > θ]      x [T, d] -> f [T, F]
    x̂ = f W_dec + b_dec                                                 f [T, F] -> x̂ [T, d]

It is read from GemmaScope's params.npz, Gemma Scope 2's params.safetensors or SAELens's folders.
"""

import math
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from runtime.messages import brief
from runtime.output import replacing
from runtime.sources import UserError, fetch, list_files, local, read_json, sha256, split_revision
from runtime.weights import check_weights, read_weights

ARRAYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What zipfile raises on unsupported or damaged archives.
ZIPFILE_RAISES = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, OverflowError)


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
        shapes = {"W_enc": (d, F), "W_dec": (F, d), "b_enc": (F,), "b_dec": (d,), "threshold": (F,)}
        for name, shape in shapes.items():
            if tuple(arrays[name].shape) != shape:
                raise UserError(
                    f"{source}: {name} has shape {tuple(arrays[name].shape)}, {shape} was expected."
                )
            self.register_buffer(name, arrays[name])
        self.source, self.sae_id, self.sha256 = source, sae_id, digest
        self.revision = None  # commit of a Hub download, set by from_pretrained
        self.file = None  # path of the weights within the source, set by from_pretrained

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

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

        sae_id: the folder of the SAE within the source. Raises UserError for an unknown id, a
        pickled object, a wrong shape, or anything but a JumpReLU SAE of the residual stream.
        """
        if sae_id is not None and (Path(sae_id).is_absolute() or ".." in Path(sae_id).parts):
            raise UserError(f"--sae-id {sae_id}: must be a path inside the SAE repository.")
        if str(source) == "tiny":
            sae_id = sae_id or only_id(local(source, "sae"))
        prefix = f"{sae_id}/" if sae_id else ""
        names = [name for files in READERS for name in files]
        root, commit = fetch(source, "sae", [prefix + name for name in names])
        folder = root / sae_id if sae_id else root
        if root.is_file():
            file, arrays = root, read_npz(root)
        else:
            there = (files for files in READERS if (folder / files[-1]).is_file())
            files = next(there, None)
            if files is None:
                named = f"--sae-id {sae_id}" if sae_id else "the folder"
                known = ", ".join(" + ".join(reversed(files)) for files in READERS)
                raise UserError(f"--sae {source}: {named} holds none of {known}.")
            file = folder / files[0]
            arrays = READERS[files](file)
        arrays = {name: array.to(device=device, dtype=dtype) for name, array in arrays.items()}
        sae = cls(arrays, str(source), sae_id, sha256(file))
        sae.revision, sae.file = commit, os.path.relpath(file, root)
        return sae


def read_npz(path: Path) -> dict[str, Tensor]:
    """The five arrays of a GemmaScope params.npz, compressed or not.

    All headers are checked before an array is read: nothing is unpickled, and a file that would
    unpack to more than 20 times its size is refused (compression saves about a tenth of float32
    weights). Raises UserError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(m.filename).stem: m for m in archive.infolist()}
            missing = [name for name in ARRAYS if name not in members]
            if missing:
                raise UserError(f"{path}: array {missing[0]} is missing.")
            unpacked = 0
            for name in ARRAYS:
                with archive.open(members[name]) as f:
                    version = np.lib.format.read_magic(f)
                    if version not in NPY_HEADERS:
                        found = f"npy version {version}, not 1.0 or 2.0"
                        raise UserError(f"{path}: {name} has {found}.")
                    shape, _, dtype = NPY_HEADERS[version](f)
                if dtype.hasobject or dtype.kind != "f":
                    kind = f"is of type {dtype}, not floating point"
                    raise UserError(f"{path}: {name} {kind}; not loaded.")
                if min(shape, default=0) < 0:
                    raise UserError(f"{path}: {name} claims the shape {shape}; not loaded.")
                unpacked += math.prod(shape) * dtype.itemsize
            if unpacked > 20 * path.stat().st_size + 65_536:
                size = f"{unpacked:,} bytes, 20 times its size"
                raise UserError(f"{path}: would unpack to {size}; not loaded.")
            arrays = {}
            for name in ARRAYS:
                # Read the members checked above: an archive may hold two under one name.
                with archive.open(members[name]) as f:
                    array = np.lib.format.read_array(f, allow_pickle=False)
                arrays[name] = torch.from_numpy(array.astype(np.float32, copy=False))
                check_weights(path, name, arrays[name])
            return arrays
    except (OSError, ValueError, EOFError, KeyError, *ZIPFILE_RAISES) as e:
        raise UserError(f"{path}: not a readable npz of {', '.join(ARRAYS)} ({brief(e)}).") from e


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
    ("params.npz",): read_npz,
    ("sae_weights.safetensors", "cfg.json"): read_saelens,
    ("params.safetensors", "config.json"): read_gemmascope2,
}


def _settings(path: Path, architecture: str) -> dict:
    try:
        cfg = read_json(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable ({e}).") from e
    if cfg.get("architecture") != architecture:
        found = cfg.get("architecture")
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


# --- which SAE, where none is named ---------------------------------------------------------------

PAPER_REPO = "google/gemma-scope-2b-pt-res"
PAPER_L0 = {6: 17, 12: 21, 18: 21, 24: 19}  # layer -> average L0 of the paper's SAE, of width 65k
L0_NAMES = {"small": 20, "medium": 60, "big": 150}  # Gemma Scope 2's names -> approximate L0


def default_source(model: str) -> str:
    """The Hub repository of a published model's SAEs. Raises UserError where none is known."""
    name = split_revision(str(model))[0]
    if m := re.fullmatch(r"google/gemma-2-(2b|9b|27b)(-it)?", name):
        return f"google/gemma-scope-{m[1]}-pt-res"
    if m := re.fullmatch(r"google/gemma-3-(270m|1b|4b|12b|27b)(-it|-pt)?", name):
        return f"google/gemma-scope-2-{m[1]}{m[2] or '-pt'}"
    raise UserError(f"--model {model}: no SAE is published under its name; give --sae.")


def default_id(source: str | Path, layer: int, width: str | None = None) -> str | None:
    """The id of a layer's SAE of lowest average L0, which is the one that the paper uses.

    width: as in the names of the folders. None: 65k; in a local folder without a 65k SAE, any
    width. Returns None for a local path without GemmaScope's names. Raises UserError where the Hub
    repository holds none.
    """
    folder = local(source, "sae")
    if folder is not None:
        files = [path.relative_to(folder).as_posix() for path in folder.glob("**/params.*")]
        found = lowest_l0(files, layer, width or "65k")
        return found or (None if width else lowest_l0(files, layer, None))
    width = width or "65k"
    if source == PAPER_REPO and width == "65k" and layer in PAPER_L0:  # no need to ask the Hub
        return f"layer_{layer}/width_65k/average_l0_{PAPER_L0[layer]}"
    found = lowest_l0(list_files(source, "sae"), layer, width)
    if found is None:
        raise UserError(f"--layer {layer}: {source} holds no SAE of width {width}; give --sae-id.")
    return found


SAE_FILE = re.compile(  # of GemmaScope or Gemma Scope 2; experiments/train_sae writes L0 as digits
    r"(?P<id>layer_(?P<layer>\d+)/width_(?P<width>\w+)/average_l0_(?P<l0>\d+))/params\.npz"
    r"|(?P<id2>resid_post(_all)?/layer_(?P<layer2>\d+)_width_(?P<width2>[^_]+)"
    r"_l0_(?P<l02>small|medium|big|\d+))/params\.safetensors"
)


def lowest_l0(files: list[str], layer: int, width: str | None) -> str | None:
    """The folder of a layer's SAE of lowest L0 among a repository's files; None without any."""
    found = []
    for m in filter(None, map(SAE_FILE.fullmatch, files)):
        scope2 = m["id2"] is not None
        its_layer, its_width = (m["layer2"], m["width2"]) if scope2 else (m["layer"], m["width"])
        if int(its_layer) == layer and width in (None, its_width):
            l0 = m["l02"] if scope2 else m["l0"]
            l0 = L0_NAMES[l0] if l0 in L0_NAMES else int(l0)
            found.append((l0, m["id2"] or m["id"]))
    return min(found)[1] if found else None


def layer_of(sae_id: str | None) -> int | None:
    """The block whose output a published SAE reads, by its id; None where the id does not say."""
    m = re.match(r"(?:resid_post(?:_all)?/)?layer_(\d+)[/_]", sae_id or "")
    return int(m[1]) if m else None


def only_id(folder: Path) -> str | None:
    """The id of the SAE in a folder that holds exactly one; otherwise None."""
    found = [path.parent for path in folder.glob("**/params.*")]
    return found[0].relative_to(folder).as_posix() if len(found) == 1 else None
