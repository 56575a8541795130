"""Held-out figures: every token once, from at least half a context, whatever the grouping."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from firstwords.config import ModelConfig
from firstwords.model.gpt import GPTModel
from firstwords.text.batches import Batch, Batches
from firstwords.text.corpus import Part
from firstwords.training import evaluate as evaluation
from firstwords.training.evaluate import evaluate, evaluate_training, windows


def part_of(lengths: list[int], vocab_size: int = 61) -> Part:
    """Documents of so many tokens; `<|endoftext|>` is the last id."""
    random = np.random.default_rng(0)
    ids = [np.concatenate(([vocab_size - 1], random.integers(0, vocab_size - 1, n))) for n in lengths]
    return Part(np.concatenate(ids).astype("<u2"), np.full(vocab_size, 3), n_documents=len(lengths))


@pytest.mark.parametrize("context", [1, 2, 5, 16, 100])
def test_each_target_is_counted_once_and_from_half_a_context_where_its_document_allows(context: int) -> None:
    starts, ends = np.array([0, 30, 31, 60]), np.array([30, 31, 60, 200])
    counted = []
    for window in windows(starts, ends, context):
        assert window.length <= context
        document = max(start for start in starts if start <= window.start)
        for place in range(window.start + window.skip, window.start + window.length):  # the input before each target
            counted.append(place + 1)
            seen = place + 1 - window.start
            assert seen >= min(math.ceil(context / 2), place + 1 - document)
    assert sorted(counted) == [place for a, b in zip(starts, ends, strict=True) for place in range(a + 1, b)]


def test_short_documents_are_judged_many_at_once(small: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = GPTModel(small).eval(), list[int]()
    features = model.features
    monkeypatch.setattr(model, "features", lambda tokens: (calls.append(len(tokens)), features(tokens))[1])
    evaluate(model, part_of([3] * 1000))
    assert sum(calls) == 1000
    assert len(calls) <= 3000 // evaluation.EVALUATED_AT_ONCE + 1


@pytest.mark.parametrize(("step", "asked"), [(0, range(16)), (1, [0]), (5, range(5)), (40, range(24, 40))])
def test_the_training_figure_is_of_the_batches_that_were_learnt_last(
    small: ModelConfig, step: int, asked: Iterable[int]
) -> None:
    seen = list[int]()

    def batch(number: int) -> Batch:
        seen.append(number)
        ids = torch.full((4, 8), number)
        return Batch(ids, ids, 32)

    evaluate_training(GPTModel(small), batch, step, torch.float32)
    assert seen[1:] == list(asked)  # the first tells how large one is


def test_the_figures_are_those_of_one_token_at_a_time(small: ModelConfig) -> None:
    torch.manual_seed(0)
    model, part = GPTModel(small).eval(), part_of([5, 1, 40, 17])
    T, stride, nats = small.context_length, small.context_length // 2, 0.0
    for document in np.split(part.ids.astype(np.int64), np.flatnonzero(part.ids == 60)[1:]):
        for place in range(1, len(document)):
            start = 0 if place <= T else stride * math.ceil((place - T) / stride)
            logits = model(torch.from_numpy(document[start:place])[None])[0, -1]
            nats -= torch.log_softmax(logits, dim=-1)[document[place]].item()
    found = evaluate(model, part)
    assert found is not None
    assert found.nats_per_token == pytest.approx(nats / 63, rel=1e-5)  # float32
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * 63), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / 63), rel=1e-4)
    assert (found.n_tokens, found.n_bytes) == (63, 189)


def test_the_figures_do_not_depend_on_how_many_windows_go_together(
    small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, part, seen = GPTModel(small).eval(), part_of([50, 3, 80]), []
    for tokens in (1, 64, 8192):
        monkeypatch.setattr(evaluation, "EVALUATED_AT_ONCE", tokens)
        seen.append(evaluate(model, part))
    assert all(found is not None for found in seen)
    assert seen[0].nats_per_token == pytest.approx(seen[2].nats_per_token, rel=1e-6)  # order of float32 sums
    assert evaluate(model, part) == seen[2]  # and the same again is the same to the last bit


def test_a_part_that_is_too_long_is_judged_by_an_even_spread_of_it(small: ModelConfig) -> None:
    torch.manual_seed(0)
    model, part = GPTModel(small).eval(), part_of([4000, 3, 6000])
    whole, some = evaluate(model, part), evaluate(model, part, most_tokens=2000)
    assert whole is not None
    assert some is not None
    stride = small.context_length // 2
    assert 2000 - stride <= some.n_tokens <= 2000 + stride
    assert some.n_bytes == 3 * some.n_tokens
    assert some.nats_per_token == pytest.approx(whole.nats_per_token, rel=0.05)  # 2,000 random ids of 10,003
    assert some.nats_per_token != whole.nats_per_token
    assert some == evaluation.of_mean(some.nats_per_token, part, small.context_length, 2000)
    assert evaluate(model, part, most_tokens=10**6) == whole


@pytest.mark.parametrize("context", [1, 2, 5, 16, 100])
@pytest.mark.parametrize("most_tokens", [1, 50, 500])
def test_the_windows_of_a_spread_are_evenly_chosen_of_all_there_are(context: int, most_tokens: int) -> None:
    part = part_of(np.random.default_rng(context).integers(0, 40, 200).tolist())
    starts = np.flatnonzero(part.ids == 60)
    whole = list(windows(starts, np.append(starts[1:], len(part.ids)), context))
    some = evaluation._chosen_windows(part, context, most_tokens)
    places = sorted(whole.index(window) for window in some)  # each is one of them
    assert len(set(places)) == len(places)
    wanted = len(whole) * most_tokens / part.n_tokens
    assert len(places) == max(1, int(wanted))
    assert all(abs(step - len(whole) / wanted) <= 1 for step in np.diff(places))


@pytest.mark.parametrize("lengths", [[4000], [40, 3], [9] * 9])
def test_at_least_one_window_is_judged_however_few_tokens_are_wanted(small: ModelConfig, lengths: list[int]) -> None:
    some = evaluate(GPTModel(small), part_of(lengths), most_tokens=1)
    assert some is not None
    assert 1 <= some.n_tokens <= small.context_length


def test_evaluating_leaves_the_model_in_its_mode_and_without_gradients(small: ModelConfig) -> None:
    model = GPTModel(small).train()
    evaluate(model, part_of([20]))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_part_without_tokens_has_no_figures(small: ModelConfig) -> None:
    assert evaluate(GPTModel(small), Part(np.empty(0, "<u2"), np.ones(61), 0)) is None


def test_held_out_documents_do_not_see_each_other(small: ModelConfig) -> None:
    torch.manual_seed(0)
    model = GPTModel(small).eval()
    alone = [evaluate(model, part_of([n])) for n in (9,)]
    assert alone[0] is not None
    ids = np.concatenate((part_of([9]).ids, part_of([9]).ids))
    twice = evaluate(model, Part(ids, np.full(61, 3), n_documents=2))
    assert twice is not None
    assert twice.nats_per_token == pytest.approx(alone[0].nats_per_token, rel=1e-6)


def test_the_training_loss_is_that_of_the_batches_learnt_last_without_dropout(small: ModelConfig) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(small, drop_rate=0.5)
    model, batches = GPTModel(config).train(), Batches(part_of([900]), small.context_length, batch_size=300, seed=1)
    found = evaluate_training(model, batches, 3, torch.float32)
    model.eval()
    learnt = [batches(step) for step in (2,)]  # one batch of 300 x 16 targets is more than half of what is looked at
    nats = sum(
        torch.nn.functional.cross_entropy(model(b.tokens).flatten(0, 1), b.targets.flatten(), reduction="sum").item()
        for b in learnt
    )
    assert found == pytest.approx(nats / sum(b.n_targets for b in learnt), rel=1e-5)  # float32
