"""Command lines: a frozen dataclass of settings becomes flags; a person's mistake becomes one
sentence.

@dataclass(frozen=True)
class Settings:
    seed: int = flag(0, "seed of the data order and the initial weights")
"""

import argparse
import dataclasses
import math
import os
import sys
import types
import typing
from collections.abc import Callable
from unicodedata import category

from runtime.sources import UserError


def flag(default, help: str, choices: tuple | None = None):
    """A dataclass field that knows its line of help."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def at_least(settings, least: float, *names: str, most: float = math.inf) -> None:
    """Raises UserError for a setting of these that is given and is not a finite number from `least`
    to `most`.
    """
    for name in names:
        value = getattr(settings, name)
        # numpy and torch take seeds below 2^63
        if value is not None and not (
            least <= value <= most and value < (2**63 if name == "seed" else math.inf)
        ):
            flag = name.replace("_", "-")
            bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise UserError(f"--{flag} {value}: a finite number, {bounds}, was expected.")


def at_least_one(settings, *names: str) -> None:
    at_least(settings, 1, *names)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{self.prog}: {message}.")


def parse(
    settings: type,
    argv: list[str] | None = None,
    presets: dict[str, dict] | None = None,
    doc: str = "",
):
    """Build `settings` from the command line. Abbreviated and unknown flags are errors.

    presets: value of --model -> defaults that fit it; flags given by the user win over them.
    """
    parser = _Parser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # `int | None`: the flag itself takes an int
            kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
        default = (
            " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        )
        shown = "" if default in (None, "") else f" (default: {default})"
        options = dict(
            default=field.default, help=f"{field.metadata['help']}{shown}".replace("%", "%%")
        )
        if (
            typing.get_origin(kind) is tuple
        ):  # `tuple[str, ...]`: any number of values after one flag
            kind, options["nargs"] = typing.get_args(kind)[0], "*"
            if not field.default:  # and the flag may be repeated
                options |= dict(action="extend", default=[])
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            allowed = field.metadata["choices"]
            metavar = "{" + ",".join(map(str, allowed)) + "}" if allowed else kind.__name__.upper()
            options |= dict(type=kind, choices=allowed, metavar=metavar)
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    if presets:
        first = _Parser(add_help=False, allow_abbrev=False)
        first.add_argument("--model")
        parser.set_defaults(**presets.get(first.parse_known_args(argv)[0].model, {}))
    values = vars(parser.parse_args(argv))
    return settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def shown(text: str) -> str:
    """Foreign text as a terminal may show it: control characters, but for newline and tab, are
    written out (\\x1b), so that they can neither move the cursor nor change what stands there.
    """
    return "".join(
        ascii(c)[1:-1] if category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text
    )


def run(main: Callable[[], None]) -> None:
    """Call main; end with exit code 2 and one sentence on stderr for a UserError, 130 for Ctrl-C,
    and 0 where the reader of our output, such as head, has read enough.
    """
    try:
        main()
    except UserError as e:
        print(shown(" ".join(str(e).split())), file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        # Python writes what stdout still holds when it ends; that would fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
