"""What trains jumprelu's thresholds, and the experiment that compares it with ReLU."""

import pytest
import torch

from fsrl import Adapter

BANDWIDTH, THRESHOLD, POSITIONS = 0.05, 0.001, 400_000
# Where a feature's pre-activations lie, each with a standard deviation of 0.3. After a ReLU, the
# first is 0 at 99.96 % of the positions, the last at 16 %.
CENTRES = torch.tensor([-1.0, -0.6, -0.3, 0.0, 0.3])


@pytest.fixture(scope="module")
def features():
    """An adapter of five features at CENTRES, and positions to read."""
    adapter = Adapter(5, 5, "jumprelu", BANDWIDTH).double()
    with torch.no_grad():
        adapter.weight.copy_(0.3 * torch.eye(5))
        adapter.bias.copy_(CENTRES)
        adapter.set_threshold(torch.full((5,), THRESHOLD, dtype=torch.float64))
    g = torch.Generator().manual_seed(0)
    return adapter, torch.randn(POSITIONS, 5, generator=g, dtype=torch.float64)


def of_threshold(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """The estimated gradient of mean ‖v‖₀ with respect to θ."""
    (gradient,) = torch.autograd.grad(adapter.steering(x).l0.mean(), adapter.raw_threshold)
    return gradient


def test_switched_off_features_do_not_push_their_thresholds(features):
    """The estimate is the rate at which ‖v‖₀ really falls, where nearly all of a ReLU's values
    would be 0 and inside the kernel.
    """
    adapter, x = features
    z = x * 0.3 + CENTRES
    step = 0.02
    on = [(z > THRESHOLD + shift).double().mean(0) for shift in (-step, step)]
    measured = (on[1] - on[0]) / (2 * step)
    estimated = of_threshold(adapter, x)
    assert (z[:, 0] <= 0).double().mean() > 0.99 and THRESHOLD < BANDWIDTH / 2
    torch.testing.assert_close(estimated, measured, rtol=0.05, atol=2e-3)


def test_the_estimate_is_the_derivative_of_the_smoothed_objective_with_a_point_mass(features):
    """Each pre-activation smeared over a rectangle of width ε gives v and ‖v‖₀ a true derivative in
    θ, compared here by differences.
    """
    adapter, x = features
    x = x[:2000]
    z = x * 0.3 + CENTRES
    probe = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def smoothed(threshold):
        """∫ t 1[t > θ] dt and ∫ 1[t > θ] dt over |t - z| < ε/2, divided by ε."""
        low = (z - BANDWIDTH / 2).maximum(threshold)
        high = (z + BANDWIDTH / 2).maximum(threshold)
        v = (high.square() - low.square()) / (2 * BANDWIDTH)
        return (v * probe + (high - low) / BANDWIDTH).sum(0)

    threshold, step = torch.full((5,), THRESHOLD, dtype=torch.float64), 1e-7
    numeric = (smoothed(threshold + step) - smoothed(threshold - step)) / (2 * step)
    steering = adapter.steering(x)
    total = (steering.v * probe).sum() + steering.l0.sum()
    (ours,) = torch.autograd.grad(total, adapter.raw_threshold)
    assert numeric.abs().max() > 100
    torch.testing.assert_close(ours, numeric, rtol=1e-5, atol=1e-3)


def test_silenced_features_neither_steer_nor_train():
    adapter = Adapter(5, 5, "jumprelu")
    adapter.init_weights(torch.Generator().manual_seed(0))
    adapter.silence([1, 3])
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    v, l1, l0 = adapter.steering(x)
    (v.sum() + l1.sum() + l0.sum()).backward()
    assert not v[:, [1, 3]].any() and v[:, [0, 2, 4]].any()
    for parameter in adapter.parameters():
        assert not parameter.grad[[1, 3]].any() and parameter.grad[[0, 2, 4]].any()
