"""The data and the picture of gemma3_270m.md, the first run on published weights.

    python -m experiments.gemma3_270m --model DIR --data pairs.jsonl --out runs/gemma3
    python -m experiments.gemma3_270m --runs runs/a runs/b --out runs/gemma3

The first writes OUT/train.jsonl and OUT/test.jsonl, in which a prompt has its last --prompt-tokens
at most: on a small machine texts are short, and train.py would cut <bos> off a longer prompt. The
second draws OUT/gemma3_270m.png: loss, L0 and both mean log-probabilities while training, and where
`python -m audit` or eval_ablation.py has been, Figure 2's curve.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

import data
from runtime import cli
from runtime.cli import flag
from runtime.folder import read_log
from runtime.output import replacing, writable, write_whole
from runtime.rows import SPLITS, data_files, decode_row, read_rows, split_of
from runtime.sources import UserError, fetch, read_json

SMOOTH = 10  # training steps behind each point of a curve


@dataclass(frozen=True)
class Settings:
    model: str = flag("", "a model folder, for its tokenizer")
    data: str = flag("", "preference pairs to cut")
    prompt_tokens: int = flag(24, "tokens of a prompt's text, at most")
    runs: tuple[str, ...] = flag((), "runs to draw")
    out: str = flag("runs/gemma3", "folder to write")

    def __post_init__(self):
        cli.at_least(self, 1, "prompt_tokens")
        if not self.runs and not (self.model and self.data):
            raise UserError("--model and --data, or --runs: what to cut or to draw was expected.")


def last_words(text: str, tokenizer: Tokenizer, most: int) -> str:
    """The end of a text, whole words of at most so many tokens."""
    places = tokenizer.encode(text, add_special_tokens=False).offsets
    if len(places) <= most:
        return text
    return text[places[-most][0] :].split(maxsplit=1)[-1]


def cut(s: Settings) -> None:
    tokenizer = data.load_tokenizer(fetch(s.model, "model", ["tokenizer.json"]).path)
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for file in data_files(s.data)[0]:
        for where, raw in read_rows(file.path):
            row = decode_row(where, raw)
            found = data.parse_row(where, row)
            prompt = last_words(found.prompt[-1][1], tokenizer, s.prompt_tokens)
            pair = dict(prompt=prompt, chosen=found.chosen, rejected=found.rejected)
            rows.setdefault(split_of(row, file), []).append(pair)
    if not all(rows[split] for split in SPLITS):
        raise UserError(f"--data {s.data}: a train and a test split were expected.")
    for split in SPLITS:
        path = Path(s.out) / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows[split]))
        print(f"{path}: {len(rows[split]):,} pairs")


def smooth(values: Sequence[float]) -> list[float]:
    """Means over the last SMOOTH values."""
    found = []
    for i in range(len(values)):
        here = values[max(0, i + 1 - SMOOTH) : i + 1]
        found.append(sum(here) / len(here))
    return found


def draw(runs: Sequence[Path], path: Path) -> None:
    # Imported here, because choosing a backend acts on the whole process.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    (loss, sparsity), (likelihood, kept) = axes
    for i, run in enumerate(runs):
        rows = read_log(run / "metrics.jsonl")
        trained = [row for row in rows if row["split"] == "train"]
        measured = [row for row in rows if row["split"] == "eval"]
        if not (trained and measured):
            raise UserError(f"--runs {run}: a run of train.py with evaluations was expected.")
        steps, colour = [row["step"] for row in trained], f"C{i}"

        def curve(axis, key, steps=steps, rows=trained, colour=colour, label=run.name):
            values = smooth([row[key] for row in rows])
            axis.plot(steps, values, color=colour, label=label, lw=1)

        curve(loss, "loss")
        points = [(row["step"], row["loss"]) for row in measured]
        loss.plot(*zip(*points, strict=True), "o--", color=colour, ms=5, lw=0.7)
        curve(sparsity, "l0")
        for side, style in (("chosen", "o-"), ("rejected", "o:")):
            points = [(row["step"], row[f"logp_{side}"]) for row in measured]
            look = dict(color=colour, ms=3, lw=1, label=None if i else side)
            likelihood.plot(*zip(*points, strict=True), style, **look)
        table = run / "eval" / "topk.json"
        if table.exists():
            points = [(row["features"], row["loss"]) for row in read_json(table)["rows"]]
            kept.plot(*zip(*points, strict=True), "o-", color=colour, ms=3, lw=1, label=run.name)
    loss.set(ylabel="SimPO loss", xlabel="step (line: training, dots: evaluation)")
    sparsity.set(ylabel="features steered a position", xlabel="step", yscale="log")
    likelihood.set(ylabel="mean log-probability, evaluation", xlabel="step")
    kept.set(ylabel="evaluation loss", xlabel="features kept (Figure 2)", xscale="log")
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        figure.savefig(part, dpi=100, format="png")
    plt.close(figure)


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    writable(Path(s.out))
    if s.runs:
        draw([Path(run) for run in s.runs], Path(s.out) / "gemma3_270m.png")
    else:
        cut(s)


if __name__ == "__main__":
    cli.run(main)
