"""What a model is worth: the verbs that judge, explain and report.

What can be refused without torch is refused before it is imported; see `api`.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from firstwords import reading, store
from firstwords.errors import CannotCreateError, ConfigError, FirstwordsError, NoInputError
from firstwords.events import Listener, Notice, Preparing, ignore_event, notices_to
from firstwords.insight import quick
from firstwords.loading import (
    kept_corpus,
    load,
    model_and_text,
    named_texts,
    prepared_text,
    require_there,
    run_of,
    tell_of_learnt_text,
)
from firstwords.presets import CHAPTER_PROMPT
from firstwords.runs import folder as run_folder
from firstwords.runs.folder import RunFolder
from firstwords.text import corpus as corpora

if TYPE_CHECKING:
    from firstwords.insight.baselines import Given
    from firstwords.insight.explain import Explanation
    from firstwords.insight.harness import HarnessModel
    from firstwords.insight.memorisation import Memorisation
    from firstwords.insight.record import Record
    from firstwords.insight.scale import Scale
    from firstwords.insight.tasks import TaskScore
    from firstwords.model.language_model import LanguageModel
    from firstwords.training.evaluate import Evaluation

Found = TypeVar("Found")
LONG_TEXT_TOKENS = 20_000  # from here on a person waits for a model to read them, and is told so
REPORT_MARK = b'name="generator" content="firstwords"', 2000  # how one of ours is known: this in so many first bytes
EVALUATED_SAMPLES, EVALUATED_TOKENS = 8, 200  # of a model that nobody trains


@dataclass(frozen=True)
class Reported:
    """What a report came to: its file, and the pictures beside it."""

    report: str
    size_bytes: int
    pictures: tuple[str, ...]


def evaluate(
    source: str | Path,
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    encoding: str | None = None,
    listener: Listener = ignore_event,
) -> Evaluation:
    """Return how good a model is on a text; by default on the held-out part of its run.

    Raises:
        NoInputError: No such model or text.
        DataError: The text is empty, or the run has no held-out part.
        DivergedError: The model's numbers are not finite.
    """
    lm, part = model_and_text(source, text, encoding, listener)

    from firstwords.training.evaluate import evaluate as evaluate_part

    evaluation = evaluate_part(lm.model, part, lm.dtype)
    assert evaluation is not None
    evaluation.require_finite(str(source))
    return evaluation


def scale(
    source: str | Path,
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    against: Sequence[str | Path] = (),
    with_baselines: bool = True,
    encoding: str | None = None,
    listener: Listener = ignore_event,
) -> Scale:
    """Return how good a model is on a text, beside chance, compressors, an n-gram model and other models.

    Args:
        source: As for `load`.
        text: By default the held-out part of its run.
        against: Other models, as for `load`.
        with_baselines: Compress the text and count n-grams; what is given the training text needs that text.
        encoding: Of the text files.
        listener: Told what happens.

    Raises:
        NoInputError: No such model or text.
        DataError: The text is empty, or the run has no held-out part.
        DivergedError: The numbers of a model are not finite.
    """
    lm, part = model_and_text(source, text, encoding, listener, others=against, look_up=True)

    from firstwords.insight import scale as scales
    from firstwords.insight.baselines import LONGEST_HELD_OUT, baselines
    from firstwords.training.evaluate import evaluate_tokens

    tell = listener if part.n_tokens >= LONG_TEXT_TOKENS else ignore_event
    tell(Preparing("reading the held-out text", None))
    tokens = evaluate_tokens(lm.model, part, lm.dtype)
    assert tokens is not None
    tokens.evaluation.require_finite(str(source))
    held_out = corpora.documents(part, lm.tokenizer)
    others = []
    for other in against:
        tell_of_learnt_text(other, part, lm.tokenizer, listener)
        tell(Preparing(f"reading it with {other}", None))
        peer = load(other, notice=notices_to(listener))
        found = evaluate_tokens(peer.model, corpora.part_of(held_out, peer.tokenizer), peer.dtype)
        assert found is not None
        found.evaluation.require_finite(str(other))
        others.append((str(other), found))
    blocks = scales.Blocks.of([len(document) for document in held_out])
    rows = []
    if with_baselines:
        tell(Preparing("compressing it, and counting n-grams", None))
        if tokens.evaluation.n_bytes > LONGEST_HELD_OUT:
            listener(Notice(f"over {LONGEST_HELD_OUT >> 20} MB: compressing that takes long, and is left out"))
        rows = list(baselines(held_out, _given(source, listener), blocks.starts))
    return scales.scale(str(source), tokens, others, rows, blocks)


def _given(source: str | Path, listener: Listener) -> Given | None:
    """Return the text that a model learnt from, prepared again where it must be and can."""
    from firstwords.insight.baselines import Given

    run = run_of(Path(source))
    try:
        if run.exists:
            return Given.of(prepared_text(run, listener))
        why = "it belongs to no run"
    except FirstwordsError as error:
        why = str(error)
    listener(Notice(f"the text that it learnt from is not here: nothing on the scale is given it ({why})"))
    return None


def memorisation(source: str | Path, *, listener: Listener = ignore_event) -> Memorisation | None:
    """Return how much of what a run's best model says is learnt by heart; None where its text is not known or not kept.

    Raises:
        NoInputError: No such model.
    """
    require_there(Path(source))
    corpus = kept_corpus(Path(source))
    if corpus is None:
        return None
    lm = load(source, notice=notices_to(listener))
    if corpus.tokenizer.sha256 != lm.tokenizer.sha256:
        return None

    from firstwords.insight.memorisation import Meter

    prompts = quick.prompts(corpus, "", EVALUATED_SAMPLES)
    meter = Meter(corpus.train, corpus.val, corpus.tokenizer, EVALUATED_TOKENS)
    if not meter.text.is_kept:
        listener(Preparing("looking for what it says in what it learnt from", None))
    samples = [said.text for said in lm.generate_batch(prompts, max_new_tokens=EVALUATED_TOKENS)]
    return meter.measure(samples, _or_notice(functools.partial(_gap, run_of(Path(source)), lm.step), listener))


def _gap(run: RunFolder, at_step: int | None) -> float | None:
    """Return by how many nats per token held-out text was harder than training text at a step; None where none was noted."""
    gap = None
    for step, line in run.metrics.of_steps("evaluation"):
        held_out, trained = (reading.number(line.get(key)) for key in ("nats_per_token", "train_nats_per_token"))
        if step == at_step and held_out is not None and trained is not None:
            gap = held_out - trained
    return gap


def evaluate_tasks(
    source: str | Path,
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    folder: str | Path | None = None,
    out: str | Path | None = None,
    encoding: str | None = None,
    listener: Listener = ignore_event,
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
        ConfigError: A folder, which has its own tasks, and a text or `out`.
    """
    from firstwords.insight import tasks as making

    if folder is not None and (text is not None or out is not None):
        do = "leave out the text and --tasks-out, or the folder"
        raise ConfigError("has its own tasks", where=f"--tasks {folder}", do=do)
    if out is not None and store.exists(Path(out)):
        raise CannotCreateError("is there already", where=str(out), do="give another --tasks-out")
    if folder is not None:
        tasks, lm = making.read(Path(folder)), load(source, notice=notices_to(listener))
    else:
        lm, part = model_and_text(source, text, encoding, listener)
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


def explain(
    source: str | Path, text: str, *, html: str | Path | None = None, listener: Listener = ignore_event
) -> Explanation:
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
    lm = load(source, notice=notices_to(listener))

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
    listener: Listener = ignore_event,
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
        CannotCreateError: Another file stands where the report or a picture is to be.
    """
    folders, pictures = [run_folder.existing(Path(name)) for name in named_texts(runs)], pictures or {}
    _require_free(out, "--out")
    if len(folders) > 1 and pictures:
        raise ConfigError("pictures are of one run", where=f"--{min(pictures)}", do="name one run")
    place = Path(out) if out is not None else folders[0].report if len(folders) == 1 else Path("comparison.html")
    if len(folders) > 1:
        _require_free(place, "--out")

    from firstwords.insight import pictures as drawing
    from firstwords.insight import record
    from firstwords.insight import report as reporting

    if pictures:
        drawing.require_matplotlib(f"--{min(pictures)}")
    for kind, name in itertools.product(pictures, (drawing.LOSS_PLOT, drawing.TEMPERATURE_PLOT)):
        _require_free(Path(pictures[kind]) / f"{name}.{kind}", f"--{kind}", drawing.MARK)
    listener(Preparing("reading the run", None))
    texts = [_or_notice(functools.partial(prepared_text, run, listener), listener) for run in folders]
    lm = _or_notice(functools.partial(load, folders[0].path), listener) if len(folders) == 1 else None
    if scale is None and lm is not None and texts[0] is not None:
        scale = quick.scale(lm, texts[0], folders[0].name)
    names = [run.name for run in folders]
    if len(set(names)) < len(names):  # exp1/notes and exp2/notes
        names = [str(run.path) for run in folders]
    records = [
        record.read(run, text, name=name, scale=scale, predicted=predicted or _predicted(run))
        for run, text, name in zip(folders, texts, names, strict=True)
    ]
    explanation = quick.passage_explained(lm, texts[0]) if lm is not None and texts[0] is not None else None
    store.make_folder(place.absolute().parent)
    store.write(place, reporting.report(records, explanation))
    drawn = _drawn(records[0], lm, pictures)
    return Reported(str(place), store.size(place), tuple(map(str, drawn)))


def _predicted(run: RunFolder) -> dict[str, Any] | None:
    """Return what was expected of a run before its first step; None where it went on to another length since."""
    events = ("start", "resume", "stop")
    lines = [line for line in run.metrics.lines() if line["event"] in events and "predicted" in line]
    predicted = lines[-1]["predicted"] if lines else None
    return predicted if isinstance(predicted, dict) else None


def _drawn(record: Record, lm: LanguageModel | None, pictures: Mapping[str, str | Path]) -> list[Path]:
    """Write the pictures of a run, each kind into its folder, and return their files."""
    from firstwords.insight import pictures as drawing

    figures, files = {}, []
    if pictures:
        figures[drawing.LOSS_PLOT] = drawing.loss_plot(record)
    if pictures and lm is not None:
        prompt = str(record.config.get("sample_prompt") or CHAPTER_PROMPT)
        figures[drawing.TEMPERATURE_PLOT] = drawing.temperature_plot(lm, prompt)
    for kind, folder in pictures.items():
        store.make_folder(Path(folder))
        for name, figure in figures.items():
            files.append(Path(folder) / f"{name}.{kind}")
            store.write(files[-1], drawing.drawn(figure, kind))
    return files


def _require_free(place: str | Path | None, where: str, mark: tuple[bytes, int] = REPORT_MARK) -> None:
    """Raise a CannotCreateError where something stands that is not ours, by its mark, which a new file would replace."""
    if place is None or not Path(place).exists():
        return
    if Path(place).is_file():
        with reading.regular(Path(place)) as (file, _):
            if mark[0] in file.read(mark[1]):
                return
    kind = "report" if mark == REPORT_MARK else "picture of a run"
    raise CannotCreateError(f"is there already, and is no {kind}", where=str(place), do=f"give another {where}")


def _or_notice(get: Callable[[], Found], listener: Listener) -> Found | None:
    """Return what `get` returns; where it fails, tell why and return None."""
    try:
        return get()
    except FirstwordsError as error:
        listener(Notice(str(error)))
        return None
