"""Integrated gradients against autograd on a whole v, and their tables."""

import numpy as np
import pytest
import torch
from effects import evaluated, golden, some_masks, table_of  # noqa: F401 (a fixture)

import data
from audit import effect_tables
from audit.attribution import KINDS, PARTS, attribute, position_kinds, quadrature
from fsrl import Adapter, SteeredModel
from simpo import preference_losses


def test_shares_sum_to_the_change_of_the_loss(golden):  # noqa: F811
    policy, pairs = golden
    found = attribute(policy, pairs, 16)
    change = evaluated(policy, pairs) - found.base.mean().item()
    assert found.change == pytest.approx(change, rel=1e-12)
    assert abs(found.change) > 0.01 and abs(found.residual) < 1e-4 * abs(found.change)
    assert abs(attribute(policy, pairs, 1).residual) > abs(found.residual)


def test_shares_are_complete_under_a_clamp_too(golden):  # noqa: F811
    """A soft-threshold adapter: v of both signs, f + v clamped at 0."""
    policy, pairs = golden
    adapter = Adapter(64, 256, "soft-threshold").to(torch.float64)
    threshold = dict(raw_threshold=torch.full((256,), 0.02))
    adapter.load_state_dict(policy.steered.adapter.state_dict() | threshold)
    steered = SteeredModel(policy.base, policy.steered.sae, adapter, policy.steered.layer)
    found = attribute(policy._replace(model=steered.requires_grad_(False)), pairs[:4], 16)
    assert abs(found.change) > 0.01 and abs(found.residual) < 0.05 * abs(found.change)


@pytest.mark.parametrize("steps", [3, 6])
def test_shares_against_autograd_on_a_whole_v(golden, steps):  # noqa: F811
    """v [T, F] of one stream as a leaf of the graph, at each node of the same quadrature."""
    policy, pairs = golden
    steered = policy.steered
    masks = some_masks(2)
    found = attribute(policy, pairs, steps, masks)
    packed = data.pack_pairs(pairs)
    plan = policy.base.plan(packed)
    x = steered.residual(packed, plan)
    v = steered.adapter(x)
    share = torch.zeros_like(v)
    for node, weight in quadrature(steps):
        leaf = (node * v).requires_grad_()
        hidden = steered.above(x + leaf @ steered.sae.W_dec, plan)
        logps = policy.base.logps(hidden, packed)
        losses = preference_losses(logps, packed, policy.recorded.beta, policy.recorded.gamma_ratio)
        losses.loss.sum().backward()
        share += weight * leaf.grad * v
    kind = position_kinds(packed, policy.tokenizer)
    by_kind = torch.stack([share[kind == i].sum(0) for i in range(len(KINDS))]) / len(pairs)
    by_pair = torch.stack([share[packed.tree == i].sum(0) for i in range(len(pairs))])
    error = by_pair.std(0) / len(pairs) ** 0.5
    by_category = by_pair @ masks.double().T
    torch.testing.assert_close(found.shares, by_kind, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.pair_category, by_category, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.error, error, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("nodes", [1, 3, 4, 5, 8, 11])
def test_the_quadrature_is_exact_for_low_polynomials(nodes):
    found = quadrature(nodes)
    places = [place for place, _ in found]
    assert len(places) == nodes and places == sorted({*places})
    assert places[0] > 0 and places[-1] < 1
    for degree in range(2 * (nodes // -(-nodes // 4))):
        integral = sum(weight * place**degree for place, weight in found)
        assert integral == pytest.approx(1 / (degree + 1), rel=1e-12)


def test_where_a_position_stands(golden):  # noqa: F811
    policy, _ = golden
    names = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>")
    start, stop, bos, eos = map(policy.tokenizer.token_to_id, names)
    model, line = policy.tokenizer.encode("model\n", add_special_tokens=False).ids
    prompt = [bos, start, 7, stop, line]
    whole, cut = [start, model, line, 8, 9, stop, line, eos], [start, model, line, 8, 9, stop]
    pairs = [
        data.Pair(prompt, whole, cut),
        data.Pair(prompt[1:], cut[:2], cut),
        data.Pair(prompt, cut, cut),
    ]
    kinds = position_kinds(data.pack_pairs(pairs), policy.tokenizer)
    header, text, end = (lambda side, n, part=part: [f"{side} {part}"] * n for part in PARTS)
    expected = ["first"] + ["prompt"] * 4
    expected += header("chosen", 3) + text("chosen", 2) + end("chosen", 3)
    expected += header("rejected", 3) + text("rejected", 2) + end("rejected", 1)
    expected += ["first"] + ["prompt"] * 3 + header("chosen", 2)
    expected += header("rejected", 3) + text("rejected", 2) + end("rejected", 1)
    expected += ["first"] + ["prompt"] * 4  # a response that was cut ends where the next one begins
    for side in ("chosen", "rejected"):
        expected += header(side, 3) + text(side, 2) + end(side, 1)
    assert [KINDS[i] for i in kinds.tolist()] == expected


def test_rows_share_out_the_whole(golden):  # noqa: F811
    policy, pairs = golden
    masks = {"a": some_masks(1)[0].numpy(), "b": ~some_masks(1)[0].numpy()}
    masks["b"][:5] = False
    tables = [table_of(masks)]
    listed = effect_tables.category_masks(tables)
    assert [x.category for x in listed] == ["a", "b", "(none)"]
    members = torch.stack([torch.from_numpy(x.mask) for x in listed])
    found = attribute(policy, pairs, 4, members)
    rows = effect_tables.attribution_rows(found, tables, np.ones(256, bool), 50, 0)
    of = {(row.category, row.where): row for row in rows}
    whole = found.change + found.residual
    assert of["(all)", "(all)"].share == pytest.approx(whole)
    for where in ("(all)", *KINDS):
        parts = sum(of[name, where].share for name in ("a", "b", "(none)"))
        assert parts == pytest.approx(of["(all)", where].share, abs=1e-12)
    assert sum(of["(all)", where].share for where in KINDS) == pytest.approx(whole)
    a = of["a", "(all)"]
    assert a.share == pytest.approx(found.pair_category[:, 0].mean().item(), rel=1e-6)
    assert a.low <= a.share <= a.high
