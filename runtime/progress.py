"""Show the progress of long work in one line: what is computed, how far, and the time left.

Nothing is shown where standard error is not a terminal, or under --quiet, a flag of every command.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager

from tqdm import tqdm

FORMAT = "{desc}: {n:.1f} of {total:.0f} {unit}, {elapsed} so far, {remaining} to go{postfix}"


class State:
    quiet = False
    line: "Line | None" = None  # the Line that is shown now


def be_quiet() -> None:
    """Show no progress from now on, not even that of downloads."""
    State.quiet = True
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the Hub's client is imported


def progress_bar(iterable: Iterable | None = None, *, shown: bool = True, **options):
    """A tqdm with these options, or inside a Line an object that moves the line instead.

    shown: False where another process shows the same bar.
    """
    if State.line is not None:
        total = options.get("total", len(iterable) if isinstance(iterable, Sized) else None)
        return Inside(State.line, iterable, options.get("desc", ""), total)
    return tqdm(iterable, disable=True if State.quiet or not shown else None, **options)


def end_bars() -> None:
    """End all bars, the inner ones first, so that what is printed next has a line of its own."""
    for bar in sorted(tqdm._instances, key=lambda bar: bar.pos):
        bar.close()


def say(text: str, file=None) -> None:
    """Print text above the progress bars; file: standard output if None."""
    tqdm.write(text, file=file)
    (file or sys.stdout).flush()


class Line:
    """One progress line for work of several parts, which may have bars of their own."""

    def __init__(self, what: str, total: float, unit: str):
        """what: title. total: size of all parts together, in units."""
        self.what, self.weights = what, {}
        how = dict(bar_format=FORMAT, smoothing=0, mininterval=0.5)
        self.bar = progress_bar(desc=what, total=total, unit=unit, **how)

    def __enter__(self) -> "Line":
        State.line = self
        return self

    def __exit__(self, *_) -> None:
        State.line = None
        self.bar.close()

    @contextmanager
    def part(
        self, name: str, work: float, bars: Mapping[str, float] | None = None
    ) -> Iterator[None]:
        """work: size of the part, in units. bars: title of a bar inside -> its share of `work`."""
        end, self.weights = self.bar.n + work, bars or {}
        self.bar.set_postfix_str("", refresh=False)
        self.bar.set_description_str(f"{self.what}, {name}")
        yield
        self.bar.update(end - self.bar.n)


class Inside:
    """A bar inside a Line: it moves the line and shows nothing itself."""

    def __init__(self, line: Line, iterable: Iterable | None, desc: str, total: int | None):
        self.line, self.iterable = line, iterable
        self.each = line.weights.get(desc, 0) / total if total else 0

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()

    def __enter__(self) -> "Inside":
        return self

    def __exit__(self, *_) -> None:
        pass

    def update(self, n: float = 1) -> None:
        self.line.bar.update(n * self.each)

    def set_postfix(self, **values) -> None:
        self.line.bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        pass


def parts(
    items: Iterable,
    what: str,
    unit: str,
    name: Callable[[object], str] = str,
    bars: Mapping[str, float] | None = None,
) -> Iterator:
    """Yield items, each an equal part of one Line. name: title of an item. bars: as in part."""
    items = list(items)
    with Line(what, len(items), unit) as line:
        for item in items:
            with line.part(name(item), 1, bars):
                yield item
