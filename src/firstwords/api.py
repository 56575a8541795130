"""The verbs as functions: plan, train, load, evaluate, scale, explain, report, info, verify, import, export, bench, doctor.

Everything that can be refused without torch is refused before torch is imported, which is why the imports that need it
stand inside the functions.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from firstwords import reading, resolve, store
from firstwords.config import RunConfig, did_you_mean, flatten, from_toml, model_config, run_config, to_toml
from firstwords.errors import CannotCreateError, ConfigError, DataError, DivergedError, FirstwordsError, NoInputError
from firstwords.model import cost
from firstwords.planning import budget, facts
from firstwords.runs import folder as run_folder
from firstwords.runs import signals
from firstwords.runs.folder import RunFolder
from firstwords.text import corpus as corpora
from firstwords.text import sources
from firstwords.text.corpus import Corpus, Part
from firstwords.training.events import Listener, Notice, Preparing, ignore
from firstwords.weights import archive

if TYPE_CHECKING:
    from torch import Tensor

    from firstwords.insight.baselines import Given
    from firstwords.insight.explain import Explanation
    from firstwords.insight.harness import HarnessModel
    from firstwords.insight.memorisation import Memorisation
    from firstwords.insight.record import Record
    from firstwords.insight.scale import Scale
    from firstwords.insight.tasks import TaskScore
    from firstwords.model.language_model import LanguageModel
    from firstwords.planning.doctor import Diagnosis
    from firstwords.planning.measure import Mark
    from firstwords.planning.plan import Plan
    from firstwords.recorder import Recorder, TrainResult
    from firstwords.resolve import Asked
    from firstwords.runs.checkpoint import Checkpoint
    from firstwords.training.evaluate import Evaluation
    from firstwords.training.loop import Forward
    from firstwords.training.state import TrainState
    from firstwords.verify import Verdict

Found = TypeVar("Found")
EXPORTS = ("hf", "gguf", "pth")
KNOWN_PROMPT = "Every effort moves you"
KNOWN_SENTENCE = f"{KNOWN_PROMPT} forward, and what you learn on the way stays with you."
BENCH_PRESETS = ("laptop", "gpt2-124m")
QUICK_IDS = 1_500_000  # of a training text whose n-grams are counted for the report at the end of a run: a second
LONG_TEXT_TOKENS = 20_000  # from here on a person waits for a model to read them, and is told so
REPORT_MARK, REPORT_HEAD_BYTES = b'name="generator" content="firstwords"', 2000  # how a report of ours is known
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 60, 0.8  # of what the model says during training
METER_SAMPLES = 4  # drawn together at an evaluation; the first is the one that is shown
PROMPT_TOKENS = 4  # that it is given to go on from
EVALUATED_SAMPLES, EVALUATED_TOKENS = 8, 200  # of a model that nobody trains


@dataclass(frozen=True)
class Imported:
    """What came of an import: the checkpoint folder, and what the model makes of a sentence and a prompt known to all."""

    run: str
    weights_sha256: str
    parameters: int
    nats_per_token: float
    prompt: str
    greedy: str
    published: str  # what others say of a model of that name; empty where nothing is known


@dataclass(frozen=True)
class Exported:
    """What came of an export."""

    path: str
    read_back_by: str  # transformers where it is installed, else firstwords
    max_logit_difference: float  # between what was read back and ours


@dataclass(frozen=True)
class Reported:
    """What a report came to: its file, and the pictures beside it."""

    report: str
    size_bytes: int
    pictures: tuple[str, ...]


def train(
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    out: str | Path | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    listener: Listener = ignore,
    started_s: float | None = None,
    **overrides: Any,
) -> TrainResult:
    """Pretrain a GPT on text and return what came of it.

    Args:
        text: Files and folders, or "-"; None: the built-in text.
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
        given |= {"text": _named(text), "text_sha256": None}
    folder = Path(out) if out is not None else None
    asked = resolve.resumed(folder, config, given) if resume else resolve.new(folder, config, given, _described, listener)
    prepared = resolve.prepare(asked, listener)
    listener(Preparing("starting PyTorch", None))
    with ThreadPoolExecutor(1) as beside:  # PyTorch's start leaves a core free
        looked_at = beside.submit(_looked_at, prepared)

        from firstwords.planning import machine
        from firstwords.training import loop
        from firstwords.training.state import taken

    settled, expected = resolve.settled(asked, prepared, *looked_at.result())
    with machine.threads(settled.threads), machine.memory_kept(), asked.run.writing(), signals.stop_requests() as stop:
        if not resume:
            run_folder.require_new(asked.run)  # another process may have begun here meanwhile
        store.require_space(asked.run.path, cost.checkpoint_bytes(settled.model))
        recorder = _begin(asked, settled, prepared, listener, started_s)
        recorder.begin(None if resume else expected.as_dict())
        evaluate, sample = _looks(recorder)
        fit = functools.partial(
            loop.fit,
            recorder.state,
            taken(resolve.batches(settled, prepared), recorder.state),
            evaluate=evaluate,
            sample=sample,
            forward=_forward(recorder),
            should_stop=lambda: stop() or recorder.best_is_behind(),
        )
        with recorder.naming_the_last_good_checkpoint():
            while not recorder.stopped:
                try:
                    for event in fit(resolve.fit_config(recorder.config)):
                        recorder.take(event)
                except DivergedError as error:
                    recorder.roll_back(error)
        return _finished(recorder)


def _finished(recorder: Recorder) -> TrainResult:
    """Return what came of a run after writing its report. A report that fails is told, and costs no run."""
    result = recorder.result()
    if recorder.config.report:
        try:
            _report_of(recorder, result.best_step)
        except Exception as error:
            recorder.listener(
                Notice(f"the report could not be written: {error}; firstwords report {result.run} tries again")
            )
    return result


def _report_of(recorder: Recorder, best_step: int) -> None:
    """Write the report of a run that ends, from what is in memory already."""
    from firstwords.insight import record, report
    from firstwords.model.language_model import LanguageModel

    run, corpus = recorder.run, recorder.corpus
    is_best = best_step == recorder.state.step
    lm = LanguageModel(recorder.state.model, corpus.tokenizer) if is_best else load(run.path)
    found = record.read(run, corpus, scale=_quick_scale(lm, corpus, run), predicted=recorder.predicted)
    store.write(run.report, report.report([found], _passage_explained(lm, corpus)))


def _quick_scale(lm: LanguageModel, corpus: Corpus, run: RunFolder) -> dict[str, Any] | None:
    """Return the scale of a run's model on its own held-out text, where that takes a moment; else None."""
    from firstwords.insight import scale as scales
    from firstwords.insight.baselines import Given, baselines
    from firstwords.training.evaluate import evaluate_tokens

    if len(corpus.train.ids) > QUICK_IDS or not 0 < corpus.val.n_tokens <= QUICK_IDS // 10:
        return None
    tokens, held_out = evaluate_tokens(lm.model, corpus.val, lm.dtype), corpora.documents(corpus.val, lm.tokenizer)
    if tokens is None:
        return None
    given = Given(*_bytes_of(corpus))
    blocks = scales.Blocks.of([len(document) for document in held_out])
    rows = list(baselines(held_out, given, blocks.starts, quick=True))
    return scales.scale(run.path.name, tokens, (), rows, blocks).as_dict()


def _bytes_of(corpus: Corpus) -> tuple[int, Callable[[int], list[bytes]]]:
    """Return how many bytes a training text has, and what gives its last ones."""
    n_bytes = int(corpus.train.id_bytes[corpus.train.ids].sum())
    return n_bytes, functools.partial(corpora.documents, corpus.train, corpus.tokenizer)


def _looked_at(prepared: Corpus) -> tuple[float, float]:
    """Return how hard a prepared text is, and how much of it repeats itself."""
    sample = facts.sample_of(prepared)
    return sample.difficulty(prepared.tokenizer), sample.repeated


def _begin(asked: Asked, config: RunConfig, prepared: Corpus, listener: Listener, started_s: float) -> Recorder:
    """Return the record of a run at its first or resumed step; the caller holds the run's lock."""
    import torch

    from firstwords.planning import machine
    from firstwords.recorder import Recorder
    from firstwords.training.evaluate import cost_in_tokens

    run, resume = asked.run, asked.texts is None
    corpus = {"folder": prepared.folder.name, "text_sha256": prepared.text_sha256}
    store.write(run.corpus, store.canonical_json(corpus))
    if not resume:  # from here on the folder holds a run, which can be resumed
        store.write(run.config, to_toml(config).encode())
    config, state, checks = _trusted(asked, config, prepared, listener)
    state.total_steps, state.eval_every = config.steps, config.eval_every
    fingerprint = machine.fingerprint(torch.device(config.device), config.precision, config.compile)
    recorder = Recorder(run, config, prepared, state, resolve.identity(config, prepared), fingerprint, listener)
    if resume:
        recorder.restore(more_time=asked.more_time)
    if resume or checks:
        store.write(run.config, to_toml(config).encode())
    now_s = time.perf_counter()
    if config.for_s is not None:
        used_s = 0.0 if asked.more_time else state.elapsed_s
        evaluation_steps = cost_in_tokens(prepared.val.n_tokens) / ((config.batch_size or 1) * config.model.context_length)
        report_s = budget.report_s(config.for_s, cost.checkpoint_bytes(config.model)) if config.report else 0.0
        deadline_s = started_s + config.for_s - used_s - report_s
        recorder.budget = budget.Budget(deadline_s, config.for_s, now_s, evaluation_steps)
    state.elapsed_s += now_s - started_s
    recorder.checks = checks
    return recorder


def _trusted(
    asked: Asked, config: RunConfig, prepared: Corpus, listener: Listener
) -> tuple[RunConfig, TrainState, list[dict[str, Any]]]:
    """Return the configuration with a way of computing that was checked, the state at step 0, and what the checks found."""
    import torch

    from firstwords.planning import machine, trust
    from firstwords.training.state import initial

    start = _start(config, asked.run, listener)
    way, state, checks = trust.begun(
        lambda way: initial(config.model, config.optim, config.seed, way.device, machine.DTYPES[way.precision], start),
        resolve.batches(config, prepared)(0).rows(config.micro_batch_size or 1),
        trust.Way(config.device, config.precision, config.compile),
        lambda: machine.precision(asked.config.precision, torch.device("cpu"), resolve.cache_folder().parent),
        insist=config.trust_device,
        notice=resolve.noticed(listener),
    )
    return dataclasses.replace(config, **vars(way)), state, [check.as_dict() for check in checks]


def plan(
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    for_s: float | str | None = None,
    target_bits_per_byte: float | None = None,
    encoding: str | None = None,
    listener: Listener = ignore,
) -> Plan:
    """Return what could be trained on a text in a time, how good it would be, and what to take; some ten seconds.

    Args:
        text: Files and folders, or "-"; None: the built-in text.
        for_s: The time budget: seconds, or `3m`; by default three minutes.
        target_bits_per_byte: How good it should be, instead; the answer is how long that takes.
        encoding: Of the text files; by default recognised.
        listener: Told what happens.

    Raises:
        FirstwordsError: No such text, an empty one, an impossible time or target.
    """
    if for_s is not None and target_bits_per_byte is not None:
        raise ConfigError("a time and a target are both named", where="--target-bits-per-byte", do="give one of them")
    if target_bits_per_byte is not None and not 0 < target_bits_per_byte < math.inf:
        what = f"cannot be {target_bits_per_byte}"
        raise ConfigError(what, where="--target-bits-per-byte", do="give a number above 0, such as 2.1")
    config = run_config({} if for_s is None else {"for_s": for_s})
    named = () if text is None else _named(text)
    texts = sources.read(named, encoding=encoding, notice=resolve.noticed(listener))
    found = facts.read(
        texts, val_fraction=config.val_fraction, progress=lambda what, share: listener(Preparing(what, share))
    )
    listener(Preparing("starting PyTorch", None))

    import torch

    from firstwords.planning import machine, measure, speed
    from firstwords.planning import plan as plans

    where = torch.device("cpu")
    with machine.threads(None):
        precision = machine.precision("auto", where)
        listener(Preparing("measuring this machine", None))
        measured = measure.learning_speed(precision)
        fingerprint = machine.fingerprint(where, precision, "off")
    speed.remember(resolve.cache_folder().parent, fingerprint, measured)
    here = plans.Machine(measured, precision, machine.free_bytes())
    listener(Preparing("planning", None))
    made = plans.plan(found, here, config.for_s or resolve.DEFAULT_FOR_S, target_bits_per_byte)
    return dataclasses.replace(made, machine=made.machine | fingerprint)


def _described(source: str) -> tuple[dict[str, Any], bytes]:
    """Return the shape of a model as configuration keys, and its tokenizer's file."""
    lm = load(source)
    return {f"model.{key}": value for key, value in dataclasses.asdict(lm.model.config).items()}, lm.tokenizer.json


def _start(config: RunConfig, run: RunFolder, listener: Listener) -> dict[str, Tensor] | None:
    """Return the weights that a run begins with instead of random ones; None where it has begun already.

    Learned positions are cut to a shorter context, and stretched between their neighbours to a longer one. New ids begin as
    the mean of all others, where a model is least wrong about what they mean.
    """
    from firstwords.runs import checkpoint

    if config.from_ is None or checkpoint.existing(run.checkpoints):
        return None

    import torch
    import torch.nn.functional as F

    lm = load(config.from_, notice=resolve.noticed(listener))
    tensors = {name: parameter.detach() for name, parameter in lm.model.named_parameters()}
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


def _looks(recorder: Recorder) -> tuple[Callable[[int], tuple[float, Evaluation | None]], Callable[[int], str]]:
    """Return what the loop asks at a step: how good the model is, and what it says; the recorder measures the latter."""
    from firstwords.insight.memorisation import Meter
    from firstwords.model.language_model import LanguageModel
    from firstwords.model.sampling import Sampling
    from firstwords.planning import machine
    from firstwords.training.evaluate import evaluate as evaluate_part
    from firstwords.training.evaluate import evaluate_training, held_out_tokens
    from firstwords.training.events import Evaluated
    from firstwords.training.loop import diverged
    from firstwords.training.state import taken

    config, corpus, model = recorder.config, recorder.corpus, recorder.state.model
    dtype, sampling = machine.DTYPES[config.precision], Sampling(temperature=SAMPLE_TEMPERATURE)
    lm, batches = LanguageModel(model, corpus.tokenizer, dtype=dtype), taken(resolve.batches(config, corpus), recorder.state)

    def evaluate(step: int) -> tuple[float, Evaluation | None]:
        held_out = evaluate_part(model, corpus.val, dtype, most_tokens=held_out_tokens(step))
        return evaluate_training(model, batches, step, dtype), held_out

    drawn: dict[int, str] = {}  # what was said when it was measured, at that step
    meter = Meter(corpus.train, corpus.val, corpus.tokenizer, SAMPLE_TOKENS)

    def measure(event: Evaluated, at_last: bool) -> Memorisation | None:
        due = config.sample_every is None or event.step % config.sample_every == 0  # a sample is drawn then in any case
        if not (at_last or (due and meter.text.is_kept)):
            return None
        prompts, held_out = _prompts(corpus, config.sample_prompt, METER_SAMPLES), event.evaluation
        seeds = [config.seed + event.step + row for row in range(METER_SAMPLES)]
        try:
            said = lm.generate_batch(prompts, max_new_tokens=SAMPLE_TOKENS, sampling=sampling, seeds=seeds)
            samples = [one.text for one in said]
        except DivergedError as error:
            raise diverged(error.what, event.step) from error
        drawn.clear()
        drawn[event.step] = samples[0]
        return meter.measure(samples, held_out.nats_per_token - event.train_nats_per_token if held_out else None)

    def sample(step: int) -> str:
        if step in drawn:
            return drawn.pop(step)
        seed = config.seed + step
        return lm.generate(config.sample_prompt, max_new_tokens=SAMPLE_TOKENS, sampling=sampling, seed=seed)

    recorder.measure = measure if config.meter else None
    return evaluate, sample


def _prompts(corpus: Corpus, first: str, count: int) -> list[str]:
    """Return prompts for samples that are measured: `first`, then the beginnings of held-out text from places evenly spread.

    All samples from `<|endoftext|>` would begin as the documents do, which a model learns by heart before all else.
    """
    from firstwords.insight.memorisation import held_out_pieces

    held_out = held_out_pieces(corpus.val, corpus.tokenizer, PROMPT_TOKENS, count - 1)
    return [first, *held_out, *[first] * (count - 1 - len(held_out))]


def _forward(recorder: Recorder) -> Forward:
    import torch

    features = recorder.state.model.features
    return torch.compile(features) if recorder.config.compile == "on" else features


def _named(text: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """Return the paths that were named.

    Raises:
        NoInputError: An empty sequence, such as a pattern that no file matched; it does not mean the built-in text.
    """
    paths = tuple(map(str, [text] if isinstance(text, str | Path) else text))
    if not paths:
        raise NoInputError("no text is named", where="text", do="name files or folders, or leave it out")
    return paths


def load(source: str | Path, *, notice: Callable[[str], None] = lambda _: None) -> LanguageModel:
    """Return the model of a run folder (its best checkpoint), of a checkpoint folder, or from elsewhere, with its tokenizer.

    Raises:
        NoInputError: None of them is there.
        DataError: It is damaged.
    """
    source = _located(source, notice)
    if _is_foreign(source):
        from firstwords.weights import reader

        return reader.read(source, notice=notice)
    found = _checkpoint(source, notice)

    from firstwords.model.language_model import LanguageModel
    from firstwords.planning import machine
    from firstwords.runs import checkpoint
    from firstwords.text import tokenizer as tokenizers
    from firstwords.training.state import restored_model

    saved = found.json(checkpoint.CONFIG)
    model = restored_model(saved, found.tensors(checkpoint.MODEL), str(found.folder))
    tokenizer = tokenizers.read(found.folder / checkpoint.TOKENIZER)
    return LanguageModel(model.eval(), tokenizer, found.step, machine.dtype_of(saved.get("precision"), str(found.folder)))


def evaluate(
    source: str | Path,
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    encoding: str | None = None,
    listener: Listener = ignore,
) -> Evaluation:
    """Return how good a model is on a text; by default on the held-out part of its run.

    Raises:
        NoInputError: No such model or text.
        DataError: The text is empty, or the run has no held-out part.
    """
    lm, part = _model_and_text(source, text, encoding, listener)

    from firstwords.training.evaluate import evaluate as evaluate_part

    evaluation = evaluate_part(lm.model, part, lm.dtype)
    if evaluation is None:
        raise DataError("there is no held-out text to evaluate on", where=str(source), do="name a text")
    return evaluation


def scale(
    source: str | Path,
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    against: Sequence[str | Path] = (),
    with_baselines: bool = True,
    encoding: str | None = None,
    listener: Listener = ignore,
) -> Scale:
    """Return how good a model is on a text, beside chance, compressors, an n-gram model and other models.

    Args:
        source: As for `load`.
        text: By default the held-out part of its run.
        against: Other models, as for `load`.
        with_baselines: Compress the text and count n-grams; what is given the training text needs the run's prepared text.
        encoding: Of the text files.
        listener: Told what happens.

    Raises:
        NoInputError: No such model or text.
        DataError: The text is empty, or the run has no held-out part.
    """
    for other in against:
        _require_there(_located(other, resolve.noticed(listener)))
    lm, part = _model_and_text(source, text, encoding, listener)

    from firstwords.insight import scale as scales
    from firstwords.insight.baselines import LONGEST_HELD_OUT, baselines
    from firstwords.training.evaluate import evaluate_tokens

    tell = listener if part.n_tokens >= LONG_TEXT_TOKENS else ignore
    tell(Preparing("reading the held-out text", None))
    tokens = evaluate_tokens(lm.model, part, lm.dtype)
    if tokens is None:
        raise DataError("there is no held-out text to evaluate on", where=str(source), do="name a text")
    held_out = corpora.documents(part, lm.tokenizer)
    others = []
    for other in against:
        tell(Preparing(f"reading it with {other}", None))
        peer = load(other, notice=resolve.noticed(listener))
        found = evaluate_tokens(peer.model, corpora.part_of(held_out, peer.tokenizer), peer.dtype)
        assert found is not None
        others.append((str(other), found))
    blocks = scales.Blocks.of([len(document) for document in held_out])
    rows = []
    if with_baselines:
        tell(Preparing("compressing it, and counting n-grams", None))
        if tokens.evaluation.n_bytes > LONGEST_HELD_OUT:
            listener(Notice(f"over {LONGEST_HELD_OUT >> 20} MB: compressing that takes long, and is left out"))
        rows = list(baselines(held_out, _given(source, listener), blocks.starts))
    return scales.scale(str(source), tokens, others, rows, blocks)


def _model_and_text(
    source: str | Path, text: str | Path | Sequence[str | Path] | None, encoding: str | None, listener: Listener
) -> tuple[LanguageModel, Part]:
    """Return a model and the text that it is to be judged on."""
    lm = load(source, notice=resolve.noticed(listener))
    if text is None:
        return lm, _held_out(Path(source), listener)
    texts = sources.read(_named(text), encoding=encoding, notice=resolve.noticed(listener))
    return lm, corpora.prepare(texts, lm.tokenizer, cache=resolve.cache_folder(), val_fraction=0.0).train


def _given(source: str | Path, listener: Listener) -> Given | None:
    """Return the text that a model learnt from, where that is still prepared."""
    from firstwords.insight.baselines import Given

    corpus = _kept_corpus(Path(source))
    if corpus is None:
        listener(Notice("the text that it learnt from is not here: nothing on the scale is given it"))
        return None
    return Given(*_bytes_of(corpus))


def memorisation(source: str | Path, *, listener: Listener = ignore) -> Memorisation | None:
    """Return how much of what a run's best model says is learnt by heart; None where its text is not known or not kept.

    Raises:
        NoInputError: No such model.
    """
    lm, corpus = load(source, notice=resolve.noticed(listener)), _kept_corpus(Path(source))
    if corpus is None or corpus.tokenizer.sha256 != lm.tokenizer.sha256:
        return None

    from firstwords.insight.memorisation import Meter

    prompts = _prompts(corpus, "", EVALUATED_SAMPLES)
    meter = Meter(corpus.train, corpus.val, corpus.tokenizer, EVALUATED_TOKENS)
    samples = [said.text for said in lm.generate_batch(prompts, max_new_tokens=EVALUATED_TOKENS)]
    lines = _run_of(Path(source)).metrics.lines()
    of_it = [line for line in lines if line["event"] == "evaluation" and line["step"] == lm.step]
    known = [line for line in of_it if line["nats_per_token"] is not None]
    return meter.measure(samples, known[-1]["nats_per_token"] - known[-1]["train_nats_per_token"] if known else None)


def evaluate_tasks(
    source: str | Path,
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    folder: str | Path | None = None,
    out: str | Path | None = None,
    encoding: str | None = None,
    listener: Listener = ignore,
) -> tuple[TaskScore, ...]:
    """Return how many questions about a text a model answers: last words of passages, sentences beside a spoilt twin.

    Args:
        source: As for `load`.
        text: What the tasks are made from; by default the held-out part of the run.
        folder: Take the tasks from here instead.
        out: Keep the tasks in this folder, for `folder` and for lm-eval.
        encoding: Of the text.
        listener: Told what happens.

    Raises:
        NoInputError: No such model, text or folder.
        DataError: The text is too short, or the folder holds no tasks.
        CannotCreateError: `out` exists.
    """
    from firstwords.insight import tasks as making

    if out is not None and store.exists(Path(out)):
        raise CannotCreateError("is there already", where=str(out), do="give another --tasks-out")
    if folder is not None:
        tasks, lm = making.read(Path(folder)), load(source, notice=resolve.noticed(listener))
    else:
        lm, part = _model_and_text(source, text, encoding, listener)
        texts = making.documents(part, lm.tokenizer)
        tasks = making.make(texts)
        if out is not None:
            store.make_folder(Path(out).absolute().parent)
            store.publish(Path(out), making.files(tasks, texts, Path(out)), lambda: {"kind": "tasks"})

    from firstwords.insight.likelihood import answer

    listener(Preparing("answering the tasks", None))
    return answer(lm, tasks)


def lm_eval_model(source: str | Path) -> HarnessModel:
    """Return a model for `lm_eval.simple_evaluate(model=...)`.

    Raises:
        NoInputError: lm-eval is not installed, or there is no such model.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise NoInputError("lm-eval is not installed", where="lm_eval", do="pip install 'firstwords[lm-eval]'")
    lm = load(source)

    from firstwords.insight.harness import HarnessModel

    return HarnessModel(lm)


def explain(source: str | Path, text: str, *, html: str | Path | None = None, listener: Listener = ignore) -> Explanation:
    """Return the chapter's six steps on `text`, token by token.

    Args:
        source: As for `load`.
        text: At least two tokens.
        html: A page to be written, with the text as a surprise map.
        listener: Told what happens.

    Raises:
        NoInputError: No such model.
        DataError: Fewer than two tokens.
        CannotCreateError: Another file than a report of ours stands where the page is to be.
    """
    _require_free(html, "--html")
    lm = load(source, notice=resolve.noticed(listener))

    from firstwords.insight import report
    from firstwords.insight.explain import explain as explain_text

    explanation = explain_text(lm, text)
    if html is not None:
        store.make_folder(Path(html).absolute().parent)
        store.write(Path(html), report.explained(explanation, str(source)))
    return explanation


def report(
    runs: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    pictures: Mapping[str, str | Path] | None = None,
    scale: Mapping[str, Any] | None = None,
    predicted: Mapping[str, Any] | None = None,
    listener: Listener = ignore,
) -> Reported:
    """Write one HTML file that shows what a run learnt, or several runs beside each other.

    Args:
        runs: Run folders.
        out: The file; by default `report.html` in the run, for several runs `comparison.html` here.
        pictures: Folders for pictures of one run, by kind: `{"png": "figures"}`; also `pdf`.
        scale: How good the model is beside others: `{"scale": [{name, bits_per_byte, low, high}], "words": [...]}`.
        predicted: What was expected of the run, by key: `{"steps": 900, "bits_per_byte": [1.9, 2.0, 2.1]}`.
        listener: Told what happens.

    Raises:
        NoInputError: There is no such run.
        ConfigError: Pictures of several runs, or without matplotlib.
        CannotCreateError: Another file stands where the report is to be.
    """
    folders, pictures = [run_folder.existing(Path(name)) for name in _named(runs)], pictures or {}
    _require_free(out, "--out")
    if len(folders) > 1 and pictures:
        raise ConfigError("pictures are of one run", where=f"--{min(pictures)}", do="name one run")
    place = Path(out) if out is not None else folders[0].report if len(folders) == 1 else Path("comparison.html")

    from firstwords.insight import pictures as drawing
    from firstwords.insight import record
    from firstwords.insight import report as reporting

    if pictures:
        drawing.require_matplotlib(f"--{min(pictures)}")
    listener(Preparing("reading the run", None))
    texts = [_or_notice(functools.partial(_prepared, run, listener), listener) for run in folders]
    lm = _or_notice(functools.partial(load, folders[0].path), listener) if len(folders) == 1 else None
    if scale is None and lm is not None and texts[0] is not None:
        scale = _quick_scale(lm, texts[0], folders[0])
    records = [
        record.read(run, text, scale=scale, predicted=predicted or _predicted(run))
        for run, text in zip(folders, texts, strict=True)
    ]
    explanation = _passage_explained(lm, texts[0]) if lm is not None and texts[0] is not None else None
    store.make_folder(place.absolute().parent)
    store.write(place, reporting.report(records, explanation))
    drawn = _drawn(records[0], lm, pictures)
    return Reported(str(place), store.size(place), tuple(map(str, drawn)))


def _predicted(run: RunFolder) -> dict[str, Any] | None:
    """Return what was expected of a run before its first step."""
    return next((line.get("predicted") for line in run.metrics.lines() if line["event"] == "start"), None)


def _drawn(record: Record, lm: LanguageModel | None, pictures: Mapping[str, str | Path]) -> list[Path]:
    """Write the pictures of a run, each kind into its folder, and return their files."""
    from firstwords.insight import pictures as drawing

    figures, files = {}, []
    if pictures:
        figures["loss-plot"] = drawing.loss_plot(record)
    if pictures and lm is not None:
        prompt = str(record.config.get("sample_prompt") or KNOWN_PROMPT)
        figures["temperature-plot"] = drawing.temperature_plot(lm, prompt)
    for kind, folder in pictures.items():
        store.make_folder(Path(folder))
        for name, figure in figures.items():
            files.append(Path(folder) / f"{name}.{kind}")
            store.write(files[-1], drawing.drawn(figure, kind))
    return files


def _require_free(place: str | Path | None, where: str) -> None:
    """Raise a CannotCreateError where something stands that is no report of ours, which a new one would replace."""
    if place is None or not Path(place).exists():
        return
    if Path(place).is_file():
        with reading.regular(Path(place)) as (file, _):
            if REPORT_MARK in file.read(REPORT_HEAD_BYTES):
                return
    raise CannotCreateError("is there already, and is no report", where=str(place), do=f"give another {where}")


def _passage_explained(lm: LanguageModel, corpus: Corpus) -> Explanation | None:
    """Return a held-out passage as a model sees it; None where there is none."""
    from firstwords.insight import surprise
    from firstwords.insight.explain import explain as explain_text

    passage = surprise.passage(corpus.val, lm.tokenizer) if corpus.val.n_tokens else None
    return None if passage is None else explain_text(lm, passage)


def _or_notice(get: Callable[[], Found], listener: Listener) -> Found | None:
    """Return what `get` returns; where it fails, tell why and return None."""
    try:
        return get()
    except FirstwordsError as error:
        listener(Notice(str(error)))
        return None


def info(source: str | Path, *, listener: Listener = ignore) -> dict[str, Any]:
    """Return what is in a run or checkpoint.

    Raises:
        NoInputError: Neither is there.
    """
    found = _checkpoint(Path(source), resolve.noticed(listener))

    from firstwords.runs import checkpoint

    config, state = found.json(checkpoint.CONFIG), found.json(checkpoint.STATE)
    model = model_config(config.get("model"), str(found.folder))
    run = RunFolder(Path(source))
    steps = checkpoint.step_of(checkpoint.existing(run.checkpoints)[-1]) if run.exists else found.step
    return {
        "run": str(source),
        "parameters": cost.parameters(model),
        "steps": steps,
        "best_step": found.step if state.get("best_step") is None else state["best_step"],
        "checkpoint": str(found.folder),
        "weights_sha256": found.weights_sha256,
        "precision": config.get("precision"),
        "config": config["model"],
        "text": run_config(from_toml(resolve.read(run.config), str(run.config))).text if run.exists else None,
    }


def verify(source: str | Path, *, replay: int | None = None) -> Verdict:
    """Return whether every checkpoint and the prepared text of a run are whole, and whether training repeats itself.

    Args:
        source: A run folder; nothing in it is changed.
        replay: Train so many steps again and compare them with what the run recorded.

    Raises:
        NoInputError: There is no run.
        ConfigError: So many steps cannot be replayed.
    """
    run = run_folder.existing(Path(source))

    from firstwords.verify import verify as verify_run

    return verify_run(run, replay)


def bench(presets: Sequence[str] = BENCH_PRESETS, *, compiled: bool = False) -> Iterator[Mark]:
    """Yield how fast this machine is and where firstwords stands on it, as it is measured: about a minute in all.

    Args:
        presets: The models that learn and speak.
        compiled: Measure instead what compiling them takes and gives, and keep it for `--compile auto`.

    Raises:
        ConfigError: No such preset.
    """
    for preset in presets:
        run_config({"preset": preset})

    from firstwords.planning import machine, measure

    with machine.threads(None):
        yield from measure.compiled_marks(presets, resolve.cache_folder().parent) if compiled else measure.marks(presets)


def doctor() -> Diagnosis:
    """Return what this machine is, what firstwords will use of it and what is wrong, measured anew in some seconds."""
    from firstwords.planning.doctor import examine

    return examine(resolve.cache_folder().parent, Path("runs"))


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | None = None,
    n_heads: int | None = None,
    listener: Listener = ignore,
) -> Imported:
    """Make a model from elsewhere ours: a checkpoint folder, with which every verb can go on.

    Args:
        source: gpt2, gpt2-medium, gpt2-large or gpt2-xl; a folder for transformers (GPT-2 or Qwen3), the chapter's `.pth`,
            or nanoGPT's `ckpt.pt`.
        out: The folder to be made.
        tokenizer: Where the source has none: gpt2, bytes, or a `tokenizer.json`.
        n_heads: Of a `.pth` that is no size of GPT-2's.
        listener: Told what happens.

    Raises:
        NoInputError: Nothing is there.
        DataError: It is damaged, or a model that ours cannot be.
        ConfigError: It does not say enough.
        CannotCreateError: `out` exists.
    """
    if store.exists(Path(out)):
        raise CannotCreateError("is there already", where=str(out), do="give another --out")
    listener(Preparing("reading the weights", None))

    from firstwords.insight.explain import explain as explain_text
    from firstwords.model.sampling import Sampling
    from firstwords.runs import checkpoint
    from firstwords.weights import reader

    notice = resolve.noticed(listener)
    lm = reader.read(_located(source, notice), tokenizer=tokenizer, n_heads=n_heads, notice=notice)
    weights = {name: parameter.detach() for name, parameter in lm.model.named_parameters()}
    store.make_folder(Path(out).absolute().parent)
    saved = checkpoint.publish(Path(out), weights, dataclasses.asdict(lm.model.config), lm.tokenizer.json)
    return Imported(
        run=str(out),
        weights_sha256=saved.weights_sha256,
        parameters=cost.parameters(lm.model.config),
        nats_per_token=explain_text(lm, KNOWN_SENTENCE).evaluation.nats_per_token,
        prompt=KNOWN_PROMPT,
        greedy=lm.generate(KNOWN_PROMPT, max_new_tokens=8, sampling=Sampling(temperature=0)),
        published=_published(str(source)),
    )


def _published(name: str) -> str:
    """Return what the chapter prints of one of GPT-2's names."""
    from firstwords.weights.hub import PUBLISHED

    if name not in PUBLISHED:
        return ""
    training, held_out, greedy = PUBLISHED[name]
    says = f"{KNOWN_PROMPT!r} goes on with {greedy!r}; " if greedy else ""
    return f"{says}the-verdict.txt: {training} nats per token on its first nine tenths, {held_out} on the rest"


def export(
    source: str | Path, to: str, out: str | Path, *, kind: str | None = None, listener: Listener = ignore
) -> Exported:
    """Write a model for another tool, read it back, and compare its logits with ours.

    Args:
        source: As for `load`.
        to: `hf`, a folder for transformers; `gguf`, a file for llama.cpp; `pth`, a file for the chapter's code.
        out: The folder or file to be made.
        kind: Of a GGUF file's matrices: f32 (by default), f16 or q8_0.
        listener: Told what happens.

    Raises:
        ConfigError: An unknown `to`, or a model that the other tool cannot have.
        CannotCreateError: `out` exists.
        DataError: What was written does not give our logits.
    """
    if to not in EXPORTS:
        raise ConfigError(f"no format {to!r}", where="--to", do=did_you_mean(to, EXPORTS))
    if kind is not None and to != "gguf":
        raise ConfigError("only a GGUF file has kinds", where="--type", do="leave it out")
    if store.exists(Path(out)):
        raise CannotCreateError("is there already", where=str(out), do="give another --out")
    lm = load(source, notice=resolve.noticed(listener))

    import torch

    from firstwords.weights import export as exporting

    lm = dataclasses.replace(lm, dtype=torch.float32)
    store.make_folder(Path(out).absolute().parent)
    listener(Preparing("writing, and reading it back", None))
    if to == "pth":
        difference = exporting.to_pth(lm, Path(out))
    elif to == "gguf":
        difference = exporting.to_gguf(lm, Path(out), kind or "f32")
    else:
        shape = exporting.figures_of(lm.model.config, cost.parameters(lm.model.config))
        card = exporting.model_card(str(source), {**shape, **_figures(Path(source))})
        difference = exporting.to_hf(lm, Path(out), card)
    return Exported(str(out), exporting.reads_back(to), difference)


def _figures(source: Path) -> dict[str, Any]:
    """Return what a run knows of its model, for its card: how good it was held to be."""
    run = RunFolder(source)
    if not run.exists:
        return {}
    found = [line for line in run.metrics.lines() if line["event"] == "evaluation" and line["best"]]
    steps = [line for line in run.metrics.lines() if line["event"] == "step"]
    text = run_config(from_toml(resolve.read(run.config), str(run.config))).text
    figures: dict[str, Any] = {"text": ", ".join(Path(name).name for name in text) or "Python's own reference"}
    if found and found[-1]["bits_per_byte"] is not None:
        figures["held-out bits per byte"] = f"{found[-1]['bits_per_byte']:.3f} (step {found[-1]['step']})"
    if steps:
        figures["learnt from"] = f"{steps[-1]['tokens']:,} tokens in {steps[-1]['elapsed_s']:.0f} s"
    return figures


def _located(source: str | Path, notice: Callable[[str], None]) -> Path:
    """Return where a model is; one of GPT-2's names is fetched, unless something of that name is here."""
    from firstwords.weights import hub

    if str(source) in hub.NAMES and not Path(source).exists():
        return hub.fetch(str(source), resolve.cache_folder().parent / "hub.json", notice)
    return Path(source)


def _is_foreign(source: Path) -> bool:
    """Whether a model from elsewhere is there: no run, no checkpoint of ours."""
    pickled = source.is_file() and source.suffix in archive.SUFFIXES
    if RunFolder(source).exists or not (pickled or (source / "config.json").is_file()):
        return False
    ours = (source / store.MANIFEST).is_file() and store.read_manifest(source).get("kind") == "checkpoint"
    return not ours


def _require_there(source: Path) -> None:
    """Raise a NoInputError where no model is."""
    if not (_is_foreign(source) or (source / store.MANIFEST).is_file() or RunFolder(source).exists):
        raise NoInputError("there is no run or checkpoint", where=str(source), do="name a folder that train made")


def _checkpoint(source: Path, notice: Callable[[str], None]) -> Checkpoint:
    _require_there(source)
    from firstwords.runs import checkpoint

    if (source / store.MANIFEST).is_file():
        return checkpoint.Checkpoint(source, store.verify(source))
    found = checkpoint.best(RunFolder(source).checkpoints, notice)
    if found is None:
        raise NoInputError("the run has no checkpoint yet", where=str(source), do="go on with train --resume")
    return found


def _kept_corpus(source: Path) -> Corpus | None:
    """Return the prepared text of the run that a source is or belongs to; None where it is not here, or damaged."""
    run = _run_of(source)
    try:
        recorded = resolve.recorded_corpus(run) if run.exists else None
        return None if recorded is None else corpora.load(recorded)
    except (DataError, NoInputError):
        return None


def _held_out(source: Path, listener: Listener) -> Part:
    run = _run_of(source)
    if not run.exists:
        raise NoInputError("a checkpoint by itself has no held-out text", where=str(source), do="name a text")
    return _prepared(run, listener).val


def _prepared(run: RunFolder, listener: Listener) -> Corpus:
    """Return the prepared text of a run, made again where the cache has lost it."""
    recorded = resolve.recorded_corpus(run)
    if recorded is not None and recorded.is_dir():
        return corpora.load(recorded)
    return resolve.prepare(resolve.resumed(run.path, None, {}), listener)


def _run_of(source: Path) -> RunFolder:
    """Return the run that a source is, or is a checkpoint of."""
    return RunFolder(source if (source / "config.toml").is_file() else source.parent.parent)
