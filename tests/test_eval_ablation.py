"""eval_ablation.py and training under a mask, against naive forms at golden size."""

import csv
import importlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import GOLDEN, SAE_ID, load
from effects import CPU, evaluated, golden, some_masks, table_of  # noqa: F401 (a fixture)
from safetensors.torch import load_file

import eval_ablation as ablating
import fsrl
import train
from audit import figures
from audit.attribution import attribute
from audit.counting import count
from fsrl import Adapter, Unsteered
from kernels import logps
from labels import write_labels
from policy import open_policy, read_features
from runtime import cli
from runtime.sources import UserError
from runtime.tables import interval

command = importlib.import_module("audit.__main__")
NO_MASKS = torch.zeros(0, 256, dtype=torch.bool)

# --- losses under a change ------------------------------------------------------------------------


def test_the_curve_ends_at_the_base_model_and_at_the_policy(golden):  # noqa: F811
    policy, pairs = golden
    curve = ablating.all_losses(policy, pairs, [1, 26], NO_MASKS).topk.mean(1)
    zero = dict(weight=torch.zeros(256, 64), bias=torch.zeros(256))
    assert curve[0].item() == pytest.approx(evaluated(policy, pairs, **zero), rel=1e-12)
    assert curve[-1].item() == pytest.approx(evaluated(policy, pairs), rel=1e-12)
    assert abs(curve[0] - curve[-1]) > 0.01


def test_top_features_by_a_naive_sort_of_each_position():
    g = torch.Generator().manual_seed(0)
    v = torch.randn(20, 50, generator=g)
    v *= torch.rand(20, 50, generator=g) < 0.4  # signed, mostly zero
    counts = [0, 1, 3, 30, 50]
    for n, kept in zip(counts, ablating.keep_top(counts)(v), strict=True):
        for row, result in zip(v.tolist(), kept.tolist(), strict=True):
            top = sorted(range(50), key=lambda k: -abs(row[k]))[:n]
            assert result == [value if k in top else 0.0 for k, value in enumerate(row)]


def test_the_number_kept_is_rounded_up():
    counts = [ablating.kept(p, 65_536) for p in (0, 0.01, 1, 5, 10, 100)]
    assert counts == [0, 7, 656, 3277, 6554, 65_536]
    assert ablating.kept(7, 100) == 7 and 7 / 100 * 100 > 7


def test_the_authors_curve_rounds_down(golden):  # noqa: F811
    """Its first point, 0.01 % of 65,536, keeps 6 features."""
    percents = (0.01, 0.02, 0.04, 0.08, 10)
    counts = [ablating.kept(percent, 65_536, "down") for percent in percents]
    assert counts == [6, 13, 26, 52, 6553]
    policy, pairs = golden
    s = ablating.Settings(run="x", keep=(0.3, 1.0), rounding="down", bootstrap=5)
    found = ablating.evaluate(ablating.Evaluation(policy, pairs, [], {}, None), s)
    assert [row.features for row in found.topk] == [0, 0, 2, 256]
    assert found.topk[1].loss == found.topk[0].loss  # of 256, 0.3 % is none: the base model


def test_zeroed_features_are_zeroed_adapter_rows(golden):  # noqa: F811
    policy, pairs = golden
    masks = some_masks(10)  # more than are steered together
    losses = ablating.ablate(policy, pairs, masks)
    weights = policy.steered.adapter.state_dict()
    for mask, loss in zip(masks, losses.mean(1).tolist(), strict=True):
        rows = {
            name: torch.where(mask if w.ndim == 1 else mask[:, None], 0, w)
            for name, w in weights.items()
        }
        assert loss == pytest.approx(evaluated(policy, pairs, **rows), rel=1e-12)
    assert len(set(losses.mean(1).tolist())) == 10


def test_packing_changes_no_pair(golden, monkeypatch):  # noqa: F811
    policy, pairs = golden
    masks = some_masks(3)

    def measured(tokens: int) -> list:
        packed = policy._replace(recorded=policy.recorded._replace(tokens_per_microbatch=tokens))
        usage = torch.from_numpy(ablating.feature_usage(packed, pairs))
        return [ablating.ablate(packed, pairs, masks), *attribute(packed, pairs, 3, masks), usage]

    results = [measured(tokens) for tokens in (1, 150, 100_000)]
    monkeypatch.setattr(fsrl, "STEER_ROWS", 7)
    monkeypatch.setitem(fsrl.STEER_ELEMENTS, "cpu", 1)
    monkeypatch.setitem(logps.CHUNK_ELEMENTS, "cpu", 1 << 12)
    monkeypatch.setattr(logps, "CHUNK_ROWS", 1)
    results.append(measured(8192))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_usage_is_that_of_the_counts(golden):  # noqa: F811
    """Over the positions of prompt+chosen and prompt+rejected together."""
    policy, pairs = golden
    counts = count(policy, pairs)
    expected = counts.events[0, 1:].sum(0) / counts.positions[1:].sum().double()
    found = torch.from_numpy(ablating.feature_usage(policy, pairs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# --- controls and intervals -----------------------------------------------------------------------


def test_controls_are_outside_the_category_and_as_many():
    rng = np.random.default_rng(0)
    usage = rng.random(300) ** 4 * (rng.random(300) < 0.7)
    mask = rng.random(300) < 0.2
    drawn = [ablating.random_set(mask, (0, i)) for i in range(3)]
    assert all(d.sum() == mask.sum() and not (d & mask).any() for d in drawn)
    assert not (drawn[0] == drawn[1]).all()
    assert (drawn[0] == ablating.random_set(mask, (0, 0))).all()

    matched = ablating.matched_set(mask, usage)
    assert matched.sum() == (usage[mask] > 0).sum()
    assert not (matched & mask).any() and (usage[matched] > 0).all()
    ours, theirs = np.sort(usage[mask & (usage > 0)]), np.sort(usage[matched])
    off = abs(ours.sum() - theirs.sum())
    assert np.abs(ours - theirs).max() < 0.1 and off < 0.05 * ours.sum()
    assert abs(ours.sum() - np.mean([usage[d].sum() for d in drawn])) > off
    assert ablating.random_set(~mask, (0, 0)) is None and ablating.matched_set(~mask, usage) is None


def test_matching_takes_the_nearest_that_is_left():
    usage = np.array([0.50, 0.40, 0.0, 0.52, 0.47, 0.10, 0.0])
    mask = np.array([1, 1, 1, 0, 0, 0, 0], dtype=bool)
    # 0.50 -> 0.52, then 0.40 -> 0.47.
    assert np.flatnonzero(ablating.matched_set(mask, usage)).tolist() == [3, 4]
    three_for_two = np.array([0, 0, 0, 1, 1, 1, 0], dtype=bool)
    assert ablating.matched_set(three_for_two, usage) is None


def test_a_control_of_other_usage_is_called_so():
    assert ablating.of_usage(9.5, 10) == "of like usage"
    assert ablating.of_usage(27.0, 44.4) == "of less usage (27 against 44.4)"
    assert ablating.of_usage(0.12, 0.1) == "of more usage (0.12 against 0.1)"


def test_intervals_are_those_of_a_mean_and_paired():
    values = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = interval(values, 2000, 0)
    width, expected = high - low, 2 * 1.96 * values.std(1) / 20
    torch.testing.assert_close(width, expected, rtol=0.1, atol=0)
    assert (low < values.mean(1)).all() and (values.mean(1) < high).all()
    # The same pairs under both conditions.
    low, high = interval((values[0] + 3) - values[0], 50, 0)
    assert low.item() == pytest.approx(3) and high.item() == pytest.approx(3)


def test_ablation_rows_add_up(golden):  # noqa: F811
    policy, pairs = golden
    usage = ablating.feature_usage(policy, pairs)
    a, b = some_masks(2).numpy()
    masks = {"a": a, "empty": np.zeros(256, bool), "b": b}
    sets = ablating.feature_sets([table_of(masks)], usage, 2, 0)
    names = [(x.category, x.name) for x in sets]
    assert names == [(c, n) for c in "ab" for n in ("category", "matched", "random 0", "random 1")]
    stacked = torch.from_numpy(np.stack([x.mask for x in sets]))
    found = ablating.all_losses(policy, pairs, [], stacked)
    s = ablating.Settings(run="x", bootstrap=50)
    rows = ablating.ablation_rows(sets, found.ablation, found.topk[-1], usage, s)
    of = {(row.category, row.set): row for row in rows}
    for row, x in zip(rows, sets, strict=True):
        assert row.delta == pytest.approx(row.loss - evaluated(policy, pairs), abs=1e-12)
        assert row.low <= row.delta <= row.high
        assert row.delta_per_feature == row.delta / x.mask.sum()
        assert row.used == (usage[x.mask] > 0).sum()
        if row.set != "category":
            whole = of[row.category, "category"]
            assert row.excess == pytest.approx(whole.delta - row.delta)
            assert row.excess_low <= row.excess <= row.excess_high


# --- the scripts ----------------------------------------------------------------------------------

MASKED = [0, 3, 17, 100, 255]


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory):
    """A short golden run with five features held at zero."""
    folder = tmp_path_factory.mktemp("masked")
    (folder / "mask.json").write_text(json.dumps(MASKED))
    where = dict(model=GOLDEN / "model", sae=GOLDEN / "sae", data=GOLDEN / "dataset")
    where |= dict(init_adapter=GOLDEN / "adapter_mid", mask_features=folder / "mask.json")
    where = {name: str(path) for name, path in where.items()}
    rest = dict(sae_id=SAE_ID, layer=1, batch_size=4, max_steps=3, lr=1e-2, eval_every=0)
    rest |= dict(samples=0, device="cpu", out=str(folder / "run"))
    train.train(train.Settings(**where, **rest))
    return folder / "run"


def test_masked_features_stay_at_zero_in_training(masked_run):
    trained = load_file(masked_run / "adapter/adapter.safetensors")
    start = Adapter.from_pretrained(GOLDEN / "adapter_mid")
    others = [k for k in range(256) if k not in MASKED]
    assert not trained["weight"][MASKED].any() and not trained["bias"][MASKED].any()
    assert start.weight[MASKED].any()
    assert (trained["weight"][others] != start.weight[others]).any(1).all()
    config = json.loads((masked_run / "config.json").read_text())
    assert any(path.endswith("mask.json") for path in config["sha256"])


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "judged.jsonl"
    rows = [
        dict(feature=k, category=c, label=k % n == 0)
        for k in range(256)
        for c, n in (("three", 3), ("../x", 5))
    ]
    rows[0]["description"] = "an explanation"
    header = dict(kind="fires", sae="golden", sae_id=SAE_ID, sae_sha256=load().sae.sha256)
    write_labels(path, header, rows)
    return path


def in_process(capsys, main, *argv) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a script."""
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script", *map(str, argv)])
        try:
            cli.run(main)
        except SystemExit as stop:
            code = stop.code
    return code, *capsys.readouterr()


def test_both_commands_write_every_table(masked_run, labels, tmp_path, capsys):
    flags = ("--run", masked_run, "--labels", labels, "--bootstrap", 20, "--random-sets", 2)
    code, said, errors = in_process(capsys, ablating.main, *flags, "--out", tmp_path)
    assert code == 0 and "costs most when its features are zeroed" in said, errors
    assert len(said.strip().splitlines()) <= 4
    folder, names = tmp_path / "eval", ("topk", "ablation")
    files = {f"{name}.{kind}" for name in names for kind in ("csv", "json")}
    assert {p.name for p in folder.iterdir()} == files | {"masks"}
    before = (folder / "topk.csv").stat().st_mtime_ns

    flags += ("--nodes", 4, "--static-pairs", 8, "--out", tmp_path)
    code, said, errors = in_process(capsys, command.main, *flags)
    assert code == 0, errors
    assert "report.html, and the tables in" in said.splitlines()[-1]
    assert (folder / "topk.csv").stat().st_mtime_ns == before  # what the script wrote is kept
    usage = command.Audit(*opened(flags)).usage_part()
    names += ("static", "choices", "attribution", "attribution_features")
    names += ("shift", "behaviour", "carriers", "carried_by")
    files = {f"{name}.{kind}" for name in names for kind in ("csv", "json", "png")}
    files |= {f"{name}.{kind}" for name in usage.tables for kind in ("csv", "json", "png")}
    files |= {*usage.files, "attribution_features.parquet", "attribution_cards.json", "masks"}
    assert {p.name for p in folder.iterdir()} == files

    tables = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    for name, table in tables.items():
        with open(folder / f"{name}.csv") as file:
            read = list(csv.DictReader(file))
        shown = [{k: "" if x is None else str(x) for k, x in row.items()} for row in table["rows"]]
        assert read == shown
        named = [entry["name"] for entry in table["about"]["labels"]]
        assert table["about"]["pairs"] == 8
        assert named == ([] if name in ("topk", "static") else ["judged"])

    rows = [json.loads(line) for line in (masked_run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "eval"][-1]["loss"]
    curve = tables["topk"]["rows"]
    assert curve[-1]["loss"] == pytest.approx(last, rel=1e-6) and curve[-1]["percent"] == 100
    assert tables["static"]["rows"][1]["loss"] == curve[-1]["loss"]
    assert tables["static"]["rows"][0]["loss"] == curve[0]["loss"]

    found = tables["choices"]["rows"]
    assert [row["tokens"] for row in found] == ["three", "../x", "end", "rest"]
    assert sum(row["part_of_change"] for row in found) == pytest.approx(1, abs=1e-6)
    policy = open_policy(str(masked_run))
    pairs, _ = policy.eval_pairs()
    scorer = train.Scorer(policy.recorded.beta, policy.recorded.gamma_ratio, 8192, CPU)
    both = Unsteered(policy.base), policy.model
    margins = [train.evaluate(model, pairs, scorer)["margin"] for model in both]
    widened = (margins[1] - margins[0]) / policy.recorded.beta
    assert sum(row["share"] for row in found) == pytest.approx(widened, abs=1e-5)

    about = tables["attribution"]["about"]
    assert about["change"] == pytest.approx(curve[-1]["loss"] - curve[0]["loss"], rel=1e-5)
    stored = pq.read_table(folder / "attribution_features.parquet").to_pydict()
    assert sum(stored["share"]) == pytest.approx(about["change"] + about["residual"], abs=1e-9)
    assert all(stored["share"][k] == 0 and stored["usage"][k] == 0 for k in MASKED)
    assert stored["explanation_judged"][0] == "an explanation"
    assert np.flatnonzero(stored["judged:three"]).tolist() == list(range(0, 256, 3))
    largest = max(range(256), key=lambda k: abs(stored["share"][k]))
    assert tables["attribution_features"]["rows"][0]["feature"] == largest

    masks = {p.name: json.loads(p.read_text()) for p in (folder / "masks").iterdir()}
    assert masks["judged-three-category.json"] == list(range(0, 256, 3))
    assert len(masks) == 8 and len(masks["judged-three-random_0.json"]) == 86
    for name, mask in masks.items():
        assert read_features(folder / "masks" / name, 256) == mask


def opened(flags):
    s = cli.parse(command.Settings, [str(flag) for flag in flags])
    return ablating.open_evaluation(s), s


def test_nothing_is_left_of_what_fails(masked_run, labels, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    flags = ("--run", masked_run, "--labels", labels, "--bootstrap", 2, "--pairs", 2)
    flags += ("--out", tmp_path)
    monkeypatch.setitem(figures.DRAW, "attribution", interrupt)
    code, *_ = in_process(capsys, command.main, *flags, "--nodes", 1, "--only", "attribution")
    assert code == 130 and not [p for p in tmp_path.rglob("*") if p.is_file()]
    monkeypatch.setattr(ablating, "write_mask", interrupt)
    code, *_ = in_process(capsys, ablating.main, *flags)
    assert code == 130 and not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_mistakes_are_one_sentence(masked_run, labels, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(labels.read_text().replace(load().sae.sha256, "0" * 64))
    unnamed = tmp_path / "unnamed.jsonl"
    unnamed.write_text(json.dumps(dict(feature=0, category="a")) + "\n")
    run = ("--run", masked_run, "--out", tmp_path / "out")
    cases = {
        (): "--run",
        ("--run", tmp_path / "nothing"): "nothing",
        (*run, "--labels", other): "0" * 12,
        (*run, "--labels", unnamed): "--assume-labels-match",
        (*run, "--labels", labels, labels): "--labels",
        (*run, "--keep", 101): "--keep",
        (*run, "--pairs", 0): "--pairs 0",
        (*run, "--data", tmp_path / "none.jsonl"): "none.jsonl",
        # A folder with model/, as a run with --full leaves it.
        ("--run", GOLDEN, "--out", tmp_path / "out"): "has no adapter",
    }
    of_audit = {
        (*run, "--coefficients", "nan"): "--coefficients",
        (*run, "--nodes", "m"): "--nodes",
    }
    for main, argv, words in (
        *((ablating.main, *case) for case in cases.items()),
        *((command.main, *case) for case in of_audit.items()),
    ):
        code, _, said = in_process(capsys, main, *argv)
        assert code == 2 and words in said and "Traceback" not in said and said.count("\n") == 1, (
            said
        )
    assert not (tmp_path / "out").exists()
    for content in ("[1, 2", "[256]", "[true]", "[-1]", '{"a": 1}', "[1.0]"):
        (tmp_path / "mask.json").write_text(content)
        with pytest.raises(UserError, match="mask.json"):
            read_features(tmp_path / "mask.json", 256)
