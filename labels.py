"""What people and machines say about features, and of which SAE they say it.

Feature k of one SAE has nothing to do with feature k of another, so a file of labels is refused unless it belongs
to the SAE in use. A file of ours (FORMAT) is jsonl: a header that names the SAE, then a row a feature and category:

    {"format": "fsrl-labels-1", "kind": "fires", "sae": ..., "sae_id": ..., "sae_sha256": ..., "judge": ...}
    {"feature": 12, "category": "alignment", "label": true, "confidence": 0.9, "judge": ..., "description": ...}

Neuronpedia's exports (rows of modelId, layer, index, description) name their SAE by a source id, see neuronpedia_sae.
"""

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.sources import UserError, sha256
from sae import JumpReLUSAE

FORMAT = "fsrl-labels-1"
UNKNOWN_SOURCE = "Neuronpedia's "  # begins the `sae` of rows whose source no table below translates
LARGEST = 1 << 32  # bytes a file may unpack to; a million explanations take about 0.2 GB
NEURONPEDIA_SOURCE = re.compile(r"(\d+)-gemmascope-(res|transcoder)-(\d+[km])(?:__l0-(\d+))?")

# Which average L0 Neuronpedia's unsuffixed source ids stand for, block by block (SAELens's table of published SAEs).
# The paper's SAEs, of lowest L0, are the suffixed ones: `12-gemmascope-res-65k` is average_l0_72, not average_l0_21.
NEURONPEDIA_L0 = {
    (
        "gemma-2-2b",
        "16k",
    ): "105 102 141 59 124 68 70 69 71 73 77 80 82 84 84 78 78 77 74 73 71 70 72 75 73 116",
    (
        "gemma-2-2b",
        "65k",
    ): "73 121 77 89 89 105 107 107 111 118 128 70 72 75 73 127 128 125 116 115 114 111 116 123 "
    "124 93",
    (
        "gemma-2-9b",
        "16k",
    ): "129 69 67 90 91 77 93 92 99 100 113 118 130 132 67 131 75 73 71 132 68 129 123 120 114 114 "
    "116 118 119 119 120 114 111 114 114 120 120 124 128 131 125 113",
    (
        "gemma-2-9b",
        "131k",
    ): "41 56 70 103 101 94 120 119 72 75 84 88 96 99 105 103 121 117 113 110 114 109 105 101 97 "
    "96 97 96 98 97 95 92 88 91 89 94 93 96 101 99 94 84",
}
NEURONPEDIA_REPO = {
    "gemma-2-2b": "google/gemma-scope-2b-pt-res",
    "gemma-2-9b": "google/gemma-scope-9b-pt-res",
    "gemma-2-9b-it": "google/gemma-scope-9b-it-res",
}


class Labels(NamedTuple):
    """F features of one SAE, as one file describes them."""

    name: str  # the file's stem, for titles
    kind: str  # "fires": by what activates a feature; "promotes": by the tokens it makes likelier
    explanations: dict[int, str]
    categories: dict[
        str, np.ndarray
    ]  # category -> bool [F]; empty for a file of explanations alone
    matched: bool  # False where the reader was told to assume that the file belongs to the SAE
    sae: dict[str, str | None]  # sae, sae_id, sae_sha256 as the file states them
    path: Path
    sha256: str
    judge: str | None = None  # who gave them, as the file states it


def load_labels(path: str | Path, sae: JumpReLUSAE, assume_match: bool = False) -> Labels:
    """Read a label or explanation file that belongs to `sae`.

    Raises UserError naming both SAEs when it belongs to another, naming the file when it does not say to which and
    assume_match is False, and naming the row that cannot be read.
    """
    path = Path(path)
    header, rows = read_rows(path)
    stated = stated_sae(path, header, rows)
    matched = _matches(path, stated, sae, assume_match)
    explanations, categories = {}, {}
    for number, row in enumerate(rows, start=1):
        k = feature_index(path, number, row)
        if k >= sae.d_sae:
            raise UserError(
                f"{path}: row {number} is of feature {k}; the SAE has features 0 to {sae.d_sae - 1}."
            )
        if text := str(row.get("description") or "").strip():
            explanations.setdefault(k, text)
        category = row.get("category")
        if category is not None:
            label = row.get("label", True)
            if not isinstance(category, str) or not isinstance(label, bool | None):
                raise UserError(
                    f"{path}: row {number}: category must be a name and label true, false or null."
                )
            categories.setdefault(category, np.zeros(sae.d_sae, dtype=bool))[k] = bool(label)
    judge = (
        header.get("judge")
        or ", ".join(sorted({str(row["judge"]) for row in rows if row.get("judge")}))
        or None
    )
    kind = header.get("kind", "fires")
    return Labels(
        path.stem, kind, explanations, categories, matched, stated, path, sha256(path), judge
    )


def read_rows(path: str | Path) -> tuple[dict, list[dict]]:
    """(header, rows) of a jsonl, json or csv file, gzipped or not; the header is {} where the file has none of ours.

    Raises UserError naming the file and the row for what cannot be read, or unpacks to more than LARGEST bytes.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UserError(f"{path}: unpacks to more than {LARGEST >> 30} GB.")
        text = data.decode()
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e}).") from e
    name = path.name.removesuffix(".gz")
    number = 0
    try:
        if name.endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(text)))
        elif name.endswith(".json"):
            rows = json.loads(text)
        else:
            rows = []
            for line in text.split(
                "\n"
            ):  # not splitlines, which also cuts at U+2028: json allows that in a string
                number += 1
                if line.strip():
                    rows.append(json.loads(line))
    except (ValueError, csv.Error, RecursionError) as e:
        raise UserError(
            f"{path}: {f'line {number}' if number else 'the file'} is not what its name says ({e})."
        ) from e
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: a list of objects was expected.")
    header = rows.pop(0) if rows and "format" in rows[0] else {}
    if header and header["format"] != FORMAT:
        raise UserError(f"{path}: its format is {header['format']}, {FORMAT} was expected.")
    return header, rows


def write_labels(path: str | Path, header: dict, rows: Iterable[dict]) -> None:
    """Write a file of ours, whole or not at all. header: kind, sae, sae_id, sae_sha256, judge, date, ...

    Raises UserError where it cannot be written. A row at a time: of millions of features, rows that are dicts take
    gigabytes.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w") as file:
            for line in chain([{"format": FORMAT} | header], rows):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}).") from e


def feature_index(path: Path, number: int, row: dict) -> int:
    """The feature a row is about: `feature`, or `index` as Neuronpedia writes it (a string)."""
    value = row.get("feature", row.get("index"))
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(
            f"{path}: row {number} has no feature index (`feature` or `index`): {value!r}."
        )
    return value


def stated_sae(path: Path, header: dict, rows: list[dict]) -> dict[str, str | None]:
    """sae, sae_id, sae_sha256 that the header states, or the Neuronpedia source of the rows; {} where neither does."""
    if header:
        return {key: header.get(key) for key in ("sae", "sae_id", "sae_sha256")}
    sources = {
        (str(row.get("modelId")), str(row.get("layer")))
        for row in rows
        if "modelId" in row and "layer" in row
    }
    if len(sources) > 1:
        first, second = sorted(map("/".join, sources))[:2]
        raise UserError(
            f"{path}: describes features of {len(sources)} SAEs, {first} and {second} among them."
        )
    if not sources:
        return {}
    model_id, source = next(iter(sources))
    repo, sae_id = neuronpedia_sae(model_id, source) or (UNKNOWN_SOURCE + model_id, source)
    return dict(sae=repo, sae_id=sae_id, sae_sha256=None)


def neuronpedia_sae(model_id: str, source: str) -> tuple[str, str] | None:
    """("gemma-2-2b", "12-gemmascope-res-65k__l0-21") -> (Hub repository, SAE id); None where it is not known."""
    m = NEURONPEDIA_SOURCE.fullmatch(source)
    if m is None or m[2] != "res" or model_id not in NEURONPEDIA_REPO:
        return None
    layer, width, l0 = int(m[1]), m[3], m[4]
    if l0 is None:
        known = NEURONPEDIA_L0.get((model_id, width), "").split()
        if layer >= len(known):
            return None
        l0 = known[layer]
    return NEURONPEDIA_REPO[model_id], f"layer_{layer}/width_{width}/average_l0_{l0}"


def neuronpedia_source(repo: str, sae_id: str | None) -> tuple[str, str] | None:
    """The other way: Hub repository and SAE id -> (modelId, source id) of its pages; None where there is none known."""
    m = re.fullmatch(r"layer_(\d+)/width_(\w+)/average_l0_(\d+)", sae_id or "")
    model_id = next(
        (i for i, r in NEURONPEDIA_REPO.items() if Path(r).name == Path(str(repo)).name), None
    )
    if m is None or model_id is None:
        return None
    plain, suffixed = f"{m[1]}-gemmascope-res-{m[2]}", f"{m[1]}-gemmascope-res-{m[2]}__l0-{m[3]}"
    return model_id, plain if neuronpedia_sae(model_id, plain) == neuronpedia_sae(
        model_id, suffixed
    ) else suffixed


def _matches(path: Path, stated: dict, sae: JumpReLUSAE, assume_match: bool) -> bool:
    """True for the SAE that the file states, by its hash where both are known, else by repository and id."""
    if not any(stated.values()):
        if not assume_match:
            ours = _name(sae.source, sae.sae_id)
            raise UserError(
                f"{path}: does not say which SAE it belongs to; --assume-labels-match takes it for {ours}."
            )
        return False
    if stated.get("sae_sha256") and sae.sha256:
        same = stated["sae_sha256"] == sae.sha256
    else:  # a local copy of a repository goes by the repository's name
        same = (
            stated.get("sae_id") == sae.sae_id
            and Path(stated.get("sae") or "").name == Path(sae.source).name
        )
    if not same and assume_match and not stated.get("sae_sha256"):
        return False
    if not same:
        theirs, ours = _name(stated.get("sae"), stated.get("sae_id")), _name(sae.source, sae.sae_id)
        hashes = (
            f" (sha256 {stated['sae_sha256'][:12]}, {sae.sha256[:12]} in use)"
            if stated.get("sae_sha256")
            else ""
        )
        raise UserError(f"{path}: belongs to the SAE {theirs}, the run's is {ours}{hashes}.")
    return True


def _name(repo: str | None, sae_id: str | None) -> str:
    return " ".join(filter(None, (repo, sae_id))) or "unnamed"
