"""Between the loop and the disk: journals what happens, saves, turns a time budget into steps, brings a run back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from firstwords import store
from firstwords.config import RunConfig
from firstwords.config_file import to_toml
from firstwords.errors import (
    ConfigError,
    DataError,
    DivergedError,
    FirstwordsError,
    NoInputError,
    PermissionDeniedError,
    StorageError,
)
from firstwords.events import Listener, Measured, Notice, Planned, RolledBack, Saved, Started
from firstwords.insight import overfitting
from firstwords.insight.memorisation import Memorisation
from firstwords.model.gpt import load_weights
from firstwords.planning import machine, recipe
from firstwords.planning.budget import PROBE_STEPS, Budget
from firstwords.runs import checkpoint
from firstwords.runs.checkpoint import Checkpoint
from firstwords.runs.folder import RunFolder
from firstwords.runs.journal import Journal
from firstwords.text.corpus import Corpus
from firstwords.training import state as states
from firstwords.training.evaluate import Evaluation, of_mean
from firstwords.training.events import CopyDue, Evaluated, Event, MicroBatchCut, Sampled, SaveDue, StepDone, Stopped
from firstwords.training.state import TrainState

MOST_FAILED_SAVES = 3  # in a row, before a run gives up
MOST_ROLLBACKS = 3  # to one checkpoint
RETRY_S = 1.0  # between two tries of the last save, which no later one makes good
EVALUATION_KEYS = tuple(field.name for field in dataclasses.fields(Evaluation))
# Given an evaluation, and whether now is the time even for a text that takes long to go through.
Measure = Callable[[Evaluated, bool], Memorisation | None]


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. The held-out figures are those of the best checkpoint; None without a held-out text."""

    run: str
    steps: int
    tokens: int
    elapsed_s: float
    tokens_per_s: float
    best_step: int
    nats_per_token: float | None
    perplexity: float | None
    bits_per_byte: float | None
    # Of the last checkpoint its weights' hash; of the last evaluation its step and figures, training without dropout.
    last: dict[str, float | str | None]
    weights_sha256: str  # of the best checkpoint
    precision: str
    seed: int
    stopped: str  # done, best, or the name of the signal
    memory_bytes: int | None  # the most that the process had
    predicted: dict[str, Any] | None  # before the first step: steps, elapsed_s, memory_bytes, bits_per_byte and more


@dataclass(frozen=True)
class BestCopy:
    """The best weights so far, from their evaluation to the next save."""

    step: int
    scalars: dict[str, Any]
    weights: dict[str, Tensor]


class Judged(NamedTuple):
    """What an evaluation came to, in nats per token."""

    step: int
    train: float | None
    held_out: float | None  # None: there is no held-out text


@dataclass
class Recorder:
    """The record of one run while it goes on. The caller holds the run's lock."""

    run: RunFolder
    config: RunConfig
    corpus: Corpus
    state: TrainState
    identity: dict[str, str]  # the hashes that tell this run from others
    fingerprint: dict[str, Any]
    listener: Listener
    budget: Budget | None = None
    newest: Checkpoint | None = None
    copy: BestCopy | None = None  # newer than `newest`
    whole: set[Path] = dataclasses.field(default_factory=set)  # checkpoints that were read back here
    evaluations: list[Judged] = dataclasses.field(default_factory=list)  # all so far
    measure: Measure | None = None  # of what the model says; None: nobody asks
    failed_saves: int = 0  # in a row
    rollbacks: int = 0  # since the newest save
    journal_failed: bool = False
    stopped: str = ""  # done, best, or the name of the signal
    predicted: dict[str, Any] | None = None  # of the run as a whole, before its first step
    checks: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of the device, before its first step

    def begin(self, predicted: dict[str, Any] | None) -> None:
        """Journal that training begins, with what is expected of it; or, where nothing is predicted now, that it goes on."""
        fresh = predicted is not None
        self.predicted = predicted or self.predicted
        line = {"step": self.state.step, "total_steps": self.state.total_steps, "checks": self.checks}
        self.note("start" if fresh else "resume", {**line, "predicted": self.predicted})
        self.listener(Started(self.run.path, self.config, self.corpus, self.state.step, self.predicted))
        if self.stopped:  # before it went on
            self._note_stop(self.stopped)

    def take(self, event: Event) -> None:
        """Record one event of the loop and pass it on.

        Raises:
            FirstwordsError: Saving failed too often in a row.
        """
        match event:
            case StepDone():
                self.note("step", dataclasses.asdict(event))
            case Evaluated():
                self._evaluated(event)
            case Sampled(step, text):
                self.note("sample", {"step": step, "text": text}, self.run.samples)
                self.note("sample", {"step": step})
            case SaveDue():
                self._save()
            case CopyDue():
                self._copy()
            case MicroBatchCut():
                self._cut(event)
            case Stopped():
                self._stop(event)
        self.listener(event)
        if isinstance(event, Evaluated):
            self._look_closer(event)
        if self.budget is not None:
            self._plan(event, self.budget)

    def _evaluated(self, event: Evaluated) -> None:
        figures = dict.fromkeys(EVALUATION_KEYS) if event.evaluation is None else event.evaluation.as_dict()
        learnt = {"step": event.step, "train_nats_per_token": event.train_nats_per_token}
        self.note("evaluation", {**learnt, **figures, "best": event.best, "memory_bytes": machine.peak_bytes()})
        self.evaluations.append(Judged(event.step, event.train_nats_per_token, figures["nats_per_token"]))

    def _stop(self, event: Stopped) -> None:
        """Journal the end, once its state is saved."""
        while self.newest is None or self.newest.step != event.step:
            time.sleep(RETRY_S)
            self._save()
        self.stopped = event.reason
        self._note_stop(event.reason)

    def _note_stop(self, reason: str) -> None:
        told = {"elapsed_s": self.state.elapsed_s, "memory_bytes": machine.peak_bytes(), "predicted": self.predicted}
        self.note("stop", {"step": self.state.step, "reason": reason, **told})

    def _look_closer(self, event: Evaluated) -> None:
        """Measure how much is learnt by heart, and say so where the run has turned."""
        turning_point = overfitting.just_turned(self._held_out())
        at_last = turning_point is not None or event.step == self.state.total_steps
        figures = self._measured(event, at_last=at_last)
        if figures is not None:
            self.note("memorisation", {"step": event.step, **figures.as_dict()})
            self.listener(Measured(event.step, figures))
        if turning_point is not None:
            self._notice(overfitting.sentence(turning_point, None if figures is None else figures.copied_share))

    def _measured(self, event: Evaluated, *, at_last: bool) -> Memorisation | None:
        """Return what was measured; a text that cannot be read meanwhile costs the figures, not the run."""
        try:
            return None if self.measure is None else self.measure(event, at_last)
        except DivergedError:
            raise
        except (OSError, FirstwordsError) as error:
            self._notice(f"it could not be measured how much is learnt by heart: {error}")
            return None

    def best_is_behind(self) -> str | None:
        """Return `best`, the reason to stop, where the run is to stop when its held-out loss has turned, and it has."""
        return "best" if self.config.until == "best" and overfitting.turning_point(self._held_out()) else None

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to go on with: it has all its steps, or stopped where it was to."""
        return bool(self.stopped) or self._is_done

    @property
    def _is_done(self) -> bool:
        return self.state.step == self.state.total_steps

    def _judged_step(self) -> int:
        return self.evaluations[-1].step if self.evaluations else 0

    def _held_out(self) -> list[tuple[int, float]]:
        return [(one.step, one.held_out) for one in self.evaluations if one.held_out is not None]

    def note(self, event: str, values: Mapping[str, Any], journal: Journal | None = None) -> None:
        """Add a line to a journal, by default metrics.jsonl; that it cannot be written is told once and ends nothing."""
        try:
            (journal or self.run.metrics).add(event, values)
        except (StorageError, PermissionDeniedError) as error:
            if not self.journal_failed:
                self._notice(f"{_briefly(error)}; training goes on without its journal")
            self.journal_failed = True

    def _save(self) -> None:
        """Publish a checkpoint; a failure is told, and ends the run only when it goes on failing."""
        try:
            self._publish_best()
            weights, optimizer = self.state.model.tensors(), states.optimizer_tensors(self.state)
            saved = self._publish(self.state.step, self._scalars(), weights, optimizer)
        except FirstwordsError as error:
            with suppress(FirstwordsError):
                self._publish_best()  # which may have made room for the whole checkpoint of its step
            self.failed_saves += 1
            if self.failed_saves >= MOST_FAILED_SAVES:
                raise
            left = MOST_FAILED_SAVES - self.failed_saves
            self._notice(f"{_briefly(error)}; the next save tries again: after {left} more that fail, the run ends")
            if self.state.step == self.state.best_step:
                self._copy()
            return
        if self.newest is None or saved.step > self.newest.step:
            self.rollbacks = 0
        self.newest, self.copy, self.failed_saves = saved, None, 0
        self.note("save", {"step": saved.step})
        try:
            checkpoint.rotate(saved, self.config.keep, self.state.best_step, self.whole)
        except FirstwordsError as error:
            self._notice(f"{error}; an old checkpoint stays until the next save")
        self.listener(Saved(saved.step, saved.folder))

    def _publish_best(self) -> None:
        """Publish the best weights, where they are those of another step or could not be saved with all else."""
        if self.copy is not None and self.copy.step == self.state.best_step:
            self._publish(self.copy.step, self.copy.scalars, self.copy.weights, None)

    def _copy(self) -> None:
        copied = {name: weight.to("cpu", copy=True) for name, weight in self.state.model.tensors().items()}
        scalars = {**states.scalars(self.state), "fingerprint": self.fingerprint}
        self.copy = BestCopy(self.state.step, scalars, copied)

    def _scalars(self) -> dict[str, Any]:
        """Return what `state.json` says; the journals are made durable as far as it says."""
        journal_bytes = {journal.path.name: journal.size_bytes() for journal in (self.run.metrics, self.run.samples)}
        also = {"journal_bytes": journal_bytes, "fingerprint": self.fingerprint, "for_s": self.config.for_s}
        also |= {"judged_step": self._judged_step(), "named_eval_every": self.config.eval_every}
        return {**states.scalars(self.state), **also}

    def _publish(
        self, step: int, scalars: dict[str, Any], weights: dict[str, Tensor], optimizer: dict[str, Tensor] | None
    ) -> Checkpoint:
        model = {"model": dataclasses.asdict(self.config.model), "precision": self.config.precision}
        return checkpoint.save(
            self.run.checkpoints,
            step,
            weights,
            optimizer,
            {checkpoint.STATE: scalars, checkpoint.CONFIG: model},
            self.corpus.tokenizer.json,
            self.identity,
        )

    def _cut(self, event: MicroBatchCut) -> None:
        """Take over a smaller micro-batch, for a resumed run too; where that cannot be written, it finds it again."""
        self.config = dataclasses.replace(self.config, micro_batch_size=event.micro_batch_size)
        self.fingerprint = {**self.fingerprint, "micro_batch_size": event.micro_batch_size}
        self.note("memory", dataclasses.asdict(event))
        self._notice(f"the device's memory ran out; going on with micro-batches of {event.micro_batch_size}")
        try:
            store.write(self.run.config, to_toml(self.config).encode())
        except FirstwordsError as error:
            self._notice(f"{error}; the smaller micro-batch is not recorded")

    def _plan(self, event: Event, budget: Budget) -> None:
        """Let the time budget hear of the event, and take over its plan when one is due."""
        state = self.state
        if isinstance(event, Evaluated):
            budget.count_evaluation(is_best=event.best)
        due = isinstance(event, StepDone) and budget.step(time.perf_counter(), event.took_s)
        if not due or state.step == state.total_steps:
            return
        state.total_steps, state.eval_every = budget.plan(state.step, state.eval_every)
        told = Planned(state.step, state.total_steps, state.eval_every)
        self.note("plan", dataclasses.asdict(told))
        self.listener(told)

    @contextmanager
    def naming_the_last_good_checkpoint(self) -> Iterator[None]:
        """Journal a divergence and add to its message where the last good weights are."""
        try:
            yield
        except DivergedError as error:
            self.note("stop", {"step": self.state.step, "reason": str(error)})
            with suppress(FirstwordsError):  # where they cannot be saved, the divergence is still what to tell of
                self._publish_best()
            good = self._good()
            kept = "there is no checkpoint" if good is None else f"the last good checkpoint is {good}"
            do = error.do + ("" if self.config.on_nan == "rollback" else ", or --resume with --on-nan rollback")
            raise DivergedError(error.what, where=error.where, why=f"{error.why}; {kept}", do=do) from error

    def _good(self) -> Path | None:
        """Return the best checkpoint, or the newest where no held-out figure tells; the newest may be bad already."""
        best_step = self.state.best_step
        best = None if best_step is None else checkpoint.folder_of(self.run.checkpoints, best_step)
        if best is not None and store.exists(best):
            return best
        return None if self.newest is None else self.newest.folder

    def result(self) -> TrainResult:
        """Return what came of the run; at least one checkpoint must be saved."""
        assert self.newest is not None
        state, context_length, best = self.state, self.config.model.context_length, None
        last = self.evaluations[-1] if self.evaluations else None
        best_step, nats, weights_sha256 = self._best()
        if nats is not None:
            best = of_mean(nats, self.corpus.val, context_length, recipe.held_out_tokens(best_step, self.config))
        return TrainResult(
            run=str(self.run.path),
            steps=state.step,
            tokens=state.tokens,
            elapsed_s=state.elapsed_s,
            tokens_per_s=round(state.tokens / max(state.elapsed_s, 1e-9), 1),
            best_step=best_step,
            nats_per_token=nats,
            perplexity=None if best is None else best.perplexity,
            bits_per_byte=None if best is None else best.bits_per_byte,
            last={
                "step": last and last.step,
                "train_nats_per_token": last and last.train,
                "nats_per_token": last and last.held_out,
                "weights_sha256": self.newest.weights_sha256,
            },
            weights_sha256=weights_sha256,
            precision=self.config.precision,
            seed=self.config.seed,
            stopped=self.stopped,
            memory_bytes=machine.peak_bytes(),
            predicted=self.predicted,
        )

    def _best(self) -> tuple[int, float | None, str]:
        """Return step, held-out nats per token and weights' hash of what speaks for the run: as `checkpoint.best` does."""
        assert self.newest is not None
        newest, best_step = self.newest, self.state.best_step
        step = checkpoint.speaking_step(newest.step, best_step, self._judged_step())
        if step == best_step:
            try:
                return step, self.state.best_nats, checkpoint.weights_sha256(self.run.checkpoints, step)
            except FirstwordsError as error:  # its save was refused
                self._notice(f"{error}; using step {newest.step} instead of the best")
        judged = {one.step: one.held_out for one in self.evaluations}  # a run that was stopped is saved between two of them
        return newest.step, judged.get(newest.step), newest.weights_sha256

    def restore(self, *, more_time: bool = False) -> None:
        """Bring the run back to its newest valid checkpoint, and its journals with it.

        Args:
            more_time: A new time budget was given: it is planned anew.

        Raises:
            NoInputError: It was saved, and no checkpoint to go on from is there any more; nothing is touched.
            DataError: There are checkpoints, but none is whole and of this run.
            ConfigError: The wanted number of steps is behind it already.
        """
        if not checkpoint.has_begun(self.run.checkpoints) and self.run.was_saved:
            what, why = "no checkpoint to go on from is there", "the run was saved, so they were removed or not copied"
            do = "put them back, or begin a new run with another --out"
            raise NoInputError(what, where=str(self.run.checkpoints), why=why, do=do)
        found = checkpoint.newest(self.run.checkpoints, self._notice, self.identity, repeats=self._repeats_from)
        if found is None:
            for journal in (self.run.metrics, self.run.samples):
                store.cut(journal.path, 0)
            self._notice("the run has no checkpoint yet: beginning at step 0 with what it recorded")
            return
        saved, predicted = self._load(found)
        has_more_time = self._extend(saved, more_time=more_time)
        if not has_more_time:
            self.predicted = self._still_true(predicted)
        self.stopped = self.best_is_behind() or ""
        if self._is_done:
            self._notice("the run is done; to go on with it: --for, --steps or --epochs")
            return
        if self.stopped:
            self._notice(f"the best was at step {self.state.best_step}; to go on nevertheless: --until end")
            return
        changed = machine.differences(saved["fingerprint"], self.fingerprint)
        self._notice(f"not bit-exact because: {changed}" if changed else self._sameness(saved))
        before, ways = saved["fingerprint"], ("threads", "precision")
        elsewhere = before.get("processor", self.fingerprint["processor"]) != self.fingerprint["processor"]
        if elsewhere and self.config.on_cpu and all(before.get(way) == self.fingerprint[way] for way in ways):
            what = f"this is another processor, and the run goes on as it began: --threads {self.config.threads}"
            self._notice(f"{what} --precision {self.config.precision}; given anew, they may suit it better")

    def _repeats_from(self, found: Checkpoint) -> bool:
        """Whether the run comes from a checkpoint to the very weights again that it came to from there before.

        Raises:
            ConfigError: It is to end before that checkpoint.
        """
        if self.config.steps is not None and self.config.steps < found.step:
            what = f"the run has {found.step} steps already"
            do = f"give more than {found.step}, or as many epochs as have more, or begin a new run"
            raise ConfigError(what, where="--steps", do=do)
        saved, length = found.json(checkpoint.STATE), self.config.steps
        if not self.config.on_cpu or self.config.on_nan == "rollback" or self.config.for_s is not None:
            return False
        same_length = length in (None, saved.get("total_steps"))
        same_rhythm = saved.get("eval_every") == self.state.eval_every  # else its step may pass unjudged
        if not (same_length and same_rhythm and saved.get("fingerprint") == self.fingerprint):
            return False
        ways, folders = ("total_steps", "eval_every", "skipped", "fingerprint"), checkpoint.existing(self.run.checkpoints)
        newer = [folder for folder in folders if checkpoint.step_of(folder) > found.step]
        with suppress(DataError):  # one is damaged: then all are kept in any case
            made = [checkpoint.unverified(folder).json(checkpoint.STATE) for folder in newer]
            return all(one.get(way) == saved.get(way) for one in made for way in ways)
        return False

    def _sameness(self, saved: store.Json) -> str:
        """Return how exactly a run goes on that computes as before: its learning rates are those of its new length."""
        if not self.config.on_cpu:
            return "resumed; on a GPU the last bits of a step may differ each time"
        if self.config.for_s is not None or self.state.total_steps != saved["total_steps"]:
            return "resumed as it was saved, to the last bit; what is left is planned anew"
        return "bit-exact resume"

    def _load(self, found: Checkpoint) -> tuple[store.Json, Any]:
        """Make a checkpoint the state of the run and cut the journals back to it.

        Returns its `state.json`, and what was last predicted of the run.
        """
        saved, predicted, evaluations = found.json(checkpoint.STATE), None, list[Judged]()
        match saved:
            case {
                "fingerprint": dict(),
                "journal_bytes": {"metrics.jsonl": int(metrics), "samples.jsonl": int(samples)},
                "for_s": None | int() | float(),
            }:
                pass
            case _:
                raise DataError("is no state of a run", where=str(found.folder / checkpoint.STATE))
        for journal, size_bytes in ((self.run.metrics, metrics), (self.run.samples, samples)):
            if not journal.cut(size_bytes):
                self._notice(f"{journal.path}: its last lines before step {found.step} are lost; the run itself is whole")
        load_weights(self.state.model, found.tensors(checkpoint.MODEL).items(), str(found.folder))
        states.load_optimizer_tensors(self.state, found.tensors(checkpoint.OPTIMIZER))
        states.load_scalars(self.state, saved)
        for line in self.run.metrics.lines():
            if line["event"] == "evaluation" and isinstance(line.get("step"), int):
                evaluations.append(Judged(line["step"], line.get("train_nats_per_token"), line.get("nats_per_token")))
            if line["event"] in ("start", "resume"):
                predicted = line.get("predicted", predicted)
        self.evaluations, self.newest, self.copy = evaluations, found, None
        return saved, predicted

    def roll_back(self, error: DivergedError) -> None:
        """Go back to the newest checkpoint and leave out the batches from there to the one that was next.

        What follows is a function of the checkpoint and the text, so a run that is killed and resumed before its next save
        diverges and goes back in the same way. As people do by hand: Chowdhery et al. 2022 (arXiv:2204.02311, 5.1).

        Raises:
            DivergedError: `error` itself, where the run is to stop, has no checkpoint, or diverges whatever is left out.
        """
        if self.config.on_nan == "stop" or self.newest is None or self.rollbacks == MOST_ROLLBACKS:
            raise error
        state, from_step, elapsed_s = self.state, self.state.step, self.state.elapsed_s
        last, plan = states.batch_index(from_step, state.skipped), (state.total_steps, state.eval_every)
        with suppress(FirstwordsError):  # of batches that are left out from now on, they never come again
            self._publish_best()
        found = checkpoint.newest(self.run.checkpoints, self._notice, self.identity)
        assert found is not None  # it would have raised
        self._load(found)
        first = states.batch_index(state.step, state.skipped)
        state.skipped = [*state.skipped, [first, last]]
        state.elapsed_s, self.rollbacks = elapsed_s, self.rollbacks + 1
        told = RolledBack(state.step, from_step, first, last, f"{error.where}: {error.what}")
        self.note("rollback", dataclasses.asdict(told))
        if plan != (state.total_steps, state.eval_every):  # made since the checkpoint; the time goes on
            state.total_steps, state.eval_every = plan
            self.note("plan", {"step": state.step, "total_steps": plan[0], "eval_every": plan[1]})
        self.listener(told)

    def _extend(self, saved: store.Json, *, more_time: bool) -> bool:
        """Take over a new length, given now or since `saved`: the learning rate goes on as if it had been planned so.

        Returns whether there is more time than there was.
        """
        state, for_s = self.state, self.config.for_s
        longer = more_time or for_s != saved["for_s"]
        if more_time and for_s is not None:  # recorded as what all of the run has, wherever it stops again
            for_s = for_s + state.elapsed_s
            self.config = dataclasses.replace(self.config, for_s=for_s)
        if for_s is not None and longer:  # as fast as before, until its first steps say more
            pace = state.step / state.elapsed_s if state.elapsed_s else 0.0
            state.total_steps = max(state.step + 2 * PROBE_STEPS, round(pace * for_s)) if pace else None
            state.eval_every = self.config.eval_every
        if self.config.eval_every is not None:
            state.eval_every = self.config.eval_every
        elif saved.get("named_eval_every") is not None:  # and is to be planned now
            state.eval_every = None
        if self.config.steps is not None:
            state.total_steps = self.config.steps
            state.eval_every = recipe.eval_every(self.config, self.corpus.val.n_tokens)
        return longer

    def _still_true(self, predicted: Any) -> dict[str, Any] | None:
        """Return what was predicted, unless another number of steps is wanted by now."""
        if not isinstance(predicted, dict) or self.config.steps not in (None, predicted.get("steps")):
            return None
        return predicted

    def _notice(self, line: str) -> None:
        self.listener(Notice(line))


def _briefly(error: FirstwordsError) -> str:
    """Return what is wrong and why, but not what to do where nobody need do anything now."""
    return str(FirstwordsError(error.what, where=error.where, why=error.why))
