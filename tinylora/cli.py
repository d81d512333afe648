"""What the commands share: settings from flags and a TOML file, one-line errors with exit code 2, a table."""

import sys
import tomllib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from tinylora.errors import InputError
from tinylora.waiting import watch


def flag(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


def split_flag(arguments: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of --name (or --name=value) if it is there, and the other arguments."""
    rest, value, remaining = [], None, iter(arguments)
    for argument in remaining:
        if argument == name:
            value = next(remaining, None)
            if value is None:
                raise InputError(f"{name} needs a value")
        elif argument.startswith(name + "="):
            value = argument.split("=", 1)[1]
        else:
            rest.append(argument)
    return value, rest


def read_settings(path: str, config: type[Any]) -> dict[str, Any]:
    """Settings from a TOML file whose keys are the flags' names, with - or _. InputError for an unknown key."""
    try:
        raw = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--config {path} is not valid TOML: {error}") from None
    settings = {key.replace("-", "_"): tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
    unknown = settings.keys() - {f.name for f in fields(config)}
    if unknown:
        raise InputError(f"--config {path}: unknown settings {', '.join(sorted(unknown))}")
    return settings


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command; bad input is one line on stderr and exit code 2, a warning is one line there."""
    watch()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])
