"""Trains on texts of many kinds and sizes, and fits the law that predicts held-out bits per byte from what came of it.

    python benchmarks/prediction.py gather TEXTS [--beside 2] [--presets laptop-tiny]    adds the runs that the table lacks
    python benchmarks/prediction.py features TEXTS                                       measures the texts themselves
    python benchmarks/prediction.py fit [--write]                  fits the law, leaving out one text at a time

TEXTS is a folder of `NAME.txt`. The table is benchmarks/prediction_runs.jsonl: one run a line, with its command. The law's
form and where it comes from: `firstwords.planning.prediction`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from firstwords.config import NONE, as_drawn, flag, model_config, run_config
from firstwords.model import cost
from firstwords.planning import facts, plan, prediction, recipe
from firstwords.planning.budget import EVALUATIONS_SHARE, MOST_EVALUATIONS
from firstwords.planning.prediction import MOST_REPEATED, Law, Situation
from firstwords.text import sources
from record import ROOT, commit

TABLE = ROOT / "benchmarks/prediction_runs.jsonl"
FEATURES = ROOT / "benchmarks/prediction_texts.json"
LAW = ROOT / "src/firstwords/planning/prediction.json"
FEWEST_TOKENS = 90_000  # of a run that is fitted; in less, a model learns little but the frequent letters
WIDENING = 0.03  # of the range's half for each factor of e beyond what was tried: by judgement, not measured
KINDS = {
    "story": "a short story, English",
    "dialogue": "plays, English (tinyshakespeare)",
    "prose": "the King James Bible (Debian bible-kjv)",
    "german": "manual pages, German (Debian manpages-de)",
    "russian": "manual pages, Russian (Debian manpages-ru)",
    "python": "Python (the standard library)",
    "torch": "Python (PyTorch)",
    "perl": "Perl (Debian perl-modules)",
    "headers": "C++ headers (PyTorch's ATen)",
    "docs": "Markdown and reStructuredText (/usr/share/doc)",
    "copyright": "licences (/usr/share/doc/*/copyright)",
    "changelogs": "changelogs (/usr/share/doc/*/changelog.Debian.gz)",
    "austen": "six novels, English (Debian r-cran-janeaustenr)",
    "french": "a handbook, French (Debian debian-handbook)",
    "japanese": "manual pages, Japanese (Debian manpages-ja)",
    "javascript": "JavaScript (the packages that node-llama-cpp installs)",
    "sources": "Python (transformers)",
    "handbook": "a handbook, English (Debian vim-runtime)",
    "spanish": "proverbs and quotations, Spanish (Debian fortunes-es)",
    "reference": "Python's own reference (the built-in text)",
}
SLICES = {
    "dialogue": (60_000, 300_000),
    "prose": (100_000, 600_000),
    "german": (100_000,),
    "russian": (250_000,),
    "python": (40_000, 300_000),
    "perl": (1_000_000,),
    "headers": (500_000,),
    "docs": (150_000,),
    "changelogs": (200_000,),
    "austen": (30_000, 400_000),
    "french": (50_000,),
    "japanese": (200_000,),
    "javascript": (100_000,),
}
SHORT = ("dialogue", "python", "russian", "prose", "torch", "german", "sources", "story", "handbook", "spanish")
LONG = ("torch", "prose", "german", "dialogue", "python", "russian", "handbook", "spanish")  # that small models read long
BROAD = ("perl", "docs", "headers", "changelogs", "french", "japanese")  # other kinds, for the small models of a minute
OFTEN = (("reference", 0), ("dialogue", 300_000), ("prose", 600_000), ("python", 300_000))  # read many times in minutes
MINUTE = ("dialogue", "reference", "prose", "python")  # as much of each as a fast machine learns from in a minute
BYTES_A_TOKEN = 3.2  # about
# Named in a case that has them. Commands from before an option are of runs without, and of a tied head in every preset.
INDUCTION, FROM_TEXT = "induction heads", "table from text"
FEWER_WORDS = "fewer words"  # of texts of over 2.6 million characters: since a vocabulary grows as their third root
LARGE = ("prose", "torch", "handbook", "docs", "changelogs", "headers", "japanese", "perl")


@dataclass(frozen=True)
class Case:
    """One run: the first bytes of a text (0: all of it), a preset, about so many tokens; as presets begin, or as drawn."""

    text: str
    slice_bytes: int
    preset: str
    tokens: int
    begun: bool = False

    @property
    def key(self) -> tuple[str | int, ...]:
        """What the table knows it by."""
        fewer = (FEWER_WORDS,) if self.text in LARGE and not self.slice_bytes else ()
        begun = (INDUCTION, FROM_TEXT, *fewer) if self.begun else ()
        return (self.text, self.slice_bytes, self.preset, self.tokens, *begun)


def cases() -> list[Case]:
    """Return every run, in an order in which each new one tells the most."""
    fast = (("laptop", 1_500_000), ("laptop-small", 2_400_000), ("laptop-mini", 3_200_000))
    begun = [(name, 0, *one) for name in MINUTE for one in fast]
    begun += [(name, 0, "laptop-mini", 400_000) for name in SHORT]
    begun += [(*text, "laptop-mini", 800_000) for text in OFTEN]
    begun += [(name, 0, "laptop-tiny", 800_000) for name in SHORT]
    begun += [(name, 0, "laptop", 400_000) for name in MINUTE]
    begun += [(name, 0, "laptop-small", 400_000) for name in SHORT[:6]]
    begun += [(*text, preset, 800_000) for text in OFTEN for preset in ("laptop-small", "laptop")]
    begun += [(*text, "laptop-mini", 1_500_000) for text in OFTEN]
    begun += [(name, 0, "laptop-tiny", 200_000) for name in SHORT]
    begun += [(name, 0, "laptop-large", 300_000) for name in ("dialogue", "german")]
    begun += [(name, 0, "laptop-tiny", 2_400_000) for name in LONG]
    begun += [(name, 0, "laptop-mini", 400_000) for name in BROAD]
    begun += [(name, 0, "laptop-tiny", 800_000) for name in BROAD]
    found = [Case(*one, begun=True) for one in begun]
    whole = [(name, 0) for name in KINDS]
    parts = [(name, size) for name, sizes in SLICES.items() for size in sizes]
    small = [("dialogue", 60_000), ("python", 40_000), ("french", 50_000), ("story", 0), ("prose", 100_000)]
    found += [Case(*text, "laptop", 400_000) for text in small]
    found += [Case("dialogue", 300_000, "laptop", 1_500_000), Case("story", 0, "laptop", 1_500_000)]
    found += [Case(name, 0, "laptop", 4_000_000) for name in ("torch", "french", "sources", "python")]
    found += [Case("prose", 100_000, "laptop", 1_500_000), Case("dialogue", 0, "laptop-large", 1_600_000)]
    found += [Case("story", 0, "laptop", 4_000_000), Case("prose", 0, "laptop", 4_000_000)]
    found += [Case(name, 0, "laptop-large", 300_000) for name in ("dialogue", "german")]
    found += [Case(name, size, "laptop", 400_000) for name, size in whole + parts]
    found += [Case(name, 0, "laptop", 1_500_000) for name, _ in whole]
    found += [Case(name, 0, "laptop", 4_000_000) for name, _ in whole]
    found += [Case("python", 40_000, "laptop", 4_000_000), Case("prose", 600_000, "laptop", 4_000_000)]
    found += [Case(name, 0, "laptop", 12_000_000) for name in ("dialogue", "prose", "torch", "german")]
    found += [Case(name, 0, "laptop-large", 4_000_000) for name in ("prose", "torch")]
    return list(dict.fromkeys(found))


def rows() -> list[dict[str, Any]]:
    """Return the table."""
    return [json.loads(line) for line in TABLE.read_text().splitlines()] if TABLE.is_file() else []


def gather(texts: Path, beside: int, presets: list[str]) -> None:
    """Add the runs of these presets that the table lacks, so many at once, which share the cores."""
    done = {tuple(row["case"]) for row in rows()}
    lacking = [case for case in cases() if case.key not in done and case.preset in presets]
    lacking = [case for case in lacking if (texts / f"{case.text}.txt").is_file()]
    threads = max(1, (os.cpu_count() or 1) // beside)
    with ThreadPoolExecutor(beside) as workers:
        for run in as_completed([workers.submit(trained, case, texts, threads) for case in lacking]):
            row = run.result()
            with TABLE.open("a") as table:
                table.write(json.dumps(row) + "\n")
            print(
                f"{datetime.now():%H:%M} {row['case']}: {row['bits_per_byte']:.3f} in {row['elapsed_s']:.0f} s", flush=True
            )


def trained(case: Case, texts: Path, threads: int) -> dict[str, Any]:
    """Train one case in a process of its own and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        return _trained(case, texts, Path(folder), str(threads))


def _trained(case: Case, texts: Path, folder: Path, threads: str) -> dict[str, Any]:
    data = sliced(texts, case.text, case.slice_bytes)
    (folder / f"{case.text}.txt").write_bytes(data)
    batch_size, steps, eval_every = shape(case, len(data))
    command = ["firstwords", "train", f"{case.text}.txt", "--preset", case.preset, "--steps", str(steps)]
    command += ["--batch-size", str(batch_size), "--eval-every", str(eval_every)]
    drawn = {} if case.begun else {"model.tied_head": True, **as_drawn()}
    for key, value in drawn.items():
        command += [flag(key), NONE if value is None else str(value).lower()]
    given = ["--threads", threads, "--out", "run", "--save-every", "1h", "--json"]
    environment = {**os.environ, "FIRSTWORDS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": threads}
    ended = subprocess.run(
        [sys.executable, "-m", *command, *given], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        sys.exit(f"{case}: {ended.stdout}{ended.stderr}")
    result = json.loads(ended.stdout.splitlines()[-1])
    config = tomllib.loads((folder / "run/config.toml").read_text())
    manifest = json.loads(next((folder / "cache/corpora").glob("*/manifest.json")).read_text())

    model = model_config(config["model"], "run")
    return {
        "case": list(case.key),
        "kind": KINDS[case.text],
        "command": " ".join(command),
        "text_bytes": len(data),
        "text_sha256": hashlib.sha256(data).hexdigest(),
        "vocab_size": model.vocab_size,
        "parameters": cost.parameters(model),
        "tokens": result["tokens"],
        "training_tokens": manifest["train"]["ids"],
        "training_bytes": manifest["train"]["bytes"],
        "epochs": round(result["tokens"] / manifest["train"]["ids"], 4),
        "drop_rate": model.drop_rate,
        "bits_per_byte": round(result["bits_per_byte"], 4),
        "best_step": result["best_step"],
        "steps": result["steps"],
        "elapsed_s": result["elapsed_s"],
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def shape(case: Case, n_bytes: int) -> tuple[int, int, int]:
    """Return batch size, steps, and steps between evaluations, as a run of so many tokens within a time budget has them."""
    context_length = run_config({"preset": case.preset}).model.context_length
    batch_size = recipe.batch_size(context_length, case.tokens, 0.9 * n_bytes / BYTES_A_TOKEN)
    steps = max(1, round(case.tokens / (batch_size * context_length)))
    held_out = min(65536.0, 0.1 * n_bytes / BYTES_A_TOKEN)
    evaluation_steps = 2 + 2 * held_out / 3 / (batch_size * context_length)
    evaluations = min(MOST_EVALUATIONS, max(1, int(EVALUATIONS_SHARE * steps / evaluation_steps)))
    return batch_size, steps, math.ceil(steps / evaluations)


def sliced(texts: Path, name: str, n_bytes: int) -> bytes:
    """Return the first bytes of a text, as whole characters; 0: all of it."""
    data = (texts / f"{name}.txt").read_bytes()
    return data[:n_bytes].decode(errors="ignore").encode() if n_bytes else data


def features(texts: Path) -> None:
    """Measure the texts of the table's runs."""
    found = json.loads(FEATURES.read_text()) if FEATURES.is_file() else {}
    for row in rows():
        name, slice_bytes, sha256 = row["case"][0], row["case"][1], row["text_sha256"]
        if sha256 in found or not (texts / f"{name}.txt").is_file():
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.txt"
            path.write_bytes(sliced(texts, name, slice_bytes))
            read = facts.read(sources.read([path]))
            tokens = plan.tokenized(read)["bpe"]
        found[sha256] = {
            "text": name,
            "bytes": read.n_bytes,
            "difficulty": round(tokens.difficulty, 4),
            "repeated": round(read.sample.repeated, 4),
        }
    FEATURES.write_text(json.dumps(found, indent=1) + "\n")


def fit(*, write: bool) -> None:
    """Fit the law to the table, say how far it is off for texts that it has not seen, and put it into the package."""
    table, texts = rows(), json.loads(FEATURES.read_text())
    cases_of = {tuple(row["case"]) for row in table}
    table = [row for row in table if (*row["case"], FEWER_WORDS) not in cases_of]  # what the program does no more
    table = [row for row in table if row["tokens"] >= FEWEST_TOKENS and row["text_sha256"] in texts]
    table = [row for row in table if texts[row["text_sha256"]]["repeated"] <= MOST_REPEATED]
    runs = [Run.of(row, texts[row["text_sha256"]]) for row in table]
    names = sorted({run.text for run in runs})
    off = {}
    for name in names:
        kept = fitted([run for run in runs if run.text != name])
        off[name] = [(run, math.log(run.bits / bits(kept, run))) for run in runs if run.text == name]
    errors = [error for found in off.values() for _, error in found]
    spread = spread_of(errors)
    for name, found in off.items():
        for run, error in found:
            at = run.at
            print(f"{name:11} {at.read_bytes / 1e6:6.2f} MB read, {at.epochs:5.1f} epochs: {run.bits:.3f}, {error:+.1%}")
    inside = statistics.mean(abs(error) <= spread for error in errors)
    width = statistics.median(2 * run.bits * math.sinh(spread) for run in runs)
    print(
        f"{len(runs)} runs on {len(names)} texts; left out one text at a time: {inside:.0%} inside, median width {width:.3f}"
    )
    print(f"median error {statistics.median(map(abs, errors)):.1%}; spread {spread:.4f}")
    theta = fitted(runs)
    print(coefficients(theta))
    if write:
        LAW.write_text(json.dumps(law_of(theta, spread, runs), indent=1) + "\n")


@dataclass(frozen=True)
class Run:
    """A row of the table as the law sees it."""

    text: str
    at: Any
    bits: float

    @classmethod
    def of(cls, row: dict[str, Any], text: dict[str, Any]) -> Run:
        """Return a row of the table with what is known of its text."""
        bytes_a_token = row["training_bytes"] / row["training_tokens"]
        read_bytes, repeated = row["tokens"] * bytes_a_token, text["repeated"]
        at = Situation(
            text["difficulty"],
            row["training_bytes"],
            read_bytes,
            row["parameters"],
            repeated,
            induction_heads=INDUCTION in row["case"],
            table_from_text=FROM_TEXT in row["case"] and not run_config({"preset": row["case"][2]}).model.tied_head,
        )
        return cls(row["case"][0], at, row["bits_per_byte"])


# What is believed before any run is seen, and how firmly: Hoffmann et al. 2022 for the exponents.
PRIOR = {  # logarithms of the coefficients: mean, standard deviation
    "g": (0.0, 0.15),
    "e": (math.log(0.4), 1.0),
    "a": (math.log(0.4), 1.0),
    "b": (math.log(0.28), 0.5),
    "n": (math.log(0.2), 0.7),
    "m": (math.log(0.34), 0.2),
    "s": (math.log(0.08), 0.3),
    "repeats": (math.log(5.0), 1.0),
    "r": (math.log(0.05), 0.7),
    "i": (math.log(0.04), 0.7),
    "t": (math.log(0.02), 0.7),
}
FAR = 2.0  # times the noise
NOISE = 0.05  # of a run's logarithm, about; errors far above it count little more (Cauchy): generated code, above all


def spread_of(errors: list[float]) -> float:
    """Return what 80 % of the errors are within."""
    return sorted(map(abs, errors))[math.ceil(0.8 * len(errors)) - 1]


def law_of(theta: Any, spread: float, runs: list[Run]) -> dict[str, Any]:
    """Return what the package holds."""
    every = [prediction.numbers(run.at) for run in runs]
    return {
        "fitted": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit(),
        "data": "benchmarks/prediction_runs.jsonl",
        "runs": len(runs),
        "texts": sorted({KINDS[run.text] for run in runs}),
        "coefficients": coefficients(theta),
        "spread": round(spread, 4),
        "widening": WIDENING,
        "tried": {name: [min(at[name] for at in every), max(at[name] for at in every)] for name in every[0]},
    }


def coefficients(theta: Any) -> dict[str, float]:
    return {name: round(math.exp(value), 4) for name, value in zip(PRIOR, theta, strict=True)}


def bits(theta: Any, run: Run) -> float:

    return Law(
        **{name: math.exp(value) for name, value in zip(PRIOR, theta, strict=True)}, spread=0, tried={}, widening=0
    ).bits(run.at)


def fitted(runs: list[Run]) -> Any:
    """Return the logarithms of the coefficients that make the runs and the prior most likely (Levenberg-Marquardt).

    Each text counts alike, however often it was trained on.
    """
    mean, deviation = (np.array(column) for column in zip(*PRIOR.values(), strict=True))
    weights = np.array([1 / NOISE / math.sqrt(max(1, sum(run.text == other.text for other in runs) / 4)) for run in runs])
    wanted = np.log([run.bits for run in runs])

    def off(theta: Any) -> Any:
        errors = weights * (np.log([bits(theta, run) for run in runs]) - wanted)
        return np.append(np.sign(errors) * FAR * np.sqrt(np.log1p((errors / FAR) ** 2)), (theta - mean) / deviation)

    theta, damping = mean.copy(), 1.0
    for _ in range(200):
        now = off(theta)
        slope = np.stack([(off(theta + 1e-5 * unit) - now) / 1e-5 for unit in np.eye(len(theta))], 1)
        square = slope.T @ slope
        step = np.linalg.solve(square + damping * np.diag(np.diag(square)), -slope.T @ now)
        better = float((off(theta + step) ** 2).sum()) < float((now**2).sum())
        theta, damping = (theta + step, damping / 3) if better else (theta, damping * 5)
    return theta


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("gather", "features", "fit"))
    options.add_argument("texts", nargs="?", type=Path)
    options.add_argument("--beside", type=int, default=1, help="runs at once")
    options.add_argument("--presets", nargs="+", default=sorted({case.preset for case in cases()}), help="of these alone")
    options.add_argument("--write", action="store_true", help="write the law into the package")
    given = options.parse_args()
    match given.what:
        case "gather":
            gather(given.texts.absolute(), given.beside, given.presets)
        case "features":
            features(given.texts.absolute())
        case _:
            fit(write=given.write)


if __name__ == "__main__":
    main()
