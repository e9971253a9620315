"""eval_ablation.py, attribution.py, promotes.py and training under a mask, against naive forms at golden size."""

import contextlib
import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import GOLDEN, SAE_ID, load, script
from packed import pack
from safetensors.torch import load_file

import data
import eval_ablation as ablating
import train
from audit import attribution as attributing
from audit.attribution import KINDS, attribution
from fsrl import Adapter, SteeredModel
from labelling import promotes
from labels import Labels, load_labels, write_labels
from policy import Policy, eval_pairs, open_policy
from runtime import cli

S = train.Settings(device="cpu", dtype="float32")
D = torch.float64


@pytest.fixture(scope="module")
def golden():
    """The golden policy in float64, and its evaluation pairs."""
    parts = load(D)
    tokenizer = data.load_tokenizer(GOLDEN / "model")
    pairs = data.load_pairs(str(GOLDEN / "dataset"), tokenizer, 2048, 1800, "test")
    return Policy(
        parts.model, parts.steered.requires_grad_(False), tokenizer, S, "golden", None
    ), pairs


def evaluated(policy: Policy, pairs, **weights) -> float:
    """train.evaluate's loss, with the adapter's weight and bias replaced."""
    adapter = Adapter(64, 256).to(D)
    adapter.load_state_dict(policy.steered.adapter.state_dict() | weights)
    steered = SteeredModel(policy.base, policy.steered.sae, adapter, policy.steered.layer)
    return train.evaluate(steered, train.Batch(pairs, range(len(pairs))), S, progress=False)["loss"]


def some_masks(conditions: int, share: float = 0.3) -> torch.Tensor:
    return torch.rand(conditions, 256, generator=torch.Generator().manual_seed(0)) < share


def table_of(masks: dict[str, np.ndarray], name="fires") -> Labels:
    given = dict(
        name=name,
        kind="fires",
        explanations={},
        categories=masks,
        matched=True,
        sae={},
        path=None,
        sha256="",
    )
    return Labels(**{field: given.get(field) for field in Labels._fields})


# --- losses under a change ----------------------------------------------------------------------------------


def test_the_curve_ends_at_the_base_model_and_at_the_policy(golden):
    policy, pairs = golden
    curve = ablating.all_losses(policy, pairs, S, [1, 26], [], torch.zeros(0, 64)).topk.mean(1)
    zero = dict(weight=torch.zeros(256, 64), bias=torch.zeros(256))
    assert curve[0].item() == pytest.approx(evaluated(policy, pairs, **zero), rel=1e-12)
    assert curve[-1].item() == pytest.approx(evaluated(policy, pairs), rel=1e-12)
    assert abs(curve[0] - curve[-1]) > 0.01


def test_top_features_by_a_naive_sort_of_each_position():
    g = torch.Generator().manual_seed(0)
    v = torch.randn(20, 50, generator=g) * (
        torch.rand(20, 50, generator=g) < 0.4
    )  # signed, mostly zero
    counts = [0, 1, 3, 30, 50]
    for n, kept in zip(counts, ablating.keep_top(counts)(v), strict=True):
        for row, result in zip(v.tolist(), kept.tolist(), strict=True):
            top = sorted(range(50), key=lambda k: -abs(row[k]))[:n]
            assert result == [value if k in top else 0.0 for k, value in enumerate(row)]


def test_the_number_kept_is_rounded_up():
    assert [ablating.kept(p, 65_536) for p in (0, 0.01, 1, 5, 10, 100)] == [
        0,
        7,
        656,
        3277,
        6554,
        65_536,
    ]
    assert ablating.kept(7, 100) == 7 and 7 / 100 * 100 > 7


def test_zeroed_features_are_zeroed_adapter_rows(golden):
    policy, pairs = golden
    masks = some_masks(10)  # more than are steered together
    losses = ablating.ablate(policy, pairs, masks, S)
    for mask, loss in zip(masks, losses.mean(1).tolist(), strict=True):
        rows = {name: torch.where(mask if w.ndim == 1 else mask[:, None], 0, w)
                for name, w in policy.steered.adapter.state_dict().items()}  # fmt: skip
        assert loss == pytest.approx(evaluated(policy, pairs, **rows), rel=1e-12)
    assert len(set(losses.mean(1).tolist())) == 10


def test_packing_changes_no_pair(golden, monkeypatch):
    policy, pairs = golden
    results = []
    for limit in (1, 150, 100_000):
        s = replace(S, tokens_per_microbatch=limit)
        masks = some_masks(3)
        losses = ablating.ablate(policy, pairs, masks, s)
        found = attribution(policy, pairs, s, 3, masks)
        results.append([losses, *found, *ablating.measure(policy, pairs, s)])
    monkeypatch.setattr("fsrl.STEER_ROWS", 7)
    monkeypatch.setitem(train.simpo.CHUNK_ELEMENTS, "cpu", 1 << 12)
    monkeypatch.setitem(__import__("fsrl").STEER_ELEMENTS, "cpu", 1)
    results.append(
        [ablating.ablate(policy, pairs, masks, S), *attribution(policy, pairs, S, 3, masks)]
    )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_means_over_the_unshared_sequences_one_at_a_time(golden):
    policy, pairs = golden
    v, f, x = [], {"chosen": [], "rejected": []}, {"chosen": [], "rejected": []}
    for pair in pairs:
        for side in f:
            tokens = pair.prompt + getattr(pair, side)
            packed = pack([(tokens, [])])
            stream = policy.steered.residual(packed, policy.base.plan(packed))
            v.append(policy.steered.adapter(stream)[1:])
            f[side].append(policy.steered.sae.encode(stream)[len(pair.prompt) :])
            x[side].append(stream[len(pair.prompt) :])
    found = ablating.measure(policy, pairs, S)
    v, gap = (
        torch.cat(v),
        lambda t: torch.cat(t["chosen"]).mean(0) - torch.cat(t["rejected"]).mean(0),
    )
    expected = (v != 0).double().mean(0), v.mean(0), gap(x), gap(f)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_a_constant_v_is_an_adapter_of_biases_alone(golden):
    policy, pairs = golden
    means = ablating.measure(policy, pairs, S)
    s = ablating.Settings(run="x", coefficients=(2.0,), top_features=(3, 999))
    names, vectors = ablating.static_directions(means, policy.steered, s)
    assert [(n["steering"], n["coefficient"], n["features"]) for n in names] == [
        ("mean v", 2.0, None),
        ("contrastive, residual stream", 2.0, None),
        ("contrastive, SAE features", 2.0, None),
        ("top features", 1.0, 3),
        ("top features", 1.0, 256),
    ]
    losses = ablating.all_losses(policy, pairs, S, [], [], vectors.double()).static.mean(1).tolist()
    largest = means.v >= means.v.sort().values[-3]
    biases = {0: 2 * means.v, 3: means.v * largest, 4: means.v}
    for i, bias in biases.items():
        assert losses[i] == pytest.approx(
            evaluated(policy, pairs, weight=torch.zeros(256, 64), bias=bias), rel=1e-5
        )
    torch.testing.assert_close(vectors[1], 2 * means.x_gap)
    torch.testing.assert_close(vectors[2], 2 * (means.f_gap @ policy.steered.sae.W_dec.float()))


# --- controls and intervals ---------------------------------------------------------------------------------


def test_controls_are_outside_the_category_and_as_many():
    rng = np.random.default_rng(0)
    usage = rng.random(300) ** 4 * (rng.random(300) < 0.7)
    mask = rng.random(300) < 0.2
    drawn = [ablating.random_set(mask, (0, i)) for i in range(3)]
    assert all(d.sum() == mask.sum() and not (d & mask).any() for d in drawn)
    assert (
        not (drawn[0] == drawn[1]).all() and (drawn[0] == ablating.random_set(mask, (0, 0))).all()
    )
    matched = ablating.matched_set(mask, usage)
    assert (
        matched.sum() == (usage[mask] > 0).sum()
        and not (matched & mask).any()
        and (usage[matched] > 0).all()
    )
    ours, theirs = np.sort(usage[mask & (usage > 0)]), np.sort(usage[matched])
    assert np.abs(ours - theirs).max() < 0.1 and abs(ours.sum() - theirs.sum()) < 0.05 * ours.sum()
    assert abs(ours.sum() - np.mean([usage[d].sum() for d in drawn])) > abs(
        ours.sum() - theirs.sum()
    )
    assert ablating.random_set(~mask, (0, 0)) is None and ablating.matched_set(~mask, usage) is None


def test_matching_takes_the_nearest_that_is_left():
    usage = np.array([0.50, 0.40, 0.0, 0.52, 0.47, 0.10, 0.0])
    mask = np.array([1, 1, 1, 0, 0, 0, 0], dtype=bool)
    assert np.flatnonzero(ablating.matched_set(mask, usage)).tolist() == [
        3,
        4,
    ]  # 0.50 -> 0.52, then 0.40 -> 0.47
    assert (
        ablating.matched_set(np.array([0, 0, 0, 1, 1, 1, 0], dtype=bool), usage) is None
    )  # three for two


def test_intervals_are_those_of_a_mean_and_paired():
    values = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=D)
    low, high = ablating.interval(values, 2000, 0)
    width, expected = high - low, 2 * 1.96 * values.std(1) / 20
    torch.testing.assert_close(width, expected, rtol=0.1, atol=0)
    assert (low < values.mean(1)).all() and (values.mean(1) < high).all()
    low, high = ablating.interval(
        (values[0] + 3) - values[0], 50, 0
    )  # the same pairs under both conditions
    assert low.item() == pytest.approx(3) and high.item() == pytest.approx(3)


def test_ablation_rows_add_up(golden):
    policy, pairs = golden
    usage = ablating.measure(policy, pairs, S).usage.numpy()
    masks = {
        "a": some_masks(2)[0].numpy(),
        "empty": np.zeros(256, bool),
        "b": some_masks(2)[1].numpy(),
    }
    sets = ablating.feature_sets([table_of(masks)], usage, 2, 0)
    names = [(x.category, x.name) for x in sets]
    assert names == [(c, n) for c in "ab" for n in ("category", "matched", "random 0", "random 1")]
    found = ablating.all_losses(policy, pairs, S, [], sets, torch.zeros(0, 64))
    rows = ablating.ablation_rows(
        sets, found.ablation, found.topk[-1], usage, ablating.Settings(run="x", bootstrap=50)
    )
    of = {(row["category"], row["set"]): row for row in rows}
    for row, x in zip(rows, sets, strict=True):
        assert row["delta"] == pytest.approx(row["loss"] - evaluated(policy, pairs), abs=1e-12)
        assert row["low"] <= row["delta"] <= row["high"]
        assert (
            row["delta_per_feature"] == row["delta"] / x.mask.sum()
            and row["used"] == (usage[x.mask] > 0).sum()
        )
        if row["set"] != "category":
            whole = of[row["category"], "category"]
            assert row["excess"] == pytest.approx(whole["delta"] - row["delta"])
            assert row["excess_low"] <= row["excess"] <= row["excess_high"]


# --- attribution --------------------------------------------------------------------------------------------


def test_shares_sum_to_the_change_of_the_loss(golden):
    policy, pairs = golden
    found = attribution(policy, pairs, S, 16)
    assert found.change == pytest.approx(
        evaluated(policy, pairs) - found.base.mean().item(), rel=1e-12
    )
    assert abs(found.change) > 0.01 and abs(found.residual) < 1e-4 * abs(found.change)
    assert abs(attribution(policy, pairs, S, 1).residual) > abs(found.residual)


def test_shares_are_complete_under_a_clamp_too(golden):
    """A soft-threshold adapter: v of both signs, f + v clamped at 0."""
    policy, pairs = golden
    adapter = Adapter(64, 256, "soft-threshold").to(D)
    adapter.load_state_dict(
        policy.steered.adapter.state_dict() | dict(raw_threshold=torch.full((256,), 0.02))
    )
    steered = SteeredModel(
        policy.base, policy.steered.sae, adapter, policy.steered.layer
    ).requires_grad_(False)
    found = attribution(policy._replace(steered=steered), pairs[:4], S, 16)
    assert abs(found.change) > 0.01 and abs(found.residual) < 0.05 * abs(found.change)


def test_shares_against_autograd_on_a_whole_v(golden):
    """v [T, F] of one stream as a leaf of the graph, at each node of the same quadrature."""
    policy, pairs = golden
    steered, steps = policy.steered, 3
    masks = some_masks(2)
    found = attribution(policy, pairs, S, steps, masks)
    packed = data.pack_pairs(pairs)
    plan = policy.base.plan(packed)
    x = steered.residual(packed, plan)
    v = steered.adapter(x)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    share = torch.zeros_like(v)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        leaf = (node * v).requires_grad_()
        hidden = steered.above(x + leaf @ steered.sae.W_dec, plan)
        train.preference(policy.base, hidden, packed, S)[0].sum().backward()
        share += weight * leaf.grad * v
    kind = attributing.position_kinds(packed, policy.tokenizer)
    by_kind = torch.stack([share[kind == i].sum(0) for i in range(len(KINDS))]) / len(pairs)
    by_pair = torch.stack([share[packed.tree == i].sum(0) for i in range(len(pairs))])
    torch.testing.assert_close(found.shares, by_kind, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        found.pair_category, by_pair @ masks.double().T, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        found.error, by_pair.std(0) / len(pairs) ** 0.5, rtol=1e-4, atol=1e-8
    )


def test_where_a_position_stands(golden):
    policy, _ = golden
    start, stop, bos, eos = map(
        policy.tokenizer.token_to_id, ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>")
    )
    model, line = policy.tokenizer.encode("model\n", add_special_tokens=False).ids
    prompt = [bos, start, 7, stop, line]
    whole, cut = [start, model, line, 8, 9, stop, line, eos], [start, model, line, 8, 9, stop]
    packed = data.pack_pairs(
        [
            data.Pair(prompt, whole, cut),
            data.Pair(prompt[1:], cut[:2], cut),
            data.Pair(prompt, cut, cut),
        ]
    )
    names = [KINDS[i] for i in attributing.position_kinds(packed, policy.tokenizer).tolist()]
    header, text, end = (
        lambda side, n, part=part: [f"{side} {part}"] * n for part in attributing.PARTS
    )
    expected = (
        ["first"] + ["prompt"] * 4 + header("chosen", 3) + text("chosen", 2) + end("chosen", 3)
    )
    expected += header("rejected", 3) + text("rejected", 2) + end("rejected", 1)
    expected += ["first"] + ["prompt"] * 3 + header("chosen", 2)
    expected += header("rejected", 3) + text("rejected", 2) + end("rejected", 1)
    expected += ["first"] + ["prompt"] * 4  # a response that was cut ends where the next one begins
    for side in ("chosen", "rejected"):
        expected += header(side, 3) + text(side, 2) + end(side, 1)
    assert names == expected


def test_attribution_rows_share_out_the_whole(golden):
    policy, pairs = golden
    masks = {"a": some_masks(1)[0].numpy(), "b": ~some_masks(1)[0].numpy()}
    masks["b"][:5] = False
    tables = [table_of(masks)]
    listed = ablating.category_masks(tables)
    assert [name for _, name, _ in listed] == ["a", "b", "(none)"]
    members = torch.stack([torch.from_numpy(mask) for *_, mask in listed])
    found = attribution(policy, pairs, S, 4, members)
    rows = ablating.attribution_rows(
        found, tables, np.ones(256, bool), ablating.Settings(run="x", bootstrap=50)
    )
    of = {(row["category"], row["where"]): row for row in rows}
    whole = found.change + found.residual
    assert of["(all)", "(all)"]["share"] == pytest.approx(whole)
    for where in ("(all)", *KINDS):
        parts = sum(of[name, where]["share"] for name in ("a", "b", "(none)"))
        assert parts == pytest.approx(of["(all)", where]["share"], abs=1e-12)
    assert sum(of["(all)", where]["share"] for where in KINDS) == pytest.approx(whole)
    assert of["a", "(all)"]["share"] == pytest.approx(
        found.pair_category[:, 0].mean().item(), rel=1e-6
    )
    assert of["a", "(all)"]["low"] <= of["a", "(all)"]["share"] <= of["a", "(all)"]["high"]


# --- the scripts --------------------------------------------------------------------------------------------

MASKED = [0, 3, 17, 100, 255]


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory):
    """A short golden run with five features held at zero."""
    folder = tmp_path_factory.mktemp("masked")
    (folder / "mask.json").write_text(json.dumps(MASKED))
    where = dict(
        model=GOLDEN / "model",
        sae=GOLDEN / "sae",
        data=GOLDEN / "dataset",
        init_adapter=GOLDEN / "adapter_mid",
    )
    where |= dict(mask_features=folder / "mask.json", out=folder / "run")
    rest = dict(
        sae_id=SAE_ID, layer=1, batch_size=4, max_steps=3, lr=1e-2, eval_every=0, device="cpu"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.decoding, "greedy", lambda *_: "")
        train.train(train.Settings(**{name: str(path) for name, path in where.items()}, **rest))
    return folder / "run"


def test_masked_features_stay_at_zero_in_training(masked_run):
    trained = load_file(masked_run / "adapter/adapter.safetensors")
    start = Adapter.from_pretrained(GOLDEN / "adapter_mid")
    others = [k for k in range(256) if k not in MASKED]
    assert not trained["weight"][MASKED].any() and not trained["bias"][MASKED].any()
    assert (
        start.weight[MASKED].any()
        and (trained["weight"][others] != start.weight[others]).any(1).all()
    )
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
    write_labels(
        path, dict(kind="fires", sae="golden", sae_id=SAE_ID, sae_sha256=load().sae.sha256), rows
    )
    return path


def in_process(*argv) -> tuple[int, str]:
    stderr = io.StringIO()
    with (
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as stop,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("sys.argv", ["eval_ablation.py", *map(str, argv)])
        cli.run(ablating.main)
    return stop.value.code, stderr.getvalue()


def test_one_command_writes_every_table(masked_run, labels, tmp_path):
    flags = (
        "--labels",
        labels,
        "--bootstrap",
        20,
        "--steps",
        4,
        "--random-sets",
        2,
        "--static-pairs",
        8,
    )
    result = script("eval_ablation.py", "--run", masked_run, *flags, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    folder, names = tmp_path / "eval", ("topk", "ablation", "static", "choices")
    names += ("attribution", "attribution_features")
    files = {f"{name}.{kind}" for name in names for kind in ("csv", "json", "png")}
    assert {p.name for p in folder.iterdir()} == files | {"attribution_features.parquet", "masks"}
    tables = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    for name, table in tables.items():
        with open(folder / f"{name}.csv") as file:
            read = list(csv.DictReader(file))
        assert read == [
            {k: "" if x is None else str(x) for k, x in row.items()} for row in table["rows"]
        ]
        named = [entry["name"] for entry in table["about"]["labels"]]
        assert table["about"]["pairs"] == 8 and named == (
            [] if name in ("topk", "static") else ["judged"]
        )

    rows = [json.loads(line) for line in (masked_run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "eval"][-1]["loss"]
    curve = tables["topk"]["rows"]
    assert curve[-1]["loss"] == pytest.approx(last, rel=1e-6) and curve[-1]["percent"] == 100
    assert tables["static"]["rows"][1]["loss"] == curve[-1]["loss"]
    assert tables["static"]["rows"][0]["loss"] == curve[0]["loss"]
    found = tables["choices"]["rows"]
    assert [row["tokens"] for row in found] == ["three", "../x", "end", "rest"]
    assert sum(row["part_of_change"] for row in found) == pytest.approx(1, abs=1e-6)
    opened = open_policy(str(masked_run))
    pairs, _ = eval_pairs(opened)
    batch = train.Batch(pairs, range(len(pairs)))
    both = opened.base, opened.steered
    margins = [train.evaluate(model, batch, opened.settings, False)["margin"] for model in both]
    beta = opened.settings.beta
    assert sum(row["share"] for row in found) == pytest.approx(
        (margins[1] - margins[0]) / beta, abs=1e-5
    )
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
    assert all(
        train.read_features(folder / "masks" / name, 256) == mask for name, mask in masks.items()
    )
    assert re.search(r"shares sum to the change of -?\d+\.\d{4}, residual", result.stdout)


def test_nothing_is_left_of_an_evaluation_that_fails(masked_run, tmp_path, monkeypatch):
    def draw(rows, about):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablating.figures, "attribution", draw)
    flags = ("--bootstrap", 2, "--steps", 1, "--static-pairs", 0, "--pairs", 2)
    code, _ = in_process("--run", masked_run, *flags, "--out", tmp_path)
    assert code == 130 and not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_mistakes_are_one_sentence(masked_run, labels, tmp_path):
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
        (*run, "--coefficients", "nan"): "--coefficients",
        (*run, "--pairs", 0): "--pairs 0",
        (*run, "--data", tmp_path / "none.jsonl"): "none.jsonl",
        (*run, "--steps", "many"): "--steps",
        (
            "--run",
            GOLDEN,
            "--out",
            tmp_path / "out",
        ): "has no adapter",  # it holds model/, as a run with --full does
    }
    for argv, words in cases.items():
        code, said = in_process(*argv)
        assert code == 2 and words in said and "Traceback" not in said and said.count("\n") == 1, (
            said
        )
    assert not (tmp_path / "out").exists()
    for content in ("[1, 2", "[256]", "[true]", "[-1]", '{"a": 1}', "[1.0]"):
        (tmp_path / "mask.json").write_text(content)
        with pytest.raises(train.UserError, match="mask.json"):
            train.read_features(tmp_path / "mask.json", 256)


def test_promoted_tokens_against_whole_logits(tmp_path, monkeypatch):
    argv = ["--model", GOLDEN / "model", "--sae", GOLDEN / "sae", "--sae-id", SAE_ID, "--tokens", 3]
    monkeypatch.setattr(
        "sys.argv", ["promotes.py", *map(str, argv), "--out", str(tmp_path / "p.jsonl")]
    )
    monkeypatch.setitem(train.simpo.CHUNK_ELEMENTS, "cpu", 512 * 100)
    cli.run(promotes.main)
    golden = load()
    found = load_labels(tmp_path / "p.jsonl", golden.sae)
    assert found.kind == "promotes" and found.matched and len(found.explanations) == 256
    tokenizer = data.load_tokenizer(GOLDEN / "model")
    embedding, norm = golden.model.model.embed_tokens.weight, golden.model.model.norm.weight
    for k in (0, 101, 255):
        logits = embedding @ (golden.sae.W_dec[k] * (1 + norm))
        words = [
            tokenizer.decode([i], skip_special_tokens=False)
            for i in logits.argsort(descending=True)[:3].tolist()
        ]
        assert found.explanations[k] == "promotes " + ", ".join(map(repr, words))
