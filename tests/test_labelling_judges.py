"""Retrieval and the linear model, against true labels and naive forms."""

import json
import re
import sys
import types
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from judge import AXBENCH, SOURCE, TINY, fill, realised, rows_of, run

from labels import load_labels, read_header_and_rows
from runtime.sources import UserError
from sae import JumpReLUSAE

pytest.importorskip("sklearn", reason="requirements-label.txt")
from labelling import judges

pytest_plugins = ("judge",)


@pytest.fixture(scope="module")
def tiny_truth(tmp_path_factory) -> tuple[Path, dict[int, str]]:
    """Categories that tiny's features truly fall under, and which of them each does."""
    path = tmp_path_factory.mktemp("tiny") / "categories.json"
    path.write_text(
        json.dumps([dict(name=n, definition=n, yes="a", no="b") for n in ("alignment", "style")])
    )
    return path, {int(row["index"]): row["category"] for row in TINY}


def test_retrieval_asks_about_a_few_and_says_how_well_it_labels_the_rest(
    serve, tiny_truth, tmp_path
):
    categories, truth = tiny_truth
    by_text = {row["description"]: row["category"] for row in TINY}
    server, out = (
        serve(truth=lambda category, text: by_text[text] == category),
        tmp_path / "labels.jsonl",
    )
    flags = dict(explanations="tiny", categories=categories, judge="retrieval", ask=300, out=out)
    run(**flags, endpoint=server.url, judge_model="judge")
    assert len(server.asked) == 600 and len(rows_of(out)) == 2 * len(truth)
    expected = read_header_and_rows(out)[0]["expected"]
    assert {a.accuracy for a in realised(out, truth, "judge").values()} == {1.0}
    for name, a in realised(out, truth, "nearest").items():
        assert a.n == len(truth) - 300 and a.mcc > 0.6
        assert abs(a.accuracy - expected[name]["accuracy"]) < 0.06
        assert (
            expected[name]["mcc_low"] < a.mcc < expected[name]["mcc_high"]
            and expected[name]["n"] == 150
        )
    sure = [r["confidence"] > 0.9 for r in rows_of(out).values() if r["judge"] != "judge"]
    right = [
        r["label"] == (truth[k] == c) for (k, c), r in rows_of(out).items() if r["judge"] != "judge"
    ]
    right, sure = np.array(right), np.array(sure)
    assert 0.3 < sure.mean() < 1 and right[sure].mean() > 0.95 > right[~sure].mean()
    run(**flags, endpoint=server.url, judge_model="judge")
    assert len(server.asked) == 600  # the choice is the same, all of it is in the journal


def test_features_that_were_asked_in_vain_stay_unlabelled_under_retrieval(serve, one, tmp_path):
    server = serve(fault=lambda n: "refusal" if n < 5 else None)
    flags = dict(
        explanations=AXBENCH,
        source=SOURCE,
        categories=one,
        endpoint=server.url,
        judge_model="judge",
    )
    run(**flags, judge="retrieval", ask=100, out=tmp_path / "labels.jsonl")
    assert len(rows_of(tmp_path / "labels.jsonl")) == 295


def test_the_linear_model_learns_from_a_small_file(tiny_truth, tmp_path):
    categories, truth = tiny_truth
    sheet, out = tmp_path / "sheet.csv", tmp_path / "labels.jsonl"
    run(explanations="tiny", categories=categories, sample=250, out=sheet)
    learned = {int(row["feature"]) for row in fill(sheet, lambda k, name: truth[k] == name)}
    run(explanations="tiny", categories=categories, judge="local", train=sheet, out=out)
    expected = read_header_and_rows(out)[0]["expected"]
    for name, a in realised(out, truth, "linear", learned).items():
        assert a.n == len(truth) - 250 and a.mcc > 0.6
        assert abs(a.accuracy - expected[name]["accuracy"]) < 0.06
    loaded = load_labels(out, JumpReLUSAE.from_pretrained("tiny"))
    assert loaded.matched and loaded.categories["style"].sum() == sum(
        row["label"] for (_, c), row in rows_of(out).items() if c == "style"
    )
    assert loaded.explanations[0].startswith("fires on")


def test_expectations_are_held_out():
    """Random labels cannot be predicted; a look at a row's own label shows as agreement."""
    g = np.random.default_rng(0)
    for scorers in (judges.NEIGHBOURS, judges.LINEAR):
        found = []
        for seed in range(20):
            x, y = g.standard_normal((200, 16)).astype(np.float32), g.random(200) < 0.5
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            judge = judges.fit(scorers, x, y, np.arange(200), seed)
            found.append(np.nan_to_num(np.corrcoef(judge.held_out, y)[0, 1]))
        assert np.mean(found) < 2 * 0.07 / np.sqrt(20)  # of 200 fair coins, r spreads by 0.07


def test_one_class_gives_no_certainty():
    x = judges.tfidf([f"word{i % 7} and word{i % 5}" for i in range(60)])
    for scorers in (judges.NEIGHBOURS, judges.LINEAR):
        p = judges.fit(scorers, x, np.zeros(60, bool), np.arange(60)).probability(x)
        assert np.isfinite(p).all() and (p < 0.1).all() and (p > 0.001).all()


def test_logistic_regression_stands_at_its_optimum():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 7, generator=g)
    y = (x[:, 0] + 0.5 * torch.randn(50, generator=g) > 0.3).float()
    fitted = judges.linear(0.7, labelled=50).fit(x.double().numpy(), y.numpy())
    w, b = (torch.tensor(t[0]).requires_grad_() for t in (fitted.coef_, fitted.intercept_))
    z = x.double() @ w + b
    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y.double(), reduction="sum")
    (loss + 0.35 * (w @ w)).backward()
    assert w.grad.abs().max() < 1e-4 and b.grad.abs() < 1e-4


def test_the_embedding_is_latent_semantic_analysis(monkeypatch):
    """Against a dense matrix and its exact singular value decomposition; embedded in chunks."""
    texts = [json.loads(line)["description"] for line in AXBENCH.read_text().splitlines()[:120]]
    monkeypatch.setattr(judges, "DIMENSIONS", 100)
    monkeypatch.setattr(judges, "CHUNK", 50)
    x = torch.from_numpy(judges.tfidf(texts))
    assert x.dtype == torch.float32

    counts = []
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        pairs = [f"{a} {b}" for a, b in pairwise(words)]
        counts.append(Counter([*words, *pairs, *(word[:4] + "-" for word in words)]))
    vocabulary = sorted(set().union(*counts))
    dense = torch.tensor([[float(count[term]) for term in vocabulary] for count in counts])
    frequency = (dense > 0).sum(0)
    weights = torch.where(dense > 0, 1 + dense.log(), 0) * (1 + torch.log(121 / (1 + frequency)))
    weights = torch.nn.functional.normalize(weights, dim=1)
    U, S, _ = torch.linalg.svd(weights, full_matrices=False)
    exact = torch.nn.functional.normalize(U[:, :100] * S[:100], dim=1)
    assert (x @ x.T - exact @ exact.T).abs().mean() < 0.01


def test_the_choice_covers_the_space():
    """Ten tight clusters of unequal size: ten random draws miss some, the covering choice none."""
    g = np.random.default_rng(0)
    centres = np.linalg.qr(g.standard_normal((16, 16)))[0][:10]
    x = np.repeat(centres, [2, 2, 2, 2, 2, 2, 2, 2, 2, 982], axis=0) + 1e-3 * g.standard_normal(
        (1000, 16)
    )
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    found = [len(set((x[judges.cover(x, 10, seed)] @ centres.T).argmax(1))) for seed in range(10)]
    assert np.mean(found) > 9.7
    assert len(set(judges.cover(x, 50, 1).tolist())) == 50
    assert (
        len(judges.cover(np.repeat(x[:3], 5, axis=0), 10, 0)) <= 6
    )  # copies of what is chosen add nothing


def test_embeddings_of_sentence_transformers(monkeypatch):
    """Its interface, by a stand-in: nothing pickled is loaded, no code run, and lengths are one."""
    seen = {}

    class SentenceTransformer:
        def __init__(self, name, trust_remote_code, model_kwargs):
            seen.update(name=name, trust=trust_remote_code, **model_kwargs)

        def encode(
            self, texts, batch_size, normalize_embeddings, convert_to_numpy, show_progress_bar
        ):
            assert normalize_embeddings and convert_to_numpy
            return np.full((len(texts), 4), 0.5)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    x = judges.embed(["a", "b"], "some/model")
    assert x.shape == (2, 4) and x.dtype == np.float32
    assert seen == dict(name="some/model", trust=False, use_safetensors=True)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="pip install sentence-transformers"):
        judges.embed(["a"], "some/model")
