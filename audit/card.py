"""The model card of an adapter folder: what it is, what it was trained on, how well, and how to load it.

write_card(OUT) writes OUT/adapter/README.md with the Hub's metadata, so that the folder can be uploaded as it is.
"""

import json
from pathlib import Path

from audit.report import Run, before_after, percent, read_run
from runtime.sources import write_whole

TAGS = (
    "fsrl",
    "sparse-autoencoder",
    "feature-steering",
    "simpo",
    "preference-optimization",
    "interpretability",
)
KINDS = {  # of adapter: what stands after the linear layer, what it does to features, what is penalised
    "relu": ("a ReLU", "turn up", "an L1"),
    "jumprelu": ("a JumpReLU", "turn up", "a sparsity"),
    "soft-threshold": ("a soft threshold", "turn up or down", "an L1"),
}
SETTINGS = (
    "l1",
    "beta",
    "gamma_ratio",
    "lr",
    "schedule",
    "warmup_ratio",
    "batch_size",
    "epochs",
    "max_steps",
    "seed",
)
OF_VARIANTS = (
    "l0",
    "threshold_init",
    "threshold_lr",
    "threshold_parametrisation",
    "bandwidth",
)  # not of relu


def write_card(out: str | Path) -> Path:
    """Write the card of a run's adapter (or of a bare adapter folder), whole; returns its path.

    Reads config.json, metrics.jsonl, adapter_config.json and eval/composition.json, as far as they are there. Local
    paths are named by their last part alone: a card is for other people.
    """
    out = Path(out)
    folder = out / "adapter" if (out / "adapter").is_dir() else out
    write_whole(folder / "README.md", card(read_run(out)))
    return folder / "README.md"


def card(run: Run) -> str:
    own, settings = run.adapter, run.config.get("settings", {})
    base, sae, trained_on = own.get("base_model"), own.get("sae"), settings.get("data")
    named = SETTINGS if own.get("activation") == "relu" else (*SETTINGS, *OF_VARIANTS)
    kind, turn, penalty = KINDS.get(own.get("activation"), KINDS["relu"])
    return "\n".join(
        [
            *front_matter(
                base if own.get("base_model_revision") else None,
                trained_on if run.data_revision else None,
            ),
            f"# FSRL adapter for {_name(base)}, layer {own.get('layer')}",
            "",
            f"One linear layer with {kind} that reads the residual stream of a frozen model and says, token by token,"
            f" which features of a frozen sparse autoencoder (SAE) to {turn}: Feature Steering with Reinforcement"
            " Learning, [arXiv 2509.12934](https://arxiv.org/abs/2509.12934). It was trained on preferences with SimPO"
            f" and {penalty} penalty; model and SAE are unchanged.",
            "",
            *_table(
                ("", ""),
                [
                    ("base model", _revised(base, own.get("base_model_revision"))),
                    ("steers the residual stream after block", own.get("layer")),
                    ("SAE", _revised(sae, own.get("sae_revision"))),
                    ("SAE id", own.get("sae_id")),
                    ("SAE sha256", own.get("sae_sha256")),
                    (
                        "adapter",
                        f"{own.get('activation')}, weight [{own.get('d_sae')}, {own.get('d_model')}], float32",
                    ),
                    ("trained on", _revised(trained_on, run.data_revision)),
                    *((name.replace("_", " "), settings.get(name)) for name in named),
                    ("code", run.config.get("code")),
                ],
            ),
            *_losses(run),
            *_composition(run),
            "## Use",
            "",
            "With the FSRL reference implementation; the folder's path or this repository's id opens model, SAE and"
            " adapter, and refuses another SAE.",
            "",
            "```python",
            "from policy import open_policy",
            "",
            'policy = open_policy("OWNER/NAME")',
            "logits = policy.model.logits(tokens)  # int64 [T] -> float32 [T, V]",
            "```",
            "",
            "`python eval_features.py --run OWNER/NAME --out DIR` reads what it does to features.",
            "",
        ]
    )


def front_matter(base: str | None, dataset: str | None) -> list[str]:
    """The Hub's metadata; json strings are yaml strings. base and dataset are Hub ids, or None for what is not on it.

    No licence is stated: nobody said which.
    """
    lines = ["---", "library_name: fsrl"]
    if base:
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    if dataset:
        lines += ["datasets:", f"- {json.dumps(dataset)}"]
    return [*lines, "tags:", *(f"- {tag}" for tag in TAGS), "---", ""]


def _losses(run: Run) -> list[str]:
    measured = before_after(run)
    if measured is None:
        return []
    where, first, last = measured
    names = {
        "loss": "SimPO loss",
        "accuracy": "accuracy",
        "l0": "L0 per position",
        "l1": "L1 per position",
    }
    rows = [
        (name, f"{first[key]:.3f}", f"{last[key]:.3f}")
        for key, name in names.items()
        if key in first
    ]
    return [
        f"## Before and after ({where})",
        "",
        *_table(("", "before", f"after step {last['step']}"), rows),
    ]


def _composition(run: Run) -> list[str]:
    if "composition" not in run.tables:
        return []
    about, found = run.tables["composition"]["about"], run.tables["composition"]["rows"]
    rows = []
    for row in found:
        interval = f"{percent(row['low'], sign=True)} to {percent(row['high'], sign=True)}"
        share = percent(row["sae"]), percent(row["adapter"]), percent(row["change"], sign=True)
        rows.append((f"{row['labels']}: {row['category']}", row["context"], *share, interval))
    titles = ("category", "context", "SAE", "adapter", "relative change", "95 % over pairs")
    return [
        "## What it uses",
        "",
        f"Share of each category among active features, on {about['pairs']:,} pairs of {_name(about['data'])}.",
        "",
        *_table(titles, rows),
        *(f"- {_plain(table['text'])}" for table in about["labels"]),
        "",
    ]


def _revised(name: str | None, revision: str | None) -> str | None:
    return f"[{name}](/{name}) at {revision}" if revision and name else name and _name(name)


def _name(name: str | None) -> str:
    """The last part of a local path, a Hub id as it is; nothing in it can act as markup."""
    name = str(name)
    name = (
        name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else Path(name).name
    )
    return _plain(name)


def _table(titles: tuple, rows: list[tuple]) -> list[str]:
    """Markdown; rows whose value is None are left out."""
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        if None not in row:
            cells = [str(cell) if str(cell).startswith("[") else _plain(cell) for cell in row]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _plain(text: object) -> str:
    for sign in "\\`*[]|<>":
        text = str(text).replace(sign, f"&#{ord(sign)};")
    return " ".join(str(text).split())
