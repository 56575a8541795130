"""What every benchmark shares: contenders in processes of their own, interleaved; the tables of docs/benchmarks.md."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/benchmarks.md"
MARK = "RESULT "


def measured(figures: dict[str, float]) -> None:
    """Print what this process measured, for `interleaved`."""
    print(MARK + json.dumps(figures), flush=True)


def interleaved(names: Sequence[str], rounds: int, script: str, arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the medians of what each contender measured: A B C, A B C, ... One that fails is left out and named."""
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(1, rounds + 1):
        for name in names:
            command = [sys.executable, script, *arguments, "--run", name]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            results = [line.removeprefix(MARK) for line in ended.stdout.splitlines() if line.startswith(MARK)]
            if results:
                found.setdefault(name, []).append(json.loads(results[-1]))
            said = results[-1] if results else "failed: " + (ended.stderr.strip().splitlines() or ["?"])[-1]
            print(f"round {number} of {rounds}: {name}: {said}", file=sys.stderr, flush=True)
    return {name: {key: statistics.median(line[key] for line in lines) for key in lines[0]} for name, lines in found.items()}


def report(key: str, title: str, head: list[str], rows: list[list[str]], *, write: bool) -> None:
    """Print a table, and put it into docs/benchmarks.md in the place of the one of that key."""
    said = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    lines = [f"## {title}", "", f"`python {' '.join([os.path.relpath(sys.argv[0], ROOT), *said])}`", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    text = "\n".join([*lines, "", place()])
    print(text)
    if not write:
        return
    before = (
        PAGE.read_text()
        if PAGE.is_file()
        else "# Benchmarks\n\nWritten by the scripts in `benchmarks/`; no figure typed by hand.\n"
    )
    begin, end = f"<!-- {key} -->", f"<!-- end of {key} -->"
    section = f"{begin}\n{text}\n{end}"
    if begin in before:
        PAGE.write_text(before[: before.index(begin)] + section + before[before.index(end) + len(end) :])
    else:
        PAGE.write_text(f"{before.rstrip()}\n\n{section}\n")


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether matrix products in bfloat16 are faster here, by the measurement that chooses our own precision."""
    import torch

    from firstwords.planning import matmul

    return matmul.precision("auto", torch.device("cpu")) == "bfloat16"


def kind(precision: str = "") -> tuple[str, str]:
    """Return which kind of processor this is, for there is a table of each: in a word, and as its title ends.

    Args:
        precision: In which products are faster here, where that was measured already.
    """
    from firstwords.model.generate import has_amx

    if not (precision == "bfloat16" if precision else bfloat16_is_faster()):
        return "float32", "where matrix products are faster in float32"
    if has_amx():
        return "amx", "where matrix products in bfloat16 have units of their own (AMX)"
    return "bfloat16", "where matrix products are faster in bfloat16"


def commit() -> str:
    """Return the commit that is measured."""
    command = ["git", "-C", ROOT, "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def place() -> str:
    """Return where and when the figures were measured."""
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} not installed"

    packages = ", ".join(map(of, ("torch", "transformers", "litgpt", "bantamtrain", "llms-from-scratch")))
    return (
        f"Commit {commit()}, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {processor()}, "
        f"Python {platform.python_version()}, {packages}."
    )


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
