"""One optimiser step, ours against the plain way, on the same weights and the same pairs.

    pip install -r requirements-dev.txt
    python benchmarks/compare.py --shape mid --dtype float32

The plain way: transformers' Gemma2ForCausalLM with a forward hook that encodes, steers and decodes twice as the paper
writes it, chosen and rejected padded and concatenated (2 pairs a micro-batch, the paper's setting), full logits,
F.cross_entropy. Frozen weights ask for no gradient there either. The two run in processes of their own, a step of one,
then a step of the other, so that a drifting machine drifts for both and each peak memory is its own. Prints one
line of JSON: ratio (ours over theirs, pairs/s, median over the alternating steps), memory_ratio (theirs counts
likewise from after the imports), and the largest difference between the two's SimPO losses.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
import simpo
import train
from benchmarks.throughput import SHAPES, build, random_pairs, synchronise
from runtime import cli
from runtime.cli import flag

PAIRS_PER_MICROBATCH = 2  # of the plain way


@dataclass(frozen=True)
class Settings:
    shape: str = flag("mid", "size of model and SAE", choices=tuple(SHAPES))
    dtype: str = flag("float32", "of weights and products", choices=("float32", "bfloat16"))
    device: str = flag("cpu", "cpu or cuda")
    pairs: int = flag(32, "pairs per optimiser step")
    steps: int = flag(3, "alternating steps measured, after one of warm-up each")
    tokens_per_microbatch: int = flag(2048, "ours only")
    seed: int = flag(0, "seed of weights and lengths")
    role: str = flag("", "used by the script itself", choices=("", "ours", "plain"))


def ours(s: Settings, steered, batch, training):
    losses = []
    real = train.score

    def keeping(*args):  # the losses of single pairs, in packing order
        scores = real(*args)
        losses.append(scores.loss.detach())
        return scores

    train.score = keeping
    train.backward(steered, train.Batch(batch, range(len(batch))), training.l1, training)
    train.score = real
    order = [i for micro in data.microbatches(batch, s.tokens_per_microbatch) for i in micro]
    return [loss for _, loss in sorted(zip(order, torch.cat(losses).tolist(), strict=True))]


def plain_model(steered, s: Settings):
    """transformers' model with our weights, and a hook that steers it the long way."""
    import tempfile

    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        steered.model.save_pretrained(folder)
        dtype = getattr(torch, s.dtype)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
    model = model.to(s.device).requires_grad_(False)
    sae, kept = steered.sae, {}

    def steer(module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        f = sae.encode(x)
        v = F.relu(
            F.linear(
                x.to(steered.adapter.weight.dtype), steered.adapter.weight, steered.adapter.bias
            )
        )
        kept["v"] = v
        steered_x = sae.decode(f + v.to(f.dtype)) + (x - sae.decode(f))
        return (steered_x, *output[1:]) if isinstance(output, tuple) else steered_x

    model.model.layers[steered.layer].register_forward_hook(steer)
    return model, kept


def plain(model, kept, batch, s: Settings, training):
    losses, positions = [], data.positions(batch)
    with train.autocast(training):
        for i in range(0, len(batch), PAIRS_PER_MICROBATCH):
            pairs = batch[i : i + PAIRS_PER_MICROBATCH]
            rows = [(p.prompt + p.chosen, len(p.prompt)) for p in pairs]
            rows += [(p.prompt + p.rejected, len(p.prompt)) for p in pairs]
            longest = max(len(tokens) for tokens, _ in rows)
            ids = torch.tensor(
                [tokens + [0] * (longest - len(tokens)) for tokens, _ in rows], device=s.device
            )
            mask = torch.tensor(
                [[1] * len(t) + [0] * (longest - len(t)) for t, _ in rows], device=s.device
            )
            scored = mask.clone().bool()
            for row, (_, prompt) in enumerate(rows):
                scored[row, :prompt] = False
            logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            logps = -F.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            ).view(len(rows), -1)
            scored = scored[:, 1:]
            means = (logps * scored).sum(1) / scored.sum(1)
            loss = simpo.simpo_loss(
                means[: len(pairs)], means[len(pairs) :], training.beta, training.gamma_ratio
            )
            l1 = (kept.pop("v").abs().sum(-1) * mask).sum()
            (loss.sum() / len(batch) + training.l1 * l1 / positions).backward()
            losses += loss.detach().tolist()
    return losses


def worker(s: Settings) -> None:
    """Answer each line on stdin with a step: {"seconds", "losses", "bytes"}."""
    training = train.Settings(
        device=s.device, dtype=s.dtype, tokens_per_microbatch=s.tokens_per_microbatch
    )
    if s.role == "plain":
        import transformers  # noqa: F401  counted before `imported`, like every other import
    imported = train.peak_memory(s.device)
    steered = build(s.shape, getattr(torch, s.dtype), s.device, s.seed)
    if s.role == "ours":
        training = train.resolve_device(training)
        if (
            training.dtype != s.dtype
        ):  # a processor without bfloat16: the rounded weights, in float32
            steered.float()
    batch = random_pairs(s.pairs, steered.model.config.vocab_size, s.seed)
    trained = list(steered.adapter.parameters())
    optimizer = train.make_optimizer(trained, training)
    if s.role == "plain":
        model, kept = plain_model(steered, s)
        steered.model = None
    for _ in sys.stdin:
        synchronise(s.device)
        start = time.perf_counter()
        losses = (
            ours(s, steered, batch, training)
            if s.role == "ours"
            else plain(model, kept, batch, s, training)
        )
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.zero_grad(set_to_none=True)  # no update: both go on with the same weights
        synchronise(s.device)
        seconds = time.perf_counter() - start
        used = train.peak_memory(s.device) - imported
        print(json.dumps(dict(seconds=seconds, losses=losses, bytes=used)), flush=True)


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    if s.role:
        return worker(s)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(s).items() if k != "role"]
    workers = {}
    for role in ("ours", "plain"):
        command = [sys.executable, "-m", "benchmarks.compare", *flags, f"--role={role}"]
        workers[role] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    results = {role: [] for role in workers}
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
    mine, theirs = results["ours"][1:], results["plain"][1:]
    gaps = [abs(a - b) for a, b in zip(mine[-1]["losses"], theirs[-1]["losses"], strict=True)]
    ratios = [y["seconds"] / x["seconds"] for x, y in zip(mine, theirs, strict=True)]
    print(
        json.dumps(
            dict(
                **dict(shape=s.shape, dtype=s.dtype, device=s.device, pairs=s.pairs),
                **dict(ratio=statistics.median(ratios), ratios=ratios),
                pairs_per_second=s.pairs / statistics.median(x["seconds"] for x in mine),
                plain_pairs_per_second=s.pairs / statistics.median(y["seconds"] for y in theirs),
                memory_ratio=mine[-1]["bytes"] / theirs[-1]["bytes"],
                **dict(bytes=mine[-1]["bytes"], plain_bytes=theirs[-1]["bytes"]),
                **dict(
                    largest_loss_difference=max(gaps), mean_loss=statistics.mean(mine[-1]["losses"])
                ),
            )
        )
    )


if __name__ == "__main__":
    cli.run(main)
