"""What a person is told of, as values: what the loop yields, and all that happens around it. They need no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstwords.config import RunConfig
from firstwords.errors import Notify
from firstwords.text.corpus import Corpus
from firstwords.training.events import Event

if TYPE_CHECKING:
    from firstwords.insight.memorisation import Memorisation
    from firstwords.model.language_model import LanguageModel


@dataclass(frozen=True)
class Notice:
    """A line that a person should read."""

    text: str


@dataclass(frozen=True)
class Preparing:
    """What is done before training, such as tokenizing; the share that is done, where it is known."""

    what: str
    share: float | None


@dataclass(frozen=True)
class Started:
    """Training begins or goes on."""

    run: Path
    config: RunConfig
    corpus: Corpus
    step: int
    predicted: dict[str, Any] | None = None  # as JSON has it; None: nothing was


@dataclass(frozen=True)
class Planned:
    """The time budget was turned into steps."""

    step: int
    total_steps: int
    eval_every: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk and was read back."""

    step: int
    folder: Path


@dataclass(frozen=True)
class RolledBack:
    """Training diverged and goes on from a checkpoint, without the batches from there to where it diverged."""

    step: int  # of the checkpoint
    from_step: int
    first_batch: int
    last_batch: int  # included
    reason: str


@dataclass(frozen=True)
class Measured:
    """It was measured how much of what the model says is learnt by heart."""

    step: int
    memorisation: Memorisation


@dataclass(frozen=True)
class Trained:
    """The run is over, and its best model is in memory: whoever wants to hear it need not read it from the disk."""

    lm: LanguageModel


Told = Event | Notice | Preparing | Started | Planned | Saved | RolledBack | Measured | Trained
Listener = Callable[[Told], None]


def notices_to(listener: Listener) -> Notify:
    """Return a function that tells a listener a line for a person."""
    return lambda line: listener(Notice(line))


def ignore_event(told: Told) -> None:
    """Listen to nothing."""
