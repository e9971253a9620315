"""Train an FSRL adapter with SimPO and an L1 penalty: the whole run, in one file.

    python train.py --model tiny                  # the embedded world, minutes on a laptop
    python train.py --layer 12 --l1 0.02          # the paper's run: Gemma-2-2B-it, GemmaScope, UltraFeedback
    python train.py --full                        # its baseline: every weight of the model trained, no SAE
    torchrun --nproc-per-node 8 train.py ...      # the same run on 8 GPUs; --shard where one cannot hold the model
    python train.py ... --out OUT --resume        # goes on where OUT's last checkpoint is

Deviations from the paper and the authors' code:
1. The headline loss, train and eval, is SimPO alone; the L1 penalty is reported beside it.
2. The penalty averages over real positions; the authors' also counts padding.
3. Logits are float32 before the log-softmax, and the residual stream is float32 throughout.
4. The pairs left over when an epoch does not divide by --batch-size are left out of it; each shuffle leaves out others.
"""

import fcntl
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

# OpenMP's threads spin for each other by default, which on a shared core keeps the one waited for from running: the
# tiny run beside another busy process takes 63 s with this, 84 s without, and 27 s alone. Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import sae as saes
import simpo
import tiny
from activations import Activations
from audit import card
from data import Pair
from fsrl import ACTIVATIONS, BANDWIDTH, PARAMETRISATIONS, Adapter, SteeredModel
from generation import decode as decoding
from model import Gemma2
from packed import Packed
from runtime import checkpoint, cli
from runtime import ranks as distributed
from runtime.cli import flag
from runtime.ranks import ALONE, Ranks
from runtime.sources import UserError, sha256, writable, write_whole

PRESETS = {  # what --model tiny changes of the defaults below
    "tiny": dict(
        sae="tiny",
        data="tiny",
        layer=tiny.LAYER,
        lr=2e-3,
        threshold_lr=0.2,
        epochs=1,
        eval_every=16,
    ),
}
BFLOAT16_PRODUCTS = (
    "avx512_bf16",
    "amx_bf16",
    "bf16",
)  # x86, x86, ARM: as torch.cpu.get_capabilities names them
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
)
TOKENIZER_FILES += ("chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Settings:
    model: str = flag("google/gemma-2-2b-it", "tiny, a Hugging Face model folder, or a Hub id")
    model_revision: str | None = flag(None, "branch, tag or commit of a Hub model")
    sae: str = flag("google/gemma-scope-2b-pt-res", "tiny, a params.npz, a folder, or a Hub id")
    sae_id: str | None = flag(
        None, "folder within --sae; unset: the layer's 65k SAE of lowest average L0"
    )
    sae_revision: str | None = flag(None, "branch, tag or commit of a Hub SAE")
    data: str = flag(
        "princeton-nlp/llama3-ultrafeedback-armorm",
        "tiny, a parquet or jsonl file, a folder, a Hub id",
    )
    eval_data: str | None = flag(None, "as --data; unset: the test split of --data")
    data_revision: str | None = flag(None, "branch, tag or commit of a Hub dataset")
    layer: int = flag(12, "steer the residual stream after this block (counted from 0)")
    l1: float | None = flag(
        None, "weight α of the L1 penalty (default: 0.02; with --adapter jumprelu 0)"
    )
    l0: float = flag(0.0, "weight λ of the L0 penalty, which --adapter jumprelu can follow")
    penalty_warmup_ratio: float = flag(0.0, "share of the steps before the penalty sets in")
    beta: float = flag(10.0, "β of SimPO")
    gamma_ratio: float = flag(0.5, "ρ = γ/β of SimPO")
    epochs: int = flag(2, "passes over the pairs")
    max_steps: int | None = flag(None, "optimiser steps; overrides --epochs")
    lr: float | None = flag(None, "peak learning rate; unset: 5e-7, with --full 2e-7")
    warmup_ratio: float = flag(0.1, "share of the steps in which the cosine schedule rises")
    schedule: str = flag(
        "cosine", "cosine (with warm-up) or constant (without)", choices=("cosine", "constant")
    )
    max_grad_norm: float = flag(1.0, "gradient norm is clipped here; 0: off")
    batch_size: int = flag(32, "pairs per optimiser step, exactly")
    tokens_per_microbatch: int = flag(
        8192, "tokens per forward pass, the memory knob; no effect on the result"
    )
    cache_activations: str | None = flag(
        None, "folder for the residual streams below the adapter, kept in --dtype"
    )
    max_length: int = flag(2048, "tokens of prompt + response, at most")
    max_prompt_length: int = flag(1800, "tokens of a truncated prompt")
    adapter: str = flag("relu", "what turns x W_aᵀ + b_a into steering", choices=ACTIVATIONS)
    threshold_parametrisation: str = flag(
        "direct", "train the thresholds or their log", choices=PARAMETRISATIONS
    )
    threshold_init: float | None = flag(
        None, "initial thresholds (default: jumprelu 0.001, soft-threshold 0)"
    )
    threshold_lr: float | None = flag(
        None, "peak learning rate of the thresholds (default: 1000 times --lr)"
    )
    bandwidth: float | None = flag(
        None, "ε of jumprelu's estimator (default: 0.05; log parametrisation 0.001)"
    )
    init_adapter: str | None = flag(None, "adapter folder (ours or the authors') to start from")
    full: bool = flag(
        False, "train every weight of the model instead of an adapter; no SAE is read"
    )
    mask_features: str | None = flag(
        None, "json list of features that never steer, as eval_ablation.py writes them"
    )
    shuffle: bool = flag(True, "a new order each epoch, from --seed; --no-shuffle: file order")
    seed: int = flag(0, "seed of the order of the pairs and of the initial weights")
    dtype: str = flag(
        "auto", "auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "float32", "bfloat16")
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA when present")
    eval_every: int = flag(200, "steps between evaluations; 0: only at start and end")
    zero: bool = flag(
        False, "under torchrun: each process keeps the optimiser's state of some weights (ZeRO-1)"
    )
    shard: bool = flag(False, "under torchrun: each process keeps a slice of every weight (FSDP2)")
    timeout: float = flag(
        30.0, "under torchrun: minutes a process waits for the others before all end"
    )
    on_bad_row: str = flag(
        "error", "what a malformed row of the data does", choices=("error", "skip")
    )
    checkpoint_every: int = flag(
        200, "steps between checkpoints, of which the newest two are kept; 0: none"
    )
    resume: bool = flag(
        False, "go on from the last checkpoint in --out; the other flags as when it was started"
    )
    out: str | None = flag(
        None, "folder to write; unset: runs/NAME of the model, with a number if taken"
    )

    def __post_init__(self):
        cli.at_least_one(self, "epochs", "batch_size", "tokens_per_microbatch", "max_steps")
        if self.lr is None:
            object.__setattr__(self, "lr", 2e-7 if self.full else 5e-7)
        for name, value in self.dependent_defaults().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # so that config.json says what the run used
        for name in ("l0", "threshold_init", "threshold_lr", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(
                    f"--{name.replace('_', '-')} {value}: must be finite and not negative."
                )
        if self.l0 and self.adapter != "jumprelu":
            raise UserError(
                f"--l0 {self.l0}: only --adapter jumprelu has a gradient for the L0 penalty."
            )
        if self.bandwidth == 0:
            raise UserError("--bandwidth 0: the estimator needs a positive width.")
        counted = ("eval_every", "checkpoint_every", "seed", "layer")
        for name in ("l1", "beta", "gamma_ratio", "lr", "max_grad_norm", "timeout", *counted):
            if not 0 <= getattr(self, name) < (2**63 if name == "seed" else math.inf):
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be finite and not negative."
                )
        for name in ("warmup_ratio", "penalty_warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: a share between 0 and 1."
                )
        exclude = dict(full=("init_adapter", "cache_activations", "mask_features", "l0"))
        exclude |= dict(shard=("zero", "cache_activations"))
        for one, others in exclude.items():
            for other in others:
                if getattr(self, one) and getattr(self, other):
                    raise UserError(f"--{one} and --{other.replace('_', '-')} exclude each other.")
        if self.full and self.adapter != "relu":
            raise UserError(f"--full and --adapter {self.adapter} exclude each other.")
        if self.adapter == "soft-threshold" and self.threshold_init and not self.init_adapter:
            raise UserError(
                f"--threshold-init {self.threshold_init}: a new soft-threshold adapter learns from 0 only."
            )
        if self.resume and not self.out:
            raise UserError("--resume: name the run to go on with, --out FOLDER.")

    def dependent_defaults(self) -> dict[str, float]:
        """What the flags that were left unset become, given the others."""
        jumprelu, log = self.adapter == "jumprelu", self.threshold_parametrisation == "log"
        defaults = {"l1": 0.0 if jumprelu else 0.02}
        if self.adapter != "relu":
            defaults |= {
                "threshold_init": 0.001 if jumprelu else 0.0,
                "threshold_lr": 1000 * self.lr,
            }
        if jumprelu:
            defaults |= {"bandwidth": 0.001 if log else BANDWIDTH}
        return defaults


# --- one step -----------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Pairs to score together: an optimiser step's, or an evaluation set."""

    pairs: list[Pair]
    indices: Sequence[int]  # of each pair in the data set, where `activations` looks it up
    activations: Activations | None = None  # the residual stream below the adapter, cached
    packed: list[tuple[list[int], Packed]] | None = (
        None  # its micro_batches, where they were made ahead
    )


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


def score(model: nn.Module, packed: Packed, s: Settings, x: Tensor | None = None) -> Scores:
    """Run a model over packed pairs: a SteeredModel, a Gemma2 (whose l1 and l0 are 0), or either within
    DistributedDataParallel. x: the residual stream below the adapter, where it is cached.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    base = inner if isinstance(inner, Gemma2) else inner.model
    if inner is base:
        hidden, l1, l0 = (
            model(packed),
            *torch.zeros(2, len(packed.tokens), device=packed.tokens.device),
        )
    else:
        hidden, l1, l0 = model(packed, x)
    losses, chosen, rejected = preference(base, hidden, packed, s)
    # Multiplied and summed, not a dot product: autocast would round that to bfloat16.
    return Scores(losses, chosen, rejected, (l1 * packed.copies).sum(), (l0 * packed.copies).sum())


def preference(
    model: Gemma2, hidden: Tensor, packed: Packed, s: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Final states [T, d] of packed pairs -> SimPO losses and mean log-probabilities, chosen and rejected, each [P]."""
    head, softcap = model.model.embed_tokens.weight, model.config.final_logit_softcapping
    if (
        s.dtype == "bfloat16"
    ):  # of float32 masters (--full) too: the head's products are the largest of all
        head = head.to(torch.bfloat16)
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


def micro_batches(batch: Batch, s: Settings, ranks: Ranks) -> Iterator[tuple[list[int], Packed]]:
    """This process's share of a batch, packed: (which of its pairs, their stream), a micro-batch at a time.

    Every process makes as many rounds as the busiest, with a pair that does not count (an empty list) where it has no
    other: what the processes do together, inside a forward or a backward, must meet.
    """
    shares = data.shares(batch.pairs, ranks.world)
    plans = [
        data.microbatches([batch.pairs[i] for i in share], s.tokens_per_microbatch)
        for share in shares
    ]
    share, plan = shares[ranks.rank], plans[ranks.rank]
    for i in range(max(map(len, plans))):
        micro = [share[j] for j in plan[i]] if i < len(plan) else []
        yield micro, data.pack_pairs([batch.pairs[j] for j in micro] or [Pair([0], [0], [0])])


def scores_by_microbatch(
    model: nn.Module, batch: Batch, s: Settings, ranks: Ranks
) -> Iterator[tuple[int, Scores]]:
    """Score this process's share of a batch a micro-batch at a time: (pairs in it, their scores). One autocast for all,
    so that a float32 master weight is cast to bfloat16 once per step. DistributedDataParallel sends gradients in the
    last round alone.
    """
    rounds = batch.packed or list(micro_batches(batch, s, ranks))
    with autocast(s):
        for i, (micro, packed) in enumerate(rounds, start=1):
            cached = batch.activations and micro
            x = (
                batch.activations([batch.indices[j] for j in micro]).to(s.device)
                if cached
                else None
            )
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = i == len(rounds)
            yield len(micro), score(model, packed.to(s.device), s, x)


def backward(
    model: nn.Module,
    batch: Batch,
    alpha: float,
    s: Settings,
    ranks: Ranks = ALONE,
    l0_weight: float = 0.0,
) -> Tensor:
    """Add the gradients of one whole step: mean SimPO over pairs + mean over positions of α ‖v‖₁ + λ ‖v‖₀.

    The weights of the means are those of the step, so that neither packing nor the number of processes matters: each
    adds its share, times their number, since DDP and FSDP2 average. Returns the step's Scores.sums over all of them.
    """
    sums, done, positions = (
        torch.zeros(7, dtype=torch.float64, device=s.device),
        0,
        data.positions(batch.pairs),
    )
    for n, scores in scores_by_microbatch(model, batch, s, ranks):
        counts = ranks.world if n else 0
        penalty = alpha * scores.l1 + l0_weight * scores.l0
        (counts * (scores.loss.sum() / len(batch.pairs) + penalty / positions)).backward()
        sums += scores.sums(s.beta) if n else 0
        done += n
    assert done == len(data.shares(batch.pairs, ranks.world)[ranks.rank])
    return distributed.total(ranks, sums)


def evaluate(
    model: nn.Module,
    batch: Batch,
    s: Settings,
    progress: bool = True,
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Means over a whole evaluation set, whatever the packing. None when stop() said so on the way."""
    sums, pairs = torch.zeros(7, dtype=torch.float64, device=s.device), batch.pairs
    # FSDP2 could not train on weights that it gathered in inference mode.
    mode = torch.inference_mode() if ranks.world == 1 else torch.no_grad()
    with (
        mode,
        tqdm(
            total=len(pairs), desc="evaluating", unit="pair", leave=False, disable=not progress
        ) as bar,
    ):
        for n, scores in scores_by_microbatch(model, batch, s, ranks):
            sums += scores.sums(s.beta) if n else 0
            bar.update(n)
            if stop():
                return None
    result = means(distributed.total(ranks, sums), len(pairs), data.positions(pairs), s.beta)
    kept = {name: result[name] for name in ("loss", "accuracy", "margin", "l1", "l0")}
    return kept | dict(pairs=len(pairs), tokens=sum(p.tokens for p in pairs))


def parameter_groups(trained: dict[str, nn.Parameter], s: Settings) -> list[dict]:
    """The trained parameters with their peak learning rates: thresholds learn at one of their own."""
    thresholds = [p for name, p in trained.items() if name.endswith("raw_threshold")]
    others = [p for name, p in trained.items() if not name.endswith("raw_threshold")]
    groups = [dict(params=others, peak_lr=s.lr), dict(params=thresholds, peak_lr=s.threshold_lr)]
    return [group for group in groups if group["params"]]


def make_optimizer(trained: list, s: Settings, ranks: Ranks = ALONE) -> torch.optim.Optimizer:
    """trained: parameters, or groups of them."""
    settings = dict(lr=s.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    if s.zero and ranks.world > 1:
        return ZeroRedundancyOptimizer(trained, torch.optim.AdamW, **settings)
    return torch.optim.AdamW(trained, **settings)


def autocast(s: Settings):
    """bfloat16 matrix products for float32 master weights; entered once per step, so that each is cast once."""
    return (
        torch.autocast(s.device.split(":")[0], torch.bfloat16)
        if s.dtype == "bfloat16"
        else nullcontext()
    )


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
    """The whole run, alone or as one of torchrun's processes; returns the folder it wrote."""
    ranks = distributed.ranks_here()
    s = resolve_device(s, ranks)
    with distributed.joined(s.device, s.timeout) as ranks:
        return _train(s, ranks)


def _train(s: Settings, ranks: Ranks) -> Path:
    out = distributed.on_first(ranks, lambda: choose_out(s, ranks))
    model, tokenizer = distributed.together(ranks, lambda: load(s))
    steered = model if isinstance(model, SteeredModel) else None
    preferences = distributed.one_by_one(
        ranks, lambda: load_data(s, tokenizer, progress=ranks.first)
    )
    pairs, eval_pairs = preferences.pairs, preferences.eval_pairs
    steps_per_epoch = len(pairs) // s.batch_size
    steps = s.max_steps or s.epochs * steps_per_epoch

    cached = s.cache_activations
    activations, eval_activations = distributed.one_by_one(
        ranks,
        lambda: [
            Activations.open(cached, steered, p, s) if cached and p else None
            for p in (pairs, eval_pairs)
        ],
    )
    eval_batch = Batch(eval_pairs, range(len(eval_pairs)), eval_activations)

    wrapped = spread(model, s, ranks)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    meant = (
        steered.adapter if steered else model
    )  # the adapter and nothing else, or with --full every weight
    assert {*map(id, trained.values())} == {*map(id, meant.parameters())}
    groups = parameter_groups(trained, s)
    grouped = sorted(id(p) for group in groups for p in group["params"])
    assert grouped == sorted(map(id, trained.values())), "the groups partition what trains"
    optimizer = make_optimizer(groups, s, ranks)

    log = distributed.together(ranks, lambda: open_run(out, s, model, preferences, ranks))
    started = time.perf_counter()
    shown = [
        list(prompt) for prompt in dict.fromkeys(tuple(p.prompt) for p in eval_pairs or pairs)
    ][:2]
    samples = [(prompt, decoding.greedy(model, tokenizer, prompt)) for prompt in shown]

    def batch_of(step: int) -> Batch:
        epoch, k = divmod(step, steps_per_epoch)
        order = data.epoch_order(len(pairs), s.seed, epoch, s.shuffle)
        indices = order[k * s.batch_size : (k + 1) * s.batch_size]
        batch = Batch([pairs[i] for i in indices], indices, activations)
        return batch._replace(packed=list(micro_batches(batch, s, ranks)))

    first = restore(out, model, trained, optimizer, log, s, ranks)
    step, saved = first, first
    # While a GPU works on a step, the next one's pairs are packed. A CPU has no time over: there a thread slows it.
    ahead = ThreadPoolExecutor(1) if s.device != "cpu" else None
    coming = ahead and ahead.submit(batch_of, step)
    stop = Interrupts(ranks)
    bar = tqdm(total=steps, initial=first, desc="training", unit="step", disable=not ranks.first)
    while (
        True
    ):  # here the state is that after `step` updates, and this is where a resumed run comes in
        stopping = stop()
        if step > saved and (stopping or s.checkpoint_every and step % s.checkpoint_every == 0):
            log.sync()
            checkpoint.save(
                out / "checkpoints", step, checkpoint.state(trained, optimizer, step), ranks
            )
            saved = step
        if stopping:
            bar.close()
            stop.leave(step, steps, out)
        if eval_pairs and (step in (0, steps) or s.eval_every and step % s.eval_every == 0):
            row = evaluate(wrapped, eval_batch, s, ranks.first, ranks, stop)
            if row is None:
                continue
            log.write(split="eval", step=step, **row)
        if step == steps:
            break

        step_started = time.perf_counter()
        batch = coming.result() if ahead else batch_of(step)
        coming = ahead and ahead.submit(batch_of, step + 1)
        tokens = sum(p.tokens for p in batch.pairs)
        alpha, l0_weight = (s.l1, s.l0) if step >= s.penalty_warmup_ratio * steps else (0.0, 0.0)
        factor = lr_factor(step, steps, s)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

        sums = backward(wrapped, batch, alpha, s, ranks, l0_weight)
        grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), s.max_grad_norm or math.inf)
        # Here the step waits for the device, for the first and only time.
        grad_norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
        row = means(sums, s.batch_size, data.positions(batch.pairs), s.beta)
        if not (math.isfinite(row["loss"]) and math.isfinite(grad_norm)):
            message = f"Step {step + 1}: loss {row['loss']}, gradient norm {grad_norm}, in pairs {batch.indices}."
            raise SystemExit(message if ranks.first else 1)
        optimizer.step()
        if steered:
            steered.adapter.project()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        seconds = time.perf_counter() - step_started
        penalty = alpha * row["l1"] + l0_weight * row["l0"]
        log.write(
            **dict(split="train", step=step, epoch=step / steps_per_epoch, **row),
            **dict(
                penalty=penalty, total=row["loss"] + penalty, lr=s.lr * factor, grad_norm=grad_norm
            ),
            **dict(
                pairs=s.batch_size,
                tokens=tokens,
                tokens_per_second=tokens / seconds,
                seconds=seconds,
            ),
        )
        shown_l0 = {} if s.full else dict(L0=f"{row['l0']:.0f}")
        bar.set_postfix(
            loss=f"{row['loss']:.3f}", acc=f"{row['accuracy']:.2f}", **shown_l0, refresh=False
        )
        bar.update()
    bar.close()
    if ahead:
        ahead.shutdown()
    stop.restore()

    distributed.together(ranks, lambda: save(out, model, s, ranks))
    after = [decoding.greedy(model, tokenizer, prompt) for prompt in shown]
    if ranks.first:
        draw(log.rows, out / "loss.png", s)
        for (prompt, before), now in zip(samples, after, strict=True):
            print(f"\n--- prompt\n{tokenizer.decode(prompt)}")
            print(f"--- before\n{before}\n--- after\n{now}")
        print_table(log.rows, time.perf_counter() - started, s)
        print(
            f"Written to {out}: {'model' if s.full else 'adapter'}/, metrics.jsonl, config.json, loss.png"
        )
    return out


def spread(model: nn.Module, s: Settings, ranks: Ranks) -> nn.Module:
    """The model over the processes, as it is to be called: a copy on each, or with --shard a slice on each."""
    if not s.shard or ranks.world == 1:
        return distributed.replicate(model.to(s.device), ranks)
    base, own = (model, None) if isinstance(model, Gemma2) else (model.model, model.adapter)
    distributed.shard(model, base.model.layers, own, s.device, getattr(torch, s.dtype))
    return model


def restore(
    out: Path, model, trained: dict, optimizer, log: "Log", s: Settings, ranks: Ranks
) -> int:
    """With --resume, load the newest whole checkpoint: the number of steps done, 0 where there is none."""
    path = checkpoint.newest(out / "checkpoints", ranks) if resumes(s, ranks) else None
    if path is None:
        if s.resume and ranks.first:
            print(f"--resume: {out} holds no checkpoint; starting at step 0.", file=sys.stderr)
        log.keep(0)
        return 0
    step = checkpoint.load(path, checkpoint.state(trained, optimizer, 0), ranks)
    checkpoint.state(trained, optimizer, step)  # Adam counts steps, too
    distributed.forget_gathered(model)
    log.keep(step)
    return step


def resumes(s: Settings, ranks: Ranks) -> bool:
    """Also what torchrun --max-restarts started again."""
    return s.resume or ranks.restarts > 0


class Interrupts:
    """SIGTERM and Ctrl-C ask the run to save and end. Called, says whether any process was asked; a second Ctrl-C ends
    it at once.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.asked = ranks, False
        self.before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _ask(self, number, frame) -> None:
        self.asked = True
        self.restore()

    def __call__(self) -> bool:
        return distributed.any_of(self.ranks, self.asked)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, step: int, steps: int, out: Path) -> None:
        self.restore()
        if self.ranks.first:
            print(
                f"Saved after step {step} of {steps}; the same command with --resume --out {out} goes on from there."
            )
        raise SystemExit(0)


def resolve_device(s: Settings, ranks: Ranks = ALONE) -> Settings:
    """Settle `auto`; of several processes, each takes the GPU of its own. Raises UserError when CUDA is asked for and
    absent.
    """
    device = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.world > 1 and device.startswith("cuda:"):
        raise UserError(
            f"--device {device}: under torchrun each process takes its own GPU; cuda was expected."
        )
    device = f"cuda:{ranks.local}" if ranks.world > 1 and device == "cuda" else device
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (":" in device and (kind == "cpu" or not index.isdigit())):
        raise UserError(f"--device {device}: auto, cpu, cuda or cuda:N was expected.")
    if kind == "cuda" and not int(index or 0) < torch.cuda.device_count():
        raise UserError(
            f"--device {device}: this machine offers {torch.cuda.device_count()} CUDA devices to torch."
        )
    dtype = dtype_on(device, s.dtype)
    if s.dtype == "bfloat16" != dtype and ranks.first:
        print(
            "--dtype bfloat16: this processor would only emulate it, far slower; float32 is used.",
            file=sys.stderr,
        )
    return replace(s, device=device, dtype=dtype)


def dtype_on(device: str, dtype: str) -> str:
    """What --dtype means there: auto is bfloat16 on CUDA and float32 on a CPU, and a processor without instructions for
    products of bfloat16, which took 30 times as long for a step, stays with float32.
    """
    if device != "cpu":
        return "bfloat16" if dtype == "auto" else dtype
    has = torch.cpu.get_capabilities()
    return "bfloat16" if dtype == "bfloat16" and any(map(has.get, BFLOAT16_PRODUCTS)) else "float32"


def load(s: Settings) -> tuple[SteeredModel | Gemma2, Tokenizer]:
    """Model, SAE and adapter -> SteeredModel (with --full the Gemma2 alone, float32, trainable), and its tokenizer.

    What will be sharded stays on the CPU until then: it need not fit one device.
    """
    dtype, device = getattr(torch, s.dtype), "cpu" if s.shard else s.device
    model = Gemma2.from_pretrained(
        s.model, torch.float32 if s.full else dtype, device, s.model_revision
    )
    tokenizer = data.load_tokenizer(model.folder)
    if tokenizer.get_vocab_size(with_added_tokens=True) > model.config.vocab_size:
        raise UserError(
            f"--model {s.model}: its tokenizer knows more tokens than its embedding has rows."
        )
    if s.full:
        model.recompute = True
        return model.requires_grad_(True), tokenizer
    sae_id = s.sae_id or saes.default_id(s.sae, s.layer, s.sae_revision)
    sae = saes.JumpReLUSAE.from_pretrained(s.sae, sae_id, dtype, device, s.sae_revision)
    how = (s.threshold_parametrisation, s.bandwidth or BANDWIDTH)
    if s.init_adapter:
        adapter = Adapter.from_pretrained(s.init_adapter, *how)
        if adapter.activation != s.adapter:
            raise UserError(
                f"--init-adapter {s.init_adapter}: a {adapter.activation} adapter, --adapter {s.adapter}."
            )
    else:
        adapter = Adapter(model.config.hidden_size, sae.d_sae, s.adapter, *how)
        adapter.init_weights(torch.Generator().manual_seed(s.seed), s.threshold_init or 0.0)
    if s.mask_features:
        adapter.silence(read_features(s.mask_features, sae.d_sae))
    return SteeredModel(model, sae, adapter.to(device), s.layer), tokenizer


def read_features(path: str, d_sae: int) -> list[int]:
    """A json list of feature indices. Raises UserError for anything else."""
    try:
        features = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(
            f"--mask-features {path}: a json list of features was expected ({e})."
        ) from e
    if not isinstance(features, list) or not all(
        type(k) is int and 0 <= k < d_sae for k in features
    ):
        raise UserError(
            f"--mask-features {path}: a json list of whole numbers from 0 to {d_sae - 1} was expected."
        )
    return features


class Preferences(NamedTuple):
    pairs: list[Pair]
    eval_pairs: list[Pair]
    files: list[data.DataFile]  # that both came from
    revision: str | None  # commit of a Hub dataset


def load_data(s: Settings, tokenizer: Tokenizer, progress: bool = True) -> Preferences:
    """Training and evaluation pairs. A branch on the Hub is resolved once, so that both come from one commit."""

    def read(source, split, revision):
        limits = s.max_length, s.max_prompt_length
        return data.load_pairs(source, tokenizer, *limits, split, revision, progress, s.on_bad_row)

    files, commit = data.data_files(s.data, None, s.data_revision)
    pairs = read(s.data, "train", commit)
    if len(pairs) < s.batch_size:
        raise UserError(
            f"--data {s.data}: {len(pairs)} training pairs, fewer than --batch-size {s.batch_size}."
        )
    if s.eval_data is None:
        eval_pairs = read(s.data, "test", commit)
    else:  # what is given for evaluation need not call itself a test split
        more, eval_commit = data.data_files(s.eval_data)
        eval_pairs, files = (
            read(s.eval_data, "test", eval_commit) or read(s.eval_data, None, eval_commit),
            files + more,
        )
    if not eval_pairs and progress:
        print(
            f"{s.eval_data or s.data} has no test split: no evaluation (give --eval-data).",
            file=sys.stderr,
        )
    return Preferences(pairs, eval_pairs, files, commit)


# --- what the run leaves behind -----------------------------------------------------------------------------


class Log:
    """metrics.jsonl: one object per optimiser step and per evaluation, written as soon as it is known, by rank 0 alone.

    Locked as long as it is open, so that two runs cannot share a folder. Raises UserError where that is so, and where
    it cannot be written.
    """

    def __init__(self, path: Path, ranks: Ranks):
        self.path, self.rows, self.file = path, [], None
        if ranks.first:
            with writing(path.parent):
                self.file = open(path, "ab+")
                lock(self.file, path.parent)

    def keep(self, step: int) -> None:
        """Only the rows that the state after `step` updates has behind it stay: not its own evaluation, which follows.

        Also cuts off what a crash tore: rows are kept up to the first that is not whole.
        """
        if self.file is None:
            return
        self.file.seek(0)
        end = 0
        for line in self.file:
            row = _row(line)
            if row is None or not (
                row["step"] < step or row["step"] == step and row["split"] == "train"
            ):
                break
            self.rows.append(row)
            end += len(line)
        missing = step - sum(row["split"] == "train" for row in self.rows)
        if missing:
            print(
                f"{self.path}: the rows of {missing} steps are lost; training goes on without them.",
                file=sys.stderr,
            )
        with writing(self.path.parent):
            self.file.truncate(end)

    def write(self, **row) -> None:
        self.rows.append(row)
        if self.file is not None:
            with writing(self.path.parent):
                self.file.write(json.dumps(row).encode() + b"\n")
                self.file.flush()

    def sync(self) -> None:
        """On disk before the checkpoint that counts on it."""
        if self.file is not None:
            with writing(self.path.parent):
                os.fsync(self.file.fileno())


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
        return (
            row
            if isinstance(row, dict) and isinstance(row.get("step"), int) and "split" in row
            else None
        )
    except ValueError:
        return None


def lock(file, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"--out {out}: another run is writing there.") from e


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written is a sentence."""
    try:
        yield
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e}).") from e


def choose_out(s: Settings, ranks: Ranks) -> Path:
    """The folder to write. Raises UserError, before anything loads, where it holds another run or cannot be made."""
    if not s.out:
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
            raise UserError(
                "--out: torchrun --max-restarts needs a folder to find the run in again."
            )
        names = (
            f"{Path(s.model).name}{suffix}" for suffix in ["", *(f"-{i}" for i in range(2, 10_000))]
        )
        return next(
            p for p in map(Path("runs").joinpath, names) if not (p / "metrics.jsonl").exists()
        )
    out = Path(s.out)
    writable(out)
    if (out / "metrics.jsonl").exists():
        if not resumes(s, ranks):
            raise UserError(
                f"--out {out}: holds a run already; choose another folder, remove it, or add --resume."
            )
        with writing(out), open(out / "metrics.jsonl", "ab") as file:
            lock(file, out)
    return out


# Settings that may differ when a run is resumed: they change neither losses nor weights, to float tolerance at most.
# (Under bfloat16 cached residual streams are rounded where computed ones are not: see same_stream.)
FREE = ("out", "resume", "eval_every", "checkpoint_every", "device", "timeout", "cache_activations")
FREE += ("zero", "shard", "tokens_per_microbatch")


def open_run(
    out: Path, s: Settings, model: SteeredModel | Gemma2, preferences: Preferences, ranks: Ranks
) -> Log:
    """Lock the output folder and write config.json: settings, versions, hardware, hashes. Never over another run.

    A run that is resumed keeps its config.json. Raises UserError where its settings or files were others.
    """
    if not ranks.first:
        return Log(out / "metrics.jsonl", ranks)
    base = model if isinstance(model, Gemma2) else model.model
    files = [*sorted(base.folder.glob("*.safetensors")), *(f.path for f in preferences.files)]
    files += [Path(s.mask_features)] if s.mask_features else []
    packages = ("torch", "safetensors", "huggingface-hub", "tokenizers", "numpy", "pyarrow")
    config = dict(
        settings=asdict(s),
        adapter=None if s.full else identity(s, model),
        sha256={str(f): sha256(f) for f in files},
        data_revision=preferences.revision,
        versions=dict(python=platform.python_version(), **{p: version(p) for p in packages}),
        hardware=torch.cuda.get_device_name(s.device)
        if s.device != "cpu"
        else f"{platform.machine()} CPU",
        processes=ranks.world,
        threads=torch.get_num_threads(),
        code=code_revision(),
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    with writing(out):
        (out / ("model" if s.full else "adapter")).mkdir(parents=True, exist_ok=True)
    log = Log(out / "metrics.jsonl", ranks)
    if resumes(s, ranks) and (out / "config.json").exists():
        _same_run(out, config)
    else:
        with writing(out):
            write_whole(out / "config.json", json.dumps(config, indent=2) + "\n")
    return log


def _same_run(out: Path, config: dict) -> None:
    try:
        before = json.loads((out / "config.json").read_text())
        theirs, hashes = dict(before["settings"]), dict(before["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{out}/config.json: not the config.json of a run ({e!r}).") from e
    for name, value in config["settings"].items():
        if name not in FREE and theirs.get(name) != value:
            flag = name.replace("_", "-")
            raise UserError(
                f"--resume: {out} was started with --{flag} {theirs.get(name)}, now it is {value}."
            )
    if not same_stream(theirs, config["settings"]):
        raise UserError(
            f"--resume: under bfloat16 {out} cannot change between cached and computed activations."
        )
    changed = sorted(name for name in config["sha256"].items() ^ hashes.items())
    if changed:
        raise UserError(f"--resume: {changed[0][0]} is not the file that {out} was started with.")


def same_stream(a: dict, b: dict) -> bool:
    """Whether two runs' settings read the same residual stream, cached or computed."""
    return b["dtype"] != "bfloat16" or bool(a.get("cache_activations")) == bool(
        b["cache_activations"]
    )


def save(out: Path, model: SteeredModel | Gemma2, s: Settings, ranks: Ranks) -> None:
    """OUT/adapter, or with --full OUT/model: float32 weights and the tokenizer's files, whole or not at all."""
    if isinstance(model, SteeredModel):
        with distributed.whole(model.adapter):
            if ranks.first:
                with writing(out):
                    model.adapter.save_pretrained(out / "adapter", identity(s, model))
                    card.write_card(out)
        return
    state = distributed.gather(model, ranks)
    if ranks.first:
        part = out / "model.part"
        with writing(out):
            shutil.rmtree(part, ignore_errors=True)
            model.save_pretrained(part, state)
            for path in model.folder.iterdir():
                if path.name in TOKENIZER_FILES:
                    shutil.copyfile(path, part / path.name)
            shutil.rmtree(out / "model", ignore_errors=True)
            os.replace(part, out / "model")


def identity(s: Settings, steered: SteeredModel) -> dict:
    """What an adapter file says about where it belongs."""
    return dict(
        **dict(base_model=s.model, base_model_revision=steered.model.revision, layer=s.layer),
        **dict(
            sae=s.sae,
            sae_id=steered.sae.sae_id,
            sae_revision=steered.sae.revision,
            sae_sha256=steered.sae.sha256,
        ),
    )


def code_revision() -> str | None:
    """Commit of this checkout, with "+" when files differ from it; None outside git."""
    command = [
        "git",
        "-C",
        str(Path(__file__).resolve().parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def draw(rows: list[dict], path: Path, s: Settings) -> None:
    """loss.png: SimPO loss (train and eval) and L0 (with --full, where nothing is steered, accuracy) against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    key, name = ("accuracy", "accuracy") if s.full else ("l0", "L0: features steered per position")
    train_rows = [r for r in rows if r["split"] == "train"]
    eval_rows = [r for r in rows if r["split"] == "eval"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    top.plot(
        [r["step"] for r in train_rows],
        [r["loss"] for r in train_rows],
        color="C0",
        alpha=0.5,
        label="train",
    )
    top.plot(
        [r["step"] for r in eval_rows],
        [r["loss"] for r in eval_rows],
        color="C1",
        marker="o",
        label="eval",
    )
    top.set(ylabel="SimPO loss", ylim=(0, None))
    top.legend(frameon=False)
    bottom.plot(
        [r["step"] for r in train_rows], [r[key] for r in train_rows], color="C0", alpha=0.5
    )
    bottom.plot([r["step"] for r in eval_rows], [r[key] for r in eval_rows], color="C1", marker="o")
    bottom.set(xlabel="optimiser step", ylabel=name, ylim=(0, None))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_table(rows: list[dict], seconds: float, s: Settings) -> None:
    """Before and after; a fresh adapter steers about half the features, by next to nothing."""
    evals = [r for r in rows if r["split"] == "eval"]
    where, measured = ("eval", evals) if evals else ("train", rows)
    print(f"\n{'':24}{'before':>9} {'after':>9}")
    names = {"loss": "SimPO loss", "accuracy": "accuracy"}
    names |= {} if s.full else {"l0": "L0 per position", "l1": "L1 per position"}
    for key, name in names.items():
        print(f"{f'{where} {name}':<24}{measured[0][key]:9.3f} {measured[-1][key]:9.3f}")
    print(f"{'seconds':<33}{seconds:10.1f}")
    print(f"{'peak memory (MiB)':<33}{peak_memory(s.device) / 2**20:10.0f}")


def peak_memory(device: str) -> int:
    """Bytes: of CUDA memory on a GPU, of resident memory of the whole process on a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def main() -> None:
    train(cli.parse(Settings, presets=PRESETS, doc=__doc__))


if __name__ == "__main__":
    cli.run(main)
