"""Documents per second of a benchmark, ours against lm-evaluation-harness's own `hf` model, on the same weights.

    pip install -r requirements-eval.txt -r requirements-dev.txt
    python benchmarks/harness.py --task truthfulqa_mc2 --data-dir DIR

Builds a Gemma-2 of a given shape with random weights and a byte-level BPE trained on the questions, saves them as a
Hugging Face folder, and evaluates the same documents with both in turn: ours, then hf at each of --batch-sizes, round
after round. hf is transformers' model as lm-eval loads it, with eager attention (its sdpa has no softcap). The time is
that of lm_eval's evaluate(), prompts and metrics included. Prints one line of JSON: ratio is documents per second, ours
over hf at the batch size where hf is fastest, median over rounds; beside it the largest differences between the two's
log-likelihoods and scores of single documents. Random weights score at chance: the scores' equality is what they are
good for.
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

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from benchmarks.throughput import SHAPES, synchronise
from evals import harness as eval_benchmarks
from model import Gemma2
from runtime import cli
from runtime.cli import flag
from runtime.sources import UserError

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")


@dataclass(frozen=True)
class Settings:
    task: str = flag(
        "truthfulqa_mc2",
        "truthfulqa_mc1, truthfulqa_mc2, or a subject of MMLU such as mmlu_anatomy",
    )
    data_dir: str | None = flag(None, "folder of local questions, as for eval_benchmarks.py")
    num_fewshot: int = flag(5, "worked examples (TruthfulQA's six are fixed)")
    limit: int = flag(40, "documents, the first ones")
    rounds: int = flag(2, "alternating evaluations measured")
    batch_sizes: tuple[str, ...] = flag(("1", "8"), "of hf")
    shape: str = flag("mid", "size of the model", choices=tuple(SHAPES))
    dtype: str = flag("float32", "of weights and products", choices=("float32", "bfloat16"))
    device: str = flag("cpu", "cpu or cuda")
    tokens_per_microbatch: int = flag(8192, "ours only")
    seed: int = flag(0, "seed of the weights")

    def __post_init__(self):
        if self.data_dir is None:
            raise UserError(
                "--data-dir: the folder of questions was expected (tasks/local.py says which files)."
            )


def build(folder: Path, s: Settings) -> None:
    """config.json, model.safetensors and a tokenizer that both sides load."""
    config = SHAPES[s.shape][0]
    model = Gemma2(config)
    model.init_weights(torch.Generator().manual_seed(s.seed))
    model.to(getattr(torch, s.dtype)).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    questions = (
        json.loads(line) for file in sorted(Path(s.data_dir).glob("*.jsonl")) for line in open(file)
    )
    texts = (
        question["question"] + "\n" + "\n".join(question.get("choices", []))
        for question in questions
    )
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    about = dict(tokenizer_class="PreTrainedTokenizerFast", **names)
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def evaluate(lm, name: str, task, s: Settings) -> tuple[float, list[list]]:
    """Seconds, and each document's (log-likelihood, greedy) pairs followed by its score."""
    synchronise(s.device)
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        result = eval_benchmarks.evaluate_task(
            lm, name, task, eval_benchmarks.Settings(tasks=(name,), limit=s.limit)
        )
    synchronise(s.device)
    return time.perf_counter() - start, [
        sample["responses"] + [sample["acc"]] for sample in result["samples"]
    ]


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    named = "mmlu" if s.task.startswith("mmlu_") else s.task
    wanted = eval_benchmarks.Settings(
        tasks=(named,), data_dir=s.data_dir, num_fewshot=s.num_fewshot
    )
    task = eval_benchmarks.load_tasks(wanted)["tasks"][s.task]
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), s)
        ours = eval_benchmarks.FSRL(
            model=folder,
            dtype=s.dtype,
            device=s.device,
            tokens_per_microbatch=s.tokens_per_microbatch,
        )
        sides = {"ours": ours}
        for size in s.batch_sizes:
            shared = sides.get(f"hf {s.batch_sizes[0]}")
            sides[f"hf {size}"] = HFLM(
                shared.model if shared else folder,
                tokenizer=shared.tokenizer if shared else None,
                device=s.device,
                dtype=s.dtype,
                batch_size=int(size),
            )
    seconds, scores = {name: [] for name in sides}, {}
    for _ in tqdm(range(s.rounds), desc="rounds"):
        for name, lm in sides.items():
            spent, scores[name] = evaluate(lm, s.task, task, s)
            seconds[name].append(spent)
            print(f"{name}: {spent:.2f} s", file=sys.stderr)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min((name for name in sides if name != "ours"), key=medians.get)
    documents = len(scores["ours"])
    logps, differing, moved = [], 0, []
    for mine, theirs in zip(scores["ours"], scores[best], strict=True):
        logps += [abs(a[0] - b[0]) for a, b in zip(mine[:-1], theirs[:-1], strict=True)]
        differing += sum(a[1] != b[1] for a, b in zip(mine[:-1], theirs[:-1], strict=True))
        moved.append(abs(mine[-1] - theirs[-1]))
    print(
        json.dumps(
            dict(
                **dict(
                    task=s.task, shape=s.shape, dtype=s.dtype, device=s.device, documents=documents
                ),
                ratio=statistics.median(
                    t / o for o, t in zip(seconds["ours"], seconds[best], strict=True)
                ),
                documents_per_second=documents / medians["ours"],
                hf_documents_per_second={
                    name: documents / medians[name] for name in sides if name != "ours"
                },
                seconds=seconds,
                largest_logp_difference=max(logps),
                **dict(greedy_differences=differing, largest_score_difference=max(moved)),
                **dict(score=statistics.mean(m[-1] for m in scores["ours"]), requests=len(logps)),
            )
        )
    )


if __name__ == "__main__":
    cli.run(main)
