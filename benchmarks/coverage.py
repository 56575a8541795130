"""How often the 95 % intervals of the scale hold: a text is dealt anew, 200 times, and an n-gram model judged each time.

    python benchmarks/coverage.py TEXT ... [--passage 5000] [--resplits 200] [--write]

A tenth of a text, in passages, trains an n-gram model once. The rest is all there is to know: its bits per byte are the
truth. In each resplit some of its passages are held out, as documents, by chance, and the interval that `firstwords eval`
would print is asked whether the truth lies in it; so for the difference to the model of order 3 on the same passages. In
`one stretch` what is held out are neighbouring passages, as one document: no interval around them can know what the other
parts of the text are like.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from firstwords.insight import ngram
from firstwords.insight.scale import Blocks, interval
from record import report

HELD_OUT = (10, 20, 40)  # passages


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("texts", type=Path, nargs="+")
    options.add_argument("--passage", type=int, default=5000, help="bytes")
    options.add_argument("--resplits", type=int, default=200)
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    asked = options.parse_args()
    rows = [row for text in asked.texts for row in rows_of(text, asked.passage, asked.resplits)]
    head = ["text", "held out", "bits per byte", "difference", "in one stretch", "difference"]
    report("coverage", f"How often a 95 % interval holds, of {asked.resplits} resplits", head, rows, write=asked.write)


def rows_of(path: Path, size: int, resplits: int) -> list[list[str]]:
    text = path.read_bytes()
    passages = [text[at : at + size] for at in range(0, len(text) - size + 1, size)]
    known = set(np.random.default_rng(0).permutation(len(passages))[: len(passages) // 10].tolist())
    model = ngram.train([passages[i] for i in sorted(known)])
    rest = [passage for i, passage in enumerate(passages) if i not in known]
    six, three = (one.nats(rest).reshape(len(rest), size) for one in (model, ngram.NGram(model.tables[:3])))
    rows = []
    for count in (count for count in HELD_OUT if count <= len(rest) / 4):  # of half of them the mean is nearly that of all
        shares = [
            covered(nats, count, resplits, together=together) for together in (False, True) for nats in (six, three - six)
        ]
        rows.append([path.name, f"{count} of {len(rest)} passages", *(f"{share:.1%}" for share in shares)])
    return rows


def covered(nats: np.ndarray, count: int, resplits: int, *, together: bool) -> float:
    """Return in what share of the resplits the interval holds the mean of all passages (N, bytes)."""
    random, size, hits = np.random.default_rng(1), nats.shape[1], 0
    truth = float(nats.mean()) / math.log(2)
    blocks = Blocks.of([count * size] if together else [size] * count)
    for _ in range(resplits):
        start = random.integers(len(nats) - count)
        drawn = np.arange(start, start + count) if together else random.integers(len(nats), size=count)  # as of endless text
        found = interval(blocks.sums(nats[drawn].reshape(-1)), blocks.n_bytes)
        assert found is not None
        hits += found.low <= truth <= found.high
    return hits / resplits


if __name__ == "__main__":
    main()
