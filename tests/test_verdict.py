"""The sentences that lead the report, on policies whose cause was planted (made by
golden/verdicts/make.py): what was learned, how sure, by which features, what would change that.
"""

import copy
import json

import pytest
import torch
from conftest import GOLDEN
from test_audit_lead import STYLE, behaviour, shift

from audit.choices import END, LEVEL, REST, Choices, Classes, data_alone, data_p_values
from audit.verdict import nats, percent, verdict
from data import Pair

# Cause -> the category that realises it.
PLANTED = {
    "style": "style",
    "bullets": "style",
    "bold": "style",
    "honesty": "alignment",
    "refusal": "alignment",
    "anti-flattery": "alignment",
}


def tables(cause: str) -> dict[str, dict]:
    return json.loads((GOLDEN / "verdicts" / f"{cause}.json").read_text())


def lead(found: dict[str, dict], tokens: str) -> dict:
    rows = found["choices"]["rows"]
    return next(row for row in rows if row["kind"] == "fires" and row["tokens"] == tokens)


@pytest.mark.parametrize("cause", PLANTED)
def test_a_planted_cause_is_what_was_learned(cause):
    found = tables(cause)
    category = PLANTED[cause]
    row, rest = lead(found, category), lead(found, REST)
    said = verdict(found)
    what, sure, features, change = (answer.text for answer in said.answers)
    mostly = "Most of what it learned has no category here; of the categories,"
    expected = f"{mostly} {category} is first." if rest["share"] > row["share"] else None
    assert said.headline == (expected or f"It learned {category}.")

    part, low, high = (percent(row[f"part_{end}"]) for end in ("of_change", "low", "high"))
    assert f"tokens of {category} earned {part} ({low} to {high})" in what
    assert what.startswith("Training widened the gap by ")
    assert "The gap is how much likelier the model finds the chosen response" in what
    assert "the rest (tokens of no category)" in what and "the end of the response" in what

    assert sure.startswith(f"{category.capitalize()} earned {nats(row['share'])} nats per token")
    assert f"above its limit, here {nats(row['chance'])} (one-sided p = " in sure
    assert "The pairs alone, without a policy, would name" in sure
    assert "Labels of what features promote (promotes) name" in sure

    top = min(found["attribution_features"]["rows"], key=lambda row: row["share"])
    assert f"feature {top['feature']} (" in features and "integrated gradients" in features
    assert "The best single vector" in features
    assert change.startswith("A second seed, or pairs from another source")
    assert change.endswith("A person who finds the features' labels (given by the grammar) wrong.")
    assert "of the categories, attribution gives most to features of" in said.differences


def test_a_gap_that_may_not_have_widened_was_learned_by_nobody():
    found = tables("style")
    found["choices"]["about"] |= dict(change_low=-0.1)
    said = verdict(found)
    assert said.headline == "Training was not shown to widen the gap between chosen and rejected."
    assert "Training was not shown to widen the gap" in said.answer("What was learned?")
    none = "None: there is no certain gain that features could have earned."
    assert said.answer("By which features?") == none


def test_a_policy_that_learned_nothing_is_said_to_have_learned_nothing():
    said = verdict(tables("none"))
    assert said.headline == "It learned nothing that these labels can name."
    what, sure, features, change = (answer.text for answer in said.answers)
    assert what.startswith("Training did not widen the gap: it changed by ")
    assert "the category with the largest share, earned" in sure
    assert "would name no category" in sure and "name nothing too" in sure
    assert features == "None: there is no gain that features could have earned."
    assert change.startswith("A label file with more categories than alignment and style")
    assert said.differences == ""


WHOLE = {  # what a reader is told: headline, then the answers
    "style": [
        "It learned style.",
        "Training widened the gap by 1.16 nats per token (95 % over pairs: 1.10 to 1.23). "
        "The gap is how much likelier the model finds the chosen response than the "
        "rejected one, in mean log-probability per token. Of that, tokens of style earned "
        "73 % (68 % to 80 %); the end of the response (<end_of_turn>) 20 %, the rest "
        "(tokens of no category) 13 %, alignment -6 % (they narrowed it).",
        "Style earned 0.842 nats per token over 64 pairs; with chosen and rejected "
        "swapped at random, one draw in 100 takes some kind of tokens above its "
        "limit, here 0.324 (one-sided p = 0.0004, of the same test). "
        "The pairs alone, without a policy, would name style: chosen responses "
        "have more tokens of it (+23.9 points of all their tokens). So the name could be "
        "read off the pairs; the size of the share could not. Labels of what features "
        "promote (promotes) name style too (51 %).",
        "Many features share the gain; of the lower loss, integrated gradients give most "
        "to feature 509 (fires on the start of the answer's turn and the end of the …) 2 "
        "%; feature 807 (fires on the start of the answer's turn and the start of …) 1 %; "
        "feature 10 (fires on the line that announces a list and the dashes and …) 1 %. "
        "The best single vector, added at every position, regains 3 % of the gain; the "
        "rest comes from reading the text.",
        "A second seed, or pairs from another source, under which another category comes "
        "first. Pairs that do not prefer style, if the gap is then earned elsewhere. A "
        "person who finds the features' labels (given by the grammar) wrong.",
    ],
    "honesty": [
        "It learned alignment.",
        "Training widened the gap by 0.083 nats per token (95 % over pairs: 0.065 to "
        "0.101). The gap is how much likelier the model finds the chosen response than "
        "the rejected one, in mean log-probability per token. Of that, tokens of "
        "alignment earned 108 % (101 % to 116 %); the end of the response (<end_of_turn>) "
        "0 %, style -1 % (they narrowed it), the rest (tokens of no category) -6 % (they "
        "narrowed it).",
        "Alignment earned 0.090 nats per token over 64 pairs; with chosen and rejected "
        "swapped at random, one draw in 100 takes some kind of tokens above its "
        "limit, here 0.038 (one-sided p = 0.0004, of the same test). "
        "The pairs alone, without a policy, would name no category. Labels of "
        "what features promote (promotes) name alignment too (88 %).",
        "Many features share the gain; of the lower loss, integrated gradients give most "
        "to feature 177 (fires on flattery of whoever asks and refusing to help …) 2 %; "
        "feature 475 (fires on the end of the person's turn: '\\n', ' problem', …) 2 %; "
        "feature 637 (fires on the predicate of a fact and the thing that a fact …) 2 %. "
        "The best single vector, added at every position, regains 1 % of the gain; the "
        "rest comes from reading the text.",
        "A second seed, or pairs from another source, under which another category comes "
        "first. A person who finds the features' labels (given by the grammar) wrong.",
    ],
    "none": [
        "It learned nothing that these labels can name.",
        "Training did not widen the gap: it changed by -0.003 nats per token (95 % over "
        "pairs: -0.005 to -0.001). The gap is how much likelier the model finds the "
        "chosen response than the rejected one, in mean log-probability per token.",
        "Alignment, the category with the largest share, earned 0.000 nats per token over "
        "64 pairs; with chosen and rejected swapped at random, one draw in 100 takes "
        "some kind of tokens above its limit, here 0.004 (one-sided p = 1, of the same test). "
        "The pairs alone, without a policy, would name "
        "no category. Labels of what features promote (promotes) name nothing too.",
        "None: there is no gain that features could have earned.",
        "A label file with more categories than alignment and style; and pairs that "
        "prefer something else, because a policy may have learned what these pairs do not "
        "show.",
    ],
}


@pytest.mark.parametrize("cause", WHOLE)
def test_what_a_reader_is_told_whole(cause):
    said = verdict(tables(cause))
    assert [said.headline, *(answer.text for answer in said.answers)] == WHOLE[cause]
    assert [answer.question for answer in said.answers] == [
        "What was learned?",
        "How sure is that?",
        "By which features?",
        "What would change this reading?",
    ]


def test_measures_that_disagree_are_said_to():
    found = tables("style")
    for row in found["choices"]["rows"]:
        if row["kind"] == "promotes":
            row["named"] = row["tokens"] == "alignment"
        row["data_named"] = row["tokens"] == "alignment"
    _, sure, _, change = (answer.text for answer in verdict(found).answers)
    assert "would name alignment" in sure and "The policy does not repeat that." in sure
    assert "name alignment (" in sure and "instead: under them a token's kind is read at" in sure
    assert "A reason to trust the other label file more than this one." in change
    assert "Pairs that do not prefer style" not in change


def test_the_rest_comes_before_the_name():
    found = tables("style")
    for row in found["choices"]["rows"]:
        row["share"] *= {REST: 10, END: 1}.get(row["tokens"], 0.1)
        row["part_of_change"] *= {REST: 10, END: 1}.get(row["tokens"], 0.1)
    said = verdict(found)
    assert said.headline.startswith("Most of what it learned has no category here; of the")
    assert "A category for the rest, whose tokens earned" in said.answers[-1].text


def test_what_it_does_comes_first():
    found = tables("style")
    found |= dict(behaviour=behaviour(style=STYLE), shift=shift("style"))
    first, learned, *_ = verdict(found).answers
    assert first.question == "What does it do differently?" and "more tokens of style" in first.text
    assert learned.question == "What was learned?"


def test_only_what_was_measured_is_said():
    found = tables("style")
    alone = verdict({"choices": found["choices"]})
    assert alone.answers[2].text.startswith("Not measured") and alone.differences == ""
    assert verdict({name: found[name] for name in ("topk", "static")}) is None
    old = copy.deepcopy(found["choices"])
    del old["about"]["change"]
    assert verdict({"choices": old}) is None


def test_foreign_text_cannot_turn_a_sentence_round():
    found = tables("honesty")
    found["attribution_features"]["rows"][0]["explanation"] = "fires on \u202e names\nand"
    assert "(fires on \\u202e names and)" in verdict(found).answers[2].text


def test_numbers_have_no_false_digits():
    assert nats(-1.1e-10) == "0.000" and nats(-0.25) == "-0.250" and nats(12.345) == "12.35"
    assert percent(-0.001) == "0 %" and percent(None) == "–"
    assert percent(0.0449, digits=1, sign=True) == "+4.5 %"


# --- what stands beside the measure ---------------------------------------------------------------


def test_the_pairs_alone():
    """Shares of tokens of each class, chosen less rejected, pair by pair."""
    of_token = torch.tensor([2, 0, 0, 1, 2])
    partition = Classes(("style", END, REST), of_token)
    pairs = [Pair([4], [1, 2, 3, 4], [3, 3]), Pair([4, 4], [1], [2])]
    expected = [[0.5, 0.25 - 1, 0.25], [0.0, 0.0, 0.0]]
    assert torch.allclose(data_alone(pairs, partition), torch.tensor(expected).double())


def test_chance_is_the_bound_of_the_one_sided_test():
    g = torch.Generator().manual_seed(0)
    names = ("style", "alignment", END, REST)
    for strength in (0.0, 0.1, 0.3, 0.5, 1.0):
        shares = torch.randn(60, 4, generator=g, dtype=torch.float64)
        shares[:, 0] += strength
        found = Choices(names, shares, shares.sum(1))
        beyond = shares.mean(0) > found.chance()
        assert beyond.tolist() == (found.p_values() <= LEVEL).tolist()
        named = "style" if bool(beyond[0]) else None
        assert found.named() in (named, "alignment")


def test_a_difference_in_the_pairs_is_found_in_either_direction():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(80, 3, generator=g, dtype=torch.float64)
    more, fewer, nothing = data_p_values(noise + torch.tensor([1.0, -1.0, 0.0])).tolist()
    assert max(more, fewer) <= LEVEL < nothing
