"""Each candidate of a plan, really trained: is the recommended one among the best?

    python benchmarks/candidates.py TEXT ... [--for 1m] [--write]

The candidates are those of `firstwords plan TEXT --for TIME`, those that do not fit into memory left out; each is one
`firstwords train` with that tokenizer and preset, in the same time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import report


def firstwords(*arguments: str) -> dict[str, Any]:
    """Run a verb in a process of its own and return what it says as JSON."""
    said = subprocess.run(
        [sys.executable, "-m", "firstwords", *arguments, "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return found


def trained(text: Path, candidate: dict[str, Any], budget: str) -> float:
    """Return the held-out bits per byte that a candidate comes to."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = ("--tokenizer", candidate["tokenizer"], "--preset", candidate["preset"])
        return float(firstwords("train", str(text), "--for", budget, *chosen, "--out", f"{folder}/run")["bits_per_byte"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("texts", nargs="+", type=Path)
    options.add_argument("--for", dest="budget", default="1m")
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = options.parse_args()
    rows = []
    for text in given.texts:
        plan = firstwords("plan", str(text), "--for", given.budget)
        fitting = [candidate for candidate in plan["candidates"] if candidate["fits"] and candidate["has_time"]]
        came = [trained(text, candidate, given.budget) for candidate in fitting]
        for candidate, bits in zip(fitting, came, strict=True):
            name = f"{candidate['tokenizer']}, {candidate['preset']}"
            low, _, high = candidate["bits_per_byte"]
            mark = "recommended" if candidate == plan["recommended"] else ""
            rows.append([text.name, name, mark, f"{low:.2f} to {high:.2f}", f"{bits:.3f}", f"{bits / min(came):.3f}"])
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    head = ["text", "candidate", "", "expected", "bits per byte", "of the best"]
    report("candidates", f"The candidates of a plan, each trained for {given.budget}", head, rows, write=given.write)


if __name__ == "__main__":
    main()
