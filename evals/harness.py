"""What a model still knows: MMLU, TruthfulQA, GSM8K and any other task of EleutherAI's lm-evaluation-harness.

    pip install -r requirements-eval.txt
    python eval_benchmarks.py --run OUT --tasks mmlu truthfulqa_mc2 gsm8k --num-fewshot 5    the paper's Table 1
    python eval_benchmarks.py --model google/gemma-2-2b-it --tasks mmlu                      # the model before training
    python eval_benchmarks.py --run OUT --tasks ... --beside runs/base-gemma-2-2b-it         # both, side by side

The prompts and the metrics are the harness's, which also fetches the questions from the Hub; with --data-dir they are
read from local files, without a network (tasks/local.py says which). Written to OUT/eval/benchmarks/: TASK.json as
each task ends, with every document's score, so that an interrupted run goes on with the next task; results.json and
results.csv at the end. The same model under the harness's own command line, with all of its flags:

    python -c "import evals.harness, lm_eval.__main__ as harness; harness.cli_evaluate()" run \\
        --model fsrl --model_args run=OUT --device auto --tasks truthfulqa_mc2 \\
        --include_path evals/tasks --metadata data_dir=DIR

A score is a mean over documents and says no more than its standard error allows. It depends on the prompt: compare it
with scores of this harness, and of the same number of worked examples, only. As the harness does with Gemma, a chat
template drops a system message, and with it the sentence that introduces an MMLU subject.
"""

import csv
import functools
import io
import json
import logging
import math
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

try:
    import lm_eval.api.group
    import lm_eval.evaluator
    import lm_eval.tasks
    import lm_eval.utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as e:
    print(
        f"eval_benchmarks.py: {e.name} is not installed; pip install -r requirements-eval.txt.",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

import train
from audit.report import before_after, read_run
from evals.likelihood import Request, likelihoods
from generation import decode as decoding
from generation.decode import Sampling
from model import PUBLISHED
from policy import Policy, open_policy
from runtime import cli
from runtime.cli import flag
from runtime.sources import UserError, sha256, write_whole

TASKS = Path(__file__).resolve().parent / "tasks"
FEWSHOT_SEED = (
    1234  # the harness's default: which worked examples are drawn where a task draws them
)
MAX_NEW_TOKENS = 256  # the harness's default, where a task names no limit
PAPER = dict(
    steered=2.73, full=2.19
)  # SimPO loss, Gemma-2-2B-it; the rest of Table 1 is not held here
SAME = (
    "num_fewshot",
    "limit",
    "chat_template",
    "max_length",
    "data_sha256",
    "lm_eval",
)  # where models are compared
GENERATED = (
    4  # times --tokens-per-microbatch are the tokens that generation keeps keys and values of
)


@dataclass(frozen=True)
class Settings:
    run: str | None = flag(
        None, "OUT of train.py, an adapter folder or its Hub id; unset: --model as it is"
    )
    model: str | None = flag(
        None, "tiny, a model folder or a Hub id; with --run, where the run's has moved"
    )
    sae: str | None = flag(None, "where the run's SAE has moved")
    sae_id: str | None = flag(None, "folder within --sae")
    tasks: tuple[str, ...] = flag(
        (), "tasks or groups of the harness: mmlu truthfulqa_mc2 gsm8k ..."
    )
    data_dir: str | None = flag(
        None, "folder of local questions (tasks/local.py); unset: from the Hub"
    )
    num_fewshot: int | None = flag(
        None, "worked examples in a prompt; unset: the task's own number"
    )
    limit: int | None = flag(None, "documents of each task, the first ones; unset: all")
    chat_template: bool = flag(False, "render prompts as turns of a chat")
    max_length: int | None = flag(
        None, "tokens read at most, the last ones; unset: the model's positions"
    )
    tokens_per_microbatch: int = flag(
        8192, "tokens per forward pass, the memory knob; no effect on the result"
    )
    dtype: str = flag(
        "auto", "auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "float32", "bfloat16")
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA when present")
    beside: tuple[str, ...] = flag(
        (), "OUT folders evaluated before, with the same settings: columns of the table"
    )
    out: str | None = flag(
        None, "where eval/benchmarks/ goes; unset: the folder of --run, or runs/base-MODEL"
    )

    def __post_init__(self):
        if not self.tasks:
            raise UserError(
                "--tasks: names of tasks were expected, such as mmlu truthfulqa_mc2 gsm8k."
            )
        for name, least in dict(
            num_fewshot=0, limit=1, max_length=2, tokens_per_microbatch=1
        ).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(
                    f"--{name.replace('_', '-')} {value}: at least {least} was expected."
                )


# --- the model, as the harness sees it ----------------------------------------------------------------------


@register_model("fsrl")
class FSRL(TemplateLM):
    """A base, steered or fully fine-tuned model behind the harness's interface. Arguments as the flags above;
    batch_size is taken because the harness passes one, and ignored: requests are packed, there are no padded batches.
    """

    def __init__(
        self,
        run: str | None = None,
        model: str | None = None,
        sae: str | None = None,
        sae_id: str | None = None,
        max_length: int | None = None,
        tokens_per_microbatch: int = 8192,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
    ):
        super().__init__()
        self.policy: Policy = open_policy(run, model, sae, sae_id, device or "auto", dtype)
        positions = self.policy.base.config.max_position_embeddings
        if max_length and max_length > positions:
            raise UserError(f"--max-length {max_length}: the model has {positions} positions.")
        self.max_length, self.tokens_per_microbatch = (
            max_length or positions,
            int(tokens_per_microbatch),
        )
        self._device = self.policy.base.device
        self._tokenizer = self.policy.tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._encode = functools.lru_cache(maxsize=4)(
            self._encode
        )  # the choices of a question share its context

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.token_to_id("<eos>")

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.token_to_id("<bos>")

    @property
    def tokenizer_name(self) -> str:
        return str(self.policy.base.source).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Turns as data.py renders them, as text. Without a generation prompt the last turn stays open."""
        names = {"user": "user", "assistant": "model", "model": "model"}
        turns = [
            (names[m["role"]], m["content"].strip()) for m in chat_history if m["role"] != "system"
        ]
        text = "".join(
            f"<start_of_turn>{role}\n{content}<end_of_turn>\n" for role, content in turns
        )
        return "<bos>" + (
            text + "<start_of_turn>model\n"
            if add_generation_prompt
            else text[: -len("<end_of_turn>\n")]
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        return (
            self.apply_chat_template([{"role": "user", "content": "{content}"}])
            if chat_template
            else ""
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids, after one <bos> unless add_special_tokens is False. Markup in the string becomes its tokens."""
        ids = self._encode(string)
        bos = [self.prefix_token_id]
        return ids if add_special_tokens is False or ids[:1] == bos else bos + ids

    def _encode(self, string: str) -> list[int]:
        return self._tokenizer.encode(string, add_special_tokens=False).ids

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        asked = [Request(context, continuation) for _, context, continuation in requests]
        with train.autocast(self.policy.settings):
            return likelihoods(
                self.policy.model,
                asked,
                self.max_length,
                self.tokens_per_microbatch,
                progress=not disable_tqdm,
            )

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p(text) of whole texts, longer than the model reads in windows: each token is scored once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in lm_eval.utils.get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, 1
            ):
                windows.append((None, *lm_eval.utils.make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logp, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[i] += logp
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings, <end_of_turn> or <eos>; the text before it.

        A request that stands there n times (a task's `repeats`) is sampled with the seeds 0 to n - 1.
        """
        repeats, groups = Counter(), defaultdict(list)
        for i, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True)
            groups[key, repeats[request.args[0], key]].append(i)
            repeats[request.args[0], key] += 1
        texts = [""] * len(requests)
        bar = tqdm(
            total=len(requests),
            desc="generating",
            unit="request",
            leave=False,
            disable=disable_tqdm,
        )
        for (key, seed), members in groups.items():
            until, most, sampling = generation(json.loads(key), seed)
            if most >= self.max_length:
                raise UserError(
                    f"The task wants {most} new tokens; a model of {self.max_length} positions was given."
                )
            prompts = {
                i: self.tok_encode(requests[i].args[0])[-(self.max_length - most) :]
                for i in members
            }
            for batch in self._batches(prompts, most):
                ended = self._ended(until)
                with train.autocast(self.policy.settings):
                    new = decoding.generate(
                        self.policy.model, [prompts[i] for i in batch], most, ended, sampling
                    )
                for i, tokens in zip(batch, new, strict=True):
                    texts[i] = before(self._tokenizer.decode(tokens), until)
                bar.update(len(batch))
        bar.close()
        return texts

    def _batches(self, prompts: dict[int, list[int]], most: int):
        """Prompts to continue together, longest first: their tokens and new ones fit what generation keeps."""
        batch, room = [], 0
        for i in sorted(prompts, key=lambda i: -len(prompts[i])):
            cost = len(prompts[i]) + most
            if batch and cost > room:
                yield batch
                batch = []
            if not batch:
                room = GENERATED * self.tokens_per_microbatch
            batch.append(i)
            room -= cost
        if batch:
            yield batch

    def _ended(self, until: list[str]):
        complete = decoding.end_of_turn(self._tokenizer)
        return lambda new: (
            complete(new) or (bool(until) and any(s in self._tokenizer.decode(new) for s in until))
        )


def generation(kwargs: dict, seed: int) -> tuple[list[str], int, Sampling]:
    """A task's generation settings -> stop strings, new tokens at most, how to choose. Raises UserError for others."""
    kwargs = dict(kwargs)
    until = kwargs.pop("until", None) or []
    limits = [kwargs.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    most = next((int(n) for n in limits if n is not None), MAX_NEW_TOKENS)
    temperature = float(kwargs.pop("temperature", None) or 0.0)
    sample = kwargs.pop("do_sample", None)
    top_k, top_p = int(kwargs.pop("top_k", None) or 0), float(kwargs.pop("top_p", None) or 1.0)
    if kwargs:
        raise UserError(
            f"The task's generation settings name {', '.join(kwargs)}, which this model does not know."
        )
    sampling = Sampling(0.0 if sample is False else temperature, top_k, top_p, seed)
    return [s for s in ([until] if isinstance(until, str) else until) if s], most, sampling


def before(text: str, until: list[str]) -> str:
    """What stands before the first of the stop strings."""
    return text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))]


# --- tasks and results --------------------------------------------------------------------------------------


def load_tasks(s: Settings):
    """The harness's TaskManager.load of the tasks named: {"tasks": {name: task}, "groups": {name: group}}."""
    include = (
        dict(include_path=str(TASKS), metadata=dict(data_dir=s.data_dir)) if s.data_dir else {}
    )
    manager = lm_eval.tasks.TaskManager(**include)
    unknown = [name for name in s.tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--tasks {unknown[0]}: the harness knows no task, group or tag of that name."
        )
    try:
        loaded = manager.load(list(s.tasks))
    except UserError:
        raise
    except Exception as e:  # whatever a task's own code, the Hub and the datasets library raise
        where = (
            "the Hub"
            if s.data_dir is None
            else "the Hub, where its questions are not among those of --data-dir"
        )
        why = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(
            f"--tasks {' '.join(s.tasks)}: could not be loaded from {where} ({why})."
        ) from e
    for task in loaded["tasks"].values():  # as the harness's own simple_evaluate does
        own = task.get_config("num_fewshot")
        task.set_config(
            key="num_fewshot",
            value=own or 0 if s.num_fewshot is None or own == 0 else s.num_fewshot,
        )
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def identity(policy: Policy, s: Settings, max_length: int) -> dict:
    """Everything a score depends on, and what identifies the weights."""
    shards = {file.name: sha256(file) for file in sorted(policy.base.folder.glob("*.safetensors"))}
    known = dict(
        model=str(policy.base.source), model_revision=policy.base.revision, model_sha256=shards
    )
    if policy.steered:
        own = policy.folder / "adapter" if (policy.folder / "adapter").is_dir() else policy.folder
        known |= dict(
            adapter_sha256={file.name: sha256(file) for file in sorted(own.glob("*.safetensors"))}
        )
        sae = policy.steered.sae
        known |= dict(
            layer=policy.steered.layer, sae=sae.source, sae_id=sae.sae_id, sae_sha256=sae.sha256
        )
    if s.data_dir:
        known |= dict(
            data_sha256={
                file.name: sha256(file) for file in sorted(Path(s.data_dir).glob("*.jsonl"))
            }
        )
    known |= dict(
        num_fewshot=s.num_fewshot,
        limit=s.limit,
        chat_template=s.chat_template,
        max_length=max_length,
    )
    return known | dict(dtype=policy.settings.dtype, lm_eval=version("lm_eval"))


def evaluate_task(lm: FSRL, name: str, task, s: Settings) -> dict:
    """One task's metrics, and each document's scores. Raises UserError for what the harness refuses."""
    started, alone = time.perf_counter(), dict(tasks={name: task}, groups={})
    chat = dict(apply_chat_template=s.chat_template, fewshot_as_multiturn=s.chat_template)
    try:
        result = lm_eval.evaluator.evaluate(lm, alone, limit=s.limit, **chat)
    except (
        AssertionError,
        ValueError,
    ) as e:  # too many worked examples asked for, code to execute, images to see
        raise UserError(f"--tasks {name}: {e}") from e
    samples = []
    for sample in result["samples"][name]:
        own = {key: sample[key] for key in ("doc_id", "filter", "target", *sample["metrics"])}
        samples.append(
            own
            | dict(
                responses=[list(r) if isinstance(r, tuple) else r for r in sample["filtered_resps"]]
            )
        )
    return dict(
        **dict(task=name, version=task.VERSION, num_fewshot=task.get_config("num_fewshot")),
        **dict(
            metrics=result["results"][name], seconds=time.perf_counter() - started, samples=samples
        ),
    )


def stored(path: Path, known: dict) -> dict | None:
    """A finished task's file, if there is one. Raises UserError when it comes from another model or setting."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        theirs = result["identity"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not a result of this script ({e!r}).") from e
    for key in dict.fromkeys([*known, *theirs]):
        if theirs.get(key) != known.get(key):
            raise UserError(
                f"{path}: holds a result with {key} {theirs.get(key)}, not {known.get(key)}; "
                f"choose another --out, or remove it."
            )
    return result


def _plain(x):
    """numpy's numbers for json."""
    return x.item() if hasattr(x, "item") else str(x)


def rows(results: dict[str, dict]) -> list[dict]:
    """{task or group: the harness's metrics} -> a row for each metric: value, standard error, documents."""
    found = []
    for name, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, float | int):
                error = metrics.get(f"{metric}_stderr,{kind}")
                error = float(error) if isinstance(error, float) and math.isfinite(error) else None
                row = dict(task=name, metric=metric, filter=kind, value=float(value), stderr=error)
                found.append(row | dict(documents=metrics.get("sample_len")))
    return found


def results_of(out: str, known: dict) -> list[dict]:
    """The rows of another model's results.json. Raises UserError unless they were made under the same settings."""
    path = Path(out) / "eval" / "benchmarks" / "results.json"
    try:
        result = json.loads(path.read_text())
        theirs, found = result["identity"], result["results"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--beside {out}: no results of this script ({e!r}).") from e
    for key in SAME:
        if theirs.get(key) != known.get(key):
            raise UserError(
                f"--beside {out}: was evaluated with {key} {theirs.get(key)}, not {known.get(key)}."
            )
    return found


def simpo_rows(policy: Policy) -> tuple[list[dict], list[dict]]:
    """Table 1's first column: the SimPO loss of a run's last evaluation by train.py, and the paper's.

    Both empty for a bare model or adapter; the paper's too unless the model is of Gemma-2-2B's shape.
    """
    trained = policy.folder and (policy.folder / "metrics.jsonl").is_file()
    measured = before_after(read_run(policy.folder)) if trained else None
    if measured is None or measured[0] != "eval":
        return [], []
    own = dict(task="simpo", metric="eval loss", filter="none", stderr=None)
    kind = "steered" if policy.steered else "full"
    theirs = (
        [own | dict(value=PAPER[kind])] if policy.base.config == PUBLISHED["gemma-2-2b"] else []
    )
    return [own | dict(value=measured[2]["loss"], documents=measured[2]["pairs"])], theirs


def print_table(columns: dict[str, list[dict]]) -> None:
    """{model: its rows}; rows are those of the first model."""
    first, *others = columns.values()
    width = max(len(row["task"]) for row in first)
    print(
        "\n" + " " * (width + 33) + "documents" + "".join(f"  {name[-17:]:>17}" for name in columns)
    )
    for row in first:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        line = f"{row['task']:<{width}}  {metric:<30} {row['documents']:>9}"
        for cell in [row, *(next((r for r in rows if _same(r, row)), None) for rows in others)]:
            error = "" if not cell or cell["stderr"] is None else f" ± {cell['stderr']:.4f}"
            line += "  " + (f"{cell['value']:.4f}{error}" if cell else "").rjust(17)
        print(line)


def _same(a: dict, b: dict) -> bool:
    return all(a[key] == b[key] for key in ("task", "metric", "filter"))


def evaluate(s: Settings) -> Path:
    lm = FSRL(
        s.run, s.model, s.sae, s.sae_id, s.max_length, s.tokens_per_microbatch, s.dtype, s.device
    )
    out = (
        Path(s.out)
        if s.out
        else lm.policy.folder or Path("runs") / f"base-{Path(lm.policy.name).name}"
    )
    folder = out / "eval" / "benchmarks"
    loaded = load_tasks(s)
    known = json.loads(json.dumps(identity(lm.policy, s, lm.max_length)))
    beside = {Path(other).name: results_of(other, known) for other in s.beside}
    done = {name: stored(folder / f"{name}.json", known) for name in loaded["tasks"]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e}).") from e
    for name, task in tqdm(
        loaded["tasks"].items(), desc="tasks", unit="task", disable=len(done) == 1
    ):
        if done[name] is None:
            done[name] = dict(identity=known, **evaluate_task(lm, name, task, s))
            write_whole(folder / f"{name}.json", json.dumps(done[name], default=_plain) + "\n")

    metrics = {name: result["metrics"] for name, result in done.items()}
    groups = {
        name: group.aggregate(metrics)
        for name, group in loaded["groups"].items()
        if group.has_aggregation
    }
    own, paper = simpo_rows(lm.policy)
    found = own + rows(groups | metrics)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["task", "metric", "filter", "value", "stderr", "documents"], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(found)
    write_whole(folder / "results.csv", text.getvalue())
    write_whole(
        folder / "results.json", json.dumps(dict(identity=known, results=found), indent=2) + "\n"
    )
    if found:
        print_table({out.name: found} | beside | (dict(paper=paper) if paper else {}))
    print(
        f"Written to {folder}: results.json, results.csv, and every document's scores in a file for each task"
    )
    return folder


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # its warnings are about flags of its own command line
    evaluate(s)


if __name__ == "__main__":
    cli.run(main)
