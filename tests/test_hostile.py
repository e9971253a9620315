"""Every script against bad input, a disk that is full at each of its files, signals, lost streams.

A script without a row in SCRIPTS fails, and so does a flag that takes text and is not in FLAGS.
Exit code 0 with a result or 2 with one sentence; no traceback, nothing half-written, memory and
time bounded. The suite runs a sample; FSRL_HOSTILE=whole python -m pytest tests/test_hostile.py
runs all.
"""

import json
import os
import random
import re
import shutil
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import forked
import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import GOLDEN, ROOT, SAE_ID
from safetensors.torch import load_file, save_file

WHOLE = os.environ.get("FSRL_HOSTILE") == "whole"
SAMPLE = 6  # bad arguments of each script that the suite tries
SHARE = 100 if WHOLE else 20  # of hundred files, how many do not fit


@dataclass(frozen=True)
class Row:
    """A script: arguments with which it ends well in a second or so.

    {x} is the folder that `prepared` makes; the run's own folder is the current one.
    """

    arguments: str
    more: str = ""  # arguments of a second run with faults
    again: str = ""  # what is added to finish a run that a full disk stopped
    make_short: str = ""  # name of a function here that makes the script's work less
    runs: bool = True  # False: no run with faults, because it is too long or starts processes
    slow: bool = False  # the run with faults is left out of the suite


MODEL = f"--model {GOLDEN}/model --sae {GOLDEN}/sae --sae-id {SAE_ID}"
TRAIN = f"{MODEL} --layer 1 --data {GOLDEN}/dataset --batch-size 4 --max-steps 2 --samples 0"
RUN = f"--run {{x}}/run {MODEL} --data {GOLDEN}/dataset --labels {{x}}/labels.jsonl"
RUN += " --assume-labels-match --pairs 3 --bootstrap 3 --random-sets 1 --out o"
SCRIPTS = {
    "train": Row(
        f"{TRAIN} --out o",
        more=f"--model {GOLDEN}/model --data {GOLDEN}/dataset --batch-size 4 --max-steps 1 --full"
        " --samples 0 --out o",
        again="--resume",
    ),
    "eval_ablation": Row(f"{RUN} --keep 1"),
    "audit": Row(f"{RUN} --keep 1 --static-pairs 3 --top-features 2 --nodes 2", slow=True),
    "audit.published": Row("--page page.md", make_short="with_page"),
    "generation": Row(
        f"--run {{x}}/run {MODEL} --prompts {{x}}/prompts.jsonl --max-new-tokens 2 --trace t.jsonl"
    ),
    "labelling": Row("--explanations tiny --sample 3 --out sheet.csv"),
    "labelling.promotes": Row(f"{MODEL} --layer 1 --tokens 2 --out promotes.jsonl"),
    "evals": Row(
        f"--run {{x}}/run {MODEL} --data-dir {{x}}/questions --tasks gsm8k --limit 1"
        " --num-fewshot 0 --out o",
        runs=False,
    ),
    "experiments.planted": Row(
        "--policies style --seeds 1 --pairs 32 --eval-pairs 8 --other-pairs 2 --loss-pairs 2"
        " --costly-seeds 0 --prompts 2 --steps 2 --out o",
        slow=True,
    ),
    "experiments.sweep": Row(
        f"--layers 1 --out o -- {TRAIN.replace('--layer 1 ', '')}", make_short="with_finished_run"
    ),
    "experiments.gemma3_270m": Row(
        f"--model {GOLDEN}/model --data {GOLDEN}/dataset --out o", more="--runs {x}/run --out o"
    ),
    "experiments.jumprelu": Row("--out o", make_short="with_made_up_runs"),
    "experiments.train_sae": Row(
        f"--model {GOLDEN}/model --layer 1 --data {GOLDEN}/dataset --width 64 --l0 4 --passes 1"
        " --round-tokens 3000 --batch 64 --max-length 100 --test-pairs 2 --out o"
    ),
    "generation.export": Row(f"--run {{x}}/run {MODEL} --to o"),
    "benchmarks.compare": Row("--shape tiny --pairs 2 --steps 1", runs=False),
    "benchmarks.decode": Row("--shape tiny --tokens 2 --rounds 1", runs=False),
    "benchmarks.evals": Row("--shape tiny --limit 2 --rounds 1", runs=False),
    "benchmarks.first_step": Row("--shape mid", runs=False),
    "benchmarks.gpu": Row("--device cpu --shape tiny --pairs 2 --steps 1 --out o.json", runs=False),
    "benchmarks.labels": Row("--what tiny", runs=False),
    "benchmarks.throughput": Row("--shape tiny --pairs 2 --steps 1"),
    "tiny.build": Row("--sae-layers 1 --sae-out o", make_short="with_few_steps"),
}


# --- less work ------------------------------------------------------------------------------------


def with_page(script: dict) -> None:
    shutil.copy(script["PAGE"], "page.md")


def with_few_steps(script: dict) -> None:
    script.update(SAE_STEPS=2, SAE_TOKENS=512)


def with_made_up_runs(script: dict) -> None:
    """Of experiments.jumprelu: rows as its runs leave them."""

    def run(plan):
        n = 1 + zlib.crc32(repr(plan).encode()) % 9
        threshold = None if plan.setting.adapter == "relu" else 0.1
        measured = (1 / n, 1.0, float(n), float(n))
        return script["Result"](plan.method, plan.setting.name, *plan[2:], *measured, threshold)

    script["runner"] = lambda: run


def with_finished_run(script: dict) -> None:
    """Of experiments.sweep: what a run would leave."""

    def execute(runs, devices):
        for run in runs:
            source = Path(os.environ["FSRL_CACHE"]) / "hostile-run"
            run.out.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", source, run.out], check=True)
        return []

    script["execute"] = execute


# --- what is bad ----------------------------------------------------------------------------------

NAMES = ("missing", "n" * 300, "e\x1b[31m", "not utf-8 \udcff", "nul \0", "~nobody/x", "")
ANY = ("empty", "links", "rows.jsonl", "pipe.jsonl", "circle.jsonl", "dangling.jsonl", "huge.jsonl")
TEXT = ("nothing", "noise", "latin", "deep", "escape", "torn", "number", "surrogate", "wide")
JSONL = (*ANY, *(f"{name}.jsonl" for name in TEXT))
JSON = (*ANY, "nothing.json", "noise.json", "deep.json", "number.json", "list.json", "wide.json")
OUTS = ("/proc/new", "{x}/bad/noise.jsonl/new", "n" * 300, "{x}/bad/pipe.jsonl", "nul \0")
BAD = {  # kind of input -> names in {x}/bad, beside NAMES
    "model": (*ANY, *(f"model-{n}" for n in ("torn", "list", "absurd", "types", "index"))),
    "sae": (*ANY, *(f"sae-{name}.npz" for name in ("noise", "nan", "int", "pickle", "names"))),
    "data": (*JSONL, "long.jsonl", "types.jsonl", "torn.parquet", "types.parquet"),
    "labels": (*JSONL, "labels-index.jsonl", "labels-format.jsonl", "torn.csv", "torn.jsonl.gz"),
    "explanations": (*JSONL, "torn.csv", "torn.jsonl.gz"),
    "prompts": (*JSONL, "long.jsonl", "huge.txt", "latin.txt", "prompt.jsonl"),
    "run": (*ANY, *(f"run-{n}" for n in ("torn", "list", "types", "nan", "int", "unfinished"))),
    "json": JSON,
    "questions": ANY,
    "folder": ANY,
    "page": ("nothing.jsonl", "rows.jsonl", "pipe.jsonl", "noise.jsonl"),
}
BAD["model"] += ("model-nan", "model-int", "model-short", "model-tokenizer")
NOT_THE_TOKENIZER = ("torn", "list", "absurd", "types", "index", "nan", "int", "short")
BAD["run"] += ("run-activation", "run-settings", "run-pipe")
VALUES = {  # kind of value -> what no flag of the kind takes
    "int": ("x", "", "1.5", "nan", "\x1b[31m", "9" * 30, "9" * 5000),
    "float": ("x", "", "nan", "inf", "1e999", "\x1b[31m"),
    "choice": ("x", "", "\x1b[31m"),
    "device": ("x", "", "cuda:99", "cpu:1", "cuda:\x1b[31m"),
    "word": ("x\x1b[31m", "\udcff", "y" * 5000),
    "folder out": OUTS,
    "file out": (*OUTS, "", "."),
}
FLAGS = {  # flag -> what it names, in every script that has it
    "--model": "model",
    "--sae": "sae",
    "--sae-id": "word",
    "--data": "data",
    "--eval-data": "data",
    "--init-adapter": "run",
    "--mask-features": "json",
    "--run": "run",
    "--runs": "folder",
    "--labels": "labels",
    "--human": "labels",
    "--train": "labels",
    "--prompts": "prompts",
    "--explanations": "explanations",
    "--categories": "json",
    "--beside": "run",
    "--data-dir": "questions",
    "--page": "page",
    "--device": "device",
    "--devices": "device",
    "--unit": "float",
    "--batch-sizes": "word",
    "--extra": "word",
    "--widths": "word",
    "--adapters": "word",
    "--causes": "word",
    "--only": "word",
    "--policies": "word",
    "--push-to": "word",
    "--token-rules": "json",
    "--without": "word",
    "--tasks": "word",
    "--task": "word",
    "--trace": "file out",
    "--out": "folder out",
    "--sae-out": "folder out",
    "--to": "folder out",
    "--folder": "folder out",
    "--journal": "file out",
}
# Free text, or what only a server is asked for: nothing that it says is bad by itself.
FREE = {"--prompt", "--rest", "--source", "--endpoint", "--judge-model", "--key-env", "--embedder"}
# What can be meant, and is work: a script need not refuse it.
MEANT = {
    *(("experiments.gemma3_270m", "--model", f"model-{name}") for name in NOT_THE_TOKENIZER),
    ("train", "--init-adapter", "run-settings"),
    ("labelling", "--human", "labels-index.jsonl"),
    ("benchmarks.compare", "--role", ""),
    ("benchmarks.gpu", "--role", ""),
    ("labelling", "--sae"),
    ("labelling", "--train"),
    ("labelling", "--journal"),
    ("labelling", "--extra", "y" * 5000),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """What the scripts read, and in bad/ what no script should."""
    x = tmp_path_factory.mktemp("x")
    forked.good(forked.golden(x / "run", "--max-steps", 2, "--samples", 0))
    shutil.copytree(x / "run", Path(os.environ["FSRL_CACHE"]) / "hostile-run")
    (x / "prompts.jsonl").write_text('{"prompt": "What is a kettle?"}\n')
    labels = [dict(feature=k, category="style", label=k % 2 == 0) for k in range(64)]
    (x / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    (x / "questions").mkdir()
    asked = '{"question": "1 + 1?", "answer": "#### 2"}\n'
    for name in ("gsm8k_train", "gsm8k_test"):
        (x / "questions" / f"{name}.jsonl").write_text(asked)

    bad = x / "bad"
    bad.mkdir()
    _bad_files(bad)
    _bad_models(bad)
    _bad_saes(bad)
    _bad_runs(bad, x / "run")
    return x


def _bad_files(bad: Path) -> None:
    (bad / "empty").mkdir()
    (bad / "links").mkdir()
    for folder in (bad, bad / "links"):
        (folder / "rows.jsonl").mkdir()
        os.mkfifo(folder / "pipe.jsonl")
        (folder / "dangling.jsonl").symlink_to(bad / "nowhere")
        (folder / "circle.jsonl").symlink_to(folder / "circle.jsonl")
    for name in ("huge.jsonl", "huge.txt"):
        with open(bad / name, "wb") as file:
            file.truncate(300 << 20)  # one line, without taking room on the disk
    turn = dict(role="user", content="a" * 1_200_000)
    answer = [dict(role="assistant", content="b")]
    long = dict(prompt=[turn], chosen=answer, rejected=answer)
    wrong = dict(prompt=3, chosen={"a": 1}, rejected=[[]])
    contents = dict(
        nothing="",
        deep="[" * 100_000 + "\n",
        escape='{"\\u001b[2J\\u001b[31m": 1}\n',
        torn='{"prompt": "a", "cho',
        number="3\n",
        list="[1e999]\n",
        surrogate='{"prompt": "\\ud800", "chosen": "a", "rejected": "b", "feature": "\\ud800"}\n',
        wide=json.dumps({"y" * 100_000: 1, "feature": "y" * 100_000}) + "\n",
        prompt='{"prompt": {"a": 1}}\n',
        long=json.dumps(long) + "\n",
        types=json.dumps(wrong) + "\n",
    )
    contents["labels-index"] = '{"feature": 99999999, "category": "style", "label": true}\n'
    contents["labels-format"] = '{"format": ["fsrl-labels-1"], "sae": 3, "learned": "x"}\n'
    for name, content in contents.items():
        (bad / f"{name}.jsonl").write_text(content)
        (bad / f"{name}.json").write_text(content)
    for suffix in ("jsonl", "json"):
        (bad / f"noise.{suffix}").write_bytes(bytes(range(256)) * 8)
    for suffix in ("jsonl", "txt"):
        (bad / f"latin.{suffix}").write_bytes('{"prompt": "caf\xe9"}\n'.encode("latin-1"))
    (bad / "torn.csv").write_bytes(b'feature,"category\n1,\0')
    (bad / "torn.jsonl.gz").write_bytes(b"\x1f\x8b\x08\0torn")
    (bad / "torn.parquet").write_bytes(b"PAR1 torn PAR1")
    pq.write_table(pa.table(dict(chosen=[1, 2], rejected=[3, 4])), bad / "types.parquet")


def _bad_models(bad: Path) -> None:
    golden = GOLDEN / "model"

    def copied(name: str) -> Path:
        folder = bad / f"model-{name}"
        folder.mkdir()
        for path in golden.iterdir():
            (folder / path.name).symlink_to(path)
        return folder

    def spoiled(name: str, file: str, content: str | bytes) -> None:
        path = copied(name) / file
        path.unlink()
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    config = json.loads((golden / "config.json").read_text())
    for name, content in dict(torn="{", list="[1]", absurd='{"hidden_size": 1e99}').items():
        spoiled(name, "config.json", content)
    spoiled("types", "config.json", json.dumps(config | dict(num_hidden_layers=[2], head_dim={})))
    spoiled("index", "model.safetensors.index.json", '{"weight_map": {"a": 3, "b": ["../x"]}}')
    spoiled("tokenizer", "tokenizer.json", '{"model": 3}')
    shard = "model-00001-of-00008.safetensors"
    spoiled("short", shard, (golden / shard).read_bytes()[:-100])
    for name, change in (
        ("nan", lambda w: w.index_fill(0, torch.tensor([1]), torch.nan)),
        ("int", torch.Tensor.int),
    ):
        path = copied(name) / shard
        path.unlink()
        save_file({n: change(w) for n, w in load_file(golden / shard).items()}, path)


def _bad_saes(bad: Path) -> None:
    arrays = dict(np.load(GOLDEN / "sae" / SAE_ID / "params.npz"))
    (bad / "sae-noise.npz").write_bytes(b"PK\3\4" + bytes(range(256)))
    np.savez(bad / "sae-nan.npz", **arrays | dict(b_dec=arrays["b_dec"] * np.nan))
    np.savez(bad / "sae-int.npz", **{name: value.astype(int) for name, value in arrays.items()})
    np.savez(bad / "sae-pickle.npz", **arrays | dict(b_dec=np.array([{}], dtype=object)))
    np.savez(bad / "sae-names.npz", **{f"{name}\x1b[31m": value for name, value in arrays.items()})


def _bad_runs(bad: Path, run: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(run, bad / f"run-{name}")) / "adapter"

    identity = json.loads((run / "adapter" / "adapter_config.json").read_text())
    contents = dict(torn="{", list="[1]", types={name: [{}] for name in identity})
    contents["activation"] = identity | dict(activation="x\x1b[31m" * 1000)
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (copied(name) / "adapter_config.json").write_text(text)
    weights = load_file(run / "adapter" / "adapter.safetensors")
    weights["bias"][3] = torch.nan
    save_file(weights, copied("nan") / "adapter.safetensors")
    whole = {name: w.nan_to_num().int() for name, w in weights.items()}
    save_file(whole, copied("int") / "adapter.safetensors")
    shutil.rmtree(copied("unfinished"))
    config = json.loads((run / "config.json").read_text())
    config["settings"] = {name: [{}] for name in config["settings"]}
    (copied("settings").parent / "config.json").write_text(json.dumps(config))
    piped = copied("pipe") / "adapter_config.json"
    piped.unlink()
    os.mkfifo(piped)


# --- the table, spelled out -----------------------------------------------------------------------


def scripts() -> set[str]:
    """Modules that end in `if __name__ == "__main__"`."""
    found = set()
    for path in ROOT.rglob("*.py"):
        where = path.relative_to(ROOT)
        if where.parts[0] in ("tests", "runtime") or where.parts[0].startswith("."):
            continue
        if re.search(r"^if __name__ ==", path.read_text(), re.M):
            found.add(".".join(where.with_suffix("").parts).removesuffix(".__main__"))
    return found


def test_every_script_has_a_row():
    assert scripts() == set(SCRIPTS)


STREAMS = (  # arguments, streams, exit code
    ("--help", {1: "full"}, 2),
    ("--help", {1: "unread"}, 0),
    ("--help", {1: "closed"}, 0),
    ("--help", {0: "closed", 1: "closed", 2: "closed"}, 0),
    ("--no-such-flag", {2: "full"}, 2),
    ("--no-such-flag", {2: "unread"}, 2),
    ("--no-such-flag", {0: "closed", 1: "closed", 2: "closed"}, 2),
)


def cases(name: str, row: Row, x: Path, flags: dict) -> list[dict]:
    """The row's arguments with one of them made bad, in every way that applies."""
    found = [case([flag], code, streams) for flag, streams, code in STREAMS]
    found += [case([word]) for word in ("--no-such-flag", "\x1b[31m", "nul \0")]
    for flag, (kind, several) in flags.items():
        kind = FLAGS[flag] if kind == "str" and flag not in FREE else kind
        values = VALUES.get(kind, ())
        if kind in BAD:
            values = [str(x / "bad" / value) for value in BAD[kind]] + [*NAMES]
        for value in values:
            if {(name, flag), (name, flag, Path(value).name), (name, flag, value)} & MEANT:
                continue
            if value == "" and (several or kind in BAD):
                continue
            value = value.replace("{x}", str(x))
            found.append(case(given(row, x, flag, value)))
    return found


def case(arguments: list[str], code: int = 2, streams: dict | None = None) -> dict:
    return dict(arguments=arguments, code=code, streams=streams or {0: "empty"})


def sample(name: str, found: list[dict]) -> list[dict]:
    """The streams, and some of the bad arguments."""
    if WHOLE:
        return found
    first = len(STREAMS)
    drawn = random.Random(name).sample(found[first:], min(SAMPLE, len(found) - first))
    return found[:first] + drawn


def given(row: Row, x: Path, flag: str = "", value: str = "", more: str = "") -> list[str]:
    """The row's arguments, a flag among them with this value."""
    words = (more or row.arguments).replace("{x}", str(x)).split()
    if flag in words:
        at = words.index(flag)
        end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
        words[at:end] = [flag, value]
    elif flag:
        words[:0] = [flag, value]
    return words


# --- the runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(request, prepared, tmp_path_factory):
    """(test, script) -> a function that waits for what its processes found; two run at a time."""
    pool, waiting = ThreadPoolExecutor(2), {}
    for item in request.session.items:
        if item.fspath == request.node.fspath and hasattr(item, "callspec"):
            test, name = item.originalname, item.callspec.params["name"]
            folder = tmp_path_factory.mktemp(f"{name}-{test}") / "work"
            folder.mkdir()
            work = {BAD_TEST: bad_ends, FAULT_TEST: fault_ends}[test]
            waiting[test, name] = pool.submit(work, name, prepared, folder)
    yield waiting
    pool.shutdown(cancel_futures=True)


def bad_ends(name: str, x: Path, folder: Path) -> list[tuple[dict, dict]]:
    row = SCRIPTS[name]
    short = globals().get(row.make_short)
    flags = hostile.answered(folder, hostile.settings, name)
    found = sample(name, cases(name, row, x, flags))
    sent = [{key: case[key] for key in ("arguments", "streams")} for case in found]
    return [
        *zip(
            found, hostile.answered(folder, hostile.refused, name, sent, folder, short), strict=True
        )
    ]


def fault_ends(name: str, x: Path, folder: Path) -> list[dict]:
    row, found = SCRIPTS[name], []
    short = globals().get(row.make_short)
    for words in (given(row, x), given(row, x, more=row.more))[: 1 + bool(row.more)]:
        again = [*words, row.again] if row.again else None
        found.append(
            hostile.answered(folder, hostile.faulty, name, words, folder, SHARE, short, again)
        )
        shutil.rmtree(folder)
        folder.mkdir()
    return found


BAD_TEST, FAULT_TEST = (
    "test_bad_input_is_refused_in_one_sentence",
    "test_faults_leave_nothing_half_written",
)


def last_sentence(said: str) -> str:
    return said.replace("\x1b[A", "").replace("\r", "\n").strip().split("\n")[-1].strip()


def printable(said: str) -> bool:
    """Without control characters but those of progress bars."""
    said = said.replace("\r", "").replace("\x1b[A", "")
    return not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_input_is_refused_in_one_sentence(name, ends):
    wrong = []
    for case, end in ends[BAD_TEST, name].result():
        sentence = last_sentence(end["said"])
        silent = "--help" in case["arguments"] or case["streams"].get(2)
        if not (
            end["code"] == case["code"]
            and "Traceback" not in end["said"]
            and (silent or re.fullmatch(r".{10,1200}[.!?]", sentence))
            and printable(end["said"])
            and not end["new"]
            and end["seconds"] < 30
            and end["peak"] < hostile.MEMORY
        ):
            end["said"] = end["said"][-500:]
            wrong.append(f"{case['arguments'][:2]} {case['streams']}: {end}")
    assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "name", [name for name, row in SCRIPTS.items() if row.runs and (WHOLE or not row.slow)]
)
def test_faults_leave_nothing_half_written(name, ends):
    for whole in ends[FAULT_TEST, name].result():
        assert whole["code"] == 0, whole
        assert whole["ends"] or not WHOLE, "it wrote nothing"
        wrong = [str(end) for end in whole["ends"] if not ended_well(end)]
        assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong)
        for file, end in whole["resumed"].items():
            good = end["code"] == 0 and end["whole"] and end["metrics"] == whole["metrics"]
            assert good, (file, end, whole["metrics"])


def ended_well(end: dict) -> bool:
    """Whether a child that met a fault ended as it should."""
    fault, code, said = end["fault"], end["code"], end["said"]
    if "Traceback" in said or any(".part" in name for name in end["new"]):
        return False
    if fault in ("full", "full stdout"):
        return code == 2 and bool(re.search(r"(written|space left).*\.$", last_sentence(said)))
    saved = code == 0 and bool(re.search("Saved after step|before the first step", said))
    return (
        dict(
            unread=code == 0,
            full=code == 0,  # standard error is: nothing can be said, and all else is done
        ).get(fault.split()[0])
        or saved
        or code == {"ctrl-c": 130, "terminate": 143}.get(fault)
    )
