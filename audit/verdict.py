"""What a run learned, in sentences made from the tables of OUT/eval/.

report.html, the card and the terminal lead with the same ones: what the policy does differently
(lead.py), what was learned, how sure that is, by which features, what would change the reading, and
why measures differ where they do. A sentence stands only where a number supports it.
"""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from audit.choices import END, REST
from audit.lead import lead as differently
from eval_ablation import of_usage
from runtime.messages import brief

Rows = Sequence[dict]

DOES = "What does it do differently?"
FEATURES = 3  # that are named
SPREAD = 0.05  # of the gain: no feature stands out that earned less
MOST = 0.9  # of the policy's gain: how few features keep so much of it
TOKENS = {
    END: "the end of the response (<end_of_turn>)",
    REST: "the rest (tokens of no category)",
}
KIND = {  # of what tells tokens apart
    "fires": "Labels of what features fire on",
    "promotes": "Labels of what features promote",
    "rules": "Token rules",
}
WHY = {  # it may name another category than labels of kind fires
    "promotes": "under them a token's kind is read at the position that predicts it",
    "rules": "they go by the text alone",
}
GAP = (
    "The gap is how much likelier the model finds the chosen response than the rejected one, in "
    "mean log-probability per token."
)
ASKED = (
    "The measures ask different questions. Choices, above, asks which kinds of tokens became "
    "likelier. Attribution asks at which features' steering the loss fell, and a feature that is "
    "turned up acts on the tokens that come after the one it stands at. Ablation asks what is lost "
    "without a category's features while all others stay, so that features which stand in for "
    "each other hide each other."
)


class Answer(NamedTuple):
    question: str
    text: str


class Verdict(NamedTuple):
    headline: str
    answers: list[Answer]
    differences: str  # between the measures

    @property
    def does(self) -> Answer | None:
        """The one that is about the policy and not about the given pairs, where it was measured."""
        return self.answers[0] if self.answers[0].question == DOES else None

    def answer(self, question: str) -> str:
        return next(text for asked, text in self.answers if asked == question)


class Reading(NamedTuple):
    """What choices says under the label file that leads."""

    labels: str
    rows: list[dict]  # a row for each kind of tokens
    named: dict | None  # the row of the category that it names

    @property
    def rest(self) -> dict:
        return next(row for row in self.rows if row["tokens"] == REST)

    @property
    def mostly_rest(self) -> bool:
        return self.named is not None and self.rest["share"] > self.named["share"]

    @property
    def data(self) -> str | None:
        """The category that the pairs alone would name."""
        return next((row["tokens"] for row in self.rows if row.get("data_named")), None)


def readings(rows: Rows) -> list[Reading]:
    """One for each label file, the leading one first: of kind "fires", by what experiments/
    PLANTED.md found, and among these the one whose category has the largest share.
    """
    found = []
    for labels in dict.fromkeys(row["labels"] for row in rows):
        of = [row for row in rows if row["labels"] == labels]
        found.append(Reading(labels, of, next((row for row in of if row["named"]), None)))

    def place(reading: Reading) -> tuple:
        fires = reading.rows[0].get("kind", "fires") == "fires"
        return not fires, -(reading.named["share"] if reading.named else 0.0)

    return sorted(found, key=place)


def verdict(tables: dict[str, dict]) -> Verdict | None:
    """tables: name -> about, rows. None where choices was not measured."""
    choices = tables.get("choices", {})
    if not choices.get("rows") or "change" not in choices["about"]:
        return None
    lead, *others = readings(choices["rows"])
    rows = {name: table.get("rows", []) for name, table in tables.items()}
    does = " ".join(differently(tables))
    answers = [Answer(DOES, does)] if does else []
    answers += [
        Answer("What was learned?", learned(lead, choices["about"])),
        Answer("How sure is that?", sure(lead, others, choices["about"]["pairs"])),
        Answer("By which features?", carried(lead, choices["about"], tables)),
        Answer("What would change this reading?", changing(lead, others, choices["about"])),
    ]
    return Verdict(headline(lead, choices["about"]), answers, differences(lead, rows))


def headline(lead: Reading, about: dict) -> str:
    if lead.named is None:
        return "It learned nothing that these labels can name."
    if about["change_low"] <= 0:
        return "Training was not shown to widen the gap between chosen and rejected."
    name = lead.named["tokens"]
    if lead.mostly_rest:
        return f"Most of what it learned has no category here; of the categories, {name} is first."
    return f"It learned {name}."


def learned(lead: Reading, about: dict) -> str:
    change, low, high = (about[key] for key in ("change", "change_low", "change_high"))
    interval = f"{nats(change)} nats per token (95 % over pairs: {nats(low)} to {nats(high)})"
    if low <= 0:
        how = "did not" if high <= 0 else "was not shown to"
        return f"Training {how} widen the gap: it changed by {interval}. {GAP}"
    text = f"Training widened the gap by {interval}. {GAP}"
    shown = sorted(lead.rows, key=lambda row: -row["share"])
    if lead.named:
        shown.remove(lead.named)
        whole, *ends = (percent(lead.named[f"part_{end}"]) for end in ("of_change", "low", "high"))
        earned = f"tokens of {lead.named['tokens']} earned {whole} ({ends[0]} to {ends[1]})"
    else:
        earned = "no category earned more than chance"
    parts = [tokens(row) + " " + part(row) for row in shown]
    return f"{text} Of that, {earned}; {', '.join(parts)}."


def sure(lead: Reading, others: list[Reading], pairs: int) -> str:
    row = lead.named or max(categories(lead), key=lambda row: row["share"])
    which = "" if lead.named else ", the category with the largest share,"
    said = [
        f"{capital(row['tokens'])}{which} earned {nats(row['share'])} nats per token over "
        f"{pairs:,} pairs; with chosen and rejected swapped at random, one draw in 100 takes "
        f"some kind of tokens above its limit, here {nats(row['chance'])} (one-sided p = "
        f"{p_value(row['p_value'])}, of the same test).",
        data_alone(lead),
    ]
    said += [other_labels(lead, other) for other in others]
    return " ".join(said)


def data_alone(lead: Reading) -> str:
    """What the pairs say without a policy, beside what the policy says."""
    named, data = lead.named and lead.named["tokens"], lead.data
    if data is None:
        return "The pairs alone, without a policy, would name no category."
    row = next(row for row in lead.rows if row["tokens"] == data)
    more = "more" if row["data"] > 0 else "fewer"
    said = (
        f"The pairs alone, without a policy, would name {data}: chosen responses have {more} "
        f"tokens of it ({100 * row['data']:+.1f} points of all their tokens)."
    )
    if data == named:
        return said + " So the name could be read off the pairs; the size of the share could not."
    return said + " The policy does not repeat that."


def other_labels(lead: Reading, other: Reading) -> str:
    ours, theirs = (of.named and of.named["tokens"] for of in (lead, other))
    kinds = [of.rows[0].get("kind", "fires") for of in (lead, other)]
    by = f"{KIND.get(kinds[1], kinds[1])} ({other.labels})"
    of_gap = ""
    if other.named:
        more = ", less than the rest" if other.mostly_rest else ""
        of_gap = f" ({percent(other.named['part_of_change'])}{more})"
    if ours == theirs:
        return f"{by} name {theirs or 'nothing'} too{of_gap}."
    why = WHY.get(kinds[1]) if kinds[0] != kinds[1] else "their categories are others"
    return f"{by} name {theirs or 'nothing'}{of_gap} instead" + (f": {why}." if why else ".")


def carried(lead: Reading, about: dict, tables: dict[str, dict]) -> str:
    if about["change_low"] <= 0:
        certain = "" if about["change_high"] <= 0 else "certain "
        return f"None: there is no {certain}gain that features could have earned."
    said = []
    attributed = tables.get("attribution_features", {})
    change = attributed.get("about", {}).get("change") or 0.0
    earned = sorted(attributed.get("rows", ()), key=lambda row: row["share"])
    earned = [row for row in earned[:FEATURES] if row["share"] < 0] if change < 0 else []
    if earned:
        shown = "; ".join(f"{feature(row)} {percent(row['share'] / change)}" for row in earned)
        spread = earned[0]["share"] / change < SPREAD
        most = "Many features share the gain" if spread else "Some features stand out"
        said.append(f"{most}; of the lower loss, integrated gradients give most to {shown}.")
    curve = tables.get("topk", {}).get("rows", ())
    enough = next((r for r in curve[1:-1] if r["recovered"] and r["recovered"] >= MOST), None)
    if enough:
        n = enough["features"]
        said.append(
            f"With only the {n:,} strongest feature{'s' * (n > 1)} kept at each position, the "
            f"policy keeps {percent(enough['recovered'])} of its gain in loss."
        )
    static = tables.get("static", {}).get("rows", ())[2:]
    best = max((row["recovered"] for row in static if row["recovered"]), default=None)
    if best is not None:
        rest = "the rest comes from" if best < MOST else "little is gained by"
        said.append(
            f"The best single vector, added at every position, regains {percent(best)} of the "
            f"gain; {rest} reading the text."
        )
    return " ".join(said) or "Not measured: attribution, topk and static were not made."


def changing(lead: Reading, others: list[Reading], about: dict) -> str:
    judges = {str(table.get("judge") or "an unnamed judge") for table in about.get("labels") or ()}
    by = f" (given by {', '.join(sorted(judges))})" if judges else ""
    if lead.named is None:
        named = " and ".join(row["tokens"] for row in categories(lead))
        return (
            f"A label file with more categories than {named}; and pairs that prefer something "
            "else, because a policy may have learned what these pairs do not show."
        )
    name = lead.named["tokens"]
    said = [
        "A second seed, or pairs from another source, under which another category comes first."
    ]
    if lead.data == name:
        said.append(f"Pairs that do not prefer {name}, if the gap is then earned elsewhere.")
    if lead.rest["part_of_change"] > 0.25:
        earned = percent(lead.rest["part_of_change"])
        said.append(f"A category for the rest, whose tokens earned {earned}.")
    if any((of.named and of.named["tokens"]) != name for of in others):
        said.append("A reason to trust the other label file more than this one.")
    said.append(f"A person who finds the features' labels{by} wrong.")
    return " ".join(said)


def differences(lead: Reading, rows: dict[str, Rows]) -> str:
    """Why attribution and ablation say what they say; "" where neither was measured."""
    if lead.named is None:
        return ""
    name, found, agree = lead.named["tokens"], [], True
    parts = [
        row
        for row in rows.get("attribution", ())
        if row["labels"] == lead.labels and row["where"] == "(all)" and row["part_of_change"]
    ]
    parts = [row for row in parts if row["category"] != "(none)"]
    if parts:
        top = max(parts, key=lambda row: row["part_of_change"])
        own = next((row for row in parts if row["category"] == name), None)
        said = f"of the categories, attribution gives most to features of {top['category']}"
        said += f" ({percent(top['part_of_change'])} of the lower loss"
        if top["category"] != name:
            agree = False
            said += f"; {percent(own['part_of_change'])} to {name}" if own else ""
        found.append(f"{said})")
    sets = [
        row
        for row in rows.get("ablation", ())
        if (row["labels"], row["category"]) == (lead.labels, name)
    ]
    own = next((row for row in sets if row["set"] == "category"), None)
    control = next((row for row in sets if row["set"] == "matched"), None)
    if own and control:
        more = control["excess_low"] > 0
        curve = rows.get("topk") or [dict(loss=float("nan"))]
        gain = curve[0]["loss"] - curve[-1]["loss"]
        agree = agree and more and not own["delta"] < gain / 10
        whole = f" (the whole gain is {nats(gain)})" if gain > 0 else ""
        like = of_usage(control["usage"], own["usage"])
        compared = "less" if more else "no less" if control["excess_high"] >= 0 else "more"
        found.append(
            f"zeroing the features of {name} adds {nats(own['delta'])} to the loss{whole}, "
            f"as many others {like} {nats(control['delta'])}, which is {compared}"
        )
    if not found:
        return ""
    verb = "They agree here" if agree else "Here they differ"
    return f"{ASKED} {verb}: choices names {name}, {', and '.join(found)}."


# --- words and numbers ----------------------------------------------------------------------------


def categories(of: Reading) -> list[dict]:
    return [row for row in of.rows if row["tokens"] not in TOKENS]


def tokens(row: dict) -> str:
    return TOKENS.get(row["tokens"], row["tokens"])


def part(row: dict) -> str:
    narrowed = " (they narrowed it)" if row["share"] <= -0.0005 else ""
    return percent(row["part_of_change"]) + narrowed


def feature(row: dict) -> str:
    said = shortened(row["explanation"] or "", 60)
    return f"feature {row['feature']}" + (f" ({said})" if said else "")


def shortened(text: str, most: int = 120) -> str:
    """Foreign text inside a sentence: on one line, cut between words, no character of it hidden."""
    return textwrap.shorten(brief(" ".join(text.split())), most, placeholder=" …")


def percent(share: float | None, digits: int = 0, sign: bool = False) -> str:
    """Never -0."""
    if share is None:
        return "–"
    value = round(100 * share, digits) or 0.0
    return f"{value:{'+' if sign else ''}.{digits}f} %"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def nats(value: float) -> str:
    """To three digits, or three decimals where that is fewer; never -0."""
    shown = f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"
    return shown.replace("-0.000", "0.000")


def p_value(p: float) -> str:
    return f"{p:.2g}"
