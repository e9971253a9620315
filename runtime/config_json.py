"""Read and write config.json of Gemma 2 and 3, as transformers 4 and 5 write it."""

import json
from pathlib import Path

from runtime.sources import UserError, read_json

TYPE2, TYPE3 = "gemma2", "gemma3_text"  # values of model_type
SLIDING, FULL = "sliding_attention", "full_attention"  # values of layer_types
# The values that our forward implements; None means that the key is absent.
ONLY = {
    "model_type": {TYPE2, TYPE3},
    "hidden_activation": {"gelu_pytorch_tanh", None},
    "attention_bias": {False, None},
    "tie_word_embeddings": {True, None},
    "use_bidirectional_attention": {False, None},
}
# transformers' defaults for Gemma 3. Its published config.json files leave these keys out.
GEMMA3 = dict(
    model_type=TYPE3,
    vocab_size=262_208,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    rope_theta=1_000_000.0,
    rope_local_base_freq=10_000.0,
    max_position_embeddings=131_072,
)


def read(path: Path) -> dict:
    """The settings under the names of model.Gemma2Config, and others that it does not know.

    A multimodal Gemma 3 has them under text_config. Raises UserError for other architectures than
    Gemma 2 and 3, and for a file that is no config.json.
    """
    try:
        raw = read_json(path)
        if raw.get("model_type") == "gemma3":
            raw = {"model_type": TYPE3} | raw["text_config"]
        for key, allowed in ONLY.items():
            if not isinstance(raw.get(key), str | bool | None) or raw.get(key) not in allowed:
                raise UserError(f"{path}: {key} is {raw.get(key)!r}; no Gemma 2 or 3 has that.")
        if "layer_types" not in raw and raw.get("sliding_window_pattern", 6) != 6:
            every = raw["sliding_window_pattern"]
            raise UserError(f"{path}: sliding_window_pattern is {every!r}, 6 was expected.")
        raw = (GEMMA3 if raw["model_type"] == TYPE3 else {}) | raw
        return raw | _rope(raw)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as e:
        raise UserError(f"{path}: a config.json was expected ({e}).") from e


def _rope(raw: dict) -> dict:
    """The settings of the rotary angles. Raises ValueError for kinds that no Gemma has.

    Gemma-2 has one base for all blocks, Gemma 3 one for each of its two kinds of block.
    """
    given = raw.get("rope_parameters") or {}
    full, local = given.get(FULL, given), given.get(SLIDING, {})
    scaling = raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", full.get("rope_type", "default"))
    linear = kind == "linear" and raw["model_type"] == TYPE3
    if not linear and (scaling or kind != "default"):
        raise ValueError(f"rope_scaling or rope_type {kind!r}")
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {local['rope_type']!r}")
    found = dict(rope_theta=full.get("rope_theta"), rope_local_base_freq=local.get("rope_theta"))
    if linear:
        found["rope_factor"] = scaling.get("factor", full.get("factor"))
    return {name: value for name, value in found.items() if value is not None}


def write(path: Path, settings: dict, dtype: str) -> None:
    """Write a config.json with the keys that transformers 4 and 5 read.

    settings: the fields of model.Gemma2Config. dtype: of the weights.
    """
    third = settings["model_type"] == TYPE3
    scaling, rope = None, {"rope_type": "default", "rope_theta": settings["rope_theta"]}
    if third:
        local = {"rope_type": "default", "rope_theta": settings["rope_local_base_freq"]}
        if settings["rope_factor"] != 1:
            scaling = {"rope_type": "linear", "factor": settings["rope_factor"]}
            rope |= scaling
        rope = {FULL: rope, SLIDING: local}
    raw = settings | {
        "architectures": ["Gemma3ForCausalLM" if third else "Gemma2ForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "rope_parameters": rope,  # transformers 5
        "rope_scaling": scaling,  # transformers 4
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    path.write_text(json.dumps(raw, indent=2) + "\n")
