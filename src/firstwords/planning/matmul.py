"""How fast matrix products are here, and in which precision they are therefore formed."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import torch

from firstwords.config import Precision
from firstwords.planning import known, machine

MUCH_FASTER = 1.5  # bfloat16 must win by this much to be worth its rounding
PROBE_SIZE, PROBE_TIMES, RATE_TIMES = 512, 5, 15
GPU_PROBE_SIZE = 4096  # a smaller product is done before the next one can be asked for
RATE_S = 0.1  # is long enough for a precision: what has no instructions takes 0.2 s for one product, or longer


def precision(name: Precision, device: torch.device, cache: Path | None = None) -> Precision:
    """Return `float32` or `bfloat16`; for `auto`, bfloat16 if its matrix products are much faster on this device.

    Args:
        name: What is wanted.
        device: The device.
        cache: Where measured rates are kept; None: they are measured, and not kept.
    """
    if name != "auto":
        return name
    return precision_of(rates(device) if cache is None else known_rates(device, cache))


def precision_of(rates: dict[str, float]) -> Precision:
    """Return bfloat16 where its products are much faster, by rates such as `rates` returns."""
    return "bfloat16" if rates["bfloat16"] > MUCH_FASTER * rates["float32"] else "float32"


def computable(dtype: torch.dtype, cache: Path) -> torch.dtype:
    """Return the dtype, or float32 where this CPU has no instructions for it, and takes up to a hundred times as long.

    Args:
        dtype: Of a model's matrix products.
        cache: Where measured rates are kept.
    """
    if dtype == torch.float32:
        return dtype
    rates = known_rates(torch.device("cpu"), cache)
    return torch.float32 if MUCH_FASTER * rates["bfloat16"] < rates["float32"] else dtype


def known_rates(device: torch.device, cache: Path) -> dict[str, float]:
    """Return `rates` as they were measured when this machine was first asked for them."""
    found = known.read(cache, machine.key(device))
    if not found.rates.keys() >= machine.DTYPES.keys():
        found = dataclasses.replace(found, rates=rates(device))
        known.remember(cache, machine.key(device), found)
    return found.rates


def known_of(device: torch.device, cache: Path) -> known.Known:
    """Return what was measured of a device before; of a GPU its `rates` too, measured now if need be."""
    found = known.read(cache, machine.key(device))
    return found if device.type == "cpu" else dataclasses.replace(found, rates=known_rates(device, cache))


def rates(device: torch.device) -> dict[str, float]:
    """Return the operations a second of square matrix products in each precision, at their best of some turns.

    The first turn includes what is done once, so that even a slow precision has two.
    """
    times_s: dict[str, list[float]] = {name: [] for name in machine.DTYPES}
    for turn in range(RATE_TIMES):  # in turns: what else runs here slows all of them
        for name, dtype in machine.DTYPES.items():
            if turn < 2 or sum(times_s[name]) < RATE_S:
                times_s[name].append(_product_s(_probe(device, dtype)))
    return {name: 2 * _probe_size(device) ** 3 / min(times) for name, times in times_s.items()}


def flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of square matrix products, measured in some milliseconds."""
    a = _probe(device, dtype)
    return 2 * _probe_size(device) ** 3 / statistics.median(_product_s(a) for _ in range(PROBE_TIMES))


def _probe_size(device: torch.device) -> int:
    return PROBE_SIZE if device.type == "cpu" else GPU_PROBE_SIZE


def _probe(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(_probe_size(device), _probe_size(device), dtype=dtype, device=device)


def _product_s(a: torch.Tensor) -> float:
    started_s = time.perf_counter()
    float((a @ a)[0, 0])  # reading a value waits for the device
    return time.perf_counter() - started_s
