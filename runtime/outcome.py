"""Summarise a training run: a table, loss.png, and sentences on what the loss does not show.

The sentences are made from the rows of metrics.jsonl and from the answers before and after training
(samples.json). They say which of the two responses became more or less likely, and warn where both
became less likely (displacement), where answers repeat themselves (collapse) or became much longer
or shorter (length), and where an earlier step was better (over-training).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runtime.colours import COLOUR
from runtime.messages import shown
from runtime.output import replacing, write_whole

GRAM = 4  # words in the sequences whose repetition is counted
# Limits beyond which a sentence warns.
MORE_REPETITION = 0.25  # increase of an answer's repetition by training
LENGTH_FACTOR = 3.0  # factor by which an answer became longer or shorter
BEST_LOSS = 0.9  # loss of the best evaluation, as a share of the last one's
CHOSEN_FALL = 0.05  # fall of the chosen response's log p, as a share of the widened gap


class Sample(NamedTuple):
    """A prompt, and its answers before and after training."""

    prompt: str
    before: str
    after: str


def measured(rows: Sequence[dict]) -> list[dict]:
    """The rows to summarise, in order: evaluations or, where there are none, training steps."""
    of = {name: [row for row in rows if row.get("split") == name] for name in ("eval", "train")}
    return of["eval"] or of["train"]


# --- in numbers -----------------------------------------------------------------------------------

NAMES = {  # key of a row -> what tables call it
    "loss": "SimPO loss",
    "accuracy": "accuracy",
    "logp_chosen": "log p per token, chosen",
    "logp_rejected": "log p per token, rejected",
    "l0": "mean L0 of all positions",
    "l1": "mean L1 of all positions",
}


def before_after(found: list[dict], steered: bool = True) -> list[tuple[str, str, str]]:
    """(name, before, after) of each metric that the rows have."""
    first, last = found[0], found[-1]
    keys = [key for key in NAMES if key in first and (steered or key not in ("l0", "l1"))]
    return [(NAMES[key], f"{first[key]:.3f}", f"{last[key]:.3f}") for key in keys]


# --- in words -------------------------------------------------------------------------------------


def outcome(rows: Sequence[dict], samples: Sequence[Sample]) -> list[str]:
    """The sentences on a run; those that warn begin with "Warning:"."""
    found = measured(rows)
    if not found:
        return []
    said = [*moved(found), *changed_answers(samples)]
    best, last = min(found, key=lambda row: row["loss"]), found[-1]
    if last["split"] == "train":
        said.append(
            "There were no evaluation pairs: these are numbers of the training pairs, and "
            "over-training cannot be seen in them."
        )
    elif best["loss"] < BEST_LOSS * last["loss"]:
        said.append(
            f"Warning: over-training. The evaluation loss was lowest at step {best['step']} "
            f"({best['loss']:.3g}) and is {last['loss']:.3g} at step {last['step']}."
        )
    return said


def moved(found: list[dict]) -> list[str]:
    """How the mean log-probabilities per token of the two responses changed."""
    first, last = found[0], found[-1]
    keys = ("logp_chosen", "logp_rejected")
    if not all(key in row for key in keys for row in (first, last)):
        return []  # written by an earlier version
    chosen, rejected = (last[key] - first[key] for key in keys)
    widened = chosen - rejected
    moves = " and ".join(
        f"{name} responses went from {first[key]:.3f} to {last[key]:.3f}"
        for name, key in zip(("chosen", "rejected"), keys, strict=True)
    )
    moves = f"In mean log-probability per token, {moves}"
    if widened < 0.005:
        return [f"The gap between chosen and rejected responses did not widen. {moves}."]
    if chosen < -CHOSEN_FALL * widened:
        return [
            f"Warning: displacement. Chosen responses became less likely too, though by less than "
            f"rejected ones. {moves}."
        ]
    share = -rejected / widened
    if share > 0.5:
        why = f"{min(1, share):.0%} of the widened gap is rejected text made unlikely"
    else:
        why = f"{1 - max(0, share):.0%} of the widened gap is chosen text made likelier"
    return [f"{moves}: {why}."]


def changed_answers(samples: Sequence[Sample]) -> list[str]:
    """Warnings where answers repeat themselves or changed their length after training.

    Neither loss nor accuracy shows this.
    """
    loops, lengths = [], []
    for _, before, after in samples:
        words = len(before.split()), len(after.split())
        if repetition(after) > repetition(before) + MORE_REPETITION:
            loops.append(f"{repetition(after):.0%} ({repetition(before):.0%} before)")
        elif not words[0] / LENGTH_FACTOR <= words[1] <= words[0] * LENGTH_FACTOR:
            lengths.append(f"{words[1]} words ({words[0]} before)")
    said = []
    if loops:
        said.append(
            f"Warning: collapse. {len(loops)} of {len(samples)} sampled answers repeat "
            f"themselves; share of {GRAM}-word sequences that occur earlier in the answer: "
            f"{', '.join(loops)}."
        )
    if lengths:
        said.append(
            f"Warning: length. {len(lengths)} of {len(samples)} sampled answers changed their "
            f"length by more than a factor of {LENGTH_FACTOR:g}: {', '.join(lengths)}."
        )
    return said


def repetition(text: str) -> float:
    """The share of a text's sequences of GRAM words that occur earlier in it."""
    words = text.split()
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# --- in a picture ---------------------------------------------------------------------------------


def draw_loss(rows: list[dict], path: Path, lower: str) -> None:
    """loss.png against steps: SimPO loss (log scale, the best evaluation marked), the
    log-probabilities of both responses, and the metric `lower`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    split = {name: [row for row in rows if row["split"] == name] for name in ("train", "eval")}
    styles = {"train": dict(alpha=0.4, lw=1), "eval": dict(marker="o", ms=4)}
    figure, (loss, logp, last) = plt.subplots(
        3, 1, figsize=(6, 7), sharex=True, layout="constrained", height_ratios=(3, 3, 2)
    )
    for name, of in split.items():
        if not of:
            continue
        steps, style = [row["step"] for row in of], styles[name]
        for axes, key in ((loss, "loss"), (last, lower)):
            axes.plot(steps, [row[key] for row in of], label=name, color=COLOUR[name], **style)
        for side in ("chosen", "rejected"):
            # The legend names each side once; pale lines are training, as in the panel above.
            label = side if name == "eval" or not split["eval"] else None
            values = [row.get(f"logp_{side}", math.nan) for row in of]
            logp.plot(steps, values, label=label, color=COLOUR[side], **style)
    if split["eval"]:
        best = min(split["eval"], key=lambda row: row["loss"])
        label = f"lowest: {best['loss']:.3g} at step {best['step']}"
        style = dict(color=COLOUR["warning"], zorder=3, label=label)
        loss.plot(best["step"], best["loss"], "D", ms=7, **style)

    for axes, key in ((loss, "loss"), (last, lower)):
        if all(row[key] > 0 for row in rows):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
    if lower == "accuracy":
        last.set(yscale="linear", ylim=(0, 1.05))
    loss.set_ylabel("SimPO loss")
    logp.set_ylabel("mean log p per token")
    last.set(ylabel="accuracy" if lower == "accuracy" else "mean L0", xlabel="optimiser step")
    for axes in (loss, logp, last):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", lw=0.3)
        axes.legend(frameon=False, fontsize=8)
    with replacing(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)


# --- all three ------------------------------------------------------------------------------------


def summarise(
    out: Path,
    rows: list[dict],
    samples: Sequence[Sample],
    steered: bool,
    seconds: float,
    peak_bytes: int,
) -> None:
    """Write OUT/loss.png and OUT/samples.json; print samples, metrics and sentences.

    steered: whether there is an adapter. Raises UserError where a file cannot be written.
    """
    draw_loss(rows, out / "loss.png", "l0" if steered else "accuracy")
    text = json.dumps([sample._asdict() for sample in samples], ensure_ascii=False, indent=1)
    write_whole(out / "samples.json", text + "\n")

    for sample in samples:
        print("\n--- prompt\n{}\n--- before\n{}\n--- after\n{}".format(*map(shown, sample)))
    print(f"\n{'':31}{'before':>9} {'after':>9}")
    if found := measured(rows):
        for name, before, after in before_after(found, steered):
            title = f"{found[0]['split']} {name}"
            print(f"{title:<31}{before:>9} {after:>9}")
    print(f"{'seconds':<40}{seconds:10.1f}")
    print(f"{'peak memory (MiB)':<40}{peak_bytes / 2**20:10.0f}")
    print("", *outcome(rows, samples), "", sep="\n")
