"""What is counted equals what separate, dense runs of every sequence count; tables say one thing in all their forms."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import GOLDEN, ROOT, SAE_ID, load, script
from packed import pack
from PIL import Image

import labels
import tiny
import train
from audit import features as ef
from audit import figures
from audit.features import CONTEXTS, SIDES, Agreement
from data import Pair
from runtime.sources import UserError, publish

S = train.Settings(device="cpu", dtype="float32", tokens_per_microbatch=70)


def some_pairs(n: int = 6, seed: int = 0) -> list[Pair]:
    """Ragged pairs over the golden vocabulary, a prompt of one token and an empty response among them."""
    g = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(0, 512, (length,), generator=g).tolist()

    sizes = torch.randint(1, 30, (n, 3), generator=g).tolist()
    return [Pair([0], tokens(5), []), *(Pair(*(tokens(length) for length in row)) for row in sizes)]


@pytest.fixture(scope="module")
def golden():
    return load(
        torch.float64
    )  # so that no feature sits on the edge of its threshold by rounding alone


@pytest.fixture(scope="module")
def counted(golden):
    """Pairs, masks of two categories, and what usage counts."""
    pairs = some_pairs()
    masks = torch.rand(2, golden.sae.d_sae, generator=torch.Generator().manual_seed(1)) < 0.3
    return pairs, masks, ef.usage(golden.steered, pairs, S, masks, progress=False)


@torch.no_grad()
def naive(golden, pairs, context: int):
    """Every sequence of a context run alone: dense v and f [N, F] of all positions but the first, and their places."""
    v, f, places, owners = [], [], [], []
    for owner, pair in enumerate(pairs):
        tokens = [*pair.prompt, *((), pair.chosen, pair.rejected)[context]]
        packed = pack([(tokens, [])])
        x = golden.model.blocks(golden.model.embed(packed.tokens), golden.model.plan(packed), 0, 2)
        v.append(golden.adapter(x)[1:])
        f.append(golden.sae.encode(x)[1:])
        places += range(1, len(tokens))
        owners += [owner] * (len(tokens) - 1)
    return torch.cat(v), torch.cat(f), torch.tensor(places), torch.tensor(owners)


@pytest.mark.parametrize("context", range(3), ids=CONTEXTS)
def test_counts_equal_separate_dense_runs(golden, counted, context):
    pairs, masks, counts = counted
    v, f, places, owners = naive(golden, pairs, context)
    assert counts.positions[context] == len(v) > 20
    assert (counts.place[context] == torch.bincount(places, minlength=counts.place.shape[1])).all()
    for side, value in enumerate((v, f)):
        active = value != 0
        assert 0 < active.sum() < active.numel()
        assert (counts.events[side, context] == active.sum(0)).all()
        torch.testing.assert_close(counts.sums[side, context], value.sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(counts.usage[side, context], active.double().mean(0))
        torch.testing.assert_close(counts.mean[side, context], value.mean(0), rtol=1e-5, atol=1e-6)
        l0 = active.sum(1)
        assert (counts.l0[side, context] == torch.bincount(l0, minlength=counts.l0.shape[-1])).all()
        place_l0 = torch.zeros_like(counts.place[context]).index_add_(0, places, l0)
        assert (counts.place_l0[side, context] == place_l0).all()
        for c, mask in enumerate([*masks, torch.ones(masks.shape[1], dtype=torch.bool)]):
            by_pair = torch.bincount(
                owners, weights=active[:, mask].sum(1).double(), minlength=len(pairs)
            )
            assert (counts.pair_events[:, side, context, c] == by_pair).all()
        for mask in masks:
            share = active[:, mask].sum() / active.sum()
            torch.testing.assert_close(
                ef.composition(counts, mask)[side, context].item(), share.item()
            )


@pytest.mark.parametrize("tokens", [1, 1000])
def test_packing_and_pieces_do_not_matter(golden, counted, tokens, monkeypatch):
    pairs, masks, counts = counted
    monkeypatch.setattr(ef, "STEER_ROWS", 3)
    monkeypatch.setitem(ef.STEER_ELEMENTS, "cpu", 7 * golden.sae.d_sae)
    other = ef.usage(
        golden.steered, pairs, train.replace(S, tokens_per_microbatch=tokens), masks, progress=False
    )
    for name, a, b in zip(counts._fields, counts, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


def test_relative_change_by_hand():
    share = torch.tensor([[0.2, 0.1, 0.3], [0.1, 0.2, 0.3]])  # adapter, SAE
    torch.testing.assert_close(ef.relative_change(share), torch.tensor([1.0, -0.5, 0.0]))


# --- intervals ----------------------------------------------------------------------------------------------


def test_bootstrap_is_over_pairs_and_seeded(counted):
    events = counted[2].pair_events
    drawn = ef.bootstrap(events, 20, seed=3)
    rng = np.random.default_rng(3)
    for b in range(20):
        chosen = events[rng.integers(len(events), size=len(events))].sum(0)  # [2, 3, C + 1]
        torch.testing.assert_close(
            drawn[b], (chosen[..., :-1] / chosen[..., -1:]).permute(2, 0, 1).double()
        )
    assert torch.equal(drawn, ef.bootstrap(events, 20, seed=3)) and not torch.equal(
        drawn, ef.bootstrap(events, 20, 4)
    )


def test_like_pairs_leave_no_doubt(counted):
    alike = counted[2].pair_events[1:2].expand(9, -1, -1, -1)
    drawn = ef.bootstrap(alike, 10, seed=0)
    torch.testing.assert_close(drawn, drawn[:1].expand_as(drawn))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(
        60
    ):  # the true share is 0.3 for the adapter, 0.2 for the SAE; pairs differ in size
        total = rng.integers(50, 500, size=(40, 2, 3))
        mine = rng.binomial(total, np.array([0.3, 0.2])[:, None])
        drawn = ef.bootstrap(torch.from_numpy(np.stack([mine, total], -1)), 200, seed=trial)
        low, high = ef._interval(ef.relative_change(drawn[:, 0]))
        covered += int(low[1] <= 0.5 <= high[1])
    assert 51 <= covered <= 60  # 57 expected


def test_label_noise_follows_the_confusion(counted):
    counts = counted[2]
    machine = np.zeros(counts.events.shape[-1], dtype=bool)
    machine[:40] = True
    point = ef.relative_change(ef.composition(counts, torch.from_numpy(machine)))
    everyone = Agreement(np.array([[10**7, 0], [0, 10**7]]), {})
    sure = ef.noisy_changes(counts, machine, everyone, 5, seed=0)
    torch.testing.assert_close(
        sure, point.expand(5, 3), rtol=1e-2, atol=1e-2
    )  # a person who always agrees
    nobody = Agreement(np.array([[1, 1], [1, 1]]), {k: bool(m) for k, m in enumerate(machine)})
    known = ef.noisy_changes(counts, machine, nobody, 5, seed=0)
    torch.testing.assert_close(
        known, point.expand(5, 3)
    )  # every feature judged: nothing is left to guess
    coin = Agreement(np.array([[10**7, 10**7], [10**7, 10**7]]), {})
    drawn = ef.noisy_changes(counts, machine, coin, 400, seed=0)
    assert (drawn.mean(0).abs() < 0.1).all() and (
        drawn.std(0) > 0.02
    ).all()  # labels without information: no change


def table(kind="fires", name="some", mask=None, explanations=None) -> labels.Labels:
    mask = np.arange(10) < 4 if mask is None else mask
    return labels.Labels(
        name, kind, explanations or {}, {"style": mask}, True, {}, ROOT / "x.jsonl", "0", "a judge"
    )


def test_human_labels_and_counts_of_them_say_the_same(tmp_path):
    rows, counts = tmp_path / "a.csv", tmp_path / "b.jsonl"
    rows.write_text(
        "feature,category,label\n0,style,yes\n1,style,true\n2,style,0\n7,style,false\n8,style,1\n"
    )
    cells = [(True, True, 2), (True, False, 1), (False, False, 1), (False, True, 1)]
    counts.write_text(
        "".join(
            json.dumps(dict(category="style", machine=m, human=h, count=n)) + "\n"
            for m, h, n in cells
        )
    )
    found = [
        ef.read_human(str(path), [table(), table("promotes", "other")]) for path in (rows, counts)
    ]
    assert [list(f) for f in found] == [
        [("some", "style")]
    ] * 2  # a person does not judge what a feature promotes
    first, second = (f["some", "style"] for f in found)
    assert first.confusion.tolist() == second.confusion.tolist() == [[1, 1], [1, 2]]
    assert first.known == {0: True, 1: True, 2: False, 7: False, 8: True} and second.known == {}
    assert first.mcc == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)


@pytest.mark.parametrize(
    "text, named",
    [
        ("feature,category,label\n0,honesty,yes\n", "row 1: category 'honesty'"),
        ("feature,category,label\n0,style,maybe\n", "row 1: label is 'maybe'"),
        (
            "feature,category,label\n0,style,yes\n0,style,no\n",
            "row 2: feature 0 is labelled both ways",
        ),
        ("feature,category,label\n99,style,yes\n", "feature 99"),
        ("category,machine,human,count\nstyle,1,1,many\n", "count is 'many'"),
    ],
)
def test_bad_human_rows_are_named(tmp_path, text, named):
    path = tmp_path / "human.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=named):
        ef.read_human(str(path), [table()])


# --- rows ---------------------------------------------------------------------------------------------------


def test_log_linear_fit():
    ranks = np.arange(1, 50)
    slope, intercept, r2 = ef.log_linear_fit(10 ** (-0.5 - 0.03 * ranks))
    assert (slope, intercept, r2) == (pytest.approx(-0.03), pytest.approx(-0.5), pytest.approx(1))
    noisy = np.sort(10 ** (-0.03 * ranks) * np.random.default_rng(0).lognormal(0, 1, len(ranks)))[
        ::-1
    ]
    expected = np.corrcoef(ranks, np.log10(noisy))[0, 1] ** 2
    assert ef.log_linear_fit(noisy)[2] == pytest.approx(expected) and expected < 0.99
    assert (
        np.isnan(ef.log_linear_fit(np.ones(5))).all()
        and np.isnan(ef.log_linear_fit(np.array([]))).all()
    )


def test_bins_lose_nothing(counted):
    counts = counted[2]
    difference = counts.mean[0] - counts.mean[1]
    for i, context in enumerate(CONTEXTS):
        rows = [row for row in ef.difference_rows(difference) if row["context"] == context]
        assert sum(row["features"] for row in rows) == difference.shape[1]
        assert (
            rows[0]["promoted"] == (difference[i] > 0).sum()
            and rows[0]["suppressed"] == (difference[i] < 0).sum()
        )
        for side, of in enumerate(SIDES):
            mine = [
                row
                for row in ef.l0_rows(counts, bins=7)
                if (row["of"], row["context"]) == (of, context)
            ]
            assert sum(row["positions"] for row in mine) == counts.positions[i]
            assert mine[0]["mean"] == pytest.approx(
                counts.events[side, i].sum().item() / counts.positions[i].item()
            )
            each = np.repeat(np.arange(counts.l0.shape[-1]), counts.l0[side, i])
            assert mine[0]["p50"] == np.percentile(each, 50, method="inverted_cdf")
            mine = [
                row
                for row in ef.place_rows(counts, bins=5)
                if (row["of"], row["context"]) == (of, context)
            ]
            assert sum(row["positions"] for row in mine) == counts.positions[i]
            total = sum(row["positions"] * row["mean_l0"] for row in mine)
            assert total == pytest.approx(counts.events[side, i].sum().item())


# --- the whole --------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert('x')</script> & \"$x^{2$ \u202e"


@pytest.fixture(scope="module")
def audited(tiny_run, tmp_path_factory):
    """A copy of the short run, audited with a label file that means harm, the usual two and a person's judgements."""
    folder = tmp_path_factory.mktemp("audit")
    out = shutil.copytree(tiny_run, folder / "run")
    _, rows = labels.read_rows(tiny.LABELS_DIR / "fires.jsonl")
    for row in rows:
        row["description"] = HOSTILE
    header = dict(kind="fires", sae="tiny", sae_id=tiny.SAE_ID, judge="<b>nobody</b>")
    labels.write_labels(folder / "hostile.jsonl", header, rows)
    human = [
        "feature,category,label",
        *(f"{k},style,{int(rows[k]['category'] == 'style')}" for k in range(60)),
    ]
    (folder / "human.csv").write_text("\n".join(human))
    files = (folder / "hostile.jsonl", tiny.LABELS_DIR / "promotes.jsonl")
    flags = ("--labels", *files, "--human", folder / "human.csv", "--pairs", 12, "--bootstrap", 40)
    result = script("-m", "audit", "--run", out, *flags)
    assert result.returncode == 0, result.stderr
    return out, result


TABLES = (
    "composition",
    "top_usage",
    "top_value",
    "value_difference",
    "usage_rank",
    "l0",
    "l0_by_position",
)


@pytest.mark.parametrize("name", TABLES)
def test_csv_json_and_png_hold_the_same_numbers(audited, name):
    folder = audited[0] / "eval"
    stored = json.loads((folder / f"{name}.json").read_text())
    with open(folder / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(stored["rows"]) > 0
    for text, row in zip(rows, stored["rows"], strict=True):
        for key, value in row.items():
            assert text[key] == ("" if value is None else str(value))
    digest = hashlib.sha256((folder / f"{name}.csv").read_bytes()).hexdigest()
    with Image.open(folder / f"{name}.png") as image:
        assert image.text["Source"] == f"{name}.csv sha256 {digest}" and image.size[0] > 600
    kinds = [(t["name"], t["kind"], t["judge"], t["matched"]) for t in stored["about"]["labels"]]
    assert kinds == [
        ("hostile", "fires", "<b>nobody</b>", True),
        ("promotes", "promotes", "the grammar", True),
    ]


def drawn(name: str, rows: list[dict], about: dict) -> set[float]:
    """Every number that the picture of a table shows as a height, a length or a place."""
    draw = (
        figures.top(name.removeprefix("top_"), "")
        if name.startswith("top_")
        else getattr(figures, name)
    )
    figure, found = draw(rows, about), set()
    for axes in figure.axes:
        for line in axes.lines:
            found |= {*np.ravel(line.get_xdata()).tolist(), *np.ravel(line.get_ydata()).tolist()}
        for patch in axes.patches:
            data = patch.get_data().values if hasattr(patch, "get_data") else [patch.get_width()]
            found |= set(np.ravel(data).tolist())
    return found


@pytest.mark.parametrize("name, keys", [
    ("composition", ("sae", "adapter", "change", "low", "high", "noisy_low", "noisy_high")),
    ("top_usage", ("usage",)),
    ("top_value", ("value",)),
    ("value_difference", ("features",)),
    ("usage_rank", ("rank", "usage")),
    ("l0", ("positions",)),
    ("l0_by_position", ("mean_l0",)),
])  # fmt: skip
def test_pictures_draw_the_rows(audited, name, keys):
    stored = json.loads((audited[0] / "eval" / f"{name}.json").read_text())
    found = drawn(name, stored["rows"], stored["about"])
    scale = 100 if name == "composition" else 1
    for row in stored["rows"]:
        for key in keys:
            assert row.get(key) is None or row[key] * scale in found, (key, row)


def test_features_parquet(audited):
    out, _ = audited
    stored = pq.read_table(out / "eval" / "features.parquet")
    assert stored["feature"].to_pylist() == list(range(tiny.WIDTH))
    assert stored["explanation_hostile"][5].as_py() == HOSTILE.strip()
    top = json.loads((out / "eval" / "top_usage.json").read_text())["rows"][0]
    usage = stored[f"{top['of']}_usage_{top['context'].replace('+', '_')}"].to_numpy()
    assert usage[top["feature"]] == top["usage"] == usage.max()
    for suffix in ("prompt", "prompt_chosen", "prompt_rejected"):
        difference = stored[f"difference_{suffix}"].to_numpy()
        np.testing.assert_array_equal(
            difference,
            stored[f"adapter_mean_{suffix}"].to_numpy() - stored[f"sae_mean_{suffix}"].to_numpy(),
        )
        for name, sign in (("promoted", -1), ("suppressed", 1)):
            rank = stored[f"{name}_rank_{suffix}"].to_numpy()
            assert sorted(rank) == list(range(1, tiny.WIDTH + 1))
            assert (np.diff(sign * difference[rank.argsort()]) >= 0).all()


def test_composition_agrees_with_the_features(audited):
    out, _ = audited
    stored = pq.read_table(out / "eval" / "features.parquet")
    rows = json.loads((out / "eval" / "composition.json").read_text())["rows"]
    assert len(rows) == 2 * 4 * 3
    for row in rows:
        suffix, mask = (
            row["context"].replace("+", "_"),
            stored[f"{row['labels']}:{row['category']}"].to_numpy(),
        )
        for of in SIDES:
            usage = stored[f"{of}_usage_{suffix}"].to_numpy()
            assert row[of] == pytest.approx(usage[mask].sum() / usage.sum())
        assert row["change"] == pytest.approx(row["adapter"] / row["sae"] - 1)
        assert row["low"] <= row["high"]
        judged = (row["labels"], row["category"]) == ("hostile", "style")
        assert ("noisy_low" in row) is judged
        if judged:
            assert (
                row["noisy_high"] - row["noisy_low"] > 0 and row["judged"] == 60 and row["mcc"] == 1
            )


def test_the_l0_of_the_audit_is_that_of_the_evaluation(tiny_run):
    """Over both responses' sequences, as train.evaluate averages it, once <bos> is put back."""
    from policy import eval_pairs, open_policy

    policy = open_policy(str(tiny_run), device="cpu")
    pairs, _ = eval_pairs(policy, limit=5)
    counts = ef.usage(policy.steered, pairs, policy.settings, progress=False)
    batch = train.Batch(pairs, range(len(pairs)))
    whole = train.evaluate(policy.steered, batch, policy.settings, progress=False)
    packed = pack([(pairs[0].prompt[:1], [])])
    bos = policy.steered(packed).l0.item()
    positions = counts.positions[1:].sum().item()
    mean = (counts.events[0, 1:].sum().item() + bos * 2 * len(pairs)) / (positions + 2 * len(pairs))
    assert mean == pytest.approx(whole["l0"], rel=1e-3)


def test_examples_are_the_first_pairs(audited):
    out, _ = audited
    found = json.loads((out / "eval" / "examples.json").read_text())
    assert len(found["pairs"]) == ef.EXAMPLES
    for pair in found["pairs"]:
        assert pair["prompt"]["l1"][0] == 0 and pair["prompt"]["tokens"][0] == "<bos>"
        for part in pair.values():
            assert len(part["tokens"]) == len(part["l1"]) == len(part["top"])
            for l1, top in zip(part["l1"], part["top"], strict=True):
                values = [abs(v) for _, v in top]
                assert values == sorted(values, reverse=True) and sum(values) <= l1 + 1e-3
                assert all(found["explanations"][str(k)] == HOSTILE.strip() for k, _ in top)


# --- mistakes and interruptions -----------------------------------------------------------------------------


def test_mistakes_end_in_a_sentence_and_leave_nothing(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    other = tmp_path / "other.jsonl"
    labels.write_labels(
        other, dict(kind="fires", sae="tiny", sae_id=tiny.SAE_ID, sae_sha256="0" * 64), []
    )
    result = script("-m", "audit", "--run", run, "--labels", other)
    assert result.returncode == 2 and "other.jsonl: belongs to the SAE" in result.stderr, (
        result.stderr
    )
    assert len(result.stderr.strip().splitlines()) == 1
    for flags, named in (
        (("--run", tmp_path / "nothing"), "nothing"),
        (("--run", "owner/name"), "--out"),
        (("--run", run, "--labels", other, "--assume-labels-match"), "belongs to the SAE"),
        (("--run", run, "--labels", other.parent / "absent.jsonl"), "absent.jsonl"),
        (("--run", run, "--human", tmp_path / "absent.csv"), "absent.csv"),
        (("--run", run, "--bootstrap", 0), "--bootstrap"),
        ((), "--run"),
    ):
        monkeypatch.setattr(sys, "argv", ["eval_features.py", *map(str, flags)])
        with pytest.raises(UserError, match=named):
            ef.main()
    assert not (run / "eval").exists() and not (run / "report.html").exists()


def test_killed_half_way_leaves_no_partial_table(tiny_run, tmp_path):
    """SIGKILL as soon as the first file is being written, under whatever name."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    command = [sys.executable, "-m", "audit", "--run", str(run), "--pairs", "4", "--bootstrap", "5"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while (
        time.time() < deadline and process.poll() is None and not any((run / "eval").rglob("*.csv"))
    ):
        time.sleep(0.01)
    assert process.poll() is None, "ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [p for p in (run / "eval").iterdir() if not p.name.startswith(".part-")] == []


def test_publish_changes_all_or_nothing(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(ZeroDivisionError), publish(tmp_path) as folder:
        (folder / "a.csv").write_text("new")
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.csv", "old")]
    with publish(tmp_path) as folder:
        (folder / "a.csv").write_text("new")
        (folder / "b.csv").write_text("new")
    assert sorted((p.name, p.read_text()) for p in tmp_path.iterdir()) == [
        ("a.csv", "new"),
        ("b.csv", "new"),
    ]


def test_an_adapter_folder_without_labels(tmp_path, monkeypatch):
    """The authors' format, no run around it: usage without composition, into --out."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: path.write_bytes(b"")
    )  # drawing is tested above
    g = GOLDEN
    flags = (
        "--run",
        g / "adapter_mid",
        "--model",
        g / "model",
        "--sae",
        g / "sae",
        "--sae-id",
        SAE_ID,
    )
    flags += ("--data", g / "dataset", "--pairs", 3, "--device", "cpu", "--out", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["eval_features.py", *map(str, flags)])
    ef.main()
    files = {path.stem for path in (tmp_path / "out" / "eval").iterdir()}
    assert files == {*TABLES, "features", "examples"} - {"composition"}
    rows = json.loads((tmp_path / "out" / "eval" / "top_usage.json").read_text())["rows"]
    assert [row["rank"] for row in rows] == [*range(1, ef.TOP + 1)] * 6 and rows[0][
        "explanation"
    ] == ""
    assert "Table 2" not in (tmp_path / "out" / "report.html").read_text()
