"""A configuration as TOML, in and out."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from firstwords import reading
from firstwords.config import NONE, PART_NAMES, RunConfig, convert, flatten, key_types, require_known
from firstwords.errors import ConfigError, DataError, NoInputError

MOST_DOTS = 100  # in a line of TOML, outside strings and comments
TOML_STRING = re.compile(r""""(?:[^"\\]|\\.)*+"|'[^']*+'|#.*""")  # or a comment


def read_toml(path: Path) -> dict[str, Any]:
    """Return the overrides in a TOML file.

    Raises:
        NoInputError, DataError: It is not there, or cannot be read.
        ConfigError: As `from_toml`.
    """
    if not path.exists():
        raise NoInputError("no such file", where=str(path), do="check the name")
    try:
        text = reading.read_bytes(path).decode("utf-8-sig")  # as editors on Windows begin it
    except UnicodeDecodeError as error:
        raise DataError("cannot be read", where=str(path), why=str(error)) from error
    return from_toml(text, str(path))


def from_toml(text: str, where: str) -> dict[str, Any]:
    """Return the overrides in the text of a TOML file.

    Raises:
        ConfigError: It is no TOML; the line and column are in the message. Or a line has over 100 dots outside strings.
            An unknown key, or a value of the wrong type.
    """
    lines = (TOML_STRING.sub("", line) for line in text.splitlines())
    if any(line.count(".") > MOST_DOTS for line in lines):  # the parser's time grows with their square
        raise ConfigError("is no TOML", where=where, why=f"a line has over {MOST_DOTS} dots")
    try:
        found = flatten(tomllib.loads(text))
    except (ValueError, RecursionError) as error:  # ValueError: no TOML, or a number of thousands of digits
        raise ConfigError("is no TOML", where=where, why=str(error)) from error
    types_of = key_types()
    for key, value in found.items():
        if key in PART_NAMES:
            raise ConfigError("must be a table", where=f"{where}, {key}", do=f"write [{key}] in a line, its keys below it")
        try:
            require_known(key, types_of)
            convert(key, value, types_of[key])
        except ConfigError as error:
            raise ConfigError(error.what, where=f"{where}, {key}", why=error.why, do=error.do) from error
        except ValueError as error:  # Python writes no whole number of over 4,300 digits, which TOML can have in base 16
            raise ConfigError("holds too long a number", where=f"{where}, {key}", do="give a shorter one") from error
    return found


def to_toml(config: RunConfig) -> str:
    """Return the whole configuration as TOML: `"none"` where there is no value, so that no preset fills it in again."""
    return tomli_w.dumps(dataclasses.asdict(config, dict_factory=_without_none))


def _without_none(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: NONE if value is None else value for key, value in items}
