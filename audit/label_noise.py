"""How far errors of the labels move the composition (Table 2), by what a person says of features
that the machine labelled.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audit.counting import relative_change
from labelling.sheets import Given, read_given
from labels import Labels, read_header_and_rows, sae_name
from runtime.messages import brief
from runtime.sources import UserError


class Judged(NamedTuple):
    """A person's labels of some features that the machine labelled too, for one category."""

    confusion: np.ndarray  # int64 [2, 2], features by (machine's label, person's label)
    known: dict[int, bool]  # feature -> the person's label; {} where only counts are known

    @property
    def mcc(self) -> float:
        """Matthews correlation; 0 where one of the two gives a single label only."""
        (tn, fn), (fp, tp) = self.confusion.astype(float)
        product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        return float((tp * tn - fp * fn) / np.sqrt(product)) if product > 0 else 0.0


def noisy_changes(
    weights: Tensor,
    whole: Tensor,
    machine: np.ndarray,
    labelled: np.ndarray,
    judged: Judged,
    draws: int,
    seed: int,
) -> Tensor:
    """Relative changes [draws, 3] of a category's composition, under labels that a person might
    have given.

    weights [2, 3, F] and whole [2, 3]: the composition under labels bool [F] is weights @ labels /
    whole. machine: bool [F], the labels that the machine gave; labelled: bool [F], where it did.

    Each draw takes P(person says yes | machine's label m) from its posterior, Beta(yes_m + 1/2,
    no_m + 1/2), then each feature's label from that probability. Features that the person judged
    keep the person's label. This assumes that the machine's errors do not depend on how much a
    feature is used. Errors dilute a category, which pulls the draws towards no change, so that they
    need not lie around the change under the machine's labels.
    """
    rng = np.random.default_rng((seed, 1))
    yes = rng.beta(judged.confusion[:, 1] + 0.5, judged.confusion[:, 0] + 0.5, size=(draws, 2))
    known = np.array(list(judged.known), dtype=np.int64)
    changes = torch.empty(draws, 3, dtype=torch.float64)
    for i in range(draws):
        labels = rng.random(len(machine)) < yes[i][machine.astype(int)]
        labels[known] = list(judged.known.values())
        labels &= labelled
        share = weights.double() @ torch.from_numpy(labels).double() / whole  # [2, 3]
        changes[i] = relative_change(share)
    return changes


def read_human(path: str, tables: list[Labels]) -> dict[tuple[str, str], Judged]:
    """A person's labels beside each label file of kind `fires`: by (file's name, category).

    Every form that labelling.sheets.read_given takes. A person reads explanations of what features
    fire on, so that labels by what they promote are not compared. Raises UserError naming the row.
    """
    compared = [table for table in tables if table.kind == "fires"]
    if not compared:
        raise UserError(f"--human {path}: needs a label file of kind fires to compare with.")
    given = read_given(path)
    saes = {sae_name(table.sae) for table in compared if any(table.sae.values())}
    if given.sae and saes and given.sae not in saes:
        ours = brief(" and ".join(sorted(saes)))
        raise UserError(f"--human {path}: is of the SAE {brief(given.sae)}, --labels of {ours}.")

    found = {}
    for category in {**given.labels, **given.counts}:
        matching = [table for table in compared if category in table.categories]
        if not matching:
            raise UserError(
                f"{_first_row(path, category)}: category {brief(category)!r} is in none of the "
                "label files."
            )
        for table in matching:
            found[table.name, category] = _judged(given.unseen(table.learned), table, category)
    return found


def _judged(given: Given, table: Labels, category: str) -> Judged:
    machine = table.categories[category]
    known = given.labels.get(category, {})
    confusion = given.counts.get(category, np.zeros((2, 2), dtype=np.int64)).copy()
    for k in known:
        if k >= len(machine):
            last = len(machine) - 1
            raise UserError(f"{given.path}: feature {k}; the SAE has features 0 to {last}.")
    if table.labelled is not None:
        known = {k: says for k, says in known.items() if table.labelled[category][k]}
    for k, says in known.items():
        confusion[int(machine[k]), int(says)] += 1
    return Judged(confusion, known)


def _first_row(path: str, category: str) -> str:
    """Names the row of a file that first names a category; the file alone for a sheet's column."""
    _, rows = read_header_and_rows(Path(path))
    numbers = (i for i, row in enumerate(rows, start=1) if row.get("category") == category)
    return " row ".join([path, *(str(i) for i in list(numbers)[:1])])
