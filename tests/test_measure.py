"""What `firstwords bench` says is measured on the real thing."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch

from command import Command, Refused
from firstwords.config import RunConfig, run_config
from firstwords.model import cost
from firstwords.model.gpt import GPTModel
from firstwords.planning import matmul, measure
from firstwords.planning.speed import Speed, guessed, point
from firstwords.text.batches import Batch
from firstwords.training import loop
from firstwords.training.state import TrainState

TRIES = 3  # where a limit was passed: it was measured a moment before, and others may have used the machine then


def test_bench_measures_the_machine_and_each_preset_against_its_limit(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PREPARED_BYTES", 1 << 20)
    for _ in range(TRIES):
        ended = command("bench", "laptop-small", "--json")
        marks = {mark["what"]: mark for mark in ended.json["marks"]}
        if all(mark["limit"] is None or mark["share"] < 1 for mark in marks.values()):
            break
    assert all(mark["rate"] > 0 for mark in marks.values())
    limited = {what for what, mark in marks.items() if mark["limit"] is not None}
    assert limited == {"learning, laptop-small", "speaking, laptop-small"}
    for what in limited:
        assert 0 < marks[what]["share"] < 1  # a limit is what cannot be passed
        assert marks[what]["share"] == pytest.approx(marks[what]["rate"] / marks[what]["limit"])
    assert all(what in ended.err for what in marks)


def test_bench_refuses_an_unknown_preset(refused: Refused) -> None:
    assert "laptop" in refused(78, "bench", "lapptop")["do"]


def test_a_measured_step_is_a_training_step() -> None:
    config = measure.bench_config("laptop-small", "float32")
    step = measure.training_step(config, rows=2)
    first = step()
    for _ in range(5):
        last = step()
    assert last[0] < first[0]  # the same batch again and again is learnt


def test_speaking_is_measured_by_as_many_tokens_as_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new model says soon that the text ends, and speaks on all the same."""
    drawn = list[int]()
    generate = measure.generate
    monkeypatch.setattr(measure, "generate", lambda *of: (drawn.append(one) or one for one in generate(*of)))
    measure.speaking_rate(measure.bench_config("laptop-mini", "float32"), 10)
    assert len(drawn) == measure.WARM_SPOKEN + 10


def test_the_speed_of_now_is_measured_and_what_was_known_before_only_tells_the_sizes_apart() -> None:
    small, usual = (
        run_config({"preset": name, "model.vocab_size": 512, "precision": "float32"}) for name in ("laptop-small", "laptop")
    )
    before = Speed(((small.model, 2e-7), (usual.model, 1e-6)))  # a million tokens a second: no machine here is that fast
    measured = measure.point_now(small, before, most_s=0.2)
    assert measured is not None
    now = before.now(measured, others=True)
    assert 10 < now.tokens_per_s(small.model) < 1e6
    assert now.tokens_per_s(small.model) == pytest.approx(5 * now.tokens_per_s(usual.model))
    dropping = dataclasses.replace(small, model=dataclasses.replace(small.model, drop_rate=0.1), batch_size=1)
    measured = measure.point_now(dropping, before, most_s=0.2)
    assert measured is not None
    assert 10 < before.now(measured, others=True).tokens_per_s(dropping.model, 256) < 1e6


def test_what_is_too_slow_for_its_time_is_not_measured() -> None:
    config = run_config({"preset": "laptop-small", "model.vocab_size": 512})
    before = Speed(((config.model, 1.0),))  # a second for a token
    assert measure.point_now(config, before, most_s=1.0) is None


@pytest.mark.parametrize(("micro_batch_size", "most"), [(2, 2), (None, 32)])
def test_the_pace_is_measured_with_no_more_sequences_than_are_learnt_from_at_once(
    micro_batch_size: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def step_s(config: RunConfig, n_rows: int, steps: int, most_s: float) -> float:
        rows.append(n_rows)
        return 1.0

    monkeypatch.setattr(measure, "step_s", step_s)
    config = run_config({"preset": "laptop", "model.vocab_size": 512, "device": "cpu", "batch_size": 4096})
    config = dataclasses.replace(config, micro_batch_size=micro_batch_size)
    assert measure.point_now(config, Speed(flops_per_s=1e18), most_s=10.0)
    assert rows == [most]  # of 256 tokens: 8,192 at once are as good as more


def test_where_memory_runs_out_while_speed_is_measured_fewer_sequences_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config({"preset": "laptop-small", "model.vocab_size": 512, "precision": "float32", "batch_size": 8})
    train_step, tried = loop.train_step, list[int]()

    def little_memory(state: TrainState, batch: Batch, *given: Any) -> tuple[float, float]:
        tried.append(len(batch.tokens))
        if len(batch.tokens) > 2:
            raise loop.TooLargeError
        return train_step(state, batch, *given)

    monkeypatch.setattr(loop, "train_step", little_memory)
    found = measure.point_now(config, Speed(((config.model, 1e-9),)), most_s=0.2)
    assert found is not None
    assert found[1] > 1e-8
    assert tried[:3] == [8, 4, 2]
    assert set(tried[2:]) == {2}


def test_a_second_size_that_is_measured_leaves_the_others_as_they_are() -> None:
    tiny, mini, usual = (
        run_config({"preset": name, "model.vocab_size": 512}).model for name in ("laptop-tiny", "laptop-mini", "laptop")
    )
    before = Speed(((mini, 2e-4), (usual, 1e-3)))
    once = before.now((usual, 2e-3), others=True)
    assert once.tokens_per_s(mini) == pytest.approx(before.tokens_per_s(mini) / 2)
    twice = once.now((mini, 1e-4), others=False)
    assert twice.tokens_per_s(usual) == pytest.approx(once.tokens_per_s(usual)) == pytest.approx(500)
    assert twice.tokens_per_s(mini) == pytest.approx(10_000)
    assert twice.now((tiny, 1e-5), others=False).tokens_per_s(tiny) == pytest.approx(100_000)


@pytest.mark.parametrize("preset", ["laptop-tiny", "laptop-mini", "laptop-large"])
def test_where_nothing_was_measured_one_size_tells_how_fast_all_are(preset: str) -> None:
    here, other = (run_config({"preset": name, "model.vocab_size": 512}).model for name in (preset, "laptop"))
    guess = guessed(1e11)
    twice = guess.now((here, 2 / guess.tokens_per_s(here)), others=True)
    assert twice.tokens_per_s(other) == pytest.approx(guess.tokens_per_s(other) / 2)


@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_measured_step_is_foretold_to_take_as_long_as_it_did(drop_rate: float, rows: int, kind: str) -> None:
    named = {"preset": "laptop", "model.vocab_size": 512, "model.drop_rate": drop_rate, "optim.kind": kind}
    config = run_config(named)
    speed = Speed((point(config, rows, 0.25),))
    assert speed.of_run(config, rows) == pytest.approx(rows * 256 / 0.25)


def test_only_an_update_by_muon_takes_longer_the_fewer_tokens_it_is_of() -> None:
    """An update of the chapter's model by Muon would take as much as learning from its 512 tokens four times over."""
    config = run_config({"preset": "chapter"})
    speed = Speed((point(config, 2, 4.0),))
    assert speed.of_run(config) == speed.of_run(config, 64) == pytest.approx(2 * 256 / 4.0)
    by_muon = run_config({"preset": "chapter", "optim.kind": "muon"})
    assert speed.of_run(by_muon, 2) < 0.5 * speed.of_run(config, 2)


def test_what_a_processor_cannot_do_is_not_measured_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    took_s = {torch.float32: 1e-3, torch.bfloat16: 2.0}  # one product: bfloat16 is done by other instructions
    asked: list[torch.dtype] = []

    def one(dtype: torch.dtype) -> float:
        asked.append(dtype)
        return took_s[dtype]

    monkeypatch.setattr(matmul, "_product_s", lambda a: one(a.dtype))
    found = matmul.rates(torch.device("cpu"))
    assert found["float32"] == pytest.approx(2000 * found["bfloat16"])
    assert matmul.precision_of(found) == "float32"
    assert asked.count(torch.bfloat16) == 2
    assert asked.count(torch.float32) == matmul.RATE_TIMES  # the negative control: what is fast is asked again


def test_the_limit_of_products_is_not_looked_for_where_one_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    a_product_s = 1.5

    def seconds(work: object, times: int) -> float:
        calls.append(times)
        return a_product_s

    monkeypatch.setattr(measure, "seconds", seconds)
    assert measure.matmul_flops_per_s(torch.bfloat16) == pytest.approx(2 * measure.SIDES[0] ** 3 / a_product_s)
    assert calls == [1]
    calls.clear()
    a_product_s = 1e-3
    assert measure.matmul_flops_per_s(torch.bfloat16) == pytest.approx(2 * measure.SIDES[-1] ** 3 / a_product_s)
    assert len(calls) == 2 * len(measure.SIDES)  # the negative control


def test_measuring_ends_when_its_time_is_over() -> None:
    calls: list[None] = []
    measure.seconds(lambda: calls.append(time.sleep(0.02)), 100, most_s=0.03)
    assert len(calls) == 2
    measure.seconds(lambda: calls.append(time.sleep(0.02)), 100, most_s=0.0)
    assert len(calls) == 3  # once in any case


def test_more_work_takes_longer() -> None:
    a = torch.ones(256, 256)
    assert measure.seconds(lambda: [a @ a for _ in range(200)], 3) > measure.seconds(lambda: a @ a, 3)


@pytest.mark.parametrize("preset", ["chapter", "gpt2-124m", "laptop", "laptop-tiny"])
def test_what_is_read_for_a_token_is_what_a_forward_pass_multiplies(preset: str) -> None:
    """All but tables that are looked up in: each number of a matrix is multiplied once for a token."""
    config = dataclasses.replace(run_config({"preset": preset}).model, vocab_size=300, n_layers=1)
    model = GPTModel(config)
    table = model.tok_emb.weight
    looked_up = {id(model.pos_emb.weight)} if model.pos_emb is not None else set()
    looked_up |= {id(table)} if model.out_head.weight is not table else set()
    assert cost.read_parameters(config) == sum(p.numel() for p in model.parameters() if id(p) not in looked_up)
