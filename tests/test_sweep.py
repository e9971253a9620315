"""experiments/sweep.py: the plan, what is skipped, reported and continued, the elbow, and runs side
by side.
"""

import csv
import fcntl
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, SAE_ID

import train
from experiments import sweep
from runtime import cli, device, sae_ids
from runtime.sources import UserError

MODEL = ["--model", str(GOLDEN / "model"), "--data", str(GOLDEN / "dataset")]
WHERE = [*MODEL, "--sae", str(GOLDEN / "sae"), "--sae-id", SAE_ID]
FLAGS = [*WHERE, "--layer", "1", "--batch-size", "4", "--max-steps", "2", "--eval-every", "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One real run, standing where a sweep would have put it; copies stand in for others."""
    out = tmp_path_factory.mktemp("sweep") / "layer1-relu-l1_0.02-seed0"
    flags = [*FLAGS, "--device", "cpu", "--samples", "0", "--out", str(out)]
    return train.train(cli.parse(train.Settings, flags))


def pretend(finished, run: sweep.Run, loss=1.0, l0=10.0) -> None:
    """A finished run of these settings with this evaluation."""
    shutil.copytree(finished, run.out)
    config = json.loads((run.out / "config.json").read_text())
    ours = {name: getattr(run.settings, name) for name in config["settings"]}
    ours["dtype"] = device.dtype_on("cpu", ours["dtype"])
    config["settings"] |= {name: v for name, v in ours.items() if name not in train.FREE}
    (run.out / "config.json").write_text(json.dumps(config))
    row = dict(split="eval", step=2, loss=loss, accuracy=1.0, margin=1.0, l1=1.0, l0=l0)
    (run.out / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def settings(out, **more) -> sweep.Settings:
    return sweep.Settings(out=str(out), **more)


class Process:
    """Stands in for train.py: takes a moment, then ends well. `all` are those that were started."""

    all: list["Process"]

    def __init__(self, command, env, **_):
        self.command, self.env = command, env
        self.began = time.perf_counter()
        self.ended = self.began + 0.3
        self.all.append(self)

    def poll(self):
        if time.perf_counter() <= self.ended:
            return None
        adapter = Path(self.command[self.command.index("--out") + 1]) / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").touch()
        return 0


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(Process, "all", [], raising=False)
    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    return Process.all


# --- the plan -------------------------------------------------------------------------------------


def test_the_plan_crosses_everything_and_each_adapter_has_its_penalty(tmp_path):
    axes = dict(l1=(0.02, 0.1), l0=(0.5,), seeds=(0, 1), layers=(1, 2))
    s = settings(tmp_path, adapters=("relu", "jumprelu", "jumprelu-log"), **axes)
    runs = sweep.plan(s, [*WHERE[:-2], "--max-steps", "3"])
    assert len({run.out for run in runs}) == len(runs) == 2 * (2 + 1 + 1) * 2
    assert [run.settings.layer for run in runs] == sorted(run.settings.layer for run in runs)
    for run in runs:
        t = run.settings
        assert t.max_steps == 3
        weight = f"l0_{t.l0:g}" if t.adapter.startswith("jumprelu") else f"l1_{t.l1:g}"
        assert run.out.name == f"layer{t.layer}-{t.adapter}-{weight}-seed{t.seed}"
        if t.adapter.startswith("jumprelu"):
            assert t.l1 == 0.0 and t.l0 == 0.5
        else:
            assert t.l1 in (0.02, 0.1) and t.l0 == 0.0
    (alone,) = sweep.plan(settings(tmp_path), ["--model", "tiny"])
    assert alone.out.name == "layer2-relu-l1_0.02-seed0"


@pytest.mark.parametrize(
    "more, rest, words",
    [
        (dict(adapters=("gelu",)), [], "--adapters gelu"),
        (dict(adapters=("jumprelu",)), [], "--l0"),
        (dict(l0=(0.1,)), [], "only --adapters jumprelu"),
        (dict(seeds=(0, 0)), [], "a value stands twice"),
        (dict(devices=("tpu",)), [], "--devices tpu"),
        (dict(widths=("wide",)), [], "--widths wide"),
        (dict(l1=(-1.0,)), [], "--l1 -1.0"),
        (dict(), ["--bogus", "1"], "bogus"),
        (dict(), ["--full"], "--full: a sweep is over adapters"),
        (dict(), ["--seed=3"], "--seed after `--`: the sweep sets it itself, by its own --seeds"),
        (dict(l1=(0.1,)), ["--l1", "0.2"], "--l1 after `--`"),
        (dict(layers=(1,)), ["--layer", "2"], "--layer after `--`.* --layers"),
        (dict(), ["--out", "x"], "--out after `--`"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, more, rest, words):
    with pytest.raises(UserError, match=words):
        sweep.plan(settings(tmp_path, **more), rest)


def test_penalties_are_not_rounded(tmp_path):
    runs = sweep.plan(settings(tmp_path, l1=(0.02, 0.12345678, 1.0, 1e-7)), ["--model", "tiny"])
    assert [run.settings.l1 for run in runs] == [0.02, 0.12345678, 1.0, 1e-7]
    names = [run.out.name.split("-", 2)[2] for run in runs]
    assert names == ["l1_0.02-seed0", "l1_0.12345678-seed0", "l1_1-seed0", "l1_1e-07-seed0"]


@pytest.fixture
def gemmascope(tmp_path):
    """A local folder of SAEs in GemmaScope's layout."""
    ids = ("1/width_1k/average_l0_20", "1/width_1k/average_l0_8", "2/width_1k/average_l0_9")
    ids += ("1/width_16k/average_l0_30", "1/width_16k/average_l0_7", "1/width_16k/average_l0_100")
    for name in ids:
        folder = tmp_path / f"saes/layer_{name}"
        folder.mkdir(parents=True)
        (folder / "params.npz").touch()
    return tmp_path / "saes"


def test_local_folders_of_saes_follow_the_papers_rule(gemmascope):
    shutil.rmtree(gemmascope / "layer_1" / "width_16k")
    # 8 before 20: numbers, not names
    assert sae_ids.default_id(str(gemmascope), 1) == "layer_1/width_1k/average_l0_8"
    assert sae_ids.default_id(str(gemmascope), 2) == "layer_2/width_1k/average_l0_9"
    assert sae_ids.default_id(str(gemmascope), 3) is None and sae_ids.default_id("tiny", 1) is None


def test_each_width_is_looked_up_by_lowest_average_l0(gemmascope, tmp_path):
    s = settings(tmp_path / "s", layers=(1,), widths=("1k", "16k"))
    flags = [*MODEL, "--sae", str(gemmascope)]
    runs = sweep.plan(s, flags)
    assert {run.out.name: run.settings.sae_id for run in runs} == {
        "layer1-width1k-relu-l1_0.02-seed0": "layer_1/width_1k/average_l0_8",
        "layer1-width16k-relu-l1_0.02-seed0": "layer_1/width_16k/average_l0_7",
    }
    assert runs[1].command()[2:].count("layer_1/width_16k/average_l0_7") == 1
    with pytest.raises(UserError, match="--widths 16k: .* holds no layer_2/width_16k"):
        sweep.plan(settings(tmp_path / "s", layers=(2,), widths=("16k",)), flags)


def test_the_papers_widths_are_looked_up_on_the_hub(monkeypatch):
    files = [f"layer_12/width_16k/average_l0_{k}/params.npz" for k in (82, 41, 176)]
    monkeypatch.setattr(sae_ids, "list_files", lambda *_: files)
    assert sae_ids.default_id(sae_ids.PAPER_REPO, 12, "16k") == "layer_12/width_16k/average_l0_41"
    assert sae_ids.default_id(sae_ids.PAPER_REPO, 12, "65k") == "layer_12/width_65k/average_l0_21"
    with pytest.raises(UserError, match="holds no SAE of width 32k"):
        sae_ids.default_id(sae_ids.PAPER_REPO, 12, "32k")


def test_the_sweeps_defaults_are_those_of_training():
    (run,) = sweep.plan(settings("nowhere"), [])
    assert run.settings == train.Settings()


# --- running --------------------------------------------------------------------------------------


def test_a_sweep_runs_skips_continues_and_reports(tmp_path, finished, monkeypatch, capsys):
    """One finished run is skipped, an unfinished one started again, two run at once, one that fails
    is named.
    """
    out = tmp_path / "s"
    flags = ["--l1", "0.02", "0.2", "--seeds", "0", "1", "--devices", "cpu", "cpu"]
    flags += ["--out", str(out), "--", *FLAGS]
    out.mkdir()
    shutil.copytree(finished, out / finished.name)
    kept = (out / finished.name / "metrics.jsonl").stat().st_mtime_ns
    broken = out / "layer1-relu-l1_0.2-seed0"
    shutil.copytree(finished, broken)
    shutil.rmtree(broken / "adapter")
    shutil.rmtree(broken / "checkpoints", ignore_errors=True)
    # A folder where this run's output would go: it cannot start.
    (out / "layer1-relu-l1_0.02-seed1.log").mkdir()

    monkeypatch.setattr(sys, "argv", ["sweep.py", *flags])
    with pytest.raises(UserError, match=r"1 of 4 runs failed: layer1-relu-l1_0.02-seed1\."):
        sweep.main()
    said = capsys.readouterr()
    assert "layer1-relu-l1_0.02-seed1 could not start" in said.err
    assert "Traceback" not in said.err and "of 3 runs" not in said.err  # quiet in a log
    assert (out / finished.name / "metrics.jsonl").stat().st_mtime_ns == kept
    assert not (out / "layer1-relu-l1_0.2-seed0.unfinished-1" / "adapter").exists()
    with open(out / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [finished.name, broken.name, "layer1-relu-l1_0.2-seed1"]
    for row in rows:
        log = [json.loads(line) for line in (out / row["run"] / "metrics.jsonl").open()]
        last = [r for r in log if r["split"] == "eval"][-1]
        assert float(row["loss"]) == last["loss"] and float(row["l0"]) == last["l0"]
        assert float(row["step"]) == 2
    assert (out / "sweep.png").stat().st_size > 10_000

    # One seed has no spread, and two penalties have no elbow: both are said.
    table = said.out.splitlines()
    (alone,) = (line.split() for line in table if " 0.02 " in line)
    (both,) = (line.split() for line in table if " 0.2 " in line)
    assert alone[-2] == "-" and float(both[-2]) >= 0
    assert "layer 1, relu: no elbow, because it takes three penalties and there are 2." in table

    monkeypatch.setattr(sys, "argv", ["sweep.py", "--list", *flags])
    sweep.main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("layer1-relu-l1_0.02-seed1") and "train.py" in line and "--l1 0.02" in line


def test_two_devices_work_at_once(tmp_path, monkeypatch, processes):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    s = settings(tmp_path / "s", layers=(1, 2), seeds=(0, 1, 2))
    assert sweep.execute(sweep.plan(s, ["--model", "tiny"]), ["cuda:0", "cuda:1"]) == []
    assert len(processes) == 6
    where = {
        (p.env["CUDA_VISIBLE_DEVICES"], p.command[p.command.index("--device") + 1])
        for p in processes
    }
    assert where == {("0", "cuda"), ("1", "cuda")}
    overlaps = [b.began < a.ended for a, b in itertools.pairwise(processes)]
    assert sum(overlaps) >= 2
    for number in ("0", "1"):  # one at a time on each
        mine = [p for p in processes if p.env["CUDA_VISIBLE_DEVICES"] == number]
        assert all(b.began >= a.ended for a, b in itertools.pairwise(mine))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert sweep.visible(1) == "7"


def test_an_unfinished_run_goes_on_from_its_checkpoint(tmp_path, processes):
    runs = sweep.plan(settings(tmp_path, seeds=(0, 1)), FLAGS)
    (runs[0].out / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert sweep.execute(runs, ["cpu"]) == []
    assert [process.command[-1] == "--resume" for process in processes] == [True, False]
    assert runs[0].out.exists()


def test_a_folder_that_another_process_writes_to_is_left_alone(tmp_path, processes, monkeypatch):
    (run,) = sweep.plan(settings(tmp_path), FLAGS)
    run.out.mkdir()
    with open(run.out / "metrics.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep.execute([run], ["cpu"]) == [run]
        monkeypatch.setattr(sys, "argv", ["sweep.py", "--out", str(tmp_path), "--", *FLAGS])
        with pytest.raises(UserError, match="another run is writing there"):
            sweep.main()
    assert processes == [] and [path.name for path in tmp_path.iterdir()] == [run.out.name]


def test_a_run_that_was_told_to_stop_is_not_taken_for_finished(tmp_path, processes, monkeypatch):
    monkeypatch.setattr(Process, "poll", lambda _: 0)
    runs = sweep.plan(settings(tmp_path), FLAGS)
    assert sweep.execute(runs, ["cpu"]) == runs


@pytest.mark.parametrize("why, told", [(SystemExit, 1), (KeyboardInterrupt, 0)])
def test_no_run_outlives_the_sweep(tmp_path, processes, monkeypatch, why, told):
    said = []
    monkeypatch.setattr(Process, "terminate", lambda _: said.append("end"), raising=False)
    monkeypatch.setattr(Process, "wait", lambda _: said.append("wait"), raising=False)

    def interrupted(_):
        raise why

    monkeypatch.setattr(sweep.time, "sleep", interrupted)
    with pytest.raises(why):
        sweep.execute(sweep.plan(settings(tmp_path), FLAGS), ["cpu"])
    assert said == ["end"] * told + ["wait"]


def test_the_list_goes_on_from_checkpoints(tmp_path, monkeypatch, capsys):
    runs = sweep.plan(settings(tmp_path, seeds=(0, 1)), FLAGS)
    (runs[0].out / "checkpoints" / "step-00000001").mkdir(parents=True)
    flags = ["--list", "--seeds", "0", "1", "--out", str(tmp_path), "--", *FLAGS]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *flags])
    sweep.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(" --resume") for line in lines] == [True, False]


def test_the_progress_counts_the_steps_of_runs_under_way(tmp_path):
    by_steps, by_epochs = (
        sweep.plan(settings(tmp_path / name), [*WHERE, "--layer", "1", *flags])[0]
        for name, flags in (("a", ["--max-steps", "8"]), ("b", ["--epochs", "3"]))
    )
    assert sweep.share_done(by_steps) == 0
    rows = [dict(split="train", step=i + 1, epoch=(i + 1) / 4) for i in range(6)]
    for run in (by_steps, by_epochs):
        run.out.mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in [*rows, dict(split="eval", step=6)])
        (run.out / "metrics.jsonl").write_text(text)
    assert sweep.share_done(by_steps) == 6 / 8 and sweep.share_done(by_epochs) == 6 / 12


def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(tmp_path, finished):
    s = settings(tmp_path)
    (run,) = sweep.plan(s, FLAGS)
    pretend(finished, run)
    assert run.finished
    (other,) = sweep.plan(s, [*FLAGS, "--lr", "0.5"])
    with pytest.raises(UserError, match="holds a run with lr .*, not 0.5"):
        _ = other.finished
    (elsewhere,) = sweep.plan(s, [*FLAGS, "--tokens-per-microbatch", "99"])
    assert elsewhere.finished

    data = tmp_path / "pairs.jsonl"
    data.write_text("now")
    config = json.loads((run.out / "config.json").read_text())
    config["sha256"][str(data)] = hashlib.sha256(b"then").hexdigest()
    (run.out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds a run that read another .*pairs.jsonl"):
        _ = run.finished


def test_a_pause_is_no_training_time(tmp_path, finished):
    rows = [dict(split=split, step=1, seconds=2.5) for split in ("train", "train")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sweep.wall(tmp_path) == 5
    assert 0 < sweep.wall(finished) < 60


def test_a_run_that_stayed_with_float32_is_finished_under_the_flags_that_asked_for_bfloat16(
    tmp_path, finished, monkeypatch
):
    (run,) = sweep.plan(settings(tmp_path), [*FLAGS, "--dtype", "bfloat16"])
    monkeypatch.setattr(device, "BFLOAT16_PRODUCTS", ())
    pretend(finished, run)
    recorded = json.loads((run.out / "config.json").read_text())["settings"]
    assert run.finished and recorded["dtype"] == "float32"
    monkeypatch.setattr(device, "BFLOAT16_PRODUCTS", ("architecture",))
    with pytest.raises(UserError, match="holds a run with dtype float32, not bfloat16"):
        _ = run.finished


def test_the_estimate_says_where_it_comes_from(tmp_path, finished, monkeypatch):
    flags = [*FLAGS, "--max-steps", "100", "--eval-every", "25"]
    runs = sweep.plan(settings(tmp_path, seeds=(0, 1)), flags)
    pretend(finished, runs[0])
    seconds, how = sweep.estimate(runs, ["cpu"])
    assert seconds == sweep.wall(runs[0].out) and how == "mean of the 1 finished here, steps alone"
    shutil.rmtree(runs[0].out)

    def timed(command, **_):
        """Loading and two evaluations of no time at all, then steps of 5, 3 and 3 seconds."""
        last = {
            name: len(command) - 1 - command[::-1].index(name) for name in ("--max-steps", "--out")
        }
        assert command[last["--max-steps"] + 1] == "3"
        out = Path(command[last["--out"] + 1])
        out.mkdir()
        rows = [dict(split="train", step=i + 1, epoch=(i + 1) / 10) for i in range(3)]
        rows = [row | dict(seconds=s) for row, s in zip(rows, (5, 3, 3), strict=True)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", timed)
    clock = iter([0.0, 31.0])  # 11 for the steps, 20 once
    monkeypatch.setattr(sweep.time, "perf_counter", clock.__next__)
    seconds, how = sweep.estimate(runs, ["cpu"])
    assert seconds == pytest.approx(100 * 3 + 20 + 4 * 20 / 2)
    assert how.startswith("3 steps of layer1-relu-l1_0.02-seed0 were timed")
    assert not runs[0].out.exists()


# --- what came out --------------------------------------------------------------------------------


def test_the_elbow_is_the_point_farthest_below_the_line():
    def points(*pairs):
        means = [dict(loss=10.0**y, l0=10.0**x, seeds=1, spread=None) for x, y in pairs]
        return [sweep.Point(1, "", "relu", "l1", 0.1, **m) for m in means]

    curve = points((0, 0), (1, -2), (2, -2.2), (4, -2.4))
    assert sweep.elbow(curve).point is curve[1]
    assert sweep.elbow(curve[::-1]).point.l0 == 10  # whatever the order
    straight = sweep.elbow(points((0, 0), (1, -1), (2, -2)))
    bulging = sweep.elbow(points((0, 0), (1, -0.1), (2, -2)))
    short = sweep.elbow(points((0, 0), (1, -1)))
    flat = sweep.elbow(points((0, 0), (1, 0), (2, 0)))
    assert straight.point is bulging.point is short.point is flat.point is None
    assert "no point lies below" in straight.why_none and "no point lies below" in bulging.why_none
    assert "three penalties and there are 2" in short.why_none and "the same" in flat.why_none


def test_curves_are_means_over_seeds(tmp_path, finished, capsys):
    s = settings(tmp_path, l1=(0.01, 0.1, 1.0), seeds=(0, 1, 2))
    runs = sweep.plan(s, FLAGS)
    for run in runs:
        loss = run.settings.l1 * (1 + run.settings.seed)
        pretend(finished, run, loss=loss, l0=1 / run.settings.l1)
    points = sweep.over_seeds(sweep.collect(runs))
    assert [p.weight for p in points] == [0.01, 0.1, 1.0]
    for p, rows in points.items():
        assert p.loss == pytest.approx(2 * p.weight) and p.seeds == 3
        assert p.spread == pytest.approx(2 * p.weight)
        assert [row.loss for row in rows] == pytest.approx([k * p.weight for k in (1, 2, 3)])
    sweep.report(runs, tmp_path)
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["elbows"] == {"layer 1, relu": None}  # a straight line
    assert "straight line" in found["no_elbow"]["layer 1, relu"]
    assert "no elbow, because" in capsys.readouterr().out


def like_the_published(finished, run: sweep.Run, total: float) -> None:
    """A finished run, as far as its files say, of Gemma-2-2B and an SAE of the paper's width."""
    pretend(finished, run)
    path = run.out / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(d_model=2304, d_sae=65536)))
    row = json.loads((run.out / "metrics.jsonl").read_text())
    (run.out / "metrics.jsonl").write_text(json.dumps(row | dict(total=total)) + "\n")


def test_the_authors_sweeps_stand_beside_runs_of_the_published_ones_shape(
    tmp_path, finished, monkeypatch, capsys
):
    """Their totals, which hold the penalty, beside ours; α at layer 12, layers at α = 0.01."""
    s = settings(tmp_path, layers=(6, 12), l1=(0.01, 0.02, 0.03), seeds=(0, 1))
    runs = sweep.plan(s, [*WHERE, "--max-steps", "2"])
    for run in runs:
        like_the_published(finished, run, total=2.0 + run.settings.seed)
    drawn = []
    monkeypatch.setattr(
        sweep, "draw_theirs", lambda _, axis, name, ours: drawn.append((axis, name))
    )
    sweep.report(runs, tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " relu l1 " in line]
    found = {(int(line[0]), float(line[4])): (line[9], line[10]) for line in lines}
    assert found == {
        (6, 0.01): ("2.500", "4.331"),
        (6, 0.02): ("2.500", "-"),
        (6, 0.03): ("2.500", "-"),
        (12, 0.01): ("2.500", "2.936"),
        (12, 0.02): ("2.500", "3.334"),
        (12, 0.03): ("2.500", "-"),
    }
    assert drawn == [(axis, name) for axis in ("weight", "layer") for name in ("loss", "l0")]
    monkeypatch.undo()
    sweep.report(runs, tmp_path)
    with open(tmp_path / "sweep.csv") as file:
        assert {row["total"] for row in csv.DictReader(file)} == {"2.0", "3.0"}

    path = runs[0].out / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(d_sae=1024)))
    assert not sweep.are_alike(runs) and sweep.are_alike(runs[1:])


def test_the_authors_points_are_those_of_the_published_file():
    import matplotlib.pyplot as plt

    published = json.loads((ROOT / "docs" / "published.json").read_text())
    figure, panels = plt.subplots(1, 2)
    sweep.draw_theirs(panels[0], "weight", "loss", [])
    sweep.draw_theirs(panels[1], "weight", "l0", [])
    rows = published["alpha_sweep"]["rows"]
    losses, l0s = (panel.lines[0].get_xydata().tolist() for panel in panels)
    assert losses == [[row["alpha"], row["total"]] for row in rows]
    assert l0s == [[row["alpha"], row["l0"]] for row in rows if row["l0"]]
    assert sweep.their_total(12, "", "relu", "l1", 0.01) == 2.936
    assert sweep.their_total(12, "", "jumprelu", "l0", 0.01) is None
    plt.close(figure)


def test_lines_run_along_each_axis(gemmascope, tmp_path):
    axes = dict(layers=(1,), widths=("1k", "16k"), l1=(0.01, 0.1))
    runs = sweep.plan(settings(tmp_path, **axes), [*MODEL, "--sae", str(gemmascope)])
    rows = [
        sweep.Row(
            "", 1, r.width, "relu", "l1", r.weight, 0, 1.0, 1.0, 1.0, 5.0, 1.0, 2, "eval", 1.0
        )
        for r in runs
    ]
    points = sweep.over_seeds(rows)
    titles = ["layer 1, relu, L1 weight 0.01", "layer 1, relu, L1 weight 0.1"]
    by_width = sweep.lines(points, "width")
    assert list(by_width) == titles
    assert [p.at("width") for p in by_width[titles[0]]] == [1000, 16_000]
    assert list(sweep.lines(points)) == ["layer 1, width 1k, relu", "layer 1, width 16k, relu"]
    sweep.draw(points, tmp_path / "widths.png")
    assert (tmp_path / "widths.png").stat().st_size > 10_000


def test_nothing_finished_is_said():
    with pytest.raises(UserError, match="no run of this sweep has finished"):
        sweep.report(sweep.plan(settings("nowhere"), ["--model", "tiny"]), GOLDEN)
