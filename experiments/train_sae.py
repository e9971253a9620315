"""Train a JumpReLU SAE on a model's residual stream, where no published one can be had.

    python -m experiments.train_sae --model DIR --layer 12 --data pairs.jsonl --out runs/sae

The stream after block --layer is computed over the texts of preference pairs, prompt with chosen
and prompt with rejected response, all positions but the first, and each dimension is divided by its
spread. Rounds of --round-tokens are computed once and kept in OUT/stream; training goes through
them --passes times, each round mixed with the one before. After every round the state is saved, so
that the same command goes on where it stopped. At the end OUT/resid_post/... holds the SAE in Gemma
Scope 2's layout, and quality.json in the same folder what it is worth on the test split: variance
explained, the loss that the model keeps when the SAE's reconstruction stands in for the stream, L0,
and features that never fire.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import data
from model import Gemma2
from policy import DEFAULTS, load_base, read_pairs
from runtime import cli
from runtime.cli import flag
from runtime.device import DTYPES, Device, resolve_device
from runtime.messages import brief
from runtime.output import replacing, writable, write_whole
from runtime.progress import parts, progress_bar, say
from runtime.rows import data_files
from runtime.sources import UserError, read_json, sha256
from sae import ARRAYS, JumpReLUSAE
from tiny.sae_trainer import Trainer


@dataclass(frozen=True)
class Settings:
    model: str = flag("", "a Hugging Face model folder, or a Hub id")
    layer: int = flag(
        DEFAULTS.layer, "train on the residual stream after this block, counted from 0"
    )
    data: str = flag(DEFAULTS.data, "preference pairs: train split to learn from, test to measure")
    width: int = flag(8192, "number of features")
    l0: int = flag(40, "features active at a position, on average")
    passes: int = flag(3, "how often to go through the texts")
    tokens: int = flag(0, "learn from about so many positions, of the first texts; 0: all")
    round_tokens: int = flag(200_000, "positions of a round")
    batch: int = flag(2048, "positions of a step")
    lr: float = flag(1e-3, "peak learning rate")
    max_length: int = flag(1024, "tokens of a text, at most; a longer prompt keeps its last half")
    test_pairs: int = flag(64, "pairs of the test split that the quality is measured on")
    seed: int = flag(0, "seed of initial weights and of the order of positions")
    dtype: str = flag("auto", "dtype of products; auto: bfloat16 on CUDA, else float32", DTYPES)
    device: str = flag("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is a GPU")
    out: str = flag("runs/sae", "folder to write")

    def __post_init__(self):
        if not self.model:
            raise UserError("--model: a model folder or a Hub id was expected.")
        cli.at_least(self, 1, "width", "l0", "passes", "round_tokens", "batch", "test_pairs")
        cli.at_least(self, 0, "layer", "lr", "seed", "tokens")
        cli.at_least(self, 2, "max_length")
        if self.l0 >= self.width:
            raise UserError(f"--l0 {self.l0}: must be less than --width {self.width}.")


# --- the stream -----------------------------------------------------------------------------------


def texts(pairs: list[data.Pair]) -> list[list[int]]:
    """Prompt + chosen, prompt + rejected, of each pair."""
    return [prompt + response for prompt, *responses in pairs for response in responses]


def rounds(texts: list[list[int]], tokens: int) -> list[list[list[int]]]:
    """Consecutive texts of about so many tokens; a last round of less than half joins another."""
    found, filled = [[]], 0
    for text in texts:
        if filled >= tokens:
            found.append([])
            filled = 0
        found[-1].append(text)
        filled += len(text)
    if len(found) > 1 and filled < tokens / 2:
        last = found.pop()
        found[-1] += last
    return found


@torch.inference_mode()
def stream(model: Gemma2, texts: list[list[int]], layer: int, device: Device) -> Iterator[Tensor]:
    """The residual stream after block `layer` of texts, without their first positions: [n, d]."""
    with progress_bar(total=len(texts), desc="stream", unit="text", leave=False) as bar:
        for first in range(0, len(texts), 8):
            some = texts[first : first + 8]
            packed = data.pack([(text, []) for text in some]).to(device.name)
            with device.autocast():
                x = model.blocks(model.embed(packed.tokens), model.plan(packed), 0, layer + 1)
            yield x[packed.position > 0]
            bar.update(len(some))


def stored_round(path: Path, model: Gemma2, texts: list, layer: int, device: Device) -> Tensor:
    """A round's stream, computed where it is not on disk yet: bfloat16 there, float32 here."""
    if not path.exists():
        x = torch.cat(list(stream(model, texts, layer, device)))
        with replacing(path) as part:
            save_file({"x": x.to(torch.bfloat16).cpu()}, part)
    return load_file(path)["x"].to(device.name).float()


def spread(x: Tensor) -> Tensor:
    """Standard deviation of each dimension of a stream [n, d], at positions of usual norm: [d].

    A few dimensions and a few positions are so large that an SAE of the stream as it is would learn
    them alone: in Gemma 3 270M one dimension of 640 has a third of the variance. The blocks divide
    it out again, by the weights of their norms. With every dimension divided by this first, the
    SAE's reconstruction keeps much more of the model's loss.
    """
    norm = x.norm(dim=1)
    return x[norm < 3 * norm.median()].std(0).clamp(min=1e-6)


def undo(arrays: dict[str, Tensor], spread: Tensor) -> dict[str, Tensor]:
    """GemmaScope's arrays of an SAE of x / spread -> those of the same SAE of x, with rows of W_dec
    of norm 1.
    """
    W_dec = arrays["W_dec"] * spread  # [F, d]
    norm = W_dec.norm(dim=1)  # f grows by it
    return {
        "W_enc": arrays["W_enc"] / spread[:, None] * norm,
        "W_dec": W_dec / norm[:, None],
        "b_enc": arrays["b_enc"] * norm,
        "b_dec": arrays["b_dec"] * spread,
        "threshold": arrays["threshold"] * norm,
    }


# --- what it is worth -----------------------------------------------------------------------------


@torch.inference_mode()
def quality(model: Gemma2, sae: JumpReLUSAE, pairs: list[data.Pair], layer: int) -> dict:
    """On pairs of the test split, positions but the first.

    loss_recovered: (loss with the stream set to its mean - loss with the reconstruction) / (loss
    with the mean - the model's own loss), of the responses' tokens.
    """
    total = {name: 0.0 for name in ("own", "spliced", "mean", "tokens")}
    kept, error, fired = [], 0.0, torch.zeros(sae.d_sae, device=model.device)
    plan = data.microbatches(pairs, DEFAULTS.tokens_per_microbatch)
    packs = [data.pack_pairs([pairs[i] for i in chosen]).to(model.device) for chosen in plan]
    streams = []
    for packed in packs:
        x = model.blocks(model.embed(packed.tokens), model.plan(packed), 0, layer + 1)
        streams.append(x)
        kept.append(x[packed.position > 0])
    every = torch.cat(kept)
    mean = every.mean(0)
    for packed, x in zip(progress_bar(packs, desc="quality", leave=False), streams, strict=True):
        first = (packed.position == 0)[:, None]
        f = sae.encode(x)
        fired += (f > 0)[packed.position > 0].sum(0)
        decoded = sae.decode(f)
        error += (x - decoded)[packed.position > 0].square().sum().item()
        variants = dict(own=x, spliced=torch.where(first, x, decoded))
        variants["mean"] = torch.where(first, x, mean)
        plan = model.plan(packed)
        for name, y in variants.items():
            states = model.final_norm(model.blocks(y, plan, layer + 1))
            total[name] -= model.logps(states, packed).sum().item()
        total["tokens"] += len(packed.target)
    own, spliced, by_mean = (total[name] / total["tokens"] for name in ("own", "spliced", "mean"))
    variance = (every - mean).square().sum().item()
    return dict(
        pairs=len(pairs),
        positions=len(every),
        variance_explained=1 - error / variance,
        loss=own,
        loss_spliced=spliced,
        loss_with_mean=by_mean,
        loss_recovered=(by_mean - spliced) / (by_mean - own),
        l0=fired.sum().item() / len(every),
        never_fired=int((fired == 0).sum()),
        median_norm=every.norm(dim=1).median().item(),
    )


# --- the run --------------------------------------------------------------------------------------


def check_same(s: Settings, out: Path) -> None:
    """Keep the settings in OUT. Raises UserError where others are there: rounds and state that
    were made with them would be taken for these.
    """
    path, free = out / "settings.json", ("out", "device", "test_pairs")
    own = {name: value for name, value in asdict(s).items() if name not in free}
    own["data_sha256"] = [sha256(file.path) for file in data_files(s.data)[0]]
    if not path.exists():
        write_whole(path, json.dumps(own, indent=1) + "\n")
        return
    try:
        there = read_json(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable ({brief(e)}).") from e
    # A folder of an earlier version does not say what its data were.
    if there.setdefault("data_sha256", own["data_sha256"]) != own["data_sha256"]:
        raise UserError(f"--out {out}: holds a training on other content of --data {s.data}.")
    for name, value in own.items():
        if there.get(name) != value:
            flag, held = name.replace("_", "-"), brief(there.get(name))
            raise UserError(f"--out {out}: holds a training with --{flag} {held}, not {value}.")


def train(s: Settings) -> Path:
    """Train, save and measure; returns the SAE's folder."""
    out, device = writable(Path(s.out)), resolve_device(s.device, s.dtype)
    model, tokenizer = load_base(s.model, device.dtype, device.name)
    blocks = model.config.num_hidden_layers
    if s.layer >= blocks:
        raise UserError(f"--layer {s.layer}: {s.model} has blocks 0 to {blocks - 1}.")
    limits = dict(max_length=s.max_length, max_prompt_length=s.max_length // 2)
    recorded = DEFAULTS._replace(data=s.data, **limits)
    splits = [read_pairs(s.data, tokenizer, recorded, split) for split in ("train", "test")]
    if not all(splits):
        raise UserError(f"--data {s.data}: a train and a test split were expected.")
    out.mkdir(parents=True, exist_ok=True)
    check_same(s, out)
    plan = rounds(texts(splits[0]), s.round_tokens)
    if s.tokens:
        plan = plan[: max(1, round(s.tokens / s.round_tokens))]
    generator = torch.Generator().manual_seed(s.seed)
    name = f"layer_{s.layer}_width_{s.width // 1024}k_l0_{s.l0}"

    def round_of(i: int) -> Tensor:
        i %= len(plan)
        path = out / "stream" / f"round{i:04d}.safetensors"
        return stored_round(path, model, plan[i], s.layer, device)

    scale = spread(round_of(0))  # [d]
    before = round_of(0) / scale
    trainer = Trainer(before, s.width, s.l0, s.lr, generator)
    done, state = 0, out / f"{name}.state.safetensors"
    if state.exists():
        held = load_file(state, device=device.name)
        done = int(held.pop("rounds"))
        trainer.load(held)
        before = round_of(done - 1) / scale
        print(f"Going on after round {done} of {s.passes * len(plan)}.", file=sys.stderr)
    count = s.passes * len(plan)
    for number in parts(range(done, count), "SAE", "rounds"):
        now = round_of(number) / scale
        mixed = torch.cat([before, now])
        order = torch.Generator().manual_seed(s.seed * 100_003 + number)
        chosen = torch.randperm(len(mixed), generator=order)[: len(now)]
        steps = max(1, len(now) // s.batch)
        bar = progress_bar(chosen[: steps * s.batch].split(s.batch), desc="steps", leave=False)
        for i, rows in enumerate(bar):
            share = (number + i / steps) / count
            found = trainer.step(mixed[rows], share, (number * steps + i + 1) / 200)
            bar.set_postfix(unexplained=f"{found.unexplained:.4f}", l0=f"{found.l0:.1f}")
        say(f"round {number + 1}: {found}", sys.stderr)
        with replacing(state) as part:
            save_file(trainer.state() | {"rounds": torch.tensor(number + 1)}, part)
        before = now

    folder = out / "resid_post" / name
    arrays = undo(trainer.arrays(before), scale)
    with replacing(folder) as part:
        save_gemmascope2(part, arrays, str(s.model), s.layer)
    sae = JumpReLUSAE.from_pretrained(out, f"resid_post/{name}", device=device.name)
    report = dict(settings=asdict(s), sha256=sha256(folder / "params.safetensors"))
    report |= quality(model, sae, splits[1][: s.test_pairs], s.layer)
    write_whole(folder / "quality.json", json.dumps(report, indent=1) + "\n")
    for key, value in report.items():
        if isinstance(value, int | float):
            print(f"{key:<20}{value:12.4f}")
    print(f"Written to {folder}")
    return folder


def save_gemmascope2(folder: Path, arrays: dict[str, Tensor], model: str, layer: int) -> None:
    """Write the five arrays as Gemma Scope 2's params.safetensors (float32) and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name.lower(): arrays[name].detach().float().cpu().contiguous() for name in ARRAYS}
    save_file(tensors, folder / "params.safetensors")
    place = dict(hf_hook_point_in=f"model.layers.{layer}.output", model_name=model)
    config = dict(architecture="jump_relu", **place)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    train(cli.parse(Settings, doc=__doc__))


if __name__ == "__main__":
    cli.run(main)
