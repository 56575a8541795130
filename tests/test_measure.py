"""What `firstwords bench` says is measured on the real thing."""

from __future__ import annotations

import pytest
import torch

from command import Command, Refused
from firstwords.config import run_config
from firstwords.planning import machine, measure
from firstwords.planning.speed import Speed


def test_bench_measures_the_machine_and_each_preset_against_its_limit(command: Command) -> None:
    ended = command("bench", "laptop-small", "--json")
    marks = {mark["what"]: mark for mark in ended.json["marks"]}
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
    config = measure.bench_config("laptop-small")
    step = measure.training_step(config, rows=2)
    first = step()
    for _ in range(5):
        last = step()
    assert last[0] < first[0]  # the same batch again and again is learnt


def test_the_speed_of_now_is_measured_and_what_was_measured_before_only_tells_the_sizes_apart() -> None:
    small, usual = (run_config({"preset": name, "model.vocab_size": 2048}).model for name in ("laptop-small", "laptop"))
    before = Speed(((small, 0.2), (usual, 1.0)))  # a second for a token: no machine is that slow
    now = measure.speed_now("float32", before)
    assert now.tokens_per_s(usual) > 10
    assert now.tokens_per_s(small) == pytest.approx(5 * now.tokens_per_s(usual))
    first = measure.speed_now("float32", None)  # on a machine where nothing was measured yet
    assert [shape for shape, _ in first.points] == [usual]
    assert first.tokens_per_s(usual) > 10


def test_what_a_processor_cannot_do_is_not_measured_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    took_s = {torch.float32: 1e-3, torch.bfloat16: 2.0}  # one product: bfloat16 is done by other instructions
    asked: list[torch.dtype] = []

    def one(dtype: torch.dtype) -> float:
        asked.append(dtype)
        return took_s[dtype]

    monkeypatch.setattr(machine, "_product_s", lambda a: one(a.dtype))
    found = machine.rates(torch.device("cpu"))
    assert found["float32"] == pytest.approx(2000 * found["bfloat16"])
    assert machine.precision_of(found) == "float32"
    assert asked.count(torch.bfloat16) == 2
    assert asked.count(torch.float32) == machine.RATE_TIMES  # the negative control: what is fast is asked again


def test_the_limit_of_products_is_not_looked_for_where_one_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    a_product_s = 1.5

    def seconds(work: object, times: int) -> float:
        calls.append(times)
        return a_product_s

    monkeypatch.setattr(measure, "seconds", seconds)
    assert measure.product_rate(torch.bfloat16) == pytest.approx(2 * measure.SIDES[0] ** 3 / a_product_s)
    assert calls == [1]
    calls.clear()
    a_product_s = 1e-3
    assert measure.product_rate(torch.bfloat16) == pytest.approx(2 * measure.SIDES[-1] ** 3 / a_product_s)
    assert len(calls) == 2 * len(measure.SIDES)  # the negative control


def test_more_work_takes_longer() -> None:
    a = torch.ones(256, 256)
    assert measure.seconds(lambda: [a @ a for _ in range(200)], 3) > measure.seconds(lambda: a @ a, 3)
