"""The tables of eval_features.py as pictures: rows in, a matplotlib Figure out. Nothing is computed here.

Every number drawn stands in the rows; about says which labels were used, and is printed under each figure. Call and
save under plt.rc_context(STYLE).
"""

import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

STYLE = {
    "text.parse_math": False,  # a dollar sign in an explanation is a dollar sign
    **{"axes.spines.top": False, "axes.spines.right": False},
}

COLOUR = {"adapter": "#d1495b", "sae": "#3d6b8e"}
NAME = {"adapter": "adapter (v)", "sae": "SAE (f)"}
CONTEXT_COLOUR = {"prompt": "#7a7a7a", "prompt+chosen": "#2a9d6f", "prompt+rejected": "#d98032"}


def finish(figure: Figure, title: str, about: dict) -> Figure:
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
    labels = "Labels: " + (". ".join(table["text"] for table in about["labels"]) or "none") + "."
    lines = textwrap.wrap(labels, int(figure.get_size_inches()[0] * 15))
    note = f"{about['run']} on {about['data']}, {about['pairs']:,} pairs.\n" + "\n".join(lines)
    figure.supxlabel(note, fontsize=7, color="#555555", x=0.01, ha="left")
    plt.close(figure)  # out of pyplot's registry; the object stays
    return figure


def composition(rows: list[dict], about: dict) -> Figure:
    """Table 2: shares at the left, relative change with intervals at the right."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1.6 + 0.24 * len(rows)), sharey=True, layout="constrained", width_ratios=(2, 3)
    )
    for y, row in enumerate(rows):
        for of in ("sae", "adapter"):
            left.plot(_percent(row[of]), y, "o", color=COLOUR[of], ms=4.5, label=NAME[of] if y == 0 else None)
        colour = CONTEXT_COLOUR[row["context"]]
        if row.get("noisy_low") is not None:
            right.plot([_percent(row["noisy_low"]), _percent(row["noisy_high"])], [y, y], color=colour, lw=1)
        if row["low"] is not None:
            right.plot([_percent(row["low"]), _percent(row["high"])], [y, y], color=colour, lw=3.5, alpha=0.6)
        if row["change"] is not None:
            right.plot(_percent(row["change"]), y, "o", color=colour, ms=4.5)
    ticks = [f"{row['labels']}: {row['category']}, {row['context']}" for row in rows]
    left.set_yticks(range(len(rows)), ticks, fontsize=8)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlim(0, None)
    left.set_xlabel("% of active features")
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.5 / (1 + len(rows) * 0.24)))
    right.axvline(0, color="black", lw=0.8)
    noise = ", thin: label noise too" if any(row.get("noisy_low") is not None for row in rows) else ""
    right.set_xlabel(f"relative change, % (bar: 95 % over pairs{noise})")
    for axes in (left, right):
        axes.grid(axis="x", lw=0.4)
    return finish(figure, "Composition of the active features (Table 2)", about)


def _percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def top(value: str, title: str):
    """-> a draw function of Tables 3 and 4: bars, with what each feature is."""

    def draw(rows: list[dict], about: dict) -> Figure:
        panels = list(dict.fromkeys((row["context"], row["of"]) for row in rows))
        contexts = list(dict.fromkeys(context for context, _ in panels))
        figure, grid = plt.subplots(
            max(1, len(contexts)), 2, figsize=(11, 1 + 2.9 * len(contexts)), layout="constrained", squeeze=False
        )
        for context, of in panels:
            axes = grid[contexts.index(context)][int(of == "sae")]
            here = [row for row in rows if (row["context"], row["of"]) == (context, of)]
            axes.barh([row["rank"] for row in here], [row[value] for row in here], color=COLOUR[of], alpha=0.35)
            for row in here:
                text = " ".join(f"{row['feature']}  {row['explanation']}".split())
                axes.text(0, row["rank"], " " + textwrap.shorten(text, 78, placeholder="…"), va="center", fontsize=7)
            axes.set_yticks([row["rank"] for row in here])
            axes.tick_params(labelsize=7)
            axes.invert_yaxis()
            axes.set_title(f"{NAME[of]}, {context}", fontsize=9, loc="left")
        return finish(figure, title, about)

    return draw


def value_difference(rows: list[dict], about: dict) -> Figure:
    """Figure 3: a histogram of features for each context."""
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    figure, grid = plt.subplots(
        len(contexts), 1, figsize=(7, 1 + 1.7 * len(contexts)), sharex=True, sharey=True, layout="constrained"
    )
    for axes, context in zip(grid, contexts, strict=True):
        here = [row for row in rows if row["context"] == context]
        edges = [row["low"] for row in here] + [here[-1]["high"]]
        axes.stairs([row["features"] for row in here], edges, fill=True, color=CONTEXT_COLOUR[context], baseline=0.5)
        axes.axvline(0, color="black", lw=0.6)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        totals = f"{here[0]['promoted']:,} promoted, {here[0]['suppressed']:,} suppressed, mean {here[0]['mean']:.3g}"
        axes.set_title(f"{context}: {totals}", fontsize=9, loc="left")
        axes.set_ylabel("features")
    grid[-1].set_xlabel("mean v − mean f of a feature")
    return finish(figure, "Mean steering minus mean activation (Figure 3)", about)


def usage_rank(rows: list[dict], about: dict) -> Figure:
    """Figure 5: usage on a log axis against rank, with the fitted lines."""
    panels = list(dict.fromkeys((row["context"], row["of"]) for row in rows))
    contexts = list(dict.fromkeys(context for context, _ in panels))
    curves = list(dict.fromkeys((row["labels"], row["category"]) for row in rows))
    names = list(dict.fromkeys(name for name, _ in curves if name))
    kinds = list(dict.fromkeys(category for name, category in curves if name))
    size = dict(figsize=(10, 1 + 3.4 * len(contexts)), layout="constrained", squeeze=False)
    figure, grid = plt.subplots(max(1, len(contexts)), 2, sharey=True, **size)
    for context, of in panels:
        axes = grid[contexts.index(context)][int(of == "sae")]
        for name, category in curves:
            key = (context, of, name, category)
            here = [row for row in rows if (row["context"], row["of"], row["labels"], row["category"]) == key]
            if not here:
                continue
            colour = f"C{kinds.index(category)}" if name else "black"
            style = ["-", (0, (4, 2)), (0, (1, 1))][names.index(name) % 3] if name else "-"
            r2 = "no fit" if here[0]["r2"] is None else f"R² {here[0]['r2']:.2f}"
            label = f"{name}: {category}" if name else category
            label += f", {here[0]['active']:,} active, {r2}"
            ranks = [row["rank"] for row in here]
            axes.plot(ranks, [row["usage"] for row in here], color=colour, ls=style, lw=1.3, label=label)
            if not name and here[0]["fit"] is not None:
                axes.plot(ranks, [row["fit"] for row in here], color=colour, lw=0.7, ls=(0, (2, 3)))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{NAME[of]}, {context}", fontsize=9, loc="left")
        axes.set_xlabel("rank by usage (within the category)", fontsize=8)
        axes.set_ylabel("share of positions", fontsize=8)
        axes.legend(frameon=False, fontsize=6.5)
    low = min((row["usage"] for row in rows), default=0.1)
    grid[0][0].set_ylim(low / 2, 2)
    return finish(figure, "Usage against rank, with the log-linear fit over all features (Figure 5)", about)


def l0(rows: list[dict], about: dict) -> Figure:
    """Positions by how many features are active there."""
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    figure, grid = plt.subplots(
        len(contexts), 1, figsize=(7, 1 + 1.7 * len(contexts)), sharex=True, layout="constrained"
    )
    for axes, context in zip(grid, contexts, strict=True):
        for of in ("sae", "adapter"):
            here = [row for row in rows if (row["context"], row["of"]) == (context, of)]
            edges = [row["low"] for row in here] + [here[-1]["high"] + 1]
            label = f"{NAME[of]}: mean {here[0]['mean']:.1f}, 90 % within {here[0]['p5']}–{here[0]['p95']}"
            heights = [row["positions"] for row in here]
            axes.stairs(heights, edges, fill=True, color=COLOUR[of], alpha=0.5, label=label)
        axes.set_title(context, fontsize=9, loc="left")
        axes.set_ylabel("positions")
        axes.legend(frameon=False, fontsize=8)
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
    grid[-1].set_xlabel("L0: features active at a position")
    return finish(figure, "How many features are active at a position", about)


def l0_by_position(rows: list[dict], about: dict) -> Figure:
    """Mean L0 against the place in the sequence."""
    figure, grid = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    for axes, of in zip(grid, ("adapter", "sae"), strict=True):
        for context in dict.fromkeys(row["context"] for row in rows):
            here = [row for row in rows if (row["context"], row["of"]) == (context, of)]
            style = dict(color=CONTEXT_COLOUR[context], lw=1.3, ls="-" if context != "prompt" else ":", label=context)
            axes.plot([(row["low"] + row["high"]) / 2 for row in here], [row["mean_l0"] for row in here], **style)
        axes.set_title(NAME[of], fontsize=9, loc="left")
        axes.set_ylabel("mean L0")
        rows_of = [row for row in rows if row["of"] == of]
        usual = max((row["positions"] for row in rows_of), default=1) / 50
        axes.set_ylim(0, 1.2 * max((row["mean_l0"] for row in rows_of if row["positions"] >= usual), default=1) or 1)
    grid[0].legend(frameon=False, fontsize=8)
    grid[1].set_xlabel("position in the sequence (<bos>, at 0, is left out); cut off where few positions remain")
    return finish(figure, "L0 by position", about)
