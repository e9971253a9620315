"""Tables of OUT/eval/ as the page shows them: short, sorted, rounded to what is known, each with a
caption that says what a large number means. csv and json keep everything.
"""

from typing import NamedTuple

from audit.verdict import nats, p_value, percent

ROWS = 40  # of a table that the page knows nothing of


class Table(NamedTuple):
    titles: list[str]
    rows: list[list]  # text, or Markup of a link to a feature's card
    numbers: int  # how many columns, the last ones, are numbers
    caption: str = ""  # what a large number means


def topk(rows: list[dict]) -> Table:
    cells = [
        [f"{row['percent']:g} %", f"{row['features']:,}", losses(row), percent(row["recovered"])]
        for row in rows
    ]
    titles = ["dictionary kept", "features at a position", "SimPO loss", "of the gain"]
    caption = "Of the gain: 0 % is the base model, 100 % the policy. Intervals: 95 % over pairs."
    return Table(titles, cells, 3, caption)


def ablation(rows: list[dict]) -> Table:
    sets: dict[tuple, dict[str, list]] = {}
    for row in rows:
        of = sets.setdefault((row["labels"], row["category"]), {})
        of.setdefault(row["set"].split()[0], []).append(row)
    cells = []
    for (name, category), of in sorted(sets.items(), key=lambda x: -x[1]["category"][0]["delta"]):
        own = of["category"][0]
        matched = next(iter(of.get("matched", ())), None)
        control, ends = "–", "–"
        if matched:
            control = nats(matched["delta"])
            ends = f"{nats(matched['excess_low'])} to {nats(matched['excess_high'])}"
        random = [row["delta"] for row in of.get("random", ())]
        mean = nats(sum(random) / len(random)) if random else "–"
        name = f"{name}: {category}"
        cells.append([name, f"{own['used']:,}", nats(own["delta"]), control, ends, mean])
    titles = ["category", "features used", "loss added", "matched", "more than matched", "random"]
    caption = (
        "Large: the loss rises much without these features. Matched: as many others of like "
        "usage; random: as many of any usage. More than matched: 95 % interval over pairs; where "
        "it holds 0, the category does no more than its control."
    )
    return Table(titles, cells, 5, caption)


def static(rows: list[dict]) -> Table:
    cells = []
    for row in sorted(rows, key=lambda row: row["loss"]):
        size = f"c = {row['coefficient']:g}" if row["coefficient"] is not None else ""
        size = f"m = {row['features']}" if row["features"] is not None else size
        cells.append([row["steering"], size, losses(row), percent(row["recovered"])])
    caption = (
        "One vector, the same at every position. Of the gain: 100 % is the policy; below 0 % is "
        "worse than the base model. c: coefficient; m: number of features."
    )
    return Table(["steering", "size", "SimPO loss", "of the gain"], cells, 2, caption)


def attribution(rows: list[dict]) -> Table:
    whole = [row for row in rows if row["where"] == "(all)"]
    cells = []
    for row in sorted(whole, key=lambda row: row["share"]):
        name = f"{row['labels']}: {row['category']}" if row["labels"] else "all features"
        ends = f"{nats(row['low'])} to {nats(row['high'])}"
        part = percent(row["part_of_change"])
        cells.append([name, f"{row['used']:,}", part, nats(row["share"]), ends])
    titles = ["features of", "used", "of the gain", "change of the loss", "95 % interval"]
    caption = (
        "Below 0: steering these features lowered the loss (integrated gradients). Categories of "
        "one file may overlap. eval/attribution.csv divides each by where the features steered."
    )
    return Table(titles, cells, 4, caption)


def shift(rows: list[dict]) -> Table:
    cells = []
    for row in sorted(rows, key=lambda row: (row["texts"], row["labels"], -row["divergence"])):
        before, after = (percent(row[key], digits=1) for key in ("before", "after"))
        ends = f"{nats(row['divergence_low'])} to {nats(row['divergence_high'])}"
        null = "–" if row["null_divergence"] is None else nats(row["null_divergence"])
        name = f"{row['labels']}: {row['tokens']}"
        cells.append([row["texts"], name, before, after, nats(row["divergence"]), ends, null])
    titles = ["texts", "tokens", "before", "after", "divergence", "95 % interval", "permuted"]
    caption = (
        "Before, after: probability of such tokens. Divergence: how far policy and base model are "
        "apart in them, nats per position; permuted: the same for a steering of equal size whose "
        "vectors stand at other positions."
    )
    return Table(titles, cells, 5, caption)


def behaviour(rows: list[dict]) -> Table:
    cells = []
    for row in sorted(rows, key=lambda row: -(row["excess"] or 0)):
        before, after = (f"{row[key]:.1f}" for key in ("before", "after"))
        ends = f"{row['low']:+.1f} to {row['high']:+.1f}"
        p = "–" if row["p_value"] is None else p_value(row["p_value"])
        cells.append([f"{row['labels']}: {row['tokens']}", before, after, ends, p])
    titles = ["tokens", "before", "after", "change, 95 % interval", "p"]
    caption = (
        "Tokens in an answer of base model and policy, mean over prompts. Small p: more changed "
        "than swapping the two models' answers explains."
    )
    return Table(titles, cells, 4, caption)


def carriers(rows: list[dict]) -> Table:
    cells = []
    for row in sorted(rows, key=lambda row: (-row["area"], row["n"])):
        ends = f"{percent(row['low'])} to {percent(row['high'])}"
        cells.append([row["ranking"], f"{row['n']:,}", percent(row["kept"]), ends])
    titles = ["ranking", "features kept", "of the shift", "95 % interval"]
    caption = "Large: the first features of the ranking alone shift the category nearly as far."
    return Table(titles, cells, 3, caption)


def plain(rows: list[dict]) -> Table:
    """A table that this page knows nothing of."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [column for column in columns if column not in ("kind", "matched")]
    cells = [[cell(row.get(column)) for column in columns] for row in rows[:ROWS]]
    return Table([column.replace("_", " ") for column in columns], cells, 0)


def cell(value: object) -> str:
    if value is None:
        return "–"
    return small(value) if isinstance(value, float) else str(value)


def small(value: float) -> str:
    """Three digits; what rounds to nothing at four decimals is 0."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return "0" if abs(value) < 5e-5 else f"{value:.3g}"


def losses(row: dict) -> str:
    return f"{nats(row['loss'])} ({nats(row['low'])} to {nats(row['high'])})"
