"""Tokens per second of cached greedy decoding, ours against transformers', on the same weights.

    pip install -r requirements-dev.txt
    python -m benchmarks.decode --shape mid --batch 1

Four ways in turn, several rounds of them in one process, so that a drifting machine drifts for all:
ours, ours steered, transformers' generate (eager attention, because its other kinds leave the
softcap out), and that with a forward hook that steers the long way, as the paper writes it. The
adapter's bias is set so that 1.42 % of the features are steered, the paper's L0. Counted from the
first new token to the last: prompts are not in it.

Prints one line of JSON: tokens per second of each (median over the rounds), and ratios of them,
round by round. The tokens of ours and theirs are compared too.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.compare import plain_model
from benchmarks.throughput import SHAPES, build, synchronise
from data import pack
from fsrl import SteeredModel, Unsteered
from generation.decode import decode
from runtime import cli
from runtime.cli import flag
from runtime.device import resolve_device

L0 = 0.0142  # share of the features steered at a position: the paper's 930 of 65,536
RATIOS = (("ours", "theirs"), ("ours_steered", "theirs"), ("ours_steered", "theirs_steered"))


@dataclass(frozen=True)
class Settings:
    shape: str = flag("mid", "size of model and SAE", tuple(SHAPES))
    dtype: str = flag("float32", "of weights and products", ("float32", "bfloat16"))
    device: str = flag("cpu", "cpu or cuda")
    batch: int = flag(1, "sequences decoded together")
    prompt: int = flag(64, "tokens of each prompt")
    tokens: int = flag(96, "new tokens of each sequence")
    rounds: int = flag(5, "rounds measured, after one of warm-up")
    seed: int = flag(0, "seed of weights and prompts")

    def __post_init__(self):
        cli.at_least(self, 1, "batch", "prompt", "rounds")
        cli.at_least(self, 2, "tokens")


class Decoded(NamedTuple):
    rate: float  # tokens per second
    new: list[list[int]]  # of each sequence


def ours(s: Settings, model: SteeredModel | Unsteered, prompts: list[list[int]]) -> Decoded:
    times, new = [], [[] for _ in prompts]
    for chosen in decode(model, prompts, s.tokens, lambda _: False):
        for i, token in chosen.items():
            new[i].append(token)
        times.append(time.perf_counter())
    return Decoded(rate(s, times), new)


def theirs(s: Settings, model, prompts: list[list[int]]) -> Decoded:
    from transformers import StoppingCriteriaList

    times = []

    def clock(ids, scores, **_):  # called after each new token
        synchronise(s.device)
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ids = torch.tensor(prompts, device=s.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=0,
            max_new_tokens=s.tokens,
            min_new_tokens=s.tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    return Decoded(rate(s, times), out[:, s.prompt :].tolist())


def rate(s: Settings, times: list[float]) -> float:
    return s.batch * (len(times) - 1) / (times[-1] - times[0])


def steer_as_often(steered: SteeredModel, prompt: list[int]) -> None:
    """Set the adapter's bias so that L0 of the features are steered."""
    packed = pack([(prompt, [])]).to(steered.model.device)
    x = steered.residual(packed, steered.model.plan(packed))
    z = torch.nn.functional.linear(x, steered.adapter.weight)
    steered.adapter.bias.fill_(-float(np.quantile(z.float().cpu().numpy(), 1 - L0)))


@contextmanager
def without_hooks(layer: torch.nn.Module) -> Iterator[None]:
    kept = dict(layer._forward_hooks)
    layer._forward_hooks.clear()
    yield
    layer._forward_hooks.update(kept)


def measure(s: Settings, steered: SteeredModel, hooked=None) -> list[dict[str, Decoded]]:
    """Rounds of each way, the first one warming up. hooked: of plain_model; None: ours alone."""
    steered.requires_grad_(False)
    vocabulary = steered.model.config.vocab_size
    prompts = np.random.default_rng(s.seed).integers(4, vocabulary, (s.batch, s.prompt)).tolist()
    steer_as_often(steered, prompts[0])
    unsteered = Unsteered(steered.model)

    rounds = []
    for number in range(s.rounds + 1):
        row = dict(ours=ours(s, unsteered, prompts), ours_steered=ours(s, steered, prompts))
        if hooked is not None:
            with without_hooks(hooked.model.layers[steered.layer]):
                row["theirs"] = theirs(s, hooked, prompts)
            row["theirs_steered"] = theirs(s, hooked, prompts)
        shown = ", ".join(f"{name} {decoded.rate:.1f}" for name, decoded in row.items())
        print(f"round {number}: {shown}", file=sys.stderr)
        rounds.append(row)
    return rounds


def result(s: Settings, rounds: list[dict[str, Decoded]]) -> dict:
    """What the line of JSON says."""
    last = rounds[-1]
    rates = {name: [row[name].rate for row in rounds[1:]] for name in last}
    found = dict(settings=vars(s), threads=torch.get_num_threads())
    for name, measured in rates.items():
        found[f"{name}_tokens_per_second"] = statistics.median(measured)
    if "theirs" in last:
        found["same_tokens"] = [last[a].new == last[b].new for a, b in (RATIOS[0], RATIOS[2])]
        for name, over in RATIOS:
            ratios = [a / b for a, b in zip(rates[name], rates[over], strict=True)]
            found[f"{name}_over_{over}"] = dict(median=statistics.median(ratios), rounds=ratios)
    return found


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    resolve_device(s.device)
    steered = build(s.shape, getattr(torch, s.dtype), s.device, s.seed)
    hooked, _ = plain_model(steered, s)
    hooked.generation_config.eos_token_id = None
    print(json.dumps(result(s, measure(s, steered, hooked))))


if __name__ == "__main__":
    cli.run(main)
