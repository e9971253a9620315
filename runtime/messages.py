"""Escape foreign text (of data, models, labels, servers), so that a terminal only shows it."""

from unicodedata import category

LONGEST = 200  # limit on the characters of foreign text inside a message


def shown(text: str) -> str:
    """Foreign text for a terminal: control characters are escaped, except newline and tab.

    Otherwise they could move the cursor and overwrite what is printed.
    """
    return "".join(
        _escaped(c) if category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text
    )


def brief(text: object) -> str:
    """Foreign text inside a message: one line of at most LONGEST characters, escaped."""
    cut = str(text)[: LONGEST + 1]
    cut = cut if len(cut) <= LONGEST else cut[: LONGEST - 1] + "…"
    return "".join(c if c.isprintable() else _escaped(c) for c in cut)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]
