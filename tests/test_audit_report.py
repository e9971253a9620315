"""The page stands alone and nothing foreign in it can act; the card says what the Hub reads."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard

from audit import card, report
from runtime.sources import UserError

HOSTILE = (
    "<script>alert('x')</script><img src=http://example.org onerror=alert(1)> \"quoted\" & | `x`"
)
VOID = {"meta", "img", "br", "line", "circle", "rect", "hr"}


class Page(HTMLParser):
    """Collects what a browser would see; raises where a tag is closed that was not open."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


L0_21 = "layer_12/width_65k/average_l0_21"


@pytest.fixture
def run(tmp_path):
    """What a run leaves, by hand: F features, explanations that mean harm, two short pairs."""

    def write(
        F=200, sae="google/gemma-scope-2b-pt-res", sae_id=L0_21, revision="c0ffee", matched=True
    ):
        out = tmp_path / "run"
        (out / "eval").mkdir(parents=True)
        (out / "adapter").mkdir()
        identity = dict(
            base_model="google/gemma-2-2b-it", base_model_revision=revision, layer=12, sae=sae
        )
        identity |= dict(
            sae_id=sae_id, sae_revision=revision, sae_sha256="5ae" * 21, activation="relu"
        )
        (out / "adapter" / "adapter_config.json").write_text(
            json.dumps(identity | dict(d_model=8, d_sae=F))
        )
        settings = dict(
            data="someone/preferences" if revision else "/disk/secret/pairs.jsonl", l1=0.02, lr=5e-7
        )
        (out / "config.json").write_text(
            json.dumps(dict(settings=settings, data_revision=revision))
        )
        rows = [
            dict(split="eval", step=s, loss=6.9 - s, accuracy=0.5, l0=930.25, l1=1.5)
            for s in (0, 4)
        ]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = f"{HOSTILE}: by what a feature fires on; judge: {HOSTILE}"
        about = dict(data="tiny", pairs=2, labels=[dict(name=HOSTILE, text=text, matched=matched)])
        row = dict(
            labels=HOSTILE,
            category=HOSTILE,
            features=3,
            sae=0.2,
            adapter=0.25,
            change=0.25,
            low=0.1,
            high=0.4,
        )
        row |= dict(noisy_low=-0.1, noisy_high=0.6, mcc=0.448)
        missing = dict.fromkeys(("change", "low", "high", "noisy_low", "noisy_high", "mcc"))
        rows = [row | dict(context="prompt"), row | missing | dict(context="prompt+chosen")]
        (out / "eval" / "composition.json").write_text(json.dumps(dict(about=about, rows=rows)))
        further = dict(
            about=about, rows=[dict(what=HOSTILE, loss=2.5), dict(what="all", loss=None)]
        )
        (out / "eval" / "of_another_kind.json").write_text(json.dumps(further))
        zeroed = dict(labels=HOSTILE, category=HOSTILE, used=3, delta=-1e-9)
        control = zeroed | dict(set="matched", delta=0.25, excess_low=-0.5, excess_high=0.125)
        rows = [zeroed | dict(set="category"), control]
        (out / "eval" / "ablation.json").write_text(json.dumps(dict(about=about, rows=rows)))
        samples = [dict(prompt=HOSTILE, before="a b c d e", after="a b a b a b a b a b a b")]
        (out / "samples.json").write_text(json.dumps(samples))
        part = dict(
            tokens=["<b>", HOSTILE, "\n"],
            l1=[0.0, 4.5, 1.0],
            top=[[], [[7, 4.0], [9, 0.5]], [[7, 1.0]]],
        )
        pairs = [dict(prompt=part, chosen=part, rejected=part)] * 2
        shown = dict(about=about, pairs=pairs, explanations={"7": HOSTILE, "9": ""})
        strongest = [4.0, f"before {HOSTILE}", HOSTILE, "after"]
        shown["cards"] = {"7": dict(promotes=[HOSTILE, "\n"], contexts=[strongest])}
        (out / "eval" / "examples.json").write_text(json.dumps(shown))
        order = np.random.default_rng(0).permutation(F)
        columns = dict(feature=np.arange(F), explanation_x=[HOSTILE] * F)
        columns["x:style"] = order < F // 3
        for name in ("adapter_usage", "adapter_mean", "sae_usage", "sae_mean", "difference"):
            columns[f"{name}_prompt_chosen"] = np.linspace(0, 1, F)
        columns["promoted_rank_prompt_chosen"] = order + 1
        columns["suppressed_rank_prompt_chosen"] = F - order
        pq.write_table(pa.table(columns), out / "eval" / "features.parquet")
        return out

    return write


def test_page_is_self_contained_and_inert(run):
    out = run()
    text = report.write_report(out).read_text()
    page = Page(text)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    # The one script is this project's, and the page allows no other.
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert script == report.SCRIPT and page.tags.count("script") == 1
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{hashed}'" in text
    targets = {value for _, name, value in page.attributes if name == "id"}
    for tag, name, value in page.attributes:
        # Pictures travel with the page; only what a reader clicks leads elsewhere.
        if name in ("src", "href"):
            elsewhere = value.startswith("https://www.neuronpedia.org/")
            within = value.removeprefix("#") in targets
            assert value.startswith("data:image/png") or (tag == "a" and (elsewhere or within))
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text
    assert page.text.count("alert('x')") > 20  # shown as what it is, in tables and tokens ...
    tips = [value for tag, name, value in page.attributes if name == "data-t"]
    assert len(tips) == 2 * 3 * 3  # ... and in what hovering shows
    size, strongest, other = tips[1].splitlines()
    assert size == "steered by 4.5 (‖v‖₁)" and other == "+0.5 feature 9"
    assert strongest.startswith("+4 <script>") and strongest.endswith(" (feature 7)")


def test_page_says_what_was_measured(run):
    text = report.write_report(run()).read_text()
    for figure in ("6.900", "2.900", "930.250", "+25.0 %", "+10.0 % to +40.0 %"):
        assert figure in text
    assert "-10.0 % to +60.0 %" in text and "MCC 0.45" in text and 'class="noisy"' in text
    ablated = text[text.index("Categories taken away") :]
    cells = re.findall(r'<td data-h="([^"]*)"[^>]*>(.*?)</td>', ablated)[:6]
    assert [value for _, value in cells[1:]] == ["3", "0.000", "0.250", "-0.500 to 0.125", "–"]
    assert "-0.000" not in text and "e-09" not in text
    assert "Warning: collapse. 1 of 1 sampled answers repeat themselves" in text

    steered = text[text.index("Steered most") :]
    feature, explanation = re.search(
        r"<td data-h=\"feature\">(.*?)</td><td.*?>(.*?)</td>", steered
    ).groups()
    assert feature == '<a class="f" href="#f199">199</a>'  # the largest v - f of the fixture
    assert "&lt;script&gt;" in explanation
    link = "https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-65k__l0-21/199"
    assert f'<h4>Feature 199\n<a href="{link}" rel="noreferrer">' in text


def test_a_feature_has_a_card_with_contexts_and_tokens(run):
    text = report.write_report(run()).read_text()
    card_of = re.search(r'<div class="card" id="f7">(.*?)</ul>', text, re.S).group(1)
    assert "+4: before &lt;script&gt;" in card_of and "<mark>&lt;script&gt;" in card_of
    assert "<code>↵</code>" in card_of and "steered at" in card_of and "mean v" in card_of
    assert 'data-f="7"' in text and 'id="f9"' not in text  # 9 has no card in the fixture


@pytest.mark.parametrize(
    "sae, sae_id, place",
    [
        (
            "google/gemma-scope-2b-pt-res",
            "layer_12/width_65k/average_l0_72",
            "gemma-2-2b/12-gemmascope-res-65k/",
        ),
        ("tiny", "layer_2/width_1k/average_l0_8", None),
        ("someone/else", L0_21, None),
    ],
)
def test_links_lead_to_the_saes_own_pages_or_nowhere(run, sae, sae_id, place):
    text = report.write_report(run(sae=sae, sae_id=sae_id)).read_text()
    assert (
        (f"https://www.neuronpedia.org/{place}" in text)
        if place
        else ("neuronpedia.org" not in text)
    )


def test_assumed_labels_are_loud(run):
    out = run(matched=False)
    assert '<li class="loud">' in report.write_report(out).read_text()


def test_page_does_not_grow_with_the_dictionary(run, tmp_path):
    small = report.write_report(run(F=200)).stat().st_size
    shutil.rmtree(tmp_path / "run")
    assert report.write_report(run(F=65_536)).stat().st_size < small + 10_000


def test_page_of_a_run_that_was_not_evaluated(run):
    out = run()
    shutil.rmtree(out / "eval")
    text = report.write_report(out).read_text()
    assert Page(text).tags.count("h2") == 2 and "930.250" in text and 'headline"' not in text
    for name in ("metrics.jsonl", "config.json"):
        (out / name).unlink()
    Page(report.write_report(out).read_text())


def test_damaged_files_are_named(run):
    out = run()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"split": "eval", "st')  # killed while writing: the rows before it count
    assert "2.900" in report.write_report(out).read_text()
    (out / "report.html").unlink()
    (out / "eval" / "composition.json").write_text(
        '{"about": {"pairs": 1}, "rows": [{"labels": "x"}]}'
    )
    with pytest.raises(UserError, match="was not written by"):
        report.write_report(out)
    (out / "eval" / "composition.json").write_text("{")
    with pytest.raises(UserError, match=r"composition\.json"):
        report.write_report(out)
    assert not (out / "report.html").exists()


def test_card_is_what_the_hub_reads(run):
    out = run()
    path = card.write_card(out)
    assert path == out / "adapter" / "README.md"
    found = ModelCard(path.read_text())
    assert found.data.base_model == "google/gemma-2-2b-it" and found.data.datasets == [
        "someone/preferences"
    ]
    assert (
        found.data.library_name == "fsrl"
        and "fsrl" in found.data.tags
        and found.data.license == "gemma"
    )
    for figure in (
        "6.900",
        "2.900",
        "930.250",
        "+25.0 %",
        L0_21,
        "5ae" * 21,
        "open_policy",
        "c0ffee",
        "0.02",
    ):
        assert figure in found.text
    assert "<script" not in found.text and "<img" not in found.text
    rows = [line for line in found.text.splitlines() if line.startswith("|") and "alert" in line]
    assert len(rows) == 2 and all(
        line.count("|") == 7 for line in rows
    )  # a pipe in a name makes no column


def test_card_keeps_local_paths_to_itself(run):
    text = card.write_card(run(revision=None)).read_text()
    assert "secret" not in text and "pairs.jsonl" in text
    assert ModelCard(text).data.base_model is None and ModelCard(text).data.datasets is None


def test_card_before_evaluation_and_of_a_bare_adapter(run, tmp_path):
    out = run()
    shutil.rmtree(out / "eval")
    assert "Which categories" not in card.write_card(out).read_text()
    shutil.move(out / "adapter", tmp_path / "bare")
    text = card.write_card(tmp_path / "bare").read_text()
    assert "What training did" not in text and L0_21 in text
