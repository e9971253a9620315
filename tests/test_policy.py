"""A run, an adapter folder or a base model opens as what it is."""

import shutil

import pytest
from conftest import GOLDEN, SAE_ID

import policy
import train
from fsrl import Unsteered
from policy import DEFAULTS, open_policy
from runtime.rows import DataFile
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


SMALL = dict(model=str(GOLDEN / "model"), data=str(GOLDEN / "dataset"), batch_size=4, max_steps=1)


def test_a_full_run_needs_no_sae_to_be_opened(tmp_path):
    out = train.train(train.Settings(**SMALL, full=True, samples=0, out=str(tmp_path / "run")))
    opened = open_policy(str(out))
    assert isinstance(opened.model, Unsteered) and opened.recorded.sae is None


def test_a_local_path_with_an_at_sign_is_no_revision(tmp_path):
    model = shutil.copytree(GOLDEN / "model", tmp_path / "x@y" / "model")
    own = dict(sae=str(GOLDEN / "sae"), sae_id=SAE_ID, layer=1, samples=0)
    settings = train.Settings(**SMALL | own | dict(model=str(model)), out=str(tmp_path / "run"))
    assert open_policy(str(train.train(settings))).recorded.model == str(model)


def test_the_recorded_sae_is_found_in_a_copy_of_its_repository(tmp_path, tiny_run):
    copy = shutil.copytree(policy.local("tiny", "sae"), tmp_path / "sae")
    opened = open_policy(str(tiny_run), sae=str(copy))
    recorded = open_policy(str(tiny_run)).recorded.sae_id
    assert opened.recorded.sae_id == recorded
    alone = open_policy(str(tiny_run), sae=str(copy / recorded))  # the folder of the SAE itself
    assert alone.steered.sae.sha256 == opened.steered.sae.sha256
    with pytest.raises(UserError, match="nonsense"):
        open_policy(str(tiny_run), sae_id="layer_2/nonsense")


def test_both_data_sets_are_read_at_one_commit_each(monkeypatch):
    """A branch may move between the two reads of a data set."""
    commits, read = {"own/train": "aaa", "own/eval": "bbb"}, []
    one = [DataFile(GOLDEN / "dataset", None)]
    monkeypatch.setattr(policy, "data_files", lambda name: (list(one), commits[name]))
    monkeypatch.setattr(policy, "read_pairs", lambda name, *_: read.append(name) or ["a pair"])
    recorded = DEFAULTS._replace(data="own/train", eval_data="own/eval")
    found = policy.load_preferences(recorded, None)
    assert set(read) == {"own/train@aaa", "own/eval@bbb"}
    assert (found.revision, found.eval_revision) == ("aaa", "bbb")
