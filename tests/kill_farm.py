"""What a farm process does: it imports PyTorch once and forks children, which train and are killed.

A farm computes with one thread itself, because libgomp cannot go on in the child of a process that used more; a child may.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from conftest import OTHER, STORY, TINY, outcome
from firstwords import api, store
from firstwords.runs import checkpoint
from firstwords.runs.folder import RunFolder
from firstwords.training import loop
from firstwords.training.events import Saved, StepDone, Told

HANGS_S = 120.0  # a child that takes so long shows its stack and dies
KILLS_A_RUN = 5
KEPT = 3  # checkpoints: the newest two, and the best
TICKS = 15.0  # the loop looks at its clock three times a step, so that such an interval is five steps


def begin() -> None:
    """Prepare a farm; called once in its process. What the first training of a process imports, no child imports again."""
    faulthandler.enable()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        first(Path(folder), steps=1)


# ---------------------------------------------------------------------------------------------------- children


def forked(act: Callable[[], object]) -> int:
    """Do something in a child and return the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def until(condition: Callable[[], object], pid: int, every_s: float = 0.001) -> None:
    """Wait until something is so, or the child has ended; one that hangs shows its stack and dies."""
    deadline_s = time.monotonic() + HANGS_S
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and not condition():
        if time.monotonic() > deadline_s:
            os.kill(pid, signal.SIGABRT)
        time.sleep(every_s)


def ended(pid: int) -> int:
    """Return how a child ended: its exit code, or the negative number of the signal that killed it."""
    until(lambda: False, pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(act: Callable[[], object]) -> None:
    """Do something in a child that must end well."""
    code = ended(forked(act))
    assert code == 0, f"the child ended with {code}"


# --------------------------------------------------------------------------------------------------------- runs


def first(folder: Path, **options: Any) -> None:
    """Train `folder/whole`, the run that is never killed."""
    folder.mkdir(exist_ok=True)
    (folder / "story.txt").write_text(STORY)
    (folder / "other.txt").write_text(OTHER)
    optim = {"kind": "muon", "peak_lr": 0.1, "warmup_steps": 2}
    use_cache_of(folder)
    api.train(
        folder / "story.txt",
        out=folder / "whole",
        **{**TINY, "val": str(folder / "other.txt"), "optim": optim, "save_every_s": 0.0, **options},
    )


def use_cache_of(folder: Path) -> None:
    os.environ["FIRSTWORDS_CACHE"] = str(folder / "cache")


@dataclass(frozen=True)
class Pace:
    """How long the run that is never killed takes: a save, and from the first step to the end with and without saves."""

    save_s: float
    saving_s: float
    training_s: float


def reference(folder: Path, threads: int) -> Pace:
    """Train the run that every killed one must equal."""
    told: list[tuple[float, Told]] = []

    def train_and_time() -> None:
        options = {"steps": 60, "batch_size": 8, "eval_every": 7, "sample_every": 20, "threads": threads}
        first(folder, **options, listener=lambda event: told.append((time.monotonic(), event)))
        saves_s = [now - before for (before, _), (now, event) in itertools.pairwise(told) if isinstance(event, Saved)]
        began_s = next(now for now, event in told if isinstance(event, StepDone))
        saving_s = told[-1][0] - began_s
        pace = Pace(statistics.median(saves_s), saving_s, saving_s - sum(saves_s[1:]))
        (folder / "pace.json").write_text(json.dumps(vars(pace)))

    finish(train_and_time)
    state = outcome(folder / "whole")["weights"]
    assert 0 < state[2] < state[0] == 60, "the best step must be neither the first nor the last"
    return Pace(**json.loads((folder / "pace.json").read_text()))


def go_on(folder: Path, run: Path, *, real: bool, saving: bool) -> None:
    """Begin a run with the configuration of `whole`, or resume it: here, or in the program that a person calls."""
    resuming, config = RunFolder(run).exists, folder / "whole" / "config.toml"
    use_cache_of(folder)
    if real:
        arguments = ["--resume"] if resuming else ["--config", str(config), "--save-every", "0s" if saving else "0.05s"]
        command = [sys.executable, "-m", "firstwords", "train", "--json", "--out", str(run), *arguments]
        with run.with_suffix(".log").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.execve(sys.executable, command, {**os.environ, "PYTHONFAULTHANDLER": "1"})
    if not saving:
        loop.time = SimpleNamespace(perf_counter=map(float, itertools.count()).__next__)  # type: ignore[assignment]
    if resuming:
        api.train(out=run, resume=True)
    else:
        api.train(config=config, out=run, save_every_s=0.0 if saving else TICKS)


# ------------------------------------------------------------------------------------- kills at random moments


@dataclass(frozen=True)
class Kill:
    """What a kill left."""

    in_save: bool  # something was half-written, or half-removed
    lost_steps: int
    folders: int  # of checkpoints: those kept, and one more for each life that was killed before its first rotation


def chain(folder: Path, number: int, pace: Pace, *, saving: bool, real: bool = False) -> list[Kill]:
    """Kill a run at random moments of its way, restart it each time, and compare its end with `whole`; returns the kills.

    Args:
        folder: Holds `whole`.
        number: Of the run, and the seed of its kills.
        pace: Of `whole`.
        saving: Save at every step, and wait with each kill for a save; otherwise save every few steps.
        real: Train in processes of their own, started as a person does.
    """
    random, run, kills = Random(number), folder / f"killed-{number}", list[Kill]()
    most_s = pace.saving_s if saving else pace.training_s
    moments_s = [0.0, *sorted(random.uniform(0, most_s) for _ in range(KILLS_A_RUN))]
    for pause_s in (after_s - before_s for before_s, after_s in itertools.pairwise(moments_s)):
        since_ns = time.time_ns()
        pid = forked(lambda: go_on(folder, run, real=real, saving=saving))
        until(lambda since_ns=since_ns: trains(run, since_ns), pid)
        time.sleep(pause_s)
        if saving:
            until(lambda: half_written(run), pid, every_s=0.0002)
            time.sleep(random.uniform(0, pace.save_s / 2))  # what it takes to notice is the other half
        os.kill(pid, signal.SIGKILL)
        if (code := ended(pid)) == 0:  # it was faster than `whole`
            break
        assert code == -signal.SIGKILL, f"the run ended with {code}"
        kills.append(left(run))
        interval = 1 if saving else TICKS // 3
        assert kills[-1].lost_steps <= interval or (real and not saving), f"{kills[-1]}, {interval} steps between saves"
        most_folders = max(KEPT, kills[-2].folders if len(kills) > 1 else 0) + 1
        assert kills[-1].folders <= most_folders, f"{kills[-1]}, {most_folders} folders expected"
    finish(lambda: go_on(folder, run, real=real, saving=saving))
    equal(run, folder / "whole")
    shutil.rmtree(run)
    return kills


def equal(run: Path, whole: Path) -> None:
    """Raise where a run that was killed did not come to the same as one that was not, or left something half-written."""
    here, there = outcome(run), outcome(whole)
    assert here == there, f"not the same: {[name for name in there if here[name] != there[name]]}"
    assert not half_written(run), f"left behind: {half_written(run)}"


def trains(run: Path, since_ns: int) -> bool:
    """Whether the journal tells of a step that a process begun at that time has done."""
    path = RunFolder(run).metrics.path
    if not path.exists() or path.stat().st_mtime_ns < since_ns:
        return False
    events = [line["event"] for line in RunFolder(run).metrics.lines()]
    return "step" in events and events[::-1].index("step") < min(map(events[::-1].index, {"start", "resume"} & {*events}))


def half_written(run: Path) -> list[Path]:
    return [path for folder in (run, run / "checkpoints") for path in store.folders(folder, store.TEMPORARY)]


def left(run: Path) -> Kill:
    """Return what a kill left, after a look at whether anything is wrong with it."""
    found = standing(run)
    steps = [line["step"] for line in RunFolder(run).metrics.lines() if line["event"] == "step"]
    return Kill(bool(half_written(run)), max(steps, default=0) - found.step, len(checkpoint.existing(found.folder.parent)))


def standing(run: Path, damaged: str = "") -> checkpoint.Checkpoint:
    """Return the newest checkpoint: each one that has its name is whole, and none is older than what was announced.

    Args:
        run: Where no process trains.
        damaged: The name of a checkpoint that may be damaged.
    """
    parent = run / "checkpoints"
    for folder in checkpoint.existing(parent):
        if folder.name != damaged:
            store.verify(folder)
    found = checkpoint.newest(parent, lambda notice: None)
    assert found is not None, "there is no checkpoint"
    if not damaged:
        announced = [line["step"] for line in RunFolder(run).metrics.lines() if line["event"] == "save"]
        assert found.step >= max(announced, default=0), "a checkpoint that was announced is gone"
    return found
