"""Log-likelihoods of continuations: what multiple-choice benchmarks ask of a model, thousands at a time.

A request is a context and a continuation, as token ids. What the model must read is context + continuation without its
last token, and many such sequences begin alike: the choices of one question share its context, the questions of one
task share their worked examples. Sorted, those that begin alike stand together; `cut` finds the cheapest runs, and
each run is one tree of the packed layout: the shared beginning once, then what follows it in each. Choices of a single
token (A, B, C, D) are not even a continuation there: they are read off at the context's last position.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

import simpo
from fsrl import SteeredModel
from model import Gemma2
from packed import Tree, pack

MOST = 64  # sequences in one tree: what they share costs each a 64th of it, and finding the cut stays linear


class Request(NamedTuple):
    context: Sequence[int]  # token ids, at least one
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    logp: float  # sum over the continuation's tokens
    greedy: bool  # whether greedy decoding would have written exactly this continuation


@torch.inference_mode()
def likelihoods(
    model: Gemma2 | SteeredModel,
    requests: Sequence[Request],
    max_length: int,
    tokens: int,
    progress: bool = False,
) -> list[Likelihood]:
    """Score requests, in their order. tokens: of one forward pass, at most (the memory knob; no effect on the result).

    At most max_length tokens are read: of longer requests the last max_length + 1 count, so that a context loses its
    beginning. A continuation of no tokens has log-likelihood 0. Raises ValueError for one longer than max_length.
    """
    asked: dict[
        tuple, list[int]
    ] = {}  # requests by what they read: single-token choices read the same
    for i, (context, continuation) in enumerate(requests):
        if not context or len(continuation) > max_length:
            raise ValueError(
                f"request {i}: {len(context)} + {len(continuation)} tokens, at most {max_length} are read"
            )
        if continuation:
            asked.setdefault(tuple([*context, *continuation][-(max_length + 1) : -1]), []).append(i)
    base = model.model if isinstance(model, SteeredModel) else model
    head, softcap = base.model.embed_tokens.weight, base.config.final_logit_softcapping

    logp = torch.zeros(len(requests), dtype=torch.float64)
    missed = torch.zeros(
        len(requests), dtype=torch.int64
    )  # tokens that greedy decoding would not have written
    bar = tqdm(
        total=len(requests), desc="scoring", unit="request", leave=False, disable=not progress
    )
    for runs in microbatches(sorted(asked), tokens):
        source, target, which = (
            [],
            [],
            [],
        )  # where each scored token is predicted, its id, its request
        trees, start = [], 0  # start: of the tree in the stream
        for run in runs:
            shared = common(run[0], run[-1]) if len(run) > 1 else len(run[0])
            trees.append(tree(run, shared))
            end = start + shared  # of what the stream holds so far
            for sequence in run:
                for i in asked[sequence]:
                    n = len(requests[i].continuation)
                    places = range(len(sequence) - n, len(sequence))
                    source += [start + p if p < shared else end + p - shared for p in places]
                    target += requests[i].continuation
                    which += [i] * n
                end += len(sequence) - shared
            start = end
        packed = pack(trees).to(base.device)
        hidden = (
            model(packed).hidden if isinstance(model, SteeredModel) else model(packed)
        )  # [T, d]
        source, target = (
            torch.tensor(source, device=base.device),
            torch.tensor(target, device=base.device),
        )
        scores = simpo.token_scores(hidden[source], head, target, softcap)  # [N]
        which = torch.tensor(which)
        logp.index_add_(0, which, scores.logp.cpu().double())
        missed.index_add_(0, which, (~scores.greedy).cpu().long())
        bar.update(sum(len(asked[sequence]) for run in runs for sequence in run))
    bar.close()
    return [Likelihood(a, b == 0) for a, b in zip(logp.tolist(), missed.tolist(), strict=True)]


def tree(run: Sequence[tuple], shared: int) -> Tree:
    """A run as a prompt, the tokens it shares, with continuations, what follows them in each sequence."""
    return run[0][:shared], [sequence[shared:] for sequence in run] if len(run) > 1 else []


def microbatches(sequences: Sequence[tuple], tokens: int) -> Iterator[list[Sequence[tuple]]]:
    """Sorted sequences -> runs of them, a tree each, filled into passes of at most `tokens` tokens. A sequence longer
    than that stands alone.
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

    A run's cost is the tokens of its tree: what all of it begins with once, and the rest of each. Runs hold at most
    MOST sequences and, beyond a single one, `tokens` tokens. The best cut of the first j ends with some run i..j and
    begins with the best cut of the first i: a dynamic programme over j.
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
