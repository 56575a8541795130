"""What a run left behind, read from its folder as columns of numbers: steps, evaluations, samples, plans, settings.

Nothing in a journal is believed to be of a certain kind: what is no number where one is needed counts as missing.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from firstwords import store
from firstwords.config import flatten, run_config
from firstwords.errors import FirstwordsError
from firstwords.insight.memorisation import Place
from firstwords.model import cost
from firstwords.model.loss import bits_per_byte
from firstwords.reading import number
from firstwords.runs import checkpoint
from firstwords.runs.folder import RunFolder
from firstwords.text.corpus import Corpus

Line = dict[str, Any]
Table = dict[str, list[Any]]  # columns of one length, by name

MOST_POINTS = 2000  # of a curve; a longer one is made of means
AXES = ("step", "epochs", "tokens", "elapsed_s")
STEP = ("nats_per_token", "lr", "grad_norm", "tokens_per_s")
COUNTS = ("step", "tokens")  # whole numbers
EVALUATION = ("train_nats_per_token", "nats_per_token", "bits_per_byte", "perplexity", "memory_bytes")
MEMORISATION = (
    "longest_copy_chars",
    "copied_share",
    "novel_8grams",
    "held_out_novel_8grams",
    "gap",
    "repeated",
    "held_out_repeated",
    "distinct",
    "held_out_distinct",
)


@dataclass(frozen=True)
class TextSize:
    """How much training text there is."""

    ids: int  # a pass over the text, `<|endoftext|>` included
    tokens: int
    bytes: int
    held_out_tokens: int


class Steps:
    """The numbers of all steps, eight bytes each: those of a million steps would be 1.5 GB as lines."""

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in (*COUNTS, "elapsed_s", *STEP)}

    def __len__(self) -> int:
        return len(self._columns["step"])

    def add(self, line: Line) -> None:
        """Take the numbers of a journal's line."""
        for name, column in self._columns.items():
            value = number(line.get(name))
            column.append(math.nan if value is None else value)

    def table(self, every: int, text: TextSize | None) -> Table:
        """Return the mean of `every` steps, at the place of the last of them, for each."""
        ends = [min(start + every, len(self)) for start in range(0, len(self), every)]
        places = [self._place(end - 1, text) for end in ends]
        table: Table = {axis: [place[axis] for place in places] for axis in AXES}
        for name in STEP:
            column = self._columns[name]
            rows = (column[start:end] for start, end in zip([0, *ends], ends, strict=False))
            table[name] = [_mean([value for value in row if not math.isnan(value)]) for row in rows]
        return _filled(table)

    def places(self, steps: Collection[float | None], text: TextSize | None) -> Mapping[Any, Line]:
        """Return by step where it stands on each axis, of those that are named; step 0 is where all of them begin."""
        beginning = dict.fromkeys(AXES, 0)
        found: dict[Any, Line] = {0: beginning if text else {**beginning, "epochs": None}}
        return found | {step: self._place(i, text) for i, step in enumerate(self._columns["step"]) if step in steps}

    def _place(self, i: int, text: TextSize | None) -> Line:
        at = {name: None if math.isnan(column[i]) else column[i] for name, column in self._columns.items()}
        step, tokens = (None if (count := at[name]) is None else int(count) for name in COUNTS)
        epochs = None if text is None or tokens is None else round(tokens / text.ids, 4)
        return {"step": step, "epochs": epochs, "tokens": tokens, "elapsed_s": at["elapsed_s"]}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Record:
    """A run. Tables have the columns `AXES` and those named above; each point of `steps` is the mean of `every` steps."""

    name: str
    steps: Table
    evaluations: Table
    memorisation: Table
    every: int
    best: Line | None  # the best evaluation's line; None where what was learnt was not judged
    longest_copy: tuple[str, str]  # of the last look at memorisation: what was copied, and where it stands
    samples: tuple[tuple[int, str], ...]
    plans: tuple[Line, ...]
    ended: Line | None  # the `stop` line
    config: Mapping[str, Any]
    n_parameters: int
    text: TextSize | None
    environment: Mapping[str, Any]
    checksums: Mapping[str, str]
    tokenizer_sha256: str  # empty where no checkpoint tells
    scale: Mapping[str, Any] | None = None  # `{"scale": [{name, bits_per_byte, low, high}], "words": [...]}`
    predicted: Mapping[str, Any] = field(default_factory=dict)  # by the keys of `report.PLANNED`


def read(
    run: RunFolder,
    corpus: Corpus | None,
    *,
    name: str = "",
    scale: Mapping[str, Any] | None = None,
    predicted: Mapping[str, Any] | None = None,
) -> Record:
    """Return the record of a run.

    Args:
        run: It exists.
        corpus: Its prepared text, without which there are no epochs.
        name: By default its folder's.
        scale: How good the model is beside others, to be shown with it.
        predicted: What was expected of the run before it began.

    Raises:
        DataError: A journal or the configuration is damaged.
        ConfigError: The configuration is not one.
    """
    text = None if corpus is None else _text_size(corpus)
    steps, events, ended = Steps(), list[Line](), None
    for line in run.metrics.lines():
        if line["event"] == "step":
            steps.add(line)
            ended = None
        else:
            events.append(line)
            ended = line if line["event"] == "stop" else ended
    evaluations = [line for line in events if line["event"] == "evaluation"]
    measured = [line for line in events if line["event"] == "memorisation"]
    places = steps.places({number(line.get("step")) for line in (*evaluations, *measured)}, text)
    every = max(1, math.ceil(len(steps) / MOST_POINTS))
    config = run.recorded_config()
    environment, checksums, tokenizer_sha256 = _checkpoints(run)
    return Record(
        name=name or run.name or str(run.path),
        steps=steps.table(every, text),
        evaluations=_with_training_bits(_table(evaluations, EVALUATION, places), text),
        memorisation=_table(measured, MEMORISATION, places),
        every=every,
        best=_best(evaluations, began=len(steps) > 0),
        longest_copy=_longest_copy(measured[-1]) if measured else ("", ""),
        samples=tuple(
            (line["step"], line["text"])
            for line in run.samples.lines()
            if isinstance(line.get("step"), int) and isinstance(line.get("text"), str)
        ),
        plans=tuple(line for line in events if line["event"] == "plan"),
        ended=ended,
        config=config,
        n_parameters=cost.parameters(run_config(config).model),
        text=text,
        environment=environment,
        checksums=checksums,
        tokenizer_sha256=tokenizer_sha256,
        scale=scale,
        predicted=predicted or {},
    )


def _best(evaluations: Sequence[Line], *, began: bool) -> Line | None:
    """Return the line of the best evaluation; None where only the untrained model was judged, and the run has gone on."""
    if began and not any(line.get("step") for line in evaluations):
        return None
    return next((line for line in reversed(evaluations) if line.get("best") is True), None)


def _longest_copy(measured: Line) -> tuple[str, str]:
    match measured:
        case {"longest_copy": str() as copied, "place": {"document": int() as document, "character": int() as character}}:
            return copied, Place(document, character).words
        case _:
            return "", ""


def _text_size(corpus: Corpus) -> TextSize:
    counts = store.read_manifest(corpus.folder)["train"]
    return TextSize(len(corpus.train.ids), corpus.train.n_tokens, counts["bytes"], corpus.val.n_tokens)


def _table(lines: Sequence[Line], names: Iterable[str], places: Mapping[Any, Line]) -> Table:
    """Return the named numbers of some lines as columns, with those of the axes; a column without a number is left out."""
    at = [places.get(number(line.get("step")), {"step": number(line.get("step"))}) for line in lines]
    table: Table = {axis: [place.get(axis) for place in at] for axis in AXES}
    return _filled(table | {name: [number(line.get(name)) for line in lines] for name in names})


def _filled(table: Table) -> Table:
    return {name: column for name, column in table.items() if any(value is not None for value in column)}


def _with_training_bits(table: Table, text: TextSize | None) -> Table:
    """Return the evaluations with `train_bits_per_byte`: from the bytes that a training token has on the average."""
    nats = table.get("train_nats_per_token")
    if text is None or nats is None:
        return table
    bits = [None if value is None else bits_per_byte(value * text.tokens, text.bytes) for value in nats]
    return {**table, "train_bits_per_byte": bits}


def _checkpoints(run: RunFolder) -> tuple[Mapping[str, Any], dict[str, str], str]:
    """Return what machine the run was on, the checksum of each checkpoint's weights, and that of the tokenizer."""
    environment: Mapping[str, Any] = {}
    checksums, tokenizer_sha256 = {}, ""
    for folder in checkpoint.existing(run.checkpoints):
        try:
            found = checkpoint.unverified(folder)
            checksums[folder.name] = found.weights_sha256
            tokenizer_sha256 = found.manifest["files"][checkpoint.TOKENIZER]["sha256"]
            environment = flatten(found.json(checkpoint.STATE).get("fingerprint") or {})
        except (FirstwordsError, KeyError) as error:
            checksums[folder.name] = f"damaged: {error}"
    return environment, checksums, tokenizer_sha256
