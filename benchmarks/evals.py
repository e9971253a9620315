"""Documents per second of a benchmark, ours against lm-evaluation-harness's own `hf` model, on the
same weights.

    pip install -r requirements-eval.txt -r requirements-dev.txt
    python -m benchmarks.evals --task truthfulqa_mc2 --data-dir DIR

Builds a Gemma-2 of a given shape with random weights and a byte-level BPE trained on the questions,
saves them as a Hugging Face folder, and evaluates the same documents with both in turn: ours, then
hf at each of --batch-sizes, round after round. hf is transformers' model as lm-eval loads it, with
eager attention (its sdpa has no softcap). The time is that of lm_eval's evaluate(), prompts and
metrics included.

Prints one line of JSON: ratio is documents per second, ours over hf at the batch size where hf is
fastest, median over rounds; beside it the largest differences between the two's log-likelihoods and
scores of single documents. Random weights score at chance: the scores show only that both agree.
"""

import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks.throughput import SHAPES, synchronise
from model import Gemma2
from runtime import cli
from runtime.cli import flag
from runtime.device import resolve_device
from runtime.sources import UserError

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")


@dataclass(frozen=True)
class Settings:
    task: str = flag(
        "truthfulqa_mc2",
        "truthfulqa_mc1, truthfulqa_mc2, or a subject of MMLU such as mmlu_anatomy",
    )
    data_dir: str | None = flag(None, "folder of local questions, as for python -m evals")
    num_fewshot: int = flag(5, "worked examples (TruthfulQA's six are fixed)")
    limit: int = flag(40, "documents, the first ones")
    rounds: int = flag(2, "alternating evaluations measured")
    batch_sizes: tuple[str, ...] = flag(("1", "8"), "of hf")
    shape: str = flag("mid", "size of the model", tuple(SHAPES))
    dtype: str = flag("float32", "of weights and products", ("float32", "bfloat16"))
    device: str = flag("cpu", "cpu or cuda")
    tokens_per_microbatch: int = flag(8192, "ours only")
    seed: int = flag(0, "seed of the weights")

    def __post_init__(self):
        cli.at_least(self, 1, "limit", "rounds", "tokens_per_microbatch")
        if self.data_dir is None:
            where = "evals/tasks/local.py says which files"
            raise UserError(f"--data-dir: the folder of questions was expected ({where}).")


def build(folder: Path, s: Settings) -> None:
    """config.json, model.safetensors and a tokenizer that both sides load."""
    config = SHAPES[s.shape][0]
    model = Gemma2(config)
    model.init_weights(torch.Generator().manual_seed(s.seed))
    model.to(getattr(torch, s.dtype)).save_pretrained(folder)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = []
    for file in sorted(Path(s.data_dir).glob("*.jsonl")):
        for question in map(json.loads, file.read_text().splitlines()):
            texts.append("\n".join([question["question"], *question.get("choices", [])]))
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    about = dict(tokenizer_class="PreTrainedTokenizerFast", **names)
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


class Document(NamedTuple):
    responses: list[tuple[float, bool]]  # log-likelihood of each choice, and whether it is greedy
    score: float


def evaluate(lm, task, s: Settings) -> tuple[float, list[Document]]:
    """Seconds, and what each document got."""
    from evals import harness  # needs lm_eval, which --help does not

    synchronise(s.device)
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        result = harness.evaluate_task(lm, s.task, task, s.limit)
    synchronise(s.device)
    seconds = time.perf_counter() - start
    return seconds, [Document(sample["responses"], sample["acc"]) for sample in result.samples]


def sides(folder: Path, s: Settings) -> dict:
    """Ours, and hf at each batch size with one copy of the weights."""
    from lm_eval.models.huggingface import HFLM

    from evals import harness  # needs lm_eval, which --help does not

    where = dict(device=s.device, dtype=s.dtype)
    ours = harness.FSRL(model=str(folder), tokens_per_microbatch=s.tokens_per_microbatch, **where)
    first, *others = map(int, s.batch_sizes)
    hf = HFLM(str(folder), batch_size=first, **where)
    found = {"ours": ours, f"hf {first}": hf}
    for size in others:
        found[f"hf {size}"] = HFLM(hf.model, tokenizer=hf.tokenizer, batch_size=size, **where)
    return found


def differences(ours: list[Document], theirs: list[Document]) -> dict:
    logps, greedy, scores = [], 0, []
    for mine, other in zip(ours, theirs, strict=True):
        scores.append(abs(mine.score - other.score))
        for (a, its_greedy), (b, also) in zip(mine.responses, other.responses, strict=True):
            logps.append(abs(a - b))
            greedy += its_greedy != also
    return dict(
        largest_logp_difference=max(logps),
        greedy_differences=greedy,
        largest_score_difference=max(scores),
        score=statistics.mean(document.score for document in ours),
        requests=len(logps),
    )


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    resolve_device(s.device)
    from evals import harness  # needs lm_eval, which --help does not

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    named = "mmlu" if s.task.startswith("mmlu_") else s.task
    task = harness.load_tasks((named,), s.data_dir, s.num_fewshot).tasks[s.task]
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), s)
        lms = sides(Path(folder), s)
    seconds, found = {name: [] for name in lms}, {}
    for number in range(s.rounds):
        for name, lm in lms.items():
            spent, found[name] = evaluate(lm, task, s)
            seconds[name].append(spent)
            print(f"round {number}, {name}: {spent:.2f} s", file=sys.stderr)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min((name for name in lms if name != "ours"), key=medians.get)
    documents = len(found["ours"])
    rates = {name: documents / median for name, median in medians.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds[best], strict=True)]
    result = dict(task=s.task, shape=s.shape, dtype=s.dtype, device=s.device, documents=documents)
    result["ratio"] = statistics.median(ratios)
    result["documents_per_second"] = rates.pop("ours")
    result["hf_documents_per_second"] = rates
    result["seconds"] = seconds
    print(json.dumps(result | differences(found["ours"], found[best])))


if __name__ == "__main__":
    cli.run(main)
