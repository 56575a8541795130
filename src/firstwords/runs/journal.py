"""What happened, one JSON object a line. Appended to while a run goes on, cut back to the checkpoint when it resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from firstwords import reading, store
from firstwords.errors import DataError, PermissionDeniedError, StorageError

BLANK, MOST_LOST_BYTES = b" " * 79 + b"\n", 1 << 28  # of lines that are filled up where they were lost


@dataclass(frozen=True)
class Journal:
    """A file of JSON lines."""

    path: Path

    def add(self, event: str, values: Mapping[str, Any]) -> None:
        """Append one line; numbers that are not finite become null."""
        line = {"event": event, **store.without_infinities(values)}
        store.append(self.path, json.dumps(line, ensure_ascii=False, allow_nan=False).encode(errors="replace") + b"\n")

    def cut(self, size_bytes: int) -> bool:
        """Cut it back to the length that a checkpoint recorded, and return whether it had all of that.

        One that is shorter, as after a copy that was not finished, is filled up with blank lines, for the checkpoint goes on
        to count on that length; half a line at its end goes first.

        Raises:
            DataError: It lacks so much that no journal can be meant.
        """
        missing = size_bytes - store.size(self.path)
        if missing <= 0:
            store.cut(self.path, size_bytes)
            return True
        if missing > MOST_LOST_BYTES:
            what, why = "is far shorter than its checkpoint says", f"{missing:,} bytes are lost"
            raise DataError(what, where=str(self.path), why=why)
        whole = 0
        if store.exists(self.path):
            with reading.regular(self.path) as (file, _):
                lines = iter(partial(file.readline, reading.MOST_BYTES), b"")
                whole = sum(len(line) for line in lines if line.endswith(b"\n"))
            store.cut(self.path, whole)
        blank, rest = divmod(size_bytes - whole, len(BLANK))
        store.append(self.path, BLANK[-rest:] * (rest > 0) + BLANK * blank)
        return False

    def size_bytes(self) -> int:
        """Return its length after making it durable, where the disk lets us: what a checkpoint records."""
        size = store.size(self.path)
        if size:
            with suppress(StorageError, PermissionDeniedError):  # weights are worth more than lines about them
                store.sync(self.path)
        return size

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what was added, oldest first; a last line that was torn by a kill is left out.

        Raises:
            DataError: A line is no JSON object, or the file is damaged.
            PermissionDeniedError, StorageError: The system does not let us read it now.
        """
        if not store.exists(self.path):
            return
        with reading.regular(self.path) as (file, _):  # bytes end lines at \n alone; what a model says may hold U+2028
            for number, line in enumerate(iter(partial(file.readline, reading.MOST_BYTES), b""), 1):
                if line.strip() and (line.endswith(b"\n") or len(line) == reading.MOST_BYTES):
                    yield self._read(line, number)

    def of_steps(self, *events: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the step and the line of each of these events that names one; a line without is no use to who goes on."""
        for line in self.lines():
            if line["event"] in events and isinstance(step := line.get("step"), int):
                yield step, line

    def _read(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = reading.parse_json(line, f"line {number}")
            return {**value, "event": value["event"]}
        except (DataError, KeyError) as error:
            do = "put as many spaces in its place: a run that goes on counts the bytes before its checkpoint"
            raise DataError("is no event", where=f"{self.path}:{number}", why=str(error), do=do) from error
