"""One optimiser step, ours against the plain way, on the same weights and the same pairs.

    pip install -r requirements-dev.txt
    python -m benchmarks.compare --shape mid --dtype float32

The plain way: transformers' Gemma2ForCausalLM with a forward hook that encodes, steers and decodes
twice as the paper writes it; chosen and rejected padded and concatenated, 2 pairs a micro-batch
(the paper's setting); full logits, F.cross_entropy. Frozen weights ask for no gradient there
either. The two run in processes of their own, a step of one, then a step of the other, so that a
drifting machine drifts for both and each peak memory is its own.

Prints one line of JSON: ratio (ours over theirs, pairs/s, median over the alternating steps),
memory_ratio (counted from after the imports), and the largest difference between the two's SimPO
losses of a pair.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
import simpo
import train
from benchmarks.throughput import SHAPES, USUAL, build, forget_peak, random_pairs, synchronise
from data import Pair
from fsrl import SteeredModel
from runtime import cli
from runtime.cli import flag
from runtime.device import Device, peak_memory, resolve_device

PAIRS_PER_MICROBATCH = 2  # of the plain way


@dataclass(frozen=True)
class Settings:
    shape: str = flag("mid", "size of model and SAE", tuple(SHAPES))
    dtype: str = flag("float32", "of weights and products", ("float32", "bfloat16"))
    device: str = flag("cpu", "cpu or cuda")
    pairs: int = flag(32, "pairs per optimiser step")
    steps: int = flag(3, "alternating steps measured, after one of warm-up each")
    tokens_per_microbatch: int = flag(2048, "ours only")
    seed: int = flag(0, "seed of weights and lengths")
    role: str = flag("", "used by the script itself", ("", "ours", "plain"))


# --- the two ways ---------------------------------------------------------------------------------


@torch.no_grad()
def our_losses(steered: SteeredModel, batch: list[Pair], scorer: train.Scorer) -> list[float]:
    """The SimPO loss of each pair, in the order of the batch."""
    losses = [0.0] * len(batch)
    with scorer.device.autocast():
        for indices in data.microbatches(batch, scorer.tokens):
            scores = scorer.score(steered, data.pack_pairs([batch[i] for i in indices]))
            for i, loss in zip(indices, scores.losses.loss.tolist(), strict=True):
                losses[i] = loss
    return losses


def plain_model(steered: SteeredModel, s: Settings):
    """transformers' model with our weights, and a hook that steers it the long way.

    Returns it with the dict in which the hook leaves v of the last forward.
    """
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        steered.model.save_pretrained(folder)
        dtype = getattr(torch, s.dtype)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
    model = model.to(s.device).requires_grad_(False)
    sae, adapter, kept = steered.sae, steered.adapter, {}

    def steer(module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        f = sae.encode(x)
        v = F.relu(F.linear(x.to(adapter.weight.dtype), adapter.weight, adapter.bias))
        kept["v"] = v
        steered_x = sae.decode(f + v.to(f.dtype)) + (x - sae.decode(f))
        return (steered_x, *output[1:]) if isinstance(output, tuple) else steered_x

    model.model.layers[steered.layer].register_forward_hook(steer)
    return model, kept


def plain(model, kept: dict, batch: list[Pair], device: Device) -> list[float]:
    """One step's gradients the plain way; returns the SimPO loss of each pair."""
    losses, positions = [], data.positions(batch)
    with device.autocast():
        for i in range(0, len(batch), PAIRS_PER_MICROBATCH):
            pairs = batch[i : i + PAIRS_PER_MICROBATCH]
            rows = [(p.prompt + p.chosen, len(p.prompt)) for p in pairs]
            rows += [(p.prompt + p.rejected, len(p.prompt)) for p in pairs]
            longest = max(len(tokens) for tokens, _ in rows)
            padded = [tokens + [0] * (longest - len(tokens)) for tokens, _ in rows]
            real = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows]
            ids = torch.tensor(padded, device=device.name)
            mask = torch.tensor(real, device=device.name)
            scored = mask.bool()
            for row, (_, prompt) in enumerate(rows):
                scored[row, :prompt] = False
            scored = scored[:, 1:]

            logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            targets = ids[:, 1:].flatten()
            logps = -F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
            means = (logps.view(len(rows), -1) * scored).sum(1) / scored.sum(1)
            chosen, rejected = means[: len(pairs)], means[len(pairs) :]
            loss = simpo.simpo_loss(chosen, rejected, USUAL.beta, USUAL.gamma_ratio)
            l1 = (kept.pop("v").abs().sum(-1) * mask).sum()
            (loss.sum() / len(batch) + USUAL.l1 * l1 / positions).backward()
            losses += loss.detach().tolist()
    return losses


# --- a process each -------------------------------------------------------------------------------


def way(s: Settings) -> tuple[Callable[[], list[float]], torch.nn.Module]:
    """What one step's gradients come from, as a function that returns each pair's loss where it has
    them at hand; and the adapter.
    """
    steered = build(s.shape, getattr(torch, s.dtype), s.device, s.seed)
    batch = random_pairs(s.pairs, steered.model.config.vocab_size, s.seed)
    if s.role == "plain":
        device = Device(s.device, getattr(torch, s.dtype))
        model, kept = plain_model(steered, s)
        steered.model = None
        return lambda: plain(model, kept, batch, device), steered.adapter

    device = resolve_device(s.device, s.dtype)
    if device.dtype_name != s.dtype:  # no bfloat16 here: the rounded weights, in float32
        steered.float()
    scorer = train.Scorer(USUAL.beta, USUAL.gamma_ratio, s.tokens_per_microbatch, device)
    losses = our_losses(steered, batch, scorer)

    def step() -> list[float]:
        train.backward(steered, batch, train.Penalty(USUAL.l1), scorer)
        return losses  # no update is made, so they do not change

    return step, steered.adapter


def worker(s: Settings) -> None:
    """Answer each line on stdin with a step: {"seconds", "losses", "bytes"}."""
    if s.role == "plain":
        import transformers  # noqa: F401  counted before `imported`, like every other import
    imported = peak_memory(s.device)
    step, adapter = way(s)
    forget_peak(s.device)  # on a GPU: how the weights came there is not the step's
    for _ in sys.stdin:
        synchronise(s.device)
        start = time.perf_counter()
        losses = step()
        train.clip(adapter, USUAL.max_grad_norm)
        adapter.zero_grad(set_to_none=True)  # no update: both go on with the same weights
        synchronise(s.device)
        seconds = time.perf_counter() - start
        used = peak_memory(s.device) - imported
        print(json.dumps(dict(seconds=seconds, losses=losses, bytes=used)), flush=True)


def alternate(s: Settings) -> dict[str, list[dict]]:
    """A step of one process, then a step of the other; the answers of each, warm-up left out."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(s).items() if k != "role"]
    command = [sys.executable, "-m", "benchmarks.compare", *flags]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    roles = ("ours", "plain")
    workers = {role: subprocess.Popen([*command, f"--role={role}"], **pipes) for role in roles}
    results = {role: [] for role in roles}
    for step in range(s.steps + 1):
        for role, process in workers.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"The {role} process ended early.")
            results[role].append(json.loads(line))
            print(f"step {step} {role}: {results[role][-1]['seconds']:.2f} s", file=sys.stderr)
    for process in workers.values():
        process.stdin.close()
        process.wait()
    return {role: answers[1:] for role, answers in results.items()}


def result(s: Settings) -> dict:
    """What the line of JSON says."""
    mine, theirs = alternate(s).values()
    ratios = [y["seconds"] / x["seconds"] for x, y in zip(mine, theirs, strict=True)]
    gaps = [abs(a - b) for a, b in zip(mine[-1]["losses"], theirs[-1]["losses"], strict=True)]
    speed, plain_speed = (
        s.pairs / statistics.median(x["seconds"] for x in r) for r in (mine, theirs)
    )
    return dict(
        shape=s.shape,
        dtype=s.dtype,
        device=s.device,
        pairs=s.pairs,
        ratio=statistics.median(ratios),
        ratios=ratios,
        pairs_per_second=speed,
        plain_pairs_per_second=plain_speed,
        memory_ratio=mine[-1]["bytes"] / theirs[-1]["bytes"],
        bytes=mine[-1]["bytes"],
        plain_bytes=theirs[-1]["bytes"],
        largest_loss_difference=max(gaps),
        mean_loss=statistics.mean(mine[-1]["losses"]),
    )


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    if s.role:
        worker(s)
    else:
        resolve_device(s.device)
        print(json.dumps(result(s)))


if __name__ == "__main__":
    cli.run(main)
