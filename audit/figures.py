"""The tables of OUT/eval/ as pictures: rows in, a matplotlib Figure out.

Nothing is computed here: every number that is drawn stands in the rows. Each figure says below what
was evaluated, and with which labels.
"""

import json
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from audit.published import alike, published
from runtime.sources import sha256
from runtime.tables import Row

STYLE = {
    "text.parse_math": False,  # a dollar sign in an explanation is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COLOUR = {"adapter": "#d1495b", "sae": "#3d6b8e"}
NAME = {"adapter": "adapter (v)", "sae": "SAE (f)"}
CONTEXT_COLOUR = {"prompt": "#7a7a7a", "prompt+chosen": "#2a9d6f", "prompt+rejected": "#d98032"}
CONDITION_COLOUR = {
    "base model": "#7a7a7a",
    "policy": "#d1495b",
    "category": "#d1495b",
    "matched": "#3d6b8e",
    "random": "#9aa7b1",
}


def finish(figure: Figure, title: str, about: dict) -> Figure:
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
    labels = "Labels: " + (". ".join(table["text"] for table in about["labels"]) or "none") + "."
    lines = textwrap.wrap(labels, int(figure.get_size_inches()[0] * 15))
    note = f"{about['run']} on {about['data']}, {about['pairs']:,} pairs.\n" + "\n".join(lines)
    figure.supxlabel(note, fontsize=7, color="#555555", x=0.01, ha="left")
    plt.close(figure)  # out of pyplot's registry; the object stays
    return figure


def distinct(rows: list[Row], *keys: str) -> list:
    """Values of a column, or tuples of several, in the order in which they first stand."""
    if len(keys) == 1:
        return list(dict.fromkeys(row[keys[0]] for row in rows))
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def where(rows: list[Row], **values) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def horizontal(axes, labels: list[str], below: float = 0.5) -> None:
    """A label for each row, the first row at the top."""
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - below, -below)
    axes.axvline(0, color="black", lw=0.8)
    axes.grid(axis="x", lw=0.4)


def percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


# --- usage ----------------------------------------------------------------------------------------


def composition_paper(rows: list[Row], about: dict) -> Figure:
    """Table 2 as the paper measures it, in the variant that the audit was asked to show."""
    rows = where(rows, first=about["first"])
    title = f"Composition of the active features (Table 2), <bos> {about['first']}"
    return shares(rows, about, title, "% of active labelled features, mean over positions")


def composition(rows: list[Row], about: dict) -> Figure:
    title = "Composition of the active features, pooled over positions"
    return shares(rows, about, title, "% of all events")


def shares(rows: list[Row], about: dict, title: str, unit: str) -> Figure:
    """Shares at the left, relative change with intervals at the right."""
    size = (9, 1.6 + 0.24 * len(rows))
    options = dict(sharey=True, layout="constrained", width_ratios=(2, 3))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, **options)
    horizontal(right, ["{labels}: {category}, {context}".format(**row) for row in rows], 0.6)
    for y, row in enumerate(rows):
        for of in ("sae", "adapter"):
            label = NAME[of] if y == 0 else None
            left.plot(percent(row[of]), y, "o", color=COLOUR[of], ms=4.5, label=label)
        colour = CONTEXT_COLOUR[row["context"]]
        for low, high, style in (
            ("noisy_low", "noisy_high", dict(lw=1)),
            ("low", "high", dict(lw=3.5, alpha=0.6)),
        ):
            right.plot([percent(row[low]), percent(row[high])], [y, y], color=colour, **style)
        right.plot(percent(row["change"]), y, "o", color=colour, ms=4.5)
    left.set_xlim(0, None)
    left.set_xlabel(unit)
    above = 1.0 + 0.5 / (1 + len(rows) * 0.24)
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, above))
    left.grid(axis="x", lw=0.4)
    noise = any(row["noisy_low"] is not None for row in rows)
    thin = ", thin: with label noise" if noise else ""
    right.set_xlabel(f"relative change, %\n(bar: 95 % over pairs{thin})", fontsize=9)
    return finish(figure, title, about)


def top(value: str, title: str) -> Callable[[list[Row], dict], Figure]:
    """-> a draw function of Tables 3 and 4: bars, with what each feature is."""

    def draw(rows: list[Row], about: dict) -> Figure:
        contexts = distinct(rows, "context")
        size = (11, 1 + 2.9 * len(contexts))
        options = dict(layout="constrained", squeeze=False)
        figure, grid = plt.subplots(max(1, len(contexts)), 2, figsize=size, **options)
        for context, of in distinct(rows, "context", "of"):
            axes = grid[contexts.index(context)][int(of == "sae")]
            here = where(rows, context=context, of=of)
            ranks = [row["rank"] for row in here]
            axes.barh(ranks, [row[value] for row in here], color=COLOUR[of], alpha=0.35)
            for row in here:
                text = " ".join(f"{row['feature']}  {row['explanation']}".split())
                text = " " + textwrap.shorten(text, 78, placeholder="…")
                axes.text(0, row["rank"], text, va="center", fontsize=7)
            axes.set_yticks(ranks)
            axes.tick_params(labelsize=7)
            axes.invert_yaxis()
            axes.set_title(f"{NAME[of]}, {context}", fontsize=9, loc="left")
        return finish(figure, title, about)

    return draw


def value_difference(rows: list[Row], about: dict) -> Figure:
    """Figure 3: a histogram of features for each context."""
    contexts = distinct(rows, "context")
    options = dict(sharex=True, sharey=True, layout="constrained")
    figure, grid = plt.subplots(len(contexts), 1, figsize=(7, 1 + 1.7 * len(contexts)), **options)
    for axes, context in zip(grid, contexts, strict=True):
        here = where(rows, context=context)
        edges = [row["low"] for row in here] + [here[-1]["high"]]
        heights = [row["features"] for row in here]
        axes.stairs(heights, edges, fill=True, color=CONTEXT_COLOUR[context], baseline=0.5)
        axes.axvline(0, color="black", lw=0.6)
        axes.set_yscale("log")
        axes.minorticks_off()  # they take most of the time of drawing
        axes.yaxis.set_major_formatter("{x:g}")
        text = "{context}: {promoted:,} promoted, {suppressed:,} suppressed, mean {mean:.3g}"
        axes.set_title(text.format(**here[0]), fontsize=9, loc="left")
        axes.set_ylabel("features")
    grid[-1].set_xlabel("mean v − mean f of a feature")
    return finish(figure, "Mean steering minus mean activation (Figure 3)", about)


def usage_rank(rows: list[Row], about: dict) -> Figure:
    """Figure 5: usage on a log axis against rank, with the fitted lines."""
    contexts, curves = distinct(rows, "context"), distinct(rows, "labels", "category")
    files = list(dict.fromkeys(name for name, _ in curves if name))
    kinds = list(dict.fromkeys(category for name, category in curves if name))
    styles = ["-", (0, (4, 2)), (0, (1, 1))]
    options = dict(sharey=True, layout="constrained", squeeze=False)
    size = (10, 1 + 3.4 * len(contexts))
    figure, grid = plt.subplots(max(1, len(contexts)), 2, figsize=size, **options)
    for context, of in distinct(rows, "context", "of"):
        axes = grid[contexts.index(context)][int(of == "sae")]
        panel = where(rows, context=context, of=of)
        for name, category in curves:
            here = where(panel, labels=name, category=category)
            if not here:
                continue
            colour = f"C{kinds.index(category)}" if name else "black"
            style = styles[files.index(name) % 3] if name else "-"
            r2 = "no fit" if here[0]["r2"] is None else f"R² {here[0]['r2']:.2f}"
            label = f"{name}: {category}" if name else category
            label += f", {here[0]['active']:,} active, {r2}"
            ranks = [row["rank"] for row in here]
            usage = [row["usage"] for row in here]
            axes.plot(ranks, usage, color=colour, ls=style, lw=1.3, label=label)
            if not name and here[0]["fit"] is not None:
                fit = [row["fit"] for row in here]
                axes.plot(ranks, fit, color=colour, lw=0.7, ls=(0, (2, 3)))
        axes.set_yscale("log")
        axes.minorticks_off()  # they take most of the time of drawing
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{NAME[of]}, {context}", fontsize=9, loc="left")
        axes.set_xlabel("rank by usage (within the category)", fontsize=8)
        axes.set_ylabel("share of positions", fontsize=8)
        axes.legend(frameon=False, fontsize=6.5, loc="upper right")
    low = min((row["usage"] for row in rows), default=0.1)
    grid[0][0].set_ylim(low / 2, 2)
    title = "Usage against rank, with the log-linear fit over all features (Figure 5)"
    return finish(figure, title, about)


def l0(rows: list[Row], about: dict) -> Figure:
    """Positions by how many features are active there."""
    contexts = distinct(rows, "context")
    size = (7, 1 + 1.7 * len(contexts))
    figure, grid = plt.subplots(len(contexts), 1, figsize=size, sharex=True, layout="constrained")
    for axes, context in zip(grid, contexts, strict=True):
        for of in ("sae", "adapter"):
            here = where(rows, context=context, of=of)
            edges = [row["low"] for row in here] + [here[-1]["high"] + 1]
            label = NAME[of] + ": mean {mean:.1f}, 90 % within {p5}–{p95}".format(**here[0])
            heights = [row["positions"] for row in here]
            axes.stairs(heights, edges, fill=True, color=COLOUR[of], alpha=0.5, label=label)
        axes.set_title(context, fontsize=9, loc="left")
        axes.set_ylabel("positions")
        axes.legend(frameon=False, fontsize=8)
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
    grid[-1].set_xlabel("L0: features active at a position")
    return finish(figure, "How many features are active at a position", about)


def l0_by_position(rows: list[Row], about: dict) -> Figure:
    """Mean L0 against the place in the sequence."""
    figure, grid = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    for axes, of in zip(grid, ("adapter", "sae"), strict=True):
        of_side = where(rows, of=of)
        for context in distinct(rows, "context"):
            here = where(of_side, context=context)
            middle = [(row["low"] + row["high"]) / 2 for row in here]
            mean = [row["mean_l0"] for row in here]
            style = dict(lw=1.3, ls=":" if context == "prompt" else "-", label=context)
            axes.plot(middle, mean, color=CONTEXT_COLOUR[context], **style)
        axes.set_title(NAME[of], fontsize=9, loc="left")
        axes.set_ylabel("mean L0")
        # Places that few sequences reach are too noisy to set the scale.
        usual = max((row["positions"] for row in of_side), default=1) / 50
        highest = max((row["mean_l0"] for row in of_side if row["positions"] >= usual), default=1)
        axes.set_ylim(0, 1.2 * highest or 1)
    grid[0].legend(frameon=False, fontsize=8)
    text = "position in the sequence (<bos>, at 0, is left out); cut off where few positions remain"
    grid[1].set_xlabel(text)
    return finish(figure, "L0 by position", about)


# --- effects --------------------------------------------------------------------------------------


def reference(axes, row: Row, name: str, label: str | None) -> None:
    """The loss of base model or policy as a line across, with its interval."""
    colour = CONDITION_COLOUR[name]
    axes.axhspan(row["low"], row["high"], color=colour, alpha=0.12, lw=0)
    axes.axhline(row["loss"], color=colour, lw=1, ls="--", label=label)


def curve(axes, rows: list[Row], key: str, colour: str, label: str) -> None:
    """Losses with their intervals, against a column."""
    at = [row[key] for row in rows]
    bounds = [[row[end] for row in rows] for end in ("low", "high")]
    axes.fill_between(at, *bounds, alpha=0.2, lw=0, color=colour)
    axes.plot(at, [row["loss"] for row in rows], "o-", ms=4, color=colour, label=label)


def topk(rows: list[Row], about: dict) -> Figure:
    """Figure 2: loss against the share of the dictionary kept; base model and policy as lines.

    A run of the published one's shape has the authors' curve beside its own.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row, name, share in ((rows[0], "base model", 0), (rows[-1], "policy", 100)):
        reference(axes, row, name, f"{name} ({share} %): {row['loss']:.3f}")
    inner = rows[1:-1]
    curve(axes, inner, "percent", "C0", "top k %")
    for row in inner:
        place = dict(xytext=(0, 5), textcoords="offset points", fontsize=7)
        axes.annotate(f"{row['features']}", (row["percent"], row["loss"]), **place)
    if alike(about):
        theirs = published()["figure_2"]["rows"]
        at, losses = ([row[key] for row in theirs] for key in ("percent", "loss"))
        style = dict(color=CONDITION_COLOUR["random"], label="the authors' policy")
        axes.plot(at, losses, "x--", lw=1, ms=4, **style)
    axes.set_xscale("log")
    axes.set_xlabel("% of the dictionary kept at each position (above each point: features)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("SimPO loss")
    axes.set_ylim(min([0, *(row["loss"] for row in inner)]), None)
    axes.legend(frameon=False, fontsize=8)
    return finish(figure, "Loss with only the largest features kept (Figure 2)", about)


def ablation(rows: list[Row], about: dict) -> Figure:
    """Of each category the loss added by zeroing it, above its controls."""
    groups = distinct(rows, "labels", "category")
    names = dict(category="the category", matched="matched on usage")
    names |= dict(random="random sets, as many features")
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.75 * len(groups)), layout="constrained")
    ticks = []
    for y, (name, category) in enumerate(groups):
        here = where(rows, labels=name, category=category)
        text = "{labels}: {category}\n{features:,} features, {used:,} used"
        ticks.append(text.format(**here[0]))
        for kind, offset in (("category", -0.22), ("matched", 0.0), ("random", 0.22)):
            sets = [row for row in here if row["set"].split()[0] == kind]
            at = y + offset
            style = dict(color=CONDITION_COLOUR[kind])
            for row in sets:
                alpha = 1 / (1 + len(sets))
                axes.plot([row["low"], row["high"]], [at, at], lw=3, alpha=alpha, **style)
            deltas = [row["delta"] for row in sets]
            label = None if y else names[kind]
            axes.plot(deltas, [at] * len(sets), "o", ms=4, label=label, **style)
    horizontal(axes, ticks)
    axes.set_xlabel("SimPO loss added by zeroing the features (95 % over pairs)")
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return finish(figure, "Zeroing a category, and controls", about)


def static(rows: list[Row], about: dict) -> Figure:
    """Losses of static steering against its coefficient, and against the number of features."""
    options = dict(sharey=True, layout="constrained", width_ratios=(3, 2))
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), **options)
    ends = {row["steering"]: row for row in rows[:2]}
    for axes in panels:
        for name, row in ends.items():
            label = f"{name}: {row['loss']:.3f}" if axes is panels[0] else None
            reference(axes, row, name, label)
    for i, name in enumerate(distinct(rows[2:], "steering")):
        top = name == "top features"
        key = "features" if top else "coefficient"
        here = sorted(where(rows, steering=name), key=lambda row, key=key: row[key])
        curve(panels[int(top)], here, key, f"C{i}", name)
    panels[0].set(xlabel="coefficient c", ylabel="SimPO loss")
    if all(row["coefficient"] is None or row["coefficient"] > 0 for row in rows):
        panels[0].set_xscale("log")
    panels[1].set(xscale="log", xlabel="m, the features of largest mean v")
    for axes, key in zip(panels, ("coefficient", "features"), strict=True):
        ticks = sorted({row[key] for row in rows} - {None})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    # A coefficient that is far too large would press all others together.
    shown = max(row["loss"] for row in rows if row["loss"] <= 4 * rows[0]["loss"])
    panels[0].set_ylim(0, 1.1 * max(shown, rows[0]["high"]))
    return finish(figure, "Steering that does not read its context", about)


def choices(rows: list[Row], about: dict) -> Figure:
    """Shares of the widened preference gap by kinds of tokens; the named category is filled."""
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.3 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        colour = CONDITION_COLOUR["policy" if row["named"] else "random"]
        axes.barh(y, row["share"], height=0.6, color=colour)
        axes.plot([row["low"], row["high"]], [y, y], color="black", lw=1.5)
    named = (" (named)" if row["named"] else "" for row in rows)
    text = "{labels}: {tokens}"
    horizontal(axes, [text.format(**row) + end for row, end in zip(rows, named, strict=True)])
    axes.set_xlabel("change of ℓ(chosen) − ℓ(rejected), nats per token (line: 95 % over pairs)")
    return finish(figure, "What the policy chooses otherwise", about)


def attribution(rows: list[Row], about: dict) -> Figure:
    """Shares of the loss's change by category, each bar divided by where the features steered."""
    groups = distinct(rows, "labels", "category")
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.45 * len(groups)), layout="constrained")
    for y, (name, category) in enumerate(groups):
        whole, *parts = where(rows, labels=name, category=category)
        ends = {True: 0.0, False: 0.0}  # of the bars to the right and to the left of zero
        for i, row in enumerate(parts):
            right = row["share"] >= 0
            label = None if y else row["where"]
            axes.barh(y, row["share"], left=ends[right], height=0.6, color=f"C{i}", label=label)
            ends[right] += row["share"]
        axes.plot([whole["low"], whole["high"]], [y, y], color="black", lw=1.5)
        axes.plot(whole["share"], y, "o", color="black", ms=4)
    horizontal(axes, [f"{name}: {what}" if name else "all features" for name, what in groups])
    axes.set_xlabel("change in SimPO loss that they earned (line: 95 % over pairs)")
    axes.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    title = "Shares of the change of {change:.3f} in loss (residual {residual:.2g})"
    return finish(figure, title.format(**about), about)


def attribution_features(rows: list[Row], about: dict) -> Figure:
    """The largest shares, feature by feature, with a standard error and what the labels say."""
    options = dict(sharey=True, layout="constrained", width_ratios=(2, 3))
    size = (11, 1.4 + 0.22 * len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, **options)
    shares, errors = ([row[key] for row in rows] for key in ("share", "error"))
    left.barh(range(len(rows)), shares, xerr=errors, color="#3d6b8e", error_kw=dict(lw=1))
    horizontal(left, [str(row["feature"]) for row in rows], 0.6)
    left.tick_params(axis="y", labelsize=7)
    left.set_xlabel("change in SimPO loss that it earned (line: standard error)", fontsize=8)
    left.set_ylabel("feature")
    for y, row in enumerate(rows):
        text = " | ".join(filter(None, (row["categories"], row["explanation"])))
        right.text(0, y, textwrap.shorten(text, 110, placeholder="…"), va="center", fontsize=7)
    right.set_axis_off()
    return finish(figure, "The features with the largest shares", about)


DRAW: dict[str, Callable[[list[Row], dict], Figure]] = {  # table -> its picture
    "composition_paper": composition_paper,
    "composition": composition,
    "top_usage": top("usage", "Most used features (Table 3)"),
    "top_value": top("value", "Features of largest mean value (Table 4)"),
    "value_difference": value_difference,
    "usage_rank": usage_rank,
    "l0": l0,
    "l0_by_position": l0_by_position,
    "topk": topk,
    "ablation": ablation,
    "static": static,
    "choices": choices,
    "attribution": attribution,
    "attribution_features": attribution_features,
}


# --- files ----------------------------------------------------------------------------------------


def draw(folder: Path, name: str, into: Path) -> None:
    """into/NAME.png of the rows in folder/NAME.json. Its `Source` states the sha256 of NAME.csv."""
    table = json.loads((folder / f"{name}.json").read_text())
    with plt.rc_context(STYLE), warnings.catch_warnings():
        # Explanations come in every script.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = DRAW[name](table["rows"], table["about"])
        figure.savefig(into / f"{name}.png", dpi=150, metadata={"Source": source(folder, name)})


def source(folder: Path, name: str) -> str:
    return f"{name}.csv sha256 {sha256(folder / f'{name}.csv')}"


def is_current(folder: Path, name: str) -> bool:
    """Whether folder/NAME.png was drawn from the folder/NAME.csv that is there now."""
    try:
        with Image.open(folder / f"{name}.png") as image:
            return image.info.get("Source") == source(folder, name)
    except OSError:
        return False
