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
TILE = 128  # queries that share their keys: a longer tile scores more keys that causality hides
SCORES = 1 << 18  # of a bucket, per head: what keeps its products in the processor's cache

Tree = tuple[
    Sequence[int], Sequence[Sequence[int]]
]  # a prompt's token ids, and those of its continuations


class Bucket(NamedTuple):
    """Tiles of queries with the keys they may see, padded to one shape so that they share a product.

    A tile is up to TILE consecutive queries of a prompt (its keys: the prompt so far) or of a continuation (its
    keys: its prompt, then itself so far). Padding repeats a tile's last query, or its first key out of reach.
    """

    queries: Tensor  # int64 [S, Lq], indices into the stream
    keys: Tensor  # int64 [S, Lk]
    query_position: Tensor  # int64 [S, Lq]
    key_position: Tensor  # int64 [S, Lk]; padding has NEVER
    real: Tensor  # bool [S, Lq], False for the padding among the queries


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

    def to(self, device: torch.device | str) -> "Packed":
        """The same layout on another device. CUDA needs no buckets: FlexAttention takes the tree as its mask."""
        if torch.device(device).type == "cpu":
            return self
        moved = (x if x is self.buckets else x.to(device, non_blocking=True) for x in self)
        return Packed(*moved)._replace(buckets=())


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
        buckets=_buckets(stretches, position),
    )


def _buckets(stretches: list[tuple[int, int, int, int]], position: Tensor) -> tuple[Bucket, ...]:
    """Cut stretches into tiles and group tiles of like shape, so that many short ones cost one product."""
    tiles = []  # (first query, queries, first key, keys of the prompt before it, own keys before the queries)
    for first, n, prompt, before in stretches:
        for i in range(0, n, TILE):
            tiles.append((first + i, min(TILE, n - i), prompt, before, i))
    tiles.sort(key=lambda t: (t[1] + t[3] + t[4], t[1]))
    groups, lq, area = [], 0, 0
    for tile in tiles:
        n, k = (
            tile[1],
            tile[1] + tile[3] + tile[4],
        )  # k only grows: the newest tile has the most keys
        if groups:
            padded = (len(groups[-1]) + 1) * max(lq, n) * k
            # A third of padding, or 32k scores a head, is cheaper than another round of small products.
            if padded <= min(SCORES, max(1.33 * (area + n * k), area + n * k + 32_768)):
                groups[-1].append(tile)
                lq, area = max(lq, n), area + n * k
                continue
        groups.append([tile])
        lq, area = n, n * k

    buckets = []
    for group in groups:
        lq, lk = max(t[1] for t in group), max(t[1] + t[3] + t[4] for t in group)
        queries = torch.empty(len(group), lq, dtype=torch.int64)
        keys = torch.zeros(len(group), lk, dtype=torch.int64)
        key_position = torch.full((len(group), lk), NEVER, dtype=torch.int64)
        real = torch.zeros(len(group), lq, dtype=torch.bool)
        for row, (first, n, prompt, before, i) in enumerate(group):
            queries[row] = torch.arange(first, first + lq).clamp(max=first + n - 1)
            real[row, :n] = True
            keys[row, :before] = torch.arange(prompt, prompt + before)
            keys[row, before : before + i + n] = torch.arange(first - i, first + n)
            key_position[row, : before + i + n] = torch.arange(before + i + n)
        buckets.append(Bucket(queries, keys, position[queries], key_position, real))
    return tuple(buckets)
