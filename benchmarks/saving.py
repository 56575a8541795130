"""What a checkpoint costs: seconds and bytes of one save, beside what this disk and this processor can do at best.

    python benchmarks/saving.py [--preset gpt2-124m] [--times 5] [--folder .]

A save writes the state, syncs it, reads it back and hashes it; the rotation after it verifies the checkpoint that stays
beside it. The limit is the disk writing and syncing as many bytes, and one SHA-256 over them. Medians, interleaved.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from firstwords.config import run_config
from firstwords.runs import checkpoint
from firstwords.training import state as states
from firstwords.training.loop import SAVE_EVERY_S, SAVE_FACTOR
from firstwords.training.state import TrainState

PIECE = 1 << 23


def trained_state(preset: str) -> TrainState:
    """Return a state whose optimizers have all that they keep."""
    config = run_config({"preset": preset})
    state = states.new_state(config.model, config.optim, 1, "cpu", torch.float32)
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in state.optimizers:
        optimizer.step(config.optim.peak_lr)
    state.model.zero_grad(set_to_none=True)
    return state


def seconds(action: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


def write_and_sync(path: Path, n_bytes: int) -> None:
    piece = os.urandom(PIECE)
    with path.open("wb", buffering=0) as file:
        for _ in range(n_bytes // PIECE):
            file.write(piece)
        os.fsync(file.fileno())
    path.unlink()


def hash_all(n_bytes: int) -> None:
    digest, piece = hashlib.sha256(), bytes(PIECE)
    for _ in range(n_bytes // PIECE):
        digest.update(piece)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--preset", default="gpt2-124m")
    options.add_argument("--times", type=int, default=5)
    options.add_argument("--folder", type=Path, default=Path.cwd())
    given = options.parse_args()
    state = trained_state(given.preset)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        parent, run, took = Path(folder), {"config_sha256": "benchmark"}, {"save": [], "rotate": [], "write": [], "hash": []}
        for step in range(given.times):
            weights, optimizer = state.model.tensors(), states.optimizer_tensors(state)
            saved: list[checkpoint.Checkpoint] = []
            took["save"].append(
                seconds(lambda: saved.append(checkpoint.save(parent, step, weights, optimizer, {}, b"", run)))  # noqa: B023
            )
            took["rotate"].append(seconds(lambda: checkpoint.rotate(saved[0], 2, None)))  # noqa: B023
            n_bytes = sum(path.stat().st_size for path in saved[0].folder.iterdir())
            took["write"].append(seconds(lambda: write_and_sync(parent / "raw", n_bytes)))  # noqa: B023
            took["hash"].append(seconds(lambda: hash_all(n_bytes)))  # noqa: B023
    median = {name: statistics.median(values) for name, values in took.items()}
    save_s = statistics.median(a + b for a, b in zip(took["save"], took["rotate"], strict=True))
    interval_s = max(SAVE_EVERY_S, SAVE_FACTOR * save_s)
    print(f"{given.preset}: {n_bytes / 1e9:.3f} GB, save {median['save']:.2f} s, rotation {median['rotate']:.2f} s")
    print(f"limit: write and sync {median['write']:.2f} s, one SHA-256 {median['hash']:.2f} s")
    print(f"default interval {interval_s:.0f} s: {save_s / (interval_s + save_s):.2%} of the training time")


if __name__ == "__main__":
    main()
