"""What is this machine, what will firstwords use of it, and what is wrong with it? Answers where PyTorch is broken too.

The rules are functions of facts; only `examine` gathers facts.
"""

from __future__ import annotations

import getpass
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from firstwords.config import Precision, run_config
from firstwords.errors import FirstwordsError
from firstwords.model import cost
from firstwords.planning import known, system
from firstwords.planning.system import System

if TYPE_CHECKING:
    from torch import device as Device
    from torch import dtype as DType

    from firstwords.planning.measure import BenchResult

Level = Literal["ok", "warn", "bad"]
PRESET, VOCAB_SIZE = "laptop", 2048  # that must fit, with a tokenizer made for a text of a megabyte
GB = 1e9
LITTLE_MEMORY, LITTLE_DISK = 2 * GB, 5 * GB
SWAP_SHARE = 0.05  # of the memory: from here on programs wait for the disk
MOST_IMPORT_S = 120.0  # of PyTorch, from a cold and slow disk
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
IMPORT = "import torch; torch.ones(64, 64) @ torch.ones(64, 64)"
INSTALL = "install PyTorch anew: pip install --force-reinstall 'torch>=2.11,<2.14'"


@dataclass(frozen=True)
class Finding:
    """One thing that is as it should be, or is not, and what to do about it."""

    level: Level
    what: str
    do: str = ""


@dataclass(frozen=True)
class Disk:
    """A folder that firstwords writes to, or the nearest one above it that is there."""

    what: str
    path: str
    free_bytes: int
    writable: bool


@dataclass(frozen=True)
class Torch:
    """What PyTorch says of itself and of the machine."""

    version: str
    built_for: str  # cpu, CUDA 12.8, ROCm 6.4
    capability: str  # of the processor, as PyTorch uses it
    threads: int
    devices: dict[str, str]  # by the name that --device takes
    sees_a_gpu: bool
    has_onednn: bool  # the library of its bfloat16 products on a CPU
    gpu_fault: str = ""  # why the first GPU that it sees cannot compute


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    machine: System
    places: tuple[Disk, ...]
    compiler: str  # why there is none for torch.compile; empty where there is
    compile_cache: tuple[str, int]  # its folder, and its bytes
    torch: Torch | None  # None: it does not work
    rates: tuple[BenchResult, ...] = ()
    uses: dict[str, Any] = field(default_factory=dict)  # device, precision, threads, compile
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether one can train here."""
        return all(finding.level != "bad" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of the command line's contract."""
        return {"ok": self.ok, **asdict(self), "rates": [mark.as_dict() for mark in self.rates]}


def examine(cache: Path, runs: Path, environment: Mapping[str, str] = os.environ) -> Diagnosis:
    """Return what is found, measured anew in some seconds; the rates are kept in `cache` for the runs to come.

    Args:
        cache: Where firstwords keeps what can be made again.
        runs: Where runs are made.
        environment: The process's variables.
    """
    machine, places = system.read(), (_place("runs", runs), _place("cache", cache))
    compiler, compiled = no_compiler(environment), compile_cache(environment)
    findings = [*of_system(machine), *of_places(places)]
    if problem := torch_problem():
        findings.append(Finding("bad", f"PyTorch does not work: {problem}", INSTALL))
        return Diagnosis(machine, places, compiler, compiled, None, findings=tuple(findings))
    torch = _torch()
    findings += [*of_torch(torch, nvidia=Path("/proc/driver/nvidia").exists()), *of_threads(torch, machine, environment)]
    findings += [Finding("warn", f"there is no compiling: {compiler}", "only --compile on needs it")] if compiler else []
    rates, uses, measured = _measured(cache, machine, torch, compiler)
    findings += measured
    return Diagnosis(machine, places, compiler, compiled, torch, rates, uses, tuple(findings))


def of_system(machine: System) -> Iterator[Finding]:
    """Yield what is wrong with a machine, whatever PyTorch is like."""
    if machine.emulated:
        what = f"this Python was made for another processor and runs under {machine.emulated}: many times slower"
        yield Finding("bad", what, "install a Python for this processor, and firstwords in it")
    if "x86" in machine.name and machine.instructions and "avx2" not in machine.instructions:
        yield Finding(
            "warn",
            "the processor has no AVX2: matrix products are slow",
            "give no --preset: a time budget takes a size that suits",
        )
    model, free = run_config({"preset": PRESET, "model.vocab_size": VOCAB_SIZE}).model, machine.available_bytes
    if free is not None and free < max(LITTLE_MEMORY, cost.training_bytes(model, 1)):
        level: Level = "bad" if free < cost.training_bytes(model, 1) else "warn"
        yield Finding(level, f"{free / GB:.1f} GB of memory are free", "end other programs, or take --preset laptop-tiny")
    if machine.swap_used_bytes and machine.swap_used_bytes > SWAP_SHARE * (machine.memory_bytes or 0):
        what = f"{machine.swap_used_bytes / GB:.1f} GB of memory are on the disk (swap)"
        yield Finding("warn", what, "end other programs: what comes back from there stops a run for seconds")
    if machine.load is not None and machine.load > machine.usable_cores:
        cores = "1 core" if machine.usable_cores == 1 else f"{machine.usable_cores} cores"
        what = f"{machine.load:.0f} processes want {cores}: all that is measured now is too low"
        yield Finding("warn", what, "end them, then run firstwords doctor again")


def of_places(places: tuple[Disk, ...]) -> Iterator[Finding]:
    """Yield what is wrong with the folders that are written to."""
    needed = 2 * cost.checkpoint_bytes(run_config({"preset": PRESET}).model)
    for place in places:
        elsewhere = "FIRSTWORDS_CACHE" if place.what == "cache" else "--out"
        if not place.writable:
            yield Finding(
                "bad", f"{place.path} may not be written ({place.what})", f"allow it, or name another: {elsewhere}"
            )
        elif place.free_bytes < LITTLE_DISK:
            level: Level = "bad" if place.free_bytes < needed else "warn"
            what = f"the disk of {place.path} has {place.free_bytes / GB:.1f} GB free ({place.what})"
            yield Finding(level, what, f"free some space, or name a place on another disk: {elsewhere}")


def of_torch(torch: Torch, *, nvidia: bool) -> Iterator[Finding]:
    """Yield what is wrong with PyTorch.

    Args:
        torch: What it says.
        nvidia: Whether NVIDIA's driver is loaded.
    """
    if torch.built_for != "cpu" and not torch.sees_a_gpu:
        what = f"PyTorch is built for {torch.built_for} and finds no GPU"
        do = "update the driver: this build needs a newer one" if nvidia else "install the GPU's driver"
        yield Finding("warn", what, f"{do}; where there is no GPU, PyTorch's CPU build is gigabytes smaller")
    if torch.gpu_fault:
        do = "end what holds it, or install the build of PyTorch for it; until then the CPU is used"
        yield Finding("warn", f"the GPU cannot compute: {torch.gpu_fault}", do)
    if torch.built_for == "cpu" and nvidia:
        yield Finding("warn", "there is an NVIDIA GPU, but this PyTorch is built for the CPU", "install its CUDA build")
    if not torch.has_onednn:
        yield Finding(
            "warn", "this PyTorch was built without oneDNN: bfloat16 is slow", "install one of pytorch.org's builds"
        )


def of_threads(torch: Torch, machine: System, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what is wrong with the number of threads."""
    cores = int(min(machine.usable_cores, machine.core_quota or machine.usable_cores))
    set_ = [name for name in THREAD_VARIABLES if environment.get(name)]
    if set_ and torch.threads < cores:
        what = f"{set_[0]}={environment[set_[0]]}: PyTorch takes {torch.threads} of {cores} cores"
        yield Finding("warn", what, f"unset {set_[0]}, or give --threads {cores}")
    if machine.core_quota is not None and torch.threads > max(1, machine.core_quota):
        what = f"{torch.threads} threads share the time of {machine.core_quota:g} cores, which this container has"
        yield Finding("warn", what, f"give --threads {max(1, cores)}")


def torch_problem(program: str = IMPORT) -> str:
    """Return why PyTorch cannot be used, empty where it can: tried in a process of its own, which it may bring down."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=MOST_IMPORT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it is not loaded after {MOST_IMPORT_S:.0f} s"
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        why = ": it is built for instructions that this processor lacks" if name == "SIGILL" else ""
        return f"loading it ends the process by {name}{why}"
    return (ended.stderr.strip().splitlines() or ["it says nothing"])[-1][:300] if ended.returncode else ""


def no_compiler(environment: Mapping[str, str]) -> str:
    """Return what `torch.compile` lacks to make code for the CPU, empty where nothing."""
    compiler = environment.get("CXX") or {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler {compiler}"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"no {header}, which Python's development package has"


def compile_cache(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return where `torch.compile` keeps what it made, and how many bytes that is."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # no such user, as in some containers
        user = "user"
    folder = Path(environment.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / f"torchinductor_{user}")
    try:
        return str(folder), sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:  # something writes there at this moment, or it is another's
        return str(folder), 0


def _place(what: str, path: Path) -> Disk:
    there = path.absolute()
    while not _is_folder(there) and there != there.parent:
        there = there.parent
    return Disk(what, str(there), shutil.disk_usage(there).free, os.access(there, os.W_OK | os.X_OK))


def _is_folder(path: Path) -> bool:
    """Whether it is one that may be looked at; what lies in a folder that may not be entered is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _torch() -> Torch:
    import torch

    from firstwords.planning import machine as machines
    from firstwords.planning import process

    devices = {"cpu": system.processor()}
    fault = machines.unusable_gpu()
    n_gpus = torch.cuda.device_count()
    devices |= {f"cuda:{i}": "not usable" if fault else torch.cuda.get_device_name(i) for i in range(n_gpus)}
    devices |= {"mps": "Apple GPU"} if torch.backends.mps.is_available() else {}
    devices |= {"xpu": "Intel GPU, which firstwords does not use"} if torch.xpu.is_available() else {}
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    return Torch(
        version=str(torch.__version__),
        built_for=f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else "cpu",
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=process.usable_threads(),
        devices=devices,
        sees_a_gpu=len(devices) > 1,
        has_onednn=bool(torch.backends.mkldnn.is_available()),  # type: ignore[no-untyped-call]
        gpu_fault=fault,
    )


def _measured(
    cache: Path, machine: System, torch: Torch, compiler: str
) -> tuple[tuple[BenchResult, ...], dict[str, Any], list[Finding]]:
    """Return rates, what firstwords will therefore use, and what that shows to be wrong."""
    from firstwords.planning import machine as machines
    from firstwords.planning import matmul, measure, process

    findings = []
    with process.threads(None):
        rates = [
            measure.BenchResult(f"matrix products, {n}", measure.matmul_flops_per_s(d) / GB, "GFLOP/s")
            for n, d in machines.DTYPES.items()
        ]
        if machine.available_bytes is None or machine.available_bytes > LITTLE_MEMORY:
            rates.append(measure.BenchResult("reading memory", measure.reading_rate() / GB, "GB/s"))
        device = machines.device("auto")
        key = machines.key(device)
        found = replace(known.read(cache, key), rates=matmul.rates(device))
        try:
            known.write(cache, key, found)
        except FirstwordsError as error:
            findings.append(Finding("bad", str(error)))
        precision = matmul.precision_of(found.rates)
        findings.append(_trusted(device, precision, machines.DTYPES[precision]))
        uses = {"device": str(device), "precision": precision, "threads": torch.threads}
    pays = ["where `bench --compile` measured that it pays"] if found.compiling else []
    pays += ["in long runs that keep the GPU busy"] if machines.compiles_for_gpu(device) else []
    compiled = ", and ".join(pays) or "off"
    return tuple(rates), {**uses, "compile": "off" if compiler else compiled}, findings


def _trusted(device: Device, precision: Precision, dtype: DType) -> Finding:
    """Return whether the device computes what float32 on the CPU does."""
    import torch

    from firstwords.planning import measure, trust
    from firstwords.text.batches import Batch
    from firstwords.training.state import new_state

    config = measure.bench_config(PRESET, precision)
    model = new_state(config.model, config.optim, config.seed, str(device), dtype).model
    shape = (measure.ROWS, config.model.context_length)
    ids = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(config.seed))
    found = trust.check(model, Batch(ids, ids.roll(-1, 1), ids.numel()), trust.Way(str(device), precision, "off"))
    if found is None:
        return Finding("ok", f"{device} in {precision} is what others are held against")
    if found.problem:
        return Finding("warn", found.problem, "nothing: train notices it and takes a safer way")
    share = f"{100 * found.gradient_difference:.1f} %"
    return Finding("ok", f"{found.way}: gradients are within {share} of those of {trust.REFERENCE}")
