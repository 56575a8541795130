"""`firstwords doctor` says what is wrong and what to do, where PyTorch is broken too."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command import Command, write
from firstwords.planning import doctor, known, measure, system
from firstwords.planning.doctor import Disk, Torch
from firstwords.planning.system import System

GOOD = System(
    name="Linux-6.1-x86_64",
    python="3.12.1",
    processor="A processor",
    instructions=("avx2", "avx512_bf16"),
    emulated="",
    cores=8,
    usable_cores=8,
    core_quota=None,
    load=0.3,
    memory_bytes=16 << 30,
    available_bytes=9 << 30,
    swap_used_bytes=0,
)
TORCH = Torch("2.13.0", "cpu", "AVX512", 8, {"cpu": "A processor"}, sees_a_gpu=False, has_onednn=True)
PLACE = Disk("runs", "/home/p/runs", 50 << 30, writable=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SIDES", (64,))
    monkeypatch.setattr(measure, "READ_BYTES", 1 << 20)


def test_a_good_machine_has_nothing_wrong() -> None:
    assert list(doctor.of_system(GOOD)) == []
    assert list(doctor.of_places((PLACE,))) == []
    assert list(doctor.of_torch(TORCH, nvidia=False)) == []
    assert list(doctor.of_threads(TORCH, GOOD, {"OMP_NUM_THREADS": "8"})) == []


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        ({"emulated": "Rosetta"}, "bad", "Rosetta"),
        ({"instructions": ("fma",)}, "warn", "AVX2"),
        ({"available_bytes": 3 << 28}, "warn", "0.8 GB of memory"),
        ({"available_bytes": 1 << 20}, "bad", "0.0 GB of memory"),
        ({"swap_used_bytes": 4 << 30}, "warn", "swap"),
        ({"load": 20.0}, "warn", "20 processes want 8 cores"),
    ],
)
def test_what_is_wrong_with_a_machine_is_said(change: dict[str, Any], level: str, said: str) -> None:
    (found,) = doctor.of_system(dataclasses.replace(GOOD, **change))
    assert found.level == level
    assert said in found.what
    assert found.do


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        ({"free_bytes": 4 << 30}, "warn", "4.3 GB free"),
        ({"free_bytes": 1 << 20}, "bad", "0.0 GB free"),
        ({"writable": False}, "bad", "may not be written"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(change: dict[str, Any], level: str, said: str) -> None:
    (found,) = doctor.of_places((dataclasses.replace(PLACE, **change),))
    assert (found.level, said in found.what, "--out" in found.do) == (level, True, True)


@pytest.mark.parametrize(
    ("change", "nvidia", "said", "do"),
    [
        ({"built_for": "CUDA 12.8"}, False, "built for CUDA 12.8 and finds no GPU", "install the GPU's driver"),
        ({"built_for": "CUDA 12.8"}, True, "built for CUDA 12.8 and finds no GPU", "update the driver"),
        ({}, True, "there is an NVIDIA GPU", "CUDA build"),
        ({"gpu_fault": "no kernel image is available"}, False, "cannot compute: no kernel image", "the CPU is used"),
        ({"has_onednn": False}, False, "oneDNN", "pytorch.org"),
    ],
)
def test_what_is_wrong_with_pytorch_is_said(change: dict[str, Any], nvidia: bool, said: str, do: str) -> None:
    (found,) = doctor.of_torch(dataclasses.replace(TORCH, **change), nvidia=nvidia)
    assert said in found.what
    assert do in found.do


def test_a_gpu_that_is_seen_is_nothing_wrong() -> None:
    gpu = dataclasses.replace(TORCH, built_for="CUDA 12.8", sees_a_gpu=True)
    assert list(doctor.of_torch(gpu, nvidia=True)) == []


def test_too_few_and_too_many_threads_are_said() -> None:
    (few,) = doctor.of_threads(dataclasses.replace(TORCH, threads=1), GOOD, {"OMP_NUM_THREADS": "1"})
    assert "OMP_NUM_THREADS=1: PyTorch takes 1 of 8 cores" in few.what
    assert "--threads 8" in few.do
    (many,) = doctor.of_threads(TORCH, dataclasses.replace(GOOD, core_quota=2.5), {})
    assert not list(doctor.of_threads(dataclasses.replace(TORCH, threads=1), dataclasses.replace(GOOD, core_quota=0.5), {}))
    assert "8 threads share the time of 2.5 cores" in many.what
    assert "--threads 2" in many.do


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise OSError('libtorch_cpu.so: cannot open shared object file')", "libtorch_cpu.so: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL: it is built for instructions"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("pass", ""),
    ],
)
def test_why_pytorch_cannot_be_loaded_is_found_out_in_another_process(program: str, said: str) -> None:
    found = doctor.torch_problem(program)
    assert said in found
    assert bool(found) == bool(said)


def without_torch(tmp_path: Path, *arguments: str, broken: str) -> subprocess.CompletedProcess[str]:
    """Run a command with a `torch` that is broken so."""
    write(tmp_path / "broken/torch/__init__.py", broken)
    paths = os.pathsep.join((str(tmp_path / "broken"), *sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    program = [sys.executable, "-m", "firstwords", *arguments]
    return subprocess.run(program, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)


@pytest.mark.parametrize(
    "broken",
    [
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
        "raise OSError('libtorch_cpu.so: cannot open shared object file')",
        "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    ],
)
def test_doctor_works_where_pytorch_does_not(tmp_path: Path, broken: str) -> None:
    ended = without_torch(tmp_path, "doctor", "--json", broken=broken)
    assert (ended.returncode, "Traceback" in ended.stderr) == (78, False)
    found = json.loads(ended.stdout)
    assert (found["ok"], found["torch"]) == (False, None)
    assert found["machine"]["cores"] >= 1
    (bad,) = [finding for finding in found["findings"] if finding["level"] == "bad"]
    assert bad["what"].startswith("PyTorch does not work: ")
    assert "pip install" in bad["do"]


@pytest.mark.parametrize(
    "broken",
    [
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
        "raise OSError('[WinError 126] The specified module could not be found. Error loading fbgemm.dll')",
        "raise ValueError('libcublas.so.*[0-9] not found in the system path')",
    ],
)
def test_a_verb_that_needs_pytorch_says_that_it_cannot_be_loaded(tmp_path: Path, broken: str) -> None:
    ended = without_torch(tmp_path, "bench", broken=broken)
    assert (ended.returncode, "Traceback" in ended.stderr) == (78, False)
    assert "PyTorch cannot be loaded" in ended.stderr
    assert "firstwords doctor" in ended.stderr


def test_a_fault_of_the_program_is_not_laid_on_pytorch(tmp_path: Path) -> None:
    ended = without_torch(tmp_path, "plan", broken="")  # loaded, but nothing is in it
    assert ended.returncode == 1
    assert "AttributeError" in ended.stderr


def test_doctor_says_what_will_be_used_and_keeps_what_it_measured(command: Command, quick: None, here: Path) -> None:
    found = command("doctor", "--json").json
    assert found["uses"]["precision"] in ("float32", "bfloat16")
    assert found["uses"]["threads"] == found["torch"]["threads"]
    assert {rate["what"] for rate in found["rates"]} >= {"matrix products, float32", "matrix products, bfloat16"}
    assert [finding for finding in found["findings"] if finding["level"] == "ok"]  # the device computes what it should
    (kept,) = (here / "cache" / known.FOLDER).iterdir()
    assert set(json.loads(kept.read_text())["rates"]) == {"float32", "bfloat16"}


def test_doctor_shows_a_person_the_same(command: Command, quick: None) -> None:
    ended = command("doctor")
    for name in ("machine", "memory", "PyTorch", "uses", "ok"):
        assert any(line.startswith(name) for line in ended.out.splitlines()), ended.out


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="NOT RUN: nothing is forbidden to root")
def test_a_cache_that_cannot_be_written_is_said(command: Command, quick: None, here: Path) -> None:
    (here / "cache").mkdir(mode=0o500)
    ended = command("doctor", "--json")
    assert ended.code == 78
    assert any(str(here / "cache") in finding["what"] for finding in ended.json["findings"])


def test_a_cache_whose_place_is_taken_by_a_file_is_said(command: Command, quick: None, here: Path) -> None:
    write(here / "cache", "a file")
    ended = command("doctor", "--json")
    assert ended.code == 78
    bad = [finding for finding in ended.json["findings"] if finding["level"] == "bad"]
    assert any(str(here / "cache") in finding["what"] for finding in bad)


def test_no_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.no_compiler({"CXX": "no-such-compiler"}) == "no C++ compiler no-such-compiler"
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/no-such-folder")
    assert "Python.h" in doctor.no_compiler({"CXX": sys.executable})


MEMINFO = "MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable: 6000 kB\nSwapTotal: 500 kB\nSwapFree: 100 kB\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files in which Linux describes a machine."""
    write(tmp_path / "proc/meminfo", MEMINFO)
    flags = "fpu avx2 avx512f amx_bf16"
    write(
        tmp_path / "proc/cpuinfo", f"processor : 0\nmodel name : One\nflags : {flags}\n\nprocessor : 1\nmodel name : Two\n"
    )
    write(tmp_path / "proc/self/cgroup", "0::/user/me\n")
    return tmp_path


def test_a_machine_is_read_as_its_system_describes_it(root: Path) -> None:
    found = system.read(root)
    assert (found.processor, found.instructions) == ("One", ("avx2", "avx512f", "amx_bf16"))
    memory = found.memory_bytes, found.available_bytes, found.swap_used_bytes
    assert memory == (8000 << 10, 6000 << 10, 400 << 10)
    assert (found.core_quota, found.emulated) == (None, "")


def test_the_limits_of_a_container_count(root: Path) -> None:
    write(root / "sys/fs/cgroup/user/memory.max", "3000000\n")
    write(root / "sys/fs/cgroup/user/me/memory.max", "max\n")
    write(root / "sys/fs/cgroup/user/me/cpu.max", "150000 100000\n")
    found = system.read(root)
    assert (found.memory_bytes, found.available_bytes, found.core_quota) == (3000000, 3000000, 1.5)


@pytest.mark.parametrize(
    ("groups", "folder", "limit", "used", "kind"),
    [
        ("0::/user/me\n", "user", "memory.max", "memory.current", ""),
        ("4:memory:/box\n", "memory/box", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ],
)
def test_what_a_container_holds_of_files_is_left_to_it(
    root: Path, groups: str, folder: str, limit: str, used: str, kind: str
) -> None:
    assert system.left_bytes(root) is None
    write(root / "proc/self/cgroup", groups)
    box = root / "sys/fs/cgroup" / folder
    write(box / limit, "4000000\n")
    write(box / used, "3900000\n")
    assert system.left_bytes(root) == 100_000
    write(box / "memory.stat", f"anon 900000\n{kind}inactive_file 2500000\n{kind}active_file 400000\n")
    assert system.left_bytes(root) == 3_000_000


def test_the_limits_of_a_container_of_the_first_kind_count(root: Path) -> None:
    write(root / "proc/self/cgroup", "4:memory:/box\n2:cpu,cpuacct:/box\n")
    write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(root / "sys/fs/cgroup/memory/box/memory.limit_in_bytes", "4000000\n")
    write(root / "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "50000\n")
    write(root / "sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000\n")
    found = system.read(root)
    assert (found.memory_bytes, found.core_quota) == (4000000, 0.5)
    write(root / "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "-1\n")  # none
    assert system.read(root).core_quota is None


def test_an_emulated_processor_is_noticed(root: Path) -> None:
    write(root / "proc/cpuinfo", "vendor_id : VirtualApple\nmodel name : VirtualApple @ 2.50GHz\n")
    assert system.read(root).emulated == "Rosetta"


def test_a_system_that_says_nothing_is_described_as_far_as_possible(tmp_path: Path) -> None:
    found = system.read(tmp_path)
    assert (found.instructions, found.core_quota, found.swap_used_bytes) == ((), None, None)
    assert found.cores >= 1
    assert list(doctor.of_system(dataclasses.replace(found, load=None))) == []
