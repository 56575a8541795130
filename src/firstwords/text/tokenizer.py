"""Text <-> token ids: GPT-2's byte-pair encoding, one trained here, or bytes.

All three are a `tiktoken.Encoding` over ranks, so they encode alike and fast, and all three are written as the
`tokenizer.json` that the `tokenizers` library reads.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken

from firstwords import reading
from firstwords.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
# GPT-2's split pattern (openai/gpt-2, src/encoder.py). What needs no look ahead stands in a group of its own: tiktoken asks
# an automaton for it at once instead of trying one kind after the other, and encodes a third faster.
PATTERN = r"""(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"""
KINDS = (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s")  # of characters; a piece is a run of one kind, after a space
SIGNS_THAT_SPLIT = regex.compile("[\x1c-\x1f]")  # for `str.split` they are white space, for the pattern they are not
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # as pinned in tiktoken
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BY_CONTEXT = ("lstrip", "rstrip", "single_word")  # ways to take the space beside an added token, or to need one there
PIECE_CHARS = 1 << 16  # the longest text that is encoded at once
GPT2_WORDS = 50256
LONGEST_TRAINED = 1000  # characters; training a BPE is quadratic in its longest piece
SMALLEST_BPE, LARGEST_BPE = 257, 1 << 20

_ANOTHER = "name a tokenizer.json that firstwords wrote, or --tokenizer gpt2, bytes or bpe:N"

Ids = np.ndarray[tuple[int], np.dtype[np.uint32]]


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level tokenizer: every text has ids, and its ids give the text back."""

    name: str  # gpt2, bytes, or bpe:N
    ranks: dict[bytes, int]  # of every word; the lower merges first
    special: tuple[str, ...] = ()  # texts that are tokens of their own, with the ids after that of `<|endoftext|>`

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The encoder."""
        special = {text: self.end_of_text + place for place, text in enumerate((END_OF_TEXT, *self.special))}
        return tiktoken.Encoding(self.name, pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=special)

    @property
    def vocab_size(self) -> int:
        """Number of ids, `<|endoftext|>` and the special ones included."""
        return len(self.ranks) + 1 + len(self.special)

    @property
    def end_of_text(self) -> int:
        """The id of `<|endoftext|>`, the first after the words."""
        return len(self.ranks)

    def with_special(self, texts: Iterable[str]) -> Tokenizer:
        """Return this tokenizer with more special tokens; all other ids stay.

        Raises:
            ConfigError: White space in one of them, where a long text might be cut, or nothing in it; the spelling of a
                word, which files could not tell from it; one begins another, of which tools choose differently; or it is
                `<|endoftext|>`, which stands between documents alone.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self.special]
        words = {_spell(word, _byte_letters()) for word in self.ranks} if new else set[str]()
        special = (END_OF_TEXT, *self.special, *new)
        for text in new:
            if text == END_OF_TEXT:
                do = "make each document a file, or a line of a .jsonl file: it is put between them"
                what, why = f"{text!r} is a token already", "it stands between documents; inside one it is text"
                raise ConfigError(what, where="--special-tokens", why=why, do=do)
            if not text or regex.search(r"\s", text):
                why = "it is empty, or has white space in it"
            elif text in words:
                why = "it is how one of the vocabulary's own words is written"
            elif not (why := _overlap(text, special)):
                continue
            do = "give texts such as <|user|>, separated by commas"
            raise ConfigError(f"{text!r} cannot be a token of its own", where="--special-tokens", why=why, do=do)
        return Tokenizer(self.name, self.ranks, (*self.special, *new)) if new else self

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; `<|endoftext|>` in it is text like any other.

        Raises:
            DataError: Half of a surrogate pair, which no file of text can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what, why = "a lone surrogate", "half of a surrogate pair has no bytes in UTF-8"
            raise DataError(
                what, where=ascii(text[max(0, error.start - 10) : error.end]), why=why, do="leave it out"
            ) from error
        return [int(token) for ids in self.stream([text]) for token in ids]

    def stream(self, pieces: Iterable[str]) -> Iterator[Ids]:
        """Yield the ids of a text in pieces, in constant memory: as of the whole, where `safe_pieces` finds its cuts."""
        return map(self.piece_ids, safe_pieces(pieces))

    def piece_ids(self, piece: str) -> Ids:
        """Return the ids of one of a text's `safe_pieces`; other threads go on meanwhile."""
        if self.special:
            return self.encoding.encode_to_numpy(piece, allowed_special=set(self.special), disallowed_special=())
        if self.name == "bytes":
            return np.frombuffer(piece.encode(), np.uint8).astype(np.uint32)
        return self.encoding.encode_to_numpy(piece, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: An id beyond the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that one id stands for.

        Raises:
            ValueError: An id beyond the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is beyond the vocabulary of {self.vocab_size}")
        return self.encoding.decode_single_token_bytes(token)

    @functools.cached_property
    def id_bytes(self) -> np.ndarray[Any, Any]:
        """(V,) int64: how many bytes each id stands for; `<|endoftext|>` for none."""
        lengths = np.zeros(self.vocab_size, np.int64)
        lengths[list(self.ranks.values())] = [len(word) for word in self.ranks]
        lengths[self.end_of_text + 1 :] = [len(text.encode()) for text in self.special]
        return lengths

    @functools.cached_property
    def json(self) -> bytes:
        """The tokenizer as the `tokenizers` library's own file."""
        spelled = _byte_letters()
        ranks = sorted(self.ranks.items(), key=lambda item: item[1])
        words = {"".join(spelled[byte] for byte in word): rank for word, rank in ranks}
        pairs = _gpt2_merges() if self.name == "gpt2" else _merges(self.ranks)
        merges = [[_spell(part, spelled) for part in pair] for pair in pairs]
        special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = {text: self.end_of_text + place for place, text in enumerate((END_OF_TEXT, *self.special))}
        value = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": token, "content": text, **special} for text, token in added.items()],
            "normalizer": None,
            "pre_tokenizer": BYTE_LEVEL,
            "post_processor": BYTE_LEVEL,
            "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": words | added, "merges": merges},
        }
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the ranks and special tokens: what decides the ids."""
        digest = hashlib.sha256()
        for word, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(b"%d %d " % (rank, len(word)) + word)
        for text in self.special:
            digest.update(b"special %d " % len(text.encode()) + text.encode())
        return digest.hexdigest()


def gpt2_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's encoding, equal to `tiktoken.get_encoding("gpt2")` but never from the network.

    Raises:
        DataError: The vocabulary file of this installation is damaged.
    """
    return gpt2().encoding


@functools.cache
def gpt2() -> Tokenizer:
    """Return GPT-2's tokenizer: 50,257 ids. Its tokenizer.json takes a second to make, so there is one in a process.

    Raises:
        DataError: The vocabulary file of this installation is damaged.
    """
    ranks = {bytes([byte]): rank for rank, byte in enumerate(_byte_letters())}
    for first, second in _gpt2_merges():
        ranks[first + second] = len(ranks)
    return Tokenizer("gpt2", ranks)


def _gpt2_merges() -> list[tuple[bytes, bytes]]:
    """Return the two parts of each merged word of GPT-2's, in rank order, as OpenAI's own file has them."""
    letters = {letter: byte for byte, letter in _byte_letters().items()}
    pairs = (line.decode().split(" ") for line in _merge_lines(_gpt2_file()))
    return [(bytes(map(letters.__getitem__, first)), bytes(map(letters.__getitem__, second))) for first, second in pairs]


def _gpt2_file() -> bytes:
    file = files("firstwords.text") / "data" / "vocab.bpe"
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != VOCAB_BPE_SHA256:
        raise DataError("GPT-2's vocabulary is damaged", where=str(file), do="install firstwords again")
    return data


def _merge_lines(data: bytes) -> list[bytes]:
    """Return the lines of a `merges.txt`, without the one of its version."""
    lines = data.splitlines()
    return lines[1:] if lines and lines[0].startswith(b"#version") else lines


def are_gpt2s_merges(data: bytes) -> bool:
    """Return whether a `merges.txt`, as tools before the `tokenizers` library keep a vocabulary, has GPT-2's merges."""
    return _merge_lines(data) == _merge_lines(_gpt2_file())


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer without merges: id = byte, 256 = `<|endoftext|>`."""
    return Tokenizer("bytes", {bytes([byte]): byte for byte in range(256)})


def train_bpe(pieces: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-pair encoding of at most `vocab_size` ids, with GPT-2's split pattern; `<|endoftext|>` is the last.

    A text that has fewer pairs to merge gives fewer ids. Runs of over 1,000 letters, digits, signs or spaces are left out
    of training (they are still encoded).

    Raises:
        ConfigError: A size that bytes and `<|endoftext|>` already exceed, or beyond 2^20.
    """
    from tokenizers import Tokenizer as Trainable
    from tokenizers import models, pre_tokenizers, trainers

    check_vocab_size(vocab_size)
    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    trainable.train_from_iterator(map(without_long_runs, safe_pieces(pieces)), trainer)
    letters = {letter: byte for byte, letter in _byte_letters().items()}
    ranks = {bytes(letters[letter] for letter in word): rank for word, rank in trainable.get_vocab().items()}
    return Tokenizer(f"bpe:{len(ranks) + 1}", ranks)


def without_long_runs(piece: str) -> str:
    """Return a piece with a newline in place of each run of over 1,000 characters of one kind."""
    return _long_run().sub("\n", piece) if _may_have_long_run(piece) else piece


@functools.cache
def _long_run() -> regex.Pattern[str]:
    return regex.compile("|".join(rf"{kind}{{{LONGEST_TRAINED + 1},}}" for kind in KINDS))


def _may_have_long_run(piece: str) -> bool:
    """Whether a piece may have a run of over 1,000: told in a fiftieth of the time that finding one takes.

    Such a run fills one of the windows, half as long, that lie side by side: it is white space, or has none within.
    """
    size = LONGEST_TRAINED // 2
    windows = (piece[start : start + size] for start in range(0, len(piece) - size + 1, size))
    return SIGNS_THAT_SPLIT.search(piece) is not None or any(len(window.split(None, 1)) < 2 for window in windows)


def check_vocab_size(vocab_size: int) -> None:
    """Raise a ConfigError for a size that a trained BPE cannot have."""
    if not SMALLEST_BPE <= vocab_size <= LARGEST_BPE:
        raise ConfigError(
            f"bpe cannot have {vocab_size} ids",
            where="--tokenizer",
            do=f"allowed: from {SMALLEST_BPE} to {LARGEST_BPE}",
        )


def read(path: Path) -> Tokenizer:
    """Return the tokenizer in a `tokenizer.json`.

    Raises:
        DataError: It cannot be read, or as `from_json`.
    """
    return from_json(reading.read_bytes(path, reading.MOST_TOKENIZER_BYTES), str(path))


def from_json(data: bytes, where: str) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json` as `Tokenizer.json` has it.

    Raises:
        DataError: No JSON, not byte-level BPE, ids with gaps, merges that do not follow from the ids, or an added token that
            is more than its text.
    """
    try:
        value = reading.parse_json(data, "", reading.MOST_TOKENIZER_BYTES)
        split = {**BYTE_LEVEL, **value["pre_tokenizer"], "trim_offsets": True}  # older files leave out what is the default
        model, plain = value["model"], value["normalizer"] is None and split == BYTE_LEVEL
        letters = {letter: byte for byte, letter in _byte_letters().items()}
        words = {word: operator.index(rank) for word, rank in model["vocab"].items()}
        listed = value.get("added_tokens") or ()
        added = {one["content"]: operator.index(one["id"]) for one in listed}
        context = [f"the added token {one['content']!r} has {key}" for one in listed for key in BY_CONTEXT if one.get(key)]
        special = tuple(sorted(added.keys() - {END_OF_TEXT}, key=lambda text: added[text]))
        contradicted = next((text for text in added if words.setdefault(text, added[text]) != added[text]), None)
        plain_words = words.keys() - {END_OF_TEXT, *special}
        ranks = {bytes(letters[letter] for letter in word): words[word] for word in plain_words}
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    except (DataError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError("is no byte-level BPE tokenizer", where=where, why=why, do=_ANOTHER) from error
    if not plain or context:
        what = "the tokenizer changes or splits its text in another way than GPT-2's"
        raise DataError(what, where=where, why=", ".join(context)[:200], do=_ANOTHER)
    if contradicted is not None:
        why = f"{contradicted!r} has id {words[contradicted]} among the words and {added[contradicted]} among those added"
        raise DataError("the tokenizer gives a word two ids", where=where, why=why, do=_ANOTHER)
    if fault := _fault_of_ids(words, (END_OF_TEXT, *special)):
        raise DataError("the tokenizer's ids are not dense", where=where, why=fault, do=_ANOTHER)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        why = f"it has no id for byte {missing[0]} by itself, and a text may hold any"
        raise DataError("the tokenizer cannot encode every text", where=where, why=why, do=_ANOTHER)
    if fault := _fault_of_merges(ranks, merges):
        what = "the tokenizer's merges are not those of its ids, in their order"
        raise DataError(what, where=where, why=fault, do=_ANOTHER)
    return Tokenizer(_name_of(ranks), ranks, special)


def require_apart(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """Return a tokenizer from elsewhere.

    Raises:
        DataError: One of its added tokens begins another: some tools find the longer one in a text, some the first of them.
    """
    special = (END_OF_TEXT, *tokenizer.special)
    if overlaps := [overlap for text in special if (overlap := _overlap(text, special))]:
        what = "tools differ in where the tokenizer's added tokens are in a text"
        raise DataError(what, where=where, why=overlaps[0], do=_ANOTHER)
    return tokenizer


def _overlap(text: str, special: Iterable[str]) -> str:
    """Return which of the special tokens begins with the text, or the text with it, in words; empty where none does."""
    others = [one for one in special if one != text and (one.startswith(text) or text.startswith(one))]
    return f"one of {text!r} and {others[0]!r} begins the other" if others else ""


def _fault_of_ids(words: dict[str, int], last: tuple[str, ...]) -> str:
    """Return the first id that is missing or stands for two words; empty where ids are dense and `last` ends them."""
    ordered = sorted(words, key=lambda word: words[word])
    for expected, word in enumerate(ordered):
        if words[word] < expected:
            return f"id {words[word]} stands for {ordered[expected - 1]!r} and for {word!r}"
        if words[word] > expected:
            return f"no word has id {expected}"
    return "" if tuple(ordered[-len(last) :]) == last else f"{', '.join(last)} must have the last ids, in this order"


def _fault_of_merges(ranks: dict[bytes, int], merges: list[tuple[str, ...]]) -> str:
    """Return the first merge that is not the one that the ids make; empty where all are."""
    spelled = _byte_letters()
    try:
        made = [(_spell(a, spelled), _spell(b, spelled)) for a, b in _merges(ranks)]
    except ValueError as error:
        return str(error)
    for number, (expected, found) in enumerate(zip_longest(made, merges)):
        if expected != found:
            return f"merge {number} is {found}, by the ids it must be {expected}"
    return ""


def safe_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the same text cut where GPT-2's pattern always splits: before the space or newline after a visible character.

    The cuts depend on the text alone, not on `pieces`. Where 65,536 characters have no such place, they are cut as they
    are; there, and only there, the ids may differ from those of a tokenizer that sees the whole.
    """
    rest = ""
    for piece in pieces:
        rest += piece
        while len(rest) > PIECE_CHARS:
            cut = _last_safe_cut(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _last_safe_cut(text: str) -> int:
    for match in regex.finditer(r"(?r)[^\s][ \n]", text, endpos=PIECE_CHARS + 1):
        return int(match.start()) + 1
    return PIECE_CHARS


def _name_of(ranks: dict[bytes, int]) -> str:
    if len(ranks) == 256 and all(ranks[bytes([byte])] == byte for byte in range(256)):
        return "bytes"
    is_gpt2 = len(ranks) == GPT2_WORDS and ranks == gpt2().ranks
    return "gpt2" if is_gpt2 else f"bpe:{len(ranks) + 1}"


@functools.cache
def _byte_letters() -> dict[int, str]:
    """Return GPT-2's printable letter for each byte, in the order of its first 256 ids (openai/gpt-2, src/encoder.py)."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def _spell(word: bytes, letters: dict[int, str]) -> str:
    return "".join(letters[byte] for byte in word)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the two parts of each merged word, in rank order: what is left of it when only lower ranks may merge.

    Raises:
        ValueError: A word that no merge makes.
    """
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return [_last_merge(word, rank, ranks) for word, rank in in_order if len(word) > 1]


def _last_merge(word: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Merge the bytes of a word, the lowest rank first, until two parts are left: in the time of its length, about."""
    size = len(word)
    ends = [*range(1, size + 1), 0]  # of the part that begins there
    starts = list(range(-1, size))  # of the part that ends there
    waiting: list[tuple[int, int, int]] = []  # pairs of neighbours that may merge: their rank, start and end

    def offer(start: int, end: int) -> None:
        found = ranks.get(word[start:end], rank)
        if found < rank:
            heapq.heappush(waiting, (found, start, end))

    for start in range(size - 1):
        offer(start, start + 2)
    n_parts = size
    while n_parts > 2:
        if not waiting:
            raise ValueError(f"no merge makes the word {word[:80]!r} of id {rank}")
        _, start, end = heapq.heappop(waiting)
        middle = ends[start]
        if middle <= 0 or middle >= end or ends[middle] != end:  # one of them has merged with another since
            continue
        ends[start], ends[middle], starts[end] = end, 0, start
        n_parts -= 1
        if end < size:
            offer(start, ends[end])
        if start > 0:
            offer(starts[start], end)
    return word[: ends[0]], word[ends[0] :]


def metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a manifest says of a tokenizer."""
    return {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
