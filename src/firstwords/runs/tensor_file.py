"""Named tensors <-> one safetensors file.

It is written by hand, streamed through `store`, because the package's own writer neither syncs nor can be made to fail at a
chosen write. It is read back with the package, but only after each claim of its header was held against the file's size.

Format (huggingface/safetensors, README): the header's length in 8 bytes, little-endian; the header, JSON, name -> dtype,
shape and place in what follows; the tensors, one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from firstwords import reading, store
from firstwords.errors import DataError

SUFFIX = ".safetensors"
LENGTH_BYTES = 8
METADATA = "__metadata__"
MOST_NAME_CHARS = 1000
MOST_DIMENSIONS = 8
# Names of the format to PyTorch's; of whole bytes only.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Described:
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes after the header
    end: int


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[store.Bytes]:
    """Yield a safetensors file: header length (8 bytes), JSON header padded to 8, the tensors in order of their names."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    yield len(text).to_bytes(LENGTH_BYTES, "little") + text
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def load(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, memory-mapped: nothing is read before it is used.

    Raises:
        DataError: It is no proper safetensors file, as `header` has it.
    """
    described = header(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
        raise DataError("is no safetensors file", where=str(path), why=str(error)) from error
    if {name: (one.dtype, one.shape) for name, one in described.items()} != {
        name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()
    }:
        raise DataError("is read in two ways by two readers", where=str(path))
    return tensors


def header(path: Path) -> dict[str, Described]:
    """Return what a file's header says of each tensor, in their order in the file.

    Every claim is checked before anything of its size is allocated: the header lies within the file and is at most 16 MB of
    proper JSON, the tensors fill the rest of the file without overlap, hole or remainder, and each is as long as its shape
    and dtype say.

    Raises:
        DataError: The first claim that does not hold; or a name that is too long, unprintable, or climbs up with `..`.
    """
    data, left = _header_bytes(path)
    if not data.startswith(b"{"):
        raise DataError("is no safetensors file", where=str(path), why="its header is no JSON object")
    claims = reading.parse_json(data, str(path))
    metadata = claims.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DataError(f"{METADATA} is not text by name", where=str(path))
    found = {name: _described(name, claim, str(path)) for name, claim in claims.items()}
    in_order = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = 0
    for name, one in in_order.items():
        if one.begin != at:
            kind = "overlaps the tensor before it" if one.begin < at else "leaves a hole before it"
            raise DataError(f"tensor {name!r} {kind}", where=str(path))
        at = one.end
    if at != left:
        what = "is cut short" if at > left else "goes on after its last tensor"
        raise DataError(what, where=str(path), why=f"its header tells of {at} bytes of tensors, {left} are there")
    return in_order


def is_proper_name(name: str) -> bool:
    """Return whether a tensor may be called so: printable, not too long, nothing that anyone could take for a path out."""
    return name.isprintable() and 0 < len(name) <= MOST_NAME_CHARS and name[0] != "/" and ".." not in name.split("/")


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """Return the header and the number of bytes after it."""
    with reading.regular(path) as (file, size):
        reading.require_no_pointer(file.read(len(reading.LFS_POINTER)), str(path))
        file.seek(0)
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        most = min(size - LENGTH_BYTES, reading.MOST_BYTES)
        if most < 2:
            raise DataError("is no safetensors file", where=str(path), why=f"it has {size} bytes")
        if not 2 <= length <= most:
            why = f"its header would have {length} bytes; from 2 to {most} are possible"
            raise DataError("is no safetensors file", where=str(path), why=why)
        return file.read(length), size - LENGTH_BYTES - length


def _described(name: str, claim: Any, where: str) -> Described:
    if not is_proper_name(name):
        raise DataError(f"a tensor cannot be called {name[:80]!r}", where=where)
    match claim:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [begin, end], **rest} if (
            kind in DTYPES and len(shape) <= MOST_DIMENSIONS and not rest
        ):
            pass
        case _:
            raise DataError(f"tensor {name!r} is not described as a dense tensor", where=where, why=str(claim)[:200])
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or begin > end:
        raise DataError(f"tensor {name!r} has an impossible shape or place", where=where, why=str(claim)[:200])
    if math.prod(shape) * DTYPES[kind].itemsize != end - begin:
        raise DataError(f"tensor {name!r} has another size than its shape", where=where, why=str(claim)[:200])
    return Described(DTYPES[kind], tuple(shape), begin, end)
