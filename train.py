"""Train an FSRL adapter with SimPO and an L1 penalty: settings, step, loop.

    python train.py --model tiny                  # the embedded world, minutes on a laptop
    python train.py --layer 12 --l1 0.02          # the paper's run: Gemma-2-2B-it, UltraFeedback
    python train.py --full                        # its baseline: every weight trained, no SAE
    torchrun --nproc-per-node 8 train.py ...      # the same run on 8 GPUs; --shard for large models
    python train.py ... --out OUT --resume        # goes on where OUT's last checkpoint is

--unit is the size of steering that counts as 1 in --l1 and in the learning rate of biases and
thresholds: a number, or `stream` for 1 % of the residual stream's median norm. The paper's is 1.
Streams of Gemma 3 are a hundred times as long as Gemma-2's, so that in their own unit the same --l1
and --lr mean about the same.

Deviations from the paper and the authors' code (all of them: docs/paper.md):

1. The headline loss, train and eval, is SimPO alone; the L1 penalty is reported beside it, and
   `total` is their sum.

2. The penalty averages over real positions; the authors' also counts padding.

3. Logits are float32 before the log-softmax, and the residual stream is float32 throughout.

4. An epoch whose pairs do not divide by --batch-size leaves the rest out; each shuffle leaves out
   others.
"""

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

# OpenMP's threads spin for each other by default, which on a shared core keeps the one waited for
# from running: the tiny run beside another busy process takes 63 s with this, 84 s without, and 27
# s alone. Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from torch import nn
from tqdm import tqdm

import data
import simpo
from data import Packed, Pair
from fsrl import KINDS, Unsteered
from policy import DEFAULTS, TINY, Policy, greedy, identity, load_preferences, new_policy, save
from runtime import cli, ranks
from runtime.cli import flag
from runtime.device import DTYPES, Device, peak_memory, resolve_device
from runtime.folder import Run, choose_out, describe, draw_loss, finished, print_table
from runtime.messages import shown
from runtime.ranks import ALONE, Ranks
from runtime.sources import UserError, sha256
from sae import default_source
from simpo import Scores, Sums

# What --model tiny changes of the defaults below.
PRESETS = {"tiny": dict(**TINY, lr=2e-3, threshold_lr=0.2, epochs=1, eval_every=16)}
# Settings that may differ when a run is resumed: they change neither losses nor weights, to float
# tolerance at most.
FREE = {"out", "resume", "eval_every", "checkpoint_every", "device", "timeout", "shard"}
FREE |= {"tokens_per_microbatch", "samples"}
SCHEDULES = ("cosine", "constant", "constant-with-warmup")
UNIT_PAIRS = 8  # that the stream's norm is taken from
SAMPLE_TOKENS = 96  # of an answer before or after training, at most


@dataclass(frozen=True)
class Settings:
    model: str = flag(DEFAULTS.model, "tiny, a Hugging Face folder, or a Hub id (name@revision)")
    sae: str | None = flag(None, "tiny, a file, a folder, or a Hub id; unset: --model's GemmaScope")
    sae_id: str | None = flag(None, "folder within --sae; unset: the layer's 65k SAE of lowest L0")
    data: str = flag(DEFAULTS.data, "tiny, a parquet or jsonl file, a folder, or a Hub id")
    eval_data: str | None = flag(None, "as --data; unset: the test split of --data")
    layer: int = flag(DEFAULTS.layer, "steer the residual stream after this block (counted from 0)")
    l1: float | None = flag(None, "weight α of the L1 penalty (default: 0.02; jumprelu: 0)")
    l0: float = flag(0.0, "weight λ of the L0 penalty, for --adapter jumprelu")
    unit: str | None = flag(None, "of steering, see above; unset: 1, of Gemma 3 stream")
    penalty_warmup_ratio: float = flag(0.0, "share of the steps before the penalty sets in")
    beta: float = flag(DEFAULTS.beta, "β of SimPO")
    gamma_ratio: float = flag(DEFAULTS.gamma_ratio, "ρ = γ/β of SimPO")
    epochs: int = flag(2, "passes over the pairs")
    max_steps: int | None = flag(None, "optimiser steps; overrides --epochs")
    lr: float | None = flag(None, "peak learning rate; unset: 5e-7, with --full 2e-7")
    threshold_lr: float | None = flag(None, "that of thresholds (default: 1000 times --lr)")
    warmup_ratio: float = flag(0.1, "share of the steps in which the learning rate rises")
    schedule: str = flag("cosine", "of the learning rate; constant: without a rise", SCHEDULES)
    max_grad_norm: float = flag(1.0, "gradient norm is clipped here; 0: off")
    batch_size: int = flag(32, "pairs per optimiser step, exactly")
    tokens_per_microbatch: int = flag(8192, "tokens a forward pass: memory, not the result")
    max_length: int = flag(DEFAULTS.max_length, "tokens of prompt + response, at most")
    max_prompt_length: int = flag(DEFAULTS.max_prompt_length, "tokens of a truncated prompt")
    adapter: str = flag("relu", "what turns x W_aᵀ + b_a into steering", KINDS)
    init_adapter: str | None = flag(None, "adapter folder (ours or the authors') to start from")
    mask_features: str | None = flag(None, "json list of features that never steer")
    full: bool = flag(False, "train every weight of the model instead of an adapter, without SAE")
    shuffle: bool = flag(True, "a new order each epoch, from --seed; --no-shuffle: file order")
    seed: int = flag(0, "seed of the order of the pairs and of the initial weights")
    samples: int = flag(2, "prompts answered before and after training; 0: none")
    dtype: str = flag("auto", "auto: bfloat16 on CUDA, float32 on CPU", DTYPES)
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA when present")
    eval_every: int = flag(200, "steps between evaluations; 0: only at start and end")
    checkpoint_every: int = flag(200, "steps between checkpoints (two are kept); 0: none")
    resume: bool = flag(False, "go on from the last checkpoint in --out, under the same flags")
    shard: bool = flag(False, "under torchrun: each process keeps a slice of every weight (FSDP2)")
    timeout: float = flag(30.0, "under torchrun: minutes to wait for the others before all end")
    on_bad_row: str = flag("error", "what a malformed row of the data does", ("error", "skip"))
    out: str | None = flag(None, "folder to write; unset: runs/NAME, with a number if taken")

    def __post_init__(self):
        """Fill in defaults that depend on others; refuse impossible values and combinations."""
        jumprelu = self.adapter.startswith("jumprelu")
        lr = (2e-7 if self.full else 5e-7) if self.lr is None else self.lr
        defaults = dict(lr=lr, l1=0.0 if jumprelu else 0.02, threshold_lr=1000 * lr)
        if not (self.sae or self.full):
            defaults["sae"] = default_source(self.model)
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # so that config.json says what the run used

        cli.at_least(self, 1, "epochs", "batch_size", "tokens_per_microbatch", "max_steps")
        cli.at_least(self, 0, "l1", "l0", "beta", "gamma_ratio", "lr", "threshold_lr")
        cli.at_least(self, 0, "max_grad_norm", "timeout", "eval_every", "checkpoint_every")
        cli.at_least(self, 0, "seed", "layer", "samples")
        if self.unit not in (None, "stream"):
            object.__setattr__(self, "unit", str(cli.number("unit", self.unit)))
        cli.at_least(self, 0, "warmup_ratio", "penalty_warmup_ratio", most=1)
        if self.l0 and not jumprelu:
            raise UserError(f"--l0 {self.l0}: only --adapter jumprelu can follow an L0 penalty.")
        if self.full and self.adapter != "relu":
            raise UserError(f"--full and --adapter {self.adapter} exclude each other.")
        for other in ("init_adapter", "mask_features"):
            if self.full and getattr(self, other):
                raise UserError(f"--full and --{other.replace('_', '-')} exclude each other.")
        if self.resume and not self.out:
            raise UserError("--resume: name the run to go on with, --out FOLDER.")


# --- one step -------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """How pairs are scored: what a step and an evaluation have in common."""

    beta: float
    gamma_ratio: float
    tokens: int  # of a micro-batch
    device: Device
    ranks: Ranks = ALONE

    def score(self, model: nn.Module, packed: Packed) -> Scores:
        return simpo.score(model, packed.to(self.device.name), self.beta, self.gamma_ratio)

    def total(self, sums: Sums) -> Sums:
        return Sums(*ranks.total(self.ranks, torch.stack(sums)))


class Penalty(NamedTuple):
    l1: float = 0.0  # α, weight of the mean over positions of ‖v‖₁
    l0: float = 0.0  # λ, weight of that of ‖v‖₀

    def added(self, found: dict[str, float]) -> dict[str, float]:
        """Metrics with penalty and total, as metrics.jsonl has them."""
        penalty = self.l1 * found["l1"] + self.l0 * found["l0"]
        return found | dict(penalty=penalty, total=found["loss"] + penalty)


class MicroBatch(NamedTuple):
    pairs: int  # that count
    packed: Packed
    last: bool  # of this process's, whose backward sends the gradients


def micro_batches(pairs: Sequence[Pair], tokens: int, who: Ranks = ALONE) -> list[MicroBatch]:
    """This process's share of some pairs, packed into micro-batches of at most so many tokens.

    All ranks run the same number of micro-batches, because collectives must match; a rank that runs
    out gets a dummy pair that does not count.
    """
    shares = data.shares(pairs, who.world)
    plans = [data.microbatches([pairs[i] for i in share], tokens) for share in shares]
    share, plan = shares[who.rank], plans[who.rank]
    rounds = max(map(len, plans))
    found = []
    for i in range(rounds):
        chosen = [pairs[share[j]] for j in plan[i]] if i < len(plan) else []
        packed = data.pack_pairs(chosen or [Pair([0], [0], [0])])
        found.append(MicroBatch(len(chosen), packed, i + 1 == rounds))
    return found


def backward(model: nn.Module, pairs: Sequence[Pair], penalty: Penalty, how: Pass) -> Sums:
    """Add the gradients of one whole step; returns the sums over all processes.

        mean over pairs of SimPO + mean over positions of α ‖v‖₁ + λ ‖v‖₀

    The means are those of the whole step, so that neither packing nor the number of processes
    matters: each process adds its share, times their number, since DDP and FSDP2 average.
    """
    sums, positions = Sums.zero(how.device.name), data.positions(pairs)
    with how.device.autocast():
        for batch in micro_batches(pairs, how.tokens, how.ranks):
            ranks.synchronises(model, batch.last)
            scores = how.score(model, batch.packed)
            simpo_loss = scores.losses.loss.sum() / len(pairs)
            sparsity_loss = (penalty.l1 * scores.l1 + penalty.l0 * scores.l0) / positions
            weight = how.ranks.world if batch.pairs else 0
            (weight * (simpo_loss + sparsity_loss)).backward()
            if batch.pairs:
                sums = sums.plus(Sums.of(scores))
    return how.total(sums)


def evaluate(
    model: nn.Module, pairs: Sequence[Pair], how: Pass, pause: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Means over a whole evaluation set, whatever the packing.

    pause: called after each micro-batch; it may end the run.
    """
    sums = Sums.zero(how.device.name)
    # FSDP2 could not train on weights that it gathered in inference mode.
    no_gradient = torch.inference_mode() if how.ranks.world == 1 else torch.no_grad()
    shown = dict(unit="pair", leave=False, disable=not how.ranks.first)
    bar = tqdm(total=len(pairs), desc="evaluating", **shown)
    with no_gradient, how.device.autocast(), bar:
        for batch in micro_batches(pairs, how.tokens, how.ranks):
            scores = how.score(model, batch.packed)
            if batch.pairs:
                sums = sums.plus(Sums.of(scores))
            bar.update(batch.pairs)
            pause()
    found = simpo.means(how.total(sums), len(pairs), data.positions(pairs), how.beta)
    tokens = sum(pair.tokens for pair in pairs)
    kept = ("loss", "accuracy", "margin", "l1", "l0")
    return {name: getattr(found, name) for name in kept} | dict(pairs=len(pairs), tokens=tokens)


def batch_indices(step: int, pairs: int, size: int, seed: int, shuffle: bool) -> list[int]:
    """Which pairs the step after `step` updates takes: a function of its arguments alone."""
    epoch, k = divmod(step, pairs // size)
    order = data.epoch_order(pairs, seed, epoch, shuffle)
    return order[k * size : (k + 1) * size]


def lr_factor(step: int, steps: int, schedule: str, warmup_ratio: float) -> float:
    """Share of the peak learning rate at step 0, 1, ...; a warm-up rises linearly from 0."""
    warmup = 0 if schedule == "constant" else math.ceil(warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    if schedule != "cosine":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def clip(trained: nn.Module, most: float) -> float:
    """Scale the gradients down to norm `most` (0: leave them); returns the norm that they had."""
    norm = nn.utils.clip_grad_norm_(trained.parameters(), most or math.inf)
    if hasattr(norm, "full_tensor"):  # in slices, under --shard
        norm = norm.full_tensor()
    return float(norm)


def make_optimizer(
    trained: nn.Module, lr: float, threshold_lr: float, unit: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW. Each group keeps its peak learning rate: thresholds learn at one of their own.

    unit: of steering, which an adapter's bias and thresholds are measured in.
    """
    named = dict(trained.named_parameters())
    own = {"bias": lr * unit, "raw_threshold": threshold_lr * unit}
    groups = [dict(params=[p for name, p in named.items() if name not in own], peak_lr=lr)]
    groups += [dict(params=[named[name]], peak_lr=own[name]) for name in own if name in named]
    how = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    return torch.optim.AdamW(groups, lr=lr, **how)


def throughput(batch: Sequence[Pair], seconds: float) -> dict[str, float]:
    tokens = sum(pair.tokens for pair in batch)
    speed = dict(tokens_per_second=tokens / seconds, seconds=seconds)
    return dict(pairs=len(batch), tokens=tokens, **speed)


# --- the run --------------------------------------------------------------------------------------


def train(s: Settings) -> Path:
    """The whole run, alone or as one of torchrun's processes; returns the folder it wrote."""
    here = ranks.ranks_here()
    if s.resume and finished(Path(s.out)):
        if here.first:
            print(f"--resume: the run in {s.out} is finished; nothing is left to do.")
        return Path(s.out)
    device = resolve_device(s.device, s.dtype, here)
    with ranks.joined(device.name, s.timeout) as who:
        job = ranks.together(who, lambda: prepare(s, device, who))
        return run_steps(s, job, device, who)


class Job(NamedTuple):
    """What a run needs, read and checked."""

    policy: Policy
    pairs: list[Pair]
    eval_pairs: list[Pair]  # empty where there is no evaluation data
    unit: float  # of steering
    out: Path | None  # the folder to write; rank 0 alone knows it
    config: dict  # config.json, on rank 0


def prepare(s: Settings, device: Device, who: Ranks) -> Job:
    """Everything that a person's mistake can spoil, before the first step. Each process reads."""
    resume = s.resume or who.restarts > 0
    out = choose_out(s.out, Path(s.model).name, resume) if who.first else None
    recorded = DEFAULTS._replace(**{name: getattr(s, name) for name in DEFAULTS._fields})
    # What will be sharded stays on the CPU until then: it need not fit one device.
    place = device._replace(name="cpu") if s.shard else device
    new = (s.full, s.adapter, s.init_adapter, s.mask_features, s.seed)
    policy = new_policy(recorded, place, *new)
    pairs, eval_pairs, files, revision = load_preferences(recorded, policy.tokenizer, who.first)
    if len(pairs) < s.batch_size:
        short = f"{len(pairs)} training pairs, fewer than --batch-size {s.batch_size}"
        raise UserError(f"--data {s.data}: {short}.")
    unit = 1.0 if s.full else steering_unit(policy, s.unit, pairs)
    if not s.init_adapter and not s.full:
        policy.steered.adapter.rescale(unit)
    policy = policy._replace(device=device)
    if not who.first:
        return Job(policy, pairs, eval_pairs, unit, None, {})

    if not eval_pairs:
        source = s.eval_data or s.data
        print(f"{source} has no test split: no evaluation (give --eval-data).", file=sys.stderr)
    read = [*sorted(policy.base.folder.glob("*.safetensors")), *(file.path for file in files)]
    read += [Path(s.mask_features)] if s.mask_features else []
    digests = {str(path): sha256(path) for path in read}
    if not s.full:
        digests |= {"sae": policy.steered.sae.sha256, **policy.steered.adapter.files}
    settings = asdict(s) | dict(device=device.name, dtype=device.dtype_name)
    config = describe(settings, digests, device.name, who.world)
    config |= dict(adapter=None if s.full else identity(policy), data_revision=revision, unit=unit)
    return Job(policy, pairs, eval_pairs, unit, out, config)


def steering_unit(policy: Policy, given: str | None, pairs: list[Pair]) -> float:
    """What --unit means for this model: a number, or 1 % of the stream's median norm."""
    given = given or ("stream" if policy.base.config.qk_norm else "1")
    if given != "stream":
        return float(given)
    with torch.inference_mode():
        sample = pairs[:UNIT_PAIRS]
        norms = [x[packed.position > 0].norm(dim=1) for _, packed, _, x in policy.streams(sample)]
    return torch.cat(norms).median().item() / 100


def run_steps(s: Settings, job: Job, device: Device, who: Ranks) -> Path:
    """The optimiser steps, with what is measured around them."""
    policy, pairs, eval_pairs, *_ = job
    model, trained = policy.model, policy.model.trained
    per_epoch = len(pairs) // s.batch_size
    steps = s.max_steps or s.epochs * per_epoch
    how = Pass(s.beta, s.gamma_ratio, s.tokens_per_microbatch, device, who)

    adapter = None if s.full else trained
    wrapped = ranks.spread(model, policy.base.model.layers, adapter, s.shard, device, who)
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for p in trained.parameters()}, "exactly `trained` learns"
    optimizer = make_optimizer(trained, s.lr, s.threshold_lr, job.unit)
    whole_penalty = Penalty(s.l1 / job.unit, s.l0)

    out = ranks.on_first(who, lambda: job.out)
    run = Run(out, trained, optimizer, steps, s.checkpoint_every, s.eval_every, who)
    ranks.together(who, lambda: run.open(job.config, FREE))
    started = time.perf_counter()
    distinct = dict.fromkeys(tuple(pair.prompt) for pair in eval_pairs or pairs)
    prompts = [list(prompt) for prompt in distinct][: s.samples]
    before = samples(policy, prompts, who)

    step = run.resume(s.resume or who.restarts > 0)
    while step < steps:
        if eval_pairs and run.evaluates(step):
            pause = functools.partial(run.checkpoint, step)
            measured = evaluate(wrapped, eval_pairs, how, pause)
            run.log("eval", step, whole_penalty.added(measured))

        step_started = time.perf_counter()
        indices = batch_indices(step, len(pairs), s.batch_size, s.seed, s.shuffle)
        batch = [pairs[i] for i in indices]
        factor = lr_factor(step, steps, s.schedule, s.warmup_ratio)
        set_learning_rate(optimizer, factor)
        penalizes = step >= s.penalty_warmup_ratio * steps
        penalty = whole_penalty if penalizes else Penalty()

        sums = backward(wrapped, batch, penalty, how)
        grad_norm = clip(trained, s.max_grad_norm)
        found = simpo.means(sums, len(batch), data.positions(batch), s.beta)
        run.stop_unless_finite(step, found.loss, grad_norm, indices)

        optimizer.step()
        if adapter is not None:
            adapter.project()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        seconds = time.perf_counter() - step_started
        row = dict(epoch=step / per_epoch, **penalty.added(found._asdict()))
        row |= dict(lr=s.lr * factor, grad_norm=grad_norm, **throughput(batch, seconds))
        run.log("train", step, row)
        run.checkpoint(step)

    if eval_pairs:
        pause = functools.partial(run.checkpoint, steps)
        measured = evaluate(wrapped, eval_pairs, how, pause)
        run.log("eval", steps, whole_penalty.added(measured))
    run.close()
    if who.first:
        draw_loss(run.rows, out / "loss.png", "accuracy" if s.full else "l0")
    ranks.together(who, lambda: save(out, policy, who))  # last: it says that the run is finished
    after = samples(policy, prompts, who)
    if who.first:
        show(run, policy, prompts, before, after, time.perf_counter() - started)
    return out


def samples(policy: Policy, prompts: list[list[int]], who: Ranks) -> list[str]:
    """What the policy answers now; every process computes it, since --shard spreads the model."""
    total = len(prompts) * SAMPLE_TOKENS
    shown = dict(unit="token", leave=False, disable=not (who.first and total))
    with tqdm(total=total, desc="sampling", **shown) as bar:
        return [greedy(policy, prompt, SAMPLE_TOKENS, bar.update) for prompt in prompts]


def show(
    run: Run,
    policy: Policy,
    prompts: list[list[int]],
    before: list[str],
    after: list[str],
    seconds: float,
) -> None:
    """The samples and the metrics before and after."""
    names, what = {"loss": "SimPO loss", "accuracy": "accuracy"}, "model"
    if not isinstance(policy.model, Unsteered):
        names |= {"l0": "L0 per position", "l1": "L1 per position"}
        what = "adapter"
    for prompt, *answers in zip(prompts, before, after, strict=False):
        texts = [policy.tokenizer.decode(prompt), *answers]
        print("\n--- prompt\n{}\n--- before\n{}\n--- after\n{}".format(*map(shown, texts)))
    print_table(run.rows, names, seconds, peak_memory(policy.device.name))
    print(f"Written to {run.out}: {what}/, metrics.jsonl, config.json, loss.png")


def main() -> None:
    train(cli.parse(Settings, presets=PRESETS, doc=__doc__))


if __name__ == "__main__":
    cli.run(main)
