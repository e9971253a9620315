"""JumpReLU SAE against sae-lens (golden), and its three file formats."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, SAE_ID, load
from safetensors.torch import save_file

from runtime import sae_ids
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


def test_a_file_is_read_by_its_name(tmp_path):
    arrays = JumpReLUSAE.from_pretrained(GOLDEN / "sae", SAE_ID).state_dict()
    scope2(tmp_path / SMALL, arrays)
    folder = JumpReLUSAE.from_pretrained(tmp_path, SMALL)
    file = JumpReLUSAE.from_pretrained(tmp_path / SMALL / "params.safetensors")
    assert torch.equal(file.W_dec, folder.W_dec) and file.sha256 == folder.sha256
    assert (file.file, folder.file) == ("params.safetensors", f"{SMALL}/params.safetensors")
    assert JumpReLUSAE.from_pretrained(PARAMS).file == "params.npz"


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
    with pytest.raises(UserError, match="holds none of"):
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


# --- Gemma Scope 2 --------------------------------------------------------------------------------


SMALL = "resid_post/layer_1_width_65k_l0_small"
HOOK = "model.layers.1.output"


def scope2(folder: Path, arrays: dict, **settings) -> Path:
    """A folder as google/gemma-scope-2-* has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name.lower(): torch.as_tensor(a).contiguous() for name, a in arrays.items()}
    save_file(tensors, folder / "params.safetensors")
    config = dict(architecture="jump_relu", hf_hook_point_in=HOOK, model_name="gemma-v3-270m-it")
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def test_gemma_scope_2_reads_as_the_same_arrays_in_another_layout(tmp_path):
    want = JumpReLUSAE.from_pretrained(GOLDEN / "sae", SAE_ID)
    scope2(tmp_path / SMALL, want.state_dict())
    ours = JumpReLUSAE.from_pretrained(tmp_path, SMALL)
    assert ours.sae_id == SMALL and ours.sha256 == sha256(tmp_path / SMALL / "params.safetensors")
    for name, array in want.state_dict().items():
        assert torch.equal(getattr(ours, name), array), name


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (dict(architecture="topk"), "topk"),
        (dict(hf_hook_point_in="model.layers.1.self_attn.o_proj.input"), "o_proj"),
        (dict(hf_hook_point_out="model.layers.1.post_feedforward_layernorm.output"), "output"),
    ],
)
def test_what_is_no_residual_stream_sae_is_refused(tmp_path, settings, word):
    arrays = JumpReLUSAE.from_pretrained(GOLDEN / "sae", SAE_ID).state_dict()
    scope2(tmp_path / SMALL, arrays, **settings)
    with pytest.raises(UserError, match=word):
        JumpReLUSAE.from_pretrained(tmp_path, SMALL)


def test_a_layer_alone_picks_65k_and_small(tmp_path, monkeypatch):
    names = [f"resid_post/layer_{n}_width_{w}_l0_{s}" for n in (5, 12) for w in ("16k", "65k")
             for s in ("big", "medium", "small")]  # fmt: skip
    names += [
        "resid_post/layer_12_width_65k_l0_small_seed_1",
        "resid_post_all/layer_3_width_65k_l0_big",
    ]
    names += ["transcoder/layer_12_width_65k_l0_small", "attn_out/layer_12_width_65k_l0_small"]
    listed = [f"{name}/params.safetensors" for name in names]
    monkeypatch.setattr(sae_ids, "list_files", lambda source, kind: listed)
    repo = sae_ids.default_source("google/gemma-3-270m-it")
    assert repo == "google/gemma-scope-2-270m-it"
    assert sae_ids.default_id(repo, 12) == "resid_post/layer_12_width_65k_l0_small"
    assert sae_ids.default_id(repo, 5, "16k") == "resid_post/layer_5_width_16k_l0_small"
    assert sae_ids.default_id(repo, 3) == "resid_post_all/layer_3_width_65k_l0_big"
    with pytest.raises(UserError, match="--layer 4"):
        sae_ids.default_id(repo, 4)
    for name in listed:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert sae_ids.default_id(tmp_path, 12) == "resid_post/layer_12_width_65k_l0_small"
    assert sae_ids.layer_of(names[0]) == 5 and sae_ids.layer_of(SAE_ID) == 1
    own = ["resid_post/layer_2_width_4k_l0_40", "resid_post/layer_2_width_4k_l0_huge"]
    listed += [f"{name}/params.safetensors" for name in own]
    assert sae_ids.lowest_l0(listed, 2, None) == own[0]  # of experiments.train_sae


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("google/gemma-2-2b-it", "google/gemma-scope-2b-pt-res"),
        ("google/gemma-2-27b", "google/gemma-scope-27b-pt-res"),
        ("google/gemma-3-270m", "google/gemma-scope-2-270m-pt"),
        ("google/gemma-3-4b-it@main", "google/gemma-scope-2-4b-it"),
    ],
)
def test_the_sae_repository_follows_from_the_models_name(model, source):
    assert sae_ids.default_source(model) == source


def test_a_model_of_another_name_needs_an_sae():
    with pytest.raises(UserError, match="give --sae"):
        sae_ids.default_source("runs/my-model")


def test_gemma_scope_2_equals_saelens(tmp_path, monkeypatch):
    loaders = pytest.importorskip(
        "sae_lens.loading.pretrained_sae_loaders", reason="compared where it is installed"
    )
    arrays = JumpReLUSAE.from_pretrained(GOLDEN / "sae", SAE_ID).state_dict()
    scope2(tmp_path / SMALL, arrays)

    def local_file(repo_id, filename, subfolder=None, **_):
        return str(tmp_path / (subfolder or "") / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", local_file)
    shapes = {name.lower(): list(array.shape) for name, array in arrays.items()}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    cfg, theirs, _ = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-270m-it", SMALL)
    ours = JumpReLUSAE.from_pretrained(tmp_path, SMALL)
    assert cfg["architecture"] == "jumprelu" and not cfg["apply_b_dec_to_input"]
    assert cfg["hook_name"] == f"blocks.{sae_ids.layer_of(SMALL)}.hook_resid_post"
    for name, array in theirs.items():
        assert torch.equal(getattr(ours, name), array), name
