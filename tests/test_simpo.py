"""Losses and log-probabilities against naive versions and the golden step, gradients included."""

import pytest
import torch
from conftest import load, ragged

import simpo
from data import pack


def test_mean_logps_are_over_each_response_alone():
    packed = pack(ragged(3, trees=6))
    logps = torch.randn(
        len(packed.target), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    means = simpo.mean_logps(logps, packed.sequence, packed.lengths)
    for c, part in enumerate(logps.split(packed.lengths.tolist())):
        if len(part):
            torch.testing.assert_close(means[c], part.mean())


def test_simpo_loss_is_the_equation_and_survives_large_margins():
    chosen, rejected = torch.tensor([-1.0, -2.0, -900.0]), torch.tensor([-1.5, -1.0, 0.0])
    loss = simpo.simpo_loss(chosen, rejected, beta=10.0, gamma_ratio=0.5)
    naive = -torch.log(torch.sigmoid(10.0 * (chosen[:2] - rejected[:2] - 0.5)))
    torch.testing.assert_close(loss[:2], naive, atol=1e-5, rtol=1e-5)
    assert loss[2] == pytest.approx(9005.0)


def test_scores_sum_norms_over_positions_of_the_separate_sequences():
    """A prompt position counts once for each of its two sequences."""
    golden = load(torch.float64)
    pairs = [([1, 2, 3], [[4, 5], [6]]), ([7], [[8], [9, 10]])]
    packed = pack(pairs)
    scores = simpo.score(golden.steered, packed, 10.0, 0.5)
    l1 = l0 = 0.0
    for prompt, continuations in pairs:
        for continuation in continuations:
            alone = pack([([*prompt, *continuation], [])])
            x = golden.steered.residual(alone, golden.model.plan(alone))
            v = golden.adapter(x)
            l1 += v.abs().sum().item()
            l0 += v.count_nonzero().item()
    assert scores.l1.item() == pytest.approx(l1, rel=1e-6)
    assert scores.l0.item() == l0


@pytest.mark.parametrize("adapter", ["mid", "paper_init"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_step(expected, report, adapter, dtype):
    """Four pairs: token log-probabilities, losses, L1, L0 and gradients.

    float32 agrees to 1e-5 with the authors' stack in float32 (both drift as much from float64),
    float64 with its float64 run to 2e-6: what is left is its RMSNorm and rotary angles, which it
    takes in float32 even there.
    """
    golden = load(dtype, adapter)
    suffix, close = ("_f32", 1e-5) if dtype == torch.float32 else ("", 2e-6)
    ids, labels, mask = (expected[f"step_{k}"] for k in ("input_ids", "labels", "attention_mask"))
    trees = []
    for i in range(4):
        (chosen, label), (rejected, _) = (
            (ids[j][mask[j].bool()].tolist(), labels[j]) for j in (i, i + 4)
        )
        p = int((label[mask[i].bool()] == -100).sum())
        trees.append((chosen[:p], [chosen[p:], rejected[p:]]))
    packed = pack(trees)
    tokens, *norms = golden.steered(packed)
    theirs = expected[f"step_{adapter}_token_logps"]  # float64
    scored = labels[:, 1:] != -100
    theirs = torch.cat([theirs[j][scored[j]] for i in range(4) for j in (i, i + 4)])
    torch.testing.assert_close(tokens.double(), theirs, atol=0, rtol=close)

    want = report["step"][adapter]
    logps = simpo.mean_logps(tokens, packed.sequence, packed.lengths)
    losses = simpo.simpo_loss(logps[0::2], logps[1::2], 10.0, 0.5)
    assert logps[0::2].tolist() == pytest.approx(want["chosen_logps" + suffix], rel=close)
    assert logps[1::2].tolist() == pytest.approx(want["rejected_logps" + suffix], rel=close)
    assert losses.tolist() == pytest.approx(
        want["losses" + suffix], rel=10 * close if suffix == "" else close
    )
    l1, l0 = (norm @ packed.copies.to(dtype) / packed.copies.sum() for norm in norms)
    assert l1.item() == pytest.approx(want["l1_real" + suffix], rel=close)
    assert l0.item() == pytest.approx(want["l0_real" + suffix], rel=1e-5)
    parameters = list(golden.adapter.parameters())
    for loss, name in ((losses.mean(), "simpo"), (l1, "l1_real")):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        for gradient, key in zip(gradients, ("weight", "bias"), strict=True):
            reference = expected[f"step_{adapter}_{key}_{name}"]  # from float64, kept as float32
            assert (gradient - reference).norm() <= 1e-5 * reference.norm()
