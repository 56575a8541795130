"""What the caller wants becomes what the run records: configuration, text, and what the machine decides.

Needs torch only for the last; whatever can be refused before is refused before torch is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from firstwords import reading, store
from firstwords.config import (
    AS_DRAWN,
    NONES,
    Precision,
    RunConfig,
    flag,
    flatten,
    from_toml,
    key_types,
    presets,
    run_config,
)
from firstwords.errors import ConfigError, DataError, FirstwordsError, NoInputError, quoted
from firstwords.model import cost
from firstwords.planning import budget, known
from firstwords.runs import folder as run_folder
from firstwords.runs.folder import RunFolder
from firstwords.text import corpus as corpora
from firstwords.text import sources
from firstwords.text import tokenizer as tokenizers
from firstwords.text.corpus import Corpus
from firstwords.text.sources import Texts
from firstwords.training.events import Listener, Notice, Preparing, Told

if TYPE_CHECKING:
    import torch

    from firstwords.planning.known import Compiling
    from firstwords.planning.plan import Candidate, Machine, Tokens
    from firstwords.planning.speed import Speed
    from firstwords.text.batches import Batches
    from firstwords.training.loop import FitConfig

EVALUATIONS = 20  # in a run of known length
DEFAULT_FOR_S = 180.0  # of a run whose length nobody gave
SHORTEST_CONTEXT = 128  # of the presets that a run which names none may take
MOST_SAVED_SHARE = 0.9  # of a step's time by compiling: what is measured on one day is held against another day's speed
PACE_SHARE, PACE_S = 0.02, 2.0  # of a time budget, and at most, to learn how fast the machine is now
# What may change when a run goes on; all else is what the run recorded.
RESUMABLE = frozenset(
    (
        "steps",
        "epochs",
        "for_s",
        "device",
        "precision",
        "threads",
        "compile",
        "trust_device",
        "micro_batch_size",
        "save_every_s",
        "on_nan",
        "until",
        "meter",
        "keep",
        "sample_prompt",
        "report",
    )
)
MOST_THREADS_A_CORE = 8
PLACES = frozenset(("val", "tokenizer", "from_"))  # recorded with the folders that they are in, where they are files
# What of a model may change when training goes on from it.
ADAPTABLE = frozenset(("model.context_length", "model.drop_rate", "model.init_std"))
# How a model that has learnt already goes on, where no preset is named: in smaller steps than one that begins.
GOING_ON = {"optim.kind": "adamw", "optim.peak_lr": 5e-4, "optim.weight_decay": 0.1}
# What no weight depends on, or what the corpus's own hash tells better.
UNTRAINED = frozenset(
    (
        "text",
        "text_sha256",
        "val",
        "val_fraction",
        "encoding",
        "tokenizer",
        "special_tokens",
        "preset",
        "eval_every",
        "eval_tokens",
        "sample_every",
    )
)
# What only decides the first weights. Checkpoints hold the weights, so runs from before the option go on.
BEGINNING = frozenset(AS_DRAWN)


@dataclass(frozen=True)
class Asked:
    """What the caller wants, before the text and the machine are looked at."""

    run: RunFolder
    config: RunConfig
    texts: Texts | None  # None: what a resumed run recorded
    given: frozenset[str]  # the keys that were named; nothing is decided for them
    more_time: bool = False  # a resumed run is given a new time budget
    moved: bool = False  # and its text is elsewhere by now
    tokenizer_json: bytes = b""  # of the model that a new run goes on from


def new(
    out: Path | None,
    config: str | Path | None,
    given: dict[str, Any],
    describe: Callable[[str], tuple[dict[str, Any], bytes]],
    listener: Listener,
) -> Asked:
    """Return what is asked of a new run; its folder is made, with nothing in it.

    Args:
        out: The run folder, or None for one by the text's name.
        config: A TOML file of keys.
        given: Keys that override it.
        describe: Returns the shape and the tokenizer's file of a model to go on from.
        listener: Told what is worth knowing.

    Raises:
        FirstwordsError: An impossible configuration, no such text, a taken folder.
    """
    layers: list[dict[str, Any]] = [] if config is None else [from_toml(read(Path(config)), str(config))]
    asked, tokenizer_json = run_config(*layers, given), b""
    if asked.tokenizer == "bpe" and "text" in given:  # which another text than a run's own fills with other words
        layers = [{key: value for key, value in layer.items() if key != "model.vocab_size"} for layer in layers]
        asked = run_config(*layers, given)
    if asked.from_ is not None:
        shape, tokenizer_json = describe(asked.from_)
        enlarged = tokenizers.from_json(tokenizer_json, asked.from_).with_special(_special(asked))
        shape["model.vocab_size"] = max(shape["model.vocab_size"], enlarged.vocab_size)
        named = {key for layer in layers for key in layer}  # a run's own file says how the model was adapted
        shape = {key: value for key, value in shape.items() if key not in ADAPTABLE & named}
        if not any("preset" in layer for layer in (*layers, given)):
            layers = [GOING_ON, *layers]
        elif "preset" in given:
            listener(Notice(f"the model is that of {asked.from_}: --preset {asked.preset} says only how it is trained"))
        place = str(Path(asked.from_).absolute()) if Path(asked.from_).exists() else asked.from_
        given = {**shape, **given, "from_": place}
        _require_shape(shape, given)
        asked = run_config(*layers, given)
    elif config is not None and "preset" in given:
        _tell_of_a_preset(str(config), layers[0], given, asked, listener)
    corpora.parse_tokenizer(asked.tokenizer)
    if asked.val is not None and given.get("val_fraction") is not None and asked.val_fraction > 0:
        what, do = "a held-out text is named as well", "give one of them; --val none leaves out a file's"
        raise ConfigError(what, where="--val-fraction", why=f"it is --val {asked.val}", do=do)
    _require_utf8(asked)
    _require_cores(asked.threads)
    texts = sources.read(asked.text, encoding=asked.encoding, notice=noticed(listener))
    run = run_folder.new(out, texts.name)
    if tokenizer_json:
        asked = dataclasses.replace(asked, tokenizer=str(run.tokenizer.absolute()))
        _require_utf8(asked)
    store.make_folder(run.path)
    every_key = frozenset(key for layer in (*layers, given) for key in layer)
    return Asked(run, asked, texts, every_key, tokenizer_json=tokenizer_json)


def _tell_of_a_preset(file: str, layer: dict[str, Any], given: dict[str, Any], asked: RunConfig, listener: Listener) -> None:
    """Say which keys of a preset that was named do not count, because the configuration file has others."""
    its_own = flatten(dataclasses.asdict(run_config({"preset": asked.preset})))
    chosen = flatten(dataclasses.asdict(asked))
    kept = [key for key in presets()[asked.preset] if key in layer and key not in given and chosen[key] != its_own[key]]
    if kept:
        names = ", ".join(map(flag, kept))
        told = f"{file} comes before --preset {asked.preset}: as the file has them, unless you name them too, are {names}"
        listener(Notice(told))


def _require_cores(threads: int | None) -> None:
    """Raise a ConfigError for threads that would do little but wait for each other, at every operation."""
    cores = os.cpu_count() or 1
    if threads is not None and threads > MOST_THREADS_A_CORE * cores:
        do = f"give {cores} or less, or leave it out"
        raise ConfigError(f"{threads} threads are too many", where="--threads", why=f"cores here: {cores}", do=do)


def _require_shape(shape: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise a ConfigError for a key that would make another model of the one to go on from, or another tokenizer."""
    if "tokenizer" in given:
        what, do = "a model goes on with its own tokenizer", "leave --tokenizer out"
        raise ConfigError(what, where="--tokenizer", why="its ids mean nothing in another", do=do)
    for key, value in shape.items():
        if key not in ADAPTABLE and run_config(shape, {key: given[key]}) != run_config(shape):
            raise ConfigError(
                "the model to go on from has another", where=flag(key), why=f"it is {value}", do="leave it out"
            )


def resumed(out: Path | None, config: str | Path | None, given: dict[str, Any]) -> Asked:
    """Return the recorded run with what may change on the way.

    Raises:
        ConfigError: No run is named, or something else than the length, the machine's keys and where its text is by now
            is given.
        NoInputError: There is no run; a fresh one is never begun instead.
    """
    if out is None:
        raise ConfigError("--resume needs --out", where="--resume", do="name the run's folder with --out")
    if config is not None:
        raise ConfigError("a resumed run has its own configuration", where="--config", do="leave --config out")
    run = run_folder.existing(out)
    recorded = _with_its_tokenizer(recorded_config(run), run)
    moved = _moved(given, recorded)
    given = {key: value for key, value in given.items() if not (key.startswith("text") or key in moved)}
    given = {key: value for key, value in given.items() if not (key in PLACES and _is_place(value, recorded.get(key)))}
    for key, value in given.items():
        if (
            key != "text_sha256"
            and key in key_types()
            and key not in RESUMABLE
            and run_config(recorded, {key: value}) != run_config(recorded)
        ):
            raise ConfigError(
                "a resumed run goes on with what it recorded",
                where=flag(key),
                do="leave it out, or begin a new run with another --out",
            )
    more_time, asked = given.get("for_s") is not None, run_config(recorded, given, moved)
    _require_utf8(asked)
    if "threads" in given:
        _require_cores(asked.threads)
    return Asked(run, asked, None, frozenset(key_types()), more_time=more_time, moved=bool(moved))


def _with_its_tokenizer(recorded: dict[str, Any], run: RunFolder) -> dict[str, Any]:
    """Return the keys with the place of the run's own tokenizer by now, where its folder was moved."""
    is_own = recorded.get("from_") not in (None, *NONES) and run.tokenizer.is_file()
    if not is_own or Path(str(recorded.get("tokenizer"))).is_file():
        return recorded
    return {**recorded, "tokenizer": str(run.tokenizer.absolute())}


def _moved(given: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """Return where a run's text and its held-out text are by now, if elsewhere: that they are the same is seen later."""
    text, val, was = given.get("text"), given.get("val"), {**recorded, "text": tuple(recorded.get("text", ()))}
    here: dict[str, Any] = {} if text is None else {"text": tuple(_absolute(text))}
    if isinstance(val, str) and val not in NONES and was.get("val") not in (None, *NONES):
        here["val"] = _absolute((val,))[0]
    return {key: place for key, place in here.items() if place != was.get(key)}


def _is_place(named: Any, recorded: Any) -> bool:
    """Whether a file is named that a run recorded, with all the folders that it is in."""
    return isinstance(named, str) and _absolute((named,))[0] == recorded


def recorded_config(run: RunFolder) -> dict[str, Any]:
    """Return the keys that a run recorded; one from before a key of `BEGINNING` began without, whatever its preset has."""
    return {**AS_DRAWN, **from_toml(read(run.config), str(run.config))}


def prepare(asked: Asked, listener: Listener, started_s: float | None = None) -> Corpus:
    """Return the prepared text of a run; the caller holds its lock.

    Args:
        asked: What the caller wants.
        listener: Told how far it is.
        started_s: When the process began, on `time.perf_counter()`; by default now.

    Raises:
        ConfigError: A text that takes longer than the time budget of a new run.
        DataError: Not the text that the configuration names by its hash, or too short for the context.
    """
    config = asked.config
    if asked.texts:
        run_folder.require_new(asked.run)  # another process may have begun here meanwhile
        if asked.tokenizer_json:
            store.write(asked.run.tokenizer, asked.tokenizer_json)
        within = _within(config, listener, time.perf_counter() if started_s is None else started_s)
        prepared = _prepare_anew(config, asked.texts, within)
    else:
        prepared = _prepare_again(asked, listener)
    n_held_out, context_length = prepared.val.n_tokens, config.model.context_length
    corpora.require_context(prepared.train, SHORTEST_CONTEXT if _is_free(asked) else context_length)
    if not n_held_out:
        listener(Notice("there is no held-out text: no held-out figures, and the last model counts as the best"))
    elif n_held_out < context_length:
        few = f"the held-out text has {n_held_out} tokens, less than one context of {context_length}"
        listener(Notice(f"{few}: its figures are rough"))
    return prepared


def _prepare_again(asked: Asked, listener: Listener) -> Corpus:
    """Return a resumed run's text: read again, or as it was prepared where the source is gone."""
    recorded = recorded_corpus(asked.run)
    try:
        if "-" in (*asked.config.text, asked.config.val):
            raise NoInputError("standard input cannot be read again", where="-")
        texts = sources.read(asked.config.text, encoding=asked.config.encoding, notice=noticed(listener))
        return _prepare_anew(asked.config, texts, listener, _n_ids(asked), recorded)
    except (NoInputError, ConfigError) as error:  # a text or a tokenizer's file is gone
        if asked.moved or recorded is None or not recorded.is_dir():
            raise _with_its_place(error, asked) from error
        listener(Notice(f"{error.where}: {error.what}; going on with the prepared text"))
        prepared = corpora.load(recorded)
        _require_unchanged(asked.config, recorded, prepared.text_sha256, prepared.folder)
        return prepared


def _require_unchanged(config: RunConfig, recorded: Path | None, text_sha256: str, folder: Path) -> None:
    """Raise a DataError for a text whose preparation would not be the recorded one, or that has another hash."""
    where = ", ".join(config.text) or "text"
    if recorded is not None and folder != recorded:
        raise DataError(
            "the text, its held-out part or its tokenizer changed since the run began",
            where=where,
            why=f"it is {folder.name[:12]} now, the run was made from {recorded.name[:12]}",
            do="restore it, or begin a new run",
        )
    if config.text_sha256 not in (None, text_sha256):
        raise DataError(
            "the text is not the one that the run was made from",
            where=where,
            why=f"its SHA-256 is {text_sha256[:12]}, recorded is {str(config.text_sha256)[:12]}",
            do="restore the text, or begin a new run",
        )


def _with_its_place(error: FirstwordsError, asked: Asked) -> FirstwordsError:
    """Return what says how to name the new place of a text: no other text is what the run needs, however near its name."""
    named = ["TEXT"] if error.where in asked.config.text else ["--val", "FILE"] if error.where == asked.config.val else []
    if asked.moved or not named:
        return error
    command = quoted("firstwords", "train", "--resume", "--out", str(asked.run.path), *named)
    do = f"put it there again, or say where it is: {command}"
    return type(error)(error.what, where=error.where, why=error.why, do=do)


def _n_ids(asked: Asked) -> int | None:
    """Return how many ids the tokenizer of a run has that goes on, as the rule for them was when it began; None: no rule."""
    if asked.config.tokenizer != "bpe":
        return None
    for folder in reversed(store.folders(asked.run.checkpoints, "")):
        with suppress(FirstwordsError):  # a damaged one is told of where it is gone on from
            found = tokenizers.read(folder / asked.run.tokenizer.name)
            return found.vocab_size - len(found.special)
    return asked.config.model.vocab_size - len(_special(asked.config))


def _within(config: RunConfig, listener: Listener, started_s: float) -> Listener:
    """Return the listener; where there is a time budget, one that refuses a text as soon as it is seen to be too large."""
    for_s = _time_budget(config)
    if for_s is None:
        return listener
    preparation = budget.Preparation(started_s, for_s)

    def heard(told: Told) -> None:
        listener(told)
        if isinstance(told, Preparing) and told.share is not None:
            took_s = preparation.too_long_s(time.perf_counter(), told.share)
            if took_s is not None:
                raise ConfigError(
                    "no time is left to learn",
                    where=flag("for_s"),
                    why=f"it takes about {took_s:.0f} s to prepare this text, and the run has {for_s:.0f} s",
                    do=f"give --for {math.ceil(2 * took_s / 60)}m or more, or a part of the text",
                )

    return heard


def _prepare_anew(
    config: RunConfig, texts: Texts, listener: Listener, n_ids: int | None = None, recorded: Path | None = None
) -> Corpus:
    notice = noticed(listener)
    val = None if config.val is None else sources.read([config.val], encoding=config.encoding, notice=notice)
    return corpora.prepare(
        texts,
        config.tokenizer,
        cache=cache_folder(),
        held_out=config.val_fraction if val is None else val,
        special=_special(config),
        n_ids=n_ids,
        check=functools.partial(_require_unchanged, config, recorded),
        notice=notice,
        progress=lambda what, share: listener(Preparing(what, share)),
    )


def _special(config: RunConfig) -> tuple[str, ...]:
    return tuple(filter(None, config.special_tokens.split(",")))


def recorded_corpus(run: RunFolder) -> Path | None:
    """Return the folder of a run's prepared text, which may be gone; None where none was recorded."""
    if not run.corpus.is_file():
        return None
    try:
        name = str(reading.read_json(run.corpus)["folder"])
        reading.require_plain_names([name], str(run.corpus))
        return cache_folder() / name
    except (DataError, KeyError) as error:
        raise DataError(
            "is damaged", where=str(run.corpus), why=str(error), do="remove it; the text is read again"
        ) from error


def settled(
    asked: Asked, prepared: Corpus, difficulty: float, repeated: float = 0.0, started_s: float | None = None
) -> tuple[RunConfig, Candidate]:
    """Return the configuration with everything decided that was left open, which the run records, and what to expect of it.

    Args:
        asked: What the caller wants.
        prepared: The text.
        difficulty: Of the text; see `planning.difficulty`.
        repeated: Of its sample; see `planning.facts`.
        started_s: When the process began, on `time.perf_counter()`; by default now.

    Raises:
        ConfigError: A vocabulary smaller than the tokenizer's, a missing device, a model beyond a processor's memory, or
            beyond the time budget of a new run.
    """
    from firstwords.planning import machine, plan, recipe

    started_s = time.perf_counter() if started_s is None else started_s
    config = _of_text(asked, prepared)
    device = machine.device(config.device)
    with machine.threads(config.threads):
        cache = cache_folder().parent
        precision = machine.precision(config.precision, device, cache)
        found = machine.known_of(device, cache)
        config = dataclasses.replace(config, precision=precision, device=str(device))
        tokens = plan_tokens(prepared, config.tokenizer, difficulty, repeated)
        here = plan.Machine(speed(device, precision, config, found), precision, on_gpu=device.type != "cpu")
        tokens = dataclasses.replace(tokens, start_s=time.perf_counter() - started_s + recipe.BEGIN_S)
        fitted = functools.partial(_fitted_to, asked, config, prepared)
        is_timed = device.type == "cpu" and config.compile != "on" and _time_budget(config) is not None
        if device.type == "cuda" or (is_timed and asked.texts is not None):  # all of a resumed run is decided
            _require_memory(fitted(tokens, here))  # before a step of it is tried
            here = _at_this_moment(here, functools.partial(fitted, tokens))
    tokens = dataclasses.replace(tokens, start_s=time.perf_counter() - started_s + recipe.BEGIN_S)
    here = dataclasses.replace(here, free_bytes=machine.free_bytes())
    config = fitted(tokens, here)
    corpora.require_context(prepared.train, config.model.context_length)
    model, batch_size = config.model, config.batch_size
    assert batch_size is not None
    of_file = asked.texts is not None and corpora.parse_tokenizer(config.tokenizer)[0] == "file"
    micro = config.micro_batch_size or cost.micro_batch_size(model, batch_size, machine.gpu_bytes(device), precision)
    _require_memory(config)
    config = dataclasses.replace(
        config,
        text=_absolute(config.text),
        val=None if config.val is None else _absolute((config.val,))[0],
        tokenizer=_absolute((config.tokenizer,))[0] if of_file else config.tokenizer,
        text_sha256=prepared.text_sha256,
        micro_batch_size=micro,
        eval_every=config.eval_every or (max(1, config.steps // EVALUATIONS) if config.steps else None),
        threads=config.threads or machine.usable_threads(),
    )
    config, expected = _expected(config, tokens, here, found)
    if asked.texts is not None:
        _require_time(expected)
    if expected.memory_bytes is None:
        return config, expected
    had_bytes = machine.peak_bytes() or 0  # more where a larger model was taken to measure the speed by
    return config, dataclasses.replace(expected, memory_bytes=max(expected.memory_bytes, had_bytes))


def _of_text(asked: Asked, prepared: Corpus) -> RunConfig:
    """Return what is asked, with as many ids as the text's tokenizer has.

    Raises:
        ConfigError: A vocabulary that is too small, or a best that no held-out text can tell.
    """
    config = asked.config
    if config.until == "best" and not prepared.val.n_tokens:
        do = "leave it out, or give a --val-fraction or --val"
        raise ConfigError("there is no held-out text to tell the best by", where="--until", do=do)
    if "model.vocab_size" not in asked.given:
        config = _with_model(config, vocab_size=prepared.tokenizer.vocab_size)
    if config.model.vocab_size < prepared.tokenizer.vocab_size:
        raise ConfigError(
            f"{config.model.vocab_size} is smaller than the tokenizer's {prepared.tokenizer.vocab_size} ids",
            where="--model.vocab-size",
            do="leave it out, or give at least that",
        )
    return config


def _require_memory(config: RunConfig) -> None:
    """Raise a ConfigError for what a processor's memory does not hold; that of a GPU is found out on the way."""
    from firstwords.planning import machine

    micro = config.micro_batch_size or cost.micro_batch_size(config.model, config.batch_size or 1)
    needed, there = cost.training_bytes(config.model, micro, config.precision), machine.memory_bytes()
    if config.on_cpu and there is not None and needed > there:
        raise ConfigError(
            f"training needs about {needed / 1e9:.1f} GB, this machine has {there / 1e9:.1f} GB",
            where="--model.emb-dim",
            do="take a smaller preset, --micro-batch-size or --model.context-length",
        )


def _expected(config: RunConfig, tokens: Tokens, here: Machine, found: known.Known) -> tuple[RunConfig, Candidate]:
    """Return the configuration with `compile` on or off, and what to expect of it.

    For `auto` it is on where what compiling saves is known or believed, and is worth it in so long a run.
    """
    from firstwords.planning import plan

    expected = plan.of_config(config, tokens, here)
    compiling = None if config.compile == "off" else _compiling(config, found, here.speed)
    if config.compile == "auto":
        learnt = expected.steps * expected.batch_size * config.model.context_length
        config = dataclasses.replace(config, compile="on" if compiling is not None and compiling.pays(learnt) else "off")
    if compiling is None or config.compile == "off":
        return config, expected
    share = min(MOST_SAVED_SHARE, compiling.saves_s * here.speed.tokens_per_s(config.model))
    tokens = dataclasses.replace(tokens, start_s=tokens.start_s + compiling.takes_s)
    return config, plan.of_config(config, tokens, dataclasses.replace(here, speed=here.speed.quicker(share)))


def _compiling(config: RunConfig, found: known.Known, speed: Speed) -> Compiling | None:
    """Return what compiling takes and saves: as it was measured for this shape, or is believed of a GPU; None: not known.

    Args:
        config: With a device and a precision.
        found: What was measured on this machine.
        speed: Of this machine, uncompiled.
    """
    import torch

    from firstwords.planning import machine

    measured = found.compiling.get(known.shape_of(config.model, config.precision))
    if measured is not None or not speed.points or not machine.compiles_for_gpu(torch.device(config.device)):
        return measured
    tokens_per_s = speed.tokens_per_s(config.model)
    share = tokens_per_s * cost.training_flops(config.model) / found.rates[config.precision]
    return known.believed(share, tokens_per_s)


def speed(device: torch.device, precision: Precision, config: RunConfig, found: known.Known) -> Speed:
    """Return how fast this machine learns: as `firstwords plan` measured it within a day, else guessed in milliseconds."""
    from firstwords.planning import machine
    from firstwords.planning import speed as speeds

    before = None if config.compile == "on" else found.speed(precision)
    return before or speeds.guessed(machine.flops_per_s(device, machine.DTYPES[precision]))


def _at_this_moment(here: Machine, fitted: Callable[[Machine], RunConfig]) -> Machine:
    """Return the machine as fast as some steps of what is to be trained show it: a fiftieth of the time.

    The first steps tell how much slower or faster everything is than it was. Where another size is the better one then, it
    is measured as well: what tells sizes apart is only about right. On a GPU another batch is another speed, too.
    """
    from firstwords.planning import measure

    def way(config: RunConfig) -> tuple[str, int | None]:
        return config.preset, None if config.on_cpu else config.batch_size

    measured = list[tuple[str, int | None]]()
    while way(config := fitted(here)) not in measured:
        point = measure.point_now(config, here.speed, min(PACE_S, PACE_SHARE * (_time_budget(config) or math.inf)))
        if point is not None:
            here = dataclasses.replace(here, speed=here.speed.now(point, others=not measured))
        measured.append(way(config))
    return here


def _time_budget(config: RunConfig) -> float | None:
    """Return the seconds that a run may take, or None where it counts steps or epochs."""
    return config.for_s or (DEFAULT_FOR_S if config.steps is None and config.epochs is None else None)


def plan_tokens(prepared: Corpus, tokenizer: str, difficulty: float, repeated: float) -> Tokens:
    """Return a prepared text as a plan sees it."""
    from firstwords.planning.plan import Tokens

    train = prepared.train
    name = "bpe" if tokenizer == "bpe" else prepared.tokenizer.name
    return Tokens(
        name, prepared.tokenizer.vocab_size, len(train.ids), train.n_bytes, prepared.val.n_tokens, difficulty, repeated
    )


def _is_free(asked: Asked) -> bool:
    """Whether the size is to be chosen: in a time budget of a new run, where neither a preset nor a part of one is named."""
    config, named = asked.config, any(key == "preset" or key.startswith(("model.", "optim.")) for key in asked.given)
    begins = asked.texts is not None and config.from_ is None
    return begins and not named and config.steps is None and config.epochs is None


def _chosen(config: RunConfig, asked: Asked, tokens: Tokens, here: Machine, n_tokens: int) -> RunConfig:
    """Return the configuration with the preset that is recommended, where the size is to be chosen."""
    from firstwords.planning import plan

    if not _is_free(asked):
        return config
    for_s = config.for_s or DEFAULT_FOR_S
    able = [preset for preset in plan.PRESETS if plan.can_learn(preset, n_tokens)]
    best = plan.recommended([plan.of_preset(tokens, preset, for_s, here) for preset in able])
    if best is None or best.preset == config.preset:
        return config
    other = run_config({"preset": best.preset, "model.vocab_size": config.model.vocab_size})
    return dataclasses.replace(config, preset=best.preset, model=other.model, optim=other.optim)


def _fitted_to(asked: Asked, config: RunConfig, prepared: Corpus, tokens: Tokens, here: Machine) -> RunConfig:
    """Return the configuration with all that follows from the text, the time and the machine's speed."""
    chosen = _chosen(config, asked, tokens, here, prepared.train.n_tokens)
    return _fitted(chosen, asked.given, tokens, here, prepared)


def _fitted(config: RunConfig, given: frozenset[str], tokens: Tokens, here: Machine, prepared: Corpus) -> RunConfig:
    """Return the configuration with what the run's length decides: batch, steps or time, dropout, and learning rate."""
    from firstwords.planning import recipe

    ring, context_length = tokens.training, config.model.context_length
    for_s = _time_budget(config)
    learnt = None if config.epochs is None else config.epochs * ring
    if for_s is not None:
        rate = here.speed.tokens_per_s(config.model)
        learnt = recipe.expected_tokens(for_s, rate, tokens.beside)
        if config.eval_tokens is None and "eval_tokens" not in given:  # a resumed run's figures stay of the same tokens
            config = dataclasses.replace(config, eval_tokens=recipe.eval_tokens(for_s, rate))
    micro = config.micro_batch_size or 1  # which fits into a batch whose size nobody named
    batch_size = config.batch_size or micro * max(1, round(recipe.batch_size(context_length, learnt, ring) / micro))
    config = dataclasses.replace(config, batch_size=batch_size, for_s=for_s)
    steps = config.steps if config.epochs is None else batches(config, prepared).steps(config.epochs)
    if steps is not None:
        learnt = steps * batch_size * context_length
    if learnt is not None and config.preset.startswith("laptop"):
        if "model.drop_rate" not in given:
            config = _with_model(config, drop_rate=recipe.drop_rate(learnt / ring, config.model.emb_dim))
        if "optim.peak_lr" not in given:
            peak_lr = recipe.peak_lr_share(learnt / ring) * config.optim.peak_lr
            config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, peak_lr=peak_lr))
    return dataclasses.replace(config, steps=steps, epochs=None)


def _require_time(expected: Candidate) -> None:
    """Raise a ConfigError for a model that is too large to learn anything within the time budget on this machine."""
    if not expected.has_time:
        least_s, for_s = expected.least_s, expected.elapsed_s
        raise ConfigError(
            "no time is left to learn",
            where=flag("for_s"),
            why=f"first steps and evaluations take about {least_s:.0f} s with this model, the run has {for_s:.0f} s",
            do=f"give --for {math.ceil(4 * least_s / 60)}m or more, or a smaller --preset",
        )


def _require_utf8(config: RunConfig) -> None:
    """Raise a DataError for a name or text that no configuration file can hold."""
    named = [*config.text, *filter(None, (config.val, config.from_)), config.tokenizer]
    recorded = _absolute([*config.text, *filter(None, (config.val,))])  # with the folder that they are in
    for name in (*named, *recorded, config.sample_prompt, config.special_tokens):
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            do = "rename the file, or send it to standard input: -"
            raise DataError("is not UTF-8", where=ascii(name), why="no configuration can hold it", do=do)


def _absolute(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path if path == "-" else str(Path(path).absolute()) for path in paths)


def _with_model(config: RunConfig, **values: Any) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **values))


def batches(config: RunConfig, prepared: Corpus) -> Batches:
    """Return the batches of a run."""
    from firstwords.text.batches import Batches

    assert config.batch_size is not None
    return Batches(prepared.train, config.model.context_length, config.batch_size, config.seed, shift=config.shift_windows)


def fit_config(config: RunConfig) -> FitConfig:
    """Return what the loop needs of a settled configuration."""
    from firstwords.planning import machine
    from firstwords.training.loop import FitConfig

    assert config.micro_batch_size is not None
    return FitConfig(
        config.optim,
        config.seed,
        config.micro_batch_size,
        config.sample_every,
        config.save_every_s,
        machine.DTYPES[config.precision],
        compiled=config.compile == "on",
    )


def identity(config: RunConfig, prepared: Corpus) -> dict[str, str]:
    """Return the hashes that tell a run from others: with equal ones a checkpoint goes on in the same way, step for step."""
    free = RESUMABLE | UNTRAINED | BEGINNING
    fixed = {key: value for key, value in flatten(dataclasses.asdict(config)).items() if key not in free}
    return {
        "config_sha256": store.sha256(store.canonical_json(fixed)),
        "corpus_sha256": prepared.folder.name,
        "tokenizer_sha256": store.sha256(prepared.tokenizer.json),
    }


def cache_folder() -> Path:
    """Return where prepared texts are kept: `FIRSTWORDS_CACHE`, or the user's cache folder."""
    given = os.environ.get("FIRSTWORDS_CACHE")
    return (Path(given) if given else platformdirs.user_cache_path("firstwords")) / "corpora"


def noticed(listener: Listener) -> Callable[[str], None]:
    """Return a function that tells a listener a line for a person."""
    return lambda line: listener(Notice(line))


def read(path: Path) -> str:
    """Return the text of a configuration file.

    Raises:
        NoInputError, DataError: It is not there, or cannot be read.
    """
    if not path.exists():
        raise NoInputError("no such file", where=str(path), do="check the name")
    try:
        return reading.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise DataError("cannot be read", where=str(path), why=str(error)) from error
