"""The small world says what it claims to say, and the built files are what their labels and
provenance state.
"""

from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch

from labels import read_header_and_rows
from runtime.sources import UserError, sha256
from sae import JumpReLUSAE
from tiny import (
    DATA_DIR,
    LABELS_DIR,
    LAYER,
    MODEL_DIR,
    ROOT,
    SAE_DIR,
    SAE_ID,
    WIDTH,
    build,
    measure,
    world,
)

CAUSES = [name for name in world.CAUSES if name != "none"]


@pytest.fixture(scope="module")
def built():
    model, tokenizer = build.load()
    return model, tokenizer, JumpReLUSAE.from_pretrained("tiny")


def test_same_seed_same_texts():
    assert world.corpus(50, 1) == world.corpus(50, 1) != world.corpus(50, 2)
    assert world.pairs("style", 20, 1) == world.pairs("style", 20, 1) != world.pairs("style", 20, 2)


def test_every_character_has_a_label_and_no_token_has_two(built):
    _, tokenizer, _ = built
    for text in world.corpus(300, 1):
        spans = text.spans
        assert all(
            span.text and span.label in world.LABELS and span.name in measure.NAMES
            for span in spans
        )
        assert "".join(span.text for span in spans) == text.text
        at = world.span_of_characters(spans)
        for begin, end in tokenizer.encode(text.text, add_special_tokens=False).offsets:
            assert len({spans[i].label for i in at[begin:end]}) == 1


def test_every_attribute_can_be_read_off_the_answer():
    for text in world.corpus(3000, 2):
        hidden = {} if text.question.kind == "harm" else {"refusal": None}
        assert world.read(text.question, text.answer_text) == text.attributes | hidden
    question = world.questions()["fact"][0]
    assert world.read(question, "The tiger eats crabs.") is None


def test_equal_texts_have_equal_probability():
    """Otherwise different choices could lead to one text, and its nats would not be its
    log-probability.
    """
    nats = {}
    for text in world.corpus(20_000, 3):
        assert nats.setdefault(text.text, text.nats) == pytest.approx(text.nats, abs=1e-9)
    assert len(nats) < 20_000  # some texts did repeat


def test_questions_and_topics_are_many():
    questions = [q for kind in world.questions().values() for q in kind]
    assert len({q.text for q in questions}) == len(questions) > 500
    assert len({q.topic for q in questions}) > 60


def frequencies(texts, attribute):
    return Counter(text.attributes[attribute] for text in texts)


@pytest.mark.parametrize("cause", ["none", *CAUSES])
def test_chosen_and_rejected_differ_by_the_cause_alone(cause):
    n = 2000
    pairs = world.pairs(cause, n, 4)
    wins, loses = world.CAUSES[cause].wins, world.CAUSES[cause].loses
    chosen, rejected = [p.chosen for p in pairs], [p.rejected for p in pairs]
    assert all(p.chosen.question == p.rejected.question for p in pairs)
    assert {p.chosen.question.kind for p in pairs} == set(world.CAUSES[cause].kinds)
    for attribute, prior in world.PRIOR.items():
        if attribute in wins:
            assert set(frequencies(chosen, attribute)) == set(wins[attribute])
            assert set(frequencies(rejected, attribute)) == set(loses[attribute])
            assert not set(wins[attribute]) & set(loses[attribute])
        else:
            for side in (chosen, rejected):  # both follow the prior, so they are alike
                for value, p in prior.items():
                    assert frequencies(side, attribute)[value] / n == pytest.approx(p, abs=0.05)


def test_a_mix_has_its_weights():
    pairs = world.pairs({"style": 3, "honesty": 1}, 2000, 5)
    assert Counter(p.cause for p in pairs)["style"] / 2000 == pytest.approx(0.75, abs=0.04)
    for p in pairs:
        for attribute, values in world.CAUSES[p.cause].wins.items():
            assert p.chosen.attributes[attribute] in values


def test_an_unknown_cause_is_refused():
    with pytest.raises(ValueError, match="sytle"):
        world.pairs("sytle", 1, 0)


def test_built_files_agree_with_their_provenance():
    for kind in ("fires", "promotes"):
        header, rows = read_header_and_rows(LABELS_DIR / f"{kind}.jsonl")
        assert (header["kind"], header["sae_id"]) == (kind, SAE_ID)
        assert header["sae_sha256"] == sha256(SAE_DIR / SAE_ID / "params.npz")
        assert header["model_sha256"] == sha256(MODEL_DIR / "model.safetensors")
        assert [row["index"] for row in rows] == [str(k) for k in range(WIDTH)]
        assert {row["category"] for row in rows} <= {*world.LABELS, None}
        assert all(row["description"] for row in rows)
    files = [f for f in ROOT.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert sum(f.stat().st_size for f in files) <= 12e6


@pytest.mark.parametrize("split, n", [("train", build.TRAIN_PAIRS), ("test", build.TEST_PAIRS)])
def test_committed_pairs_are_those_of_the_world(split, n):
    rows = pq.read_table(DATA_DIR / f"{split}-00000-of-00001.parquet").to_pylist()
    pairs = world.pairs(build.PLANTED, n, build.SEEDS[f"{split} pairs"])
    assert rows == [pair.row(f"{split}-{i:05d}") for i, pair in enumerate(pairs)]


def test_special_tokens_stand_where_gemma_has_them(built):
    _, tokenizer, _ = built
    ids = [tokenizer.token_to_id(token) for token in build.SPECIAL]
    assert ids == list(range(6))
    text = world.corpus(1, 1)[0].text
    assert tokenizer.encode(text, add_special_tokens=False).ids[0] == 2
    strange = "A tab\t, an emoji 🐝 and  two spaces\n\n."
    assert tokenizer.decode(tokenizer.encode(strange, add_special_tokens=False).ids) == strange


def test_quality_holds_and_notices_a_shuffled_sae(built):
    model, tokenizer, sae = built
    texts = world.corpus(60, 6)
    q = measure.quality(model, sae, tokenizer, texts, LAYER)
    assert q.loss < 1.1 * q.entropy
    assert q.variance_explained >= 0.95 and q.loss_recovered >= 0.97 and q.l0 <= 20
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(0))
    arrays = {
        name: getattr(sae, name).clone()
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    }
    shuffled = measure.quality(
        model, JumpReLUSAE(arrays | {"W_dec": sae.W_dec[order]}), tokenizer, texts, LAYER
    )
    assert shuffled.variance_explained < 0.5 and shuffled.loss_recovered < 0.9


def test_firing_labels_hold_on_other_texts(built):
    model, tokenizer, sae = built
    rows = read_header_and_rows(LABELS_DIR / "fires.jsonl")[1]
    fires = measure.firing(model, sae, tokenizer, world.corpus(150, 7), LAYER)
    clear = [row for row in rows if row["purity"] >= 0.8 and fires.count[int(row["index"])] >= 10]
    agree = [
        world.LABELS[int(fires.label[int(row["index"])].argmax())] == row["category"]
        for row in clear
    ]
    assert len(clear) > WIDTH / 4 and sum(agree) / len(agree) > 0.95


def test_promotion_labels_hold_on_other_texts(built):
    """Of the features that clearly promote one label, in the shape in which they were written."""
    model, tokenizer, sae = built
    rows = [
        row
        for row in read_header_and_rows(LABELS_DIR / "promotes.jsonl")[1]
        if row["purity"] >= 0.8
    ]
    clear = [int(row["index"]) for row in rows]
    arrays = {name: getattr(sae, name)[clear] for name in ("W_dec", "b_enc", "threshold")}
    some = JumpReLUSAE(arrays | {"W_enc": sae.W_enc[:, clear], "b_dec": sae.b_dec})

    texts = world.corpus(100, 7)
    fires = measure.firing(model, some, tokenizer, texts, LAYER)
    promotes = measure.promotion(model, some, tokenizer, texts, fires, LAYER, probes=2)
    top = promotes.label.argmax(1).tolist()
    agree = [world.LABELS[label] == row["category"] for label, row in zip(top, rows, strict=True)]
    assert len(rows) > 50 and sum(agree) / len(agree) > 0.9
    written = measure.label_rows(tokenizer, fires, promotes, build.MODEL_ID, "")
    live = int(fires.count.argmax())
    assert written["promotes"][live].keys() == rows[0].keys()
    assert (
        written["fires"][live].keys()
        == read_header_and_rows(LABELS_DIR / "fires.jsonl")[1][0].keys()
    )


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--sae-layers 6: a layer from 0 to 5"):
        build.Settings(sae_layers=(1, 6))
