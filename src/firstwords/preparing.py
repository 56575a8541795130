"""The text of a run: prepared for one that begins, and the very same again for one that goes on. Needs no torch."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from firstwords import store
from firstwords.asking import Asked
from firstwords.config import RunConfig, flag
from firstwords.errors import ConfigError, DataError, FirstwordsError, NoInputError, quoted
from firstwords.events import Listener, Notice, Preparing, Told, notices_to
from firstwords.planning import budget
from firstwords.presets import SHORTEST_CONTEXT
from firstwords.runs import folder as run_folder
from firstwords.text import corpus as corpora
from firstwords.text import sources
from firstwords.text import tokenizer as tokenizers
from firstwords.text.corpus import READING, Corpus
from firstwords.text.sources import Texts
from firstwords.text.tokenizer import Tokenizer


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
        prepared = _prepare_anew(config, asked.texts, within, functools.partial(_require_unchanged, config, None))
    else:
        prepared = _prepare_again(asked, listener)
    corpora.require_context(prepared.train, SHORTEST_CONTEXT if asked.is_free else config.model.context_length)
    if not prepared.val.n_tokens:
        listener(Notice("there is no held-out text: no held-out figures, and the last model counts as the best"))
    return prepared


def tell_of_few(prepared: Corpus, context_length: int, listener: Listener) -> None:
    """Say that there is less held-out text than a model sees at once, where there is."""
    if 0 < prepared.val.n_tokens < context_length:
        few = f"the held-out text has {prepared.val.n_tokens} tokens, less than one context of {context_length}"
        listener(Notice(f"{few}: its figures are rough"))


def _prepare_again(asked: Asked, listener: Listener) -> Corpus:
    """Return a resumed run's text: read again, or as it was prepared where the source is gone."""
    recorded, found_sha256 = asked.run.recorded_corpus(), ""
    if not asked.config.text and asked.config.val is None and recorded is not None and corpora.is_there(recorded):
        with suppress(DataError):  # what is damaged is prepared again, as any text is
            return _as_prepared(asked.config, recorded)  # the built-in text: each Python has its own
    try:
        if "-" in (*asked.config.text, asked.config.val):
            raise NoInputError("standard input cannot be read again", where="-")
        texts = sources.read(asked.config.text, encoding=asked.config.encoding, notice=notices_to(listener))

        def check(text_sha256: str, folder: Path) -> None:
            nonlocal found_sha256
            found_sha256 = text_sha256
            _require_unchanged(asked.config, recorded, text_sha256, folder, may_go=not asked.moved)

        return _prepare_anew(asked.config, texts, listener, check, _became(asked))
    except (NoInputError, ConfigError) as error:  # a text or a tokenizer's file is gone
        if asked.moved or recorded is None or not corpora.is_there(recorded):
            raise _with_its_place(error, asked) from error
        listener(Notice(f"{error.where}: {error.what}; going on with the prepared text"))
        return _as_prepared(asked.config, recorded)
    except DataError as error:
        if asked.moved or recorded is None or not corpora.is_there(recorded):
            raise
        if not found_sha256:  # a file of the text cannot be read any more
            do = f"restore it; or {_move_away(asked.config)}"
            raise DataError(error.what, where=error.where, why=error.why, do=do) from error
        by_text_alone = asked.config.val is None and corpora.parse_tokenizer(asked.config.tokenizer)[0] != "file"
        if not by_text_alone or found_sha256 != asked.config.text_sha256:
            raise
        return _as_prepared(asked.config, recorded)  # the same text, which was cut otherwise when the run began


def _as_prepared(config: RunConfig, recorded: Path) -> Corpus:
    prepared = corpora.load(recorded)
    _require_unchanged(config, recorded, prepared.text_sha256, prepared.folder)
    return prepared


def _require_unchanged(
    config: RunConfig, recorded: Path | None, text_sha256: str, folder: Path, *, may_go: bool = False
) -> None:
    """Raise a DataError for a text whose preparation would not be the recorded one, or that has another hash.

    Args:
        config: Of the run.
        recorded: The folder of its prepared text; None: a new run has none.
        text_sha256: Of the text by now.
        folder: Of the text as it would be prepared by now.
        may_go: Whether the run would go on with what was prepared if the text were not there.
    """
    where = ", ".join(config.text) or "the built-in text"
    python_s = "each version of Python has its own: go on with the one that the run began with, or begin a new run"
    if recorded is not None and folder != recorded:
        do = "restore it, or begin a new run"
        if not config.text and config.val is None:
            do = python_s
        elif may_go and corpora.is_there(recorded):
            do += f"; or {_move_away(config)}"
        raise DataError(
            "the text, its held-out part or its tokenizer changed since the run began",
            where=where,
            why=f"it is {folder.name[:12]} now, the run was made from {recorded.name[:12]}",
            do=do,
        )
    if config.text_sha256 not in (None, text_sha256):
        do = "restore the text, or begin a new run" if config.text else python_s
        if config.text and recorded is None:  # one begins
            do = "restore the text; or take it as it is now: firstwords train TEXT --config FILE"
        raise DataError(
            "the text is not the one that the run was made from",
            where=where,
            why=f"its SHA-256 is {text_sha256[:12]}, recorded is {str(config.text_sha256)[:12]}",
            do=do,
        )


def _move_away(config: RunConfig) -> str:
    names = ", ".join((*config.text, *([config.val] if config.val else [])))
    return f"move away {names}: the run then goes on with the text as it was prepared"


def _with_its_place(error: FirstwordsError, asked: Asked) -> FirstwordsError:
    """Return what says how to name the new place of a text: no other text is what the run needs, however near its name."""
    if error.where in asked.config.text and "text" not in asked.moved:
        named = ["TEXT", *(["--val", str(asked.config.val)] if "val" in asked.moved else [])]
    elif error.where == asked.config.val and "val" not in asked.moved:
        named = [*(asked.config.text if "text" in asked.moved else ()), "--val", "FILE"]
    else:
        return error
    command = quoted("firstwords", "train", "--resume", "--out", str(asked.run.path), *named)
    do = f"put it there again, or say where it is: {command}"
    return type(error)(error.what, where=error.where, why=error.why, do=do)


def _became(asked: Asked) -> Tokenizer | int | None:
    """Return the tokenizer of a run that goes on, from its checkpoints; where none is there, how many ids a `bpe` had."""
    for folder in reversed(store.folders(asked.run.checkpoints, "")):
        with suppress(FirstwordsError):  # a damaged one is told of where it is gone on from
            return tokenizers.read(folder / asked.run.tokenizer.name)
    return asked.config.model.vocab_size - len(asked.config.special) if asked.config.tokenizer == "bpe" else None


def _within(config: RunConfig, listener: Listener, started_s: float) -> Listener:
    """Return the listener; where there is a time budget, one that refuses a text as soon as it is seen to be too large."""
    for_s = config.budget_s
    if for_s is None:
        return listener
    preparation = budget.Preparation(started_s, for_s)

    def heard(told: Told) -> None:
        listener(told)
        if isinstance(told, Preparing) and told.share is not None:
            took_s = preparation.too_long_s(time.perf_counter(), told.share)
            if took_s is not None:
                once = told.what == READING  # the first pass of several
                raise ConfigError(
                    "no time is left to learn",
                    where=flag("for_s"),
                    why=f"it takes about {took_s:.0f} s to {'read this text once' if once else 'prepare this text'},"
                    f" and the run has {for_s:.0f} s",
                    do=f"give {'far more time' if once else f'--for {math.ceil(2 * took_s / 60)}m or more'},"
                    " or a part of the text",
                )

    return heard


def _prepare_anew(
    config: RunConfig,
    texts: Texts,
    listener: Listener,
    check: Callable[[str, Path], None],
    became: Tokenizer | int | None = None,
) -> Corpus:
    notice = notices_to(listener)
    val = None if config.val is None else sources.read([config.val], encoding=config.encoding, notice=notice)
    return corpora.prepare(
        texts,
        config.tokenizer,
        cache=corpora.cache_folder(),
        held_out=config.val_fraction if val is None else val,
        special=config.special,
        became=became,
        check=check,
        notice=notice,
        progress=lambda what, share: listener(Preparing(what, share)),
    )
