"""What every test shares: a cache of its own, one thread, and models small enough to train in a moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from firstwords.config import ModelConfig

TEXTS = os.environ.get("FIRSTWORDS_TEXTS")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTWORDS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


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
    "model": {"context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 2, "ff_dim": 64, "drop_rate": 0.1},
}
