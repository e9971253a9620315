"""Read and write explanations and category labels of an SAE's features.

Feature k of one SAE has nothing to do with feature k of another, so a file of labels is refused
unless it belongs to the SAE in use. Our own files (FORMAT) are jsonl: a header that names the SAE,
then one row for each feature and category:

    {"format": "fsrl-labels-1", "kind": "fires", "sae": ..., "sae_id": ..., "sae_sha256": ...}
    {"feature": 12, "category": "alignment", "label": true, "confidence": 0.9, "description": ...}

A row without `label` names the only category of its feature. Neuronpedia's exports (rows with
modelId, layer, index, description) name their SAE by a source id: see runtime/sae_ids.py.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from runtime import rows, sae_ids
from runtime.messages import brief
from runtime.output import publish
from runtime.sources import UserError, sha256
from sae import JumpReLUSAE

FORMAT = "fsrl-labels-1"
UNKNOWN_SOURCE = "Neuronpedia's "  # prefix of the `sae` of a source id that we do not know
RESERVED = ("end", "rest", "(all)", "(none)")  # rows of tables that are no category
SAE_KEYS = ("sae", "sae_id", "sae_sha256")
SHEET = ("feature", "sae", "explanation")  # first columns of a person's sheet; then the categories
SAYS = {"yes": True, "y": True, "true": True, "1": True, "related": True}
SAYS |= {"no": False, "n": False, "false": False, "0": False, "not-related": False, "": None}


class Labels(NamedTuple):
    """A label file about the F features of one SAE."""

    name: str  # the file's stem, for titles
    kind: str  # "fires": by what activates a feature; "promotes": by the tokens it makes likelier
    explanations: dict[int, str]  # feature -> text
    categories: dict[str, np.ndarray]  # category -> bool [F]; {} for explanations alone
    matched: bool  # False where --assume-labels-match says that the file belongs to the SAE
    sae: dict[str, str | None]  # sae, sae_id, sae_sha256 as the file states them
    path: Path
    sha256: str
    judge: str | None = None  # who gave the labels, as the file states it
    learned: frozenset[int] = frozenset()  # features whose labels by a person trained the judge
    # category -> bool [F], the features with a yes or a no; None: all of them
    labelled: dict[str, np.ndarray] | None = None

    def has_label(self, category: str) -> np.ndarray:
        """The features that have a label of the category, yes or no: bool [F]."""
        if self.labelled is None:
            return np.ones_like(self.categories[category])
        return self.labelled[category]


class Said(NamedTuple):
    """What the rows of a file say of features."""

    texts: dict[int, str]  # feature -> its explanation, "" where there is none
    labels: dict[str, dict[int, bool]]  # category -> feature -> yes or no
    saes: set[str]  # the SAEs that a sheet's rows name


def load_labels(path: str | Path, sae: JumpReLUSAE, assume_match: bool = False) -> Labels:
    """Read a label or explanation file that belongs to `sae`.

    Raises UserError where it belongs to another SAE, or states none and assume_match is False; and
    for a row that cannot be read, naming it.
    """
    path = Path(path)
    header, found = read_header_and_rows(path)
    stated = stated_sae(path, header, found)
    matched = _matches(path, stated, sae, assume_match)
    given = said(path, enumerate(found, start=1))
    if not given.texts and not given.labels:
        raise UserError(f"{path}: holds neither a label nor an explanation.")
    for k in given.texts:
        if k >= sae.d_sae:
            raise UserError(f"{path}: feature {k}; the SAE has features 0 to {sae.d_sae - 1}.")

    categories, labelled = {}, {}
    for name, of in given.labels.items():
        if name in RESERVED:
            raise UserError(f"{path}: {name!r} cannot be the name of a category.")
        categories[name] = np.zeros(sae.d_sae, dtype=bool)
        categories[name][[k for k, yes in of.items() if yes]] = True
        labelled[name] = np.zeros(sae.d_sae, dtype=bool)
        labelled[name][list(of)] = True
    judges = sorted({str(row["judge"]) for row in found if row.get("judge")})
    return Labels(
        name=path.stem,
        kind=header.get("kind") or "fires",
        explanations={k: text for k, text in given.texts.items() if text},
        categories=categories,
        matched=matched,
        sae=stated,
        path=path,
        sha256=sha256(path),
        judge=header.get("judge") or ", ".join(judges) or None,
        learned=frozenset(header.get("learned", ())),
        labelled=labelled,
    )


def said(path: Path, rows: Iterable[tuple[int, dict]]) -> Said:
    """Read (number, row) pairs of label files, of explanations, or of a sheet that a person filled.

    Raises UserError for a row that cannot be read or contradicts another, naming it.
    """
    found = Said({}, {}, set())
    of_one_category = set()
    for number, row in rows:
        where, category = f"{path}: row {number}", row.get("category")
        if not isinstance(category, str | None):
            raise UserError(f"{where}: category must be a name, found {brief(category)}.")
        k = feature_index(path, number, row)
        text = str(row.get("description") or row.get("explanation") or "").strip()
        here = {}
        if category is None and row.keys() >= {*SHEET}:
            text = re.sub(r"^'(?=[=+@-])", "", text)  # see labelling.sheets.write_sheet
            found.saes.update({str(row["sae"])} - {"", "None"})
            here = {name: says(where, row, name) for name in row if name not in SHEET}
        elif category is not None and "label" in row:
            here = {category: says(where, row, "label")}
        elif category is not None:
            of_one_category.add(k)
            here = {category: True}
        found.texts[k] = found.texts.get(k) or text
        for name, yes in here.items():
            of = found.labels.setdefault(name, {})
            if yes is not None and of.setdefault(k, yes) is not yes:
                raise UserError(f"{where}: feature {k} is labelled both ways.")
    for of in found.labels.values():
        of.update({k: False for k in of_one_category - of.keys()})
    return found


def says(where: str, row: dict, column: str) -> bool | None:
    """A cell's yes or no; None where it is empty. Raises UserError for anything else."""
    cell = row.get(column)
    word = "" if cell is None else str(cell).strip().lower()
    if word not in SAYS:
        raise UserError(f"{where}: {brief(column)} is {brief(cell)!r}, yes or no was expected.")
    return SAYS[word]


def read_header_and_rows(path: str | Path, file: BinaryIO | None = None) -> tuple[dict, list[dict]]:
    """(header, rows) of any file that runtime/rows.py reads; the header of other formats is {}.

    Raises UserError naming the file, and the row that cannot be read.
    """
    found = rows.read(path, file)
    header = found.pop(0) if found and "format" in found[0] else {}
    if header and header["format"] != FORMAT:
        raise UserError(f"{path}: its format is {brief(header['format'])}, {FORMAT} was expected.")
    for key in (*SAE_KEYS, "kind", "judge"):
        if not isinstance(header.get(key), str | None):
            raise UserError(f"{path}: {key} in its first line must be text.")
    learned = header.get("learned", [])
    if not isinstance(learned, list) or not all(isinstance(k, int) for k in learned):
        raise UserError(f"{path}: learned in its first line must be a list of features.")
    return header, found


def write_labels(path: str | Path, header: dict, rows: Iterable[dict]) -> None:
    """Write a label file; after a failure there is no new file, and an old one is unchanged.

    header: kind, sae, sae_id, sae_sha256, judge, ... rows: may be a generator, so that millions of
    rows need not be in memory. Raises UserError where the file cannot be written.
    """
    path = Path(path)
    with publish(path.parent) as part, open(part / path.name, "w", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT, **header}, ensure_ascii=False) + "\n")
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def feature_index(path: Path, number: int, row: dict) -> int:
    """A row's feature: `feature`, or Neuronpedia's `index`, which is a string. Raises UserError."""
    value = row.get("feature", row.get("index"))
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**9:
        raise UserError(
            f"{path}: row {number} has no feature index (`feature` or `index`): {brief(value)!r}."
        )
    return value


def stated_sae(path: Path, header: dict, rows: list[dict]) -> dict[str, str | None]:
    """sae, sae_id, sae_sha256 from the header or the rows' Neuronpedia source; {} without either.

    Raises UserError for rows of several SAEs.
    """
    if header:
        return {key: header.get(key) for key in SAE_KEYS}
    sources = {
        (str(row["modelId"]), str(row["layer"]))
        for row in rows
        if "modelId" in row and "layer" in row
    }
    if len(sources) > 1:
        some = brief(", ".join(sorted(map("/".join, sources))))
        raise UserError(
            f"{path}: describes features of several SAEs, {some}; "
            "labelling reads one, name one of them with --source."
        )
    if not sources:
        return {}
    model_id, source = sources.pop()
    known = sae_ids.sae_of(model_id, source)
    repo, sae_id = known or (UNKNOWN_SOURCE + model_id, source)
    return dict(sae=repo, sae_id=sae_id, sae_sha256=None)


def sae_name(sae: dict) -> str:
    """An SAE in one line: repository or path, id, and the first digits of its hash."""
    digest = (sae.get("sae_sha256") or "")[:12]
    parts = (sae.get("sae"), sae.get("sae_id"), digest and f"({digest})")
    return " ".join(filter(None, parts)) or "unnamed"


def explain(labels: list[Labels], k: int) -> str:
    """The explanation of feature k in the first label file that has one; "" if none has."""
    return next((table.explanations[k] for table in labels if k in table.explanations), "")


def categories(labels: list[Labels], k: int) -> str:
    """The categories of feature k in each label file: "fires: style; promotes: content"."""
    named = {table.name: [c for c, mask in table.categories.items() if mask[k]] for table in labels}
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in named.items() if found)


def described(table: Labels) -> dict:
    """What a table of results records of a label file that it was made with; `text` in words."""
    words = {"fires": "by what a feature fires on", "promotes": "by what a feature promotes"}
    by = words.get(table.kind, table.kind)
    match = "of this SAE" if table.matched else "ASSUMED to be of this SAE, the file does not say"
    return dict(
        name=table.name,
        kind=table.kind,
        judge=table.judge,
        matched=table.matched,
        sha256=table.sha256,
        **table.sae,
        text=f"{table.name}: {by}; judge: {table.judge or 'not stated'}; {match}",
    )


def _matches(path: Path, stated: dict, sae: JumpReLUSAE, assume_match: bool) -> bool:
    """Whether the file states this SAE, by hash where both have one, else by repository and id.

    False where it states none and assume_match is True. Raises UserError for another SAE.
    """
    ours = dict(sae=sae.source, sae_id=sae.sae_id, sae_sha256=sae.sha256)
    if not any(stated.values()):
        if not assume_match:
            raise UserError(
                f"{path}: does not say which SAE it belongs to; --assume-labels-match takes it for "
                f"{_name(ours)}."
            )
        return False
    hashed = stated.get("sae_sha256")
    if hashed and sae.sha256:
        same = hashed == sae.sha256
    else:  # compared by name alone, so that a local copy of a repository counts as the repository
        same_repo = Path(stated.get("sae") or "").name == Path(sae.source).name
        same = same_repo and stated.get("sae_id") == sae.sae_id
    if not same and assume_match and not hashed:
        return False
    if not same:
        both = hashed and sae.sha256
        digests = f" (sha256 {hashed[:12]}, {sae.sha256[:12]} in use)" if both else ""
        theirs = brief(_name(stated))
        raise UserError(
            f"{path}: belongs to the SAE {theirs}, the run's is {_name(ours)}{digests}."
        )
    return True


def _name(sae: dict) -> str:
    return sae_name({**sae, "sae_sha256": None})
