"""Runs that survive: the same bytes after any interruption, a sentence for any fault of the disk.

The loop of random SIGKILLs is short here; FSRL_KILLS=25 in the environment makes it long.
"""

import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import GOLDEN, SAE_ID, metrics
from forked import GOLDEN_FLAGS, Run, golden, good
from safetensors.torch import load_file
from test_distributed import wait_for
from torch.nn.parallel import DistributedDataParallel

import train
from fsrl import Adapter
from policy import open_policy
from runtime import checkpoint
from runtime.ranks import ALONE
from runtime.sources import UserError

KILLS = int(os.environ.get("FSRL_KILLS", "4"))
FLAGS = ("--max-steps", 12, "--lr", 1e-3, "--checkpoint-every", 2, "--eval-every", 5)
FLAGS += ("--init-adapter", GOLDEN / "adapter_mid")
RESUME = (*FLAGS, "--resume")


def adapter(out: Path) -> bytes:
    return (out / "adapter/adapter.safetensors").read_bytes()


def rows(out: Path, split: str) -> list[dict]:
    timing = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in timing} for row in metrics(out, split)]


def same(out: Path, other: Path) -> bool:
    return adapter(out) == adapter(other) and all(
        rows(out, s) == rows(other, s) for s in ("train", "eval")
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    good(golden(out, *FLAGS))
    return out


@pytest.fixture
def stopped(tmp_path, whole):
    """A run of 12 steps, killed during step 9 or so: it holds checkpoints of steps 6 and 8."""
    out = shutil.copytree(whole, tmp_path / "stopped")
    kept = [
        line
        for line in (out / "metrics.jsonl").read_text().splitlines(True)
        if json.loads(line)["step"] <= 9
    ]
    (out / "metrics.jsonl").write_text("".join(kept))
    shutil.rmtree(out / "adapter")
    newest = {"8": "00000010", "6": "00000012"}  # made again by a run that ends there
    for step in newest.values():
        shutil.rmtree(out / f"checkpoints/step-{step}")
    for step in (6, 8):
        shutil.copytree(whole.parent / f"at{step}", out / f"checkpoints/step-0000000{step}")
    return out


@pytest.fixture(scope="module", autouse=True)
def earlier_checkpoints(whole):
    """Those of steps 6 and 8, of a run stopped after step 8; the whole run has deleted them."""
    out = whole.parent / "eight"
    run = Run([*GOLDEN_FLAGS, "--out", out, *FLAGS], call=stop_after_eight)
    ended = run.wait()
    assert ended[0].returncode == 0 and "--resume" in ended[0].stdout, ended
    for step in (6, 8):
        shutil.copytree(out / f"checkpoints/step-0000000{step}", whole.parent / f"at{step}")


def stop_after_eight():
    """SIGTERM in the middle of step 8; the process group must then outlive the model's wrapper."""
    real, leave, steps = train.backward, dist.destroy_process_group, []

    def backward(*arguments):
        steps.append(1)
        if len(steps) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    def destroy():
        assert not any(isinstance(o, DistributedDataParallel) for o in gc.get_objects())
        leave()

    train.backward, dist.destroy_process_group = backward, destroy


# --- stopping and going on ------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_bytes(whole, stopped):
    said = good(golden(stopped, *RESUME))
    assert same(stopped, whole) and "Written to" in said.stdout
    assert [p.name for p in checkpoint.saved(stopped / "checkpoints")] == [
        "step-00000012",
        "step-00000010",
    ]
    good(golden(stopped, *RESUME))  # a finished run may be resumed too: nothing is left to do
    assert same(stopped, whole)


def test_asked_to_end_it_saves_and_says_how_to_go_on(tmp_path, whole):
    """First by SIGTERM, then, going on, by Ctrl-C, then to the end."""
    out, folder = tmp_path / "run", tmp_path / "run/checkpoints"
    for number, after in ((signal.SIGTERM, 3), (signal.SIGINT, 6)):
        run = Run([*GOLDEN_FLAGS, "--out", out, *RESUME, "--checkpoint-every", 0])
        wait_for(
            lambda after=after: (out / "metrics.jsonl").exists() and len(metrics(out)) >= after
        )
        os.kill(run.processes[0].pid, number)
        (ended,) = run.wait()
        assert ended.returncode == 0 and ended.stdout.count("\n") == 1, ended
        step = int(
            re.fullmatch(r"Saved after step (\d+) of 12; .* --resume --out .*\n", ended.stdout)[1]
        )
        assert step >= after and checkpoint.saved(folder)[0].name == f"step-{step:08d}"
    good(golden(out, *RESUME))
    assert same(out, whole)


def test_killed_at_random_moments_nothing_is_lost_beyond_the_last_checkpoint(tmp_path, whole):
    """SIGKILL, writes of checkpoints included: a checkpoint after every step, and half of the kills
    aimed at one.
    """
    out, reached, kills, rng = tmp_path / "run", 0, 0, random.Random(0)
    folder = out / "checkpoints"
    flags = (*RESUME, "--checkpoint-every", 1)
    while kills < KILLS:
        run = Run([*GOLDEN_FLAGS, "--out", out, *flags])
        alive = run.processes[0].is_alive
        if kills % 2:  # while a checkpoint is being written
            wait_for(lambda alive=alive: any(folder.glob("*.part")) or not alive())
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0.2, 1.5))
        alive = alive()
        run.kill()
        (ended,) = run.wait()
        assert "damaged" not in ended.stderr and (ended.returncode in (0, -signal.SIGKILL)), ended
        now = checkpoint.newest(folder, ALONE)
        step = int(now.name.removeprefix("step-")) if now else 0
        assert step >= reached and all(
            checkpoint._damage(p) is None for p in checkpoint.saved(folder)
        )
        reached = step
        kills += alive
        if not alive or reached == 12:  # it came to its end: from the start again
            assert reached != 12 or same_after_all(out, flags, whole)
            shutil.rmtree(out)
            reached = 0
    assert same_after_all(out, flags, whole)


def same_after_all(out, flags, whole) -> bool:
    good(golden(out, *flags))
    return same(out, whole)


# --- other numbers of processes -------------------------------------------------------------------


@pytest.mark.parametrize("before, after", [(("--shard",), 3), ((), 1)])
def test_what_two_processes_saved_others_resume(tmp_path, whole, before, after):
    out = tmp_path / "run"
    run = Run([*GOLDEN_FLAGS, "--out", out, *FLAGS, *before], processes=2, call=stop_after_eight)
    ended = run.wait()
    assert [end.returncode for end in ended] == [0, 0] and "Saved after step 8" in ended[
        0
    ].stdout, ended
    good(golden(out, *RESUME, *(before if after > 1 else ()), processes=after))
    one, other = (
        load_file(path / "adapter/adapter.safetensors")["weight"] for path in (whole, out)
    )
    moved = one - Adapter.from_pretrained(GOLDEN / "adapter_mid").weight
    assert (one - other).norm() <= 2e-3 * moved.norm()
    assert [row["step"] for row in metrics(out)] == [*range(1, 13)]


def test_a_full_run_saved_in_slices_is_resumed_by_one(tmp_path):
    flags = ("--full", "--max-steps", 10, "--lr", 1e-3, "--schedule", "constant")
    run = Run(
        [*GOLDEN_FLAGS, "--out", tmp_path / "a", *flags, "--shard"],
        processes=2,
        call=stop_after_eight,
    )
    assert [end.returncode for end in run.wait()] == [0, 0]
    good(golden(tmp_path / "a", *flags, "--resume"))
    good(golden(tmp_path / "b", *flags))
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in "ab")
    assert all((a[name] - b[name]).norm() <= 1e-3 * b[name].norm() + 1e-4 for name in b)


# --- what a disk and a person can do --------------------------------------------------------------


def shorten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 5)


def test_a_truncated_checkpoint_is_passed_over(whole, stopped):
    shorten(next((stopped / "checkpoints/step-00000008").glob("*.safetensors")))
    said = good(golden(stopped, *RESUME))
    assert re.search("step-00000008: .* is damaged", said.stderr) and same(stopped, whole)
    assert sorted(p.name for p in (stopped / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000012",
    ]


def test_nothing_but_damaged_checkpoints_is_a_sentence(stopped):
    shorten(next((stopped / "checkpoints/step-00000008").glob("*.safetensors")))
    (stopped / "checkpoints/step-00000006/progress.json").write_text("{")
    (ended,) = golden(stopped, *RESUME)
    assert ended.returncode == 2 and ended.stderr.splitlines()[-1].startswith(
        "--resume: no checkpoint in"
    )


def test_a_torn_last_line_of_the_metrics_is_cut_off(whole, stopped):
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"split": "train", "step": 10, "lo')
    good(golden(stopped, *RESUME))
    assert same(stopped, whole)


def test_two_runs_cannot_share_a_folder(tmp_path):
    out = tmp_path / "run"
    first = Run([*GOLDEN_FLAGS, "--out", out, *FLAGS, "--max-steps", 100_000])
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 1)
    (second,) = golden(out, *RESUME, "--max-steps", 100_000)
    first.kill()
    first.wait()
    assert second.returncode == 2 and "another run is writing there" in second.stderr


def small_files():
    """A disk with room for the metrics and not for a checkpoint."""
    real = checkpoint.save

    def save(folder, step, *rest):
        if step > 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        real(folder, step, *rest)

    checkpoint.save = save


def test_a_full_disk_is_a_sentence_and_leaves_the_last_checkpoint(tmp_path, whole):
    out = tmp_path / "run"
    (ended,) = golden(out, *FLAGS, call=small_files)
    assert ended.returncode == 2 and "cannot be written" in ended.stderr.splitlines()[-1], ended
    assert "Traceback" not in ended.stderr
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]
    good(golden(out, *RESUME))
    assert same(out, whole)


def test_a_folder_that_cannot_be_written_is_found_before_the_model_loads(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    refused = [tmp_path / "file/run"] + ([locked / "run"] if os.geteuid() else [])
    (tmp_path / "file").write_text("")
    for out in refused:
        (ended,) = golden(out, "--model", tmp_path / "no model")
        assert (
            ended.returncode == 2 and "--out" in ended.stderr and "no model" not in ended.stderr
        ), ended
    (ended,) = golden(Path("/proc/run"))  # where even root cannot
    assert (
        ended.returncode == 2
        and "--out /proc/run" in ended.stderr
        and "Traceback" not in ended.stderr
    )


def test_resuming_with_other_settings_or_data_is_refused(tmp_path, stopped):
    (ended,) = golden(stopped, *RESUME, "--lr", 0.002)
    assert ended.returncode == 2 and "--lr 0.001, now it is 0.002" in ended.stderr
    config = json.loads((stopped / "config.json").read_text())
    config["sha256"][next(name for name in config["sha256"] if "dataset" in name)] = "0" * 64
    (stopped / "config.json").write_text(json.dumps(config))
    (ended,) = golden(stopped, *RESUME)
    assert ended.returncode == 2 and "is not the file that" in ended.stderr
    (ended,) = golden(stopped, *FLAGS)
    assert ended.returncode == 2 and "holds a run already" in ended.stderr


def test_resume_without_a_run_starts_one(tmp_path, whole):
    good(golden(tmp_path / "run", *RESUME))
    assert same(tmp_path / "run", whole)


def explode():
    """A gradient that is not finite in step 4."""
    real, steps = train.backward, []

    def backward(model, *rest):
        steps.append(1)
        sums = real(model, *rest)
        if len(steps) == 4:
            next(p for p in model.parameters() if p.requires_grad).grad[0] = torch.inf
        return sums

    train.backward = backward


def test_what_is_not_finite_stops_and_leaves_the_last_checkpoint(tmp_path, whole):
    out = tmp_path / "run"
    (ended,) = golden(out, *FLAGS, call=explode)
    assert ended.returncode == 1 and re.search(
        r"Step 4: .* norm (inf|nan), in pairs \[", ended.stderr
    ), ended
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]
    good(golden(out, *RESUME))
    assert same(out, whole)


# --- runs that ended at an unusual moment ---------------------------------------------------------


def settings(out: Path, **changed) -> train.Settings:
    g = GOLDEN
    where = dict(model=str(g / "model"), sae=str(g / "sae"), sae_id=SAE_ID, data=str(g / "dataset"))
    own = dict(layer=1, batch_size=4, max_steps=4, samples=0, checkpoint_every=2, eval_every=2)
    return train.Settings(**where | own | changed, out=str(out))


def fails_at(step: int, monkeypatch):
    """train.backward that raises at a step, counted from 0."""
    real, calls = train.backward, []

    def backward(*arguments):
        calls.append(1)
        if len(calls) > step:
            raise UserError("it fails")
        return real(*arguments)

    monkeypatch.setattr(train, "backward", backward)


def test_a_run_without_a_step_does_not_block_its_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="it fails"):
        fails_at(0, patch)
        train.train(settings(tmp_path / "run", lr=1e-3))
    gc.collect()  # its lock
    train.train(settings(tmp_path / "run", lr=1e-2))  # a new run, which may differ
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["settings"]["lr"] == 1e-2
    assert [row["step"] for row in metrics(tmp_path / "run", "eval")] == [0, 2, 4]


def test_an_adapter_half_moved_in_is_no_finished_run(tmp_path):
    out = train.train(settings(tmp_path / "run"))
    whole = adapter(out)
    (out / "adapter/adapter_config.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        open_policy(str(out))
    gc.collect()
    train.train(settings(out, resume=True))
    assert adapter(out) == whole and open_policy(str(out)).steered


def test_a_resume_without_evaluations_keeps_those_there_are(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="it fails"):
        fails_at(2, patch)
        train.train(settings(tmp_path / "run"))
    gc.collect()
    train.train(settings(tmp_path / "run", resume=True, eval_every=0))
    assert [row["step"] for row in metrics(tmp_path / "run", "eval")] == [0, 2, 4]


def test_a_resume_keeps_the_unit_it_started_with(tmp_path, monkeypatch):
    """Another device could round the stream's norm otherwise."""
    measured = iter([2.0, 3.0])
    monkeypatch.setattr(train, "steering_unit", lambda *_: next(measured))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="it fails"):
        fails_at(2, patch)
        train.train(settings(tmp_path / "run", l1=0.5))
    gc.collect()
    train.train(settings(tmp_path / "run", l1=0.5, resume=True))
    assert json.loads((tmp_path / "run/config.json").read_text())["unit"] == 2.0
    for row in metrics(tmp_path / "run", "train"):
        assert row["penalty"] == pytest.approx(0.5 / 2.0 * row["l1"])


def test_nothing_is_saved_before_the_first_step(tmp_path, monkeypatch, capsys):
    real = train.evaluate

    def evaluate(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(SystemExit) as ended:
        train.train(settings(tmp_path / "run"))
    assert ended.value.code == 0 and "nothing to save" in capsys.readouterr().out
