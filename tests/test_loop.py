"""One update, many updates, and what the loop says of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from firstwords.config import ModelConfig, OptimConfig
from firstwords.errors import DivergedError
from firstwords.model.gpt import GPTModel
from firstwords.text.batches import Batches
from firstwords.text.corpus import Part
from firstwords.training import loop
from firstwords.training.evaluate import Evaluation
from firstwords.training.events import Evaluated, Event, Sampled, SaveDue, StepDone, Stopped
from firstwords.training.loop import FitConfig, fit, train_step
from firstwords.training.optim import Optimizer, optimizers
from firstwords.training.state import TrainState, optimizer_tensors

CONFIG = FitConfig(
    OptimConfig(peak_lr=0.01, warmup_steps=2),
    seed=1,
    micro_batch_size=6,
    sample_every=None,
    save_every_s=1e9,
    dtype=torch.float32,
)


def new_state(small: ModelConfig, kind: str = "adamw", **changes: object) -> TrainState:
    torch.manual_seed(0)
    model = GPTModel(dataclasses.replace(small, **changes))  # type: ignore[arg-type]
    return TrainState(model, optimizers(model, OptimConfig(kind=kind), torch.float32))  # type: ignore[arg-type]


def new_batches(small: ModelConfig) -> Batches:
    ids = np.random.default_rng(0).integers(0, small.vocab_size - 1, 200).astype("<u2")
    ids[0] = small.vocab_size - 1
    return Batches(Part(ids, np.ones(small.vocab_size), n_documents=1), small.context_length, batch_size=6, seed=1)


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return copy.deepcopy(state.model.tensors())


def one_step(small: ModelConfig, config: FitConfig, kind: str = "adamw") -> tuple[float, float, dict[str, torch.Tensor]]:
    state = new_state(small, kind)
    done = train_step(state, new_batches(small)(12), config, 0.01, state.model.features)
    return *done, weights(state)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_an_update_does_not_depend_on_how_the_batch_is_cut(small: ModelConfig, kind: str, micro_batch_size: int) -> None:
    whole = one_step(small, CONFIG, kind)
    cut = one_step(small, dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size), kind)
    assert cut[:2] == pytest.approx(whole[:2], rel=1e-5)  # order of float32 sums
    for name, weight in whole[2].items():
        # Adam's first step is lr * sign(g): where g is rounding noise, its sign is too; 2 lr bounds that
        assert (weight - cut[2][name]).abs().mean() < 1e-4
        assert (weight - cut[2][name]).abs().max() <= 0.02 + 1e-6


def test_the_loss_is_that_of_pytorch_on_the_whole_batch(small: ModelConfig) -> None:
    batch, model = new_batches(small)(12), new_state(small).model
    wanted = torch.nn.functional.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())
    assert one_step(small, CONFIG)[0] == pytest.approx(wanted.item(), rel=1e-5)  # float32


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_told(
    small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, max_grad_norm=1e-3))
    free = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, max_grad_norm=None))
    seen = {}
    for name, config in (("tight", tight), ("free", free)):
        state = new_state(small)
        norms = []
        optimizer = state.optimizers[0]

        def noted(lr: float, optimizer: Optimizer = optimizer, norms: list[float] = norms) -> None:
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in optimizer.parameters if p.grad is not None])))
            type(optimizer).step(optimizer, lr)

        monkeypatch.setattr(optimizer, "step", noted)
        told = train_step(state, new_batches(small)(0), config, 0.0, state.model.features)[1]
        seen[name] = told, norms[0]
    assert seen["tight"][0] == pytest.approx(seen["free"][0])
    assert seen["tight"][1] == pytest.approx(1e-3, rel=1e-3)
    assert seen["free"][1] == pytest.approx(seen["free"][0], rel=1e-5)


def test_the_gradients_of_a_tied_table_are_added_in_place(small: ModelConfig) -> None:
    state, table = new_state(small, tied_head=True), [small.vocab_size, small.emb_dim]
    with torch.autograd.profiler.profile(record_shapes=True) as profiler:
        train_step(state, new_batches(small)(0), CONFIG, 0.0, state.model.features)
    summed = [e for e in profiler.function_events if e.name in ("aten::add", "aten::add_") and table in e.input_shapes[:1]]
    outermost = [e.name for e in summed if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::add")]
    assert outermost == ["aten::add_"]  # of the one micro-batch


def test_dropout_is_a_function_of_seed_and_step_and_leaves_the_callers_generator_alone(small: ModelConfig) -> None:
    def loss(seed: int, step: int) -> float:
        state = new_state(small, drop_rate=0.5)
        state.step = step
        return train_step(state, new_batches(small)(0), dataclasses.replace(CONFIG, seed=seed), 0.0, state.model.features)[0]

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    losses = {(seed, step): loss(seed, step) for seed in (1, 2) for step in (0, 1)}
    torch.manual_seed(5)
    assert loss(1, 0) == losses[1, 0]
    torch.manual_seed(5)
    state = new_state(small, drop_rate=0.5)
    torch.manual_seed(5)
    train_step(state, new_batches(small)(0), CONFIG, 0.0, state.model.features)
    assert torch.equal(torch.rand(1), expected)
    assert len(set(losses.values())) == 4


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_kept_has_its_room_before_a_step_forms_anything(small: ModelConfig, kind: str) -> None:
    state, begun = new_state(small, kind), []

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        begun.append({name: kept.data_ptr() for name, kept in optimizer_tensors(state).items()})
        return state.model.features(tokens)

    train_step(state, new_batches(small)(0), CONFIG, 0.01, forward)
    assert {name.split("/")[0] for name in begun[0]} == weights(state).keys()
    assert begun[0] == {name: kept.data_ptr() for name, kept in optimizer_tensors(state).items()}, "and stays there"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_stops_before_the_update(small: ModelConfig, value: float, kind: str) -> None:
    state = new_state(small, kind)
    with torch.no_grad():
        state.model.trf_blocks[0].att.W_value.weight[0, 0] = value
    before = weights(state)
    with pytest.raises(DivergedError, match="step 1"):
        train_step(state, new_batches(small)(0), CONFIG, 0.01, state.model.features)
    for name, weight in weights(state).items():
        assert torch.equal(weight, before[name]) or torch.isnan(weight).any()
    assert not any(kept.any() for kept in optimizer_tensors(state).values()), "as it began"


def test_a_gradient_that_is_not_finite_stops_before_the_update(small: ModelConfig) -> None:
    state = new_state(small)
    state.model.final_norm.scale.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(state)
    with pytest.raises(DivergedError):
        train_step(state, new_batches(small)(0), CONFIG, 0.01, state.model.features)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(state).items())


def run(small: ModelConfig, total_steps: int, figures: list[float], **options: object) -> tuple[list[Event], TrainState]:
    state = new_state(small)
    state.total_steps, state.eval_every = total_steps, 3
    answers: Iterator[float] = iter(figures)
    events = fit(
        state,
        new_batches(small),
        CONFIG,
        evaluate=lambda step: (1.0, Evaluation.of(next(answers) * 10, 10, 10)),
        sample=lambda step: f"sample {step}",
        **options,  # type: ignore[arg-type]
    )
    return list(events), state


def test_the_events_come_in_order_and_the_first_and_last_step_are_looked_at(
    small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_FACTOR", 0.0)  # else the best is only copied where this machine pauses for a millisecond
    events, state = run(small, 7, [5.0, 4.0, 4.0, 3.0])
    told = [(type(event).__name__, event.step) for event in events]
    looks = lambda step: [("Evaluated", step), ("Sampled", step)]  # noqa: E731
    steps = lambda *numbers: [("StepDone", number) for number in numbers]  # noqa: E731
    assert told == [
        ("SaveDue", 0), *looks(0), *steps(1, 2, 3), *looks(3), ("SaveDue", 3), *steps(4, 5, 6), *looks(6),
        *steps(7), *looks(7), ("SaveDue", 7), ("Stopped", 7),
    ]  # fmt: skip
    assert (state.best_step, state.best_nats, state.tokens) == (7, 3.0, 7 * 6 * small.context_length - sum_ignored(small, 7))


@pytest.mark.parametrize("held_up", [[0], [1], [1, 2]])
def test_a_save_that_a_disk_held_up_does_not_put_off_the_others(
    small: ModelConfig, monkeypatch: pytest.MonkeyPatch, held_up: list[int]
) -> None:
    state, now, saved = new_state(small), [0.0], list[int]()
    state.total_steps = 400

    def later(passed_s: float = 1.0) -> float:
        now[0] += passed_s
        return now[0]

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=later))  # each look at the clock is a second later
    config = dataclasses.replace(CONFIG, save_every_s=None)
    for event in fit(state, new_batches(small), config, evaluate=lambda step: (1.0, None), sample=lambda _: ""):
        if isinstance(event, SaveDue):
            if len(saved) in held_up:
                later(600.0)
            saved.append(event.step)
    assert (len(saved) > 4) == (len(held_up) == 1)  # after two such, saving is slow


def sum_ignored(small: ModelConfig, steps: int) -> int:
    return sum(6 * small.context_length - new_batches(small)(step).n_targets for step in range(steps))


def test_the_best_is_the_first_of_equals(small: ModelConfig) -> None:
    events, state = run(small, 6, [5.0, 4.0, 4.0])
    assert [event.best for event in events if isinstance(event, Evaluated)] == [True, True, False]
    assert state.best_step == 3


def test_a_request_to_stop_finishes_the_step_saves_and_stops(small: ModelConfig) -> None:
    asked = iter([None, "SIGTERM", "never asked again"])
    events, state = run(small, 9, [5.0], should_stop=lambda: next(asked))
    assert [type(event) for event in events[-3:]] == [StepDone, SaveDue, Stopped]
    assert events[-1] == Stopped(2, "SIGTERM")
    assert state.step == 2


def test_who_stops_listening_stops_the_training(small: ModelConfig) -> None:
    state = new_state(small)
    state.total_steps = 10
    for event in fit(state, new_batches(small), CONFIG, evaluate=lambda step: (1.0, None), sample=lambda _: ""):
        if isinstance(event, StepDone) and event.step == 4:
            break
    assert state.step == 4


def test_a_plan_made_on_the_way_is_followed(small: ModelConfig) -> None:
    state = new_state(small)
    events = []
    for event in fit(state, new_batches(small), CONFIG, evaluate=lambda step: (1.0, None), sample=lambda _: ""):
        events.append(event)
        if isinstance(event, StepDone) and event.step == 3:
            state.total_steps = 5
    assert state.step == 5
    assert [event.lr for event in events if isinstance(event, StepDone)][2] == 0.01  # at its peak while no end was known
    assert [event.step for event in events if isinstance(event, Sampled)] == [0, 5]
    assert [event.step for event in events if isinstance(event, SaveDue)] == [0, 5]


def test_training_learns(small: ModelConfig) -> None:
    state = new_state(small, "muon" if small.block == "qwen3" else "adamw")
    state.total_steps = 60
    losses = [
        event.nats_per_token
        for event in fit(state, new_batches(small), CONFIG, evaluate=lambda step: (1.0, None), sample=lambda _: "")
        if isinstance(event, StepDone)
    ]
    assert losses[-1] < losses[0] - 1.0  # 200 random ids seen 30 times are learnt by heart


def test_a_run_that_did_all_its_steps_is_done_whatever_was_asked_meanwhile(small: ModelConfig) -> None:
    events, _ = run(small, 1, [5.0, 4.0], should_stop=lambda: "SIGINT")
    assert events[-1] == Stopped(1, "done")
