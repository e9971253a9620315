"""Train a JumpReLU SAE on a model's residual stream, where no published one can be had.

    python -m experiments.train_sae --model DIR --layer 12 --data pairs.jsonl --out runs/sae

The stream after block --layer is computed over the texts of preference pairs, prompt with chosen
and prompt with rejected response, all positions but the first. Rounds of --round-tokens are
computed once and kept in OUT/stream; training goes through them --passes times, each round mixed
with the one before. After every round the state is saved, so that the same command goes on where it
stopped. At the end OUT/resid_post/... holds the SAE in Gemma Scope 2's layout, and OUT/quality.json
what it is worth on the test split: variance explained, the loss that the model keeps when the SAE's
reconstruction stands in for the stream, L0, and features that never fire.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import data
from model import Gemma2
from policy import DEFAULTS, load_base, read_pairs
from runtime import cli
from runtime.cli import flag
from runtime.device import DTYPES, Device, resolve_device
from runtime.output import replacing, writable, write_whole
from runtime.sources import UserError, sha256
from sae import JumpReLUSAE, save_gemmascope2

IDLE = 200  # batches without firing after which a feature learns from the others' error
FINAL = 50_000  # positions on which the final threshold is set


@dataclass(frozen=True)
class Settings:
    model: str = flag("", "a Hugging Face model folder, or a Hub id")
    layer: int = flag(DEFAULTS.layer, "the block whose output is read")
    data: str = flag(DEFAULTS.data, "preference pairs: train split to learn from, test to measure")
    width: int = flag(8192, "features")
    l0: int = flag(40, "features active at a position, on average")
    passes: int = flag(3, "times that the texts are gone through")
    tokens: int = flag(0, "learn from about so many positions, of the first texts; 0: all")
    round_tokens: int = flag(200_000, "positions of a round")
    batch: int = flag(2048, "positions of a step")
    lr: float = flag(1e-3, "peak learning rate")
    max_length: int = flag(1024, "tokens of a text, at most; a longer prompt keeps its last half")
    test_pairs: int = flag(64, "pairs of the test split that the quality is measured on")
    seed: int = flag(0, "seed of initial weights and of the order of positions")
    dtype: str = flag("auto", "auto: bfloat16 on CUDA, float32 on CPU", DTYPES)
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA when present")
    out: str = flag("runs/sae", "folder to write")

    def __post_init__(self):
        if not self.model:
            raise UserError("--model: a model folder or a Hub id was expected.")
        cli.at_least(self, 1, "width", "l0", "passes", "round_tokens", "batch", "test_pairs")
        cli.at_least(self, 0, "layer", "lr", "seed", "tokens")
        cli.at_least(self, 2, "max_length")
        if self.l0 >= self.width:
            raise UserError(f"--l0 {self.l0}: must be less than --width {self.width}.")


# --- the trainer ----------------------------------------------------------------------------------


class Progress(NamedTuple):
    unexplained: float  # share of the batch's variance
    l0: float
    idle: int  # features that have not fired for IDLE batches


class Trainer:
    """A JumpReLU SAE in training, on y = (x - mean) / scale.

    While training all features share one threshold, moved after every batch so that L0 settles on
    its target (BatchTopK without the sorting). Features that have not fired for a while learn from
    the error that the others leave (the auxiliary loss of TopK SAEs).
    """

    def __init__(self, x: Tensor, width: int, l0: int, lr: float, generator: torch.Generator):
        """x [N, d]: positions that give mean and scale."""
        d = x.shape[1]
        self.l0, self.lr = l0, lr
        self.mean = x.mean(0)
        self.scale = (x - self.mean).square().mean().sqrt()
        W_dec = F.normalize(torch.randn(width, d, generator=generator), dim=1)
        self.W_dec = W_dec.to(x.device).requires_grad_()
        self.W_enc = self.W_dec.detach().T.clone().requires_grad_()
        self.b_enc = torch.zeros(width, device=x.device, requires_grad=True)
        self.b_dec = torch.zeros(d, device=x.device, requires_grad=True)
        self.trained = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        self.optimizer = torch.optim.Adam(self.trained, lr=lr, betas=(0.9, 0.99))
        self.threshold, self.silent = 0.5, torch.zeros(width, device=x.device)

    def step(self, x: Tensor, done: float, warmup: float = 1.0) -> Progress:
        """One batch x [n, d]. done: share of the training that lies behind; warmup: of the rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, warmup, 2.5 * (1 - done))
        # At first four times as many features are active, so that fewer of them die.
        target = self.l0 * max(1.0, 4 - 12 * done)
        y = (x - self.mean) / self.scale
        z = y @ self.W_enc + self.b_enc  # [n, d] -> [n, F]
        f = z * (z > self.threshold)
        error = y - (f @ self.W_dec + self.b_dec)  # [n, F] -> [n, d]
        loss = error.square().sum(1).mean()

        fired = (z.detach() > self.threshold).sum(0)
        self.silent = torch.where(fired > 0, 0.0, self.silent + 1)
        idle = (self.silent > IDLE).nonzero().squeeze(1)
        if len(idle):
            best = torch.relu(z[:, idle]).topk(min(self.l0, len(idle)), dim=1)
            g = torch.zeros(len(y), len(idle), device=y.device)
            g = g.scatter(1, best.indices, best.values)
            missed = error.detach() - g @ self.W_dec[idle]
            loss = loss + missed.square().sum(1).mean() / 32
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.W_dec.copy_(F.normalize(self.W_dec, dim=1))

        l0 = fired.sum().item() / len(x)
        off = max(-1.0, min(1.0, l0 / target - 1))
        self.threshold = max(1e-3, self.threshold * math.exp(0.02 * off))
        spread = (y - y.mean(0)).square().sum()
        return Progress((error.detach().square().sum() / spread).item(), l0, len(idle))

    @torch.no_grad()
    def arrays(self, x: Tensor) -> dict[str, Tensor]:
        """GemmaScope's five arrays, which act on the raw stream; L0 on x [N, d] is the target."""
        z = ((x - self.mean) / self.scale) @ self.W_enc + self.b_enc
        threshold = z.flatten().topk(self.l0 * len(z)).values[-1]
        # z is linear in y = (x - mean) / scale, and f scales with x: W_enc stays, thresholds and
        # biases grow.
        return {
            "W_enc": self.W_enc.detach(),
            "W_dec": self.W_dec.detach(),
            "b_enc": self.scale * self.b_enc - self.mean @ self.W_enc,
            "b_dec": self.scale * self.b_dec + self.mean,
            "threshold": torch.full_like(self.b_enc, self.scale * threshold),
        }

    def state(self) -> dict[str, Tensor]:
        """Everything that goes on, by name."""
        held = dict(zip(("W_enc", "W_dec", "b_enc", "b_dec"), self.trained, strict=True))
        held |= dict(mean=self.mean, scale=self.scale, silent=self.silent)
        held["threshold"] = torch.tensor(self.threshold, dtype=torch.float64)
        for name, parameter in zip(("W_enc", "W_dec", "b_enc", "b_dec"), self.trained, strict=True):
            of = self.optimizer.state[parameter]
            held |= {f"adam.{name}.{key}": value for key, value in of.items()}
        return {name: tensor.detach().contiguous() for name, tensor in held.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, parameter in zip(("W_enc", "W_dec", "b_enc", "b_dec"), self.trained, strict=True):
            parameter.copy_(state[name])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {k: state[f"adam.{name}.{k}"].clone() for k in keys}
        self.mean, self.scale, self.silent = state["mean"], state["scale"], state["silent"]
        self.threshold = state["threshold"].item()


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
    with tqdm(total=len(texts), desc="stream", unit="text", leave=False) as bar:
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


# --- what it is worth -----------------------------------------------------------------------------


@torch.inference_mode()
def quality(model: Gemma2, sae: JumpReLUSAE, pairs: list[data.Pair], layer: int) -> dict:
    """On pairs of the test split, positions but the first.

    loss_recovered: (loss with the stream set to its mean - loss with the reconstruction) / (loss
    with the mean - the model's own loss), of the responses' tokens.
    """
    total = {name: 0.0 for name in ("own", "spliced", "mean", "tokens")}
    kept, error, fired = [], 0.0, torch.zeros(sae.d_sae, device=model.device)
    packs = [data.pack_pairs([pair]).to(model.device) for pair in pairs]
    streams = []
    for packed in packs:
        x = model.blocks(model.embed(packed.tokens), model.plan(packed), 0, layer + 1)
        streams.append(x)
        kept.append(x[packed.position > 0])
    every = torch.cat(kept)
    mean = every.mean(0)
    for packed, x in zip(tqdm(packs, desc="quality", leave=False), streams, strict=True):
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


def train(s: Settings) -> Path:
    """Train, save and measure; returns the SAE's folder."""
    out, device = writable(Path(s.out)), resolve_device(s.device, s.dtype)
    model, tokenizer = load_base(s.model, device.dtype, device.name)
    limits = dict(max_length=s.max_length, max_prompt_length=s.max_length // 2)
    recorded = DEFAULTS._replace(data=s.data, **limits)
    plan = rounds(texts(read_pairs(s.data, tokenizer, recorded, "train")), s.round_tokens)
    if s.tokens:
        plan = plan[: max(1, round(s.tokens / s.round_tokens))]
    generator = torch.Generator().manual_seed(s.seed)
    name = f"layer_{s.layer}_width_{s.width // 1024}k_l0_{s.l0}"

    def round_of(i: int) -> Tensor:
        i %= len(plan)
        path = out / "stream" / f"layer{s.layer}-length{s.max_length}-round{i:04d}.safetensors"
        return stored_round(path, model, plan[i], s.layer, device)

    before = round_of(0)
    trainer = Trainer(before, s.width, s.l0, s.lr, generator)
    done, state = 0, out / f"{name}.state.safetensors"
    if state.exists():
        held = load_file(state, device=device.name)
        done = int(held.pop("rounds"))
        trainer.load(held)
        before = round_of(done - 1)
        print(f"Going on after round {done} of {s.passes * len(plan)}.", file=sys.stderr)
    count = s.passes * len(plan)
    for number in tqdm(range(done, count), desc="rounds", initial=done, total=count):
        now = round_of(number)
        mixed = torch.cat([before, now])
        order = torch.Generator().manual_seed(s.seed * 100_003 + number)
        chosen = torch.randperm(len(mixed), generator=order)[: len(now)]
        steps = max(1, len(now) // s.batch)
        bar = tqdm(chosen[: steps * s.batch].split(s.batch), desc="steps", leave=False)
        for i, rows in enumerate(bar):
            share = (number + i / steps) / count
            found = trainer.step(mixed[rows], share, (number * steps + i + 1) / 200)
            bar.set_postfix(unexplained=f"{found.unexplained:.4f}", l0=f"{found.l0:.1f}")
        tqdm.write(f"round {number + 1}: {found}", file=sys.stderr)
        with replacing(state) as part:
            save_file(trainer.state() | {"rounds": torch.tensor(number + 1)}, part)
        before = now

    folder = out / "resid_post" / name
    arrays = trainer.arrays(before[:FINAL])
    with replacing(folder) as part:
        save_gemmascope2(part, arrays, str(s.model), s.layer)
    sae = JumpReLUSAE.from_pretrained(out, f"resid_post/{name}", device=device.name)
    pairs = read_pairs(s.data, tokenizer, recorded, "test")[: s.test_pairs]
    report = dict(settings=asdict(s), sha256=sha256(folder / "params.safetensors"))
    report |= quality(model, sae, pairs, s.layer)
    write_whole(folder / "quality.json", json.dumps(report, indent=1) + "\n")
    for key, value in report.items():
        if isinstance(value, int | float):
            print(f"{key:<20}{value:12.4f}")
    print(f"Written to {folder}")
    return folder


def main() -> None:
    train(cli.parse(Settings, doc=__doc__))


if __name__ == "__main__":
    cli.run(main)
