"""One process or many: which one this is, what they tell each other, and a model spread over them.

The model's code knows nothing of this: DistributedDataParallel and FSDP2 are put around it here.
torch's distributed modules are imported in the functions that need them, because the import takes a
second and a run of one process needs none of them.
"""

import gc
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.messages import first_line
from runtime.sources import UserError

T = TypeVar("T")


class Ranks(NamedTuple):
    """Which process this is. Rank 0 alone writes and prints."""

    rank: int = 0
    world: int = 1  # how many processes
    local: int = 0  # rank on this host: the index of its GPU
    restarts: int = 0  # how often torchrun has started all of them again

    @property
    def first(self) -> bool:
        return self.rank == 0


ALONE = Ranks()
TIME_TO_PRINT = 2  # seconds that others wait before they end: torchrun kills all when one ends


def ranks_here() -> Ranks:
    """The ranks by torchrun's environment variables; ALONE without them. Raises UserError."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
    try:
        values = [os.environ.get(name, alone) for name, alone in zip(names, ALONE, strict=True)]
        return Ranks(*map(int, values))
    except ValueError as e:
        wanted = f"torchrun's whole numbers were expected ({e})"
        raise UserError(f"The environment's {', '.join(names)}: {wanted}.") from e


@contextmanager
def joined(device: str, minutes: float) -> Iterator[Ranks]:
    """Join the processes that torchrun started. minutes: how long each waits for the others.

    A process that loses the others prints a line and exits with code 1; the process that failed has
    printed the reason.
    """
    ranks = ranks_here()
    if ranks.world == 1:
        yield ranks
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)  # NCCL sends from the current device
    try:
        # Beside NCCL, gloo sends what is on the CPU: errors, requests to stop, checkpoint plans.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        wait = timedelta(minutes=minutes)
        group = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, starts = meet(ranks, wait)
            ranks = ranks._replace(restarts=starts - 1)
            group = dict(store=store, rank=ranks.rank, world_size=ranks.world)
        dist.init_process_group(backend, timeout=wait, **group)
        yield ranks
        _leave()  # not after a failure: it would wait for processes that hang
    except SystemExit as e:
        if not e.code:
            traceback.clear_frames(e.__traceback__)  # which hold the model
            _leave()
        raise
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        lost = f"it lost the others or waited {minutes:g} minutes"
        print(f"Rank {ranks.rank} ends: {lost} ({first_line(e)}).", file=sys.stderr)
        # The interpreter's usual end would wait for threads that still wait for the others.
        sys.stderr.flush()
        os._exit(1)


def _leave() -> None:
    """Destroy the process group, but collect every DistributedDataParallel first.

    One that outlives the group would destroy it in its own destructor, which holds the
    interpreter's lock while it waits for a thread that may need this lock.
    """
    gc.collect()
    dist.destroy_process_group()


def meet(ranks: Ranks, wait: timedelta) -> tuple[dist.Store, int]:
    """A new store that all processes of this start share, and the number of starts so far.

    torchrun's agents keep one store through all restarts, but each counts only the restarts that
    its own workers caused. With keys made of that count, processes could wait for each other under
    different keys for ever. So rank 0 counts the starts and tells each other rank the number, under
    a key that is unique to that rank's process.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=wait)
    if ranks.first:
        start = store.add("starts", 1)
        missing, until = set(range(1, ranks.world)), time.monotonic() + wait.total_seconds()
        while missing:
            for rank in [r for r in missing if store.check([f"hello {r}"])]:
                # Read the key again each time: it may be that of an earlier start, whose process
                # does not answer any more.
                store.set(store.get(f"hello {rank}").decode(), str(start))
                if store.check([f"here {start} {rank}"]):
                    missing.remove(rank)
            if time.monotonic() > until:
                raise dist.DistStoreError(f"rank {min(missing)} did not come")
            time.sleep(0.02)
    else:
        key = f"welcome {uuid.uuid4()}"
        store.set(f"hello {ranks.rank}", key)
        start = int(store.get(key))  # waits for it
        store.set(f"here {start} {ranks.rank}", "")
    return dist.PrefixStore(f"start {start}", store), start


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Call work() on every process. A UserError in any of them ends all, and is printed once.

    Also a barrier: no process goes on before all are done. work() must not communicate after a
    point where it may raise UserError on some processes only.
    """
    result, mistake = None, None
    try:
        result = work()
    except UserError as e:
        mistake = e
    if ranks.world > 1:
        mistakes = [None] * ranks.world
        dist.all_gather_object(mistakes, None if mistake is None else str(mistake))
        speaker = next((rank for rank, text in enumerate(mistakes) if text is not None), None)
        if speaker is not None and speaker != ranks.rank:
            time.sleep(TIME_TO_PRINT)
            raise SystemExit(2)
    if mistake is not None:
        raise mistake
    return result


def on_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Like together, but only rank 0 calls work(); every process gets its result."""
    box = [together(ranks, lambda: work() if ranks.first else None)]
    if ranks.world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def total(ranks: Ranks, x: Tensor) -> Tensor:
    """Sum x over the processes, in place."""
    if ranks.world > 1:
        dist.all_reduce(x)
    return x


class Interrupts:
    """SIGTERM and Ctrl-C become requests to save and end; a second one ends the process at once."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.asked_here = ranks, False
        signals = (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self._ask) for number in signals}

    def _ask(self, number, frame) -> None:
        self.asked_here = True
        self.restore()

    def asked(self) -> bool:
        """Whether any process was asked to end; a collective call."""
        if self.ranks.world == 1:
            return self.asked_here
        said = torch.tensor([self.asked_here], dtype=torch.int32)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def restore(self) -> None:
        """Put the earlier signal handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


# --- around the model -----------------------------------------------------------------------------


def spread(
    model: nn.Module,
    blocks: nn.ModuleList,
    own: nn.Module | None,
    sharded: bool,
    device,
    who: Ranks,
):
    """Spread the model over the processes and return what to call: copies, or slices if sharded.

    With copies, gradients are averaged during the last backward of a step; no weights are sent at
    the start, because all processes read the same files and draw from the same seed.
    device: a runtime.device.Device. blocks, own: see shard.
    """
    if who.world == 1:
        return model.to(device.name)
    if sharded:
        shard(model, blocks, own, device.name, device.dtype)
        return model
    from torch.nn.parallel import DistributedDataParallel

    how = dict(forward_sync_buffers=False, init_sync=False, gradient_as_bucket_view=True)
    return DistributedDataParallel(model.to(device.name), **how)


def shard(
    model: nn.Module, blocks: nn.ModuleList, own: nn.Module | None, device: str, dtype: torch.dtype
) -> None:
    """Apply FSDP2 in place: each process holds a slice of every weight, gathered block by block.

    Weights outside the blocks (the embedding, which is also the head) stay gathered from forward to
    backward. own: a module that is gathered by itself, in the dtype of its weights (the adapter, in
    float32). dtype: that in which all other weights are gathered; gradients are summed in float32.
    The methods that a module lists as forward_methods gather its weights like its forward.
    """
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.split(":")[0], (dist.get_world_size(),))
    # cast_forward_inputs=False, because the residual stream between blocks stays float32.
    policy = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
    if own is not None:
        fsdp.fully_shard(own, mesh=mesh, reshard_after_forward=False)
    fsdp.fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    for module in (model, own):
        for method in getattr(module, "forward_methods", ()):
            fsdp.register_fsdp_forward_method(module, method)


def synchronises(model: nn.Module, last: bool) -> None:
    """Let copies average their gradients only in the backward of a step's last micro-batch."""
    if hasattr(model, "require_backward_grad_sync"):
        model.require_backward_grad_sync = last


def forget_gathered(model: nn.Module) -> None:
    """Drop gathered weights, which are outdated when a checkpoint was loaded into the slices."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Gather the weights of a module on every process, inside the with block."""
    sharded = hasattr(module, "unshard")
    if sharded:
        module.unshard()
    yield
    if sharded:
        module.reshard()


def gather(module: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """A module's whole state on the CPU of rank 0, {} on the others. All processes must call it."""
    state = {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if ranks.first:
            state[name] = tensor.detach().cpu()
    return state
