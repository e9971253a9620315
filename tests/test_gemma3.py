"""Gemma 3 against transformers: a small random model, configs, names, generation."""

import dataclasses
import json
import shutil

import forked
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, metrics, ragged, small_gemma3
from safetensors.torch import load_file, save_file

from benchmarks.sizes import PUBLISHED
from data import load_tokenizer, pack
from experiments import gemma3_270m
from fsrl import Unsteered
from generation import decode
from model import FULL, SLIDING, Gemma2, Gemma2Config
from runtime.sources import UserError

FOLDER = GOLDEN / "gemma3"  # 7 blocks, window 9, linear scaling on the full block


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected.safetensors")


def changed(**values) -> Gemma2:
    """The golden model under another configuration."""
    model = Gemma2.from_pretrained(FOLDER)
    other = Gemma2(dataclasses.replace(model.config, **values))
    other.load_state_dict(model.state_dict())
    return other


def test_logits_equal_transformers(golden):
    ours = Gemma2.from_pretrained(FOLDER).logits(golden["input_ids"])
    torch.testing.assert_close(ours, golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("feature", "values"),
    [
        ("no_sliding_window", dict(sliding_window=1000)),
        ("window_plus_1", dict(sliding_window=10)),
        ("all_sliding", dict(layer_types=(SLIDING,) * 7)),
        ("no_linear_scaling", dict(rope_factor=1.0)),
        ("one_theta", dict(rope_local_base_freq=1e6)),
        ("qpas_is_head_dim", dict(query_pre_attn_scalar=12)),
        ("final_softcap", dict(final_logit_softcapping=30.0)),
    ],
)
def test_each_feature_moves_the_logits_as_in_transformers(golden, feature, values):
    """1e-4 could not hide a missing feature: without it the logits move this much."""
    want = json.loads((FOLDER / "expected.json").read_text())["logit_change_if_feature_is_wrong"]
    moved = (changed(**values).logits(golden["input_ids"]) - golden["logits"]).abs().max()
    assert moved.item() == pytest.approx(want[feature], rel=1e-3)


def test_norms_of_queries_and_keys_move_the_logits_as_in_transformers(golden):
    model = Gemma2.from_pretrained(FOLDER)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_norm.weight.zero_()
            block.self_attn.k_norm.weight.zero_()
    want = json.loads((FOLDER / "expected.json").read_text())["logit_change_if_feature_is_wrong"]
    moved = (model.logits(golden["input_ids"]) - golden["logits"]).abs().max().item()
    assert moved == pytest.approx(want["qk_norm_weights_zero"], rel=1e-3)


def test_gradients_of_every_weight_equal_transformers(golden):
    model = Gemma2.from_pretrained(FOLDER).requires_grad_(True)
    ids = golden["input_ids"]
    hidden = model(pack([(ids[:-1].tolist(), [])]))
    loss = F.cross_entropy(model.head(hidden[-20:]), ids[-20:])
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        want = golden[f"grad.{name}"]
        assert (parameter.grad - want).norm() <= 1e-4 * want.norm(), name


def test_float32_masters_train_under_bfloat16_autocast(golden):
    """--full --dtype bfloat16: norms keep queries and keys float32, where products are bfloat16."""
    model, ids = Gemma2.from_pretrained(FOLDER).requires_grad_(True), golden["input_ids"]
    packed = pack([(ids[:20].tolist(), [ids[20:].tolist()])])
    exact = model.logps(model(packed), packed)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.logps(model(packed), packed)
        found.sum().backward()
    assert (found - exact).abs().max() < 0.1 and not torch.equal(found, exact)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_cached_greedy_tokens_beyond_the_window_equal_transformers(golden):
    model = Unsteered(Gemma2.from_pretrained(FOLDER))
    prompt = golden["input_ids"][:5].tolist()
    (new,) = decode.generate(model, [prompt], 30, lambda _: False)
    assert new == golden["greedy"].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_packed_trees_equal_separate_sequences(seed):
    model = Gemma2.from_pretrained(FOLDER, torch.float64)
    trees = ragged(seed, vocabulary=96)
    together = model(pack(trees))
    start = 0
    for prompt, continuations in trees:
        alone = model(pack([(prompt, [])]))
        torch.testing.assert_close(together[start : start + len(prompt)], alone)
        start += len(prompt)
        for continuation in continuations:
            alone = model(pack([(prompt + continuation, [])]))[len(prompt) :]
            torch.testing.assert_close(together[start : start + len(alone)], alone)
            start += len(alone)


def test_shards_train_as_one_process_does(tmp_path):
    """Every weight trains, the norms of queries and keys among them; each process has a slice."""
    small_gemma3(tmp_path / "model")
    flags = ("--model", tmp_path / "model", "--data", GOLDEN / "dataset", "--full", "--lr", 1e-3)
    flags += ("--batch-size", 4, "--max-steps", 2, "--eval-every", 0, "--device", "cpu")
    one, two = tmp_path / "one", tmp_path / "two"
    forked.good(forked.Run([*flags, "--out", one]).wait())
    forked.good(forked.Run([*flags, "--out", two, "--shard"], 2).wait())
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    trained = [load_file(out / "model" / "model.safetensors") for out in (one, two)]
    start = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], atol=1e-5, rtol=1e-4)
        assert not torch.equal(tensor, start[name]), name


# --- files ----------------------------------------------------------------------------------------


def config(tmp_path, raw) -> Gemma2Config:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return Gemma2Config.from_json(tmp_path / "config.json")


def test_old_and_new_configs_and_the_text_part_mean_the_same_model(tmp_path):
    new = json.loads((FOLDER / "config.json").read_text())
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types")}
    old |= dict(sliding_window_pattern=6, rope_theta=1e6, rope_local_base_freq=1e4)
    old |= dict(rope_scaling=dict(rope_type="linear", factor=8.0))
    wanted = config(tmp_path, new)
    assert wanted.rope_factor == 8 and wanted.layer_types[5] == FULL
    assert config(tmp_path, old) == wanted
    assert config(tmp_path, dict(model_type="gemma3", text_config=new)) == wanted
    assert config(tmp_path, dict(model_type="gemma3", text_config=old)) == wanted


def test_what_the_published_4b_leaves_out_is_filled_in(tmp_path):
    """The text_config of google/gemma-3-4b names six values alone."""
    text = dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240)
    text |= dict(num_hidden_layers=34, sliding_window=1024)
    text |= dict(rope_scaling=dict(factor=8.0, rope_type="linear"))
    found = config(tmp_path, dict(model_type="gemma3", text_config=text))
    assert found == PUBLISHED["gemma-3-4b"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gemma-3-270m", 268_098_176),
        ("gemma-3-1b", 999_885_952),
        ("gemma-3-4b", 3_880_263_168),
        ("gemma-3-12b", 11_766_034_176),
        ("gemma-3-27b", 27_009_346_304),
    ],
)
def test_published_sizes_have_the_checkpoints_names_and_shapes(name, count):
    """Counts of the text parts: transformers 5.23 on the meta device, from the same numbers."""
    c = PUBLISHED[name]
    with torch.device("meta"):
        state = Gemma2(c).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == count
    assert state["model.layers.0.self_attn.q_norm.weight"].shape == (c.head_dim,)
    assert state["model.layers.0.self_attn.k_norm.weight"].shape == (c.head_dim,)
    assert c.layer_types[:6] == (SLIDING,) * 5 + (FULL,)
    assert c.attn_logit_softcapping is c.final_logit_softcapping is None


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_checkpoint_loads(tmp_path, golden, prefix):
    """The vision tower is left out by name; a shard that holds nothing else is not needed."""
    text = json.loads((FOLDER / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gemma3", text_config=text)))
    state = load_file(FOLDER / "model.safetensors")
    named = {name.replace("model.", prefix, 1): tensor for name, tensor in state.items()}
    named["vision_tower.vision_model.embeddings.weight"] = torch.zeros(2)
    save_file(named, tmp_path / "model-1.safetensors")
    places = {name: "model-1.safetensors" for name in named}
    places |= {"multi_modal_projector.weight": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=places)))
    ours = Gemma2.from_pretrained(tmp_path).logits(golden["input_ids"])
    torch.testing.assert_close(ours, golden["logits"], atol=1e-4, rtol=0)


def test_saving_round_trips(tmp_path, golden):
    model = Gemma2.from_pretrained(FOLDER)
    model.save_pretrained(tmp_path)
    again = Gemma2.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.logits(golden["input_ids"]), model.logits(golden["input_ids"]))
    shutil.copy(FOLDER / "config.json", tmp_path / "theirs.json")
    written = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads((FOLDER / "config.json").read_text())
    assert not {k for k in theirs if k in written and written[k] != theirs[k]}


def test_a_saved_folder_loads_in_transformers(tmp_path, golden):
    transformers = pytest.importorskip("transformers", reason="compared where it is installed")
    Gemma2.from_pretrained(FOLDER).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = theirs(golden["input_ids"][None]).logits[0]
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)


def test_a_pattern_of_windows_that_no_gemma_has_is_refused(tmp_path):
    raw = json.loads((FOLDER / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if key != "layer_types"}
    assert config(tmp_path, raw | dict(sliding_window_pattern=6)).layer_types[5] == FULL
    with pytest.raises(UserError, match="sliding_window_pattern is 4"):
        config(tmp_path, raw | dict(sliding_window_pattern=4))


def test_the_rotary_factor_stands_where_transformers_4_and_5_read_it(tmp_path):
    Gemma2.from_pretrained(FOLDER).config.to_json(tmp_path / "config.json", torch.float32)
    raw = json.loads((tmp_path / "config.json").read_text())
    for place in (raw["rope_scaling"], raw["rope_parameters"][FULL]):
        assert (place["rope_type"], place["factor"]) == ("linear", 8.0)


@pytest.mark.parametrize("model_type", ["gemma3n", "llama", "gemma"])
def test_another_family_is_refused_in_a_sentence(tmp_path, model_type):
    raw = json.loads((FOLDER / "config.json").read_text()) | dict(model_type=model_type)
    with pytest.raises(UserError, match=f"model_type is '{model_type}'"):
        config(tmp_path, raw)


# --- the experiment's data ------------------------------------------------------------------------


def test_cut_prompts_keep_their_last_whole_words(tmp_path):
    prompt = "many words of a question that ends with these few words"
    rows = [dict(prompt=prompt, chosen="yes", rejected="no", split="train")]
    rows += [dict(prompt="short", chosen="a", rejected="b", split="test")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    s = gemma3_270m.Settings(
        model=str(GOLDEN / "model"),
        data=str(tmp_path / "rows.jsonl"),
        prompt_tokens=8,
        out=str(tmp_path / "out"),
    )
    gemma3_270m.cut(s)
    (train,) = map(json.loads, (tmp_path / "out" / "train.jsonl").read_text().splitlines())
    (test,) = map(json.loads, (tmp_path / "out" / "test.jsonl").read_text().splitlines())
    tokenizer = load_tokenizer(GOLDEN / "model")
    assert prompt.endswith(" " + train["prompt"]) and train["chosen"] == "yes"
    assert 0 < len(tokenizer.encode(train["prompt"], add_special_tokens=False).ids) <= 8
    assert test == dict(prompt="short", chosen="a", rejected="b")
