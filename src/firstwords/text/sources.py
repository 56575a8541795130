"""Read a person's text: files, folders, standard input, or the corpus that comes with Python.

The first of the steps that turn text into batches. Texts stream in pieces, so memory stays the same for a novel and for
a gigabyte on one line. Nothing is guessed and nothing repaired: what is not text in a known encoding is an error.
"""

from __future__ import annotations

import codecs
import difflib
import encodings.aliases
import errno
import gzip
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from firstwords import reading, store
from firstwords.errors import (
    ConfigError,
    DataError,
    FirstwordsError,
    NoInputError,
    Notify,
    PermissionDeniedError,
    StorageError,
    ignore_line,
    quoted,
)
from firstwords.text.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

JSON_LINES = (".jsonl", ".ndjson")  # of which each line is a document
SUFFIXES = (".txt", ".md", *JSON_LINES)  # what a folder is searched for, each also with .gz
SHOWN_KINDS = 3  # of the files in a folder that are not read
RUN_PARTS = ("config.toml", "checkpoints")  # of a run folder, whose journals are no text
PIECE_BYTES = 2**20
HEAD_BYTES = 2**16  # looked at before anything is read in full
LONGEST_NAME = 60  # characters of a short name: with a number behind it, it must still be the name of a folder

_STDIN = "standard input"
_GZIP_MAGIC = b"\x1f\x8b"
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose little-endian mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
CHANGING = "wait until nothing writes to it, or read a copy"
_TABLE = "a table; its separators and quotes"
_NOT_PROSE = {".csv": _TABLE, ".tsv": _TABLE, ".json": "JSON; its brackets, keys and quotes, unlike those of a .jsonl file,"}
_NAME_A_TEXT = "name a text file instead"
_EXPORT = 'export its text to a .jsonl file, one {{"text": "..."}} a line'
_NOT_TEXT = (  # first bytes, what they are the mark of, what to do
    (rb"\x89PNG\r\n\x1a\n", "a PNG image", _NAME_A_TEXT),
    (rb"\xff\xd8\xff", "a JPEG image", _NAME_A_TEXT),
    (rb"GIF8[79]a", "a GIF image", _NAME_A_TEXT),
    (rb"\{\\rtf", "an RTF document", "save it as plain text"),
    (rb"%PDF-", "a PDF document", "take its text out: pdftotext {path}"),
    (rb"PK\x03\x04", "a ZIP archive", "unzip {path}; .docx, .odt and .epub are ZIPs too: save those as plain text"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it: 7z x {path}"),
    (rb"\xfd7zXZ\x00", "an xz archive", "unpack it: xz -dk {path}"),
    (rb"BZh[1-9]1AY&SY", "a bzip2 archive", "unpack it: bunzip2 -k {path}"),
    (rb"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it: zstd -d {path}"),
    (_GZIP_MAGIC, "a gzip archive inside a gzip archive", "unpack it once: gunzip -k {path}"),
    (rb"\x7fELF", "an ELF program", _NAME_A_TEXT),
    (rb"SQLite format 3\x00", "an SQLite database", _EXPORT),
    (rb"PAR1", "a Parquet table", _EXPORT),
    (rb"(?s:.{6})\x00\x00\{\"", "a safetensors file", _NAME_A_TEXT),
    (rb"GGUF[\x01-\x09]\x00\x00\x00", "a GGUF model", _NAME_A_TEXT),
    (re.escape(reading.LFS_POINTER), "a Git LFS pointer", reading.LFS_PULL),
)
_GUESSES = (  # encoding, the letters that its texts are made of; the more particular first
    ("shift_jis", "[\u3000-\u30ff\u4e00-\u9fff\uff01-\uff5e]"),
    ("euc_kr", "[\u3000-\u303f\uac00-\ud7a3]"),
    ("gb18030", "[\u2010-\u2027\u3000-\u303f\u4e00-\u9fff\uff01-\uff5e]"),
    ("euc_jp", "[\u3000-\u30ff\u4e00-\u9fff\uff01-\uff5e]"),
    ("big5", "[\u3000-\u303f\u4e00-\u9fff\uff01-\uff5e]"),
    ("cp1251", "[\u0400-\u04ff]"),
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a collection.

    Attributes:
        name: For messages: a path, `path:line` for a line of a .jsonl file, `standard input` or `pydoc_data.topics`.
        pieces: Yields the text in order in pieces of about 1 MiB, from the beginning at each call. Line ends are left
            as they are. Raises the errors of `Texts`.
    """

    name: str
    pieces: Callable[[], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents in order, from the beginning at each iteration, in constant memory (a .jsonl line is held whole).

    Iterating, like `Document.pieces`, raises `DataError` at what does not decode, at a .jsonl line without a text, at
    broken gzip and at a file that changed since `read`; and the errors of `read` at a file that is gone since.

    Attributes:
        name: A short name: `notes` for `notes/` or `notes.txt.gz`, `stdin`, `pydoc-topics`; the first's of several.
        n_bytes: Of UTF-8 in all of them, where their sizes on disk tell it: packed and other files hold other amounts.
    """

    name: str
    n_bytes: int | None
    _parts: tuple[Callable[[], Iterator[Document]], ...] = field(repr=False)

    def __iter__(self) -> Iterator[Document]:
        return chain.from_iterable(part() for part in self._parts)


def read(paths: Sequence[str | Path], *, encoding: str | None = None, notice: Notify = ignore_line) -> Texts:
    """Find the texts and look at their first 64 KiB; the rest is read when the result is iterated.

    Args:
        paths: Files, folders (searched for `SUFFIXES`, in sorted order, without hidden files) and `-` for standard
            input. A .jsonl file gives a document a line, from the key `text`; any other a document a file. What begins
            as gzip is unpacked. None at all: `pydoc_data.topics`, Python's own reference, about 465,000 characters.
        encoding: Python's name of an encoding. By default UTF-8, or UTF-16 or UTF-32 that say so with a byte-order
            mark, which is dropped.
        notice: Told of what is read but may surprise, and of what a folder holds that is not read.

    Raises:
        ConfigError: If there is no such encoding.
        NoInputError: If a path leads to no regular file or folder, or a folder holds no text.
        PermissionDeniedError: If one may not be read.
        DataError: If one is empty or, by its first bytes, not text.
        StorageError: If reading fails.
    """
    if encoding is not None:
        _check_encoding(encoding)
    if not paths:
        return Texts("pydoc-topics", None, (_built_in,))
    sources = [source for path in paths for source in _find(path, encoding, notice)]
    n_bytes = sum(source.status.st_size for source in sources if source.status) if all(map(_is_plain, sources)) else None
    return Texts(_short_name(str(paths[0])), n_bytes, tuple(source.documents for source in sources))


@dataclass(frozen=True, slots=True)
class _Source:
    """Bytes that can be opened again and again, and how to take them for documents."""

    name: str
    open: Callable[[], io.BufferedReader]
    encoding: str | None
    is_jsonl: bool = False
    is_gzip: bool = False  # by its suffix; the first bytes can say so too
    status: os.stat_result | None = None  # of the file when it was found

    def documents(self) -> Iterator[Document]:
        if not self.is_jsonl:
            yield Document(self.name, self.pieces)
            return
        for number, line in enumerate(_lines(self.pieces()), start=1):
            if line.strip():
                text = _text_of(line, where=f"{self.name}:{number}")
                yield Document(f"{self.name}:{number}", partial(_cut, text))

    def pieces(self) -> Iterator[str]:
        with closing(self.chunks()) as chunks:
            first = next(chunks, b"")
            encoding, n_bytes = _detect(first, self.encoding)
            decoder = codecs.getincrementaldecoder(encoding)()
            n_lines = 0
            for chunk in chain([first[n_bytes:]], chunks, [b""]):
                n_bytes += len(chunk)
                try:
                    piece = decoder.decode(chunk, final=not chunk)
                except UnicodeError as error:
                    raise self._undecodable(error, encoding, n_bytes, n_lines) from None
                if piece:
                    yield piece
                n_lines += piece.count("\n")

    def chunks(self) -> Generator[bytes, None, None]:
        """Yield the bytes, unpacked."""
        with _errors_of(self.name), self.open() as raw:
            is_gzip = self.is_gzip or raw.peek(2).startswith(_GZIP_MAGIC)
            with gzip.GzipFile(fileobj=raw) if is_gzip else raw as file:
                while chunk := file.read(PIECE_BYTES):
                    yield chunk
                if self.status is not None and (why := _changes(self.status, os.fstat(raw.fileno()))):
                    raise DataError("changed while being read", where=self.name, why=why, do=CHANGING)

    def _undecodable(self, error: UnicodeError, encoding: str, n_bytes: int, n_lines: int) -> DataError:
        """Say where the text stops being `encoding`, once `n_bytes` went in and `n_lines` lines came out."""
        if not isinstance(error, UnicodeDecodeError):  # a codec's own rule, as UTF-16 without its mark
            return DataError(f"not {encoding} text", where=self.name, why=str(error), do="give another --encoding")
        offset = n_bytes - len(error.object) + error.start
        line = n_lines + 1 + error.object[: error.start].decode(encoding, "replace").count("\n")
        guess = _guess(error.object, error.start) if self.encoding is None and encoding == "utf-8" else None
        advice = f"looks like {guess} (a guess): try --encoding {guess}" if guess else "repair it, or name --encoding"
        if error.reason.startswith("unexpected"):  # "end of data"
            advice = f"get the file again if it was cut short; {advice}"
        what = f"byte 0x{error.object[error.start]:02X} is not valid {encoding}"
        where = f"{self.name}, line {line}, byte offset {offset}"
        return DataError(what, where=where, why=error.reason, do=advice)


def _find(path: str | Path, encoding: str | None, notice: Notify) -> list[_Source]:
    """Return the sources at a path that a person named, at least one."""
    if str(path) == "-":
        return _not_empty([_Source(_STDIN, _spool_stdin(), encoding)], _STDIN, notice)
    if not str(path):  # to pathlib, the current folder: not what an unset shell variable means
        raise NoInputError("no file is named", where="''", do="give a file or folder")
    path = Path(path)
    if "\0" in str(path):
        raise NoInputError("no such file", where=_shown(path), why="a name cannot hold a NUL", do="check the name")
    with _errors_of(_shown(path)):
        files = _text_files(path, notice) if stat.S_ISDIR(path.stat().st_mode) else [path]
    return _not_empty([_file(file, encoding) for file in files], _shown(path), notice)


def _is_plain(source: _Source) -> bool:
    """Whether its size on disk is that of its text in UTF-8."""
    if source.status is None or source.is_jsonl or source.encoding is not None:
        return False
    with _errors_of(source.name), source.open() as file:
        head = file.read(4)
    return not head.startswith(_GZIP_MAGIC) and _detect(head, None)[0] == "utf-8"


def _not_empty(sources: Iterable[_Source], name: str, notice: Notify) -> list[_Source]:
    kept, empty = list[_Source](), list[str]()
    for source in sources:
        if _check_head(source, notice):
            kept.append(source)
        elif source.name != name:
            empty.append(source.name)
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        notice(f"{empty[0]}{more}: skipped, empty (0 bytes)")
    if not kept:
        raise DataError("is empty (0 bytes)", where=name, why="there is nothing to learn from", do="name another text")
    return kept


def _file(path: Path, encoding: str | None) -> _Source:
    with _errors_of(_shown(path)):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe could wait for ever, and /dev/zero has no end
        why, do = "it is a pipe, socket or device", f"send it to standard input: - < {quoted(_shown(path))}"
        raise NoInputError("not a regular file", where=_shown(path), why=why, do=do)
    absolute = path.absolute()
    name = path.name.lower()
    is_jsonl = name.removesuffix(".gz").endswith(JSON_LINES)
    is_gzip = name.endswith(".gz")
    return _Source(_shown(path), lambda: absolute.open("rb"), encoding, is_jsonl, is_gzip, status)


def _changes(before: os.stat_result, now: os.stat_result) -> str:
    """Return what tells that a file is another by now; empty where nothing does."""
    if now.st_size != before.st_size:
        return f"it had {before.st_size} bytes at the start"
    if now.st_mtime_ns != before.st_mtime_ns:  # and no inode: FAT and some network file systems number a file anew
        return "it was written to, or replaced, since the start"
    return ""


def _text_files(folder: Path, notice: Notify) -> list[Path]:
    found, left = list[Path](), Counter[str]()
    with _errors_of(_shown(folder)):
        for parent, folders, files in os.walk(folder, onerror=_raise):
            if what := _made_here(Path(parent), {*folders, *files}):
                notice(f"{_shown(Path(parent))}: skipped, it is {what} and no text")
                folders[:] = []
                continue
            folders[:] = [name for name in folders if not name.startswith(".")]
            for link in filter(Path.is_symlink, (Path(parent, name) for name in folders)):
                notice(f"{_shown(link)}: skipped, it is a link to a folder")
            for name in (name for name in files if not name.startswith(".")):
                if name.lower().removesuffix(".gz").endswith(SUFFIXES):
                    found.append(_leading_somewhere(Path(parent, name)))
                else:
                    left[Path(name).suffix or name] += 1
    if not found:
        why, do = f"it holds no {', '.join(SUFFIXES)}, also not with .gz", "name files of other kinds one by one"
        raise NoInputError("no text in this folder", where=_shown(folder), why=why, do=do)
    if left:
        kinds = ", ".join(kind for kind, _ in left.most_common(SHOWN_KINDS))
        notice(f"{_shown(folder)}: other files are not read, {left.total()} of {kinds}; name those that are text one by one")
    return sorted(found, key=Path.as_posix)


def _made_here(folder: Path, names: set[str]) -> str:
    """Return what of ours a folder is: a run, or what was exported of one; empty where it is neither."""
    if set(RUN_PARTS) <= names:
        return "a run"
    if store.MANIFEST in names:
        with suppress(FirstwordsError):
            return f"what firstwords made ({store.read_manifest(folder).get('kind')})"
    return ""


def _leading_somewhere(path: Path) -> Path:
    """Return the path of a file in a folder, unless it is a link to what is not there."""
    if path.is_symlink() and not path.exists():
        what, do = "is a link to what is not there", "remove it, or put that back"
        raise NoInputError(what, where=_shown(path), why=f"it leads to {_shown(path.readlink())}", do=do)
    return path


def _raise(error: OSError) -> NoReturn:
    raise error


def _spool_stdin() -> Callable[[], io.BufferedReader]:
    """Copy standard input, which can be read only once, and return what opens the copy."""
    # Writing goes through store everywhere else, to survive a crash; this file has no name and ends with us.
    if sys.stdin is None:
        raise NoInputError("is closed", where=_STDIN, do="write a text into it, or name a file")
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the last source that can open it is gone
    place = f"{_STDIN}, kept in {tempfile.gettempdir()}"

    def reopen() -> io.BufferedReader:
        return io.BufferedReader(_Reader(spool))

    weakref.finalize(reopen, spool.close)
    with _errors_of(place):
        shutil.copyfileobj(sys.stdin.buffer, spool, PIECE_BYTES)
    return reopen


class _Reader(io.RawIOBase):
    """Reads a shared file from its beginning, with a position of its own."""

    def __init__(self, shared: io.BufferedRandom) -> None:
        self._shared, self._position = shared, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._shared.seek(self._position)
        n_bytes = self._shared.readinto(buffer)
        self._position += n_bytes
        return n_bytes


def _built_in() -> Iterator[Document]:
    yield Document("pydoc_data.topics", _topics)


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics  # half a megabyte that only the built-in corpus needs

    return _cut("\n\n".join(topics[key] for key in sorted(topics)))


def _cut(text: str) -> Iterator[str]:
    return (text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES))


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """Yield the lines that end in a line feed; not `str.splitlines`, as JSON strings may hold U+2028."""
    held: list[str] = []
    for piece in pieces:
        head, *tail = piece.split("\n")
        held.append(head)
        for part in tail:
            yield "".join(held)
            held = [part]
    yield "".join(held)


def _text_of(line: str, *, where: str) -> str:
    """Return the text of a line of a .jsonl file, or raise `DataError`."""
    wanted = 'each line must be an object like {"text": "..."}'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        why = f"{error.msg}; the line may be cut short"
        raise DataError("not valid JSON", where=f"{where}, column {error.colno}", why=why, do=wanted) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
        raise DataError("JSON that cannot be read", where=where, why=str(error), do=wanted) from None
    if not isinstance(record, dict):
        raise DataError("not a JSON object", where=where, why=f"it is a {type(record).__name__}", do=wanted)
    if "text" not in record:
        seen = ", ".join(_shown(key) for key in record) or "none"
        raise DataError('no key "text"', where=where, why=f"the keys are: {seen}", do=wanted)
    text = record["text"]
    if not isinstance(text, str):
        raise DataError('"text" is not a string', where=where, why=f"it is a {type(text).__name__}", do=wanted)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        why = f"character {error.start} of the text is {_shown(text[error.start])}, half of a surrogate pair"
        raise DataError("a lone surrogate", where=where, why=why, do="write the whole pair, or remove it") from None
    return text


def _check_head(source: _Source, notice: Notify) -> bool:
    """Return whether the source holds anything; raise `DataError` if its first bytes are not text."""
    with closing(source.chunks()) as chunks:
        head = next(chunks, b"")[:HEAD_BYTES]
    encoding, bom_bytes = _detect(head, source.encoding)
    if len(head) == bom_bytes:
        return False
    for mark, kind, advice in _NOT_TEXT:
        if re.match(mark, head):
            do = advice.format(path=quoted(source.name))
            raise DataError(f"this is {kind}, not text", where=source.name, why="its first bytes are the mark of one", do=do)
    text = head[bom_bytes:].decode(encoding, "replace")
    if text.count("\0") * 100 > len(text):
        raise _binary(head, source.name)
    if bom_bytes and source.encoding is None and encoding != "utf-8":
        notice(f"{source.name}: read as {encoding}, by its byte-order mark")
    if source.encoding is not None and codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig") and _is_utf8(head):
        notice(f"{source.name}: is UTF-8 by its letters, and read as {encoding} all the same, as --encoding says")
    for note in _read_as_text(text, source):
        notice(f"{source.name}: {note}")
    return True


def _read_as_text(text: str, source: _Source) -> Iterator[str]:
    """Yield what the beginning of a text shows to be no prose, and is learnt all the same."""
    if END_OF_TEXT in text:
        yield f"holds {END_OF_TEXT}, which is read as text; lines of a .jsonl file are documents"
    if "\0" in text:
        yield "holds NUL characters; they are read as text"
    if text.lstrip().lower().startswith(("<!doctype html", "<html")):
        yield "looks like an HTML page; its tags are read as text"
    if re.search(r"\x1b(\$[@B]|\(J)", text):
        yield "looks like ISO-2022-JP, whose marks are read as text: try --encoding iso2022_jp"
    if not source.is_jsonl and _begins_with_line_of_json(text):
        yield "looks like lines of JSON, whose brackets and keys are read as text: in a file of the name .jsonl they are not"
    elif marks := _NOT_PROSE.get(Path(source.name.lower().removesuffix(".gz")).suffix):
        yield f"{marks} are read as text"


def _begins_with_line_of_json(text: str) -> bool:
    """Whether a text begins as a .jsonl file does."""
    line, _, rest = text.partition("\n")
    try:
        return bool(rest) and line.startswith("{") and "text" in json.loads(line)
    except (ValueError, RecursionError):
        return False


def _binary(head: bytes, name: str) -> DataError:
    """Say what a text with too many NULs is: UTF-16 if every second byte of the first KiB is one, or binary."""
    even, odd = head[:1024:2], head[1:1024:2]
    for encoding, high, low in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if high.count(0) * 2 > len(high) and not low.count(0):
            what, why = "looks like UTF-16 without a byte-order mark", "every second byte is NUL"
            return DataError(what, where=name, why=why, do=f"add --encoding {encoding}")
    return DataError("binary, not text", where=name, why="more than 1 % of its characters are NUL", do=_NAME_A_TEXT)


def _detect(head: bytes, wanted: str | None) -> tuple[str, int]:
    """Return the encoding and the length in bytes of the byte-order mark to drop."""
    for bom, encoding in _BOMS:
        if head.startswith(bom) and (wanted is None or codecs.lookup(wanted).name == encoding):
            return encoding, len(bom)
    return wanted or "utf-8", 0


def _guess(data: bytes, start: int) -> str | None:
    """Guess which encoding has the byte at `start`, which UTF-8 has not; None if the text around it is UTF-8.

    Encodings of letters outside Latin put high bytes side by side; Western text has them one by one, among ASCII.
    """
    window = data[max(0, start - 1024) : start + 1024]
    if _n_high(window.decode("utf-8", "ignore").encode()) * 2 > _n_high(window):
        return None
    # In these encodings a byte after an ASCII byte begins a character, so decoding can begin at the run's first byte.
    run = re.search(rb"[\x80-\xff]*\Z", data[max(0, start - 1024) : start])
    window = data[start - len(run[0] if run else b"") : start + 1024]
    side_by_side = sum(map(len, re.findall(rb"[\x80-\xff]{2,}", window)))
    for encoding, letters in _GUESSES if side_by_side * 2 > _n_high(window) else ():
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(window)  # incremental: the window may cut a character
        except UnicodeDecodeError:
            continue
        foreign = [character for character in text if not character.isascii()]
        if len(re.findall(letters, text)) >= 0.9 * len(foreign) > 0:
            return encoding
    return "cp1252"


def _is_utf8(head: bytes) -> bool:
    """Whether the beginning of a file has letters beyond ASCII, and they are all UTF-8's: by chance they hardly are."""
    try:
        return not codecs.getincrementaldecoder("utf-8")().decode(head).isascii()  # which may be cut inside a letter
    except UnicodeDecodeError:
        return False


def _n_high(data: bytes) -> int:
    return sum(byte >= 0x80 for byte in data)


def _check_encoding(name: str) -> None:
    try:
        "a".encode(name)  # refuses codecs that are not of text, such as base64
        b"a".decode(name, "replace")
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError):
        known = sorted({*encodings.aliases.aliases, *encodings.aliases.aliases.values()})
        near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)
        do = f"did you mean {near[0].replace('_', '-')}?" if near else "leave it out for UTF-8"
        why = "Python has no text encoding of this name"
        raise ConfigError(f"unknown encoding {_shown(name)}", where="--encoding", why=why, do=do) from None


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Turn what opening and reading raises into errors that name the file."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        what, do = "damaged gzip data", "get the file again; `gzip -t` tests it"
        raise DataError(what, where=name, why=str(error), do=do) from error
    except OSError as error:
        where = _shown(os.fsdecode(error.filename)) if error.filename else name
        why = error.strerror or str(error)
        match error.errno:
            case errno.ENOENT | errno.ENOTDIR:
                raise NoInputError("no such file", where=where, do=_nearest(error)) from error
            case errno.ELOOP | errno.ENAMETOOLONG:
                raise NoInputError("leads to no file", where=where, why=why, do="name the file itself") from error
            case errno.EACCES | errno.EPERM:
                do = f"ask its owner, or try: chmod u+r {quoted(where)}"
                raise PermissionDeniedError("may not be read", where=where, why=why, do=do) from error
        raise StorageError("reading failed", where=where, why=why, do="check the disk, then try again") from error


def _nearest(error: OSError) -> str:
    """Return advice for a file that is not there: the name most like it in its folder, if any is."""
    near = reading.nearest(Path(os.fsdecode(error.filename)))
    return f"did you mean {_shown(near)}?" if near else f"check the name, from {_shown(Path.cwd())}"


def _short_name(path: str) -> str:
    if path == "-":
        return "stdin"
    named = Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()
    name = _shown(named.name if named.is_dir() else Path(named.name.removesuffix(".gz")).stem)
    return name.strip(".")[:LONGEST_NAME] or "text"


def _shown(name: str | Path) -> str:
    """Return a name as it is safe to print: control and other unprintable characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
