"""Gemma-2 against transformers (golden), packed against unpacked, files against their formats."""

import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, load, ragged
from safetensors.torch import load_file, save_file
from torch.nn.attention.flex_attention import create_block_mask

import model as gemma
from benchmarks.sizes import PUBLISHED
from data import pack
from kernels.attention import tree_mask
from model import SLIDING, Gemma2, Gemma2Config
from runtime.sources import UserError


@pytest.mark.parametrize("name", "abc")
def test_logits_and_residual_stream_equal_transformers(expected, name):
    golden = load().model
    ids, mask = expected[f"{name}_input_ids"], expected[f"{name}_attention_mask"].bool()
    for i, real in enumerate(mask):
        packed = pack([(ids[i][real].tolist(), [])])
        plan = golden.plan(packed)
        embedded = golden.embed(packed.tokens)
        resid = golden.blocks(embedded, plan, 0, 2)
        torch.testing.assert_close(
            embedded, expected[f"{name}_embed"][i][real], atol=1e-6, rtol=1e-6
        )
        torch.testing.assert_close(
            resid, expected[f"{name}_resid_post_1"][i][real], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            golden.logits(ids[i][real]), expected[f"{name}_logits"][i][real], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize(
    ("feature", "change"),
    [
        ("no_sliding_window", dict(sliding_window=10_000)),
        ("window_plus_1", dict(sliding_window=17)),
        ("no_attn_softcap", dict(attn_logit_softcapping=None)),
        ("no_final_softcap", dict(final_logit_softcapping=None)),
        ("qpas_is_head_dim", dict(query_pre_attn_scalar=32)),
    ],
)
def test_each_feature_of_the_family_moves_the_logits_as_in_transformers(
    expected, report, feature, change
):
    """Without a feature the logits move this much: a tolerance of 1e-4 cannot hide it."""
    golden = load().model
    raw = json.loads((GOLDEN / "model/config.json").read_text())
    broken = Gemma2(Gemma2Config.from_json(_config(raw, change)))
    broken.load_state_dict(golden.state_dict())
    ids, logits = (
        expected["b_input_ids"][0],
        expected["b_logits"][0],
    )  # 126 tokens, longer than the window
    moved = (broken.logits(ids) - logits).abs().max().item()
    assert moved == pytest.approx(report["logit_change_if_feature_is_wrong"][feature], rel=1e-3)


def _config(raw, change):
    path = Path(tempfile.mkdtemp()) / "config.json"
    path.write_text(json.dumps(raw | change))
    return path


def test_both_config_styles_mean_the_same_model(tmp_path):
    new = json.loads((GOLDEN / "model/config.json").read_text())
    old = json.loads((GOLDEN / "model/config.hub_style.json").read_text())
    assert "layer_types" in new and "rope_parameters" in new
    assert "layer_types" not in old and "rope_theta" in old
    assert Gemma2Config.from_json(_config(new, {})) == Gemma2Config.from_json(_config(old, {}))
    turned = Gemma2Config.from_json(
        _config(new, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}})
    )
    assert turned.rope_theta == 5.0


@pytest.mark.parametrize("seed", range(8))
def test_packed_trees_equal_separate_sequences_with_gradients(seed):
    golden = load(torch.float64).model
    trees = ragged(seed)
    packed = pack(trees)
    x = golden.embed(packed.tokens).requires_grad_()
    together = golden.blocks(x, golden.plan(packed))

    separate, start = [], 0
    for prompt, continuations in trees:
        own = x[start : start + len(prompt)]
        for branch in [prompt, *continuations]:
            stretch = x[start : start + len(branch)]
            start += len(branch)
            alone, states = (
                (prompt, own) if branch is prompt else (prompt + branch, torch.cat([own, stretch]))
            )
            y = golden.blocks(states, golden.plan(pack([(alone, [])])))
            separate.append(y[len(y) - len(branch) :])
    separate = torch.cat(separate)
    torch.testing.assert_close(together, separate, atol=1e-10, rtol=1e-10)

    probe = torch.randn(
        together.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    gradients = [torch.autograd.grad((y * probe).sum(), x)[0] for y in (together, separate)]
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)


def test_a_block_is_one_graph_as_torch_compile_sees_it():
    """On a GPU blocks run fused. They say the same fused or not, with FlexAttention or plain,
    windowed or full.
    """
    config = Gemma2Config(64, 64, 96, 2, 4, 2, 16, 16, sliding_window=9)
    model = Gemma2(config)
    model.init_weights(torch.Generator().manual_seed(0))
    fused = torch.compile(gemma.Block.run, backend="eager", fullgraph=True)
    for seed in range(2):
        packed = pack(ragged(seed))
        plan, T = model.plan(packed), len(packed.tokens)
        tree = packed.tree, packed.branch, packed.position
        masks = [
            create_block_mask(tree_mask(*tree, window), None, None, T, T, device="cpu")
            for window in (9, None)
        ]
        flexible = plan._replace(attend=gemma.Flexible(*masks))
        x = torch.randn(T, 64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for block in model.model.layers:
                ours = fused(block, x, flexible)
                torch.testing.assert_close(ours, block(x, plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "count"),
    [("gemma-2-2b", 2_614_341_888), ("gemma-2-9b", 9_241_705_984), ("gemma-2-27b", 27_227_128_320)],
)
def test_published_sizes_build_with_the_checkpoints_names_and_shapes(name, count):
    """The parameter counts are those the published checkpoints are listed with."""
    config = PUBLISHED[name]
    with torch.device("meta"):
        state = Gemma2(config).state_dict()
    assert sum(t.numel() for t in state.values()) == count
    d, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    block = {
        "self_attn.q_proj.weight": (heads * config.head_dim, d),
        "self_attn.k_proj.weight": (kv * config.head_dim, d),
        "self_attn.v_proj.weight": (kv * config.head_dim, d),
        "self_attn.o_proj.weight": (d, heads * config.head_dim),
        "mlp.gate_proj.weight": (config.intermediate_size, d),
        "mlp.up_proj.weight": (config.intermediate_size, d),
        "mlp.down_proj.weight": (d, config.intermediate_size),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "pre_feedforward_layernorm.weight": (d,),
        "post_feedforward_layernorm.weight": (d,),
    }
    names = {"model.embed_tokens.weight": (256_000, d), "model.norm.weight": (d,)}
    names |= {
        f"model.layers.{i}.{k}": v
        for i in range(config.num_hidden_layers)
        for k, v in block.items()
    }
    assert {k: tuple(v.shape) for k, v in state.items()} == names
    assert config.layer_types[:2] == (SLIDING, gemma.FULL)


def test_single_file_equals_shards_and_saving_round_trips(tmp_path):
    golden = load().model
    golden.save_pretrained(tmp_path)
    again = Gemma2.from_pretrained(tmp_path)
    assert again.config == golden.config
    for (name, a), (other, b) in zip(
        golden.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    written = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads((GOLDEN / "model/config.json").read_text())  # by transformers 5
    differ = {k for k in theirs if k in written and written[k] != theirs[k]}
    assert not differ, differ
    assert {
        "architectures",
        "model_type",
        "layer_types",
        "rope_parameters",
        "hidden_activation",
    } <= written.keys()


def test_saved_folder_loads_in_transformers(tmp_path, expected):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not a dependency; compared when there"
    )
    golden = load().model
    golden.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    ids = expected["b_input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits[0], golden.logits(ids[0]), atol=1e-4, rtol=0)


def test_tied_head_may_be_repeated_but_not_differ(tmp_path):
    golden = load().model
    golden.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    Gemma2.from_pretrained(tmp_path)
    state["lm_head.weight"][0, 0] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lm_head"):
        Gemma2.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *(dict(model_type="gemma"), dict(hidden_activation="silu"), dict(attention_bias=True)),
        *(
            dict(num_key_value_heads=0),
            dict(hidden_size="64"),
            dict(final_logit_softcapping=float("nan")),
        ),
        *(dict(rope_scaling={"factor": 2}), dict(layer_types=["other"] * 4)),
    ],
)
def test_another_architecture_is_refused(tmp_path, change):
    raw = json.loads((GOLDEN / "model/config.json").read_text())
    with pytest.raises(UserError, match=next(iter(change))):
        Gemma2Config.from_json(_config(raw, change))
    with pytest.raises(UserError, match="a softcap of 100"):
        Gemma2Config.from_json(_config(raw, dict(attn_logit_softcapping=100.0)))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="a config.json was expected"):
        Gemma2Config.from_json(tmp_path / "config.json")


def test_rms_norm_of_bfloat16_is_computed_in_float32_and_cast_last():
    norm = gemma.RMSNorm(2304, 1e-6).to(torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(norm.weight, std=0.3, generator=g)
    x = torch.randn(64, 2304, generator=g).bfloat16()
    y = (
        x.double()
        / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        * (1 + norm.weight.double())
    )
    ours = norm(x)
    assert ours.dtype == torch.bfloat16
    assert (ours == y.bfloat16()).float().mean() > 0.999  # ties in the last rounding apart


def test_bfloat16_weights_keep_a_float32_stream_and_rounded_embedding_scale():
    """sqrt(d) is rounded to the weights' dtype before it multiplies, as in Gemma; d = 2304 makes it
    48 either way.
    """
    config = dataclasses.replace(
        load().model.config, hidden_size=72, num_hidden_layers=2, layer_types=None
    )
    small = Gemma2(config).to(torch.bfloat16)
    small.init_weights(torch.Generator().manual_seed(0))
    x = small.embed(torch.tensor([5, 9]))
    scale = torch.tensor(72**0.5).bfloat16()
    assert scale.float() != torch.tensor(72**0.5)
    assert x.dtype == torch.float32
    torch.testing.assert_close(
        x, (small.model.embed_tokens.weight[[5, 9]] * scale).float(), atol=0, rtol=0
    )
    assert small.blocks(x, small.plan(pack([([5, 9], [])]))).dtype == torch.float32
