"""Pages for a browser: one jinja2 environment, which escapes all text, and the tokens shaded by
their steering that the report and generation's trace both show.

A page stands alone: its policy (templates/page.html) forbids scripts and requests, so that styles
are inline and pictures are data URLs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

SHARED = Path(__file__).resolve().parent / "templates"  # page.html, page.css, tokens.html
SHADES = 10
DARKEST = 0.98  # quantile of ‖v‖₁ from which on a token gets the darkest shade


class Token(NamedTuple):
    """A token as tokens.html shows it."""

    text: str
    shade: int  # 0 to SHADES - 1
    note: str  # shown where the token is pointed at or tapped; may have several lines
    part: str = ""  # a CSS class


def darkest(sizes: Sequence[float]) -> float:
    """The ‖v‖₁ of the darkest shade. A few outliers share it, or all others would be pale."""
    return float(np.quantile(sizes, DARKEST, method="lower")) or 1.0


def shade(size: float, full: float) -> int:
    """0 to SHADES - 1 for a ‖v‖₁ from 0 to `full` and above."""
    return min(SHADES - 1, round((SHADES - 1) * size / full))


def render(template: Path, **values) -> str:
    """Fill in a template, which may extend and import those in runtime/templates.

    Every value is escaped, in markdown too; a value that the template names and the caller does
    not give raises jinja2.UndefinedError.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(shades=SHADES, **values)
