"""Rows of the tables of usage lose nothing of what was counted."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_audit_counting import counted, golden, naive, policy  # noqa: F401 (fixtures)

from audit import features
from audit.counting import CONTEXTS, SIDES
from audit.feature_cards import cards


def test_log_linear_fit():
    ranks = np.arange(1, 50)
    slope, intercept, r2 = features.log_linear_fit(10 ** (-0.5 - 0.03 * ranks))
    assert (slope, intercept, r2) == (pytest.approx(-0.03), pytest.approx(-0.5), pytest.approx(1))
    noise = np.random.default_rng(0).lognormal(0, 1, len(ranks))
    noisy = np.sort(10 ** (-0.03 * ranks) * noise)[::-1]
    expected = np.corrcoef(ranks, np.log10(noisy))[0, 1] ** 2
    assert features.log_linear_fit(noisy)[2] == pytest.approx(expected) and expected < 0.99
    for values in (np.ones(5), np.array([])):
        assert np.isnan(features.log_linear_fit(values)).all()


@pytest.mark.parametrize("context", range(3), ids=CONTEXTS)
def test_bins_of_differences_lose_nothing(counted, context):  # noqa: F811
    counts = counted[2]
    difference = counts.mean[0] - counts.mean[1]
    rows = features.difference_rows(difference)
    rows = [row for row in rows if row.context == CONTEXTS[context]]
    assert sum(row.features for row in rows) == difference.shape[1]
    assert rows[0].promoted == (difference[context] > 0).sum()
    assert rows[0].suppressed == (difference[context] < 0).sum()


@pytest.mark.parametrize("side", range(2), ids=SIDES)
@pytest.mark.parametrize("context", range(3), ids=CONTEXTS)
def test_bins_of_l0_lose_nothing(counted, side, context):  # noqa: F811
    counts = counted[2]
    positions = counts.positions[context].item()
    events = counts.events[side, context].sum().item()

    def here(rows):
        return [r for r in rows if (r.of, r.context) == (SIDES[side], CONTEXTS[context])]

    rows = here(features.l0_rows(counts, bins=7))
    assert sum(row.positions for row in rows) == positions
    assert rows[0].mean == pytest.approx(events / positions)
    each = np.repeat(np.arange(counts.l0.shape[-1]), counts.l0[side, context])
    assert rows[0].p50 == np.percentile(each, 50, method="inverted_cdf")
    some = each[each > 0]
    assert rows[0].some == pytest.approx(len(some) / len(each))
    assert rows[0].some_p95 == np.percentile(some, 95, method="inverted_cdf")

    for least in (0, 0.2):
        rows = here(features.place_rows(counts, bins=5, least=least))
        assert sum(row.positions for row in rows) == positions
        assert sum(row.positions * row.mean_l0 for row in rows) == pytest.approx(events)
        assert all(row.positions >= least * positions for row in rows)
        ends = [(row.low, row.high) for row in rows]
        assert ends[0][0] == 1 and all(b[0] == a[1] + 1 for a, b in pairwise(ends))


def test_the_most_used_features_have_both_units(counted):  # noqa: F811
    """Share of positions, and share of events: what the paper's script divides by."""
    counts = counted[2]
    rows = features.top_rows(counts, "usage", [])
    first = [row for row in rows if (row["of"], row["context"]) == ("adapter", "prompt+chosen")]
    events = counts.events[0, 1]
    assert [row["feature"] for row in first[:1]] == [events.argmax().item()]
    for row in first:
        n = events[row["feature"]].item()
        assert row["usage"] == pytest.approx(n / counts.positions[1].item())
        assert row["share_of_events"] == pytest.approx(n / events.sum().item())
    assert "share_of_events" not in features.top_rows(counts, "value", [])[0]


class Words:
    """A tokenizer whose tokens are their numbers."""

    def decode(self, ids, skip_special_tokens):
        return f"<{ids[0]}>"


def test_cards_show_where_a_feature_is_steered_most(golden, policy, counted):  # noqa: F811
    """Against every sequence run alone; the token stands within the text around it."""
    pairs, _, counts = counted
    which = counts.mean[0, 1].topk(3).indices.tolist()
    found = cards(policy._replace(tokenizer=Words()), pairs, which)
    runs = [naive(golden, pairs, context) for context in (1, 2)]
    for k in which:
        strongest = []
        for pair in range(len(pairs)):
            here = torch.cat([v[owners == pair, k] for _, v, _, _, owners in runs])
            strongest.append(max(here.tolist(), default=0.0))
        expected = [v for v in sorted(strongest, reverse=True) if v][:3]
        contexts = found[str(k)]["contexts"]
        assert [c.v for c in contexts] == pytest.approx(expected, abs=1e-4) and expected
        texts = ["".join(f"<{t}>" for t in of) for p in pairs for of in (p.prompt, *p[1:])]
        assert all(any(c.before + c.token + c.after in text for text in texts) for c in contexts)
        raised = (golden.sae.W_dec[k] * (1 + golden.model.model.norm.weight)) @ (
            golden.model.model.embed_tokens.weight.T
        )
        assert found[str(k)]["promotes"][0] == f"<{raised.argmax().item()}>"
