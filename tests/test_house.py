"""The shape of the code: imports point one way, without circles; none hides inside a function."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# A file may import from its own level and from those before it.
LEVELS = (
    ("kernels",),
    ("runtime",),
    ("",),  # the root
    ("audit", "labelling", "generation", "evals", "tiny"),
    ("experiments", "benchmarks"),
)
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in LEVEL
    for path in (ROOT / folder).glob("*.py" if not folder else "**/*.py")
)
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}


def top(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else ""


def imported(path: Path) -> list[tuple[str, ast.stmt]]:
    """Project modules that a file imports, each with its statement."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [(name, node) for name in names if name in MODULES]
    return found


def test_every_source_file_stands_on_a_level():
    tracked = {path.parts[0] for path in map(Path, (p.name for p in ROOT.iterdir() if p.is_dir()))}
    with_code = {name for name in tracked if [*(ROOT / name).glob("**/*.py")]}
    assert {n for n in with_code if not n.startswith((".", "runs", "venv"))} <= {*LEVEL, "tests"}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_one_way(path):
    for name, _ in imported(path):
        other = top(MODULES[name])
        assert LEVEL[other] <= LEVEL[top(path)], f"{path} imports {name}, which stands above it"
        if name == "train" and path.stem != "train":
            assert top(path) in LEVELS[-1], f"{path} imports train"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_an_import_inside_a_function_says_why(path):
    lines = (ROOT / path).read_text().splitlines()
    for name, node in imported(path):
        if node.col_offset == 0:
            continue
        said = "#" in lines[node.lineno - 1] or lines[node.lineno - 2].strip().startswith("#")
        assert said, f"{path}:{node.lineno} imports {name} inside a block without a comment"


def test_there_are_no_circles():
    edges = {
        name: {other for other, _ in imported(path)} - {name} for name, path in MODULES.items()
    }
    edges = {
        name: {o for o in others if not name.startswith(o + ".")} for name, others in edges.items()
    }
    done: set[str] = set()
    way: list[str] = []

    def visit(name: str) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name in done:
            return
        way.append(name)
        for other in sorted(edges[name]):
            visit(other)
        way.pop()
        done.add(name)

    for name in edges:
        visit(name)


def test_nothing_edits_the_import_path():
    for path in SOURCES:
        assert "sys.path" not in (ROOT / path).read_text(), path
