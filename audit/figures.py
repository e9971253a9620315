"""The tables of OUT/eval/ as pictures: rows in, a matplotlib Figure out.

Nothing is computed here: every number that is drawn stands in the rows. A figure has no title,
because the page that shows it has one; what was evaluated, and with which labels, stands in the
png's metadata.
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
from runtime.colours import COLOUR
from runtime.sources import sha256
from runtime.tables import Row

STYLE = {
    "text.parse_math": False,  # a dollar sign in an explanation is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
}
NAME = {"adapter": "adapter (v)", "sae": "SAE (f)"}
CONTEXT_COLOUR = {
    "prompt": COLOUR["prompt"],
    "prompt+chosen": COLOUR["chosen"],
    "prompt+rejected": COLOUR["rejected"],
}
SET_COLOUR = {
    "category": COLOUR["named"],
    "matched": COLOUR["matched"],
    "random": COLOUR["control"],
}
STATIC_COLOUR = ("#222222", "#8c6d31", "#637939", "#6b6ecf")  # kinds of vectors
WIDTH = 6.5  # inches; the page's column, in which 9 points are as large as its text


def finish(figure: Figure) -> Figure:
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
    return shares(where(rows, first=about["first"]), "% of active labelled features")


def composition(rows: list[Row], about: dict) -> Figure:
    return shares(rows, "% of all events")


def shares(rows: list[Row], unit: str) -> Figure:
    """Shares at the left, relative change with intervals at the right."""
    size = (9, 1.2 + 0.24 * len(rows))
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
    return finish(figure)


def top(value: str, unit: str) -> Callable[[list[Row], dict], Figure]:
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
            axes.set_ylabel("rank", fontsize=8)
        for axes in grid[-1]:
            axes.set_xlabel(unit, fontsize=8)
        return finish(figure)

    return draw


def value_difference(rows: list[Row], about: dict) -> Figure:
    """Figure 3: a histogram of features for each context."""
    contexts = distinct(rows, "context")
    options = dict(sharex=True, sharey=True, layout="constrained")
    figure, grid = plt.subplots(
        len(contexts), 1, figsize=(WIDTH, 0.6 + 1.5 * len(contexts)), **options
    )
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
    return finish(figure)


def usage_rank(rows: list[Row], about: dict) -> Figure:
    """Figure 5: usage on a log axis against rank, with the fitted lines."""
    contexts, curves = distinct(rows, "context"), distinct(rows, "labels", "category")
    files = list(dict.fromkeys(name for name, _ in curves if name))
    kinds = list(dict.fromkeys(category for name, category in curves if name))
    styles = ["-", (0, (4, 2)), (0, (1, 1))]
    options = dict(sharey=True, layout="constrained", squeeze=False)
    size = (9, 0.6 + 3.2 * len(contexts))
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
    return finish(figure)


def l0(rows: list[Row], about: dict) -> Figure:
    """Positions by how many features are active there; those with none have a panel of their own,
    since a log axis has no 0.
    """
    contexts = distinct(rows, "context")
    size = (WIDTH, 0.6 + 1.7 * len(contexts))
    options = dict(layout="constrained", width_ratios=(1, 6), sharex="col", squeeze=False)
    figure, grid = plt.subplots(len(contexts), 2, figsize=size, **options)
    for (none, some), context in zip(grid, contexts, strict=True):
        highest = 1
        for i, of in enumerate(("sae", "adapter")):
            zero, *here = where(rows, context=context, of=of)
            edges = [row["low"] for row in here] + [here[-1]["high"] + 1]
            heights = [row["positions"] for row in here]
            style = dict(color=COLOUR[of], alpha=0.6)
            none.bar(i, zero["positions"], width=0.8, **style)
            some.stairs(heights, edges, fill=True, label=NAME[of], **style)
            highest = max(highest, *heights)
        none.set_xticks([0, 1], ["SAE", "adapter"], fontsize=7, rotation=90)
        none.set_ylabel("positions", fontsize=8)
        none.yaxis.set_major_formatter("{x:,.0f}")
        some.yaxis.set_major_formatter("{x:,.0f}")
        some.set_ylim(0, 1.05 * highest)
        some.set_title(context, fontsize=9, loc="left")
        for axes in (none, some):
            axes.tick_params(labelsize=7)
        some.set_xscale("log")
        some.minorticks_off()
        some.xaxis.set_major_formatter("{x:,g}")
    grid[0][1].legend(frameon=False, fontsize=8)
    grid[-1][0].set_xlabel("no feature\nactive", fontsize=8)
    grid[-1][1].set_xlabel("features active at a position (bins widen to the right)", fontsize=8)
    return finish(figure)


def l0_by_position(rows: list[Row], about: dict) -> Figure:
    """Mean L0 against the place in the sequence, above how many positions the mean is over."""
    options = dict(sharex=True, layout="constrained", height_ratios=(3, 3, 2))
    figure, grid = plt.subplots(3, 1, figsize=(WIDTH, 5.5), **options)
    for axes, of in zip(grid[:2], ("adapter", "sae"), strict=True):
        of_side = where(rows, of=of)
        for context in distinct(rows, "context"):
            here = where(of_side, context=context)
            middle = [(row["low"] + row["high"]) / 2 for row in here]
            mean = [row["mean_l0"] for row in here]
            style = dict(lw=1.3, ls=":" if context == "prompt" else "-", label=context)
            axes.plot(middle, mean, color=CONTEXT_COLOUR[context], **style)
            if of == "adapter":
                counts = [row["positions"] for row in here]
                edges = [row["low"] for row in here] + [here[-1]["high"] + 1]
                grid[2].stairs(counts, edges, color=CONTEXT_COLOUR[context], baseline=None)
        axes.set_title(NAME[of], fontsize=9, loc="left")
        axes.set_ylabel("mean L0")
        axes.set_ylim(0, None)
    grid[2].set_ylabel("positions")
    grid[2].set_yscale("log")
    grid[2].minorticks_off()
    grid[2].yaxis.set_major_formatter("{x:,g}")
    grid[0].legend(frameon=False, fontsize=8)
    grid[2].set_xlabel("position in the sequence; <bos>, at 0, is left out")
    return finish(figure)


# --- effects --------------------------------------------------------------------------------------


def reference(axes, row: Row, name: str, label: str | None) -> None:
    """The loss of base model or policy as a line across, with its interval."""
    colour = COLOUR["base" if name == "base model" else "adapter"]
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
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    for row, name, share in ((rows[0], "base model", 0), (rows[-1], "policy", 100)):
        reference(axes, row, name, f"{name} ({share} %): {row['loss']:.3f}")
    inner = rows[1:-1]
    curve(axes, inner, "percent", "#222222", "only the largest |v| kept")
    for row in inner:
        place = dict(xytext=(0, 5), textcoords="offset points", fontsize=7)
        axes.annotate(f"{row['features']}", (row["percent"], row["loss"]), **place)
    if alike(about):
        theirs = published()["figure_2"]["rows"]
        at, losses = ([row[key] for row in theirs] for key in ("percent", "loss"))
        style = dict(color=COLOUR["control"], label="the authors' policy")
        axes.plot(at, losses, "x--", lw=1, ms=4, **style)
    axes.set_xscale("log")
    axes.set_xlabel("% of the dictionary kept at each position (above each point: features)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("SimPO loss")
    axes.set_ylim(min([0, *(row["loss"] for row in inner)]), None)
    axes.legend(frameon=False, fontsize=8)
    return finish(figure)


def ablation(rows: list[Row], about: dict) -> Figure:
    """Of each category the loss added by zeroing it, above its controls."""
    groups = distinct(rows, "labels", "category")
    names = dict(category="the category", matched="matched on usage")
    names |= dict(random="random sets, as many features")
    figure, axes = plt.subplots(figsize=(WIDTH, 1.0 + 0.6 * len(groups)), layout="constrained")
    ticks = []
    for y, (name, category) in enumerate(groups):
        here = where(rows, labels=name, category=category)
        text = "{labels}: {category}\n{features:,} features, {used:,} used"
        ticks.append(text.format(**here[0]))
        for kind, offset in (("category", -0.22), ("matched", 0.0), ("random", 0.22)):
            sets = [row for row in here if row["set"].split()[0] == kind]
            at = y + offset
            style = dict(color=SET_COLOUR[kind])
            for row in sets:
                alpha = 1 / (1 + len(sets))
                axes.plot([row["low"], row["high"]], [at, at], lw=3, alpha=alpha, **style)
            deltas = [row["delta"] for row in sets]
            label = None if y else names[kind]
            axes.plot(deltas, [at] * len(sets), "o", ms=4, label=label, **style)
    horizontal(axes, ticks)
    axes.set_xlabel("SimPO loss added by zeroing the features (95 % over pairs)")
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return finish(figure)


def static(rows: list[Row], about: dict) -> Figure:
    """Losses of static steering against its coefficient, and against the number of features."""
    options = dict(sharey=True, layout="constrained", width_ratios=(3, 2))
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.6), **options)
    ends = {row["steering"]: row for row in rows[:2]}
    for axes in panels:
        for name, row in ends.items():
            label = f"{name}: {row['loss']:.3f}" if axes is panels[0] else None
            reference(axes, row, name, label)
    for i, name in enumerate(distinct(rows[2:], "steering")):
        top = name == "top features"
        key = "features" if top else "coefficient"
        here = sorted(where(rows, steering=name), key=lambda row, key=key: row[key])
        curve(panels[int(top)], here, key, STATIC_COLOUR[i % len(STATIC_COLOUR)], name)
    panels[0].set(xlabel="coefficient c", ylabel="SimPO loss")
    if all(row["coefficient"] is None or row["coefficient"] > 0 for row in rows):
        panels[0].set_xscale("log")
    panels[1].set(xscale="log", xlabel="m features of largest mean v")
    for axes, key in zip(panels, ("coefficient", "features"), strict=True):
        ticks = sorted({row[key] for row in rows} - {None})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    # A coefficient that is far too large would press all others together.
    shown = max(row["loss"] for row in rows if row["loss"] <= 4 * rows[0]["loss"])
    panels[0].set_ylim(0, 1.1 * max(shown, rows[0]["high"]))
    return finish(figure)


def choices(rows: list[Row], about: dict) -> Figure:
    """Shares of the widened preference gap by kinds of tokens."""
    figure, axes = plt.subplots(figsize=(WIDTH, 1.0 + 0.3 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        axes.barh(y, row["share"], height=0.6, color=COLOUR["named" if row["named"] else "other"])
        axes.plot([row["low"], row["high"]], [y, y], color="black", lw=1.5)
    named = (" (named)" if row["named"] else "" for row in rows)
    text = "{labels}: {tokens}"
    horizontal(axes, [text.format(**row) + end for row, end in zip(rows, named, strict=True)])
    axes.set_xlabel("change of the gap, nats per token (line: 95 % over pairs)")
    return finish(figure)


def shift(rows: list[Row], about: dict) -> Figure:
    """Divergence between policy and base model by kinds of tokens, a panel for each set of texts;
    beside it, what permuted steering of equal KL moves.
    """
    kinds, texts = distinct(rows, "labels", "tokens"), distinct(rows, "texts")
    size = (max(WIDTH, 2.6 * len(texts)), 1.4 + 0.3 * len(kinds))
    options = dict(sharey=True, sharex=True, layout="constrained", squeeze=False)
    figure, (panels,) = plt.subplots(1, len(texts), figsize=size, **options)
    for axes, name in zip(panels, texts, strict=True):
        for row in where(rows, texts=name):
            y = kinds.index((row["labels"], row["tokens"]))
            colour = COLOUR["named" if row["named"] else "other"]
            axes.barh(y, row["divergence"], height=0.6, color=colour)
            axes.plot(
                [row["divergence_low"], row["divergence_high"]], [y, y], color="black", lw=1.5
            )
            if row["null_divergence"] is not None:
                label = None if axes.get_legend_handles_labels()[1] else "permuted, equal KL"
                axes.plot(row["null_divergence"], y, "D", color="black", ms=4, label=label)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("nats per position", fontsize=8)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    horizontal(panels[0], [f"{labels}: {tokens}" for labels, tokens in kinds])
    return finish(figure)


def behaviour(rows: list[Row], about: dict) -> Figure:
    """Change of the number of tokens in an answer, by kinds; and what was gained and lost of it."""
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.3 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        if row["gained"] is not None:
            axes.barh(y, row["gained"], height=0.6, color=COLOUR["other"], alpha=0.5)
            axes.barh(y, -row["lost"], height=0.6, color=COLOUR["other"], alpha=0.5)
        axes.plot([row["low"], row["high"]], [y, y], color="black", lw=1.5)
        style = dict(color=COLOUR["named"] if row["named"] else "black", ms=5)
        axes.plot(row["change"], y, "o", **style)
    horizontal(axes, ["{labels}: {tokens}".format(**row) for row in rows])
    axes.set_xlabel(
        "tokens an answer, policy less base model\n"
        "(dot: change, 95 % over prompts; bars: gains and losses by token)"
    )
    return finish(figure)


def carriers(rows: list[Row], about: dict) -> Figure:
    """Share of the shift in a category that the first n features of each ranking keep alone."""
    figure, axes = plt.subplots(figsize=(WIDTH, 4), layout="constrained")
    for ranking in distinct(rows, "ranking"):
        here = where(rows, ranking=ranking)
        n, kept = ([row[key] for row in here] for key in ("n", "kept"))
        style = dict(
            lw=2.5 if here[0]["wins"] else 1.2, ls=":" if ranking == "random" else "-", marker="o"
        )
        (line,) = axes.plot(n, kept, ms=4, label=f"{ranking} ({here[0]['area']:.2f})", **style)
        ends = [row["low"] for row in here], [row["high"] for row in here]
        axes.fill_between(n, *ends, alpha=0.1, color=line.get_color())
    axes.set_xscale("log", base=2)
    ticks = distinct(rows, "n")
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xlabel("features kept")
    axes.set_ylabel("share of the shift kept\n(band: 95 % over texts)")
    axes.legend(frameon=False, fontsize=8, title="ranking (area)", title_fontsize=8)
    return finish(figure)


def carried_by(rows: list[Row], about: dict) -> Figure:
    """The features that the best ranking names first: their usage, and what the labels say."""
    options = dict(sharey=True, layout="constrained", width_ratios=(2, 3))
    size = (11, 1.2 + 0.22 * len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, **options)
    left.barh(range(len(rows)), [percent(row["usage"]) for row in rows], color=COLOUR["adapter"])
    horizontal(left, [str(row["feature"]) for row in rows], 0.6)
    left.tick_params(axis="y", labelsize=7)
    left.set_xlabel("% of positions at which it steers", fontsize=8)
    for y, row in enumerate(rows):
        text = " | ".join(filter(None, (row["categories"], row["explanation"])))
        right.text(0, y, textwrap.shorten(text, 110, placeholder="…"), va="center", fontsize=7)
    right.set_axis_off()
    return finish(figure)


WHERE_COLOUR = {  # where a feature steered
    "first": "#444444",
    "prompt": COLOUR["prompt"],
    "chosen header": "#a9d8c5",
    "chosen text": COLOUR["chosen"],
    "chosen end": "#176146",
    "rejected header": "#f0cfae",
    "rejected text": COLOUR["rejected"],
    "rejected end": "#8f4f14",
}


def attribution(rows: list[Row], about: dict) -> Figure:
    """Shares of the loss's change by category, each bar divided by where the features steered."""
    groups = distinct(rows, "labels", "category")
    figure, axes = plt.subplots(figsize=(WIDTH, 1.3 + 0.4 * len(groups)), layout="constrained")
    # A part too small to be seen has no place in the legend.
    widest = max((abs(row["share"]) for row in rows), default=0)
    seen = {row["where"] for row in rows if abs(row["share"]) > 0.005 * widest}
    for y, (name, category) in enumerate(groups):
        whole, *parts = where(rows, labels=name, category=category)
        ends = {True: 0.0, False: 0.0}  # of the bars to the right and to the left of zero
        for row in parts:
            right, of = row["share"] >= 0, row["where"]
            label = of if y == 0 and of in seen else None
            style = dict(height=0.6, color=WHERE_COLOUR[of], label=label)
            axes.barh(y, row["share"], left=ends[right], **style)
            ends[right] += row["share"]
        axes.plot([whole["low"], whole["high"]], [y, y], color="black", lw=1.5)
        axes.plot(whole["share"], y, "o", color="black", ms=4)
    horizontal(axes, [f"{name}: {what}" if name else "all features" for name, what in groups])
    axes.set_xlabel("change in SimPO loss that they earned (line: 95 % over pairs)")
    axes.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return finish(figure)


def attribution_features(rows: list[Row], about: dict) -> Figure:
    """The largest shares, feature by feature, with a standard error and what the labels say."""
    options = dict(sharey=True, layout="constrained", width_ratios=(2, 3))
    size = (11, 1.4 + 0.22 * len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, **options)
    shares, errors = ([row[key] for row in rows] for key in ("share", "error"))
    style = dict(color=COLOUR["adapter"], error_kw=dict(lw=1))
    left.barh(range(len(rows)), shares, xerr=errors, **style)
    horizontal(left, [str(row["feature"]) for row in rows], 0.6)
    left.tick_params(axis="y", labelsize=7)
    left.set_xlabel("change in SimPO loss that it earned (line: standard error)", fontsize=8)
    left.set_ylabel("feature")
    for y, row in enumerate(rows):
        text = " | ".join(filter(None, (row["categories"], row["explanation"])))
        right.text(0, y, textwrap.shorten(text, 110, placeholder="…"), va="center", fontsize=7)
    right.set_axis_off()
    return finish(figure)


DRAW: dict[str, Callable[[list[Row], dict], Figure]] = {  # table -> its picture
    "composition_paper": composition_paper,
    "composition": composition,
    "top_usage": top("usage", "share of positions"),
    "top_value": top("value", "mean value over all positions"),
    "value_difference": value_difference,
    "usage_rank": usage_rank,
    "l0": l0,
    "l0_by_position": l0_by_position,
    "topk": topk,
    "ablation": ablation,
    "static": static,
    "choices": choices,
    "shift": shift,
    "behaviour": behaviour,
    "carriers": carriers,
    "carried_by": carried_by,
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
        about = table["about"]
        labels = "; ".join(of["text"] for of in about["labels"]) or "none"
        said = (
            f"{name} of {about['run']} on {about['data']}, {about['pairs']} pairs. Labels: {labels}"
        )
        # png texts are Latin-1
        metadata = dict(Source=source(folder, name), Description=ascii(said)[1:-1])
        figure.savefig(into / f"{name}.png", dpi=150, metadata=metadata)


def source(folder: Path, name: str) -> str:
    return f"{name}.csv sha256 {sha256(folder / f'{name}.csv')}"


def is_current(folder: Path, name: str) -> bool:
    """Whether folder/NAME.png was drawn from the folder/NAME.csv that is there now."""
    try:
        with Image.open(folder / f"{name}.png") as image:
            return image.info.get("Source") == source(folder, name)
    except OSError:
        return False
