"""Every script against bad input, a disk that is full at each of its files, signals, lost streams.

The table SCRIPTS holds a row for each; a script without one fails. Exit code 0 with a result or 2
with one sentence, no traceback, nothing half-written.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import hostile
import pytest
from conftest import GOLDEN, ROOT, SAE_ID


@dataclass(frozen=True)
class Row:
    """A script: arguments with which it ends well in a second or so, and what they name.

    {x} in an argument is the folder prepared for all; the run's own folder is the current one.
    """

    arguments: str
    inputs: dict[str, str] = field(default_factory=dict)  # flag -> "folder" or "file"
    numbers: tuple[str, ...] = ()  # flags that take a positive number
    out: str = ""  # flag of what is written
    runs: bool = True  # False: too long, or asks a server; its own tests run it


GOLDEN_MODEL = f"--model {GOLDEN}/model --sae {GOLDEN}/sae --sae-id {SAE_ID} --layer 1"
PAIRS = {"--data": "file"}
SCRIPTS = {
    "train": Row(
        f"{GOLDEN_MODEL} --data {GOLDEN}/dataset --batch-size 4 --max-steps 2 --samples 1 --out o",
        {"--model": "folder", "--sae": "folder", "--data": "file", "--mask-features": "file"},
        ("--lr", "--l1", "--batch-size", "--max-length", "--unit"),
        "--out",
    ),
    "generation": Row(
        "--run {x}/run --prompts {x}/prompts.jsonl --max-new-tokens 2 --trace t.jsonl",
        {"--run": "folder", "--prompts": "file", "--labels": "file"},
        ("--max-new-tokens", "--batch-size", "--top-p"),
        "--trace",
    ),
    "labelling.promotes": Row(
        "--model tiny --tokens 2 --out promotes.jsonl",
        {"--model": "folder", "--sae": "folder"},
        ("--tokens",),
        "--out",
    ),
}


def scripts() -> set[str]:
    """Modules that call cli.run(main), or end in `if __name__ == "__main__"`."""
    found = set()
    for path in ROOT.rglob("*.py"):
        where = path.relative_to(ROOT)
        if where.parts[0] in ("tests", "runtime") or where.parts[0].startswith("."):
            continue
        if re.search(r"^(    )?(cli\.run\(main\)|run\(main\)|main\(\))", path.read_text(), re.M):
            found.add(".".join(where.with_suffix("").parts).removesuffix(".__main__"))
    return found


def test_every_script_has_a_row():
    assert scripts() == set(SCRIPTS)


# --- what is bad ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tiny_run, tmp_path_factory) -> Path:
    """What the scripts read, and in bad/ what no script should."""
    x = tmp_path_factory.mktemp("x")
    (x / "run").symlink_to(tiny_run)
    (x / "prompts.jsonl").write_text('{"prompt": "What is a kettle?"}\n')
    bad = x / "bad"
    bad.mkdir()
    (bad / "empty").mkdir()
    (bad / "nothing.jsonl").write_text("")
    (bad / "noise.jsonl").write_bytes(bytes(range(256)) * 8)
    (bad / "latin.jsonl").write_bytes('{"prompt": "caf\xe9"}\n'.encode("latin-1"))
    (bad / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (bad / "escape.jsonl").write_text('{"\\u001b[2J\\u001b[31m": 1}\n')
    (bad / "torn.jsonl").write_text('{"prompt": "a", "cho')
    (bad / "rows.jsonl").mkdir()
    os.mkfifo(bad / "pipe.jsonl")
    (bad / "dangling.jsonl").symlink_to(bad / "nowhere")
    (bad / "circle.jsonl").symlink_to(bad / "circle.jsonl")
    for name, content in dict(torn="{", list="[1]", absurd='{"hidden_size": 1e99}').items():
        (bad / name).mkdir()
        for file in ("config.json", "fsrl_adapter_config.json"):
            (bad / name / file).write_text(content)
    return x


NAMES = ("missing", "n" * 300, "e\x1b[31m", "not utf-8 \udcff", "nul \0")
FILES = (
    "nothing",
    "noise",
    "latin",
    "deep",
    "escape",
    "torn",
    "rows",
    "pipe",
    "dangling",
    "circle",
)
BAD = {
    "folder": (*NAMES, "empty", "noise.jsonl", "pipe.jsonl", "circle.jsonl", "torn", "list")
    + ("absurd",),
    "file": (*NAMES, "empty", *(f"{name}.jsonl" for name in FILES)),
    "number": ("nan", "inf", "-1", "x", "1e999", ""),
    "out": ("/proc/new", "{x}/bad/noise.jsonl/new", "n" * 300, "{x}/bad/pipe.jsonl", "nul \0"),
}


def bad_arguments(row: Row, x: Path) -> list[list[str]]:
    """The row's arguments with one of them made bad, in every way that applies."""
    flags = {f: (kind, BAD[kind]) for f, kind in row.inputs.items()}
    flags |= {f: ("number", BAD["number"]) for f in row.numbers}
    if row.out:
        flags[row.out] = ("out", BAD["out"])
    cases = [["--no-such-flag"], ["\x1b[31m"]]
    for flag, (kind, values) in flags.items():
        inside = kind in ("folder", "file")
        for value in values:
            value = str(x / "bad" / value) if inside and value else value.replace("{x}", str(x))
            cases.append([*given(row, x, without=flag), flag, value])
    return cases


def given(row: Row, x: Path, without: str = "") -> list[str]:
    words = row.arguments.replace("{x}", str(x)).split()
    if without in words:
        at = words.index(without)
        end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
        del words[at:end]
    return words


def last_sentence(said: str) -> str:
    return re.sub(r"\x1b\[A", "", said).strip().replace("\r", "\n").split("\n")[-1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_input_is_refused_in_one_sentence(name, prepared, tmp_path):
    row, folder = SCRIPTS[name], tmp_path / "work"
    folder.mkdir()
    cases = bad_arguments(row, prepared)
    ends = hostile.answer(*hostile.start(hostile.refused, name, cases, folder, folder=folder))
    wrong = []
    for arguments, end in zip(cases, ends, strict=True):
        sentence = last_sentence(end["said"])
        if (
            end["code"] != 2
            or "Traceback" in end["said"]
            or not re.search(r"[.!?]$", sentence)
            or len(sentence) > 1000
            or re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", end["said"].replace("\r", ""))
            or end["new"]
            or end["seconds"] > 20
            or end["peak"] > hostile.MEMORY
        ):
            end["said"] = end["said"][-600:]
            wrong.append((arguments[-2:], end))
    if os.environ.get("SLOW"):
        pairs = sorted(zip([e["seconds"] for e in ends], [c[-2:] for c in cases]), reverse=True)
        print(len(cases), *pairs[:20], sep="\n")
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("name", [name for name, row in SCRIPTS.items() if row.runs])
def test_a_fault_at_any_file_leaves_nothing_half_written(name, prepared, tmp_path):
    row, folder = SCRIPTS[name], tmp_path / "work"
    folder.mkdir()
    job = hostile.start(hostile.run, name, given(row, prepared), folder, True, folder=folder)
    whole = hostile.answer(*job)
    assert whole["code"] == 0, whole
    assert {end["name"] for end in whole["ends"]} > {"stdout"}, whole
    wrong = [end for end in whole["ends"] if not ended_well(end)]
    assert not wrong, "\n".join(map(str, wrong))


def ended_well(end: dict) -> bool:
    fault, said, sentence = end["fault"], end["said"], last_sentence(end["said"])
    if "Traceback" in said or [n for n in end["new"] if ".part" in n]:
        return False
    if fault in ("full", "full output"):
        return end["code"] == 2 and bool(re.search(r"(written|space left).*\.$", sentence))
    if fault == "no reader":
        return end["code"] == 0
    if fault == "ctrl-c":
        return end["code"] == 130 or (end["code"] == 0 and "Saved after step" in said)
    return end["code"] in (-15, 0)
