"""The choices measure is complete and charges whom it says; planting trains, asks, counts and
resumes.
"""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import load, script

import data
import simpo
from audit import choices as ch
from audit.ranking import NUMBERS
from data import Pair
from experiments import fitting, planted, planting
from experiments import planted_tables as tables
from fsrl import Unsteered
from labels import load_labels
from policy import DEFAULTS, Policy
from runtime.device import Device
from tiny import LABELS_DIR, WIDTH, world

RUN = DEFAULTS._replace(tokens_per_microbatch=70)


def golden_policy() -> Policy:
    golden = load()
    tokenizer = data.load_tokenizer(golden.model.folder)
    steered = golden.steered.requires_grad_(False)
    return Policy(steered, tokenizer, Device("cpu", torch.float32), RUN, "golden")


def golden_pairs(tokenizer, n: int = 5) -> list[Pair]:
    """Ragged answers in chat markup, an empty one among them."""
    markup = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("model\n", "\n")]
    start, end, eos = map(tokenizer.token_to_id, ("<start_of_turn>", "<end_of_turn>", "<eos>"))
    g = torch.Generator().manual_seed(0)

    def words(n):
        return torch.randint(10, 512, (n,), generator=g).tolist()

    def answer(n):
        return [start, *markup[0], *words(n), end, *markup[1], eos]

    return [Pair([2, *words(3 + i)], answer(4 * i), answer(7)) for i in range(n)]


def test_shares_sum_to_the_change_of_the_gap():
    """Under any partition; and the change is what scoring base model and policy apart gives."""
    policy = golden_policy()
    pairs, V = golden_pairs(policy.tokenizer), policy.base.config.vocab_size
    g = torch.Generator().manual_seed(1)
    names = ("a", "b", ch.END, ch.REST)
    partitions = [ch.Classes(names, torch.randint(0, 4, (V,), generator=g)) for _ in range(2)]
    packed = data.pack_pairs(pairs)
    gaps = []
    for model in (Unsteered(policy.base), policy.steered):
        losses = simpo.score(model, packed, RUN.beta, RUN.gamma_ratio).losses
        gaps.append(losses.logp_chosen - losses.logp_rejected)
    change = gaps[1] - gaps[0]
    assert change.abs().max() > 0.01  # the adapter does something
    for found in ch.choices(policy, pairs, partitions):
        torch.testing.assert_close(found.change, change, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.shares.sum(1), found.change, atol=1e-9, rtol=0)


def test_a_choice_against_the_rest_belongs_to_the_category():
    p0 = torch.tensor([[0.3, 0.0, 0.7], [0.3, 0.0, 0.7], [0.3, 0.0, 0.7]], dtype=torch.float64)
    p1 = torch.tensor([[0.8, 0.0, 0.2], [0.8, 0.0, 0.2], [0.3, 0.0, 0.7]], dtype=torch.float64)
    # A token of the rest, then one of class 0, at a place where class 0 became likelier; then a
    # choice within the rest.
    change = torch.tensor([math.log(0.2 / 0.7), math.log(0.8 / 0.3), -1.5], dtype=torch.float64)
    terms = ch.token_shares(change, p0, p1, torch.tensor([2, 0, 2]))
    expected = torch.tensor(
        [[change[0], 0, 0], [change[1], 0, 0], [0, 0, -1.5]], dtype=torch.float64
    )
    torch.testing.assert_close(terms, expected)


def test_a_choice_between_two_categories_and_the_rest_is_shared_by_mass():
    p0 = torch.tensor([[0.1, 0.1, 0.8]], dtype=torch.float64)
    p1 = torch.tensor([[0.4, 0.2, 0.4]], dtype=torch.float64)
    terms = ch.token_shares(
        torch.tensor([math.log(0.5)], dtype=torch.float64), p0, p1, torch.tensor([2])
    )
    torch.testing.assert_close(
        terms[0] / math.log(0.5), torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64)
    )


def test_sign_flip_is_the_permutation_test():
    g = torch.Generator().manual_seed(0)
    null = torch.randn(40, 400, generator=g, dtype=torch.float64)
    p = ch.sign_flip(null, 999)
    assert abs((p <= 0.1).double().mean() - 0.1) < 0.05  # uniform where there is nothing
    assert ch.sign_flip(torch.full((20, 1), 0.1, dtype=torch.float64), 999).item() == pytest.approx(
        0.001, abs=1e-9
    )
    assert ch.sign_flip(torch.full((20, 1), -0.1, dtype=torch.float64), 999).item() == 1.0


# --- planting -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start():
    return fitting.tiny_policy()


def test_tokens_are_those_that_training_reads(start, tmp_path):
    tokenizer = start.tokenizer
    some = world.pairs({"style": 1, "honesty": 1}, 20, 3)
    rows = "".join(json.dumps(p.row(str(i))) + "\n" for i, p in enumerate(some))
    (tmp_path / "rows.jsonl").write_text(rows)
    pairs, names = planted.tokenise(tokenizer, some)
    assert pairs == data.load_pairs(str(tmp_path / "rows.jsonl"), tokenizer)
    assert [len(n) for n in names] == [len(p.chosen) + len(p.rejected) for p in pairs]


@pytest.fixture(scope="module")
def tables_of(start):
    paths = [LABELS_DIR / f"{kind}.jsonl" for kind in planted.KINDS]
    return [load_labels(path, start.steered.sae) for path in paths]


@pytest.fixture(scope="module")
def bold(start, tables_of, tmp_path_factory):
    """A policy trained for bold type, and fresh pairs of the same cause."""
    folder = tmp_path_factory.mktemp("policies")
    given = start, planting.Recipe("bold", "bold"), 7, 128, folder, tables_of
    policy, seconds = planting.plant(*given)
    again, same = planting.plant(*given)  # read back
    assert torch.equal(again.steered.adapter.weight, policy.steered.adapter.weight)
    assert seconds == same > 0
    return policy, *planted.tokenise(policy.tokenizer, world.pairs("bold", 48, 700_000))


def test_the_planted_cause_is_named(bold, tables_of):
    policy, pairs, names = bold
    ground = planted.Ground(planted.Settings(), 7, policy, tables_of)
    answers = planted.on_pairs(policy, pairs, ground.partitions(pairs, names, fine=True))
    for kind, expected in (
        ("fires", "style"),
        ("true spans", "style"),
        ("fires, explanations", "bold"),
    ):
        for measure in ("choices", "shift"):
            assert tables.named(f"{measure}|{kind}", answers[f"{measure}|{kind}"]) == expected


def test_what_a_policy_does_is_read_from_its_answers(bold):
    """Swapped answers, every one of them: bold type and nothing else came about."""
    policy, *_ = bold
    drawn = world.pairs("bold", 24, 3)
    pairs, _ = planted.tokenise(policy.tokenizer, drawn)
    answers = [p._replace(chosen=p.rejected, rejected=p.chosen) for p in pairs]  # base, policy
    found = planted.does(policy, [pair.chosen.question for pair in drawn], answers)
    assert found["bold"].p_value <= 0.01 and found["bold"].rates["True"] == [0.0, 1.0]
    others = {name: of for name, of in found.items() if name != "bold"}
    assert all(of.p_value > 0.01 for of in others.values())


def test_recipes_make_policies_that_disagree_with_their_data(start, tables_of, tmp_path):
    """Rate 0 steers nothing; silenced features never steer; swapped pairs are every other one."""
    still = planting.Recipe("still", "style", trained=False)
    policy, seconds = planting.plant(start, still, 0, 32, tmp_path, tables_of)
    assert seconds == 0 and policy.steered.adapter.weight.abs().max() < 1e-8
    silenced = planting.Recipe("silenced", "style", silenced=True)
    policy, _ = planting.plant(start, silenced, 0, 32, tmp_path, tables_of)
    mask = np.any([t.categories["style"] for t in tables_of], axis=0)
    weight = policy.steered.adapter.weight[torch.from_numpy(mask)]
    assert mask.any() and not weight.any() and policy.steered.adapter.weight.any()
    pairs = [Pair([i], [1], [2]) for i in range(10)]
    for share, swapped in ((0.0, []), (0.5, [1, 3, 5, 7, 9]), (0.1, [9])):
        found = planting.swap(pairs, share)
        assert [i for i, pair in enumerate(found) if pair.chosen == [2]] == swapped


def test_nothing_is_named_when_the_preference_is_undone(bold):
    """Half the pairs swapped: the same policy earned nothing on them."""
    policy, pairs, _ = bold
    masks = load_labels(LABELS_DIR / "fires.jsonl", policy.steered.sae).categories
    masks = {c: m for c, m in masks.items() if c not in planted.NOT_OF_INTEREST}
    classes = ch.classes(policy, pairs, masks)
    mixed = [Pair(p.prompt, p.rejected, p.chosen) if i % 2 else p for i, p in enumerate(pairs)]
    (before,), (after,) = (ch.choices(policy, some, [classes]) for some in (pairs, mixed))
    torch.testing.assert_close(after.shares[1::2], -before.shares[1::2], atol=1e-5, rtol=1e-4)
    assert before.named() == "style" and after.named() is None


def test_classes_follow_the_labels_they_are_given(bold):
    """Labels of other features make another partition, and markup belongs to no category."""
    policy, pairs, _ = bold
    mask = np.zeros(WIDTH, dtype=bool)
    mask[:512] = True
    found = [ch.classes(policy, pairs, {"it": m}).of_token for m in (mask, ~mask)]
    end, start = (policy.tokenizer.token_to_id(t) for t in ("<end_of_turn>", "<start_of_turn>"))
    assert not torch.equal(*found)
    for of_token in found:
        assert of_token[end] == 1 and of_token[start] == 2


# --- many runs, counted ---------------------------------------------------------------------------


def test_rates_and_ranks():
    assert tables.wilson(24, 24) == pytest.approx((0.8620, 1.0), abs=1e-3)
    assert tables.wilson(1, 10) == pytest.approx((0.0179, 0.4042), abs=1e-3)
    assert tables.spearman([1, 2, 2, 3], [1, 5, 3, 9]) == pytest.approx(0.9487, abs=1e-4)
    assert tables.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_runs_are_written_counted_and_not_made_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(planted, "ANSWER_TOKENS", 8)
    small = dict(pairs=32, eval_pairs=8, other_pairs=2, loss_pairs=2, prompts=2, steps=1)
    s = planted.Settings(seeds=1, policies=("bold",), **small, out=str(tmp_path))
    planted.run(s)
    rows = planted.run(s)  # as they are read back
    planted.write(rows, s, "a command")
    runs = (tmp_path / "runs.jsonl").read_text()
    assert [json.loads(line) for line in runs.splitlines()] == [row._asdict() for row in rows]
    assert rows[0].policy == "bold"
    measures = {key.split("|")[0] for key in tables.keys_of(rows)}
    assert measures == {
        *("composition", "composition, pooled", "ablation", "ablation - matched"),
        *("attribution", "attribution per feature", "choices", "data alone", "behaviour"),
        *("shift", "shift, share of KL", "shift, mass", "shift - null"),
    }
    others = {cause for cause in world.CAUSES if cause != "bold"}
    sets = {"own", "base's texts", "policy's texts", "answers", *others}
    assert set(rows[0].answers) == sets and {"v · gradient", "random"} <= rows[0].kept.keys()
    in_answers = rows[0].kept_in_answers
    assert set(in_answers) == set(planted.IN_ANSWERS)
    assert all(len(in_answers[name]) == len(NUMBERS) for name in planted.IN_ANSWERS)
    assert "a command" in (tmp_path / "tables.md").read_text()
    assert planted.run(s) == rows and (tmp_path / "runs.jsonl").read_text() == runs

    # A row made when its seed was not among --costly-seeds is made again.
    text = json.dumps(rows[0]._replace(kept={}, kept_in_answers={})._asdict()) + "\n"
    (tmp_path / "runs.jsonl").write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(planted, "Runner", lambda _: lambda recipe, seed: rows[0])
        assert planted.run(replace(s, costly_seeds=0))[0].kept == {}
        assert planted.run(s) == rows

    other = script("-m", "experiments.planted", "--out", tmp_path)
    assert other.returncode == 2 and "other settings" in other.stderr
    assert "Traceback" not in other.stderr


def audited(policy, seed=0, does=None, **answers) -> tables.Audited:
    """A made-up row; answers: measure -> answer on its own pairs, under labels of kind fires."""
    sets = {"own": {f"{name}|fires": answer for name, answer in answers.items()}}
    numbers = (0.0, 1.0, 1.0)
    rest = (does or {}, [1.0, 1.0], {}, {}, 1.0, 1.0)
    return tables.Audited(policy, policy, seed, {}, *numbers, sets, *rest)


STRONG, WEAK = (1.0, 9.0), (0.0, 0.1)


def test_counting():
    """A made-up study: one measure that is always right, one that names style whatever was
    planted.
    """

    def row(cause, truth):
        right = {c: STRONG if c == truth else WEAK for c in ("style", "alignment")}
        return audited(cause, good=right, bad=dict(style=STRONG, alignment=WEAK))

    rows = [row(cause, category) for cause, category in tables.PLANTED.items()]
    found = tables.summarise([*rows, row("none", None)])
    good, bad = found["good|fires"], found["bad|fires"]
    own = "own cause"
    assert all(good["first"] + good["category"] + good["right"][own]) and not any(good["none"])
    assert sum(bad["first"]) == sum(bad["right"][own]) == 3 and bad["none"] == [True]
    assert bad["wrong"]["honesty"] == {"style": 1} and "style" not in bad["wrong"]


def test_audit_sets_are_told_apart_by_what_they_prefer():
    kinds = {name: tables.set_kind(name, "bold") for name in ("own", "style", "honesty", "none")}
    expected = ("own cause", "same category", "other category", "no category")
    assert tuple(kinds.values()) == expected
    assert tables.set_kind("answers", "bold") == "answers"
    assert set(expected) < set(tables.SETS)


def test_a_measure_is_judged_by_what_the_policy_does():
    """A policy that changed both categories, alignment most; and one that changed nothing."""
    does = dict(bold=[0.3, 0.001, {}], honesty=[0.5, 0.001, {}], layout=[0.9, 0.2, {}])
    assert tables.done(audited("bold", does=does)) == ["alignment", "style"]
    said = {c: STRONG if c == "style" else WEAK for c in ("style", "alignment")}
    nothing = dict(style=WEAK, alignment=WEAK)
    rows = [audited("bold", does=does, good=said), audited("none", good=nothing)]
    found = tables.summarise(rows)["good|fires"]
    assert found["most"] == [False, True] and found["agrees"] == [True, True]


def test_shift_is_said_from_a_size_on():
    least = tables.LEAST["shift"]
    for low, expected in ((least, "style"), (0.9 * least, None)):
        answer = dict(style=(1.0, low), alignment=(0.5, 0.4), rest=(2.0, 1.0))
        assert tables.named("shift|fires", answer) == expected


def test_scores_follow_the_planted_weight():
    weights = {
        "style": 1.0,
        "3 style : 1 honesty": 0.75,
        "1 style : 3 honesty": 0.25,
        "honesty": 0.0,
    }
    assert {cause: tables.weight_of_style(cause) for cause in weights} == weights
    assert tables.weight_of_style("bold") is None
    rows = [
        audited(cause, good=dict(style=(weight, 9.0), alignment=(0.1, 9.0)))
        for cause, weight in weights.items()
    ]
    assert tables.summarise(rows)["good|fires"]["spearman"] == pytest.approx(1)


def test_composition_is_contrasted_with_the_policies_that_learned_nothing():
    """The mean of three null policies is taken off; of a null policy, the mean of the others."""
    nulls = [audited("none", i, composition=dict(style=(float(i), 5.0))) for i in range(4)]
    policy = audited("style", composition=dict(style=(9.5, 5.0)))
    *less, of_policy = tables.contrasted([*nulls, policy])
    change, z = of_policy.answers["own"]["composition - null|fires"]["style"]
    deviation = np.std([0, 1, 2, 3], ddof=1) * math.sqrt(1 + 1 / 4)
    assert change == pytest.approx(8.0) and z == pytest.approx(8.0 / deviation)
    assert less[0].answers["own"]["composition - null|fires"]["style"][0] == pytest.approx(0 - 2.0)
    assert tables.contrasted([*nulls[:2], policy]) == [*nulls[:2], policy]
    assert tables.tally(Counter(style=1, nothing=3)) == "nothing 3, style 1"


def test_the_smallest_p_value_is_one_over_the_ways_to_flip():
    """Draws that repeat the signs as they are count as ties, in whatever order they were added
    up.
    """
    for seed in range(40):
        shares = (
            torch.rand(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            + 0.1
        )
        assert ch.sign_flip(shares).min() > 0.8 / 32
