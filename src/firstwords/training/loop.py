"""The one loop. It informs by yielding events and does not act: saving, showing and deciding are its caller's."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from firstwords.config import OptimConfig
from firstwords.errors import DivergedError
from firstwords.model.gpt import GPTModel
from firstwords.model.loss import target_nats
from firstwords.text.batches import Batch
from firstwords.training.evaluate import Evaluation
from firstwords.training.events import CopyDue, Evaluated, Event, MicroBatchCut, Sampled, SaveDue, StepDone, Stopped
from firstwords.training.optim import learning_rate
from firstwords.training.state import TrainState, all_finite, batch_index

SAVE_EVERY_S, SAVE_FACTOR = 60.0, 50.0
UNSURE_PAUSE_S = 600.0  # while one save alone was timed
FIRST_SAVE = 3.0  # later saves hold AdamW's two means too, and take so many times as long as the one at step 0
Forward = Callable[[Tensor], Tensor]  # (B, T) ids -> (B, T, C) features


class StepFigures(NamedTuple):
    """What an update came to."""

    nats_per_token: float
    grad_norm: float  # before clipping


class TooLargeError(Exception):
    """A micro-batch does not fit into the device's memory; the state is as before its step."""


@dataclass(frozen=True)
class FitConfig:
    """What the loop needs to know of a run."""

    optim: OptimConfig
    seed: int
    micro_batch_size: int
    sample_every: int | None  # None: with the evaluations
    save_every_s: float | None  # None: SAVE_EVERY_S, or longer where saves are slow
    dtype: torch.dtype  # of the matrix products
    compiled: bool = False  # what it computes, by torch.compile


def forward_of(model: GPTModel, *, compiled: bool) -> Forward:
    """Return the model's `features`, or them compiled."""
    return torch.compile(model.features) if compiled else model.features


def fit(
    state: TrainState,
    batches: Callable[[int], Batch],
    config: FitConfig,
    *,
    evaluate: Callable[[int], tuple[float, Evaluation | None]],
    sample: Callable[[int], str],
    should_stop: Callable[[], str | None] = lambda: None,
) -> Iterator[Event]:
    """Train until `state.total_steps` and yield what happens. The state is consistent at every yield.

    A plan is part of the state: the caller may set `total_steps` and `eval_every` at any yield, and training follows. The
    model is evaluated and speaks at step 0, every `eval_every` steps and at the last one. A save is due at step 0, every
    `save_every_s`, at the last step, and before stopping; after a best evaluation too, unless saving takes more than a
    fiftieth of the time since: then a copy is due. Where a device's memory runs out, the micro-batch is halved.

    Args:
        state: Changed in place.
        batches: The batch of the update after that many updates; see `state.without_skipped`.
        config: Fixed for the run.
        evaluate: Nats per token on training text, and the held-out figures, of `state.model` now, at a step.
        sample: What `state.model` says now; its argument is the step.
        should_stop: Asked after each step; a reason stops.

    Raises:
        DivergedError: A number is not finite; the weights are those of the step before, or not finite and not saved.
    """
    reason, saved_s, saves_s = None, time.perf_counter(), deque[float](maxlen=2)
    began_s, forward = saved_s - state.elapsed_s, forward_of(state.model, compiled=config.compiled)
    if state.step == 0:  # saved before the evaluation, which a run resumed here takes as if it were first
        saves_s.append(FIRST_SAVE * (yield from _save(state)))
        saved_s = time.perf_counter()
        yield from _evaluate(state, evaluate)
        yield from _sample(state, sample)
    while not reason and (state.total_steps is None or state.step < state.total_steps):
        started_s, batch = time.perf_counter(), batches(state.step)
        lr = learning_rate(state.step, config.optim, state.total_steps)
        figures = None
        with suppress(TooLargeError):  # which holds on to the step's memory until it is gone
            figures = train_step(state, batch, config, lr, forward)
        if figures is None:
            config = dataclasses.replace(config, micro_batch_size=_smaller(config.micro_batch_size, len(batch.tokens)))
            yield MicroBatchCut(state.step, config.micro_batch_size)
            continue
        yield _count(state, batch.n_targets, lr, figures, started_s, began_s)
        last = state.step == state.total_steps
        evaluation_due = last or (state.eval_every is not None and state.step % state.eval_every == 0)
        sample_due = last or (state.step % config.sample_every == 0 if config.sample_every else evaluation_due)
        best = evaluation_due and (yield from _evaluate(state, evaluate))
        if sample_due:
            yield from _sample(state, sample)
        reason, since_s, pause_s = should_stop(), time.perf_counter() - saved_s, _pause_s(saves_s)
        if last or reason or since_s >= _save_interval_s(config, pause_s) or (best and since_s >= pause_s):
            state.elapsed_s = round(time.perf_counter() - began_s, 3)
            saves_s.append((yield from _save(state)))
            saved_s = time.perf_counter()
        elif best:
            _require_finite(state)
            yield CopyDue(state.step)
    yield Stopped(state.step, "done" if state.step == state.total_steps else reason or "done")


def _save(state: TrainState) -> Generator[Event, None, float]:
    """Ask for a save and return the seconds that it took."""
    if state.step:
        _require_finite(state)
    started_s = time.perf_counter()
    yield SaveDue(state.step)
    return time.perf_counter() - started_s


def _require_finite(state: TrainState) -> None:
    """Raise a DivergedError for a state that must not outlive the run, be it saved or copied for the next save."""
    if not all_finite(state):
        raise diverged("the update left a weight or an optimizer's number that is not finite", state.step)


def _pause_s(saves_s: Collection[float]) -> float:
    """Return the seconds after a save in which no other is worth its time: saving costs at most a fiftieth.

    Of the last two, the faster one counts, and one alone for ten minutes at most: a save that the disk held up once puts off
    no other for hours.
    """
    pause_s = SAVE_FACTOR * min(saves_s, default=0.0)
    return pause_s if len(saves_s) > 1 else min(pause_s, UNSURE_PAUSE_S)


def _save_interval_s(config: FitConfig, pause_s: float) -> float:
    """Return the seconds until the next save."""
    return max(SAVE_EVERY_S, pause_s) if config.save_every_s is None else config.save_every_s


def _count(state: TrainState, n_targets: int, lr: float, figures: StepFigures, started_s: float, began_s: float) -> StepDone:
    """Count the update that began at `started_s` and return what to say of it; the run, without pauses, at `began_s`."""
    now_s = time.perf_counter()
    state.step, state.tokens = state.step + 1, state.tokens + n_targets
    state.elapsed_s = round(now_s - began_s, 3)
    return StepDone(
        step=state.step,
        tokens=state.tokens,
        nats_per_token=figures.nats_per_token,
        lr=lr,
        grad_norm=figures.grad_norm,
        tokens_per_s=round(n_targets / (now_s - started_s), 1),
        took_s=round(now_s - started_s, 4),
        elapsed_s=state.elapsed_s,
    )


def _smaller(micro_batch_size: int, batch_size: int) -> int:
    """Return the largest micro-batch of at most half the size that divides the batch."""
    return max(rows for rows in range(1, micro_batch_size // 2 + 1) if batch_size % rows == 0)


def _evaluate(state: TrainState, evaluate: Callable[[int], tuple[float, Evaluation | None]]) -> Generator[Event, None, bool]:
    """Evaluate the model as it is now, and return whether it is the best so far."""
    train_nats_per_token, evaluation = evaluate(state.step)
    if evaluation is not None and not math.isfinite(evaluation.nats_per_token):
        raise diverged(f"the held-out loss is {evaluation.nats_per_token}", state.step)
    best = evaluation is not None and (state.best_nats is None or evaluation.nats_per_token < state.best_nats)
    if best and evaluation is not None:
        state.best_step, state.best_nats = state.step, evaluation.nats_per_token
    yield Evaluated(state.step, train_nats_per_token, evaluation, best)
    return best


def _sample(state: TrainState, sample: Callable[[int], str]) -> Iterator[Event]:
    """Let the model as it is now speak."""
    try:
        text = sample(state.step)
    except DivergedError as error:
        raise diverged(error.what, state.step) from error
    yield Sampled(state.step, text)


def train_step(state: TrainState, batch: Batch, config: FitConfig, lr: float, forward: Forward) -> StepFigures:
    """Do one update over one global batch and return what to say of it.

    The batch is cut into micro-batches; each adds its nats divided by the whole batch's counted targets, so the
    gradient is that of the whole whatever the cut.

    Raises:
        DivergedError: The loss, a gradient, a weight or an optimizer's number is not finite. Nothing is updated.
        TooLargeError: The device's memory ran out while the gradient was formed. Nothing is updated.
    """
    model, device = state.model, state.model.tok_emb.weight.device
    if not model.training:
        model.train()
    for optimizer in state.optimizers:
        optimizer.make_room()
    loss = torch.zeros((), device=device)
    with _fitting(state, config.micro_batch_size), _seeded(config.seed, state.step, device):
        for start in range(0, len(batch.tokens), config.micro_batch_size):
            rows = slice(start, start + config.micro_batch_size)
            tokens, targets = _sent(batch.tokens[rows], device), _sent(batch.targets[rows], device)
            with torch.autocast(device.type, config.dtype, enabled=config.dtype != torch.float32):
                head = model.out_head.weight
                if model.config.tied_head:
                    # The sparse gradient of the lookup must come before the head's dense one to be added in place. Gradients
                    # come in the opposite order of what they belong to, so this view has its place before the lookup.
                    head = head.expand_as(head)
                nats = target_nats(forward(tokens), head, targets, compiled=config.compiled)
            (nats / batch.n_targets).backward()  # type: ignore[no-untyped-call]
            loss += nats.detach() / batch.n_targets
    on_device = torch.stack((loss, _clip(model, config.optim.max_grad_norm), all_finite(state)))
    nats_per_token, grad_norm, is_finite = on_device.tolist()  # the one time that a step waits for its device
    if not (math.isfinite(nats_per_token) and math.isfinite(grad_norm) and is_finite):
        _forget_gradients(state)
        index, size = batch_index(state.step, state.skipped), len(batch.tokens)
        what = f"the loss is {nats_per_token}, the gradient's norm {grad_norm}"
        what += "" if is_finite else ", and a weight or an optimizer's number is not finite"
        place = f" on batch {index}, sequences {index * size} to {(index + 1) * size - 1} of the shuffled text"
        raise diverged(what, state.step + 1, place)
    for optimizer in state.optimizers:
        optimizer.step(lr)
    _forget_gradients(state)
    return StepFigures(nats_per_token, grad_norm)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a GPU fetches it when it comes to it, while the CPU goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def diverged(what: str, step: int, on: str = "") -> DivergedError:
    """Return the error for a number that is not finite at a step, with the batch that it came from."""
    do = "try a lower --optim.peak-lr, a longer --optim.warmup-steps"
    return DivergedError(what, where=f"step {step}", why=f"training diverged{on}", do=do)


def _forget_gradients(state: TrainState) -> None:
    """Free the gradients; the model's own way looks for its parameters first, in a time that a GPU would wait for."""
    for optimizer in state.optimizers:
        for parameter in optimizer.parameters:
            parameter.grad = None


def _clip(model: torch.nn.Module, max_grad_norm: float | None) -> Tensor:
    """Scale the gradients down to a norm of at most `max_grad_norm` and return the norm that they had.

    On a CPU PyTorch's own norm takes longer than the root of a product with itself, and loses more digits of a large
    table. A norm that is not finite scales nothing; see `train_step`.
    """
    limit = math.inf if max_grad_norm is None else max_grad_norm
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if gradients[0].device.type != "cpu":
        return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    norm = torch.stack([flat.dot(flat) for flat in map(torch.flatten, gradients)]).sum().sqrt()
    if norm > limit:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


@contextmanager
def _fitting(state: TrainState, micro_batch_size: int) -> Iterator[None]:
    """Raise a TooLargeError where a device's memory runs out inside and the micro-batch can be smaller."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError, or on some devices one that only says so
        if micro_batch_size == 1 or "out of memory" not in str(error).lower():
            raise
        _forget_gradients(state)
        raise TooLargeError from error


@contextmanager
def _seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Make dropout a function of (seed, step), and leave the process's random generators as they were."""
    index = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=index, device_type=device.type if device.type != "cpu" else "cuda"):
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        yield
