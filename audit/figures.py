"""The tables of eval_features.py and eval_ablation.py as pictures: rows in, a matplotlib Figure out.

Nothing is computed here: every number drawn stands in the rows. about says which labels were used, and is printed under
each figure. Call and save under plt.rc_context(STYLE).
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
CONDITION_COLOUR = {
    "base model": "#7a7a7a",
    "policy": "#d1495b",
}  # of eval_ablation.py, and its sets of features:
CONDITION_COLOUR |= {"category": "#d1495b", "matched": "#3d6b8e", "random": "#9aa7b1"}
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
        1,
        2,
        figsize=(9, 1.6 + 0.24 * len(rows)),
        sharey=True,
        layout="constrained",
        width_ratios=(2, 3),
    )
    for y, row in enumerate(rows):
        for of in ("sae", "adapter"):
            left.plot(
                _percent(row[of]),
                y,
                "o",
                color=COLOUR[of],
                ms=4.5,
                label=NAME[of] if y == 0 else None,
            )
        colour = CONTEXT_COLOUR[row["context"]]
        if row.get("noisy_low") is not None:
            right.plot(
                [_percent(row["noisy_low"]), _percent(row["noisy_high"])],
                [y, y],
                color=colour,
                lw=1,
            )
        if row["low"] is not None:
            right.plot(
                [_percent(row["low"]), _percent(row["high"])],
                [y, y],
                color=colour,
                lw=3.5,
                alpha=0.6,
            )
        if row["change"] is not None:
            right.plot(_percent(row["change"]), y, "o", color=colour, ms=4.5)
    ticks = [f"{row['labels']}: {row['category']}, {row['context']}" for row in rows]
    left.set_yticks(range(len(rows)), ticks, fontsize=8)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlim(0, None)
    left.set_xlabel("% of active features")
    left.legend(
        frameon=False,
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, 1.0 + 0.5 / (1 + len(rows) * 0.24)),
    )
    right.axvline(0, color="black", lw=0.8)
    noise = (
        ", thin: label noise too" if any(row.get("noisy_low") is not None for row in rows) else ""
    )
    right.set_xlabel(f"relative change, %\n(bar: 95 % over pairs{noise})", fontsize=9)
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
            max(1, len(contexts)),
            2,
            figsize=(11, 1 + 2.9 * len(contexts)),
            layout="constrained",
            squeeze=False,
        )
        for context, of in panels:
            axes = grid[contexts.index(context)][int(of == "sae")]
            here = [row for row in rows if (row["context"], row["of"]) == (context, of)]
            axes.barh(
                [row["rank"] for row in here],
                [row[value] for row in here],
                color=COLOUR[of],
                alpha=0.35,
            )
            for row in here:
                text = " ".join(f"{row['feature']}  {row['explanation']}".split())
                axes.text(
                    0,
                    row["rank"],
                    " " + textwrap.shorten(text, 78, placeholder="…"),
                    va="center",
                    fontsize=7,
                )
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
        len(contexts),
        1,
        figsize=(7, 1 + 1.7 * len(contexts)),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axes, context in zip(grid, contexts, strict=True):
        here = [row for row in rows if row["context"] == context]
        edges = [row["low"] for row in here] + [here[-1]["high"]]
        axes.stairs(
            [row["features"] for row in here],
            edges,
            fill=True,
            color=CONTEXT_COLOUR[context],
            baseline=0.5,
        )
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
            here = [
                row
                for row in rows
                if (row["context"], row["of"], row["labels"], row["category"]) == key
            ]
            if not here:
                continue
            colour = f"C{kinds.index(category)}" if name else "black"
            style = ["-", (0, (4, 2)), (0, (1, 1))][names.index(name) % 3] if name else "-"
            r2 = "no fit" if here[0]["r2"] is None else f"R² {here[0]['r2']:.2f}"
            label = f"{name}: {category}" if name else category
            label += f", {here[0]['active']:,} active, {r2}"
            ranks = [row["rank"] for row in here]
            axes.plot(
                ranks, [row["usage"] for row in here], color=colour, ls=style, lw=1.3, label=label
            )
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
    return finish(
        figure, "Usage against rank, with the log-linear fit over all features (Figure 5)", about
    )


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
            style = dict(
                color=CONTEXT_COLOUR[context],
                lw=1.3,
                ls="-" if context != "prompt" else ":",
                label=context,
            )
            axes.plot(
                [(row["low"] + row["high"]) / 2 for row in here],
                [row["mean_l0"] for row in here],
                **style,
            )
        axes.set_title(NAME[of], fontsize=9, loc="left")
        axes.set_ylabel("mean L0")
        rows_of = [row for row in rows if row["of"] == of]
        usual = max((row["positions"] for row in rows_of), default=1) / 50
        axes.set_ylim(
            0,
            1.2 * max((row["mean_l0"] for row in rows_of if row["positions"] >= usual), default=1)
            or 1,
        )
    grid[0].legend(frameon=False, fontsize=8)
    grid[1].set_xlabel(
        "position in the sequence (<bos>, at 0, is left out); cut off where few positions remain"
    )
    return finish(figure, "L0 by position", about)


def topk(rows: list[dict], about: dict) -> Figure:
    """Figure 2: loss against the share of the dictionary kept, on a log axis; base model and policy as lines."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row, name in ((rows[0], "base model (0 %)"), (rows[-1], "policy (100 %)")):
        colour = CONDITION_COLOUR[name.split(" (")[0]]
        axes.axhspan(row["low"], row["high"], color=colour, alpha=0.12, lw=0)
        axes.axhline(row["loss"], color=colour, lw=1, ls="--", label=f"{name}: {row['loss']:.3f}")
    inner = rows[1:-1]
    at, loss = [row["percent"] for row in inner], [row["loss"] for row in inner]
    axes.fill_between(
        at,
        [row["low"] for row in inner],
        [row["high"] for row in inner],
        alpha=0.2,
        lw=0,
        color="C0",
    )
    axes.plot(at, loss, "o-", ms=4, color="C0", label="top k %")
    for row in inner:
        axes.annotate(
            f"{row['features']}",
            (row["percent"], row["loss"]),
            (0, 5),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(
        xscale="log",
        xlabel="% of the dictionary kept at each position (above each point: features)",
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(ylabel="SimPO loss", ylim=(min(0, *loss), None))
    axes.legend(frameon=False, fontsize=8)
    return finish(figure, "Loss with only the largest features kept (Figure 2)", about)


def ablation(rows: list[dict], about: dict) -> Figure:
    """Of each category the loss added by zeroing it, above its controls."""
    groups = list(dict.fromkeys((row["labels"], row["category"]) for row in rows))
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.75 * len(groups)), layout="constrained")
    ticks = []
    for y, (name, category) in enumerate(groups):
        here = [row for row in rows if (row["labels"], row["category"]) == (name, category)]
        ticks.append(
            f"{name}: {category}\n{here[0]['features']:,} features, {here[0]['used']:,} used"
        )
        for kind, offset in (("category", -0.22), ("matched", 0.0), ("random", 0.22)):
            sets = [row for row in here if row["set"].split()[0] == kind]
            for row in sets:
                axes.plot(
                    [row["low"], row["high"]],
                    [y + offset] * 2,
                    color=CONDITION_COLOUR[kind],
                    lw=3,
                    alpha=1 / (1 + len(sets)),
                )
            deltas = [row["delta"] for row in sets]
            label = dict(
                category="the category",
                matched="matched on usage",
                random="random sets, as many features",
            )
            axes.plot(
                deltas,
                [y + offset] * len(sets),
                "o",
                ms=4,
                color=CONDITION_COLOUR[kind],
                label=label[kind] if not y else None,
            )
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(groups)), ticks, fontsize=8)
    axes.set(
        ylim=(len(groups) - 0.5, -0.5),
        xlabel="SimPO loss added by zeroing the features (95 % over pairs)",
    )
    axes.grid(axis="x", lw=0.4)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return finish(figure, "Zeroing a category, and controls", about)


def static(rows: list[dict], about: dict) -> Figure:
    """Losses of static steering against its coefficient, and against the number of features."""
    figure, panels = plt.subplots(
        1, 2, figsize=(9, 4), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    curves = {
        name: [row for row in rows if row["steering"] == name]
        for name in dict.fromkeys(r["steering"] for r in rows)
    }
    for axes in panels:
        for name in ("base model", "policy"):
            (row,) = curves[name]
            axes.axhspan(row["low"], row["high"], color=CONDITION_COLOUR[name], alpha=0.12, lw=0)
            label = f"{name}: {row['loss']:.3f}" if axes is panels[0] else None
            axes.axhline(row["loss"], color=CONDITION_COLOUR[name], lw=1, ls="--", label=label)
    for i, (name, here) in enumerate(curves.items()):
        if name in ("base model", "policy"):
            continue
        axes, key = (
            (panels[1], "features") if name == "top features" else (panels[0], "coefficient")
        )
        here = sorted(here, key=lambda row: row[key])
        at = [row[key] for row in here]
        axes.fill_between(
            at,
            [r["low"] for r in here],
            [r["high"] for r in here],
            alpha=0.15,
            lw=0,
            color=f"C{i - 2}",
        )
        axes.plot(at, [r["loss"] for r in here], "o-", ms=4, color=f"C{i - 2}", label=name)
    panels[0].set(xlabel="coefficient c", ylabel="SimPO loss")
    if all(row["coefficient"] is None or row["coefficient"] > 0 for row in rows):
        panels[0].set_xscale("log")
    panels[1].set(xscale="log", xlabel="m, the features of largest mean v")
    for axes, at in zip(
        panels, ({r["coefficient"] for r in rows}, {r["features"] for r in rows}), strict=True
    ):
        axes.set_xticks(sorted(at - {None}), [f"{x:g}" for x in sorted(at - {None})])
        axes.minorticks_off()
    for axes in panels:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    axes.set_ylim(
        0,
        1.1
        * max(max(r["loss"] for r in rows if r["loss"] <= 4 * rows[0]["loss"]), rows[0]["high"]),
    )
    return finish(figure, "Steering that does not read its context", about)


def choices(rows: list[dict], about: dict) -> Figure:
    """Shares of the widened preference gap by kinds of tokens; the named category is filled."""
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.3 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        colour = CONDITION_COLOUR["policy" if row["named"] else "random"]
        axes.barh(y, row["share"], height=0.6, color=colour)
        axes.plot([row["low"], row["high"]], [y, y], color="black", lw=1.5)
    axes.axvline(0, color="black", lw=0.8)
    ticks = [
        f"{row['labels']}: {row['tokens']}{' (named)' if row['named'] else ''}" for row in rows
    ]
    axes.set_yticks(range(len(rows)), ticks, fontsize=8)
    axes.set(ylim=(len(rows) - 0.5, -0.5))
    axes.set_xlabel("change of ℓ(chosen) − ℓ(rejected), nats per token (line: 95 % over pairs)")
    axes.grid(axis="x", lw=0.4)
    return finish(figure, "What the policy chooses otherwise", about)


def attribution(rows: list[dict], about: dict) -> Figure:
    """Shares of the loss's change by category, each bar divided by where the features steered."""
    groups = list(dict.fromkeys((row["labels"], row["category"]) for row in rows))
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.45 * len(groups)), layout="constrained")
    for y, group in enumerate(groups):
        here = {row["where"]: row for row in rows if (row["labels"], row["category"]) == group}
        ends = {1: 0.0, -1: 0.0}  # bars to the right and to the left of zero
        for i, where in enumerate(where for where in here if where != "(all)"):
            share = here[where]["share"]
            sign = 1 if share >= 0 else -1
            axes.barh(
                y,
                share,
                left=ends[sign],
                height=0.6,
                color=f"C{i}",
                label=where if y == 0 else None,
            )
            ends[sign] += share
        whole = here["(all)"]
        axes.plot([whole["low"], whole["high"]], [y, y], color="black", lw=1.5)
        axes.plot(whole["share"], y, "o", color="black", ms=4)
    axes.axvline(0, color="black", lw=0.8)
    ticks = [f"{name}: {category}" if name else "all features" for name, category in groups]
    axes.set_yticks(range(len(groups)), ticks, fontsize=8)
    axes.set(
        ylim=(len(groups) - 0.5, -0.5),
        xlabel="change in SimPO loss that they earned (line: 95 % over pairs)",
    )
    axes.grid(axis="x", lw=0.4)
    axes.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return finish(
        figure,
        f"Shares of the change of {about['change']:.3f} in loss (residual {about['residual']:.2g})",
        about,
    )


def attribution_features(rows: list[dict], about: dict) -> Figure:
    """The largest shares, feature by feature, with a standard error and what the label files say."""
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(11, 1.4 + 0.22 * len(rows)),
        sharey=True,
        layout="constrained",
        width_ratios=(2, 3),
    )
    error = [row["error"] for row in rows]
    left.barh(
        range(len(rows)),
        [row["share"] for row in rows],
        xerr=error,
        color="#3d6b8e",
        error_kw=dict(lw=1),
    )
    left.set_yticks(range(len(rows)), [row["feature"] for row in rows], fontsize=7)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.axvline(0, color="black", lw=0.8)
    left.set_xlabel("change in SimPO loss that it earned (line: standard error)", fontsize=8)
    left.set_ylabel("feature")
    for y, row in enumerate(rows):
        text = " | ".join(filter(None, (row["categories"], row["explanation"])))
        right.text(0, y, textwrap.shorten(text, 110, placeholder="…"), va="center", fontsize=7)
    right.set_axis_off()
    return finish(figure, "The features with the largest shares", about)
