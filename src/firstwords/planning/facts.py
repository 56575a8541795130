"""What of a text decides what can be learnt from it: size, writing, what it repeats, and how hard it is to predict."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from firstwords.planning import difficulty
from firstwords.text import corpus as corpora
from firstwords.text.corpus import Corpus, Part, Progress, ignore_progress
from firstwords.text.sources import Document, Texts
from firstwords.text.tokenizer import Tokenizer

PASSAGE_BYTES = 64  # repeated to the letter, they are no chance
IDS_AT_ONCE = 1 << 17
HASHED_BYTES = 1 << 18  # at once: each takes up to 40 bytes of memory meanwhile
FEWEST_SHARE = 0.01  # of the letters that a script must have to be named
ENGLISH = re.compile(rb"\b(?:the|and|of|to|in|that|he|was|it|is|for|with|as|his|on|be|at|by|I)\b")
ENGLISH_SHARE, PROSE_SIGNS = 0.15, 0.02  # of the words; of the characters that are brackets and the like


@dataclass(frozen=True)
class Sample:
    """Evenly spread parts of a text, to learn from and held out, of at most so many bytes as `difficulty` says."""

    training: tuple[bytes, ...]  # chunks in order
    held_out: tuple[bytes, ...]

    def difficulty(self, tokenizer: Tokenizer) -> float:
        """Return how hard the text is; see `planning.difficulty`. Without held-out text, the last tenth is judged."""
        training, held_out = b"".join(self.training), b"".join(self.held_out)
        packed = [_heads(self.training, difficulty.PACKED_TRAINING), _heads(self.held_out, difficulty.PACKED_HELD_OUT)]
        if not held_out:
            cut = len(training) - max(1, len(training) // 10)
            training, held_out = training[:cut], training[cut:]
            packed = [training[-difficulty.PACKED_TRAINING :], held_out[: difficulty.PACKED_HELD_OUT]]
        no_id = np.empty(0, np.uint32)  # a tenth of a tiny text may be a part of a letter
        known, new = (
            np.concatenate([no_id, *tokenizer.stream([part.decode(errors="ignore")])]) for part in (training, held_out)
        )
        grams = (bits / len(held_out) for bits in difficulty.ngram_bits(known, new, tokenizer.vocab_size, most=3))
        return difficulty.bits_per_byte(*grams, difficulty.xz_bits(*packed))

    @property
    def repeated(self) -> float:
        """Share of the passages that stood somewhere before in the sample, to the letter."""
        passages = _Passages()
        for chunk in self.training:
            passages.add(chunk)
        return passages.repeated


def _heads(chunks: Sequence[bytes], most_bytes: int) -> bytes:
    """Return the beginnings of the chunks, about `most_bytes` in all."""
    return b"".join(chunk[: most_bytes // max(1, len(chunks))] for chunk in chunks)


@dataclass(frozen=True)
class TextFacts:
    """What was found in a text. Bytes are of UTF-8."""

    n_bytes: int
    n_documents: int
    training_chars: int
    training_bytes: int
    held_out_bytes: int
    scripts: dict[str, float]  # share of the letters in the sample, the most used first
    sample: Sample

    @property
    def is_english_prose(self) -> bool:
        """Whether it looks like it: enough of the commonest words, few brackets."""
        seen = _heads(self.sample.training, difficulty.PACKED_TRAINING)
        words, signs = len(re.findall(rb"[A-Za-z]+", seen)), len(re.findall(rb"[{}()\[\]<>=;_\\]", seen))
        return signs < PROSE_SIGNS * len(seen) and len(ENGLISH.findall(seen)) > ENGLISH_SHARE * max(1, words)


def read(texts: Texts, *, val_fraction: float = 0.1, progress: Progress = ignore_progress) -> TextFacts:
    """Return what is in a text; it is read twice, in constant memory.

    Args:
        texts: The documents.
        val_fraction: The share that is held out, as in training.
        progress: Told what is done.

    Raises:
        DataError: No text, or nothing but white space.
    """
    found = corpora.survey(texts, progress)
    cuts = corpora.learnt_chars(found, val_fraction)
    training = _Spread(sum(cuts), difficulty.TRAINING_BYTES)
    held_out = _Spread(found.total_chars - sum(cuts), difficulty.HELD_OUT_BYTES)
    for document, cut in corpora.again(texts, cuts):
        _take(document, cut, training, held_out)
    sample = Sample(training.sample, held_out.sample)
    return TextFacts(
        n_bytes=training.n_bytes + held_out.n_bytes,
        n_documents=len(found.n_chars),
        training_chars=sum(cuts),
        training_bytes=training.n_bytes,
        held_out_bytes=held_out.n_bytes,
        scripts=scripts(_heads(sample.training, difficulty.PACKED_TRAINING).decode(errors="ignore")),
        sample=sample,
    )


def sample_of(corpus: Corpus) -> Sample:
    """Return about the sample that `read` takes, from a prepared text: chunks are laid by bytes and cut between tokens."""
    parts = ((corpus.train, difficulty.TRAINING_BYTES), (corpus.val, difficulty.HELD_OUT_BYTES))
    return Sample(*(_decoded(part, corpus, most_bytes) for part, most_bytes in parts))


def _decoded(part: Part, corpus: Corpus, most_bytes: int) -> tuple[bytes, ...]:
    """Return evenly spread chunks of a part, laid by bytes: how many a token has changes on the way."""
    if not part.n_tokens:
        return ()
    ranges, at = corpora.evenly(part.n_bytes, difficulty.CHUNKS, most_bytes // difficulty.CHUNKS), 0
    chunks: list[list[int]] = [[] for _ in ranges]
    for ids in part.pieces(IDS_AT_ONCE):
        ends = at + np.cumsum(part.id_bytes[ids], dtype=np.int64)
        at = int(ends[-1])
        for i, bounds in enumerate(ranges):
            first, last = np.searchsorted(ends, bounds, side="right")
            chunks[i] += ids[first:last].tolist()
    end_of_text, decode = corpus.tokenizer.end_of_text, corpus.tokenizer.encoding.decode_bytes
    return tuple(decode([token for token in chunk if token != end_of_text]) for chunk in chunks)


def scripts(text: str) -> dict[str, float]:
    """Return the writing systems of the letters with their shares, the most used first; rare ones are left out.

    Unicode's names begin with the script: LATIN SMALL LETTER A.
    """
    letters = Counter(letter for letter in text if letter.isalpha())
    names: Counter[str] = Counter()
    for letter, count in letters.items():
        names[unicodedata.name(letter, "OTHER").split(" ")[0].split("-")[0].capitalize()] += count
    total = sum(names.values())
    return {name: count / total for name, count in names.most_common() if count >= FEWEST_SHARE * total}


def _take(document: Document, cut: int, training: _Spread, held_out: _Spread) -> None:
    at = 0
    for piece in document.pieces():
        before = max(0, min(len(piece), cut - at))
        training.add(piece[:before])
        held_out.add(piece[before:])
        at += len(piece)


@dataclass
class _Spread:
    """Takes evenly spread chunks out of a stream of known length as it passes."""

    total_chars: int
    most_bytes: int
    n_bytes: int = 0
    _at: int = 0
    _taken: dict[int, list[str]] = field(default_factory=dict)

    def add(self, text: str) -> None:
        self.n_bytes += len(text.encode())
        for number, (start, end) in enumerate(self._wanted()):
            if start < self._at + len(text) and end > self._at:
                self._taken.setdefault(number, []).append(text[max(0, start - self._at) : end - self._at])
        self._at += len(text)

    def _wanted(self) -> list[tuple[int, int]]:
        return corpora.evenly(self.total_chars, difficulty.CHUNKS, self.most_bytes // difficulty.CHUNKS)

    @property
    def sample(self) -> tuple[bytes, ...]:
        """What was taken: of writings of several bytes a letter, the beginning of each chunk."""
        size = self.most_bytes // max(1, len(self._taken))
        return tuple("".join(parts).encode()[:size] for parts in self._taken.values())


class _Passages:
    """Counts the passages that stood somewhere before, by a sample of their hashes.

    Which passages are in the sample depends on their bytes alone, so that a copy is in it where its original is: Manber
    1994, "Finding similar files in a large file system".
    """

    def __init__(self) -> None:
        self._hashes: list[np.ndarray[Any, np.dtype[np.uint64]]] = []

    def add(self, data: bytes) -> None:
        """Take note of the passages of a piece."""
        for start in range(0, len(data) - PASSAGE_BYTES + 1, HASHED_BYTES):
            piece = data[start : start + HASHED_BYTES + PASSAGE_BYTES - 1]  # as many places, and the last one's passage
            hashes = _rolling(np.frombuffer(piece, np.uint8).astype(np.uint64))
            self._hashes.append(hashes[hashes >> np.uint64(58) == 0])  # 6 of 64 bits: one of 64

    @property
    def repeated(self) -> float:
        """Share of the passages that are the second of their kind, or a later one."""
        hashes: Iterator[Any] = iter(self._hashes)
        every = np.concatenate([np.empty(0, np.uint64), *hashes])
        return 1 - len(np.unique(every)) / len(every) if len(every) else 0.0


def _rolling(data: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return a hash of the 64 bytes at each place: halves are joined again and again, all places at once."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    hashes, width = (data + np.uint64(1)) * odd, 1
    while width < PASSAGE_BYTES:
        hashes = (hashes[:-width] ^ (hashes[:-width] >> np.uint64(29))) * odd + hashes[width:]
        width *= 2
    return (hashes ^ (hashes >> np.uint64(32))) * odd
