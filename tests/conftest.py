"""What every test shares: a cache of its own, one thread, and models small enough to train in a moment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from command import a_run, cache, command, here, refused, template, text  # noqa: F401 - fixtures
from firstwords import judging, watching
from firstwords.app import console
from firstwords.config import ModelConfig
from firstwords.runs import checkpoint
from firstwords.runs.folder import RunFolder
from firstwords.training import state as states
from record import TECHNIQUES, Record

TEXTS = os.environ.get("FIRSTWORDS_TEXTS")
RECORD = Record()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="as many cases as there are, not a sample: takes an hour")
    parser.addoption("--record", metavar="FILE", help="write what the reliability tests proved")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("technique"):
            assert mark.args[0] in TECHNIQUES
            item.user_properties.append(("technique", mark.args[0]))
            item.user_properties += [("row", number) for number in mark.args[1:]]


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody asks
def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: a fifth of the time a test waits, for a disk or for a process of its own."""
    return (os.cpu_count() or 1) + 1


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    RECORD.take(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not RECORD.rows:
        return
    terminalreporter.section("reliability")
    for line in RECORD.lines():
        terminalreporter.write_line(line)
    if config.option.record:
        Path(config.option.record).write_text(RECORD.page())


@pytest.fixture
def proved(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Write down how many cases of the test's technique went well; called last."""

    def note(cases: int, detail: str = "") -> None:
        request.node.user_properties.append(("proved", {"cases": cases, "detail": detail}))

    return note


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether every case is wanted and not a sample."""
    return bool(request.config.option.full)


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: for tests that write a folder some ten thousand times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTWORDS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def short_samples() -> None:
    """Models say less: over half of the time of many a test went into texts that it does not look at."""
    patch = pytest.MonkeyPatch()
    patch.setattr(watching, "SAMPLE_TOKENS", 4)
    patch.setattr(console, "LAST_WORDS", 4)
    patch.setattr(judging, "EVALUATED_TOKENS", 20)


@pytest.fixture
def texts() -> Path:
    if TEXTS is None:
        pytest.skip("NOT RUN: set FIRSTWORDS_TEXTS to a folder with the-verdict.txt and tinyshakespeare.txt")
    return Path(TEXTS)


@pytest.fixture(params=["gpt2", "qwen3"])
def small(request: pytest.FixtureRequest) -> ModelConfig:
    """A small model of each kind of block."""
    return ModelConfig(
        vocab_size=61,
        context_length=16,
        emb_dim=24,
        n_heads=3,
        n_layers=2,
        drop_rate=0.0,
        block=request.param,
        tied_head=request.param == "qwen3",
        init_std=0.2,
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


STORY = "".join(
    f"Once there were {n} ducks; the duck said {n * n}. It was a {'cold' if n % 3 else 'warm'} day.\n" for n in range(120)
)
TINY = {
    "tokenizer": "bytes",
    "batch_size": 4,
    "threads": 1,
    "precision": "float32",
    "device": "cpu",
    "report": False,
    "model": {"context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 2, "ff_dim": 64, "drop_rate": 0.1},
}
OTHER = "".join(chr(0x4E00 + 7919 * n % 20000) for n in range(300))  # a held-out text unlike STORY: soon it gets worse
MEASURED = ("elapsed_s", "tokens_per_s", "took_s", "memory_bytes")  # of the machine, not of the training


def journal(run: Path, *events: str) -> list[dict[str, Any]]:
    """Return what a run journaled of some events, without times, which no two runs share."""
    lines = RunFolder(run).metrics.lines()
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines if line["event"] in events]


def outcome(run: Path) -> dict[str, Any]:
    """Return all that two runs must agree in to count as the same, whether they stopped on the way or not."""
    folder, notices = RunFolder(run), list[str]()
    last, best = checkpoint.newest(folder.checkpoints, notices.append), checkpoint.best(folder.checkpoints, notices.append)
    assert last is not None
    assert best is not None
    saved = last.json(checkpoint.STATE)
    elapsed_s = [line["elapsed_s"] for line in folder.metrics.lines() if line["event"] == "step"]
    return {
        "notices": notices,
        "weights": (last.step, last.weights_sha256, best.step, best.weights_sha256),
        "state": {name: saved[name] for name in states.SCALARS if name != "elapsed_s"},
        "time goes on": elapsed_s == sorted(elapsed_s),
        "losses, gradients, learning rates": [repr(line) for line in journal(run, "step")],
        "evaluations": [repr(line) for line in journal(run, "evaluation", "sample")],
        "samples": folder.samples.path.read_text(),
    }
