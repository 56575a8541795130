"""This machine: its devices and their speed, how this process computes on it, and what the bits of a run depend on."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firstwords.config import Precision
from firstwords.errors import ConfigError, DataError
from firstwords.planning import known, system

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MUCH_FASTER = 1.5  # bfloat16 must win by this much to be worth its rounding
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
# What glibc itself comes to in a process that frees large blocks; set once, it adapts no more.
GLIBC_VALUES = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
PROBE_SIZE, PROBE_TIMES, RATE_TIMES = 512, 5, 15
GPU_PROBE_SIZE = 4096  # a smaller product is done before the next one can be asked for
RATE_S = 0.1  # is long enough for a precision: what has no instructions takes 0.2 s for one product, or longer


def device(name: str) -> torch.device:
    """Return the device of that name; `auto` is the first GPU of CUDA where it can be used, or else the CPU.

    Raises:
        ConfigError: No such device here, or one that cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not unusable_gpu() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"no device {name!r}", where="--device", do="known: auto, cpu, cuda, cuda:1, mps") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(found.type, False) or (found.index or 0) >= max(1, torch.cuda.device_count()):
        raise ConfigError(f"there is no {name} here", where="--device", do="use --device cpu")
    if found.type == "cuda" and (why := gpu_fault(str(found))):
        raise ConfigError(f"{name} cannot be used", where="--device", why=why, do="use --device cpu")
    return found


def unusable_gpu() -> str:
    """Return why the first GPU that PyTorch sees cannot compute, empty where it can or there is none."""
    return gpu_fault("cuda") if torch.cuda.is_available() else ""


@functools.cache
def gpu_fault(name: str) -> str:
    """Return why a GPU cannot compute, empty where it can.

    PyTorch's build may lack its kind, or another process may hold it alone.
    """
    try:
        float(torch.ones(1, device=name) + 1)
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return ""


def dtype_of(precision: Any, where: str) -> torch.dtype:
    """Return the dtype of the matrix products that a file names.

    Raises:
        DataError: An unknown one.
    """
    if precision not in list(DTYPES):
        raise DataError(f"has no known precision but {str(precision)[:80]!r}", where=where)
    return DTYPES[precision]


def usable_threads() -> int:
    """Return with how many CPU threads to compute: PyTorch's number, but no more than a container has the time of.

    PyTorch does not know of such a limit; where `OMP_NUM_THREADS` says a number, it is that one.
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


def precision(name: Precision, where: torch.device, cache: Path | None = None) -> Precision:
    """Return `float32` or `bfloat16`; for `auto`, bfloat16 if its matrix products are much faster on this device.

    Args:
        name: What is wanted.
        where: The device.
        cache: Where measured rates are kept; None: they are measured, and not kept.
    """
    if name != "auto":
        return name
    return precision_of(rates(where) if cache is None else known_rates(where, cache))


def precision_of(rates: dict[str, float]) -> Precision:
    """Return bfloat16 where its products are much faster, by rates such as `rates` returns."""
    return "bfloat16" if rates["bfloat16"] > MUCH_FASTER * rates["float32"] else "float32"


def computable(dtype: torch.dtype, cache: Path) -> torch.dtype:
    """Return the dtype, or float32 where this processor has no instructions for it, and takes up to a hundred times as long.

    Args:
        dtype: Of a model's matrix products.
        cache: Where measured rates are kept.
    """
    if dtype == torch.float32:
        return dtype
    rates = known_rates(torch.device("cpu"), cache)
    return torch.float32 if MUCH_FASTER * rates["bfloat16"] < rates["float32"] else dtype


def known_rates(where: torch.device, cache: Path) -> dict[str, float]:
    """Return `rates` as they were measured when this machine was first asked for them."""
    found = known.read(cache, key(where))
    if not found.rates.keys() >= DTYPES.keys():
        found = dataclasses.replace(found, rates=rates(where))
        known.remember(cache, key(where), found)
    return found.rates


def known_of(where: torch.device, cache: Path) -> known.Known:
    """Return what was measured of a device before; of a GPU its `rates` too, measured now if need be."""
    found = known.read(cache, key(where))
    return found if where.type == "cpu" else dataclasses.replace(found, rates=known_rates(where, cache))


def rates(where: torch.device) -> dict[str, float]:
    """Return the operations a second of square matrix products in each precision, at their best of some turns.

    The first turn includes what is done once, so that even a slow precision has two.
    """
    times_s: dict[str, list[float]] = {name: [] for name in DTYPES}
    for turn in range(RATE_TIMES):  # in turns: what else runs here slows all of them
        for name, dtype in DTYPES.items():
            if turn < 2 or sum(times_s[name]) < RATE_S:
                times_s[name].append(_product_s(_probe(where, dtype)))
    return {name: 2 * _probe_size(where) ** 3 / min(times) for name, times in times_s.items()}


def flops_per_s(where: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of square matrix products, measured in some milliseconds."""
    a = _probe(where, dtype)
    return 2 * _probe_size(where) ** 3 / statistics.median(_product_s(a) for _ in range(PROBE_TIMES))


def _probe_size(where: torch.device) -> int:
    return PROBE_SIZE if where.type == "cpu" else GPU_PROBE_SIZE


def _probe(where: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(_probe_size(where), _probe_size(where), dtype=dtype, device=where)


def _product_s(a: torch.Tensor) -> float:
    started_s = time.perf_counter()
    float((a @ a)[0, 0])  # reading a value waits for the device
    return time.perf_counter() - started_s


def key(where: torch.device) -> dict[str, Any]:
    """Return all that what was measured depends on."""
    known = {name: value for name, value in fingerprint(where, "", "").items() if name not in ("numpy", "denormals")}
    return {**known, "machine": platform.machine()}


def fingerprint(where: torch.device, precision_name: str, compiled: str) -> dict[str, Any]:
    """Return all that the bits of a run depend on beside its configuration and text."""
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,  # which orders the text
        "processor": system.processor(),  # products are other code on each
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": precision_name,
        "compile": compiled,
        "denormals": "flushed" if flushes_denormals() else "kept",
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what differs between two fingerprints, for a person: `threads 2 -> 8`; empty where nothing does.

    What an older version did not note is not known to differ.
    """
    keys = sorted(before.keys() & now.keys())
    return ", ".join(f"{k} {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k))


def memory_bytes() -> int | None:
    """Return the memory that this process may have, or None where the system does not tell."""
    return system.look().memory_bytes


def compiles_for_gpu(where: torch.device) -> bool:
    """Whether `torch.compile` can make code for this device, a GPU of CUDA: by Triton, which not every PyTorch has."""
    return where.type == "cuda" and find_spec("triton") is not None


def gpu_bytes(where: torch.device) -> int | None:
    """Return the memory that this process can have of a GPU, or None where the device is none or does not tell."""
    if where.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)  # by PyTorch, of what was freed
    return torch.cuda.mem_get_info(where)[0] + kept


def free_bytes() -> int | None:
    """Return the memory that a new process can have now, or None where the system does not tell."""
    found = system.available_bytes()
    return memory_bytes() if found is None else found


def peak_bytes() -> int | None:
    """Return the most memory that this process ever had, or None where the system does not tell."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
