"""train.py as a user runs it: the golden trajectory, what it writes, what it refuses, and the tiny
run.
"""

import contextlib
import io
import json
import re
import shutil
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, SAE_ID, golden_run, load, metrics
from safetensors.torch import load_file

import data
import simpo
import train
from fsrl import Adapter
from runtime import cli
from runtime.device import Device, dtype_on, resolve_device

TRAJECTORY = (
    "--schedule",
    "constant",
    "--lr",
    1e-3,
    "--max-grad-norm",
    0,
    "--max-steps",
    10,
    "--no-shuffle",
)


def quick_run(out, *flags) -> forked.Ended:
    """golden_run without the imports of a new process, and without samples."""
    return forked.golden(out, *flags)[0]


@pytest.fixture(scope="module")
def mid_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mid"
    result = golden_run(
        out, *TRAJECTORY, "--init-adapter", GOLDEN / "adapter_mid", "--eval-every", 4
    )
    assert result.returncode == 0, result.stderr
    return out, result


@pytest.mark.parametrize("adapter", ["mid", "paper_init"])
def test_ten_steps_follow_the_golden_trajectory(report, expected, tmp_path, mid_run, adapter):
    """Losses and the final adapter stay within three times float32's own drift from the authors'
    stack in float64.
    """
    out = mid_run[0] if adapter == "mid" else tmp_path / "run"
    if adapter != "mid":  # micro-batches of one pair each: the packing must not matter
        flags = ("--tokens-per-microbatch", 1, "--init-adapter", GOLDEN / f"adapter_{adapter}")
        assert quick_run(out, *TRAJECTORY, *flags).returncode == 0
    want = report["trajectory"][adapter]
    rows = metrics(out)
    assert len(rows) == len(want["steps"]) == 10
    for row, step in zip(rows, want["steps"], strict=True):
        assert row["total"] == pytest.approx(step["loss"], abs=3 * want["noise"]["loss_maxdiff"])
        assert row["loss"] == pytest.approx(step["simpo"], abs=3 * want["noise"]["loss_maxdiff"])
    assert rows[0]["loss"] == pytest.approx(want["steps"][0]["simpo"], rel=1e-5)
    assert rows[0]["l1"] == pytest.approx(want["steps"][0]["l1"], rel=1e-5)
    assert rows[0]["l0"] == pytest.approx(want["steps"][0]["l0"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(want["steps"][0]["grad_norm"], rel=1e-5)
    weight = load_file(out / "adapter/adapter.safetensors")["weight"]
    reference = expected[f"final_{adapter}_weight"]
    assert (weight - reference).abs().max() <= 3 * want["noise"]["final_weight_maxdiff"]
    assert (weight - reference).norm() <= 3 * want["noise"][
        "final_weight_rel_l2"
    ] * reference.norm()


def test_a_run_writes_what_the_contract_says(mid_run):
    out, result = mid_run
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "adapter",
        "loss.png",
        "samples.json",
        "checkpoints",
    }
    keys = "split step epoch loss l1 l0 penalty total accuracy margin reward_chosen reward_rejected"
    keys += " logp_chosen logp_rejected lr grad_norm pairs tokens tokens_per_second seconds"
    rows = metrics(out)
    assert set(rows[0]) == set(keys.split())
    for row in rows:
        assert row["penalty"] == pytest.approx(0.02 * row["l1"])
        assert row["total"] == pytest.approx(row["loss"] + row["penalty"])
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"])
        assert row["reward_chosen"] == pytest.approx(10 * row["logp_chosen"])
        assert row["pairs"] == 4
    evals = metrics(out, "eval")
    assert [row["step"] for row in evals] == [0, 4, 8, 10]
    assert set(evals[0]) == {
        "split",
        "step",
        "loss",
        "accuracy",
        "margin",
        "logp_chosen",
        "logp_rejected",
        "l1",
        "l0",
        "penalty",
        "total",
        "pairs",
        "tokens",
    }
    assert evals[0]["pairs"] == 8
    for row in evals:  # the authors' evaluation loss is this total
        assert row["total"] == pytest.approx(row["loss"] + 0.02 * row["l1"]) != row["loss"]

    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["layer"] == 1 and config["settings"]["dtype"] != "auto"
    inputs = dict(model=2, shards=8, data_files=2, sae=1, init_adapter=1)
    assert config["versions"]["torch"] and len(config["sha256"]) == sum(inputs.values())
    adapter = json.loads((out / "adapter/adapter_config.json").read_text())
    assert (
        adapter["sae_sha256"] == load().sae.sha256
        and adapter["sae_id"] == SAE_ID
        and adapter["layer"] == 1
    )
    for words in (
        "before",
        "after",
        "eval SimPO loss",
        "eval accuracy",
        "eval mean L0",
        "seconds",
        "peak memory",
    ):
        assert words in result.stdout
    assert "Traceback" not in result.stderr


def test_same_seed_same_bytes_whatever_was_cached(tmp_path):
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        assert quick_run(out, "--max-steps", 3, "--seed", 7).returncode == 0
    a, b = ((out / "adapter/adapter.safetensors").read_bytes() for out in outs)
    assert a == b
    assert quick_run(tmp_path / "c", "--max-steps", 3, "--seed", 8).returncode == 0
    assert (tmp_path / "c/adapter/adapter.safetensors").read_bytes() != a


def test_packing_changes_neither_losses_nor_the_adapter(tmp_path):
    flags = ("--max-steps", 3, "--lr", 1e-3, "--init-adapter", GOLDEN / "adapter_mid")
    for limit in (1, 150, 100_000):
        result = quick_run(tmp_path / str(limit), *flags, "--tokens-per-microbatch", limit)
        assert result.returncode == 0, result.stderr
    one, some, all_ = (tmp_path / name for name in ("1", "150", "100000"))
    for other in (some, all_):
        for a, b in zip(metrics(one), metrics(other), strict=True):
            assert all(
                a[k] == pytest.approx(b[k], rel=1e-4)
                for k in ("loss", "l1", "l0", "accuracy", "grad_norm")
            )
        weights = [load_file(out / "adapter/adapter.safetensors")["weight"] for out in (one, other)]
        assert (weights[0] - weights[1]).norm() <= 1e-4 * weights[0].norm()


def test_the_frozen_parts_are_bit_identical_after_training(tmp_path, monkeypatch):
    kept = {}
    real = train.new_policy

    def watched(*arguments):
        kept["policy"] = real(*arguments)
        state = kept["policy"].model.state_dict()
        kept["before"] = {name: tensor.clone() for name, tensor in state.items()}
        return kept["policy"]

    monkeypatch.setattr(train, "new_policy", watched)
    monkeypatch.setattr(train, "greedy", lambda *_: "")
    g = GOLDEN
    where = dict(model=str(g / "model"), sae=str(g / "sae"), sae_id=SAE_ID, data=str(g / "dataset"))
    how = dict(layer=1, batch_size=4, max_steps=3, lr=1e-2, out=str(tmp_path / "run"))
    train.train(train.Settings(**where, **how, device="cpu"))
    after = kept["policy"].model.state_dict()
    before = kept["before"].items()
    changed = {name for name, tensor in before if not torch.equal(tensor, after[name])}
    assert changed == {"adapter.weight", "adapter.bias"}


def test_learning_rate_schedule_is_transformers_cosine():
    """Printed by get_cosine_schedule_with_warmup(optimizer, ceil(0.1 * 25), 25) of transformers
    5.23.
    """
    theirs = [
        *(0.0, 0.333333, 0.666667, 1.0, 0.994911, 0.979746, 0.954816, 0.920627, 0.877875),
        *(0.82743, 0.77032, 0.707708, 0.640866, 0.571157, 0.5, 0.428843, 0.359134, 0.292292),
        *(0.22968, 0.17257, 0.122125, 0.079373, 0.045184, 0.020254, 0.005089),
    ]
    ours = [train.lr_factor(step, 25, "cosine", 0.1) for step in range(25)]
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert train.lr_factor(0, 25, "constant", 0.1) == 1.0
    assert train.lr_factor(0, 25, "cosine", 0.0) == 1.0
    warmed = [train.lr_factor(step, 25, "constant-with-warmup", 0.1) for step in (0, 1, 2, 3, 24)]
    assert warmed == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])


def test_the_authors_schedule_penalty_warmup_and_unclipped_gradients(tmp_path):
    """Their configuration of August 2025, as docs/paper.md has it, on the golden model."""
    flags = "--layer 1 --lr 5e-7 --schedule constant-with-warmup --max-grad-norm 0"
    flags += " --penalty-warmup-ratio 0.2 --max-steps 10 --eval-every 0"
    result = quick_run(tmp_path / "run", *flags.split(), "--init-adapter", GOLDEN / "adapter_mid")
    assert result.returncode == 0, result.stderr
    rows = metrics(tmp_path / "run")
    assert [row["lr"] for row in rows] == [0.0, *[5e-7] * 9]
    assert [row["penalty"] for row in rows[:2]] == [0.0, 0.0] and rows[0]["l1"] > 0
    for row in rows[2:]:
        assert row["penalty"] == pytest.approx(0.02 * row["l1"]) and row["penalty"] > 0

    layer = torch.nn.Linear(2, 1, bias=False)
    for most, left in ((0.0, [3.0, 4.0]), (1.0, [0.6, 0.8])):
        layer.weight.grad = torch.tensor([[3.0, 4.0]])
        assert train.clip(layer, most) == 5.0
        assert layer.weight.grad[0].tolist() == pytest.approx(left, rel=1e-5)


def test_bfloat16_stays_near_float32_and_does_not_depend_on_packing(tmp_path):
    """bfloat16 weights and products end to end; what averages over pairs and positions is still
    summed in float32.
    """
    flags = ("--max-steps", 3, "--lr", 1e-3, "--init-adapter", GOLDEN / "adapter_mid")
    for name, dtype, limit in (
        ("a", "float32", 8192),
        ("b", "bfloat16", 8192),
        ("c", "bfloat16", 100),
    ):
        result = quick_run(
            tmp_path / name, *flags, "--dtype", dtype, "--tokens-per-microbatch", limit
        )
        assert result.returncode == 0, result.stderr
    for split in ("train", "eval"):
        for exact, low, packed in zip(
            *(metrics(tmp_path / name, split) for name in "abc"), strict=True
        ):
            for key, close in dict(loss=0.1, l1=0.01, l0=0.02).items():
                assert low[key] == pytest.approx(exact[key], rel=close) and low[key] != exact[key]
                assert packed[key] == pytest.approx(low[key], rel=close / 2)


@pytest.mark.parametrize(
    "has", [{"avx512_bf16": True}, {"amx_bf16": True}, {"bf16": True}, {"avx512_bf16": False}, {}]
)
def test_bfloat16_is_for_processors_that_multiply_it(monkeypatch, capsys, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    found = resolve_device("cpu", "bfloat16")
    assert found.dtype == (torch.bfloat16 if any(has.values()) else torch.float32)
    said = capsys.readouterr().err.count("--dtype bfloat16")
    assert said == (found.dtype == torch.float32)
    for dtype in ("auto", "float32"):
        assert resolve_device("cpu", dtype).dtype == torch.float32
    assert dtype_on("cuda:0", "auto") == dtype_on("cuda:0", "bfloat16") == "bfloat16"
    assert dtype_on("cuda:0", "float32") == "float32" and capsys.readouterr().err == ""


def test_penalties_are_summed_in_float32_under_autocast():
    golden = load()
    pairs = [data.Pair([2] * 40, [5] * n, [6] * 3) for n in range(1, 30)]
    packed = data.pack_pairs(pairs)
    with Device("cpu", torch.bfloat16).autocast(), torch.no_grad():
        scores = simpo.score(golden.steered, packed, 10.0, 0.5)
        _, l1, l0 = golden.steered(packed)
    assert scores.l0.dtype == torch.float32
    exact_l0, exact_l1 = ((x.double() * packed.copies).sum().item() for x in (l0, l1))
    assert scores.l0.item() == pytest.approx(exact_l0, rel=1e-6)
    assert scores.l1.item() == pytest.approx(exact_l1, rel=1e-6)


def test_evaluation_is_a_mean_over_pairs_and_positions_whatever_the_packing():
    golden = load()
    tokenizer = data.load_tokenizer(GOLDEN / "model")
    pairs = data.load_pairs(GOLDEN / "dataset", tokenizer, split="test")
    results = []
    for limit in (1, 200, 100_000):
        scorer = train.Scorer(10.0, 0.5, limit, resolve_device("cpu"))
        results.append(train.evaluate(golden.steered, pairs, scorer))
    for other in results[1:]:
        # A feature whose pre-activation is within rounding of 0 may count on one side only.
        assert other.pop("l0") == pytest.approx(results[0]["l0"], rel=1e-3)
        same = {k: v for k, v in results[0].items() if k != "l0"}
        assert other == pytest.approx(same, rel=1e-5, abs=1e-4)
    with torch.no_grad():
        alone = [simpo.score(golden.steered, data.pack_pairs([p]), 10.0, 0.5) for p in pairs]
    losses = [scores.losses.loss.item() for scores in alone]
    assert results[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    l1 = sum(x.l1.item() for x in alone) / sum(data.positions([p]) for p in pairs)
    assert results[0]["l1"] == pytest.approx(l1, rel=1e-6)


def test_the_unit_of_steering_scales_penalty_and_biases(tmp_path):
    """`stream` is 1 % of the residual stream's median norm, which config.json records."""
    flags = ("--max-steps", 4, "--lr", 1e-3, "--schedule", "constant")
    found = {}
    for name in ("1", "stream"):
        assert quick_run(tmp_path / name, *flags, "--unit", name).returncode == 0
        unit = json.loads((tmp_path / name / "config.json").read_text())["unit"]
        bias = load_file(tmp_path / name / "adapter/adapter.safetensors")["bias"]
        found[name] = unit, bias.abs().max().item(), metrics(tmp_path / name)
    unit, bias, rows = found["stream"]
    golden = load()
    pairs = data.load_pairs(
        GOLDEN / "dataset", data.load_tokenizer(GOLDEN / "model"), split="train"
    )
    norms = []
    for pair in pairs[: train.UNIT_PAIRS]:
        packed = data.pack_pairs([pair])
        x = golden.steered.residual(packed, golden.model.plan(packed))
        norms.append(x[packed.position > 0].norm(dim=1))
    assert unit == pytest.approx(torch.cat(norms).median().item() / 100, rel=1e-5)
    assert found["1"][0] == 1.0 and unit != 1.0
    assert all(row["penalty"] == pytest.approx(0.02 * row["l1"] / unit) for row in rows)
    assert bias == pytest.approx(unit * found["1"][1], rel=0.3)


# --- mistakes -------------------------------------------------------------------------------------


def one_sentence(result, *words):
    assert result.returncode == 2, result.stderr
    message = result.stderr.splitlines()[-1]
    said = [line for line in result.stderr.splitlines() if "rows used" not in line]
    assert "Traceback" not in result.stderr and len(said) <= 2, result.stderr
    assert message.endswith(".") and all(word in message for word in map(str, words)), message


def mangled_shard(tmp_path, keep):
    """The golden model with only the first `keep` bytes of one shard, or without it."""
    folder = shutil.copytree(GOLDEN / "model", tmp_path / "model")
    shard = folder / "model-00003-of-00008.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    if keep:
        shard.write_bytes(whole[:keep])
    return "--model", folder


def mangled_npz(tmp_path, **changed):
    with np.load(GOLDEN / "sae" / SAE_ID / "params.npz") as npz:
        np.savez(tmp_path / "params.npz", **(dict(npz) | changed))
    return "--sae", tmp_path / "params.npz", "--sae-id", ""


def with_row(tmp_path, **row):
    good = dict(prompt="q", chosen="a", rejected="b")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [good] * 4 + [row]))
    return "--data", tmp_path / "rows.jsonl"


def out_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return "--out", tmp_path / "file" / "run"


def tokenizer_too_large(tmp_path):
    folder = shutil.copytree(GOLDEN / "model", tmp_path / "model")
    shutil.copy(ROOT / "tiny/model/tokenizer.json", folder)
    return "--model", folder


GOOD = [dict(role="user", content="q"), dict(role="assistant", content="a")]
OTHER = [dict(role="user", content="p"), GOOD[1]]
ROBOT = [dict(role="robot", content="q"), GOOD[1]]
MISTAKES = {  # name -> the flags (made in a folder t), and words the sentence must hold
    "missing shard": (
        lambda t: mangled_shard(t, 0),
        ["model-00003-of-00008.safetensors", "missing"],
    ),
    "truncated shard": (
        lambda t: mangled_shard(t, 5000),
        ["model-00003-of-00008.safetensors", "not a whole"],
    ),
    "truncated header": (
        lambda t: mangled_shard(t, 5),
        ["model-00003-of-00008.safetensors", "not a whole"],
    ),
    "npz of a wrong shape": (
        lambda t: mangled_npz(t, W_dec=np.zeros((3, 5), np.float32)),
        ["params.npz", "W_dec", "(3, 5)"],
    ),
    "npz with a pickled object": (
        lambda t: mangled_npz(t, b_dec=np.array([{}], dtype=object)),
        ["params.npz", "b_dec", "object"],
    ),
    "row without rejected": (lambda t: with_row(t, chosen=GOOD), ["row 4", "`rejected`"]),
    "assistant turn missing": (
        lambda t: with_row(t, chosen=GOOD[:1], rejected=GOOD),
        ["row 4", "assistant turn"],
    ),
    "differing prompts": (
        lambda t: with_row(t, chosen=GOOD, rejected=OTHER),
        ["row 4", "disagree on the prompt"],
    ),
    "unknown role": (lambda t: with_row(t, chosen=GOOD, rejected=ROBOT), ["row 4", "'robot'"]),
    "unknown flag": (lambda t: ("--learning-rate", 1), ["--learning-rate"]),
    "abbreviated flag": (lambda t: ("--bet", 1), ["--bet"]),
    "not a number": (lambda t: ("--lr", "fast"), ["--lr"]),
    "layer beyond the model": (lambda t: ("--layer", 4), ["--layer 4", "blocks 0 to 3"]),
    "layer of another SAE": (lambda t: ("--layer", 2), ["--layer 2", SAE_ID]),
    "unknown SAE id": (lambda t: ("--sae-id", "layer_1/width_1m"), ["layer_1/width_1m"]),
    "CUDA absent": (lambda t: ("--device", "cuda:63"), ["--device cuda:63", "CUDA"]),
    "unknown device": (lambda t: ("--device", "abacus"), ["--device abacus"]),
    "indexed cpu": (lambda t: ("--device", "cpu:0"), ["--device cpu:0"]),
    "seed too large": (lambda t: ("--seed", 10**20), ["--seed"]),
    "ratio not a number": (lambda t: ("--gamma-ratio", "nan"), ["--gamma-ratio"]),
    "model without a value": (lambda t: ("--model",), ["--model"]),
    "tokenizer of another model": (tokenizer_too_large, ["tokenizer"]),
    "no such data": (lambda t: ("--data", t / "nothing.jsonl"), ["nothing.jsonl"]),
    "no such model": (lambda t: ("--model", t / "nothing"), ["nothing"]),
    "batch larger than the data": (lambda t: ("--batch-size", 49), ["--batch-size 49"]),
    "negative penalty": (lambda t: ("--l1", -1), ["--l1"]),
    "nan": (lambda t: ("--beta", "nan"), ["--beta"]),
    "out below a file": (out_below_a_file, ["--out"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, mistake):
    """As a subprocess for one of them; the others in this process, which spares an import of torch
    each.
    """
    prepare, words = MISTAKES[mistake]
    arguments = prepare(tmp_path)
    if mistake == "unknown flag":
        one_sentence(golden_run(tmp_path / "run", *arguments), *words)
    else:
        one_sentence(in_process(tmp_path / "run", arguments), *words)
    assert not (tmp_path / "run").exists()


def in_process(out, arguments):
    g = GOLDEN
    argv = [
        "--model",
        g / "model",
        "--sae",
        g / "sae",
        "--sae-id",
        SAE_ID,
        "--data",
        g / "dataset",
        "--layer",
        1,
    ]
    argv += ["--batch-size", 4, "--out", out, *arguments]
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as stop:
        cli.run(lambda: train.train(cli.parse(train.Settings, [*map(str, argv)], train.PRESETS)))
    return SimpleNamespace(returncode=stop.value.code, stderr=stderr.getvalue())


def test_a_finished_run_is_not_overwritten(mid_run):
    out, _ = mid_run
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    one_sentence(in_process(out, []), "--out", "holds a run already")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_loss_that_is_not_finite_stops_with_step_and_pairs(tmp_path):
    adapter = Adapter.from_pretrained(GOLDEN / "adapter_mid")
    with torch.no_grad():
        adapter.weight[3] = 3e38  # finite, but not its product with the residual stream
    adapter.save_pretrained(tmp_path / "huge", {})
    (result,) = forked.golden(tmp_path / "run", "--init-adapter", tmp_path / "huge", "--no-shuffle")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(r"Step 1: loss nan, .*, in pairs \[0, 1, 2, 3\]", result.stderr), result.stderr
    assert not (tmp_path / "run/adapter").exists() and not metrics(tmp_path / "run")


# --- the embedded world ---------------------------------------------------------------------------


def test_the_tiny_run_learns_the_planted_style(tiny_run):
    first, *_, last = metrics(tiny_run, "eval")
    assert last["loss"] <= first["loss"] / 2
    assert last["accuracy"] > 0.9
    samples = (tiny_run.parent / "stdout").read_text().split("--- before\n")[1:]
    before, after = zip(*(sample.split("--- after\n") for sample in samples), strict=True)
    assert not any("**" in text or "In summary" in text for text in before)
    assert all("**" in text and "In summary" in text for text in after)


def test_tiny_trains_on_real_ultrafeedback_pairs(tmp_path):
    rows = ROOT / "tests/data/ultrafeedback_32.jsonl"
    flags = ("--max-steps", 2, "--batch-size", 4, "--eval-data", rows, "--out", tmp_path / "run")
    forked.good(forked.Run(["--model", "tiny", "--data", rows, *flags]).wait())
    assert (
        len(metrics(tmp_path / "run")) == 2 and metrics(tmp_path / "run", "eval")[-1]["pairs"] == 8
    )
