"""python -m audit on a short tiny run: tables say one thing in all forms, nothing is made twice,
and a mistake leaves nothing.
"""

import csv
import hashlib
import html
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN, HOSTILE, ROOT, SAE_ID, SMALL, audit, metrics, script
from PIL import Image

import labels
import tiny
from audit import features, figures, published, report
from audit.counting import SIDES
from audit.lead import lead
from runtime.output import publish
from runtime.sources import UserError

command = importlib.import_module("audit.__main__")

USAGE = ("top_usage", "top_value", "value_difference", "usage_rank", "l0", "l0_by_position")
EFFECTS = ("topk", "ablation", "static", "choices", "attribution", "attribution_features")
CHANGES = ("shift", "behaviour", "carriers", "carried_by")
COMPOSITIONS = ("composition_paper", "composition")
TABLES = (*COMPOSITIONS, *USAGE, *EFFECTS, *CHANGES)


def read(out, name: str) -> dict:
    return json.loads((out / "eval" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", TABLES)
def test_csv_json_and_png_hold_the_same_numbers(audited, name):
    folder, stored = audited[0] / "eval", read(audited[0], name)
    with open(folder / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(stored["rows"]) > 0
    for text, row in zip(rows, stored["rows"], strict=True):
        for key, value in row.items():
            assert text[key] == ("" if value is None else str(value))
    digest = hashlib.sha256((folder / f"{name}.csv").read_bytes()).hexdigest()
    with Image.open(folder / f"{name}.png") as image:
        assert image.text["Source"] == f"{name}.csv sha256 {digest}" and image.size[0] > 600
    kinds = [(t["name"], t["kind"], t["judge"], t["matched"]) for t in stored["about"]["labels"]]
    hostile = ("hostile", "fires", "<b>nobody</b>", True)
    both = [hostile, ("promotes", "promotes", "the grammar", True)]
    assert kinds == ([] if name in ("topk", "static") else both)


def drawn(name: str, rows: list[dict], about: dict) -> set[float]:
    """Every number that the picture of a table shows as a height, a length or a place."""
    figure, found = figures.DRAW[name](rows, about), set()
    for axes in figure.axes:
        for line in axes.lines:
            found |= {*np.ravel(line.get_xdata()).tolist(), *np.ravel(line.get_ydata()).tolist()}
        for patch in axes.patches:
            if hasattr(patch, "get_data"):
                values = patch.get_data().values
            else:  # a bar that lies or stands
                values = [patch.get_width(), patch.get_height()]
            found |= set(np.ravel(values).tolist())
    return found


@pytest.mark.parametrize("name, keys", [
    ("composition_paper", ("sae", "adapter", "change", "low", "high", "noisy_low", "noisy_high")),
    ("composition", ("sae", "adapter", "change", "low", "high", "noisy_low", "noisy_high")),
    ("top_usage", ("usage",)),
    ("top_value", ("value",)),
    ("value_difference", ("features",)),
    ("usage_rank", ("rank", "usage")),
    ("l0", ("positions",)),
    ("l0_by_position", ("mean_l0",)),
    ("topk", ("loss",)),
    ("ablation", ("delta", "low", "high")),
    ("static", ("loss",)),
    ("choices", ("share", "low", "high")),
    ("shift", ("divergence", "divergence_low", "divergence_high", "null_divergence")),
    ("behaviour", ("change", "low", "high", "gained")),
    ("carriers", ("n", "kept")),
    ("attribution", ("low", "high")),
    ("attribution_features", ("share",)),
])  # fmt: skip
def test_pictures_draw_the_rows(audited, name, keys):
    stored = read(audited[0], name)
    found = drawn(name, stored["rows"], stored["about"])
    scale = 100 if name in COMPOSITIONS else 1
    for row in report.shown_rows(stored) if name in COMPOSITIONS else stored["rows"]:
        for key in keys:
            assert row.get(key) is None or row[key] * scale in found, (key, row)


def test_features_parquet(audited):
    out, _ = audited
    stored = pq.read_table(out / "eval" / "features.parquet")
    assert stored["feature"].to_pylist() == list(range(tiny.WIDTH))
    assert stored["explanation_hostile"][5].as_py() == HOSTILE.strip()
    top = read(out, "top_usage")["rows"][0]
    usage = stored[f"{top['of']}_usage_{top['context'].replace('+', '_')}"].to_numpy()
    assert usage[top["feature"]] == top["usage"] == usage.max()
    for suffix in ("prompt", "prompt_chosen", "prompt_rejected"):
        difference = stored[f"difference_{suffix}"].to_numpy()
        means = (stored[f"{of}_mean_{suffix}"].to_numpy() for of in ("adapter", "sae"))
        np.testing.assert_array_equal(difference, np.subtract(*means))
        for name, sign in (("promoted", -1), ("suppressed", 1)):
            rank = stored[f"{name}_rank_{suffix}"].to_numpy()
            assert sorted(rank) == list(range(1, tiny.WIDTH + 1))
            assert (np.diff(sign * difference[rank.argsort()]) >= 0).all()


def test_composition_agrees_with_the_features(audited):
    out, _ = audited
    stored = pq.read_table(out / "eval" / "features.parquet")
    rows = read(out, "composition")["rows"]
    assert len(rows) == 2 * 4 * 3
    for row in rows:
        suffix = row["context"].replace("+", "_")
        mask = stored[f"{row['labels']}:{row['category']}"].to_numpy()
        for of in SIDES:
            usage = stored[f"{of}_usage_{suffix}"].to_numpy()
            assert row[of] == pytest.approx(usage[mask].sum() / usage.sum())
        assert row["change"] == pytest.approx(row["adapter"] / row["sae"] - 1)
        assert row["low"] <= row["high"]
        judged = (row["labels"], row["category"]) == ("hostile", "style")
        assert (row["noisy_low"] is not None) is judged
        if judged:
            assert row["noisy_high"] - row["noisy_low"] > 0
            assert row["judged"] == 60 and row["mcc"] == 1


def test_both_variants_of_the_papers_composition_are_there(audited):
    rows = read(audited[0], "composition_paper")["rows"]
    assert len(rows) == 2 * 2 * 4 * 3
    assert [row["first"] for row in rows] == ["left out"] * 24 + ["counted"] * 24
    for row, other in zip(rows[:24], rows[24:], strict=True):
        assert row["category"] == other["category"] and row["sae"] != other["sae"]
        assert row["change"] == pytest.approx(row["adapter"] / row["sae"] - 1)
        judged = (row["labels"], row["category"]) == ("hostile", "style")
        assert (row["noisy_low"] is not None) is judged and row["low"] <= row["high"]
    # Each feature of a file has one category, so that the shares at a position sum to 1.
    for key in ("sae", "adapter"):
        assert sum(row[key] for row in rows[:24]) == pytest.approx(2 * 3)
    text = (audited[0] / "report.html").read_text()
    assert "Averaged over positions (Table 2)" in text and "&lt;bos&gt;, is left out" in text


def test_the_report_leads_with_what_the_policy_does(audited):
    """Then come what it learned on the given pairs, and the tables behind both."""
    said = lead({name: read(audited[0], name) for name in ("behaviour", "shift", "carriers")})
    text = html.unescape((audited[0] / "report.html").read_text())
    order = [*said, "On the given pairs", "What was learned?", "What it does differently"]
    order = [text.index(words) for words in order]
    assert len(said) > 2 and order == sorted(order)


def test_examples_are_the_first_pairs(audited):
    found = read(audited[0], "examples")
    assert len(found["pairs"]) == features.EXAMPLES
    for pair in found["pairs"]:
        assert pair["prompt"]["l1"][0] == 0 and pair["prompt"]["tokens"][0] == "<bos>"
        for part in pair.values():
            assert len(part["tokens"]) == len(part["l1"]) == len(part["top"])
            for l1, top in zip(part["l1"], part["top"], strict=True):
                values = [abs(v) for _, v in top]
                assert values == sorted(values, reverse=True) and sum(values) <= l1 + 1e-3
                assert all(found["explanations"][str(k)] == HOSTILE.strip() for k, _ in top)


# --- what is made again ---------------------------------------------------------------------------


def test_only_what_is_missing_or_out_of_date_is_made_again(audited, tmp_path, capsys):
    out, flags = audited
    copy = shutil.copytree(out, tmp_path / "run")
    flags = ("--run", copy, *flags[2:])

    def made() -> dict[str, bool]:
        audit(*flags)
        lines = capsys.readouterr().out.splitlines()
        named = [line for line in lines if line.split(" ")[0] in command.PARTS]
        return {line.split()[0]: "there already" not in line for line in named}

    files = {path: path.stat().st_mtime_ns for path in (copy / "eval").glob("*")}
    assert made() == dict.fromkeys(command.PARTS, False)
    assert {path: path.stat().st_mtime_ns for path in files} == files

    (copy / "eval" / "l0.png").unlink()  # a picture alone is drawn again
    (copy / "eval" / "choices.json").unlink()
    assert made() == dict.fromkeys(command.PARTS, False) | dict(choices=True)
    assert (copy / "eval" / "l0.png").is_file() and (copy / "eval" / "choices.json").is_file()

    flags = (*flags, "--random-sets", 0)
    assert made() == dict.fromkeys(command.PARTS, False) | dict(ablation=True)

    flags += ("--only", "static")
    assert made() == dict(static=True)
    with pytest.raises(UserError, match="--only static: the other flags leave this part out"):
        audit(*flags, "--static-pairs", 0)


def test_tables_of_other_pairs_or_labels_are_left_out(audited, tmp_path):
    out = shutil.copytree(audited[0], tmp_path / "run")
    about = read(out, "choices")["about"]
    assert report.read_run(out, about).left_out == []
    other = report.read_run(out, about | dict(pairs_sha256="0"))
    assert {*other.left_out} >= {"choices", "topk", "static", "examples"}
    assert other.tables.keys().isdisjoint(other.left_out)
    assert "Steered most" in report.write_report(out, about).read_text()
    text = report.write_report(out, about | dict(pairs_sha256="0")).read_text()
    assert "Left out, because" in text and "Steered most" not in text
    relabelled = report.read_run(out, about | dict(labels=[])).left_out
    assert "choices" in relabelled and "topk" not in relabelled and "static" not in relabelled


def test_tables_of_another_adapter_are_marked_and_made_again(audited, tmp_path, capsys):
    out, flags = audited
    copy = shutil.copytree(out, tmp_path / "run")
    table = read(copy, "topk")
    table["about"]["adapter_sha256"] = "0" * 64
    (copy / "eval" / "topk.json").write_text(json.dumps(table))
    text = report.write_report(copy).read_text()
    assert "made with another adapter, other pairs or other labels: topk." in text
    audit("--run", copy, *flags[2:])
    assert read(copy, "topk")["about"]["adapter_sha256"] != "0" * 64
    assert "to make: ablation; about" in capsys.readouterr().out
    assert "made with another adapter" not in (copy / "report.html").read_text()


def test_published_figures_stand_beside_a_run_of_their_shape(audited, tmp_path, monkeypatch):
    """Were the published run of this shape, its figures would stand beside these tables'."""
    out, flags = audited
    copy = shutil.copytree(out, tmp_path / "run")
    assert not (copy / "eval" / "beside_published.json").exists()
    about, theirs = read(copy, "topk")["about"], published.published()
    shape = {key: about[key] for key in ("d_model", "d_sae", "layer")}
    monkeypatch.setattr(published, "published", lambda: theirs | dict(setting=shape))
    audit("--run", copy, *flags[2:])

    found = {row["figure"]: row for row in read(copy, "beside_published")["rows"]}
    last = metrics(copy, "eval")[-1]
    assert found["SimPO loss"]["published"] == 2.73 and found["SimPO loss"]["here"] == last["loss"]
    assert found["L0"]["here"] == last["l0"]
    rows = read(copy, "composition_paper")["rows"]
    named = dict(labels="hostile", category="style", context="prompt", first="counted")
    (ours,) = (row for row in rows if named.items() <= row.items())
    change = found["hostile: style, prompt, relative change, %"]
    assert (change["published"], change["here"]) == (1.91, 100 * ours["change"])
    assert "Beside the published figures" in (copy / "report.html").read_text()


# --- mistakes and interruptions -------------------------------------------------------------------


def test_mistakes_end_in_a_sentence_and_leave_nothing(tiny_run, tmp_path):
    out = shutil.copytree(tiny_run, tmp_path / "run")
    other = tmp_path / "other.jsonl"
    header = dict(kind="fires", sae="tiny", sae_id=tiny.SAE_ID, sae_sha256="0" * 64)
    labels.write_labels(other, header, [])
    result = script("-m", "audit", "--run", out, "--labels", other)
    assert result.returncode == 2 and "other.jsonl: belongs to the SAE" in result.stderr, (
        result.stderr
    )
    assert len(result.stderr.strip().splitlines()) == 1
    for flags, named in (
        (("--run", tmp_path / "nothing"), "nothing"),
        (("--run", "owner/name"), "--out"),
        (("--run", out, "--labels", other, "--assume-labels-match"), "belongs to the SAE"),
        (("--run", out, "--labels", other.parent / "absent.jsonl"), "absent.jsonl"),
        (("--run", out, "--human", tmp_path / "absent.csv"), "absent.csv"),
        (("--run", out, "--bootstrap", 0), "--bootstrap"),
        (("--run", out, "--only", "everything"), "--only everything"),
        (("--run", out, "--coefficients", 1e300), "--coefficients"),
        (("--run", out, "--pairs", 1), "1 pair to evaluate on"),
        (("--run", out, "--prompts", 1), "--prompts 1"),
        ((), "--run"),
    ):
        with pytest.raises(UserError, match=named):
            audit(*flags)
    assert not (out / "eval").exists() and not (out / "report.html").exists()


def test_killed_half_way_leaves_no_partial_table(tiny_run, tmp_path):
    """SIGKILL as soon as the first file is being written, under whatever name."""
    out = shutil.copytree(tiny_run, tmp_path / "run")
    flags = ("--run", str(out), "--pairs", "4", "--bootstrap", "5")
    process = subprocess.Popen(
        [sys.executable, "-m", "audit", *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if any((out / "eval").rglob("*.csv")):
            break
        time.sleep(0.01)
    assert process.poll() is None, "ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [p for p in (out / "eval").iterdir() if not p.name.startswith(".part-")] == []


def test_publish_changes_all_or_nothing(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(ZeroDivisionError), publish(tmp_path) as folder:
        (folder / "a.csv").write_text("new")
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.csv", "old")]
    with publish(tmp_path) as folder:
        (folder / "a.csv").write_text("new")
        (folder / "b.csv").write_text("new")
    both = sorted((p.name, p.read_text()) for p in tmp_path.iterdir())
    assert both == [("a.csv", "new"), ("b.csv", "new")]


def test_an_adapter_folder_without_labels(tmp_path, monkeypatch):
    """The authors' format, no run around it: usage without composition, into --out."""
    from matplotlib.figure import Figure

    # Drawing is tested above.
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.write_bytes(b""))
    where = dict(run="adapter_mid", model="model", sae="sae", data="dataset")
    flags = [word for name, folder in where.items() for word in (f"--{name}", GOLDEN / folder)]
    audit(*flags, "--sae-id", SAE_ID, *SMALL, "--device", "cpu", "--out", tmp_path / "out")
    files = {path.stem for path in (tmp_path / "out" / "eval").iterdir()}
    without = {*COMPOSITIONS, "ablation", "choices", *CHANGES}
    others = {"features", "examples", "attribution_cards", "masks"}
    assert files == {*TABLES, *others} - without
    rows = read(tmp_path / "out", "top_usage")["rows"]
    assert [row["rank"] for row in rows] == [*range(1, features.TOP + 1)] * 6
    assert rows[0]["explanation"] == ""
    assert "Table 2" not in (tmp_path / "out" / "report.html").read_text()
