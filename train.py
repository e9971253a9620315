"""Train an FSRL adapter with the SimPO loss and an L1 penalty.

    python train.py --model tiny                  # a small embedded world, under a minute on a CPU
    python train.py --layer 12 --l1 0.02          # the paper's run: Gemma-2-2B-it, UltraFeedback
    python train.py --full                        # its baseline: all weights train, without an SAE
    torchrun --nproc-per-node 8 train.py ...      # the same run on 8 GPUs; --shard for large models
    python train.py ... --out OUT --resume        # continue from the last checkpoint in OUT

--unit sets the unit of steering: a number, or `stream` for 1 % of the median norm of the residual
stream. The L1 penalty counts v in this unit, and the learning rates of biases and thresholds are
multiplied by it. The paper's unit is 1. The residual stream of Gemma 3 has about a hundred times
the norm of Gemma-2's; with `stream`, the same --l1 and --lr have about the same effect on both.

The main deviations from the paper and the authors' code (docs/paper.md lists all):

1. `loss`, in training and evaluation, is the SimPO loss alone; the penalty is reported beside it,
   and `total` is their sum.

2. The penalty is averaged over real positions; the authors' code also counts padding.

3. Logits are float32 before the log-softmax, and the residual stream is float32 between blocks.

4. Every step has exactly --batch-size pairs. The pairs that remain at the end of an epoch are left
   out of it; with shuffling, these are other pairs in each epoch.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

# OpenMP's threads spin while they wait for each other. On a shared core this takes time from the
# thread that they wait for: beside another busy process, the tiny run took 84 s with the default
# and 63 s with this limit (27 s alone). torch reads the variable when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from torch import nn

import data
import simpo
from data import Packed, Pair
from fsrl import KINDS
from policy import DEFAULTS, TINY, Policy, greedy, identity, load_preferences, new_policy, save
from runtime import cli, ranks
from runtime.cli import flag
from runtime.device import DTYPES, Device, peak_memory, resolve_device
from runtime.folder import Run, choose_out, describe, finished, holds_run, push, started_with
from runtime.outcome import Sample, summarise
from runtime.progress import progress_bar
from runtime.ranks import ALONE, Ranks
from runtime.sae_ids import default_source
from runtime.sources import UserError, check_upload, sha256
from simpo import Scores, Sums

# Value of --model -> other defaults that it changes.
PRESETS = {"tiny": dict(**TINY, lr=2e-3, threshold_lr=0.2, epochs=1, eval_every=16)}
# Settings that --resume may change, because losses and weights do not depend on them, apart from
# rounding.
FREE = {"out", "resume", "eval_every", "checkpoint_every", "device", "timeout", "shard"}
FREE |= {"tokens_per_microbatch", "samples", "push_to"}
SCHEDULES = ("cosine", "constant", "constant-with-warmup")
UNIT_PAIRS = 8  # pairs over which --unit stream measures the residual stream's norm
SAMPLE_TOKENS = 96  # limit on the tokens of an answer before and after training


@dataclass(frozen=True)
class Settings:
    model: str = flag(DEFAULTS.model, "tiny, a Hugging Face folder, or a Hub id (name@revision)")
    sae: str | None = flag(None, "tiny, a file, a folder, or a Hub id (default: the model's SAEs)")
    sae_id: str | None = flag(None, "folder in --sae (default: the layer's 65k SAE of lowest L0)")
    data: str = flag(DEFAULTS.data, "tiny, a parquet or jsonl file, a folder, or a Hub id")
    eval_data: str | None = flag(None, "data to evaluate on (default: test split of --data)")
    layer: int = flag(DEFAULTS.layer, "steer the residual stream after this block, counted from 0")
    l1: float | None = flag(None, "weight α of the L1 penalty (default: 0.02; for jumprelu 0)")
    l0: float = flag(0.0, "weight λ of the L0 penalty; only with --adapter jumprelu")
    unit: str | None = flag(None, "unit of steering, see above (default: 1; for Gemma 3 stream)")
    penalty_warmup_ratio: float = flag(0.0, "share of the steps, at the start, without penalty")
    beta: float = flag(DEFAULTS.beta, "β of the SimPO loss")
    gamma_ratio: float = flag(DEFAULTS.gamma_ratio, "ρ = γ/β of the SimPO loss")
    epochs: int = flag(2, "how often to train on each pair")
    max_steps: int | None = flag(None, "number of optimiser steps, in place of --epochs")
    lr: float | None = flag(None, "peak learning rate (default: 5e-7; with --full 2e-7)")
    threshold_lr: float | None = flag(None, "peak rate of thresholds (default: 1000 times --lr)")
    warmup_ratio: float = flag(
        0.1, "share of the steps in which the learning rate rises from 0, the first step's"
    )
    schedule: str = flag("cosine", "of the learning rate; constant has no warm-up", SCHEDULES)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm at this value; 0: do not clip")
    batch_size: int = flag(32, "pairs in each optimiser step")
    tokens_per_microbatch: int = flag(
        8192, "tokens in a forward pass; changes memory and speed only"
    )
    max_length: int = flag(DEFAULTS.max_length, "truncate when prompt + response have more tokens")
    max_prompt_length: int = flag(
        DEFAULTS.max_prompt_length, "tokens a truncated prompt keeps; a response keeps the rest"
    )
    adapter: str = flag("relu", "function from x W_aᵀ + b_a to the steering v", KINDS)
    init_adapter: str | None = flag(None, "start from this adapter: a folder or a Hub id")
    mask_features: str | None = flag(None, "json file that lists features which must never steer")
    full: bool = flag(False, "train all weights of the model, without an adapter and an SAE")
    shuffle: bool = flag(True, "shuffle the pairs in each epoch")
    seed: int = flag(0, "seed of the order of the pairs and of the initial weights")
    samples: int = flag(2, "prompts to answer before and after training; 0: none")
    dtype: str = flag("auto", "dtype of products; auto: bfloat16 on CUDA, else float32", DTYPES)
    device: str = flag("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is a GPU")
    eval_every: int = flag(200, "steps between evaluations; 0: only before and after training")
    checkpoint_every: int = flag(200, "steps between checkpoints (the last two are kept); 0: none")
    resume: bool = flag(False, "continue from the last checkpoint in --out; needs the same flags")
    shard: bool = flag(False, "under torchrun: each process holds a slice of every weight (FSDP2)")
    timeout: float = flag(30.0, "under torchrun: minutes after which a process gives up waiting")
    on_bad_row: str = flag("error", "end the run on a malformed row, or skip it", ("error", "skip"))
    out: str | None = flag(None, "folder to write (default: runs/NAME, with a number if taken)")
    push_to: str | None = flag(None, "audit, then upload adapter, card and report to OWNER/NAME")

    def __post_init__(self):
        """Fill in defaults that depend on other settings. Raises UserError for impossible ones."""
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
        for other in ("init_adapter", "mask_features", "push_to"):
            if self.full and getattr(self, other):
                raise UserError(f"--full and --{other.replace('_', '-')} exclude each other.")
        if self.resume and not self.out:
            raise UserError("--resume: name the run to go on with, --out FOLDER.")
        if self.push_to:
            check_upload(self.push_to)


# --- one step -------------------------------------------------------------------------------------


class Scorer(NamedTuple):
    """What every forward pass over pairs needs, in training and in evaluation."""

    beta: float
    gamma_ratio: float
    tokens: int  # limit on the tokens of a micro-batch
    device: Device
    ranks: Ranks = ALONE

    def score(self, model: nn.Module, packed: Packed) -> Scores:
        return simpo.score(model, packed.to(self.device.name), self.beta, self.gamma_ratio)

    def total(self, sums: Sums) -> Sums:
        """Add up the sums of all processes."""
        return Sums(*ranks.total(self.ranks, torch.stack(sums)))


class Penalty(NamedTuple):
    l1: float = 0.0  # α, weight of the mean over positions of ‖v‖₁
    l0: float = 0.0  # λ, weight of the mean over positions of ‖v‖₀

    def added(self, found: dict[str, float]) -> dict[str, float]:
        """Metrics with the columns `penalty` and `total` of metrics.jsonl added.

        A train row has the penalty of its step (none during --penalty-warmup-ratio), an eval row
        the whole one.
        """
        penalty = self.l1 * found["l1"] + self.l0 * found["l0"]
        return found | dict(penalty=penalty, total=found["loss"] + penalty)


class MicroBatch(NamedTuple):
    pairs: int  # how many pairs; 0 for a dummy
    packed: Packed
    last: bool  # the last one of the step, whose backward sends the gradients


def rank_batches(pairs: Sequence[Pair], tokens: int, who: Ranks = ALONE) -> Iterator[MicroBatch]:
    """Pack this process's share of the pairs into micro-batches of at most so many tokens.

    All ranks run the same number of micro-batches, because collectives must match; a rank that runs
    out gets a dummy pair that does not count.
    """
    shares = [[pairs[i] for i in share] for share in data.shares(pairs, who.world)]
    plans = [data.microbatches(share, tokens) for share in shares]
    share, plan = shares[who.rank], plans[who.rank]
    rounds = max(map(len, plans))
    for i in range(rounds):
        own = [share[j] for j in plan[i]] if i < len(plan) else []
        packed = data.pack_pairs(own or [Pair([0], [0], [0])])
        yield MicroBatch(len(own), packed, last=i + 1 == rounds)


def backward(model: nn.Module, pairs: Sequence[Pair], penalty: Penalty, scorer: Scorer) -> Sums:
    """Add the gradients of one whole step to the trained weights; returns sums over all processes.

        mean over pairs of SimPO + mean over positions of α ‖v‖₁ + λ ‖v‖₀

    The means are over the whole step, so that neither the packing nor the number of processes
    changes them. DDP and FSDP2 average over processes: `weight` undoes that.
    """
    sums, positions = Sums.zero(scorer.device.name), data.positions(pairs)
    with scorer.device.autocast():
        for batch in rank_batches(pairs, scorer.tokens, scorer.ranks):
            ranks.synchronises(model, batch.last)
            scores = scorer.score(model, batch.packed)
            simpo_loss = scores.losses.loss.sum() / len(pairs)
            sparsity_loss = (penalty.l1 * scores.l1 + penalty.l0 * scores.l0) / positions
            weight = scorer.ranks.world if batch.pairs else 0
            (weight * (simpo_loss + sparsity_loss)).backward()
            if batch.pairs:
                sums = sums.plus(Sums.of(scores))
    return scorer.total(sums)


def evaluate(
    model: nn.Module,
    pairs: Sequence[Pair],
    scorer: Scorer,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means over a whole evaluation set, as in an eval row of metrics.jsonl.

    pause: called after each micro-batch; it may end the run.
    """
    sums = Sums.zero(scorer.device.name)
    # Weights that FSDP2 gathers in inference mode cannot be trained afterwards.
    no_gradient = torch.inference_mode() if scorer.ranks.world == 1 else torch.no_grad()
    look = dict(unit="pair", leave=False, shown=scorer.ranks.first)
    bar = progress_bar(total=len(pairs), desc="evaluating", **look)
    with no_gradient, scorer.device.autocast(), bar:
        for batch in rank_batches(pairs, scorer.tokens, scorer.ranks):
            scores = scorer.score(model, batch.packed)
            if batch.pairs:
                sums = sums.plus(Sums.of(scores))
            bar.update(batch.pairs)
            pause()
    found = simpo.means(scorer.total(sums), len(pairs), data.positions(pairs), scorer.beta)
    tokens = sum(pair.tokens for pair in pairs)
    kept = ("loss", "accuracy", "margin", "logp_chosen", "logp_rejected", "l1", "l0")
    return {name: getattr(found, name) for name in kept} | dict(pairs=len(pairs), tokens=tokens)


def batch_indices(step: int, pairs: int, size: int, seed: int, shuffle: bool) -> list[int]:
    """The pairs of a step, counted from 0, as indices; they depend on the arguments alone."""
    epoch, k = divmod(step, pairs // size)
    order = data.epoch_order(pairs, seed, epoch, shuffle)
    return order[k * size : (k + 1) * size]


def lr_factor(step: int, steps: int, schedule: str, warmup_ratio: float) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak.

    A warm-up rises linearly from 0; "cosine" then falls to 0, the other schedules stay at 1.
    """
    warmup = 0 if schedule == "constant" else math.ceil(warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    if schedule != "cosine":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to its peak times this factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def clip(trained: nn.Module, most: float) -> float:
    """Clip the norm of the gradients at `most` (0: do not); returns the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(trained.parameters(), most or math.inf)
    if hasattr(norm, "full_tensor"):  # under --shard each process holds a slice
        norm = norm.full_tensor()
    return float(norm)


def make_optimizer(
    trained: nn.Module, lr: float, threshold_lr: float, unit: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW, with the peak learning rate of each group of parameters as its `peak_lr`.

    threshold_lr: peak learning rate of thresholds. unit: of steering; bias and thresholds are
    proportional to it, and so are their learning rates.
    """
    named = dict(trained.named_parameters())
    rates = {"bias": lr * unit, "raw_threshold": threshold_lr * unit}
    groups = [dict(params=[p for name, p in named.items() if name not in rates], peak_lr=lr)]
    groups += [dict(params=[named[name]], peak_lr=rates[name]) for name in rates if name in named]
    adam = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    return torch.optim.AdamW(groups, lr=lr, **adam)


# --- the run --------------------------------------------------------------------------------------


def train(s: Settings) -> Path:
    """Run everything, alone or as one of torchrun's processes; returns the folder written."""
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
    """Everything that a run needs, read and checked before its first step."""

    policy: Policy
    pairs: list[Pair]
    eval_pairs: list[Pair]  # empty where there is no evaluation data
    unit: float  # of steering (--unit), on rank 0
    out: Path | None  # the folder to write, on rank 0
    config: dict  # content of config.json, on rank 0


def prepare(s: Settings, device: Device, who: Ranks) -> Job:
    """Read and check what the run needs, in each process. Raises UserError for a mistake in it."""
    resume = s.resume or who.restarts > 0
    out = choose_out(s.out, Path(s.model).name, resume) if who.first else None
    recorded = DEFAULTS._replace(**{name: getattr(s, name) for name in DEFAULTS._fields})
    # A model that will be sharded is loaded on the CPU, because it may not fit one GPU.
    place = device._replace(name="cpu") if s.shard else device
    new = (s.full, s.adapter, s.init_adapter, s.mask_features, s.seed)
    policy = new_policy(recorded, place, *new)
    pairs, eval_pairs, files, *revisions = load_preferences(recorded, policy.tokenizer, who.first)
    if len(pairs) < s.batch_size:
        short = f"{len(pairs)} training pairs, fewer than --batch-size {s.batch_size}"
        raise UserError(f"--data {s.data}: {short}.")
    if not who.first:
        return Job(policy._replace(device=device), pairs, eval_pairs, 1.0, None, {})

    resumes = resume and (out / "config.json").is_file() and holds_run(out)
    began = started_with(out) if resumes else {}  # another device could round the unit otherwise
    unit = began.get("unit") or (1.0 if s.full else steering_unit(policy, s.unit, pairs))
    policy = policy._replace(device=device)
    if not eval_pairs:
        print(
            f"{s.data} has no test split, so the run evaluates nothing and cannot warn of "
            "over-training; --eval-data names pairs for both.",
            file=sys.stderr,
        )
    read = [policy.base.folder / name for name in ("config.json", "tokenizer.json")]
    read += [*sorted(policy.base.folder.glob("*.safetensors")), *(file.path for file in files)]
    read += [Path(s.mask_features)] if s.mask_features else []
    digests = {str(path): sha256(path) for path in read}
    if not s.full:
        digests |= {"sae": policy.steered.sae.sha256, **policy.steered.adapter.files}
    settings = asdict(s) | dict(device=device.name, dtype=device.dtype_name)
    config = describe(settings, digests, device.name, who.world)
    config |= dict(zip(("data_revision", "eval_data_revision"), revisions, strict=True))
    config |= dict(adapter=None if s.full else identity(policy), unit=unit)
    return Job(policy, pairs, eval_pairs, unit, out, config)


def steering_unit(policy: Policy, given: str | None, pairs: list[Pair]) -> float:
    """The unit of steering as a number. given: --unit, None for the model's default."""
    given = given or ("stream" if policy.base.config.qk_norm else "1")
    if given != "stream":
        return float(given)
    with torch.inference_mode():
        sample = pairs[:UNIT_PAIRS]
        norms = [x[packed.position > 0].norm(dim=1) for _, packed, _, x in policy.streams(sample)]
    return torch.cat(norms).median().item() / 100


def run_steps(s: Settings, job: Job, device: Device, who: Ranks) -> Path:
    """Train, evaluate and save; returns the folder written."""
    policy, pairs, eval_pairs, *_ = job
    resume = s.resume or who.restarts > 0
    model, trained = policy.model, policy.model.trained
    per_epoch = len(pairs) // s.batch_size
    steps = s.max_steps or s.epochs * per_epoch
    scorer = Scorer(s.beta, s.gamma_ratio, s.tokens_per_microbatch, device, who)

    out, unit = ranks.on_first(who, lambda: (job.out, job.unit))
    adapter = None if s.full else trained
    if adapter is not None:
        adapter.set_unit(unit, fresh=not s.init_adapter)
    wrapped = ranks.spread(model, policy.base.model.layers, adapter, s.shard, device, who)
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for p in trained.parameters()}, "exactly `trained` must learn"
    optimizer = make_optimizer(trained, s.lr, s.threshold_lr, unit)
    whole_penalty = Penalty(s.l1 / unit, s.l0)

    run = Run(out, trained, optimizer, steps, s.checkpoint_every, s.eval_every, who)
    ranks.together(who, lambda: run.open(job.config, FREE, resume))
    started = time.perf_counter()
    distinct = dict.fromkeys(tuple(pair.prompt) for pair in eval_pairs or pairs)
    prompts = [list(prompt) for prompt in distinct][: s.samples]
    before = samples(policy, prompts, who)

    def evaluate_at(step: int) -> None:
        if eval_pairs:
            metrics = evaluate(wrapped, eval_pairs, scorer, lambda: run.checkpoint(step))
            run.log("eval", step, whole_penalty.added(metrics))

    step = run.resume(resume)
    while step < steps:
        if run.evaluates(step):
            evaluate_at(step)

        step_started = time.perf_counter()
        indices = batch_indices(step, len(pairs), s.batch_size, s.seed, s.shuffle)
        batch = [pairs[i] for i in indices]
        factor = lr_factor(step, steps, s.schedule, s.warmup_ratio)
        set_learning_rate(optimizer, factor)
        penalizes = step >= s.penalty_warmup_ratio * steps
        penalty = whole_penalty if penalizes else Penalty()

        sums = backward(wrapped, batch, penalty, scorer)
        grad_norm = clip(trained, s.max_grad_norm)
        metrics = simpo.means(sums, len(batch), data.positions(batch), s.beta)
        run.stop_unless_finite(step, metrics.loss, grad_norm, indices)

        optimizer.step()
        if adapter is not None:
            adapter.project()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        seconds, tokens = time.perf_counter() - step_started, sum(pair.tokens for pair in batch)
        row = dict(
            epoch=step / per_epoch,
            **penalty.added(metrics._asdict()),
            lr=s.lr * factor,
            grad_norm=grad_norm,
            pairs=len(batch),
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            seconds=seconds,
        )
        run.log("train", step, row)
        run.checkpoint(step)

    evaluate_at(steps)
    run.close()
    after = samples(policy, prompts, who)
    asked = map(policy.tokenizer.decode, prompts)
    answers = [Sample(*texts) for texts in zip(asked, before, after, strict=True)]
    spent = time.perf_counter() - started, peak_memory(device.name)
    ranks.on_first(who, lambda: summarise(out, run.rows, answers, not s.full, *spent))
    ranks.together(who, lambda: save(out, policy, who))  # last: these files mark a run as finished
    if who.first:
        what = "model" if s.full else "adapter"
        print(f"Written to {out}: {what}/, metrics.jsonl, config.json, samples.json, loss.png")
    return out


def samples(policy: Policy, prompts: list[list[int]], who: Ranks) -> list[str]:
    """The policy's answers. Every process computes them, because --shard spreads the model."""
    total = len(prompts) * SAMPLE_TOKENS
    look = dict(unit="token", leave=False, shown=bool(who.first and total))
    with progress_bar(total=total, desc="sampling", **look) as bar:
        return [greedy(policy, prompt, SAMPLE_TOKENS, bar.update) for prompt in prompts]


def main() -> None:
    s = cli.parse(Settings, presets=PRESETS, doc=__doc__)
    out = train(s)
    if s.push_to and ranks.ranks_here().first:
        push(out, s.push_to)


if __name__ == "__main__":
    cli.run(main)
