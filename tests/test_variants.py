"""Adapters with thresholds: their gradients, files, parameter groups and runs."""

import json

import pytest
import torch
from conftest import GOLDEN, SAE_ID, load, metrics
from safetensors.torch import load_file, save_file

import fsrl
import train
from data import pack
from fsrl import Adapter, SteeredModel
from runtime import outcome
from runtime.sources import UserError

VARIANTS = fsrl.KINDS


def made(kind, bandwidth=0.3, seed=0, d=64, d_sae=256) -> Adapter:
    """A random float64 adapter of the golden model's shape, a third of whose features pass."""
    g = torch.Generator().manual_seed(seed)
    adapter = Adapter(d, d_sae, kind, bandwidth).double()
    with torch.no_grad():
        adapter.weight.copy_(torch.randn(d_sae, d, generator=g) * 0.1)
        adapter.bias.copy_(torch.randn(d_sae, generator=g) * 0.1)
    if kind != "relu":
        adapter.set_threshold(torch.rand(d_sae, generator=g, dtype=torch.float64) * 0.5 + 0.05)
    return adapter


def residual(seed=0, rows=20, d=64):
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_log_parametrisation_follows_the_chain_rule():
    direct, log = made("jumprelu"), made("jumprelu-log")
    torch.testing.assert_close(direct.threshold, log.threshold, atol=1e-12, rtol=1e-12)
    gradients = []
    for adapter in (direct, log):
        v, _, l0 = adapter.steering(residual())
        loss = v.square().sum() + l0.sum()
        gradients.append(torch.autograd.grad(loss, adapter.raw_threshold)[0])
    torch.testing.assert_close(gradients[1], gradients[0] * direct.threshold, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", VARIANTS)
def test_activations_and_norms_are_the_equations(kind):
    adapter, x = made(kind), residual()
    z, threshold = (
        x @ adapter.weight.T + adapter.bias,
        adapter.threshold if kind != "relu" else None,
    )
    naive = {
        "relu": lambda: z.clamp(min=0),
        "jumprelu": lambda: torch.where(z > threshold, z, 0.0),
        "soft-threshold": lambda: torch.where(
            z > threshold, z - threshold, (z + threshold).clamp(max=0)
        ),
    }[adapter.activation]()
    v, l1, l0 = adapter.steering(x)
    assert torch.equal(adapter(x), v)
    torch.testing.assert_close(v, naive, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(l1, naive.abs().sum(1), atol=1e-12, rtol=1e-12)
    assert torch.equal(l0, (naive != 0).sum(1).double()) and 0 < l0.mean() < 200
    assert l0.requires_grad == (adapter.activation == "jumprelu")
    if kind == "soft-threshold":
        assert (naive < 0).any() and (naive > 0).any()
        for loss in (
            lambda v: v.square().sum(),
            lambda v: v.abs().sum(),
        ):  # autograd of the cases, τ included
            pair = [
                torch.autograd.grad(loss(y), list(adapter.parameters()), retain_graph=True)
                for y in (v, naive)
            ]
            for a, b in zip(*pair, strict=True):
                torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", VARIANTS)
def test_steering_is_the_long_form_with_the_clamp(monkeypatch, kind):
    golden, adapter, x = load(torch.float64), made(kind), residual()
    steered = SteeredModel(golden.model, golden.sae, adapter, 1)
    monkeypatch.setitem(fsrl.STEER_ELEMENTS, "cpu", 3 * 256)
    monkeypatch.setattr(fsrl, "STEER_ROWS", 1)
    ours, l1, _ = steered.steer(x)
    f, v = golden.sae.encode(x), adapter(x)
    clamped, free = (
        golden.sae.decode(total) + x - golden.sae.decode(f)
        for total in ((f + v).clamp(min=0), f + v)
    )
    torch.testing.assert_close(ours, clamped, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(l1, v.abs().sum(1), atol=1e-12, rtol=1e-12)
    assert ((clamped - free).abs().max() > 0.01) == (kind == "soft-threshold")
    acting = steered.acting(x)  # what the audit counts: adding it is adding v
    expected = (f + v).clamp(min=0) - f if kind == "soft-threshold" else v
    torch.testing.assert_close(acting, expected, atol=0, rtol=0)
    torch.testing.assert_close(steered.add(x, acting), ours, atol=1e-12, rtol=1e-12)
    probe = residual(1)
    parameters = list(adapter.parameters())
    a, b = (
        torch.autograd.grad((y * probe).sum(), parameters, retain_graph=True)
        for y in (ours, clamped)
    )
    for mine, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
        assert theirs.any()


def test_the_l0_penalty_counts_positions_of_the_separate_sequences():
    """A prompt position counts once for each of its two sequences, in θ's gradient too; nothing
    else gets one.
    """
    golden, adapter = load(torch.float64), made("jumprelu")
    steered = SteeredModel(golden.model, golden.sae, adapter, 1)
    g = torch.Generator().manual_seed(3)
    prompt, chosen, rejected = (
        torch.randint(0, 512, (n,), generator=g).tolist() for n in (9, 4, 7)
    )
    gradients = []
    for trees in ([(prompt, [chosen, rejected])], [(prompt, [chosen]), (prompt, [rejected])]):
        packed = pack(trees)
        total = (steered(packed).l0 * packed.copies).sum()
        gradients.append(torch.autograd.grad(total, list(adapter.parameters()), allow_unused=True))
    torch.testing.assert_close(gradients[0][2], gradients[1][2], atol=1e-9, rtol=1e-9)
    assert gradients[0][2].any() and not any(x is not None and x.any() for x in gradients[0][:2])


def test_under_bfloat16_thresholds_stay_float32():
    adapter = made("jumprelu").float()
    adapter.set_threshold(torch.full_like(adapter.bias, 0.2503))  # bfloat16 has 0.25 and 0.251
    before = adapter.raw_threshold.clone()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5, weight_decay=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        v, _, l0 = adapter.steering(residual().float())
    assert v.dtype == torch.bfloat16
    assert l0.dtype == adapter.raw_threshold.dtype == torch.float32
    assert (v[v != 0] >= 0.25).all() and (v != 0).any()  # rounded only after it has passed
    l0.mean().backward()
    optimizer.step()
    moved = adapter.raw_threshold.detach() - before
    learning = adapter.raw_threshold.grad != 0
    assert learning.any() and torch.allclose(moved[learning], torch.tensor(1e-5), rtol=0.01)


@pytest.mark.parametrize("kind", VARIANTS)
def test_adapter_files_round_trip(tmp_path, kind):
    adapter = made(kind).float()
    adapter.save_pretrained(tmp_path, dict(layer=1))
    names = {"weight", "bias"} | ({"threshold"} if kind != "relu" else set())
    assert set(load_file(tmp_path / "adapter.safetensors")) == names
    again = Adapter.from_pretrained(tmp_path)
    assert again.activation == adapter.activation and again.identity["layer"] == 1
    assert torch.equal(again(residual().float()), adapter(residual().float()))
    if adapter.activation == "jumprelu":
        log = Adapter.from_pretrained(tmp_path, "jumprelu-log")
        torch.testing.assert_close(log.threshold, adapter.threshold, atol=0, rtol=1e-6)


@pytest.mark.parametrize(
    "config, name, activation",
    [
        ({"use_jump_relu": True, "bandwidth": 0.001}, "log_threshold", "jumprelu"),
        (
            {"activation_type": "jump_relu", "use_steering_magnitude": False},
            "log_threshold",
            "jumprelu",
        ),
        ({"activation_type": "soft_threshold"}, "soft_threshold", "soft-threshold"),
        ({"activation_type": "relu"}, None, "relu"),
    ],
)
def test_the_authors_files_load(tmp_path, config, name, activation):
    ours = made(activation).float()
    weights = {
        "adapter_linear.weight": ours.weight.detach(),
        "adapter_linear.bias": ours.bias.detach(),
    }
    if name:
        weights[name] = (
            ours.threshold.log() if name == "log_threshold" else ours.threshold
        ).detach()
    (tmp_path / "fsrl_adapter_config.json").write_text(json.dumps(config | {"base_sae_id": SAE_ID}))
    save_file(weights, tmp_path / "adapter_weights.safetensors")
    theirs = Adapter.from_pretrained(tmp_path)
    assert theirs.activation == activation and theirs.identity["sae_id"] == SAE_ID
    torch.testing.assert_close(
        theirs(residual().float()), ours(residual().float()), atol=1e-6, rtol=1e-6
    )
    save_file(
        weights | {"steering_magnitude": torch.ones(256)}, tmp_path / "adapter_weights.safetensors"
    )
    with pytest.raises(UserError, match="steering_magnitude"):
        Adapter.from_pretrained(tmp_path)


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_impossible_thresholds_are_refused(tmp_path, bad):
    adapter = made("jumprelu").float()
    with torch.no_grad():
        adapter.raw_threshold[3] = bad
    adapter.save_pretrained(tmp_path, {})
    with pytest.raises(
        UserError, match="thresholds? .*(finite|not negative)|threshold is (nan|inf) at"
    ):
        Adapter.from_pretrained(tmp_path)


def test_thresholds_below_zero_are_set_to_zero_and_logarithms_are_not_touched():
    direct, log = made("jumprelu"), made("jumprelu-log")
    with torch.no_grad():
        direct.raw_threshold[::2] = -1.0
    kept = log.raw_threshold.clone()
    direct.project(), log.project(), made("relu").project()
    assert not direct.threshold[::2].any() and (direct.threshold[1::2] > 0).all()
    assert torch.equal(log.raw_threshold, kept) and (kept < 0).any()


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_samples_nor_pictures(monkeypatch):
    """The runs below are about the optimiser: spare them what other tests look at."""
    monkeypatch.setattr(train, "greedy", lambda *_: "")
    monkeypatch.setattr(outcome, "draw_loss", lambda *_: None)


def run(out, **settings):
    g = GOLDEN
    where = dict(
        model=str(g / "model"), sae=str(g / "sae"), sae_id=SAE_ID, data=str(g / "dataset"), layer=1
    )
    common = dict(batch_size=4, max_steps=3, eval_every=0, device="cpu", out=str(out)) | where
    train.train(train.Settings(**common | settings))
    return metrics(out)


@pytest.mark.parametrize("kind", VARIANTS[1:])
def test_groups_partition_the_parameters_and_each_has_its_learning_rate(
    tmp_path, monkeypatch, kind
):
    """The first AdamW step moves a parameter with a gradient by its learning rate."""
    lr = dict(lr=1e-3, threshold_lr=1e-5, schedule="constant", max_grad_norm=0.0, max_steps=1)
    start = made(kind).float()
    start.save_pretrained(tmp_path / "start", {})
    if start.activation == "jumprelu":
        monkeypatch.setitem(fsrl.BANDWIDTH, kind, 0.3)
    penalty = dict(l0=0.1) if start.activation == "jumprelu" else dict(l1=0.1)
    run(
        tmp_path / "run",
        adapter=kind,
        init_adapter=str(tmp_path / "start"),
        **penalty,
        **lr,
    )
    end = Adapter.from_pretrained(tmp_path / "run" / "adapter", kind)
    for name, rate in (("weight", 1e-3), ("bias", 1e-3), ("raw_threshold", 1e-5)):
        moved = (getattr(end, name) - getattr(start, name)).abs().max().item()
        assert moved == pytest.approx(rate, rel=0.05), name


def test_a_run_keeps_its_thresholds_above_zero(tmp_path):
    """Without a penalty the loss would push some thresholds below zero, at this learning rate
    within a step.
    """
    made("soft-threshold").float().save_pretrained(tmp_path / "start", {})
    flags = dict(adapter="soft-threshold", l1=0.0, threshold_lr=1.0, schedule="constant")
    run(tmp_path / "run", init_adapter=str(tmp_path / "start"), **flags)
    thresholds = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")["threshold"]
    assert (thresholds >= 0).all() and (thresholds == 0).any()


def test_the_total_includes_the_l0_penalty_and_thresholds_follow_it(tmp_path, monkeypatch):
    monkeypatch.setitem(fsrl.BANDWIDTH, "jumprelu", 0.3)
    flags = dict(adapter="jumprelu", threshold_lr=0.1, schedule="constant", max_steps=6, lr=1e-4)
    made("jumprelu").float().save_pretrained(tmp_path / "start", {})
    rows = {}
    for l0 in (0.0, 1.0):
        rows[l0] = run(tmp_path / str(l0), init_adapter=str(tmp_path / "start"), l0=l0, **flags)
        for row in rows[l0]:
            assert row["penalty"] == pytest.approx(l0 * row["l0"])
            assert row["total"] == pytest.approx(row["loss"] + row["penalty"])
    assert rows[1.0][-1]["l0"] < 0.8 * rows[0.0][-1]["l0"]


def test_packing_changes_nothing_for_jumprelu(tmp_path):
    made("jumprelu").float().save_pretrained(tmp_path / "start", {})
    flags = dict(
        adapter="jumprelu", l0=0.1, lr=1e-4, threshold_lr=1e-3, init_adapter=str(tmp_path / "start")
    )
    one, all_ = (run(tmp_path / str(n), tokens_per_microbatch=n, **flags) for n in (1, 100_000))
    for a, b in zip(one, all_, strict=True):
        assert all(
            a[k] == pytest.approx(b[k], rel=1e-4)
            for k in ("loss", "l1", "l0", "total", "grad_norm")
        )


def test_defaults_that_depend_on_the_adapter():
    s = train.Settings()
    assert (s.l1, s.l0, s.threshold_lr) == (0.02, 0.0, 5e-4)
    s = train.Settings(adapter="jumprelu", lr=1e-6)
    assert (s.l1, s.threshold_lr) == (0.0, 1e-3)
    assert train.Settings(adapter="soft-threshold").l1 == 0.02
    assert Adapter(2, 3, "jumprelu").bandwidth == 0.05
    assert Adapter(2, 3, "jumprelu-log").bandwidth == 0.001


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(l0=0.1), "--l0 0.1: only --adapter jumprelu"),
        (dict(adapter="jumprelu", threshold_lr=-1.0), "--threshold-lr -1.0"),
        (
            dict(adapter="jumprelu", init_adapter=str(GOLDEN / "adapter_mid")),
            "a relu adapter, --adapter jumprelu",
        ),
        (dict(adapter="softplus"), "--adapter softplus: one of relu"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_new_jumprelu_adapter_steers_in_bfloat16_too():
    """It starts with the bias at the threshold, which bfloat16 would round below it: then nothing
    ever passed.
    """
    adapter = Adapter(32, 64, "jumprelu")
    adapter.init_weights(torch.Generator().manual_seed(0))
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1)) * 10
    with torch.autocast("cpu", torch.bfloat16):
        counted = [adapter.steering(rows).l0.mean().item() for rows in (x, x[:4])]
    assert all(10 < l0 < 54 for l0 in counted), counted
