"""The only writer: every byte that firstwords leaves on a disk passes through here.

Folders are *published*: written under a temporary name, made durable, renamed, read back. A reader therefore sees a whole
folder or none, whenever the process or the machine stops. Nothing is overwritten in place; only logs are appended to.
The calls that change a disk are spelled as the system's own (`os.rename`, not `Path.rename`), so that a test can fail,
kill or record each of them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import platformdirs

from firstwords import reading
from firstwords.errors import (
    CannotCreateError,
    DataError,
    FirstwordsError,
    Notify,
    PermissionDeniedError,
    StorageError,
    ignore_line,
)

Json = dict[str, Any]
Bytes: TypeAlias = "bytes | memoryview[int]"
FORMAT = 1
MANIFEST = "manifest.json"
TEMPORARY = "tmp-"  # how the names of what is not yet, or no longer, there begin
LEFT = re.compile(r".-x[0-9a-f]{8}$")  # and end: no date, nor another number that a person writes
PROBE = "probe"
PROBED_S = 0.05  # is longer than another process holds a lock to see whether it is held
READ_BYTES = 4 << 20
PART_BYTES = 32 << 20
CAN_UNCACHE = hasattr(os, "posix_fadvise")  # neither macOS nor Windows
HASHING_THREADS = 2  # a checkpoint has two large files
BESIDE_BYTES = 1 << 20  # are hashed in half a millisecond; a thread begins in a tenth of one, or more where cores are busy
PROBE_BYTES = 1 << 20  # written and removed before a run: a quota is not told by the free space (mmdetection#12069)
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # some network and FUSE file systems
BINARY = getattr(os, "O_BINARY", 0)  # Windows would turn each newline byte into two


def cache_folder() -> Path:
    """Return where is kept what can be made again: `FIRSTWORDS_CACHE`, or the user's cache folder."""
    given = os.environ.get("FIRSTWORDS_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("firstwords")


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """Return the one spelling of `value` that is hashed and compared: sorted keys, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def without_infinities(value: Any) -> Any:
    """Return a JSON value with null for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def exists(path: Path) -> bool:
    """Whether something is there."""
    with _speaking_of(path):
        return path.exists()


def size(path: Path) -> int:
    """Return the length of a file in bytes; 0 where there is none."""
    with _speaking_of(path):
        return path.stat().st_size if path.exists() else 0


def file_sha256(path: Path, *, from_disk: bool = False) -> str:
    """Return the SHA-256 of a file, read in pieces; `from_disk`, not from the system's cache of it, nor leaving it there."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        if from_disk:
            _uncache(file.fileno(), 0)
        while count := file.readinto(piece):
            digest.update(piece[:count])
            if from_disk:
                _uncache(file.fileno(), file.tell())
    return digest.hexdigest()


def make_folder(path: Path) -> None:
    """Create a folder with its parents, durably; a folder that exists is fine.

    Raises:
        CannotCreateError: A file stands where a folder is needed.
        PermissionDeniedError, StorageError: The system refuses.
    """
    with _speaking_of(path):
        if path.is_dir():
            return
    if path.parent != path:
        make_folder(path.parent)
    with _speaking_of(path):
        try:
            os.mkdir(path)
        except FileExistsError:
            if not path.is_dir():
                raise
        _sync_folder(path.parent)


def write(path: Path, data: bytes | Iterable[Bytes]) -> None:
    """Write a whole file atomically, given at once or in pieces: readers see the old one or the new one, never a part."""
    temporary = _temporary(path)
    with _speaking_of(path):
        try:
            _write_durably(temporary, [data] if isinstance(data, bytes) else data)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def append(path: Path, data: bytes) -> int:
    """Append to a log, all of it or nothing, and return its new length. Not synced: `sync` makes what it says durable."""
    with _speaking_of(path):
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | BINARY, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, data)
            except OSError:
                os.truncate(descriptor, size)  # half a line would spoil the next one too
                raise
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if is_new:
            _sync_folder(path.parent)
    return size


def cut(path: Path, size_bytes: int) -> None:
    """Cut a log back to `size_bytes`; one that is shorter or absent stays as it is."""
    with _speaking_of(path):
        if path.exists() and path.stat().st_size > size_bytes:
            os.truncate(path, size_bytes)


def sync(path: Path) -> None:
    """Make a file's content durable."""
    with _speaking_of(path):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(
    folder: Path,
    files: Mapping[str, Iterable[Bytes]],
    describe: Callable[[], Mapping[str, Any]],
) -> Json:
    """Write `files` and a manifest as one folder that appears whole or not at all, and return the manifest.

    Args:
        folder: The final place; its parent must exist, it must not.
        files: File name to its bytes in pieces, written in this order and never held whole in memory.
        describe: Called after the last piece; its keys join the manifest (counts are known only then).

    Raises:
        CannotCreateError: `folder` exists already.
        StorageError: Disk full or failing; nothing appears under `folder`.
        DataError: What was read back is not what was written.
    """
    if exists(folder):
        raise CannotCreateError("is there already", where=str(folder))
    temporary = _temporary(folder)
    with _speaking_of(folder):
        try:
            os.mkdir(temporary)
            records = {name: _write_durably(temporary / name, pieces) for name, pieces in files.items()}
            manifest = {"format": FORMAT, "files": records, **describe()}
            manifest["sha256"] = sha256(canonical_json(manifest))
            _write_durably(temporary / MANIFEST, [canonical_json(manifest)])
            _sync_folder(temporary)
            os.rename(temporary, folder)
            _sync_folder(folder.parent)
        except BaseException:
            with suppress(OSError):
                _remove(temporary)
            raise
    return verify(folder, from_disk=True)


def read_manifest(folder: Path) -> Json:
    """Return the manifest of a published folder, checked against its own hash.

    Raises:
        DataError: Missing, damaged, or made by a newer format.
    """
    path = folder / MANIFEST
    data = reading.read_bytes(path)
    manifest = reading.parse_json(data, str(path))
    if not isinstance(manifest.get("files"), dict) or not all(map(_is_record, manifest["files"].values())):
        raise DataError("this is no manifest", where=str(path))
    reading.require_plain_names(manifest["files"], str(path))
    if manifest.get("format") != FORMAT:
        raise DataError(f"made by format {manifest.get('format')}; this version reads format {FORMAT}", where=str(path))
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != sha256(canonical_json(rest)) or data != canonical_json(manifest):
        raise DataError("the manifest is damaged", where=str(path), why="its checksum does not match")
    return manifest


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("bytes"), int) and isinstance(value.get("sha256"), str)


def verify(folder: Path, *, from_disk: bool = False) -> Json:
    """Return the manifest after comparing every file's size and SHA-256 with it.

    Args:
        folder: A published folder.
        from_disk: As for `file_sha256`: for what is large, and not read again at once.

    Raises:
        DataError: Names the first file that is missing, of another size, changed, or unreadable on its disk.
        PermissionDeniedError, StorageError: The system refuses to read; that says nothing about the files.
    """
    manifest = read_manifest(folder)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        checks = [
            _deferred(pool, functools.partial(_verify_file, folder / name, record, from_disk), record["bytes"])
            for name, record in manifest["files"].items()
        ]
        for check in checks:
            check()
    return manifest


def _verify_file(path: Path, record: Mapping[str, Any], from_disk: bool) -> None:
    with reading.opening(path):
        if not path.is_file():
            raise DataError("a file is missing", where=str(path))
        size = path.stat().st_size
        if size != record["bytes"]:
            raise DataError(f"has {size} bytes, its manifest says {record['bytes']}", where=str(path))
        if file_sha256(path, from_disk=from_disk) != record["sha256"]:
            raise DataError("is damaged", where=str(path), why="its SHA-256 is not the one in its manifest")


def set_aside(folder: Path, mark: str = "damaged") -> Path:
    """Rename a folder to `damaged-...`, or after another mark, so that nothing goes on with it, and return its new place."""
    place = folder.with_name(f"{mark}-{folder.name}-{secrets.token_hex(4)}")
    with _speaking_of(folder):
        os.rename(folder, place)
        _sync_folder(folder.parent)
    return place


def remove_folder(folder: Path) -> None:
    """Remove a published folder: it loses its name first, so that a half-removed one is never taken for whole."""
    doomed = _temporary(folder)
    with _speaking_of(folder):
        os.rename(folder, doomed)
        _sync_folder(folder.parent)  # or a power loss could keep the old name and take some of the files
        _remove(doomed)


def _temporary(path: Path) -> Path:
    """Return a name beside `path` for what is to become it, or was it; `remove_leftovers` knows it by its form."""
    return path.with_name(f"{TEMPORARY}{path.name}-x{secrets.token_hex(4)}")


def remove_leftovers(parent: Path, older_than_s: float = 0.0) -> None:
    """Remove the temporary folders and files that a killed process left in `parent`.

    Args:
        parent: Its lock is held; or other processes write there meanwhile, to folders that are younger.
        older_than_s: How long nothing was written to what is removed, at least.

    Raises:
        PermissionDeniedError, StorageError: The first one that could not be removed; the others are, where they can be.
    """
    failed: FirstwordsError | None = None
    for path in folders(parent, TEMPORARY):
        if not LEFT.search(path.name):  # a person's own
            continue
        try:
            with _speaking_of(path):
                if not older_than_s or time.time() - _written_s(path) > older_than_s:
                    _remove(path)
        except FirstwordsError as error:
            failed = failed or error
    if failed is not None:
        raise failed


def _written_s(path: Path) -> float:
    """Return when something was last written to a file, or to a folder or a file in it: seconds since 1970."""
    times_s: list[float] = [one.stat().st_mtime for one in (path, *(path.iterdir() if path.is_dir() else ()))]
    return max(times_s)


def folders(parent: Path, prefix: str) -> list[Path]:
    """Return what stands in `parent` under a name that begins with `prefix`; nothing where there is no `parent`."""
    with _speaking_of(parent):
        names = os.listdir(parent) if parent.is_dir() else []
    return [parent / name for name in sorted(names) if name.startswith(prefix)]


def require_space(folder: Path, size_bytes: int) -> None:
    """Raise a StorageError where the disk of `folder` has not twice `size_bytes` free, or refuses a probe (a quota)."""
    with _speaking_of(folder):
        free = shutil.disk_usage(folder).free
    if free < 2 * size_bytes:
        raise StorageError(
            f"the disk has {free / 1e9:.2f} GB free, two checkpoints need {2 * size_bytes / 1e9:.2f} GB",
            where=str(folder),
            do="free some space; a new run may have its --out on another disk",
        )
    probe = folder / f"{TEMPORARY}{PROBE}-x{secrets.token_hex(4)}"
    with _speaking_of(folder):
        try:
            _write_durably(probe, [bytes(min(2 * size_bytes, PROBE_BYTES))])
        finally:
            with suppress(OSError):
                os.unlink(probe)


@contextmanager
def lock(path: Path, notice: Notify = ignore_line) -> Iterator[None]:
    """Hold the lock file `path`; the system frees it when the process ends, however it ends.

    Args:
        path: The file.
        notice: Told where the system or its file system has no locks: then nothing is held.

    Raises:
        CannotCreateError: Another process holds it; the message names its pid and host.
    """
    with _speaking_of(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with _speaking_of(path):
            locked = _try_lock(descriptor, path, notice)
            if not locked:
                time.sleep(PROBED_S)
                locked = _try_lock(descriptor, path, notice)
        if not locked:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise CannotCreateError(
                "is in use", where=str(path.parent), why=f"held by {holder}", do="wait for it, or use another --out"
            )
        with _speaking_of(path):
            os.truncate(descriptor, 0)
            _write_all(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):  # the lock is free then too, and no content of ours depends on it
            os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether another process holds the lock file `path` now."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:  # there is none, or none of ours
        return False
    try:
        return not _try_lock(descriptor, path)
    except OSError:  # it cannot be asked
        return False
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path, notice: Notify = ignore_line) -> bool:
    """Return whether the lock is ours now; where there are no locks it is a courtesy only, and always ours."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock
        notice(f"{path}: this system has no locks, so see to it yourself that no other process trains here")
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        notice(f"{path}: its file system has no locks, so see to it yourself that no other process trains here")
    return True


def _write_all(descriptor: int, data: Bytes) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _write_durably(path: Path, pieces: Iterable[Bytes]) -> Json:
    """Create `path`, write and sync it, and return its record for a manifest.

    What is large goes to the disk as it is written, and leaves the system's cache to others: a checkpoint would fill it
    with gigabytes that nobody reads.
    """
    digest, size, uncached = hashlib.sha256(), 0, 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o644)
    try:
        with ThreadPoolExecutor(1) as pool:
            for part in _parts(pieces):
                hash_part = _deferred(pool, functools.partial(digest.update, part), len(part))  # as long as writing takes
                _write_all(descriptor, part)
                size += len(part)
                if size - uncached >= PART_BYTES and CAN_UNCACHE:
                    os.fdatasync(descriptor)
                    _uncache(descriptor, uncached := size)
                hash_part()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _deferred(pool: Executor, work: Callable[[], None], n_bytes: int) -> Callable[[], None]:
    """Begin work on so many bytes on another core, or leave it where beginning it there takes longer; the call ends it."""
    return pool.submit(work).result if n_bytes >= BESIDE_BYTES else work


def _parts(pieces: Iterable[Bytes]) -> Iterator[memoryview[int]]:
    """Yield all bytes of the pieces in parts of at most `PART_BYTES`."""
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for start in range(0, len(view), PART_BYTES):
            yield view[start : start + PART_BYTES]


def _uncache(descriptor: int, end: int) -> None:
    """Let the system forget what it keeps of a file's beginning up to `end`, 0: of all of it; where it can be told so."""
    if CAN_UNCACHE:
        os.posix_fadvise(descriptor, 0, end, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder to sync it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder; its files are synced by then
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or a folder; other programs put folders into ours (`.ipynb_checkpoints`). No link is followed."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or getattr(found, "st_reparse_tag", 0) != 0:  # Windows has links that are folders
        os.unlink(path)
        return
    for name in os.listdir(path):
        _remove(path / name)
    os.rmdir(path)


@contextmanager
def _speaking_of(path: Path) -> Iterator[None]:
    """Turn the system's errors into ones that say what a person can do about them."""
    try:
        yield
    except OSError as error:
        raise as_firstwords_error(error, path) from error


def as_firstwords_error(error: OSError, path: Path) -> FirstwordsError:
    """Return the error to show for a failed system call on `path`."""
    where, why = str(path), os.strerror(error.errno or 0)
    match error.errno:
        case errno.EACCES | errno.EPERM | errno.EROFS:
            do = "allow it, or take another place: --out for runs, FIRSTWORDS_CACHE for texts"
            return PermissionDeniedError("may not be written", where=where, why=why, do=do)
        case errno.EEXIST | errno.ENOTDIR | errno.EISDIR | errno.ENOTEMPTY | errno.ENAMETOOLONG:
            return CannotCreateError("cannot be created", where=where, why=why, do="take another place or name")
        case errno.ENOSPC | errno.EDQUOT:
            do = "free some space there and try again; a run goes on with --resume"
            return StorageError("the disk is full", where=where, why=str(error), do=do)
        case _:
            do = "check the disk and try again; a run goes on with --resume"
            return StorageError("writing failed", where=where, why=str(error), do=do)
