"""Does a text go round in circles, and how varied is it? To be read beside the same figures of held-out text as long."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import regex

LOOP = 8  # characters that are at least repeated in a loop: "ll" and "no no" are none
# A word: a run of letters, marks and digits; one letter alone where words are written without spaces between them.
WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*|(?:[\p{L}\p{M}\p{N}]|(?<=\p{L})['’](?=\p{L}))+"
)


def repeated(text: str) -> float:
    """Return the share of characters in a span of at least LOOP that repeats what stands right before it.

    A character belongs to a loop of period p where p or more characters in a row, it among them, each equal the one p
    places before.
    """
    letters = np.frombuffer(text.encode("utf-32-le", errors="replace"), "<u4")
    inside = np.zeros(len(letters), bool)
    for period in range(1, len(letters) // 2 + 1):
        equal = np.concatenate(([False], letters[period:] == letters[:-period], [False]))
        edges = np.flatnonzero(equal[1:] != equal[:-1]) + period
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if end - start >= max(period, LOOP):
                inside[start:end] = True
    return float(inside.mean()) if len(letters) else 0.0


def distinct(text: str) -> float | None:
    """Return the share of the pairs of neighbouring words that are different pairs; None without a pair.

    Source: distinct-2, Li et al. 2016 (arXiv:1510.03055), here of one text.
    """
    pairs = list(pairwise(WORD.findall(text)))
    return len(set(pairs)) / len(pairs) if pairs else None
