"""The benchmarks run, print what they promise, and count operations as the profiler does."""

import importlib.util
import json

import pytest
import torch
from conftest import script
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks import throughput


def test_counted_operations_are_those_the_step_executes():
    """Against torch's own counter over a whole step. It sees more, because tiles compute some scores that causality
    hides; on one-token prompts and responses next to nothing is hidden.
    """
    config, d_sae, layer = throughput.SHAPES["tiny"]
    steered = throughput.build("tiny", torch.float32, "cpu", 0)
    s = train.Settings(device="cpu", dtype="float32")
    for pairs, slack in (
        (throughput.random_pairs(6, 1024, 0), 1.1),
        ([throughput.Pair([5], [6], [7])] * 4, 1.0005),
    ):
        counted = throughput.step_flops(config, d_sae, layer, pairs)
        with FlopCounterMode(display=False) as counter:
            train.backward(steered, train.Batch(pairs, range(len(pairs))), 0.02, s)
        executed = counter.get_total_flops()
        assert counted <= executed <= slack * counted


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_visible_pairs(before, window):
    n = 9
    pairs = [
        (q, k)
        for q in range(before, before + n)
        for k in range(q + 1)
        if window is None or q - k < window
    ]
    assert throughput.visible(n, before, window) == len(pairs)


def test_lengths_follow_ultrafeedback():
    import numpy as np

    pairs = throughput.random_pairs(4000, 1000, 0)
    for name, (median, p90) in throughput.LENGTHS.items():
        lengths = [len(getattr(p, name)) for p in pairs]
        assert np.median(lengths) == pytest.approx(median, rel=0.1)
        assert np.quantile(lengths, 0.9) == pytest.approx(p90, rel=0.1)


def test_throughput_prints_one_line_of_json():
    result = script("-m", "benchmarks.throughput", "--shape", "tiny", "--pairs", 4, "--steps", 1)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    keys = "pairs_per_second tokens_per_second peak_bytes step_flops matmul_flops_per_second fraction_of_limit"
    assert all(json.loads(line)[key] > 0 for key in keys.split())


@pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="compares with transformers, a dev library"
)
def test_compare_finds_the_same_losses():
    result = script("-m", "benchmarks.compare", "--shape", "tiny", "--pairs", 4, "--steps", 1)
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout)
    assert line["largest_loss_difference"] < 1e-3 and line["ratio"] > 0 and line["memory_ratio"] > 0
