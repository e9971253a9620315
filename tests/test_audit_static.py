"""Static steering: means over the unshared sequences, and vectors that are adapters of biases."""

import math

import pytest
import torch
from effects import evaluated, golden  # noqa: F401 (a fixture)

from audit import static
from audit.counting import count
from data import pack


def test_means_over_the_unshared_sequences_one_at_a_time(golden):  # noqa: F811
    policy, pairs = golden
    v, f, x = [], {"chosen": [], "rejected": []}, {"chosen": [], "rejected": []}
    for pair in pairs:
        for side in f:
            packed = pack([(pair.prompt + getattr(pair, side), [])])
            stream = policy.steered.residual(packed, policy.base.plan(packed))
            v.append(policy.steered.adapter(stream)[1:])
            f[side].append(policy.steered.sae.encode(stream)[len(pair.prompt) :])
            x[side].append(stream[len(pair.prompt) :])

    def gap(of):
        return torch.cat(of["chosen"]).mean(0) - torch.cat(of["rejected"]).mean(0)

    expected = torch.cat(v).mean(0), gap(x), gap(f)
    for a, b in zip(static.means(count(policy, pairs)), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_a_constant_v_is_an_adapter_of_biases_alone(golden):  # noqa: F811
    policy, pairs = golden
    means = static.means(count(policy, pairs))
    vectors = static.vectors(means, policy.steered, (2.0,), (3, 999))
    assert [(x.steering, x.coefficient, x.features) for x in vectors] == [
        ("mean v", 2.0, None),
        ("contrastive, residual stream", 2.0, None),
        ("contrastive, SAE features", 2.0, None),
        ("top features", 1.0, 3),
        ("top features", 1.0, 256),
    ]
    losses = static.losses(policy, pairs, vectors)
    largest = means.v >= means.v.sort().values[-3]
    biases = {0: 2 * means.v, 3: means.v * largest, 4: means.v}
    for i, bias in biases.items():
        alone = evaluated(policy, pairs, weight=torch.zeros(256, 64), bias=bias)
        assert losses[2 + i].mean().item() == pytest.approx(alone, rel=1e-5)
    torch.testing.assert_close(vectors[1].x, 2 * means.stream_gap)
    decoded = means.f_gap @ policy.steered.sae.W_dec
    torch.testing.assert_close(vectors[2].x, 2 * decoded)

    rows = static.static_rows(vectors, losses, 20, 0)
    zero = dict(weight=torch.zeros(256, 64), bias=torch.zeros(256))
    assert rows[0].loss == pytest.approx(evaluated(policy, pairs, **zero), rel=1e-12)
    assert rows[1].loss == pytest.approx(evaluated(policy, pairs), rel=1e-12)
    assert rows[1].delta == 0
    assert all(math.isnan(row.recovered) for row in rows)  # a policy that is worse has no gain
    better = static.static_rows(vectors, -losses, 20, 0)
    assert better[0].recovered == 0 and better[1].recovered == 1
