"""Published folders appear whole or not at all, and damage is noticed."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from faults import Failing
from firstwords import store
from firstwords.errors import CannotCreateError, DataError, StorageError
from firstwords.runs.folder import RunFolder

FILES = {"weights": [b"abc", b"", b"defg"], "words": [b"hello\n"]}


def published(parent: Path, name: str = "one") -> Path:
    store.publish(parent / name, FILES, lambda: {"kind": "test"})
    return parent / name


def test_a_published_folder_reads_back_as_written(tmp_path: Path) -> None:
    folder = published(tmp_path)
    assert (folder / "weights").read_bytes() == b"abcdefg"
    assert store.verify(folder)["kind"] == "test"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("can_uncache", [True, False])
def test_what_is_large_is_synced_part_by_part_and_reads_back_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_uncache: bool
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(store, "PART_BYTES", 1000)
    monkeypatch.setattr(store, "READ_BYTES", 300)
    monkeypatch.setattr(store, "CAN_UNCACHE", can_uncache and store.CAN_UNCACHE)
    if hasattr(os, "fdatasync"):
        monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    pieces = [bytes([n]) * size for n, size in enumerate((1, 2500, 0, 999, 1))]
    store.publish(tmp_path / "one", {"weights": pieces}, lambda: {"kind": "test"})
    assert (tmp_path / "one" / "weights").read_bytes() == b"".join(pieces)
    assert store.file_sha256(tmp_path / "one" / "weights", from_disk=True) == store.sha256(b"".join(pieces))
    assert synced == ([1001, 2001, 3500] if store.CAN_UNCACHE else [])


def test_nothing_is_published_twice_under_one_name(tmp_path: Path) -> None:
    published(tmp_path)
    with pytest.raises(CannotCreateError):
        published(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_whichever_write_fails_nothing_appears_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = published(tmp_path, "before")
    for n in range(1, 100):
        Failing(n, number).install(monkeypatch)
        try:
            published(tmp_path, "after")
        except StorageError:
            monkeypatch.undo()
            store.verify(before)
            # only a failure after the rename may leave the folder, and then it is whole
            if (tmp_path / "after").exists():
                store.verify(tmp_path / "after")
                store.remove_folder(tmp_path / "after")
            assert [path.name for path in tmp_path.iterdir()] == ["before"]
        else:
            break
    assert 10 < n < 99, "the loop must have met every operation, and then none"


def test_every_prefix_and_every_flipped_byte_of_every_file_is_noticed(tmp_path: Path) -> None:
    folder = published(tmp_path)
    cases = 0
    for path in folder.iterdir():
        whole = path.read_bytes()
        damaged = [whole[:n] for n in range(len(whole))]
        damaged += [whole[:n] + bytes([whole[n] ^ 0xFF]) + whole[n + 1 :] for n in range(len(whole))]
        damaged += [whole + b"\0"]
        for data in damaged:
            path.write_bytes(data)
            with pytest.raises(DataError):
                store.verify(folder)
            cases += 1
        path.write_bytes(whole)
    assert cases > 500
    store.verify(folder)  # the negative control: undamaged, it passes


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / "words").unlink()
    with pytest.raises(DataError, match="missing"):
        store.verify(folder)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    manifest = {"format": 1, "files": {"../secret": {"bytes": 1, "sha256": store.sha256(b"x")}}}
    manifest["sha256"] = store.sha256(store.canonical_json(manifest))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / store.MANIFEST).write_bytes(store.canonical_json(manifest))
    with pytest.raises(DataError):
        store.verify(tmp_path / "one")


def test_an_atomic_write_leaves_the_old_file_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config"
    store.write(path, b"old")
    for n in range(1, 20):
        Failing(n, errno.ENOSPC).install(monkeypatch)
        try:
            store.write(path, b"new")
        except StorageError:
            monkeypatch.undo()
            assert path.read_bytes() in (b"old", b"new")
            assert [p.name for p in tmp_path.iterdir()] == ["config"]
            path.write_bytes(b"old")
        else:
            break
    assert path.read_bytes() == b"new"


def test_a_log_is_cut_back_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    size = store.append(path, b"one\n")
    store.append(path, b"two\n")
    store.cut(path, size)
    store.append(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"


def test_a_held_lock_is_refused_with_its_holder_and_free_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with store.lock(path), pytest.raises(CannotCreateError, match=f"pid {os.getpid()}"), store.lock(path):
        pass
    with store.lock(path):
        pass


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "tmp-step-1-x0123abcd").mkdir()
    (tmp_path / "tmp-file-x0123abcd").write_bytes(b"")
    kept = [published(tmp_path), tmp_path / "tmp-notes.txt", tmp_path / "tmp-plots-20260501"]  # two are a person's own
    kept[1].write_bytes(b"")
    (kept[2] / "deep").mkdir(parents=True)
    store.remove_leftovers(tmp_path)
    assert {*tmp_path.iterdir()} == {*kept}


def test_what_other_programs_put_into_a_folder_goes_with_it_but_nothing_that_a_link_leads_to(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "deep").mkdir(parents=True)
    (theirs / "deep" / "letter").write_bytes(b"precious")
    folder = published(tmp_path)
    (folder / ".ipynb_checkpoints" / "deeper").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "deeper" / "copy").write_bytes(b"")
    (folder / ".ipynb_checkpoints" / "link").symlink_to(theirs, target_is_directory=True)
    (folder / "link").symlink_to(theirs / "deep" / "letter")
    store.remove_folder(folder)
    assert [*tmp_path.iterdir()] == [theirs]
    assert (theirs / "deep" / "letter").read_bytes() == b"precious"


def test_a_leftover_that_cannot_be_removed_keeps_no_other_and_hinders_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = RunFolder(tmp_path), list[str]()
    run.checkpoints.mkdir()
    first, second = (run.checkpoints / f"tmp-step-{n}-x0123abcd" for n in (1, 2))
    for path in (first, second):
        path.write_bytes(b"")
    real = os.unlink

    def unlink(path: Path) -> None:
        if path == first:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        with run.writing(told.append):
            pass
    assert [*run.checkpoints.iterdir()] == [first]
    assert ["stays" in line and first.name in line for line in told] == [True]
    with run.writing(pytest.fail):
        pass  # the negative control
    assert [*run.checkpoints.iterdir()] == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_where_a_file_system_has_no_locks_nobody_is_refused_and_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The answer is made up: such a file system, of a network or in FUSE, cannot be had where the tests run."""
    fcntl, path, told = pytest.importorskip("fcntl"), tmp_path / "run.lock", list[str]()

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if number == errno.EIO:  # the negative control
        with pytest.raises(StorageError), store.lock(path, told.append):
            pass
        return
    with store.lock(path, told.append):
        assert not store.is_locked(path)
    assert [str(path) in line and "no locks" in line for line in told] == [True]


def test_where_a_system_has_no_locks_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    told = list[str]()
    with store.lock(tmp_path / "run.lock", told.append):
        assert not store.is_locked(tmp_path / "run.lock")
    assert ["no locks" in line for line in told] == [True]


def test_who_only_looks_whether_a_lock_is_held_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    looking = os.open(tmp_path / "run.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_EX)
    with (
        pytest.raises(CannotCreateError, match="in use"),
        store.lock(tmp_path / "run.lock"),
    ):
        pass  # the negative control: it stays held
    monkeypatch.setattr(store.time, "sleep", lambda _: os.close(looking))
    with store.lock(tmp_path / "run.lock"):
        assert store.is_locked(tmp_path / "run.lock")
    assert not store.is_locked(tmp_path / "run.lock")
