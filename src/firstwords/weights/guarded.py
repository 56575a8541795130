"""The process that opens a pickled file: few rights, little memory, little time. `pickled` starts it; nothing else may.

The guards, each for the case that those before it fail: the archive and its pickle are looked at without being run
(`archive`); the system limits memory, time, files and processes; every event of Python's audit but reading is the end of the
process; and only then `torch.load` runs, with `weights_only`. The answer is a published folder, or one JSON object on
standard output. Windows has no limits of this kind: there only the time, which the parent keeps, and the audit guard.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from firstwords import store
from firstwords.errors import DataError, FirstwordsError, StorageError
from firstwords.weights import archive

if TYPE_CHECKING:
    from torch import Tensor

SPARE_BYTES = 200 << 20  # memory beyond twice the file
SPARE_FILE_BYTES = 16 << 20
MOST_OPEN_FILES = 64
MOST_VALUES, MOST_DEPTH = 10_000, 20  # of what stands beside the weights
# Events that only look; any other (import, exec, compile, pickle.find_class, subprocess, socket, ctypes) ends the process.
LOOKING = frozenset(("sys._getframe", "object.__getattr__", "builtins.id", "os.listdir", "os.scandir", "array.__new__"))
STARTING = frozenset(("_thread.start_new_thread", "_thread.start_joinable_thread"))  # told of by Python 3.12 and 3.13
MAKING = frozenset(("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"))
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main(arguments: list[str]) -> NoReturn:
    """Do what `pickled.convert` asks: file, folder, seconds. Ends the process."""
    path, out, limit_s = Path(arguments[0]), Path(arguments[1]), float(arguments[2])
    try:
        _extract(path, out, limit_s)
    except StorageError as error:  # of the folder that it writes to
        refuse(error.what, error.why, error.do, where=error.where, code=error.exit_code)
    except FirstwordsError as error:
        refuse(error.what, error.why, error.do)
    except MemoryError:
        refuse("needs more memory than its size allows")
    except Exception as error:  # torch.load raises whatever a wrong file leads it to
        # PyTorch's own message first advises to load without this guard.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        refuse("cannot be read as plain tensors", f"{type(error).__name__}: {reason}", archive.SAFER)
    sys.stdout.flush()
    os._exit(0)


def refuse(what: str, why: str = "", do: str = "", *, where: str = "", code: int = DataError.exit_code) -> NoReturn:
    """Say why and end the process, whatever it is doing; `where` is empty where that is the pickled file."""
    answer = {"what": what[:500], "where": where[:500], "why": why[:500], "do": do}
    os.write(1, json.dumps(answer).encode())
    os._exit(code)


def _extract(path: Path, out: Path, limit_s: float) -> None:
    size = path.stat().st_size
    limit_resources(size, limit_s)
    limit_memory(SPARE_BYTES, for_good=False)
    archive.require_plain(path)
    limit_memory(None, for_good=False)

    import torch

    from firstwords.runs import tensor_file
    from firstwords.runs.checkpoint import MODEL
    from firstwords.weights.pickled import SCALARS, WEIGHTS

    torch.set_num_threads(1)
    _rehearse()
    limit_memory(2 * size + SPARE_BYTES, for_good=True)
    guard = Guard()
    sys.addaudithook(guard)
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    tensors, scalars = choose(loaded)
    require_dense(tensors, 2 * size)
    guard.output = str(out)
    files = {MODEL: tensor_file.safetensors_bytes(tensors), SCALARS: [store.canonical_json(scalars)]}
    store.publish(out / WEIGHTS, files, lambda: {"kind": "weights"})


def _rehearse() -> None:
    """Load something harmless, so that all that torch imports late is there before imports are forbidden."""
    import io

    import torch

    file = io.BytesIO()
    torch.save({"tensor": torch.zeros(1)}, file)
    torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@dataclass
class Guard:
    """An audit hook: the process ends at the first event that reading plain tensors does not need."""

    output: str = ""  # the only folder that may be written to; none while the pickle runs

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Look at one event."""
        if event in LOOKING or (event == "open" and not self._writes(arguments)):
            return
        paths = arguments[: 2 if event == "os.rename" else 1]
        makes = (event in MAKING or event == "open") and all(map(self._is_inside, paths))
        if self.output and (makes or event in STARTING):
            return
        refuse(f"wants to do what no weights need: {event}", str(arguments[:1])[:200])

    def _writes(self, arguments: tuple[Any, ...]) -> bool:
        return not isinstance(arguments[2], int) or bool(arguments[2] & WRITING)

    def _is_inside(self, path: Any) -> bool:
        inside = os.path.realpath(self.output) + os.sep
        return isinstance(path, str | bytes | os.PathLike) and os.path.realpath(os.fsdecode(path)).startswith(inside)


def choose(loaded: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the table of tensors in what was loaded, and the plain values beside it.

    Raises:
        DataError: There is none, or there are several.
    """
    if not isinstance(loaded, Mapping):
        raise DataError("holds no table of tensors", why=f"it is a {type(loaded).__name__}")
    scalars = {name: value for name, value in loaded.items() if isinstance(name, str) and is_plain(value)}
    inner = {name: value for name, value in loaded.items() if isinstance(name, str) and _is_table(value)}
    outer = {name: value for name, value in loaded.items() if _is_tensor(value)}
    if len(inner) > 1 or not (inner or outer):
        why = f"there are several: {', '.join(inner)[:200]}" if inner else ""
        raise DataError("holds no single table of tensors", why=why, do="save one in a file of its own" if inner else "")
    return (dict(next(iter(inner.values()))) if inner else outer), scalars


def _is_tensor(value: Any) -> bool:
    import torch

    return type(value) in (torch.Tensor, torch.nn.Parameter)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(map(_is_tensor, value.values()))


def is_plain(value: Any) -> bool:
    """Return whether JSON can hold `value` and it is small; lists of the same lists, which multiply, are not."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        one, depth = waiting.pop()
        seen += 1
        match one:
            case dict() if all(isinstance(name, str) for name in one):
                waiting += [(inner, depth + 1) for inner in one.values()]
            case list() | tuple():
                waiting += [(inner, depth + 1) for inner in one]
            case None | str():
                pass
            case int() | float() if math.isfinite(one) and abs(one) < 1 << 63:
                pass
            case _:
                return False
        if seen + len(waiting) > MOST_VALUES or depth > MOST_DEPTH:
            return False
    return True


def require_dense(tensors: Mapping[str, Tensor], most_bytes: int) -> None:
    """Raise a DataError unless all are dense, of a dtype that safetensors have, and together at most `most_bytes`.

    Views of one storage, such as tied weights, count each; a number that is shown a million times is refused.
    """
    import torch

    from firstwords.runs import tensor_file

    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not tensor_file.is_proper_name(name):
            raise DataError(f"a tensor cannot be called {str(name)[:80]!r}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in tensor_file.DTYPES.values():
            raise DataError(f"tensor {name!r} is not dense, or of the dtype {tensor.dtype}, which is not supported")
        total += tensor.numel() * tensor.element_size()
    if total > most_bytes:
        raise DataError(f"its tensors would have {total} bytes", why=f"a file of its size can hold {most_bytes}")


def limit_resources(size: int, limit_s: float) -> None:
    """Limit CPU time, the size of files, open files, processes and core dumps, for good."""
    try:
        import resource
    except ImportError:  # Windows
        return
    seconds = math.ceil(limit_s)
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 2 * size + SPARE_FILE_BYTES,
        resource.RLIMIT_NOFILE: MOST_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (allowed, allowed))


def limit_memory(more_bytes: int | None, *, for_good: bool) -> None:
    """Limit the address space to what it is now and `more_bytes`; None: as large as the system lets it be.

    Only where the system tells how large it is (Linux).
    """
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return
    import resource

    now, hard = int(statm.read_bytes().split()[0]) * resource.getpagesize(), resource.getrlimit(resource.RLIMIT_AS)[1]
    most = hard if more_bytes is None else now + more_bytes
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most if for_good else hard))
