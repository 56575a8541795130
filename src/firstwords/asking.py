"""What the caller wants of a run, new or to go on, before its text and the machine are looked at. Needs no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstwords import reading, store
from firstwords.config import NONES, Role, RunConfig, convert, flag, flatten, key_types, keys_of, run_config
from firstwords.config_file import read_toml
from firstwords.errors import ConfigError, DataError
from firstwords.events import Listener, Notice, notices_to
from firstwords.presets import presets
from firstwords.runs import folder as run_folder
from firstwords.runs.folder import RunFolder
from firstwords.text import corpus as corpora
from firstwords.text import sources
from firstwords.text import tokenizer as tokenizers
from firstwords.text.sources import Texts

MOST_THREADS_A_CORE = 8
# How a model that has learnt already is trained, where no preset is named: in smaller steps than one that begins.
FINE_TUNING = {"optim.kind": "adamw", "optim.peak_lr": 5e-4, "optim.weight_decay": 0.1}


@dataclass(frozen=True)
class Asked:
    """What the caller wants, before the text and the machine are looked at."""

    run: RunFolder
    config: RunConfig
    texts: Texts | None  # None: what a resumed run recorded
    given: frozenset[str]  # the keys that were named; nothing is decided for them
    more_time: bool = False  # a resumed run is given a new time budget
    moved: frozenset[str] = frozenset()  # and what of text and val is elsewhere by now
    was_on_gpu: bool = False  # and it learned on a GPU so far
    tokenizer_json: bytes = b""  # of a new run that makes none: a file's, or that of the model to go on from

    @property
    def begins(self) -> bool:
        """Whether the run is a new one."""
        return self.texts is not None

    @property
    def is_free(self) -> bool:
        """Whether the size is to be chosen: in a time budget of a new run, where no preset and no part of one is named."""
        named = any(key == "preset" or key.startswith(("model.", "optim.")) for key in self.given)
        is_timed = self.config.steps is None and self.config.epochs is None
        return self.begins and self.config.from_ is None and not named and is_timed


def new(
    out: Path | None,
    config_file: str | Path | None,
    given: dict[str, Any],
    describe: Callable[[str], tuple[dict[str, Any], bytes]],
    listener: Listener,
) -> Asked:
    """Return what is asked of a new run; its folder is made, with nothing in it.

    Args:
        out: The run folder, or None for one by the text's name.
        config_file: A TOML file of keys.
        given: Keys that override it.
        describe: Returns the shape and the tokenizer's file of a model to go on from.
        listener: Told what is worth knowing.

    Raises:
        FirstwordsError: An impossible configuration, no such text, a taken folder.
    """
    file = (
        {} if config_file is None else _with_its_tokenizer(read_toml(Path(config_file)), RunFolder(Path(config_file).parent))
    )
    config = run_config(file, given)
    if "text_sha256" in file and keys_of(Role.TEXT) & given.keys():  # a run's own, which counted other words
        file.pop("model.vocab_size", None)
        config = run_config(file, given)
    _require_sense(config, given, out)
    tokenizer_json = b"" if config.from_ is not None else _tokenizer_file(config.tokenizer)
    texts = sources.read(config.text, encoding=config.encoding, notice=notices_to(listener))
    run = run_folder.new(out, texts.name)
    if config.from_ is not None:  # last, for it may be fetched
        shape, tokenizer_json = describe(config.from_)
        given = _of_model(config, file, given, shape, tokenizer_json)
        if "preset" in given:
            listener(Notice(f"the model is that of {config.from_}: --preset {config.preset} says only how it is trained"))
        elif "preset" not in file:
            file = {**FINE_TUNING, **file}
        config = run_config(file, given)
        run = run if out is not None else run_folder.new(None, texts.name)  # another process may have taken it meanwhile
    elif "preset" in given:
        _tell_of_a_preset(str(config_file), file, given, config, listener)
    return _in_its_folder(Asked(run, config, texts, frozenset(file.keys() | given.keys()), tokenizer_json=tokenizer_json))


def elsewhere(asked: Asked) -> Asked:
    """Return what is asked of a new run with another folder by its text's name; standard input cannot be read again."""
    assert asked.texts is not None
    return _in_its_folder(dataclasses.replace(asked, run=run_folder.new(None, asked.texts.name)))


def _in_its_folder(asked: Asked) -> Asked:
    """Return what is asked with the place that its tokenizer will have, and make the folder."""
    if asked.tokenizer_json:
        config = dataclasses.replace(asked.config, tokenizer=str(asked.run.tokenizer.absolute()))
        _require_utf8(config)
        asked = dataclasses.replace(asked, config=config)
    store.make_folder(asked.run.path)
    return asked


def _of_model(
    config: RunConfig, file: dict[str, Any], given: dict[str, Any], shape: dict[str, Any], tokenizer_json: bytes
) -> dict[str, Any]:
    """Return the given keys with the shape of the model to go on from, where `file` or they do not adapt it."""
    assert config.from_ is not None
    enlarged = tokenizers.from_json(tokenizer_json, config.from_).with_special(config.special)
    shape = {**shape, "model.vocab_size": max(shape["model.vocab_size"], enlarged.vocab_size)}
    shape = {key: value for key, value in shape.items() if key not in keys_of(Role.ADAPTABLE) & file.keys()}
    place = str(Path(config.from_).absolute()) if Path(config.from_).exists() else config.from_
    given = {**shape, **given, "from_": place}
    _require_shape(shape, given)
    return given


def _tokenizer_file(name: str) -> bytes:
    """Return the content of a tokenizer that is a file, which a run keeps; empty for another."""
    if corpora.parse_tokenizer(name)[0] != "file":
        return b""
    content = reading.read_bytes(Path(name), reading.MOST_TOKENIZER_BYTES)
    tokenizers.require_apart(tokenizers.from_json(content, name), name)  # refused by the name that the person gave it
    return content


def _tell_of_a_preset(
    file: str, layer: dict[str, Any], given: dict[str, Any], config: RunConfig, listener: Listener
) -> None:
    """Say which keys of a preset that was named do not count, because the configuration file has others."""
    its_own = flatten(dataclasses.asdict(run_config({"preset": config.preset})))
    chosen = flatten(dataclasses.asdict(config))
    kept = [key for key in presets()[config.preset] if key in layer and key not in given and chosen[key] != its_own[key]]
    if kept:
        names = ", ".join(map(flag, kept))
        told = f"{file} comes before --preset {config.preset}: as the file has them, unless you name them too, are {names}"
        listener(Notice(told))


def _require_sense(config: RunConfig, given: dict[str, Any], out: Path | None) -> None:
    """Raise for what can be seen to be wrong with a new run before its text is read."""
    _require_utf8(config, *(() if out is None else (str(out),)))
    if [*config.text, config.val].count("-") > 1:
        raise ConfigError("standard input can be read only once", where="-", do="name a file")
    if config.val is not None and given.get("val_fraction") is not None and config.val_fraction > 0:
        what, do = "a held-out text is named as well", "give one of them; --val none leaves out a file's"
        raise ConfigError(what, where="--val-fraction", why=f"it is --val {config.val}", do=do)
    if config.until == "best" and config.val is None and config.val_fraction == 0:
        raise no_best()
    _require_cores(config.threads)
    tokenizers.byte_tokenizer().with_special(config.special)  # what is wrong with them in any tokenizer


def no_best() -> ConfigError:
    """Return what is wrong with stopping at the best where nothing tells which that is."""
    do = "leave it out, or give a --val-fraction or --val"
    return ConfigError("there is no held-out text to tell the best by", where="--until", do=do)


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
        if key not in keys_of(Role.ADAPTABLE) and run_config(shape, {key: given[key]}) != run_config(shape):
            raise ConfigError(
                "the model to go on from has another", where=flag(key), why=f"it is {value}", do="leave it out"
            )


def resumed(out: Path | None, config_file: str | Path | None, given: dict[str, Any]) -> Asked:
    """Return the recorded run with what may change on the way.

    Raises:
        ConfigError: No run is named, or something else than the length, the machine's keys and where its text is by now
            is given.
        NoInputError: There is no run; a fresh one is never begun instead.
    """
    if out is None:
        raise ConfigError("--resume needs --out", where="--resume", do="name the run's folder with --out")
    if config_file is not None:
        raise ConfigError("a resumed run has its own configuration", where="--config", do="leave --config out")
    run = run_folder.existing(out)
    recorded = _with_its_tokenizer(run.recorded_config(), run)
    moved = _moved(given, recorded)
    given = {key: value for key, value in given.items() if not (key.startswith("text") or key in moved)}
    same = {key for key in keys_of(Role.PLACE) & given.keys() if _is_the_file(given[key], recorded.get(key))}
    given = {key: value for key, value in given.items() if key not in same}
    for key, value in given.items():
        if key in key_types() and key not in keys_of(Role.RESUMABLE) and _is_another(key, value, recorded):
            raise ConfigError(
                "a resumed run goes on with what it recorded",
                where=flag(key),
                do="leave it out, or begin a new run with another --out",
            )
    more_time, config = given.get("for_s") is not None, run_config(recorded, given, moved)
    _require_utf8(config)
    if "threads" in given:
        _require_cores(config.threads)
    named = frozenset(key_types()) - ({"micro_batch_size", "precision", "compile"} - given.keys())  # decided on the device
    was_on_gpu = not run_config(recorded).on_cpu
    return Asked(run, config, None, named, more_time=more_time, moved=frozenset(moved), was_on_gpu=was_on_gpu)


def _is_another(key: str, value: Any, recorded: dict[str, Any]) -> bool:
    """Whether a value is not the one that a run recorded."""
    return bool(convert(key, value, key_types()[key]) != flatten(dataclasses.asdict(run_config(recorded)))[key])


def _with_its_tokenizer(recorded: dict[str, Any], run: RunFolder) -> dict[str, Any]:
    """Return the keys with the place of the run's own tokenizer by now: another run may be where its folder was."""
    recorded_place = Path(str(recorded.get("tokenizer")))
    is_of_a_run = "text_sha256" in recorded and run.checkpoints.is_dir()  # and not a copy of its file elsewhere
    if recorded_place.name != run.tokenizer.name or not run.tokenizer.is_file():
        return recorded
    if recorded_place.is_file() and not is_of_a_run:
        return recorded
    return {**recorded, "tokenizer": str(run.tokenizer.absolute())}


def _moved(given: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """Return where a run's text and its held-out text are by now, if elsewhere: that they are the same is seen later."""
    text, val, was = given.get("text"), given.get("val"), {**recorded, "text": tuple(recorded.get("text", ()))}
    here: dict[str, Any] = {} if text is None else {"text": tuple(absolute(text))}
    if isinstance(val, str) and val not in NONES and was.get("val") not in (None, *NONES):
        here["val"] = absolute((val,))[0]
    return {key: place for key, place in here.items() if place != was.get(key)}


def _is_the_file(named: Any, recorded: Any) -> bool:
    """Whether a file is named that a run recorded, with all the folders that it is in, or that it keeps a copy of."""
    if not (isinstance(named, str) and isinstance(recorded, str)):
        return False
    here, there = Path(named).absolute(), Path(recorded)
    return here == there or (here.is_file() and there.is_file() and store.file_sha256(here) == store.file_sha256(there))


def _require_utf8(config: RunConfig, *more: str) -> None:
    """Raise a DataError for a name or text, of the configuration or more, that no configuration file can hold."""
    named = [*config.text, *filter(None, (config.val, config.from_)), config.tokenizer]
    recorded = absolute([*config.text, *filter(None, (config.val,))])  # with the folder that they are in
    said = (config.sample_prompt, config.special_tokens)
    for name in (*said, *named, *recorded, *more):
        if not reading.is_utf8(name):
            do = "write it in UTF-8" if name in said else "rename the file, or send it to standard input: -"
            do = "give another --out" if name in more else do
            raise DataError("is not UTF-8", where=ascii(name), why="no configuration can hold it", do=do)


def absolute(paths: Sequence[str]) -> tuple[str, ...]:
    """Return paths with the folders that they are in; `-` is none."""
    return tuple(path if path == "-" else str(Path(path).absolute()) for path in paths)
