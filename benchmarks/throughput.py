"""How close one training configuration comes to the machine's own limit.

    python -m benchmarks.throughput --shape mid --dtype float32 --device cpu

Runs whole optimiser steps (train.backward, clipping, AdamW) on random weights of a given shape and
on token lengths that follow UltraFeedback, and prints one line of JSON. The limit is the time that
the floating-point operations which no step can avoid (step_flops, counted from shapes) would take
at the rate of plain matrix products of the model's own shapes, measured between the steps of the
same run: fraction_of_limit = that time / the step's time. An evaluation of the same pairs
(train.evaluate) is measured alike.
"""

import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

import data
import train
from data import Pair
from fsrl import Adapter, SteeredModel
from model import PUBLISHED, SLIDING, Gemma2, Gemma2Config
from runtime import cli
from runtime.cli import flag
from runtime.device import peak_memory, resolve_device
from sae import JumpReLUSAE


class Shape(NamedTuple):
    config: Gemma2Config
    d_sae: int
    layer: int


TINY = Gemma2Config(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
)
MID = Gemma2Config(
    vocab_size=32_768,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    query_pre_attn_scalar=64,
)
SHAPES = {
    "tiny": Shape(TINY, 1024, 2),
    "mid": Shape(MID, 8192, 3),
    "gemma-2-2b": Shape(PUBLISHED["gemma-2-2b"], 65_536, 12),
}
# Tokens of 2,177 UltraFeedback pairs: median, 90th percentile, longest.
LENGTHS = {"prompt": (79, 420), "chosen": (230, 646), "rejected": (171, 546)}
LONGEST = {"prompt": 1593, "chosen": 1263, "rejected": 1021}


@dataclass(frozen=True)
class Settings:
    shape: str = flag("mid", "size of model and SAE", tuple(SHAPES))
    dtype: str = flag("float32", "as in train.py", ("float32", "bfloat16"))
    device: str = flag("cpu", "cpu or cuda")
    pairs: int = flag(32, "pairs per optimiser step")
    steps: int = flag(3, "optimiser steps measured, after one of warm-up")
    tokens_per_microbatch: int = flag(8192, "as in train.py")
    d_sae: int | None = flag(None, "another width of the SAE")
    length_scale: float = flag(1.0, "multiplies every length, for cost against sequence length")
    seed: int = flag(0, "seed of weights and lengths")


# --- what is measured -----------------------------------------------------------------------------


def random_pairs(n: int, vocabulary: int, seed: int, scale: float = 1.0) -> list[Pair]:
    """Pairs of random tokens, lengths log-normal through UltraFeedback's median and 90th
    percentile.
    """
    g = np.random.default_rng(seed)
    columns = []
    for name, (median, p90) in LENGTHS.items():
        sigma = math.log(p90 / median) / 1.2816  # the 90th percentile of a standard normal
        lengths = np.exp(math.log(median) + sigma * g.standard_normal(n)).clip(8, LONGEST[name])
        drawn = (g.integers(4, vocabulary, max(4, int(length * scale))) for length in lengths)
        columns.append([tokens.tolist() for tokens in drawn])
    return [data.truncate(Pair(*row), 2048, 1800) for row in zip(*columns, strict=True)]


def build(
    shape: str, dtype: torch.dtype, device: str, seed: int, d_sae: int | None = None
) -> SteeredModel:
    """A steered model with random weights."""
    config, width, layer = SHAPES[shape]
    width, d = d_sae or width, config.hidden_size
    g = torch.Generator(device).manual_seed(seed)
    with torch.device(device):
        model = Gemma2(config).to(dtype)
        model.init_weights(g)
        W_dec = torch.nn.functional.normalize(torch.randn(width, d, generator=g), dim=1).to(dtype)
        vectors = dict(b_enc=torch.zeros(width), b_dec=torch.zeros(d), threshold=torch.ones(width))
        arrays = dict(W_enc=W_dec.T.contiguous(), W_dec=W_dec, **vectors)
        sae = JumpReLUSAE({name: array.to(dtype) for name, array in arrays.items()})
        adapter = Adapter(d, width)
        torch.nn.init.normal_(adapter.weight, std=0.02 / d**0.5, generator=g)
    if device != "cpu":  # the weights were float32 on their way: that peak is not the step's
        torch.cuda.reset_peak_memory_stats(device)
    return SteeredModel(model.requires_grad_(False), sae, adapter, layer)


def visible(n: int, before: int, window: int | None) -> int:
    """Query-key pairs of n queries at positions before, before + 1, ..., causal and in a window."""
    seen = np.arange(before + 1, before + n + 1)
    return int(seen.sum() if window is None else np.minimum(seen, window).sum())


def step_flops(
    config: Gemma2Config, d_sae: int, layer: int, pairs: list[Pair], training: bool = True
) -> int:
    """Floating-point operations of one optimiser step that no arrangement avoids (a multiply-add
    counts 2), or of an evaluation of the same pairs, which is the forward alone.

    T packed tokens, N response tokens, A query-key pairs that attention must look at:
      a block forward          2 T (d (H + 2 KV) hd + H hd d + 3 d ffn) + 4 A H hd
      its activation-backward  the same for products with weights, twice it for attention
      lower blocks             forward
      upper blocks             forward and activation-backward; no weight gradients
      adapter                  2 T d F forward, 2 T d F weight gradient; nothing trains below it
      decode v W_dec           2 T F d forward, 2 T F d backward
      head, response tokens    2 N d V forward, 2 N d V backward
    """
    c, d = config, config.hidden_size
    T = sum(p.tokens for p in pairs)
    N = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    weights = d * (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    weights += c.num_attention_heads * c.head_dim * d + 3 * d * c.intermediate_size
    total = 0
    for i, layer_type in enumerate(c.layer_types):
        window = c.sliding_window if layer_type == SLIDING else None
        seen = 0
        for p in pairs:
            seen += visible(len(p.prompt), 0, window)
            seen += sum(visible(len(r), len(p.prompt), window) for r in (p.chosen, p.rejected))
        linear, attention = 2 * T * weights, 4 * seen * c.num_attention_heads * c.head_dim
        goes_back = training and i > layer
        total += 2 * linear + 3 * attention if goes_back else linear + attention
    once = 4 * T * d * d_sae + 2 * N * d * c.vocab_size
    return total + (2 * once if training else once)


def matmul_rate(
    config: Gemma2Config, d_sae: int, tokens: int, dtype: torch.dtype, device: str
) -> float:
    """FLOP/s of plain matrix products at the model's shapes, a micro-batch of tokens at a time,
    each shape weighted by the work it stands for in a step.
    """
    c, d = config, config.hidden_size
    chunk = max(1, min(tokens, (1 << 26) // c.vocab_size))
    qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    n = c.num_hidden_layers
    shapes = [  # (rows, inner, columns, how often)
        (tokens, d, qkv, n),
        (tokens, c.num_attention_heads * c.head_dim, d, n),
        (tokens, d, c.intermediate_size, 2 * n),
        (tokens, c.intermediate_size, d, n),
        (tokens, d, d_sae, 2),
        (tokens, d_sae, d, 2),
        (chunk, d, c.vocab_size, tokens / chunk),
        (chunk, c.vocab_size, d, tokens / chunk),
    ]
    work = spent = 0.0
    for rows, inner, columns, often in shapes:
        a = torch.randn(rows, inner, device=device, dtype=dtype)
        b = torch.randn(columns, inner, device=device, dtype=dtype).T
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        times = []
        for _ in range(4):
            synchronise(device)
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            synchronise(device)
            times.append(time.perf_counter() - start)
        work += often * 2 * rows * inner * columns
        spent += often * statistics.median(times[1:])
    return work / spent


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


class Measured(NamedTuple):
    """Of each step after the warm-up."""

    seconds: list[float]
    evaluation_seconds: list[float]
    rates: list[float]  # of matrix products, FLOP/s


def measure(s: Settings, steered: SteeredModel, batch: list[Pair], typical: int) -> Measured:
    """typical: tokens of the micro-batch at whose shapes plain products are timed."""
    device = resolve_device(s.device, s.dtype)
    usual = train.Settings()  # train.py's own defaults
    how = train.Pass(usual.beta, usual.gamma_ratio, s.tokens_per_microbatch, device)
    optimizer = train.make_optimizer(steered.adapter, usual.lr, usual.threshold_lr)
    found = Measured([], [], [])
    for step in range(s.steps + 1):
        rate = matmul_rate(steered.model.config, steered.sae.d_sae, typical, device.dtype, s.device)
        synchronise(s.device)
        started = time.perf_counter()
        train.backward(steered, batch, train.Penalty(usual.l1), how)
        train.clip(steered.adapter, usual.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise(s.device)
        stepped = time.perf_counter()
        train.evaluate(steered, batch, how)  # ends by reading its sums: the device is done
        evaluated = time.perf_counter()

        seconds = stepped - started
        print(f"step {step}: {seconds:.2f} s, matmul {rate / 1e9:.0f} GFLOP/s", file=sys.stderr)
        if step > 0:
            found.rates.append(rate)
            found.seconds.append(seconds)
            found.evaluation_seconds.append(evaluated - stepped)
    return found


def fraction_of_limit(flops: int, rates: list[float], seconds: list[float]) -> float:
    pairs = zip(rates, seconds, strict=True)
    return statistics.median(flops / rate / second for rate, second in pairs)


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    device = resolve_device(s.device, s.dtype)
    steered = build(s.shape, device.dtype, s.device, s.seed, s.d_sae)
    config, d_sae, layer = steered.model.config, steered.sae.d_sae, steered.layer
    batch = random_pairs(s.pairs, config.vocab_size, s.seed, s.length_scale)
    micro = [
        sum(batch[i].tokens for i in m) for m in data.microbatches(batch, s.tokens_per_microbatch)
    ]
    found = measure(s, steered, batch, int(statistics.median(micro)))

    tokens, step = sum(micro), statistics.median(found.seconds)
    flops, eval_flops = (step_flops(config, d_sae, layer, batch, t) for t in (True, False))
    result = dict(
        shape=s.shape,
        dtype=device.dtype_name,
        device=s.device,
        pairs=len(batch),
        tokens=tokens,
        microbatches=len(micro),
        pairs_per_second=len(batch) / step,
        tokens_per_second=tokens / step,
        seconds=found.seconds,
        peak_bytes=peak_memory(s.device),
        step_flops=flops,
        matmul_flops_per_second=statistics.median(found.rates),
        fraction_of_limit=fraction_of_limit(flops, found.rates, found.seconds),
        evaluation_seconds=found.evaluation_seconds,
        evaluation_flops=eval_flops,
        evaluation_fraction_of_limit=fraction_of_limit(
            eval_flops, found.rates, found.evaluation_seconds
        ),
    )
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
