"""The only reader of whole small files: JSON, configuration, tokenizers. They may come from a stranger, or be misspelt.

A file is asked for its kind and size before it is opened, its JSON for its depth and its number of values before a parser
sees it. What is refused is a DataError, never a RecursionError or MemoryError, and costs no time to speak of.
"""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from firstwords.errors import DataError, PermissionDeniedError, StorageError

MOST_BYTES = 16 << 20  # of a JSON or configuration file
MOST_TOKENIZER_BYTES = 256 << 20  # a vocabulary of 2^20 ids takes some 50 MB
NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
BYTES_A_VALUE = 32  # a Python object takes over 60 bytes and `{},` only 3; so many values are allowed for the largest size
MOST_DEPTH = 64
LFS_POINTER, LFS_PULL = b"version https://git-lfs", "fetch the file that it stands for: git lfs pull"
MOST_DIGITS = 20  # of a whole number: 64 bits
MOST_NAME_BYTES = 255
MOST_NAMES = 1000  # of a folder, that are held against a misspelt one: some take 0.1 ms each
# Whatever is no bracket or comma outside a string. Possessive and with an optional end, so that it never goes back.
NO_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[^"\[\]{},]++', re.DOTALL)
STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord(","): 0}


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file of at most `most_bytes`.

    Raises:
        DataError: It is larger, or as `regular`.
        PermissionDeniedError, StorageError: The system does not let us read it now.
    """
    with regular(path) as (file, size):
        if size > most_bytes:
            raise DataError(f"has {size} bytes", where=str(path), why=f"at most {most_bytes} make sense here")
        return file.read(size)


@contextmanager
def regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file, and give it with its size in bytes.

    What was opened is looked at, not what stood there before. A FIFO, for which one waits without end, is not waited for.

    Raises:
        DataError: It is not there, or is a folder, a FIFO, a device; or it is damaged.
        PermissionDeniedError, StorageError: The system does not let us read it now.
    """
    with opening(path), open(path, "rb", opener=_without_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DataError("is no regular file", where=str(path))
        yield file, found.st_size


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Tell what is damaged (missing, or a bad place of the disk) from what the system does not let us read now.

    Raises:
        DataError: It is damaged, so that another copy is needed.
        PermissionDeniedError, StorageError: It may be whole, so that nobody sets it aside.
    """
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        match error.errno:
            case errno.EIO | errno.ENOENT | errno.EISDIR | errno.ENOTDIR | errno.ELOOP | errno.ENAMETOOLONG:
                raise DataError("cannot be read", where=str(path), why=why, do="check the name and the disk") from error
            case errno.EACCES | errno.EPERM:
                raise PermissionDeniedError("may not be read", where=str(path), why=why, do="allow it") from error
            case _:
                raise StorageError(
                    "reading failed", where=str(path), why=why, do="check the disk, then try again"
                ) from error
    except ValueError as error:  # a NUL in the name
        raise DataError("cannot be read", where=str(path), why=str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        DataError: As `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path), str(path))


def parse_json(data: bytes, where: str, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Return the JSON object in `data`.

    Args:
        data: UTF-8.
        where: What it is part of, for messages.
        most_bytes: The largest size; it also bounds the number of values.

    Raises:
        DataError: No JSON object, too large, nested over 64 deep, a key twice, NaN, Infinity, a number over 20
            digits, or half of a surrogate pair.
    """
    if len(data) > most_bytes:
        raise DataError(f"has {len(data)} bytes", where=where, why=f"at most {most_bytes} make sense here")
    skeleton = NO_STRUCTURE.sub(b"", data)
    if len(skeleton) > most_bytes // BYTES_A_VALUE:
        raise DataError("has too many values", where=where, why=f"at most {most_bytes // BYTES_A_VALUE} make sense here")
    if max(accumulate(STEPS[byte] for byte in skeleton), default=0) > MOST_DEPTH:
        raise DataError("is nested too deep", where=where, why=f"at most {MOST_DEPTH} brackets may be open")
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_without_repetition,
            parse_int=_whole_number,
            parse_float=_number,
            parse_constant=_no_number,
        )
        if b"\\ud" in data.lower():  # half a character can be read and neither shown nor written
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise DataError("is no proper JSON", where=where, why=str(error)) from error
    if not isinstance(value, dict):
        raise DataError("is no JSON object", where=where, why="it must be one, in { and }")
    return value


def require_no_pointer(head: bytes, where: str) -> None:
    """Raise a DataError for the first bytes of a file that Git LFS put in the place of another."""
    if head.startswith(LFS_POINTER):
        raise DataError("is a Git LFS pointer", where=where, why="the file itself was not downloaded", do=LFS_PULL)


def require_plain_names(names: Iterable[str], where: str) -> None:
    """Raise a DataError unless each name is that of a file inside one folder, and they differ on every file system.

    Refused are paths, `..`, control and other unprintable characters, over 255 bytes, and names that differ in case only.
    """
    seen: dict[str, str] = {}
    for name in names:
        too_long = len(name.encode(errors="replace")) > MOST_NAME_BYTES
        if not name.isprintable() or too_long or name in ("", ".", "..") or set(name) & set("/\\:"):
            raise DataError(f"{name[:80]!r} is no plain file name", where=where)
        if other := seen.get(name.casefold()):
            raise DataError(f"names {other!r} and {name!r}", where=where, why="some file systems take them for one")
        seen[name.casefold()] = name


def is_utf8(text: str) -> bool:
    """Whether text has bytes in UTF-8: names and arguments that had none come as half a surrogate pair for each byte."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def number(value: Any) -> float | int | None:
    """Return a value of a file where it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | NO_WAITING)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return value


def _whole_number(text: str) -> int:
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"the number {text[:20]}... has {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no finite number")


def nearest(path: Path, fits: Callable[[Path], bool] = lambda _: True) -> Path | None:
    """Return what a person may have meant by a path: of its folder, what fits and is named most like it.

    Args:
        path: What was named; it is not there, or does not fit.
        fits: Whether another path can be meant.
    """
    try:
        others = islice((entry for entry in path.parent.iterdir() if entry.name != path.name), MOST_NAMES)
        likely = difflib.get_close_matches(path.name, [entry.name for entry in others if _seems(fits, entry)], n=1)
    except (OSError, ValueError):  # it cannot be listed, or its name holds a NUL
        return None
    return path.parent / likely[0] if likely else None


def _seems(fits: Callable[[Path], bool], path: Path) -> bool:
    try:
        return fits(path)
    except OSError:
        return False
