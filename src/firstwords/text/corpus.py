"""Documents become token shards: two memory-mapped files and a manifest, shared by every run on the same text.

A part (training or held-out) is one stream of ids: `<|endoftext|>`, document, `<|endoftext|>`, document, ... so that a
document's first token is predicted from `<|endoftext|>`. All cores encode, in constant memory.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, repeat, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from firstwords import store
from firstwords.errors import CannotCreateError, ConfigError, DataError, FirstwordsError, NoInputError, Notify, ignore_line
from firstwords.text import sources
from firstwords.text import tokenizer as tokenizers
from firstwords.text.sources import Document, Texts
from firstwords.text.tokenizer import Tokenizer

Item = TypeVar("Item")
Made = TypeVar("Made")
Progress = Callable[[str, float | None], None]  # what is being done, the share that is done where it is known
FORMAT = 2  # changes with how a text is cut and its tokenizer trained: part of the key under which it is cached
READING = "reading the text"  # what a survey is told to do
MANY_DOCUMENTS, SHORT_DOCUMENT = 100, 2000  # so many, of so few characters in the mean, are held out whole
LARGEST_SHARE = 0.05  # of the text that one of them may be; and of the documents that copies of one may be
DTYPES = ("<u2", "<u4")
TOKENIZER_FILE = "tokenizer.json"
ABANDONED_S = 86400.0  # a preparation that wrote nothing for a day was killed
SMALLEST_FITTING, LARGEST_FITTING = 512, 8192  # ids of a `bpe` whose size nobody named
BPE_CHARS = 16 << 20  # from which a `bpe` learns, at most; a second for every few megabytes
MOST_ENCODERS = 16  # threads, each with a tokenizer; more would wait for the one that reads the text
IDS_AT_ONCE = 1 << 20  # that are checked, or become numbers of Python


@dataclass(frozen=True)
class Part:
    """One stream of token ids, as memory-mapped uint16 or uint32."""

    ids: np.ndarray[Any, Any]
    id_bytes: np.ndarray[Any, Any]  # (V,) UTF-8 bytes that each id stands for
    n_documents: int
    counted_bytes: int | None = None  # of the text, where they were counted when it was prepared

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return int(self.id_bytes[self.ids].sum()) if self.counted_bytes is None else self.counted_bytes

    def pieces(self, n_ids: int) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the ids in order, so many together; from the file, for pages of a map count as this process's memory."""
        for start in range(0, len(self.ids), n_ids):
            if isinstance(self.ids, np.memmap):
                assert self.ids.filename is not None
                yield np.fromfile(self.ids.filename, self.ids.dtype, n_ids, offset=start * self.ids.itemsize)
            else:
                yield self.ids[start : start + n_ids]

    @property
    def n_tokens(self) -> int:
        """Ids of text, `<|endoftext|>` not counted."""
        return len(self.ids) - self.n_documents


@dataclass(frozen=True)
class Corpus:
    """A prepared text."""

    folder: Path
    tokenizer: Tokenizer
    train: Part
    val: Part
    text_sha256: str


@dataclass(frozen=True)
class Survey:
    """What one pass over the documents tells: the hash of their texts in order, and the length and a mark of each."""

    sha256: str
    n_chars: array.array[int]
    marks: array.array[int]  # the first 32 bits of a document's own hash: the same for the same text, else drawn evenly

    @property
    def total_chars(self) -> int:
        """Characters of all documents."""
        return sum(self.n_chars)

    @functools.cached_property
    def short(self) -> np.ndarray[Any, Any]:
        """Which documents' ends are too little to be judged by; none, where there are too few to hold out some whole."""
        n_chars, n, total = np.asarray(self.n_chars), len(self.n_chars), self.total_chars
        if n >= MANY_DOCUMENTS and total <= SHORT_DOCUMENT * n and n_chars.max() <= LARGEST_SHARE * total:
            return np.ones(n, bool)
        short = n_chars <= SHORT_DOCUMENT
        return short & (np.count_nonzero(n_chars[short]) >= MANY_DOCUMENTS)


def learnt_chars(found: Survey, held_out: float) -> array.array[int]:
    """Return from how many characters of each document a run learns; the rest, its end or all of it, is held out.

    Of short documents, where there are many, a share is held out whole, the same text always on the same side: their ends,
    cut off from what they end, would say little of a model, and it would learn to stop in the middle.

    Args:
        found: The text.
        held_out: The share that is held out.
    """
    return _cuts(found, held_out, _whole(found, held_out))


def _whole(found: Survey, held_out: float) -> np.ndarray[Any, Any] | None:
    """Return which documents are held out as a whole; None where the end of each is."""
    short = found.short
    if not (held_out and short.any()):
        return None
    whole = np.zeros(len(short), bool)
    whole[short] = _held_out_whole(np.asarray(found.marks)[short], np.asarray(found.n_chars)[short], held_out)
    return None if whole.all() else whole


def _cuts(found: Survey, held_out: float, whole: np.ndarray[Any, Any] | None) -> array.array[int]:
    ends = array.array("q", (int((1 - held_out) * n) for n in found.n_chars))
    if whole is None:
        return ends
    learnt = np.where(found.short, np.where(whole, 0, found.n_chars), ends)
    return array.array("q", learnt.astype(np.int64).tobytes())


def _held_out_whole(marks: np.ndarray[Any, Any], n_chars: np.ndarray[Any, Any], share: float) -> np.ndarray[Any, Any]:
    """Return which documents are held out: about a share, by the marks of their texts, and one text at least.

    What is said again and again, as `none` in the answers to a question, is learnt: all its copies would be on one side, and
    with them far more, or far less, than the share. Only where little else is said is some of that held out too.
    """
    texts, which, copies = np.unique(marks, return_inverse=True, return_counts=True)
    chars, wanted = np.bincount(which, n_chars), share * n_chars.sum()
    often = (copies > LARGEST_SHARE * len(marks)) | (chars > LARGEST_SHARE * n_chars.sum())
    held_out = ~often & (texts < share * 2**32)
    for text in np.flatnonzero(often):  # a few
        have = chars[held_out].sum()
        held_out[text] = have < wanted / 2 and have + chars[text] <= 2 * wanted
    said = np.flatnonzero(chars)
    if not chars[held_out].any():
        seldom = said[~often[said]]
        held_out[seldom[0] if len(seldom) else said[np.argmin(chars[said])]] = True
    elif not chars[~held_out].any() and len(said) > 1:
        held_out[said[-1]] = False
    return held_out[which]  # type: ignore[no-any-return]


def evenly(total: int, count: int, size: int) -> list[tuple[int, int]]:
    """Return `count` evenly spread ranges [start, end) of `size` in `total`; one, of all, where that is not more."""
    if total <= count * size:
        return [(0, total)]
    starts = (i * (total - size) // (count - 1) for i in range(count))
    return [(start, start + size) for start in starts]


def cache_folder() -> Path:
    """Return where prepared texts are kept."""
    return store.cache_folder() / "corpora"


def ignore_progress(what: str, share: float | None) -> None:
    """Show no progress."""


def survey(texts: Texts, progress: Progress = ignore_progress, take: Callable[[bytes], object] = lambda _: None) -> Survey:
    """Read every document once.

    Args:
        texts: What is read.
        progress: Told what is being done.
        take: Given the hash of each document that is not empty.

    Raises:
        DataError: Nothing but white space in all of them.
    """
    whole, n_chars, marks, blank, name = hashlib.sha256(), array.array("q"), array.array("I"), True, "text"
    n_bytes = 0
    for document in texts:
        digest, length, name = hashlib.sha256(), 0, document.name
        for piece in document.pieces():
            data = _encoded(piece, document.name)
            digest.update(data)
            n_bytes, length = n_bytes + len(data), length + len(piece)
            blank = blank and not piece.strip()
            progress(READING, min(1.0, n_bytes / texts.n_bytes) if texts.n_bytes else None)
        whole.update(digest.digest())
        n_chars.append(length)
        marks.append(int.from_bytes(digest.digest()[:4], "big"))
        if length:
            take(digest.digest())
    if blank:
        what = "there is no text, only white space" if n_chars else "there is no text"
        raise DataError(what, where=name, why="there is nothing to learn from", do="name another text")
    return Survey(whole.hexdigest(), n_chars, marks)


def _encoded(piece: str, where: str) -> bytes:
    """Return the bytes of a piece of text; some encodings can say what no text is."""
    try:
        return piece.encode()
    except UnicodeEncodeError as error:
        why, do = "half of a surrogate pair has no bytes in UTF-8", "name the text's own encoding with --encoding"
        raise DataError("a lone surrogate", where=where, why=why, do=do) from error


def prepare(
    texts: Texts,
    tokenizer: str | Tokenizer,
    *,
    cache: Path,
    held_out: float | Texts = 0.1,
    special: tuple[str, ...] = (),
    became: Tokenizer | int | None = None,
    check: Callable[[str, Path], None] = lambda *_: None,
    notice: Notify = ignore_line,
    progress: Progress = ignore_progress,
) -> Corpus:
    """Return the corpus of `texts`, from the cache where the same content was prepared in the same way before.

    Args:
        texts: The documents; read two to four times.
        tokenizer: `gpt2`, `bytes`, `bpe` (`fitting_vocab_size`), `bpe:N`, the path of a `tokenizer.json`, or one that is
            there already.
        cache: Folder of prepared corpora, named by content hash.
        held_out: The share that is held out, as `learnt_chars` says; or texts that are held out as a whole.
        special: Texts that are to be tokens of their own; see `Tokenizer.with_special`.
        became: What a `bpe` became when a run that goes on began, or of how many ids; None: it is trained.
        check: Given the SHA-256 of the text and the corpus's folder, before anything is tokenized; raises where they will
            not do.
        notice: Told what a person should know.
        progress: Told how far it is.

    Raises:
        ConfigError: No such tokenizer.
        DataError: No text.
    """
    if isinstance(tokenizer, str):
        parse_tokenizer(tokenizer)
    val, fraction = (None, held_out) if isinstance(held_out, int | float) else (held_out, 0.0)
    found, found_val = _surveyed(texts, val, notice, progress)
    whole = _whole(found, fraction)
    folder = cache / _key(found, found_val, fraction, tokenizer, special, whole)
    check(found.sha256, folder)
    store.make_folder(cache)
    with suppress(FirstwordsError):  # another process may remove it too, and nothing depends on it
        store.remove_leftovers(cache, older_than_s=ABANDONED_S)
    if folder.exists():
        try:
            return load(folder)
        except (DataError, NoInputError) as error:
            notice(f"{error}; set aside as {store.set_aside(folder).name} and prepared again")
    cuts = _cuts(found, fraction, whole)
    training = _Slices(texts, None, cuts, found.total_chars, progress)
    if val is not None and found_val is not None:
        validation = _Slices(val, None, found_val.n_chars, found_val.total_chars, progress)
    else:
        validation = _Slices(texts, cuts, found.n_chars, found.total_chars, progress)
    made = make_tokenizer(tokenizer, training, sum(cuts), became).with_special(special)
    try:
        _publish(folder, training, validation, made, found.sha256)
    except CannotCreateError:  # another process was faster with the same text
        if not folder.is_dir():
            raise
    return load(folder, made)


def _surveyed(texts: Texts, val: Texts | None, notice: Notify, progress: Progress) -> tuple[Survey, Survey | None]:
    """Return what a pass over the text tells, and one over its held-out text; shared documents are told."""
    held, both = set[bytes](), Counter[bool]()
    found_val = None if val is None else survey(val, progress, held.add)
    found = survey(texts, progress, lambda digest: both.update([digest in held]))
    if found_val is not None and found_val.sha256 == found.sha256:
        notice("training and held-out text are the same: the held-out figures will only show what was learnt by heart")
    elif both[True]:
        which = "1 document is" if both[True] == 1 else f"{both[True]} documents are"
        notice(f"{which} both learnt from and held out: the held-out figures will be too good")
    return found, found_val


def again(documents: Iterable[Document], *found: Iterable[int]) -> Iterator[tuple[Any, ...]]:
    """Yield each document with the numbers that were found of it when the text was read before.

    Raises:
        DataError: There were more documents then, or fewer.
    """
    for row in zip_longest(documents, *found):
        if any(one is None for one in row):
            why = "it has another number of documents than at first"
            raise DataError("changed while being read", where="the text", why=why, do=sources.CHANGING)
        yield row


def is_there(folder: Path) -> bool:
    """Whether a prepared text is in a folder: what removes old files from a cache may leave empty ones."""
    return (folder / store.MANIFEST).is_file()


def load(folder: Path, tokenizer: Tokenizer | None = None) -> Corpus:
    """Return a prepared corpus after checking its files against their hashes and its ids against the vocabulary.

    Args:
        folder: Where it is.
        tokenizer: What its file holds, where that is known: reading GPT-2's takes a second.

    Raises:
        NoInputError: It is not there.
        DataError: It is damaged.
    """
    if not is_there(folder):
        do = "firstwords eval RUN makes it again where the text itself is still there"
        raise NoInputError("the prepared text is not there", where=str(folder), do=do)
    manifest = store.verify(folder)
    tokenizer = tokenizer or tokenizers.read(folder / TOKENIZER_FILE)
    parts = [_open(folder / f"{name}.bin", manifest[name], tokenizer) for name in ("train", "val")]
    return Corpus(folder, tokenizer, parts[0], parts[1], manifest["text_sha256"])


def documents(part: Part, tokenizer: Tokenizer, most_bytes: int | None = None) -> list[bytes]:
    """Return the text of a part, document by document, or the last `most_bytes` of it."""
    ids = part.ids if most_bytes is None else part.ids[-(most_bytes + part.n_documents) :]
    if most_bytes is not None:
        ids = ids[np.cumsum(part.id_bytes[ids][::-1])[::-1] <= most_bytes]
    return [text for piece in split_at_ends(ids, tokenizer) if (text := _bytes_of(piece, tokenizer))]


def split_at_ends(ids: np.ndarray[Any, Any], tokenizer: Tokenizer) -> list[np.ndarray[Any, Any]]:
    """Return the ids of each document, or what of it is there, without `<|endoftext|>`."""
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text))
    return [piece[piece != tokenizer.end_of_text] for piece in pieces]


def _bytes_of(ids: np.ndarray[Any, Any], tokenizer: Tokenizer) -> bytes:
    """Return the text of ids; as numbers of Python, all of them at once would take 36 bytes each."""
    slices = (ids[start : start + IDS_AT_ONCE].tolist() for start in range(0, len(ids), IDS_AT_ONCE))
    return b"".join(map(tokenizer.encoding.decode_bytes, slices))


def part_of(texts: Iterable[bytes], tokenizer: Tokenizer) -> Part:
    """Return documents as a part in memory, as another tokenizer has them; `documents` gives them back."""
    end, count, ids = np.array([tokenizer.end_of_text], np.uint32), 0, [np.empty(0, np.uint32)]
    for text in texts:
        count += 1
        ids += [end, *tokenizer.stream([text.decode()])]
    return Part(np.concatenate(ids), tokenizer.id_bytes, count)


def require_context(part: Part, context_length: int) -> None:
    """Raise a DataError where a training part is shorter than one context and its target."""
    n = part.n_tokens
    if n <= context_length:
        raise DataError(
            f"the training text has {n} tokens, a context of {context_length} needs {context_length + 1}",
            where="text",
            do=f"give more text, or --model.context-length {n - 1}" if n > 1 else "give more text, or --val-fraction 0",
        )


def parse_tokenizer(name: str) -> tuple[str, int]:
    """Return (kind, size) of a tokenizer's name; kind is gpt2, bytes, bpe or file, size is 0 but for `bpe:N`.

    Raises:
        ConfigError: Neither a known name nor an existing file.
    """
    kind, _, size = name.partition(":")
    if kind == "bpe" and size.isdecimal() and len(size) < 10:
        tokenizers.check_vocab_size(int(size))
        return "bpe", int(size)
    if name in ("gpt2", "bytes", "bpe"):
        return name, 0
    if Path(name).is_file():
        return "file", 0
    raise ConfigError(f"no tokenizer {name!r}", where="--tokenizer", do="known: gpt2, bytes, bpe, bpe:N, a tokenizer.json")


def fitting_vocab_size(n_chars: int) -> int:
    """Return how many ids a tokenizer trained on so many characters should have: a power of two.

    It is the one next to 2 √characters, or to 17 ∛characters where that is less. Source: docs/recipe.md.
    """
    n_chars = max(1, n_chars)
    wanted = math.log2(min(2 * math.sqrt(n_chars), 17 * math.cbrt(n_chars)))
    return min(LARGEST_FITTING, max(SMALLEST_FITTING, 1 << round(wanted)))


def make_tokenizer(
    name: str | Tokenizer, training: Iterable[Document], n_chars: int, became: Tokenizer | int | None = None
) -> Tokenizer:
    """Return the tokenizer of that name; a `bpe` is trained on the training part only, which has `n_chars` characters.

    One that it `became` when the run began is taken as it is. Of a large text it learns from pieces at even distances: from
    half of 12 MB, it needs 0.5 % more ids than from all.
    """
    if isinstance(name, Tokenizer):
        return name
    kind, size = parse_tokenizer(name)
    match kind:
        case "gpt2":
            return tokenizers.gpt2()
        case "bytes":
            return tokenizers.byte_tokenizer()
        case "bpe":
            if isinstance(became, Tokenizer):
                return became
            spread = islice(tokenizers.safe_pieces(_apart(training)), 0, None, max(1, math.ceil(n_chars / BPE_CHARS)))
            return tokenizers.train_bpe(spread, size or became or fitting_vocab_size(n_chars))
        case _:
            return tokenizers.read(Path(name))


def _apart(documents: Iterable[Document]) -> Iterator[str]:
    """Yield the text of documents, a newline between each two: what ends one is no word with what begins the next."""
    for number, document in enumerate(documents):
        if number:
            yield "\n"
        yield from document.pieces()


@dataclass(frozen=True)
class _Slices:
    """Documents cut to character ranges; iterated anew each time."""

    documents: Iterable[Document]
    starts: Sequence[int] | None  # of each document; None: its beginning
    ends: Sequence[int]
    total_chars: int
    progress: Progress

    def __iter__(self) -> Iterator[Document]:
        done = 0
        for document, start, end in again(self.documents, self.starts or repeat(0, len(self.ends)), self.ends):
            if end > start:
                yield Document(document.name, functools.partial(self._slice, document.pieces, start, end, done))
            done += end

    def _slice(self, pieces: Callable[[], Iterator[str]], start: int, end: int, done: int) -> Iterator[str]:
        at = 0
        for piece in pieces():
            self.progress("tokenizing", min(1.0, (done + min(at, end)) / max(1, self.total_chars)))
            if at < end and at + len(piece) > start:
                yield piece[max(0, start - at) : end - at]
            at += len(piece)


def _key(
    found: Survey,
    held_out: Survey | None,
    fraction: float,
    tokenizer: str | Tokenizer,
    special: tuple[str, ...],
    whole: np.ndarray[Any, Any] | None,
) -> str:
    """Return the cache folder's name: a hash of all that decides the shards.

    That not the marks of documents alone decide which are held out counts only where they do not, so that a run which began
    before that goes on with its text.
    """
    if isinstance(tokenizer, Tokenizer):
        tokenizer = "ranks:" + tokenizer.sha256
    elif parse_tokenizer(tokenizer)[0] == "file":
        tokenizer = "sha256:" + store.file_sha256(Path(tokenizer))
    wanted = [FORMAT, found.sha256, held_out and held_out.sha256, fraction, tokenizer]
    short = found.short
    if whole is not None and not np.array_equal(whole[short], np.asarray(found.marks)[short] < fraction * 2**32):
        wanted.append("what is said again and again is learnt")
    if whole is not None and not short.all():
        wanted.append("of the others the end is held out")
    return store.sha256(store.canonical_json({"prepared": [*wanted, *special]}))[:32]


class _OfThread(threading.local):
    """A tokenizer that each thread has to itself.

    The state of a pattern that two threads share goes from core to core with every word: they encode no faster than one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = dataclasses.replace(tokenizer)


def _publish(folder: Path, training: _Slices, validation: _Slices, tokenizer: Tokenizer, text_sha256: str) -> None:
    dtype = np.dtype(DTYPES[tokenizer.vocab_size > 1 << 16])
    own, counts = _OfThread(tokenizer), dict[str, dict[str, int]]()

    def shard(name: str, documents: Iterable[Document]) -> Iterator[bytes]:
        count = counts[name] = {"ids": 0, "bytes": 0, "documents": 0}
        for n_documents, n_bytes, ids in _in_order(pool, encoded, _groups(_pieces(documents))):
            count["documents"] += n_documents
            count["bytes"] += n_bytes
            count["ids"] += len(ids)
            yield ids.tobytes()

    def encoded(group: list[str | None]) -> tuple[int, int, np.ndarray[Any, Any]]:
        end, n_bytes = np.array([tokenizer.end_of_text], dtype), sum(len(piece.encode()) for piece in group if piece)
        ids = [end if piece is None else own.tokenizer.piece_ids(piece).astype(dtype) for piece in group]
        return group.count(None), n_bytes, np.concatenate(ids)

    with ThreadPoolExecutor(_encoders()) as pool:
        store.publish(
            folder,
            {
                TOKENIZER_FILE: [tokenizer.json],
                "train.bin": shard("train", training),
                "val.bin": shard("val", validation),
            },
            lambda: {
                "kind": "corpus",
                "dtype": dtype.str,
                "text_sha256": text_sha256,
                "tokenizer": tokenizers.metadata(tokenizer),
                **{name: {**count, "dtype": dtype.str} for name, count in counts.items()},
            },
        )


def _pieces(documents: Iterable[Document]) -> Iterator[str | None]:
    """Yield the pieces of every document, that can be encoded each by itself, with None before each document."""
    for document in documents:
        yield None
        yield from tokenizers.safe_pieces(document.pieces())


def _groups(pieces: Iterable[str | None]) -> Iterator[list[str | None]]:
    """Yield the pieces in groups of many characters: one of a short document is less work than handing it to a thread."""
    group, n_chars = list[str | None](), 0
    for piece in pieces:
        group.append(piece)
        n_chars += 1 if piece is None else len(piece)
        if n_chars >= tokenizers.PIECE_CHARS:
            yield group
            group, n_chars = [], 0
    if group:
        yield group


def _encoders() -> int:
    return min(os.cpu_count() or 1, MOST_ENCODERS)


def _in_order(pool: Executor, function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Yield what the function makes of each item, in their order; all threads work, and few items wait."""
    waiting: deque[Future[Made]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 4 * _encoders():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _open(path: Path, record: dict[str, Any], tokenizer: Tokenizer) -> Part:
    if record["dtype"] not in DTYPES:
        raise DataError(f"does not hold ids but {record['dtype']!r}", where=str(path))
    dtype = np.dtype(record["dtype"])
    if path.stat().st_size != record["ids"] * dtype.itemsize:
        raise DataError(f"does not hold the {record['ids']} ids that its manifest names", where=str(path))
    _check_ids(path, dtype, tokenizer.vocab_size)
    ids = np.memmap(path, dtype, "r") if record["ids"] else np.empty(0, dtype)  # an empty file cannot be mapped
    return Part(ids, tokenizer.id_bytes, record["documents"], record["bytes"])


def _check_ids(path: Path, dtype: np.dtype[Any], vocab_size: int) -> None:
    """Raise a DataError for the first id beyond the vocabulary. Read in pieces: a map would bring all ids into memory."""
    with path.open("rb") as file:
        at = 0
        while len(ids := np.fromfile(file, dtype, IDS_AT_ONCE)):
            if int(ids.max()) >= vocab_size:
                first = int(np.argmax(ids >= vocab_size))
                raise DataError(
                    f"token id {int(ids[first])} is beyond the vocabulary of {vocab_size}",
                    where=f"{path}, token {at + first}",
                    do="remove the folder; the text will be prepared again",
                )
            at += len(ids)
