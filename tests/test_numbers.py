"""Numbers that are not finite: noticed before they change a weight, and a run can go back from them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MEASURED, STORY, TINY
from firstwords import api
from firstwords.errors import DivergedError
from firstwords.events import Notice, RolledBack, Saved, Told
from firstwords.recorder import MOST_ROLLBACKS, TrainResult
from firstwords.runs import checkpoint
from firstwords.training import loop
from firstwords.training import state as states
from firstwords.training.events import StepDone
from firstwords.training.state import TrainState

VALUES = (float("nan"), float("inf"), -float("inf"))
STEPS, SAVE_EVERY, POISONED = 24, 5, 13  # the update after 13 updates meets the poison
PLACES = ("the loss", "an activation", "one gradient", "one weight", "the optimizer")


def train(folder: Path, **options: Any) -> TrainResult:
    text = folder / "story.txt"
    text.write_text(STORY)
    if options.get("resume"):
        return api.train(out=folder / "run", **options)
    given = {"steps": STEPS, "eval_every": SAVE_EVERY, "optim": {"kind": "muon", "peak_lr": 0.02, "warmup_steps": 2}}
    return api.train(text, out=folder / "run", **{**TINY, **given, "save_every_s": 1e9, **options})


def learnt(state: TrainState) -> dict[str, torch.Tensor]:
    """Return a copy of everything that an update changes."""
    tensors = {**state.model.tensors(), **states.optimizer_tensors(state)}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor: NaN does not equal itself."""
    return tensor.reshape(-1).view(torch.uint8)


def inject(place: str, value: float, state: TrainState, patch: pytest.MonkeyPatch) -> None:
    """Put a number that is not finite where the next update meets it."""
    real = loop.target_nats
    model = state.model
    match place:
        case "the loss":
            patch.setattr(loop, "target_nats", lambda *given, **named: real(*given, **named) + value)
        case "an activation":

            def spoilt(features: torch.Tensor, *given: torch.Tensor, **named: bool) -> torch.Tensor:
                features = features.clone()
                features[0, 0, 0] = value
                return real(features, *given, **named)

            patch.setattr(loop, "target_nats", spoilt)
        case "one gradient":
            model.final_norm.scale.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), value))
        case "one weight":  # of a token that the text does not have: neither loss nor gradient feels it
            with torch.no_grad():
                model.tok_emb.weight[1, 0] = value
        case "the optimizer":
            momentum = next(iter(state.optimizers[0].state.values()))["momentum"]
            momentum[0, 0] = value


@pytest.mark.technique("R11")
@pytest.mark.parametrize("place", PLACES)
def test_a_number_that_is_not_finite_is_noticed_before_the_update(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proved: Callable[..., None]
) -> None:
    real = loop.train_step
    for step, value in zip(range(1, 11), itertools.cycle(VALUES), strict=False):
        before: dict[str, torch.Tensor] = {}
        states_seen: list[TrainState] = []

        def step_with(state: TrainState, *given: Any, at: int = step, what: float = value) -> Any:
            if state.step == at:
                inject(place, what, state, monkeypatch)
                before.update(learnt(state))  # noqa: B023
                states_seen.append(state)  # noqa: B023
            return real(state, *given)

        monkeypatch.setattr(loop, "train_step", step_with)
        folder = tmp_path / str(step)
        folder.mkdir()
        with pytest.raises(DivergedError, match=rf"step {step + 1}: .* on batch {step}, sequences {4 * step} to"):
            train(folder, model={**TINY["model"], "tied_head": False}, eval_every=100)
        monkeypatch.undo()
        monkeypatch.setenv("FIRSTWORDS_CACHE", str(tmp_path / "cache"))
        after = learnt(states_seen[0])
        assert after.keys() == before.keys()
        assert all(torch.equal(bits(after[name]), bits(before[name])) for name in before)
        assert api.load(folder / "run").step == 0  # what was saved before is whole, finite and still there
    proved(10, place)


def test_without_the_pass_over_the_state_a_bad_weight_would_be_learnt_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: loss and gradients alone do not show it."""
    monkeypatch.setattr(loop, "all_finite", lambda state: torch.tensor(True))
    real = loop.train_step

    def step_with(state: TrainState, *given: Any) -> Any:
        if state.step == 3:
            inject("one weight", float("nan"), state, monkeypatch)
        return real(state, *given)

    monkeypatch.setattr(loop, "train_step", step_with)
    train(tmp_path, model={**TINY["model"], "tied_head": False}, meter=False)  # whose samples would show it by chance
    assert not api.load(tmp_path / "run").model.tok_emb.weight.isfinite().all()


def test_a_bad_weight_that_the_held_out_text_does_not_show_is_not_kept_as_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_FACTOR", 1e9)  # the best is copied for the next save
    real = loop.train_step

    def step_with(state: TrainState, *given: Any) -> Any:
        done = real(state, *given)
        if state.step == SAVE_EVERY - 1:  # what is judged, and copied, next
            inject("one weight", float("nan"), state, monkeypatch)
        return done

    monkeypatch.setattr(loop, "train_step", step_with)
    with pytest.raises(DivergedError, match="the update left a weight"):
        train(tmp_path, model={**TINY["model"], "tied_head": False}, meter=False)
    assert api.load(tmp_path / "run").step == 0


class KilledError(Exception):
    """Stands for the end of the process."""


def poison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, times: int = 1) -> None:
    """Let some batches of the text be ones that training cannot bear, whenever they come."""
    seen: list[torch.Tensor] = []
    real_step, real_nats = loop.train_step, loop.target_nats

    def step_with(state: TrainState, batch: Any, *given: Any) -> Any:
        index = states.batch_index(state.step, state.skipped)
        if POISONED <= index < POISONED + times and not any(torch.equal(batch.targets, bad) for bad in seen):
            seen.append(batch.targets)
        return real_step(state, batch, *given)

    def nats(features: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, *, compiled: bool) -> torch.Tensor:
        bad = any(torch.equal(targets, poisoned) for poisoned in seen)
        return real_nats(features, head, targets, compiled=compiled) * (float("nan") if bad else 1.0)

    monkeypatch.setattr(loop, "train_step", step_with)
    monkeypatch.setattr(loop, "target_nats", nats)


def journal(folder: Path, *events: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines if line["event"] in events]


RECORDED = ("step", "evaluation", "sample", "rollback")


def rolled_back(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> TrainResult:
    folder.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SAVE_FACTOR", 0.0)  # each best evaluation is saved
        poison(patch, folder)
        return train(folder, on_nan="rollback", **options)


def test_a_poisoned_batch_and_those_since_the_checkpoint_are_left_out_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Told] = []
    result = rolled_back(tmp_path, monkeypatch, listener=told.append)
    back = next(event for event in told if isinstance(event, RolledBack))
    saved = max(event.step for event in told[: told.index(back)] if isinstance(event, Saved))
    assert 0 < saved <= POISONED
    assert (back.step, back.from_step, back.first_batch, back.last_batch) == (saved, POISONED, saved, POISONED)
    assert journal(tmp_path, "rollback")[0]["last_batch"] == POISONED
    assert [line["step"] for line in journal(tmp_path, "step")] == list(range(1, STEPS + 1))
    assert result.steps == STEPS
    (ends_with,) = (c for c in checkpoint.existing(tmp_path / "run" / "checkpoints") if checkpoint.step_of(c) == STEPS)
    assert json.loads((ends_with / "state.json").read_bytes())["skipped"] == [[saved, POISONED]]


def test_a_run_that_was_rolled_back_is_that_of_a_text_without_those_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint on, the steps are those of a run that was told to leave the batches out from the beginning."""
    result = rolled_back(tmp_path / "a", monkeypatch)
    first, last = (journal(tmp_path / "a", "rollback")[0][key] for key in ("first_batch", "last_batch"))
    (tmp_path / "b").mkdir()
    real = states.new_state
    monkeypatch.setattr(states, "new_state", lambda *given: skipping(real(*given), [[first, last]]))
    assert train(tmp_path / "b").last["weights_sha256"] == result.last["weights_sha256"]


def skipping(state: TrainState, skipped: list[list[int]]) -> TrainState:
    state.skipped = skipped
    return state


@pytest.mark.parametrize(
    ("kill_at", "occurrence"), [(11, 1), (11, 2), (12, 1), (12, 2), (13, 1), (13, 2), (17, 1), (STEPS - 1, 1)]
)
def test_a_rolled_back_run_that_is_killed_anywhere_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int, occurrence: int
) -> None:
    uninterrupted = rolled_back(tmp_path / "whole", monkeypatch)
    count = 0

    def listener(told: Told) -> None:
        nonlocal count
        if isinstance(told, StepDone) and told.step == kill_at:
            count += 1
            if count == occurrence:
                raise KilledError

    killed = tmp_path / "killed"
    with pytest.raises(KilledError):
        rolled_back(killed, monkeypatch, listener=listener)
    resumed = rolled_back(killed, monkeypatch, resume=True)
    assert resumed.last["weights_sha256"] == uninterrupted.last["weights_sha256"]
    assert (resumed.weights_sha256, resumed.best_step) == (uninterrupted.weights_sha256, uninterrupted.best_step)
    assert journal(killed, *RECORDED) == journal(tmp_path / "whole", *RECORDED)


def test_a_run_whose_threads_changed_on_the_way_says_so_where_it_does_not_replay(tmp_path: Path) -> None:
    options = {**TINY, "save_every_s": 0.0, "keep": 50, "eval_every": 10**6}
    api.train(write_text(tmp_path), out=tmp_path / "run", steps=4, **options)
    api.train(out=tmp_path / "run", resume=True, steps=6, precision="bfloat16")
    assert api.verify(tmp_path / "run", replay=2).ok  # as it computed when it was resumed
    found = api.verify(tmp_path / "run", replay=6).replay
    assert found is not None
    if not found.ok:  # the bits of such small sums may be the same
        assert "it was computed otherwise: precision float32 -> bfloat16" in found.problem


def test_a_replay_without_a_whole_checkpoint_leaves_what_else_was_found(tmp_path: Path) -> None:
    api.train(write_text(tmp_path), out=tmp_path / "run", steps=2, **TINY)
    for file in (tmp_path / "run/checkpoints").glob("*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    found = api.verify(tmp_path / "run", replay=1)
    assert not any(one.ok for one in found.checkpoints)
    assert found.replay is not None
    assert "no checkpoint to start from" in found.replay.problem


def test_a_replay_past_a_damaged_checkpoint_leaves_what_else_was_found(tmp_path: Path) -> None:
    api.train(write_text(tmp_path), out=tmp_path / "run", steps=4, **{**TINY, "save_every_s": 0.0, "keep": 50})
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    (folders[-1] / "manifest.json").write_text("{")
    found = api.verify(tmp_path / "run", replay=4)
    assert [one.ok for one in found.checkpoints] == [True] * (len(folders) - 1) + [False]
    assert found.replay is not None
    assert found.replay.ok


def write_text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(STORY)
    return tmp_path / "text.txt"


def test_a_rolled_back_run_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rolled_back(tmp_path, monkeypatch, keep=100)
    verdict = api.verify(tmp_path / "run", replay=STEPS - 5)  # from before the roll-back to the end
    assert verdict.ok, verdict
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if "rollback" not in line))
    assert not api.verify(tmp_path / "run", replay=STEPS - 5).ok  # the negative control


def test_a_run_that_diverges_whatever_is_left_out_stops_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Told] = []
    monkeypatch.setattr(loop, "SAVE_FACTOR", 0.0)
    with pytest.raises(DivergedError, match="the last good checkpoint is"):
        train(tmp_path, on_nan="rollback", listener=told.append, optim={"peak_lr": 1e12, "warmup_steps": 0})
    assert len([event for event in told if isinstance(event, RolledBack)]) == MOST_ROLLBACKS


def test_a_run_that_diverges_keeps_its_best_weights_that_were_not_saved_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_FACTOR", 1e9)  # as where saving takes long: the best is copied for the next save
    poison(monkeypatch, tmp_path)
    best = POISONED - POISONED % SAVE_EVERY
    with pytest.raises(DivergedError, match=rf"the last good checkpoint is .*step-0*{best}\b"):
        train(tmp_path)
    assert api.load(tmp_path / "run").step == best
    told: list[Told] = []
    assert train(tmp_path, resume=True, on_nan="rollback", listener=told.append).steps == STEPS
    kept = [line.text for line in told if isinstance(line, Notice) and "has weights alone" in line.text]
    assert len(kept) == 2, "where it stopped and where it goes back: it goes another way, and does not come to them again"
    assert (tmp_path / "run/checkpoints" / kept[0].rpartition(" ")[2]).is_dir()


def test_a_roll_back_keeps_best_weights_that_were_not_saved_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_FACTOR", 1e9)  # the best is copied for the next save
    poison(monkeypatch, tmp_path)
    told: list[Told] = []
    assert train(tmp_path, on_nan="rollback", listener=told.append).steps == STEPS
    kept = [line.text for line in told if isinstance(line, Notice) and "has weights alone" in line.text]
    assert len(kept) == 1
    folder = tmp_path / "run/checkpoints" / kept[0].rpartition(" ")[2]
    assert api.load(folder).step == POISONED - POISONED % SAVE_EVERY


def test_a_run_that_stopped_goes_on_with_a_roll_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        poison(patch, tmp_path)
        with pytest.raises(DivergedError):
            train(tmp_path)
        assert train(tmp_path, resume=True, on_nan="rollback").steps == STEPS
    assert len(journal(tmp_path, "rollback")) == 1
