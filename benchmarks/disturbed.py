"""A run with a time budget whose cores are taken from its middle on: is it on time, and does training repeat itself?

    python benchmarks/disturbed.py TEXT [--for 3m] [--write]

At half of the budget, another program begins to use every core, until the run ends. Then `firstwords verify --replay` trains
all steps again that follow the oldest checkpoint that there still is, and compares them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import report


def burn() -> None:
    """Use a core for ever."""
    while True:
        pass


@contextmanager
def burning() -> Iterator[None]:
    """Use every core meanwhile."""
    processes = [multiprocessing.Process(target=burn, daemon=True) for _ in range(os.cpu_count() or 1)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def events(run: Path) -> list[dict[str, Any]]:
    """Return a run's journal."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("text", type=Path)
    options.add_argument("--for", dest="budget", default="3m")
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = options.parse_args()
    from firstwords.config import seconds

    budget_s, firstwords = seconds(given.budget), [sys.executable, "-m", "firstwords"]
    with tempfile.TemporaryDirectory() as folder:
        run, started_s = Path(folder, "run"), time.perf_counter()
        command = [*firstwords, "train", str(given.text), "--for", given.budget, "--out", str(run)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            time.sleep(budget_s / 2)
            half = len(events(run))
            with burning():
                process.wait()
        took_s, journal = time.perf_counter() - started_s, events(run)
        plans = [
            [line["total_steps"] for line in lines if line["event"] == "plan"] for lines in (journal[:half], journal[half:])
        ]
        oldest = min(int(file.parent.name.split("-")[1]) for file in run.glob("checkpoints/step-*/optimizer.safetensors"))
        replay = max(line["step"] for line in journal if line["event"] == "step") - oldest
        replayed = subprocess.run([*firstwords, "verify", str(run), "--replay", str(replay)], check=False)
    rows = [
        ["time", f"{budget_s:.0f} s", f"{took_s:.1f} s"],
        ["steps planned before", "", ", ".join(map(str, plans[0]))],
        ["steps planned after", "", ", ".join(map(str, plans[1]))],
        [f"exit code of the run, and of `verify --replay {replay}`", "0, 0", f"{process.returncode}, {replayed.returncode}"],
    ]
    title = "A time budget, where another program takes every core from the middle on"
    report("disturbed", title, ["", "wanted", "came"], rows, write=given.write)


if __name__ == "__main__":
    main()
