"""How close one training configuration comes to the machine's own limit.

    python -m benchmarks.throughput --shape mid --dtype float32 --device cpu

Runs whole optimiser steps (train.backward, clipping, AdamW) on random weights of a given shape and
on token lengths that follow UltraFeedback, and prints one line of JSON. The limit is the time that
the floating-point operations which no step can avoid (step_flops, counted from shapes) would take
at the rate of plain matrix products of the model's own shapes, measured between the steps of the
same run: fraction_of_limit = that time / the step's time. An evaluation of the same pairs
(train.evaluate) is measured alike. The first step and the first evaluation, in which a GPU's
kernels are compiled, stand apart.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

import data
import train
from benchmarks.sizes import PUBLISHED
from data import Pair
from fsrl import Adapter, PolicyModel, SteeredModel, Unsteered
from model import SLIDING, Gemma2, Gemma2Config
from runtime import cli
from runtime.cli import flag
from runtime.device import Device, peak_memory, resolve_device
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
USUAL = train.Settings()  # β, γ/β, α, learning rates and clipping of train.py


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

    def __post_init__(self):
        cli.at_least(self, 0, "length_scale")
        cli.at_least(self, 1, "pairs", "steps", "tokens_per_microbatch", "d_sae")


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


def random_model(shape: str, dtype: torch.dtype, device: str, g: torch.Generator) -> Gemma2:
    """Gemma-2 with random weights, never in memory in another dtype than this."""
    with torch.device("meta"):
        model = Gemma2(SHAPES[shape].config).to(dtype)
    model.to_empty(device=device).init_weights(g)
    return model


def build(
    shape: str, dtype: torch.dtype, device: str, seed: int, d_sae: int | None = None
) -> SteeredModel:
    """A steered model with random weights."""
    config, width, layer = SHAPES[shape]
    width, d = d_sae or width, config.hidden_size
    g = torch.Generator(device).manual_seed(seed)
    model = random_model(shape, dtype, device, g)
    with torch.device(device):
        W_dec = torch.nn.functional.normalize(torch.randn(width, d, generator=g), dim=1).to(dtype)
        vectors = dict(b_enc=torch.zeros(width), b_dec=torch.zeros(d), threshold=torch.ones(width))
        arrays = dict(W_enc=W_dec.T.contiguous(), W_dec=W_dec, **vectors)
        sae = JumpReLUSAE({name: array.to(dtype) for name, array in arrays.items()})
        adapter = Adapter(d, width)
        torch.nn.init.normal_(adapter.weight, std=0.02 / d**0.5, generator=g)
    return SteeredModel(model.requires_grad_(False), sae, adapter, layer)


def visible(n: int, before: int, window: int | None) -> int:
    """Query-key pairs of n queries at positions before, before + 1, ..., causal and in a window."""
    seen = np.arange(before + 1, before + n + 1)
    return int(seen.sum() if window is None else np.minimum(seen, window).sum())


def step_flops(model: PolicyModel, pairs: list[Pair], training: bool = True) -> int:
    """Floating-point operations of one optimiser step that no arrangement avoids (a multiply-add
    counts 2), or of an evaluation of the same pairs, which is the forward alone.

    T packed tokens, N response tokens, A query-key pairs that attention must look at:
      a block forward          2 T (d (H + 2 KV) hd + H hd d + 3 d ffn) + 4 A H hd
      its activation-backward  the same for products with weights, twice it for attention
      its weight gradients     the same for products with weights
      lower blocks             forward
      upper blocks             forward and activation-backward; no weight gradients
      adapter                  2 T d F forward, 2 T d F weight gradient; nothing trains below it
      decode v W_dec           2 T F d forward, 2 T F d backward
      head, response tokens    2 N d V forward, 2 N d V backward
    An Unsteered model trains whole: each block goes all three ways, the head too, and there is
    neither adapter nor decode.
    """
    c, d = model.model.config, model.model.config.hidden_size
    whole = isinstance(model, Unsteered)
    lower, d_sae = (0, 0) if whole else (model.layer + 1, model.sae.d_sae)
    T = sum(p.tokens for p in pairs)
    N = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    weights = d * (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    weights += c.num_attention_heads * c.head_dim * d + 3 * d * c.intermediate_size
    linear = 2 * T * weights
    ways = 3 if whole else 2  # forward, activation-backward, and where weights train theirs
    total = 0
    for i, layer_type in enumerate(c.layer_types):
        window = c.sliding_window if layer_type == SLIDING else None
        seen = 0
        for p in pairs:
            seen += visible(len(p.prompt), 0, window)
            seen += sum(visible(len(r), len(p.prompt), window) for r in (p.chosen, p.rejected))
        attention = 4 * seen * c.num_attention_heads * c.head_dim
        goes_back = training and i >= lower
        total += ways * linear + 3 * attention if goes_back else linear + attention
    steering, head = 4 * T * d * d_sae, 2 * N * d * c.vocab_size
    return total + (2 * steering + ways * head if training else steering + head)


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


def forget_peak(device: str) -> None:
    """Count peak memory from here on; on a CPU it is the whole process's for ever."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def reserved_memory(device: str) -> int:
    """Peak bytes that torch took from the GPU, its unused fragments included."""
    return torch.cuda.max_memory_reserved() if device != "cpu" else peak_memory(device)


def scorer_of(s: Settings, device: Device) -> train.Scorer:
    """With train.py's own defaults."""
    return train.Scorer(USUAL.beta, USUAL.gamma_ratio, s.tokens_per_microbatch, device)


def stepper(model: PolicyModel, batch: list[Pair], scorer: train.Scorer) -> Callable[[], None]:
    """A function that makes one whole optimiser step, as train.run_steps does."""
    optimizer = train.make_optimizer(model.trained, USUAL.lr, USUAL.threshold_lr)
    penalty = train.Penalty() if isinstance(model, Unsteered) else train.Penalty(USUAL.l1)

    def step() -> None:
        train.backward(model, batch, penalty, scorer)
        train.clip(model.trained, USUAL.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Measured(NamedTuple):
    """Lists hold the first step, which compiles, and then each measured one."""

    seconds: list[float]
    evaluation_seconds: list[float]
    rates: list[float]  # of matrix products, FLOP/s
    peak_bytes: int  # of the steps
    reserved_bytes: int


def measure(s: Settings, model: PolicyModel, batch: list[Pair], evaluates: bool) -> Measured:
    device = resolve_device(s.device, s.dtype)
    scorer = scorer_of(s, device)
    step = stepper(model, batch, scorer)
    d_sae = 0 if isinstance(model, Unsteered) else model.sae.d_sae
    typical = int(statistics.median(microbatch_tokens(s, batch)))
    seconds, evaluations, rates, peaks = [], [], [], []
    for number in range(s.steps + 1):
        rate = matmul_rate(model.model.config, d_sae, typical, device.dtype, s.device)
        if number == 0 and s.device != "cpu":
            torch.cuda.empty_cache()  # reserved memory is then the steps', not the products' above
        forget_peak(s.device)
        synchronise(s.device)
        started = time.perf_counter()
        step()
        synchronise(s.device)
        stepped = time.perf_counter()
        peaks.append((peak_memory(s.device), reserved_memory(s.device)))
        if evaluates:
            train.evaluate(model, batch, scorer)  # ends by reading its sums: the device is done
            evaluations.append(time.perf_counter() - stepped)

        rates.append(rate)
        seconds.append(stepped - started)
        shown = f"{seconds[-1]:.2f} s, matmul {rate / 1e9:.0f} GFLOP/s"
        print(f"step {number}: {shown}", file=sys.stderr)
    return Measured(seconds, evaluations, rates, *map(max, zip(*peaks, strict=True)))


def microbatch_tokens(s: Settings, batch: list[Pair]) -> list[int]:
    """Tokens of each micro-batch of a step."""
    plan = data.microbatches(batch, s.tokens_per_microbatch)
    return [sum(batch[i].tokens for i in indices) for indices in plan]


def fraction_of_limit(flops: int, rates: list[float], seconds: list[float]) -> float:
    pairs = zip(rates, seconds, strict=True)
    return statistics.median(flops / rate / second for rate, second in pairs)


def result(s: Settings, model: PolicyModel, batch: list[Pair], evaluates: bool = True) -> dict:
    """What the line of JSON says."""
    found = measure(s, model, batch, evaluates)
    (first, *seconds), rates = found.seconds, found.rates[1:]
    micro = microbatch_tokens(s, batch)
    tokens, step = sum(micro), statistics.median(seconds)
    flops, eval_flops = (step_flops(model, batch, training) for training in (True, False))
    said = dict(
        shape=s.shape,
        dtype=resolve_device(s.device, s.dtype).dtype_name,
        device=s.device,
        pairs=len(batch),
        tokens=tokens,
        microbatches=len(micro),
        pairs_per_second=len(batch) / step,
        tokens_per_second=tokens / step,
        first_seconds=first,
        seconds=seconds,
        peak_bytes=found.peak_bytes,
        reserved_bytes=found.reserved_bytes,
        step_flops=flops,
        matmul_flops_per_second=statistics.median(rates),
        fraction_of_limit=fraction_of_limit(flops, rates, seconds),
    )
    if not evaluates:
        return said

    first, *seconds = found.evaluation_seconds
    return said | dict(
        first_evaluation_seconds=first,
        evaluation_seconds=seconds,
        evaluation_flops=eval_flops,
        evaluation_fraction_of_limit=fraction_of_limit(eval_flops, rates, seconds),
    )


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    device = resolve_device(s.device, s.dtype)
    steered = build(s.shape, device.dtype, s.device, s.seed, s.d_sae)
    batch = random_pairs(s.pairs, steered.model.config.vocab_size, s.seed, s.length_scale)
    print(json.dumps(result(s, steered, batch)))


if __name__ == "__main__":
    cli.run(main)
