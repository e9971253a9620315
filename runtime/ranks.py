"""One process or many: who we are, what the processes tell each other, and how a finished model is
spread over them.

    torchrun --nproc-per-node 8 train.py --layer 12          # a copy of the model on each GPU
    torchrun --nproc-per-node 8 train.py ... --shard         # a slice of each block on each GPU

The model's code knows nothing of this: DistributedDataParallel and FSDP2 are put around it here.
torch's distributed modules load inside the functions that need them, because a run of one process
needs none and they take a second.
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


def ranks_here() -> Ranks:
    """What torchrun says in the environment; ALONE without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
    try:
        values = (
            int(os.environ.get(name, default)) for name, default in zip(names, ALONE, strict=True)
        )
        return Ranks(*values)
    except ValueError as e:
        raise UserError(
            f"The environment's {', '.join(names)}: torchrun's whole numbers were expected ({e})."
        ) from e


@contextmanager
def joined(device: str, minutes: float) -> Iterator[Ranks]:
    """Join the processes that torchrun started. minutes: how long one waits for the others before
    it gives up.

    A process that loses the others ends with a line of its own and exit code 1: the reason is what
    the one that failed has printed.
    """
    ranks = ranks_here()
    if ranks.world == 1:
        yield ranks
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)  # NCCL sends from the current device
    try:
        # gloo beside NCCL carries what lives on the CPU: errors, requests to stop, plans of
        # checkpoints.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        wait = timedelta(minutes=minutes)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, starts = meet(ranks, wait)
            ranks = ranks._replace(restarts=starts - 1)
            dist.init_process_group(
                backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=wait
            )
        else:
            dist.init_process_group(backend, timeout=wait)
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
        why = str(e).strip().splitlines()[0]
        lost = f"it lost the others or waited {minutes:g} minutes"
        print(f"Rank {ranks.rank} ends: {lost} ({why}).", file=sys.stderr)
        # Not through the interpreter's usual end, where threads of the backend may still wait for
        # the others.
        sys.stderr.flush()
        os._exit(1)


def _leave() -> None:
    """End the process group, after every DistributedDataParallel: one that outlives the group ends
    it in its own destructor, which holds the interpreter's lock while it waits for a thread that
    may need that lock.
    """
    gc.collect()
    dist.destroy_process_group()


def meet(ranks: Ranks, wait: timedelta) -> tuple[dist.Store, int]:
    """A fresh store that all processes of this start share, and how many starts there have been.

    torchrun's agents keep one store through all restarts, and each counts restarts for itself: an
    agent that restarts because another's worker died does not count it. Going by that count,
    processes of one start could wait in two places for ever. So rank 0 counts the starts, and
    writes the number under each other rank's unique key.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=wait)
    if ranks.first:
        start = store.add("starts", 1)
        missing, until = set(range(1, ranks.world)), time.monotonic() + wait.total_seconds()
        while missing:
            for rank in [r for r in missing if store.check([f"hello {r}"])]:
                # The key may be that of an earlier start, whose process will not answer: read it
                # again each time.
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
    """work() on every process; a person's mistake in any of them ends all, in one sentence printed
    once.

    Also a barrier: no process goes on before all are done. work() must not wait for a process that
    a mistake in work() could keep away.
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
            time.sleep(2)  # torchrun ends all with the first that ends: let the sentence come first
            raise SystemExit(2)
    if mistake is not None:
        raise mistake
    return result


def on_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """together(), for what rank 0 alone does: its result, on every process."""
    box = [together(ranks, lambda: work() if ranks.first else None)]
    if ranks.world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def any_of(ranks: Ranks, flag: bool) -> bool:
    """Whether any process says yes: all get the same answer at the same point of the run."""
    if ranks.world == 1:
        return flag
    said = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def total(ranks: Ranks, x: Tensor) -> Tensor:
    """Sum over the processes."""
    if ranks.world > 1:
        dist.all_reduce(x)
    return x


class Interrupts:
    """SIGTERM and Ctrl-C ask the run to save and end. asked() says whether any process was asked; a
    second Ctrl-C ends it at once.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.here = ranks, False
        signals = (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self._ask) for number in signals}

    def _ask(self, number, frame) -> None:
        self.here = True
        self.restore()

    def asked(self) -> bool:
        return any_of(self.ranks, self.here)

    def restore(self) -> None:
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
    """The model over the processes, as it is to be called: a copy on each, or a slice on each.

    Of copies, gradients are averaged during the last backward of a step. Nothing is sent at the
    start, because the processes read the same files and draw from the same seed. device: with name
    and dtype. For blocks and own see shard.
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
    """FSDP2, in place: each process keeps a slice of every weight, and a block is whole only while
    it runs.

    What stands outside the blocks (the embedding, which is the head too) stays whole from forward
    to backward, since the head is used between them. own: a module with a group of its own, always
    in the dtype of its weights (the adapter, float32). The forward_methods of both are called
    beside their forward. dtype: what all other weights are gathered in; gradients are summed in
    float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(device.split(":")[0], (dist.get_world_size(),))
    # Weights alone change their dtype: the residual stream between blocks stays float32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if own is not None:
        fully_shard(own, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    for module in (model, own):
        for method in getattr(module, "forward_methods", ()):
            register_fsdp_forward_method(module, method)


def synchronises(model: nn.Module, last: bool) -> None:
    """Send a copy's gradients in the last micro-batch of a step alone."""
    if hasattr(model, "require_backward_grad_sync"):
        model.require_backward_grad_sync = last


def forget_gathered(model: nn.Module) -> None:
    """After weights were written from outside (a checkpoint): drop whole copies that a forward has
    left.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of one module are whole on every process."""
    sharded = hasattr(module, "unshard")
    if sharded:
        module.unshard()
    yield
    if sharded:
        module.reshard()


def gather(module: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """A module's whole state on the CPU of rank 0, tensor by tensor; {} on the others, who must
    call it too.
    """
    state = {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if ranks.first:
            state[name] = tensor.detach().cpu()
    return state
