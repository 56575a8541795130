"""What a text costs those who learn nothing: chance, compressors, an n-gram model.

A compressor that is given the training text is charged for what the held-out text adds: size(training + held-out) -
size(training). Sizes are those of the programs: `xz -9e`, `bzip2 -9`; PPMd is 7-zip's, order 6, where the package pyppmd is.
"""

from __future__ import annotations

import bz2
import functools
import importlib
import lzma
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from firstwords.insight import ngram
from firstwords.text import corpus as corpora
from firstwords.text.corpus import Corpus

UNIFORM, NGRAM = "uniform", "n-gram"
PPMD_ORDER, PPMD_MEMORY = 6, 256 << 20
COMPRESSED_BYTES = 5 << 20  # of the training text, its last ones, that a compressor is given: xz takes a second for each MB
COUNTED_BYTES = 64 << 20  # that the n-gram model is given: six seconds, 0.3 GB
LONGEST_HELD_OUT = 8 << 20  # that is compressed
# And shortest whose share in a size can be told: xz counts in fours, and bzip2, which sorts the training text anew with it,
# may need hundreds of bytes less then.
SHORTEST_GIVEN = {"xz": 1 << 9, "bzip2": 1 << 14}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Baseline:
    """What one of them needs for the held-out text."""

    name: str
    kind: str  # uniform, compressor or n-gram
    bits_per_byte: float
    block_nats: Array | None = None  # what each block costs; None: only the whole is known


@dataclass(frozen=True)
class Given:
    """A training text."""

    n_bytes: int
    last: Callable[[int], list[bytes]]  # at most so many bytes from its end, as documents

    @classmethod
    def of(cls, corpus: Corpus) -> Given:
        """Return that of a prepared text."""
        return cls(corpus.train.n_bytes, functools.partial(corpora.documents, corpus.train, corpus.tokenizer))

    def named(self, most: int) -> str:
        """Return how to speak of what is taken of it."""
        return "the training text" if self.n_bytes <= most else f"the training text's last {most >> 20} MB"


def baselines(held_out: Sequence[bytes], given: Given | None, cuts: Array, *, quick: bool = False) -> Iterator[Baseline]:
    """Yield every baseline that there is for a held-out text.

    Args:
        held_out: Its documents.
        given: The training text; None: it is not known.
        cuts: Where the blocks begin by which intervals are made.
        quick: Of the compressors only bzip2, which takes a tenth of xz's time.
    """
    text = b"".join(held_out)
    yield Baseline(UNIFORM, "uniform", 8.0, np.diff([*cuts, len(text)]) * math.log(256))
    if len(text) <= LONGEST_HELD_OUT:
        yield from _compressors(text, given, cuts, quick=quick)
    if given is not None:
        nats = ngram.train(given.last(COUNTED_BYTES)).nats(held_out)
        name, per_block = f"{NGRAM} of {given.named(COUNTED_BYTES)}", np.add.reduceat(nats, cuts, dtype=np.float64)
        yield Baseline(name, "n-gram", float(per_block.sum()) / math.log(2) / len(text), per_block)


def xz_bytes(text: bytes) -> int:
    """Return the size of what `xz -9e` makes of a text."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def bzip2_bytes(text: bytes) -> int:
    """Return the size of what `bzip2 -9` makes of a text."""
    return len(bz2.compress(text))


def ppmd_bytes(text: bytes, known: bytes, cuts: Array) -> Array | None:
    """Return the bytes that PPMd needs for each stretch of a text after a known one, or None where pyppmd is not installed.

    What it gives out lags a few bytes behind what it was given, so a stretch's figure is off by as many.
    """
    try:
        pyppmd = importlib.import_module("pyppmd")
    except ImportError:
        return None
    encoder = pyppmd.Ppmd7Encoder(PPMD_ORDER, PPMD_MEMORY)
    if known:
        encoder.encode(known)
    stretches = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    sizes = [len(encoder.encode(stretch)) for stretch in stretches]
    sizes[-1] += len(encoder.flush())
    return np.array(sizes)


def _compressors(text: bytes, given: Given | None, cuts: Array, *, quick: bool) -> Iterator[Baseline]:
    """Yield each compressor alone, and where the training text is known, given that."""
    known = b"" if given is None else b"".join(given.last(COMPRESSED_BYTES))
    after = "" if given is None else f" given {given.named(COMPRESSED_BYTES)}"
    wanted = [text, known + text, known] if known else [text]
    with ThreadPoolExecutor() as pool:  # both let other threads go on
        sizes = {"bzip2": pool.map(bzip2_bytes, wanted)} | ({} if quick else {"xz": pool.map(xz_bytes, wanted)})
        for name, found in sizes.items():
            alone, *both = found
            yield Baseline(f"{name} alone", "compressor", 8 * alone / len(text))
            if both and len(text) >= SHORTEST_GIVEN[name]:
                yield Baseline(name + after, "compressor", 8 * (both[0] - both[1]) / len(text))
    if quick:
        return
    for name, before in {"PPMd alone": b"", **({f"PPMd{after}": known} if known else {})}.items():
        stretches = ppmd_bytes(text, before, cuts)
        if stretches is not None:
            yield Baseline(name, "compressor", 8 * float(stretches.sum()) / len(text), stretches * math.log(256))
