"""The command line, run in the process of the tests, and what its tests share: a tiny model, a text, a run to spoil."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from firstwords import store
from firstwords.app.cli import main
from firstwords.app.console import visible

TINY_FLAGS = ["--tokenizer=bytes", "--steps=2", "--batch-size=4", "--threads=1", "--precision=float32", "--device=cpu"]
TINY_FLAGS += ["--save-every=0s", "--report=false"]
TINY_FLAGS += [
    "--model.emb-dim=32",
    "--model.n-heads=2",
    "--model.n-layers=1",
    "--model.ff-dim=64",
    "--model.context-length=32",
]
TEXT = "".join(f"The {n}. word of the text is {n * n}.\n" for n in range(100)) + "Ende gut, alles süß.\n"
ESC = "\x1b"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one line of standard output."""
        (line,) = self.out.splitlines()
        value: dict[str, Any] = json.loads(line)
        return value


Command = Callable[..., Ended]
Refused = Callable[..., dict[str, Any]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and output that is not for a terminal."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def command(here: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process."""

    def run(*arguments: str | Path) -> Ended:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        ended = Ended(code, *capsys.readouterr())
        assert "Traceback" not in ended.out + ended.err
        assert ESC not in ended.out + ended.err or "FORCE_COLOR" in os.environ
        return ended

    return run


@pytest.fixture
def refused(command: Command) -> Refused:
    """Run a command that must fail with `code`, plainly and with --json, and return the error."""

    def run(code: int, *arguments: str | Path) -> dict[str, Any]:
        plain = command(*arguments)
        assert plain.code == code, plain.err
        error = error_of(command(*arguments, "--json"), code)
        assert all(visible(error[part]) in plain.err for part in ("what", "where", "why", "do"))
        return error

    return run


def error_of(ended: Ended, code: int) -> dict[str, Any]:
    """Return the error of a command that ran with --json, which must be complete."""
    assert ended.code == code, ended.out + ended.err
    assert set(ended.json) == {"error"}
    error: dict[str, Any] = ended.json["error"]
    assert set(error) == {"code", "what", "where", "why", "do"}
    assert error["code"] == code
    assert error["what"]
    assert error["where"]
    assert error["why"] or error["do"], error
    return error


@pytest.fixture
def text(here: Path) -> Path:
    return write(here / "text.txt", TEXT)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a run of two steps on it, and the cache that goes with them."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTWORDS_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        write(folder / "text.txt", TEXT)
        assert main(["train", "text.txt", "--out", "run", *TINY_FLAGS]) == 0
    return folder


@pytest.fixture
def a_run(template: Path, here: Path) -> Path:
    """A run of two steps, with checkpoints of both, that the test may spoil. Its text is `text.txt` beside it."""
    shutil.copytree(template, here, dirs_exist_ok=True)
    config = here / "run/config.toml"
    write(config, config.read_text().replace(str(template), str(here)))
    return here / "run"


@pytest.fixture
def cache(here: Path) -> Path:
    """Where prepared texts are."""
    return here / "cache/corpora"


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest of a changed folder hold again, as a program of another version would have written it."""
    manifest = json.loads((folder / store.MANIFEST).read_bytes()) | changes
    for name, record in manifest["files"].items():
        data = (folder / name).read_bytes()
        record |= {"bytes": len(data), "sha256": store.sha256(data)}
    del manifest["sha256"]
    manifest["sha256"] = store.sha256(store.canonical_json(manifest))
    write(folder / store.MANIFEST, store.canonical_json(manifest))


def checkpoints(run: Path) -> list[Path]:
    found = sorted((run / "checkpoints").glob("step-*"))
    assert len(found) >= 2
    return found


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
