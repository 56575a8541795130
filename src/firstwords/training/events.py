"""What the loop yields, as values. They need no torch, so that whoever shows them needs none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


Event = StepDone | Evaluated | Sampled | SaveDue | CopyDue | MicroBatchCut | Stopped
