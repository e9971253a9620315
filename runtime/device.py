"""Where a run computes, and in which dtype its matrix products are."""

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
    def kind(self) -> str:
        return self.name.split(":")[0]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager:
        """bfloat16 products of float32 master weights. Entered once a step, each weight is cast
        once a step.
        """
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.kind, torch.bfloat16)
        return nullcontext()


def resolve_device(device: str = "auto", dtype: str = "auto", ranks: Ranks = ALONE) -> Device:
    """What --device and --dtype mean on this machine; of several processes, each takes the GPU of
    its own.

    auto is CUDA where present, with bfloat16, else the CPU, with float32. Raises UserError when
    CUDA is asked for and absent.
    """
    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.world > 1 and name.startswith("cuda:"):
        raise UserError(
            f"--device {name}: under torchrun each process takes its own GPU; cuda was expected."
        )
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
        print(
            "--dtype bfloat16: this processor would only emulate it, far slower; float32 is used.",
            file=sys.stderr,
        )
    return Device(name, getattr(torch, used))


def dtype_on(device: str, dtype: str) -> str:
    """What --dtype means there. A processor without instructions for products of bfloat16 stays
    with float32, because a step took 30 times as long where they were emulated.
    """
    if device != "cpu":
        return "bfloat16" if dtype == "auto" else dtype
    has = torch.cpu.get_capabilities()
    fast = any(map(has.get, BFLOAT16_PRODUCTS))
    return "bfloat16" if dtype == "bfloat16" and fast else "float32"


def peak_memory(device: str) -> int:
    """Bytes: of CUDA memory on a GPU, of resident memory of the whole process on a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
