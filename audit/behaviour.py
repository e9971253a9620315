"""What a reader of the two models' texts would notice: base model and policy answer the same
prompts, and the answers are compared by class of tokens and by length.

    excess(c) = Σ_{y ∈ c} |mean n'(y) - mean n(y)|  less its mean under the null

n(y) and n'(y) count a token in an answer of base model and policy. The sum is of gains and losses,
so a class within which one phrase replaces another shows as one that grows or shrinks. By chance
alone it is positive; the null says how large: if the two models were one, the two answers to a
prompt could be swapped, which flips the sign of that prompt's differences.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audit.choices import LEVEL, Classes
from data import Pair, header_ids
from fsrl import Change, SteeredModel, Unsteered
from generation.decode import Sampling, end_of_turn, generate
from policy import Policy

BATCH = 64  # prompts answered together
SIDES = (1, 2)  # of a Pair: the base model's answer, the policy's


class Behaviour(NamedTuple):
    """Differences between the answers to P prompts, by C classes. On the CPU, float64."""

    names: tuple[str, ...]  # of the classes
    before: Tensor  # [P, C], tokens of each class in the base model's answer
    after: Tensor  # [P, C], in the policy's
    gained: Tensor  # [C], Σ of the positive differences of mean counts, by token
    lost: Tensor  # [C], of the negative ones, as a positive number
    excess: Tensor  # [C], gained + lost, less its mean under the null
    p_values: Tensor  # [C], of gained + lost, times the number of classes (Bonferroni)
    tokens: dict[tuple[int, int], float]  # (class, token id) -> difference of mean counts

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
    found = []
    for c in partitions:
        counts = [count(pairs, side, c) for side in SIDES]
        things = sorted({thing for side in counts for of in side for thing in of})
        difference = torch.zeros(len(pairs), len(things), dtype=torch.float64)
        column = {thing: i for i, thing in enumerate(things)}
        for sign, side in zip((-1, 1), counts, strict=True):
            for row, of in zip(difference, side, strict=True):
                for thing, n in of.items():
                    row[column[thing]] += sign * n
        kinds = torch.tensor([kind for kind, _ in things])
        member = torch.eye(len(c.names), dtype=torch.float64)[kinds]  # [Y, C]
        moved = excess(difference, member, draws, seed)
        before, after = (by_class(side, len(c.names)) for side in counts)
        mean = difference.mean(0).tolist()
        tokens = dict(zip(things, mean, strict=True))
        found.append(Behaviour(c.names, before, after, *moved, tokens))
    return found


Thing = tuple[int, int]  # class, token id


def count(pairs: Sequence[Pair], side: int, classes: Classes) -> list[Counter[Thing]]:
    """Of each pair, how often each token of a class stands in one side: 1 chosen, 2 rejected."""
    found = []
    for i, pair in enumerate(pairs):
        places = torch.arange(len(pair.chosen) + len(pair.rejected))
        targets = torch.tensor([*pair.chosen, *pair.rejected])
        kinds = classes.of_targets(torch.full_like(places, i), places, targets).tolist()
        first = len(pair.chosen)
        kinds = kinds[:first] if side == 1 else kinds[first:]
        found.append(Counter(zip(kinds, pair[side], strict=True)))
    return found


def by_class(counts: list[Counter[Thing]], classes: int) -> Tensor:
    """Tokens of each class: float64 [P, C]."""
    total = torch.zeros(len(counts), classes, dtype=torch.float64)
    for row, of in zip(total, counts, strict=True):
        for (kind, _), n in of.items():
            row[kind] += n
    return total


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
