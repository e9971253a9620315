"""An exported policy in transformers: logits and text, its switches, its code, its servers."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, script
from safetensors.torch import load_file, save_file

from data import load_tokenizer
from fsrl import Adapter, SteeredModel, Unsteered
from generation import decode
from generation import export as exporting
from generation.export import CODE, Settings, export
from model import Gemma2
from policy import DEFAULTS, TOKENIZER_FILES, Policy
from runtime import device
from runtime.device import resolve_device
from runtime.sources import UserError
from sae import ARRAYS, JumpReLUSAE, save_gemmascope

KINDS = ("relu", "jumprelu", "soft-threshold")


def policy_of(family: str, kind: str) -> Policy:
    """A random adapter and SAE, whose steering is large, on a golden model."""
    model = Gemma2.from_pretrained(GOLDEN / ("model" if family == "gemma2" else "gemma3"))
    g, d, n = torch.Generator().manual_seed(0), model.config.hidden_size, 96
    shapes = dict(W_enc=(d, n), W_dec=(n, d), b_enc=(n,), b_dec=(d,), threshold=(n,))
    arrays = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    arrays["threshold"].abs_()
    adapter = Adapter(d, n, kind)
    adapter.weight.data = torch.randn(n, d, generator=g) / 8
    adapter.bias.data = torch.randn(n, generator=g)
    if adapter.raw_threshold is not None:
        adapter.set_threshold(torch.rand(n, generator=g) / 2)
    steered = SteeredModel(model, JumpReLUSAE(arrays), adapter, layer=2).requires_grad_(False)
    tokenizer = load_tokenizer(GOLDEN / "model")
    return Policy(steered, tokenizer, resolve_device("cpu", "float32"), DEFAULTS, family)


def opened(folder: Path, **options):
    transformers = pytest.importorskip("transformers", reason="exports are for transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options
    )


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 90, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(theirs, ids: torch.Tensor) -> torch.Tensor:
    return theirs(ids[None]).logits[0]


def ours(policy: Policy, ids: torch.Tensor, change=None) -> torch.Tensor:
    packed = decode.pack([(ids.tolist(), [])])
    return policy.base.head(policy.model.states(packed, change=change).hidden)


CASES = [("gemma2", kind, "eager") for kind in KINDS]
CASES += [("gemma3", kind, "eager") for kind in KINDS] + [("gemma3", "relu", "sdpa")]


@pytest.mark.parametrize(("family", "kind", "attention"), CASES)
def test_transformers_computes_the_steered_model(family, kind, attention, tmp_path):
    policy, ids = policy_of(family, kind), tokens(40)
    export(policy, tmp_path / "hf")
    theirs = opened(tmp_path / "hf", attn_implementation=attention)
    assert theirs.config._attn_implementation == attention and theirs.dtype == torch.float32
    want, base = ours(policy, ids), policy.base.logits(ids)
    torch.testing.assert_close(logits(theirs, ids), want, atol=1e-4, rtol=0)
    assert (want - base).abs().max() > 0.1

    new = theirs.generate(
        ids[None], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    (greedy,) = decode.generate(policy.model, [ids.tolist()], 24, lambda new: False)
    assert new[0, len(ids) :].tolist() == greedy

    theirs.config.steering_scale = -0.5
    halved = ours(policy, ids, lambda v: -0.5 * v)
    torch.testing.assert_close(logits(theirs, ids), halved, atol=1e-4, rtol=0)
    theirs.config.steering_scale, theirs.config.silenced_features = 1.0, [*range(0, 96, 2)]
    odd = torch.arange(96) % 2
    torch.testing.assert_close(
        logits(theirs, ids), ours(policy, ids, lambda v: v * odd), atol=1e-4, rtol=0
    )
    theirs.config.silenced_features = [*range(96)]
    torch.testing.assert_close(logits(theirs, ids), base, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_what_vllm_asks_of_a_model_of_transformers_holds(family, tmp_path, monkeypatch):
    """Its backend builds auto_map's AutoModel on the meta device, fills in the parameters by name,
    and puts its own attention in by ALL_ATTENTION_FUNCTIONS; keywords of the model's forward reach
    that attention.
    """
    transformers = pytest.importorskip("transformers", reason="exports are for transformers")
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    policy, ids, seen = policy_of(family, "relu"), tokens(30), []
    export(policy, tmp_path / "hf")
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")

    def attend(module, *args, attention_instances, **kwargs):
        seen.append(attention_instances[module.layer_idx])
        return code.eager_attention_forward(module, *args, **kwargs)

    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    names = list(json.loads((tmp_path / "hf" / "config.json").read_text())["auto_map"])
    assert names[:2] == ["AutoConfig", "AutoModel"]
    assert not hasattr(transformers, config.architectures[0])
    assert config.base_model_tp_plan and config.base_model_pp_plan and config.layer_types
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "ours", attend)
    monkeypatch.setitem(MASKS._global_mapping, "ours", MASKS["eager"])
    config._attn_implementation = "ours"
    auto = transformers.AutoModel
    with torch.device("meta"):
        empty = auto.from_config(config, trust_remote_code=True)
    assert type(empty).is_backend_compatible() and empty.get_decoder() is empty
    held = load_file(tmp_path / "hf" / "model.safetensors")
    assert {f"model.{name}" for name, _ in empty.named_parameters()} == set(held)
    assert not any("steering" in name for name, _ in empty.named_buffers())
    model = auto.from_pretrained(tmp_path / "hf", trust_remote_code=True, config=config)
    instances = {i: f"layer {i}" for i in range(config.num_hidden_layers)}
    with torch.no_grad():
        hidden = model(ids[None], attention_instances=instances, use_cache=False)[0][0]
    assert seen == [*instances.values()]
    want = policy.model.states(decode.pack([(ids.tolist(), [])])).hidden
    torch.testing.assert_close(hidden, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "prefix", "sae"),
    [
        ("relu", "language_model.model.", "params.npz"),
        ("soft-threshold", "model.language_model.", "params.safetensors"),
        ("jumprelu", "model.", "params.npz"),
    ],
)
def test_a_reference_reads_base_and_sae_where_they_are(kind, prefix, sae, tmp_path):
    """Here from folders; tests/test_hub.py has the Hub. Multimodal checkpoints name their text part
    so, and have more in them.
    """
    policy, ids, base = policy_of("gemma3", kind), tokens(30), tmp_path / "base"
    given = policy.steered.sae
    arrays = {name: getattr(given, name) for name in ARRAYS}
    save_gemmascope(tmp_path / "sae" / "params.npz", arrays)
    if sae != "params.npz":
        save_file({name.lower(): array for name, array in arrays.items()}, tmp_path / "sae" / sae)
    policy.base.save_pretrained(base)
    state = load_file(base / "model.safetensors")
    named = {name.replace("model.", prefix, 1): tensor for name, tensor in state.items()}
    if prefix != "model.":
        named["vision_tower.vision_model.embeddings.weight"] = torch.zeros(2)
    save_file(named, base / "model.safetensors", metadata={"format": "pt"})
    policy.base.revision = given.revision = "0" * 40
    given.file = sae
    export(policy, tmp_path / "hf", reference=True)
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config |= dict(base_model=str(base), sae=str(tmp_path / "sae"))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    found = logits(opened(tmp_path / "hf"), ids)
    torch.testing.assert_close(found, ours(policy, ids), atol=1e-4, rtol=0)


def test_in_bfloat16_biases_and_thresholds_stay_float32(tmp_path):
    """A bias that starts at its threshold would otherwise not rise above it."""
    policy = policy_of("gemma2", "jumprelu")
    policy.steered.adapter.bias.data[:] = 0.001
    policy.steered.adapter.set_threshold(torch.full((96,), 0.001))
    policy.steered.adapter.weight.data *= 1e-6
    export(policy, tmp_path / "hf")
    theirs = opened(tmp_path / "hf", dtype=torch.bfloat16)
    (layer,) = (m for name, m in theirs.named_modules() if name.endswith("steering"))
    kept = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    assert kept["bias"] == kept["threshold"] == torch.float32
    assert kept["weight"] == kept["W_dec"] == theirs.lm_head.weight.dtype == torch.bfloat16
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16() / 100
    with torch.no_grad():
        assert (layer(x) != x).float().mean() > 0.9


def test_the_code_of_an_export_is_short_and_knows_nothing_of_this_project():
    lines = CODE.read_text().splitlines()
    assert len(lines) < 120
    imports = [n for n in ast.walk(ast.parse("\n".join(lines))) if "Import" in type(n).__name__]
    roots = {getattr(n, "module", None) or n.names[0].name for n in imports}
    allowed = {"torch", "transformers", "numpy", "safetensors"}
    assert {root.split(".")[0] for root in roots} == allowed


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hf"
    result = script("-m", "generation.export", "--run", tiny_run, "--to", folder)
    assert result.returncode == 0 and f"Written to {folder}" in result.stdout, result.stderr
    return folder


def test_bfloat16_is_stored_where_its_products_are_not_fast(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "BFLOAT16_PRODUCTS", ())
    flags = ["--run", tiny_run, "--to", tmp_path / "hf", "--dtype", "bfloat16"]
    monkeypatch.setattr("sys.argv", ["export", *map(str, flags)])
    exporting.main()
    held = load_file(tmp_path / "hf" / "model.safetensors")
    assert {t.dtype for t in held.values() if t.dim() == 2} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_answer_ends_with_its_turn_where_the_base_model_does_not_say_so(tmp_path):
    policy = policy_of("gemma2", "relu")
    assert not (policy.base.folder / "generation_config.json").exists()
    export(policy, tmp_path / "hf")
    stop = policy.tokenizer.token_to_id("<end_of_turn>")
    stops = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [1, stop] and stop > 1


def test_the_hub_is_asked_for_the_files_that_are_copied(monkeypatch):
    asked = []
    monkeypatch.setattr("model.fetch", lambda *given: asked.extend(given[2]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Gemma2.from_pretrained("own/name")
    copied = set(TOKENIZER_FILES) - {"tokenizer.model"}  # transformers reads tokenizer.json instead
    assert all(any(map(Path(name).match, asked)) for name in copied)


QUESTION = "What is a kettle used for?"


def test_the_tiny_policy_says_the_same_in_transformers(exported, tiny_run):
    transformers = pytest.importorskip("transformers", reason="exports are for transformers")
    flags = ("--prompt", QUESTION, "--max-new-tokens", 60)
    said = script("-m", "generation", "--run", tiny_run, *flags).stdout.strip()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = tokenizer.apply_chat_template(
        [dict(role="user", content=QUESTION)], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    new = opened(exported).generate(ids, max_new_tokens=60, do_sample=False)
    assert tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip() == said


def test_without_trust_no_unsteered_model_loads(exported):
    """A Gemma class of transformers' own would load the base weights and say no word."""
    transformers = pytest.importorskip("transformers", reason="exports are for transformers")
    with pytest.raises(ValueError, match="custom code"):
        transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False)


def test_mistakes_are_sentences_and_leave_nothing(tmp_path):
    policy = policy_of("gemma2", "relu")
    with pytest.raises(UserError, match="--reference: the model .* is not on the Hub"):
        export(policy, tmp_path / "hf", reference=True)
    unsteered = policy._replace(model=Unsteered(policy.base))
    with pytest.raises(UserError, match=r"has no adapter to export; a run of train.py --full"):
        export(unsteered, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    (tmp_path / "mine").write_text("")
    cases = {
        ("OUT", None): "--run and --to: a run to export and a folder to write were expected",
        ("OUT", str(tmp_path)): f"--to {tmp_path}: holds files already",
        ("OUT", str(tmp_path / "mine")): f"--to {tmp_path / 'mine'}: cannot be written",
    }
    for (run, to), sentence in cases.items():
        with pytest.raises(UserError, match=re.escape(sentence)):
            Settings(run=run, to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
