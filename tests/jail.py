"""A process that opens hostile files and is watched while it does: imports once, then forks for each file.

Reads one JSON task a line from standard input, `{"door": ..., "path": ..., "place": ...}`, and answers each with one line.
A door is a way in which the program reads a file; `naive:` doors are how it must not, to show that a file does do harm.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PAGE = resource.getpagesize()
SPARE_BYTES = 200 << 20
HARD_STOP_S = 60
ESCAPED = 99  # exit code where the audit saw what must not happen
WATCHED = ("pickle.find_class", "exec", "compile", "os.system", "socket.connect", "socket.bind", "import", "ctypes.dlopen")


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


TORCH_BYTES = rss_bytes()  # of a process that has imported torch and nothing else

import firstwords  # noqa: E402
from firstwords import reading, store  # noqa: E402
from firstwords.app import cli  # noqa: E402
from firstwords.errors import FirstwordsError  # noqa: E402
from firstwords.runs import tensor_file  # noqa: E402
from firstwords.text import tokenizer  # noqa: E402
from firstwords.weights import archive, folder, guarded, pickled  # noqa: E402


def load_tensors(path: Path, place: Path) -> None:
    for tensor in tensor_file.load(path).values():
        tensor.double().sum().item()


def load_folder(path: Path, place: Path) -> None:
    for _, tensor in folder.find(path).tensors():
        tensor.double().sum().item()


def convert(path: Path, place: Path) -> None:
    pickled.convert(path, place / "out")


def verb(path: Path, place: Path) -> int:
    return cli.main([path.name if word == "PATH" else word for word in (place / "verb.txt").read_text().split("\n")])


def load_model(path: Path, place: Path) -> None:
    firstwords.load(path).generate("a", max_new_tokens=2)


def only_weights_only(path: Path, place: Path) -> None:
    archive.require_plain = lambda path: None
    guarded.limit_memory(SPARE_BYTES, for_good=True)
    torch.load(path, weights_only=True, map_location="cpu")


def only_audit(path: Path, place: Path) -> None:
    sys.addaudithook(guarded.Guard())
    torch.load(path, weights_only=False)


def naive_pickle(path: Path, place: Path) -> None:
    with path.open("rb") as file:
        pickle.load(file)


def naive_torch(path: Path, place: Path) -> None:
    torch.load(path, weights_only=False)


def naive_numpy(path: Path, place: Path) -> None:
    import numpy as np

    found = np.load(path, allow_pickle=True)
    if hasattr(found, "files"):
        _ = [found[name] for name in found.files]


def naive_exec(path: Path, place: Path) -> None:
    exec(path.read_text(), {})


def naive_class_path(path: Path, place: Path) -> None:
    """What a loader does that believes a class's name in a configuration (CVE-2026-58659)."""
    import importlib

    value = json.loads(path.read_text())
    module, _, name = value["_target_"].rpartition(".")
    getattr(importlib.import_module(module), name)(*value["_args_"])


def naive_extract(path: Path, place: Path) -> None:
    """Write each member of a zip or tar where its name says."""
    import tarfile
    import zipfile

    inside = place / "deep" / "er"
    inside.mkdir(parents=True)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            for name in zipped.namelist():
                target = inside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(zipped.read(name))
    else:
        with tarfile.open(path) as tarred:
            tarred.extractall(inside, filter="fully_trusted")


DOORS: dict[str, Callable[[Path, Path], Any]] = {
    "safetensors": load_tensors,
    "folder": load_folder,
    "pickled": convert,
    "verb": verb,
    "model": load_model,
    "info": lambda path, place: firstwords.info(path) and None,
    "json": lambda path, place: reading.read_json(path),
    "tokenizer": lambda path, place: tokenizer.read(path),
    "manifest": lambda path, place: store.verify(path),
    "only:weights_only": only_weights_only,
    "only:audit": only_audit,
    "naive:pickle": naive_pickle,
    "watched:pickle": naive_pickle,
    "naive:torch": naive_torch,
    "naive:numpy": naive_numpy,
    "naive:exec": naive_exec,
    "naive:class_path": naive_class_path,
    "naive:extract": naive_extract,
}


def watch(event: str, arguments: tuple[Any, ...], place: str, tell: Callable[..., None]) -> None:
    """End the process at what reading a file must never lead to."""
    wrong = event in WATCHED
    if event == "import":
        wrong = arguments[0].split(".")[0] not in sys.stdlib_module_names
    if event in ("exec", "compile"):  # imports of the standard library; annotations, which it compiles
        caller = sys._getframe(2).f_code.co_filename
        wrong = not caller.startswith(("<frozen importlib", typing.__file__))
    if event == "subprocess.Popen":  # our own guarded child is the only one
        wrong = list(arguments[1][:4]) != [sys.executable, "-I", "-c", pickled.CHILD]
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & guarded.WRITING:
        where = os.path.realpath(os.fsdecode(arguments[0])) if not isinstance(arguments[0], int) else place
        wrong = not where.startswith((place, os.devnull))
    if wrong:
        tell(code=ESCAPED, message=f"{event}: {str(arguments)[:300]}")
        os._exit(0)


def in_jail(task: dict[str, str], answer: int) -> None:
    place, path, door = Path(task["place"]), Path(task["path"]), task["door"]
    os.chdir(place)
    os.environ["FIRSTWORDS_CACHE"] = str(place / "cache")
    signal.alarm(HARD_STOP_S)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    before, began = rss_bytes(), time.perf_counter()

    def tell(**said: Any) -> None:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 - TORCH_BYTES
        figures = {"bytes": max(own, child, 0), "seconds": time.perf_counter() - began}
        os.write(answer, json.dumps({**said, **figures}).encode())

    if not door.startswith(("naive:", "only:")):
        size = path.stat().st_size if path.is_file() else 0
        now = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
        most = now + min(2 * size, 1 << 30) + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        sys.addaudithook(lambda event, arguments: watch(event, arguments, str(place.resolve()), tell))
    try:
        code = DOORS[door](path, place)
        tell(code=code if isinstance(code, int) else 0, message="")
    except FirstwordsError as error:
        tell(code=error.exit_code, message=str(error))
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        tell(code=1, message=f"{type(error).__name__}: {str(error)[:1000]} at {at.filename}:{at.lineno}")


def answer_to(task: dict[str, str]) -> bytes:
    readable, writable = os.pipe()
    if (child := os.fork()) == 0:
        os.close(readable)
        try:
            in_jail(task, writable)
        finally:
            os._exit(0)
    os.close(writable)
    said = b""
    while piece := os.read(readable, 1 << 16):
        said += piece
    os.close(readable)
    status = os.waitpid(child, 0)[1]
    return said or json.dumps({"code": -1, "message": f"ended by {status}", "bytes": 0, "seconds": HARD_STOP_S}).encode()


def warm_up() -> None:
    """Import whatever a door imports late, by using all of them on something good."""
    from hostile_files import make_checkpoint

    with tempfile.TemporaryDirectory() as made, contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        place = Path(made)
        good = make_checkpoint(place / "run" / "checkpoints")
        (place / "run" / "config.toml").write_text('tokenizer = "bytes"')
        load_model(good, place)
        for words in (["verify", str(place / "run")], ["train", "--config", str(good / "state.json")], ["info", str(good)]):
            cli.main(words)


def main() -> None:
    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        sys.stdout.buffer.write(answer_to(json.loads(line)) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
