"""Pages for a browser: one jinja2 environment, which escapes all text, and the tokens shaded by
their steering that the report and generation's trace both show.

A page stands alone: its policy (templates/page.html) forbids requests and every script but the
page's own, which it knows by hash. Styles are inline and pictures are data URLs.
"""

import base64
import hashlib
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from runtime.colours import COLOUR

SHARED = Path(__file__).resolve().parent / "templates"  # page.html, page.css, tokens.html
SHADES = 10
LONGEST = 90  # characters of an explanation in a note
DARKEST = 0.98  # quantile of ‖v‖₁ from which on a token gets the darkest shade


class Token(NamedTuple):
    """A token as tokens.html shows it."""

    text: str
    shade: int  # 0 to SHADES - 1
    note: str  # shown where the token is pointed at or tapped; may have several lines
    part: str = ""  # a CSS class
    features: Sequence[int] = ()  # that have a card on the page


def darkest(sizes: Sequence[float]) -> float:
    """The ‖v‖₁ of the darkest shade. A few outliers share it, or all others would be pale."""
    return float(np.quantile(sizes, DARKEST, method="lower")) or 1.0


def shade(size: float, full: float) -> int:
    """0 to SHADES - 1 for a ‖v‖₁ from 0 to `full` and above."""
    return min(SHADES - 1, round((SHADES - 1) * size / full))


def named(feature: int, value: float, explanation: str | None) -> str:
    """A feature and the v that was added there, by its explanation where it has one."""
    name = f"feature {feature}"
    if explanation:
        name = f"{textwrap.shorten(explanation, LONGEST, placeholder='…')} ({name})"
    return f"{value:+.3g} {name}"


def note(size: float, features: Iterable[tuple[int, float, str | None]]) -> str:
    """What is shown of a token: ‖v‖₁ there, then its strongest features, a line each."""
    return "\n".join([f"steered by {size:.3g} (‖v‖₁)", *(named(*each) for each in features)])


def render(template: Path, script: str = "", **values) -> str:
    """Fill in a template, which may extend and import those in runtime/templates.

    Every value is escaped, in markdown too; a value that the template names and the caller does
    not give raises jinja2.UndefinedError. script: the page's own, of this project's files.
    """
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = dict(shades=SHADES, colours=COLOUR, script=Markup(script), script_hash=hashed)
    return environment.get_template(template.name).render(**own, **values)
