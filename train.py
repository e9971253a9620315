"""Train an FSRL adapter with SimPO and an L1 penalty: the whole run, in one file.

    python train.py --model tiny                  the embedded world, minutes on a laptop
    python train.py --layer 12 --l1 0.02          the paper's run: Gemma-2-2B-it, GemmaScope, UltraFeedback

Deviations from the paper and the authors' code:
1. The headline loss, train and eval, is SimPO alone; the L1 penalty is reported beside it.
2. The penalty averages over real positions; the authors' also counts padding.
3. Logits are float32 before the log-softmax, and the residual stream is float32 throughout.
4. The pairs left over when an epoch does not divide by --batch-size are left out of it; each shuffle leaves out others.
"""

import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

# OpenMP's threads spin for each other by default, which on a shared core keeps the one waited for from running: the
# tiny run beside another busy process takes 63 s with this, 84 s without, and 27 s alone. Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from torch import Tensor
from tqdm import tqdm

import cli
import data
import generate
import sae as saes
import simpo
import tiny
from activations import Activations
from cli import flag
from data import Pair
from fsrl import Adapter, SteeredModel
from model import Gemma2
from packed import Packed
from sources import UserError, sha256, write_whole

PRESETS = {  # what --model tiny changes of the defaults below
    "tiny": dict(sae="tiny", data="tiny", layer=tiny.LAYER, lr=2e-3, epochs=1, eval_every=16),
}


@dataclass(frozen=True)
class Settings:
    model: str = flag("google/gemma-2-2b-it", "tiny, a Hugging Face model folder, or a Hub id")
    model_revision: str | None = flag(None, "branch, tag or commit of a Hub model")
    sae: str = flag("google/gemma-scope-2b-pt-res", "tiny, a params.npz, a folder, or a Hub id")
    sae_id: str | None = flag(None, "folder within --sae; unset: the layer's 65k SAE of lowest average L0")
    sae_revision: str | None = flag(None, "branch, tag or commit of a Hub SAE")
    data: str = flag("princeton-nlp/llama3-ultrafeedback-armorm", "tiny, a parquet or jsonl file, a folder, a Hub id")
    eval_data: str | None = flag(None, "as --data; unset: the test split of --data")
    data_revision: str | None = flag(None, "branch, tag or commit of a Hub dataset")
    layer: int = flag(12, "steer the residual stream after this block (counted from 0)")
    l1: float = flag(0.02, "weight α of the L1 penalty")
    penalty_warmup_ratio: float = flag(0.0, "share of the steps before the penalty sets in")
    beta: float = flag(10.0, "β of SimPO")
    gamma_ratio: float = flag(0.5, "ρ = γ/β of SimPO")
    epochs: int = flag(2, "passes over the pairs")
    max_steps: int | None = flag(None, "optimiser steps; overrides --epochs")
    lr: float = flag(5e-7, "peak learning rate")
    warmup_ratio: float = flag(0.1, "share of the steps in which the cosine schedule rises")
    schedule: str = flag("cosine", "cosine (with warm-up) or constant (without)", choices=("cosine", "constant"))
    max_grad_norm: float = flag(1.0, "gradient norm is clipped here; 0: off")
    batch_size: int = flag(32, "pairs per optimiser step, exactly")
    tokens_per_microbatch: int = flag(8192, "tokens per forward pass, the memory knob; no effect on the result")
    cache_activations: str | None = flag(None, "folder for the residual streams below the adapter, kept in --dtype")
    max_length: int = flag(2048, "tokens of prompt + response, at most")
    max_prompt_length: int = flag(1800, "tokens of a truncated prompt")
    adapter: str = flag("relu", "kind of adapter", choices=("relu",))
    init_adapter: str | None = flag(None, "adapter folder (ours or the authors') to start from")
    mask_features: str | None = flag(None, "json list of features that never steer, as eval_ablation.py writes them")
    shuffle: bool = flag(True, "a new order each epoch, from --seed; --no-shuffle: file order")
    seed: int = flag(0, "seed of the order of the pairs and of the initial weights")
    dtype: str = flag("auto", "auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "float32", "bfloat16"))
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA when present")
    eval_every: int = flag(200, "steps between evaluations; 0: only at start and end")
    out: str | None = flag(None, "folder to write; unset: runs/NAME of the model, with a number if taken")

    def __post_init__(self):
        for name in ("epochs", "batch_size", "tokens_per_microbatch", "max_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1 was expected.")
        for name in ("l1", "beta", "gamma_ratio", "lr", "max_grad_norm", "eval_every", "seed", "layer"):
            if not 0 <= getattr(self, name) < (2**63 if name == "seed" else math.inf):
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be finite and not negative.")
        for name in ("warmup_ratio", "penalty_warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: a share between 0 and 1.")


# --- one step -----------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Pairs to score together: an optimiser step's, or an evaluation set."""

    pairs: list[Pair]
    indices: Sequence[int]  # of each pair in the data set, where `activations` looks it up
    activations: Activations | None = None  # the residual stream below the adapter, cached


class Scores(NamedTuple):
    """What a forward pass says about its pairs (P of them) and positions."""

    loss: Tensor  # [P], SimPO
    logp_chosen: Tensor  # [P], mean over the response's tokens
    logp_rejected: Tensor  # [P]
    l1: Tensor  # sum over positions
    l0: Tensor  # sum over positions

    def sums(self, beta: float) -> Tensor:
        """[7] detached: loss, accuracy, margin, logp_chosen, logp_rejected summed over pairs; l1, l0 over positions.

        margin is the difference of the rewards β ℓ; accuracy the share of pairs where it is positive.
        """
        gap = self.logp_chosen - self.logp_rejected
        pairs = [self.loss, gap > 0, beta * gap, self.logp_chosen, self.logp_rejected]
        return torch.stack([*(x.sum() for x in pairs), self.l1, self.l0]).detach().double()


def score(steered: SteeredModel, packed: Packed, s: Settings, x: Tensor | None = None) -> Scores:
    """Run the steered model over packed pairs. x: the residual stream below the adapter, where it is cached."""
    hidden, l1, l0 = steered(packed, x)
    losses, chosen, rejected = preference(steered.model, hidden, packed, s)
    # Multiplied and summed, not a dot product: autocast would round that to bfloat16.
    return Scores(losses, chosen, rejected, (l1 * packed.copies).sum(), (l0 * packed.copies).sum())


def preference(model: Gemma2, hidden: Tensor, packed: Packed, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Final states [T, d] of packed pairs -> SimPO losses and mean log-probabilities, chosen and rejected, each [P]."""
    head, softcap = model.model.embed_tokens.weight, model.config.final_logit_softcapping
    logps = simpo.token_logps(hidden[packed.source], head, packed.target, softcap)
    logps = simpo.mean_logps(logps, packed.sequence, packed.lengths)
    chosen, rejected = logps[0::2], logps[1::2]
    return simpo.simpo_loss(chosen, rejected, s.beta, s.gamma_ratio), chosen, rejected


def means(sums: Tensor, pairs: int, positions: int, beta: float) -> dict[str, float]:
    """Sums of Scores.sums over a whole step or evaluation set -> the metrics of metrics.jsonl."""
    loss, accuracy, margin, chosen, rejected = (sums[:5] / pairs).tolist()
    l1, l0 = (sums[5:] / positions).tolist()
    return dict(
        **dict(loss=loss, l1=l1, l0=l0, accuracy=accuracy, margin=margin),
        **dict(reward_chosen=beta * chosen, reward_rejected=beta * rejected),
        **dict(logp_chosen=chosen, logp_rejected=rejected),
    )


def scores_by_microbatch(steered: SteeredModel, batch: Batch, s: Settings) -> Iterator[tuple[int, Scores]]:
    """Score a batch a micro-batch at a time: (pairs in it, their scores). One autocast for all, so that a float32
    master weight is cast to bfloat16 once per step.
    """
    with autocast(s):
        for micro in data.microbatches(batch.pairs, s.tokens_per_microbatch):
            packed = data.pack_pairs([batch.pairs[i] for i in micro]).to(s.device)
            x = batch.activations([batch.indices[i] for i in micro]).to(s.device) if batch.activations else None
            yield len(micro), score(steered, packed, s, x)


def backward(steered: SteeredModel, batch: Batch, alpha: float, s: Settings) -> Tensor:
    """Add the gradients of one whole step: mean SimPO over pairs + α · mean ‖v‖₁ over positions.

    The weights of the means are those of the step, so that packing does not matter. Returns the step's Scores.sums.
    """
    sums, done, positions = torch.zeros(7, dtype=torch.float64, device=s.device), 0, data.positions(batch.pairs)
    for n, scores in scores_by_microbatch(steered, batch, s):
        (scores.loss.sum() / len(batch.pairs) + alpha * scores.l1 / positions).backward()
        sums += scores.sums(s.beta)
        done += n
    assert done == len(batch.pairs)
    return sums


@torch.inference_mode()
def evaluate(steered: SteeredModel, batch: Batch, s: Settings, progress: bool = True) -> dict[str, float]:
    """Means over a whole evaluation set, whatever the packing."""
    sums, pairs = torch.zeros(7, dtype=torch.float64, device=s.device), batch.pairs
    with tqdm(total=len(pairs), desc="evaluating", unit="pair", leave=False, disable=not progress) as bar:
        for n, scores in scores_by_microbatch(steered, batch, s):
            sums += scores.sums(s.beta)
            bar.update(n)
    result = means(sums, len(pairs), data.positions(pairs), s.beta)
    kept = {name: result[name] for name in ("loss", "accuracy", "margin", "l1", "l0")}
    return kept | dict(pairs=len(pairs), tokens=sum(p.tokens for p in pairs))


def make_optimizer(trained: list[torch.nn.Parameter], s: Settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained, lr=s.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)


def autocast(s: Settings):
    """bfloat16 matrix products for float32 master weights; entered once per step, so that each is cast once."""
    return torch.autocast(s.device.split(":")[0], torch.bfloat16) if s.dtype == "bfloat16" else nullcontext()


def lr_factor(step: int, steps: int, s: Settings) -> float:
    """Share of the peak learning rate at step 0, 1, ...: rises linearly from 0, then falls as a half cosine."""
    if s.schedule == "constant":
        return 1.0
    warmup = math.ceil(s.warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# --- the run ------------------------------------------------------------------------------------------------


def train(s: Settings) -> Path:
    s = resolve_device(s)
    steered, tokenizer = load(s)
    model, adapter = steered.model, steered.adapter
    preferences = load_data(s, tokenizer)
    pairs, eval_pairs = preferences.pairs, preferences.eval_pairs
    steps_per_epoch = len(pairs) // s.batch_size
    steps = s.max_steps or s.epochs * steps_per_epoch

    trained = [p for p in steered.parameters() if p.requires_grad]
    frozen = [p for p in steered.parameters() if not p.requires_grad]
    assert {*map(id, trained)} == {*map(id, adapter.parameters())}, "the adapter, and nothing else, trains"
    assert {*map(id, frozen)} == {*map(id, model.parameters())}
    optimizer = make_optimizer(trained, s)

    cached = s.cache_activations
    activations = Activations.open(cached, steered, pairs, s) if cached else None
    eval_activations = Activations.open(cached, steered, eval_pairs, s) if cached and eval_pairs else None
    eval_batch = Batch(eval_pairs, range(len(eval_pairs)), eval_activations)
    out = open_run(s, steered, preferences)
    log = Log(out / "metrics.jsonl")
    started = time.perf_counter()
    shown = [list(prompt) for prompt in dict.fromkeys(tuple(p.prompt) for p in eval_pairs or pairs)][:2]
    samples = [(prompt, generate.greedy(steered, tokenizer, prompt)) for prompt in shown]
    if eval_pairs:
        log.write(split="eval", step=0, **evaluate(steered, eval_batch, s))

    bar = tqdm(total=steps, desc="training", unit="step")
    for step in range(steps):
        step_started = time.perf_counter()
        epoch, k = divmod(step, steps_per_epoch)
        if k == 0:
            order = data.epoch_order(len(pairs), s.seed, epoch, s.shuffle)
        indices = order[k * s.batch_size : (k + 1) * s.batch_size]
        batch = Batch([pairs[i] for i in indices], indices, activations)
        tokens = sum(p.tokens for p in batch.pairs)
        alpha = s.l1 if step >= s.penalty_warmup_ratio * steps else 0.0
        lr = optimizer.param_groups[0]["lr"] = s.lr * lr_factor(step, steps, s)

        sums = backward(steered, batch, alpha, s)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, s.max_grad_norm or math.inf)
        row = means(sums, s.batch_size, data.positions(batch.pairs), s.beta)  # the step's one wait for the device
        if not (math.isfinite(row["loss"]) and torch.isfinite(grad_norm)):
            raise SystemExit(f"Step {step + 1}: loss {row['loss']}, gradient norm {grad_norm}, in pairs {indices}.")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - step_started
        penalty = alpha * row["l1"]
        log.write(
            **dict(split="train", step=step + 1, epoch=(step + 1) / steps_per_epoch, **row),
            **dict(penalty=penalty, total=row["loss"] + penalty, lr=lr, grad_norm=float(grad_norm)),
            **dict(pairs=s.batch_size, tokens=tokens, tokens_per_second=tokens / seconds, seconds=seconds),
        )
        bar.set_postfix(loss=f"{row['loss']:.3f}", acc=f"{row['accuracy']:.2f}", L0=f"{row['l0']:.0f}", refresh=False)
        bar.update()
        last = step + 1 == steps
        if eval_pairs and (last or s.eval_every and (step + 1) % s.eval_every == 0):
            log.write(split="eval", step=step + 1, **evaluate(steered, eval_batch, s))
    bar.close()

    adapter.save_pretrained(out / "adapter", identity(s, steered))
    draw(log.rows, out / "loss.png")
    for prompt, before in samples:
        print(f"\n--- prompt\n{tokenizer.decode(prompt)}")
        print(f"--- before\n{before}\n--- after\n{generate.greedy(steered, tokenizer, prompt)}")
    print_table(log.rows, time.perf_counter() - started, s)
    print(f"Written to {out}: adapter/, metrics.jsonl, config.json, loss.png")
    return out


def resolve_device(s: Settings) -> Settings:
    """Settle `auto`. Raises UserError when CUDA is asked for and absent."""
    device = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (":" in device and (kind == "cpu" or not index.isdigit())):
        raise UserError(f"--device {device}: auto, cpu, cuda or cuda:N was expected.")
    if kind == "cuda" and not int(index or 0) < torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine offers {torch.cuda.device_count()} CUDA devices to torch.")
    dtype = s.dtype if s.dtype != "auto" else "bfloat16" if kind == "cuda" else "float32"
    return replace(s, device=device, dtype=dtype)


def load(s: Settings):
    """Model, SAE and adapter -> SteeredModel, and the model's tokenizer."""
    dtype = getattr(torch, s.dtype)
    model = Gemma2.from_pretrained(s.model, dtype, s.device, s.model_revision)
    sae_id = s.sae_id or saes.default_id(s.sae, s.layer, s.sae_revision)
    sae = saes.JumpReLUSAE.from_pretrained(s.sae, sae_id, dtype, s.device, s.sae_revision)
    if s.init_adapter:
        adapter = Adapter.from_pretrained(s.init_adapter)
    else:
        adapter = Adapter(model.config.hidden_size, sae.d_sae, s.adapter)
        adapter.init_weights(torch.Generator().manual_seed(s.seed))
    if s.mask_features:
        adapter.silence(read_features(s.mask_features, sae.d_sae))
    tokenizer = data.load_tokenizer(model.folder)
    if tokenizer.get_vocab_size(with_added_tokens=True) > model.config.vocab_size:
        raise UserError(f"--model {s.model}: its tokenizer knows more tokens than its embedding has rows.")
    return SteeredModel(model, sae, adapter.to(s.device), s.layer), tokenizer


def read_features(path: str, d_sae: int) -> list[int]:
    """A json list of feature indices. Raises UserError for anything else."""
    try:
        features = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"--mask-features {path}: a json list of features was expected ({e}).") from e
    if not isinstance(features, list) or not all(type(k) is int and 0 <= k < d_sae for k in features):
        raise UserError(f"--mask-features {path}: a json list of whole numbers from 0 to {d_sae - 1} was expected.")
    return features


class Preferences(NamedTuple):
    pairs: list[Pair]
    eval_pairs: list[Pair]
    files: list[data.DataFile]  # that both came from
    revision: str | None  # commit of a Hub dataset


def load_data(s: Settings, tokenizer) -> Preferences:
    """Training and evaluation pairs. A branch on the Hub is resolved once, so that both come from one commit."""

    def read(source, split, revision):
        return data.load_pairs(source, tokenizer, s.max_length, s.max_prompt_length, split, revision, progress=True)

    files, commit = data.data_files(s.data, None, s.data_revision)
    pairs = read(s.data, "train", commit)
    if len(pairs) < s.batch_size:
        raise UserError(f"--data {s.data}: {len(pairs)} training pairs, fewer than --batch-size {s.batch_size}.")
    if s.eval_data is None:
        eval_pairs = read(s.data, "test", commit)
    else:  # what is given for evaluation need not call itself a test split
        more, eval_commit = data.data_files(s.eval_data)
        eval_pairs, files = read(s.eval_data, "test", eval_commit) or read(s.eval_data, None, eval_commit), files + more
    if not eval_pairs:
        print(f"{s.eval_data or s.data} has no test split: no evaluation (give --eval-data).", file=sys.stderr)
    return Preferences(pairs, eval_pairs, files, commit)


# --- what the run leaves behind -----------------------------------------------------------------------------


class Log:
    """metrics.jsonl: one object per optimiser step and per evaluation, on disk as soon as it is known."""

    def __init__(self, path: Path):
        self.file, self.rows = open(path, "w"), []

    def write(self, **row) -> None:
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def open_run(s: Settings, steered: SteeredModel, preferences: Preferences) -> Path:
    """Make the output folder and write config.json: settings, versions, hardware, hashes. Never over another run."""
    if s.out:
        out = Path(s.out)
        if (out / "metrics.jsonl").exists():
            raise UserError(f"--out {out}: holds a run already; choose another folder or remove it.")
    else:
        names = (f"{Path(s.model).name}{suffix}" for suffix in ["", *(f"-{i}" for i in range(2, 10_000))])
        out = next(p for p in map(Path("runs").joinpath, names) if not (p / "metrics.jsonl").exists())
    files = [*sorted(steered.model.folder.glob("*.safetensors")), *(f.path for f in preferences.files)]
    files += [Path(s.mask_features)] if s.mask_features else []
    packages = ("torch", "safetensors", "huggingface-hub", "tokenizers", "numpy", "pyarrow")
    config = dict(
        settings=asdict(s),
        adapter=identity(s, steered),
        sha256={str(f): sha256(f) for f in files},
        data_revision=preferences.revision,
        versions=dict(python=platform.python_version(), **{p: version(p) for p in packages}),
        hardware=torch.cuda.get_device_name(s.device) if s.device != "cpu" else f"{platform.machine()} CPU",
        threads=torch.get_num_threads(),
        code=code_revision(),
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    try:
        (out / "adapter").mkdir(parents=True, exist_ok=True)
        write_whole(out / "config.json", json.dumps(config, indent=2) + "\n")
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e}).") from e
    return out


def identity(s: Settings, steered: SteeredModel) -> dict:
    """What an adapter file says about where it belongs."""
    return dict(
        **dict(base_model=s.model, base_model_revision=steered.model.revision, layer=s.layer),
        **dict(sae=s.sae, sae_id=steered.sae.sae_id, sae_revision=steered.sae.revision, sae_sha256=steered.sae.sha256),
    )


def code_revision() -> str | None:
    """Commit of this checkout, with "+" when files differ from it; None outside git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def draw(rows: list[dict], path: Path) -> None:
    """loss.png: SimPO loss (train and eval) and L0 against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train_rows = [r for r in rows if r["split"] == "train"]
    eval_rows = [r for r in rows if r["split"] == "eval"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    top.plot([r["step"] for r in train_rows], [r["loss"] for r in train_rows], color="C0", alpha=0.5, label="train")
    top.plot([r["step"] for r in eval_rows], [r["loss"] for r in eval_rows], color="C1", marker="o", label="eval")
    top.set(ylabel="SimPO loss", ylim=(0, None))
    top.legend(frameon=False)
    bottom.plot([r["step"] for r in train_rows], [r["l0"] for r in train_rows], color="C0", alpha=0.5)
    bottom.plot([r["step"] for r in eval_rows], [r["l0"] for r in eval_rows], color="C1", marker="o")
    bottom.set(xlabel="optimiser step", ylabel="L0: features steered per position", ylim=(0, None))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_table(rows: list[dict], seconds: float, s: Settings) -> None:
    """Before and after; a fresh adapter steers about half the features, by next to nothing."""
    evals = [r for r in rows if r["split"] == "eval"]
    where, measured = ("eval", evals) if evals else ("train", rows)
    print(f"\n{'':24}{'before':>9} {'after':>9}")
    names = {"loss": "SimPO loss", "accuracy": "accuracy", "l0": "L0 per position", "l1": "L1 per position"}
    for key, name in names.items():
        print(f"{f'{where} {name}':<24}{measured[0][key]:9.3f} {measured[-1][key]:9.3f}")
    print(f"{'seconds':<33}{seconds:10.1f}")
    print(f"{'peak memory (MiB)':<33}{peak_memory(s.device) / 2**20:10.0f}")


def peak_memory(device: str) -> int:
    """Bytes: of CUDA memory on a GPU, of resident memory of the whole process on a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    train(cli.parse(Settings, presets=PRESETS, doc=__doc__))


if __name__ == "__main__":
    cli.run(main)
