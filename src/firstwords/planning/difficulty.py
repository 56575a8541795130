"""How hard a text is to predict, measured on a sample of it in a fraction of a second, without a model of ours."""

from __future__ import annotations

import lzma
import math
from typing import Any

import numpy as np

from firstwords.insight.ngram import lookup

DISCOUNT = 0.8  # taken from every count for what was never seen; 0.7 to 0.9 is usual
FEWEST_BITS = 0.01  # of a copy; nothing takes none
TRAINING_BYTES, HELD_OUT_BYTES = 1 << 22, 1 << 18  # that are looked at, at most
PACKED_TRAINING, PACKED_HELD_OUT = 1 << 19, 1 << 16  # of them, by xz
CHUNKS = 16  # that a sample is made of, evenly spread
XZ: tuple[dict[str, Any], ...] = ({"id": lzma.FILTER_LZMA2, "preset": 1},)  # fast, and without the frame of a file

Ids = np.ndarray[Any, Any]
Grams = np.ndarray[Any, np.dtype[np.uint64]]


def bits_per_byte(*codes: float) -> float:
    """Return about how many bits a byte takes for who knows the rest of the text: the geometric mean of several codes.

    They are n-gram models of one, two and three tokens (`ngram_bits`), which know which tokens are frequent and follow each
    other, and nothing over a distance; and xz (`xz_bits`), which finds what stood before, however far away, and nothing less
    than literally so. A small GPT does some of each. Of the means that were tried, this came nearest to the runs of
    benchmarks/prediction_runs.jsonl, each text predicted without its own.

    Args:
        *codes: Bits a byte of each.
    """
    return math.exp(sum(math.log(max(FEWEST_BITS, bits)) for bits in codes) / len(codes))


def xz_bits(training: bytes, held_out: bytes) -> float:
    """Return the bits a byte by which `held_out` makes `training` longer when xz packs both."""
    both, alone = (len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=XZ)) for data in (training + held_out, training))
    return 8 * (both - alone) / max(1, len(held_out))


def ngram_bits(training: Ids, held_out: Ids, vocab_size: int, most: int) -> list[float]:
    """Return the bits that all ids of `held_out` take together under n-gram models of `training`, of 1 to `most` ids.

        p_n(b | c) = (max(n(c b) - D, 0) + D * kinds(c) * p_{n-1}(b | c')) / n(c),    p_0 = 1 / vocab_size

    n counts in `training`, kinds(c) is how many different ids followed c, c' is c without its first id; a context that never
    occurred leaves the matter to the shorter one. Interpolated absolute discounting: Ney, Essen & Kneser 1994, "On
    structuring probabilistic dependences in stochastic language modelling".

    Raises:
        ValueError: `most` ids do not fit into 64 bits.
    """
    bits = max(1, (vocab_size - 1).bit_length())
    if bits * most > 64:
        raise ValueError(f"{most} ids of {bits} bits are more than 64")
    p, found = np.full(len(held_out), 1 / vocab_size), []
    for order in range(most):
        if min(len(training), len(held_out)) > order:
            p[order:] = _one_order(
                _packed(training, order, bits), _packed(held_out, order, bits), np.uint64(bits), p[order:]
            )
        found.append(float(-np.log2(p).sum()))
    return found


def _one_order(training: Grams, wanted: Grams, bits: np.uint64, shorter: Any) -> Any:
    """Return the probabilities of the wanted grams' last ids, given those of one order less."""
    grams, counts = np.unique(training, return_counts=True)
    contexts, first, kinds = np.unique(grams >> bits, return_index=True, return_counts=True)
    totals, before = np.add.reduceat(counts, first), wanted >> bits
    count, total, kind = (
        lookup(grams, counts, wanted, missing=0),
        lookup(contexts, totals, before, missing=0),
        lookup(contexts, kinds, before, missing=0),
    )
    longer = (np.maximum(count - DISCOUNT, 0) + DISCOUNT * kind * shorter) / np.maximum(total, 1)
    return np.where(total > 0, longer, shorter)


def _packed(ids: Ids, order: int, bits: int) -> Grams:
    """Return each id with `order` ids before it as one number, the id itself lowest."""
    grams = np.zeros(len(ids) - order, np.uint64)
    for i in range(order + 1):
        grams <<= np.uint64(bits)
        last = ids[i : len(ids) - order + i]
        np.bitwise_or(grams, last, out=grams, dtype=np.uint64, casting="unsafe")  # in place: a sample's grams are 32 MB
    return grams
