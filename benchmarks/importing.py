"""What it costs to bring a model in: seconds and peak memory, beside the five ways that the chapter's repository shows.

    python benchmarks/importing.py [--preset gpt2-1558m] [--folder .] [--rounds 1] [--write]

The model has random weights, once as a folder for transformers and once as a state dict of the chapter's. `import` reads it,
says a sentence, and writes and reads back a checkpoint of ours; `load` is what every verb does with such a folder. The five
ways (rasbt/LLMs-from-scratch, ch05/08) only fill a model. Memory is what the process itself holds at most (`RssAnon`, every
5 ms) beyond what it held after its imports; files that are mapped are the system's. Linux only.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from firstwords import api
from firstwords.config import ModelConfig, run_config
from firstwords.model import cost
from firstwords.model.gpt import GPTModel
from firstwords.model.language_model import LanguageModel
from firstwords.text.tokenizer import gpt2
from firstwords.weights import export, reader
from record import interleaved, measured, report

POLL_S = 0.005


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak() -> Iterator[list[int]]:
    """Yield a list that holds, afterwards, the most bytes that were held beyond those of the beginning."""
    before, found, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            found[0] = max(found[0], anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def whole(config: ModelConfig, folder: Path) -> object:
    model = GPTModel(config)
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True), strict=False)
    return model


def one_by_one(config: ModelConfig, folder: Path) -> object:
    model, state = GPTModel(config), torch.load(folder / "model.pth", weights_only=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state.pop(name))
    return model


def empty(config: ModelConfig) -> GPTModel:
    with torch.device("meta"):
        model = GPTModel(config)
    model.to_empty(device="cpu")
    if config.tied_head:
        model.out_head.weight = model.tok_emb.weight
    return model


def without_drawing(config: ModelConfig, folder: Path) -> object:
    model = empty(config)
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True), strict=False)
    return model


def mapped(config: ModelConfig, folder: Path) -> object:
    with torch.device("meta"):
        model = GPTModel(config)
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True, mmap=True), strict=False, assign=True)
    return model


def a_file_each(config: ModelConfig, folder: Path) -> object:
    model = empty(config)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(model.named_parameters()):
            parameter.copy_(torch.load(folder / f"{number}.pt", weights_only=True))
    return model


def imported(config: ModelConfig, folder: Path) -> object:  # noqa: ARG001
    with tempfile.TemporaryDirectory(dir=folder) as out:
        return api.import_model(folder / "hf", Path(out) / "run")


def loaded(config: ModelConfig, folder: Path) -> object:  # noqa: ARG001
    return reader.read(folder / "hf")


WAYS: dict[str, Callable[[ModelConfig, Path], object]] = {
    "firstwords import": imported,
    "firstwords load": loaded,
    "1: a whole state dict into a drawn model": whole,
    "2: tensor by tensor from a whole state dict": one_by_one,
    "3: a model without memory first": without_drawing,
    "4: mapped and assigned": mapped,
    "5: a file for each tensor": a_file_each,
}


def make(config: ModelConfig, folder: Path) -> None:
    """Write a model with random weights in all the forms that are read."""
    torch.manual_seed(1)
    lm = LanguageModel(GPTModel(config).eval(), gpt2())
    export.to_hf(lm, folder / "hf", "card")
    parameters = {name: parameter.detach() for name, parameter in lm.model.named_parameters()}
    for number, parameter in enumerate(parameters.values()):
        torch.save(parameter.clone(), folder / f"{number}.pt")
    torch.save(parameters, folder / "model.pth")


def run(name: str, config: ModelConfig, folder: Path) -> None:
    torch.zeros(1) @ torch.zeros(1)
    started_s = time.perf_counter()
    with peak() as most:
        WAYS[name](config, folder)
    measured({"seconds": time.perf_counter() - started_s, "bytes": float(most[0])})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--preset", default="gpt2-1558m")
    arguments.add_argument("--folder", type=Path, default=Path())
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--write", action="store_true")
    arguments.add_argument("--run", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    config = run_config({"preset": options.preset}).model
    place = options.folder / f"importing-{options.preset}"
    if options.run:
        run(options.run, config, place)
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        make(config, place)
        found = interleaved(
            list(WAYS), options.rounds, __file__, ["--preset", options.preset, "--folder", str(options.folder)]
        )
    finally:
        shutil.rmtree(place)
    weights = 4 * cost.parameters(config)
    rows = [
        [name, f"{figures['seconds']:.1f} s", f"{figures['bytes'] / 1e9:.2f} GB", f"{figures['bytes'] / weights:.2f}"]
        for name, figures in found.items()
    ]
    title = f"Bringing in {options.preset}: {cost.parameters(config):,} parameters, {weights / 1e9:.2f} GB"
    report("importing", title, ["", "took", "peak memory", "of the weights"], rows, write=options.write)


if __name__ == "__main__":
    main()
