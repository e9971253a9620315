"""Policies that are trained on a known cause, or made to disagree with the data that they saw.

A policy is trained once and kept in a folder: its adapter after the last step and after each of
DOSES.
"""

import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

import train
from data import Pair
from experiments.fitting import fit, fresh
from fsrl import Adapter, SteeredModel
from labels import Labels
from policy import Policy
from tiny import measure, world

Cause = str | dict[str, float]  # a name in world.CAUSES, or a mix
DOSES = (1, 2, 4, 8, 16)  # steps after which an adapter is kept, beside the last
SILENCED = "style"  # the category whose features Recipe.silenced switches off


class Recipe(NamedTuple):
    """How a policy is made, and the name that the tables give it."""

    name: str
    cause: Cause
    swapped: float = 0.0  # share of the training pairs whose two responses change places
    silenced: bool = False  # features labelled SILENCED by any label file never steer
    trained: bool = True  # False: learning rate 0
    steps: int | None = None  # one of DOSES: stopped after so many steps; None: the last


MIXES = ({"style": 1, "honesty": 3}, {"style": 1, "honesty": 1}, {"style": 3, "honesty": 1})
CAUSES = tuple(Recipe(cause, cause) for cause in world.CAUSES)
MIXED = tuple(Recipe(" : ".join(f"{w} {c}" for c, w in mix.items()), mix) for mix in MIXES)
# What the policy learned and what the data show are not the same.
DISAGREEING = (
    Recipe("shuffled style", "style", swapped=0.5),
    Recipe("style, 10 % swapped", "style", swapped=0.1),
    Recipe("style, rate 0", "style", trained=False),
    Recipe("1 style : 1 honesty, style silenced", MIXES[1], silenced=True),
)
DOSED = tuple(
    Recipe(f"{cause}, {n} step{'s' * (n > 1)}", cause, steps=n)
    for cause in ("style", "honesty")
    for n in DOSES
)


def tokenise(
    tokenizer: Tokenizer, pairs: list[world.TextPair]
) -> tuple[list[Pair], list[list[int]]]:
    """Token ids as data.load_pairs gives them; and of every response token, chosen before rejected,
    the index in measure.NAMES of the span that it stands in.
    """
    result, names = [], []
    for pair in pairs:
        ids, owners = [], []
        sides = (pair.chosen.prompt_spans, pair.chosen.response_spans, pair.rejected.response_spans)
        for spans in sides:
            text = "".join(span.text for span in spans)
            encoding = tokenizer.encode(text, add_special_tokens=False)
            at = world.span_of_characters(spans)
            ids.append(encoding.ids)
            of_token = (spans[at[begin]].name for begin, _ in encoding.offsets)
            owners.append([measure.NAME_INDEX[name] for name in of_token])
        result.append(Pair(*ids))
        names.append(owners[1] + owners[2])
    return result, names


def training_settings(seed: int) -> train.Settings:
    return train.Settings(model="tiny", **train.PRESETS["tiny"], seed=seed)


def swap(pairs: list[Pair], share: float) -> list[Pair]:
    """Exchange chosen and rejected in every so-manieth pair."""
    every = round(1 / share) if share else len(pairs) + 1
    return [
        Pair(p.prompt, p.rejected, p.chosen) if i % every == every - 1 else p
        for i, p in enumerate(pairs)
    ]


def plant(
    start: Policy,
    recipe: Recipe,
    seed: int,
    pairs: int,
    folder: Path,
    labels: list[Labels],
) -> tuple[Policy, float]:
    """The recipe's policy and the seconds that its training took, from `folder` if it is there.

    `pairs` pairs of the cause, drawn by the seed, are seen once each.
    """
    policy = fresh(start, seed=seed)
    silent = np.any([t.categories[SILENCED] for t in labels], axis=0)
    if recipe.silenced:
        policy.steered.adapter.silence(np.flatnonzero(silent).tolist())
    if not recipe.trained:
        policy.model.requires_grad_(False)
        return policy, 0.0

    whole = recipe._replace(steps=None)
    base = f"{recipe.cause} {recipe.swapped} {recipe.silenced} {pairs}"
    base = re.sub(r"[^a-z0-9.]+", "-", base.lower()).strip("-")
    base = folder / f"{base} seed {seed}"
    last = base / "last"
    if not (last / "adapter_config.json").is_file():
        _train(policy, whole, seed, pairs, base)
    where = last if recipe.steps is None else base / f"step {recipe.steps}"
    adapter = Adapter.from_pretrained(where)
    old = policy.steered
    model = SteeredModel(old.model, old.sae, adapter, old.layer).requires_grad_(False)
    return policy._replace(model=model), adapter.identity["seconds"]


def _train(policy: Policy, recipe: Recipe, seed: int, pairs: int, folder: Path) -> None:
    began = time.perf_counter()
    known, _ = tokenise(policy.tokenizer, world.pairs(recipe.cause, pairs, seed))
    adapter = policy.steered.adapter

    def keep(step: int, name: str = "") -> None:
        if name or step in DOSES:
            seconds = time.perf_counter() - began
            adapter.save_pretrained(folder / (name or f"step {step}"), dict(seconds=seconds))

    fit(policy, swap(known, recipe.swapped), training_settings(seed), after_step=keep)
    keep(0, "last")
