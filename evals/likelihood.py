"""Log-likelihoods of continuations: what multiple-choice benchmarks ask of a model, thousands at a
time.

A request is a context and a continuation, as token ids. The model must read context + continuation
without its last token, and many such sequences begin alike: the choices of one question share its
context, the questions of one task share their worked examples. Sorted, those that begin alike stand
together; `cut` finds the cheapest runs, and each run is one tree of the packed layout (data.py):
the shared beginning once, then what follows it in each. Choices of a single token (A, B, C, D) are
not even a continuation there: they are read off at the context's last position.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from data import Tree, pack
from fsrl import SteeredModel, Unsteered
from kernels.logps import token_scores
from runtime.progress import progress_bar

MOST = 64  # sequences in one tree: what they share then costs little, and the cut stays linear


class Request(NamedTuple):
    context: Sequence[int]  # token ids, at least one
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    logp: float  # sum over the continuation's tokens
    greedy: bool  # whether greedy decoding would have written exactly this continuation


@torch.inference_mode()
def likelihoods(
    model: SteeredModel | Unsteered,
    requests: Sequence[Request],
    max_length: int,
    tokens: int,
    progress: bool = False,
) -> list[Likelihood]:
    """Score requests, in their order. tokens: of one forward pass at most, the memory knob; no
    effect on the result.

    At most max_length tokens are read: of longer requests the last max_length + 1 count, so that a
    context loses its beginning. A continuation of no tokens has log-likelihood 0. Raises ValueError
    for one longer than max_length.
    """
    # Requests by what they read: those of single-token choices read the same.
    asked: dict[tuple, list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        if not context or len(continuation) > max_length:
            lengths = f"{len(context)} + {len(continuation)}"
            raise ValueError(f"request {i}: {lengths} tokens, at most {max_length} are read")
        if continuation:
            read = [*context, *continuation][-(max_length + 1) : -1]
            asked.setdefault(tuple(read), []).append(i)

    base = model.model
    head, softcap = base.model.embed_tokens.weight, base.config.final_logit_softcapping
    logp = torch.zeros(len(requests), dtype=torch.float64)
    missed = torch.zeros(len(requests), dtype=torch.int64)  # tokens that greedy would not write
    look = dict(desc="scoring", unit="request", leave=False, shown=progress)
    with progress_bar(total=len(requests), **look) as bar:
        for runs in microbatches(sorted(asked), tokens):
            trees, targets = plant(runs, asked, requests)
            source, target, which = torch.tensor(targets).T  # [N, 3] -> three of [N]
            hidden = model.states(pack(trees).to(base.device)).hidden  # [T, d]
            source, target = source.to(base.device), target.to(base.device)
            scores = token_scores(hidden[source], head, target, softcap)  # [N]
            logp.index_add_(0, which, scores.logp.cpu().double())
            missed.index_add_(0, which, (~scores.greedy).cpu().long())
            bar.update(sum(len(asked[sequence]) for run in runs for sequence in run))
    return [Likelihood(a, b == 0) for a, b in zip(logp.tolist(), missed.tolist(), strict=True)]


class Target(NamedTuple):
    """A token to score."""

    source: int  # the position in the packed stream that predicts it
    token: int
    request: int


def plant(
    runs: Sequence[Sequence[tuple]], asked: dict[tuple, list[int]], requests: Sequence[Request]
) -> tuple[list[Tree], list[Target]]:
    """The trees of a forward pass, and what to score in their packed stream."""
    trees, targets, start = [], [], 0  # start: of the tree in the stream
    for run in runs:
        shared = common(run[0], run[-1]) if len(run) > 1 else len(run[0])
        trees.append(tree(run, shared))
        end = start + shared  # of what the stream holds so far
        for sequence in run:
            for i in asked[sequence]:
                continuation = requests[i].continuation
                first = len(sequence) - len(continuation)
                for place, token in enumerate(continuation, start=first):
                    source = start + place if place < shared else end + place - shared
                    targets.append(Target(source, token, i))
            end += len(sequence) - shared
        start = end
    return trees, targets


def tree(run: Sequence[tuple], shared: int) -> Tree:
    """A run as a prompt, the tokens it shares, with continuations, what follows them in each
    sequence.
    """
    return run[0][:shared], [sequence[shared:] for sequence in run] if len(run) > 1 else []


def microbatches(sequences: Sequence[tuple], tokens: int) -> Iterator[list[Sequence[tuple]]]:
    """Sorted sequences -> runs of them, a tree each, filled into passes of at most `tokens` tokens.
    A sequence longer than that stands alone.
    """
    batch, room = [], tokens
    for run, cost in cut(sequences, tokens):
        if batch and cost > room:
            yield batch
            batch, room = [], tokens
        batch.append(run)
        room -= cost
    if batch:
        yield batch


def cut(sequences: Sequence[tuple], tokens: int) -> list[tuple[Sequence[tuple], int]]:
    """Cut sorted sequences into runs of least total cost: (run, cost) in order.

    A run's cost is the tokens of its tree: what all of it begins with once, and the rest of each.
    Runs hold at most MOST sequences and, beyond a single one, `tokens` tokens. The best cut of the
    first j ends with some run i..j and begins with the best cut of the first i: a dynamic programme
    over j.
    """
    best, back = [0], [0]  # of the first j: the least cost, and where its last run begins
    alike = [0] + [common(a, b) for a, b in itertools.pairwise(sequences)]
    for j in range(1, len(sequences) + 1):
        shared, total, options = len(sequences[j - 1]), 0, []
        for i in range(j - 1, max(-1, j - 1 - MOST), -1):
            total += len(sequences[i])
            shared = min(shared, alike[i + 1]) if i < j - 1 else shared
            cost = total - (j - i - 1) * shared
            if i < j - 1 and (shared == 0 or cost > tokens):
                break
            options.append((best[i] + cost, i))

        least, i = min(options)
        best.append(least)
        back.append(i)

    runs, j = [], len(sequences)
    while j:
        i = back[j]
        runs.append((sequences[i:j], best[j] - best[i]))
        j = i
    return runs[::-1]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
