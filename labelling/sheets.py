"""A person's judgement: a blind sheet, what it says once it is filled in, and how far labels agree
with it (paper's Table 6).
"""

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from labelling.explanations import Explanations
from labels import SAE_KEYS, SHEET, read_header_and_rows, sae_name, said, says
from runtime.messages import brief
from runtime.output import write_whole
from runtime.sources import UserError


def write_sheet(out: Path, e: Explanations, categories: list[str], n: int, seed: int) -> None:
    """A csv of n features drawn uniformly: explanations, and an empty column for each category.

    Raises UserError if there are fewer features, or if the file exists.
    """
    if n > len(e.texts):
        raise UserError(f"--sample {n}: there are {len(e.texts)} features.")
    if out.suffix != ".csv":
        raise UserError(f"--out {out}: the sheet is a csv, its name should say so.")
    if out.exists():
        raise UserError(
            f"--out {out}: exists already, and may hold a person's answers; choose another name."
        )
    sheet = io.StringIO()
    table = csv.writer(sheet)
    table.writerow([*SHEET, *categories])
    for i in np.random.default_rng(seed).choice(len(e.texts), n, replace=False).tolist():
        text = e.texts[i]
        if text[0] in "=+-@":  # a spreadsheet would take it for a formula
            text = "'" + text
        table.writerow([int(e.features[i]), sae_name(e.sae), text, *[""] * len(categories)])
    write_whole(out, sheet.getvalue())
    print(
        f"{n} features written to {out}: fill in {', '.join(categories)} with yes or no; "
        "give it as --human, here or to the audit."
    )


# --- what was given -------------------------------------------------------------------------------


class Given(NamedTuple):
    """Labels of single features by a person or a judge, or counts of how often two agree."""

    path: Path
    sae: str  # as sae_name gives it; "" where the file does not say
    labels: dict[str, dict[int, bool]]  # category -> feature -> yes or no
    counts: dict[str, np.ndarray]  # category -> int64 [2, 2]: features by [machine, person]
    texts: dict[int, str]  # feature -> its explanation, "" where there is none
    learned: frozenset[int]  # features whose labels by a person trained the judge

    def unseen(self, learned: frozenset[int]) -> "Given":
        """The same without the learned features' labels. Raises UserError if none is left."""
        left = {
            name: {k: yes for k, yes in of.items() if k not in learned}
            for name, of in self.labels.items()
        }
        if any(self.labels.values()) and not any(left.values()):
            raise UserError(
                f"{self.path}: the judge learned from these labels, so they cannot measure it; "
                "labels of other features were expected."
            )
        return self._replace(labels=left)


def read_given(path: str | Path) -> Given:
    """Read labels from any of these: a sheet that a person has filled in, a label file, or rows of
    feature, category, label. Or read counts: rows of category, machine, human, count, or the
    agreement file that labelling writes.

    Raises UserError for a row that cannot be read or contradicts another, naming it, and for a file
    without a label.
    """
    path = Path(path)
    header, rows = read_header_and_rows(path)
    counts: dict[str, np.ndarray] = {}
    others = []
    for number, row in enumerate(rows, start=1):
        category = row.get("category")
        if isinstance(category, str) and ("count" in row or "tp" in row):
            table = counts.setdefault(category, np.zeros((2, 2), dtype=np.int64))
            table += _counted(f"{path}: row {number}", row)
        else:
            others.append((number, row))
    texts, labels, saes = said(path, others)
    if any(header.get(key) for key in SAE_KEYS):
        saes.add(sae_name(header))
    if len(saes) > 1:
        raise UserError(f"{path}: is of {len(saes)} SAEs, labels of one were expected.")
    labels = {name: of for name, of in labels.items() if of}
    if not labels and not counts:
        raise UserError(f"{path}: holds no label, neither a yes nor a no.")
    return Given(path, "".join(saes), labels, counts, texts, frozenset(header.get("learned", ())))


def _counted(where: str, row: dict) -> np.ndarray:
    """A row of counts -> int64 [2, 2], features by [machine, person]."""
    if "tp" in row:
        cells = {"tp": (1, 1), "fp": (1, 0), "fn": (0, 1), "tn": (0, 0)}
    else:
        both = [says(where, row, name) for name in ("machine", "human")]
        if None in both:
            raise UserError(f"{where}: machine and human must each be yes or no.")
        cells = {"count": tuple(map(int, both))}
    table = np.zeros((2, 2), dtype=np.int64)
    for column, cell in cells.items():
        value = str(row.get(column)).strip()
        if not value.isdecimal() or len(value) > 15:
            raise UserError(f"{where}: {column} is {brief(value)!r}, a whole number was expected.")
        table[cell] = int(value)
    return table


# --- agreement ------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """How often a judge (predicted) agrees with a person (true)."""

    n: int
    accuracy: float
    mcc: float
    mcc_low: float  # bounds of the 95 % bootstrap interval
    mcc_high: float
    kappa: float  # Cohen's
    tp: int
    fp: int
    fn: int
    tn: int

    def __str__(self) -> str:
        if self.n == 0:
            return "nothing to compare"
        return (
            f"accuracy {self.accuracy:.3f}, MCC {self.mcc:.3f} "
            f"[{self.mcc_low:.3f}, {self.mcc_high:.3f}], kappa {self.kappa:.3f} on {self.n} "
            f"(yes by both {self.tp}, by the judge alone {self.fp}, by the other alone {self.fn}, "
            f"by neither {self.tn})"
        )


def agreement(
    tp: int, fp: int, fn: int, tn: int, resamples: int = 10_000, seed: int = 0
) -> Agreement:
    """Accuracy, Matthews correlation and Cohen's kappa of a confusion table.

    Resampling the n rows with replacement draws the four counts from a multinomial, which is what
    is done. MCC and kappa are 0 if a side uses one label only, and nan without any row.
    """
    table = np.array([tp, fp, fn, tn], dtype=np.float64)
    n = int(table.sum())
    if n == 0:
        return Agreement(0, *[float("nan")] * 5, 0, 0, 0, 0)
    drawn = np.random.default_rng(seed).multinomial(n, table / n, size=resamples)
    low, high = np.percentile(_mcc(drawn.T.astype(np.float64)), [2.5, 97.5])
    accuracy = (tp + tn) / n
    chance = ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / n**2
    kappa = (accuracy - chance) / (1 - chance) if chance < 1 else 0.0
    mcc = float(_mcc(table))
    return Agreement(n, accuracy, mcc, float(low), float(high), kappa, tp, fp, fn, tn)


def compare(predicted: np.ndarray, true: np.ndarray) -> Agreement:
    """Agreement of two bool arrays [n]."""
    cells = (predicted & true, predicted & ~true, ~predicted & true, ~predicted & ~true)
    return agreement(*(int(cell.sum()) for cell in cells))


def report(path: Path, person: Given) -> None:
    """Compare a label file with a person's labels, by every category that both have.

    Prints the agreement and writes it beside the label file, as NAME.agreement.json. Raises
    UserError if the two are of different SAEs, have no category in common, or if the judge learned
    from the person's labels.
    """
    machine = read_given(path)
    if machine.sae and person.sae and machine.sae != person.sae:
        raise UserError(
            f"--human {person.path}: is of the SAE {brief(person.sae)}, "
            f"{path} is of {brief(machine.sae)}."
        )
    blind = person.unseen(machine.learned)
    names = [name for name in machine.labels if blind.labels.get(name)]
    if not names:
        theirs, ours = (brief(", ".join(given.labels) or "none") for given in (person, machine))
        raise UserError(
            f"--human {person.path}: has labels of the categories {theirs}, {path} of {ours}; "
            "one in common was expected."
        )
    found = {}
    for name in names:
        judged, given = machine.labels[name], blind.labels[name]
        both = np.array([(judged[k], yes) for k, yes in given.items() if k in judged], dtype=bool)
        both = both.reshape(-1, 2)
        found[name] = compare(both[:, 0], both[:, 1])
        left_out = {
            "without a label of the judge's": len(given) - len(both),
            "that the judge learned from": len(person.labels[name]) - len(given),
        }
        more = "".join(f"; {n} more {why}" for why, n in left_out.items() if n)
        print(f"{brief(name)}: {found[name]}{more}")
    out = path.with_suffix(".agreement.json")
    counts = {name: a._asdict() if a.n else None for name, a in found.items()}
    write_whole(out, json.dumps(counts, indent=2) + "\n")
    print(f"written to {out}; the audit takes it as --human")


def _mcc(table: np.ndarray) -> np.ndarray:
    """Matthews correlation of tp, fp, fn, tn [4, ...] -> [...]; 0 if a side uses one label only."""
    tp, fp, fn, tn = table
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return np.where(product > 0, (tp * tn - fp * fn) / np.sqrt(np.maximum(product, 1)), 0.0)
