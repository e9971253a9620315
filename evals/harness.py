"""Our models behind the interface of lm-evaluation-harness, and the harness's tasks.

The one module that needs lm_eval. Importing it registers the model `fsrl`, for the harness's own
command line too:

    python -c "import evals.harness, lm_eval.__main__ as harness; harness.cli_evaluate()" run \\
        --model fsrl --model_args run=OUT --device auto --tasks truthfulqa_mc2 \\
        --include_path evals/tasks --metadata data_dir=DIR
"""

import functools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.tasks
import lm_eval.utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from evals.chat_template import ChatTemplate
from evals.likelihood import Request, likelihoods
from generation import decode
from generation.decode import Sampling
from policy import DEFAULTS, Policy, open_policy
from runtime.progress import progress_bar
from runtime.sources import UserError

TASKS = Path(__file__).resolve().parent / "tasks"
# Its own bar, while it builds prompts, knows no --quiet and shows itself in a log, too.
lm_eval.api.task.tqdm = progress_bar
FEWSHOT_SEED = 1234  # the harness's default, for tasks that draw their worked examples
MAX_NEW_TOKENS = 256  # the harness's default, where a task names no limit
# Generation keeps keys and values of so many times --tokens-per-microbatch tokens.
GENERATED = 4


# --- the model, as the harness sees it ------------------------------------------------------------


@register_model("fsrl")
class FSRL(TemplateLM):
    """A base, steered or fully fine-tuned model. Arguments as the flags of python -m evals.

    batch_size and max_batch_size are taken because the harness passes them, and ignored: requests
    are packed, so there are no padded batches.
    """

    def __init__(
        self,
        run: str | None = None,
        model: str | None = None,
        sae: str | None = None,
        sae_id: str | None = None,
        max_length: int | None = None,
        tokens_per_microbatch: int = DEFAULTS.tokens_per_microbatch,
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
        self.max_length = max_length or positions
        self.tokens_per_microbatch = int(tokens_per_microbatch)
        self._device = self.policy.base.device
        self._tokenizer = self.policy.tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The choices of a question share its context.
        self._encode = functools.lru_cache(maxsize=4)(self._encode)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.token_to_id("<eos>")

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.token_to_id("<bos>")

    @property
    def tokenizer_name(self) -> str:
        return str(self.policy.base.source).replace("/", "__")

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """Raises UserError where the tokenizer states none."""
        return ChatTemplate.from_folder(self.policy.base.folder)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.template.render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.template.source if chat_template else ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids, after one <bos> unless add_special_tokens is False. Markup in the string
        becomes its tokens.
        """
        ids = self._encode(string)
        bos = [self.prefix_token_id]
        return ids if add_special_tokens is False or ids[:1] == bos else bos + ids

    def _encode(self, string: str) -> list[int]:
        return self._tokenizer.encode(string, add_special_tokens=False).ids

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        asked = [Request(context, continuation) for _, context, continuation in requests]
        limits = self.max_length, self.tokens_per_microbatch
        with self.policy.autocast():
            return likelihoods(self.policy.model, asked, *limits, progress=not disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p(text) of whole texts; one that is longer than the model reads is read in windows
        that score each token once.
        """
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = lm_eval.utils.get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, 1
            )
            for window in rolling:
                windows.append((None, *lm_eval.utils.make_disjoint_window(window)))
                owners.append(i)

        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (logp, _) in zip(owners, scored, strict=True):
            totals[i] += logp
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings, <end_of_turn> or <eos>; the text
        before it.

        A request that stands there n times (a task's `repeats`) is sampled with the seeds 0 to n-1.
        """
        times, groups = Counter(), defaultdict(list)
        for i, request in enumerate(requests):
            context, settings = request.args[0], json.dumps(request.args[1], sort_keys=True)
            groups[settings, times[context, settings]].append(i)
            times[context, settings] += 1

        texts = [""] * len(requests)
        look = dict(desc="generating", unit="request", leave=False, shown=not disable_tqdm)
        with progress_bar(total=len(requests), **look) as bar:
            for (settings, seed), members in groups.items():
                wanted = generation(json.loads(settings), seed)
                contexts = [requests[i].args[0] for i in members]
                for k, text in self._texts(contexts, wanted):
                    texts[members[k]] = text
                    bar.update()
        return texts

    def _texts(self, contexts: list[str], wanted: "Generation") -> Iterator[tuple[int, str]]:
        """(which context, the text that continues it), in any order."""
        most = wanted.max_new_tokens
        if most >= self.max_length:
            positions = f"a model of {self.max_length} positions was given"
            raise UserError(f"--tasks: the task wants {most} new tokens; {positions}.")
        room = self.max_length - most
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        ended = self._ended(wanted.until)
        for batch in batches(prompts, most, GENERATED * self.tokens_per_microbatch):
            with self.policy.autocast():
                some = [prompts[i] for i in batch]
                new = decode.generate(self.policy.model, some, most, ended, wanted.sampling)
            for i, tokens in zip(batch, new, strict=True):
                yield i, before(self._tokenizer.decode(tokens), wanted.until)

    def _ended(self, until: list[str]) -> decode.Ended:
        complete = decode.end_of_turn(self._tokenizer)
        if not until:
            return complete

        def ended(new: list[int]) -> bool:
            return complete(new) or any(stop in self._tokenizer.decode(new) for stop in until)

        return ended


class Generation(NamedTuple):
    """What a task asks of generated text."""

    until: list[str]  # stop strings
    max_new_tokens: int
    sampling: Sampling


def generation(kwargs: dict, seed: int) -> Generation:
    """A task's generation settings. Raises UserError for those that this model does not know."""
    kwargs = dict(kwargs)
    until = kwargs.pop("until", None) or []
    limits = [kwargs.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    most = next((int(n) for n in limits if n is not None), MAX_NEW_TOKENS)
    temperature = float(kwargs.pop("temperature", None) or 0.0)
    sample = kwargs.pop("do_sample", None)
    top_k = int(kwargs.pop("top_k", None) or 0)
    top_p = float(kwargs.pop("top_p", None) or 1.0)
    if kwargs:
        unknown = ", ".join(kwargs)
        raise UserError(
            f"--tasks: the task's generation settings name {unknown}, which is not known here."
        )
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    sampling = Sampling(0.0 if sample is False else temperature, top_k, top_p, seed)
    return Generation(stops, most, sampling)


def batches(prompts: Sequence[Sequence[int]], most: int, room: int) -> Iterator[list[int]]:
    """Indices of prompts to continue together, longest first: their tokens, and `most` new ones of
    each, fit into room.
    """
    batch, left = [], room
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        cost = len(prompts[i]) + most
        if batch and cost > left:
            yield batch
            batch, left = [], room
        batch.append(i)
        left -= cost
    if batch:
        yield batch


def before(text: str, until: list[str]) -> str:
    """What stands before the first of the stop strings."""
    return text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))]


# --- tasks ----------------------------------------------------------------------------------------


class Tasks(NamedTuple):
    tasks: dict  # name -> the harness's task
    groups: dict  # name -> the harness's group, which averages tasks


def load_tasks(
    names: Sequence[str], data_dir: str | None = None, num_fewshot: int | None = None
) -> Tasks:
    """The tasks named. data_dir: a folder of local questions instead of the Hub's. num_fewshot:
    None for each task's own number.

    Raises UserError for an unknown name, and for questions that cannot be had.
    """
    include = {}
    if data_dir:
        include = dict(include_path=str(TASKS), metadata=dict(data_dir=data_dir))
    manager = lm_eval.tasks.TaskManager(**include)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--tasks {unknown[0]}: the harness knows no task, group or tag of that name."
        )
    try:
        loaded = manager.load(list(names))
    except UserError:
        raise
    except Exception as e:  # whatever a task's own code, the Hub and the datasets library raise
        where = "the Hub"
        if data_dir:
            where += ", where its questions are not among those of --data-dir"
        why = next(iter(str(e).splitlines()), type(e).__name__)
        asked = " ".join(names)
        raise UserError(f"--tasks {asked}: could not be loaded from {where} ({why}).") from e

    for task in loaded["tasks"].values():  # as the harness's own simple_evaluate does
        own = task.get_config("num_fewshot")
        fixed = num_fewshot is None or own == 0  # a task of 0 has its examples in its prompt
        task.set_config(key="num_fewshot", value=own or 0 if fixed else num_fewshot)
    return Tasks(loaded["tasks"], loaded["groups"])


class TaskResult(NamedTuple):
    task: str
    version: float | str
    num_fewshot: int
    metrics: dict  # the harness's: "metric,filter" -> number
    seconds: float
    samples: list[dict]  # of each document: doc_id, filter, target, its metrics, responses


def evaluate_task(
    lm: TemplateLM, name: str, task, limit: int | None = None, chat_template: bool = False
) -> TaskResult:
    """One task's metrics, and each document's scores. Raises UserError for what the harness
    refuses.
    """
    started = time.perf_counter()
    # With a template, worked examples are turns of their own: the harness's default.
    chat = dict(apply_chat_template=chat_template, fewshot_as_multiturn=chat_template)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples however often it was evaluated
    try:
        alone = dict(tasks={name: task}, groups={})
        result = lm_eval.evaluator.evaluate(lm, alone, limit=limit, **chat)
    except (AssertionError, ValueError) as e:
        # Too many worked examples asked for, code to execute, images to see.
        raise UserError(f"--tasks {name}: {e}") from e

    samples = []
    for sample in result["samples"][name]:
        kept = {key: sample[key] for key in ("doc_id", "filter", "target", *sample["metrics"])}
        responses = [list(r) if isinstance(r, tuple) else r for r in sample["filtered_resps"]]
        samples.append(kept | dict(responses=responses))
    about = name, task.VERSION, task.get_config("num_fewshot")
    seconds = time.perf_counter() - started
    return TaskResult(*about, result["results"][name], seconds, samples)
