"""The same code on a GPU: attention and steps against the CPU's, without waiting for the device or
compiling again.
"""

import forked
import pytest
import torch
from conftest import GOLDEN, load, metrics, ragged

import data
import model as gemma
import train
from audit.attribution import attribute
from audit.counting import count
from data import pack
from eval_ablation import all_losses
from generation import decode as decoding
from kernels import attention
from policy import DEFAULTS, Policy
from runtime import ranks
from runtime.device import resolve_device

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def on(device: str, dtype: torch.dtype = torch.float32):
    """The golden steered model there; its adapter stays float32."""
    golden = load()
    golden.steered.model.to(device, dtype)
    golden.steered.sae.to(device, dtype)
    golden.steered.adapter.to(device)
    return golden.steered


def pairs(seed: int, n: int = 6) -> list[data.Pair]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 90, (n, 3), generator=g).tolist()
    return [
        data.Pair(*(torch.randint(4, 512, (k,), generator=g).tolist() for k in row))
        for row in lengths
    ]


def scorer(device: str, dtype: str = "float32") -> train.Scorer:
    return train.Scorer(10.0, 0.5, 300, resolve_device(device, dtype))


PENALTY = train.Penalty(l1=0.02)


@pytest.mark.parametrize(
    "head_dim, dtype, close",
    [(256, torch.float32, 2e-4), (256, torch.bfloat16, 3e-2), (128, torch.bfloat16, 3e-2)],
)
@pytest.mark.parametrize("window", [None, 100])
def test_flex_attention_equals_plain_attention_with_gradients(window, head_dim, dtype, close):
    """Compiled, at Gemma's head sizes; for that of 256 a consumer GPU needs smaller tiles than
    FlexAttention's own.
    """
    config = gemma.Gemma2Config(
        512, 64, 64, 1, 4, 2, head_dim, head_dim, sliding_window=window or 1 << 20
    )
    base = gemma.Gemma2(config).to(DEVICE)
    for seed in range(3):
        packed, g = pack(ragged(seed, longest=300)), torch.Generator().manual_seed(seed)
        T, scale = len(packed.tokens), head_dim**-0.5
        exact = [
            torch.randn(T, heads, head_dim, generator=g).to(dtype).float() for heads in (4, 2, 2)
        ]
        probe, results = torch.randn(T, 4, head_dim, generator=g), []
        mask = base.attend(packed.to(DEVICE)).sliding
        for device, kind in (("cpu", torch.float32), (DEVICE, dtype)):
            q, k, v = (x.to(device, kind).requires_grad_() for x in exact)
            if device == "cpu":
                out = attention.plain(q, k, v, packed.buckets, window, scale, 5.0)
            else:
                out = attention.flexible(q, k, v, mask, scale, 5.0)
            gradients = torch.autograd.grad((out * probe.to(device)).sum(), (q, k, v))
            results.append([x.detach().float().cpu() for x in (out, *gradients)])
        for expected, ours in zip(*results, strict=True):
            torch.testing.assert_close(
                ours, expected, atol=close * expected.abs().max().item(), rtol=0
            )


def test_a_step_is_that_of_the_cpu():
    batch, found = pairs(0), []
    for device, dtype in (("cpu", "float32"), (DEVICE, "float32"), (DEVICE, "bfloat16")):
        steered = on(device, getattr(torch, dtype))
        sums = train.backward(steered, batch, PENALTY, scorer(device, dtype))
        sums = torch.stack(sums).cpu()
        found.append((sums, steered.adapter.weight.grad.cpu()))
    (sums, grad), (exact, exact_grad), (low, low_grad) = found
    torch.testing.assert_close(exact, sums, rtol=1e-4, atol=1e-4)
    assert (exact_grad - grad).norm() < 1e-3 * grad.norm()
    assert (
        low[0].item() == pytest.approx(sums[0].item(), rel=0.1)
        and (low_grad - grad).norm() < 0.2 * grad.norm()
    )


def test_a_step_neither_waits_nor_compiles_again():
    """Once a few lengths have been seen, of one block of 128 positions and of more, no other is
    compiled for; and the host waits for nothing inside a step.
    """
    one_pass, steered = scorer(DEVICE, "bfloat16"), on(DEVICE, torch.bfloat16)

    def batch(length: int) -> list[data.Pair]:
        return [data.Pair([5] * (length - 30), [6] * 20, [7] * 10)]

    for length in (300, 700, 53, 90, 128, 256):
        train.backward(steered, batch(length), PENALTY, one_pass)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            for length in (411, 333, 512, 640, 77, 120, 1000):
                train.backward(steered, batch(length), PENALTY, one_pass)
                torch.nn.utils.clip_grad_norm_(steered.adapter.parameters(), 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lengths", [(5,), (3, 40, 17), (130, 20)])
def test_greedy_tokens_are_those_of_the_cpu(lengths):
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 512, (n,), generator=g).tolist() for n in lengths]
    ours, theirs = (
        decoding.generate(on(device), prompts, 12, lambda new: False) for device in (DEVICE, "cpu")
    )
    assert ours == theirs


def test_slices_of_one_process_are_the_whole():
    """FSDP2 and NCCL, on the one GPU that a process may have: the gradient is that of a step
    without them.
    """
    batch, found = pairs(0), []
    store = torch.distributed.HashStore()
    backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        for sharded in (False, True):
            steered, one_pass = on(DEVICE, torch.bfloat16), scorer(DEVICE, "bfloat16")
            steered.model.requires_grad_(False)
            if sharded:
                where = (DEVICE, one_pass.device.dtype)
                ranks.shard(steered, steered.model.model.layers, steered.adapter, *where)
            sums = train.backward(steered, batch, PENALTY, one_pass)
            gradient = steered.adapter.weight.grad
            gradient = gradient.full_tensor() if sharded else gradient
            found.append((torch.stack(sums).cpu(), gradient.cpu()))
    finally:
        torch.distributed.destroy_process_group()
    (sums, gradient), (sharded_sums, sharded_gradient) = found
    torch.testing.assert_close(sharded_sums, sums, rtol=1e-3, atol=1e-3)
    assert (sharded_gradient - gradient).norm() < 2e-2 * gradient.norm()


def test_the_audit_counts_what_it_counts_on_the_cpu():
    tokenizer = data.load_tokenizer(GOLDEN / "model")
    batch, run = pairs(0), DEFAULTS._replace(tokens_per_microbatch=300)
    members = torch.rand(2, 256, generator=torch.Generator().manual_seed(0)) < 0.3
    found = []
    for device in ("cpu", DEVICE):
        where = resolve_device(device, "float32")
        policy = Policy(on(device).requires_grad_(False), tokenizer, where, run, "golden")
        counts, shares = count(policy, batch, members), attribute(policy, batch, 2, members)
        losses = all_losses(policy, batch, [5, 50], members)
        assert all(x.device.type == "cpu" for x in (*losses, *shares, counts.events))
        found.append((counts, shares, losses))
    (counts, shares, losses), (their_counts, their_shares, their_losses) = found
    torch.testing.assert_close(their_counts.mean, counts.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(their_counts.usage, counts.usage, rtol=0, atol=2e-2)
    torch.testing.assert_close(their_shares.shares, shares.shares, rtol=1e-2, atol=1e-4)
    for ours, theirs in zip(losses, their_losses, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def test_a_run_of_train_py(tmp_path):
    """With the default bfloat16, and near what float32 on the CPU finds."""
    flags = ("--max-steps", 3, "--lr", 1e-3, "--init-adapter", GOLDEN / "adapter_mid")
    for name, device in (("gpu", DEVICE), ("cpu", "cpu")):
        forked.good(forked.golden(tmp_path / name, *flags, "--device", device, timeout=600))
    for ours, theirs in zip(
        metrics(tmp_path / "gpu", "eval"), metrics(tmp_path / "cpu", "eval"), strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)
