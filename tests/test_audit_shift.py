"""Shift against the whole [T, V] written out; the null, behaviour and rankings on known ground."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from effects import golden, table_of  # noqa: F401 (a fixture)

import data
from audit import behaviour, ranking, shift
from audit import choices as ch
from data import Pair
from fsrl import Adapter, SteeredModel

NAMES = ("a", "b", ch.END, ch.REST)


def some_classes(V: int, seed: int = 0) -> ch.Classes:
    of_token = torch.randint(0, 4, (V,), generator=torch.Generator().manual_seed(seed))
    return ch.Classes(NAMES, of_token)


def naive(policy, pair: Pair, response: list[int], classes: ch.Classes):
    """Mean over the response's positions, one sequence, all of [T, V] at once."""
    tokens = torch.tensor([*pair.prompt, *response])
    base, steered = policy.base.logits(tokens), policy.steered.logits(tokens)
    places = slice(len(pair.prompt) - 1, len(tokens) - 1)
    logp0, logp1 = (x[places].log_softmax(-1) for x in (base, steered))
    p0, p1 = logp0.exp(), logp1.exp()
    terms = (p0, p1, p1 * (logp1 - logp0), (p1 - p0) * (logp1 - logp0))
    each = [torch.stack([x[:, classes.of_token == c].sum(1) for c in range(4)], 1) for x in terms]
    kl = torch.nn.functional.kl_div(logp0, logp1, reduction="sum", log_target=True) / len(response)
    return [x.mean(0) for x in each], kl


def test_shift_is_the_naive_sum_and_its_shares_add_up(golden, monkeypatch):  # noqa: F811
    policy, pairs = golden
    pairs = pairs[:4]
    by_7 = lambda x, _: [slice(i, i + 7) for i in range(0, len(x), 7)]  # noqa: E731 (cuts texts)
    monkeypatch.setattr(ch, "chunks", by_7)
    partitions = [some_classes(policy.base.config.vocab_size, seed) for seed in (0, 1)]
    for classes, found in zip(partitions, shift.shift(policy, pairs, partitions), strict=True):
        texts = [(pair, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
        for i, (pair, response) in enumerate(texts):
            expected, kl = naive(policy, pair, response, classes)
            got = (found.before[i], found.after[i], found.share[i], found.divergence[i])
            for ours, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(found.kl[i], kl, atol=1e-9, rtol=1e-6)
        assert found.kl.min() > 1e-3
        assert (found.divergence >= -1e-12).all()
        for mass in (found.before, found.after):
            torch.testing.assert_close(mass.sum(1), torch.ones(len(mass), dtype=torch.float64))


def zeros(policy):
    adapter = Adapter(64, 256).to(torch.float64)
    steered = SteeredModel(policy.base, policy.steered.sae, adapter, policy.steered.layer)
    return policy._replace(model=steered.requires_grad_(False))


def test_an_adapter_of_zeros_shifts_nothing_and_answers_alike(golden):  # noqa: F811
    policy, pairs = golden
    still, classes = zeros(policy), [some_classes(policy.base.config.vocab_size)]
    for found in (shift.shift(still, pairs[:2], classes), shift.null(still, pairs[:2], classes)):
        assert not found[0].share.any() and not found[0].divergence.any()
        assert torch.equal(found[0].before, found[0].after)
    answers = behaviour.answered(still, [pair.prompt for pair in pairs[:3]], 8)
    assert all(pair.chosen == pair.rejected for pair in answers)
    (same,) = behaviour.compare(answers, classes)
    assert same.named() is None and not same.excess.any() and (same.p_values == 1).all()


def test_classes_partition_the_vocabulary(golden):  # noqa: F811
    """Every token has one class; one that no text shows belongs to the rest."""
    policy, pairs = golden
    masks = torch.rand(2, 256, generator=torch.Generator().manual_seed(3)) < 0.4
    found = ch.classes(policy, pairs, {"a": masks[0].numpy(), "b": masks[1].numpy()})
    assert found.names == NAMES and found.of_token.shape == (policy.base.config.vocab_size,)
    seen = {token for pair in pairs for token in (*pair.chosen, *pair.rejected)}
    end = policy.tokenizer.token_to_id("<end_of_turn>")
    unseen = [t for t in range(policy.base.config.vocab_size) if t not in seen | {end}]
    assert unseen and (found.of_token[unseen] == 3).all() and found.of_token[end] == 2
    assert ((found.of_token >= 0) & (found.of_token < 4)).all()


def test_the_null_has_the_policys_divergence_at_other_places(golden, monkeypatch):  # noqa: F811
    policy, pairs = golden
    classes = [some_classes(policy.base.config.vocab_size)]
    own, null = shift.shift(policy, pairs, classes)[0], shift.null(policy, pairs, classes)[0]
    assert null.kl.mean().item() == pytest.approx(own.kl.mean().item(), rel=0.05)
    monkeypatch.setattr(shift, "SEARCH_PAIRS", 1)  # the scale is corrected on all pairs
    null = shift.null(policy, pairs, classes)[0]
    assert null.kl.mean().item() == pytest.approx(own.kl.mean().item(), rel=0.02)
    assert not torch.allclose(null.kl, own.kl, rtol=0.05)
    stream = next(policy.streams(pairs))
    push = policy.steered.steer(stream.x)[0] - stream.x
    moved = shift.shuffled(policy, stream, 0)
    first = stream.packed.position == 0
    assert torch.equal(moved[first], push[first]) and not torch.equal(moved, push)
    for rows in (stream.packed.branch == 0, stream.packed.branch > 0):
        torch.testing.assert_close(moved[rows].sum(0), push[rows].sum(0))


# --- behaviour ------------------------------------------------------------------------------------


def test_a_phrase_that_replaces_another_within_a_class_is_a_change_of_it():
    """Ten prompts: token 5 in place of 4, both of class a; token 7 of class b now and then."""
    classes = ch.Classes(NAMES, torch.tensor([3, 2, 3, 3, 0, 0, 1, 1]))
    pairs = [Pair([2], [4, 4, 3], [5, 5, 3, 6 + i % 2]) for i in range(12)]
    pairs = [p if i % 3 else Pair([2], [*p.chosen, 6 + i % 2], p.rejected[:3])
             for i, p in enumerate(pairs)]  # fmt: skip
    (found,) = behaviour.compare(pairs, [classes])
    assert found.named() == "a" and found.p_values[0] <= 0.01 < found.p_values[1]
    assert found.gained[0] == found.lost[0] == 2
    assert found.before.mean(0)[0] == found.after.mean(0)[0] == 2


def test_excess_is_nothing_on_average_without_an_effect():
    g = torch.Generator().manual_seed(0)
    member = torch.eye(2, dtype=torch.float64)[torch.arange(40) % 2]
    found = [
        behaviour.excess(
            torch.randint(-1, 2, (30, 40), generator=g, dtype=torch.int64).double(), member, 199
        )
        for _ in range(60)
    ]
    excess = torch.stack([f.excess for f in found])
    total = torch.stack([f.gained + f.lost for f in found])
    assert abs(excess.mean()) < 0.03 * total.mean()
    p = torch.stack([f.p_values for f in found]) / 2
    assert abs((p <= 0.1).double().mean() - 0.1) < 0.08


def test_answers_are_independent_draws_and_do_not_depend_on_their_company(golden):  # noqa: F811
    policy, pairs = golden
    prompts = [pairs[0].prompt] * 3 + [pairs[1].prompt]
    together = behaviour.answered(policy, prompts, 6, seed=5)
    alone = behaviour.answered(policy, prompts[1:2], 6, seed=6)
    assert together[1] == alone[0]
    assert len({tuple(pair.chosen) for pair in together[:3]}) > 1
    header = data.header_ids(policy.tokenizer)
    assert all(pair.rejected[: len(header)] == header for pair in together)


# --- rankings -------------------------------------------------------------------------------------


def test_gradient_scores_are_the_derivative_of_the_divergence(golden):  # noqa: F811
    """Of the divergence in the class, by how much all of a feature's steering grows."""
    policy, pairs = golden
    pairs, classes = pairs[:2], some_classes(policy.base.config.vocab_size)
    scores = ranking.gradient_scores(policy, pairs, classes, "a")
    lengths = torch.tensor([len(r) for pair in pairs for r in (pair.chosen, pair.rejected)])

    def divergence(scale: torch.Tensor) -> float:
        def conditions(stream):
            v = policy.steered.adapter(stream.x)
            return [policy.steered.add(stream.x, v * scale)]

        found = shift.shifts(policy, pairs, [classes], conditions)[0][0]
        return (found.divergence[:, 0] * lengths).sum().item()

    for k in scores.abs().topk(3).indices.tolist():
        step = torch.zeros(256, dtype=torch.float64)
        step[k] = 1e-4
        difference = (divergence(1 + step) - divergence(1 - step)) / 2e-4
        assert scores[k].item() == pytest.approx(difference, rel=1e-3)


def test_curves_keep_the_features_named_first(golden):  # noqa: F811
    policy, pairs = golden
    pairs, classes = pairs[:2], some_classes(policy.base.config.vocab_size)
    orders = {"forward": torch.arange(256), "backward": torch.arange(255, -1, -1)}
    forward, backward = ranking.curves(policy, pairs, classes, "b", orders, numbers=(0, 40, 256))
    for curve in (forward, backward):
        assert curve.shares[0] == 0 and curve.shares[2].item() == pytest.approx(1, abs=1e-9)
        assert curve.area == pytest.approx(curve.shares.clamp(max=1).mean().item())
    assert forward.shares[1] != backward.shares[1]


def test_rankings_put_the_best_first():
    usage, mean_v = np.array([0.1, 0.9, 0.0, 0.5]), np.array([0.3, 0.1, 0.0, 2.0])
    gradient = torch.tensor([5.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    table = table_of({"style": np.array([False, True, False, False])})
    found = ranking.rankings("style", [table], usage, mean_v, None, gradient)
    first = {name: order[0].item() for name, order in found.items()}
    assert first["usage"] == 1 and first["mean v"] == 3 and first["v · gradient"] == 0
    assert found["random"][-1] == 2  # it never steers


def test_a_categorys_features_come_first_and_the_others_keep_their_order():
    earned = torch.tensor([3.0, 0.0, 5.0, -1.0, 2.0], dtype=torch.float64)
    found = SimpleNamespace(shares=-earned[None])
    table = table_of({"style": np.array([False, True, False, False, True])})
    anything = np.ones(5)
    orders = ranking.rankings("style", [table], anything, anything, found, earned)
    assert orders["attribution"].tolist() == [2, 0, 4, 1, 3]
    assert orders[f"attribution, {table.name}"].tolist() == [4, 1, 2, 0, 3]


def test_a_response_may_place_its_own_tokens(golden):  # noqa: F811
    """Where they are placed as their tokens are, choices and gap are the same; and a target placed
    elsewhere takes its gap along.
    """
    policy, pairs = golden
    pairs, classes = pairs[:3], some_classes(policy.base.config.vocab_size)
    own = [classes.of_token[torch.tensor([*p.chosen, *p.rejected])] for p in pairs]
    same = classes._replace(own=own)
    found = ch.choices(policy, pairs, [classes, same])
    torch.testing.assert_close(found[0].shares, found[1].shares)
    torch.testing.assert_close(ch.data_alone(pairs, classes), ch.data_alone(pairs, same))
    other = classes._replace(own=[torch.zeros_like(of) for of in own])
    (moved,) = ch.choices(policy, pairs, [other])
    torch.testing.assert_close(moved.shares.sum(1), found[0].shares.sum(1))
    gap = ch.data_alone(pairs, other)
    assert not gap[:, 1:].any() and gap.abs().max() < 1e-12  # 1 of each response's tokens
