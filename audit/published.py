"""The published figures as tables of docs/paper.md.

    python -m audit.published        # writes them between the two marks of that page

docs/published.json is the one place where they stand; everything that draws or prints "theirs
beside ours" reads it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from runtime import cli
from runtime.cli import flag
from runtime.messages import brief
from runtime.output import write_whole
from runtime.rows import read_text
from runtime.sources import UserError

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "paper.md"
MARKS = ("<!-- written by python -m audit.published -->", "<!-- end of what it writes -->")


def published() -> dict:
    """Every figure that the paper and its authors published."""
    return json.loads((DOCS / "published.json").read_text())


def markdown() -> str:
    """All of published.json, in its order."""
    parts = []
    for name, entry in published().items():
        title = name.replace("_", " ").capitalize()
        if not isinstance(entry, dict):
            parts.append(f"{title}: {entry}.\n")
            continue
        notes = [entry[key] for key in ("measure", "unit", "source", "note") if key in entry]
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
        elif key != "note":
            found.append((name, value))
    return found


def table(rows: list[dict]) -> str:
    columns = list(rows[0])
    lines = [[column.replace("_", " ") for column in columns], ["---"] * len(columns)]
    lines += [[cell(row[column]) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: object) -> str:
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
