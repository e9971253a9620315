"""Command lines: the fields of a dataclass become flags, a user's mistake becomes one sentence.

    @dataclass(frozen=True)
    class Settings:
        seed: int = flag(0, "seed of the data order and the initial weights")

At the end of a script: cli.run(main), where main calls cli.parse(Settings).
"""

import argparse
import dataclasses
import io
import math
import os
import re
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable

from safetensors import SafetensorError

from runtime import progress
from runtime.messages import LONGEST, brief, shown
from runtime.sources import UserError


def flag(default, help: str, choices: tuple | None = None):
    """A dataclass field with its line of help and the values it may have (None: any)."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def at_least(settings, least: float, *names: str, most: float = math.inf) -> None:
    """Check settings that are not None. Raises UserError for one not finite or out of bounds."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (least <= value <= most and value < math.inf):
            flag = name.replace("_", "-")
            bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise UserError(f"--{flag} {value}: a finite number, {bounds}, was expected.")


def number(name: str, given: str) -> float:
    """The value of a flag as a number. Raises UserError where it is not positive and finite."""
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"--{name} {brief(given)}: a positive number was expected.")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{self.prog}: {message}.")


def parse(
    settings: type,
    argv: list[str] | None = None,
    presets: dict[str, dict] | None = None,
    doc: str = "",
):
    """Build `settings` from the command line. Raises UserError for unknown or abbreviated flags.

    presets: value of --model -> other defaults that it changes. doc: the text above --help's list.
    """
    for model, changed in (presets or {}).items():
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
        doc += "\n" + textwrap.fill(f"--model {model} changes these defaults: {flags}", 100) + "\n"
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(_command(), description=doc, allow_abbrev=False, formatter_class=form)
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # `int | None`: the flag itself takes an int
            kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
        default = field.default
        default = " ".join(map(str, default)) if isinstance(default, tuple) else default
        known = "" if default is False or default in (None, "") else f" (default: {default})"
        words = f"{field.metadata['help']}{known}".replace("%", "%%")
        options = dict(default=field.default, help=words)
        if typing.get_origin(kind) is tuple:  # `tuple[str, ...]`: a flag with any number of values
            kind, options["nargs"] = typing.get_args(kind)[0], "*"
            if not field.default:  # it may then also be repeated
                options |= dict(action="extend", default=[])
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            allowed = field.metadata["choices"]
            metavar = "{" + ",".join(map(str, allowed)) + "}" if allowed else kind.__name__.upper()
            named = _whole if kind is int else kind
            options |= dict(type=named, choices=allowed, metavar=metavar)
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    given = sys.argv[1:] if argv is None else argv
    if any("\0" in word for word in given):
        raise UserError(f"{parser.prog}: an argument holds a zero byte.")
    if presets:  # parse once for --model alone
        parser.set_defaults(**presets.get(parser.parse_args(given).model, {}))
    values = vars(parser.parse_args(given))
    if values.pop("quiet"):
        progress.be_quiet()
    return settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _whole(given: str) -> int:
    value = int(given)
    if abs(value) >= 1 << 63:  # more than numpy and torch can hold
        raise ValueError
    return value


_whole.__name__ = "int"  # argparse's messages show it


def _command() -> str:
    """How this script was started: "python train.py" or "python -m audit"."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return f"python {os.path.basename(sys.argv[0])}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def run(main: Callable[[], None]) -> None:
    """Call main and end as a command line should.

    Exit code 2 and one sentence on stderr for a UserError and for what the system refuses, 130 for
    Ctrl-C, 143 for SIGTERM, otherwise 0. Where the reader of our output stops early, as head does,
    main goes on and writes its files.
    """
    _open_streams()
    if "RANK" not in os.environ:  # torchrun's processes may wait for each other: end them at once
        signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            main()
        except SystemExit as e:
            if e.code:
                raise
        sys.stdout.flush()
    except (UserError, OSError, SafetensorError, ModuleNotFoundError) as e:
        progress.end_bars()
        print(_sentence(e), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        progress.end_bars()
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # drop the rest: Python would try again when it ends, and fail again
            _to_devnull(sys.stdout.fileno())


def _sentence(error: Exception) -> str:
    """An error's message on one line, with long words (paths, values) shortened in the middle."""
    said = str(error)
    if isinstance(error, ModuleNotFoundError):
        where = "README.md says under Extras which requirements file has it"
        said = f"The package {error.name} is not installed; {where}."
    elif not isinstance(error, UserError) and getattr(error, "strerror", None):
        said = f"{error.filename or 'output'}: {error.strerror}."
    said = shown(" ".join(said.split()))
    return re.sub(rf"\S{{{LONGEST + 1},}}", lambda word: f"{word[0][:100]}…{word[0][-99:]}", said)


def _terminate(number, frame) -> None:
    """Turn SIGTERM into an exception, so that half-written files are removed on the way out."""
    raise SystemExit(128 + number)


class _Output(io.FileIO):
    """Standard output or standard error; the process goes on when its reader is gone."""

    def write(self, content) -> int:
        try:
            return super().write(content)
        except OSError as e:
            # Report a full disk on stdout; on stderr there is no place left to report it.
            if self.fileno() == 1 and not isinstance(e, BrokenPipeError):
                raise
            _to_devnull(self.fileno())
            return len(content)


class _Text(io.TextIOWrapper):
    """Text with control characters escaped: only progress bars, on stderr, may move the cursor."""

    moves = re.compile(r"(\r|\x1b\[A)")

    def write(self, text: str) -> int:
        if self.fileno() == 2:
            parts = self.moves.split(text)
            parts[::2] = map(shown, parts[::2])  # between the moves
            text = "".join(parts)
        else:
            text = shown(text)
        return super().write(text)


def _open_streams() -> None:
    """Connect streams that the shell closed to /dev/null; escape what a terminal cannot show."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file opened would get its number
            _to_devnull(number)
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
        elif number == 0 and _is(stream, 0):
            stream.reconfigure(errors="strict")  # in some locales it would hide what is not UTF-8
        elif _is(stream, number):  # not where a test has put a buffer
            raw = io.BufferedWriter(_Output(number, "w", closefd=False))
            how = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
            opened = _Text(raw, stream.encoding, "backslashreplace", **how)
            setattr(sys, name, opened)


def _is(stream, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError, AttributeError):
        return False


def _to_devnull(number: int) -> None:
    devnull = os.open(os.devnull, os.O_RDWR)
    if devnull != number:
        os.dup2(devnull, number)
        os.close(devnull)
