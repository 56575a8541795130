"""What the operating system says of this machine, and what it lets this process have of it. Needs no torch."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Of the processor's instructions, those that matrix products use.
INSTRUCTIONS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
    "i8mm",
)
ROOT = Path("/")
LIMITS = ("memory.max", "memory.limit_in_bytes")  # of a control group's memory, in both versions of Linux's


@dataclass(frozen=True)
class System:
    """A machine as its system describes it; None where it does not."""

    name: str
    python: str
    processor: str
    instructions: tuple[str, ...]
    emulated: str  # by what, where the processor is another than this program was made for
    cores: int
    usable_cores: int  # by this process
    core_quota: float | None  # the time of so many cores, which a container may have
    load: float | None  # processes that want a core, mean of the last minute
    memory_bytes: int | None  # that this process may have
    available_bytes: int | None  # of it
    swap_used_bytes: int | None


def read(root: Path = ROOT) -> System:
    """Return what the system says now.

    Args:
        root: Where `proc` and `sys` are.
    """
    meminfo = _table(root / "proc/meminfo")
    limit = _least(_limits(root, "memory", LIMITS))
    physical = _kib(meminfo, "MemTotal") or _physical_bytes()
    affinity = getattr(os, "sched_getaffinity", None)
    cores = os.cpu_count() or 1
    return System(
        name=platform.platform(),
        python=platform.python_version(),
        processor=processor(root),
        instructions=tuple(name for name in INSTRUCTIONS if name in _flags(root)),
        emulated=_emulated(root),
        cores=cores,
        usable_cores=len(affinity(0)) if affinity else cores,
        core_quota=core_quota(root),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        memory_bytes=_whole(_least([physical, limit])),
        available_bytes=available_bytes(root),
        swap_used_bytes=None if "SwapTotal" not in meminfo else _kib(meminfo, "SwapTotal") - _kib(meminfo, "SwapFree"),
    )


def available_bytes(root: Path = ROOT) -> int | None:
    """Return the memory that a new process can have now, or None where the system does not tell."""
    free = _kib(_table(root / "proc/meminfo"), "MemAvailable") or None
    known = [free, left_bytes(root), _whole(_least(_limits(root, "memory", LIMITS)))]
    return min((count for count in known if count is not None), default=None)


def left_bytes(root: Path = ROOT) -> int | None:
    """Return the memory that the limits of a container leave this process, with what they hold of files; None: no limit."""
    names = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
    left = []
    for folder, (most, now, whole) in itertools.product(_groups(root, "memory"), names):
        limit, used = _text(folder / most), _text(folder / now)
        if limit.isdigit() and used.isdigit():
            stat = dict(line.partition(" ")[::2] for line in _text(folder / "memory.stat").splitlines())
            files = sum(int(stat.get(f"{whole}{kind}_file", 0)) for kind in ("inactive", "active"))  # given up when needed
            left.append(max(0, int(limit) - int(used) + files))
    return min(left, default=None)


def core_quota(root: Path = ROOT) -> float | None:
    """Return the time of how many cores this process may have, where a container sets a limit."""
    return _least(_quotas(root))


def processor(root: Path = ROOT) -> str:
    """Return the name of the processor."""
    named = _table(root / "proc/cpuinfo").get("model name", "") or _sysctl("machdep.cpu.brand_string")
    return named or platform.processor() or platform.machine()


def _flags(root: Path) -> set[str]:
    table = _table(root / "proc/cpuinfo")
    return set((table.get("flags") or table.get("Features") or "").split())


def _emulated(root: Path) -> str:
    if "VirtualApple" in str(_table(root / "proc/cpuinfo")) or _sysctl("sysctl.proc_translated") == "1":
        return "Rosetta"
    is_arm = "ARM" in os.environ.get("PROCESSOR_IDENTIFIER", "")
    return "Windows" if is_arm and platform.machine() == "AMD64" else ""


def _sysctl(name: str) -> str:
    """Return what macOS says; empty on other systems."""
    if platform.system() != "Darwin":
        return ""
    ended = subprocess.run(["/usr/sbin/sysctl", "-in", name], capture_output=True, text=True, check=False)
    return ended.stdout.strip()


def _physical_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _quotas(root: Path) -> Iterator[float]:
    """Yield the cores that each control group above this process may use, in both versions of Linux's control groups."""
    for folder in _groups(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        quota, period = quota or _text(folder / "cpu.cfs_quota_us"), period or _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _limits(root: Path, controller: str, names: tuple[str, ...]) -> Iterator[float]:
    for folder in _groups(root, controller):
        yield from (int(text) for text in (_text(folder / name) for name in names) if text.isdigit())


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, from its own up to the root of each mount."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        mount = root / "sys/fs/cgroup" / ("" if number == "0" else controller)
        if number == "0" or controller in controllers.split(","):
            own = mount / group.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount))


def _table(path: Path) -> dict[str, str]:
    """Return `name: value` of a file of such lines, the first of each name."""
    pairs = [line.partition(":") for line in reversed(_text(path).splitlines())]
    return {name.strip(): value.strip() for name, _, value in pairs}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _kib(table: dict[str, str], name: str) -> int:
    return 1024 * int(table.get(name, "0").split(" ")[0])


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value), default=None)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
