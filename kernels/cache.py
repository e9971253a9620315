"""A cache of keys and values, so that generating a token computes nothing for earlier ones again.

The sequences of a batch are aligned at their ends, in slots 0, 1, 2, ... that all of them share:

    slot        0 1 2 3 4 5 | 6 7
    sequence 0  p p p p p p | n n        prompts of 6 and 3 tokens, two new tokens each
    sequence 1  . . . p p p | n n

The newest tokens of all sequences therefore share a slot: keys are written and a sliding window is
read with one slice, and only the empty slots before a shorter prompt need a mask. A cached step
computes what a forward over the whole sequence computes at its last position.
"""

import torch
from torch import Tensor

from kernels.attention import Attend
from kernels.pointwise import at_least_float32


class Cache:
    """Keys and values of B sequences. lengths: tokens of each prompt. room: initial slots for new
    tokens; more are added when they are full.
    """

    def __init__(self, lengths: list[int], room: int, device: torch.device | str):
        self.end = max(lengths)  # slots in use
        self.capacity = self.end + max(1, room)
        # Block -> [B, KV, capacity, hd], made when the block first writes, in the dtype that the
        # block computes in; under FSDP2 its weights have another dtype.
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.starts = [self.end - n for n in lengths]  # first slot of each sequence
        self.device = device
        self._mark_empty_slots()

    def prefill(self, tree: Tensor, position: Tensor, first: int, attend: Attend) -> Attend:
        """Attention for a packed stream of whole prompts, which also stores their keys and values.

        tree, position: int64 [T]. first: the sequence of the stream's first prompt. attend: the
        attention among the stream's positions.
        """
        rows = tree + first
        slots = self.start[rows] + position

        def keep_and_attend(block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(block.index, rows, slots, k, v)
            return attend(block, q, k, v)

        return keep_and_attend

    def step(self) -> tuple[Tensor, Attend]:
        """Positions int64 [B] of one new token of each sequence, and the attention for them."""
        if self.end == self.capacity:
            for tensors in (self.keys, self.values):
                for block, old in tensors.items():  # its old tensor is freed before the next one
                    tensors[block] = torch.cat([old, torch.zeros_like(old)], dim=2)
            self.capacity *= 2
            self._mark_empty_slots()
        slot = slice(self.end, self.end + 1)
        self.end += 1

        def keep_and_attend(block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = k[:, :, None], v[:, :, None]  # [B, KV, hd] -> [B, KV, 1, hd]
            self._write(block.index, slice(None), slot, k, v)
            return self._attend(block, q)

        return self.end - 1 - self.start, keep_and_attend

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but these."""
        index = torch.tensor(rows, device=self.device)
        for tensors in (self.keys, self.values):
            for block, old in tensors.items():
                tensors[block] = old[index]
        self.starts = [self.starts[row] for row in rows]
        self._mark_empty_slots()

    def _write(self, block: int, rows, slots, k: Tensor, v: Tensor) -> None:
        if block not in self.keys:
            # Zeros, because an empty slot has weight 0, and 0 times random memory may be NaN.
            shape = (len(self.starts), k.shape[1], self.capacity, k.shape[-1])
            self.keys[block], self.values[block] = k.new_zeros(shape), v.new_zeros(shape)
        self.keys[block][rows, :, slots] = k
        self.values[block][rows, :, slots] = v

    def _attend(self, block, q: Tensor) -> Tensor:
        """softmax(c tanh(s q kᵀ / c)) v for the newest tokens: q [B, H, hd] -> [B, H, hd]."""
        B, H, hd = q.shape
        first = max(self.first, self.end - block.window) if block.window else self.first
        k = self.keys[block.index][:, :, first : self.end].flatten(0, 1)  # [B KV, n, hd]
        v = self.values[block.index][:, :, first : self.end].flatten(0, 1)
        grouped = q.reshape(len(k), -1, hd)  # [B KV, G, hd]
        scores = torch.bmm(grouped * (block.scale / (block.softcap or 1.0)), k.mT)  # [B KV, G, n]
        if block.softcap:
            scores.tanh_().mul_(block.softcap)
        if first < self.last:
            scores.view(B, H, -1).masked_fill_(self.empty[:, None, first : self.end], -torch.inf)
        weights = scores.softmax(-1, dtype=at_least_float32(scores.dtype)).to(v.dtype)
        return torch.bmm(weights, v).view(B, H, hd)

    def _mark_empty_slots(self) -> None:
        """Find the empty slots again, after sequences or slots have changed."""
        self.start = torch.tensor(self.starts, device=self.device)  # [B]
        slots = torch.arange(self.capacity, device=self.device)
        self.empty = slots < self.start[:, None]  # [B, capacity]
        self.first, self.last = min(self.starts), max(self.starts)  # no slot is empty from last on
