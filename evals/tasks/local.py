"""The benchmarks' rows from a folder of jsonl files instead of the Hub, for the yaml files beside
this one.

    truthfulqa_mc.jsonl        {question, mc1_targets, mc2_targets}, each of them {choices, labels}
    gsm8k_train*.jsonl         {question, answer}, the worked examples are drawn from these
    gsm8k_test.jsonl           {question, answer}
    mmlu_dev.jsonl, mmlu_test.jsonl   {question, subject, choices: [4], answer: 0..3}

The columns are those of the Hub's data sets. The folder is the harness's metadata `data_dir`.
"""

import functools
from pathlib import Path

import datasets
import numpy as np

from runtime.rows import decode_row, read_rows
from runtime.sources import UserError

COLUMNS = {
    "truthfulqa_mc": {"question": str, "mc1_targets": dict, "mc2_targets": dict},
    "gsm8k": {"question": str, "answer": str},
    "mmlu": {"question": str, "subject": str, "choices": list, "answer": int},
}


def find(data_dir: str | None, pattern: str) -> Path:
    """The one file of the folder that the pattern names. Raises UserError when there is none, or a
    choice.
    """
    if data_dir is None or not Path(data_dir).is_dir():
        raise UserError(f"--data-dir {data_dir}: a folder that holds {pattern} was expected.")
    found = sorted(Path(data_dir).glob(pattern))
    if len(found) != 1:
        raise UserError(
            f"--data-dir {data_dir}: holds {len(found)} files {pattern}, one was expected."
        )
    return found[0]


@functools.cache
def rows(path: Path, benchmark: str) -> list[dict]:
    """All rows of a file. Raises UserError naming the row that lacks a column."""
    found = []
    for where, raw in read_rows(path):
        row = decode_row(where, raw)
        for column, kind in COLUMNS[benchmark].items():
            if not isinstance(row.get(column), kind):
                raise UserError(
                    f"{where}: its {column} is {row.get(column)!r}; a {kind.__name__} was expected."
                )
        found.append({column: row[column] for column in COLUMNS[benchmark]})
    return found


def truthfulqa(data_dir: str | None = None, **_) -> dict[str, datasets.Dataset]:
    return {
        "validation": datasets.Dataset.from_list(
            rows(find(data_dir, "truthfulqa_mc.jsonl"), "truthfulqa_mc")
        )
    }


def gsm8k(data_dir: str | None = None, **_) -> dict[str, datasets.Dataset]:
    files = {split: find(data_dir, f"gsm8k_{split}*.jsonl") for split in ("train", "test")}
    return {split: datasets.Dataset.from_list(rows(file, "gsm8k")) for split, file in files.items()}


def mmlu(subject: str, data_dir: str | None = None, **_) -> dict[str, datasets.Dataset]:
    """One subject's rows, in the order of the file."""
    splits = {}
    for split in ("dev", "test"):
        file = find(data_dir, f"mmlu_{split}.jsonl")
        own = [row for row in rows(file, "mmlu") if row["subject"] == subject]
        if not own:
            raise UserError(f"{file}: holds no row of the subject {subject}.")
        splits[split] = datasets.Dataset.from_list(own)
    return splits


def probability_of_true(doc: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
    """MC2: the share of the true answers in the probability of all answers given."""
    logps = np.array([logp for logp, _ in results])
    p = np.exp(logps - logps.max())
    return {"acc": float(p[np.array(doc["mc2_targets"]["labels"]) == 1].sum() / p.sum())}
