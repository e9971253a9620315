"""report.html: what a run learned, on one page that needs no network and no JavaScript.

    python report.py --run OUT

Made of what train.py, eval_features.py and eval_ablation.py left in OUT; what is missing is left out. Everything that
comes from data (explanations, tokens, names) is escaped, and the page's own policy forbids scripts and requests.
"""

import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from runtime import cli
from runtime.cli import flag
from runtime.neuronpedia import page_of
from runtime.sources import UserError, write_whole

FEATURES = 15  # promoted, and suppressed, that are shown; features.parquet has them all
ROWS = 40  # of a table that the page shows; its csv has them all
OURS = {  # tables of eval_features.py -> heading and how to read the picture
    "value_difference": (
        "Steering against activation (Figure 3)",
        "How many features have which mean v − f: right of 0 the adapter adds more than the SAE finds.",
    ),
    "top_usage": (
        "Most used features (Table 3)",
        "Share of positions at which a feature is active.",
    ),
    "top_value": (
        "Features of largest mean value (Table 4)",
        "Mean over all positions, active or not.",
    ),
    "usage_rank": (
        "Usage against rank (Figure 5)",
        "Dotted: least-squares line of log usage on rank over all active features; R² by category in the legend.",
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
FURTHER = {  # tables of eval_ablation.py
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
}


@dataclass(frozen=True)
class Settings:
    run: str | None = flag(None, "a folder that train.py and eval_features.py wrote")

    def __post_init__(self):
        if self.run is None or not Path(self.run).is_dir():
            raise UserError(
                f"--run {self.run}: a folder that train.py and eval_features.py wrote was expected."
            )


class Run(NamedTuple):
    """What lies in OUT."""

    folder: Path
    config: dict  # {} where there is none, as in a bare adapter folder
    adapter: dict  # adapter_config.json
    metrics: list[dict]
    tables: dict[str, dict]  # of eval/NAME.json: about, rows

    @property
    def data_revision(self) -> str | None:
        return self.config.get("data_revision")


def read_run(out: str | Path) -> Run:
    """Raises UserError naming a file that cannot be read."""
    out = Path(out)

    def read(path: Path) -> dict:
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"{path}: not readable json ({e}).") from e
        if not isinstance(found, dict):
            raise UserError(f"{path}: an object was expected.")
        return found

    folder = out / "adapter" if (out / "adapter").is_dir() else out
    try:
        text = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").is_file() else ""
        complete = text[
            : text.rfind("\n") + 1
        ]  # what a run is still writing, or was killed while writing, has no end
        metrics = [json.loads(line) for line in complete.splitlines()]
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{out / 'metrics.jsonl'}: not readable jsonl ({e}).") from e
    tables = {path.stem: read(path) for path in sorted((out / "eval").glob("*.json"))}
    if not (tables or metrics or (folder / "adapter_config.json").is_file()):
        raise UserError(f"--run {out}: neither a run of train.py nor an evaluation of one.")
    return Run(
        out, read(out / "config.json"), read(folder / "adapter_config.json"), metrics, tables
    )


def before_after(run: Run) -> tuple[str, dict, dict] | None:
    """("eval" or "train", first row, last row) of metrics.jsonl; None without any."""
    for split in ("eval", "train"):
        rows = [row for row in run.metrics if row.get("split") == split]
        if rows:
            return split, rows[0], rows[-1]
    return None


def percent(share: float | None, sign: bool = False) -> str:
    return "–" if share is None else f"{100 * share:{'+' if sign else ''}.2f} %"


# --- the page -----------------------------------------------------------------------------------------------


def write_report(out: str | Path) -> Path:
    """Write OUT/report.html whole; returns its path. Raises UserError where a file is not what its name says."""
    run = read_run(out)
    sections = (
        _head,
        _training,
        _choices,
        _composition,
        _features,
        _examples,
        _figures,
        _further,
        _provenance,
    )
    try:
        parts = [section(run) for section in sections]
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"--run {out}: a file in it was not written by this project's scripts ({e!r})."
        ) from e
    title = _text(f"What {_short(run.adapter.get('base_model') or run.folder.name)} learned")
    path = run.folder / "report.html"
    write_whole(
        path,
        PAGE.replace("{title}", title)
        .replace("{style}", STYLE)
        .replace("{body}", "\n".join(parts)),
    )
    return path


def _head(run: Run) -> str:
    own, settings = run.adapter, run.config.get("settings", {})
    facts = {
        "model": own.get("base_model"),
        "steered after block": own.get("layer"),
        "SAE": " ".join(filter(None, (own.get("sae"), own.get("sae_id")))),
        "features": f"{own['d_sae']:,}" if "d_sae" in own else None,
        "trained on": settings.get("data"),
        "settings": ", ".join(
            f"{name.replace('_', ' ')} {settings[name]}"
            for name in (
                "l1",
                "beta",
                "gamma_ratio",
                "lr",
                "batch_size",
                "epochs",
                "max_steps",
                "seed",
            )
            if settings.get(name) is not None
        ),
    }
    return (
        f"<h1>What {_text(_short(own.get('base_model') or run.folder.name))} learned from preferences</h1>"
        "<p>A frozen language model was trained on preferences through one small layer that, at each token, turns "
        "features of a frozen sparse autoencoder up. This page says which, how often, and where.</p>"
        + _facts(facts)
    )


def _facts(facts: dict) -> str:
    """Name and value of what is known."""
    rows = (
        f"<dt>{name}</dt><dd>{_text(value)}</dd>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return f"<dl>{''.join(rows)}</dl>"


def _training(run: Run) -> str:
    measured = before_after(run)
    if measured is None:
        return ""
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
    note = "A fresh adapter steers about half of the features, by next to nothing."
    table = _table([f"{where} means", "before", f"after step {last.get('step')}"], rows, numbers=2)
    return f"<h2>Before and after</h2>{table}<p class=note>{note}</p>{_image(run.folder / 'loss.png', 'losses')}"


def _choices(run: Run) -> str:
    """The audit's headline, where eval_ablation.py was run: what the widened gap between the responses is made of."""
    table = run.tables.get("choices")
    if not table:
        return ""
    said, cells = [], []
    for name in dict.fromkeys(row["labels"] for row in table["rows"]):
        here = [row for row in table["rows"] if row["labels"] == name]
        named = next((row["tokens"] for row in here if row["named"]), "no category")
        rest = here[-1]["part_of_change"]
        said.append(
            f"by <i>{_text(name)}</i> it names <b>{_text(named)}</b> (the rest: {percent(rest)})"
        )
    for row in table["rows"]:
        where = (row["labels"], row["tokens"], percent(row["part_of_change"], sign=True))
        cells.append(
            [
                *where,
                f"{row['share']:.4f}",
                f"{row['low']:.4f} to {row['high']:.4f}",
                f"{row['p_value']:.2g}",
            ]
        )
    titles = [
        "labels",
        "tokens",
        "part of the gap's change",
        "nats per token",
        "95 % over pairs",
        "p",
    ]
    image = _image(
        run.folder / "eval" / "choices.png", "shares of the widened gap by kinds of tokens"
    )
    return (
        f"<h2>What it chooses otherwise</h2><p>In one line: {'; '.join(said)}.</p>"
        "<p>Training widens the gap between the mean log-probabilities of chosen and rejected responses. Every token "
        "has its part in that change, and the parts are shared out among kinds of tokens, as the features' labels tell "
        "them apart. p: a sign-flip test over pairs, corrected for the number of kinds. Where the rest, tokens of no "
        "category, has the largest share, a name says only which category comes first.</p>"
        f"{image}{_table(titles, cells, numbers=4)}{_labels(table.get('about') or {})}"
    )


def _composition(run: Run) -> str:
    """Table 2 as a picture: a row a category and context, the interval drawn in the row."""
    if not run.tables.get("composition", {}).get("rows"):
        return ""
    about, rows = run.tables["composition"]["about"], run.tables["composition"]["rows"]
    ends = [
        row.get(key) for row in rows for key in ("change", "low", "high", "noisy_low", "noisy_high")
    ]
    ends = [x for x in ends if x is not None]
    edges = min([0.0, *ends]), max([0.01, *ends])
    noise = any(row.get("noisy_low") is not None for row in rows)
    lines, group = [], None
    for row in rows:
        if (row["labels"], row["category"]) != group:
            group = row["labels"], row["category"]
            kind = f"<small>{_text(row['labels'])}, {row['features']:,} features</small>"
            mcc = (
                f"<small>agreement with a person: MCC {row['mcc']:.2f}</small>"
                if row.get("mcc") is not None
                else ""
            )
            lines.append(
                f"<tr class=group><th colspan=5>{_text(row['category'])} {kind} {mcc}</th></tr>"
            )
        sure = row["low"] is not None and not row["low"] <= 0 <= row["high"]
        change, interval = percent(row["change"], sign=True), _between(row, "low", "high")
        if row.get("noisy_low") is not None:
            interval += f"<br>label noise too: {_between(row, 'noisy_low', 'noisy_high')}"
        lines.append(
            f"<tr><td>{_text(row['context'])}</td><td class=n data-h=SAE>{percent(row['sae'])}</td>"
            f"<td class=n data-h=adapter>{percent(row['adapter'])}</td><td class=pic>{_interval(row, *edges)}</td>"
            f"<td class=n>{'<b>' + change + '</b>' if sure else change}<br><small>{interval}</small></td></tr>"
        )
    thin = " and, thin, with the uncertainty of the labels too" if noise else ""
    return (
        "<h2>What it uses (Table 2)</h2>"
        "<p>Of all active features at all positions, the share in each category: as the SAE finds them in the text, "
        "and as the adapter turns them up. The bar is the relative change with its 95 % interval over "
        f"pairs{thin}; the line is no change, the field reaches from {100 * edges[0]:+.0f} to {100 * edges[1]:+.0f} %. "
        "Bold: the interval excludes 0.</p>"
        "<table class=forest><thead><tr><th>context</th><th class=n>SAE</th><th class=n>adapter</th>"
        "<th class=pic>relative change</th><th class=n></th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>{_labels(about)}"
        "<p class=note>A share of use is not a share of effect: a policy may use a category more for no gain, or earn "
        "its gain with few features of another. Choices, ablation and attribution, where run, measure effect.</p>"
    )


def _between(row: dict, low: str, high: str) -> str:
    return f"{percent(row[low], sign=True)} to {percent(row[high], sign=True)}"


def _interval(row: dict, left: float, right: float) -> str:
    """One row of the forest plot as inline SVG, from left to right; 0 lies between."""
    if row["change"] is None:
        return ""

    def x(value: float) -> str:
        return f"{5 + 190 * (value - left) / (right - left):.1f}"

    lines = f'<line x1="{x(0)}" x2="{x(0)}" y1="0" y2="16" class="zero"/>'
    for low, high, kind in (("noisy_low", "noisy_high", "noisy"), ("low", "high", "pairs")):
        if row.get(low) is not None:
            lines += f'<line x1="{x(row[low])}" x2="{x(row[high])}" y1="8" y2="8" class="{kind}"/>'
    lines += f'<circle cx="{x(row["change"])}" cy="8" r="3.5" class="{"more" if row["change"] > 0 else "less"}"/>'
    label = f"{percent(row['change'], sign=True)}, {_between(row, 'low', 'high')}"
    return f'<svg viewBox="0 0 200 16" role="img" aria-label="{label}">{lines}</svg>'


def _labels(about: dict) -> str:
    """Which labels a table was made with; loud where they were only assumed to fit."""
    found = about.get("labels")
    if not isinstance(found, list) or not all(
        isinstance(table, dict) and "text" in table for table in found
    ):
        return ""
    tags = ("li" if table.get("matched") else "li class=loud" for table in found)
    items = (f"<{tag}>{_text(table['text'])}</li>" for tag, table in zip(tags, found, strict=True))
    return f"<p class=note>Labels:</p><ul class=note>{''.join(items)}</ul>" if found else ""


def _features(run: Run) -> str:
    """The features that v - f puts first and last, in the context prompt+chosen."""
    path = run.folder / "eval" / "features.parquet"
    if not path.is_file():
        return ""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path}: not a readable parquet file ({e}).") from e
    explained = [name for name in table.column_names if name.startswith("explanation_")]
    tagged = [field.name for field in table.schema if pa.types.is_boolean(field.type)]
    numbers = ("adapter_usage", "adapter_mean", "sae_usage", "sae_mean", "difference")
    titles = ["feature", "what it is", "v used", "mean v", "f used", "mean f", "v − f"]
    sections = []
    for name, heading in (("promoted", "Promoted most"), ("suppressed", "Promoted least")):
        rank = table[f"{name}_rank_prompt_chosen"].to_numpy()
        rows = []
        for row in table.take(rank.argsort()[:FEATURES]).to_pylist():
            said = (
                "<br>".join(_text(row[column]) for column in explained if row[column])
                or "<i>no explanation</i>"
            )
            tags = " ".join(
                f"<span class=tag>{_text(tag.replace(':', ': ', 1))}</span>"
                for tag in tagged
                if row[tag]
            )
            v_used, v, f_used, f, difference = (
                row[f"{number}_prompt_chosen"] for number in numbers
            )
            shown = [percent(v_used), f"{v:.4f}", percent(f_used), f"{f:.4f}", f"{difference:+.4f}"]
            rows.append([_link(run, row["feature"]), f"{said} {tags}", *shown])
        shown = _table(titles, rows, numbers=5, escaped=True)
        sections.append(f"<h3>{heading}</h3><div class=features>{shown}</div>")
    return (
        "<h2>Features promoted and suppressed</h2>"
        "<p>By mean v − f over the positions of prompt+chosen: what the adapter adds to a feature, against what the "
        "SAE finds of it there. An adapter with a ReLU turns nothing down; the second table has the features that are "
        f"active in the text and to which it adds the least. All {table.num_rows:,} are in eval/features.parquet.</p>"
        + "".join(sections)
    )


def _link(run: Run, feature: int) -> str:
    """The feature's page on Neuronpedia, where the SAE has one: each SAE of a layer has pages of its own."""
    place = page_of(run.adapter.get("sae") or "", run.adapter.get("sae_id"))
    if place is None:
        return str(feature)
    url = html.escape(f"https://www.neuronpedia.org/{place[0]}/{place[1]}/{feature}")
    return f'<a href="{url}" rel="noreferrer">{feature}</a>'


def _examples(run: Run) -> str:
    """Pairs with each token shaded by ‖v‖₁ and, on hover or tap, its top features at the foot of the window (CSS)."""
    found = run.tables.get("examples")
    if not found or not found.get("pairs"):
        return ""
    said = found["explanations"]
    sizes = sorted(x for pair in found["pairs"] for part in pair.values() for x in part["l1"])
    full = sizes[int(0.98 * (len(sizes) - 1))] or 1.0  # the darkest shade; a few outliers share it
    sections = []
    for number, pair in enumerate(found["pairs"], start=1):
        for name, part in pair.items():
            tokens = []
            for token, l1, top in zip(part["tokens"], part["l1"], part["top"], strict=True):
                shade = min(9, round(9 * l1 / full))
                lines = [
                    f"steered by {l1:.3g}",
                    *(f"{v:+.3g}  {k}  {said.get(str(k), '')}"[:160] for k, v in top),
                ]
                tip = html.escape("\n".join(lines), quote=True).replace("\n", "&#10;")
                shown = _text(token.replace("\n", "↵\n")) or "·"
                tokens.append(f'<i class=s{shade} tabindex=-1 data-t="{tip}">{shown}</i>')
            cut = " (cut)" if len(tokens) >= 400 else ""
            sections.append(
                f"<h3>Pair {number}, {name}{cut}</h3><p class=tokens>{''.join(tokens)}</p>"
            )
    scale = "".join(f"<i class=s{i}>&nbsp;&nbsp;</i>" for i in range(10))
    return (
        "<h2>Where it steers</h2>"
        f"<p>The first {len(found['pairs'])} pairs of the evaluation data. The darker a token, the stronger the "
        f"steering there: ‖v‖₁ from 0 <span class=tokens>{scale}</span> to {full:.3g} and above. Hover or tap for the "
        f"features turned up most.</p><div class=examples>{''.join(sections)}</div>"
    )


def _figures(run: Run) -> str:
    shown = []
    for name, (heading, note) in OURS.items():
        image = _image(run.folder / "eval" / f"{name}.png", heading)
        if image:
            shown.append(_figure(heading, note, image))
    return f"<h2>Figures</h2>{''.join(shown)}" if shown else ""


def _figure(heading: str, note: str, image: str) -> str:
    return (
        f"<div class=figure><h3>{_text(heading)}</h3><p class=note>{_text(note)}</p>{image}</div>"
    )


def _further(run: Run) -> str:
    """What other evaluations left in eval/: their pictures, and their tables where those are short."""
    others = [
        name
        for name in run.tables
        if name not in {*OURS, *FURTHER, "choices", "composition", "examples"}
    ]
    shown = []
    for name in [*FURTHER, *others]:
        table = run.tables.get(name, {})
        rows = table.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            continue
        said = ("kind", "matched")  # of the labels, once below
        columns = [
            column
            for column in dict.fromkeys(key for row in rows for key in row)
            if column not in said
        ]
        cells = [[_cell(row.get(column)) for column in columns] for row in rows[:ROWS]]
        left = len(rows) - ROWS
        more = (
            f"<p class=note>{left:,} more rows in eval/{_text(name)}.json.</p>" if left > 0 else ""
        )
        heading, note = FURTHER.get(name, (name.replace("_", " "), ""))
        image = _image(run.folder / "eval" / f"{name}.png", heading)
        body = _table([column.replace("_", " ") for column in columns], cells)
        about = _labels(table.get("about") or {})
        shown.append(f"{_figure(heading, note, image)}{body}{more}{about}")
    return f"<h2>What its loss depends on</h2>{''.join(shown)}" if shown else ""


def _cell(value: object) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _provenance(run: Run) -> str:
    abouts = [
        table["about"] for table in run.tables.values() if isinstance(table.get("about"), dict)
    ]
    said = dict.fromkeys(
        f"{a['data']}, {a['pairs']:,} pairs" for a in abouts if {"data", "pairs"} <= set(a)
    )
    about = next(iter(abouts), {})
    facts = {
        "code": run.config.get("code"),
        "hardware": run.config.get("hardware"),
        "trained": run.config.get("started"),
        "model revision": run.adapter.get("base_model_revision"),
        "SAE sha256": run.adapter.get("sae_sha256"),
        "data revision": run.data_revision,
        "evaluated on": "; ".join(said) or None,
        "evaluated in": about.get("dtype"),
    }
    return f"<h2>Where this comes from</h2>{_facts(facts)}"


def _table(titles: list[str], rows: list[list], numbers: int = 0, escaped: bool = False) -> str:
    """The last `numbers` columns are set to the right. escaped: the cells are html already."""
    first = len(titles) - numbers

    def line(cells: list, tag: str) -> str:
        kinds = (" class=n" if i >= first else "" for i in range(len(cells)))
        return (
            "<tr>"
            + "".join(f"<{tag}{k}>{c}</{tag}>" for c, k in zip(cells, kinds, strict=True))
            + "</tr>"
        )

    body = "".join(line([cell if escaped else _text(cell) for cell in row], "td") for row in rows)
    head = line([_text(title) for title in titles], "th")
    return f"<div class=wide><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"


def _image(path: Path, description: str) -> str:
    if not path.is_file():
        return ""
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(description)}" src="data:image/png;base64,{encoded}">'


def _text(value: object) -> str:
    """Anything, as text of the page: nothing in it can act as markup."""
    return html.escape(str(value), quote=True)


def _short(name: str) -> str:
    return Path(name).name or name


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

# Ten shades of one hue; the text on all of them keeps a contrast of 4.5 or more.
SHADES = "".join(f".s{i}{{background:rgba(214,69,80,{i * 0.075:.3f})}}" for i in range(10))
STYLE = (
    """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;background:#fff;max-width:60rem;margin:0 auto;
padding:1rem 1rem 8rem}
h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.25rem;margin-top:2.5rem;border-top:1px solid #ccc;padding-top:1rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem}dt{color:#666}dd{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:.88rem;width:100%}
th,td{text-align:left;vertical-align:top;padding:.25rem .5rem;border-bottom:1px solid #e5e5e5}
th{font-weight:600}.n{text-align:right;font-variant-numeric:tabular-nums}td.n{white-space:nowrap}
.wide{overflow-x:auto}.features td:nth-child(2){min-width:14rem}img{max-width:min(100%,46rem);height:auto;display:block}
small,.note{color:#5a5a5a;font-size:.85rem;font-weight:400}
.loud{color:#b3303f;font-weight:600}
.group th{padding-top:.8rem;font-size:1rem}
.pic{width:40%;text-align:center}svg{display:block;width:100%;height:auto;min-width:8rem;background:#fafafa}
.zero{stroke:#888;stroke-width:.7}.pairs{stroke:#3d6b8e;stroke-width:4;opacity:.55}.noisy{stroke:#3d6b8e;stroke-width:1}
.more{fill:#b3303f}.less{fill:#24557a}
.tag{background:#eef2f5;border-radius:.5rem;padding:0 .4rem;font-size:.78rem;white-space:nowrap}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7}
.tokens i{font-style:normal;unicode-bidi:isolate;border-radius:2px}
.examples i{cursor:help;outline:none}.examples i:hover,.examples i:focus{box-shadow:0 0 0 2px #1c1c1c}
.examples i:hover::after,.examples i:focus::after{content:attr(data-t);position:fixed;left:0;right:0;bottom:0;z-index:9;
background:#1c1c1c;color:#fff;font:.85rem/1.4 ui-monospace,monospace;padding:.6rem 1rem;white-space:pre-wrap}
.examples:has(i:hover) i:focus:not(:hover)::after{content:none}
@media(max-width:40rem){dl{grid-template-columns:1fr}dd{margin-bottom:.4rem}
.forest thead{display:none}.forest [data-h]::before{content:attr(data-h) " ";color:#5a5a5a}
.forest tr{display:flex;flex-wrap:wrap;border-bottom:1px solid #e5e5e5}
.forest td,.forest th{border:0;flex:1 0 auto;padding:.2rem;font-size:.8rem}
.forest td.pic{flex:1 0 100%;order:9}.forest td:last-child{flex:1 0 100%}}
@media print{body{max-width:none;padding:0;font-size:10pt}h2,h3{break-after:avoid}tr,.figure{break-inside:avoid}
.wide{overflow:visible}.wide table{font-size:7pt;overflow-wrap:anywhere}.wide td,.wide th{padding:.1rem .2rem}
.wide .n,.tag{white-space:normal}.tag{font-size:6pt}.features td:nth-child(2){min-width:0}
.features td.n{white-space:nowrap}a{color:inherit}i{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.examples i::after{content:none!important}}
"""
    + SHADES
)


def main() -> None:
    s = cli.parse(Settings, doc=__doc__)
    print(f"Written: {write_report(s.run)}")


if __name__ == "__main__":
    cli.run(main)
