"""A checkpoint with any damage is found, and the one before it is used.

One file of the newest checkpoint is damaged in place and mended again, case by case. Damage is found by hashing alone, so
that all cases go through `store.verify`; a sample goes through the whole fall-back and a few dozen through a resumed run.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest

from faults import End, end, train
from firstwords import store
from firstwords.errors import DataError
from firstwords.events import Notice, Told
from firstwords.recorder import TrainResult
from firstwords.runs import checkpoint

PAGE = 4096
EVERY = 29  # places of a file are looked at one in so many where not all are: each byte of the 4 of a number in its turn
pytestmark = pytest.mark.technique("R3")
Damage = tuple[str, bytes]  # the name of a file, and what it holds instead


@dataclass(frozen=True)
class Run:
    """A run of a moment ago: its checkpoints, and what came of it."""

    path: Path
    result: TrainResult
    end: End

    @property
    def identity(self) -> dict[str, str]:
        """The hashes that tell it from others."""
        hashes: dict[str, str] = store.read_manifest(self.newest)["run"]
        return hashes

    @property
    def newest(self) -> Path:
        return checkpoint.existing(self.path / "checkpoints")[-1]

    @property
    def older(self) -> Path:
        return checkpoint.existing(self.path / "checkpoints")[-2]

    def files(self, folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def made(ram: Path) -> Run:
    """A run whose checkpoints have 70 kB: a model of 1 layer and 8 channels, and its AdamW."""
    (ram / "home").mkdir()
    result = train(ram / "home")
    return Run(ram / "home" / "run", result, end(result))


def is_found(folder: Path) -> bool:
    try:
        store.verify(folder)
    except DataError:
        return True
    return False


def count_unnoticed_flips(folder: Path, flips: Callable[[int], list[int]]) -> tuple[int, int]:
    """Change one byte after the other by `flips` of its place, and return the cases and how many were not found."""
    cases = unnoticed = 0
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for place, byte in enumerate(whole):
                for flip in flips(place):
                    os.pwrite(file.fileno(), bytes([byte ^ flip]), place)
                    cases, unnoticed = cases + 1, unnoticed + (not is_found(folder))
                    os.pwrite(file.fileno(), bytes([byte]), place)
    return cases, unnoticed


def cuts(data: bytes, every: int) -> Iterator[bytes]:
    return (data[:length] for length in range(0, len(data), every))


def pages(data: bytes) -> Iterator[bytes]:
    """Yield `data` with each page zeroed, and with each two pages swapped, where that changes anything."""
    parts = [data[start : start + PAGE] for start in range(0, len(data), PAGE)]
    for n, part in enumerate(parts):
        yield b"".join([*parts[:n], bytes(len(part)), *parts[n + 1 :]])
    for a, b in combinations(range(len(parts)), 2):
        swapped = list(parts)
        swapped[a], swapped[b] = parts[b], parts[a]
        yield b"".join(swapped)


def damages(run: Run) -> Iterator[Damage]:
    """Yield what tears whole pages, adds, or mixes two checkpoints up."""
    older = run.files(run.older)
    for name, data in run.files(run.newest).items():
        whole = [*pages(data), data + b"\0", data + b"\n", data + data[-1:], data + data[-PAGE:], data + data, older[name]]
        yield from ((name, changed) for changed in whole if changed != data)


@pytest.mark.system
def test_every_prefix_of_every_file_is_found(made: Run, full: bool, proved: Callable[..., None]) -> None:
    cases = 0
    for path in sorted(made.newest.iterdir()):
        whole = path.read_bytes()
        for length in reversed(range(0, len(whole), 1 if full else EVERY)):
            os.truncate(path, length)
            assert is_found(made.newest), f"{path.name} cut at {length}"
            cases += 1
        path.write_bytes(whole)
    assert not is_found(made.newest)
    proved(cases, f"{cases:,} prefixes")


@pytest.mark.system
def test_every_flipped_byte_and_a_sample_of_flipped_bits_are_found(
    made: Run, full: bool, proved: Callable[..., None]
) -> None:
    chance = random.Random(0)
    bits = {place: 1 << chance.randrange(8) for place in range(0, 1 << 20, 7 if full else 41)}

    def flips(place: int) -> list[int]:
        whole = [0xFF] if full or place % EVERY == 0 else []
        return [*whole, bits[place]] if place in bits else whole

    cases, unnoticed = count_unnoticed_flips(made.newest, flips)
    assert unnoticed == 0
    assert not is_found(made.newest)
    proved(cases, f"{cases:,} flips")


def test_torn_pages_tails_and_files_of_another_step_are_found(made: Run, proved: Callable[..., None]) -> None:
    cases = 0
    for name, changed in damages(made):
        whole = (made.newest / name).read_bytes()
        (made.newest / name).write_bytes(changed)
        assert is_found(made.newest), name
        (made.newest / name).write_bytes(whole)
        cases += 1
    assert cases > 100
    proved(cases, f"{cases} torn pages, tails and swapped files")


def test_each_missing_file_and_each_folder_in_a_files_place_is_found(made: Run, proved: Callable[..., None]) -> None:
    files = made.files(made.newest)
    for name, data in files.items():
        (made.newest / name).unlink()
        assert is_found(made.newest), f"{name} missing"
        (made.newest / name).mkdir()
        assert is_found(made.newest), f"{name} a folder"
        (made.newest / name).rmdir()
        (made.newest / name).write_bytes(data)
    proved(2 * len(files), f"{len(files)} missing files")


def test_the_manifest_of_one_step_does_not_pass_for_the_files_of_another(made: Run, proved: Callable[..., None]) -> None:
    mixed = made.path / "mixed"
    for manifest, files in [(made.newest, made.older), (made.older, made.newest)]:
        shutil.copytree(files, mixed)
        shutil.copy(manifest / store.MANIFEST, mixed)
        assert is_found(mixed)
        shutil.rmtree(mixed)
    proved(2)


def test_a_file_that_the_manifest_does_not_name_counts_for_nothing(made: Run, proved: Callable[..., None]) -> None:
    """The manifest lists what a checkpoint is; what a file manager leaves beside it (`.DS_Store`) is no damage."""
    (made.newest / ".DS_Store").write_bytes(b"\0")
    found = checkpoint.newest(made.path / "checkpoints", pytest.fail, made.identity)
    assert found is not None
    assert (found.folder, ".DS_Store" in found.manifest["files"]) == (made.newest, False)
    assert end(train(made.path.parent, resume=True)) == made.end
    proved(1)


def sample(run: Run, count: int) -> list[Damage]:
    """Return so many damages of every kind: cuts, flips, torn pages, mixed steps."""
    chance = random.Random(1)
    files = run.files(run.newest)
    cut = [(name, piece) for name, data in files.items() for piece in cuts(data, max(1, len(data) // 50))]
    flip = []
    for name, data in files.items():
        for place in chance.sample(range(len(data)), 50):
            flip.append((name, data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]))
    return [damage for kind in (cut, flip, list(damages(run))) for damage in chance.sample(kind, count // 3)]


def test_the_checkpoint_before_a_damaged_one_is_used_and_the_damaged_one_set_aside(
    made: Run, full: bool, proved: Callable[..., None]
) -> None:
    newest, older, identity, cases = made.newest, made.older, made.identity, 0
    for name, changed in sample(made, 300 if full else 45):
        whole, told = (newest / name).read_bytes(), list[str]()
        (newest / name).write_bytes(changed)
        found = checkpoint.newest(newest.parent, told.append, identity)
        assert found is not None
        assert found.folder == older
        [damaged] = newest.parent.glob("damaged-*")
        assert len(told) == 1
        assert str(newest) in told[0]
        assert f"set aside as {damaged.name}" in told[0]
        damaged.rename(newest)
        (newest / name).write_bytes(whole)
        cases += 1
    proved(cases, f"{cases} through the fall-back")


@pytest.mark.system
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before_to_the_same_end(
    made: Run, full: bool, proved: Callable[..., None]
) -> None:
    home, cases = made.path.parent, 0
    for name, changed in sample(made, 48 if full else 9):
        shutil.copytree(made.path, home / "torn")
        torn = home / "torn" / "checkpoints" / made.newest.name
        (torn / name).write_bytes(changed)
        told: list[Told] = []
        assert end(train(home, "torn", resume=True, listener=told.append)) == made.end
        assert any(isinstance(line, Notice) and "set aside as damaged-" in line.text for line in told)
        assert not is_found(torn)
        shutil.rmtree(home / "torn")
        cases += 1
    proved(cases, f"{cases} through a resumed run")


def test_without_checksums_flips_go_unnoticed(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: with sizes alone the same loop counts almost every flip as unnoticed."""
    hashes = {made.newest / name: record["sha256"] for name, record in store.verify(made.newest)["files"].items()}
    monkeypatch.setattr(store, "file_sha256", lambda path, **_: hashes[path])
    cases, unnoticed = count_unnoticed_flips(made.newest, lambda place: [0xFF] if place % 97 == 0 else [])
    assert unnoticed > 0.9 * cases > 500
