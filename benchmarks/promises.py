"""What was said before a run against what came of it: time to exit, memory, speed, bits per byte; row by row, resumable.

    python benchmarks/promises.py TEXTS [--texts story dialogue prose torch sources] [--for 1m 3m 10m] [--write]

TEXTS is a folder of `NAME.txt`. Each pair of text and budget is one `firstwords train` in a process of its own, after one
`firstwords plan` for the machine; rows that benchmarks/promises.jsonl holds are not run again. The machine should do nothing
else meanwhile. The texts: those of benchmarks/prediction.py, which the law was fitted to, and two that it was not: essays in
Markdown (Debian anarchism) and Italian proverbs and quotations (Debian fortunes-it).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prediction import KINDS

from record import ROOT, commit, report

ROWS = ROOT / "benchmarks/promises.jsonl"
TEXTS, BUDGETS = ("story", "dialogue", "prose", "torch", "sources"), ("1m", "3m", "10m")
LATE_SHARE, LATE_S, EARLY_SHARE, NEAR = 0.03, 3.0, 0.05, 0.10


def planned(text: Path, cache: Path) -> float:
    """Measure this machine as `firstwords plan` does, for the runs to come, and return how long that took."""
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "firstwords", "plan", str(text), "--json"]
    subprocess.run(command, env={**os.environ, "FIRSTWORDS_CACHE": str(cache)}, capture_output=True, check=True)
    return time.perf_counter() - started_s


def trained(text: Path, budget: str, measured: Path) -> dict[str, Any]:
    """Train within one budget, the text not prepared yet, and return what was predicted and what came of it."""
    from firstwords.config import seconds

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        shutil.copytree(measured, cache)
        command = ["firstwords", "train", str(text), "--for", budget, "--out", f"{folder}/run", "--json"]
        environment = {**os.environ, "FIRSTWORDS_CACHE": str(cache)}
        started_s = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            said = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = status
        took_s, result = time.perf_counter() - started_s, json.loads(said.splitlines()[-1])
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "text": text.stem,
        "text_bytes": text.stat().st_size,
        "for": budget,
        "command": f"firstwords train {text.name} --for {budget}",
        "predicted": result["predicted"],
        "actual": {
            "elapsed_s": round(took_s, 2),
            "memory_bytes": used.ru_maxrss * unit,
            "tokens_per_s": round(result["tokens"] / took_s, 1),
            "bits_per_byte": result["bits_per_byte"],
            "steps": result["steps"],
        },
        "budget_s": seconds(budget),
        "commit": commit(),
        "load": os.getloadavg()[0],
    }


def kept(row: dict[str, Any]) -> dict[str, bool]:
    """Return which of the promises a row kept."""
    predicted, actual, budget_s = row["predicted"], row["actual"], row["budget_s"]
    late_s = actual["elapsed_s"] - budget_s
    low, _, high = predicted["bits_per_byte"]
    return {
        "time": -EARLY_SHARE * budget_s <= late_s <= max(LATE_SHARE * budget_s, LATE_S),
        "memory": abs(predicted["memory_bytes"] / actual["memory_bytes"] - 1) <= NEAR,
        "speed": abs(predicted["tokens_per_s"] / actual["tokens_per_s"] - 1) <= NEAR,
        "bits": low <= actual["bits_per_byte"] <= high,
    }


def line(row: dict[str, Any]) -> list[str]:
    """Return a row of the table: predicted, then actual."""
    predicted, actual, is_kept = row["predicted"], row["actual"], kept(row)
    mark = {name: "" if good else " ✗" for name, good in is_kept.items()}
    low, _, high = predicted["bits_per_byte"]
    return [
        f"{row['text']}, {row['text_bytes'] / 1e6:.2f} MB" + ("" if row["text"] in KINDS else ", new to the law"),
        f"{row['budget_s']:.0f} s, {actual['elapsed_s']:.1f} s{mark['time']}",
        f"{predicted['memory_bytes'] / 1e9:.2f} GB, {actual['memory_bytes'] / 1e9:.2f} GB{mark['memory']}",
        f"{predicted['tokens_per_s']:,.0f}, {actual['tokens_per_s']:,.0f}{mark['speed']}",
        f"{low:.2f} to {high:.2f}, {actual['bits_per_byte']:.3f}{mark['bits']}",
        row["commit"][:7],
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--texts", nargs="+", default=TEXTS)
    options.add_argument("--for", dest="budgets", nargs="+", default=BUDGETS)
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = options.parse_args()
    rows = [json.loads(text) for text in ROWS.read_text().splitlines()] if ROWS.is_file() else []
    done = {(row["text"], row["for"]) for row in rows}
    wanted = [(name, budget) for budget in given.budgets for name in given.texts if (name, budget) not in done]
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder, "cache")
        if wanted:
            took_s = planned(given.folder / f"{wanted[0][0]}.txt", measured)
            print(f"firstwords plan took {took_s:.1f} s", file=sys.stderr, flush=True)
        for name, budget in wanted:
            rows.append(trained(given.folder / f"{name}.txt", budget, measured))
            with ROWS.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(" | ".join(line(rows[-1])), file=sys.stderr, flush=True)
    verdicts = [kept(row) for row in rows]
    shares = ", ".join(f"{name} {sum(found[name] for found in verdicts)} of {len(rows)}" for name in verdicts[0])
    width = statistics.median(row["predicted"]["bits_per_byte"][2] - row["predicted"]["bits_per_byte"][0] for row in rows)
    print(f"kept: {shares}; median width of the range {width:.2f}", file=sys.stderr)
    head = ["text", "time", "peak memory", "tokens/s, all in", "held-out bits per byte", "commit"]
    report("promises", "Predicted, actual", head, [line(row) for row in rows], write=given.write)


if __name__ == "__main__":
    main()
