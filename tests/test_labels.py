"""A label file is read whole, belongs to the SAE in use, or is refused with a sentence."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest

import labels
from labelling.sheets import read_given
from runtime import rows
from runtime import sae_ids as table
from runtime.sources import UserError
from sae import JumpReLUSAE
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
    tiny_sae = JumpReLUSAE.from_pretrained("tiny")
    for kind in ("fires", "promotes"):
        found = labels.load_labels(LABELS_DIR / f"{kind}.jsonl", tiny_sae)
        assert found.kind == kind and found.matched and len(found.explanations) == tiny_sae.d_sae
        assert set(found.categories) == {"style", "alignment", "content", "chat"}
        assert (np.sum(list(found.categories.values()), axis=0) == 1).all()


def test_neuronpedia_ids_map_to_the_sae_they_are_not_named_after():
    assert table.sae_of("gemma-2-2b", "12-gemmascope-res-65k") == (RES, L0_72)
    assert table.sae_of("gemma-2-2b", "12-gemmascope-res-65k__l0-21") == (RES, L0_21)
    assert table.sae_of("gemma-2-2b", "6-gemmascope-mlp-65k") is None
    medium = "resid_post/layer_12_width_65k_l0_medium"
    for model_id, repo in (("gemma-3-270m-it", "270m-it"), ("gemma-3-4b", "4b-pt")):
        of = f"google/gemma-scope-2-{repo}", medium
        assert table.sae_of(model_id, "12-gemmascope-2-res-65k") == of
        assert table.page_of(*of) == (model_id, "12-gemmascope-2-res-65k")
    small = medium.replace("medium", "small")
    assert table.page_of("google/gemma-scope-2-4b-pt", small) is None
    assert table.sae_of("gemma-3-4b", "12-gemmascope-2-transcoder-65k") is None
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
        ('{"feature": 1, "category": "rest"}\n', "'rest' cannot be the name of a category"),
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


def test_a_persons_labels_are_read_alike_from_every_form(tmp_path):
    says = {1: True, 2: False, 7: True}
    sheet = tmp_path / "sheet.csv"  # as a spreadsheet saves it, with a byte order mark
    lines = [f"{k},tiny,'-x,{'Yes' if says[k] else 'no'}," for k in says]
    sheet.write_text("\ufefffeature,sae,explanation,style,notes\n" + "\n".join(lines) + "\n")
    rows_of = tmp_path / "rows.csv"
    lines = [f"{k},style,{int(says[k])}" for k in says]
    rows_of.write_text("feature,category,label\n" + "\n".join(lines) + "\n")
    ours = tmp_path / "ours.jsonl"
    labels.write_labels(
        ours, {"kind": "fires"}, [dict(feature=k, category="style", label=says[k]) for k in says]
    )
    for path in (sheet, rows_of, ours):
        assert read_given(path).labels["style"] == says
    given = read_given(sheet)
    assert (given.sae, given.texts[1], [*given.labels]) == ("tiny", "-x", ["style"])
    assert given.unseen({1}).labels["style"] == {2: False, 7: True}
    with pytest.raises(UserError, match="sheet.csv: the judge learned from these labels"):
        given.unseen(frozenset(says))


def test_an_explanation_keeps_its_apostrophe_but_a_sheet_escapes_formulas(tmp_path):
    """A spreadsheet would compute "=x"; labelling writes "'=x" and takes that alone back."""
    ours = tmp_path / "ours.jsonl"
    texts = {1: "'s possessive endings", 2: "'=' in code"}
    labels.write_labels(
        ours, {"kind": "fires"}, [dict(feature=k, description=texts[k]) for k in texts]
    )
    assert labels.load_labels(ours, sae(), assume_match=True).explanations == texts
    sheet = tmp_path / "sheet.csv"
    lines = ["1,tiny,'s possessive endings,yes", "2,tiny,'=x,no"]
    sheet.write_text("feature,sae,explanation,style\n" + "\n".join(lines) + "\n")
    assert read_given(sheet).texts == {1: "'s possessive endings", 2: "=x"}


def test_counts_are_read_from_rows_and_from_an_agreement_file(tmp_path):
    table = [[201, 25], [5, 69]]  # [machine, person]: the paper's Table 6, formatting
    rows_of, agreement = tmp_path / "counts.csv", tmp_path / "l.agreement.json"
    lines = [f"style,{m},{h},{table[m][h]}" for m in (0, 1) for h in (0, 1)]
    rows_of.write_text("category,machine,human,count\n" + "\n".join(lines) + "\n")
    agreement.write_text(json.dumps({"style": dict(n=300, tp=69, fp=5, fn=25, tn=201), "x": None}))
    for path in (rows_of, agreement):
        given = read_given(path)
        assert {name: c.tolist() for name, c in given.counts.items()} == {"style": table}
        assert given.labels == {}


def test_a_row_without_a_label_names_the_one_category_of_its_feature(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("feature,category\n1,style\n2,alignment\n")
    expected = {"style": {1: True, 2: False}, "alignment": {2: True, 1: False}}
    assert read_given(path).labels == expected


@pytest.mark.parametrize(
    "text, named",
    [
        ("feature,category,label\n0,style,maybe\n", "row 1: label is 'maybe'"),
        ("feature,category,label\n0,style,1\n0,style,0\n", "row 2: feature 0 is labelled both"),
        ("category,machine,human,count\nstyle,1,1,many\n", "count is 'many'"),
        ("category,machine,human,count\nstyle,1,,3\n", "machine and human must each be yes or no"),
        ("feature,category,label\n0,style,\n", "holds no label"),
        ("feature,sae,explanation,style\n0,a,x,yes\n1,b,x,no\n", "is of 2 SAEs"),
        (f"feature,category,label\n{'9' * 5000},style,1\n", "row 1 has no feature index"),
    ],
)
def test_labels_that_cannot_be_read_are_named(tmp_path, text, named):
    path = tmp_path / "human.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=named) as e:
        read_given(path)
    assert len(str(e.value)) < 500
