"""Tokens per second of cached greedy decoding, ours against transformers', base and steered, on the same weights.

    pip install -r requirements-dev.txt
    python benchmarks/decode.py --shape mid --batch 1

Four ways in turn, several rounds of them in one process, so that a drifting machine drifts for all: ours, ours steered,
transformers' generate (eager attention: its other kinds leave the softcap out), and that with a forward hook that
steers the long way, as the paper writes it. The adapter's bias is set so that 1.42 % of the features are steered, the
paper's L0. Counted from the first new token to the last: prompts are not in it.
Prints one line of JSON: tokens per second of each (median over the rounds), and ratios of them, round by round. The
tokens of the unsteered ways are compared too.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from packed import pack

from benchmarks.compare import plain_model
from benchmarks.throughput import SHAPES, build, synchronise
from generation import decode as decoding
from runtime import cli
from runtime.cli import flag

L0 = 0.0142  # share of the features steered at a position: the paper's 930 of 65,536


@dataclass(frozen=True)
class Settings:
    shape: str = flag("mid", "size of model and SAE", choices=tuple(SHAPES))
    dtype: str = flag("float32", "of weights and products", choices=("float32", "bfloat16"))
    device: str = flag("cpu", "cpu or cuda")
    batch: int = flag(1, "sequences decoded together")
    prompt: int = flag(64, "tokens of each prompt")
    tokens: int = flag(96, "new tokens of each sequence")
    rounds: int = flag(5, "rounds measured, after one of warm-up")
    seed: int = flag(0, "seed of weights and prompts")


def ours(s: Settings, model, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    """(tokens per second, the new tokens)."""
    times, new = [], [[] for _ in prompts]
    for chosen in decoding.decode(model, prompts, s.tokens, lambda _: False):
        for i, token in chosen.items():
            new[i].append(token)
        times.append(time.perf_counter())
    return rate(s, times), new


def theirs(s: Settings, model, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    from transformers import StoppingCriteriaList

    times = []

    def clock(ids, scores, **_):  # called after each new token
        synchronise(s.device)
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ids = torch.tensor(prompts, device=s.device)
    with torch.inference_mode():
        out = model.generate(
            **dict(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0
            ),
            **dict(
                max_new_tokens=s.tokens,
                min_new_tokens=s.tokens,
                stopping_criteria=StoppingCriteriaList([clock]),
            ),
        )
    return rate(s, times), out[:, s.prompt :].tolist()


def rate(s: Settings, times: list[float]) -> float:
    return s.batch * (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    steered = build(s.shape, getattr(torch, s.dtype), s.device, s.seed).requires_grad_(False)
    vocabulary = steered.model.config.vocab_size
    prompts = np.random.default_rng(s.seed).integers(4, vocabulary, (s.batch, s.prompt)).tolist()
    packed = pack([(prompts[0], [])]).to(s.device)
    x = steered.residual(packed, steered.model.plan(packed))
    z = torch.nn.functional.linear(x, steered.adapter.weight)
    steered.adapter.bias.fill_(-float(np.quantile(z.float().cpu().numpy(), 1 - L0)))
    hooked, _ = plain_model(steered, s)
    (steer,) = hooked.model.layers[steered.layer]._forward_hooks.values()
    hooked.generation_config.eos_token_id = None

    rounds = []
    for number in range(s.rounds + 1):
        row = {}
        row["ours"], a = ours(s, steered.model, prompts)
        row["ours_steered"], c = ours(s, steered, prompts)
        hooked.model.layers[steered.layer]._forward_hooks.clear()
        row["theirs"], b = theirs(s, hooked, prompts)
        hooked.model.layers[steered.layer].register_forward_hook(steer)
        row["theirs_steered"], d = theirs(s, hooked, prompts)
        print(
            f"round {number}: " + ", ".join(f"{k} {v:.1f}" for k, v in row.items()), file=sys.stderr
        )
        rounds.append(row)
    rounds = rounds[1:]
    result = {
        f"{name}_tokens_per_second": statistics.median(r[name] for r in rounds)
        for name in rounds[0]
    }
    for name, over in (
        ("ours", "theirs"),
        ("ours_steered", "theirs"),
        ("ours_steered", "theirs_steered"),
    ):
        ratios = [r[name] / r[over] for r in rounds]
        result[f"{name}_over_{over}"] = dict(median=statistics.median(ratios), rounds=ratios)
    print(
        json.dumps(
            dict(settings=vars(s), threads=torch.get_num_threads(), same_tokens=[a == b, c == d])
            | result
        )
    )


if __name__ == "__main__":
    cli.run(main)
