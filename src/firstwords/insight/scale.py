"""One honest scale: bits per byte of a model beside what chance, compressors, an n-gram model and other models need.

Whatever has an opinion on every byte is compared on the same blocks of the same held-out text, by bytes, so that tokenizers
do not matter: a token's nats belong to where its bytes begin.

Intervals are Student's, of 95 %, over at most 30 blocks: neighbouring bytes are not independent, so blocks are few and long,
as batch means are (Schmeiser 1982, doi:10.1287/opre.30.3.556), and documents of up to a tenth of the text stay whole. A
bootstrap-t over as few is absurdly wide where a resample holds nearly equal ones. `benchmarks/coverage.py` measures how
often they hold. They speak of texts like the held-out one: what stands on a single stretch of a long text cannot tell how
its other parts are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from firstwords.insight.baselines import Baseline

if TYPE_CHECKING:
    from firstwords.training.evaluate import Evaluation, TokenFigures

BLOCKS, FEWEST_BLOCKS = 30, 5
SHORTEST_BLOCK = 256  # bytes
LONG_DOCUMENT = 0.1  # of the text: one that is longer is cut
Z_95 = 1.959964  # the standard normal distribution's quantile at 0.975
TOP = 5
TOO_SHORT = "the held-out text is too short for intervals"
ONE_STRETCH = "the intervals speak of texts like these few stretches: other parts of a long text may lie outside them"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Interval:
    """Such intervals hold the true figure, that of endless text like this, 95 times of 100."""

    low: float
    high: float

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class ScaleEntry:
    """One place on the scale, or how far the model is from it."""

    name: str
    kind: str  # model, other (a model named beside it), n-gram, compressor or uniform
    bits_per_byte: float
    interval: Interval | None  # None: a compressor gives one number, or there are too few blocks

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of the mark."""
        ends = {"low": None, "high": None} if self.interval is None else asdict(self.interval)
        return {"name": self.name, "kind": self.kind, "bits_per_byte": self.bits_per_byte, **ends}


@dataclass(frozen=True)
class Position:
    """The loss of targets that are predicted from `first` to `last` tokens."""

    first: int
    last: int
    nats_per_token: float
    n_tokens: int


@dataclass(frozen=True)
class Scale:
    """How good a model is, and what that is worth."""

    name: str
    evaluation: Evaluation
    interval: Interval | None
    top1: float  # the share of tokens that were the model's first choice
    top5: float
    by_position: tuple[Position, ...]
    marks: tuple[ScaleEntry, ...]  # the best first
    # By how many bits per byte each other one needs more than the model, on the same blocks.
    differences: tuple[ScaleEntry, ...]
    n_blocks: int  # that the intervals stand on
    words: tuple[str, ...]
    caveat: str | None  # what the intervals do not say

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of the command line's contract."""
        return {
            **self.evaluation.as_dict(),
            "interval": None if self.interval is None else asdict(self.interval),
            "accuracy": {"top1": self.top1, "top5": self.top5},
            "by_position": [asdict(position) for position in self.by_position],
            "scale": [mark.as_dict() for mark in self.marks],
            "differences": [difference.as_dict() for difference in self.differences],
            "n_blocks": self.n_blocks,
            "words": list(self.words),
            "caveat": self.caveat,
        }


@dataclass(frozen=True)
class Blocks:
    """Stretches of a held-out text, one after the other."""

    starts: Array  # (n,) bytes
    n_bytes: Array  # (n,)
    cut: bool  # a document is in more than one

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Blocks:
        """Return the blocks of documents of these lengths in bytes: at most 30, and none much shorter than 256.

        Whole documents go together; one that is longer than a tenth of the text is cut.
        """
        total = sum(lengths)
        size = max(total / BLOCKS, SHORTEST_BLOCK)
        starts, at, since, cut = [0], 0, 0, False
        for length in lengths:
            pieces = max(1, int(length / size)) if length > LONG_DOCUMENT * total else 1
            cut |= pieces > 1
            for i in range(1, pieces + 1):
                end = at + length * i // pieces
                if end - since >= size * (1 - 1e-9) and total - end >= size / 2:
                    starts.append(end)
                    since = end
            at += length
        return cls(np.array(starts), np.diff(starts, append=total), cut)

    @property
    def caveat(self) -> str | None:
        """What intervals over these blocks do not say."""
        if len(self.starts) < FEWEST_BLOCKS:
            return TOO_SHORT
        return ONE_STRETCH if self.cut else None

    def sums(self, byte_nats: Array) -> Array:
        """Return the nats of each block, of those of each byte (N,)."""
        return np.add.reduceat(byte_nats, self.starts, dtype=np.float64)


def interval(nats: Array, n_bytes: Array) -> Interval | None:
    """Return the interval of Σ nats / ln 2 / Σ bytes over blocks; None where there are fewer than five.

    Source: the standard error of a ratio of sums from its residuals, Cochran 1977, Sampling Techniques, section 6.4.
    """
    if len(nats) < FEWEST_BLOCKS:
        return None
    bits, n = nats / math.log(2), len(nats)
    mean = float(bits.sum() / n_bytes.sum())
    error = math.sqrt(float(((bits - mean * n_bytes) ** 2).sum()) * n / (n - 1)) / float(n_bytes.sum())
    around = students_quantile(n - 1) * error
    return Interval(mean - around, mean + around)


def students_quantile(degrees: int) -> float:
    """Return the quantile at 0.975 of Student's t distribution, to 0.3 % from four degrees of freedom on.

    Source: Abramowitz & Stegun 1964, Handbook of Mathematical Functions, 26.7.5.
    """
    z = Z_95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def byte_nats(tokens: TokenFigures) -> Array:
    """Return the nats of each byte, (N,): those of a token stand at its first."""
    found = np.zeros(tokens.evaluation.n_bytes)
    found[tokens.bytes_before] = tokens.nats
    return found


def scale(
    name: str,
    tokens: TokenFigures,
    others: Sequence[tuple[str, TokenFigures]],
    baselines: Sequence[Baseline],
    blocks: Blocks,
) -> Scale:
    """Return the scale of a model on a held-out text.

    Args:
        name: Of the model.
        tokens: What it makes of the text.
        others: Other models and what they make of the same text.
        baselines: Of the same text.
        blocks: Of the same text.
    """
    own = blocks.sums(byte_nats(tokens))
    own_bits = tokens.evaluation.bits_per_byte
    rows: list[tuple[str, str, float, Array | None]] = [
        (other, "other", found.evaluation.bits_per_byte, blocks.sums(byte_nats(found))) for other, found in others
    ]
    rows += [(base.name, base.kind, base.bits_per_byte, base.block_nats) for base in baselines]
    marks, differences = [ScaleEntry(name, "model", own_bits, _above_nothing(interval(own, blocks.n_bytes)))], []
    for other, kind, bits, sums in rows:
        around = None if sums is None else _above_nothing(interval(sums, blocks.n_bytes))
        marks.append(ScaleEntry(other, kind, bits, Interval(bits, bits) if kind == "uniform" else around))
        between = None if sums is None else interval(sums - own, blocks.n_bytes)
        differences.append(ScaleEntry(other, kind, bits - own_bits, between))
    return Scale(
        name,
        tokens.evaluation,
        marks[0].interval,
        float((tokens.ranks == 1).mean()),
        float((tokens.ranks <= TOP).mean()),
        by_position(tokens),
        tuple(sorted(marks, key=lambda mark: mark.bits_per_byte)),
        tuple(differences),
        len(blocks.starts),
        tuple(words(differences)),
        blocks.caveat,
    )


def _above_nothing(found: Interval | None) -> Interval | None:
    """Return an interval of a cost, which is never below 0."""
    return None if found is None else Interval(max(0.0, found.low), found.high)


def by_position(tokens: TokenFigures) -> tuple[Position, ...]:
    """Return the loss by how many tokens stand before the target: 1, 2, 3-4, 5-8, and so on."""
    T = len(tokens.position_tokens)
    edges = [0, *(1 << i for i in range((T - 1).bit_length())), T]
    found = []
    for first, end in pairwise(edges):
        count = int(tokens.position_tokens[first:end].sum())
        if count:
            found.append(Position(first + 1, end, float(tokens.position_nats[first:end].sum()) / count, count))
    return tuple(found)


def words(differences: Sequence[ScaleEntry]) -> list[str]:
    """Return what the scale says, in plain lines: the n-gram model, the best compressor, each other model."""
    kinds = {kind: [d for d in differences if d.kind == kind] for kind in ("n-gram", "compressor", "other")}
    best = sorted(kinds["compressor"], key=lambda difference: difference.bits_per_byte)[:1]
    return [_in_words(difference) for difference in (*kinds["n-gram"], *best, *kinds["other"])]


def _in_words(difference: ScaleEntry) -> str:
    """Return one line on one difference, with what to do where the model is worse."""
    bits, found = difference.bits_per_byte, difference.interval
    around = "" if found is None else f" ± {found.half:.2f}"
    what = f"an {difference.name}" if difference.kind == "n-gram" else difference.name
    if bits == 0 or (found is not None and found.low <= 0 <= found.high):
        return f"not to be told from {what}: {bits:+.2f}{around} bits per byte"
    if bits > 0:
        return f"better than {what}, by {bits:.2f}{around} bits per byte"
    counting = "; who only counts does better: train longer, or on more text"
    advice = {"n-gram": counting, "other": "; for such a text that one is the better"}
    return f"worse than {what}, by {-bits:.2f}{around} bits per byte" + advice.get(difference.kind, "")
