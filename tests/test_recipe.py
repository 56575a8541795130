"""What a run is made of when nobody says."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from conftest import STORY
from firstwords import api
from firstwords.config import run_config
from firstwords.insight import memorisation
from firstwords.planning import budget, recipe
from firstwords.planning.recipe import FIRST_TOKENS, HELD_OUT_TOKENS, Overhead, held_out_tokens
from firstwords.training.evaluate import cost_in_tokens

UNSEEN: dict[str, Any] = {"report": False, "meter": False, "eval_every": 10**6}  # nobody looks at what was learnt


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """What the runs in a folder recorded, by their names."""
    return {path.parent.name: tomllib.loads(path.read_text()) for path in folder.glob("*/config.toml")}


def test_longer_runs_take_larger_batches() -> None:
    sizes = [recipe.batch_size(256, 10.0**n) for n in range(1, 12)]
    assert sizes == sorted(sizes)
    assert sizes[0] * 256 == recipe.FEWEST_TOKENS
    assert sizes[-1] * 256 > 100 * recipe.BATCH_TOKENS


def test_the_chapter_s_recipe_is_judged_by_no_more_than_the_chapter_judges_by() -> None:
    """Five batches of two sequences; of a long text, a run would else do little but judge itself every five steps."""
    config = run_config({"preset": "chapter"})
    assert held_out_tokens(5, config) == 5 * (config.batch_size or 0) * config.model.context_length
    assert held_out_tokens(5, dataclasses.replace(config, eval_tokens=None)) > 10_000  # the negative control


def test_a_text_that_is_read_on_and_on_is_read_in_batches_as_if_it_were_read_a_few_times() -> None:
    few = recipe.batch_size(256, recipe.FRESH_EPOCHS * 1e6)
    assert recipe.batch_size(256, 100e6, 1e6) == few < recipe.batch_size(256, 100e6, 100e6)
    assert recipe.batch_size(256, 1e6, 1e6) == recipe.batch_size(256, 1e6)


@pytest.mark.parametrize("context_length", [1, 32, 256, 1000, 2**20])
def test_a_batch_has_a_sequence_and_about_the_same_tokens_whatever_the_context(context_length: int) -> None:
    rows = recipe.batch_size(context_length, None)
    assert rows >= 1
    assert rows & (rows - 1) == 0  # a power of two divides into micro-batches
    assert rows == 1 or recipe.BATCH_TOKENS / 1.5 < rows * context_length < recipe.BATCH_TOKENS * 1.5


def test_more_time_is_more_tokens_in_proportion_and_evaluations_take_theirs() -> None:
    once, twice, thrice = (recipe.expected_tokens(seconds, 1e4, Overhead(0)) for seconds in (600, 1200, 1800))
    assert thrice - twice == pytest.approx(twice - once, rel=0.01)  # evaluations are whole
    assert once > 0
    assert recipe.expected_tokens(600, 1e4, Overhead(50_000)) < once
    assert recipe.expected_tokens(600, 1e4, Overhead(0, start_s=recipe.START_S + 100)) == pytest.approx(once - 100 * 1e4)


def test_evaluations_of_a_named_rhythm_take_their_time() -> None:
    overhead, rate = Overhead(50_000), 1e4
    each_s = recipe.evaluation_s(600, rate, overhead.held_out_tokens)
    seldom, often = (recipe.expected_tokens(600, rate, overhead, every) for every in (math.inf, 1e4))
    assert seldom / rate + each_s == pytest.approx(often / rate + often / 1e4 * each_s)  # one is after the last step
    assert often < recipe.expected_tokens(600, rate, overhead) < seldom


def test_looking_up_in_a_long_text_what_the_model_says_takes_time_that_it_does_not_learn_in() -> None:
    short, long, longer = (recipe.expected_tokens(120, 1e4, Overhead(0, text_bytes=size)) for size in (1e6, 5e7, 1e10))
    assert long == pytest.approx(short - 1e4 * memorisation.memorisation_s(5e7))
    assert longer == short  # a run of two minutes does not look in so long a text


def test_a_slow_machine_or_a_short_run_judges_itself_by_fewer_tokens() -> None:
    assert recipe.eval_tokens(75, 25_000) == HELD_OUT_TOKENS
    slow, short = recipe.eval_tokens(75, 2500), recipe.eval_tokens(10, 25_000)
    assert recipe.FEWEST_HELD_OUT <= slow < HELD_OUT_TOKENS
    assert recipe.FEWEST_HELD_OUT <= short < HELD_OUT_TOKENS
    assert recipe.eval_tokens(1, 1) == recipe.FEWEST_HELD_OUT
    for seconds, tokens_per_s in ((75, 2500), (10, 25_000), (180, 5000)):
        share = recipe.evaluation_s(seconds, tokens_per_s, 1e6) / seconds
        assert share < recipe.EVALUATION_SHARE + recipe.SPOKEN_S / seconds + 0.001  # of the training tokens overhead it


@pytest.mark.parametrize("steps", [1, 7, 20, 100, 2000])
@pytest.mark.parametrize("held_out_tokens", [0, FIRST_TOKENS, 30_000, HELD_OUT_TOKENS])
def test_a_run_of_known_length_spends_little_of_its_time_on_evaluations(steps: int, held_out_tokens: int) -> None:
    config = run_config({"steps": steps, "batch_size": 16})  # of 256 tokens each
    every = recipe.eval_every(config, held_out_tokens)
    assert every is not None
    evaluations = math.ceil(steps / every)
    assert 1 <= evaluations <= budget.MOST_EVALUATIONS + 1  # what does not divide has one more, at its end
    if held_out_tokens > FIRST_TOKENS and evaluations > 1:
        assert (evaluations - 1) * cost_in_tokens(
            held_out_tokens
        ) <= 1.1 * recipe.ALL_EVALUATIONS_SHARE * steps * 4096  # whole steps
    if steps >= 2000:  # which has the time for all of them
        assert every == steps // budget.MOST_EVALUATIONS
    assert recipe.eval_every(dataclasses.replace(config, eval_every=3), held_out_tokens) == 3
    assert recipe.eval_every(dataclasses.replace(config, steps=None, for_s=60.0), held_out_tokens) is None


def test_the_time_of_a_run_of_known_length_counts_each_evaluation() -> None:
    rate, overhead = 1e4, Overhead(1e6, start_s=3.0)
    once, twice = (recipe.steps_s(1e5, rate, overhead, evaluations, HELD_OUT_TOKENS) for evaluations in (1, 2))
    assert twice - once == pytest.approx(recipe.SPOKEN_S + cost_in_tokens(HELD_OUT_TOKENS) / rate)
    longer = recipe.steps_s(2e5, rate, overhead, 1, HELD_OUT_TOKENS)
    assert longer - once == pytest.approx(1e5 / rate)


@pytest.mark.parametrize("seconds", [30.0, 180.0, 3600.0])
@pytest.mark.parametrize("held_out_tokens", [0, 50_000])
@pytest.mark.parametrize("text_bytes", [0, 5e7])
def test_the_time_that_tokens_take_is_the_inverse_of_the_tokens_that_a_time_gives(
    seconds: float, held_out_tokens: int, text_bytes: float
) -> None:
    overhead = Overhead(held_out_tokens, text_bytes)
    tokens = recipe.expected_tokens(seconds, 2e4, overhead)
    assert recipe.elapsed_s(tokens, 2e4, overhead) == pytest.approx(seconds, rel=0.09)  # the share of evaluations


def test_a_text_that_is_read_often_is_learnt_with_more_dropout() -> None:
    rates = [recipe.drop_rate(epochs, 192) for epochs in (0.1, 1, 5, 10, 100, 10_000)]
    assert rates == sorted(rates)
    assert (rates[0], rates[1]) == (0, 0)
    assert rates[-1] == recipe.MOST_DROPPED > rates[3] > rates[2]


def test_a_narrow_model_drops_less() -> None:
    rates = [recipe.drop_rate(20, channels) for channels in (64, 96, 128, 192)]
    assert rates[0] < rates[1] < rates[2] == rates[3]


def test_dropout_follows_the_epochs_where_nobody_named_it(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    shape = {"emb_dim": 16, "n_heads": 2, "n_layers": 1, "ff_dim": 16, "context_length": 64}
    named = {**shape, "drop_rate": 0.05}
    for name, epochs, model in (("once", 1.0, shape), ("often", 40.0, shape), ("named", 40.0, named)):
        config = {"tokenizer": "bpe:300", "batch_size": 32, "model": model, **UNSEEN}
        api.train(tmp_path / "story.txt", out=tmp_path / name, epochs=epochs, **config)
    found = {
        path.parent.name: tomllib.loads(path.read_text())["model"]["drop_rate"] for path in tmp_path.glob("*/config.toml")
    }
    assert found == {"once": 0.0, "often": recipe.drop_rate(40, 16), "named": 0.05}


def test_a_text_that_is_read_very_often_is_learnt_more_slowly(tmp_path: Path) -> None:
    fast = recipe.FAST_EPOCHS
    assert [recipe.peak_lr_share(epochs) for epochs in (0.0, 1.0, fast, 2 * fast, 10 * fast)] == [1, 1, 1, 0.5, 0.1]
    (tmp_path / "story.txt").write_text(STORY)
    shape = {"emb_dim": 16, "n_heads": 2, "n_layers": 1, "ff_dim": 16, "context_length": 64}
    found, often = {}, 2.0 * fast
    for name, epochs, optim in (("once", 1.0, {}), ("often", often, {}), ("named", often, {"peak_lr": 1e-3})):
        config = {"tokenizer": "bpe:300", "batch_size": 32, "model": shape, "optim": optim, **UNSEEN}
        api.train(tmp_path / "story.txt", out=tmp_path / name, epochs=epochs, **config)
        found[name] = tomllib.loads((tmp_path / name / "config.toml").read_text())["optim"]["peak_lr"]
    assert found["often"] == pytest.approx(found["once"] / 2, rel=0.1)  # whole batches are not whole epochs
    assert found["named"] == 1e-3
    api.train(out=tmp_path / "often", resume=True, epochs=90.0)  # what was decided once is not decided again
    assert tomllib.loads((tmp_path / "often" / "config.toml").read_text())["optim"]["peak_lr"] == found["often"]


def test_a_run_records_the_batch_that_was_decided_and_one_that_was_given_stays(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    shape = {"tokenizer": "bytes", "model": {"emb_dim": 16, "n_heads": 2, "n_layers": 1, "ff_dim": 16, "context_length": 8}}
    for name, given in (("decided", {"steps": 1}), ("epochs", {"epochs": 0.2}), ("given", {"steps": 1, "batch_size": 3})):
        api.train(tmp_path / "story.txt", out=tmp_path / name, **given, **shape)  # type: ignore[arg-type]
    assert {name: config["batch_size"] for name, config in configs(tmp_path).items()} == {
        "decided": recipe.batch_size(8, None, len(STORY)),
        "epochs": recipe.batch_size(8, 1.0),
        "given": 3,
    }
