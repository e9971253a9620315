"""What a reader of the two models' texts would notice: base model and policy answer the same
prompts, and the answers are compared by class of tokens and by length.

    excess(c) = Σ_{y ∈ c} |mean n'(y) - mean n(y)|  less its mean under the null

n(y) and n'(y) count a token in an answer of base model and policy. The sum is of gains and losses,
so a class within which one phrase replaces another shows as one that grows or shrinks. By chance
alone it is positive; the null says how large: if the two models were one, the two answers to a
prompt could be swapped, which flips the sign of that prompt's differences.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audit.choices import Classes
from data import Pair, header_ids
from fsrl import Change, SteeredModel, Unsteered
from generation.decode import Sampling, end_of_turn, generate
from policy import Policy

BATCH = 64  # prompts answered together
LEVEL = 0.01


class Behaviour(NamedTuple):
    """Differences between the answers to P prompts, by C classes. On the CPU, float64."""

    names: tuple[str, ...]  # of the classes
    before: Tensor  # [P, C], tokens of each class in the base model's answer
    after: Tensor  # [P, C], in the policy's
    gained: Tensor  # [C], Σ of the positive differences of mean counts, by token
    lost: Tensor  # [C], of the negative ones, as a positive number
    excess: Tensor  # [C], gained + lost, less its mean under the null
    p_values: Tensor  # [C], of gained + lost, times the number of classes (Bonferroni)

    def named(self, level: float = LEVEL) -> str | None:
        """The category whose tokens changed most; None where chance reaches that change too often.

        It is never one of the last two classes, the end of the answer and the rest.
        """
        top = int(self.excess[:-2].argmax())
        return self.names[top] if self.p_values[top] <= level else None


def answered(
    policy: Policy, prompts: Sequence[list[int]], tokens: int, seed: int = 0
) -> list[Pair]:
    """Prompts (token ids) -> Pair(prompt, the base model's answer, the policy's), of at most so
    many tokens and at temperature 1.

    The two draw with the same random numbers, one series for each prompt, so that a policy that
    steers nothing answers in the same words.
    """
    models = (Unsteered(policy.base), policy.steered)
    answers = (answers_of(policy, model, prompts, tokens, seed) for model in models)
    return list(map(Pair, prompts, *answers))


def answers_of(
    policy: Policy,
    model: SteeredModel | Unsteered,
    prompts: Sequence[list[int]],
    tokens: int,
    seed: int,
    change: Change | None = None,
) -> list[list[int]]:
    """The model's answers as token ids, header included. change: of the steering, see decode."""
    header, ended = header_ids(policy.tokenizer), end_of_turn(policy.tokenizer)
    given = [[*prompt, *header] for prompt in prompts]
    seeds = [seed + i for i in range(len(given))]
    answers = []
    for some in range(0, len(given), BATCH):
        part = slice(some, some + BATCH)
        options = dict(sampling=Sampling(temperature=1.0), change=change, seeds=seeds[part])
        with policy.autocast():
            new = generate(model, given[part], tokens, ended, **options)
        answers += [[*header, *answer] for answer in new]
    return answers


def compare(
    pairs: Sequence[Pair], partitions: Sequence[Classes], draws: int = 9999, seed: int = 0
) -> list[Behaviour]:
    """pairs: as `answered` gives them."""
    difference, tokens = differences(pairs)
    found = []
    for c in partitions:
        before, after = (counts_of(pairs, side, c) for side in (1, 2))
        member = torch.eye(len(c.names), dtype=torch.float64)[c.of_token[tokens]]  # [Y, C]
        moved = excess(difference, member, draws, seed)
        found.append(Behaviour(c.names, before, after, *moved))
    return found


class Excess(NamedTuple):
    """Of each class, float64 [C]; see Behaviour."""

    gained: Tensor
    lost: Tensor
    excess: Tensor
    p_values: Tensor


def excess(difference: Tensor, member: Tensor, draws: int = 9999, seed: int = 0) -> Excess:
    """difference float64 [P, Y]: of each pair of answers and each of Y countable things, how much
    more the second holds. member float64 [Y, C]: which class each belongs to.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (draws, len(difference)))
    mean, scaled = difference.mean(0), difference / len(difference)
    drawn = [(some @ scaled).abs() @ member for some in torch.from_numpy(signs).split(1000)]
    drawn = torch.cat(drawn)  # [draws, C]
    gained, lost = mean.clamp(min=0) @ member, (-mean).clamp(min=0) @ member
    total = gained + lost
    # Equal draws may differ by the order of their sum.
    p = (1 + (drawn >= total - 1e-9 * total).sum(0)) / (1 + draws)
    return Excess(gained, lost, total - drawn.mean(0), (p * member.shape[1]).clamp(max=1))


def differences(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Counts in the policy's answer less those in the base model's: float64 [P, Y], and the tokens
    int64 [Y] that occur.
    """
    tokens = torch.tensor(sorted({t for pair in pairs for t in (*pair.chosen, *pair.rejected)}))
    column = {token: i for i, token in enumerate(tokens.tolist())}
    difference = torch.zeros(len(pairs), len(tokens), dtype=torch.float64)
    for row, pair in zip(difference, pairs, strict=True):
        for sign, answer in ((-1.0, pair.chosen), (1.0, pair.rejected)):
            places = torch.tensor([column[t] for t in answer], dtype=torch.int64)
            row.index_add_(0, places, torch.full((len(places),), sign, dtype=torch.float64))
    return difference, tokens


def counts_of(pairs: Sequence[Pair], side: int, classes: Classes) -> Tensor:
    """Tokens of each class in one side of each pair (1: chosen, 2: rejected): float64 [P, C]."""
    of = (classes.of_token[torch.tensor(pair[side], dtype=torch.int64)] for pair in pairs)
    return torch.stack([torch.bincount(c, minlength=len(classes.names)) for c in of]).double()
