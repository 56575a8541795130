"""What was measured on this machine before: one small file in the cache folder for each machine, device and PyTorch."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstwords import reading, store
from firstwords.config import ModelConfig, Precision
from firstwords.errors import FirstwordsError

FOLDER = "machines"
UNCOMPILED = ("vocab_size", "tied_head", "init_std", "drop_rate")  # what the compiled part of a model does not depend on
WORTH = 2.0  # compiling must save so many times what it takes


@dataclass(frozen=True)
class Compiling:
    """What compiling a model of one shape takes once, and saves for each token that is learnt from."""

    takes_s: float
    saves_s: float  # below 0 where the compiled model is slower

    def pays(self, tokens: float) -> bool:
        """Whether it is worth it in a run of so many tokens."""
        return tokens * self.saves_s > WORTH * self.takes_s


@dataclass(frozen=True)
class Known:
    """What is known of one machine.

    Args:
        rates: Operations a second of matrix products, by precision; empty where they were not measured.
        compiling: By `shape_of`.
    """

    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    compiling: dict[str, Compiling] = dataclasses.field(default_factory=dict)


def shape_of(model: ModelConfig, precision: Precision) -> str:
    """Return the name of all that the compiled part of a model depends on; of dropout, whether there is any."""
    shape: dict[str, Any] = {k: v for k, v in dataclasses.asdict(model).items() if k not in UNCOMPILED}
    return store.sha256(store.canonical_json({**shape, "drops": model.drop_rate > 0, "precision": precision}))[:16]


def read(cache: Path, key: dict[str, Any]) -> Known:
    """Return what is known of the machine that `key` describes; nothing where the file is absent, damaged or another's."""
    path = _path(cache, key)
    try:
        found = reading.read_json(path) if path.is_file() else {}
    except (FirstwordsError, OSError):
        return Known()
    match found:
        case {"key": dict() as of, "rates": dict() as rates, "compiling": dict() as compiling} if of == key:
            pass
        case _:
            return Known()
    pairs = {name: (_number(c, "takes_s"), _number(c, "saves_s")) for name, c in compiling.items()}
    good = {
        name: Compiling(takes, saves) for name, (takes, saves) in pairs.items() if takes is not None and saves is not None
    }
    numbers = {name: _number(rates, name) for name in rates}
    return Known({name: rate for name, rate in numbers.items() if rate is not None and rate > 0}, good)


def _number(table: Any, name: str) -> float | None:
    value = table.get(name) if isinstance(table, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number and value is not None else None


def write(cache: Path, key: dict[str, Any], known: Known) -> None:
    """Write what is known of a machine.

    Raises:
        FirstwordsError: The cache folder cannot be written.
    """
    store.make_folder(cache / FOLDER)
    store.write(_path(cache, key), store.canonical_json({"key": key, **dataclasses.asdict(known)}))


def remember(cache: Path, key: dict[str, Any], known: Known) -> None:
    """Write what is known where that is possible: it can be measured again."""
    with suppress(FirstwordsError):
        write(cache, key, known)


def _path(cache: Path, key: dict[str, Any]) -> Path:
    return cache / FOLDER / f"{store.sha256(store.canonical_json(key))[:16]}.json"
