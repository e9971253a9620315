"""benchmarks.gpu on a CPU: its parts, its file, what it does when a part fails or time is up."""

import json
import time

import pytest
from conftest import script

from benchmarks import gpu, gpu_table
from benchmarks.gpu import Parts, Record, Settings, groups, measure
from runtime.sources import UserError

TINY = dict(shape="tiny", device="cpu", pairs=2, steps=1, tokens=(2048,))
HERE = dict(name="x86_64 CPU", torch="2.13.0")


def settings(tmp_path, **changed) -> Settings:
    return Settings(**TINY | dict(out=str(tmp_path / "gpu.json")) | changed)


def test_the_command_on_a_cpu(tmp_path):
    flags = ("--device", "cpu", "--shape", "tiny", "--pairs", 2, "--steps", 1, "--tokens", 2048)
    out = tmp_path / "new" / "gpu.json"
    wanted = ("step-2048", "profile")
    ended = script("-m", "benchmarks.gpu", *flags, "--out", out, "--only", *wanted)
    assert ended.returncode == 0, ended.stderr
    content = json.loads(out.read_text())
    step, profile = (content["parts"][name] for name in wanted)
    assert step["fraction_of_limit"] > 0 and step["evaluation_fraction_of_limit"] > 0
    assert len(step["seconds"]) == 1 and step["first_seconds"] > 0 and step["peak_bytes"] > 0
    assert profile["kernels"][0]["seconds"] >= profile["kernels"][1]["seconds"] > 0
    assert len(profile["kernels"]) == 15 and any("mm" in k["name"] for k in profile["kernels"])
    page = out.with_suffix(".md").read_text()
    assert page.strip() in ended.stdout
    assert "| training step, 2,048 tokens a micro-batch |" in page and "`aten::mm`" in page
    assert "Not measured: checks (not yet); audit (not yet)" in page


def test_parts_that_share_a_model(tmp_path):
    """What one leaves does not change another: decoding freezes the adapter and sets its bias."""
    parts = Parts(settings(tmp_path))
    bias = parts.steered.adapter.bias.detach().clone()
    decoded = parts.decode(2)
    assert decoded["ours_tokens_per_second"] > 0 and decoded["ours_steered_tokens_per_second"] > 0
    assert bias.equal(parts.steered.adapter.bias)
    audit, full, step = parts.audit(), parts.full(), parts.step(2048)
    assert [len(times) for times in audit["seconds"].values()] == [2, 2, 2]
    assert full["step_flops"] > step["step_flops"] and full["pairs"] == step["pairs"] == 2
    assert "evaluation_seconds" in step and "evaluation_seconds" not in full
    found = dict(audit=audit, full=full) | {"decode-2": decoded}
    record = dict(settings=dict(TINY, dtype="auto", memory_cap=None), hardware=HERE, parts=found)
    page = gpu_table.table(record | dict(wanted=[*found, "checks"]))
    assert all(f"audit of 2 pairs: {n} |" in page for n in ("usage", "ablation", "attribution"))
    assert (
        "`--full` step" in page and "| 2 | " in page and "Not measured: checks (not yet)." in page
    )


def test_a_file_without_hardware_is_a_table_too():
    failed = dict(settings=dict(TINY, dtype="auto", memory_cap=None), wanted=["full"])
    page = gpu_table.table(failed | dict(parts={"full": dict(failed="its process died")}))
    assert page.startswith("# GPU unknown") and "full (its process died)" in page


@pytest.fixture
def asked(monkeypatch):
    """Which processes were asked for what; a part's answer is taken from `answers`."""
    seen, answers = [], {}

    def ask(s, group, names, seconds):
        seen.append((group, names, round(seconds)))
        yield dict(hardware=HERE)
        for name in names:
            answer = answers.get(name, dict(passed=3, failures=[], skipped=0))
            if answer is None:  # its process dies here
                return
            yield dict(part=name, **answer)
            if "failed" in answer:
                return

    monkeypatch.setattr(gpu, "ask", ask)
    monkeypatch.setattr(gpu, "table", lambda content: "")
    return seen, answers


def run(s: Settings) -> dict:
    record = Record(s)
    measure(s, record)
    return json.loads(record.path.read_text())["parts"]


def test_a_part_that_fails_costs_that_part_alone_and_is_tried_again(tmp_path, asked):
    seen, answers = asked
    s = settings(tmp_path)
    answers |= {"step-2048": dict(failed="OutOfMemoryError"), "audit": None}
    parts = run(s)
    assert parts["step-2048"]["failed"] == "OutOfMemoryError" and "died" in parts["audit"]["failed"]
    assert all("failed" not in parts[name] for name in ("checks", "decode-8", "full", "compare"))
    ours = [names for group, names, _ in seen if group == "ours"]
    assert [names[0] for names in ours] == ["step-2048", "profile", "decode-1"]

    seen.clear(), answers.clear()
    assert not any("failed" in part for part in run(s).values())
    assert [(group, names) for group, names, _ in seen] == [("ours", ["step-2048", "audit"])]
    seen.clear()
    run(settings(tmp_path, only=("full",)))
    assert [names for _, names, _ in seen] == [["full"]]


def test_each_group_has_its_share_of_the_time_and_what_is_left(tmp_path, asked):
    seen, _ = asked
    run(settings(tmp_path, minutes=10.0))
    assert sum(gpu.SHARES.values()) == pytest.approx(1)
    # The fakes take next to no time.
    assert [seconds for *_, seconds in seen] == pytest.approx([156, 420, 504, 600], abs=30)
    seen.clear()
    parts = run(settings(tmp_path / "short", minutes=0.3))  # too little for checks to start
    assert "checks" not in parts and "compare" in parts


def test_each_check_is_told_as_it_ends(tmp_path, monkeypatch, capsys):
    """So that the record names those that ended, where time is up before the last one."""
    lines = (
        "tests/test_cuda.py::test_a[64] PASSED  [ 33%]",
        "tests/test_cuda.py::test_b FAILED  [ 66%]",
    )
    lines += ("tests/test_cuda.py::test_c SKIPPED (needs a GPU)  [100%]",)
    (tmp_path / "pytest").write_text(
        "#!/bin/sh\n" + "".join(f"echo '{x}'\n" for x in lines) + "exit 1"
    )
    (tmp_path / "pytest").chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(tmp_path / "pytest"))
    assert gpu.checks() == dict(passed=1, failures=["test_b"], skipped=1)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(told) == 3 and "1 passed, 1 failed ['test_b']" in told[1]["failed"]


def test_a_process_that_hangs_is_ended(tmp_path, monkeypatch):
    """With what it has started, as pytest and compare's processes are."""
    monkeypatch.setattr(gpu.sys, "executable", str(tmp_path / "hang"))
    (tmp_path / "hang").write_text("#!/bin/sh\nsleep 60 & echo $!\nsleep 60\n")
    (tmp_path / "hang").chmod(0o755)
    started = time.monotonic()
    assert list(gpu.ask(settings(tmp_path), "ours", ["audit"], 0.5)) == []
    assert time.monotonic() - started < 50


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(memory_cap=24.0), "--memory-cap: only a GPU"),
        (dict(only=("stepp",)), "--only stepp: one of checks, step-2048"),
        (dict(tokens=()), "--tokens"),
        (dict(steps=0), "--steps 0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changed, words):
    with pytest.raises(UserError, match=words):
        settings(tmp_path, **changed)


def test_a_cap_leaves_out_what_it_does_not_reach(tmp_path):
    capped = groups(settings(tmp_path, device="cuda", memory_cap=24.0))
    assert list(capped) == ["ours", "full"]


def test_the_file_of_other_settings_or_another_machine_is_refused(tmp_path, asked):
    run(settings(tmp_path))
    before = (tmp_path / "gpu.json").read_text()
    with pytest.raises(UserError, match="was made with pairs 2, now it is 3; name another file"):
        Record(settings(tmp_path, pairs=3))
    record = Record(settings(tmp_path))
    with pytest.raises(UserError, match="was measured on x86_64 CPU.*this is H100"):
        record.note(dict(hardware=dict(name="H100")))
    assert (tmp_path / "gpu.json").read_text() == before
    (tmp_path / "gpu.json").write_text("[]")
    with pytest.raises(UserError, match="not a file of this script"):
        Record(settings(tmp_path))
