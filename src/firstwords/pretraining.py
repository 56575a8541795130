"""Training: what is asked becomes a run that is planned, checked, recorded, judged as it goes, and reported on at its end.

Everything that can be refused without torch is refused before torch is imported, which is why the imports that need it
stand inside the functions.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstwords import asking, preparing, resolve, store
from firstwords.config import RunConfig, flatten
from firstwords.config_file import to_toml
from firstwords.errors import CannotCreateError, DivergedError
from firstwords.events import Listener, Notice, Preparing, Trained, ignore_event, notices_to
from firstwords.insight import quick
from firstwords.loading import load, named_texts, read_model, require_finite, tell_of_learnt_text
from firstwords.model import cost
from firstwords.planning import budget, facts
from firstwords.runs import signals
from firstwords.runs.folder import RunFolder
from firstwords.text.corpus import Corpus

if TYPE_CHECKING:
    from torch import Tensor

    from firstwords.asking import Asked
    from firstwords.model.language_model import LanguageModel
    from firstwords.planning.plan import Candidate
    from firstwords.recorder import Recorder, TrainResult
    from firstwords.training.evaluate import TokenFigures
    from firstwords.training.state import TrainState

LEAST_LEFT_S = 1.0  # of a time budget that is used up when its run goes on


def train(
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    out: str | Path | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    listener: Listener = ignore_event,
    started_s: float | None = None,
    **overrides: Any,
) -> TrainResult:
    """Pretrain a GPT on text and return what came of it.

    Args:
        text: Files and folders, or "-"; None: the built-in text. To resume: where its text is by now; None: where it was.
        out: The run folder; by default `runs/<name of the text>`, numbered if taken.
        config: A TOML file of configuration keys.
        resume: Go on with the run in `out`.
        listener: Told what happens.
        started_s: When the process began, on `time.perf_counter()`; a time budget counts from there.
        **overrides: Configuration keys: `steps=500`, `model={"n_layers": 6}`.

    Raises:
        FirstwordsError: What is wrong and what to do; see `firstwords.errors`.
    """
    started_s = time.perf_counter() if started_s is None else started_s
    given = flatten(overrides)
    if text is not None:
        given |= {"text": named_texts(text), "text_sha256": None}
    folder = Path(out) if out is not None else None
    with ExitStack() as locked:
        asked = _lock_run_folder(locked, folder, config, given, resume=resume, listener=listener)
        prepared = preparing.prepare(asked, listener, started_s)
        listener(Preparing("starting PyTorch", None))
        with ThreadPoolExecutor(1) as pool:  # PyTorch's start leaves a core free
            about_text = pool.submit(_difficulty_and_repetition, prepared)

            from firstwords.planning import process
            from firstwords.training import loop
            from firstwords.training.state import without_skipped
            from firstwords.watching import Watcher

        settled, expected = resolve.settle(asked, prepared, *about_text.result(), started_s)
        with process.threads(settled.threads), signals.stop_requests() as stop:
            recorder = _new_recorder(asked, settled, prepared, listener, started_s, expected)
            batches = without_skipped(resolve.batches(settled, prepared), recorder.state)
            watcher = Watcher(recorder, batches)
            recorder.measure = watcher.measure if settled.meter else None

            def should_stop() -> str | None:
                return stop() or recorder.best_is_behind()

            fit = functools.partial(loop.fit, recorder.state, batches, evaluate=watcher.evaluate, sample=watcher.sample)
            with process.memory_kept(), recorder.naming_the_last_good_checkpoint():
                while not recorder.stopped:
                    try:
                        for event in fit(resolve.fit_config(recorder.config), should_stop=should_stop):
                            recorder.take(event)
                    except DivergedError as error:
                        recorder.roll_back(error)
            return _finished(recorder, watcher.last_tokens)


def _lock_run_folder(
    locked: ExitStack,
    out: Path | None,
    config_file: str | Path | None,
    given: dict[str, Any],
    *,
    resume: bool,
    listener: Listener,
) -> Asked:
    """Return what is asked of a run, whose lock is held from now on; of the runs that begin at once, each has a folder."""
    asked = asking.resumed(out, config_file, given) if resume else asking.new(out, config_file, given, _described, listener)
    while True:
        try:
            locked.enter_context(asked.run.writing(notices_to(listener)))
        except CannotCreateError:
            if out is not None or not store.is_locked(asked.run.lock):
                raise
            asked = asking.elsewhere(asked)
        else:
            return asked


def _new_recorder(
    asked: Asked, config: RunConfig, prepared: Corpus, listener: Listener, started_s: float, expected: Candidate
) -> Recorder:
    """Return the record of a run that begins or goes on now; the caller holds the run's lock."""
    import torch

    from firstwords.model import induction
    from firstwords.planning import machine, recipe
    from firstwords.recorder import Recorder

    run, resume = asked.run, not asked.begins
    preparing.tell_of_few(prepared, config.model.context_length, listener)
    store.require_space(run.path, cost.checkpoint_bytes(config.model))
    corpus = {"folder": prepared.folder.name, "text_sha256": prepared.text_sha256}
    store.write(run.corpus, store.canonical_json(corpus))
    if not resume:  # from here on the folder holds a run, which can be resumed
        store.write(run.config, to_toml(config).encode())
        _tell_of_a_late_start(config.for_s, started_s, listener)
        if asked.config.device == "auto" and (why := machine.unusable_gpu()):
            listener(Notice(f"the GPU cannot compute ({why}): training on the CPU"))
        wants_heads = config.model.induction_heads and "model.induction_heads" in asked.given
        if wants_heads and config.from_ is None and not induction.applies(config.model):
            listener(Notice("this model has no room for two heads that copy: it begins without them"))
        if config.from_ is not None and prepared.val.n_tokens:
            of, tokenizer, within_s = prepared.val, prepared.tokenizer, config.for_s
            with suppress(OSError):  # what was learnt is gone meanwhile: nothing depends on it
                tell_of_learnt_text(config.from_, of, tokenizer, listener, name="the held-out text", within_s=within_s)
    config, state, checks = _first_state(asked, config, prepared, listener)
    state.total_steps, state.eval_every = config.steps, recipe.eval_every(config, prepared.val.n_tokens)
    fingerprint = machine.fingerprint(torch.device(config.device), config.precision, config.compile)
    fingerprint["micro_batch_size"] = config.micro_batch_size  # sums of other parts differ in their last bits
    recorder = Recorder(run, config, prepared, state, resolve.identity(config, prepared), fingerprint, listener)
    if resume:
        recorder.restore(more_time=asked.more_time)
        config = recorder.config
    if resume or checks:
        store.write(run.config, to_toml(config).encode())
    now_s = time.perf_counter()
    if config.for_s is not None and not recorder.is_over:
        left_s = max(config.for_s - state.elapsed_s, LEAST_LEFT_S)
        as_first = config.from_ is not None and not resume  # then the first evaluation, which is timed, judges as much
        recorder.budget = _time_budget(config, prepared, started_s, now_s, left_s, as_first=as_first)
    if not recorder.is_over:
        state.elapsed_s += now_s - started_s
    recorder.checks = checks
    if not prepared.val.n_tokens:  # it has no held-out figure
        expected = dataclasses.replace(expected, expected=None)
    recorder.begin(None if recorder.newest else expected.as_dict())  # killed before its first save, a run begins again
    return recorder


def _time_budget(
    config: RunConfig, prepared: Corpus, started_s: float, now_s: float, left_s: float, *, as_first: bool
) -> budget.Budget:
    """Return the budget of a run that began at `started_s`, has `left_s` from there, and trains from `now_s` on.

    Args:
        config: Of the run.
        prepared: Its text.
        started_s: When this process began, on `time.perf_counter()`.
        now_s: When training begins.
        left_s: What is left of the run's time at `started_s`.
        as_first: Whether all evaluations judge as much as the first one.
    """
    from firstwords.planning import recipe
    from firstwords.training.evaluate import cost_in_tokens

    step_tokens = (config.batch_size or 1) * config.model.context_length
    judged = 0 if as_first else min(prepared.val.n_tokens, recipe.held_out_tokens(1, config))
    return budget.Budget(
        started_s + left_s,
        left_s,
        now_s,
        evaluation_steps=cost_in_tokens(judged) / step_tokens,
        end_s=_end_s(config, prepared, left_s),
        scale_steps=quick.scale_tokens(prepared, config.eval_tokens) / step_tokens if config.report else 0.0,
    )


def _first_state(
    asked: Asked, config: RunConfig, prepared: Corpus, listener: Listener
) -> tuple[RunConfig, TrainState, list[dict[str, Any]]]:
    """Return the configuration with a way of computing that was checked, the state at step 0, and what the checks found."""
    import torch

    from firstwords.planning import machine, matmul, trust
    from firstwords.training.state import new_state

    start, directions = _initial_weights(config, asked.run, listener), _directions(config, asked.run, prepared)
    way, state, checks = trust.first_trusted_state(
        lambda way: new_state(
            config.model, config.optim, config.seed, way.device, machine.DTYPES[way.precision], start, directions
        ),
        resolve.batches(config, prepared)(0).rows(config.micro_batch_size or 1),
        trust.Way(config.device, config.precision, config.compile),
        lambda: matmul.precision(
            asked.config.precision if "precision" in asked.given else "auto", torch.device("cpu"), store.cache_folder()
        ),
        insist=config.trust_device,
        notice=notices_to(listener),
    )
    if way.device != config.device and "micro_batch_size" not in asked.given:  # it was for the memory of a GPU
        config = dataclasses.replace(config, micro_batch_size=cost.micro_batch_size(config.model, config.batch_size or 1))
    return dataclasses.replace(config, **vars(way)), state, [check.as_dict() for check in checks]


def _described(source: str) -> tuple[dict[str, Any], bytes]:
    """Return the shape of a model as configuration keys, and its tokenizer's file."""
    lm = load(source)
    require_finite(lm, source)
    return {f"model.{key}": value for key, value in dataclasses.asdict(lm.model.config).items()}, lm.tokenizer.json


def _initial_weights(config: RunConfig, run: RunFolder, listener: Listener) -> dict[str, Tensor] | None:
    """Return the weights that a run begins with instead of random ones; None where it has begun already.

    Learned positions are cut to a shorter context, and stretched between their neighbours to a longer one. New ids begin as
    the mean of all others, where a model is least wrong about what they mean.
    """
    from firstwords.runs import checkpoint

    if config.from_ is None or checkpoint.has_begun(run.checkpoints):
        return None

    import torch
    import torch.nn.functional as F

    lm = read_model(config.from_, notices_to(listener))
    tensors = lm.model.tensors()
    positions, wanted = tensors.get("pos_emb.weight"), config.model.context_length
    if positions is not None and len(positions) < wanted:
        stretched = F.interpolate(positions.T[None], wanted, mode="linear", align_corners=True)
        tensors["pos_emb.weight"] = stretched[0].T.to(torch.float32)
    elif positions is not None:
        tensors["pos_emb.weight"] = positions[:wanted]
    for name in {"tok_emb.weight", "out_head.weight"} & tensors.keys():
        rows = tensors[name]
        n_new = config.model.vocab_size - len(rows)
        tensors[name] = torch.cat((rows, rows.mean(0, keepdim=True).expand(n_new, -1)))
    return tensors


def _directions(config: RunConfig, run: RunFolder, prepared: Corpus) -> Tensor | None:
    """Return what the table of a new model takes from its text; None where that is nothing, or the run has begun already."""
    from firstwords.model import neighbours
    from firstwords.runs import checkpoint

    if not config.model.table_from_text or config.from_ is not None or checkpoint.has_begun(run.checkpoints):
        return None
    return neighbours.directions(prepared.train.ids, config.model, config.seed)


def _difficulty_and_repetition(prepared: Corpus) -> tuple[float, float]:
    """Return how hard a prepared text is, and how much of it repeats itself."""
    sample = facts.sample_of(prepared)
    return sample.difficulty(prepared.tokenizer), sample.repeated


def _tell_of_a_late_start(for_s: float | None, started_s: float, listener: Listener) -> None:
    late_s = time.perf_counter() - started_s
    if for_s is not None and late_s > for_s:
        listener(Notice(f"the start alone took {late_s:.0f} s, longer than --for: it learns from a step or two"))


def _end_s(config: RunConfig, prepared: Corpus, for_s: float) -> float:
    """Return how long what follows the last evaluation of a time budget takes, about."""
    from firstwords.insight.memorisation import memorisation_s

    meter_s = memorisation_s(prepared.train.n_bytes) if config.meter else 0.0
    end_s = budget.end_s(for_s, cost.checkpoint_bytes(config.model))
    return end_s + (meter_s if budget.has_room_for(meter_s, for_s) else 0.0)


def _finished(recorder: Recorder, last_tokens: TokenFigures | None) -> TrainResult:
    """Return what came of a run after writing its report. A report that fails is told, and costs no run.

    Args:
        recorder: Of the run.
        last_tokens: What the evaluation at the last step found of each token, where it did.
    """
    result = recorder.result()
    if recorder.config.report:
        try:
            _report_of(recorder, result.best_step, last_tokens)
        except Exception as error:
            recorder.listener(
                Notice(f"the report could not be written: {error}; firstwords report {result.run} tries again")
            )
    return result


def _report_of(recorder: Recorder, best_step: int, last_tokens: TokenFigures | None) -> None:
    """Write the report of a run that ends, from what is in memory already."""
    from firstwords.insight import record, report
    from firstwords.model.language_model import LanguageModel
    from firstwords.planning import machine

    run, corpus = recorder.run, recorder.corpus
    is_best = best_step == recorder.state.step
    recorder.listener(Preparing("writing the report", None))
    dtype = machine.DTYPES[recorder.config.precision]
    lm = LanguageModel(recorder.state.model, corpus.tokenizer, best_step, dtype) if is_best else read_model(run.path)
    lm.model.to(recorder.config.device)  # where the time that judging it takes was planned
    recorder.listener(Trained(lm))
    scale = _scale_of(recorder, lm, last_tokens if is_best else None)
    found = record.read(run, corpus, scale=scale, predicted=recorder.predicted)
    store.write(run.report, report.report([found], quick.passage_explained(lm, corpus)))


def _scale_of(recorder: Recorder, lm: LanguageModel, tokens: TokenFigures | None) -> dict[str, Any] | None:
    """Return the scale of a run that ends; None where its text is too long for one, or no time is left to judge `lm`."""
    if not quick.scale_tokens(recorder.corpus, recorder.config.eval_tokens):
        return None
    plans = recorder.budget
    late = plans is not None and not plans.has_time_for_scale(time.perf_counter())
    if tokens is None and (late or recorder.stopped in signals.NAMES):
        why = "no time was left" if late else "it was stopped before there was time"
        do = f"firstwords report {recorder.run.path} does"
        recorder.listener(Notice(f"{why} to set its best weights on a scale: {do}"))
        return None
    return quick.scale(lm, recorder.corpus, recorder.run.name, tokens)
