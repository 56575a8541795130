"""What a farm process does: it imports PyTorch once and forks children, which train and are killed.

A farm computes with one thread itself, because libgomp cannot go on in the child of a process that used more; a child may.
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from conftest import OTHER, STORY, TINY, outcome
from firstwords import api, recorder, store
from firstwords.errors import DataError
from firstwords.events import Saved, Started, Told
from firstwords.recorder import Recorder
from firstwords.runs import checkpoint, journal
from firstwords.runs import folder as folder_module
from firstwords.runs.checkpoint import Checkpoint
from firstwords.runs.folder import RunFolder
from firstwords.training import loop
from firstwords.training.events import StepDone

HANGS_S = 120.0  # a child that takes so long shows its stack and dies
TRIES = 3  # at a place: a process may make a call less than the one in which they were counted, and then ends by itself
KEPT = 3  # checkpoints: the newest two, and the best
TICKS = 15.0  # between saves: the loop looks at its clock three times a step, so that such an interval is five steps


def begin() -> None:
    """Prepare a farm; called once in its process. What the first training of a process imports, no child imports again."""
    faulthandler.enable()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        first(Path(folder), steps=1)
    gc.freeze()  # so that no collection in a child copies all memory


# ---------------------------------------------------------------------------------------------------- children


def forked(act: Callable[[], object]) -> int:
    """Do something in a child and return the child's process id."""
    gc.collect()  # what the parent dropped would be closed in some children and not in others, whose calls are counted
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
        if (late_s := time.monotonic() - deadline_s) > 0:
            os.kill(pid, signal.SIGABRT if late_s < 5 else signal.SIGKILL)
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
    """Train the run that every killed one must equal, and return how fast that went."""
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
    folders: int  # of checkpoints: those kept, and those of a save before its rotation, which a kill leaves to the next


def chain(folder: Path, number: int, pace: Pace, *, saving: bool, most_kills: int = 5, real: bool = False) -> list[Kill]:
    """Kill a run at random moments of its way, restart it each time, and compare its end with `whole`; returns the kills.

    Args:
        folder: Holds `whole`.
        number: Of the run, and the seed of its kills.
        pace: Of `whole`.
        saving: Save at every step, and wait with each kill for a save; otherwise save every few steps.
        most_kills: Of the run.
        real: Train in processes of their own, started as a person does.
    """
    random, run, kills = Random(number), folder / f"killed-{number}", list[Kill]()
    most_s = pace.saving_s if saving else pace.training_s
    moments_s = [0.0, *sorted(random.uniform(0, most_s) for _ in range(most_kills))]
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
        timed = real and not saving  # where an interval is no number of steps
        assert 0 <= kills[-1].lost_steps <= (math.inf if timed else interval), f"{kills[-1]}, saved every {interval} steps"
        most_folders = max(KEPT, kills[-2].folders if len(kills) > 1 else 0) + 2
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
    begun = max((number for number, event in enumerate(events) if event in ("start", "resume")), default=len(events))
    return "step" in events[begun:]


def half_written(run: Path) -> list[Path]:
    return [path for folder in (run, run / "checkpoints") for path in store.folders(folder, store.TEMPORARY)]


def left(run: Path) -> Kill:
    """Return what a kill left, after a look at whether anything is wrong with it."""
    found = standing(run)
    steps = [line["step"] for line in RunFolder(run).metrics.lines() if line["event"] == "step"]
    return Kill(bool(half_written(run)), max(steps, default=0) - found.step, len(checkpoint.existing(found.folder.parent)))


def standing(run: Path, damaged: str = "") -> Checkpoint:
    """Return the newest checkpoint to go on from: all that have their names are whole, and it is as new as was announced.

    Args:
        run: Where no process trains.
        damaged: The name of a checkpoint that may be damaged.
    """
    found: Checkpoint | None = None
    for folder in checkpoint.existing(run / "checkpoints"):
        try:
            manifest = store.verify(folder)
        except DataError as error:
            if folder.name != damaged:
                raise AssertionError(f"a checkpoint that has its name is not whole: {error}") from error
        else:
            found = Checkpoint(folder, manifest) if checkpoint.OPTIMIZER in manifest["files"] else found
    assert found is not None, "there is no checkpoint to go on from"
    if not damaged:
        announced = [line["step"] for line in RunFolder(run).metrics.lines() if line["event"] == "save"]
        assert found.step >= max(announced, default=0), "a checkpoint that was announced is gone"
    return found


# ------------------------------------------------------------------------------------ kills at every single place

Act = Callable[[Path], object]  # what is killed, in a run's folder
Killer = Callable[[Callable[[], object]], int]  # does something in a child, kills it somewhere; returns how it ended
CALLS = (
    "openat,mkdir,mkdirat,write,pwrite64,fsync,fdatasync,close,lseek,ftruncate,truncate,flock,rename,renameat,renameat2,"
    "unlink,unlinkat,rmdir,newfstatat,getdents64"
)
SAVED_STEP, DAMAGED = 10, "step-00000005"
WRITERS = {module.__file__ for module in (store, checkpoint, folder_module, journal, recorder)}


class HeldError(BaseException):
    """Ends a training just before something, which is then still to do."""


@dataclass(frozen=True)
class Report:
    """What was killed everywhere."""

    kills: int
    states: int  # different folders that the kills left; a run was resumed from each
    places: int  # different lines, or system calls, that were killed at


def saving(folder: Path) -> tuple[Path, Act]:
    """Return the folder of a run, and its next save: of the best weights, of the newest state, and a rotation."""
    held: list[Recorder] = []

    def hold(recorder: Recorder) -> None:
        if recorder.state.step == SAVED_STEP:
            held.append(recorder)
            raise HeldError
        save(recorder)

    save = Recorder._save
    with patch.object(Recorder, "_save", hold), patch.object(loop, "time", loop.time), suppress(HeldError):
        go_on(folder, folder / "scene", real=False, saving=False)
    assert held[0].copy is not None, "there are no best weights to save"

    def act(run: Path) -> None:
        held[0].run = RunFolder(run)
        held[0]._save()

    return folder / "scene", act


def recovering(folder: Path) -> tuple[Path, Act]:
    """Return the folder of a killed run with all that a resume has to clear up, and that resume up to its first step."""
    scene, save = saving(folder)
    with patch.object(checkpoint, "rotate"), patch.object(Recorder, "_scalars", side_effect=HeldError), suppress(HeldError):
        save(scene)  # of the best weights alone
    half = scene / "checkpoints" / f"tmp-step-{SAVED_STEP:08d}-x0123abcd"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (scene / "tmp-config.toml-x0123abcd").write_bytes(b"half")
    weights = scene / "checkpoints" / DAMAGED / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")

    def act(run: Path) -> None:
        with suppress(HeldError):
            api.train(out=run, resume=True, listener=hold)

    def hold(event: Told) -> None:
        if isinstance(event, Started):
            raise HeldError

    return scene, act


def everywhere(folder: Path, path: str, places: str, *, every: int = 1, careless: bool = False) -> Report:
    """Kill something at each of its places, and look at what is left; resume once from each different thing that is left.

    Args:
        folder: Empty.
        path: `saving` or `recovering`.
        places: `lines` or `calls`.
        every: Kill at one place of so many, in their order.
        careless: Save without care, as a control.
    """
    small = {"context_length": 32, "emb_dim": 8, "n_heads": 2, "n_layers": 1, "ff_dim": 16, "drop_rate": 0.1}
    first(folder, steps=12, batch_size=2, eval_every=4, sample_every=6, model=small, val=None)
    (scene, act), damaged = (saving(folder), "") if path == "saving" else (recovering(folder), DAMAGED)
    run, states = folder / "run", set[Any]()
    with patch.object(store, "publish", publish_without_care) if careless else nullcontext():
        killers = (lines(scene, run, act) if places == "lines" else calls(scene, run, act))[::every]
        allowed = whole_ones(scene, damaged) | whole_ones(run, damaged)
        for place, killer in killers:
            for _ in range(TRIES):
                anew(scene, run)
                if (code := killer(lambda: act(run))) == -signal.SIGKILL:
                    break
            assert code == -signal.SIGKILL, f"killed at {place}, but it ended with {code}"
            try:
                nothing_lost(scene, run, damaged, allowed)
                if (state := what_stands(run)) not in states:
                    states.add(state)
                    finish(lambda: go_on(folder, run, real=False, saving=False))
                    equal(run, folder / "whole")
            except AssertionError as error:
                raise AssertionError(f"killed at {place}: {error}") from error
    return Report(len(killers), len(states), len({place.partition(" ")[0] for place, _ in killers}))


def anew(scene: Path, run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(scene, run)


def whole_ones(run: Path, damaged: str) -> set[tuple[int, str]]:
    """Return step and weights of the newest checkpoint, which a kill may neither lose nor change."""
    found = standing(run, damaged)
    return {(found.step, found.weights_sha256)}


def nothing_lost(scene: Path, run: Path, damaged: str, allowed: set[tuple[int, str]]) -> None:
    """Raise where the newest checkpoint is none of those allowed, or the journals are not what it says they were."""
    found = standing(run, damaged)
    assert (found.step, found.weights_sha256) in allowed, f"the newest checkpoint is of step {found.step}"
    for name, n_bytes in found.json(checkpoint.STATE)["journal_bytes"].items():
        before, now = ((place / name).read_bytes()[:n_bytes] for place in (scene, run))
        assert now == before, f"{name} lost what the checkpoint counts on"


def what_stands(run: Path) -> tuple[tuple[str, int], ...]:
    """Return the names and sizes in a run's folder, without the random parts of names."""
    files = sorted(path for path in run.rglob("*"))
    return tuple((re.sub(r"(tmp-|damaged-|kept-)([^/]*)-x?[0-9a-f]{8}", r"\1\2", str(p)), p.stat().st_size) for p in files)


def publish_without_care(folder: Path, files: Any, describe: Callable[[], Any]) -> store.Json:
    """Write a checkpoint where it will stand, for a control."""
    folder.mkdir()
    records = {name: store._write_durably(folder / name, pieces) for name, pieces in files.items()}
    manifest = {"format": store.FORMAT, "files": records, **describe()}
    manifest["sha256"] = store.sha256(store.canonical_json(manifest))
    store._write_durably(folder / store.MANIFEST, [store.canonical_json(manifest)])
    return store.verify(folder)


def lines(scene: Path, run: Path, act: Act) -> list[tuple[str, Killer]]:
    """Return each line of Python that an act runs in the modules that write, with what kills it there."""
    log = run.with_suffix(".lines")

    def note() -> None:
        passed: list[str] = []
        traced(lambda: act(run), passed, None)
        log.write_text("\n".join(passed))

    anew(scene, run)
    finish(note)

    def killer(number: int) -> Killer:
        return lambda act: ended(forked(lambda: traced(act, [], number)))

    return [(f"{place} (line {k} of its way)", killer(k)) for k, place in enumerate(log.read_text().split("\n"), 1)]


def traced(act: Callable[[], object], passed: list[str], last: int | None) -> None:
    """Do something and note each line of the modules that write; the process is killed before the `last`."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if name not in WRITERS:
            return None
        if event == "line":
            passed.append(f"{Path(name).name}:{frame.f_lineno}")
            if len(passed) == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    act()
    sys.settrace(None)


def calls(scene: Path, run: Path, act: Act) -> list[tuple[str, Killer]]:
    """Return each system call of an act that concerns files, with what kills it there.

    Those of its first thread, the only one that writes; strace counts each thread's calls by themselves.
    """
    log = run.with_suffix(".calls")
    anew(scene, run)
    code = under_strace(lambda: act(run), "-o", str(log), "-e", f"trace={CALLS}")
    assert code == 0, f"the act ended with {code}"
    told = re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE)
    names = [name for thread, name in told if thread == told[0][0]]
    numbered = [(name, k) for name, n in Counter(names).items() for k in range(1, n + 1)]

    def killer(name: str, k: int) -> Killer:
        inject = f"inject={name}:signal=KILL:when={k}"
        return lambda act: under_strace(act, "-o", os.devnull, "-e", f"trace={name}", "-e", inject)

    return [(f"{name} (number {k})", killer(name, k)) for name, k in numbered]


def under_strace(act: Callable[[], object], *options: str) -> int:
    """Do something in a child that strace watches from the first moment on; return how it ended."""

    def wait_for_strace() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        act()

    pid = forked(wait_for_strace)
    os.waitpid(pid, os.WUNTRACED)
    with subprocess.Popen(["strace", "-f", "-qq", "-p", str(pid), *options]) as strace:
        until(lambda: strace.poll() is not None or "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text(), pid)
        os.kill(pid, signal.SIGCONT)
        return ended(pid)


def can_trace() -> bool:
    """Whether strace is there and may watch a child: it sees one call and kills there."""
    if shutil.which("strace") is None:
        return False
    inject = "inject=mkdir:signal=KILL:when=1"
    return under_strace(Path("/").mkdir, "-o", os.devnull, "-e", "trace=mkdir", "-e", inject) == -signal.SIGKILL
