"""What a file of `torch.save` is made of, found out without unpickling it.

Since 1.6 PyTorch writes a zip archive: the pickle `data.pkl`, which names storages, and each storage as it lies in memory,
not compressed. A plain table of tensors needs few of pickle's operations and few names; whatever else is in there is not
wanted. That makes most files that run code a one-line message, and it is not the only guard: see `guarded`.
"""

from __future__ import annotations

import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from firstwords import reading
from firstwords.errors import DataError

SUFFIXES = (".pt", ".pth", ".bin")  # by which people name such files
MOST_PICKLE_BYTES = 4 << 20  # 10,000 tensors take 1.2 MB
MOST_MEMBERS = 1 << 16
ENCRYPTED = 1
# The format's own marks (PKWARE APPNOTE, 4.3.7 and 4.3.14 to 4.3.16): the first member; the end; the end where sizes have 64
# bits; what says where that lies. The last three are as long as their structures, without a comment.
FIRST = b"PK\x03\x04"
END, END_64, LOCATOR = (
    struct.Struct("<4s 8x I I H"),
    struct.Struct("<4s 36x Q Q"),
    struct.Struct("<4s 4x Q 4x"),
)
GGUF = b"GGUF"  # how another format begins, that people have such models in
MEMBER = r"/(data\.pkl|data/\d{1,9}|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id)"
SAFER = "load it where you trust it, and save the weights as safetensors"
# What `torch.save` of dicts, lists, numbers, text and dense tensors uses (protocol 2).
OPERATIONS = """PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS
    BINPUT LONG_BINPUT BINGET LONG_BINGET"""
BUILDERS = ("collections OrderedDict", "torch Size", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter")
STORAGE_BYTES = {
    "Double": 8,
    "Long": 8,
    "Float": 4,
    "Int": 4,
    "Half": 2,
    "BFloat16": 2,
    "Short": 2,
    "Char": 1,
    "Byte": 1,
    "Bool": 1,
}


def require_plain(path: Path) -> None:
    """Raise a DataError unless `path` is an archive of `torch.save` that asks for tensors and plain values alone.

    The format before PyTorch 1.6 is refused: its pickles lie in one stream with the tensors, so that nothing about them can
    be known before they are run.
    """
    with reading.regular(path) as (file, size):
        head = file.read(512)
        file.seek(-min(size, END.size + LOCATOR.size + END_64.size), os.SEEK_END)
        tail = file.read()
    reading.require_no_pointer(head, str(path))
    if head.startswith(GGUF):
        do = "import the folder for transformers, or the .pth, that it was made from"
        raise DataError("is a GGUF file, which is not read", where=str(path), do=do)
    if not head.startswith(FIRST) or not _has_one_directory(tail, size):
        raise DataError("is no archive of torch.save", where=str(path), why=_kind(head), do=SAFER)
    try:
        with zipfile.ZipFile(path) as archive:
            _require_members(archive, size, str(path))
            sizes = {member.filename.partition("/")[2]: member.file_size for member in archive.infolist()}
            pickled = archive.read(archive.namelist()[0].partition("/")[0] + "/data.pkl")
            _require_names(pickled, str(path))
            _require_storages(pickled, sizes, str(path))
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, KeyError) as error:
        raise DataError("is a damaged archive", where=str(path), why=str(error)) from error


def _has_one_directory(tail: bytes, size: int) -> bool:
    """Return whether an archive ends with its list of members and nothing else, so that no two readers find two lists.

    Python looks for the list right before the end, PyTorch where the end says that it is.
    """
    if len(tail) < END.size:
        return False
    mark, n_bytes, begin, n_comment = END.unpack(tail[-END.size :])
    at = size - END.size
    before = tail[: -END.size]
    if before[-LOCATOR.size :].startswith(b"PK\x06\x07") and len(before) == LOCATOR.size + END_64.size:
        at -= len(before)
        mark_64, n_bytes_64, begin_64 = END_64.unpack(before[: END_64.size])
        short = all(told in (wide, 0xFFFFFFFF) for told, wide in ((n_bytes, n_bytes_64), (begin, begin_64)))
        if mark_64 != b"PK\x06\x06" or LOCATOR.unpack(before[END_64.size :])[1] != at or not short:
            return False
        n_bytes, begin = n_bytes_64, begin_64
    return bool(mark == b"PK\x05\x06" and n_comment == 0 and begin + n_bytes == at)


def _kind(head: bytes) -> str:
    if head[257:262] == b"ustar" or head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
        return "it was written by a PyTorch before 1.6, and cannot be read without running what is in it"
    if head.startswith(FIRST):
        return "it is no archive, or more than one"
    return "a bare pickle, or no weights at all"


def _require_members(archive: zipfile.ZipFile, size: int, where: str) -> None:
    members = archive.infolist()
    names = [member.orig_filename for member in members]
    root = re.escape(names[0].partition("/")[0]) if names else ""
    if len(members) > MOST_MEMBERS or len(set(names)) < len(names):
        raise DataError("has too many members, or one twice", where=where)
    if strange := [name for name in names if not re.fullmatch(root + MEMBER, name)]:
        raise DataError(
            f"has a member {strange[0][:80]!r}, which torch.save of tensors does not write", where=where, do=SAFER
        )
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & ENCRYPTED for member in members):
        raise DataError("is compressed or encrypted", where=where, why="torch.save does neither", do=SAFER)
    if sum(member.file_size for member in members) > size:
        raise DataError("says that it holds more bytes than it has", where=where)
    if any(member.file_size > MOST_PICKLE_BYTES for member in members if member.filename.endswith("/data.pkl")):
        raise DataError("has too large a pickle", where=where, why=f"at most {MOST_PICKLE_BYTES} bytes make sense", do=SAFER)


def _require_names(pickled: bytes, where: str) -> None:
    """Read the operations of a pickle, as a disassembler does: nothing is built or called."""
    operations, names = set(OPERATIONS.split()), {*BUILDERS, *(f"torch {kind}Storage" for kind in STORAGE_BYTES)}
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL" and argument not in names:
            name = str(argument)[:80].replace(" ", ".")
            raise DataError(f"its pickle asks for {name}, which is no plain tensor", where=where, do=SAFER)
        if operation.name not in operations:
            what = f"its pickle uses the operation {operation.name}, which no table of tensors needs"
            raise DataError(what, where=where, do=SAFER)


def _require_storages(pickled: bytes, sizes: Mapping[str, int], where: str) -> None:
    """Hold every storage that a pickle names against the member that has its bytes: PyTorch maps them without asking."""
    sizes_of = {f"torch {kind}Storage": n_bytes for kind, n_bytes in STORAGE_BYTES.items()}
    for named in _persistent_ids(pickled):
        match named:
            case ("storage", str(kind), str(key), str(), int(numbers)) if (
                sizes.get(f"data/{key}") == numbers * sizes_of[kind]
            ):
                pass
            case _:
                raise DataError(
                    "its pickle names a storage that is not there in that size", where=where, why=str(named)[:200]
                )


def _persistent_ids(pickled: bytes) -> Iterator[Any]:
    """Yield what each BINPERSID is given, as far as it is a tuple of plain values; anything else comes out as no tuple.

    There is no operation among `OPERATIONS` that takes a value off the stack and leaves what is below it, so that the last
    value seen is the one that a memo keeps.
    """
    values: list[Any] = []
    memo: dict[Any, Any] = {}
    for operation, argument, _ in pickletools.genops(pickled):
        match operation.name:
            case "MARK":
                values = []
            case "TUPLE":
                values = [tuple(values)]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = values[-1] if values else None
            case "BINGET" | "LONG_BINGET":
                values.append(memo.get(argument))
            case "BINPERSID":
                yield values[-1] if values else None
                values = [None]
            case _:
                values.append(argument)
