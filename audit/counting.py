"""Which features are active where: everything that the tables of usage need, counted in one pass.

v is what the adapter adds, f = sae.encode(x) what the SAE itself finds in the same residual stream
x. A feature is active where v ≠ 0, or where f > 0. An event is a feature that is active at a
position.

The contexts are those of the unshared sequences: a prompt's position counts once in each of
`prompt`, `prompt+chosen` and `prompt+rejected`. The first position is left out. It is <bos>, or the
first token of a truncated prompt, and its residual stream is an outlier.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Pair
from policy import Policy
from runtime.tables import resampled

SIDES = ("adapter", "sae")  # v and f: the first axis of what is counted
CONTEXTS = ("prompt", "prompt+chosen", "prompt+rejected")


class Counts(NamedTuple):
    """Counts over P pairs, on the CPU. Axes: side as in SIDES [2], context as in CONTEXTS [3]. Only
    pair_events grows with the number of pairs, by 48 (C + 1) bytes each.
    """

    positions: Tensor  # int64 [3]
    events: Tensor  # int64 [2, 3, F]
    sums: Tensor  # float64 [2, 3, F], Σ v and Σ f over positions
    stream: Tensor  # float64 [3, d], Σ x over positions
    l0: Tensor  # int64 [2, 3, F + 1], positions by how many features are active there
    place: Tensor  # int64 [3, L], positions by where they stand in their sequence
    place_l0: Tensor  # int64 [2, 3, L], Σ L0 over those
    pair_events: Tensor  # int64 [P, 2, 3, C + 1], a pair's events by category, then all of them

    @property
    def usage(self) -> Tensor:
        """Share of positions at which each feature is active, float64 [2, 3, F]."""
        return self.events / self.positions[:, None].double()

    @property
    def mean(self) -> Tensor:
        """Mean value over all positions, active or not, float64 [2, 3, F]."""
        return self.sums / self.positions[:, None].double()


@torch.inference_mode()
def count(
    policy: Policy, pairs: Sequence[Pair], masks: Tensor | None = None, what: str | None = None
) -> Counts:
    """One pass over the blocks below the adapter, adapter and SAE, in memory that hardly depends on
    the number of pairs.

    masks: bool [C, F], the categories that pair_events tells apart. what: shown with the progress.
    """
    steered, device = policy.steered, policy.device.name
    n, P = steered.sae.d_sae, len(pairs)
    masks = torch.zeros(0, n, dtype=torch.bool) if masks is None else masks
    groups = torch.cat([masks, torch.ones(1, n, dtype=torch.bool)]).T.to(device, torch.float32)
    C1 = groups.shape[1]  # groups is [F, C + 1]
    L = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)

    # By segment first: 0 the prompt, 1 the chosen response, 2 the rejected one.
    def zeros(*shape, dtype=torch.int64):
        return torch.zeros(shape, dtype=dtype, device=device)

    events, sums = zeros(2, 3, n), zeros(2, 3, n, dtype=torch.float64)
    streams = zeros(3, steered.sae.d_model, dtype=torch.float64)
    l0s, pair_events = zeros(2, 3 * (n + 1)), zeros(2, 3 * P, C1)
    place, place_l0 = zeros(3 * L), zeros(2, 3 * L)
    for stream in policy.streams(pairs, what):
        packed = stream.packed
        which = torch.tensor(stream.pairs, device=device)[packed.tree]  # [T], the pair in `pairs`
        real = (packed.position > 0).nonzero()[:, 0]
        for x, rows in zip(steered.pieces(stream.x[real]), steered.pieces(real), strict=True):
            segment, at = packed.branch[rows], packed.position[rows]
            onehot = F.one_hot(segment, 3).T.float()  # [3, rows]
            streams += onehot @ x.float()
            place.index_add_(0, segment * L + at, torch.ones_like(at))
            with policy.autocast():
                v, f = steered.adapter(x), steered.sae.encode(x)  # [rows, d] -> [rows, F]
            for side, value in enumerate((v, f)):
                value = value.float()
                active = (value != 0).float()
                # Sums of 0 and 1 below 2^24 are exact in float32.
                events[side] += (onehot @ active).long()
                sums[side] += onehot @ value
                by_group = (active @ groups).long()  # [rows, F] -> [rows, C + 1]
                l0 = by_group[:, -1]
                pair_events[side].index_add_(0, which[rows] * 3 + segment, by_group)
                l0s[side].index_add_(0, segment * (n + 1) + l0, torch.ones_like(l0))
                place_l0[side].index_add_(0, segment * L + at, l0)

    place = _contexts(place.view(3, L))
    return Counts(
        positions=place.sum(1),
        events=_contexts(events),
        sums=_contexts(sums),
        stream=_contexts(streams),
        l0=_contexts(l0s.view(2, 3, n + 1)),
        place=place,
        place_l0=_contexts(place_l0.view(2, 3, L)),
        pair_events=_contexts(pair_events.view(2, P, 3, C1)).transpose(0, 1),
    )


def _contexts(segments: Tensor) -> Tensor:
    """[..., 3 segments, N] -> [..., 3 contexts, N], on the CPU."""
    prompt, chosen, rejected = segments.cpu().unbind(-2)
    return torch.stack([prompt, prompt + chosen, prompt + rejected], -2)


# --- composition (Table 2) ------------------------------------------------------------------------


def composition(counts: Counts, mask: Tensor) -> Tensor:
    """Share of all events whose feature is in the mask: bool [F] -> float64 [2, 3]; nan where there
    is no event.
    """
    return counts.events[..., mask].sum(-1).double() / counts.events.sum(-1)


def resampled_composition(pair_events: Tensor, resamples: int, seed: int) -> Tensor:
    """Composition of every category over pairs drawn with replacement: [P, 2, 3, C + 1] ->
    [resamples, C, 2, 3].
    """
    drawn = resampled(pair_events.permute(3, 1, 2, 0).double(), resamples, seed)  # [B, C + 1, 2, 3]
    return drawn[:, :-1] / drawn[:, -1:]


def relative_change(share: Tensor) -> Tensor:
    """Composition [..., 2, 3] -> (adapter - SAE) / SAE, [..., 3]: the figure of Table 2."""
    adapter, sae = share.unbind(-2)
    return (adapter - sae) / sae
