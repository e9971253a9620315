"""JumpReLU SAE against sae-lens (golden), and its two file formats."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, SAE_ID, load
from safetensors.torch import save_file

from runtime.sources import UserError, sha256
from sae import ARRAYS, JumpReLUSAE, save_gemmascope

PARAMS = GOLDEN / "sae" / SAE_ID / "params.npz"


def test_features_and_reconstruction_equal_sae_lens(expected):
    sae = load().sae
    f = sae.encode(expected["sae_x"][0])
    torch.testing.assert_close(f, expected["sae_f"][0], atol=1e-5, rtol=1e-5)
    assert torch.equal(f > 0, expected["sae_f"][0] > 0)
    torch.testing.assert_close(sae.decode(f), expected["sae_recon"][0], atol=1e-5, rtol=1e-5)


def arrays() -> dict[str, np.ndarray]:
    with np.load(PARAMS) as npz:
        return {name: npz[name] for name in ARRAYS}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_compressed_or_not_by_path_folder_or_id(tmp_path, save):
    file = tmp_path / "layer_1" / "a" / "params.npz"
    file.parent.mkdir(parents=True)
    save(file, **arrays())
    for source, sae_id in ((file, None), (file.parent, None), (tmp_path, "layer_1/a")):
        sae = JumpReLUSAE.from_pretrained(source, sae_id)
        assert all(
            np.array_equal(getattr(sae, name).numpy(), array) for name, array in arrays().items()
        )
        assert sae.sha256 == sha256(file)


def test_saelens_folder_with_b_dec_on_the_input_folded(tmp_path):
    raw = {name: torch.tensor(array) for name, array in arrays().items()}
    raw["b_dec"] = torch.randn(64, generator=torch.Generator().manual_seed(0))
    save_file(raw, tmp_path / "sae_weights.safetensors")
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    for flag in (True, False):
        cfg = dict(architecture="jumprelu", apply_b_dec_to_input=flag, normalize_activations="none")
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        sae = JumpReLUSAE.from_pretrained(tmp_path)
        z = (x - raw["b_dec"] if flag else x) @ raw["W_enc"] + raw["b_enc"]
        f = torch.where(z > raw["threshold"], z, 0.0)
        torch.testing.assert_close(sae.encode(x), f, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            sae.decode(f), f @ raw["W_dec"] + raw["b_dec"], atol=1e-5, rtol=1e-5
        )


def test_saelens_itself_agrees(tmp_path):
    """Against SAELens's own loader and encoder, where it is installed."""
    sae_lens = pytest.importorskip(
        "sae_lens", reason="sae-lens is not a dependency; compared when there"
    )
    config = sae_lens.JumpReLUSAEConfig(d_in=64, d_sae=256, apply_b_dec_to_input=True)
    theirs = sae_lens.JumpReLUSAE(config)
    raw = {name: torch.tensor(array) for name, array in arrays().items()}
    raw["b_dec"] = torch.randn(64, generator=torch.Generator().manual_seed(0))
    theirs.load_state_dict(raw)
    theirs.save_model(tmp_path)
    ours = JumpReLUSAE.from_pretrained(tmp_path)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours.decode(ours.encode(x)), theirs.decode(theirs.encode(x)), atol=1e-5, rtol=1e-5
    )


def test_other_byte_orders_and_widths_are_read(tmp_path):
    np.savez(
        tmp_path / "params.npz", **{name: array.astype(">f8") for name, array in arrays().items()}
    )
    sae = JumpReLUSAE.from_pretrained(tmp_path)
    assert all(
        np.array_equal(getattr(sae, name).numpy(), array) for name, array in arrays().items()
    )


def test_writing_round_trips(tmp_path):
    save_gemmascope(
        tmp_path / "params.npz", {name: torch.tensor(array) for name, array in arrays().items()}
    )
    sae = JumpReLUSAE.from_pretrained(tmp_path / "params.npz")
    assert all(
        np.array_equal(getattr(sae, name).numpy(), array) for name, array in arrays().items()
    )


def refused(tmp_path, match, **changed):
    contents = arrays() | changed
    np.savez(tmp_path / "params.npz", **{k: v for k, v in contents.items() if v is not None})
    with pytest.raises(UserError, match=match):
        JumpReLUSAE.from_pretrained(tmp_path)


def test_wrong_files_are_refused(tmp_path):
    refused(tmp_path, r"W_dec has shape \(64, 256\)", W_dec=np.zeros((64, 256), np.float32))
    refused(tmp_path, r"W_enc has shape \(64,\)", W_enc=np.zeros(64, np.float32))
    refused(tmp_path, r"W_enc has shape \(2, 3, 4\)", W_enc=np.zeros((2, 3, 4), np.float32))
    for name, shape in dict(W_enc=(64, 255), b_enc=(64,), b_dec=(256,), threshold=()).items():
        refused(tmp_path, "has shape", **{name: np.zeros(shape, np.float32)})
    refused(tmp_path, "threshold is missing", threshold=None)
    refused(tmp_path, "b_enc is of type int64", b_enc=np.zeros(256, np.int64))
    refused(
        tmp_path, "b_dec is of type object", b_dec=np.array([{"pickled": 1}] * 64, dtype=object)
    )
    (tmp_path / "params.npz").write_bytes(PARAMS.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a readable npz"):
        JumpReLUSAE.from_pretrained(tmp_path)
    (tmp_path / "params.npz").unlink()
    with pytest.raises(UserError, match="holds neither"):
        JumpReLUSAE.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="inside the SAE repository"):
        JumpReLUSAE.from_pretrained(tmp_path, "../elsewhere")


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path):
    np.savez_compressed(
        tmp_path / "params.npz", **(arrays() | {"W_enc": np.zeros((64, 400_000), np.float32)})
    )
    assert (tmp_path / "params.npz").stat().st_size < 1_000_000
    with pytest.raises(UserError, match="not loaded"):
        JumpReLUSAE.from_pretrained(tmp_path)


def test_another_saelens_architecture_is_refused(tmp_path):
    (tmp_path / "cfg.json").write_text(json.dumps(dict(architecture="topk")))
    with pytest.raises(UserError, match="topk"):
        JumpReLUSAE.from_pretrained(tmp_path)
