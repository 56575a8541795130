"""This machine: its devices, its memory, and what the bits of a run depend on beside its configuration and text."""

from __future__ import annotations

import functools
import platform
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from firstwords.errors import ConfigError, DataError
from firstwords.planning import process, system

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def key(device: torch.device) -> dict[str, Any]:
    """Return all that what was measured depends on."""
    known = {name: value for name, value in fingerprint(device, "", "").items() if name not in ("numpy", "denormals")}
    return {**known, "machine": platform.machine()}


def fingerprint(device: torch.device, precision_name: str, compiled: str) -> dict[str, Any]:
    """Return all that the bits of a run depend on beside its configuration and text."""
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,  # which orders the text
        "processor": system.processor(),  # products are other code on each
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": precision_name,
        "compile": compiled,
        "denormals": "flushed" if process.flushes_denormals() else "kept",
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what differs between two fingerprints, for a person: `threads 2 -> 8`; empty where nothing does.

    What an older version did not note is not known to differ.
    """
    keys = sorted(before.keys() & now.keys())
    return ", ".join(f"{k} {before.get(k)} -> {now.get(k)}" for k in keys if before.get(k) != now.get(k))


def memory_bytes() -> int | None:
    """Return the memory that this process may have, or None where the system does not tell."""
    return system.read().memory_bytes


def compiles_for_gpu(device: torch.device) -> bool:
    """Whether `torch.compile` can make code for this device, a GPU of CUDA: by Triton, which not every PyTorch has."""
    return device.type == "cuda" and find_spec("triton") is not None


def gpu_bytes(device: torch.device) -> int | None:
    """Return the memory that this process can have of a GPU, or None where the device is none or does not tell."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, of what was freed
    return torch.cuda.mem_get_info(device)[0] + kept


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
