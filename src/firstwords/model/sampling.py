"""How the next token is drawn. Needs no torch, so that impossible wishes are refused at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from firstwords.errors import ConfigError

COLDEST = 1e-6  # below, all but the likeliest are out of reach: float32 does not tell logits of 10 nearer than that


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's probabilities. Temperature 0 takes the likeliest."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 1e4:
            raise ConfigError(f"cannot be {self.temperature}", where="--temperature", do="allowed: 0 (greedy) to 10000")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"cannot be {self.top_k}", where="--top-k", do="allowed: from 1 to the vocabulary's size")
        if self.min_p is not None and not 0 < self.min_p <= 1:
            raise ConfigError(f"cannot be {self.min_p}", where="--min-p", do="allowed: above 0, to 1")
        if self.repetition_penalty is not None and not 1 <= self.repetition_penalty <= 100:
            what, do = f"cannot be {self.repetition_penalty}", "allowed: 1 (none) to 100; 1.1 is usual"
            raise ConfigError(what, where="--repetition-penalty", do=do)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"cannot be {self.top_p}", where="--top-p", do="allowed: above 0, to 1")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < COLDEST


def stop_texts(stop: str | Sequence[str]) -> Sequence[str]:
    """Return the texts before which one ends, given one or several.

    Raises:
        ConfigError: One is empty: no text is before that.
    """
    stop = [stop] if isinstance(stop, str) else stop
    if not all(stop):
        raise ConfigError("is empty", where="--stop", do="give a text")
    return stop
