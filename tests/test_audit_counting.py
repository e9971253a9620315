"""What is counted equals what separate, dense runs of every sequence count; intervals and label
noise say what they should.
"""

import contextlib
import json
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, load

import fsrl
import labels
import train
from audit import counting, label_noise
from audit.counting import CONTEXTS, count, relative_change, resampled_composition
from audit.label_noise import Judged, noisy_changes, read_human
from audit.published import published
from data import Pair, pack
from policy import DEFAULTS, Policy, Stream, open_policy
from runtime.device import Device
from runtime.sources import UserError
from runtime.tables import percentiles

CPU = Device("cpu", torch.float32)
RUN = DEFAULTS._replace(tokens_per_microbatch=70)


def some_pairs(n: int = 6, seed: int = 0) -> list[Pair]:
    """Ragged pairs over the golden vocabulary, among them a prompt of one token and an empty
    response.
    """
    g = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(0, 512, (length,), generator=g).tolist()

    sizes = torch.randint(1, 30, (n, 3), generator=g).tolist()
    return [Pair([0], tokens(5), []), *(Pair(*(tokens(length) for length in row)) for row in sizes)]


@pytest.fixture(scope="module")
def golden():
    """In float64, so that no feature sits on the edge of its threshold by rounding alone."""
    return load(torch.float64)


@pytest.fixture(scope="module")
def policy(golden) -> Policy:
    return Policy(golden.steered.requires_grad_(False), None, CPU, RUN, "golden")


@pytest.fixture(scope="module")
def counted(policy):
    """Pairs, masks of two categories, and what is counted."""
    pairs = some_pairs()
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(2, policy.steered.sae.d_sae, generator=generator) < 0.3
    return pairs, masks, count(policy, pairs, masks)


@torch.no_grad()
def naive(golden, pairs, context: int):
    """Every sequence of a context run alone: x, dense v and f [N, F] of all positions but the
    first, their places and whose they are.
    """
    streams, v, f, places, owners = [], [], [], [], []
    for owner, pair in enumerate(pairs):
        tokens = [*pair.prompt, *((), pair.chosen, pair.rejected)[context]]
        packed = pack([(tokens, [])])
        x = golden.model.blocks(golden.model.embed(packed.tokens), golden.model.plan(packed), 0, 2)
        streams.append(x[1:])
        v.append(golden.adapter(x)[1:])
        f.append(golden.sae.encode(x)[1:])
        places += range(1, len(tokens))
        owners += [owner] * (len(tokens) - 1)
    x, v, f = (torch.cat(parts) for parts in (streams, v, f))
    return x, v, f, torch.tensor(places), torch.tensor(owners)


@pytest.mark.parametrize("context", range(3), ids=CONTEXTS)
def test_counts_equal_separate_dense_runs(golden, counted, context):
    pairs, masks, counts = counted
    x, v, f, places, owners = naive(golden, pairs, context)
    assert counts.positions[context] == len(v) > 20
    assert (counts.place[context] == torch.bincount(places, minlength=counts.place.shape[1])).all()
    torch.testing.assert_close(counts.stream[context], x.sum(0), rtol=1e-5, atol=1e-4)
    for side, value in enumerate((v, f)):
        active = value != 0
        assert 0 < active.sum() < active.numel()
        assert (counts.events[side, context] == active.sum(0)).all()
        torch.testing.assert_close(counts.sums[side, context], value.sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(counts.usage[side, context], active.double().mean(0))
        torch.testing.assert_close(counts.mean[side, context], value.mean(0), rtol=1e-5, atol=1e-6)
        l0 = active.sum(1)
        assert (counts.l0[side, context] == torch.bincount(l0, minlength=counts.l0.shape[-1])).all()
        place_l0 = torch.zeros_like(counts.place[context]).index_add_(0, places, l0)
        assert (counts.place_l0[side, context] == place_l0).all()
        for c, mask in enumerate([*masks, torch.ones(masks.shape[1], dtype=torch.bool)]):
            events = active[:, mask].sum(1).double()
            by_pair = torch.bincount(owners, weights=events, minlength=len(pairs))
            assert (counts.pair_events[:, side, context, c] == by_pair).all()
        for mask in masks:
            share = active[:, mask].sum() / active.sum()
            found = counting.composition(counts, mask)[side, context]
            torch.testing.assert_close(found.item(), share.item())


@pytest.mark.parametrize("tokens", [1, 1000])
def test_packing_and_pieces_do_not_matter(policy, counted, tokens, monkeypatch):
    pairs, masks, counts = counted
    monkeypatch.setattr(fsrl, "STEER_ROWS", 3)
    monkeypatch.setitem(fsrl.STEER_ELEMENTS, "cpu", 7 * policy.steered.sae.d_sae)
    other = policy._replace(recorded=RUN._replace(tokens_per_microbatch=tokens))
    found = count(other, pairs, masks)
    for name, a, b in zip(counts._fields[:-1], counts, found, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-4 if name == "stream" else 1e-6)
    for a, b in zip(counts.shares[1:], found.shares[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_relative_change_by_hand():
    share = torch.tensor([[0.2, 0.1, 0.3], [0.1, 0.2, 0.3]])  # adapter, SAE
    torch.testing.assert_close(relative_change(share), torch.tensor([1.0, -0.5, 0.0]))


def test_the_l0_of_the_audit_is_that_of_the_evaluation(tiny_run):
    """Over both responses' sequences, as train.evaluate averages it, once <bos> is put back."""
    policy = open_policy(str(tiny_run), device="cpu")
    pairs, _ = policy.eval_pairs(limit=5)
    counts = count(policy, pairs)
    scorer = train.Scorer(policy.recorded.beta, policy.recorded.gamma_ratio, 8192, policy.device)
    whole = train.evaluate(policy.model, pairs, scorer)
    bos = policy.model(pack([(pairs[0].prompt[:1], [])])).l0.item()
    positions = counts.positions[1:].sum().item()
    events = counts.events[0, 1:].sum().item()
    mean = (events + bos * 2 * len(pairs)) / (positions + 2 * len(pairs))
    assert mean == pytest.approx(whole["l0"], rel=1e-3)


# --- the paper's measure --------------------------------------------------------------------------


class Features(NamedTuple):
    """Stands for a steered model: v and f are given for each token id, three of them a position."""

    values: torch.Tensor  # [2, tokens, F]

    def streams(self, pairs, what=None):
        for i, pair in enumerate(pairs):
            packed = pack([(pair.prompt, (pair.chosen, pair.rejected))])
            yield Stream([i], packed, None, packed.tokens[:, None].float())

    def autocast(self):
        return contextlib.nullcontext()

    @property
    def steered(self):
        def of(side):
            return lambda x: self.values[side][x[:, 0].long()]

        sae = SimpleNamespace(d_sae=self.values.shape[-1], d_model=1, encode=of(1))
        return SimpleNamespace(sae=sae, acting=of(0), pieces=lambda x: (x,))

    device = CPU


def test_the_papers_measure_of_three_positions_by_hand():
    """Features 0 and 1 are in the category, 0 to 3 are labelled, 4 is not. After <bos> stand three
    positions, at which 2 of 3, 0 of 1 and no labelled features are active.
    """
    v = torch.zeros(2, 9, 5)
    v[:, 0, 0] = 9.0  # <bos>: 1 of 1
    v[:, 1] = torch.tensor([0.5, 2.0, 1.0, 0.0, 7.0])
    v[:, 2] = torch.tensor([1e-7, 0.0, 0.0, 0.3, 7.0])  # feature 0 is below 1e-6
    v[:, 3] = torch.tensor([0.0, 0.0, 0.0, 0.0, 7.0])
    v[1, 1, 2] = 0.0  # what the SAE finds: 2 of 2 at the first of the three
    pairs = [Pair([0, 1, 2, 3], [], [])]
    mask = torch.tensor([[1, 1, 0, 0, 0]], dtype=torch.bool)
    labelled = torch.tensor([[1, 1, 1, 1, 0]], dtype=torch.bool)
    counts = count(Features(v), pairs, mask, labelled=labelled)
    found = counting.paper_composition(counts)[0, :, :, 0]  # [2 first, 2 sides], the prompt's
    without, with_first = [(2 / 3 + 0) / 2, (1 + 0) / 2], [(1 + 2 / 3 + 0) / 3, (1 + 1 + 0) / 3]
    torch.testing.assert_close(found, torch.tensor([without, with_first], dtype=torch.float64))
    assert counts.shares.positions[0, :, :, 0].tolist() == [[2, 2], [3, 3]]
    # The pooled share counts every value but 0: 2 of 4, 1 of 3 and 0 of 1 without <bos>.
    assert counting.composition(counts, mask[0])[0, 0] == pytest.approx(3 / 8)
    # The same by the weights of each feature, which label noise uses.
    weights = counts.shares.weights[0] @ mask[0].double() / counts.shares.positions[0]
    torch.testing.assert_close(weights[:, :, 0], found)


@pytest.mark.parametrize("context", range(3), ids=CONTEXTS)
def test_the_papers_measure_equals_separate_dense_runs(golden, policy, counted, context):
    pairs, masks, _ = counted
    generator = torch.Generator().manual_seed(2)
    labelled = masks | (torch.rand(masks.shape, generator=generator) < 0.5)
    counts = count(policy, pairs, masks, labelled=labelled)
    found = counting.paper_composition(counts)[:, 0, :, context]  # [C, 2]
    _, v, f, _, owners = naive(golden, pairs, context)
    for c, (mask, known) in enumerate(zip(masks, labelled, strict=True)):
        for side, value in enumerate((v, f)):
            active = value.abs() > 1e-6
            among = active[:, known].sum(1)
            share = active[:, mask].sum(1) / among
            assert found[c, side].item() == pytest.approx(share[among > 0].mean().item())
            own = share[(owners == 2) & (among > 0)].sum()
            assert counts.shares.pair_shares[2, 0, side, context, c].item() == pytest.approx(
                own.item()
            )


def test_the_papers_measure_is_resampled_over_pairs(policy, counted):
    pairs, masks, _ = counted
    counts = count(policy, pairs, masks, labelled=masks | masks.flip(0))
    drawn = counting.resampled_paper_composition(counts, 5, seed=3)
    generator = torch.Generator().manual_seed(3)
    for b in range(5):
        chosen = torch.randint(len(pairs), (len(pairs),), generator=generator)
        again = count(policy, [pairs[i] for i in chosen], masks, labelled=masks | masks.flip(0))
        torch.testing.assert_close(drawn[b], counting.paper_composition(again))


# --- intervals ------------------------------------------------------------------------------------


def test_resampling_is_over_pairs_and_seeded(counted):
    events = counted[2].pair_events
    drawn = resampled_composition(events, 20, seed=3)
    generator = torch.Generator().manual_seed(3)
    for b in range(20):
        pairs = torch.randint(len(events), (len(events),), generator=generator)
        chosen = events[pairs].sum(0)  # [2, 3, C + 1]
        expected = (chosen[..., :-1] / chosen[..., -1:]).permute(2, 0, 1).double()
        torch.testing.assert_close(drawn[b], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(drawn, resampled_composition(events, 20, seed=3))
    assert not torch.equal(drawn, resampled_composition(events, 20, seed=4))


def test_like_pairs_leave_no_doubt(counted):
    alike = counted[2].pair_events[1:2].expand(9, -1, -1, -1)
    drawn = resampled_composition(alike, 10, seed=0)
    torch.testing.assert_close(drawn, drawn[:1].expand_as(drawn))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """The true share is 0.3 for the adapter, 0.2 for the SAE; pairs differ in size."""
    rng, covered = np.random.default_rng(0), 0
    for trial in range(60):
        total = rng.integers(50, 500, size=(40, 2, 3))
        mine = rng.binomial(total, np.array([0.3, 0.2])[:, None])
        events = torch.from_numpy(np.stack([mine, total], -1))
        drawn = resampled_composition(events, 200, seed=trial)
        low, high = percentiles(relative_change(drawn[:, 0]))
        covered += int(low[1] <= 0.5 <= high[1])
    assert 51 <= covered <= 60  # 57 expected


# --- label noise ----------------------------------------------------------------------------------


def test_label_noise_follows_the_confusion(counted):
    counts = counted[2]
    machine = np.zeros(counts.events.shape[-1], dtype=bool)
    machine[:40] = True
    every = np.ones_like(machine)
    point = relative_change(counting.composition(counts, torch.from_numpy(machine)))
    many = 10**7
    weights = counts.events, counts.events.sum(-1)
    # A person who always agrees.
    agrees = Judged(np.array([[many, 0], [0, many]]), {})
    drawn = noisy_changes(*weights, machine, every, agrees, 5, seed=0)
    torch.testing.assert_close(drawn, point.expand(5, 3), rtol=1e-2, atol=1e-2)
    # Every feature was judged, so that nothing is left to guess.
    whole = {k: bool(m) for k, m in enumerate(machine)}
    nobody = Judged(np.ones((2, 2), dtype=int), whole)
    known = noisy_changes(*weights, machine, every, nobody, 5, seed=0)
    torch.testing.assert_close(known, point.expand(5, 3))
    # A feature without a label of the machine's stays outside the category.
    few = np.arange(len(machine)) < 100
    drawn = noisy_changes(*weights, machine, few, agrees, 5, seed=0)
    torch.testing.assert_close(drawn, point.expand(5, 3), rtol=1e-2, atol=1e-2)
    # Labels without information show no change.
    coin = Judged(np.full((2, 2), many), {})
    drawn = noisy_changes(*weights, machine, every, coin, 400, seed=0)
    assert (drawn.mean(0).abs() < 0.1).all() and (drawn.std(0) > 0.02).all()


@pytest.mark.parametrize("row", published()["table_6"]["rows"], ids=lambda row: row["category"])
def test_label_noise_by_the_papers_counts_of_agreement(row, tmp_path):
    """Table 6. Where every event under the SAE is of the category, and the adapter's are spread
    over features that the machine put there, the change is minus the share that a person denies.
    """
    counts = {name: row[name] for name in ("tp", "fp", "fn", "tn")}
    (tmp_path / "agreement.json").write_text(json.dumps({"style": counts}))
    (judged,) = read_human(str(tmp_path / "agreement.json"), [table()]).values()
    assert judged.confusion.tolist() == [[row["tn"], row["fn"]], [row["fp"], row["tp"]]]
    assert round(judged.mcc, 3) == row["mcc"]

    weights = torch.zeros(2, 3, 4001)
    weights[0, :, :4000], weights[1, :, 4000] = 1.0, 1.0
    judged, every = judged._replace(known={4000: True}), np.ones(4001, bool)
    drawn = noisy_changes(weights, weights.sum(-1), every, every, judged, 1000, seed=0)
    precision = (row["tp"] + 0.5) / (row["tp"] + row["fp"] + 1)
    assert drawn.mean().item() == pytest.approx(precision - 1, abs=0.007)


def table(kind="fires", name="some") -> labels.Labels:
    masks = {"style": np.arange(10) < 4}
    return labels.Labels(name, kind, {}, masks, True, {}, ROOT / "x.jsonl", "0", "a judge")


def test_human_labels_and_counts_of_them_say_the_same(tmp_path):
    rows, counts = tmp_path / "a.csv", tmp_path / "b.jsonl"
    rows.write_text(
        "feature,category,label\n0,style,yes\n1,style,true\n2,style,0\n7,style,false\n8,style,1\n"
    )
    cells = [(True, True, 2), (True, False, 1), (False, False, 1), (False, True, 1)]
    lines = [dict(category="style", machine=m, human=h, count=n) for m, h, n in cells]
    counts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # A person does not judge what a feature promotes.
    tables = [table(), table("promotes", "other")]
    found = [read_human(str(path), tables) for path in (rows, counts)]
    assert [list(f) for f in found] == [[("some", "style")]] * 2
    first, second = (f["some", "style"] for f in found)
    assert first.confusion.tolist() == second.confusion.tolist() == [[1, 1], [1, 2]]
    assert first.known == {0: True, 1: True, 2: False, 7: False, 8: True} and second.known == {}
    assert first.mcc == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)


@pytest.mark.parametrize(
    "text, named",
    [
        ("feature,category,label\n0,honesty,yes\n", "row 1: category 'honesty'"),
        ("feature,category,label\n0,style,maybe\n", "row 1: label is 'maybe'"),
        (
            "feature,category,label\n0,style,yes\n0,style,no\n",
            "row 2: feature 0 is labelled both ways",
        ),
        ("feature,category,label\n99,style,yes\n", "feature 99"),
        ("category,machine,human,count\nstyle,1,1,many\n", "count is 'many'"),
        (
            "feature,sae,explanation,style\n0,other (5ae5ae5ae5ae),fires on x,yes\n",
            "is of the SAE other",
        ),
    ],
)
def test_bad_human_rows_are_named(tmp_path, text, named):
    path = tmp_path / "human.csv"
    path.write_text(text)
    ours = table()._replace(sae=dict(sae="tiny", sae_id="x", sae_sha256="0" * 64))
    with pytest.raises(UserError, match=named):
        read_human(str(path), [ours])


def test_labels_that_the_judge_learned_from_do_not_measure_it(tmp_path):
    path = tmp_path / "human.csv"
    path.write_text("feature,category,label\n0,style,yes\n1,style,no\n")
    taught = table()._replace(learned=frozenset({0}))
    assert label_noise.read_human(str(path), [taught])["some", "style"].known == {1: False}
    with pytest.raises(UserError, match="learned from these labels"):
        label_noise.read_human(str(path), [taught._replace(learned=frozenset({0, 1}))])


def test_a_feature_without_a_label_of_the_machines_says_nothing_of_it(tmp_path):
    sheet = [dict(feature=k, category="style", label=k < 6) for k in range(8)]
    (tmp_path / "person.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sheet))
    some = table()._replace(labelled={"style": np.arange(10) < 5})
    (judged,) = read_human(str(tmp_path / "person.jsonl"), [some]).values()
    assert judged.confusion.tolist() == [[0, 1], [0, 4]] and set(judged.known) == set(range(5))
