"""Write a table as csv and json, and compute the intervals of its numbers."""

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
    """Rows as csv, with columns in the order in which they first occur."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_table(folder: Path, name: str, about: dict, rows: Sequence[Row]) -> None:
    """Write the same rows as name.csv and name.json. nan becomes null in json, empty in csv."""
    rows = [{key: plain(value) for key, value in row.items()} for row in rows]
    (folder / f"{name}.csv").write_text(csv_text(rows))
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    text = f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n'
    (folder / f"{name}.json").write_text(text)


def plain(value):
    """A scalar of torch or numpy as a number of Python; nan and infinity as None."""
    value = value.item() if isinstance(value, Tensor | np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def resampled(values: Tensor, resamples: int, seed: int) -> Tensor:
    """Means over pairs that are drawn with replacement: float64 [..., P] -> [resamples, ...].

    Pairs are drawn and not positions, because the positions of a text are not independent. The
    draws depend on P and seed alone, so that all conditions get the same draws.
    """
    generator, P = torch.Generator().manual_seed(seed), values.shape[-1]
    drawn = []
    for _ in range(resamples):
        times = torch.bincount(torch.randint(P, (P,), generator=generator), minlength=P)
        drawn.append(values @ times.to(values.dtype) / P)
    return torch.stack(drawn)


def percentiles(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """95 % interval over the first axis: [B, ...] -> low [...], high [...]; nan is left out."""
    return torch.nanquantile(drawn, drawn.new_tensor([0.025, 0.975]), dim=0).unbind()


def interval(values: Tensor, resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """95 % interval of the mean over pairs: float64 [..., P] -> low [...], high [...]."""
    return percentiles(resampled(values, resamples, seed))
