"""What each feature of an SAE promotes, the cheap way: explanations to be classified like any other.

    python promotes.py --model tiny --out promotes.jsonl
    python promotes.py --layer 12 --out promotes.jsonl         Gemma-2-2B-it and its GemmaScope SAE

A feature turned up adds its decoder row to the residual stream. Read through the final norm's weights and the
unembedding E, past the blocks in between, it raises the logits by

    W_dec · diag(1 + w_norm) · Eᵀ      [F, d] -> [F, V]

up to a positive factor at each position (the norm's scale) and the softcap, neither of which changes their order. The
tokens that rise most are the feature's explanation, in a label file of kind "promotes" (labels.py) that names its SAE.
What the blocks in between make of the push is left out: tiny/measure.py runs them, at many times the cost.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import sae as saes
import train
from labels import write_labels
from model import Gemma2
from runtime import cli
from runtime.cli import flag
from runtime.sources import UserError
from simpo import CHUNK_ELEMENTS


@dataclass(frozen=True)
class Settings:
    model: str = flag(train.Settings.model, "tiny, a Hugging Face model folder, or a Hub id")
    sae: str = flag(train.Settings.sae, "tiny, a params.npz, a folder, or a Hub id")
    sae_id: str | None = flag(
        None, "folder within --sae; unset: the layer's 65k SAE of lowest average L0"
    )
    layer: int = flag(
        train.Settings.layer, "the block whose SAE is meant, where --sae-id does not say"
    )
    tokens: int = flag(10, "tokens named for each feature")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA when present")
    out: str | None = flag(None, "the jsonl file to write")

    def __post_init__(self):
        if self.out is None or self.tokens < 1:
            raise UserError(
                "--out and --tokens: a file to write, and at least 1 token for each feature, were expected."
            )


def promoted(model: Gemma2, W_dec: Tensor, n: int) -> Tensor:
    """The n tokens whose logits each decoder row raises most, the first the most: [F, d] -> int64 [F, n]."""
    E, scale = model.model.embed_tokens.weight.float(), 1 + model.model.norm.weight.float()
    rows = max(1, CHUNK_ELEMENTS[E.device.type] // len(E))
    pieces = tqdm(W_dec.float().split(rows), desc="projecting", leave=False)
    return torch.cat([((piece * scale) @ E.T).topk(min(n, len(E))).indices for piece in pieces])


@torch.inference_mode()
def main() -> None:
    s = cli.parse(Settings, presets={"tiny": dict(sae="tiny")}, doc=__doc__)
    device = train.resolve_device(train.Settings(device=s.device)).device
    model = Gemma2.from_pretrained(s.model, device=device)
    sae = saes.JumpReLUSAE.from_pretrained(
        s.sae, s.sae_id or saes.default_id(s.sae, s.layer), device=device
    )
    if sae.d_model != model.config.hidden_size:
        raise UserError(
            f"--sae {s.sae}: made for d_model {sae.d_model}, the model's is {model.config.hidden_size}."
        )
    tokenizer = data.load_tokenizer(model.folder)
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
    )
    header |= dict(method="W_dec · diag(1 + w_norm) · Eᵀ", date=time.strftime("%Y-%m-%d"))
    try:
        write_labels(Path(s.out), header, rows)
    except OSError as e:
        raise UserError(f"--out {s.out}: cannot be written ({e}).") from e
    print(
        f"{len(rows):,} features written to {s.out}; classify_features.py puts them into categories."
    )


if __name__ == "__main__":
    cli.run(main)
