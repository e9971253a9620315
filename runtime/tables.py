"""A table as csv and json of the same rows, and the interval that stands beside its numbers."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Row = dict[str, object]


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as csv; columns in the order in which the rows name them first."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_table(folder: Path, name: str, about: dict, rows: Sequence[Row]) -> None:
    """name.csv and name.json of the same rows. A number that is not there (nan) is null in json and
    empty in csv.
    """
    rows = [{key: plain(value) for key, value in row.items()} for row in rows]
    (folder / f"{name}.csv").write_text(csv_text(rows))
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    text = f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n'
    (folder / f"{name}.json").write_text(text)


def plain(value):
    """Tensors and numpy numbers as Python's; nan as None."""
    value = value.item() if isinstance(value, Tensor | np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def resampled(values: Tensor, resamples: int, seed: int) -> Tensor:
    """Means over pairs that are drawn with replacement: float64 [..., P] -> [resamples, ...].

    Pairs and not tokens, because the positions of one text are anything but independent. The draws
    depend on P and seed alone: conditions measured on the same pairs are resampled alike.
    """
    generator, P = torch.Generator().manual_seed(seed), values.shape[-1]
    drawn = []
    for _ in range(resamples):
        times = torch.bincount(torch.randint(P, (P,), generator=generator), minlength=P)
        drawn.append(values @ times.to(values.dtype) / P)
    return torch.stack(drawn)


def percentiles(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """95 % percentile interval over the first axis: [B, ...] -> low [...], high [...]; nan draws
    are left out.
    """
    low, high = torch.nanquantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype), dim=0)
    return low, high


def interval(values: Tensor, resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """95 % percentile interval of the mean over pairs: float64 [..., P] -> low [...], high
    [...].
    """
    return percentiles(resampled(values, resamples, seed))
