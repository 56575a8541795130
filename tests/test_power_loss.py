"""No power loss takes a checkpoint that was announced as saved.

A real run is recorded from its very beginning: every call that changes the disk, in order, and every announcement. Then the
power goes after each of them, on a file system that keeps only what it must: a file's content once the file is synced, a
folder's entries once the folder is synced. What is not synced may be there or not, in any combination and order, and
content may be zeros or cut. Each disk that could be left is looked at, and some are trained on.

This checks our model of the disk, not the disk: one that honours `fsync` and renames atomically. A drive that lies about
`fsync`, or bit rot, is another matter (`test_torn`). The cache of prepared texts is left out: a cache is made again from the
text, and is published by the same function as a checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from faults import STEPS, End, System, end, train
from firstwords import store
from firstwords.config import run_config
from firstwords.config_file import from_toml
from firstwords.errors import DataError, FirstwordsError
from firstwords.events import Saved, Told
from firstwords.runs import checkpoint
from firstwords.runs.checkpoint import Checkpoint
from firstwords.runs.folder import RunFolder
from firstwords.training.events import StepDone

pytestmark = pytest.mark.technique("R4")
PAGE = 4096
FEW = 9  # operations that are not synced: all their combinations are tried
ROTTEN = 4  # the step whose checkpoint rots
MOST, MOST_FULL = 6, 500  # states looked at for one moment
RESUME_EVERY = 541
Name = tuple[int, str]  # the folder's number, and the name in it
Tree = dict[Path, bytes | None]  # None: a folder


@dataclass(frozen=True)
class Entry:
    """A name in a folder appears, goes, or both: a file or folder is made, removed or renamed."""

    inode: int
    gone: Name | None
    there: Name | None

    @property
    def durable_with(self) -> int:
        """The folder that must be synced; nothing of ours is renamed from one folder to another."""
        folders = {name[0] for name in (self.gone, self.there) if name}
        assert len(folders) == 1
        return folders.pop()


@dataclass(frozen=True)
class Data:
    """Bytes of a file."""

    inode: int
    offset: int
    data: bytes

    @property
    def durable_with(self) -> int:
        return self.inode

    def torn(self, chance: random.Random) -> Data:
        """Return what may be there of it where no sync came: zeros, or a part."""
        length = chance.choice([len(self.data) // 2, chance.randrange(len(self.data) // PAGE + 1) * PAGE])
        return replace(self, data=chance.choice([bytes(len(self.data)), self.data[:length]]))


@dataclass(frozen=True)
class Cut:
    """A file becomes shorter."""

    inode: int
    size: int

    @property
    def durable_with(self) -> int:
        return self.inode


@dataclass(frozen=True)
class Synced:
    """What was done to a file, or to the names in a folder, is durable."""

    inode: int
    is_folder: bool


@dataclass(frozen=True)
class Said:
    """The program announced that this step is saved; None: it has to take back what it said."""

    step: int | None


Change = Entry | Data | Cut
Log = list[Change | Synced | Said]


class Recording(System):
    """A system that writes down what its disk is told. The folder `root` is there, empty and durable."""

    def __init__(self, root: Path) -> None:
        self.root, self.log = root, Log()
        self.names: dict[Name, int] = {}
        self.folders = {0}
        self.opened: dict[int, int] = {}
        self.last = 0

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        record = getattr(self, f"_{name}", None)
        watched = args and (args[0] in self.opened if isinstance(args[0], int) else self._is_inside(args[0]))
        return real(*args) if record is None or not watched else record(real, *args)

    def rot(self, path: Path) -> None:
        """Damage a file behind the program's back, as a disk does."""
        path.write_bytes(data := bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        self.log += [Data(inode := self._inode(path), 0, data), Synced(inode, is_folder=False)]

    def _is_inside(self, path: Any) -> bool:
        return Path(path).is_relative_to(self.root)

    def _name(self, path: Path) -> Name:
        return self._inode(path.parent), path.name

    def _inode(self, path: Path) -> int:
        return 0 if path == self.root else self.names[self._name(path)]

    def _made(self, path: Path) -> int:
        self.last += 1
        self._entry(Entry(self.last, None, self._name(path)))
        return self.last

    def _entry(self, entry: Entry) -> None:
        apply(entry, self.names, {})
        self.log.append(entry)

    def _open(self, real: Callable[..., int], path: Path, *args: Any) -> int:
        descriptor, place = real(path, *args), Path(path)
        is_there = place == self.root or self._name(place) in self.names
        self.opened[descriptor] = self._inode(place) if is_there else self._made(place)
        return descriptor

    def _close(self, real: Callable[..., None], descriptor: int) -> None:
        del self.opened[descriptor]
        real(descriptor)

    def _write(self, real: Callable[..., int], descriptor: int, data: bytes) -> int:
        written = real(descriptor, data)
        inode, offset = self.opened[descriptor], os.lseek(descriptor, 0, os.SEEK_CUR) - written
        new, before = bytes(memoryview(data)[:written]), self.log[-1]
        if isinstance(before, Data) and (before.inode, before.offset + len(before.data)) == (inode, offset):
            self.log[-1] = replace(before, data=before.data + new)  # one write: a torn one is cut anywhere anyway
        elif new:
            self.log.append(Data(inode, offset, new))
        return written

    def _fsync(self, real: Callable[..., None], descriptor: int) -> None:
        real(descriptor)
        inode = self.opened[descriptor]
        self.log.append(Synced(inode, inode in self.folders))

    def _truncate(self, real: Callable[..., None], where: Path | int, size: int) -> None:
        real(where, size)
        self.log.append(Cut(self.opened[where] if isinstance(where, int) else self._inode(where), size))

    def _mkdir(self, real: Callable[..., None], path: Path) -> None:
        real(path)
        self.folders.add(self._made(path))

    def _rename(self, real: Callable[..., None], path: Path, new: Path) -> None:
        real(path, new)
        self._entry(Entry(self._inode(path), self._name(path), self._name(new)))

    _replace = _rename

    def _unlink(self, real: Callable[..., None], path: Path) -> None:
        real(path)
        self._entry(Entry(self._inode(path), self._name(path), None))

    _rmdir = _unlink


def apply(change: Change, names: dict[Name, int], contents: dict[int, bytes]) -> None:
    """Do one change to the names and contents of a disk."""
    match change:
        case Entry(inode, gone, there):
            if gone is not None and names.get(gone) == inode:
                del names[gone]
            if there is not None:
                names[there] = inode
        case Data(inode, offset, data):
            before = contents.get(inode, b"")
            contents[inode] = before[:offset].ljust(offset, b"\0") + data + before[offset + len(data) :]
        case Cut(inode, size):
            contents[inode] = contents.get(inode, b"")[:size]


class Disk:
    """A disk at one moment: what is durable, and what is not yet."""

    def __init__(self, folders: set[int]) -> None:
        self.names: dict[Name, int] = {}
        self.contents: dict[int, bytes] = {}
        self.folders, self.pending = folders, list[Change]()

    def take(self, told: Change | Synced) -> None:
        if not isinstance(told, Synced):
            self.pending.append(told)
            return
        for change in self.pending:
            if change.durable_with == told.inode:
                apply(change, self.names, self.contents)
        self.pending = [change for change in self.pending if change.durable_with != told.inode]

    def left_with(self, survivors: Sequence[Change]) -> Tree:
        """Return what stands on the disk when of all that is pending only `survivors` came through."""
        names, contents = dict(self.names), dict(self.contents)
        for change in survivors:
            apply(change, names, contents)
        inside: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), inode in names.items():
            inside.setdefault(folder, []).append((name, inode))
        tree: Tree = {}
        reached = [(Path(), 0)]
        for place, folder in reached:
            for name, inode in inside.get(folder, []):
                is_folder = inode in self.folders
                tree[place / name] = None if is_folder else contents.get(inode, b"")
                reached += [(place / name, inode)] if is_folder else []
        return tree

    def survivals(self, chance: random.Random, most: int) -> Iterator[list[Change]]:
        """Yield what may come through of what is pending: all, nothing, and every subset or a sample of them, torn."""
        pending = self.pending
        yield pending
        yield []
        if len(pending) <= FEW:
            for kept in product([True, False], repeat=len(pending)):
                yield [change for change, is_kept in zip(pending, kept, strict=True) if is_kept]
        else:
            alone = [[change] for change in pending] + [[c for c in pending if c is not lost] for lost in pending]
            yield from chance.sample(alone, min(len(alone), most // 2))
        for _ in range(most // 2):
            share = chance.random()
            kept_changes = [change for change in pending if chance.random() < share]
            yield [c.torn(chance) if isinstance(c, Data) and chance.random() < 0.5 else c for c in kept_changes]


class Written:
    """A folder that is made to hold one tree after the other; only differences are written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, Tree()
        folder.mkdir()

    def hold(self, tree: Tree) -> None:
        wrong = {path for path, data in self.now.items() if path not in tree or (data is None) != (tree[path] is None)}
        for path in sorted(wrong, reverse=True):
            (self.folder / path).rmdir() if self.now[path] is None else (self.folder / path).unlink()
        for path in sorted(tree):
            data = tree[path]
            if path in self.now and path not in wrong and self.now[path] == data:
                continue
            (self.folder / path).mkdir() if data is None else (self.folder / path).write_bytes(data)
        self.now = tree


@dataclass(repr=False)
class Recorded:
    """A run with all that its disk was told, and what it announced."""

    log: Log
    folders: set[int]
    journals: dict[str, dict[str, bytes]]  # by a checkpoint's hash: the lines that it counts on
    corpus: bytes
    end: End

    def states(self, most: int) -> Iterator[tuple[Tree, int | None]]:
        """Yield each disk that a power loss can leave, with the step announced before; each pair once."""
        chance, seen, said = random.Random(0), set[int](), None
        disk = Disk(self.folders)
        for told in self.log:
            if isinstance(told, Said):
                said = told.step
            else:
                disk.take(told)
            for survivors in disk.survivals(chance, most):
                tree = disk.left_with(survivors)
                state = hash((said, frozenset(tree.items())))
                if state not in seen:
                    seen.add(state)
                    yield tree, said


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def recorded(ram: Path) -> Recorded:
    """A run that is killed at its fifth step, whose newest checkpoint rots, and that goes on from the one before."""
    undisturbed = end(train(ram / "undisturbed"))  # and the cache is filled
    (ram / "home").mkdir()
    run, journals, disk = RunFolder(ram / "home" / "run"), dict[str, dict[str, bytes]](), Recording(ram / "home")

    def listen(told: Told) -> None:
        if isinstance(told, Saved):
            disk.log.append(Said(told.step))
            sizes = json.loads((told.folder / checkpoint.STATE).read_bytes())["journal_bytes"]
            lines = {name: (run.path / name).read_bytes()[:size] for name, size in sizes.items() if size}
            journals[store.read_manifest(told.folder)["sha256"]] = lines

    def listen_until_killed(told: Told) -> None:
        listen(told)
        if isinstance(told, StepDone) and told.step == ROTTEN + 1:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        with pytest.raises(KilledError):
            train(run.path.parent, listener=listen_until_killed)
        disk.log.append(Said(ROTTEN - 1))
        disk.rot(checkpoint.folder_of(run.checkpoints, ROTTEN) / checkpoint.MODEL)
        result = train(run.path.parent, resume=True, listener=listen)
    assert end(result) == undisturbed
    assert len(journals) == STEPS + 2  # the rotten one was saved again
    return Recorded(disk.log, disk.folders, journals, run.corpus.read_bytes(), undisturbed)


def problem(run: RunFolder, said: int | None, recorded: Recorded) -> str:
    """Return what is wrong with a run after a power loss, when step `said` had been announced; nothing: all is well."""
    try:
        for folder in checkpoint.existing(run.checkpoints):
            if checkpoint.step_of(folder) != ROTTEN:
                store.verify(folder)
        found = checkpoint.newest(run.checkpoints, lambda line: None)
        if run.exists:
            run_config(from_toml(run.config.read_text(), str(run.config)))
    except FirstwordsError as error:
        return str(error)
    for journal in (run.metrics, run.samples):
        with suppress(DataError):  # at its end, which no checkpoint counts on yet, anything may be there
            list(journal.lines())
    if said is not None and (found is None or found.step < said):
        return f"step {said} was announced, and the newest is {found and found.step}"
    return "" if found is None else missing(run, found, recorded)


def missing(run: RunFolder, found: Checkpoint, recorded: Recorded) -> str:
    """Return what a checkpoint needs and does not have beside it."""
    if not run.exists or run.corpus.read_bytes() != recorded.corpus:
        return "there is a checkpoint, but not the run's configuration and text"
    for name, lines in recorded.journals[found.manifest["sha256"]].items():
        if (run.path / name).read_bytes()[: len(lines)] != lines:
            return f"{name} lacks lines that step {found.step} counts on"
    return ""


def problems(recorded: Recorded, folder: Path, most: int) -> Iterator[tuple[RunFolder, str]]:
    """Look at each disk that a power loss can leave, and yield where that is and what is wrong with it."""
    written = Written(folder)
    for tree, said in recorded.states(most):
        written.hold(tree)
        run = RunFolder(folder / "run")
        yield run, problem(run, said, recorded)


@pytest.mark.system
def test_no_power_loss_takes_what_was_announced_and_a_run_goes_on_to_the_same_end(
    recorded: Recorded, ram: Path, full: bool, proved: Callable[..., None]
) -> None:
    states = resumed = 0
    for run, wrong in problems(recorded, ram / "left", MOST_FULL if full else MOST):
        assert not wrong
        if run.exists and states % RESUME_EVERY == 0:
            shutil.copytree(run.path, ram / "home" / "again")
            assert end(train(ram / "home", "again", resume=True)) == recorded.end
            assert not list((ram / "home" / "again").glob("**/tmp-*"))
            shutil.rmtree(ram / "home" / "again")
            resumed += 1
        states += 1
    moments = sum(not isinstance(told, Said) for told in recorded.log)
    assert states >= (5000 if full else 600)
    assert resumed >= (20 if full else 3)
    proved(states, f"{states:,} disks after {moments} operations, {resumed} trained on to the same end")


def without_sync(recorded: Recorded, *, of_folders: bool) -> Log:
    return [told for told in recorded.log if not isinstance(told, Synced) or told.is_folder != of_folders]


def with_names_before_data(recorded: Recorded) -> Log:
    """Return the log of a program that gives a checkpoint its name when it begins to write it."""
    log: Log = []
    for told in recorded.log:
        place = len(log)
        if isinstance(told, Entry) and told.there is not None and told.there[1].startswith(checkpoint.PREFIX):
            place = 1 + next(n for n, made in enumerate(log) if isinstance(made, Entry) and made.inode == told.inode)
        log.insert(place, told)
    return log


@pytest.mark.parametrize(
    "careless",
    [
        lambda recorded: without_sync(recorded, of_folders=False),
        lambda recorded: without_sync(recorded, of_folders=True),
        with_names_before_data,
    ],
    ids=["files are not synced", "folders are not synced", "the name comes before the data"],
)
def test_a_careless_program_is_caught(recorded: Recorded, ram: Path, careless: Callable[[Recorded], Log]) -> None:
    """The negative control."""
    other = replace(recorded, log=careless(recorded))
    assert any(wrong for _, wrong in problems(other, ram / "left", MOST))
