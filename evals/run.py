"""Measure what a model still knows: MMLU, TruthfulQA, GSM8K and any other task of EleutherAI's
lm-evaluation-harness.

    pip install -r requirements-eval.txt
    python -m evals --run OUT --tasks mmlu truthfulqa_mc2 gsm8k
    python -m evals --model google/gemma-2-2b-it --tasks mmlu         # the model before training
    python -m evals --run OUT --tasks ... --beside runs/base-gemma-2-2b-it       # side by side

Prompts and metrics are the harness's, which also fetches the questions from the Hub; with
--data-dir they are read from local files, without a network (evals/tasks/local.py says which).
Written to OUT/eval/benchmarks/: TASK.json as each task ends, with every document's score, so that
an interrupted run goes on with the next task; results.json and results.csv at the end.

A score is a mean over documents and says no more than its standard error allows. It depends on the
prompt: compare it only with scores of this harness, of the same number of worked examples and the
same use of a chat template. The paper states neither, so each task's own number is the default
here. --chat-template means what it means in the harness: the template that the tokenizer states,
with worked examples as turns; a system message that the template refuses is dropped.
"""

import json
import logging
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from audit.published import published
from fsrl import Unsteered
from policy import DEFAULTS, Policy
from runtime import cli
from runtime.cli import flag
from runtime.device import DTYPES
from runtime.folder import read_log
from runtime.output import write_whole, writing
from runtime.progress import parts
from runtime.sources import UserError, local, read_json, sha256, split_revision
from runtime.tables import csv_text, plain

# Keys of an identity that must agree where models are compared.
SAME = ("num_fewshot", "limit", "chat_template", "max_length", "data_sha256", "lm_eval")


# What a prompt's tokens depend on, beside the weights.
TOKENIZER = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Settings:
    run: str | None = flag(
        None, "run folder written by train.py, adapter folder, or Hub id; without it: --model alone"
    )
    model: str | None = flag(
        None, "base model to evaluate alone; with --run: base model, if no longer where recorded"
    )
    sae: str | None = flag(None, "SAE, if no longer where the run recorded it")
    sae_id: str | None = flag(None, "folder of the SAE in --sae")
    tasks: tuple[str, ...] = flag(
        (), "tasks or groups of the harness: mmlu truthfulqa_mc2 gsm8k ..."
    )
    data_dir: str | None = flag(
        None, "folder of local questions, see evals/tasks/local.py (default: from the Hub)"
    )
    num_fewshot: int | None = flag(
        None, "worked examples in each prompt (default: each task's own number)"
    )
    limit: int | None = flag(None, "evaluate only the first documents of each task (default: all)")
    chat_template: bool = flag(False, "render prompts by the tokenizer's chat template")
    max_length: int | None = flag(
        None, "keep this many last tokens of a text (default: as many as the model has positions)"
    )
    tokens_per_microbatch: int = flag(
        DEFAULTS.tokens_per_microbatch,
        "tokens in a forward pass; changes memory only",
    )
    dtype: str = flag("auto", "dtype of products; auto: bfloat16 on CUDA, else float32", DTYPES)
    device: str = flag("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is a GPU")
    beside: tuple[str, ...] = flag(
        (), "OUT folders evaluated before with the same settings, to show beside in the table"
    )
    out: str | None = flag(
        None,
        "folder for eval/benchmarks/ (default: that of --run, runs/NAME, runs/base-MODEL)",
    )

    def __post_init__(self):
        """Raises UserError for settings that mean nothing."""
        if not self.tasks:
            raise UserError(
                "--tasks: names of tasks were expected, such as mmlu truthfulqa_mc2 gsm8k."
            )
        cli.at_least(self, 0, "num_fewshot")
        cli.at_least(self, 1, "limit", "tokens_per_microbatch")
        cli.at_least(self, 2, "max_length")


class Identity(NamedTuple):
    """Everything a score depends on, and what identifies the weights."""

    model: str
    model_revision: str | None
    model_sha256: dict[str, str]  # of each shard, config.json and the tokenizer's files
    adapter_sha256: dict[str, str] | None
    layer: int | None
    sae: str | None
    sae_id: str | None
    sae_sha256: str | None
    data_sha256: dict[str, str] | None  # of each file of --data-dir
    num_fewshot: int | None
    limit: int | None
    chat_template: bool
    max_length: int
    dtype: str
    lm_eval: str


def identity(policy: Policy, s: Settings, max_length: int) -> Identity:
    layer, sae, adapter = None, None, None
    if not isinstance(policy.model, Unsteered):
        layer, sae = policy.steered.layer, policy.steered.sae
        own = policy.folder / "adapter"
        adapter = hashes(own if own.is_dir() else policy.folder, "*.safetensors")
    return Identity(
        model=str(policy.base.source),
        model_revision=policy.base.revision,
        model_sha256=hashes(policy.base.folder, "*.safetensors", *TOKENIZER),
        adapter_sha256=adapter,
        layer=layer,
        sae=sae and sae.source,
        sae_id=sae and sae.sae_id,
        sae_sha256=sae and sae.sha256,
        data_sha256=hashes(Path(s.data_dir), "*.jsonl") if s.data_dir else None,
        num_fewshot=s.num_fewshot,
        limit=s.limit,
        chat_template=s.chat_template,
        max_length=max_length,
        dtype=policy.device.dtype_name,
        lm_eval=version("lm_eval"),
    )


def hashes(folder: Path, *patterns: str) -> dict[str, str]:
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {file.name: sha256(file) for file in files}


# --- scores ---------------------------------------------------------------------------------------


class Score(NamedTuple):
    """A row of results.csv."""

    task: str  # or group, or "simpo"
    metric: str
    filter: str  # what the harness made of the answers before it scored them
    value: float
    stderr: float | None
    documents: int | None

    def same(self, other: "Score") -> bool:
        return self[:3] == other[:3]


def scores(results: dict[str, dict]) -> list[Score]:
    """{task or group: the harness's metrics} -> a row for each metric."""
    found = []
    for name, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, float) and math.isfinite(error)
            documents = metrics.get("sample_len")
            found.append(
                Score(name, metric, kind, float(value), error if known else None, documents)
            )
    return found


def simpo_scores(policy: Policy) -> tuple[list[Score], list[Score]]:
    """The SimPO loss of a run's last evaluation by train.py, and the paper's; the cells of its
    Table 1 are lost.

    Both are empty for a bare model or adapter; the paper's too unless the model is of Gemma-2-2B's
    width.
    """
    last = last_evaluation(policy.folder / "metrics.jsonl") if policy.folder else None
    if last is None:
        return [], []
    own = Score("simpo", "eval loss", "none", last["loss"], None, last["pairs"])
    if policy.base.config.hidden_size != published()["setting"]["d_model"]:
        return [own], []
    kind = "full_fine_tuning" if isinstance(policy.model, Unsteered) else "fsrl"
    return [own], [own._replace(value=published()["losses"][kind], documents=None)]


def last_evaluation(path: Path) -> dict | None:
    """The last eval row of a metrics.jsonl; None where there is none."""
    rows = [row for row in read_log(path) if row["split"] == "eval"]
    try:
        return {key: rows[-1][key] for key in ("loss", "pairs")} if rows else None
    except KeyError as e:
        raise UserError(f"{path}: an evaluation in it has no {e}.") from e


def table(columns: dict[str, list[Score]]) -> str:
    """{model: its scores} as lines for a terminal; the first model's scores are the rows."""
    first, *others = columns.values()
    width = max(len(row.task) for row in first)
    names = "".join(f"  {name[-17:]:>17}" for name in columns)
    lines = ["", " " * (width + 33) + "documents" + names]
    for row in first:
        metric = row.metric if row.filter == "none" else f"{row.metric} ({row.filter})"
        line = f"{row.task:<{width}}  {metric:<30} {row.documents or '':>9}"
        for cell in (row, *(next(filter(row.same, other), None) for other in others)):
            error = "" if not cell or cell.stderr is None else f" ± {cell.stderr:.4f}"
            line += "  " + (f"{cell.value:.4f}{error}" if cell else "").rjust(17)
        lines.append(line)
    return "\n".join(lines)


# --- files ----------------------------------------------------------------------------------------


def finished(path: Path, known: dict) -> dict | None:
    """The metrics of a task that ended in an earlier run; None where it has not.

    Raises UserError when they come from another model or setting.
    """
    if not path.exists():
        return None
    try:
        result = read_json(path)
        theirs, metrics = dict(result["identity"]), dict(result["metrics"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not a result of this script ({e!r}).") from e
    for key in dict.fromkeys([*known, *theirs]):
        if theirs.get(key) != known.get(key):
            raise UserError(
                f"{path}: holds a result with {key} {theirs.get(key)}, not {known.get(key)}; "
                f"choose another --out, or remove it."
            )
    return metrics


def scores_of(out: str, known: dict) -> list[Score]:
    """Another model's scores. Raises UserError unless they were made under the same settings."""
    path = Path(out) / "eval" / "benchmarks" / "results.json"
    try:
        result = read_json(path)
        theirs = dict(result["identity"])
        found = [Score(**row) for row in result["results"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--beside {out}: no results of this script ({e!r}).") from e
    for key in SAME:
        if theirs.get(key) != known.get(key):
            raise UserError(
                f"--beside {out}: was evaluated with {key} {theirs.get(key)}, not {known.get(key)}."
            )
    return found


def out_of(s: Settings, policy: Policy) -> Path:
    """--out or its default, which is never a folder of the Hub's cache."""
    if s.out:
        return Path(s.out)
    if s.run and local(s.run, "run") is None:
        return Path("runs") / Path(split_revision(s.run)[0]).name
    return policy.folder or Path("runs") / f"base-{Path(policy.name).name}"


def titles(out: Path, beside: tuple[str, ...]) -> list[str]:
    """A title for each column: its folder's name, and the parent's where two are alike.

    Raises UserError where that does not tell them apart.
    """
    places = [Path(folder).resolve() for folder in (out, *beside)]
    names = [place.name for place in places] + ["paper"]
    found = []
    for i, place in enumerate(places):
        alike = names.count(place.name) > 1
        title = f"{place.name} ({place.parent.name})" if alike else place.name
        if title in found:
            raise UserError(
                f"--beside {beside[i - 1]}: a column of the table has its name already."
            )
        found.append(title)
    return found


def write_json(path: Path, value: dict, indent: int | None = None) -> None:
    def of_numpy(x):
        return plain(x) if hasattr(x, "item") else str(x)

    write_whole(path, json.dumps(value, default=of_numpy, indent=indent) + "\n")


# --- the run --------------------------------------------------------------------------------------


def evaluate(s: Settings) -> Path:
    """Run the tasks that have no result yet; returns the folder written."""
    try:
        # Here and not above, so that --help and a wrong flag need no lm_eval.
        from evals import harness
    except ModuleNotFoundError as e:
        raise UserError(
            f"python -m evals: {e.name} is not installed; pip install -r requirements-eval.txt."
        ) from e
    # Its warnings are about flags of its own command line.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    where = s.run, s.model, s.sae, s.sae_id
    lm = harness.FSRL(*where, s.max_length, s.tokens_per_microbatch, s.dtype, s.device)
    policy = lm.policy
    if s.chat_template:
        lm.chat_template(True)  # raises for a tokenizer without one, before any work
    out = out_of(s, policy)
    title, *others = titles(out, s.beside)
    folder = out / "eval" / "benchmarks"
    loaded = harness.load_tasks(s.tasks, s.data_dir, s.num_fewshot)
    known = json.loads(json.dumps(identity(policy, s, lm.max_length)._asdict()))
    found = [scores_of(other, known) for other in s.beside]
    beside = dict(zip(others, found, strict=True))
    metrics = {name: finished(folder / f"{name}.json", known) for name in loaded.tasks}
    with writing(out):
        folder.mkdir(parents=True, exist_ok=True)

    bars = dict(scoring=1, generating=1)  # a task has one of the two
    missing = [name for name in loaded.tasks if metrics[name] is None]
    for name in parts(missing, "evals", "tasks", bars=bars):
        task = loaded.tasks[name]
        result = harness.evaluate_task(lm, name, task, s.limit, s.chat_template)
        metrics[name] = result.metrics
        with writing(out):
            write_json(folder / f"{name}.json", dict(identity=known, **result._asdict()))

    groups = {
        name: group.aggregate(metrics)
        for name, group in loaded.groups.items()
        if group.has_aggregation
    }
    own, paper = simpo_scores(policy)
    found = own + scores(groups | metrics)
    rows = [score._asdict() for score in found]
    with writing(out):
        write_whole(folder / "results.csv", csv_text(rows))
        write_json(folder / "results.json", dict(identity=known, results=rows), indent=2)
    if found:
        print(table({title: found} | beside | (dict(paper=paper) if paper else {})))
    print(
        f"Written to {folder}: results.json, results.csv, and every document's scores in TASK.json"
    )
    return folder


def main() -> None:
    evaluate(cli.parse(Settings, doc=__doc__))
