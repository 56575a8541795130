"""The verbs as functions. Most stand in modules of their own; what plans, describes, verifies and measures is here.

Everything that can be refused without torch is refused before torch is imported, which is why the imports that need it
stand inside the functions.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstwords import store
from firstwords.config import DEFAULT_FOR_S, model_config, run_config
from firstwords.errors import ConfigError, DataError
from firstwords.events import Listener, Preparing, ignore_event, notices_to
from firstwords.exchange import Exported as Exported
from firstwords.exchange import Imported as Imported
from firstwords.exchange import export as export
from firstwords.exchange import import_model as import_model
from firstwords.judging import Reported as Reported
from firstwords.judging import evaluate as evaluate
from firstwords.judging import evaluate_tasks as evaluate_tasks
from firstwords.judging import explain as explain
from firstwords.judging import lm_eval_model as lm_eval_model
from firstwords.judging import memorisation as memorisation
from firstwords.judging import report as report
from firstwords.judging import scale as scale
from firstwords.loading import checkpoint_of, is_foreign, locate, named_texts
from firstwords.loading import load as load
from firstwords.model import cost
from firstwords.planning import facts
from firstwords.presets import SHORTEST_CONTEXT
from firstwords.pretraining import train as train
from firstwords.runs import folder as run_folder
from firstwords.runs.folder import RunFolder
from firstwords.text import sources

if TYPE_CHECKING:
    from firstwords.planning.doctor import Diagnosis
    from firstwords.planning.measure import BenchResult
    from firstwords.planning.plan import Plan
    from firstwords.verifying import Verdict

BENCH_PRESETS = ("laptop", "gpt2-124m")


def plan(
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    for_s: float | str | None = None,
    target_bits_per_byte: float | None = None,
    encoding: str | None = None,
    listener: Listener = ignore_event,
) -> Plan:
    """Return what could be trained on a text in a time, how good it would be, and what to take; some ten seconds.

    Args:
        text: Files and folders, or "-"; None: the built-in text.
        for_s: The time budget: seconds, or `3m`; by default three minutes.
        target_bits_per_byte: How good it should be, instead; the answer is how long that takes.
        encoding: Of the text files; by default recognised.
        listener: Told what happens.

    Raises:
        FirstwordsError: No such text, an empty one, an impossible time or target.
    """
    if for_s is not None and target_bits_per_byte is not None:
        raise ConfigError("a time and a target are both named", where="--target-bits-per-byte", do="give one of them")
    if target_bits_per_byte is not None and not 0 < target_bits_per_byte < math.inf:
        what = f"cannot be {target_bits_per_byte}"
        raise ConfigError(what, where="--target-bits-per-byte", do="give a number above 0, such as 2.1")
    config = run_config({} if for_s is None else {"for_s": for_s})
    named = () if text is None else named_texts(text)
    texts = sources.read(named, encoding=encoding, notice=notices_to(listener))
    found = facts.read(
        texts, val_fraction=config.val_fraction, progress=lambda what, share: listener(Preparing(what, share))
    )
    if found.training_bytes <= SHORTEST_CONTEXT:  # and a token is a byte at least
        what = f"{found.training_bytes} bytes to learn from are less than one context of {SHORTEST_CONTEXT} tokens"
        raise DataError(what, where=texts.name, why="no candidate could learn from them", do="give more text")
    listener(Preparing("starting PyTorch", None))

    from firstwords.planning import known, machine, matmul, measure, process
    from firstwords.planning import plan as plans

    device = machine.device("auto")
    with process.threads(None):
        key, cache = machine.key(device), store.cache_folder()
        precision = matmul.precision("auto", device, cache)
        listener(Preparing("measuring this machine", None))
        measured = measure.learning_speed(device, precision)
        fingerprint, before = machine.fingerprint(device, precision, "off"), known.read(cache, key)
    now = known.Learning(time.time(), measured)
    known.remember(cache, key, dataclasses.replace(before, learning={**before.learning, precision: now}))
    here = plans.Machine(measured, precision, machine.free_bytes(), on_gpu=device.type != "cpu")
    listener(Preparing("planning", None))
    made = plans.plan(found, here, config.for_s or DEFAULT_FOR_S, target_bits_per_byte)
    return dataclasses.replace(made, machine=made.machine | fingerprint)


def info(source: str | Path, *, listener: Listener = ignore_event) -> dict[str, Any]:
    """Return what is in a run, a checkpoint or a model from elsewhere, which has no steps.

    Raises:
        NoInputError: None of them is there.
    """
    notice = notices_to(listener)
    place = locate(source, notice)
    if is_foreign(place):
        model = load(place, notice=notice).model.config
        shape = dataclasses.asdict(model)
        return {"run": str(source), "parameters": cost.parameters(model), "checkpoint": str(place), "config": shape}
    found = checkpoint_of(place, notice)

    from firstwords.runs import checkpoint

    config, state = found.json(checkpoint.CONFIG), found.json(checkpoint.STATE)
    model = model_config(config.get("model"), str(found.folder))
    run = RunFolder(Path(source))
    steps = checkpoint.step_of(checkpoint.existing(run.checkpoints)[-1]) if run.exists else found.step
    return {
        "run": str(source),
        "parameters": cost.parameters(model),
        "steps": steps,
        "best_step": found.step if run.exists or state.get("best_step") is None else state["best_step"],
        "checkpoint": str(found.folder),
        "weights_sha256": found.weights_sha256,
        "precision": config.get("precision"),
        "config": config["model"],
        "text": run_config(run.recorded_config()).text if run.exists else None,
    }


def verify(source: str | Path, *, replay: int | None = None) -> Verdict:
    """Return whether every checkpoint and the prepared text of a run are whole, and whether training repeats itself.

    Args:
        source: A run folder; nothing in it is changed.
        replay: Train so many steps again and compare them with what the run recorded.

    Raises:
        NoInputError: There is no run.
        ConfigError: So many steps cannot be replayed.
    """
    run = run_folder.existing(Path(source))

    from firstwords.verifying import verify as verify_run

    return verify_run(run, replay)


def bench(presets: Sequence[str] = BENCH_PRESETS, *, compiled: bool = False) -> Iterator[BenchResult]:
    """Yield how fast this machine is and where firstwords stands on it, as it is measured: about a minute in all.

    Args:
        presets: The models that learn and speak.
        compiled: Measure instead what compiling them takes and gives, and keep it for `--compile auto`.

    Raises:
        ConfigError: No such preset.
    """
    for preset in presets:
        run_config({"preset": preset})

    from firstwords.planning import measure, process

    with process.threads(None):
        yield from (measure.compiled_marks if compiled else measure.marks)(presets, store.cache_folder())


def doctor() -> Diagnosis:
    """Return what this machine is, what firstwords will use of it and what is wrong, measured anew in some seconds."""
    from firstwords.planning.doctor import examine

    return examine(store.cache_folder(), Path("runs"))
