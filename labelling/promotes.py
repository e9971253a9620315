"""What each feature of an SAE promotes, read off the weights: explanations to label like any other.

    python -m labelling.promotes --model tiny --out runs/promotes.jsonl
    python -m labelling.promotes --layer 12 --out runs/promotes.jsonl     Gemma-2-2B-it

A feature that is turned up adds its decoder row to the residual stream. Read through the final
norm's weights and the unembedding E, without the blocks in between, it raises the logits by

    W_dec · diag(1 + w_norm) · Eᵀ      [F, d] -> [F, V]

up to a positive factor at each position (the norm's scale) and the softcap, neither of which
changes their order. The tokens that rise most are the feature's explanation, in a label file of
kind "promotes" (labels.py). tiny/measure.py runs the blocks as well, at many times the cost.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor

from labels import write_labels
from model import Gemma2
from policy import DEFAULTS, TINY, load_base, load_sae
from runtime import cli
from runtime.cli import at_least, flag
from runtime.device import resolve_device
from runtime.output import writable_file
from runtime.progress import progress_bar
from runtime.sources import UserError

LOGITS = 1 << 24  # at once: 64 MB in float32


@dataclass(frozen=True)
class Settings:
    model: str = flag(DEFAULTS.model, "tiny, a Hugging Face model folder, or a Hub id")
    sae: str = flag(DEFAULTS.sae, "tiny, a params.npz, a folder, or a Hub id")
    sae_id: str | None = flag(None, "folder in --sae (default: the layer's 65k SAE of lowest L0)")
    layer: int = flag(DEFAULTS.layer, "layer of the SAE, if --sae-id does not say it")
    tokens: int = flag(10, "number of tokens to name for each feature")
    device: str = flag("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is a GPU")
    out: str | None = flag(None, "the jsonl file to write")

    def __post_init__(self):
        at_least(self, 1, "tokens")
        writable_file(self.out or "")


def promoted(model: Gemma2, W_dec: Tensor, n: int) -> Tensor:
    """The n tokens whose logits each decoder row raises most, the first the most: [F, n], int64."""
    E, scale = model.model.embed_tokens.weight.float(), 1 + model.model.norm.weight.float()
    rows = max(1, LOGITS // len(E))
    pieces = progress_bar(W_dec.float().split(rows), desc="projecting", leave=False)
    return torch.cat([((piece * scale) @ E.T).topk(min(n, len(E))).indices for piece in pieces])


@torch.inference_mode()
def main() -> None:
    preset = dict(sae=TINY["sae"], layer=TINY["layer"])
    s = cli.parse(Settings, presets={"tiny": preset}, doc=__doc__)
    device = resolve_device(s.device, "float32")
    model, tokenizer = load_base(s.model, device.dtype, device.name)
    named = DEFAULTS._replace(sae=s.sae, sae_id=s.sae_id, layer=s.layer)
    sae = load_sae(named, device)
    if sae.d_model != model.config.hidden_size:
        raise UserError(
            f"--sae {s.sae}: made for d_model {sae.d_model}, "
            f"the model's is {model.config.hidden_size}."
        )
    rows = []
    for k, ids in enumerate(promoted(model, sae.W_dec, s.tokens).tolist()):
        words = (tokenizer.decode([i], skip_special_tokens=False) for i in ids)
        rows.append(dict(feature=k, description="promotes " + ", ".join(map(repr, words))))
    header = dict(
        kind="promotes",
        sae=s.sae,
        sae_id=sae.sae_id,
        sae_sha256=sae.sha256,
        judge=None,
        model=s.model,
        method="W_dec · diag(1 + w_norm) · Eᵀ",
        date=datetime.now(UTC).date().isoformat(),
    )
    write_labels(s.out, header, rows)
    print(f"{len(rows):,} features written to {s.out}; label them with --explanations {s.out}")


if __name__ == "__main__":
    cli.run(main)
