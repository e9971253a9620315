"""Which features steered each token: kept while text is generated, then printed, or written as
jsonl or as a page.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from generation import page
from labels import Labels
from runtime.output import write_whole
from runtime.sources import UserError

WHERE = "v stands at the token where it was computed; what it does shows in the token after that."
TEMPLATE = Path(__file__).parent / "templates" / "trace.html"


class Steered(NamedTuple):
    """One of the features steered most at a position."""

    feature: int
    value: float  # of v; a soft-threshold is clamped after that, where f + v is negative
    explanation: str | None

    def __str__(self) -> str:
        return page.named(*self)


class Position(NamedTuple):
    """One token of a prompt or of its answer, and the steering there."""

    position: int  # counted from <bos>, which has none of these
    part: str  # prompt or answer
    token: str
    l1: float  # ‖v‖₁
    l0: int
    features: list[Steered]

    def as_json(self) -> dict:
        features = [feature._asdict() for feature in self.features]
        return self._asdict() | dict(features=features)


class Norms(NamedTuple):
    """Steering at one position, as generation.decode shows it."""

    l1: float
    l0: int
    largest: list[tuple[int, float]]  # (feature, value of v), by falling size


@dataclass
class Trace:
    """A generation.decode.Watch that keeps, for each position, norms and the largest features."""

    top: int
    seen: dict[int, list[Norms]] = field(default_factory=dict)  # by prompt, in order of position

    def __call__(self, owners: list[int], v: torch.Tensor) -> None:
        """owners: the prompt of each row of v [rows, F]."""
        size = v.abs()
        largest = size.topk(min(self.top, v.shape[1])).indices
        values = v.gather(1, largest)
        columns = (size.sum(-1), v.count_nonzero(-1), largest, values)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for owner, (l1, l0, features, of) in zip(owners, rows, strict=True):
            steered = [(k, x) for k, x in zip(features, of, strict=True) if x]
            self.seen.setdefault(owner, []).append(Norms(l1, l0, steered))

    def positions(
        self,
        owner: int,
        prompt: list[int],
        new: list[int],
        tokenizer: Tokenizer,
        labels: Labels | None,
    ) -> list[Position]:
        """Every position of one prompt and its answer but the first, which is <bos>."""
        explained = labels.explanations if labels else {}
        found = []
        for i, (token, norms) in enumerate(zip(prompt + new, self.seen[owner], strict=True)):
            part = "prompt" if i < len(prompt) else "answer"
            features = [Steered(k, x, explained.get(k)) for k, x in norms.largest]
            text = token_text(tokenizer, token)
            found.append(Position(i, part, text, norms.l1, norms.l0, features))
        return found[1:]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A single token's text; for markup and parts of characters, its name."""
    text = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else tokenizer.id_to_token(token) or f"<{token}>"


def table(positions: Iterable[Position], settings: dict[str, str]) -> str:
    """The answer's positions as lines for a terminal."""
    lines = ["", "; ".join(f"{name}: {value}" for name, value in settings.items()), WHERE]
    lines.append(f"{'token':>16}  {'L1':>7}  {'L0':>5}  features steered most (value, feature)")
    for row in positions:
        if row.part == "answer":
            features = "; ".join(map(str, row.features))
            lines.append(f"{row.token[-14:]!r:>16}  {row.l1:7.2f}  {row.l0:5d}  {features}")
    return "\n".join(lines)


def write(path: Path, traces: list[list[Position]], title: str, settings: dict[str, str]) -> None:
    """path.jsonl: one object a token. path.html: a page that shades each token by ‖v‖₁.

    After a failure there is no new file. Raises UserError where it cannot be written.
    """
    try:
        html = path.suffix == ".html"
        write_whole(path, rendered(traces, title, settings) if html else rows(traces))
    except OSError as e:
        raise UserError(f"--trace {path}: cannot be written ({e.strerror}).") from e


def rows(traces: list[list[Position]]) -> str:
    lines = [
        json.dumps(dict(prompt=i) | row.as_json(), ensure_ascii=False) + "\n"
        for i, positions in enumerate(traces)
        for row in positions
    ]
    return "".join(lines)


def rendered(traces: list[list[Position]], title: str, settings: dict[str, str]) -> str:
    full = page.darkest([row.l1 for positions in traces for row in positions] or [0.0])
    shaded = []
    for positions in traces:
        tokens = []
        for row in positions:
            note = page.note(row.l1, row.features)
            tokens.append(page.Token(row.token, page.shade(row.l1, full), note, row.part))
        shaded.append(tokens)
    about = dict(title=title, settings=settings, where=WHERE, darkest=full)
    return page.render(TEMPLATE, traces=shaded, **about)
