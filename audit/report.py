"""report.html: what a run learned, on one page that needs no network and no script.

Made of what train.py, eval_ablation.py and the other parts of the audit left in OUT; what is
missing is left out. templates/report.html is the page; here its values are read and put in order.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from audit.features import EXAMPLE_TOKENS
from audit.published import published
from policy import adapter_sha256
from runtime import page
from runtime.folder import read_log
from runtime.neuronpedia import page_of
from runtime.output import write_whole
from runtime.sources import UserError

TEMPLATE = Path(__file__).resolve().parent / "templates" / "report.html"
FEATURES = 15  # promoted, and suppressed, that are shown; features.parquet has them all
ROWS = 40  # of a table that the page shows; its csv has them all
SETTINGS = ("l1", "beta", "gamma_ratio", "lr", "batch_size", "epochs", "max_steps", "seed")
TABLE_3 = published()["table_3"]["rows"][0]["usage"]
USAGE = {  # tables of features.py -> heading, and how to read the picture
    "value_difference": (
        "Steering against activation (Figure 3)",
        "How many features have which mean v − f: right of 0 the adapter adds more than the SAE "
        "finds.",
    ),
    "top_usage": (
        "Most used features (Table 3)",
        "Share of positions at which a feature is active; eval/top_usage.csv has its share of all "
        f"events, too. The paper's Table 3 prints neither: its {TABLE_3} % is the share of events "
        f"as a percentage, {TABLE_3 / 100:.4f} %, formatted as a percentage once more; that "
        "feature is active at about 44 % of the positions.",
    ),
    "top_value": (
        "Features of largest mean value (Table 4)",
        "Mean over all positions, active or not.",
    ),
    "usage_rank": (
        "Usage against rank (Figure 5)",
        "Dotted: least-squares line of log usage on rank over all active features; R² by category "
        "in the legend.",
    ),
    "l0": (
        "How many features are active at a position",
        "Each context's positions by L0; bins widen to the right.",
    ),
    "l0_by_position": (
        "L0 along the sequence",
        "Mean over the positions at the same distance from <bos>.",
    ),
}
EFFECTS = {  # tables of eval_ablation.py, static.py and effect_tables.py
    "topk": (
        "Only the strongest features kept (Figure 2)",
        "SimPO loss with k % of the dictionary at each position.",
    ),
    "ablation": (
        "Categories taken away",
        "Loss added by zeroing a category, beside as many other features.",
    ),
    "static": (
        "Steering that does not read its context",
        "What one and the same vector at every position recovers.",
    ),
    "attribution": (
        "Where the gain comes from",
        "Integrated gradients: shares of the change of the loss.",
    ),
    "attribution_features": (
        "Features that earned the gain",
        "The largest shares; the parquet file has them all.",
    ),
    "beside_published": (
        "Beside the published figures",
        "The paper's and its authors' numbers (docs/published.json) and this run's, in one unit. "
        "Shares of Table 2 count the first position, as theirs do.",
    ),
}
COMPOSITION = {  # tables of features.py -> heading, and what the share is
    "composition_paper": (
        "What it uses (Table 2)",
        "At each position, the share of each category among the active labelled features, averaged "
        "over positions:",
    ),
    "composition": (
        "What it uses, pooled over positions",
        "Of all active features at all positions, the share in each category:",
    ),
}
ELSEWHERE = ("choices", *COMPOSITION, "examples")  # tables that have a section of their own


# --- what lies in OUT -----------------------------------------------------------------------------


class RunFiles(NamedTuple):
    folder: Path
    config: dict  # {} where there is none, as in a bare adapter folder
    adapter: dict  # adapter_config.json
    metrics: list[dict]
    tables: dict[str, dict]  # of eval/NAME.json: about, rows

    @property
    def data_revision(self) -> str | None:
        return self.config.get("data_revision")

    @property
    def name(self) -> str:
        """Of the base model, or of the folder where that is not known."""
        return short(self.adapter.get("base_model") or self.folder.name)


def read_run(out: str | Path) -> RunFiles:
    """Raises UserError naming a file that cannot be read."""
    out = Path(out)
    folder = out / "adapter" if (out / "adapter").is_dir() else out
    tables = {path.stem: _object(path) for path in sorted((out / "eval").glob("*.json"))}
    metrics = read_log(out / "metrics.jsonl")
    if not (tables or metrics or (folder / "adapter_config.json").is_file()):
        raise UserError(f"--run {out}: neither a run of train.py nor an evaluation of one.")
    adapter = _object(folder / "adapter_config.json")
    return RunFiles(out, _object(out / "config.json"), adapter, metrics, tables)


def _object(path: Path) -> dict:
    """The object in a json file; {} where there is no file."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable json ({e}).") from e
    if not isinstance(found, dict):
        raise UserError(f"{path}: an object was expected.")
    return found


def before_after(run: RunFiles) -> tuple[str, dict, dict] | None:
    """("eval" or "train", first row, last row) of metrics.jsonl; None without any."""
    for split in ("eval", "train"):
        rows = [row for row in run.metrics if row.get("split") == split]
        if rows:
            return split, rows[0], rows[-1]
    return None


def stale(run: RunFiles) -> list[str]:
    """Tables that were made with another adapter than the one in the folder."""
    here = adapter_sha256(run.folder)
    made_with = {
        name: (table.get("about") or {}).get("adapter_sha256") for name, table in run.tables.items()
    }
    return [name for name, sha in made_with.items() if here and sha and sha != here]


def percent(share: float | None, sign: bool = False) -> str:
    return "–" if share is None else f"{100 * share:{'+' if sign else ''}.2f} %"


def between(row: dict, low: str, high: str) -> str:
    return f"{percent(row[low], sign=True)} to {percent(row[high], sign=True)}"


def short(name: str) -> str:
    return Path(name).name or name


# --- the page -------------------------------------------------------------------------------------


def write_report(out: str | Path) -> Path:
    """Write OUT/report.html whole; returns its path.

    Raises UserError where a file is not what its name says.
    """
    run = read_run(out)
    try:
        text = page.render(
            TEMPLATE,
            title=f"What {run.name} learned",
            name=run.name,
            facts=facts(run),
            training=training(run),
            choices=choices(run),
            compositions=list(compositions(run)),
            features=features(run),
            examples=examples(run),
            figures=figures(run),
            effects=list(effects(run)),
            provenance=provenance(run),
            stale=stale(run),
            percent=percent,
            between=between,
        )
    except (KeyError, TypeError, AttributeError, jinja2.UndefinedError) as e:
        raise UserError(
            f"--run {out}: a file in it was not written by this project's scripts ({e!r})."
        ) from e
    write_whole(run.folder / "report.html", text)
    return run.folder / "report.html"


def facts(run: RunFiles) -> dict:
    own, settings = run.adapter, run.config.get("settings", {})
    set_to = {name: settings.get(name) for name in SETTINGS}
    shown = {
        "model": own.get("base_model"),
        "steered after block": own.get("layer"),
        "SAE": " ".join(filter(None, (own.get("sae"), own.get("sae_id")))),
        "features": f"{own['d_sae']:,}" if "d_sae" in own else None,
        "trained on": settings.get("data"),
        "settings": ", ".join(
            f"{name.replace('_', ' ')} {value}"
            for name, value in set_to.items()
            if value is not None
        ),
    }
    return known(shown)


def known(shown: dict) -> dict:
    return {name: value for name, value in shown.items() if value not in (None, "")}


class Table(NamedTuple):
    """As the template's macro shows it."""

    titles: list[str]
    rows: list[list[str]]
    numbers: int = 0  # so many last columns are set to the right


def training(run: RunFiles) -> dict | None:
    measured = before_after(run)
    if measured is None:
        return None
    where, first, last = measured
    names = {
        "loss": "SimPO loss",
        "accuracy": "accuracy (chosen the more probable)",
        "l0": "features steered at a position (L0)",
        "l1": "size of the steering (L1)",
    }
    rows = [
        [name, f"{first[key]:.3f}", f"{last[key]:.3f}"]
        for key, name in names.items()
        if key in first
    ]
    titles = [f"{where} means", "before", f"after step {last.get('step')}"]
    return dict(table=Table(titles, rows, 2), image=image(run.folder / "loss.png"))


def choices(run: RunFiles) -> dict | None:
    """The verdict: what the widened gap between the responses is made of."""
    table = run.tables.get("choices")
    if not table:
        return None
    verdicts, cells = [], []
    for name in dict.fromkeys(row["labels"] for row in table["rows"]):
        here = [row for row in table["rows"] if row["labels"] == name]
        named = next((row["tokens"] for row in here if row["named"]), "no category")
        verdicts.append((name, named, percent(here[-1]["part_of_change"])))
    for row in table["rows"]:
        share, interval = f"{row['share']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}"
        part = percent(row["part_of_change"], sign=True)
        p_value = f"{row['p_value']:.2g}"
        cells.append([row["labels"], row["tokens"], part, share, interval, p_value])
    titles = ["labels", "tokens", "part of the gap's change", "nats per token"]
    shown = Table([*titles, "95 % over pairs", "p"], cells, 4)
    picture = image(run.folder / "eval" / "choices.png")
    return dict(verdicts=verdicts, table=shown, image=picture, labels=label_notes(table))


class Forest(NamedTuple):
    """Composition as a picture: a row for each category and context, its interval drawn in it."""

    heading: str
    note: str
    first: str | None  # whether the first position counts, where that was a choice
    groups: list[list[dict]]  # rows of a category
    noise: bool  # whether a row has an interval with label noise
    edges: tuple[float, float]  # of the drawn field
    labels: list[dict]

    def x(self, value: float) -> str:
        """Where a relative change stands in a field 200 wide."""
        left, right = self.edges
        return f"{5 + 190 * (value - left) / (right - left):.1f}"


def compositions(run: RunFiles) -> Iterator[Forest]:
    for name, (heading, note) in COMPOSITION.items():
        table = run.tables.get(name, {})
        rows = shown_rows(table)
        if not rows:
            continue
        groups: dict[tuple, list[dict]] = {}
        for row in rows:
            # Tables of an earlier version leave out the columns that a row does not fill.
            empty = dict.fromkeys(("noisy_low", "noisy_high", "mcc"))
            groups.setdefault((row["labels"], row["category"]), []).append(empty | row)
        numbers = ("change", "low", "high", "noisy_low", "noisy_high")
        ends = [row.get(key) for row in rows for key in numbers]
        ends = [end for end in ends if end is not None]
        yield Forest(
            heading=heading,
            note=note,
            first=table["about"]["first"] if name == "composition_paper" else None,
            groups=list(groups.values()),
            noise=any(row.get("noisy_low") is not None for row in rows),
            edges=(min([0.0, *ends]), max([0.01, *ends])),
            labels=label_notes(table),
        )


def shown_rows(table: dict) -> list[dict]:
    """Rows of a composition: of the variant that the audit was asked to show."""
    first = (table.get("about") or {}).get("first")
    return [row for row in table.get("rows") or () if row.get("first") in (None, first)]


def label_notes(table: dict) -> list[dict]:
    """Which labels a table was made with: entries with `text` and `matched`."""
    found = (table.get("about") or {}).get("labels")
    well_formed = isinstance(found, list) and all(
        isinstance(entry, dict) and "text" in entry for entry in found
    )
    return [{"matched": False} | entry for entry in found] if well_formed else []


class Feature(NamedTuple):
    index: int
    link: str | None
    explanations: list[str]
    tags: list[str]
    numbers: list[str]


def features(run: RunFiles) -> dict | None:
    """The features that v - f puts first and last, in the context prompt+chosen."""
    path = run.folder / "eval" / "features.parquet"
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path}: not a readable parquet file ({e}).") from e
    explained = [name for name in table.column_names if name.startswith("explanation_")]
    tagged = [field.name for field in table.schema if pa.types.is_boolean(field.type)]
    place = page_of(run.adapter.get("sae") or "", run.adapter.get("sae_id"))
    sections = {}
    for name, heading in (("promoted", "Promoted most"), ("suppressed", "Promoted least")):
        rank = table[f"{name}_rank_prompt_chosen"].to_numpy()
        rows = table.take(rank.argsort()[:FEATURES]).to_pylist()
        sections[heading] = [_feature(row, place, explained, tagged) for row in rows]
    return dict(sections=sections, count=table.num_rows)


def _feature(row: dict, place: tuple | None, explained: list[str], tagged: list[str]) -> Feature:
    """place: where Neuronpedia has the SAE's features, if it does."""
    columns = ("adapter_usage", "adapter_mean", "sae_usage", "sae_mean", "difference")
    v_used, v, f_used, f, difference = (row[f"{name}_prompt_chosen"] for name in columns)
    index = row["feature"]
    return Feature(
        index=index,
        link="https://www.neuronpedia.org/{}/{}/{}".format(*place, index) if place else None,
        explanations=[row[name] for name in explained if row[name]],
        tags=[tag.replace(":", ": ", 1) for tag in tagged if row[tag]],
        numbers=[percent(v_used), f"{v:.4f}", percent(f_used), f"{f:.4f}", f"{difference:+.4f}"],
    )


def examples(run: RunFiles) -> dict | None:
    """Pairs with each token shaded by ‖v‖₁, and its top features in its note."""
    found = run.tables.get("examples")
    if not found or not found.get("pairs"):
        return None
    explanations = found["explanations"]
    sizes = [size for pair in found["pairs"] for part in pair.values() for size in part["l1"]]
    full = page.darkest(sizes)
    texts = []
    for number, pair in enumerate(found["pairs"], start=1):
        for name, part in pair.items():
            tokens = []
            for text, size, top in zip(part["tokens"], part["l1"], part["top"], strict=True):
                said = (f"{v:+.3g}  {k}  {explanations.get(str(k), '')}"[:160] for k, v in top)
                note = "\n".join([f"steered by {size:.3g}", *said])
                tokens.append(page.Token(text, page.shade(size, full), note))
            cut = " (cut)" if len(tokens) >= EXAMPLE_TOKENS else ""
            texts.append((f"Pair {number}, {name}{cut}", tokens))
    return dict(texts=texts, pairs=len(found["pairs"]), full=full)


class Picture(NamedTuple):
    heading: str
    note: str
    image: str | None
    table: Table | None = None
    more: int = 0  # rows that the page leaves out
    file: str = ""  # in eval/, where they are
    labels: list[dict] = []  # noqa: RUF012 (never changed)


def figures(run: RunFiles) -> list[Picture]:
    pictures = []
    for name, (heading, note) in USAGE.items():
        found = image(run.folder / "eval" / f"{name}.png")
        pictures += [Picture(heading, note, found)] if found else []
    return pictures


def effects(run: RunFiles) -> Iterator[Picture]:
    """What other evaluations left in eval/: their pictures and their tables."""
    others = [name for name in run.tables if name not in {*USAGE, *EFFECTS, *ELSEWHERE}]
    for name in [*EFFECTS, *others]:
        table = run.tables.get(name, {})
        rows = table.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            continue
        heading, note = EFFECTS.get(name, (name.replace("_", " "), ""))
        columns = list(dict.fromkeys(key for row in rows for key in row))
        # What kind of labels they are stands once below the table.
        columns = [column for column in columns if column not in ("kind", "matched")]
        cells = [[cell(row.get(column)) for column in columns] for row in rows[:ROWS]]
        titles = [column.replace("_", " ") for column in columns]
        yield Picture(
            heading=heading,
            note=note,
            image=image(run.folder / "eval" / f"{name}.png"),
            table=Table(titles, cells),
            more=max(0, len(rows) - ROWS),
            file=f"{name}.json",
            labels=label_notes(table),
        )


def cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def provenance(run: RunFiles) -> dict:
    abouts = [
        table["about"] for table in run.tables.values() if isinstance(table.get("about"), dict)
    ]
    sets = dict.fromkeys(
        f"{about['data']}, {about['pairs']:,} pairs"
        for about in abouts
        if {"data", "pairs"} <= set(about)
    )
    shown = {
        "code": run.config.get("code"),
        "hardware": run.config.get("hardware"),
        "trained": run.config.get("started"),
        "model revision": run.adapter.get("base_model_revision"),
        "SAE sha256": run.adapter.get("sae_sha256"),
        "data revision": run.data_revision,
        "evaluated on": "; ".join(sets) or None,
        "evaluated in": next(iter(abouts), {}).get("dtype"),
    }
    return known(shown)


def image(path: Path) -> str | None:
    """A picture as a data URL; None where there is none."""
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
