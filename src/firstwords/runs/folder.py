"""The run folder: the name of everything in it, and who may write there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstwords import reading, store
from firstwords.config_file import read_toml
from firstwords.errors import CannotCreateError, DataError, FirstwordsError, NoInputError, Notify, ignore_line
from firstwords.runs.journal import Journal
from firstwords.text import corpus as corpora

LOCK = "run.lock"


@dataclass(frozen=True)
class RunFolder:
    """A run on disk."""

    path: Path

    @property
    def name(self) -> str:
        """What the run is called: the folder's own name, also where the path is `.`."""
        return self.path.absolute().name

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def corpus(self) -> Path:
        """Which prepared text."""
        return self.path / "corpus.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of a run that makes none: a file's, or that of the model that it goes on from."""
        return self.path / "tokenizer.json"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Journal:
        """What happened."""
        return Journal(self.path / "metrics.jsonl")

    @property
    def samples(self) -> Journal:
        """What the model said during training."""
        return Journal(self.path / "samples.jsonl")

    @property
    def report(self) -> Path:
        """The page that shows what it learnt."""
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        """What a process holds that writes here."""
        return self.path / LOCK

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config.is_file()

    @property
    def was_saved(self) -> bool:
        """Whether it had a checkpoint, there or not by now.

        Raises:
            DataError: Its journal cannot be read.
        """
        return any(line["event"] == "save" for line in self.metrics.lines())

    def recorded_config(self) -> dict[str, Any]:
        """Return the keys that it recorded.

        Raises:
            FirstwordsError: As `config_file.read_toml`.
        """
        return read_toml(self.config)

    def recorded_corpus(self) -> Path | None:
        """Return the folder of its prepared text, which may be gone; None where none was recorded.

        Raises:
            DataError: The record is damaged.
        """
        if not self.corpus.is_file():
            return None
        try:
            name = str(reading.read_json(self.corpus)["folder"])
            reading.require_plain_names([name], str(self.corpus))
        except (DataError, KeyError) as error:
            do = "remove it; the text is read again"
            raise DataError("is damaged", where=str(self.corpus), why=str(error), do=do) from error
        return corpora.cache_folder() / name

    @contextmanager
    def writing(self, notice: Notify = ignore_line) -> Iterator[None]:
        """Hold the run's lock, having removed what a killed process left half-written.

        Args:
            notice: Told what could not be removed, which hinders no run, and where there are no locks.

        Raises:
            CannotCreateError: Another process trains here, or no folder can be made.
        """
        store.make_folder(self.path)
        with store.lock(self.lock, notice):
            store.make_folder(self.checkpoints)
            for folder in (self.path, self.checkpoints):
                try:
                    store.remove_leftovers(folder)
                except FirstwordsError as error:
                    notice(f"what was left half-written stays: {error}")
            yield


def new(out: Path | None, name: str) -> RunFolder:
    """Return the folder for a new run: `out`, or `runs/<name>`, numbered if taken. An empty folder is free.

    Raises:
        CannotCreateError: `out` holds a run or other files, or is no folder.
    """
    if out is not None:
        if store.exists(out) and not out.is_dir():
            raise CannotCreateError("is a file, not a folder", where=str(out), do="give another --out")
        run = RunFolder(out)
        require_new(run)
        if not _is_free(out):
            raise CannotCreateError("is not empty and holds no run", where=str(out), do="give another --out")
        return run
    for number in itertools.count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if _is_free(path) and not store.is_locked(path / LOCK):  # by another process, whose run begins there
            break
    return RunFolder(path)


def _is_free(path: Path) -> bool:
    """Whether nothing is there but what a start leaves behind that was refused or killed before there was a run."""
    return not path.exists() or (path.is_dir() and all(map(_is_of_no_run, path.iterdir())))


def _is_of_no_run(path: Path) -> bool:
    run = RunFolder(path.parent)
    if path == run.checkpoints:
        return path.is_dir() and not any(path.iterdir())
    written = (run.config.name, run.corpus.name, run.tokenizer.name, store.PROBE)
    half_written = tuple(f"{store.TEMPORARY}{name}-" for name in written)
    if path.name in (
        run.corpus.name,
        run.tokenizer.name,
    ):  # a person may have files of these names; ours come after the lock
        return (path.parent / LOCK).is_file()
    return path.name == LOCK or path.name.startswith(half_written)


def require_new(run: RunFolder) -> None:
    """Raise a CannotCreateError where a run was begun already."""
    if run.exists:
        raise CannotCreateError("holds another run", where=str(run.path), do="go on with --resume, or give another --out")


def existing(path: Path) -> RunFolder:
    """Return the run in `path`.

    Raises:
        NoInputError: There is none.
    """
    run = RunFolder(path)
    if not run.exists:
        near = reading.nearest(path, lambda other: RunFolder(other).exists)
        do = f"did you mean {near}?" if near else "check the name"
        raise NoInputError("there is no run", where=str(path), why="no config.toml in it", do=do)
    return run
