"""Render pages for a browser with jinja2, which escapes all text, and shade tokens by steering.

A page is one file: its content security policy (templates/page.html) forbids scripts and requests,
so that styles are inline and pictures are data URLs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

SHARED = Path(__file__).resolve().parent / "templates"  # page.html, page.css, tokens.html
SHADES = 10
DARKEST = 0.98  # tokens from this quantile of ‖v‖₁ on get the darkest shade


class Token(NamedTuple):
    """A token for templates/tokens.html."""

    text: str
    shade: int  # 0 to SHADES - 1
    note: str  # shown when the token is pointed at or tapped; may have several lines
    part: str = ""  # a CSS class


def darkest(sizes: Sequence[float]) -> float:
    """The ‖v‖₁ of the darkest shade: a quantile, so that outliers do not make the rest pale."""
    return float(np.quantile(sizes, DARKEST, method="lower")) or 1.0


def shade(size: float, full: float) -> int:
    """A ‖v‖₁ -> its shade, from 0 for 0 to SHADES - 1 for `full` and more."""
    return min(SHADES - 1, round((SHADES - 1) * size / full))


def render(template: Path, **values) -> str:
    """Fill in a template, which may extend and import those in runtime/templates.

    Every value is escaped, also in markdown. Raises jinja2.UndefinedError for a missing value.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(shades=SHADES, **values)
