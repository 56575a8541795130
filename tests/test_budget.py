"""A time budget becomes steps that fill it."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from command import Command, write
from conftest import STORY, TINY
from firstwords import api
from firstwords.errors import ConfigError
from firstwords.planning import budget
from firstwords.planning.budget import PROBE_STEPS, Budget, Preparation
from firstwords.text import corpus as corpora
from firstwords.text import sources


def simulate(
    budget_s: float,
    step_s: float,
    evaluation_s: float,
    slower: float = 1.0,
    end_s: float = 0.0,
    rest_slower: float | None = None,
    done: int = 0,
    rest: Callable[[int], float] = lambda _: 0.0,
) -> tuple[float, int, int]:
    """Play a run on a simulated clock; everything becomes `slower` half-way. Returns (seconds, steps, evaluations).

    What is not a step becomes slower by `rest_slower`, where it is named; `done` steps were done before; `rest` seconds
    pass after a step on what is neither a step nor an evaluation.
    """
    now_s, step, evaluations = 0.1, done, 0  # the first save and sample
    plans = Budget(budget_s, budget_s, now_s=0.0, evaluation_steps=0.7 * evaluation_s / step_s, end_s=end_s)
    total: int | None = None
    every: int | None = None
    while total is None or step < total:
        pace, rest_pace = (slower, rest_slower or slower) if now_s > budget_s / 2 else (1.0, 1.0)
        took_s = step_s * pace
        now_s, step = now_s + took_s, step + 1
        if plans.step(now_s, took_s) and step != total:
            total, every = plans.plan(step, every)
        if step == total or (every and step % every == 0):
            now_s, evaluations = now_s + evaluation_s * rest_pace, evaluations + 1
            plans.count_evaluation()
        now_s += rest(step) * rest_pace
    return now_s + end_s * rest_pace, step - done, evaluations


@pytest.mark.parametrize(("budget_s", "step_s"), [*product([20, 120], [0.01, 0.2, 1.5]), (3600, 0.2), (3600, 1.5)])
@pytest.mark.parametrize("evaluation_s", [0.01, 0.5, 2.0])
def test_a_steady_machine_ends_on_time(budget_s: float, step_s: float, evaluation_s: float) -> None:
    took_s, _, evaluations = simulate(budget_s, step_s, evaluation_s)
    # within 3 % or the few steps that come before the first plan
    assert took_s == pytest.approx(budget_s, abs=max(0.03 * budget_s, PROBE_STEPS * step_s))
    assert evaluations >= 1


@pytest.mark.parametrize(
    "rest",
    [
        lambda _: 0.1,  # who listens draws a picture at each step
        lambda step: 0.3 * (step % 3 == 0),  # a sample at every third
        lambda step: 3.0 * (step % 400 == 0),  # a save now and then
    ],
)
def test_what_passes_between_steps_is_time_too_and_no_evaluation_s(rest: Callable[[int], float]) -> None:
    took_s, _, evaluations = simulate(60, 0.02, 0.5, rest=rest)
    assert took_s == pytest.approx(60, rel=0.03)  # without counting it, 138 s of the first kind
    assert evaluations >= 7  # as often as without: they did not become slower


@pytest.mark.parametrize("done", [100, 12_345])
def test_a_run_that_is_given_more_time_is_judged_as_often_as_a_new_one(done: int) -> None:
    fresh, longer = simulate(120, 0.05, 0.3), simulate(120, 0.05, 0.3, done=done)
    assert fresh[2] > 10
    assert longer[2] == pytest.approx(fresh[2], abs=1)  # where the first falls depends on where the run stands
    assert longer[1] == pytest.approx(fresh[1], rel=0.01)  # an evaluation more is 0.3 of 120 s


@pytest.mark.parametrize("slower", [0.6, 1.5])
def test_a_machine_that_changes_its_speed_is_followed(slower: float) -> None:
    took_s, _, evaluations = simulate(300, 0.2, 0.3, slower)
    assert took_s == pytest.approx(300, rel=0.05)
    assert evaluations > 5


@pytest.mark.parametrize("slower", [0.6, 1.5])
def test_it_is_followed_also_where_there_is_one_evaluation_at_the_end(slower: float) -> None:
    took_s, _, evaluations = simulate(60, 0.1, 6.0, slower)
    assert evaluations == (1 if slower > 1 else 2)  # a plan that grew by more than a quarter has room for another
    assert took_s == pytest.approx(60, rel=0.05)  # a plan made once would miss it by a quarter


@pytest.mark.parametrize("slower", [0.5, 1.0, 2.0])
def test_what_follows_the_last_step_is_expected_to_be_as_slow_as_the_steps(slower: float) -> None:
    took_s, _, _ = simulate(100, 0.1, 2.0, slower, end_s=8.0)
    assert took_s == pytest.approx(100, rel=0.03)  # the promise; 8 s at half the speed are 16
    late_s, _, _ = simulate(100 - 8.0, 0.1, 2.0, slower)
    assert abs(late_s + 8.0 * slower - 100) > 3 or slower == 1.0  # the negative control: a fixed reserve


@pytest.mark.parametrize(("rest_slower", "limit"), [(2.0, 100.0), (4.5, 1.5)])
def test_where_steps_become_much_slower_than_the_rest_it_is_still_on_time(
    monkeypatch: pytest.MonkeyPatch, rest_slower: float, limit: float
) -> None:
    measured = {"slower": 8.0, "end_s": 3.0, "rest_slower": rest_slower}  # beside a program on every core
    assert 0.95 * 180 < simulate(180, 0.17, 1.5, **measured)[0] < 1.03 * 180  # the promise
    monkeypatch.setattr(budget, "MOST_SLOWED", limit)
    assert not 0.95 * 180 < simulate(180, 0.17, 1.5, **measured)[0] < 1.03 * 180  # the negative control


def test_where_the_best_is_behind_there_is_time_to_judge_it_again() -> None:
    def left_s(*, is_best: bool) -> float:
        plans = Budget(100, 100, now_s=0.0, evaluation_steps=1.0, scale_steps=30)
        step, total = 0, None
        while total is None or step < total:
            step += 1
            if plans.step(0.1 * step, 0.1) and step != total:
                total, _ = plans.plan(step, 10**6)
                plans.count_evaluation(is_best=is_best)
        return 100 - 0.1 * step

    assert left_s(is_best=False) - left_s(is_best=True) == pytest.approx(30 * 0.1, abs=0.2)  # a step more or less


@pytest.mark.parametrize(("slower", "has_time"), [(1.0, True), (3.0, False)])
def test_there_is_time_for_a_scale_where_it_would_not_end_much_too_late(slower: float, *, has_time: bool) -> None:
    plans = Budget(100, 100, now_s=0.0, evaluation_steps=1.0, end_s=1.0, scale_steps=20)
    for step in range(1, 60):
        if plans.step(0.1 * step, 0.1):
            plans.plan(step, 10**6)
    for step in range(60, 120):
        plans.step(0.1 * step, 0.1 * slower)
    assert plans.has_time_for_scale(100 - 1.0 - 20 * 0.1) is has_time


@pytest.mark.parametrize(("step_s", "steps"), [(0.1, PROBE_STEPS), (4.0, 3)])
def test_steps_that_warm_up_do_not_count_in_the_first_plan(step_s: float, steps: int) -> None:
    plans, step, now_s, due = Budget(75, 75, now_s=5.0, evaluation_steps=1.0), 0, 5.0, False
    while not due:
        took_s = step_s if step >= 2 else 3 * step_s
        step, now_s = step + 1, now_s + took_s
        due = plans.step(now_s, took_s)
    assert step == steps
    rest = (75 - now_s) / step_s
    assert plans.plan(step, 10**6)[0] - step == pytest.approx(rest, abs=2), "all that fit but for an evaluation's time"


def test_evaluations_take_a_small_share() -> None:
    took_s, _, evaluations = simulate(120, 0.2, 3.0)
    assert evaluations * 3.0 < 0.15 * took_s


def test_a_run_with_a_budget_journals_its_plan_and_ends_at_the_floor(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    api.train(tmp_path / "story.txt", out=tmp_path / "first", steps=1, **TINY)  # a first run of a process starts slowly
    run = api.train(tmp_path / "story.txt", out=tmp_path / "run", for_s=6, optim={"decay": "linear"}, **TINY)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    plans = [line for line in lines if line["event"] == "plan"]
    rates = [line["lr"] for line in lines if line["event"] == "step"]
    assert plans[-1]["total_steps"] == run.steps == len(rates)
    assert rates[-1] < 0.05 * max(rates)


def test_there_is_time_for_what_is_said_at_the_end_without_a_report_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    made, given = budget.Budget, list[float]()
    monkeypatch.setattr(budget, "Budget", lambda *args, **kwargs: given.append(kwargs["end_s"]) or made(*args, **kwargs))
    for report in (True, False):
        api.train(tmp_path / "story.txt", out=tmp_path / str(report), for_s=3, **{**TINY, "report": report})
    assert given[0] == given[1] > 0


def test_a_run_whose_plan_was_changed_on_the_way_replays_exactly(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    run = tmp_path / "run"
    steps = api.train(tmp_path / "story.txt", out=run, for_s=4, keep=1000, optim={"decay": "linear"}, **TINY).steps
    lines = (run / "metrics.jsonl").read_text().splitlines()
    plans = [json.loads(line) for line in lines if json.loads(line)["event"] == "plan"]
    assert len(plans) >= 2
    assert 0 < plans[0]["step"] < plans[-1]["step"] < steps
    found = api.verify(run, replay=steps).replay
    assert found is not None
    assert found.ok, found.problem
    changed = [line.replace('"total_steps": ', '"total_steps": 1') if '"plan"' in line else line for line in lines]
    (run / "metrics.jsonl").write_text("\n".join(changed) + "\n")
    other = api.verify(run, replay=steps).replay  # the negative control: the rates follow the plans
    assert other is not None
    assert not other.ok


def test_a_model_too_large_for_a_budget_is_refused_before_it_takes_any_of_it(command: Command) -> None:
    write(Path("text.txt"), "".join(f"Line {n} of a text, and {n * n} more.\n" for n in range(2000)))
    given = ("train", "text.txt", "--for", "4s", "--device", "cpu", "--precision", "float32", "--preset")
    ended = command(*given, "gpt2-124m")
    assert ended.code == 78
    assert "no time is left to learn" in ended.err
    assert re.search(r"give --for [1-9]\d*[sm] or more, or a smaller --preset", ended.err)
    assert command(*given, "laptop-tiny").code == 0  # the negative control


def test_the_first_pass_over_a_text_can_be_seen_to_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that is gigabytes, reading it once is more than a short budget has."""
    (tmp_path / "text.txt").write_text(STORY * 200)
    told = list[tuple[str, float | None]]()
    corpora.survey(sources.read([tmp_path / "text.txt"]), lambda what, share: told.append((what, share)))
    shares = [share for what, share in told if what == "reading the text"]
    assert shares == sorted(filter(None, shares))
    assert shares[-1] == 1.0
    monkeypatch.setattr(budget.Preparation, "too_long_s", lambda *_: 1000.0)
    with pytest.raises(ConfigError, match="it takes about 1000 s to read this text once"):
        api.train(tmp_path / "text.txt", out=tmp_path / "run", for_s=10)
    assert not (tmp_path / "cache/corpora").exists()  # nothing was tokenized by then


def test_a_start_that_was_late_makes_no_text_too_large(tmp_path: Path) -> None:
    """As where a model was fetched first: a text of one piece is read in a moment, however long ago the process began."""
    (tmp_path / "text.txt").write_text(STORY)
    late = time.perf_counter() - 55
    assert api.train(tmp_path / "text.txt", out=tmp_path / "run", for_s=60, started_s=late, **TINY).steps > 0


@pytest.mark.parametrize(("pass_s", "total_s", "too_long"), [(200, 180, True), (200, 240, True), (200, 600, False)])
def test_a_text_too_large_for_a_budget_is_seen_early(pass_s: float, total_s: float, *, too_long: bool) -> None:
    preparation, said = Preparation(started_s=100, total_s=total_s), []
    for start_s, end_s in (
        (110, 110 + pass_s / 10),
        (110 + pass_s / 10, 110 + 1.1 * pass_s),
    ):  # two passes over the text
        for share in np.linspace(0, 1, 101):
            now_s = start_s + share * (end_s - start_s)
            found = preparation.too_long_s(now_s, float(share))
            said += [] if found is None else [(now_s, found)]
    assert bool(said) is too_long
    if said:
        assert said[0][0] < 110 + pass_s / 10 + 5  # in the first seconds of the second pass
        assert said[0][1] == pytest.approx(10 + 1.1 * pass_s, rel=0.01)


def test_a_text_that_leaves_no_time_to_learn_is_refused_while_it_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stories = [tmp_path / f"{n}.txt" for n in range(3)]
    for story in stories:
        story.write_text(STORY)
    monkeypatch.setattr(budget, "SURE_S", 0.0)  # they are prepared in less
    train = functools.partial(api.train, stories, started_s=time.perf_counter() - 100, **TINY)
    with pytest.raises(ConfigError) as refused:
        train(out=tmp_path / "late", for_s=60)
    assert refused.value.where == "--for"
    assert "it takes about 100 s to read this text once" in refused.value.why
    assert train(out=tmp_path / "counted", steps=1).steps == 1  # the negative control: no budget, no haste
