"""What trains jumprelu's thresholds, and the experiment that compares it with ReLU."""

import json

import pytest
import torch
from conftest import metrics

import train
from experiments import fitting, jumprelu
from fsrl import Adapter
from policy import load_preferences

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


@pytest.mark.parametrize(("unit", "fresh"), [(1.0, True), (100.0, True), (100.0, False)])
def test_silenced_features_neither_steer_nor_train(unit, fresh):
    adapter = Adapter(5, 5, "jumprelu")
    adapter.init_weights(torch.Generator().manual_seed(0))
    adapter.silence([1, 3])
    adapter.set_unit(unit, fresh)
    assert adapter.bandwidth == pytest.approx(0.05 * unit)  # also of an adapter that goes on
    x = unit * torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    v, l1, l0 = adapter.steering(x)
    (v.sum() + l1.sum() + l0.sum()).backward()
    assert not v[:, [1, 3]].any() and v[:, [0, 2, 4]].any()
    for parameter in adapter.parameters():
        assert not parameter.grad[[1, 3]].any() and parameter.grad[[0, 2, 4]].any()


# --- the experiment -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    policy = fitting.tiny_policy()
    return policy, load_preferences(policy.recorded, policy.tokenizer)


@pytest.mark.parametrize(
    "flags",
    [
        dict(adapter="jumprelu", l0=0.1, threshold_lr=0.2),
        # Thresholds start at 0, and the loss alone pushes some below.
        dict(adapter="soft-threshold", l1=0.0, threshold_lr=1.0, schedule="constant"),
    ],
)
def test_a_run_in_memory_is_a_run_of_train(world, tmp_path, monkeypatch, flags):
    """Same settings, same seed: the same weights after training and the same evaluation."""
    policy, (pairs, eval_pairs, *_) = world
    flags |= dict(lr=0.002, seed=1, max_steps=2, batch_size=4, device="cpu")
    settings = train.Settings(**flags)
    fresh = fitting.fresh(policy, flags["adapter"], seed=1)
    fitting.fit(fresh, pairs, settings)
    found = train.evaluate(fresh.model, eval_pairs[:8], fitting.scorer_of(fresh, settings))

    few = world[1]._replace(eval_pairs=eval_pairs[:8])
    monkeypatch.setattr(train, "load_preferences", lambda *_: few)
    out = tmp_path / "run"
    place = dict(model="tiny", sae="tiny", data="tiny", layer=2, eval_every=0, samples=0)
    train.train(train.Settings(**flags, **place, out=str(out)))
    theirs = Adapter.from_pretrained(out)
    for name, parameter in fresh.steered.adapter.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
    last = metrics(out, "eval")[-1]
    assert all(last[name] == pytest.approx(value, rel=1e-6) for name, value in found.items())


def result(method="ReLU + L1", setting="a", weight=0.1, seed=0, loss=1.0, l0=10.0, threshold=None):
    return jumprelu.Result(method, setting, weight, seed, loss, 1.0, l0, 2 * l0, threshold)


def test_the_setting_that_is_kept():
    """Of those that halve the loss and are sparse, the least loss times L0; else the sparsest."""
    dense, sparser = result(loss=0.001, l0=200), result(loss=0.2, l0=60)
    useless, silent = result(loss=2.2, l0=1), result(loss=4.1, l0=0.1)
    good, better = result(loss=0.1, l0=20), result(loss=0.3, l0=5)
    assert jumprelu.choose([dense, sparser, useless, good, better, silent]) is better
    assert jumprelu.choose([dense, sparser, useless, silent]) is sparser
    assert jumprelu.choose([useless, silent]) is silent


def test_means_over_seeds_and_the_front():
    results = [result(seed=seed, loss=1.0 + seed, l0=10 + seed, threshold=0.5) for seed in range(3)]
    results += [result(weight=1.0, loss=3.0, l0=12.0), result(weight=2.0, loss=0.5, l0=40.0)]
    first, beaten, last = jumprelu.means(results)
    assert (first.loss, first.least, first.most, first.l0) == (2.0, 1.0, 3.0, 11.0)
    assert (first.l1, first.threshold, last.threshold) == (22.0, 0.5, None)
    assert jumprelu.front([last, beaten, first]) == [first, last]


def test_runs_are_made_once_and_tabulated(tmp_path, monkeypatch, capsys):
    """Of a made-up study; one that was interrupted goes on where it stopped."""
    made = []

    def runner():
        def run(plan):
            made.append(plan)
            if len(made) == 20:
                raise KeyboardInterrupt
            l0 = 30 / (1 + plan.weight + plan.setting.lr)
            theta = None if plan.setting.adapter == "relu" else 1.5
            method, setting, weight, seed = plan
            return result(method, setting.name, weight, seed, 0.1 / l0 + seed, l0, theta)

        return run

    monkeypatch.setattr(jumprelu, "runner", runner)
    monkeypatch.setattr("sys.argv", ["jumprelu", "--out", str(tmp_path / "out")])
    with pytest.raises(KeyboardInterrupt):
        jumprelu.main()
    jumprelu.main()
    jumprelu.main()
    # 12 settings; of 3 methods x 3 penalties x 3 seeds, one each was a run of the tuning; 6 beyond.
    rows = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").open()]
    assert len(rows) == len(set(made)) == 12 + 27 - 3 + 6 and len(made) == len(rows) + 1
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert tables.count("**kept**") == 3 and "JumpReLU + L0, log" in tables
    assert (tmp_path / "out" / "jumprelu.png").stat().st_size > 10_000
    assert tables in capsys.readouterr().out
