"""An n-gram model of bytes: what a text's next byte is worth to whoever has only counted.

Interpolated modified Kneser-Ney smoothing (Chen & Goodman 1999, doi:10.1006/csla.1999.0128), the discounts from counts of
counts (their eq. 26), and the begin of a document a symbol that is seen and never predicted, as kenlm's lmplz has it
(Heafield et al. 2013, aclanthology P13-2121). Unlike there the end of a document is not predicted: no figure counts it.

A symbol is a byte or a mark and takes 9 bits, so that six of them are one uint64 whose low bits are the newest. Counting is
sorting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ORDER = 6
BITS = 9  # of a symbol
BYTE_VALUES = 256
BEGIN, NOTHING = 256, 257  # the begin of a document, and what stands before it
AT_ONCE = 1 << 22  # symbols that are packed or looked up together
FALLBACK = (0.0, 0.5, 1.0, 1.5)  # discounts where counts of counts give none: lmplz's --discount_fallback


@dataclass(frozen=True)
class Table:
    """The k-grams of one order, sorted, and the contexts that they begin with."""

    keys: Array  # (n,) uint64
    shares: Array  # (n,) float32: the discounted count, divided by that of all k-grams of the context
    contexts: Array  # (m,) uint64
    left: Array  # (m,) float32: the share that a context leaves to the order below


@dataclass(frozen=True)
class NGram:
    """A trained model: one table for each order, from 1."""

    tables: tuple[Table, ...]

    def nats(self, documents: Iterable[bytes]) -> Array:
        """Return -ln p of every byte of some documents, one after the other, (N,) float64."""
        found = [-np.log(self._probabilities(keys)) for keys in _packed(documents)]
        return np.concatenate(found) if found else np.empty(0)

    def probabilities(self, before: bytes) -> Array:
        """Return the probabilities of all bytes after the begin of a document, (256,) float64; their sum is 1."""
        history = [*[NOTHING] * ORDER, BEGIN, *before][-(ORDER - 1) :]
        packed = np.uint64(0)
        for symbol in history:
            packed = packed << np.uint64(BITS) | np.uint64(symbol)
        return self._probabilities(packed << np.uint64(BITS) | np.arange(BYTE_VALUES, dtype=np.uint64))

    def _probabilities(self, keys: Array) -> Array:
        """Return p of the last symbol of each key.

        p_k(w | h) = max(c(hw) - D(c(hw)), 0) / Σ c(h·) + left(h) p_(k-1)(w | h less its oldest), p_0 = 1/256.
        """
        keys, places = np.unique(keys, return_inverse=True)  # in order, a search finds its way in the CPU's cache
        p = np.full(len(keys), 1 / BYTE_VALUES)
        for k, table in enumerate(self.tables, start=1):
            wanted = keys & _mask(k)
            p *= lookup(table.contexts, table.left, wanted >> np.uint64(BITS), missing=1)
            p += lookup(table.keys, table.shares, wanted, missing=0)
        return p[places]


def train(documents: Iterable[bytes]) -> NGram:
    """Return the model of some documents; without a byte in them it is the uniform one. Deterministic.

    Memory follows the number of different 6-grams, not the length of the text.
    """
    keys, counts = _counted(_packed(documents))
    tables = []
    for k in range(ORDER, 0, -1):
        real = keys >> np.uint64(BITS * (k - 1)) != NOTHING
        tables.append(_table(keys[real], counts[real]))
        if k > 1:
            keys, counts = _one_shorter(keys, counts, k - 1)
    return NGram(tuple(reversed(tables)))


def _packed(documents: Iterable[bytes]) -> Iterator[Array]:
    """Yield every byte with the five symbols before it as keys, (n,) uint64, in order."""
    rest = np.full(ORDER - 1, NOTHING, np.uint16)
    for new in _symbols(documents):
        symbols = np.concatenate((rest, new))
        newest = symbols[ORDER - 1 :]
        keys, begun = newest.astype(np.uint64), np.zeros(len(newest), bool)
        for age in range(1, ORDER):
            begun |= symbols[ORDER - age : len(symbols) - age + 1] == BEGIN
            symbol = np.where(begun, NOTHING, symbols[ORDER - 1 - age : len(symbols) - age])
            keys |= symbol.astype(np.uint64) << np.uint64(BITS * age)
        yield keys[newest != BEGIN]
        rest = symbols[-(ORDER - 1) :]


def _symbols(documents: Iterable[bytes]) -> Iterator[Array]:
    """Yield the symbols of documents, uint16, about `AT_ONCE` together."""
    waiting, n_waiting = list[Array](), 0
    for document in documents:
        waiting.append(np.array([BEGIN], np.uint16))
        for start in range(0, len(document), AT_ONCE):
            waiting.append(np.frombuffer(document, np.uint8, min(AT_ONCE, len(document) - start), start).astype(np.uint16))
            n_waiting += len(waiting[-1])
            if n_waiting >= AT_ONCE:
                yield np.concatenate(waiting)
                waiting, n_waiting = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _counted(groups: Iterable[Array]) -> tuple[Array, Array]:
    """Return the different keys of all groups, sorted, and how often each is there."""
    keys, counts = np.empty(0, np.uint64), np.empty(0, np.uint32)
    for group in groups:
        group.sort()
        some, firsts = _firsts(group)
        more = np.diff(firsts, append=len(group)).astype(np.uint32)
        keys, counts = _summed(np.concatenate((keys, some)), np.concatenate((counts, more)))
    return keys, counts


def _one_shorter(keys: Array, counts: Array, k: int) -> tuple[Array, Array]:
    """Return the k-grams that end the given ones: each counts the different symbols before it.

    Before the begin of a document there is but one, so a k-gram that begins there counts how often it is there.
    """
    suffixes = keys & _mask(k)
    at_begin = suffixes >> np.uint64(BITS * (k - 1)) >= BEGIN
    return _summed(suffixes, np.where(at_begin, counts, np.uint32(1)))


def _summed(keys: Array, counts: Array) -> tuple[Array, Array]:
    """Return the different keys, sorted, and the sum of the counts of each."""
    order = np.argsort(keys, kind="stable")  # a merge where the keys are two sorted rows
    keys, firsts = _firsts(keys[order])
    return keys, np.add.reduceat(counts[order], firsts) if len(firsts) else counts


def _firsts(ordered: Array) -> tuple[Array, Array]:
    """Return the different values of a sorted array, and where each stands first."""
    firsts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))) if len(ordered) else np.empty(0, int)
    return ordered[firsts], firsts


def _table(keys: Array, counts: Array) -> Table:
    """Return the table of the k-grams of one order, which have these counts."""
    amounts = discounts(counts)[np.minimum(counts, 3)]
    contexts, firsts = _firsts(keys >> np.uint64(BITS))
    totals = np.add.reduceat(counts, firsts, dtype=np.float64)
    sizes = np.diff(firsts, append=len(keys))
    shares = (counts - amounts) / np.repeat(totals, sizes)
    left = np.add.reduceat(amounts, firsts) / totals
    return Table(keys, shares.astype(np.float32), contexts, left.astype(np.float32))


def discounts(counts: Array) -> Array:
    """Return what a k-gram that counts 0, 1, 2, 3 or more gives away, (4,).

    D_j = j - (j + 1) Y n_(j+1) / n_j with Y = n_1 / (n_1 + 2 n_2), and n_j the number of k-grams that count j. Where the
    text is too small for that, as any text is for single bytes, `FALLBACK`.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)
    if not n[1:4].all():
        return np.array(FALLBACK)
    y = n[1] / (n[1] + 2 * n[2])
    found = np.array([0.0, *(j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3))])
    return found if (found >= 0).all() else np.array(FALLBACK)


def lookup(keys: Array, values: Array, wanted: Array, *, missing: float) -> Array:
    """Return the value of each wanted key, or `missing`."""
    if not len(keys):
        return np.full(len(wanted), float(missing))
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], missing)


def _mask(k: int) -> np.uint64:
    """Return the bits of the k newest symbols."""
    return np.uint64((1 << BITS * k) - 1)
