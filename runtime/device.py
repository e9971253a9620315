"""Choose the device and the dtype of matrix products."""

import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from runtime.ranks import ALONE, Ranks
from runtime.sources import UserError

DTYPES = ("auto", "float32", "bfloat16")
# Instructions for products of bfloat16 on x86 and ARM, as torch.cpu.get_capabilities names them.
BFLOAT16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")


class Device(NamedTuple):
    name: str  # cpu, cuda or cuda:N
    dtype: torch.dtype  # of frozen weights and of matrix products: float32 or bfloat16

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager:
        """A context in which products are bfloat16 if dtype is. It caches the weights it casts, so
        that entering it once a step casts each weight once a step.
        """
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.name.split(":")[0], torch.bfloat16)
        return nullcontext()


def resolve_device(device: str = "auto", dtype: str = "auto", ranks: Ranks = ALONE) -> Device:
    """The Device for --device and --dtype on this machine.

    auto is CUDA with bfloat16 where there is a GPU, else the CPU with float32. Of several processes
    on one host, each takes its own GPU. Raises UserError for a device that this machine lacks.
    """
    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.world > 1 and name.startswith("cuda:"):
        why = "under torchrun each process takes its own GPU; cuda was expected"
        raise UserError(f"--device {name}: {why}.")
    if ranks.world > 1 and name == "cuda":
        name = f"cuda:{ranks.local}"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and (kind == "cpu" or not index.isdigit())):
        raise UserError(f"--device {name}: auto, cpu, cuda or cuda:N was expected.")
    if kind == "cuda" and not int(index or 0) < torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device {name}: this machine offers {count} CUDA devices to torch.")

    used = dtype_on(name, dtype)
    if dtype == "bfloat16" != used and ranks.first:
        why = "this processor would only emulate it, far slower; float32 is used"
        print(f"--dtype bfloat16: {why}.", file=sys.stderr)
    return Device(name, getattr(torch, used))


def dtype_on(device: str, dtype: str) -> str:
    """The dtype for --dtype on a device. A CPU without instructions for bfloat16 products gets
    float32, because emulating them made a step take 30 times as long.
    """
    if device != "cpu":
        return "bfloat16" if dtype == "auto" else dtype
    if dtype != "bfloat16":
        return "float32"
    has = torch.cpu.get_capabilities()
    return "bfloat16" if any(map(has.get, BFLOAT16_PRODUCTS)) else "float32"


def peak_memory(device: str) -> int:
    """Most bytes used so far: of CUDA memory on a GPU, else of the process's resident memory."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
