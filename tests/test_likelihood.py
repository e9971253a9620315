"""Packed, shared and cut as they may be, requests score what each would score alone."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import load

from evals import likelihood
from evals.likelihood import Request, common, cut, likelihoods
from fsrl import Unsteered


@pytest.fixture(scope="module")
def golden():
    """The golden model, base and steered."""
    loaded = load()
    return SimpleNamespace(base=Unsteered(loaded.model), steered=loaded.steered)


def alone(model, request: Request, max_length: int) -> tuple[float, bool]:
    """One sequence, full logits, log-softmax."""
    whole = [*request.context, *request.continuation][-(max_length + 1) :]
    n = len(request.continuation)
    logits = model.logits(torch.tensor(whole[:-1]))[-n:].double()
    target = torch.tensor(request.continuation)
    logps = logits.log_softmax(-1).gather(1, target[:, None])
    return float(logps.sum()), bool((logits.argmax(-1) == target).all())


def questions(seed: int, vocabulary: int = 512) -> list[Request]:
    """What benchmarks ask: shared examples, questions under them, choices of one token and of many,
    one repeated.
    """
    g = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        n = int(torch.randint(low, high, (), generator=g))
        return torch.randint(4, vocabulary, (n,), generator=g).tolist()

    examples, requests = tokens(30, 50), []
    for _ in range(4):
        context = examples + tokens(1, 12)
        choices = [tokens(1, 9) for _ in range(3)] + [tokens(1, 2) for _ in range(3)]
        choices += [choices[0] + tokens(1, 4), choices[0]]
        requests += [Request(context, choice) for choice in choices]
    requests += [Request(tokens(1, 3), tokens(1, 20)) for _ in range(3)]
    order = torch.randperm(len(requests), generator=g).tolist()
    return [requests[i] for i in order]


@pytest.mark.parametrize("which", ["base", "steered"])
@pytest.mark.parametrize(
    ("tokens", "max_length"), [(10_000, 1000), (90, 1000), (1, 1000), (300, 40), (300, 21)]
)
def test_every_request_scores_as_if_alone(golden, which, tokens, max_length):
    """Under any budget, and where contexts are cut from the left (two requests then read different
    beginnings).
    """
    model = getattr(golden, which)
    requests = questions(tokens + max_length)
    found = likelihoods(model, requests, max_length, tokens)
    with torch.inference_mode():
        for request, (logp, greedy) in zip(requests, found, strict=True):
            expected, likeliest = alone(model, request, max_length)
            assert logp == pytest.approx(expected, abs=1e-4)
            assert greedy == likeliest


def test_what_greedy_decoding_writes_is_called_greedy(golden):
    context = [2, 17, 33, 40]
    with torch.inference_mode():
        written = []
        for _ in range(6):
            written.append(int(golden.base.logits(torch.tensor(context + written))[-1].argmax()))
    spoilt = [*written[:3], (written[3] + 1) % 512, *written[4:]]
    found = likelihoods(
        golden.base, [Request(context, written), Request(context, spoilt)], 100, 100
    )
    assert [x.greedy for x in found] == [True, False]


def test_a_prompt_is_computed_once(golden, monkeypatch):
    """Four single-token choices cost their context alone; questions that share examples share them
    in the stream.
    """
    streams = []
    pack = likelihood.pack
    monkeypatch.setattr(
        likelihood, "pack", lambda trees: streams.append(pack(trees)) or streams[-1]
    )
    examples, questions = list(range(4, 104)), [[200 + i, *range(300, 310)] for i in range(5)]
    requests = [Request(examples + q, [letter]) for q in questions for letter in (7, 8, 9, 10)]
    likelihoods(golden.base, requests, 1000, 10_000)
    assert sum(len(s.tokens) for s in streams) == 100 + 5 * 11
    streams.clear()
    answers = [[20 + i, 30, 31] for i in range(6)]
    likelihoods(golden.base, [Request(examples, a) for a in answers], 1000, 10_000)
    assert (
        sum(len(s.tokens) for s in streams) == 100 + 6 * 2
    )  # the last token of an answer is only predicted


@pytest.mark.parametrize("seed", range(8))
def test_the_cut_is_the_cheapest(seed):
    """Against every way to cut, at random sequences with shared beginnings."""
    g = torch.Generator().manual_seed(seed)
    stems = [
        torch.randint(0, 3, (int(n),), generator=g).tolist()
        for n in torch.randint(1, 8, (4,), generator=g)
    ]
    ends = [
        torch.randint(0, 3, (int(n),), generator=g).tolist()
        for n in torch.randint(0, 6, (10,), generator=g)
    ]
    sequences = sorted({tuple(stems[i % 4] + end) for i, end in enumerate(ends)})

    def cost(run):
        shared = common(run[0], run[-1]) if len(run) > 1 else len(run[0])
        return shared + sum(len(s) - shared for s in run) if shared else None

    def total(borders):
        costs = [cost(sequences[a:b]) for a, b in itertools.pairwise([0, *borders, len(sequences)])]
        return None if None in costs else sum(costs)

    inner = range(1, len(sequences))
    every = (total(b) for n in range(len(sequences)) for b in itertools.combinations(inner, n))
    runs = cut(sequences, 10_000)
    assert [s for run, _ in runs for s in run] == sequences
    assert all(cost(run) == claimed for run, claimed in runs)
    assert sum(claimed for _, claimed in runs) == min(t for t in every if t is not None)


def test_passes_stay_within_their_budget():
    sequences = sorted({tuple(r.context) for seed in range(6) for r in questions(seed)})
    for tokens in (1, 40, 100, 400):
        passes = list(likelihood.microbatches(sequences, tokens))
        assert [s for batch in passes for run in batch for s in run] == sequences
        for batch in passes:
            spent = sum(
                len(p) + sum(map(len, c))
                for p, c in (likelihood.tree(r, common(r[0], r[-1])) for r in batch)
            )
            assert spent <= tokens or (len(batch) == 1 and len(batch[0]) == 1)


def test_nothing_to_score(golden):
    assert likelihoods(golden.base, [], 10, 10) == []
    assert likelihoods(golden.base, [Request([5], [])], 10, 10) == [(0.0, True)]
    with pytest.raises(ValueError):
        likelihoods(golden.base, [Request([], [3])], 10, 10)
    with pytest.raises(ValueError):
        likelihoods(golden.base, [Request([5], [3] * 11)], 10, 10)
