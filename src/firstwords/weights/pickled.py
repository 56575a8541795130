"""Weights in a file of `torch.save` (`.pt`, `.pth`, `.bin`), taken out by a guarded process and never opened in this one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import firstwords
from firstwords import reading, store
from firstwords.errors import CannotCreateError, DataError, StorageError
from firstwords.runs.checkpoint import MODEL
from firstwords.weights import folder
from firstwords.weights.folder import Weights

SCALARS = "scalars.json"
WEIGHTS = "weights"
LEAST_S, BYTES_A_SECOND = 60.0, 20e6  # a start, and a slow disk
MOST_ANSWER_BYTES = 1 << 16
# What a program needs to start at all; tokens, keys and proxies stay here.
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP")
CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); sys.path.append(sys.argv[2]); "
    "from firstwords.weights.guarded import main; main(sys.argv[3:])"
)


@dataclass(frozen=True)
class Pickled:
    """What was in a pickled file."""

    weights: Weights
    scalars: dict[str, Any]  # what stood beside the weights and JSON can hold, such as nanoGPT's model_args


def convert(path: Path, out: Path, *, limit_s: float | None = None) -> Pickled:
    """Take the tensors out of a file of `torch.save`, and publish them as safetensors in the folder `out/weights`.

    A process of its own does it, with few rights: see `guarded`. Nothing is left where it fails.

    Args:
        path: The file.
        out: A folder to be made.
        limit_s: Seconds of wall-clock and CPU time; by default a minute and one second more per 20 MB.

    Raises:
        DataError: It holds more than plain tensors and plain values, or its process had to be ended.
        CannotCreateError: `out` exists.
        StorageError: The folder's disk is full, or fails.
    """
    with reading.regular(path) as (_, size):
        pass
    if out.exists():
        raise CannotCreateError("is there already", where=str(out))
    store.make_folder(out)
    try:
        _run(path.absolute(), out.absolute(), limit_s or LEAST_S + size / BYTES_A_SECOND)
        store.verify(out / WEIGHTS)
        return Pickled(folder.find(out / WEIGHTS / MODEL), reading.read_json(out / WEIGHTS / SCALARS))
    except BaseException:
        store.remove_leftovers(out)  # of a process that was ended while it wrote
        if (out / WEIGHTS).is_dir():
            store.remove_folder(out / WEIGHTS)
        store.remove_folder(out)
        raise


def _run(path: Path, out: Path, limit_s: float) -> None:
    package, pytorch = (Path(str(module.__file__)).parent.parent for module in (firstwords, torch))
    command = [sys.executable, "-I", "-c", CHILD, str(package), str(pytorch), str(path), str(out), str(limit_s)]
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    with tempfile.TemporaryFile(dir=out) as answer:  # and no pipe: the limit on the size of files holds for it too
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd=out,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"took over {limit_s:.0f} s to read", where=str(path), why="it was given up") from error
        if done.returncode:
            answer.seek(0)
            raise _refusal(answer.read(MOST_ANSWER_BYTES), path, done.returncode)


def _refusal(answer: bytes, path: Path, code: int) -> DataError | StorageError:
    """Return what the process said of the file, or of how it ended where it said nothing that can be understood."""
    kind = StorageError if code == StorageError.exit_code else DataError
    try:
        told = reading.parse_json(answer, str(path))
        return kind(str(told["what"]), where=str(told.get("where") or path), why=str(told["why"]), do=str(told["do"]))
    except (DataError, KeyError):
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return DataError("the process that read it was ended", where=str(path), why=how)
