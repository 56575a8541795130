"""What the n-gram model of `firstwords eval` costs: seconds and memory for so many megabytes of training text.

python benchmarks/ngram.py TEXT [--megabytes 1 5 50] [--write]
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from record import interleaved, measured, report

HELD_OUT_BYTES = 500_000


def run(n_bytes: int, path: Path) -> dict[str, float]:
    """Return what training on the first bytes of a text costs, and judging its last ones."""
    from firstwords.insight import ngram

    with path.open("rb") as file:
        text = file.read(n_bytes)
        file.seek(-HELD_OUT_BYTES, 2)
        held_out = file.read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s = time.perf_counter()
    model = ngram.train([text])
    trained_s = time.perf_counter()
    model.nats([held_out])
    judged_s = time.perf_counter() - trained_s
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    n_grams = sum(len(table.keys) for table in model.tables)
    return {"train_s": trained_s - started_s, "judge_s": judged_s, "bytes": memory, "n_grams": n_grams}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("text", type=Path)
    options.add_argument("--megabytes", nargs="+", default=["1", "5", "50"])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options.add_argument("--run", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.run:
        measured(run(int(given.run) * 10**6, given.text))
        return
    found = interleaved(given.megabytes, given.rounds, __file__, [str(given.text)])
    rows = [
        [
            f"{size} MB",
            f"{f['train_s']:.1f} s",
            f"{f['judge_s']:.2f} s",
            f"{f['bytes'] / 1e6:.0f} MB",
            f"{f['n_grams']:,.0f}",
        ]
        for size, f in found.items()
    ]
    head = ["training text", "counting", "judging 0.5 MB", "memory, the text itself not counted", "n-grams"]
    report("ngram", "The n-gram model of eval", head, rows, write=given.write)


if __name__ == "__main__":
    main()
