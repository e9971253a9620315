"""Read weights from safetensors and npz files; refuse all but finite floating-point numbers."""

import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.messages import brief
from runtime.sources import UserError, read_json

Rename = Callable[[str], str]  # a tensor's name in the file -> its name here; "" leaves it out
# What zipfile and numpy raise on damaged archives.
DAMAGED = (OSError, ValueError, EOFError, KeyError, RuntimeError, OverflowError)
DAMAGED += (zipfile.BadZipFile, zlib.error, struct.error)


def read_weights(
    path: Path, rename: Rename = str, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """The tensors of a safetensors file under our names. dtype: None keeps theirs.

    Raises UserError for a file that is missing or truncated, and for a tensor of integers or with
    values that are not finite, naming it.
    """
    if not path.is_file():
        raise UserError(f"{path}: this safetensors file is missing.")
    found = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for theirs in file.keys():  # noqa: SIM118 (not a dict)
                if ours := rename(theirs):
                    tensor = file.get_tensor(theirs)
                    check_weights(path, theirs, tensor)
                    found[ours] = tensor.to(device=device, dtype=dtype)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a whole safetensors file ({brief(e)}).") from e
    return found


def read_sharded(
    folder: Path, rename: Rename, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """The tensors of a model's folder: of model.safetensors, or of the shards that its index names.

    Shards without a tensor that is wanted need not be there. Raises UserError as read_weights, and
    for an index that cannot be read.
    """
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weights = read_json(index)["weight_map"].items()
            names = sorted({shard for name, shard in weights if rename(name)})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{index}: not an index of safetensors shards ({e!r}).") from e
    state = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: shard name {name!r} leaves the folder.")
        state.update(read_weights(folder / name, rename, dtype, device))
    return state


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The named arrays of an npz file, compressed or not, as float32.

    All headers are checked before an array is read: nothing is unpickled, and a file that would
    unpack to more than 20 times its size is refused (compression saves about a tenth of float32
    weights). Raises UserError.
    """
    found, unpacked = {}, 0
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(m.filename).stem: m for m in archive.infolist()}
            for name in names:
                if name not in members:
                    raise UserError(f"{path}: array {name} is missing.")
                with archive.open(members[name]) as f:
                    if np.lib.format.read_magic(f) != (1, 0):
                        raise ValueError(f"{name} is not of npy version 1.0")
                    shape, _, dtype = np.lib.format.read_array_header_1_0(f)
                if dtype.kind != "f":
                    raise UserError(f"{path}: {name} is of type {dtype}, not floating point.")
                if min(shape, default=0) < 0:
                    raise ValueError(f"{name} claims the shape {shape}")
                unpacked += math.prod(shape) * dtype.itemsize
            if unpacked > 20 * path.stat().st_size + 65_536:
                size = f"{unpacked:,} bytes, 20 times its size"
                raise UserError(f"{path}: would unpack to {size}; not loaded.")
            for name in names:
                # Read the members checked above: an archive may hold two under one name.
                with archive.open(members[name]) as f:
                    array = np.lib.format.read_array(f, allow_pickle=False)
                found[name] = torch.from_numpy(array.astype(np.float32, copy=False))
    except DAMAGED as e:
        raise UserError(f"{path}: not a readable npz of {', '.join(names)} ({brief(e)}).") from e
    for name, tensor in found.items():
        check_weights(path, name, tensor)
    return found


def check_weights(path: Path, name: str, tensor: Tensor) -> None:
    """Raises UserError for integers and for values that are not finite, naming the first."""
    name = brief(name)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{path}: tensor {name} holds {kind}; a float type was expected.")
    if tensor.numel() == 0:
        return
    # aminmax needs no memory, and returns nan if there is one. float() makes a float64 infinite
    # that is too large for float32.
    extremes = torch.stack(tensor.aminmax()).float()
    if not extremes.isfinite().all():
        first = (~tensor.float().isfinite()).nonzero()[0].tolist()
        value = tensor[tuple(first)].item()
        raise UserError(f"{path}: tensor {name} is {value} at {first}; weights must be finite.")


def check_shapes(folder: Path, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raises UserError where names or shapes are not those of wanted, naming the first tensor."""
    for name in sorted(wanted.keys() | state.keys()):
        ours, theirs = (tuple(d[name].shape) if name in d else "nothing" for d in (wanted, state))
        if ours != theirs:
            found = f"config.json asks for {ours}, the file has {theirs}"
            raise UserError(f"{folder}: tensor {name}: {found}.")
