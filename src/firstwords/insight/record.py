"""What a run left behind, read from its folder as columns of numbers: steps, evaluations, samples, plans, settings.

Nothing in a journal is believed to be of a certain kind: what is no number where one is needed counts as missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from firstwords import reading, store
from firstwords.config import flatten, from_toml, run_config
from firstwords.errors import FirstwordsError
from firstwords.insight.memorisation import Place
from firstwords.model import cost
from firstwords.model.loss import bits_per_byte
from firstwords.runs import checkpoint
from firstwords.runs.folder import RunFolder
from firstwords.text.corpus import Corpus

Line = dict[str, Any]
Table = dict[str, list[Any]]  # columns of one length, by name

MOST_POINTS = 2000  # of a curve; a longer one is made of means
AXES = ("step", "epochs", "tokens", "elapsed_s")
STEP = ("nats_per_token", "lr", "grad_norm", "tokens_per_s")
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
    scale: Mapping[str, Any] | None = None  # `{"scale": [{name, bits_per_byte, low, high}], "words": [...]}`
    predicted: Mapping[str, Any] = field(default_factory=dict)  # by the keys of `report.PLANNED`


def read(
    run: RunFolder,
    corpus: Corpus | None,
    *,
    scale: Mapping[str, Any] | None = None,
    predicted: Mapping[str, Any] | None = None,
) -> Record:
    """Return the record of a run.

    Args:
        run: It exists.
        corpus: Its prepared text, without which there are no epochs.
        scale: How good the model is beside others, to be shown with it.
        predicted: What was expected of the run before it began.

    Raises:
        DataError: A journal or the configuration is damaged.
        ConfigError: The configuration is not one.
    """
    text = None if corpus is None else _text_size(corpus)
    events = list(run.metrics.lines())
    steps = [line for line in events if line["event"] == "step"]
    evaluations = [line for line in events if line["event"] == "evaluation"]
    looks = [line for line in events if line["event"] == "memorisation"]
    places = _places(steps, text)
    every = max(1, math.ceil(len(steps) / MOST_POINTS))
    config = from_toml(reading.read_bytes(run.config).decode(errors="replace"), str(run.config))
    environment, checksums = _checkpoints(run)
    return Record(
        name=run.path.name or str(run.path),
        steps=_thinned(_table(steps, STEP, places), every),
        evaluations=_with_training_bits(_table(evaluations, EVALUATION, places), text),
        memorisation=_table(looks, MEMORISATION, places),
        every=every,
        best=_best(evaluations, began=bool(steps)),
        longest_copy=_longest_copy(looks[-1]) if looks else ("", ""),
        samples=tuple(
            (line["step"], line["text"])
            for line in run.samples.lines()
            if isinstance(line.get("step"), int) and isinstance(line.get("text"), str)
        ),
        plans=tuple(line for line in events if line["event"] == "plan"),
        ended=_ended(events),
        config=config,
        n_parameters=cost.parameters(run_config(config).model),
        text=text,
        environment=environment,
        checksums=checksums,
        scale=scale,
        predicted=predicted or {},
    )


def number(value: Any) -> float | int | None:
    """Return a value where it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _best(evaluations: Sequence[Line], *, began: bool) -> Line | None:
    """Return the line of the best evaluation; None where only the untrained model was judged, and the run has gone on."""
    if began and not any(line.get("step") for line in evaluations):
        return None
    return next((line for line in reversed(evaluations) if line.get("best") is True), None)


def _ended(events: Sequence[Line]) -> Line | None:
    """Return how the run ended: its last `stop`, if no step came after it."""
    found = next((line for line in reversed(events) if line["event"] in ("stop", "step")), None)
    return found if found is not None and found["event"] == "stop" else None


def _longest_copy(look: Line) -> tuple[str, str]:
    match look:
        case {"longest_copy": str() as copied, "place": {"document": int() as document, "character": int() as character}}:
            return copied, Place(document, character).words
        case _:
            return "", ""


def _text_size(corpus: Corpus) -> TextSize:
    counts = store.read_manifest(corpus.folder)["train"]
    return TextSize(len(corpus.train.ids), corpus.train.n_tokens, counts["bytes"], corpus.val.n_tokens)


def _places(steps: Iterable[Line], text: TextSize | None) -> dict[Any, Line]:
    """Return by step where it stands on each axis; step 0 is where all of them begin."""
    beginning = dict.fromkeys(AXES, 0)
    found: dict[Any, Line] = {0: beginning if text else {**beginning, "epochs": None}}
    for line in steps:
        tokens = number(line.get("tokens"))
        found[number(line.get("step"))] = {
            "step": number(line.get("step")),
            "epochs": None if text is None or tokens is None else round(tokens / text.ids, 4),
            "tokens": tokens,
            "elapsed_s": number(line.get("elapsed_s")),
        }
    return found


def _table(lines: Sequence[Line], names: Iterable[str], places: Mapping[Any, Line]) -> Table:
    """Return the named numbers of some lines as columns, with those of the axes; a column without a number is left out."""
    at = [places.get(number(line.get("step")), {"step": number(line.get("step"))}) for line in lines]
    table: Table = {axis: [place.get(axis) for place in at] for axis in AXES}
    table |= {name: [number(line.get(name)) for line in lines] for name in names}
    return {name: column for name, column in table.items() if any(value is not None for value in column)}


def _thinned(table: Table, every: int) -> Table:
    """Return a table with the mean of `every` rows, at the place of the last of them, for each."""
    if every == 1:
        return table
    return {
        name: [_of_rows(name, column[i : i + every]) for i in range(0, len(column), every)] for name, column in table.items()
    }


def _of_rows(name: str, values: list[Any]) -> Any:
    there = [value for value in values if value is not None]
    if name in AXES or not there:
        return values[-1]
    return sum(there) / len(there)


def _with_training_bits(table: Table, text: TextSize | None) -> Table:
    """Return the evaluations with `train_bits_per_byte`: from the bytes that a training token has on the average."""
    nats = table.get("train_nats_per_token")
    if text is None or nats is None:
        return table
    bits = [None if value is None else bits_per_byte(value * text.tokens, text.bytes) for value in nats]
    return {**table, "train_bits_per_byte": bits}


def _checkpoints(run: RunFolder) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Return what machine the run was on, and the checksum of each checkpoint's weights, as their manifests have it."""
    environment: Mapping[str, Any] = {}
    checksums = {}
    for folder in checkpoint.existing(run.checkpoints):
        try:
            found = checkpoint.Checkpoint(folder, store.read_manifest(folder))
            checksums[folder.name] = found.weights_sha256
            environment = flatten(found.json(checkpoint.STATE).get("fingerprint") or {})
        except (FirstwordsError, KeyError) as error:
            checksums[folder.name] = f"damaged: {error}"
    return environment, checksums
