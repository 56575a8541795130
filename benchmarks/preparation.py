"""How fast a text becomes token shards, and in how much memory: GPT-2's tokens, all cores.

    python benchmarks/preparation.py TEXT [--megabytes 100 1000] [--write]

TEXT is repeated, each time with another number before each line, until it has the wanted size. The limit is tiktoken on one
core, encoding the same text line by line of a megabyte.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from record import interleaved, measured, report

PIECE = 1 << 20
TIKTOKEN = "tiktoken, one core"


def repeated(text: Path, n_bytes: int, target: Path) -> None:
    lines, size, number = text.read_text().splitlines(), 0, 0
    with target.open("w") as file:
        while size < n_bytes:
            number += 1
            size += file.write("\n".join(f"{number} {line}" if line else line for line in lines) + "\n")


def run(name: str, text: Path) -> dict[str, float]:
    """Return the seconds and the peak memory of a process that prepares a text, or encodes it with tiktoken alone."""
    from firstwords.text import corpus, sources
    from firstwords.text.tokenizer import gpt2

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s = time.perf_counter()
    if name == TIKTOKEN:
        encoding, whole = gpt2().encoding, text.read_text()
        pieces = [whole[start : start + PIECE] for start in range(0, min(len(whole), 64 * PIECE), PIECE)]
        n_bytes, started_s = sum(len(piece.encode()) for piece in pieces), time.perf_counter()
        for piece in pieces:
            encoding.encode_to_numpy(piece, disallowed_special=())
        return {"bytes_per_s": n_bytes / (time.perf_counter() - started_s), "peak_bytes": 0}
    with tempfile.TemporaryDirectory() as cache:
        corpus.prepare(sources.read([str(text)]), "gpt2", cache=Path(cache))
    took_s = time.perf_counter() - started_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes_per_s": text.stat().st_size / took_s, "peak_bytes": peak * 1024, "before_bytes": before * 1024}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("text", type=Path)
    options.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options.add_argument("--run", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.run:
        measured(run(given.run, given.text))
        return
    rows = []
    for megabytes in given.megabytes:
        with tempfile.NamedTemporaryFile(suffix=".txt") as file:
            repeated(given.text, megabytes * 10**6, Path(file.name))
            os.sync()  # a person's text lies on the disk already
            names = ["firstwords", *([TIKTOKEN] if megabytes == given.megabytes[0] else [])]
            for name, figures in interleaved(names, given.rounds, __file__, [file.name]).items():
                memory = f"{figures['peak_bytes'] / 1e6:.0f} MB" if figures["peak_bytes"] else ""
                rows.append([name, f"{megabytes} MB", f"{figures['bytes_per_s'] / 1e6:.1f} MB/s", memory])
            print(rows, file=sys.stderr, flush=True)
    report("preparation", "A text becomes GPT-2's tokens", ["", "text", "speed", "peak memory"], rows, write=given.write)


if __name__ == "__main__":
    main()
