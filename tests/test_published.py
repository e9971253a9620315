"""docs/paper.md: its figures are those of published.json, and its rows point at what is there."""

import importlib
import re

import pytest
from conftest import ROOT

from audit.published import MARKS, PAGE, markdown, published

TEXT = PAGE.read_text()


def test_the_page_prints_the_file():
    _, _, rest = TEXT.partition(MARKS[0])
    assert rest.partition(MARKS[1])[0].strip() == markdown().strip()


def test_every_figure_of_the_file_is_on_the_page():
    def numbers(entry):
        if isinstance(entry, dict):
            for value in entry.values():
                yield from numbers(value)
        elif isinstance(entry, list):
            for value in entry:
                yield from numbers(value)
        elif isinstance(entry, int | float):
            yield entry

    found = list(numbers(published()))
    assert len(found) > 100
    for number in found:
        assert re.search(rf"(?<![\d.]){re.escape(f'{number:,}')}(?!\d)|{number}", TEXT), number


def named() -> list[str]:
    """`module.name` and `module.Class.method`, in the table of where things stand."""
    section = TEXT.split("## Where it stands")[1].split("## Deviations")[0]
    found, module = [], ""
    for name in re.findall(r"`([A-Za-z_.]+(?:/[a-z_]+\.[a-z]+)?)`", section):
        if "/" in name or name.endswith((".md", ".json")):
            assert (ROOT / name).is_file(), name
            continue
        if name.startswith("."):
            name = module + name
        else:
            parts = name.split(".")
            deep = parts[0] in ("audit", "evals", "labelling", "experiments", "kernels")
            module = ".".join(parts[: 2 if deep else 1])
        found.append(name)
    return found


@pytest.mark.parametrize("name", named())
def test_every_row_points_at_something_that_is_there(name):
    if name == "train.py":
        return
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as e:
            if e.name == "lm_eval":
                pytest.skip("lm_eval is not installed")
            continue
        break
    for attribute in parts[end:]:
        thing = getattr(thing, attribute)
