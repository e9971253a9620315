"""Which features are active where: everything that the tables of usage need, counted in one pass.

v is what the adapter adds, f = sae.encode(x) what the SAE itself finds in the same residual stream
x. A feature is active where v ≠ 0, or where f > 0. An event is a feature that is active at a
position.

The contexts are those of the unshared sequences: a prompt's position counts once in each of
`prompt`, `prompt+chosen` and `prompt+rejected`. The first position is left out. It is <bos>, or the
first token of a truncated prompt, and its residual stream is an outlier.

The composition of Table 2 is estimated in two ways. Pooled: a category's share of all events, which
weights positions by how many features are active there. As the paper measures it: at each position
the category's share of the active labelled features, averaged over positions; positions without an
active labelled feature are left out, and a feature is active where |value| > 1e-6. The paper counts
the first position too, so that this one is given with and without it.
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
PAPER_ACTIVE = 1e-6  # a feature is active above it, in the paper's measure
FIRST = ("left out", "counted")  # the first position, in the paper's measure


class PositionShares(NamedTuple):
    """Sums behind the paper's measure. Axes before the last: first position as in FIRST [2], side
    [2], context [3]. Categories that label the same features share a group of labels, G in all.
    """

    group: list[int]  # of each category
    weights: Tensor  # float64 [G, 2, 2, 3, F], Σ over positions of 1 / active labelled features
    positions: Tensor  # int64 [G, 2, 2, 3], with an active labelled feature
    pair_shares: Tensor  # float64 [P, 2, 2, 3, C], Σ of a category's share over a pair's positions
    pair_positions: Tensor  # int64 [P, 2, 2, 3, G]


class Counts(NamedTuple):
    """Counts over P pairs, on the CPU. Axes: side as in SIDES [2], context as in CONTEXTS [3]. Only
    what is counted by pair grows with the number of pairs.
    """

    positions: Tensor  # int64 [3]
    events: Tensor  # int64 [2, 3, F]
    sums: Tensor  # float64 [2, 3, F], Σ v and Σ f over positions
    stream: Tensor  # float64 [3, d], Σ x over positions
    l0: Tensor  # int64 [2, 3, F + 1], positions by how many features are active there
    place: Tensor  # int64 [3, L], positions by where they stand in their sequence
    place_l0: Tensor  # int64 [2, 3, L], Σ L0 over those
    pair_events: Tensor  # int64 [P, 2, 3, C + 1], a pair's events by category, then all of them
    shares: PositionShares

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
    policy: Policy,
    pairs: Sequence[Pair],
    masks: Tensor | None = None,
    what: str | None = None,
    labelled: Tensor | None = None,
) -> Counts:
    """One pass over the blocks below the adapter, adapter and SAE, in memory that hardly depends on
    the number of pairs.

    masks: bool [C, F], the categories. labelled: bool [C, F], the features that have a label of the
    category, yes or no; None: all of them. what: shown with the progress.
    """
    steered, device = policy.steered, policy.device.name
    n, P = steered.sae.d_sae, len(pairs)
    masks = torch.zeros(0, n, dtype=torch.bool) if masks is None else masks
    labelled = torch.ones_like(masks) if labelled is None else labelled
    groups, group = labelled.unique(dim=0, return_inverse=True)  # bool [G, F], int64 [C]
    every = torch.cat([masks, torch.ones(1, n, dtype=torch.bool)]).T.to(device, torch.float32)
    members, among = every[:, :-1], groups.T.to(device, torch.float32)  # [F, C], [F, G]
    C, G = len(masks), len(groups)
    L = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)

    # By segment first: 0 prompt, 1 chosen response, 2 rejected response, 3 first position.
    def zeros(*shape, dtype=torch.int64):
        return torch.zeros(shape, dtype=dtype, device=device)

    events, sums = zeros(2, 4, n), zeros(2, 4, n, dtype=torch.float64)
    streams = zeros(4, steered.sae.d_model, dtype=torch.float64)
    l0s, pair_events = zeros(2, 4 * (n + 1)), zeros(2, 4 * P, C + 1)
    place, place_l0 = zeros(4 * L), zeros(2, 4 * L)
    weights, labelled_at = zeros(G, 2, 4, n, dtype=torch.float64), zeros(2, 4 * P, G)
    pair_shares = zeros(2, 4 * P, C, dtype=torch.float64)
    for stream in policy.streams(pairs, what):
        packed = stream.packed
        which = torch.tensor(stream.pairs, device=device)[packed.tree]  # [T], the pair in `pairs`
        segments = torch.where(packed.position == 0, 3, packed.branch)
        columns = (stream.x, segments, packed.position, which * 4 + segments)
        pieces = zip(*(steered.pieces(column) for column in columns), strict=True)
        for x, segment, at, of_pair in pieces:
            onehot = F.one_hot(segment, 4).T.float()  # [4, rows]
            streams += onehot @ x.float()
            place.index_add_(0, segment * L + at, torch.ones_like(at))
            with policy.autocast():
                v, f = steered.acting(x), steered.sae.encode(x)  # [rows, d] -> [rows, F]
            for side, value in enumerate((v, f)):
                value = value.float()
                active = (value != 0).float()
                # Sums of 0 and 1 below 2^24 are exact in float32.
                events[side] += (onehot @ active).long()
                sums[side] += onehot @ value
                by_category = (active @ every).long()  # [rows, F] -> [rows, C + 1]
                l0 = by_category[:, -1]
                pair_events[side].index_add_(0, of_pair, by_category)
                l0s[side].index_add_(0, segment * (n + 1) + l0, torch.ones_like(l0))
                place_l0[side].index_add_(0, segment * L + at, l0)
                if C:
                    active = (value.abs() > PAPER_ACTIVE).float()
                    found = active @ among  # [rows, F] -> [rows, G]
                    part = torch.where(found > 0, 1 / found, 0.0)
                    for g in range(G):
                        weights[g, side] += (onehot * part[:, g]) @ active
                    share = (active @ members) * part[:, group]  # [rows, C]
                    pair_shares[side].index_add_(0, of_pair, share.double())
                    labelled_at[side].index_add_(0, of_pair, (found > 0).long())

    weights *= among.T[:, None, None]  # features without a label have no part in a share

    def both(segments: Tensor) -> Tensor:
        """[..., 4 segments, N] -> [..., 2 first, 3 contexts, N]"""
        return torch.stack([_contexts(segments), _contexts(segments, first=True)], -3)

    def by_pair(found: Tensor) -> Tensor:
        """[2, 4 P, N] -> [P, 2 first, 2 sides, 3 contexts, N]"""
        return both(found.view(2, P, 4, -1)).permute(1, 2, 0, 3, 4)

    place = _contexts(place.view(4, L))
    pair_positions = by_pair(labelled_at)
    return Counts(
        positions=place.sum(1),
        events=_contexts(events),
        sums=_contexts(sums),
        stream=_contexts(streams),
        l0=_contexts(l0s.view(2, 4, n + 1)),
        place=place,
        place_l0=_contexts(place_l0.view(2, 4, L)),
        pair_events=_contexts(pair_events.view(2, P, 4, C + 1)).transpose(0, 1),
        shares=PositionShares(
            group=group.tolist(),
            weights=both(weights).transpose(1, 2),
            positions=pair_positions.sum(0).movedim(-1, 0),
            pair_shares=by_pair(pair_shares),
            pair_positions=pair_positions,
        ),
    )


def _contexts(segments: Tensor, first: bool = False) -> Tensor:
    """[..., 4 segments, N] -> [..., 3 contexts, N], on the CPU. first: with the first position."""
    prompt, chosen, rejected, at_first = segments.cpu().unbind(-2)
    prompt = prompt + at_first if first else prompt
    return torch.stack([prompt, prompt + chosen, prompt + rejected], -2)


# --- composition (Table 2) ------------------------------------------------------------------------


def relative_change(share: Tensor) -> Tensor:
    """Composition [..., 2, 3] -> (adapter - SAE) / SAE, [..., 3]: the figure of Table 2."""
    adapter, sae = share.unbind(-2)
    return (adapter - sae) / sae


def composition(counts: Counts, mask: Tensor) -> Tensor:
    """The pooled share: of all events, those whose feature is in the mask. bool [F] -> float64 [2,
    3]; nan where there is no event.
    """
    return counts.events[..., mask].sum(-1).double() / counts.events.sum(-1)


def resampled_composition(pair_events: Tensor, resamples: int, seed: int) -> Tensor:
    """The pooled share of every category over pairs drawn with replacement: [P, 2, 3, C + 1] ->
    [resamples, C, 2, 3].
    """
    drawn = resampled(pair_events.permute(3, 1, 2, 0).double(), resamples, seed)  # [B, C + 1, 2, 3]
    return drawn[:, :-1] / drawn[:, -1:]


def paper_composition(counts: Counts) -> Tensor:
    """The share of every category as the paper measures it: float64 [C, 2 first, 2, 3]."""
    totals = counts.shares.pair_shares.sum(0).movedim(-1, 0)
    return totals / counts.shares.positions[counts.shares.group]


def resampled_paper_composition(counts: Counts, resamples: int, seed: int) -> Tensor:
    """The same over pairs drawn with replacement: [resamples, C, 2 first, 2, 3]."""
    shares = counts.shares
    totals = shares.pair_shares.movedim(0, -1)  # [2, 2, 3, C, P]
    positions = shares.pair_positions.movedim(0, -1).double()  # [2, 2, 3, G, P]
    drawn = resampled(torch.cat([totals, positions], -2), resamples, seed).movedim(-1, 1)
    C = totals.shape[-2]
    return drawn[:, :C] / drawn[:, C:][:, shares.group]
