"""A small world of questions and answers in which every character carries a label.

Each text is a question and an answer drawn from a grammar. A question has a topic; an answer has
attributes (its layout, whether it flatters, how honest it is about what it knows, …) that are drawn
independently of the question and of each other. The text is a list of spans, and each span says
which of four labels it has and what it is called:

    style       bullets, numbers, headings, bold, exclamation marks, lead-ins, closing summaries
    alignment   flattery, hedging, admitting ignorance, over-claiming, refusing harm or not
    content     questions and facts; a fact inside a bullet or inside bold is still content
    chat        turn markers and role names

Because attributes are independent, a preference can be planted: `pairs("honesty", …)` draws chosen
and rejected answers alike except for the attribute that the cause names.

The generator keeps the logarithm of the probability of every choice that it makes. Different
choices always give different texts (no option is empty or repeated inside a slot, and every
attribute shows), so the sum is the exact log-probability of the text, and its mean over held-out
texts is the loss that no model can beat.
"""

import math
import random
import re
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from tiny.lexicon import (
    BOASTS,
    COMPLY_FACTS,
    FACTS,
    HARM_QUESTIONS,
    HARMS,
    HEDGES,
    REFUSE_FACTS,
    SENTENCES,
    UNKNOWABLE,
)

LABELS = ("style", "alignment", "content", "chat")


class Span(NamedTuple):
    """A piece of text that has one label."""

    text: str
    label: str  # one of LABELS
    name: str  # what it is within its label: "bullet", "hedging", "fact", …


# --- the attributes of an answer ------------------------------------------------------------------

PRIOR = {  # attribute -> value -> probability; drawn independently for every answer
    "layout": {"prose": 0.4, "bullets": 0.3, "numbered": 0.3},
    "heading": {True: 0.25, False: 0.75},
    "bold": {True: 0.35, False: 0.65},
    "exclaim": {True: 0.25, False: 0.75},
    "summary": {True: 0.35, False: 0.65},
    "flattery": {True: 0.35, False: 0.65},
    "honesty": {"plain": 0.3, "honest": 0.35, "over-claiming": 0.35},
    "refusal": {True: 0.5, False: 0.5},  # shows where the question invites harm
    "points": {1: 0.2, 2: 0.3, 3: 0.3, 4: 0.2},
}
QUESTION_KINDS = {"fact": 0.55, "unknowable": 0.2, "harm": 0.25}


class Cause(NamedTuple):
    """Why one answer is preferred."""

    category: str | None  # the label of the tokens that show it; None where no label's tokens do
    wins: dict  # attribute -> the values that it may take on the winning side
    loses: dict  # the same on the losing side
    kinds: tuple = tuple(QUESTION_KINDS)  # the kinds of question where the cause shows


CAUSES = {
    "none": Cause(None, {}, {}),
    "style": Cause(
        "style",
        {"layout": ("bullets",), "bold": (True,), "summary": (True,)},
        {"layout": ("prose",), "bold": (False,), "summary": (False,)},
    ),
    "bullets": Cause("style", {"layout": ("bullets",)}, {"layout": ("prose",)}),
    "bold": Cause("style", {"bold": (True,)}, {"bold": (False,)}),
    "honesty": Cause("alignment", {"honesty": ("honest",)}, {"honesty": ("over-claiming",)}),
    "refusal": Cause("alignment", {"refusal": (True,)}, {"refusal": (False,)}, ("harm",)),
    "anti-flattery": Cause("alignment", {"flattery": (False,)}, {"flattery": (True,)}),
    "brevity": Cause(None, {"points": (1, 2)}, {"points": (3, 4)}),
}


class Draw:
    """Random choices from a seeded local generator, and the nats that they cost."""

    def __init__(self, rng: random.Random):
        self.rng, self.nats = rng, 0.0

    def choice(self, options):
        """A uniform choice."""
        options = list(options)
        self.nats += math.log(len(options))
        return options[self.rng.randrange(len(options))]

    def weighted(self, distribution: dict):
        """A choice of a key with probability proportional to its value."""
        options, weights = list(distribution), list(distribution.values())
        chosen = self.rng.choices(range(len(options)), weights)[0]
        self.nats -= math.log(weights[chosen] / sum(weights))
        return options[chosen]

    def sentence(self, name: str) -> str:
        """One of SENTENCES[name] with its slots filled."""
        pieces = _split_slots(self.choice(SENTENCES[name]))
        return "".join(piece if isinstance(piece, str) else self.choice(piece) for piece in pieces)


@cache
def _split_slots(template: str) -> tuple:
    """ "a {b|c} d" -> ("a ", ("b", "c"), " d")."""
    return tuple(
        tuple(piece.split("|")) if i % 2 else piece
        for i, piece in enumerate(re.split(r"[{}]", template))
    )


# --- questions and answers ------------------------------------------------------------------------


class Question(NamedTuple):
    """What is asked, and which points an answer may make."""

    kind: str  # "fact", "unknowable" or "harm"
    text: str
    topic: str  # "the tiger", or the deed
    facts: tuple  # ((predicate, value), …); for a harmful deed the complying ones
    refusing_facts: tuple = ()  # the points of a refusing answer
    asked: int | None = None  # the index of the fact asked for


def _topics():
    for attributes, topics in FACTS.values():
        for topic, values in topics.items():
            facts = tuple((p, v) for (_, p), v in zip(attributes, values.split("|"), strict=True))
            yield topic, tuple(q for q, _ in attributes), facts


@cache
def questions() -> dict:
    """kind -> every Question of that kind."""
    fact, unknowable, harm = [], [], []
    for topic, asks, facts in _topics():
        fact += [
            Question("fact", q.format(t=topic), topic, facts, asked=i) for i, q in enumerate(asks)
        ]
        unknowable += [Question("unknowable", q.format(t=topic), topic, facts) for q in UNKNOWABLE]
    for deed, values in HARMS.items():
        values = values.split("|")
        comply = tuple(zip(COMPLY_FACTS, values[:4], strict=True))
        refuse = tuple(zip(REFUSE_FACTS, values[4:], strict=True))
        harm += [Question("harm", q.format(t=deed), deed, comply, refuse) for q in HARM_QUESTIONS]
    return {"fact": tuple(fact), "unknowable": tuple(unknowable), "harm": tuple(harm)}


def draw_question(draw: Draw, kinds=tuple(QUESTION_KINDS)) -> Question:
    kind = draw.weighted({k: QUESTION_KINDS[k] for k in kinds})
    return draw.choice(questions()[kind])


def draw_attributes(draw: Draw, allowed: dict | None = None) -> dict:
    """A value for every attribute, from PRIOR; of those in `allowed`, one of the values there."""
    allowed = allowed or {}
    return {
        name: draw.weighted({v: p for v, p in prior.items() if v in allowed.get(name, prior)})
        for name, prior in PRIOR.items()
    }


def draw_answer(draw: Draw, question: Question, attributes: dict) -> list[Span]:
    """The spans of an answer to `question` that has these attributes."""
    spans: list[Span] = []

    def say(text, label, name):
        """Add a sentence on the current line."""
        gap = " " if spans and not spans[-1].text.endswith("\n") else ""
        spans.append(Span(gap + text, label, name))

    def new_line(name):
        if spans and not spans[-1].text.endswith("\n"):
            spans.append(Span("\n", "style", name))

    if attributes["flattery"]:
        say(draw.sentence("flattery"), "alignment", "flattery")
    if attributes["heading"]:
        new_line("heading")
        spans.append(Span(draw.sentence("heading"), "style", "heading"))
        spans.append(Span(" " + question.topic, "content", "heading topic"))
        spans.append(Span("\n", "style", "heading"))
    refuses = question.kind == "harm" and attributes["refusal"]
    if question.kind == "harm":
        name = "refusal" if refuses else "compliance"
        say(draw.sentence(name), "alignment", name)
    honesty = attributes["honesty"]
    if honesty == "honest":
        name = "ignorance" if question.kind == "unknowable" else "hedging"
        say(draw.sentence(name), "alignment", name)
    elif honesty == "over-claiming":
        suffix = " the unknowable" if question.kind == "unknowable" else ""
        say(draw.sentence("over-claiming" + suffix), "alignment", "over-claiming")

    facts = question.refusing_facts if refuses else question.facts
    points = _draw_points(draw, facts, question.asked, attributes["points"])
    layout = attributes["layout"]
    list_name = {"bullets": "bullet", "numbered": "number"}.get(layout)
    if list_name and draw.weighted({True: 0.4, False: 0.6}):
        new_line(list_name)
        say(draw.sentence("lead-in"), "style", "lead-in")
    subject = _subject(question)
    for i, (predicate, value) in enumerate(points):
        if list_name:
            new_line(list_name)
            spans.append(Span("-" if layout == "bullets" else f"{i + 1})", "style", list_name))
        say(subject if i == 0 else "It", "content", "subject")
        if honesty != "plain" and draw.weighted({True: 0.4, False: 0.6}):
            if honesty == "honest":
                say(draw.choice(HEDGES), "alignment", "hedging")
            else:
                say(draw.choice(BOASTS), "alignment", "over-claiming")
        before, after = predicate.split("{v}")
        spans.append(Span(" " + before.rstrip(), "content", "predicate"))
        _say_value(spans, value, attributes["bold"])
        if after:
            spans.append(Span(after, "content", "predicate"))
        if attributes["exclaim"]:
            spans.append(Span("!", "style", "exclamation"))
        else:
            spans.append(Span(".", "content", "full stop"))

    if honesty != "plain" and draw.weighted({True: 0.4, False: 0.6}):
        name = "closing caveat" if honesty == "honest" else "closing boast"
        if list_name:
            new_line(list_name)
        say(draw.sentence(name), "alignment", name)
    if attributes["summary"]:
        new_line("summary")
        spans.append(Span(draw.sentence("summary"), "style", "summary"))
        _say_value(spans, points[0][1], False)
        if len(points) > 1:
            spans.append(Span(" and", "style", "summary"))
            _say_value(spans, points[-1][1], False)
    return spans


def _subject(question):
    """How the first point names what it is about."""
    return "The deed" if question.kind == "harm" else question.topic[0].upper() + question.topic[1:]


def _draw_points(draw, facts, asked, n):
    """n facts, the one asked for first, the others in random order."""
    points = [] if asked is None else [facts[asked]]
    while len(points) < n:
        points.append(draw.choice([fact for fact in facts if fact not in points]))
    return points


def _say_value(spans, value, bold):
    if bold:
        spans += [
            Span(" **", "style", "bold"),
            Span(value, "content", "value"),
            Span("**", "style", "bold"),
        ]
    else:
        spans.append(Span(" " + value, "content", "value"))


# --- texts ----------------------------------------------------------------------------------------


@dataclass
class Text:
    """A question and its answer, rendered for the model, with the label of every character."""

    question: Question
    attributes: dict
    answer: list[Span] = field(repr=False)
    nats: float  # -log of the probability of this text under the grammar

    @property
    def prompt_spans(self) -> list[Span]:
        """The person's turn, <bos> included."""
        return [
            Span("<bos><start_of_turn>user\n", "chat", "prompt header"),
            Span(self.question.text, "content", f"{self.question.kind} question"),
            Span("<end_of_turn>\n", "chat", "end of prompt"),
        ]

    @property
    def response_spans(self) -> list[Span]:
        header = Span("<start_of_turn>model\n", "chat", "response header")
        footer = Span("<end_of_turn>\n<eos>", "chat", "end of response")
        return [header, *self.answer, footer]

    @property
    def spans(self) -> list[Span]:
        """The whole text, as data.py renders it, <bos> to <eos>."""
        return self.prompt_spans + self.response_spans

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)

    @property
    def answer_text(self) -> str:
        return "".join(span.text for span in self.answer)


def corpus(n: int, seed: int) -> list[Text]:
    """n texts for pre-training: every kind of question, every attribute from PRIOR."""
    rng = random.Random(f"corpus {seed}")
    texts = []
    for _ in range(n):
        draw = Draw(rng)
        question = draw_question(draw)
        attributes = draw_attributes(draw)
        answer = draw_answer(draw, question, attributes)
        # Refusal does not show on a question without harm: there, the text's probability does not
        # depend on it.
        hidden = 0.0
        if question.kind != "harm":
            hidden = -math.log(PRIOR["refusal"][attributes["refusal"]])
        texts.append(Text(question, attributes, answer, draw.nats - hidden))
    return texts


@dataclass
class TextPair:
    """Two answers to one question; `cause` is why the first is preferred."""

    cause: str
    chosen: Text
    rejected: Text

    def row(self, prompt_id: str) -> dict:
        """As a row of princeton-nlp/llama3-ultrafeedback-armorm (without its columns of scores)."""
        prompt = self.chosen.question.text
        user = {"content": prompt, "role": "user"}
        return {
            "prompt_id": prompt_id,
            "prompt": prompt,
            "chosen": [user, {"content": self.chosen.answer_text, "role": "assistant"}],
            "rejected": [user, {"content": self.rejected.answer_text, "role": "assistant"}],
        }


def pairs(cause: str | dict[str, float], n: int, seed: int) -> list[TextPair]:
    """n preference pairs whose chosen side wins because of `cause`, a name in CAUSES.

    With a dict {cause: weight} each pair has one cause, drawn with probability proportional to its
    weight. Both sides answer the same question; every attribute that the pair's cause does not name
    is drawn for each side independently from the same distribution.
    """
    mix = {cause: 1.0} if isinstance(cause, str) else cause
    unknown = [name for name in mix if name not in CAUSES]
    if unknown:
        raise ValueError(f"unknown cause {unknown[0]!r}: expected one of {', '.join(CAUSES)}")
    rng = random.Random(f"pairs {sorted(mix.items())} {seed}")
    result = []
    for _ in range(n):
        draw = Draw(rng)
        name = draw.weighted(mix)
        question = draw_question(draw, CAUSES[name].kinds)
        sides = []
        for allowed in (CAUSES[name].wins, CAUSES[name].loses):
            side = Draw(rng)
            attributes = draw_attributes(side, allowed)
            sides.append(
                Text(question, attributes, draw_answer(side, question, attributes), side.nats)
            )
        result.append(TextPair(name, *sides))
    return result


def span_of_characters(spans: list[Span]) -> list[int]:
    """For every character, the index of the span that it belongs to."""
    return [i for i, span in enumerate(spans) for _ in span.text]


# --- reading answers back -------------------------------------------------------------------------


@cache
def _said(name: str) -> str:
    """A regular expression of every sentence in SENTENCES[name]."""

    def any_of(piece):
        if isinstance(piece, str):
            return re.escape(piece)
        return f"(?:{'|'.join(map(re.escape, piece))})"

    templates = map(_split_slots, SENTENCES[name])
    return "|".join("".join(map(any_of, template)) for template in templates)


@cache
def _pattern(question: Question) -> re.Pattern:
    """Matches every answer that the grammar can give to `question`; named groups tell attributes.

    One thing is left unchecked: that the points of an answer agree with each other (number, bold,
    "It").
    """

    said = _said
    unknowable = question.kind == "unknowable"
    honest = said("ignorance" if unknowable else "hedging")
    boast = said("over-claiming the unknowable" if unknowable else "over-claiming")
    facts = {*question.facts, *question.refusing_facts}
    values = "|".join(re.escape(value) for _, value in facts)
    stated = "|".join(
        re.escape(p).replace(r"\{v\}", rf"(?:{re.escape(v)}|\*\*{re.escape(v)}\*\*)")
        for p, v in facts
    )
    subject = re.escape(_subject(question))
    point = rf"(?:- |\d\) )?(?:{subject}|It)(?: (?:{'|'.join(HEDGES + BOASTS)}))? (?:{stated})[.!]"
    asks_harm = (
        rf"(?:(?P<refuses>{said('refusal')})|{said('compliance')})\s"
        if question.kind == "harm"
        else ""
    )
    return re.compile(
        rf"(?:(?P<flattery>{said('flattery')})\s)?"
        rf"(?P<heading>(?:{said('heading')}) {re.escape(question.topic)}\n)?"
        rf"{asks_harm}"
        rf"(?:(?:(?P<honest>{honest})|(?P<boast>{boast}))\s)?"
        rf"(?:(?:{said('lead-in')})\n)?"
        rf"(?P<points>{point}(?:\s{point}){{0,3}})"
        rf"(?:\s(?:{said('closing caveat')}|{said('closing boast')}))?"
        rf"(?P<summary>\n(?:{said('summary')}) (?:{values})(?: and (?:{values}))?)?"
    )


def read(question: Question, answer: str) -> dict | None:
    """The attributes that an answer shows, or None where the grammar cannot have said it.

    `refusal` is None for a question that invites no harm: it does not show there.
    """
    match = _pattern(question).fullmatch(answer)
    if match is None:
        return None
    points = match["points"]
    layout = "numbered" if points[0].isdigit() else "prose"
    layout = "bullets" if points.startswith("- ") else layout
    honesty = "over-claiming" if match["boast"] else "plain"
    honesty = "honest" if match["honest"] else honesty
    return {
        "layout": layout,
        "heading": match["heading"] is not None,
        "bold": "**" in points,
        "exclaim": "!" in points,
        "summary": match["summary"] is not None,
        "flattery": match["flattery"] is not None,
        "honesty": honesty,
        "refusal": match["refuses"] is not None if question.kind == "harm" else None,
        "points": points.count(".") + points.count("!"),
    }


# Attributes that show in tokens of a category.
CATEGORY_OF = dict.fromkeys(("layout", "heading", "bold", "exclaim", "summary"), "style")
CATEGORY_OF |= dict.fromkeys(("flattery", "honesty", "refusal"), "alignment")


def shows(question: Question, answer: str) -> dict[str, object]:
    """The attributes of CATEGORY_OF that an answer shows, found one by one: for texts of a model,
    which the grammar as a whole need not have said. An answer that is honest in one place and
    over-claims in another is "both".
    """

    def has(*names: str) -> bool:
        return any(re.search(_said(name), answer) for name in names)

    def words(these) -> bool:
        return re.search(rf"\b(?:{'|'.join(these)})\b", answer) is not None

    lines = answer.splitlines()
    numbered = any(re.match(r"\d\) ", line) for line in lines)
    bullets = any(line.startswith("- ") for line in lines)
    honest = has("ignorance", "hedging", "closing caveat") or words(HEDGES)
    boasts = has("over-claiming", "over-claiming the unknowable", "closing boast") or words(BOASTS)
    refuses, complies = has("refusal"), has("compliance")
    honesty = {(True, True): "both", (True, False): "honest", (False, True): "over-claiming"}
    refusal = {(True, True): "both", (True, False): True, (False, True): False}
    return {
        "layout": "bullets" if bullets else "numbered" if numbered else "prose",
        "heading": has("heading"),
        "bold": "**" in answer,
        "exclaim": "!" in answer,
        "summary": has("summary"),
        "flattery": has("flattery"),
        "honesty": honesty.get((honest, boasts), "plain"),
        "refusal": refusal.get((refuses, complies)) if question.kind == "harm" else None,
    }
