"""The benchmarks run, print what they promise, and count operations as the profiler does."""

import copy
import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import script
from torch.utils.flop_counter import FlopCounterMode

import simpo
import train
from benchmarks import compare, throughput
from data import Pair, pack_pairs
from fsrl import Unsteered
from runtime.device import Device

CPU = Device("cpu", torch.float32)


@pytest.fixture(scope="module")
def steered():
    return throughput.build("tiny", torch.float32, "cpu", 0)


@pytest.mark.parametrize("whole", [False, True])
def test_counted_operations_are_those_the_step_executes(steered, whole):
    """Against torch's own counter over a whole step. It sees more, because tiles compute some
    scores that causality hides, and where the head trains its logits are computed a second time;
    on one-token prompts and responses next to nothing is hidden.
    """
    model = Unsteered(copy.deepcopy(steered.model).requires_grad_(True)) if whole else steered
    scorer = train.Scorer(beta=10.0, gamma_ratio=0.5, tokens=8192, device=CPU)
    config = steered.model.config
    for pairs, slack in (
        (throughput.random_pairs(6, 1024, 0), 1.1),
        ([Pair([5], [6], [7])] * 4, 1.0005),
    ):
        responses = sum(len(p.chosen) + len(p.rejected) for p in pairs)
        again = 2 * responses * config.hidden_size * config.vocab_size if whole else 0
        counted = throughput.step_flops(model, pairs)
        with FlopCounterMode(display=False) as counter:
            train.backward(model, pairs, train.Penalty(0.02), scorer)
        assert counted <= counter.get_total_flops() - again <= slack * counted

        counted = throughput.step_flops(model, pairs, training=False)
        with FlopCounterMode(display=False) as counter:
            train.evaluate(model, pairs, scorer)
        assert counted <= counter.get_total_flops() <= slack * counted


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
    pairs = throughput.random_pairs(4000, 1000, 0)
    for name, (median, p90) in throughput.LENGTHS.items():
        lengths = [len(getattr(p, name)) for p in pairs]
        assert np.median(lengths) == pytest.approx(median, rel=0.1)
        assert np.quantile(lengths, 0.9) == pytest.approx(p90, rel=0.1)


def run(main, monkeypatch, capsys, *flags) -> dict:
    """The one line of json that a benchmark prints."""
    monkeypatch.setattr("sys.argv", ["benchmark", *flags])
    main()
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_throughput_prints_one_line_of_json(monkeypatch, capsys):
    flags = ("--shape", "tiny", "--pairs", "4", "--steps", "1")
    found = run(throughput.main, monkeypatch, capsys, *flags)
    keys = "pairs_per_second tokens_per_second peak_bytes step_flops matmul_flops_per_second"
    keys += " fraction_of_limit evaluation_fraction_of_limit"
    assert all(found[key] > 0 for key in keys.split())


@pytest.mark.parametrize("name", ["throughput", "compare"])
def test_help_needs_no_optional_package(name):
    result = script("-m", f"benchmarks.{name}", "--help")
    assert result.returncode == 0 and f"python -m benchmarks.{name}" in result.stdout


def test_losses_of_pairs_stand_in_the_order_of_the_batch(steered):
    """Micro-batches are filled by length; each loss is put back where its pair stood."""
    pairs = throughput.random_pairs(7, 1024, 3, scale=0.1)
    scorer = train.Scorer(beta=10.0, gamma_ratio=0.5, tokens=100, device=CPU)
    alone = [
        simpo.score(steered, pack_pairs([pair]), 10.0, 0.5).losses.loss.item() for pair in pairs
    ]
    assert compare.our_losses(steered, pairs, scorer) == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 7


@pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="compares with transformers, a dev library"
)
def test_compare_finds_the_same_losses():
    """Started as a user does: Linux counts a large parent's memory as its child's peak."""
    flags = ("--shape", "tiny", "--pairs", 4, "--steps", 1)
    ended = script("-m", "benchmarks.compare", *flags)
    assert ended.returncode == 0, ended.stderr
    line = json.loads(ended.stdout)
    assert line["largest_loss_difference"] < 1e-3 and line["ratio"] > 0 and line["memory_ratio"] > 0
