"""A steered policy as a Hugging Face folder, which transformers loads and its servers serve.

    python -m generation.export --run runs/tiny --to runs/tiny-hf
    python -m generation.export --run OUT --to DIR --dtype bfloat16
    python -m generation.export --run OUT --to DIR --reference

DIR gets config.json, the tokenizer's files, templates/modeling_fsrl.py, and the weights of base
model, adapter and decoder. --reference leaves out the weights that are on the Hub: config.json
names base model and SAE by id and commit, and from_pretrained downloads them.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fsrl import SteeredModel, Unsteered
from policy import Policy, copy_tokenizer, identity, open_policy
from runtime import cli
from runtime.cli import flag
from runtime.device import DTYPES, dtype_on
from runtime.output import replacing, writable
from runtime.sources import UserError, read_json

CODE = Path(__file__).resolve().parent / "templates" / "modeling_fsrl.py"
# What transformers serve loads a model by, where its class is none of transformers' own. The order
# is vLLM's: it takes the first entry that begins with AutoModel.
HEADS = ("AutoModelForCausalLM", "AutoModelForDecision")


@dataclass(frozen=True)
class Settings:
    run: str | None = flag(None, "OUT of train.py, an adapter folder, or a Hub id of one")
    to: str | None = flag(None, "folder to write, new or empty")
    reference: bool = flag(False, "name base model and SAE by Hub id instead of holding them")
    model: str | None = flag(None, "where the run's base model is now")
    sae: str | None = flag(None, "where the run's SAE is now")
    sae_id: str | None = flag(None, "folder within --sae")
    dtype: str = flag("float32", "of the weights", DTYPES[1:])

    def __post_init__(self):
        """Raises UserError where --run or --to is missing, and for a folder that is not empty."""
        if not self.run or not self.to:
            raise UserError("--run and --to: a run to export and a folder to write were expected.")
        folder = writable(Path(self.to), "to")
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--to {folder}: holds files already; name a new folder.")


def steering(model: SteeredModel) -> dict[str, Tensor]:
    """The tensors of modeling_fsrl.Steering, by its names: matrices in the model's dtype."""
    adapter, sae, dtype = model.adapter, model.sae, model.model.model.norm.weight.dtype
    threshold = torch.zeros_like(adapter.bias) if adapter.threshold is None else adapter.threshold
    tensors = dict(weight=adapter.weight, bias=adapter.bias, threshold=threshold, W_dec=sae.W_dec)
    if adapter.activation == "soft-threshold":
        tensors |= dict(W_enc=sae.W_enc, b_enc=sae.b_enc, theta=sae.threshold)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return {name: t.to(dtype) if t.dim() == 2 else t.float() for name, t in tensors.items()}


def config(policy: Policy, reference: bool) -> dict:
    """What config.json holds beside the base model's own keys."""
    model, family = policy.steered, "Gemma3" if policy.base.config.qk_norm else "Gemma2"
    named = dict.fromkeys(("base_model", "base_model_revision", "sae", "sae_file", "sae_revision"))
    if reference:
        known = identity(policy) | dict(sae_file=model.sae.file)
        named = {name: known[name] for name in named}
    classes = dict(AutoConfig="Config", AutoModel="Model") | dict.fromkeys(HEADS, "ForCausalLM")
    return dict(
        model_type="fsrl_gemma3_text" if family == "Gemma3" else "fsrl_gemma2",
        architectures=[f"FSRL{family}ForCausalLM"],
        auto_map={name: f"{CODE.stem}.FSRL{family}{of}" for name, of in classes.items()},
        steering_layer=model.layer,
        steering_kind=model.adapter.activation,
        steering_features=model.sae.d_sae,
        steering_scale=1.0,
        silenced_features=[],
        **named,
    )


def export(policy: Policy, folder: Path, reference: bool = False) -> None:
    """Write the folder; after a failure there is none.

    Raises UserError for a model without an adapter, and under reference where base model or SAE did
    not come from the Hub.
    """
    if isinstance(policy.model, Unsteered):
        own = "a run of train.py --full is in that layout already, in its folder model/"
        raise UserError(f"--run {policy.name}: has no adapter to export; {own}.")
    base, sae, layer = policy.base, policy.steered.sae, policy.steered.layer
    for name, given in (("model", base), ("sae", sae)):
        if reference and not given.revision:
            raise UserError(f"--reference: the {name} {given.source} is not on the Hub.")

    tensors = steering(policy.steered)
    with replacing(folder) as part:
        if reference:
            part.mkdir()
            base.config.to_json(part / "config.json", base.model.norm.weight.dtype)
            own = {name: t for name, t in tensors.items() if name not in ("W_dec", "W_enc")}
            save_file(own, part / "steering.safetensors")
        else:
            named = {f"model.layers.{layer}.steering.{name}": t for name, t in tensors.items()}
            base.save_pretrained(part, base.state_dict() | named)
        text = json.dumps(read_json(part / "config.json") | config(policy, reference), indent=2)
        (part / "config.json").write_text(text + "\n")
        copy_tokenizer(policy, part)
        shutil.copyfile(CODE, part / CODE.name)


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    # Opened in a dtype whose products this processor has, and stored in the one asked for.
    policy = open_policy(s.run, s.model, s.sae, s.sae_id, "cpu", dtype_on("cpu", s.dtype))
    policy.base.to(getattr(torch, s.dtype))
    export(policy, Path(s.to), s.reference)
    size = sum(path.stat().st_size for path in Path(s.to).iterdir())
    print(f"Written to {s.to}: {size / 1e6:,.0f} MB")


if __name__ == "__main__":
    cli.run(main)
