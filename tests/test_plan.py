"""What could be trained, said before anything is: what fits, how long it takes, how good it will be; and what to take."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command import TEXT, TINY_FLAGS, Command, Refused, write
from conftest import STORY, TINY, journal
from firstwords import api, asking, judging, preparing, resolve
from firstwords.app import plans
from firstwords.config import ModelConfig, RunConfig, run_config
from firstwords.errors import ConfigError, DataError
from firstwords.events import Saved, ignore_event
from firstwords.model import cost
from firstwords.planning import facts, machine, measure, plan, recipe
from firstwords.planning.plan import Candidate, Machine, TokenizedText
from firstwords.planning.prediction import BEYOND_PHRASES, Prediction
from firstwords.planning.speed import DROPPING_SHARE, UPDATE_TOKENS, WIDTH_POWER, Point, Speed
from firstwords.presets import SHORTEST_CONTEXT
from firstwords.runs.folder import RunFolder
from firstwords.text import sources
from firstwords.training.events import Event

GIB = 1 << 30
FAST = Speed(flops_per_s=1e12)
TOKENS = TokenizedText("bpe", 2048, training=350_000, training_bytes=1e6, held_out=40_000, difficulty=2.6)
KEYS = {"tokenizer", "preset", "batch_size", "fits", "has_time", "memory_bytes", "tokens_per_s"}
KEYS |= {"steps", "epochs", "elapsed_s"}


def here(speed: Speed = FAST, free_bytes: int | None = 64 * GIB) -> Machine:
    return Machine(speed, "bfloat16", free_bytes)


def laptop(for_s: float, **changes: Any) -> Candidate:
    return plan.of_preset(dataclasses.replace(TOKENS, **changes), "laptop", for_s, here())


def bits(candidate: Candidate) -> float:
    assert candidate.expected is not None
    return candidate.expected.mid


@pytest.fixture
def found(tmp_path: Path) -> facts.TextFacts:
    return facts.read(sources.read([write(tmp_path / "story.txt", STORY * 30)]))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is measured on one small step: the real one, in less time."""
    monkeypatch.setattr(measure, "MEASURED", (("laptop-small", 512),))
    monkeypatch.setattr(measure, "UPDATE_TOKENS", 256)
    monkeypatch.setattr(measure, "MEASURED_STEPS", 1)


def test_more_time_is_more_steps_and_never_worse() -> None:
    candidates = [laptop(seconds) for seconds in (30, 60, 180, 600, 3600)]
    assert [one.steps * one.batch_size for one in candidates] == sorted(one.steps * one.batch_size for one in candidates)
    assert [bits(one) for one in candidates] == sorted((bits(one) for one in candidates), reverse=True)


def test_a_run_that_is_to_judge_itself_often_is_foretold_fewer_steps() -> None:
    config = run_config({"preset": "laptop", "model.vocab_size": TOKENS.vocab_size, "for_s": 600.0, "batch_size": 16})
    usual, often = (plan.of_config(one, TOKENS, here()) for one in (config, dataclasses.replace(config, eval_every=2)))
    assert often.steps < usual.steps / 1.2


def test_a_harder_text_is_expected_to_come_out_worse() -> None:
    assert bits(laptop(180, difficulty=1.5)) < bits(laptop(180)) < bits(laptop(180, difficulty=3.5))


def test_what_does_not_fit_into_free_memory_says_so_and_is_not_recommended(found: facts.TextFacts) -> None:
    made = plan.plan(found, here(free_bytes=2 * GIB), for_s=180)
    fits = {(one.tokenizer, one.preset): one.fits for one in made.candidates}
    assert fits["bpe", "laptop"]
    assert not fits["gpt2", "gpt2-124m"]
    assert made.recommended is not None
    assert made.recommended.fits
    nothing = plan.plan(found, here(free_bytes=GIB // 8), for_s=180)
    assert not any(one.fits for one in nothing.candidates)
    assert nothing.recommended is None
    assert "memory" in nothing.why
    unknown = plan.plan(found, here(free_bytes=None), for_s=180)
    assert all(one.fits for one in unknown.candidates)


@pytest.mark.parametrize("for_s", [5.0, 60.0, 3600.0])
def test_nothing_is_foretold_to_be_worse_than_a_model_that_learnt_nothing(for_s: float) -> None:
    slow, untaught = here(Speed(flops_per_s=2e9)), math.log2(TOKENS.vocab_size) * TOKENS.training / TOKENS.training_bytes
    found = [plan.of_preset(TOKENS, preset, for_s, slow).expected for preset in plan.PRESETS]
    assert all(one is not None and one.low <= one.mid <= one.high <= untaught for one in found)
    assert for_s > 5 or any(one is not None and one.high == untaught for one in found)  # it bites


def test_a_run_that_is_too_short_for_any_size_is_told_of_the_smallest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "speed", lambda *_: Speed(flops_per_s=1e6))  # so slow that no step of it can be measured
    story = write(tmp_path / "story.txt", STORY * 300)
    asked = asking.new(tmp_path / "run", None, {"text": (str(story),), "for_s": 1.0}, lambda _: ({}, b""), ignore_event)
    prepared = preparing.prepare(asked, ignore_event)
    with pytest.raises(ConfigError, match="no time is left") as refused:
        resolve.settle(asked, prepared, difficulty=1.0)
    assert "laptop-tiny" in refused.value.why
    assert "smaller" not in refused.value.do


def test_what_has_no_time_for_its_first_steps_says_so_and_is_not_recommended(found: facts.TextFacts) -> None:
    made = plan.plan(found, here(Speed(flops_per_s=2e9)), for_s=20)
    has_time = {one.preset: one.has_time for one in made.candidates}
    assert has_time["laptop-tiny"]
    assert not has_time["laptop-large"]
    assert not has_time["gpt2-124m"]
    assert made.recommended is not None
    assert made.recommended.has_time
    assert "fit into memory and time" in made.why  # laptop does not: what is taken is not held against it
    for one in made.candidates:
        cells = plans.row(one, with_time=False)
        assert ("none" in cells) is not one.has_time
        assert any("-" in cell for cell in cells[1:]) is one.has_time  # a range of bits per byte
    nothing = plan.plan(found, here(Speed(flops_per_s=1e6)), for_s=20)
    assert nothing.recommended is None
    assert "time" in nothing.why
    assert all(one.has_time for one in plan.plan(found, here(), for_s=180).candidates if one.preset != "gpt2-124m")


@pytest.mark.parametrize("seconds", [60, 600])
def test_the_time_for_a_target_reaches_it_and_is_the_soonest(seconds: float, found: facts.TextFacts) -> None:
    slow = here(Speed(flops_per_s=1e10))
    usual = next(one for one in plan.plan(found, slow, for_s=seconds).candidates if one.preset == "laptop")
    target = bits(usual)
    made = plan.plan(found, slow, for_s=180, target=target)
    best, again = made.recommended, next(one for one in made.candidates if one.preset == "laptop")
    assert best is not None
    assert bits(again) == pytest.approx(target, rel=0.02)  # whole evaluations and whole steps
    # Just below the epochs from which on numbers are dropped, a step is faster: less time is as good.
    assert 0.9 * DROPPING_SHARE * seconds < again.elapsed_s < 1.1 * seconds
    assert best.elapsed_s == min(one.elapsed_s for one in made.candidates if one.tokenizer == "bpe")
    easier = plan.plan(found, slow, for_s=180, target=1.1 * target).recommended
    assert easier is not None
    assert easier.elapsed_s < best.elapsed_s


def test_a_target_that_nothing_reaches_says_so(found: facts.TextFacts) -> None:
    made = plan.plan(found, here(), for_s=180, target=0.01)
    assert made.candidates == ()
    assert made.recommended is None
    assert "0.01" in made.why


def candidate(preset: str, mid: float, *, fits: bool = True, tokenizer: str = "bpe") -> Candidate:
    expected = Prediction(mid - 0.1, mid, mid + 0.1)
    return dataclasses.replace(laptop(60), preset=preset, tokenizer=tokenizer, fits=fits, expected=expected)


def test_of_presets_that_are_nearly_as_good_the_largest_is_recommended() -> None:
    usual, small = candidate("laptop", 2.0), dataclasses.replace(candidate("laptop-small", 1.8), parameters=900_000)
    near, worse = (dataclasses.replace(candidate("laptop-mini", mid), parameters=500_000) for mid in (1.78, 1.75))
    assert plan.recommended([near, small, usual]) == small
    said = "it is expected to be better than laptop by 10%"
    assert plan.why(small, [near, small, usual], None) == f"{said}, and a smaller one to be better still by no more than 2%"
    assert plan.why(small, [small, usual], None) == said
    assert plan.recommended([worse, small, usual]) == worse


def test_laptop_is_recommended_unless_another_is_clearly_better() -> None:
    usual = candidate("laptop", 2.0)
    assert plan.recommended([usual, candidate("laptop-large", 1.97)]) == usual
    better = candidate("laptop-large", 1.95)
    assert plan.recommended([usual, better]) == better
    assert plan.recommended([usual, dataclasses.replace(better, fits=False)]) == usual
    assert plan.recommended([usual, candidate("gpt2-124m", 1.0, tokenizer="gpt2")]) == usual  # nobody tried it
    by_bytes = [candidate(preset, mid, tokenizer="bytes") for preset, mid in (("laptop", 2.0), ("laptop-mini", 1.9))]
    assert plan.recommended(by_bytes) == by_bytes[1]  # where a tokenizer is named, the sizes are compared with that one
    assert plan.recommended([usual, *by_bytes]) == usual
    short, long = (
        dataclasses.replace(better, expected=Prediction(1.8, 1.9, 2.0, (BEYOND_PHRASES["read_bytes"][is_long],)))
        for is_long in (0, 1)
    )
    assert plan.recommended([usual, short]) == short
    assert plan.recommended([usual, long]) == usual
    hard = BEYOND_PHRASES["difficulty"][True]  # of the text, so of every candidate
    of_hard_text = [
        dataclasses.replace(one, expected=Prediction(*one.expected.range, (*one.expected.beyond, hard)))
        for one in (usual, short, long)
        if one.expected
    ]
    assert plan.recommended(of_hard_text) == of_hard_text[1]
    assert plan.recommended([of_hard_text[0], of_hard_text[2]]) == of_hard_text[0]
    assert plan.recommended([]) is None


def test_the_risk_of_learning_by_heart_grows_with_epochs_and_size() -> None:
    small, large = (cost.parameters(run_config({"preset": name}).model) for name in ("laptop-small", "laptop-large"))
    assert plan.by_heart(1, large, TOKENS) == "low"
    assert plan.by_heart(8, large, TOKENS) == "some"
    assert plan.by_heart(40, large, TOKENS) == "high"
    long_text = dataclasses.replace(TOKENS, training_bytes=1e9)
    assert plan.by_heart(40, small, long_text) == "some"  # it cannot hold a gigabyte


def test_a_text_that_is_longer_than_the_memory_fits_and_counts_as_far_as_it_is_read() -> None:
    """Its ids are mapped from the disk."""
    config = run_config({"preset": "laptop", "batch_size": 16, "steps": 10})
    needed = cost.training_bytes(config.model, cost.micro_batch_size(config.model, 16))
    long_text = dataclasses.replace(TOKENS, training=1e12, training_bytes=3e12)

    def planned(tokens: TokenizedText, free_bytes: int) -> Candidate:
        return plan.of_config(config, tokens, here(free_bytes=free_bytes))

    assert planned(TOKENS, 2 * needed).memory_bytes == needed + 2 * TOKENS.training  # 16 bits an id
    read = planned(long_text, 2 * needed)
    assert read.memory_bytes == needed + 160 * cost.MAPPED_BYTES
    assert read.fits
    assert not planned(long_text, needed).fits  # others use some of it


def test_what_nobody_tried_is_named() -> None:
    assert laptop(40, repeated=0.1).as_dict()["beyond"] == []
    copies = laptop(40, repeated=0.9).expected
    assert copies is not None
    assert copies.beyond == (plan.UNTRIED_TEXT,)
    of_gpt2 = plan.of_preset(TOKENS, "gpt2-124m", 600, here()).expected
    assert of_gpt2 is not None
    assert plan.UNTRIED_RECIPE in of_gpt2.beyond
    for preset, tied, begins, is_untried in (
        ("laptop", True, False, False),
        ("laptop", False, True, True),
        ("laptop-mini", False, True, False),
        ("laptop-mini", True, False, False),
        ("laptop-mini", False, False, True),
    ):
        drawn = {"model.induction_heads": False, "model.table_std": None, "model.table_from_text": False}
        config = run_config({"preset": preset, "model.tied_head": tied, **({} if begins else drawn)})
        assert (plan.UNTRIED_RECIPE in plan.untried(config, TOKENS)) == is_untried


def test_gpt2_is_hinted_at_for_english_prose_only(texts: Path, tmp_path: Path) -> None:
    english = plan.hint(facts.read(sources.read([texts / "the-verdict.txt"])))
    assert english is not None
    assert "hint" in english
    russian = write(tmp_path / "russian.txt", "Однажды весною, в час небывало жаркого заката. " * 200)
    assert plan.hint(facts.read(sources.read([russian]))) is None


def test_tokens_are_counted_from_a_sample_for_each_tokenizer(found: facts.TextFacts) -> None:
    tokens = plan.tokenized(found)
    assert tokens["bytes"].training == pytest.approx(found.training_bytes, rel=0.01)
    assert tokens["bpe"].training < tokens["gpt2"].training < tokens["bytes"].training  # its own words are the longest
    assert plan.bytes_a_token(tokens["bpe"]) > 2


def test_a_measured_shape_is_as_fast_as_it_was_and_another_as_its_operations_say() -> None:
    small, usual, large = (run_config({"preset": name}).model for name in ("laptop-small", "laptop", "laptop-large"))
    found = Speed(((small, 1e-5), (usual, 3e-5)))
    assert found.tokens_per_s(small) == pytest.approx(1e5)
    assert found.tokens_per_s(usual) == pytest.approx(1 / 3e-5)

    def operations(model: ModelConfig) -> float:
        return cost.training_flops(model) + cost.update_flops(model) / UPDATE_TOKENS

    expected = operations(usual) / operations(large) / 3e-5  # by the nearest in width
    assert found.tokens_per_s(large) == pytest.approx(expected)
    tiny = run_config({"preset": "laptop-tiny"}).model
    wide, narrow = (operations(model) * found.tokens_per_s(model) for model in (small, tiny))
    assert narrow == pytest.approx(wide * (tiny.emb_dim / small.emb_dim) ** WIDTH_POWER)
    more_words = dataclasses.replace(usual, vocab_size=4 * usual.vocab_size)
    assert found.tokens_per_s(more_words) < found.tokens_per_s(usual)


def test_a_model_that_drops_numbers_is_slower_whatever_their_share() -> None:
    usual = run_config({"preset": "laptop"}).model
    tenth, fifth = (dataclasses.replace(usual, drop_rate=rate) for rate in (0.1, 0.2))
    found = Speed(((usual, 3e-5),))
    assert found.tokens_per_s(tenth) == found.tokens_per_s(fifth) < found.tokens_per_s(usual)


def test_a_larger_batch_is_faster_by_what_fewer_updates_save() -> None:
    model = run_config({"preset": "laptop"}).model
    found, one = Speed(((model, 5e-5),)), cost.update_flops(model)
    sizes = [1 << n for n in range(8, 20)]
    rates = [found.tokens_per_s(model, size) for size in sizes]
    assert rates == sorted(rates)
    assert rates[sizes.index(UPDATE_TOKENS)] == pytest.approx(1 / 5e-5)  # as it was measured
    seconds = [size / rate for size, rate in zip(sizes, rates, strict=True)]
    flops_per_s = one / (2 * seconds[0] - seconds[1])  # what a step takes that has no token
    assert flops_per_s == pytest.approx((cost.training_flops(model) + one / UPDATE_TOKENS) / 5e-5)


def test_what_more_words_take_is_known_from_a_shape_that_was_measured_with_two_vocabularies() -> None:
    few, some, many = (dataclasses.replace(run_config().model, vocab_size=count) for count in (2000, 5000, 8000))
    found = Speed(((few, 3e-5), (many, 4e-5)))
    assert found.tokens_per_s(few) == pytest.approx(1 / 3e-5)
    assert found.tokens_per_s(many) == pytest.approx(1 / 4e-5)
    assert found.tokens_per_s(some) == pytest.approx(1 / 3.5e-5)
    noise = Speed(((few, 3e-5), (many, 2e-5)))  # more words cannot be faster: each counts by itself
    assert noise.tokens_per_s(dataclasses.replace(some, vocab_size=2500)) < 1 / 3e-5
    assert noise.tokens_per_s(dataclasses.replace(some, vocab_size=9000)) < 1 / 2e-5


@pytest.mark.usefixtures("measured")
def test_plan_says_all_that_it_promises(command: Command, here: Path) -> None:
    write(here / "story.txt", STORY * 20)
    made = command("plan", "story.txt", "--for", "1m", "--json").json
    assert set(made) == {"machine", "text", "candidates", "recommended", "why", "hint", "target_bits_per_byte"}
    assert len(made["candidates"]) == len(plan.CHOICES)
    for one in made["candidates"]:
        assert set(one) >= KEYS
        low, mid, high = one["bits_per_byte"]
        assert 0 < low < mid < high
        assert one["elapsed_s"] == 60
        assert one["steps"] >= 1
    assert made["recommended"] in made["candidates"]
    assert made["text"]["n_bytes"] == len(STORY * 20)
    assert made["text"]["repeated"] > 0.8
    shown = command("plan", "story.txt", "--for", "1m").out
    assert "firstwords train story.txt --for 1m" in shown
    assert "because" in shown
    assert "train refuses it" in command("plan", "story.txt", "--for", "2s").out  # GPT-2's size in two seconds


@pytest.mark.usefixtures("measured")
def test_plan_tells_how_long_a_wish_takes(command: Command, here: Path) -> None:
    write(here / "story.txt", STORY * 20)
    made = command("plan", "story.txt", "--target-bits-per-byte", "0.3", "--json").json
    assert made["target_bits_per_byte"] == 0.3
    assert made["recommended"]["bits_per_byte"][1] <= 0.3 * 1.02  # whole steps
    never = command("plan", "story.txt", "--target-bits-per-byte", "0.001")
    assert never.code == 0
    assert "none of them" in never.out
    assert "tokens/s" not in never.out  # no table without rows
    assert "epochs" not in never.out


@pytest.mark.usefixtures("measured")
def test_the_command_that_a_plan_ends_with_names_all_that_the_plan_is_of(command: Command, here: Path) -> None:
    story = STORY * 20
    (here / "old.txt").write_bytes(story.replace("duck", "dück").encode("cp1252"))
    shown = command("plan", "old.txt", "--encoding", "cp1252", "--target-bits-per-byte", "0.3")
    assert shown.code == 0
    (line,) = [line for line in shown.out.splitlines() if line.startswith("train ")]
    best = command("plan", "old.txt", "--encoding", "cp1252", "--target-bits-per-byte", "0.3", "--json").json["recommended"]
    assert line.endswith(f"--encoding cp1252 --preset {best['preset']}")


def test_a_text_too_short_for_most_presets_is_learnt_by_one_that_can(tmp_path: Path) -> None:
    contexts = [run_config({"preset": preset}).model.context_length for preset in plan.PRESETS]
    assert min(contexts) == SHORTEST_CONTEXT < max(contexts)
    words = " ".join(f"{n * n}" for n in range(190))  # about as many tokens as bytes: no two are alike
    story = write(tmp_path / "story.txt", words)
    made = plan.plan(facts.read(sources.read([write(tmp_path / "part.txt", words[:400])])), here(), for_s=60)
    assert made.recommended is not None
    assert run_config({"preset": made.recommended.preset}).model.context_length == SHORTEST_CONTEXT
    assert "so short a text" in made.why
    given = {"text": (str(story),), "for_s": 60.0}
    asked = asking.new(tmp_path / "run", None, given, lambda source: ({}, b""), ignore_event)
    prepared = preparing.prepare(asked, ignore_event)
    assert SHORTEST_CONTEXT < prepared.train.n_tokens <= max(contexts)
    config, _ = resolve.settle(asked, prepared, difficulty=1.0)
    assert config.model.context_length == SHORTEST_CONTEXT
    named = asking.new(tmp_path / "named", None, {**given, "preset": "laptop"}, lambda source: ({}, b""), ignore_event)
    with pytest.raises(DataError, match="a context of 256"):  # the negative control: what was named is not changed
        preparing.prepare(named, ignore_event)
    with pytest.raises(DataError, match="no candidate"):
        plan.plan(facts.read(sources.read([write(tmp_path / "short.txt", words[:150])])), here(), for_s=60)


def test_plan_refuses_what_it_cannot_plan(refused: Refused, here: Path) -> None:
    write(here / "empty.txt", "")
    write(here / "blank.txt", " \n" * 50)
    write(here / "text.txt", TEXT)
    refused(66, "plan", "no-such-file.txt")
    refused(65, "plan", "empty.txt")
    refused(65, "plan", "blank.txt")
    refused(78, "plan", "text.txt", "--for", "soon")
    refused(78, "plan", "text.txt", "--target-bits-per-byte", "good")
    refused(78, "plan", "text.txt", "--target-bits-per-byte", "0")
    refused(78, "plan", "text.txt", "--target-bits-per-byte", "2", "--for", "3m")


def test_a_run_that_chooses_nothing_takes_what_plan_recommends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Speed(flops_per_s=2e9)  # measured twice, it might stand on either side of what is best for two sizes
    for place, name, value in ((measure, "learning_speed", slow), (resolve, "speed", slow), (measure, "point_now", None)):
        monkeypatch.setattr(place, name, lambda *_, value=value: value)
    story = write(tmp_path / "story.txt", STORY * 10)
    best = api.plan(story, for_s=6).recommended
    assert best is not None
    run = api.train(story, out=tmp_path / "run", for_s=6)
    (start,) = journal(tmp_path / "run", "start")
    wanted = {key: best.as_dict()[key] for key in ("tokenizer", "preset", "batch_size")}
    assert {key: start["predicted"][key] for key in wanted} == wanted
    assert run.predicted is not None
    recorded = (tmp_path / "run/config.toml").read_text()
    assert f'preset = "{best.preset}"' in recorded
    assert f"batch_size = {best.batch_size}" in recorded


def test_another_preset_is_taken_where_it_is_clearly_better_and_none_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = str(write(tmp_path / "story.txt", STORY))
    monkeypatch.setattr(plan, "recommended", lambda candidates: next(c for c in candidates if c.preset == "laptop-small"))

    def settled(**given: Any) -> tuple[str, int]:
        asked = asking.new(
            tmp_path / f"run-{len(given)}", None, {"text": (story,), **given}, lambda source: ({}, b""), ignore_event
        )
        config, _ = resolve.settle(asked, preparing.prepare(asked, ignore_event), difficulty=1.0)
        return config.preset, config.model.emb_dim

    assert settled() == settled(for_s=60.0) == ("laptop-small", 128)
    assert settled(preset="laptop", for_s=60.0) == ("laptop", 192)
    assert settled(steps=3) == ("laptop", 192)
    assert settled(**{"model.n_layers": 3, "for_s": 60.0, "seed": 1}) == ("laptop", 192)


def test_the_size_that_is_taken_is_one_whose_speed_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = str(write(tmp_path / "story.txt", STORY))
    best, measured, point_now = ["laptop-small"], list[str](), measure.point_now

    def spied(config: RunConfig, before: Speed, most_s: float) -> Point | None:
        measured.append(config.preset)
        best[0] = "laptop-mini"  # what the first steps tell makes it the better one
        return point_now(config, before, most_s)

    monkeypatch.setattr(measure, "point_now", spied)
    monkeypatch.setattr(plan, "recommended", lambda candidates: next(c for c in candidates if c.preset == best[0]))
    asked = asking.new(tmp_path / "run", None, {"text": (story,), "for_s": 60.0}, lambda source: ({}, b""), ignore_event)
    config, _ = resolve.settle(asked, preparing.prepare(asked, ignore_event), difficulty=1.0)
    assert config.preset == best[0] == "laptop-mini"
    assert measured == ["laptop-small", "laptop-mini"]


def test_memory_that_the_process_had_before_its_first_step_is_foretold_too(tmp_path: Path) -> None:
    story = str(write(tmp_path / "story.txt", STORY))

    def foretold() -> int:
        asked = asking.new(
            tmp_path / "run", None, {"text": (story,), "preset": "laptop-tiny"}, lambda _: ({}, b""), ignore_event
        )
        return resolve.settle(asked, preparing.prepare(asked, ignore_event), difficulty=1.0)[1].memory_bytes

    taken = foretold() + (64 << 20)  # beyond all that this process had, and all that the model needs
    assert foretold() < taken
    assert len(bytearray(taken)) == taken
    assert foretold() >= taken


def test_a_run_says_before_and_after_what_was_predicted(command: Command, here: Path) -> None:
    write(here / "story.txt", STORY)
    ended = command("train", "story.txt", "--out", "run", *TINY_FLAGS, "--json")
    predicted = ended.json["predicted"]
    assert predicted["steps"] == ended.json["steps"] == 2
    assert ended.json["memory_bytes"] > 100 << 20  # Python with PyTorch
    (start,), (stop,) = journal(here / "run", "start"), journal(here / "run", "stop")
    assert {**start["predicted"], "elapsed_s": 0} == {**predicted, "elapsed_s": 0}
    assert stop["predicted"]["bits_per_byte"] == predicted["bits_per_byte"]
    last = json.loads((here / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["memory_bytes"] > 100 << 20) == ("stop", True)
    shown = command("train", "story.txt", "--out", "again", *TINY_FLAGS)
    assert "plan   about 2 steps" in shown.err
    assert "predicted 2 steps (came to 2)" in shown.out


def test_what_was_predicted_is_kept_by_a_resume_and_dropped_with_another_length(tmp_path: Path) -> None:
    story = write(tmp_path / "story.txt", STORY)
    first = api.train(story, out=tmp_path / "run", steps=4, **TINY)
    same = api.train(out=tmp_path / "run", resume=True)
    assert first.predicted is not None
    assert same.predicted == first.predicted
    longer = api.train(out=tmp_path / "run", resume=True, steps=6)
    assert longer.predicted is None


@pytest.mark.parametrize("longer", [{"for_s": 60.0}, {"steps": 400}], ids=str)
def test_a_longer_run_that_is_killed_is_not_held_against_what_was_predicted_of_the_shorter(
    tmp_path: Path, longer: dict[str, Any]
) -> None:
    story = write(tmp_path / "story.txt", STORY)
    short = {"steps": 4} if "steps" in longer else {"for_s": 4.0}
    assert api.train(story, out=tmp_path / "run", **short, **TINY).predicted is not None

    class KilledError(Exception):
        """Stands for a signal that no process outlives."""

    def killed_after_a_save(event: Event) -> None:
        if isinstance(event, Saved):
            raise KilledError

    with pytest.raises(KilledError):
        api.train(out=tmp_path / "run", resume=True, listener=killed_after_a_save, save_every_s=0.1, **longer)
    assert judging._predicted(RunFolder(tmp_path / "run")) is None
    soon = time.perf_counter() - 58.0  # this process began so long ago: it has two seconds of a minute left
    end = {"steps": journal(tmp_path / "run", "save")[-1]["step"] + 2} if "steps" in longer else {}
    assert api.train(out=tmp_path / "run", resume=True, started_s=soon, **end).predicted is None


def test_nothing_is_predicted_of_a_model_that_learnt_elsewhere(tmp_path: Path) -> None:
    story = write(tmp_path / "story.txt", STORY)
    api.train(story, out=tmp_path / "first", steps=1, **TINY)
    on = api.train(story, out=tmp_path / "on", from_=str(tmp_path / "first"), steps=1, batch_size=2)
    assert on.predicted is not None
    assert on.predicted["bits_per_byte"] is None


@pytest.mark.parametrize(("came", "said"), [(1.5, "(1.500)"), (1.0, "(1.000, better"), (2.5, "(2.500, worse than that)")])
def test_what_came_is_held_against_what_was_predicted(came: float, said: str) -> None:
    predicted = {"steps": 2, "elapsed_s": 3.0, "memory_bytes": None, "bits_per_byte": [1.2, 1.5, 2.0]}
    result = SimpleNamespace(steps=2, elapsed_s=3.0, memory_bytes=None, bits_per_byte=came)
    assert said in plans.comparison(result, predicted)  # type: ignore[arg-type]


def test_plans_are_json_without_infinities(found: facts.TextFacts) -> None:
    made = plan.plan(found, here(), for_s=60).as_dict()
    json.dumps(made, allow_nan=False)
    assert math.isfinite(made["text"]["difficulty"])


def test_a_preset_s_batch_is_the_recipe_s() -> None:
    one = laptop(180)
    model = run_config({"model.vocab_size": TOKENS.vocab_size}).model
    usual = recipe.expected_tokens(180, FAST.tokens_per_s(model), TOKENS.overhead)
    assert one.batch_size == recipe.batch_size(256, usual, TOKENS.training)
    assert recipe.drop_rate(one.epochs, model.emb_dim)
    dropping = dataclasses.replace(model, drop_rate=recipe.drop_rate(one.epochs, model.emb_dim))
    learnt = recipe.expected_tokens(180, FAST.tokens_per_s(dropping, one.batch_size * 256), TOKENS.overhead)
    assert one.steps * one.batch_size * 256 == pytest.approx(learnt, rel=0.01)


def test_a_text_that_no_candidate_could_learn_from_is_refused(here: Path, refused: Refused) -> None:
    write(here / "short.txt", "too short")
    assert "context" in refused(65, "plan", "short.txt")["what"]


def test_a_recipe_of_another_kind_is_named() -> None:
    laptop_s = {"preset": "laptop", "model.tied_head": True}
    assert plan.UNTRIED_RECIPE not in plan.untried(
        run_config(laptop_s, {"optim.peak_lr": 1e-4}), TOKENS
    )  # as for short texts
    for other in ({"model.block": "gpt2"}, {"optim.kind": "adamw"}, {"optim.peak_lr": 1.0}, {"optim.weight_decay": 0.5}):
        assert plan.UNTRIED_RECIPE in plan.untried(run_config(laptop_s, other), TOKENS)


def test_a_size_that_nobody_named_fits_into_the_memory_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is refused, or tried, for being larger than what could be chosen instead."""
    story = str(write(tmp_path / "story.txt", STORY * 20))
    asked = asking.new(
        tmp_path / "run", None, {"text": (story,), "for_s": 36000.0, "device": "cpu"}, lambda _: ({}, b""), ignore_event
    )
    prepared, tried = preparing.prepare(asked, ignore_event), list[str]()

    def spied(config: RunConfig, before: Speed, most_s: float) -> Point | None:
        tried.append(config.preset)
        return None

    monkeypatch.setattr(measure, "point_now", spied)
    large, _ = resolve.settle(asked, prepared, difficulty=1.0)
    assert large.preset != "laptop-tiny"  # the negative control

    def needed(preset: str) -> int:
        model = run_config({"preset": preset, "model.vocab_size": large.model.vocab_size}).model
        rows = (large.batch_size or 1) * large.model.context_length // model.context_length
        return cost.training_bytes(model, cost.micro_batch_size(model, rows), large.precision)

    little = int((needed("laptop-tiny") + needed("laptop-mini")) / 2 / plan.FREE_SHARE)
    monkeypatch.setattr(machine, "memory_bytes", lambda: little)
    monkeypatch.setattr(machine, "free_bytes", lambda: little)
    tried.clear()
    assert resolve.settle(asked, prepared, difficulty=1.0)[0].preset == "laptop-tiny"
    assert set(tried) <= {"laptop-tiny"}
