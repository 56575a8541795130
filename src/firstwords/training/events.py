"""What happens in a run, as values. They need no torch, so that whoever shows them needs none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstwords.config import RunConfig
from firstwords.errors import Notify
from firstwords.text.corpus import Corpus

if TYPE_CHECKING:
    from firstwords.insight.memorisation import Memorisation
    from firstwords.model.language_model import LanguageModel
    from firstwords.training.evaluate import Evaluation


@dataclass(frozen=True)
class StepDone:
    """An update is done."""

    step: int  # updates done, from 1
    tokens: int  # targets learnt from so far
    nats_per_token: float
    lr: float
    grad_norm: float  # before clipping
    tokens_per_s: float  # of this step
    took_s: float  # this step
    elapsed_s: float  # of the run so far, everything included


@dataclass(frozen=True)
class Evaluated:
    """The held-out text was evaluated, a spread of `eval_tokens` of it; `evaluation` is None where there is none."""

    step: int
    train_nats_per_token: float  # of the batches learnt last, without dropout
    evaluation: Evaluation | None
    best: bool


@dataclass(frozen=True)
class Sampled:
    """The model spoke."""

    step: int
    text: str


@dataclass(frozen=True)
class SaveDue:
    """It is time for a checkpoint of the state as it is now."""

    step: int


@dataclass(frozen=True)
class CopyDue:
    """The weights are the best so far, but a save would take too much of the time: copy them, for the next save."""

    step: int


@dataclass(frozen=True)
class Stopped:
    """No more steps: `done`, or the caller's reason."""

    step: int
    reason: str


@dataclass(frozen=True)
class MicroBatchCut:
    """Memory ran out in an update, which is done again, as those to come, in smaller micro-batches."""

    step: int  # updates done
    micro_batch_size: int  # from here on


Event = StepDone | Evaluated | Sampled | SaveDue | CopyDue | MicroBatchCut | Stopped  # what the loop yields


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


def noticed(listener: Listener) -> Notify:
    """Return a function that tells a listener a line for a person."""
    return lambda line: listener(Notice(line))


def ignore(told: Told) -> None:
    """Listen to nothing."""
