"""What was measured on this machine before: one small file in the cache folder for each machine, device and PyTorch."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstwords import reading, store
from firstwords.config import ModelConfig, Precision, model_config
from firstwords.errors import FirstwordsError
from firstwords.planning.speed import Speed, timed

FOLDER = "machines"
WORTH = 2.0  # compiling must save so many times what it takes
# On a GPU that is busy with a model, until `bench --compile` measures it. One that waits for its CPU, as with the
# laptop presets (0.1 to 8 % of its products' rate), learns no faster from compiled ones.
BUSY_SHARE, GPU_COMPILING_S, GPU_SAVED_SHARE = 0.15, 40.0, 0.3
BELIEVED_S = 86400.0  # how fast a machine learns is measured anew after a day


@dataclass(frozen=True)
class Compiling:
    """What compiling a model of one shape takes once, and saves for each token that is learnt from."""

    takes_s: float
    saves_s: float  # below 0 where the compiled model is slower

    def pays(self, tokens: float) -> bool:
        """Whether it is worth it in a run of so many tokens."""
        return tokens * self.saves_s > WORTH * self.takes_s


def believed(gpu_share: float, tokens_per_s: float) -> Compiling | None:
    """Return what compiling does on a GPU where it was not measured; None where it is believed to save nothing.

    Args:
        gpu_share: Of the rate of its products, that learning reaches without.
        tokens_per_s: That are learnt from without.
    """
    return None if gpu_share < BUSY_SHARE else Compiling(GPU_COMPILING_S, GPU_SAVED_SHARE / tokens_per_s)


@dataclass(frozen=True)
class Learning:
    """How fast a machine learned, and when that was measured: seconds since 1970."""

    measured_s: float
    speed: Speed


@dataclass(frozen=True)
class Known:
    """What is known of one machine.

    Args:
        rates: Operations a second of matrix products, by precision; empty where they were not measured.
        compiling: By `shape_of`.
        learning: By precision.
    """

    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    compiling: dict[str, Compiling] = dataclasses.field(default_factory=dict)
    learning: dict[str, Learning] = dataclasses.field(default_factory=dict)

    def speed(self, precision: Precision) -> Speed | None:
        """Return how fast the machine learned in a precision; None where that was not measured within a day."""
        found = self.learning.get(precision)
        return found.speed if found is not None and 0 <= time.time() - found.measured_s < BELIEVED_S else None


def shape_of(model: ModelConfig, precision: Precision) -> str:
    """Return the name of all that a saving by compiling depends on; of dropout, whether there is any."""
    shape = {**timed(model), "drops": model.drop_rate > 0, "precision": precision}
    del shape["tied_head"]  # the saving hardly depends on it
    return store.sha256(store.canonical_json(shape))[:16]


def read(cache: Path, key: dict[str, Any]) -> Known:
    """Return what is known of the machine that `key` describes; nothing where the file is absent, damaged or another's."""
    path = _path(cache, key)
    try:
        found = reading.read_json(path) if path.is_file() else {}
    except (FirstwordsError, OSError):
        return Known()
    match found:
        case {"key": of, "rates": dict(rates), "compiling": dict(compiling), "learning": dict(learning)} if of == key:
            pass
        case _:
            return Known()
    numbers = {name: _number(rates, name) for name in rates}
    return Known(
        rates={name: rate for name, rate in numbers.items() if rate is not None and rate > 0},
        compiling={name: good for name, entry in compiling.items() if (good := _compiling(entry)) is not None},
        learning={name: ours for name, entry in learning.items() if (ours := _learning(entry, str(path))) is not None},
    )


def _compiling(entry: Any) -> Compiling | None:
    takes_s, saves_s = _number(entry, "takes_s"), _number(entry, "saves_s")
    return None if takes_s is None or saves_s is None else Compiling(takes_s, saves_s)


def _learning(entry: Any, where: str) -> Learning | None:
    measured_s = _number(entry, "measured_s")
    try:
        points = [(model_config(shape, where), float(token_s)) for shape, token_s in entry["speed"]["points"]]
    except (FirstwordsError, ValueError, TypeError, KeyError):
        return None
    if measured_s is None or not points or not all(0 < token_s < math.inf for _, token_s in points):
        return None
    return Learning(measured_s, Speed(tuple(points)))


def _number(table: Any, name: str) -> float | None:
    value = reading.number(table.get(name)) if isinstance(table, dict) else None
    return None if value is None else float(value)


def write(cache: Path, key: dict[str, Any], known: Known) -> None:
    """Write what is known of a machine.

    Raises:
        FirstwordsError: The cache folder cannot be written.
    """
    store.make_folder(cache / FOLDER)
    store.write(_path(cache, key), store.canonical_json({"key": key, **dataclasses.asdict(known)}))


def remember(cache: Path, key: dict[str, Any], known: Known) -> None:
    """Write what is known where that is possible: it can be measured again, and that it cannot be kept ends nothing."""
    with suppress(FirstwordsError):
        write(cache, key, known)


def _path(cache: Path, key: dict[str, Any]) -> Path:
    return cache / FOLDER / f"{store.sha256(store.canonical_json(key))[:16]}.json"
