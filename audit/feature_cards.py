"""What the page says of single features beside their numbers: the contexts in which a feature is
steered most strongly, and the tokens that it makes likelier.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from audit.counting import Counts
from audit.features import TOP, token_texts
from data import Packed, Pair
from labelling.promotes import promoted
from policy import Policy

MOST = 200  # features of the examples and tables that get a card
CONTEXTS = 3  # on a card
AROUND = 12  # tokens before the one that is shown in its context
PROMOTED = 8  # tokens on a card


def of_interest(counts: Counts, shown: dict) -> list[int]:
    """The features that the page's tables of usage show first, then those of the examples."""
    difference = counts.mean[0] - counts.mean[1]
    orders = (counts.usage[0], counts.mean[0], difference, -difference, counts.usage[1])
    n = min(2 * TOP, difference.shape[-1])
    found = [k for of in orders for k in of[1].topk(n).indices.tolist()]
    return list(dict.fromkeys([*found, *shown["often"]]))[:MOST]


class Context(NamedTuple):
    """Where a feature is steered strongly: the token, and those around it in the same text."""

    v: float
    before: str
    token: str
    after: str


class Card(NamedTuple):
    """What the page says of one feature beside its numbers."""

    promotes: list[str]  # tokens whose logits its decoder row raises most, read off the weights
    contexts: list[Context]


@torch.inference_mode()
def cards(policy: Policy, pairs: list[Pair], which: Sequence[int]) -> dict[str, dict]:
    """A Card for each of some features, by the feature's number; contexts of different pairs."""
    which = list(dict.fromkeys(which))
    steered = policy.steered
    index = torch.tensor(which, device=policy.device.name)
    found: dict[int, list[Context]] = {k: [] for k in which}
    for stream in policy.streams(pairs, "strongest contexts") if which else ():
        packed = stream.packed
        with policy.autocast():
            v = torch.cat([steered.acting(x)[:, index] for x in steered.pieces(stream.x)]).float()
        v[packed.position == 0] = 0
        for tree in range(len(stream.pairs)):
            rows = (packed.tree == tree).nonzero()[:, 0]
            at = rows[v[rows].abs().max(0).indices]  # [K], the pair's strongest position of each
            values = v.gather(0, at[None])[0].tolist()
            for k, row, value in zip(which, at.tolist(), values, strict=True):
                known = found[k]
                if value and (len(known) < CONTEXTS or abs(value) > abs(known[-1].v)):
                    known.append(_context(policy, packed, row, value))
                    known.sort(key=lambda context: -abs(context.v))
                    del known[CONTEXTS:]
    raised = promoted(policy.base, steered.sae.W_dec[index], PROMOTED) if which else []
    return {
        str(k): Card(token_texts(policy, tokens), found[k])._asdict()
        for k, tokens in zip(which, raised, strict=True)
    }


def _context(policy: Policy, packed: Packed, row: int, v: float) -> Context:
    same = (packed.tree == packed.tree[row]) & (packed.branch == packed.branch[row])
    rows = same.nonzero()[:, 0]
    at = int((rows == row).nonzero()[0])
    parts = (rows[max(0, at - AROUND) : at], rows[at : at + 1], rows[at + 1 : at + 1 + AROUND // 2])
    return Context(round(v, 4), *("".join(token_texts(policy, packed.tokens[r])) for r in parts))
