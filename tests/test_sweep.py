"""sweep.py: the plan, what is skipped, shared, reported and continued, the elbow, and runs side by side."""

import csv
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, SAE_ID

import sae
import train
from experiments import sweep
from runtime import cli
from runtime.sources import UserError

G = GOLDEN
WHERE = [
    "--model",
    str(G / "model"),
    "--sae",
    str(G / "sae"),
    "--sae-id",
    SAE_ID,
    "--data",
    str(G / "dataset"),
]
FLAGS = [*WHERE, "--layer", "1", "--batch-size", "4", "--max-steps", "2", "--eval-every", "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One real run, standing where a sweep would have put it; copies stand in for others."""
    out = tmp_path_factory.mktemp("sweep") / "layer1-relu-l1_0.02-seed0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.decoding, "greedy", lambda *_: "")  # samples are other tests' business
        return train.train(
            cli.parse(train.Settings, [*FLAGS, "--device", "cpu", "--out", str(out)])
        )


def pretend(finished, run: sweep.Run, loss=1.0, l0=10.0) -> None:
    """A finished run of these settings with this evaluation."""
    shutil.copytree(finished, run.out)
    config = json.loads((run.out / "config.json").read_text())
    ours = {name: getattr(run.settings, name) for name in config["settings"]}
    ours["dtype"] = train.dtype_on("cpu", ours["dtype"])
    config["settings"] |= {
        name: value for name, value in ours.items() if name not in sweep.ELSEWHERE
    }
    (run.out / "config.json").write_text(json.dumps(config))
    row = dict(
        split="eval", step=2, loss=loss, accuracy=1.0, margin=1.0, l1=1.0, l0=l0, pairs=8, tokens=9
    )
    (run.out / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def settings(out, **more) -> sweep.Settings:
    return sweep.Settings(out=str(out), **more)


def test_the_plan_crosses_everything_and_each_adapter_has_its_penalty(tmp_path):
    s = settings(
        tmp_path,
        adapters=("relu", "jumprelu"),
        l1=(0.02, 0.1),
        l0=(0.5,),
        seeds=(0, 1),
        layers=(1, 2),
    )
    runs = sweep.plan(s, [*WHERE[:4], *WHERE[6:], "--max-steps", "3"])
    assert len({run.out for run in runs}) == len(runs) == 2 * (2 + 1) * 2
    assert [run.settings.layer for run in runs] == sorted(run.settings.layer for run in runs)
    for run in runs:
        t = run.settings
        assert t.max_steps == 3
        weight = f"l0_{t.l0:g}" if t.adapter == "jumprelu" else f"l1_{t.l1:g}"
        assert run.out.name == f"layer{t.layer}-{t.adapter}-{weight}-seed{t.seed}"
        assert (
            (t.l1 == 0.0 and t.l0 == 0.5)
            if t.adapter == "jumprelu"
            else (t.l1 in (0.02, 0.1) and t.l0 == 0.0)
        )
        assert ("--cache-activations", str(tmp_path / "activations")) == run.cache
    (alone,) = sweep.plan(settings(tmp_path, cache=False), ["--model", "tiny"])
    assert alone.out.name == "layer2-relu-l1_0.02-seed0" and alone.cache == ()


@pytest.mark.parametrize(
    "more, rest, words",
    [
        (dict(adapters=("gelu",)), [], "--adapters gelu"),
        (dict(adapters=("jumprelu",)), [], "--l0"),
        (dict(l0=(0.1,)), [], "only --adapters jumprelu"),
        (dict(seeds=(0, 0)), [], "a value stands twice"),
        (dict(devices=("tpu",)), [], "--devices tpu"),
        (dict(l1=(-1.0,)), [], "--l1 -1.0"),
        (dict(), ["--bogus", "1"], "bogus"),
        (dict(), ["--full"], "--full: a sweep is over adapters"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, more, rest, words):
    with pytest.raises(UserError, match=words):
        sweep.plan(settings(tmp_path, **more), rest)


def test_local_folders_of_saes_follow_the_papers_rule(tmp_path):
    for name in (
        "layer_1/width_1k/average_l0_20",
        "layer_1/width_1k/average_l0_8",
        "layer_2/width_1k/average_l0_9",
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "params.npz").touch()
    assert (
        sae.default_id(str(tmp_path), 1) == "layer_1/width_1k/average_l0_8"
    )  # 8 before 20: numbers, not names
    assert sae.default_id(str(tmp_path), 2) == "layer_2/width_1k/average_l0_9"
    assert sae.default_id(str(tmp_path), 3) is None and sae.default_id("tiny", 1) is None


def test_a_sweep_runs_shares_skips_continues_and_reports(tmp_path, finished, monkeypatch, capsys):
    """One finished run is skipped, an unfinished one started again, two run at once, one that fails is named."""
    out = tmp_path / "s"
    flags = [
        "--l1",
        "0.02",
        "0.2",
        "--seeds",
        "0",
        "1",
        "--devices",
        "cpu",
        "cpu",
        "--out",
        str(out),
        "--",
        *FLAGS,
    ]
    out.mkdir()
    shutil.copytree(finished, out / finished.name)
    kept = (out / finished.name / "metrics.jsonl").stat().st_mtime_ns
    broken = out / "layer1-relu-l1_0.2-seed0"
    shutil.copytree(finished, broken)
    shutil.rmtree(broken / "adapter")
    shutil.rmtree(broken / "checkpoints", ignore_errors=True)
    (
        out / "layer1-relu-l1_0.02-seed1.log"
    ).mkdir()  # where this run's output would go: it cannot start
    result = subprocess.run(
        [sys.executable, "-m", "experiments.sweep", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (
        result.returncode == 2 and "1 of 4 runs failed: layer1-relu-l1_0.02-seed1." in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert (out / finished.name / "metrics.jsonl").stat().st_mtime_ns == kept
    assert not (out / "layer1-relu-l1_0.2-seed0.unfinished-1" / "adapter").exists()
    with open(out / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [finished.name, broken.name, "layer1-relu-l1_0.2-seed1"]
    for row in rows:
        log = [json.loads(line) for line in (out / row["run"] / "metrics.jsonl").open()]
        last = [r for r in log if r["split"] == "eval"][-1]
        assert (
            float(row["loss"]) == last["loss"]
            and float(row["l0"]) == last["l0"]
            and float(row["step"]) == 2
        )
    assert (out / "sweep.png").stat().st_size > 10_000
    # Streams of train and test pairs, written by the first run and read by the other.
    assert len(list((out / "activations").iterdir())) == 2
    logs = [(out / f"{name}.log").read_text() for name in (broken.name, "layer1-relu-l1_0.2-seed1")]
    assert sorted(log.count("GB of activations") for log in logs) == [0, 2]
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--list", *flags])
    sweep.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("layer1-relu-l1_0.02-seed1") and "train.py" in line and "--l1 0.02" in line


def test_two_devices_work_at_once_and_the_first_run_of_a_layer_goes_alone(tmp_path, monkeypatch):
    spans, lock = {}, threading.Lock()

    def fake(command, env, **_):
        name = command[command.index("--out") + 1]
        began = time.perf_counter()
        time.sleep(0.2)
        with lock:
            visible = env.get("CUDA_VISIBLE_DEVICES"), command[command.index("--device") + 1]
            spans[name] = (
                began,
                time.perf_counter(),
                visible,
                int(re.search(r"layer(\d+)", name)[1]),
            )
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runs = sweep.plan(settings(tmp_path / "s", layers=(1, 2), seeds=(0, 1, 2)), ["--model", "tiny"])
    assert sweep.execute(runs, ["cuda:0", "cuda:1"]) == []
    assert len(spans) == 6 and {span[2] for span in spans.values()} == {
        ("0", "cuda"),
        ("1", "cuda"),
    }
    for layer in (1, 2):
        (first, *others) = sorted(span for span in spans.values() if span[3] == layer)
        assert all(span[0] >= first[1] for span in others)
    ordered = sorted(spans.values())
    assert sum(b[0] < a[1] for a, b in itertools.pairwise(ordered)) >= 2  # they did overlap
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert sweep.visible(1) == "7"


def test_an_unfinished_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    runs = sweep.plan(settings(tmp_path, seeds=(0, 1)), FLAGS)
    (runs[0].out / "checkpoints" / "step-00000001").mkdir(parents=True)
    commands = []
    monkeypatch.setattr(
        sweep.subprocess,
        "run",
        lambda c, **_: commands.append(c) or subprocess.CompletedProcess(c, 0),
    )
    assert sweep.execute(runs, ["cpu"]) == []
    assert [command[-1] == "--resume" for command in commands] == [True, False]
    assert runs[0].out.exists()


def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(tmp_path, finished):
    s = settings(tmp_path)
    (run,) = sweep.plan(s, FLAGS)
    pretend(finished, run)
    assert run.finished
    (other,) = sweep.plan(s, [*FLAGS, "--lr", "0.5"])
    with pytest.raises(UserError, match="holds a run with lr .*, not 0.5"):
        sweep.plan(s, [*FLAGS, "--lr", "0.5"])
        _ = other.finished
    (elsewhere,) = sweep.plan(s, [*FLAGS, "--tokens-per-microbatch", "99"])
    assert elsewhere.finished


def test_a_run_that_stayed_with_float32_is_finished_under_the_flags_that_asked_for_bfloat16(
    tmp_path, finished, monkeypatch
):
    (run,) = sweep.plan(settings(tmp_path), [*FLAGS, "--dtype", "bfloat16"])
    monkeypatch.setattr(train, "BFLOAT16_PRODUCTS", ())
    pretend(finished, run)
    assert (
        run.finished
        and json.loads((run.out / "config.json").read_text())["settings"]["dtype"] == "float32"
    )
    monkeypatch.setattr(train, "BFLOAT16_PRODUCTS", ("architecture",))
    with pytest.raises(UserError, match="holds a run with dtype float32, not bfloat16"):
        _ = run.finished


def test_the_estimate_says_where_it_comes_from(tmp_path, finished, monkeypatch):
    runs = sweep.plan(
        settings(tmp_path, seeds=(0, 1)), [*FLAGS, "--max-steps", "100", "--eval-every", "25"]
    )
    pretend(finished, runs[0])
    seconds, how = sweep.estimate(runs, ["cpu"])
    assert seconds == sweep.wall(runs[0].out) and how == "mean of the 1 finished here"
    shutil.rmtree(runs[0].out)

    def timed(command, **_):
        """Loading and two evaluations of no time at all, then steps of 5, 3 and 3 seconds."""
        given = {
            flag: command[len(command) - 1 - command[::-1].index(flag) + 1]
            for flag in ("--max-steps", "--out")
        }
        assert given["--max-steps"] == "3" and "--cache-activations" not in command
        Path(given["--out"]).mkdir()
        rows = [
            dict(split="train", step=i + 1, epoch=(i + 1) / 10, seconds=s)
            for i, s in enumerate((5, 3, 3))
        ]
        (Path(given["--out"]) / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", timed)
    monkeypatch.setattr(
        sweep.time, "perf_counter", iter([0.0, 31.0]).__next__
    )  # 11 for the steps, 20 once
    seconds, how = sweep.estimate(runs, ["cpu"])
    assert seconds == pytest.approx(100 * 3 + 20 + 4 * 20 / 2)
    assert how.startswith("3 steps of layer1-relu-l1_0.02-seed0 were timed")
    assert not runs[0].out.exists()


def test_the_elbow_is_the_point_farthest_below_the_line():
    def points(*pairs):
        return [dict(l0=10.0**x, loss=10.0**y) for x, y in pairs]

    curve = points((0, 0), (1, -2), (2, -2.2), (4, -2.4))
    assert sweep.elbow(curve) is curve[1]
    assert sweep.elbow(curve[::-1])["l0"] == 10  # whatever the order
    assert sweep.elbow(points((0, 0), (1, -1), (2, -2))) is None  # straight
    assert sweep.elbow(points((0, 0), (1, -0.1), (2, -2))) is None  # bulges the other way
    assert sweep.elbow(points((0, 0), (1, -1))) is None


def test_curves_are_means_over_seeds(tmp_path, finished):
    s = settings(tmp_path, l1=(0.01, 0.1, 1.0), seeds=(0, 1, 2), cache=False)
    runs = sweep.plan(s, FLAGS)
    for run in runs:
        pretend(
            finished, run, loss=run.settings.l1 * (1 + run.settings.seed), l0=1 / run.settings.l1
        )
    rows = sweep.collect(runs)
    (points,) = sweep.curves(rows).values()
    assert [p["weight"] for p in points] == [0.01, 0.1, 1.0]
    for p in points:
        assert p["loss"] == pytest.approx(2 * p["weight"]) and p["seeds"] == 3
        assert p["loss_range"] == pytest.approx((p["weight"], 3 * p["weight"]))
    sweep.report(runs, tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text())["elbows"] == {
        "layer 1, relu": None
    }  # a straight line


def test_nothing_finished_is_said():
    with pytest.raises(UserError, match="no run of this sweep has finished"):
        sweep.report(sweep.plan(settings("nowhere"), ["--model", "tiny"]), GOLDEN)


def test_the_sweeps_defaults_are_those_of_training():
    (run,) = sweep.plan(settings("nowhere", cache=False), [])
    assert run.settings == train.Settings()
