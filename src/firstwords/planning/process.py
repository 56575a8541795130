"""How this process computes: with how many threads, what it takes for 0, and whether it keeps what it frees."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from firstwords.planning import system

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
# What glibc itself comes to in a process that frees large blocks; set once, it adapts no more.
GLIBC_VALUES = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}


def usable_threads() -> int:
    """Return the number of CPU threads to compute with: PyTorch's, but no more than a container's quota of CPU time.

    PyTorch does not know of such a quota; where `OMP_NUM_THREADS` says a number, it is that one.
    """
    count, quota = torch.get_num_threads(), system.core_quota()
    return count if quota is None or os.environ.get("OMP_NUM_THREADS") else max(1, min(count, int(quota)))


def flush_denormals() -> None:
    """Let numbers below 1e-38 count as 0, in this thread and in those that PyTorch starts from here on.

    Many processors are several times slower with them, and AdamW's means of words that a text has no more of decay to such
    numbers. Threads that run already are left as they are: so it comes before the first operation that several share.
    """
    torch.set_flush_denormal(True)


def flushes_denormals(count: int | None = None) -> bool:
    """Whether they count as 0 in all threads, or in the one that an operation on so few numbers takes."""
    count = torch.get_num_threads() << 16 if count is None else count
    tiny = torch.full((count,), 1 << 22, dtype=torch.int32).view(torch.float32)  # 6e-39 each
    return not bool(tiny.mul(1.0).view(torch.int32).any())


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many CPU threads inside, and with as many as before afterwards; None: with those that are usable.

    Numbers below 1e-38 count as 0 inside; see `flush_denormals`.
    """
    before, flushed = torch.get_num_threads(), flushes_denormals(1)
    flush_denormals()
    torch.set_num_threads(count or usable_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(flushed)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Let the C library keep what a step frees for the next step, inside; afterwards it is given back to the system.

    glibc asks the system anew for each tensor of over 32 MB, and the system clears every page of it: a fifth of the time
    of a step of GPT-2 124M. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is None or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.malloc_trim(0)  # what preparing a text left
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        for parameter, value in GLIBC_VALUES.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
