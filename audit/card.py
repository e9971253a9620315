"""An adapter's model card: what it learned and how sure that is, what it is, and how to load it.

write_card(OUT) writes OUT/adapter/README.md with the Hub's metadata, so that the folder can be
uploaded as it is. templates/card.md is the text.
"""

from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from audit.report import RunFiles, between, read_run, shown_rows, tenths
from audit.verdict import verdict
from generation import page
from runtime.outcome import before_after, measured, outcome
from runtime.output import write_whole

TEMPLATE = Path(__file__).resolve().parent / "templates" / "card.md"
TAGS = ("fsrl", "sparse-autoencoder", "feature-steering", "simpo", "preference-optimization")
TAGS += ("interpretability",)
# Gemma's terms cover what is derived from it; what else a base model's would, its author must say.
LICENCES = {"google/gemma": "gemma"}
SETTINGS = ("l1", "beta", "gamma_ratio", "lr", "schedule", "warmup_ratio", "batch_size", "epochs")
SETTINGS += ("max_steps", "seed")
OF_VARIANTS = ("l0", "threshold_lr")  # not of a relu adapter
OF_VARIANTS += ("threshold_init", "threshold_parametrisation", "bandwidth")  # of earlier versions


class Kind(NamedTuple):
    """What a kind of adapter is, in the card's words."""

    function: str  # after the linear layer
    turns: str  # features
    penalty: str


KINDS = {
    "relu": Kind("a ReLU", "up", "an L1"),
    "jumprelu": Kind("a JumpReLU", "up", "a sparsity"),
    "soft-threshold": Kind("a soft threshold", "up or down", "an L1"),
}


def write_card(out: str | Path, about: dict | None = None) -> Path:
    """Write the card of a run's adapter, or of a bare adapter folder, whole; returns its path.

    Reads what report.html reads, as far as it is there. Local paths are named by their last part
    alone, because a card is for other people. about: as for read_run.
    """
    out = Path(out)
    folder = out / "adapter" if (out / "adapter").is_dir() else out
    write_whole(folder / "README.md", card(read_run(out, about)))
    return folder / "README.md"


def card(run: RunFiles) -> str:
    own, settings = run.adapter, run.config.get("settings", {})
    base, sae, trained_on = own.get("base_model"), own.get("sae"), settings.get("data")
    activation = own.get("activation")
    named = SETTINGS if activation == "relu" else (*SETTINGS, *OF_VARIANTS)
    shape = f"weight [{own.get('d_sae')}, {own.get('d_model')}]"
    about = [
        ("base model", revised(base, own.get("base_model_revision"))),
        ("steers the residual stream after block", own.get("layer")),
        ("SAE", revised(sae, own.get("sae_revision"))),
        ("SAE id", own.get("sae_id")),
        ("SAE sha256", own.get("sae_sha256")),
        ("adapter", f"{activation}, {shape}, float32"),
        ("trained on", revised(trained_on, run.data_revision)),
        *((name.replace("_", " "), settings.get(name)) for name in named),
        ("code", run.config.get("code")),
    ]
    return page.render(
        TEMPLATE,
        # Only what is on the Hub goes into its metadata.
        base_on_hub=base if own.get("base_model_revision") else None,
        data_on_hub=trained_on if run.data_revision else None,
        licence=LICENCES.get(str(base).split("-")[0]) if own.get("base_model_revision") else None,
        tags=TAGS,
        base=public_name(base),
        layer=own.get("layer"),
        kind=KINDS.get(activation, KINDS["relu"]),
        about=[(name, value) for name, value in about if value is not None],
        verdict=verdict(run.tables),
        training=training(run),
        composition=composition(run),
        percent=tenths,
        between=between,
        public_name=public_name,
        plain=plain,
    )


def composition(run: RunFiles) -> dict | None:
    """The paper's measure where it was made, else the pooled one."""
    for name in ("composition_paper", "composition"):
        table = run.tables.get(name)
        if table:
            how = "averaged over positions" if name == "composition_paper" else "pooled"
            return dict(about=table["about"], rows=shown_rows(table), how=how)
    return None


def training(run: RunFiles) -> dict | None:
    found = measured(run.metrics)
    if not found:
        return None
    last, said = found[-1], outcome(run.metrics, run.samples)
    return dict(where=last["split"], step=last["step"], rows=before_after(found), said=said)


def revised(name: str | None, revision: str | None) -> str | Markup | None:
    """A Hub id as a link with its commit; a local name alone."""
    if not name:
        return None
    return (
        Markup(f"[{plain(name)}](/{plain(name)}) at {plain(revision)}")
        if revision
        else public_name(name)
    )


def public_name(name: str | None) -> str:
    """The last part of a local path; a Hub id as it is."""
    name = str(name)
    on_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return name if on_hub else Path(name).name


def plain(text: object) -> Markup:
    """Text on one line, in which nothing acts as markdown or html."""
    if isinstance(text, Markup):
        return text
    line = " ".join(str(text).split())
    return Markup("".join(f"&#{ord(c)};" if c in "&\\`*[]|<>" else c for c in line))
