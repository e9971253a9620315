"""The steered forward: golden logits, the identity behind it, adapter files, and what trains."""

import json
import shutil

import pytest
import torch
from conftest import GOLDEN, load
from safetensors.torch import load_file

import fsrl
from data import pack
from fsrl import INIT_RANGE, Adapter, SteeredModel
from runtime.sources import UserError
from sae import JumpReLUSAE


@pytest.mark.parametrize("adapter", ["mid", "paper_init"])
def test_steered_logits_equal_the_authors_stack(expected, adapter):
    golden = load(adapter=adapter)
    logits = golden.steered.logits(expected["b_input_ids"][0])
    torch.testing.assert_close(logits, expected[f"steered_{adapter}"][0], atol=1e-4, rtol=0)
    x = expected["sae_x"][0]
    if adapter == "mid":
        torch.testing.assert_close(
            golden.adapter(x), expected["sae_mid_v"][0], atol=1e-5, rtol=1e-5
        )
    y = x + golden.adapter(x) @ golden.sae.W_dec
    torch.testing.assert_close(y, expected[f"sae_{adapter}_y"][0], atol=1e-5, rtol=1e-5)


def steer_long_form(x, sae, v):
    """x' as the paper writes it: x [T, d], v [T, F] -> x' [T, d]."""
    f = sae.encode(x)
    return sae.decode(f + v) + (x - sae.decode(f))


def test_the_short_form_equals_the_long_form_with_gradients():
    golden = load(torch.float64)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probe = torch.randn(20, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = golden.adapter(x)
    short, long = x + v @ golden.sae.W_dec, steer_long_form(x, golden.sae, v)
    assert (short - x).abs().max() > 0.1
    torch.testing.assert_close(short, long, atol=1e-12, rtol=1e-12)
    parameters = list(golden.adapter.parameters())
    ours = torch.autograd.grad((short * probe).sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad((long * probe).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_identity_holds_for_any_v_not_only_relu_outputs():
    golden = load(torch.float64)
    g = torch.Generator().manual_seed(2)
    x, v = (
        torch.randn(20, 64, generator=g, dtype=torch.float64),
        torch.randn(20, 256, generator=g, dtype=torch.float64),
    )
    torch.testing.assert_close(
        x + v @ golden.sae.W_dec, steer_long_form(x, golden.sae, v), atol=1e-12, rtol=1e-12
    )


def test_steering_in_pieces_changes_nothing(monkeypatch):
    golden = load(torch.float64)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = golden.steered.steer(x)
    v = golden.adapter(x)
    torch.testing.assert_close(
        whole, (x + v @ golden.sae.W_dec, v.abs().sum(1), (v != 0).sum(1).double())
    )
    monkeypatch.setitem(fsrl.STEER_ELEMENTS, "cpu", 3 * 256)
    monkeypatch.setattr(fsrl, "STEER_ROWS", 1)
    pieces = golden.steered.steer(x)
    torch.testing.assert_close(pieces, whole, atol=1e-12, rtol=1e-12)
    losses = (y[0].square().sum() + y[1].sum() for y in (whole, pieces))
    gradients = [torch.autograd.grad(loss, golden.adapter.weight)[0] for loss in losses]
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=1e-11)


def test_only_the_adapter_has_gradients_and_trainable_parameters(expected):
    golden = load()
    out = golden.steered(pack([(expected["a_input_ids"][0].tolist(), [[5]])]))
    (out.logps.sum() + out.l1.sum()).backward()
    trained = {name for name, p in golden.steered.named_parameters() if p.requires_grad}
    assert trained == {"adapter.weight", "adapter.bias"}
    assert all(
        (p.grad is not None) == (name in trained) for name, p in golden.steered.named_parameters()
    )


def test_a_fresh_adapter_starts_at_the_unsteered_model(expected):
    golden = load()
    adapter = Adapter(64, 256)
    adapter.init_weights(torch.Generator().manual_seed(0))
    assert 0 < adapter.weight.abs().max() <= INIT_RANGE and not adapter.bias.any()
    ids = expected["b_input_ids"][0]
    steered = SteeredModel(golden.model, golden.sae, adapter, 1).logits(ids)
    torch.testing.assert_close(steered, golden.model.logits(ids), atol=1e-5, rtol=0)


def test_adapter_files_round_trip_and_name_their_sae(tmp_path):
    golden = load()
    identity = dict(base_model="x", base_model_revision=None, layer=1, sae="y", sae_id="z")
    identity |= dict(sae_sha256=golden.sae.sha256)
    golden.adapter.save_pretrained(tmp_path, identity)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter.safetensors", "adapter_config.json"}
    assert set(load_file(tmp_path / "adapter.safetensors")) == {"weight", "bias"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        identity.items() <= config.items()
        and config["d_sae"] == 256
        and config["activation"] == "relu"
    )
    again = Adapter.from_pretrained(tmp_path)
    assert torch.equal(again.weight, golden.adapter.weight) and torch.equal(
        again.bias, golden.adapter.bias
    )
    SteeredModel(golden.model, golden.sae, again, 1)


def test_another_sae_or_layer_is_refused(tmp_path):
    golden = load()
    other = JumpReLUSAE(
        {**golden.sae.state_dict(), "b_dec": golden.sae.b_dec + 1}, "other", "other_id", "0" * 64
    )
    golden.adapter.save_pretrained(
        tmp_path, dict(layer=1, sae_id="z", sae_sha256=golden.sae.sha256)
    )
    adapter = Adapter.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=golden.sae.sha256):
        SteeredModel(golden.model, other, adapter, 1)
    unnamed = JumpReLUSAE(golden.sae.state_dict(), "unnamed", None, golden.sae.sha256)
    with pytest.raises(UserError, match="layer 1"):
        SteeredModel(golden.model, unnamed, adapter, 2)
    with pytest.raises(UserError, match=f"--layer 2: the SAE {golden.sae.sae_id}"):
        SteeredModel(golden.model, golden.sae, golden.adapter, 2)
    with pytest.raises(UserError, match="other_id"):  # the authors' files record only the SAE's id
        SteeredModel(golden.model, other, Adapter.from_pretrained(GOLDEN / "adapter_mid"), 1)


def test_misfits_are_refused(tmp_path):
    golden = load()
    with pytest.raises(UserError, match="blocks 0 to 3"):
        SteeredModel(golden.model, golden.sae, golden.adapter, 4)
    with pytest.raises(UserError, match="shape"):
        SteeredModel(golden.model, golden.sae, Adapter(64, 128), 1)
    with pytest.raises(UserError, match="not an adapter folder"):
        Adapter.from_pretrained(tmp_path)
    shutil.copytree(GOLDEN / "adapter_mid", tmp_path / "a")
    (tmp_path / "a" / "fsrl_adapter_config.json").write_text('{"use_jump_relu": true}')
    with pytest.raises(UserError, match="a jumprelu adapter has weight .* threshold"):
        Adapter.from_pretrained(tmp_path / "a")
