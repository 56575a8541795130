"""A run that stops anywhere and goes on ends as one that never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import STORY, TINY, journal, outcome
from firstwords import api, asking, exchange, preparing, pretraining, recorder, resolve, store, verifying
from firstwords.config import RunConfig, run_config
from firstwords.config_file import from_toml
from firstwords.errors import ConfigError, DataError, FirstwordsError, NoInputError, PermissionDeniedError, StorageError
from firstwords.events import Listener, Notice, Preparing, Started, Told, ignore_event
from firstwords.insight import memorisation, record
from firstwords.planning import budget, machine, matmul, measure, system
from firstwords.recorder import TrainResult
from firstwords.runs import checkpoint, signals
from firstwords.runs.folder import RunFolder
from firstwords.text import corpus, tokenizer
from firstwords.text.tokenizer import train_bpe
from firstwords.training import loop
from firstwords.training import state as states
from firstwords.training.events import Evaluated, Sampled, SaveDue, StepDone

STEPS = 24


class KilledError(Exception):
    """Stands for the end of the process: nothing after it runs."""


def killing(at: tuple[type, int]) -> Listener:
    """Return a listener that ends the process, as it were, at a step."""

    def listener(told: Told) -> None:
        if isinstance(told, at[0]) and getattr(told, "step", -1) >= at[1]:
            raise KilledError

    return listener


EMPTY: dict[str, dict[str, Any]] = {checkpoint.STATE: {}, checkpoint.CONFIG: {}}


def stopping(at: tuple[type, int]) -> Listener:
    """Return a listener that asks for a stop at a step."""

    def listener(told: Told) -> None:
        if isinstance(told, at[0]) and getattr(told, "step", -1) == at[1]:
            signal.raise_signal(signal.SIGTERM)

    return listener


def train(
    tmp_path: Path,
    name: str,
    *,
    kill_at: tuple[type, int] | None = None,
    sigterm_at: tuple[type, int] | None = None,
    **options: Any,
) -> TrainResult:
    text = tmp_path / "story.txt"
    text.write_text(STORY)
    other = tmp_path / "other.txt"
    other.write_text(STORY[::-1][:900])  # first its letters are learnt, then that it is unlike the story

    listener = killing(kill_at) if kill_at else stopping(sigterm_at) if sigterm_at else ignore_event
    options = {
        "listener": listener,
        **TINY,
        "val": str(other),
        "steps": STEPS,
        "eval_every": 5,
        "save_every_s": 0.0,
        "optim": {"kind": "muon", "peak_lr": 0.1, "warmup_steps": 2},
        **options,
    }
    if options.get("resume"):
        options = {key: value for key, value in options.items() if key in ("resume", "steps", "threads", "listener")}
        return api.train(out=tmp_path / name, **options)
    return api.train(text, out=tmp_path / name, **options)


def same(a: TrainResult, b: TrainResult) -> bool:
    figures = [(r.weights_sha256, r.best_step, r.nats_per_token, r.tokens, r.last) for r in (a, b)]
    return figures[0] == figures[1] and outcome(Path(a.run)) == outcome(Path(b.run))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """The folder of a run that never stopped, with its cache, and its result."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTWORDS_CACHE", str(folder / "cache"))
        return folder, train(folder, "whole")


@pytest.fixture
def whole(tmp_path: Path, original: tuple[Path, TrainResult]) -> TrainResult:
    """A copy of the run that never stopped, in `tmp_path / "whole"`."""
    shutil.copytree(original[0], tmp_path, dirs_exist_ok=True)
    return original[1]


@pytest.mark.parametrize(
    "kill_at", [(StepDone, 1), (SaveDue, 5), (StepDone, 13), (Sampled, 10), (StepDone, 23), (SaveDue, 24)]
)
def test_a_run_killed_anywhere_goes_on_to_the_same_end(
    tmp_path: Path, whole: TrainResult, kill_at: tuple[type, int]
) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, "killed", kill_at=kill_at)
    told: list[Told] = []
    resumed = train(tmp_path, "killed", resume=True, listener=told.append)
    nothing_left = kill_at == (SaveDue, STEPS)  # it was saved before the kill
    assert (Notice("bit-exact resume") in told) is not nothing_left
    assert same(whole, resumed)


@pytest.mark.parametrize(
    ("given", "micro"),
    [({"device": "cpu"}, TINY["batch_size"]), ({"device": "auto"}, TINY["batch_size"]), ({"micro_batch_size": 1}, 1)],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA")
def test_a_run_that_leaves_a_gpu_leaves_what_was_decided_for_it(
    tmp_path: Path, given: dict[str, Any], micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settled(**given: Any) -> RunConfig:
        asked = asking.resumed(tmp_path / "run", None, given)
        return resolve.settle(asked, preparing.prepare(asked, lambda _: None), difficulty=1.0)[0]

    train(tmp_path, "run", steps=1, micro_batch_size=1)
    assert settled().micro_batch_size == 1  # the negative control: it stays on its processor
    config, of_a_gpu = tmp_path / "run/config.toml", {'"cpu"': '"cuda:1"', '"float32"': '"bfloat16"', '"off"': '"on"'}
    text = config.read_text()
    for before, after in of_a_gpu.items():
        text = text.replace(f" = {before}\n", f" = {after}\n")
    config.write_text(text)
    monkeypatch.setattr(matmul, "known_rates", lambda *_: {"float32": 1e11, "bfloat16": 1e9})  # has no instructions for it
    found = settled(**{"device": "cpu", **given})
    assert (found.micro_batch_size, found.precision, found.compile) == (micro, "float32", "off")


def test_a_run_that_goes_on_on_a_gpu_promises_no_last_bit(
    tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, "killed", kill_at=(StepDone, 13))
    monkeypatch.setattr(RunConfig, "on_cpu", False)  # as if there were one
    told: list[Told] = []
    way = {"precision": "float32", "compile": "off"}  # else decided anew, as for a run that left one
    api.train(out=tmp_path / "killed", resume=True, listener=told.append, **way)
    said = [notice.text for notice in told if isinstance(notice, Notice)]
    assert any("on a GPU the last bits" in line for line in said)
    assert "bit-exact resume" not in said


@pytest.mark.parametrize("length", [{"steps": STEPS + 2}, {"for_s": 1}])
def test_a_run_that_is_planned_anew_promises_its_state_to_the_last_bit_and_not_what_follows(
    tmp_path: Path, whole: TrainResult, length: dict[str, Any]
) -> None:
    told: list[Told] = []
    api.train(out=tmp_path / "whole", resume=True, listener=told.append, **length)
    said = [notice.text for notice in told if isinstance(notice, Notice)]
    assert "resumed as it was saved, to the last bit; what is left is planned anew" in said
    assert "bit-exact resume" not in said


def test_a_run_that_is_done_says_so_and_that_nothing_is_planned(tmp_path: Path) -> None:
    timed = train(tmp_path, "timed", steps=None, for_s=2, eval_every=None)
    told: list[Told] = []
    resumed = api.train(out=tmp_path / "timed", resume=True, threads=2, listener=told.append)
    said = [notice.text for notice in told if isinstance(notice, Notice)]
    assert resumed.steps == timed.steps
    assert any(line.startswith("the run is done") for line in said)
    assert not any("planned anew" in line or "bit-exact" in line for line in said)


def test_a_run_of_one_setting_equals_itself_and_not_another_seed(tmp_path: Path, whole: TrainResult) -> None:
    assert same(whole, train(tmp_path, "again"))
    assert not same(whole, train(tmp_path, "other", seed=2))


def test_every_attribute_of_the_state_is_registered() -> None:
    tensors = {"model", "optimizers"}
    assert set(states.TrainState.__dataclass_fields__) == tensors | set(states.SCALARS)


def test_a_longer_run_extends_the_schedule_from_where_it_was(tmp_path: Path, whole: TrainResult) -> None:
    longer = train(tmp_path, "whole", resume=True, steps=STEPS + 6)
    assert longer.steps == STEPS + 6
    steps = [line["step"] for line in journal(tmp_path / "whole", "step")]
    assert steps == list(range(1, STEPS + 7))
    assert longer.tokens > whole.tokens


def test_a_run_that_is_done_stays_as_it_is(tmp_path: Path, whole: TrainResult) -> None:
    again = train(tmp_path, "whole", resume=True)
    assert (again.steps, again.weights_sha256, again.last) == (whole.steps, whole.weights_sha256, whole.last)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_ends_the_same(tmp_path: Path, whole: TrainResult) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, "killed", kill_at=(StepDone, 13))
    newest = checkpoint.existing(tmp_path / "killed" / "checkpoints")[-1] / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    told: list[Told] = []
    resumed = train(tmp_path, "killed", resume=True, listener=told.append)
    assert any(isinstance(t, Notice) and "set aside" in t.text for t in told)
    assert same(whole, resumed)


def test_with_every_checkpoint_damaged_nothing_is_begun_anew(tmp_path: Path, whole: TrainResult) -> None:
    for folder in checkpoint.existing(tmp_path / "whole" / "checkpoints"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match="every checkpoint is damaged"):
        train(tmp_path, "whole", resume=True)


def test_resuming_where_there_is_no_run_begins_none(tmp_path: Path) -> None:
    with pytest.raises(NoInputError):
        train(tmp_path, "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_run_without_a_checkpoint_begins_at_step_0_and_says_so(tmp_path: Path, whole: TrainResult) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, "killed", kill_at=(Started, 0))
    told: list[Told] = []
    resumed = train(tmp_path, "killed", resume=True, listener=told.append)
    assert any(isinstance(t, Notice) and "step 0" in t.text for t in told)
    assert same(whole, resumed)


@pytest.mark.parametrize("best_is_left", [False, True])
def test_a_run_that_was_saved_is_not_begun_anew_where_no_checkpoint_to_go_on_from_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_is_left: bool
) -> None:
    best_step = seldom_saved(tmp_path, "run", monkeypatch).best_step
    run = RunFolder(tmp_path / "run")
    for folder in checkpoint.existing(run.checkpoints):
        if not (best_is_left and checkpoint.step_of(folder) == best_step):  # which has its weights alone
            shutil.rmtree(folder)
    before = contents(run.path)
    with pytest.raises(NoInputError, match="no checkpoint to go on from is there"):
        train(tmp_path, "run", resume=True)
    assert contents(run.path) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


def test_the_best_and_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run = train(tmp_path, "run", steps=40)
    kept = [int(path.name[5:]) for path in checkpoint.existing(tmp_path / "run" / "checkpoints")]
    assert kept == sorted({run.best_step, 39, 40})
    assert run.best_step < 39
    assert api.load(tmp_path / "run").step == run.best_step


def seldom_saved(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> TrainResult:
    """Train so that saves take far too long to follow each best evaluation."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SAVE_FACTOR", 1e12)
        return train(tmp_path, name, save_every_s=1e9, **options)


def test_a_best_that_came_between_two_saves_is_kept_with_the_next(
    tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = seldom_saved(tmp_path, "seldom", monkeypatch)
    assert same(whole, result)
    assert 0 < result.best_step < STEPS
    folders = checkpoint.existing(tmp_path / "seldom" / "checkpoints")
    assert [checkpoint.step_of(folder) for folder in folders] == [0, result.best_step, STEPS]
    files = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in folders]
    assert files == [["model.safetensors", "optimizer.safetensors"], ["model.safetensors"], files[0]]
    assert api.load(tmp_path / "seldom").step == result.best_step
    assert api.verify(tmp_path / "seldom", replay=STEPS).ok  # not begun at the best, which has no optimizer


@pytest.mark.parametrize("kill_at", [(StepDone, 7), (StepDone, STEPS - 1), (SaveDue, STEPS)])
def test_a_run_killed_with_its_best_in_memory_only_finds_it_again(
    tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch, kill_at: tuple[type, int]
) -> None:
    with pytest.raises(KilledError):
        seldom_saved(tmp_path, "killed", monkeypatch, kill_at=kill_at)
    assert same(whole, seldom_saved(tmp_path, "killed", monkeypatch, resume=True))


def test_a_best_that_was_saved_without_the_save_that_it_belongs_to_is_made_again(
    tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    seldom_saved(tmp_path, "killed", monkeypatch)
    store.remove_folder(checkpoint.folder_of(tmp_path / "killed" / "checkpoints", STEPS))
    assert same(whole, seldom_saved(tmp_path, "killed", monkeypatch, resume=True))
    assert not list((tmp_path / "killed" / "checkpoints").glob("kept-*"))


@pytest.mark.parametrize("otherwise", [{"steps": 2 * STEPS}, {"threads": 2}])
def test_a_best_that_no_run_will_make_again_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, otherwise: dict[str, Any]
) -> None:
    """The learning rates of another length are others, and so are sums by other threads."""
    best_step = seldom_saved(tmp_path, "killed", monkeypatch).best_step
    checkpoints = tmp_path / "killed" / "checkpoints"
    weights = checkpoint.weights_sha256(checkpoints, best_step)
    store.remove_folder(checkpoint.folder_of(checkpoints, STEPS))
    told: list[Told] = []
    train(tmp_path, "killed", resume=True, listener=told.append, **otherwise)
    (kept,) = checkpoints.glob("kept-*")
    assert store.verify(kept)["files"][checkpoint.MODEL]["sha256"] == weights
    assert any(isinstance(line, Notice) and kept.name in line.text for line in told)


def test_a_resume_that_is_refused_leaves_the_weights_that_are_newer(tmp_path: Path) -> None:
    train(tmp_path, "run", keep=100, steps=6)
    checkpoints = tmp_path / "run/checkpoints"
    last = checkpoint.folder_of(checkpoints, 6)
    found = checkpoint.verified(last)
    tensors = {name: tensor.clone() for name, tensor in found.tensors(checkpoint.MODEL).items()}
    described = {name: found.json(name) for name in (checkpoint.STATE, checkpoint.CONFIG)}
    tokenizer_json = (last / checkpoint.TOKENIZER).read_bytes()
    store.remove_folder(last)
    checkpoint.save(checkpoints, 6, tensors, None, described, tokenizer_json, found.manifest["run"])
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError, match="steps already"):
        api.train(out=tmp_path / "run", resume=True, steps=3)
    assert contents(tmp_path / "run") == before


def test_changed_threads_are_named_as_the_reason_why_a_resume_is_not_exact(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, "killed", kill_at=(StepDone, 13))
    told: list[Told] = []
    train(tmp_path, "killed", resume=True, threads=2, listener=told.append)
    assert Notice("not bit-exact because: threads 1 -> 2") in told


@pytest.mark.parametrize("elsewhere", [True, False])
def test_on_another_processor_it_is_not_exact_and_says_what_may_not_suit_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, elsewhere: bool
) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, "killed", kill_at=(StepDone, 13))
    if elsewhere:
        monkeypatch.setattr(system, "processor", lambda *_: "another")
    told: list[Told] = []
    train(tmp_path, "killed", resume=True, listener=told.append)
    said = [line.text for line in told if isinstance(line, Notice)]
    assert any(line == "bit-exact resume" for line in said) is not elsewhere
    assert any("as it began: --threads 1 --precision float32" in line for line in said) is elsewhere


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path, whole: TrainResult) -> None:
    before = (tmp_path / "whole" / "config.toml").read_text()
    with pytest.raises(ConfigError, match=f"{STEPS} steps already"):
        train(tmp_path, "whole", resume=True, steps=STEPS - 1)
    assert (tmp_path / "whole" / "config.toml").read_text() == before


def test_a_finished_run_goes_on_for_the_time_that_it_is_given(tmp_path: Path, whole: TrainResult) -> None:
    longer = api.train(out=tmp_path / "whole", resume=True, for_s=2)
    assert longer.steps > whole.steps
    assert journal(tmp_path / "whole", "plan")[-1]["total_steps"] == longer.steps


def test_time_that_a_run_was_given_once_more_is_kept_where_it_stops_again(tmp_path: Path, whole: TrainResult) -> None:
    folder = tmp_path / "whole"
    longer = api.train(out=folder, resume=True, for_s=1)
    recorded = run_config(from_toml((folder / "config.toml").read_text(), "config.toml"))
    assert recorded.for_s == pytest.approx(whole.elapsed_s + 1, abs=0.01)
    with pytest.raises(KilledError):  # after some of ten more seconds
        api.train(out=folder, resume=True, for_s=10, listener=killing((StepDone, longer.steps + 5)))
    began_s = time.perf_counter()
    api.train(out=folder, resume=True)
    assert 5 < time.perf_counter() - began_s < 11  # the rest of the ten


def test_time_that_a_run_was_given_once_more_is_not_lost_where_nothing_is_saved_meanwhile(
    tmp_path: Path, whole: TrainResult
) -> None:
    folder = tmp_path / "whole"
    with pytest.raises(KilledError):
        api.train(out=folder, resume=True, for_s=3, save_every_s=3600, listener=killing((StepDone, whole.steps + 5)))
    longer = api.train(out=folder, resume=True)
    assert longer.steps > whole.steps + 5
    assert api.train(out=folder, resume=True).steps == longer.steps, "and then it is done"


def test_another_length_brings_its_own_evaluations_and_what_was_named_stays(tmp_path: Path) -> None:
    for name, named in (("own", None), ("named", 7)):
        train(tmp_path, name, steps=20, eval_every=named)
        api.train(out=tmp_path / name, resume=True, steps=80)
        judged = [line["step"] for line in journal(tmp_path / name, "evaluation")]
        between = [step for step in judged if step > 20]
        assert between == (list(range(24, 81, 4)) if name == "own" else [*range(21, 80, 7), 80])


def test_a_run_that_was_killed_before_its_first_save_is_foretold_as_any_other(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, "run", kill_at=(SaveDue, 0), steps=6)
    shutil.rmtree(tmp_path / "run/checkpoints", ignore_errors=True)
    (tmp_path / "run/metrics.jsonl").unlink(missing_ok=True)
    resumed = api.train(out=tmp_path / "run", resume=True)
    assert resumed.predicted is not None
    assert journal(tmp_path / "run", "start", "resume")[0]["event"] == "start"


def test_more_time_has_room_for_what_it_has_room_for_by_itself(
    tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long look at its end is made where it is a small share of the time that is left, not of what the run had before."""
    look_s = budget.END_SHARE * (2 + whole.elapsed_s / 2)
    monkeypatch.setattr(memorisation, "memorisation_s", lambda n_bytes: look_s)
    told: list[Told] = []
    api.train(out=tmp_path / "whole", resume=True, for_s=2, listener=told.append)
    assert any(isinstance(line, Notice) and "no time is left to look up" in line.text for line in told)


def test_a_run_that_is_given_a_little_more_time_does_not_learn_at_the_full_rate_again(
    tmp_path: Path, whole: TrainResult
) -> None:
    """Its first steps, before a plan is made of them, are as those of a run that was planned so long by its pace."""
    optim = {"decay": "linear", "peak_lr": 8e-3, "warmup_steps": 2}
    began = train(tmp_path, "timed", steps=200, optim=optim, save_every_s=3600, eval_every=None)
    api.train(out=tmp_path / "timed", resume=True, for_s=1.5)
    rates = [line["lr"] for line in journal(tmp_path / "timed", "step") if line["step"] > began.steps]
    assert rates
    assert max(rates) < 0.7 * 8e-3


def test_more_steps_in_place_of_a_time_budget_bring_their_own_evaluations(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, "killed", kill_at=(StepDone, 3), steps=None, for_s=60, eval_every=None)
    api.train(out=tmp_path / "killed", resume=True, steps=40)
    assert [line["step"] for line in journal(tmp_path / "killed", "evaluation")] == [0, *range(4, 41, 2)]


def test_evaluations_of_a_time_budget_become_as_often_as_a_resume_says(tmp_path: Path) -> None:
    train(tmp_path, "run", sigterm_at=(StepDone, 12), steps=None, for_s=3600, eval_every=None)  # its first plan is behind
    api.train(out=tmp_path / "run", resume=True, eval_every=7, listener=stopping((StepDone, 40)))
    assert [line["step"] for line in journal(tmp_path / "run", "evaluation")] == [0, 14, 21, 28, 35]


def test_a_run_that_was_not_judged_since_it_began_speaks_with_what_it_learnt(tmp_path: Path) -> None:
    stopped = train(tmp_path, "stopped", eval_every=20, sigterm_at=(StepDone, 12))
    assert (stopped.stopped, stopped.best_step, stopped.bits_per_byte) == ("SIGTERM", 12, None)
    told: list[str] = []
    assert api.load(tmp_path / "stopped", notice=told.append).step == 12
    assert "was not judged since it began" in told[0]
    assert record.read(RunFolder(tmp_path / "stopped"), None).best is None
    judged = train(tmp_path, "judged", eval_every=10, sigterm_at=(StepDone, 12))  # the negative control
    assert judged.best_step == 10
    assert api.load(tmp_path / "judged").step == 10
    assert record.read(RunFolder(tmp_path / "judged"), None).best["step"] == 10


def test_an_evaluation_that_a_resume_wants_sooner_was_not_made_by_that(tmp_path: Path) -> None:
    """Its beginning was judged alone, and would count as the best of it: it would speak with weights that learnt nothing."""
    train(tmp_path, "run", eval_every=20, sigterm_at=(StepDone, 12))
    again = api.train(out=tmp_path / "run", resume=True, eval_every=10, listener=stopping((StepDone, 13)))
    assert again.best_step == api.load(tmp_path / "run").step == 13


def test_a_replay_goes_on_where_a_run_beside_it_removes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(Path(train(tmp_path, "run", keep=100, save_every_s=0.0).run))
    first, judged = checkpoint.existing(run.checkpoints)[1], verifying._corpus

    def removing(run: RunFolder) -> verifying.FolderCheck:
        store.remove_folder(first)
        return judged(run)

    monkeypatch.setattr(verifying, "_corpus", removing)
    assert api.verify(run.path, replay=1).ok


def test_figures_stay_of_the_same_held_out_tokens(tmp_path: Path, whole: TrainResult) -> None:
    api.train(out=tmp_path / "whole", resume=True, for_s=1)
    assert 'eval_tokens = "none"' in (tmp_path / "whole/config.toml").read_text()


def test_a_text_that_cannot_be_looked_up_does_not_end_the_run(
    tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise FileNotFoundError(2, "No such file", "train.bin")

    monkeypatch.setattr(memorisation.Meter, "measure", gone)
    told: list[Told] = []
    assert train(tmp_path, "other", listener=told.append).weights_sha256 == whole.weights_sha256
    assert any(isinstance(line, Notice) and "by heart" in line.text for line in told)


@pytest.mark.parametrize("changed", ["killed/tokenizer.json", "other.txt"])
def test_a_changed_tokenizer_or_held_out_text_is_refused(tmp_path: Path, changed: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(train_bpe([STORY], 280).json)
    with pytest.raises(KilledError):
        train(tmp_path, "killed", kill_at=(StepDone, 13), tokenizer=str(tmp_path / "tokenizer.json"))
    if changed == "killed/tokenizer.json":
        (tmp_path / changed).write_bytes(train_bpe([STORY[::-1]], 280).json)
    else:
        (tmp_path / changed).write_text("another text")
    with pytest.raises(DataError, match=r"changed since the run began.*move away"):
        api.train(out=tmp_path / "killed", resume=True)


@pytest.mark.parametrize("became", [b"caf\xe9", b""])
def test_a_text_that_cannot_be_read_any_more_may_be_moved_away(tmp_path: Path, became: bytes) -> None:
    whole = train(tmp_path, "whole")
    with pytest.raises(KilledError):
        train(tmp_path, "killed", kill_at=(StepDone, 13))
    (tmp_path / "story.txt").write_bytes(became)
    with pytest.raises(DataError, match=r"restore it; or move away .*story\.txt, .*other\.txt: the run then goes on"):
        api.train(out=tmp_path / "killed", resume=True)
    (tmp_path / "story.txt").unlink()
    assert same(whole, api.train(out=tmp_path / "killed", resume=True))


@pytest.mark.parametrize("changed", [False, True])
def test_a_run_whose_text_would_be_cut_otherwise_by_now_goes_on_with_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    story = tmp_path / "story.txt"
    story.write_text(STORY)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_key", lambda *_: "0" * 32)  # as an earlier version may have called it
        whole = api.train(story, out=tmp_path / "whole", steps=4, **TINY)
        api.train(story, out=tmp_path / "run", steps=2, **TINY)
    if changed:  # the negative control
        story.write_text(STORY[::-1])
        with pytest.raises(DataError, match="changed since the run began"):
            api.train(out=tmp_path / "run", resume=True, steps=4)
        return
    api.train(out=tmp_path / "run", resume=True, steps=4)
    assert (tmp_path / "run/corpus.json").read_bytes() == (tmp_path / "whole/corpus.json").read_bytes()
    assert whole.steps == api.load(tmp_path / "run").step


def test_a_run_from_another_s_configuration_may_take_the_text_as_it_is_now(tmp_path: Path) -> None:
    train(tmp_path, "first")
    (tmp_path / "story.txt").write_text(STORY[::-1])
    config = tmp_path / "first/config.toml"
    with pytest.raises(DataError, match="or take it as it is now: firstwords train TEXT --config"):
        api.train(config=config, out=tmp_path / "second")
    assert api.train(tmp_path / "story.txt", config=config, out=tmp_path / "second").steps


@pytest.mark.parametrize("gone", ["story.txt", "other.txt"])
def test_a_run_whose_files_are_gone_goes_on_with_the_prepared_text(tmp_path: Path, gone: str) -> None:
    whole = train(tmp_path, "whole")
    with pytest.raises(KilledError):
        train(tmp_path, "killed", kill_at=(StepDone, 13))
    (tmp_path / gone).unlink()
    assert same(whole, api.train(out=tmp_path / "killed", resume=True))


@pytest.mark.parametrize("then", ["changed", "gone", "named again"])
def test_a_run_keeps_the_tokenizer_that_it_was_given(tmp_path: Path, then: str) -> None:
    file = tmp_path / "words.json"
    file.write_bytes(train_bpe([STORY], 280).json)
    whole = train(tmp_path, "whole", tokenizer=str(file))
    with pytest.raises(KilledError):
        train(tmp_path, "killed", kill_at=(StepDone, 13), tokenizer=str(file))
    match then:
        case "changed":
            file.write_bytes(train_bpe([STORY[::-1]], 280).json)
        case "gone":
            file.unlink()
    shutil.rmtree(tmp_path / "cache/corpora")
    again = {"tokenizer": str(file)} if then == "named again" else {}
    assert same(whole, api.train(out=tmp_path / "killed", resume=True, **again))


def test_another_tokenizer_than_a_run_keeps_is_refused_when_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_bytes(train_bpe([STORY], 280).json)
    (tmp_path / "other.json").write_bytes(train_bpe([STORY[::-1]], 280).json)
    train(tmp_path, "run", sigterm_at=(StepDone, 3), tokenizer=str(tmp_path / "words.json"))
    with pytest.raises(ConfigError, match="goes on with what it recorded"):
        api.train(out=tmp_path / "run", resume=True, tokenizer=str(tmp_path / "other.json"))


@pytest.mark.parametrize("changed", ["story.txt", "other.txt"])
def test_a_changed_text_is_refused_before_it_is_prepared(tmp_path: Path, changed: str) -> None:
    train(tmp_path, "run", sigterm_at=(StepDone, 3))
    prepared, told = sorted((tmp_path / "cache/corpora").iterdir()), list[Told]()
    (tmp_path / changed).write_text(STORY + "and one more line\n")
    with pytest.raises(DataError, match="changed since the run began"):
        api.train(out=tmp_path / "run", resume=True, listener=told.append)
    assert sorted((tmp_path / "cache/corpora").iterdir()) == prepared
    assert {event.what for event in told if isinstance(event, Preparing)} == {"reading the text"}


def failing_saves(
    monkeypatch: pytest.MonkeyPatch, first: int, last: int, error: type[FirstwordsError] = StorageError
) -> None:
    """Let the disk refuse from the `first` to the `last` save."""
    real, count = checkpoint.save, 0

    def save(*args: Any, **kwargs: Any) -> checkpoint.Checkpoint:
        nonlocal count
        count += 1
        if first <= count <= last:
            raise error("refused")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)


@pytest.mark.parametrize("error", [StorageError, PermissionDeniedError])
def test_a_disk_that_refuses_for_a_while_does_not_end_the_run(
    tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch, error: type[FirstwordsError]
) -> None:
    failing_saves(monkeypatch, 6, 7, error)
    assert whole.best_step == 5  # which could not be saved when it came
    assert same(whole, train(tmp_path, "full"))


def test_a_disk_that_stays_full_ends_the_run_with_the_checkpoints_before_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_saves(monkeypatch, 5, 10**9)
    with pytest.raises(StorageError):
        train(tmp_path, "full")
    assert len(journal(tmp_path / "full", "step")) == 6  # steps 4, 5 and 6 could not be saved
    assert checkpoint.newest(tmp_path / "full" / "checkpoints", print).step == 3  # type: ignore[union-attr]


def test_a_last_save_that_fails_is_tried_again(tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "RETRY_S", 0.0)
    failing_saves(monkeypatch, STEPS + 1, STEPS + 2)  # step 0 is the first save
    assert same(whole, train(tmp_path, "full"))


def test_a_last_save_that_goes_on_failing_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "RETRY_S", 0.0)
    failing_saves(monkeypatch, STEPS + 1, 10**9)
    with pytest.raises(StorageError):
        train(tmp_path, "full")


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionDeniedError("may not be removed", where=str(folder))

    monkeypatch.setattr(store, "remove_folder", refuse)
    assert same(whole, train(tmp_path, "kept"))
    assert len(checkpoint.existing(tmp_path / "kept" / "checkpoints")) == STEPS + 1


def test_a_journal_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise StorageError("the disk is full", where=str(path))

    told: list[Told] = []
    monkeypatch.setattr(store, "append", full)
    text = tmp_path / "story.txt"
    options = {**TINY, "val": str(tmp_path / "other.txt"), "steps": STEPS, "eval_every": 5, "save_every_s": 0.0}
    optim = {"kind": "muon", "peak_lr": 0.1, "warmup_steps": 2}
    run = api.train(text, out=tmp_path / "mute", listener=told.append, optim=optim, **options)
    assert run.last["weights_sha256"] == whole.last["weights_sha256"]
    assert len([t for t in told if isinstance(t, Notice) and "without its journal" in t.text]) == 1


def test_best_weights_that_made_room_for_a_checkpoint_which_found_none_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk holds the weights of the last step, which are the best, but not what the optimizers keep beside them."""
    monkeypatch.setattr(recorder, "RETRY_S", 0.0)
    real = store.publish

    def publish(folder: Path, files: Any, describe: Any) -> Any:
        if folder.name == "step-00000005" and checkpoint.OPTIMIZER in files:
            raise StorageError("the disk is full", where=str(folder))
        return real(folder, files, describe)

    monkeypatch.setattr(store, "publish", publish)
    with pytest.raises(StorageError):
        train(tmp_path, "full", steps=5)
    assert api.load(tmp_path / "full").step == 5
    monkeypatch.setattr(store, "publish", real)
    assert train(tmp_path, "full", resume=True).best_step == 5  # and it goes on from the one before


def test_weights_alone_are_kept_where_what_came_after_them_is_damaged(tmp_path: Path) -> None:
    ours, told = {"config_sha256": "ours"}, list[str]()
    first, _, last = (
        checkpoint.save(tmp_path, step, {}, optimizer, EMPTY, b"", ours) for step, optimizer in ((1, {}), (2, None), (3, {}))
    )
    (last.folder / checkpoint.TOKENIZER).write_bytes(b"damaged")
    (first.folder / checkpoint.TOKENIZER).rename(tmp_path / "away")
    with pytest.raises(DataError, match="every checkpoint is damaged"):
        checkpoint.newest(tmp_path, told.append, ours)
    assert [checkpoint.step_of(path) for path in checkpoint.existing(tmp_path)] == [1, 2, 3]  # as it was
    (tmp_path / "away").rename(first.folder / checkpoint.TOKENIZER)
    found = checkpoint.newest(tmp_path, told.append, ours)
    assert found is not None
    assert found.step == 1
    assert checkpoint.existing(tmp_path) == [first.folder]
    (kept,) = tmp_path.glob("kept-step-00000002-*")
    assert any(kept.name in line for line in told)
    checkpoint.save(tmp_path, 2, {}, None, EMPTY, b"", ours)
    checkpoint.newest(
        tmp_path, pytest.fail, ours, repeats=lambda _: True
    )  # the negative control: what a kill left goes, and nothing is said
    assert checkpoint.existing(tmp_path) == [first.folder]
    assert list(tmp_path.glob("kept-step-00000002-*")) == [kept]


@pytest.mark.usefixtures("whole")
def test_a_resume_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    run, before = RunFolder(tmp_path / "whole"), outcome(tmp_path / "whole")
    lines = run.metrics.path.read_bytes()
    with pytest.raises(ConfigError, match="steps already"):
        train(tmp_path, "whole", resume=True, steps=STEPS - 1)
    assert run.metrics.path.read_bytes() == lines
    assert outcome(run.path) == before


def test_another_micro_batch_is_not_said_to_be_bit_exact_and_each_part_replays_with_its_own(tmp_path: Path) -> None:
    train(tmp_path, "run", keep=100, sigterm_at=(StepDone, 3))
    told: list[Told] = []
    api.train(out=tmp_path / "run", resume=True, micro_batch_size=2, steps=4, listener=told.append)
    assert Notice("not bit-exact because: micro_batch_size 4 -> 2") in told
    assert api.verify(tmp_path / "run", replay=1).ok  # the last step, in the new way
    api.train(out=tmp_path / "run", resume=True, micro_batch_size=4)  # it is done: nothing is trained in that way
    assert api.verify(tmp_path / "run", replay=1).ok
    found = api.verify(tmp_path / "run", replay=2)  # one in each
    assert not found.ok
    assert "micro_batch_size" in str(found.replay)


def test_a_run_that_was_stopped_before_it_was_judged_is_not_said_to_be_as_good_as_it_began(tmp_path: Path) -> None:
    stopped = train(tmp_path, "run", sigterm_at=(StepDone, 3))
    assert (stopped.best_step, stopped.bits_per_byte) == (3, None)
    assert api.info(tmp_path / "run")["best_step"] == 3
    figures = exchange._figures(tmp_path / "run", 3)
    assert "held-out bits per byte" not in figures
    assert figures["learnt from"].startswith(f"{stopped.tokens:,} tokens")
    assert exchange._figures(tmp_path / "run", 0)["held-out bits per byte"].endswith("(step 0)")  # the negative control


def test_a_run_that_was_stopped_is_not_kept_waiting_for_a_scale(tmp_path: Path) -> None:
    told: list[Told] = []

    def listener(event: Told) -> None:
        told.append(event)
        stopping((StepDone, 7))(event)

    run = train(tmp_path, "run", report=True, listener=listener)
    assert (run.stopped, run.best_step) == ("SIGTERM", 5)
    lines = [event.text for event in told if isinstance(event, Notice)]
    assert any("to set its best weights on a scale" in line for line in lines)
    assert RunFolder(tmp_path / "run").report.is_file()


@pytest.mark.usefixtures("whole")
def test_a_run_whose_checkpoints_are_gone_is_not_whole(tmp_path: Path) -> None:
    assert api.verify(tmp_path / "whole").ok  # the negative control
    shutil.rmtree(RunFolder(tmp_path / "whole").checkpoints)
    found = api.verify(tmp_path / "whole")
    assert not found.ok
    assert "none of its checkpoints" in found.checkpoints[0].problem


def test_a_run_goes_on_with_as_many_words_as_it_began_with_whatever_rule_there_is_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = train(tmp_path, "run", tokenizer="bpe", special_tokens="<|a|>,<|b|>", sigterm_at=(StepDone, 3))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(corpus, "fitting_vocab_size", lambda n_chars: 300)
    assert train(tmp_path, "run", resume=True).tokens > began.tokens
    other = train(tmp_path, "other", tokenizer="bpe", sigterm_at=(StepDone, 1))  # the negative control
    assert api.info(other.run)["config"]["vocab_size"] == 300


@pytest.mark.parametrize("is_prepared", [True, False])
def test_a_run_goes_on_with_its_text_at_another_place_and_with_no_other_text(tmp_path: Path, is_prepared: bool) -> None:
    train(tmp_path, "run", sigterm_at=(StepDone, 3), steps=5)
    (tmp_path / "story.txt").rename(tmp_path / "moved.txt")
    (tmp_path / "story-2.txt").write_text("another text, by its name the nearest " * 99)
    if not is_prepared:
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(NoInputError, match=r"say where it is: firstwords train --resume --out \S+ TEXT") as told:
            api.train(out=tmp_path / "run", resume=True)
        assert "story-2" not in str(told.value)
    with pytest.raises(DataError, match=r"changed since the run began|not the one"):
        api.train(tmp_path / "story-2.txt", out=tmp_path / "run", resume=True)
    with pytest.raises(NoInputError, match="no such file"):
        api.train(tmp_path / "mved.txt", out=tmp_path / "run", resume=True)
    recorded = (tmp_path / "run/config.toml").read_bytes()
    with pytest.raises(ConfigError, match="--steps"):
        api.train(tmp_path / "moved.txt", out=tmp_path / "run", resume=True, steps=2)
    assert (tmp_path / "run/config.toml").read_bytes() == recorded
    assert api.train(tmp_path / "moved.txt", out=tmp_path / "run", resume=True).steps == 5
    shutil.rmtree(tmp_path / "cache")
    assert api.train(out=tmp_path / "run", resume=True, steps=6).steps == 6  # it knows the place by now


def test_a_run_goes_on_with_its_held_out_text_at_another_place(tmp_path: Path) -> None:
    train(tmp_path, "run", sigterm_at=(StepDone, 3), val=tmp_path / "other.txt")
    (tmp_path / "other.txt").rename(tmp_path / "moved.txt")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(NoInputError, match=r"train --resume --out \S+ --val FILE"):
        api.train(out=tmp_path / "run", resume=True)
    with pytest.raises(DataError, match="changed since the run began"):
        api.train(out=tmp_path / "run", resume=True, val=str(tmp_path / "story.txt"))
    (tmp_path / "story.txt").rename(tmp_path / "moved-too.txt")
    with pytest.raises(NoInputError, match=r"train --resume --out \S+ \S+moved-too\.txt --val FILE"):
        api.train(tmp_path / "moved-too.txt", out=tmp_path / "run", resume=True)
    (tmp_path / "moved-too.txt").rename(tmp_path / "story.txt")
    assert api.train(out=tmp_path / "run", resume=True, val=tmp_path / "moved.txt").steps == STEPS


def test_a_run_with_rows_to_spare_goes_on_without_its_prepared_text(tmp_path: Path) -> None:
    spare: dict[str, Any] = {**TINY, "model": {**TINY["model"], "vocab_size": 600}, "tokenizer": "bpe"}
    (tmp_path / "story.txt").write_text(STORY)
    began = api.train(tmp_path / "story.txt", out=tmp_path / "run", steps=STEPS, listener=stopping((StepDone, 3)), **spare)
    words = tokenizer.read(tmp_path / "run/checkpoints/step-00000000/tokenizer.json").vocab_size
    assert words < 600
    shutil.rmtree(tmp_path / "cache")
    assert api.train(out=tmp_path / "run", resume=True).tokens > began.tokens
    assert tokenizer.read(checkpoint.existing(tmp_path / "run/checkpoints")[-1] / "tokenizer.json").vocab_size == words


def test_a_run_that_was_stopped_between_evaluations_tells_no_figure_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path, "whole", eval_every=5, sigterm_at=(StepDone, 8))
    assert whole.nats_per_token is not None  # the negative control

    def refuse(parent: Path, step: int) -> str:
        raise DataError("cannot be read", where=f"step {step}")

    monkeypatch.setattr(checkpoint, "weights_sha256", refuse)
    made = train(tmp_path, "run", eval_every=5, sigterm_at=(StepDone, 8))
    assert (made.best_step, made.nats_per_token) == (8, None)
    assert (made.last["step"], made.last["nats_per_token"] is None) == (5, False)
    assert train(tmp_path, "judged", eval_every=5, sigterm_at=(Evaluated, 5)).nats_per_token is not None  # at this very step


def test_a_checkpoint_that_a_run_removes_meanwhile_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path, "run", sigterm_at=(StepDone, 3)).run
    gone = RunFolder(Path(run)).checkpoints / "step-00000099"
    listed = checkpoint.existing
    monkeypatch.setattr(checkpoint, "existing", lambda parent: [*listed(parent), gone])
    assert api.verify(run).ok
    gone.mkdir()
    assert not api.verify(run).ok  # the negative control


def test_the_command_of_a_run_repeated_with_resume_is_the_same_where_files_are_named_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, "run", sigterm_at=(StepDone, 3))
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"text": "story.txt", "out": "run", "resume": True}
    assert api.train(val=Path("other.txt"), **given).steps == STEPS
    with pytest.raises(DataError, match="changed since the run began"):
        api.train(val="story.txt", **given)  # the negative control


def test_a_run_that_goes_on_where_there_is_less_memory_is_told_what_may_still_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, "run", sigterm_at=(StepDone, 3))
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1)
    with pytest.raises(ConfigError, match="this machine has") as refused:
        api.train(out=tmp_path / "run", resume=True)
    assert refused.value.where == "--micro-batch-size"


@pytest.mark.parametrize(("late_s", "told"), [(30.0, True), (0.0, False)])
def test_a_budget_that_the_start_alone_used_up_is_told(late_s: float, told: bool) -> None:
    heard: list[Told] = []
    pretraining._tell_of_a_late_start(20.0, time.perf_counter() - late_s, heard.append)
    assert any("the start alone took 30 s" in one.text for one in heard if isinstance(one, Notice)) is told


def test_a_time_budget_that_goes_on_measures_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {**TINY, "for_s": 20.0, "listener": stopping((StepDone, 3))}
    (tmp_path / "story.txt").write_text(STORY)
    api.train(tmp_path / "story.txt", out=tmp_path / "run", **timed)

    def refuse(*given: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(measure, "point_now", refuse)
    api.train(out=tmp_path / "run", resume=True, listener=stopping((StepDone, 6)))
    with pytest.raises(AssertionError):
        api.train(tmp_path / "story.txt", out=tmp_path / "new", **timed)  # the negative control
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1 << 20)
    with pytest.raises(ConfigError, match="this machine has"):  # and what has no room is refused before it is tried
        api.train(tmp_path / "story.txt", out=tmp_path / "large", **timed)


def test_the_file_of_a_run_serves_for_another_text(tmp_path: Path) -> None:
    options = {"tokenizer": "bpe", "sigterm_at": (StepDone, 1)}
    small = train(tmp_path, "small", **options)
    letters = np.random.default_rng(0).integers(97, 123, (80_000, 5))
    (tmp_path / "large.txt").write_text(" ".join("".join(map(chr, word)) for word in letters))
    made = api.train(
        tmp_path / "large.txt", config=tmp_path / "small/config.toml", out=tmp_path / "large", steps=1, val=None
    )
    words = [api.info(run.run)["config"]["vocab_size"] for run in (small, made)]
    assert words[0] < words[1]


def test_rotation_counts_only_whole_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(tmp_path, "run", kill_at=(SaveDue, 13))
    before, newest = checkpoint.existing(tmp_path / "run" / "checkpoints")[-2:]
    (newest / "state.json").write_text("{}")
    run, tokenizer = store.read_manifest(newest)["run"], (newest / "tokenizer.json").read_bytes()
    rest = checkpoint.save(newest.parent, 14, {}, {}, EMPTY, tokenizer, run)
    checkpoint.rotate(rest, 2, None)
    assert checkpoint.existing(newest.parent) == [before, newest, rest.folder]
    checkpoint.rotate(checkpoint.save(newest.parent, 15, {}, {}, EMPTY, tokenizer, run), 2, None)
    assert [checkpoint.step_of(path) for path in checkpoint.existing(newest.parent)] == [14, 15]


def test_a_checkpoint_is_read_back_once_however_many_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = Counter[str](), store.verify

    def verify(folder: Path, **options: bool) -> store.Json:
        read[folder.name] += folder.name.startswith("step-")
        return real(folder, **options)

    monkeypatch.setattr(store, "verify", verify)
    best_step = train(tmp_path, "run", keep=4).best_step
    assert {read[checkpoint.folder_of(tmp_path, step).name] for step in range(STEPS + 1)} == {1}
    kept = {checkpoint.step_of(path) for path in checkpoint.existing(tmp_path / "run/checkpoints")}
    assert kept == {best_step, *range(STEPS - 3, STEPS + 1)}


def test_nothing_is_read_back_where_no_more_checkpoints_are_there_than_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, last = (checkpoint.save(tmp_path, step, {}, {}, EMPTY, b"", {}) for step in range(3))
    read = list[Path]()
    monkeypatch.setattr(store, "verify", lambda folder, **_: read.append(folder) or store.read_manifest(folder))
    checkpoint.rotate(last, 3, None)
    assert read == []
    checkpoint.rotate(last, 2, None)  # the negative control
    assert len(read) == 1


def test_rotation_neither_counts_nor_removes_another_runs_checkpoints(tmp_path: Path) -> None:
    theirs, ours = {"config_sha256": "theirs"}, {"config_sha256": "ours"}
    for step, run in ((1, theirs), (2, ours), (3, ours), (4, theirs)):
        checkpoint.save(tmp_path, step, {}, {}, EMPTY, b"", run)
    checkpoint.rotate(checkpoint.save(tmp_path, 5, {}, {}, EMPTY, b"", ours), 2, None)
    assert [checkpoint.step_of(path) for path in checkpoint.existing(tmp_path)] == [1, 3, 4, 5]


def test_a_damaged_folder_of_the_same_step_makes_room_for_the_save(tmp_path: Path) -> None:
    saved = checkpoint.save(tmp_path, 1, {}, {}, EMPTY, b"", {})
    (saved.folder / "state.json").write_text("{}!")
    assert checkpoint.save(tmp_path, 1, {}, {}, EMPTY, b"", {}).json("state.json") == {}
    assert [path.name[:8] for path in sorted(tmp_path.iterdir())] == ["damaged-", "step-000"]


def test_a_configuration_that_was_edited_by_hand_is_not_gone_on_with(tmp_path: Path, whole: TrainResult) -> None:
    path = tmp_path / "whole" / "config.toml"
    path.write_text(path.read_text().replace("peak_lr = 0.1", "peak_lr = 0.2"))
    with pytest.raises(DataError, match="its config_sha256 is not this run's"):
        train(tmp_path, "whole", resume=True)


def test_a_disk_that_is_too_small_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match="two checkpoints need"):
        train(tmp_path, "run")
    assert not checkpoint.existing(tmp_path / "run" / "checkpoints")


def test_a_run_is_verified_and_its_last_steps_repeat_themselves(tmp_path: Path, whole: TrainResult) -> None:
    found = api.verify(tmp_path / "whole", replay=1)
    assert found.ok
    assert (found.replay.from_step, found.replay.to_step) == (STEPS - 1, STEPS)  # type: ignore[union-attr]
    assert whole.best_step < STEPS - 2
    far = api.verify(tmp_path / "whole", replay=STEPS - whole.best_step)  # from the best checkpoint to the end
    assert far.ok
    with pytest.raises(ConfigError, match="cannot be replayed"):
        api.verify(tmp_path / "whole", replay=STEPS + 1)
    config = tmp_path / "whole/config.toml"
    config.write_text(config.read_text().replace('device = "cpu"', 'device = "cuda:99"'))
    with pytest.raises(ConfigError, match="replay it where it was trained") as refused:  # verify has no --device
        api.verify(tmp_path / "whole", replay=1)
    assert "--device" not in str(refused.value)


@pytest.mark.parametrize("damage", ["journal", "weights", "shard"])
def test_what_is_not_as_recorded_is_found(tmp_path: Path, whole: TrainResult, damage: str) -> None:
    """The negative control of `verify`."""
    run = tmp_path / "whole"
    if damage == "journal":
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        place = max(i for i, line in enumerate(lines) if '"event": "step"' in line)
        lines[place] = lines[place].replace('"nats_per_token": ', '"nats_per_token": 1')
        (run / "metrics.jsonl").write_text("".join(lines))
    else:
        corpus = tmp_path / "cache" / "corpora" / json.loads((run / "corpus.json").read_text())["folder"]
        best = checkpoint.folder_of(run / "checkpoints", whole.best_step) / "model.safetensors"
        path = best if damage == "weights" else corpus / "train.bin"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    found = api.verify(run, replay=1 if damage == "journal" else None)
    assert not found.ok
    assert [part.ok for part in found.checkpoints] == [damage != "weights", True, True]
    assert found.corpus.ok == (damage != "shard")
    assert (found.replay is None) == (damage != "journal")


def test_a_step_that_the_journal_lacks_is_named(tmp_path: Path, whole: TrainResult) -> None:
    path, gone = tmp_path / "whole/metrics.jsonl", whole.best_step + 1  # the first that is replayed
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if (json.loads(line)["event"], json.loads(line).get("step")) != ("step", gone)]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(kept))
    with pytest.raises(DataError, match=f"step {gone} is not in it"):
        api.verify(tmp_path / "whole", replay=2)


def test_the_threads_of_the_process_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    train(tmp_path, "run", threads=before + 1, steps=2)
    assert torch.get_num_threads() == before


def command(tmp_path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "firstwords", "train", "--json", "--out", str(tmp_path / "run"), *arguments]


def fresh(tmp_path: Path) -> list[str]:
    text = tmp_path / "story.txt"
    text.write_text(STORY)
    flags = ["--steps", "60", "--save-every", "0.2s", "--threads", "1", "--tokenizer", "bytes", "--eval-every", "20"]
    flags += ["--model.context-length", "32", "--batch-size", "8", "--precision", "float32"]
    shape = ["--model.emb-dim", "32", "--model.n-heads", "2", "--model.n-layers", "2", "--model.drop-rate", "0.1"]
    return command(tmp_path, str(text), *flags, *shape)


def wait_for_step(tmp_path: Path, process: subprocess.Popen[str], step: int) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline_s = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline_s:
        if metrics.exists() and f'"event": "step", "step": {step},' in metrics.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came: {process.communicate()}")


def finish(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.system
def test_a_real_process_killed_at_step_25_resumes_to_the_same_weights_and_losses(tmp_path: Path) -> None:
    uninterrupted = finish(fresh(tmp_path))
    losses = journal(tmp_path / "run", "step")
    (tmp_path / "run").rename(tmp_path / "uninterrupted")
    process = subprocess.Popen(fresh(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, process, 25)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = finish(command(tmp_path, "--resume"))
    assert journal(tmp_path / "run", "step") == losses
    assert len(losses) == 60
    for key in ("weights_sha256", "best_step", "nats_per_token", "tokens"):
        assert resumed[key] == uninterrupted[key]


@pytest.mark.system
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: int, code: int) -> None:
    arguments = [argument for argument in fresh(tmp_path) if argument != "--json"]
    arguments[arguments.index("60")] = "100000"
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, process, 3)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"--resume --out {tmp_path / 'run'}" in out
    last = journal(tmp_path / "run", "step")[-1]["step"]
    assert checkpoint.existing(tmp_path / "run" / "checkpoints")[-1].name.endswith(f"{last:08d}")


def test_only_a_second_ctrl_c_ends_at_once_and_the_first_signal_keeps_its_name() -> None:
    with signals.stop_requests() as stop:
        try:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):  # a system that ends sends several
                signal.raise_signal(number)
                assert stop() == "SIGTERM"
        except KeyboardInterrupt:
            pytest.fail(f"{number.name} ended it at once")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.system
def test_a_hangup_that_nohup_ignores_is_ignored(tmp_path: Path) -> None:
    arguments = fresh(tmp_path)
    arguments[arguments.index("60")] = "120"
    process = subprocess.Popen(["nohup", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, process, 3)
    os.kill(process.pid, signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(journal(tmp_path / "run", "step")) == 120


def test_a_run_on_the_built_in_text_goes_on_under_a_python_that_has_another(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydoc_data.topics import topics

    options = {key: value for key, value in TINY.items() if key != "val"}
    api.train(out=tmp_path / "run", steps=1, **options)
    monkeypatch.setitem(topics, "zzz", "what the next version says more")
    assert api.train(out=tmp_path / "run", resume=True, steps=2).steps == 2
    shutil.rmtree(cache)
    with pytest.raises(DataError, match="each version of Python has its own"):
        api.train(out=tmp_path / "run", resume=True, steps=3)


def test_a_run_in_time_that_is_over_keeps_its_scale_when_it_is_asked_to_go_on(tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text(STORY)  # so short that even a slow machine judges itself by all that is held out
    api.train(text, out=tmp_path / "run", **{**TINY, "for_s": 4, "report": True})
    report = tmp_path / "run/report.html"
    report.unlink()  # as where the run was killed before it
    api.train(out=tmp_path / "run", resume=True, started_s=time.perf_counter() - 60)  # longer than its time
    assert "beside others" in report.read_text()


def test_steps_before_the_length_of_a_run_is_known_replay_without_one(tmp_path: Path, whole: TrainResult) -> None:
    """As in a run of so many steps that was given a time at step 0 instead: then the learning rate still warms up."""
    assert verifying._plans(RunFolder(tmp_path / "whole"))[0] == STEPS
    with (tmp_path / "whole/metrics.jsonl").open("a") as file:
        file.write('{"event":"resume","step":0,"total_steps":null}\n')
    assert verifying._plans(RunFolder(tmp_path / "whole"))[0] is None


def test_a_best_of_another_course_of_the_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was made with batches left out: going on as recorded, the run does not come to it again."""
    best_step = seldom_saved(tmp_path, "killed", monkeypatch).best_step
    checkpoints = tmp_path / "killed" / "checkpoints"
    store.remove_folder(checkpoint.folder_of(checkpoints, STEPS))
    found = checkpoint.verified(checkpoint.folder_of(checkpoints, best_step))
    tensors = {name: tensor.clone() for name, tensor in found.tensors(checkpoint.MODEL).items()}
    state = found.json(checkpoint.STATE) | {"skipped": [[2, 3]]}
    described = {checkpoint.STATE: state, checkpoint.CONFIG: found.json(checkpoint.CONFIG)}
    tokenizer_json, run = (found.folder / checkpoint.TOKENIZER).read_bytes(), found.manifest["run"]
    store.remove_folder(found.folder)
    checkpoint.save(checkpoints, best_step, tensors, None, described, tokenizer_json, run)
    seldom_saved(tmp_path, "killed", monkeypatch, resume=True)
    assert list(checkpoints.glob("kept-*"))


def test_a_journal_that_does_not_say_what_was_left_out_cannot_be_replayed(tmp_path: Path, whole: TrainResult) -> None:
    run = RunFolder(tmp_path / "whole")
    with run.metrics.path.open("a") as file:
        file.write('{"event":"plan","step":1}\n')
    assert api.verify(run.path, replay=1).ok
    with run.metrics.path.open("a") as file:
        file.write('{"event":"rollback","step":1}\n')
    assert api.verify(run.path, replay=1).ok  # of a step long after it
    with run.metrics.path.open("a") as file:
        file.write(f'{{"event":"rollback","step":{STEPS - 1}}}\n')
    with pytest.raises(DataError, match="which batches it left out"):
        api.verify(run.path, replay=1)


def test_how_often_it_evaluates_is_planned_again_where_it_is_no_longer_named(tmp_path: Path) -> None:
    text, options = tmp_path / "story.txt", {**TINY, "for_s": 60, "eval_every": 3, "save_every_s": 0.0}
    text.write_text(STORY * 3)
    with pytest.raises(KilledError):
        api.train(text, out=tmp_path / "run", listener=killing((StepDone, 20)), **options)
    with pytest.raises(KilledError):
        api.train(out=tmp_path / "run", resume=True, eval_every="none", listener=killing((StepDone, 40)))
    rhythms = [line["eval_every"] for line in journal(tmp_path / "run", "plan")]
    assert rhythms[0] == 3
    assert rhythms[-1] != 3
