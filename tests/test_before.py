"""Folders, adapters and labels written before the redesign still load; checkpoints do not."""

import json
import shutil

import forked
import pytest
from conftest import GOLDEN, ROOT

import tiny
import train
from fsrl import Adapter
from labels import load_labels
from policy import open_policy
from sae import JumpReLUSAE

BEFORE = GOLDEN / "before"  # three steps of the golden run, by the code of before


def test_a_run_of_before_opens_and_gives_its_own_losses(monkeypatch):
    monkeypatch.chdir(ROOT)  # it names its inputs relative to the checkout
    policy = open_policy(str(BEFORE), device="cpu")
    assert (policy.recorded.layer, policy.recorded.beta, policy.recorded.gamma_ratio) == (
        1,
        10.0,
        0.5,
    )
    pairs, _ = policy.eval_pairs()
    scorer = train.Scorer(policy.recorded.beta, policy.recorded.gamma_ratio, 8192, policy.device)
    found = train.evaluate(policy.model, pairs, scorer)
    *_, last = map(json.loads, (BEFORE / "metrics.jsonl").read_text().splitlines())
    assert last["split"] == "eval"
    for name in ("loss", "accuracy", "margin", "l1", "l0", "pairs", "tokens"):
        assert found[name] == pytest.approx(last[name], abs=1e-6, rel=1e-6), name


def test_an_adapter_of_before_loads():
    adapter = Adapter.from_pretrained(BEFORE / "adapter")
    assert adapter.kind == "relu" and adapter.identity["layer"] == 1


def test_label_files_of_before_load():
    sae = JumpReLUSAE.from_pretrained("tiny")
    for kind in ("fires", "promotes"):
        table = load_labels(tiny.LABELS_DIR / f"{kind}.jsonl", sae)
        assert table.kind == kind and table.matched and table.categories["style"].any()


def test_an_unfinished_run_of_before_is_refused_in_one_sentence(tmp_path):
    out = shutil.copytree(BEFORE / "unfinished", tmp_path / "run")
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (ended,) = forked.golden(out, "--max-steps", 3, "--resume")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].endswith("and only that version can resume it.")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
