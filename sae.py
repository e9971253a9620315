"""JumpReLU sparse autoencoder, from GemmaScope's params.npz or SAELens's folder.

f = JumpReLU_θ(x W_enc + b_enc),  JumpReLU_θ(z) = z · 1[z > θ]      x [T, d] -> f [T, F]
x̂ = f W_dec + b_dec                                                 f [T, F] -> x̂ [T, d]
"""

import math
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from runtime.sources import UserError, fetch, list_files, read_json, sha256

ARRAYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
# Where zipfile cannot unpack something, or a damaged archive told it lies.
ZIPFILE_RAISES = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, OverflowError)


class JumpReLUSAE(nn.Module):
    """Frozen. W_enc [d, F], W_dec [F, d], b_enc [F], b_dec [d], threshold [F]."""

    def __init__(
        self,
        arrays: dict[str, Tensor],
        source: str = "",
        sae_id: str | None = None,
        digest: str = "",
    ):
        super().__init__()
        if arrays["W_enc"].ndim != 2:
            raise UserError(
                f"{source}: W_enc has shape {tuple(arrays['W_enc'].shape)}, (d, F) was expected."
            )
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

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, x: Tensor) -> Tensor:
        """x [T, d] -> features f [T, F]; b_dec is not subtracted from x, as in GemmaScope."""
        z = x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc
        return z * (z > self.threshold)

    def decode(self, f: Tensor) -> Tensor:
        """f [T, F] -> x̂ [T, d]."""
        return f.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        sae_id: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        revision: str | None = None,
    ) -> "JumpReLUSAE":
        """Load from `tiny`, a params.npz, a folder, or a Hub repository with sae_id the folder within it.

        Raises UserError for an unknown id, a pickled object, a wrong shape, or an architecture other than jumprelu.
        """
        if sae_id is not None and (Path(sae_id).is_absolute() or ".." in Path(sae_id).parts):
            raise UserError(f"--sae-id {sae_id}: must be a path inside the SAE repository.")
        prefix = f"{sae_id}/" if sae_id else ""
        wanted = [prefix + name for name in ("params.npz", "cfg.json", "sae_weights.safetensors")]
        root, commit = fetch(source, "sae", wanted, revision)
        if str(source) == "tiny" and sae_id is None:
            from tiny import SAE_ID as sae_id
        folder = root / sae_id if sae_id else root
        if root.is_file():
            file, arrays = root, read_npz(root)
        elif (folder / "params.npz").is_file():
            file, arrays = folder / "params.npz", read_npz(folder / "params.npz")
        elif (folder / "cfg.json").is_file():
            file, arrays = folder / "sae_weights.safetensors", read_saelens(folder)
        else:
            named = f"--sae-id {sae_id}" if sae_id else "the folder"
            raise UserError(
                f"--sae {source}: {named} holds neither params.npz nor cfg.json + sae_weights.safetensors."
            )
        arrays = {
            name: torch.as_tensor(array).to(device=device, dtype=dtype)
            for name, array in arrays.items()
        }
        sae = cls(arrays, str(source), sae_id, sha256(file))
        sae.revision = commit
        return sae


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The five arrays of a GemmaScope params.npz, compressed or not.

    Headers are checked before any array is read, and the arrays are read from the very members that were checked:
    nothing is unpickled, and a file that unpacks to more than 20 times its size is refused (float32 weights compress by
    about a tenth). Raises UserError.
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
                    header = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}.get(
                        version
                    )
                    if header is None:
                        raise UserError(
                            f"{path}: {name} has npy version {version}, (1, 0) or (2, 0) was expected."
                        )
                    shape, _, dtype = getattr(np.lib.format, header)(f)
                if dtype.hasobject or dtype.kind != "f":
                    raise UserError(
                        f"{path}: {name} is of type {dtype}, floating point was expected; not loaded."
                    )
                if min(shape, default=0) < 0:
                    raise UserError(f"{path}: {name} claims the shape {shape}; not loaded.")
                unpacked += math.prod(shape) * dtype.itemsize
            if unpacked > 20 * path.stat().st_size + 65_536:
                raise UserError(
                    f"{path}: would unpack to {unpacked:,} bytes, over 20 times its size; not loaded."
                )
            arrays = {}
            for name in ARRAYS:
                with archive.open(members[name]) as f:
                    arrays[name] = np.lib.format.read_array(f, allow_pickle=False).astype(
                        np.float32, copy=False
                    )
            return arrays
    except (OSError, ValueError, EOFError, KeyError, *ZIPFILE_RAISES) as e:
        why = str(e)[:200]  # zipfile quotes names, which may be anything
        raise UserError(f"{path}: not a readable npz of {', '.join(ARRAYS)} ({why}).") from e


def read_saelens(folder: Path) -> dict[str, Tensor]:
    """The same arrays from SAELens's cfg.json + sae_weights.safetensors (architecture jumprelu).

    Raises UserError for any setting under which SAELens would compute something else than this file does.
    """
    path = folder / "sae_weights.safetensors"
    try:
        cfg = read_json(folder / "cfg.json")
        if cfg.get("architecture") != "jumprelu":
            raise UserError(
                f"{folder}/cfg.json: architecture is {cfg.get('architecture')!r}, jumprelu was expected."
            )
        for key in ("normalize_activations", "reshape_activations"):
            if cfg.get(key, "none") != "none":
                raise UserError(
                    f"{folder}/cfg.json: {key} is {cfg[key]!r}, only 'none' is supported."
                )
        with safe_open(path, framework="pt", device="cpu") as f:
            arrays = {name: f.get_tensor(name) for name in ARRAYS}
        if cfg.get(
            "apply_b_dec_to_input", True
        ):  # SAELens's default: (x - b_dec) W_enc; fold it into b_enc
            arrays["b_enc"] = arrays["b_enc"] - arrays["b_dec"] @ arrays["W_enc"]
        return arrays
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"{path}: not a readable SAELens SAE ({e}).") from e


def save_gemmascope(path: Path, arrays: dict[str, Tensor]) -> None:
    """Write the five arrays as GemmaScope's params.npz, float32 and uncompressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: arrays[name].detach().float().cpu().numpy() for name in ARRAYS})


PAPER_REPO = "google/gemma-scope-2b-pt-res"
PAPER_L0 = {6: 17, 12: 21, 18: 21, 24: 19}  # average L0 of the paper's SAE at each layer, width 65k


def default_id(repo: str, layer: int, revision: str | None = None) -> str | None:
    """The SAE of a layer when none was named: the paper's choice; of a local folder with GemmaScope's layer_N/ folders,
    that layer's SAE of lowest average L0; None for another local path or `tiny`.
    """
    local = Path(repo).expanduser()
    if repo == "tiny" or local.exists():
        folders = (
            []
            if repo == "tiny"
            else [p.parent for p in local.glob(f"layer_{layer}/*/average_l0_*/params.npz")]
        )
        by_l0 = {
            folder: int(m[1]) for folder in folders if (m := re.search(r"_(\d+)$", folder.name))
        }
        return min(by_l0, key=by_l0.get).relative_to(local).as_posix() if by_l0 else None
    if repo == PAPER_REPO and layer in PAPER_L0:  # spares a question to the Hub
        return f"layer_{layer}/width_65k/average_l0_{PAPER_L0[layer]}"
    return lowest_l0_id(repo, layer, revision=revision)


def lowest_l0_id(repo: str, layer: int, width: str = "65k", revision: str | None = None) -> str:
    """The paper's choice at a layer: of the repository's SAEs of this width, the one of lowest average L0."""
    pattern = re.compile(rf"layer_{layer}/width_{width}/average_l0_(\d+)/params\.npz")
    found = [m for m in map(pattern.fullmatch, list_files(repo, "sae", revision)) if m]
    if not found:
        raise UserError(
            f"--layer {layer}: {repo} holds no layer_{layer}/width_{width}; give --sae-id."
        )
    return str(Path(min(found, key=lambda m: int(m[1]))[0]).parent)
