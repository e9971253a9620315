"""Render pages for a browser with jinja2, which escapes all text, and shade tokens by steering.

A page is one file: its content security policy (templates/page.html) forbids requests and all
scripts but the page's own, which it names by hash. Styles are inline and pictures are data URLs.
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
DARKEST = 0.98  # tokens from this quantile of ‖v‖₁ on get the darkest shade


class Token(NamedTuple):
    """A token for templates/tokens.html."""

    text: str
    shade: int  # 0 to SHADES - 1
    note: str  # shown when the token is pointed at or tapped; may have several lines
    part: str = ""  # a CSS class
    features: Sequence[int] = ()  # its features that have a card on the page


def darkest(sizes: Sequence[float]) -> float:
    """The ‖v‖₁ of the darkest shade: a quantile, so that outliers do not make the rest pale."""
    return float(np.quantile(sizes, DARKEST, method="lower")) or 1.0


def shade(size: float, full: float) -> int:
    """A ‖v‖₁ -> its shade, from 0 for 0 to SHADES - 1 for `full` and more."""
    return min(SHADES - 1, round((SHADES - 1) * size / full))


def named(feature: int, value: float, explanation: str | None) -> str:
    """A feature, its value v, and its explanation where there is one, as text."""
    name = f"feature {feature}"
    if explanation:
        name = f"{textwrap.shorten(explanation, LONGEST, placeholder='…')} ({name})"
    return f"{value:+.3g} {name}"


def note(size: float, features: Iterable[tuple[int, float, str | None]]) -> str:
    """A token's note: its ‖v‖₁, and below it its features (feature, v, explanation), one a line."""
    return "\n".join([f"steered by {size:.3g} (‖v‖₁)", *(named(*each) for each in features)])


def render(template: Path, script: str = "", **values) -> str:
    """Fill in a template, which may extend and import those in generation/templates.

    Every value is escaped, also in markdown. Raises jinja2.UndefinedError for a missing value.
    script: content of the page's own script.
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
