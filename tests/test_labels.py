"""A label file is read whole, belongs to the SAE in use, or is refused with a sentence."""

import dataclasses
import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest

import labels
import policy
from runtime import neuronpedia as table
from runtime import rows
from runtime.sources import UserError
from tests.conftest import GOLDEN, SAE_ID
from tiny import LABELS_DIR

RES = "google/gemma-scope-2b-pt-res"
L0_21, L0_72 = "layer_12/width_65k/average_l0_21", "layer_12/width_65k/average_l0_72"


def sae(source=RES, sae_id=L0_21, digest="a" * 64, width=65_536):
    return SimpleNamespace(source=source, sae_id=sae_id, sha256=digest, d_sae=width)


def neuronpedia(tmp_path, source="12-gemmascope-res-65k", index="457", name="rows.json", **more):
    row = (
        dict(modelId="gemma-2-2b", layer=source, index=index, description=" the word \u2028 so")
        | more
    )
    path = tmp_path / name
    text = (
        json.dumps([row])
        if ".json" in name and "jsonl" not in name
        else json.dumps(row, ensure_ascii=False) + "\n"
    )
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_tiny_labels_have_one_category_a_feature():
    tiny_sae = labels.JumpReLUSAE.from_pretrained("tiny")
    for kind in ("fires", "promotes"):
        found = labels.load_labels(LABELS_DIR / f"{kind}.jsonl", tiny_sae)
        assert found.kind == kind and found.matched and len(found.explanations) == tiny_sae.d_sae
        assert set(found.categories) == {"style", "alignment", "content", "chat"}
        assert (np.sum(list(found.categories.values()), axis=0) == 1).all()


def test_neuronpedia_ids_map_to_the_sae_they_are_not_named_after():
    assert table.sae_of("gemma-2-2b", "12-gemmascope-res-65k") == (RES, L0_72)
    assert table.sae_of("gemma-2-2b", "12-gemmascope-res-65k__l0-21") == (RES, L0_21)
    assert table.sae_of("gemma-2-2b", "6-gemmascope-mlp-65k") is None
    assert table.sae_of("llama-3", "6-gemmascope-res-65k") is None
    for sae_id in (L0_21, L0_72):
        model_id, source = table.page_of(RES, sae_id)
        assert table.sae_of(model_id, source) == (RES, sae_id)
    assert [len(row.split()) for row in table.AVERAGE_L0.values()] == [
        26,
        26,
        42,
        42,
    ]  # every block of 2B and 9B


@pytest.mark.parametrize("name", ["rows.json", "batch-1.jsonl", "batch-1.jsonl.gz"])
def test_explanations_of_another_sae_are_refused_naming_both(tmp_path, name):
    path = neuronpedia(tmp_path, name=name)
    assert labels.load_labels(path, sae(sae_id=L0_72)).explanations == {457: "the word \u2028 so"}
    assert labels.load_labels(path, sae(source="/disk/gemma-scope-2b-pt-res", sae_id=L0_72)).matched
    with pytest.raises(UserError, match="average_l0_72.*average_l0_21"):
        labels.load_labels(path, sae())
    assert not labels.load_labels(path, sae(), assume_match=True).matched


def ours(tmp_path, **header):
    labels.write_labels(
        tmp_path / "l.jsonl",
        header,
        [dict(feature=3, category="style", label=True, confidence=0.9)],
    )
    return tmp_path / "l.jsonl"


def test_a_hash_decides_and_cannot_be_assumed_away(tmp_path):
    path = ours(tmp_path, kind="fires", sae="elsewhere", sae_id="renamed", sae_sha256="a" * 64)
    assert labels.load_labels(path, sae()).categories["style"].nonzero()[0].tolist() == [3]
    with pytest.raises(UserError, match="renamed.*average_l0_21"):
        labels.load_labels(path, sae(digest="b" * 64), assume_match=True)


def test_no_provenance_needs_to_be_assumed(tmp_path):
    path = ours(tmp_path, kind="fires")
    with pytest.raises(UserError, match="--assume-labels-match"):
        labels.load_labels(path, sae())
    assert not labels.load_labels(path, sae(), assume_match=True).matched


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"feature": 70000}\n', "features 0 to 65535"),
        ('{"index": "x"}\n', "row 1 has no feature index"),
        ('{"feature": 1}\n{"feature"\n', "line 2"),
        ('{"format": "fsrl-labels-9"}\n', "fsrl-labels-9"),
        ('{"feature": 1, "category": ["a"]}\n', "category must be a name"),
        ("[1]\n", "list of objects"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_unreadable_rows_are_named(tmp_path, content, words):
    path = tmp_path / "l.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        labels.load_labels(path, sae(), assume_match=True)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LARGEST", 1 << 10)
    with pytest.raises(UserError, match="unpacks to more"):
        labels.load_labels(neuronpedia(tmp_path, name="b.jsonl.gz", description="x" * 2000), sae())


def test_a_run_opens_as_what_was_trained(tiny_run):
    opened = policy.open_policy(str(tiny_run))
    assert opened.steered and opened.model is opened.steered and opened.steered.layer == 2
    assert opened.settings.lr == 2e-3 and opened.settings.device == "cpu"
    pairs, name = policy.eval_pairs(opened, limit=5)
    assert (len(pairs), name) == (5, "tiny")
    bare = policy.open_policy(str(tiny_run / "adapter"))
    assert (
        bare.steered.sae.sha256 == opened.steered.sae.sha256 and bare.folder == tiny_run / "adapter"
    )
    base = policy.open_policy(None, model="tiny")
    assert base.steered is None and base.model is base.base


def test_moved_sources_are_named_on_the_way_in(tmp_path):
    folder = (
        GOLDEN / "adapter_mid"
    )  # the authors' format: it names an SAE id, but neither model nor repository
    opened = policy.open_policy(
        str(folder), model=str(GOLDEN / "model"), sae=str(GOLDEN / "sae"), sae_id=SAE_ID
    )
    assert opened.steered.layer == 1
    with pytest.raises(UserError, match="--run nowhere/at/all"):
        policy.open_policy("nowhere/at/all")
    assert dataclasses.is_dataclass(opened.settings)
