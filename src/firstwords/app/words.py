"""Text for a person at a terminal: nothing in it can steer the terminal, and it is short."""

from __future__ import annotations

import re
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return text with control characters spelled out (`\x1b`), so that no output can steer a terminal."""
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return text as one visible line."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "⏎").replace("\t", " ")


def duration(seconds: float) -> str:
    """Return a time for a person: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60 and not rest:
        return f"{minutes} min"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: int, noun: str) -> str:
    """Return so many of something: `1 step`, `1,200 steps`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def sparkline(values: Sequence[float], width: int) -> str:
    """Return a curve as `width` blocks between its lowest and its highest value; each shows the value at its place."""
    if not values:
        return ""
    low, span = min(values), max(values) - min(values)
    shown = (values[i * len(values) // width] for i in range(width))
    return "".join(BLOCKS[int((value - low) / span * (len(BLOCKS) - 1) + 0.5) if span else 0] for value in shown)
