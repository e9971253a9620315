"""A training run in memory: the steps of train.py without its folder, for experiments that make
many small ones.
"""

from collections.abc import Callable, Sequence

import torch

import train
from data import Pair
from fsrl import Adapter, SteeredModel
from policy import DEFAULTS, TINY, Policy, new_policy
from runtime.device import resolve_device
from runtime.progress import progress_bar


def tiny_policy() -> Policy:
    """The embedded world's model and SAE with an adapter that steers nothing, float32 on the
    CPU.
    """
    run = DEFAULTS._replace(model="tiny", **TINY)
    return new_policy(run, resolve_device("cpu", "float32"))


def fresh(policy: Policy, kind: str = "relu", bandwidth: float | None = None, seed: int = 0):
    """The same frozen model and SAE with a new adapter -> Policy. bandwidth: see Adapter."""
    old = policy.steered
    adapter = Adapter(policy.base.config.hidden_size, old.sae.d_sae, kind, bandwidth)
    adapter.init_weights(torch.Generator().manual_seed(seed))
    return policy._replace(model=SteeredModel(old.model, old.sae, adapter, old.layer))


def scorer_of(policy: Policy, s: train.Settings) -> train.Scorer:
    """How pairs are scored under these settings."""
    return train.Scorer(s.beta, s.gamma_ratio, s.tokens_per_microbatch, policy.device)


def fit(
    policy: Policy,
    pairs: Sequence[Pair],
    s: train.Settings,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train the adapter of `policy`. Of the settings, those of the optimiser, the loss and the
    order of the pairs count. after_step: called with the number of steps made, after each.
    """
    adapter, scorer = policy.steered.adapter, scorer_of(policy, s)
    optimizer = train.make_optimizer(adapter, s.lr, s.threshold_lr)
    steps = s.max_steps or s.epochs * (len(pairs) // s.batch_size)
    penalty = train.Penalty(s.l1, s.l0)
    for step in progress_bar(range(steps), desc="training", unit="step", leave=False):
        indices = train.batch_indices(step, len(pairs), s.batch_size, s.seed, s.shuffle)
        factor = train.lr_factor(step, steps, s.schedule, s.warmup_ratio)
        train.set_learning_rate(optimizer, factor)

        train.backward(policy.model, [pairs[i] for i in indices], penalty, scorer)
        train.clip(adapter, s.max_grad_norm)
        optimizer.step()
        adapter.project()
        optimizer.zero_grad(set_to_none=True)
        if after_step:
            after_step(step + 1)
