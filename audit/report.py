"""report.html: what a run learned, on one page that loads nothing from elsewhere.

Made of what train.py, eval_ablation.py and the other parts of the audit left in OUT; what is
missing is left out. It leads with the sentences of verdict.py; evidence follows, and everything
else is folded. templates/report.html is the page; here its values are read and put in order.
"""

import base64
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from audit import page_tables
from audit.features import EXAMPLE_TOKENS
from audit.page_tables import Table, small
from audit.published import published
from audit.verdict import nats, p_value, percent, readings, shortened, verdict
from generation import page
from policy import adapter_sha256
from runtime.folder import read_log
from runtime.outcome import Sample, before_after, measured, outcome
from runtime.output import write_whole
from runtime.sae_ids import page_of
from runtime.sources import UserError, read_json

TEMPLATE = Path(__file__).resolve().parent / "templates" / "report.html"
SCRIPT = TEMPLATE.with_name("report.js").read_text()
IN_SIGHT = 6  # features that earned the gain
FEATURES = 10  # of each other order of features; the parquet files have them all
CONTEXT = "prompt_chosen"  # of the features' numbers on the page
TABLE_3 = published()["table_3"]["rows"][0]["usage"]
SETTINGS = ("l1", "beta", "gamma_ratio", "lr", "batch_size", "epochs", "max_steps", "seed")


# --- what lies in OUT -----------------------------------------------------------------------------


class RunFiles(NamedTuple):
    folder: Path
    config: dict  # {} where there is none, as in a bare adapter folder
    adapter: dict  # adapter_config.json
    metrics: list[dict]
    samples: list[Sample]
    tables: dict[str, dict]  # of eval/NAME.json: about, rows
    left_out: list[str]  # names of tables of another adapter, other pairs or other labels

    @property
    def data_revision(self) -> str | None:
        return self.config.get("data_revision")

    @property
    def name(self) -> str:
        """Of the base model, or of the folder where that is not known."""
        return short(self.adapter.get("base_model") or self.folder.name)

    def rows(self, name: str) -> list[dict]:
        return self.tables.get(name, {}).get("rows") or []


def read_run(out: str | Path, about: dict | None = None) -> RunFiles:
    """What lies in OUT. Raises UserError naming a file that cannot be read.

    about: of the tables that are wanted, as eval_ablation.described_run gives it. Without it they
    are those of the adapter in the folder.
    """
    out = Path(out)
    folder = out / "adapter" if (out / "adapter").is_dir() else out
    tables = {path.stem: _json(path) for path in sorted((out / "eval").glob("*.json"))}
    wanted = dict(adapter_sha256=adapter_sha256(out)) if about is None else about
    left_out = [name for name, table in tables.items() if is_other(table, wanted)]
    metrics = read_log(out / "metrics.jsonl")
    if not (tables or metrics or (folder / "adapter_config.json").is_file()):
        raise UserError(f"--run {out}: neither a run of train.py nor an evaluation of one.")
    adapter, config = _json(folder / "adapter_config.json"), _json(out / "config.json")
    if about and not adapter:  # results that lie apart from their run
        adapter = {name: about[name] for name in ("base_model", "layer", "sae", "sae_id")}
    tables = {name: table for name, table in tables.items() if name not in left_out}
    return RunFiles(out, config, adapter, metrics, _samples(out / "samples.json"), tables, left_out)


def is_other(table: dict, wanted: dict) -> bool:
    """Whether a table was made with another adapter, other pairs or other labels than wanted."""
    made = table.get("about") or {}
    keys = [key for key in ("adapter_sha256", "pairs_sha256") if made.get(key) and wanted.get(key)]
    # Tables that no label enters have none.
    keys += ["labels"] if made.get("labels") and "labels" in wanted else []
    return any(made[key] != wanted[key] for key in keys)


def _json(path: Path, kind: type = dict):
    """What a json file holds; empty where there is no file."""
    try:
        return read_json(path, kind) if path.exists() else kind()
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable json ({e}).") from e


def _samples(path: Path) -> list[Sample]:
    try:
        return [Sample(*(str(row[key]) for key in Sample._fields)) for row in _json(path, list)]
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}: prompts with answers were expected ({e!r}).") from e


def tenths(share: float | None, sign: bool = False) -> str:
    return percent(share, digits=1, sign=sign)


def between(row: dict, low: str, high: str) -> str:
    return f"{tenths(row[low], True)} to {tenths(row[high], True)}"


def short(name: str) -> str:
    return Path(name).name or name


# --- the page -------------------------------------------------------------------------------------


def write_report(out: str | Path, about: dict | None = None) -> Path:
    """Write OUT/report.html whole; returns its path. about: as for read_run.

    Raises UserError where a file is not what its name says.
    """
    run = read_run(out, about)
    try:
        known = Known(run)
        text = page.render(
            TEMPLATE,
            script=SCRIPT,
            title=f"What {run.name} learned",
            name=run.name,
            facts=facts(run),
            verdict=verdict(run.tables),
            choices=choices(run),
            training=training(run),
            l0=l0(run),
            compositions=list(compositions(run)),
            features=list(features(run, known)),
            examples=examples(run, known),
            does=list(sections(run, DOES)),
            effects=effects(run),
            figures=figures(run),
            provenance=provenance(run),
            labels=labels(run),
            cards=known.cards(),
            left_out=run.left_out,
            percent=tenths,
            whole=percent,
            between=between,
        )
    except (KeyError, TypeError, AttributeError, IndexError, jinja2.UndefinedError) as e:
        raise UserError(
            f"--run {out}: a file in it was not written by this project's scripts ({e!r})."
        ) from e
    write_whole(run.folder / "report.html", text)
    return run.folder / "report.html"


def facts(run: RunFiles) -> str:
    """What was trained on what, in a line."""
    settings, own = run.config.get("settings", {}), run.adapter
    parts = [
        run.name,
        f"layer {own['layer']}" if "layer" in own else None,
        f"SAE {short(own['sae'])} {own.get('sae_id') or ''}".strip() if own.get("sae") else None,
        f"trained on {short(settings['data'])}" if settings.get("data") else None,
    ]
    return " · ".join(part for part in parts if part)


def training(run: RunFiles) -> dict | None:
    found = measured(run.metrics)
    if not found:
        return None
    titles = [f"{found[-1]['split']} means", "before", f"after step {found[-1].get('step')}"]
    table = Table(titles, [list(row) for row in before_after(found)], 2)
    return dict(
        said=outcome(run.metrics, run.samples),
        table=table,
        image=image(run.folder / "loss.png"),
        samples=run.samples,
    )


# --- the verdict's numbers ------------------------------------------------------------------------


class Scale(NamedTuple):
    """Where a value stands in a drawn field 200 wide."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Scale":
        known = [value for value in values if value is not None]
        return cls(min([0.0, *known]), max([0.01, *known]))

    def x(self, value: float) -> str:
        return f"{5 + 190 * (value - self.low) / (self.high - self.low):.1f}"


def choices(run: RunFiles) -> dict | None:
    """The shares of the widened gap: bars under the leading labels, numbers under all."""
    rows = run.rows("choices")
    if not rows:
        return None
    lead = readings(rows)[0].rows
    bars = sorted(lead, key=lambda row: -row["share"])
    scale = Scale.of([row[key] for row in bars for key in ("low", "high", "share")])
    cells = []
    for row in sorted(rows, key=lambda row: (row["labels"] != lead[0]["labels"], -row["share"])):
        interval = f"{nats(row['low'])} to {nats(row['high'])}"
        chance = (nats(row["chance"]), p_value(row["p_value"])) if "chance" in row else ("–", "–")
        data = f"{100 * row['data']:+.1f}" if "data" in row else "–"
        part = percent(row["part_of_change"])
        cells.append([row["labels"], row["tokens"], part, nats(row["share"]), interval])
        cells[-1] += [*chance, data]
    titles = ["labels", "tokens", "part of the gap", "nats per token", "95 % interval"]
    titles += ["chance, at most", "p, one-sided", "data alone, points"]
    caption = (
        "Large: much of the widened gap was earned by choices of such tokens. Chance: what "
        "swapping chosen and rejected exceeds once in 100 draws, all kinds of tokens together; p "
        "is of the same test. Data alone: the share of such tokens in chosen responses less that "
        "in rejected ones, which no policy enters."
    )
    return dict(bars=bars, scale=scale, table=Table(titles, cells, 6, caption))


# --- L0 -------------------------------------------------------------------------------------------


def l0(run: RunFiles) -> dict | None:
    found = {(row["of"], row["context"]): row for row in run.rows("l0") if "some" in row}
    if not found:
        return None
    cells = [
        [
            "adapter" if of == "adapter" else "SAE",
            context,
            percent(row["some"]),
            f"{row['some_p50'] or 0:,}",
            f"{row['some_p95'] or 0:,}",
            f"{row['mean']:.1f}",
        ]
        for (of, context), row in found.items()
    ]
    titles = ["", "positions of", "with any feature", "median there", "95th percentile there"]
    titles.append("mean of all")
    caption = (
        "Of the evaluation pairs, <bos> left out. Median and percentile are over the positions "
        "with any feature; the mean is over all positions."
    )
    row = found.get(("adapter", "prompt+chosen"))
    said = row and (
        f"At {percent(row['some'])} of the positions of prompt and chosen response the adapter "
        f"steers at all; there it turns up a median of {row['some_p50'] or 0:,} features (95th "
        f"percentile {row['some_p95'] or 0:,}). The mean over all positions, {row['mean']:.1f}, "
        "describes neither."
    )
    image_of = image(run.folder / "eval" / "l0.png")
    return dict(said=said, table=Table(titles, cells, 4, caption), image=image_of)


# --- composition ----------------------------------------------------------------------------------

COMPOSITION = {  # tables of features.py -> heading, and what the share is
    "composition_paper": (
        "Averaged over positions (Table 2)",
        "At each position, the share of each category among the active labelled features, averaged "
        "over positions:",
    ),
    "composition": (
        "Pooled over positions",
        "Of all active features at all positions, the share in each category:",
    ),
}


class Forest(NamedTuple):
    """Composition as a picture: a row for each category and context, its interval drawn in it."""

    heading: str
    note: str
    first: str | None  # whether the first position counts, where that was a choice
    groups: list[list[dict]]  # rows of a category
    noise: bool  # whether a row has an interval with label noise
    scale: Scale


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
        yield Forest(
            heading=heading,
            note=note,
            first=table["about"]["first"] if name == "composition_paper" else None,
            groups=list(groups.values()),
            noise=any(row.get("noisy_low") is not None for row in rows),
            scale=Scale.of([row.get(key) for row in rows for key in numbers]),
        )


def shown_rows(table: dict) -> list[dict]:
    """Rows of a composition: of the variant that the audit was asked to show."""
    first = (table.get("about") or {}).get("first")
    return [row for row in table.get("rows") or () if row.get("first") in (None, first)]


def labels(run: RunFiles) -> list[dict]:
    """The label files behind the page's tables: entries with `text` and `matched`."""
    found = {}
    for table in run.tables.values():
        entries = (table.get("about") or {}).get("labels")
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and "text" in entry:
                found[entry["text"]] = {"matched": False} | entry
    return list(found.values())


# --- features -------------------------------------------------------------------------------------


class Card(NamedTuple):
    index: int
    link: str | None  # to Neuronpedia
    explanations: list[str]
    tags: list[str]
    numbers: dict[str, str]
    promotes: list[str]
    contexts: list[list]  # v, the text before, the token, the text after


class Known:
    """What features.parquet and the cards say of features; a link asks for the feature's card."""

    def __init__(self, run: RunFiles):
        beside = "examples" not in run.left_out  # made together
        self.table = _parquet(run.folder / "eval" / "features.parquet") if beside else None
        self.extra = {}
        for name in ("examples", "attribution_cards"):
            self.extra |= run.tables.get(name, {}).get("cards") or {}
        self.place = page_of(run.adapter.get("sae") or "", run.adapter.get("sae_id"))
        names = self.table.column_names if self.table else []
        self.explained = [name for name in names if name.startswith("explanation_")]
        fields = self.table.schema if self.table else ()
        self.tagged = [field.name for field in fields if pa.types.is_boolean(field.type)]
        self.linked: set[int] = set()

    def link(self, k: int) -> Markup | str:
        if not self.table or not 0 <= k < self.table.num_rows:
            return str(k)
        self.linked.add(k)
        return Markup('<a class="f" href="#f{0}">{0}</a>').format(int(k))

    def column(self, name: str) -> np.ndarray:
        return self.table[f"{name}_{CONTEXT}"].to_numpy()

    def named(self, k: int) -> tuple[Markup | str, str]:
        """A link, and what the labels say: explanations, then categories."""
        card = self.card(k)
        said = shortened(card.explanations[0]) if card.explanations else "no explanation"
        said = f"{said} [{'; '.join(card.tags) or 'no category'}]"
        return self.link(k), said

    def card(self, k: int) -> Card:
        (row,) = self.table.slice(k, 1).to_pylist()
        more = self.extra.get(str(k), {})
        numbers = {
            "steered at": f"{tenths(row[f'adapter_usage_{CONTEXT}'])} of positions",
            "mean v": small(row[f"adapter_mean_{CONTEXT}"]),
            "found by the SAE at": f"{tenths(row[f'sae_usage_{CONTEXT}'])} of positions",
            "mean f": small(row[f"sae_mean_{CONTEXT}"]),
        }
        url = "https://www.neuronpedia.org/{}/{}/{}".format(*self.place, k) if self.place else None
        return Card(
            index=k,
            link=url,
            explanations=[row[name] for name in self.explained if row[name]],
            tags=[tag.replace(":", ": ", 1) for tag in self.tagged if row[tag]],
            numbers=numbers,
            promotes=more.get("promotes", []),
            contexts=more.get("contexts", []),
        )

    def cards(self) -> list[Card]:
        return [self.card(k) for k in sorted(self.linked)]


def _parquet(path: Path) -> pa.Table | None:
    if not path.is_file():
        return None
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path}: not a readable parquet file ({e}).") from e


class Section(NamedTuple):
    """A heading, what stands below it, a picture, a table."""

    heading: str
    note: str
    table: Table | None = None
    image: str | None = None
    more: str = ""  # what the page leaves out, and where it is


def features(run: RunFiles, known: Known) -> Iterator[Section]:
    """The features that carry the change, then those that earned the gain, as far as either was
    measured; then by how they are used.
    """
    carried = run.rows("carried_by")
    if carried and known.table:
        cells = [
            [*known.named(r["feature"]), tenths(r["usage"]), small(r["mean_v"])]
            for r in carried[:IN_SIGHT]
        ]
        ranking = next((row["ranking"] for row in run.rows("carriers") if row["wins"]), "")
        caption = (
            f"In the order of the ranking ({ranking}) whose first features, kept alone, keep most "
            "of the shift. Steered at: share of positions."
        )
        titles = ["feature", "what it is", "steered at", "mean v"]
        more = "More of them are in eval/carried_by.csv."
        table = Table(titles, cells, 2, caption)
        yield Section("Features that carry the change", "", table, None, more)

    about = run.tables.get("attribution_features", {}).get("about") or {}
    change = about.get("change") or 0.0
    earned = [r for r in run.rows("attribution_features") if change < 0 and r["share"] < 0]
    earned = sorted(earned, key=lambda row: row["share"])
    if earned and known.table:
        whole = percent(1 + about.get("residual", 0.0) / change)
        cells = [
            [
                *known.named(r["feature"]),
                percent(r["share"] / change),
                tenths(r["usage"]),
                small(r["mean_v"]),
            ]
            for r in earned[:IN_SIGHT]
        ]
        titles = ["feature", "what it is", "of the gain", "steered at", "mean v"]
        caption = (
            "Large: much of the lower loss is due to turning this feature up (integrated "
            f"gradients; the shares of all features sum to {whole}, and come nearer to 100 % with "
            "more --nodes). Steered at: share of positions."
        )
        more = "The largest 30 are in eval/attribution_features.csv, all in the parquet beside it."
        yield Section(
            "Features that earned the gain", "", Table(titles, cells, 3, caption), None, more
        )
    if known.table is None:
        return

    used, mean, difference = map(known.column, ("adapter_usage", "adapter_mean", "difference"))
    found, f = known.column("sae_usage"), known.column("sae_mean")
    orders = {
        "Steered most": (
            np.argsort(-difference, kind="stable"),
            "The order of the paper's Figure 3, mean v − f. Size is not effect: a feature here may "
            "change nothing when it is kept alone.",
        ),
        "Found in the text and not turned up": (
            [k for k in np.argsort(-f, kind="stable") if not used[k] and f[k] > 0],
            "Features that the SAE finds and the adapter never adds to, by mean f.",
        ),
        "Most used (Table 3)": (
            np.argsort(-used, kind="stable"),
            f"By share of positions. The paper's Table 3 prints neither that nor a percentage of "
            f"events: its {TABLE_3} % is the share of events formatted as a percentage twice; "
            "that feature is active at about 44 % of the positions.",
        ),
        "Largest mean value (Table 4)": (np.argsort(-mean, kind="stable"), "Over all positions."),
    }
    titles = ["feature", "what it is", "steered at", "mean v", "found at", "mean f"]
    for heading, (order, note) in orders.items():
        cells = [
            [*known.named(k), tenths(used[k]), small(mean[k]), tenths(found[k]), small(f[k])]
            for k in map(int, order[:FEATURES])
        ]
        more = f"All {known.table.num_rows:,} features are in eval/features.parquet."
        if cells:
            yield Section(heading, note, Table(titles, cells, 4), None, more)


def examples(run: RunFiles, known: Known) -> dict | None:
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
                note = page.note(size, ((k, v, explanations.get(str(k), "")) for k, v in top))
                carded = [k for k, _ in top if str(k) in known.extra and known.link(k)]
                tokens.append(page.Token(text, page.shade(size, full), note, features=carded))
            cut = " (cut)" if len(tokens) >= EXAMPLE_TOKENS else ""
            texts.append((f"Pair {number}, {name}{cut}", tokens))
    return dict(texts=texts, pairs=len(found["pairs"]), full=full)


# --- other tables ---------------------------------------------------------------------------------


Sections = dict[str, tuple[str, str, Callable[[list[dict]], Table]]]
DOES: Sections = {  # tables of change_tables.py
    "behaviour": (
        "In its own answers",
        "Tokens in the answers of policy and base model to the same prompts.",
        page_tables.behaviour,
    ),
    "shift": (
        "In its distribution over the next token",
        "How far policy and base model are apart, by kinds of tokens, on given texts and on "
        "answers of both.",
        page_tables.shift,
    ),
    "carriers": (
        "By few features alone",
        "How much of the shift the first features of each ranking keep when all others are "
        "silenced.",
        page_tables.carriers,
    ),
}
EFFECTS: Sections = {
    "topk": (
        "Only the strongest features kept (Figure 2)",
        "At each position only the features with the largest |v| steer.",
        page_tables.topk,
    ),
    "attribution": (
        "What each category's features earned",
        "The change of the loss, divided among features by integrated gradients.",
        page_tables.attribution,
    ),
    "ablation": (
        "Categories taken away",
        "The loss added by zeroing a category's features, beside as many others.",
        page_tables.ablation,
    ),
    "static": (
        "Steering that does not read its context",
        "What one and the same vector at every position regains of the policy's gain.",
        page_tables.static,
    ),
    "beside_published": (
        "Beside the published figures",
        "The paper's and its authors' numbers (docs/published.json) and this run's, in one unit. "
        "Shares of Table 2 count the first position, as theirs do.",
        page_tables.plain,
    ),
}
USAGE = {  # tables of features.py whose pictures the page has -> heading, and how to read them
    "l0_by_position": (
        "Features turned up, along the sequence",
        "Mean over the positions at about the same distance from <bos>; where few positions are "
        "left, more of them share a mean. Below: how many positions a mean is over.",
    ),
    "value_difference": (
        "Steering against activation (Figure 3)",
        "How many features have which mean v − f: right of 0 the adapter adds more than the SAE "
        "finds.",
    ),
    "usage_rank": (
        "Usage against rank (Figure 5)",
        "Dotted: least-squares line of log usage on rank over all active features; R² by category "
        "in the legend.",
    ),
}
# Tables that have a section of their own, or none.
ELSEWHERE = ("choices", *COMPOSITION, "examples", "attribution_features", "attribution_cards")
ELSEWHERE += ("l0", "top_usage", "top_value", "carried_by")


def sections(run: RunFiles, known: Sections) -> Iterator[Section]:
    for name, (heading, note, make) in known.items():
        rows = run.tables.get(name, {}).get("rows")
        if rows and isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            left_out = len(rows) - page_tables.ROWS if make is page_tables.plain else 0
            more = f"{left_out:,} more rows in eval/{name}.json." if left_out > 0 else ""
            picture = image(run.folder / "eval" / f"{name}.png")
            yield Section(heading, note, make(rows), picture, more)


def effects(run: RunFiles) -> list[Section]:
    """What the loss depends on; and every table in eval/ that this page knows nothing of."""
    known = {*USAGE, *DOES, *EFFECTS, *ELSEWHERE}
    others = {
        name: (name.replace("_", " "), "", page_tables.plain)
        for name in run.tables
        if name not in known
    }
    return [*sections(run, EFFECTS), *sections(run, others)]


def figures(run: RunFiles) -> list[Section]:
    pictures = {name: image(run.folder / "eval" / f"{name}.png") for name in USAGE}
    return [Section(*USAGE[name], image=found) for name, found in pictures.items() if found]


def provenance(run: RunFiles) -> dict:
    settings, own = run.config.get("settings", {}), run.adapter
    abouts = [
        table["about"] for table in run.tables.values() if isinstance(table.get("about"), dict)
    ]
    sets = dict.fromkeys(
        f"{about['data']}, {about['pairs']:,} pairs"
        for about in abouts
        if {"data", "pairs"} <= set(about)
    )
    trained = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    shown = {
        "base model": own.get("base_model"),
        "model revision": own.get("base_model_revision"),
        "layer": own.get("layer"),
        "SAE": own.get("sae"),
        "SAE id": own.get("sae_id"),
        "SAE sha256": own.get("sae_sha256"),
        "adapter": own.get("activation"),
        "trained on": settings.get("data"),
        "data revision": run.data_revision,
        "settings": ", ".join(f"{name} {value}" for name, value in trained.items()) or None,
        "code": run.config.get("code"),
        "hardware": run.config.get("hardware"),
        "trained": run.config.get("started"),
        "evaluated on": "; ".join(sets) or None,
        "evaluated in": next(iter(abouts), {}).get("dtype"),
    }
    return {name: value for name, value in shown.items() if value is not None}


def image(path: Path) -> str | None:
    """A picture as a data URL; None where there is none."""
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
