"""A disk that fails, for a moment or for good, costs neither a checkpoint that is there nor, for a moment, the run."""

from __future__ import annotations

import errno
import functools
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import FAULTS, STEPS, End, Failing, end, train
from firstwords import recorder, store
from firstwords.errors import CannotCreateError, FirstwordsError, PermissionDeniedError, StorageError
from firstwords.events import Notice, Saved, Started, Told
from firstwords.runs import checkpoint
from firstwords.runs.folder import RunFolder
from firstwords.training.events import StepDone

REFUSED = (StorageError, PermissionDeniedError, CannotCreateError)  # exit codes 74, 77, 73
TENSORS = {"a": torch.arange(300.0), "b": torch.ones(2, 3)}
SAMPLE = 3  # of the operations of a run
JOURNAL_CALLS = (1, 2, 3, 4, 20, 21, 22)  # of opening, writing, syncing and closing the journals
RUN = {"config_sha256": "1"}


def each_fault(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with each error, once and for ever."""
    name = errno.errorcode.get
    kinds = pytest.mark.parametrize("number", FAULTS, ids=lambda number: name(number, "short write"))
    return kinds(pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])(test))


def says_what_to_do(error: FirstwordsError) -> bool:
    return isinstance(error, REFUSED) and all((error.what, error.where, error.why, error.do))


def error_of(act: Callable[[], object]) -> FirstwordsError | None:
    """Return the error for a person that `act` ends with; any other comes out."""
    try:
        act()
    except FirstwordsError as error:
        return error
    return None


def save(parent: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.save(parent, step, TENSORS, TENSORS, {"state.json": {"step": step}, "config.json": {}}, b"{}", RUN)


def save_and_rotate(parent: Path) -> None:
    checkpoint.rotate(save(parent, 3), keep=2, best_step=None)


def steps(parent: Path) -> list[int]:
    """Return the steps whose checkpoints are there; each must be whole."""
    return [int(store.verify(folder)["step"]) for folder in checkpoint.existing(parent)]


def n_open_files() -> int:
    descriptors = Path("/proc/self/fd")  # of Linux
    return len(list(descriptors.iterdir())) if descriptors.is_dir() else 0


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob(f"{store.TEMPORARY}*"))


@pytest.mark.technique("R5")
@each_fault
def test_whichever_operation_of_a_save_fails_the_checkpoints_before_stay_and_the_next_save_succeeds(
    ram: Path, number: int, for_ever: bool, proved: Callable[..., None]
) -> None:
    save(ram, 1)
    save(ram, 2)
    n, system = 0, Failing(1, number)
    open_files = n_open_files()
    while system.failed or n == 0:
        n, system = n + 1, Failing(n + 1, number, for_ever=for_ever)
        with pytest.MonkeyPatch.context() as patch:
            system.install(patch)
            error = error_of(lambda: save_and_rotate(ram))
        assert error is None or (system.failed and says_what_to_do(error)), error
        assert 2 in steps(ram)
        assert checkpoint.newest(ram, pytest.fail, RUN).step in (2, 3)  # type: ignore[union-attr]
        store.remove_leftovers(ram)
        save_and_rotate(ram)
        assert steps(ram) == [2, 3]
        assert not leftovers(ram)
        store.remove_folder(ram / "step-00000003")
        save(ram, 1)
    assert n_open_files() <= open_files  # fewer where something of before was collected meanwhile
    assert n >= 10  # nine writes, or many more operations
    proved(n - 1)


def is_part_of(lines: list[dict[str, Any]], whole: list[dict[str, Any]]) -> bool:
    """Whether `lines` are those of `whole` in their order, less some that could not be written."""
    rest = iter(whole)
    return all(line in rest for line in lines)


def differences(found: End, expected: End, saved: list[int]) -> list[Any]:
    """Return where a run came to something else, less what the disk refused: lines of the journal, or the best."""
    differing = [pair for pair in [(found.last, expected.last)] if pair[0] != pair[1]]
    if found.best != expected.best and expected.best[0] in saved:
        differing.append((found.best, expected.best))
    return differing + ([] if is_part_of(found.journal, expected.journal) else [found.journal])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> End:
    """What the run comes to on a disk that works."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTWORDS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return end(train(tmp_path_factory.mktemp("undisturbed") / "home"))


class Tried:
    """A run on a failing disk: what came of it, and what it had announced."""

    def __init__(self, home: Path, system: Failing, *, report: bool = True) -> None:
        self.home, self.run = home, RunFolder(home / "run")
        self.told: list[Told] = []
        self.end: End | None = None
        self.error: FirstwordsError | None = None
        with pytest.MonkeyPatch.context() as patch:
            system.install(patch)
            try:
                result = train(home, listener=self.told.append, report=report)
            except FirstwordsError as error:
                self.error = error
                return
        self.end = end(result)

    @property
    def started(self) -> bool:
        return any(isinstance(told, Started) for told in self.told)

    @property
    def saved(self) -> list[int]:
        return [told.step for told in self.told if isinstance(told, Saved)]

    def check(self, expected: End, *, for_ever: bool) -> None:
        """Raise an AssertionError where a failing disk cost more than it must."""
        if self.error is None:
            assert self.end is not None
            assert not differences(self.end, expected, self.saved)
        else:
            assert says_what_to_do(self.error), self.error.as_dict()
            assert for_ever or not self.started, f"one failure ended the run: {self.error}"
            refused = sum(isinstance(told, Notice) and "next save tries again" in told.text for told in self.told)
            assert refused == (recorder.MOST_FAILED_SAVES - 1 if self.started else 0)
        there = steps(self.run.checkpoints) if self.run.checkpoints.is_dir() else []
        if self.saved:
            assert self.saved[-1] in there
        again = train(self.home, resume=self.run.exists, listener=self.told.append)
        assert not differences(end(again), expected, self.saved)
        assert not leftovers(self.run.path)


@pytest.mark.system
@pytest.mark.technique("R5")
@each_fault
def test_a_disk_that_fails_at_any_operation_of_a_run_costs_no_checkpoint_and_the_run_goes_on_to_the_same_end(
    ram: Path, expected: End, number: int, for_ever: bool, full: bool, proved: Callable[..., None]
) -> None:
    system = Failing(1 << 30, number)
    Tried(ram / "counted", system).check(expected, for_ever=False)
    chosen = range(1, system.count + 1)
    if not full:
        chosen = sorted(random.Random(f"{number} {for_ever}").sample(chosen, SAMPLE))
    for n in chosen:
        tried = Tried(ram / "home", Failing(n, number, for_ever=for_ever))
        tried.check(expected, for_ever=for_ever)
        shutil.rmtree(ram / "home")
    proved(len(chosen))


class FailingJournals(Failing):
    """A disk on which only the journals cannot be written."""

    def __init__(self, n: int, number: int, *, for_ever: bool = False) -> None:
        super().__init__(n, number, for_ever=for_ever)
        self.descriptors: set[int] = set()

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        is_open = name == "open" and str(args[0]).endswith(".jsonl")
        if not is_open and (not args or args[0] not in self.descriptors):
            return real(*args)
        if name == "close":
            self.descriptors.discard(args[0])
        answer = super().call(name, real, *args)
        if is_open:
            self.descriptors.add(answer)
        return answer


@pytest.mark.technique("R5")
@each_fault
def test_a_journal_that_cannot_be_written_never_ends_a_run_and_costs_no_checkpoint(
    ram: Path, expected: End, number: int, for_ever: bool, full: bool, proved: Callable[..., None]
) -> None:
    chosen = JOURNAL_CALLS if full else JOURNAL_CALLS[::2]
    for n in chosen:
        system = FailingJournals(n, number, for_ever=for_ever)
        tried = Tried(ram / "home", system, report=False)  # which reads the journals and writes none
        assert system.failed
        assert tried.error is None
        assert tried.saved == list(range(STEPS + 1))
        tried.check(expected, for_ever=for_ever)
        shutil.rmtree(ram / "home")
    proved(len(chosen))


class FailingLooks(Failing):
    """A disk that cannot be asked what is there, as with a stale handle: `stat` of checkpoints and journals fails."""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        real = os.stat

        def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
            is_ours = not isinstance(path, int) and ("checkpoints" in str(path) or str(path).endswith(".jsonl"))
            asked = functools.partial(real, path, *args, **options)
            return self.call("stat", asked) if is_ours else asked()

        patch.setattr(os, "stat", stat)


@pytest.mark.system
@pytest.mark.technique("R5")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_cannot_be_looked_at_for_a_moment_does_not_end_a_run(
    ram: Path, expected: End, number: int, full: bool, proved: Callable[..., None]
) -> None:
    system, cases = FailingLooks(1 << 30, number), 0
    Tried(ram / "counted", system).check(expected, for_ever=False)
    for n in range(1, system.count + 1, 7 if full else 61):
        for for_ever in (False, True):
            tried = Tried(ram / "home", FailingLooks(n, number, for_ever=for_ever))
            tried.check(expected, for_ever=for_ever)
            shutil.rmtree(ram / "home")
            cases += 1
    assert cases > (50 if full else 6)
    proved(cases)


def train_on_a_small_disk(home: Path) -> None:
    """Train where the disk is full from step 3 to step 5; called in a process that has a disk of its own."""
    filler, told = home.parent / "filler", list[Told]()

    def listener(event: Told) -> None:
        told.append(event)
        if isinstance(event, StepDone) and event.step == 3:
            fill(filler)
        if isinstance(event, StepDone) and event.step == 5:
            filler.unlink()

    came_to = end(train(home, listener=listener))
    saved = [event.step for event in told if isinstance(event, Saved)]
    refused = [event.text for event in told if isinstance(event, Notice) and "No space left on device" in event.text]
    assert saved == [0, 1, 2, 5, 6, 7, 8], saved
    assert sum("next save tries again" in text for text in refused) == 2, refused
    assert not leftovers(home)
    assert steps(home / "run" / "checkpoints") == [6, 7, 8]
    list(RunFolder(home / "run").metrics.lines())  # raises where a line is torn
    assert not differences(came_to, end(train(home.parent.parent / "big" / "home")), saved)


def fill(path: Path) -> None:
    """Write until the disk has no place for another byte."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.system
@pytest.mark.technique("R5-tmpfs")
def test_a_small_disk_that_fills_up_and_is_freed_again_does_not_end_the_run(
    tmp_path: Path, proved: Callable[..., None]
) -> None:
    disk = tmp_path / "disk"
    (tmp_path / "big").mkdir()
    disk.mkdir()
    script = f"import test_failing_disk as t; t.train_on_a_small_disk(t.Path({str(disk / 'home')!r}))"
    mounted = f"mount -t tmpfs -o size=2m none {shlex.quote(str(disk))}"
    for namespace in (["unshare", "-Urm"], ["unshare", "-m"]):  # the second one needs to be root
        if can(*namespace, "sh", "-c", mounted):
            break
    else:
        pytest.skip("NOT RUN: no disk of 2 MB can be mounted here, unshare or mount is refused")
    run = f"{mounted} && exec {shlex.quote(sys.executable)} -c {shlex.quote(script)}"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [*namespace, "sh", "-c", run],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "FIRSTWORDS_CACHE": str(tmp_path / "cache")},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not any(disk.iterdir()), "the disk was mounted where others see it"
    proved(1, "2 refused saves, 7 others")


def can(*command: str) -> bool:
    """Whether a command is there and succeeds."""
    return shutil.which(command[0]) is not None and subprocess.run(command, check=False, capture_output=True).returncode == 0
