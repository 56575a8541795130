"""How much of what a model says is its training text, word for word, and how much of any other text would be.

The samples are indexed, and the training text goes past them once: it may be of any length, and little of it is in memory.
Spans are told in characters of text, never in tokens, so that models with different tokenizers can be compared.

How a span is found: of the text only every eighth byte is looked at. Two aligned words of 8 bytes lie in every span of at
least SHORTEST bytes, wherever it stands; two such words that a sample holds as well are followed to both sides, byte by
byte. What is shorter is not looked for, nor what is the same 8 bytes or fewer again and again, as the spaces of a table, a
ruled line and `0, 0, 0,` are: from every one of its places to every other they would be followed. With 8 bytes of something
else it is found.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from firstwords.insight.variety import WORD, distinct, repeated
from firstwords.text.corpus import Part
from firstwords.text.tokenizer import Tokenizer

STEP = 8  # bytes that are compared at once, and from one anchor to the next
SHORTEST = 3 * STEP - 1  # bytes of a span that is found wherever it stands
# Characters from which a span counts as copied. Of held-out prose (the King James Bible, Shakespeare's plays) 0.3 % lies in
# spans of 40 that the rest holds as well, and nothing in spans of 50; licences and other set phrases do reach it.
COPIED = 50
GRAM = 8  # words
IDS_AT_ONCE, PAIRS_AT_ONCE = 1 << 17, 1 << 17
KEPT_BYTES = 1 << 24  # of a text that is kept decoded for the next look
# Of a text that is not kept: it goes by for the samples, for held-out text, and up to the place of the longest copy.
PASSES, PASSED_BYTES_PER_S = 3, 4e7
YARDSTICKS = 32  # pieces of held-out text
PROMPT_TOKENS = 4  # that a model is given to go on from, where what it says is measured
TABLE_BITS = 18
BETWEEN_DOCUMENTS, BETWEEN_SAMPLES = b"\xff", b"\xfe"  # bytes that no UTF-8 holds
_MIX, _MIX_NEXT = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd, with bits everywhere

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Place:
    """Where a span stands in the training text."""

    document: int  # from 0
    character: int  # of the document, from 0

    @property
    def words(self) -> str:
        """How a person counts; documents that are held out are not among them."""
        return f"learnt document {self.document + 1}, character {self.character + 1}"


@dataclass(frozen=True)
class Copies:
    """What of some samples stands in the training text verbatim."""

    longest: str  # the longest span; empty where none has SHORTEST bytes
    place: Place | None  # its first place in the text
    share: float  # of the characters, in spans of at least COPIED and in samples that stand there whole
    novel_8grams: float | None  # share of the samples' spans of eight words that the text does not hold; None without any


@dataclass(frozen=True)
class Memorisation:
    """How much of what a model says is learnt by heart, and how good it is, beside held-out text of the same length."""

    longest_copy: str
    longest_copy_chars: int
    place: Place | None
    copied_share: float
    held_out_copied_share: float | None
    novel_8grams: float | None
    held_out_novel_8grams: float | None
    gap: float | None  # nats per token, held-out minus training
    repeated: float
    held_out_repeated: float | None
    distinct: float | None
    held_out_distinct: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON has them."""
        return asdict(self)


class TrainingText:
    """The bytes of a prepared part, in pieces; `<|endoftext|>` is BETWEEN_DOCUMENTS.

    A text of up to KEPT_BYTES stays decoded in memory after the first look; a longer one is decoded anew each time.
    """

    def __init__(self, part: Part, tokenizer: Tokenizer) -> None:
        self._part = part
        words = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        words[tokenizer.end_of_text] = BETWEEN_DOCUMENTS
        self._lengths = np.array([len(word) for word in words], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._words = np.frombuffer(b"".join(words), np.uint8)
        self._kept: list[Bytes] | None = None

    @functools.cached_property
    def is_kept(self) -> bool:
        """Whether it is short enough to stay in memory, so that a look takes a moment."""
        return self._part.n_bytes <= KEPT_BYTES

    def pieces(self) -> Iterator[Bytes]:
        """Yield the text."""
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Bytes] = []
        for ids in self._part.pieces(IDS_AT_ONCE):
            piece = self._decoded(ids)
            yield piece
            if self.is_kept:
                kept.append(piece)
        self._kept = kept if self.is_kept else None

    def _decoded(self, ids: np.ndarray[Any, Any]) -> Bytes:
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        shifts = np.repeat((self._starts[ids] - (ends - lengths)), lengths)
        return self._words[shifts + np.arange(len(shifts))]


class Samples:
    """Some texts, indexed for the training text to go past.

    A document's end is in no sample and a sample's end in no text, so no span crosses either.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        pieces = [text.encode(errors="replace") for text in texts]
        self.texts = tuple(piece.decode() for piece in pieces)
        padding = BETWEEN_SAMPLES * 2 * STEP
        self.bytes = np.frombuffer(padding + b"".join(piece + BETWEEN_SAMPLES for piece in pieces) + padding, np.uint8)
        self.starts = 2 * STEP + np.cumsum([0, *(len(piece) + 1 for piece in pieces)])[:-1]
        longest = max(map(len, pieces), default=0)
        self.reach = -(-longest // STEP) * STEP + 2 * STEP  # bytes that an extension to either side may read
        self._words = _words_everywhere(self.bytes)
        first = np.arange(STEP, len(self.bytes) - 3 * STEP)
        keys = _key(self._words[first], self._words[first + STEP])
        order = np.argsort(keys, kind="stable")
        self._keys, self._at = keys[order], first[order]
        self._table = np.zeros(1 << TABLE_BITS, bool)
        self._table[_slot(self._words)] = True
        self._lengths = np.zeros(len(self.bytes), np.int64)  # of the longest maximal match that begins here
        self._places = np.zeros(len(self.bytes), np.int64)  # and where in the text

    def pass_by(self, window: Bytes, base: int, stop: int) -> None:
        """Take note of what of a window of the text the samples hold.

        Args:
            window: From `reach` bytes before the first anchor to `reach` bytes after the last.
            base: Where in the text the window begins, a multiple of STEP.
            stop: Anchors stand before this byte of the window.
        """
        aligned = window[: len(window) // STEP * STEP].view("<u8")
        first, end = self.reach // STEP, -(-stop // STEP)
        known = self._table[_slot(aligned[first : end + 1])]
        everywhere = _words_everywhere(window)
        blocks = first + np.flatnonzero(known[:-1] & known[1:])
        blocks = blocks[~_is_repetition(everywhere, STEP * blocks)]
        keys = _key(aligned[blocks], aligned[blocks + 1])
        low = np.searchsorted(self._keys, keys)
        counts = np.searchsorted(self._keys, keys, "right") - low
        blocks, low, counts = blocks[counts > 0], low[counts > 0], counts[counts > 0]
        for some in _slices(counts):
            repeated = np.repeat(np.arange(len(counts))[some], counts[some])
            rank = np.arange(len(repeated)) - np.repeat(np.cumsum(counts[some]) - counts[some], counts[some])
            self._follow(everywhere, blocks[repeated] * STEP, self._at[low[repeated] + rank], base)

    def _follow(self, text: np.ndarray[Any, Any], at: Numbers, own: Numbers, base: int) -> None:
        """Follow pairs of equal places, `at` in the window and `own` here, to both sides, and keep the longest spans."""
        first = (text[at - STEP] != self._words[own - STEP]) | _is_repetition(text, at - STEP)
        first &= (text[at] == self._words[own]) & (text[at + STEP] == self._words[own + STEP])
        at, own = at[first], own[first]  # a span is followed from its first anchor only, and from those behind a repetition
        left, right = np.zeros(len(at), np.int64), np.full(len(at), 2 * STEP)
        for side, sign, from_top in ((left, -1, True), (right, 1, False)):
            going = np.arange(len(at))
            while len(going):
                there = sign * side[going] - STEP * from_top
                differ = text[at[going] + there] ^ self._words[own[going] + there]
                side[going] += _zero_bytes(differ, from_top=from_top)
                going = going[differ == 0]
        starts, lengths, places = own - left, left + right, base + at - left
        longer = lengths > self._lengths[starts]
        order = np.flatnonzero(longer)[np.lexsort((-places[longer], lengths[longer]))]  # the last assignment stands
        self._lengths[starts[order]], self._places[starts[order]] = lengths[order], places[order]

    def spans(self) -> tuple[Numbers, Numbers]:
        """Return, for each byte of the samples, where the longest span from it on ends and where it stands in the text."""
        here = np.arange(len(self.bytes))
        found = self._lengths > 0
        order = np.where(found, here + self._lengths, 0)
        ends = np.maximum.accumulate(order)  # what is left of a span is a span
        source = np.maximum.accumulate(np.where(found & (order == ends) & (np.r_[0, ends[:-1]] < ends), here, 0))
        return np.maximum(ends, here), self._places[source] + here - source


@dataclass(frozen=True)
class _Spans:
    """What of samples stands in the training text: for each of their bytes, the longest span from it on."""

    index: Samples
    is_start: np.ndarray[Any, Any]  # of a character
    ordinal: Numbers  # of the character
    ends: Numbers  # of whole characters
    places: Numbers  # in the training text
    n_chars: Numbers  # 0 where it is shorter than SHORTEST, or begins within a character

    @classmethod
    def of(cls, samples: Sequence[str], text: TrainingText) -> _Spans:
        index = Samples(samples)
        for window, base, stop in _windows(text.pieces(), index.reach):
            index.pass_by(window, base, stop)
        ends, places = index.spans()
        is_start = (index.bytes & 0xC0) != 0x80
        ends = np.maximum.accumulate(np.where(is_start, np.arange(len(is_start)), 0))[ends]
        ordinal = np.cumsum(is_start) - 1
        whole = is_start & (ends - np.arange(len(ends)) >= SHORTEST)
        return cls(index, is_start, ordinal, ends, places, np.where(whole, ordinal[ends] - ordinal, 0))

    @property
    def share(self) -> float:
        """Of the characters, in spans of at least COPIED, or in samples that stand there whole, as short documents do."""
        lengths, starts = np.array(list(map(len, self.index.texts)), np.int64), self.index.starts
        whole = starts[(self.n_chars[starts] == lengths) & (lengths > 0)]
        copied = np.union1d(np.flatnonzero(self.n_chars >= COPIED), whole)
        return _covered(copied, self.ends, self.is_start) / int(lengths.sum()) if lengths.any() else 0.0


def copied_share(samples: Sequence[str], text: TrainingText) -> float:
    """Return the share of the samples' characters that stand in the training text; see `Copies`."""
    return _Spans.of(samples, text).share


def copies(samples: Sequence[str], text: TrainingText) -> Copies:
    """Return what of the samples stands in the training text verbatim."""
    spans = _Spans.of(samples, text)
    best = int(np.argmax(spans.n_chars))
    found = bool(spans.n_chars[best])
    return Copies(
        longest=spans.index.bytes[best : int(spans.ends[best])].tobytes().decode() if found else "",
        place=_place(text, int(spans.places[best])) if found else None,
        share=spans.share,
        novel_8grams=_novel_grams(spans.index, spans.ends, np.flatnonzero(spans.is_start), spans.ordinal),
    )


class Meter:
    """Measures samples against the text that their model learns from and against its held-out text.

    Args:
        train: The text that is learnt.
        val: Held-out text; may be empty.
        tokenizer: Of both.
        n_tokens: Of a sample, and so of each piece of held-out text that it is compared with.
    """

    def __init__(self, train: Part, val: Part, tokenizer: Tokenizer, n_tokens: int) -> None:
        self.text = TrainingText(train, tokenizer)
        self._held_out = held_out_pieces(val, tokenizer, n_tokens, behind=PROMPT_TOKENS)

    def measure(self, samples: Sequence[str], gap: float | None) -> Memorisation:
        """Return the figures of some samples; `gap` is the held-out loss minus the training loss."""
        found, natural = copies(samples, self.text), self._natural
        return Memorisation(
            longest_copy=found.longest,
            longest_copy_chars=len(found.longest),
            place=found.place,
            copied_share=found.share,
            held_out_copied_share=None if natural is None else natural.share,
            novel_8grams=found.novel_8grams,
            held_out_novel_8grams=None if natural is None else natural.novel_8grams,
            gap=gap,
            repeated=_mean(map(repeated, samples)) or 0.0,
            held_out_repeated=self._natural_variety[0],
            distinct=_mean(map(distinct, samples)),
            held_out_distinct=self._natural_variety[1],
        )

    @functools.cached_property
    def _natural(self) -> Copies | None:
        return copies(self._held_out, self.text) if self._held_out else None

    @functools.cached_property
    def _natural_variety(self) -> tuple[float | None, float | None]:
        return _mean(map(repeated, self._held_out)), _mean(map(distinct, self._held_out))


def memorisation_s(n_bytes: float) -> float:
    """Return how long measuring takes at the end of a run on so much text; 0 where it is so short that it takes a moment."""
    return PASSES * n_bytes / PASSED_BYTES_PER_S if n_bytes > KEPT_BYTES else 0.0


def held_out_pieces(
    val: Part, tokenizer: Tokenizer, n_tokens: int, most: int = YARDSTICKS, *, behind: int = 0
) -> tuple[str, ...]:
    """Return pieces of held-out text, evenly spread; none where there is none.

    As a sample ends where its document does, so does a piece; one that would go on into the next document begins with that.

    Args:
        val: The text.
        tokenizer: Of it.
        n_tokens: Of a piece, at most.
        most: Pieces, at most.
        behind: Tokens that are left out at the beginning of each, as those of a prompt are none that were said.
    """
    n_tokens += behind
    last = len(val.ids) - n_tokens
    pieces: dict[int, bytes] = {}
    for start in np.linspace(0, max(0, last), min(most, 1 + max(0, last) // n_tokens), dtype=np.int64).tolist():
        crossed = _ends(val.ids[start : start + n_tokens], tokenizer)
        begin = start + 1 + crossed[0] if crossed else start
        piece = val.ids[begin : begin + n_tokens]
        piece = piece[: next(iter(_ends(piece, tokenizer)), None)]
        pieces[begin] = b"".join(map(tokenizer.token_bytes, piece[behind:]))
    return tuple(text.decode(errors="ignore") for text in pieces.values() if text)


def _ends(ids: np.ndarray[Any, Any], tokenizer: Tokenizer) -> list[int]:
    """Return where documents end in some ids."""
    return np.flatnonzero(ids == tokenizer.end_of_text).tolist()


def _mean(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return statistics.mean(known) if known else None


def _covered(starts: Numbers, ends: Numbers, is_start: np.ndarray[Any, Any]) -> int:
    """Return how many characters lie in the spans that begin at `starts`."""
    edges = np.zeros(len(is_start) + 1, np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, ends[starts], -1)
    return int(((np.cumsum(edges)[:-1] > 0) & is_start).sum())


def _novel_grams(index: Samples, ends: Numbers, char_starts: Numbers, ordinal: Numbers) -> float | None:
    """Return the share of spans of eight words, of at least SHORTEST bytes, that are not in the text."""
    novel = []
    for text, start in zip(index.texts, index.starts.tolist(), strict=True):
        words = [match.span() for match in WORD.finditer(text)]
        for (first, _), (_, last) in zip(words, words[GRAM - 1 :], strict=False):
            begin, end = (int(char_starts[ordinal[start] + char]) for char in (first, last))
            if end - begin >= SHORTEST:
                novel.append(int(ends[begin]) < end)
    return sum(novel) / len(novel) if novel else None


def _place(text: TrainingText, position: int) -> Place:
    """Return the document and the character at a byte of the text."""
    documents, characters, at = -1, 0, 0
    for whole in text.pieces():
        piece = whole[: position - at]
        separators = np.flatnonzero(piece == BETWEEN_DOCUMENTS[0])
        documents += len(separators)
        if len(separators):
            characters, rest = 0, piece[separators[-1] + 1 :]
        else:
            rest = piece
        characters += int(((rest & 0xC0) != 0x80).sum())
        at += len(piece)
        if at >= position:
            break
    return Place(documents, characters)


def _windows(pieces: Iterator[Bytes], reach: int) -> Iterator[tuple[Bytes, int, int]]:
    """Yield windows of a text for `Samples.pass_by`: every place is an anchor in one of them."""
    window, base = np.frombuffer(BETWEEN_DOCUMENTS * reach, np.uint8), -reach
    for piece in pieces:
        window = np.concatenate((window, piece))
        stop = (len(window) - reach) // STEP * STEP
        if stop > reach:
            yield window, base, stop
            window, base = window[stop - reach :], base + stop - reach
    end = np.frombuffer(BETWEEN_DOCUMENTS * (reach + 2 * STEP), np.uint8)
    yield np.concatenate((window, end)), base, len(window)


def _slices(counts: Numbers) -> Iterator[slice]:
    """Yield slices of the counts, each with a sum of about PAIRS_AT_ONCE at most."""
    groups = np.cumsum(counts) // PAIRS_AT_ONCE
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(counts)]
    for start, end in pairwise(edges):
        if end > start:
            yield slice(start, end)


def _words_everywhere(data: Bytes) -> np.ndarray[Any, Any]:
    """Return the 8 bytes from each byte on as one number, without copying them."""
    return np.ndarray((len(data) - STEP + 1,), "<u8", np.ascontiguousarray(data), 0, (1,))


def _is_repetition(words: np.ndarray[Any, Any], at: Numbers) -> np.ndarray[Any, Any]:
    """Return whether the 16 bytes from these places on are the same 1 to 8 again and again."""
    word, following = words[at], words[at + STEP]
    found = word == following  # of 1, 2, 4 or 8
    for period in (5, 6, 7):  # and of 3, which is half of 6
        found |= (word == words[at + period]) & (words[at + STEP - period] == following)
    return found  # type: ignore[no-any-return]


def _slot(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (words * _MIX) >> np.uint64(64 - TABLE_BITS)


def _key(words: np.ndarray[Any, Any], following: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return one number for 16 bytes; equal ones may rarely stand for different bytes, which are compared afterwards."""
    return words * _MIX ^ following * _MIX_NEXT


def _zero_bytes(words: np.ndarray[Any, Any], *, from_top: bool) -> Numbers:
    """Return how many bytes are zero from the last byte in memory backwards, or from the first one on."""
    zeros = np.zeros(len(words), np.int64)
    for n in range(1, STEP + 1):
        bits = np.uint64(64 - 8 * n)
        zeros += (words >> bits if from_top else words << bits) == 0
    return zeros
