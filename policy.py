"""A trained run, opened: what every script that takes --run reads."""

import dataclasses
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

import data
import sae as saes
import train
from data import Pair
from fsrl import ADAPTER_FILES, Adapter, SteeredModel
from model import Gemma2
from runtime.sources import UserError, fetch


class Policy(NamedTuple):
    base: Gemma2  # the frozen model; of a full fine-tuning run, the trained one
    steered: SteeredModel | None  # None for a base model alone and for a full fine-tuning run
    tokenizer: Tokenizer
    settings: (
        train.Settings
    )  # those of the run, with the device and dtype in use; defaults for a bare adapter folder
    name: str  # what was opened, for titles
    folder: Path | None  # the run's, where its evaluations go; None for a base model alone

    @property
    def model(self) -> Gemma2 | SteeredModel:
        return self.steered or self.base


def open_policy(
    run: str | None,
    model: str | None = None,
    sae: str | None = None,
    sae_id: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    model_revision: str | None = None,
) -> Policy:
    """Open what train.py left (OUT, with adapter/ or model/), an adapter folder (ours or the authors'), or its Hub id.

    None as run is the base model alone, at model_revision. model, sae and sae_id stand in for the names the run
    recorded, for when those have moved. Raises UserError where something is missing or does not fit together.
    """
    if run is None:
        named = train.PRESETS.get(model, {}) | (dict(model=model) if model else {})
        s = train.resolve_device(
            train.Settings(**named, model_revision=model_revision, device=device, dtype=dtype)
        )
        base = Gemma2.from_pretrained(s.model, getattr(torch, s.dtype), s.device, s.model_revision)
        return Policy(base, None, data.load_tokenizer(base.folder), s, s.model, None)

    names = [name for files in ADAPTER_FILES for name in files]
    folder = fetch(
        run, "run", ["config.json", *names, *(f"adapter/{n}" for n in names), "model/*"]
    ).path
    recorded = _recorded_settings(folder / "config.json")
    here = dict(device=device, dtype=dtype)
    if (folder / "model" / "config.json").is_file():
        s = train.resolve_device(dataclasses.replace(recorded, **here))
        base = Gemma2.from_pretrained(str(folder / "model"), getattr(torch, s.dtype), s.device)
        return Policy(base, None, data.load_tokenizer(base.folder), s, str(run), folder)

    if (folder / "metrics.jsonl").is_file() and not (
        folder / "adapter" / ADAPTER_FILES[0][0]
    ).is_file():
        raise UserError(f"--run {run}: has not finished; train.py goes on with it by --resume.")
    adapter = Adapter.from_pretrained(folder)
    own = adapter.identity
    named = re.match(
        r"layer_(\d+)/", own.get("sae_id") or ""
    )  # the authors' files state the layer only so
    layer = (
        own.get("layer")
        if own.get("layer") is not None
        else int(named[1])
        if named
        else recorded.layer
    )
    where = dict(
        model=own.get("base_model"), model_revision=own.get("base_model_revision"), layer=layer
    )
    where |= dict(
        sae=own.get("sae"), sae_id=own.get("sae_id"), sae_revision=own.get("sae_revision")
    )
    where = {name: value for name, value in where.items() if value is not None}
    where |= dict(model=model, model_revision=None) if model else {}
    where |= dict(sae=sae, sae_id=sae_id, sae_revision=None) if sae else {}
    s = train.resolve_device(dataclasses.replace(recorded, **where, **here))
    kind, place = getattr(torch, s.dtype), s.device
    base = Gemma2.from_pretrained(s.model, kind, place, s.model_revision)
    sae_id = s.sae_id or saes.default_id(s.sae, s.layer, s.sae_revision)
    decoder = saes.JumpReLUSAE.from_pretrained(s.sae, sae_id, kind, place, s.sae_revision)
    steered = SteeredModel(base, decoder, adapter.to(place), s.layer).requires_grad_(False)
    return Policy(base, steered, data.load_tokenizer(base.folder), s, str(run), folder)


def eval_pairs(
    policy: Policy,
    source: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
    split: str = "test",
) -> tuple[list[Pair], str]:
    """The pairs to evaluate on, and the name of where they come from: `source`, or the run's own evaluation data.

    A source given for the purpose need not call its rows a test split: without one, all of it is used. Raises
    UserError where there is nothing to evaluate on.
    """
    s = policy.settings
    name = source or s.eval_data or s.data
    if name == s.data and revision is None:
        revision = s.data_revision
    _, commit = data.data_files(name, None, revision)

    def read(part):
        limits = s.max_length, s.max_prompt_length
        return data.load_pairs(name, policy.tokenizer, *limits, part, commit, True, s.on_bad_row)

    pairs = read(split) or (read(None) if source or s.eval_data else [])
    if not pairs:
        raise UserError(f"--data {name}: it has no {split} split; name the data to evaluate on.")
    return pairs[:limit], name


def _recorded_settings(path: Path) -> train.Settings:
    """The settings in a run's config.json; the defaults where there is none (a bare adapter folder)."""
    if not path.is_file():
        return train.Settings()
    try:
        recorded = json.loads(path.read_text())
        if "settings" not in recorded:  # an adapter's or a model's own config.json
            return train.Settings()
        known = {field.name for field in dataclasses.fields(train.Settings)}
        return train.Settings(
            **{name: value for name, value in recorded["settings"].items() if name in known}
        )
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not the config.json of a run ({e!r}).") from e
