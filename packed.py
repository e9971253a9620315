"""The one layout: prompts with continuations, packed into one stream without padding.

    tokens     p p p p w w w  l l l l  | next prompt ...
    position   0 1 2 3 4 5 6  4 5 6 7  | 0 1 ...
    attends    own prompt and own continuation, causally; the other continuation never

A preference pair is a prompt with two continuations, a multiple-choice question one with k, a text to
generate from one with none. The shared prompt is computed once; every hidden state is [T, d].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = 1 << 30  # a key position no query reaches: marks padding inside a bucket

Tree = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prompt's token ids, and those of its continuations


class Bucket(NamedTuple):
    """Stretches of queries with the keys they may see, padded to one shape so that they share a product.

    A stretch is a prompt (its keys: itself) or a continuation (its keys: its prompt, then itself).
    """

    queries: Tensor  # int64 [S, Lq], indices into the stream; padding repeats index 0
    keys: Tensor  # int64 [S, Lk]
    query_position: Tensor  # int64 [S, Lq]; padding has 0, so that its softmax stays finite
    key_position: Tensor  # int64 [S, Lk]; padding has NEVER


class Packed(NamedTuple):
    tokens: Tensor  # int64 [T]
    position: Tensor  # int64 [T], counted from the prompt's first token
    tree: Tensor  # int64 [T], which prompt
    branch: Tensor  # int64 [T], 0 in a prompt, 1.. in its continuations
    copies: Tensor  # float32 [T], in how many of the separate sequences the position stands
    source: Tensor  # int64 [N], the position whose hidden state predicts ...
    target: Tensor  # int64 [N], ... this token: every continuation token, in order
    sequence: Tensor  # int64 [N], which continuation the target belongs to, 0..C-1 in packing order
    lengths: Tensor  # int64 [C], tokens of each continuation
    buckets: tuple[Bucket, ...]  # how the plain attention walks the tree
    unbucket: Tensor  # int64 [T], where each position's output stands among the buckets' outputs

    def to(self, device: torch.device | str) -> "Packed":
        """The same layout on another device; the copy does not wait when the memory is pinned."""

        def move(x):
            if isinstance(x, Tensor):
                return x.to(device, non_blocking=True)
            return tuple(Bucket(*map(move, bucket)) for bucket in x)

        return Packed(*map(move, self))


def pack(trees: Sequence[Tree]) -> Packed:
    """Lay prompts and their continuations into one stream. Every prompt needs at least one token."""
    tokens, position, tree, branch, copies, source, lengths = [], [], [], [], [], [], []
    stretches = []  # (first query, number of queries, first prompt token, prompt tokens before the queries)
    for index, (prompt, continuations) in enumerate(trees):
        if not len(prompt):
            raise ValueError(f"prompt {index} has no tokens")
        start, p = len(tokens), len(prompt)
        tokens += prompt
        position += range(p)
        branch += [0] * p
        copies += [max(1, len(continuations))] * p
        stretches.append((start, p, start, 0))
        for c, continuation in enumerate(continuations, start=1):
            first, n = len(tokens), len(continuation)
            tokens += continuation
            position += range(p, p + n)
            branch += [c] * n
            copies += [1] * n
            # The first token of each continuation is predicted at the prompt's last position.
            source += [start + p - 1, *range(first, first + n - 1)][:n]
            lengths.append(n)
            if n:
                stretches.append((first, n, start, p))
        tree += [index] * (len(tokens) - start)

    is_target = torch.tensor(branch) > 0
    tokens, position = torch.tensor(tokens), torch.tensor(position)
    buckets, unbucket = _buckets(stretches, position)
    return Packed(
        tokens=tokens,
        position=position,
        tree=torch.tensor(tree),
        branch=torch.tensor(branch),
        copies=torch.tensor(copies, dtype=torch.float32),
        source=torch.tensor(source, dtype=torch.int64),
        target=tokens[is_target],
        sequence=torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        buckets=buckets,
        unbucket=unbucket,
    )


def _buckets(stretches: list[tuple[int, int, int, int]], position: Tensor) -> tuple[tuple[Bucket, ...], Tensor]:
    """Group stretches of like shape, so that many short ones cost one product and long ones little padding."""
    stretches = sorted(stretches, key=lambda s: (s[1] + s[3], s[1]))
    groups, lq, area = [], 0, 0
    for s in stretches:
        n, k = s[1], s[1] + s[3]  # k only grows: the newest stretch has the most keys
        if groups:
            padded = (len(groups[-1]) + 1) * max(lq, n) * k
            # A third of padding, or 32k scores a head, is cheaper than another round of small products.
            if padded <= max(1.33 * (area + n * k), area + n * k + 32_768):
                groups[-1].append(s)
                lq, area = max(lq, n), area + n * k
                continue
        groups.append([s])
        lq, area = n, n * k

    buckets, unbucket, offset = [], torch.empty(len(position), dtype=torch.int64), 0
    for group in groups:
        lq, lk = max(s[1] for s in group), max(s[1] + s[3] for s in group)
        queries = torch.zeros(len(group), lq, dtype=torch.int64)
        keys = torch.zeros(len(group), lk, dtype=torch.int64)
        query_position = torch.zeros(len(group), lq, dtype=torch.int64)
        key_position = torch.full((len(group), lk), NEVER, dtype=torch.int64)
        for row, (first, n, prompt, p) in enumerate(group):
            own = torch.arange(first, first + n)
            queries[row, :n] = own
            query_position[row, :n] = position[own]
            keys[row, :p] = torch.arange(prompt, prompt + p)
            keys[row, p : p + n] = own
            key_position[row, : p + n] = torch.arange(p + n)
            unbucket[own] = offset + row * lq + torch.arange(n)
        offset += queries.numel()
        buckets.append(Bucket(queries, keys, query_position, key_position))
    return tuple(buckets), unbucket
