"""What the memorisation meter costs: going through a training text of some size, and its share of a run.

    python benchmarks/memorisation.py TEXT [--megabytes 5 50 200] [--for 75] [--write]

TEXT is repeated, each time with another number before each line, until it has the wanted size. Four samples of 60 tokens are
looked for: two pieces of the text, and two of nothing. Then a run on TEXT itself, its meter's seconds counted inside.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

from preparation import repeated

from record import interleaved, measured, report

RUN = "a run"


def go_through(text: Path) -> dict[str, float]:
    """Return the seconds on a core of the first and of a later look at a text, and the memory that they take."""
    from firstwords.insight.memorisation import TrainingText, copies
    from firstwords.text import corpus, sources

    with tempfile.TemporaryDirectory() as cache:
        prepared = corpus.prepare(sources.read([str(text)]), "gpt2", cache=Path(cache))
        samples = [
            prepared.tokenizer.decode(prepared.train.ids[at : at + 60]) for at in (1000, len(prepared.train.ids) // 2)
        ]
        samples += ["It goes without saying that nobody ever wrote this sentence before. " * 4, "€ 1,50 " * 40]
        training, looks = TrainingText(prepared.train, prepared.tokenizer), []
        for _ in range(4):
            started_s = time.process_time()  # one core's work, whatever else the machine does
            found = copies(samples, training)
            looks.append(time.process_time() - started_s)
        tracemalloc.start()
        assert copies(samples, TrainingText(prepared.train, prepared.tokenizer)).longest == found.longest
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found.longest in samples
    return {"first_s": looks[0], "later_s": min(looks[1:]), "peak_bytes": peak_bytes}


def train(text: Path, for_s: float) -> dict[str, float]:
    """Return the seconds that a run spends on its meter, in all, and on the samples that it would have drawn without."""
    from firstwords import api
    from firstwords.recorder import Recorder
    from firstwords.watching import SAMPLE_TOKENS

    spent: list[float] = []
    inner = Recorder._look_closer

    def counted(recorder: Recorder, event: object) -> None:
        started_s = time.perf_counter()
        inner(recorder, event)
        spent.append(time.perf_counter() - started_s)

    Recorder._look_closer = counted
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.perf_counter()
        api.train(text, out=Path(folder) / "run", for_s=for_s)
        took_s = time.perf_counter() - started_s
        lm = api.load(Path(folder) / "run")
        lm.model.train()  # as in the run: the rounded copy is made anew each time
        started_s = time.perf_counter()
        for seed in range(5):
            lm.generate(max_new_tokens=SAMPLE_TOKENS, seed=seed)
        alone_s = len(spent) * (time.perf_counter() - started_s) / 5
    return {"meter_s": sum(spent), "alone_s": alone_s, "took_s": took_s, "looks": len(spent)}


def run(name: str, text: Path, for_s: float) -> dict[str, float]:
    """Return the figures of one contender."""
    return train(text, for_s) if name == RUN else go_through(text)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("text", type=Path)
    options.add_argument("--megabytes", type=int, nargs="+", default=[5, 50, 200])
    options.add_argument("--for", dest="for_s", type=float, default=75.0)
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options.add_argument("--run", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.run:
        measured(run(given.run, given.text, given.for_s))
        return
    rows = []
    for megabytes in given.megabytes:
        with tempfile.NamedTemporaryFile(suffix=".txt") as file:
            repeated(given.text, megabytes * 10**6, Path(file.name))
            os.sync()
            (found,) = interleaved(["looks"], 1, __file__, [file.name]).values()
        seconds = f"{found['first_s']:.2f} s, then {found['later_s']:.2f} s"
        rows.append([f"four samples against {megabytes} MB", seconds, f"{found['peak_bytes'] / 1e6:.0f} MB"])
        print(rows[-1], file=sys.stderr, flush=True)
    (found,) = interleaved([RUN], 1, __file__, [str(given.text), "--for", str(given.for_s)]).values()
    more_s = found["meter_s"] - found["alone_s"]
    share = f"{more_s:.2f} s of {found['took_s']:.0f} s in {found['looks']:.0f} looks: {more_s / found['took_s']:.1%}"
    rows.append([f"a run of {given.for_s:.0f} s on {given.text.name}, beyond its samples", share, ""])
    title = "Looking for what is learnt by heart"
    report("memorisation", title, ["", "time", "memory"], rows, write=given.write)


if __name__ == "__main__":
    main()
