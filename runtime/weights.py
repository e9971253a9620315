"""Read weights from safetensors files; refuse all but finite floating-point numbers."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.messages import brief
from runtime.sources import UserError

Rename = Callable[[str], str]  # a tensor's name in the file -> its name here; "" leaves it out


def read_weights(
    path: Path, rename: Rename = str, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """The tensors of a file under our names. dtype: None keeps theirs.

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
