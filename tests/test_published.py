"""docs/paper.md: its figures are those of published.json, and its rows point at what is there; the
published figures stand beside the own ones of a run like the published one, and of no other.
"""

import importlib
import json
import re
from dataclasses import fields

import pytest
from conftest import ROOT

import train
from audit import figures
from audit.__main__ import Settings as Audit
from audit.published import MARKS, PAGE, alike, beside, markdown, published
from evals.run import Settings as Evals
from experiments.sweep import Settings as Sweep
from labelling.label import Settings as Labelling

TEXT = PAGE.read_text()
SETTING = published()["setting"]


def section(title: str) -> str:
    return TEXT.split(f"## {title}")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a markdown table's rows, its heads first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if set("".join(row)) != {"-"}]


# --- the page -------------------------------------------------------------------------------------


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
    found, module = [], ""
    for name in re.findall(
        r"`([A-Za-z_.0-9]+(?:/[a-zA-Z_]+\.[a-z]+)?)`", section("Where it stands")
    ):
        if "/" in name:
            assert (ROOT / name).is_file(), name
            continue
        if name.startswith("."):
            name = module + name
        else:
            parts = name.split(".")
            deep = (ROOT / parts[0]).is_dir()
            module = ".".join(parts[: 2 if deep else 1])
        found.append(name)
    return found


@pytest.mark.parametrize("name", named())
def test_every_row_points_at_something_that_is_there(name):
    parts = name.split(".")
    depth = 2 if (ROOT / parts[0]).is_dir() else 1
    try:
        thing = importlib.import_module(".".join(parts[:depth]))
    except ModuleNotFoundError as e:
        if e.name != "lm_eval":
            raise
        pytest.skip("lm_eval is not installed")
    for attribute in parts[depth:]:
        thing = getattr(thing, attribute)


def test_each_deviation_says_what_paper_and_authors_do_what_this_does_and_why():
    heads, *found = rows(section("Deviations"))
    assert heads == ["", "paper", "authors' code", "here", "why"] and len(found) > 20
    for what, paper, authors, here, why in found:
        assert what and here and why and (paper, authors) != ("–", "–"), what
        assert here not in (paper, authors), f"{what}: is none"
    assert "†" not in TEXT


def test_flags_and_tests_that_the_page_names_are_there():
    known = {f.name for s in (train.Settings, Audit, Evals, Sweep, Labelling) for f in fields(s)}
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", TEXT))
    assert len(flags) > 10 and {flag.replace("-", "_") for flag in flags} <= known
    for what, *_, files in rows(section("What was checked against whom"))[1:]:
        names = re.findall(r"`(test_\w+\.py)`", files)
        assert names and all((ROOT / "tests" / name).is_file() for name in names), what


def test_the_authors_command_is_one_that_train_takes():
    """Each of its flags differs from train.py's default as the table of deviations says."""
    (line,) = re.findall(r"    python train.py (--layer 12 .*)", section("The authors'"))
    s = train.cli.parse(train.Settings, line.split())
    assert (s.layer, s.l1, s.lr) == (12, 0.02, 5e-7) and s.epochs == 2 and s.batch_size == 32
    assert (s.schedule, s.max_grad_norm, s.penalty_warmup_ratio) == ("constant-with-warmup", 0, 0.2)
    paper = train.Settings()  # its Table 5
    assert (paper.schedule, paper.warmup_ratio, paper.penalty_warmup_ratio) == ("cosine", 0.1, 0)
    assert (paper.model, paper.layer) == (SETTING["model"], SETTING["layer"])
    assert (paper.l1, paper.epochs, paper.batch_size) == (0.02, 2, 32)
    assert (paper.beta, paper.gamma_ratio) == (10.0, 0.5)
    assert (paper.max_length, paper.max_prompt_length) == (2048, 1800)


# --- beside a run's own ---------------------------------------------------------------------------

ABOUT = {key: SETTING[key] for key in ("d_model", "d_sae", "layer")}


def run_like_theirs() -> tuple[list[dict], dict[str, dict]]:
    """metrics.jsonl and tables of a made-up run."""
    metrics = [dict(split="train", epoch=0.5, seconds=1200.0), dict(split="eval", loss=3.0, l0=1e3)]
    metrics += [
        dict(split="train", epoch=1.0, seconds=1200.0),
        dict(split="eval", loss=2.5, l0=9e2),
    ]
    row = dict(labels="a", kind="fires", category="style", context="prompt", first="counted")
    row |= dict(sae=0.25, change=-0.01)
    others = [
        row | dict(first="left out", sae=0.9),
        row | dict(kind="promotes"),
        row | dict(category="x"),
    ]
    topk = [dict(percent=percent, loss=1.0 + percent) for percent in (0.0, 0.01, 3.0, 10.0, 100.0)]
    tables = dict(
        composition_paper=dict(about=ABOUT, rows=[*others, row]), topk=dict(about=ABOUT, rows=topk)
    )
    return metrics, tables


def test_a_run_like_the_published_one_has_their_figures_beside_its_own():
    found = {
        (row.where, row.figure): (row.published, row.here) for row in beside(*run_like_theirs())
    }
    assert found == {
        ("losses", "SimPO loss"): (2.73, 2.5),
        ("sparsity", "L0"): (930, 900),
        ("cost", "minutes an epoch, theirs on one GH200"): (50, 40),
        ("table_2", "a: style, prompt, SAE, %"): (25.25, 25.0),
        ("table_2", "a: style, prompt, relative change, %"): (1.91, -1.0),
        ("figure_2", "loss with 0.01 % of the dictionary"): (6.977, 1.01),
        ("figure_2", "loss with 10 % of the dictionary"): (2.783, 11.0),
    }


@pytest.mark.parametrize("key", ABOUT)
def test_a_run_of_another_shape_has_not(key):
    metrics, tables = run_like_theirs()
    for table in tables.values():
        table["about"] = ABOUT | {key: ABOUT[key] + 1}
    assert beside(metrics, tables) == []
    assert not alike(ABOUT | {key: ABOUT[key] + 1}) and alike(ABOUT)


@pytest.mark.parametrize("like_theirs", [True, False])
def test_figure_2_has_the_authors_curve_where_the_run_is_like_theirs(like_theirs):
    points = [
        dict(percent=p, features=k, loss=3.0, low=2.9, high=3.1) for p, k in ((0, 0), (1, 10))
    ]
    points.append(points[0] | dict(percent=100))
    about = dict(run="x", data="y", pairs=2, labels=[]) | ABOUT
    about |= {} if like_theirs else dict(d_sae=1024)
    (axes,) = figures.topk(points, about).axes
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    theirs = [[row["percent"], row["loss"]] for row in published()["figure_2"]["rows"]]
    assert (theirs in drawn) == like_theirs
    assert json.dumps(theirs).count("6.977") == 1
