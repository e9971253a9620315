"""The published figures: as tables of docs/paper.md, and beside a run's own.

    python -m audit.published        # writes them between the two marks of that page

docs/published.json is the one place where they stand; everything that draws or prints "theirs
beside ours" reads it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runtime import cli
from runtime.cli import flag
from runtime.messages import brief
from runtime.output import write_whole
from runtime.rows import read_text
from runtime.sources import UserError

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "paper.md"
NOTES = ("measure", "unit", "source", "note")  # keys of an entry that hold words about it
MARKS = ("<!-- written by python -m audit.published -->", "<!-- end of what it writes -->")


def published() -> dict:
    """Every figure that the paper and its authors published."""
    return json.loads((DOCS / "published.json").read_text())


# --- beside a run's own ---------------------------------------------------------------------------


def alike(described: dict, keys: tuple[str, ...] = ("d_model", "d_sae", "layer")) -> bool:
    """Whether a run has the published one's shape.

    described: a table's `about`, or adapter_config.json.
    """
    setting = published()["setting"]
    return all(described.get(key) == setting[key] for key in keys)


class Beside(NamedTuple):
    """A row: a published figure and the run's own, in the same unit."""

    where: str  # in published.json
    figure: str
    published: float
    here: float


def beside(metrics: list[dict], tables: dict[str, dict]) -> list[Beside]:
    """What a run of the published one's shape has to compare; [] for any other.

    metrics: rows of metrics.jsonl. tables: of OUT/eval by name, each with `about` and `rows`.
    """
    if not any(alike(table.get("about") or {}) for table in tables.values()):
        return []
    figures = published()
    rows = []
    trained = [row for row in metrics if row["split"] == "train"]
    evaluated = [row for row in metrics if row["split"] == "eval"]
    if evaluated:
        last = evaluated[-1]
        rows.append(Beside("losses", "SimPO loss", figures["losses"]["fsrl"], last["loss"]))
        rows.append(Beside("sparsity", "L0", figures["sparsity"]["l0"], last["l0"]))
    if trained:
        minutes = sum(row["seconds"] for row in trained) / trained[-1]["epoch"] / 60
        theirs = figures["cost"]["fsrl"]["minutes_per_epoch"]
        on = f"minutes an epoch, theirs on {figures['cost']['hardware']}"
        rows.append(Beside("cost", on, theirs, minutes))

    # The authors count the first position.
    shares = tables.get("composition_paper", {}).get("rows", ())
    ours = [row for row in shares if row["first"] == "counted" and row["kind"] == "fires"]
    for theirs in figures["table_2"]["rows"]:
        for row in ours:
            if (row["category"], row["context"]) == (theirs["category"], theirs["context"]):
                of = f"{row['labels']}: {row['category']}, {row['context']}"
                for key, name in (("sae", "SAE, %"), ("change", "relative change, %")):
                    if row[key] is not None:
                        rows.append(Beside("table_2", f"{of}, {name}", theirs[key], 100 * row[key]))

    kept = {row["percent"]: row["loss"] for row in tables.get("topk", {}).get("rows", ())}
    for theirs in figures["figure_2"]["rows"]:
        if theirs["percent"] in kept:
            what = f"loss with {theirs['percent']} % of the dictionary"
            rows.append(Beside("figure_2", what, theirs["loss"], kept[theirs["percent"]]))
    return rows


# --- as tables of the page ------------------------------------------------------------------------


def markdown() -> str:
    """All of published.json, in its order."""
    parts = []
    for name, entry in published().items():
        title = name.replace("_", " ").capitalize()
        if not isinstance(entry, dict):
            parts.append(f"{title}: {entry}.\n")
            continue
        notes = [entry[key] for key in NOTES if key in entry]
        about = f": {'; '.join(notes)}" if notes else ""
        parts.append(f"**{title}**{about}.\n")
        rows = entry.get("rows")
        if rows is None:
            rows = [{"figure": key, "value": value} for key, value in flat(entry)]
        parts.append(table(rows))
    return "\n".join(parts)


def flat(entry: dict, before: str = "") -> list[tuple[str, object]]:
    """("fsrl memory gb", 55) and so on, without the notes."""
    found = []
    for key, value in entry.items():
        name = f"{before}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            found += flat(value, f"{name}, ")
        elif key not in NOTES:
            found.append((name, value))
    return found


def table(rows: list[dict]) -> str:
    columns = list(rows[0])
    lines = [[column.replace("_", " ") for column in columns], ["---"] * len(columns)]
    lines += [[cell(row[column]) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) and value > 99_999 else str(value)


@dataclass(frozen=True)
class Settings:
    page: str = flag(str(PAGE), "the page that holds the two marks")


def main() -> None:
    page = Path(cli.parse(Settings, doc=__doc__).page)
    before, opened, rest = read_text(page).partition(MARKS[0])
    _, closed, after = rest.partition(MARKS[1])
    if not (opened and closed):
        raise UserError(f"--page {brief(page)}: lacks the two marks between which figures stand.")
    write_whole(page, f"{before}{MARKS[0]}\n\n{markdown()}\n{MARKS[1]}{after}")
    print(f"Written: {page}")


if __name__ == "__main__":
    cli.run(main)
