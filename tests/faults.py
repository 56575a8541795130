"""What the tests of broken disks share: a run so small that it is trained hundreds of times, and a system that fails."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import MEASURED, STORY
from firstwords import api, recorder, store, watching
from firstwords.events import Listener, ignore_event
from firstwords.recorder import TrainResult
from firstwords.training import evaluate

CALLS = ("open", "write", "fsync", "close", "rename", "replace", "mkdir", "unlink", "rmdir", "truncate", "listdir")
SHORT_WRITE = 0  # stands for no error: the system takes over half of what it was given, and says so
FULL = (errno.ENOSPC, errno.EDQUOT)
FAULTS = (*FULL, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EINTR, SHORT_WRITE)
STEPS = 8
MODEL = {"context_length": 16, "emb_dim": 8, "n_heads": 2, "n_layers": 1, "ff_dim": 16, "block": "gpt2", "tied_head": False}
OPTIM = {"kind": "adamw", "peak_lr": 0.05, "warmup_steps": 2}
UNLIKE = STORY[:20] + "".join(chr(0x4E00 + 7919 * n % 20000) for n in range(6))  # held out: it gets worse before the end


class System:
    """Stands for the module `os` in `store`: what touches a disk passes through `call`, all else is the system's."""

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        return real(*args)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return functools.partial(self.call, name, real) if name in CALLS else real

    def install(self, patch: pytest.MonkeyPatch) -> None:
        usage = functools.partial(self.call, "disk_usage", shutil.disk_usage)
        patch.setattr(store, "os", self)
        patch.setattr(store, "shutil", SimpleNamespace(disk_usage=usage))


class Failing(System):
    """A system whose n-th call fails, alone or with all that follow; of short writes, the n-th write."""

    def __init__(self, n: int, number: int, *, for_ever: bool = False) -> None:
        self.n, self.number, self.for_ever, self.count = n, number, for_ever, 0

    @property
    def failed(self) -> bool:
        return self.count >= self.n

    def is_due(self, name: str) -> bool:
        """Whether this call fails."""
        self.count += name == "write" or self.number != SHORT_WRITE
        return self.count == self.n or (self.for_ever and self.failed)

    def call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        if not self.is_due(name) or (name == "truncate" and self.number in FULL):  # to become shorter needs no space
            return real(*args)
        if self.number == SHORT_WRITE:
            return real(args[0], args[1][: (len(args[1]) + 1) // 2]) if name == "write" else real(*args)
        if name == "write" and self.number in FULL:
            real(args[0], args[1][: len(args[1]) // 2])  # a full disk takes what still fits
        if name == "close":
            real(*args)  # the system frees a descriptor even where it reports that closing failed
        raise OSError(self.number, os.strerror(self.number))


@dataclass(frozen=True)
class End:
    """All of a run that must not depend on what happened to its disk."""

    best: tuple[int, float | None, str]  # its step, its nats per token, its weights
    last: tuple[int, str]  # its step and weights
    figures: tuple[Any, ...]  # of the last evaluation, which a resume reads in the journal
    journal: list[dict[str, Any]]
    samples: str


def train(
    home: Path, name: str = "run", *, resume: bool = False, listener: Listener = ignore_event, report: bool = True
) -> TrainResult:
    """Train the tiny run in `home / name`, or go on with it as it began; nothing waits and little is said."""
    text, other = home.parent / "story.txt", home.parent / "other.txt"
    if not text.exists():
        text.write_text(STORY[:2000])
        other.write_text(UNLIKE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "SAMPLE_TOKENS", 4)
        patch.setattr(evaluate, "EVALUATED_AT_ONCE", 128)
        patch.setattr(recorder, "RETRY_S", 0.0)
        if resume:
            return api.train(out=home / name, resume=True, listener=listener)
        own: dict[str, Any] = {"tokenizer": "bytes", "batch_size": 2, "threads": 1, "precision": "float32", "report": report}
        pace = {"steps": STEPS, "eval_every": 3, "save_every_s": 0.0}
        return api.train(text, out=home / name, listener=listener, val=str(other), model=MODEL, optim=OPTIM, **own, **pace)


def end(result: TrainResult) -> End:
    """Return what came of a run, with what it recorded, less what the machine is."""
    run = Path(result.run)
    said = {name: (run / name).read_text() if (run / name).exists() else "" for name in ("metrics.jsonl", "samples.jsonl")}
    lines = map(json.loads, said["metrics.jsonl"].splitlines())
    kept = [line for line in lines if line["event"] in ("step", "evaluation", "sample")]
    best = (result.best_step, result.nats_per_token, result.weights_sha256)
    journal = [{key: value for key, value in line.items() if key not in MEASURED} for line in kept]
    last, figures = (result.steps, str(result.last["weights_sha256"])), (result.last["nats_per_token"], result.tokens)
    return End(best, last, figures, journal, said["samples.jsonl"])
