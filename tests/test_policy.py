"""A run, an adapter folder or a base model opens as what it is."""

import pytest
from conftest import GOLDEN, SAE_ID

from fsrl import Unsteered
from policy import open_policy
from runtime.sources import UserError


def test_a_run_opens_as_what_was_trained(tiny_run):
    opened = open_policy(str(tiny_run))
    assert opened.model is opened.steered and opened.steered.layer == 2
    assert (opened.recorded.model, opened.recorded.data, opened.recorded.layer) == (
        "tiny",
        "tiny",
        2,
    )
    assert opened.device.name == "cpu"
    pairs, name = opened.eval_pairs(limit=5)
    assert (len(pairs), name) == (5, "tiny")
    bare = open_policy(str(tiny_run / "adapter"))
    assert bare.steered.sae.sha256 == opened.steered.sae.sha256
    assert bare.folder == tiny_run / "adapter"
    base = open_policy(None, model="tiny")
    assert isinstance(base.model, Unsteered) and base.base is base.model.model
    with pytest.raises(UserError, match="has no adapter"):
        _ = base.steered


def test_moved_sources_are_named_on_the_way_in():
    folder = GOLDEN / "adapter_mid"  # the authors' format: an SAE id, no model and no repository
    model, sae = str(GOLDEN / "model"), str(GOLDEN / "sae")
    opened = open_policy(str(folder), model=model, sae=sae, sae_id=SAE_ID)
    assert opened.steered.layer == 1
    with pytest.raises(UserError, match="--run nowhere/at/all"):
        open_policy("nowhere/at/all")
