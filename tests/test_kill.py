"""A run may be killed at any moment: it goes on and ends as one that never stopped."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

import kill_farm
from conftest import OTHER, STORY, TINY, outcome
from firstwords import api, recorder, resolve, store
from firstwords.events import Told
from firstwords.planning.budget import Budget
from firstwords.runs import checkpoint
from firstwords.training import loop
from firstwords.training import state as states
from firstwords.training.events import Sampled
from kill_farm import Kill, Pace

SEED = 20_000
EVERY = {"lines": 97, "calls": 47}  # a process is killed at one place of so many where not all are tried
MEMORY = "/dev/shm"
Proved = Callable[..., None]
pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def farm(request: pytest.FixtureRequest) -> Iterator[ProcessPoolExecutor]:
    """Processes that fork and kill; see `kill_farm`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")  # threads that wait in a loop take the cores from those that work
        workers = 2 if request.config.option.full else 1
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=kill_farm.begin) as pool:
            yield pool


def killed(farm: ProcessPoolExecutor, wanted: int, at_once: int, folder: Path, pace: Pace, **how: Any) -> list[Kill]:
    """Return what at least `wanted` kills left, half of them or more inside a save."""
    print(f"seeds from {SEED}")
    kills, running, numbers = list[Kill](), set[Future[list[Kill]]](), itertools.count(SEED)
    while running or len(kills) < wanted or 2 * inside(kills) < wanted:
        while len(running) < at_once and (len(kills) < wanted or 2 * inside(kills) < wanted):
            saving = 2 * inside(kills) <= len(kills)
            running.add(farm.submit(kill_farm.chain, folder, next(numbers), pace, saving=saving, **how))
        done, running = wait(running, return_when=FIRST_COMPLETED)
        kills += itertools.chain.from_iterable(future.result() for future in done)
        print(f"{len(kills)} of {wanted} kills, {inside(kills)} inside a save", file=sys.stderr, flush=True)
    return kills


def inside(kills: list[Kill]) -> int:
    return sum(kill.in_save for kill in kills)


def told(kills: list[Kill], threads: int, what: str) -> str:
    lost = max(kill.lost_steps for kill in kills)
    folders = max(kill.folders for kill in kills)
    many = f"at most {lost} steps lost and {folders} checkpoints on disk"
    return f"{len(kills)} {what}, threads {threads}: {inside(kills)} inside a save, {many}"


@pytest.mark.technique("K1")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_killed_at_random_moments_ends_as_one_that_never_stopped(
    farm: ProcessPoolExecutor, tmp_path: Path, proved: Proved, threads: int, full: bool
) -> None:
    pace = farm.submit(kill_farm.reference, tmp_path, threads).result()
    kills = killed(farm, 25 if full else 5, 1, tmp_path, pace)
    proved(len(kills), told(kills, threads, "of forks"))


@pytest.mark.technique("K1")
def test_a_real_process_killed_at_random_moments_ends_as_one_that_never_stopped(
    farm: ProcessPoolExecutor, tmp_path: Path, proved: Proved, full: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    done, said = 0, []
    for threads in (1, 2) if full else (2,):
        folder = tmp_path / str(threads)
        pace = farm.submit(kill_farm.reference, folder, threads).result()
        with capfd.disabled() if full else nullcontext():
            kills = killed(farm, *((250, 2) if full else (2, 1)), folder, pace, real=True, most_kills=5 if full else 2)
        done, said = done + len(kills), [*said, told(kills, threads, "of real processes")]
    proved(done, "; ".join(said))


PLACES = [
    pytest.param("saving", "calls", marks=pytest.mark.technique("K2")),
    pytest.param("saving", "lines", marks=pytest.mark.technique("K3")),
    pytest.param("recovering", "calls", marks=pytest.mark.technique("K5")),
    pytest.param("recovering", "lines", marks=pytest.mark.technique("K5")),
]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a kill leaves, unlike a power cut, does not depend on the disk."""
    with TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else tmp_path) as path:
        yield Path(path)


@pytest.mark.parametrize(("path", "places"), PLACES)
def test_wherever_it_is_killed_nothing_is_lost(
    farm: ProcessPoolExecutor, memory: Path, proved: Proved, path: str, places: str, full: bool
) -> None:
    require_strace(farm, places)
    report = farm.submit(kill_farm.everywhere, memory, path, places, every=1 if full else EVERY[places]).result()
    proved(report.kills, f"{path}: {report.kills} {places} ({report.places} different), {report.states} states resumed from")


@pytest.mark.parametrize("places", ["calls", "lines"])
def test_a_save_without_care_is_found_out(farm: ProcessPoolExecutor, memory: Path, places: str) -> None:
    """The negative control."""
    require_strace(farm, places)
    with pytest.raises(AssertionError, match="has its name is not whole"):
        farm.submit(kill_farm.everywhere, memory, "saving", places, careless=True).result()


def require_strace(farm: ProcessPoolExecutor, places: str) -> None:
    if places == "calls" and not farm.submit(kill_farm.can_trace).result():
        pytest.skip("NOT RUN: strace is not here, or may not trace")


# ------------------------------------------------------------------------------------------- the negative control

KINDS = ("momentum", "exp_avg", "exp_avg_sq", "step")  # of the optimizers' tensors: Muon's and AdamW's
KILLED_AT, POISONED = 15, 5
train_step = loop.train_step


class KilledError(Exception):
    """Stands for the end of the process: nothing after it runs."""


def step_unless_poisoned(state: states.TrainState, *given: Any) -> Any:
    if states.batch_index(state.step, state.skipped) == POISONED:
        raise loop.diverged("poisoned", state.step + 1)
    return train_step(state, *given)


def train(folder: Path, name: str, **options: Any) -> None:
    """Train `folder/name` without a batch that makes it diverge.

    It goes on for a time, which becomes 24 steps after step 10, with an evaluation after each fifth.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTWORDS_CACHE", str(folder / "cache"))
        patch.setattr(Budget, "plan", lambda budget, done, eval_every: (24, 5))
        patch.setattr(loop, "train_step", step_unless_poisoned)
        api.train(out=folder / name, **options)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a time budget, and one that was killed after a sample."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "story.txt").write_text(STORY)
    (folder / "other.txt").write_text(OTHER)
    options = {
        **TINY,
        "text": folder / "story.txt",
        "val": str(folder / "other.txt"),
        "for_s": 1e6,
        "on_nan": "rollback",
        "save_every_s": 0.0,
        "optim": {"kind": "muon", "peak_lr": 0.1, "warmup_steps": 2},
    }

    def kill(event: Told) -> None:
        if isinstance(event, Sampled) and event.step == KILLED_AT:
            raise KilledError

    begun_s = time.perf_counter() - 1000  # long ago, so that a clock which begins anew goes back for certain
    train(folder, "whole", **options, started_s=begun_s)
    with pytest.raises(KilledError):
        train(folder, "killed", **options, started_s=begun_s, listener=kill)
    return folder


def leave_out(piece: str, patch: pytest.MonkeyPatch) -> None:
    """Let the next resume go on without a piece of what was saved, as if it had not been."""
    match piece:
        case "weights":
            patch.setattr(recorder, "load_weights", lambda model, tensors, where: None)
        case "metrics.jsonl" | "samples.jsonl":
            cut = store.cut
            patch.setattr(store, "cut", lambda path, size: None if path.name == piece else cut(path, size))
        case "position":  # of the data, which the step tells: begin with the first batch again
            real = resolve.batches
            patch.setattr(resolve, "batches", lambda *of: lambda step: real(*of)(step - KILLED_AT + 1))
        case _ if piece.startswith("*/"):
            load, kind = states.load_optimizer_tensors, piece[1:]
            patch.setattr(
                states,
                "load_optimizer_tensors",
                lambda state, tensors: load(
                    state, {name: torch.zeros_like(t) if name.endswith(kind) else t for name, t in tensors.items()}
                ),
            )
        case _:
            load_scalars = states.load_scalars

            def load_others(state: states.TrainState, values: dict[str, Any]) -> None:
                before = getattr(state, piece)
                load_scalars(state, values)
                setattr(state, piece, before)

            patch.setattr(states, "load_scalars", load_others)


@pytest.mark.technique("K9")
@pytest.mark.parametrize(
    "piece", [*states.SCALARS, *(f"*/{kind}" for kind in KINDS), "weights", "metrics.jsonl", "samples.jsonl", "position"]
)
def test_a_piece_of_state_that_is_left_out_shows(
    tmp_path: Path, planned: Path, proved: Proved, piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scalar that joins the registry is left out too, and must show: where it does not, this run needs to use it."""
    shutil.copytree(planned, tmp_path, dirs_exist_ok=True)
    leave_out(piece, monkeypatch)
    train(tmp_path, "killed", resume=True)
    assert outcome(tmp_path / "killed") != outcome(planned / "whole")
    proved(1)


def test_nothing_shows_where_nothing_is_left_out(tmp_path: Path, planned: Path) -> None:
    shutil.copytree(planned, tmp_path, dirs_exist_ok=True)
    train(tmp_path, "killed", resume=True)
    assert outcome(tmp_path / "killed") == outcome(planned / "whole")


def test_each_kind_of_tensor_is_left_out_once(planned: Path) -> None:
    found = checkpoint.newest(planned / "killed" / "checkpoints", print)
    assert found is not None
    assert {name.rpartition("/")[2] for name in found.tensors(checkpoint.OPTIMIZER)} == set(KINDS)
