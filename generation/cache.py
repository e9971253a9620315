"""Keys and values of earlier tokens, so that in generation a new token computes only itself.

The sequences of a batch stand flush right in slots 0, 1, 2, ... that all of them share:

    slot        0 1 2 3 4 5 | 6 7
    sequence 0  p p p p p p | n n        prompts of 6 and 3 tokens, two new tokens each
    sequence 1  . . . p p p | n n

Every newest token therefore has the same slot: it is written with a slice, a sliding window is read with one, and all
that ever needs a mask is the empty slots before a shorter prompt.
"""

import torch
from torch import Tensor

from packed import Packed


class Cache:
    """Of B sequences, whose prompts have the given lengths, in every block; room: for so many new tokens at first."""

    def __init__(self, blocks: int, lengths: list[int], room: int, device: torch.device):
        self.end = max(lengths)  # slots in use
        self.capacity = self.end + max(1, room)
        # Each [B, KV, capacity, hd], made when a block first writes: the dtype is that of what it computes, which under
        # FSDP2 is not that of its weights.
        self.keys: list[Tensor | None] = [None] * blocks
        self.values: list[Tensor | None] = [None] * blocks
        self.starts, self.device = [self.end - n for n in lengths], device  # first slot of each
        self._rows_changed()
        self.where: tuple = ()  # (rows, slots) that the next forward writes: tensors for a prompt, slices for a step

    @property
    def stepping(self) -> bool:
        """Whether the next forward is one new token of each sequence, and not a packed stream of prompts."""
        return isinstance(self.where[0], slice)

    def prompts(self, packed: Packed, first: int) -> None:
        """The next forward is this stream of whole prompts, of the sequences from `first` on."""
        rows = packed.tree + first
        self.where = rows, self.start[rows] + packed.position

    def step(self) -> Tensor:
        """The next forward is one new token of each sequence, at the positions returned: int64 [B]."""
        if self.end == self.capacity:
            for tensors in (
                self.keys,
                self.values,
            ):  # in place, so that a block's old tensor goes before the next's
                for i, old in enumerate(tensors):
                    tensors[i] = torch.cat([old, torch.zeros_like(old)], dim=2)
            self.capacity *= 2
            self._rows_changed()
        self.where = slice(None), slice(self.end, self.end + 1)
        self.end += 1
        return self.end - 1 - self.start

    def write(self, block: int, k: Tensor, v: Tensor) -> None:
        """k, v [T, KV, hd] of a forward's positions."""
        rows, slots = self.where
        if self.keys[block] is None:
            # Zeros, because an empty slot's weight of 0 times whatever memory held could be NaN.
            shape = (len(self.start), k.shape[1], self.capacity, k.shape[2])
            self.keys[block], self.values[block] = k.new_zeros(shape), v.new_zeros(shape)
        if self.stepping:
            k, v = k[:, :, None], v[:, :, None]  # [B, KV, hd] -> [B, KV, 1, hd]
        self.keys[block][rows, :, slots] = k
        self.values[block][rows, :, slots] = v

    def attend(
        self, block: int, q: Tensor, window: int | None, scale: float, softcap: float | None
    ) -> Tensor:
        """Attention of the newest tokens: q [B, H, hd] -> [B, H, hd]."""
        first = max(self.first, self.end - window) if window else self.first
        k, v = (
            x[block][:, :, first : self.end].flatten(0, 1) for x in (self.keys, self.values)
        )  # [B KV, n, hd]
        B, H, hd = q.shape
        scores = torch.bmm(
            q.reshape(len(k), -1, hd) * (scale / (softcap or 1.0)), k.mT
        )  # [B KV, G, n]
        if softcap:
            scores.tanh_().mul_(softcap)
        if first < self.last:
            scores.view(B, H, -1).masked_fill_(self.empty[:, None, first : self.end], -torch.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
            v.dtype
        )
        return torch.bmm(weights, v).view(B, H, hd)

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences alone."""
        index = torch.tensor(rows, device=self.device)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                tensors[i] = old[index]
        self.starts = [self.starts[row] for row in rows]
        self._rows_changed()

    def _rows_changed(self) -> None:
        self.start = torch.tensor(self.starts, device=self.device)  # [B]
        self.empty = (
            torch.arange(self.capacity, device=self.device) < self.start[:, None]
        )  # [B, capacity]
        self.first, self.last = (
            min(self.starts),
            max(self.starts),
        )  # from `last` on every slot is filled
