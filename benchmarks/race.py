"""So many seconds, all in, from the start of the process: how good is the model then on the held-out tenth of a text?

    python benchmarks/race.py TEXT ... [--seconds 75] [--nanogpt CHECKOUT] [--peers bantamtrain ...] [--write]

Ours is `firstwords train TEXT --for SECONDS` with nothing else chosen. nanoGPT is its own data preparation by characters
and its README's flags for a laptop, run for its 2,000 steps however long they take. bantamtrain, litgpt, transformers and
the chapter's package have as many seconds as we, evaluation not counted (`race_peers.py`). The compressors are given the
training text first: what they need more for the held-out text is counted. All figures are bits per byte of the held-out
text, all of it. Each kind of processor has a table; see `record.kind`. `texts.py` makes the texts of the tables but
tinyshakespeare.
"""

from __future__ import annotations

import argparse
import bz2
import json
import lzma
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from record import kind, report

LAPTOP = "--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4"
LAPTOP += " --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
LARGEST_DICTIONARY = 1 << 28


def split(text: str) -> tuple[str, str]:
    """Return the training part and the held-out part, as all of the contenders cut them."""
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def firstwords(path: Path, seconds: float, folder: Path) -> tuple[float, float]:
    """Return bits per byte of all held-out text, and the seconds that the process took; nothing is prepared before it."""
    environment = {**os.environ, "GOMP_SPINCOUNT": "20000", "FIRSTWORDS_CACHE": str(folder / "cache")}

    def run(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "firstwords", *arguments, "--json"]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    started_s = time.perf_counter()
    run("train", path, "--for", f"{seconds}s", "--out", folder / "run")
    took_s = time.perf_counter() - started_s
    judged = run("eval", folder / "run", "--no-baselines")
    return json.loads(judged.splitlines()[-1])["bits_per_byte"], took_s


def nanogpt(path: Path, checkout: Path, folder: Path) -> tuple[float, float]:
    """Return bits per byte of nanoGPT's last evaluation, and the seconds that it took."""
    text = path.read_text()
    letters = sorted(set(text))
    index = {letter: i for i, letter in enumerate(letters)}
    data = folder / "data/race"
    data.mkdir(parents=True)
    parts = split(text)
    for name, part in zip(("train", "val"), parts, strict=True):
        np.array([index[letter] for letter in part], np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": index})
    )
    for name in ("train.py", "model.py", "configurator.py"):
        (folder / name).write_bytes((checkout / name).read_bytes())
    command = [sys.executable, "train.py", checkout / "config/train_shakespeare_char.py", "--dataset=race", *LAPTOP.split()]
    started_s = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    took_s = time.perf_counter() - started_s
    nats = float(re.findall(r"val loss ([\d.]+)", ended.stdout)[-1])  # a character
    return nats / math.log(2) * len(parts[1]) / len(parts[1].encode()), took_s


def peer(name: str, path: Path, seconds: float) -> tuple[float, float]:
    """Return bits per byte of one of `race_peers.py`, and the seconds that its process took."""
    command = [sys.executable, Path(__file__).with_name("race_peers.py"), name, path, str(seconds)]
    started_s = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(ended.stdout.split()[-1]), time.perf_counter() - started_s


def compressed(path: Path, pack: Callable[[bytes], bytes]) -> float:
    """Return the bits per byte that a compressor needs for the held-out part after the training part."""
    training, held_out = (part.encode() for part in split(path.read_text()))
    return 8 * (len(pack(training + held_out)) - len(pack(training))) / len(held_out)


def xz(data: bytes) -> bytes:
    dictionary = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": LARGEST_DICTIONARY}]
    return lzma.compress(data, filters=dictionary)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("text", type=Path, nargs="+")
    options.add_argument("--seconds", type=float, default=75)
    options.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    options.add_argument("--peers", nargs="*", default=[], help="installed packages of `race_peers.py`")
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = options.parse_args()
    rows = []
    for path in given.text:
        with tempfile.TemporaryDirectory() as name:
            ours, took_s = firstwords(path, given.seconds, Path(name))
            row = [path.name, f"{path.stat().st_size / 1e6:.2f} MB", f"{ours:.3f}", f"{took_s:.1f} s"]
            if given.nanogpt:
                theirs, their_s = nanogpt(path, given.nanogpt.resolve(), Path(name))
                row += [f"{theirs:.2f}", f"{their_s:.1f} s"]
            for package in given.peers:
                theirs, their_s = peer(package, path, given.seconds)
                row += [f"{theirs:.2f}", f"{their_s:.1f} s"]
            row += [f"{compressed(path, pack):.2f}" for pack in (xz, lambda data: bz2.compress(data, 9))]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    peers = ["nanoGPT, characters", "took"] if given.nanogpt else []
    peers += [word for package in given.peers for word in (package, "took")]
    head = ["text", "size", "firstwords", "took", *peers, "xz given the rest", "bz2 given the rest"]

    which, where = kind()
    title = f"Held-out bits per byte after {given.seconds:g} seconds, {where}"
    report(f"race-{which}", title, head, rows, write=given.write)


if __name__ == "__main__":
    main()
