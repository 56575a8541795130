"""The surprise map: which passage is shown, and how hot each token is."""

from __future__ import annotations

import itertools
import re

from firstwords.text.corpus import Part
from firstwords.text.tokenizer import Tokenizer

PASSAGE_BYTES = 700  # some 200 tokens of a BPE: half a page of text, explained in a moment
MOST_IDS = 4096  # that are looked at for it
PART = "·"  # stands where a token is only a part of a letter, which the last of its parts shows
HOTTEST = 8.0  # nats from which a token is shown at full heat: one chance in 3,000


def passage(part: Part, tokenizer: Tokenizer) -> str | None:
    """Return the beginning of a held-out text, or None where there is too little.

    It begins with the first whole line, or else the first whole word, where that leaves most of the text. It is of the first
    document that is long enough, or of the longest; the same part gives the same passage.
    """
    ids = (int(token) for token in part.ids[1:MOST_IDS])
    documents = (list(run) for ends, run in itertools.groupby(ids, tokenizer.end_of_text.__eq__) if not ends)
    texts = [b"".join(map(tokenizer.token_bytes, document))[: 2 * PASSAGE_BYTES] for document in documents]
    longest = max(texts, key=len, default=b"")
    text = next((text for text in texts if len(text) >= PASSAGE_BYTES), longest).decode(errors="ignore")
    for mark in ("\n", " "):
        before, found, after = text.partition(mark)
        if found and len(before.encode()) < min(PASSAGE_BYTES, len(text.encode())) // 2 and after.strip():
            text = after.lstrip("\n")
            break
    if len(text.encode()) > PASSAGE_BYTES:
        text = text.encode()[:PASSAGE_BYTES].decode(errors="ignore")
        text = re.sub(r"\s+\S{0,40}\Z", "", text)  # no half word at the end, where words are parted at all
    return text if len(tokenizer.encode(text)) > 1 else None


def heat(log_probability: float | None) -> float:
    """Return how surprising a token is, from 0 (certain) to 1 (`HOTTEST` nats or more)."""
    return 0.0 if log_probability is None else min(1.0, -log_probability / HOTTEST)
