"""Every error that a user can meet, on one page, with the exit code that it ends the program with.

An error says what is wrong, where, why, and what to do. A wrong call from Python code is a `ValueError`, not one of these.
What need end nothing is a line to a person, by whoever is given as `Notify`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable

Notify = Callable[[str], None]  # told one line that a person should read


class FirstwordsError(Exception):
    """Base of all errors of the user's world.

    Args:
        what: What is wrong, in one clause: `no such file`.
        where: The file, line, byte, key or flag that it concerns.
        why: The reason, where `what` does not say it.
        do: What the person can do now; a command or flag where there is one.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.do = what, where, why, do

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return head + "".join(f"; {part}" for part in (self.why, self.do) if part)

    def as_dict(self) -> dict[str, str | int]:
        """Return the error as the JSON object of the command line's contract."""
        return {"code": self.exit_code, "what": self.what, "where": self.where, "why": self.why, "do": self.do}


class UsageError(FirstwordsError):
    """The command line does not parse."""

    exit_code = 2


class DataError(FirstwordsError):
    """A text, corpus, checkpoint or other file is not what it should be."""

    exit_code = 65


class NoInputError(FirstwordsError):
    """A file or run that was named is not there."""

    exit_code = 66


class StoppedError(FirstwordsError):
    """The person stopped the program at once, by a second Ctrl-C or outside training."""

    exit_code = 130


class DivergedError(FirstwordsError):
    """Training produced a loss or gradient that is not a finite number."""

    exit_code = 70


class CannotCreateError(FirstwordsError):
    """An output cannot be made: the place is taken, locked, or not a folder."""

    exit_code = 73


class StorageError(FirstwordsError):
    """Reading or writing failed: disk full, input/output error."""

    exit_code = 74


class PermissionDeniedError(FirstwordsError):
    """The person may not read or write there."""

    exit_code = 77


class ConfigError(FirstwordsError):
    """A configuration key or value is unknown or impossible."""

    exit_code = 78


def ignore_line(line: str) -> None:
    """Do nothing with a line."""


SPECIAL = set("&|<>^()")  # to cmd.exe, outside of quotes


def quoted(*words: str) -> str:
    """Return words of a command as the shell of this system takes them, for a person to repeat."""
    if os.name != "nt":
        return shlex.join(words)

    import subprocess  # which takes its time

    as_arguments = (subprocess.list2cmdline([word]) for word in words)
    return " ".join(f'"{word}"' if set(word) & SPECIAL and word[0] != '"' else word for word in as_arguments)
