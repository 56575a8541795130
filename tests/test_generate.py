"""What a model says: reproducible, cut by temperature, k and p, and the same with and without the cache."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from conftest import STORY, seeded
from firstwords.config import ModelConfig
from firstwords.errors import ConfigError, DataError, DivergedError
from firstwords.insight.explain import explain
from firstwords.model import generate as generating
from firstwords.model.generate import generate, generate_batch, generate_text_simple, next_probabilities
from firstwords.model.gpt import GPTModel
from firstwords.model.language_model import LanguageModel
from firstwords.model.sampling import Sampling
from firstwords.planning import process
from firstwords.text.tokenizer import byte_tokenizer, train_bpe

# The chapter's nine logits (section 5.3.1) and the probabilities that its text gives for them.
CHAPTER = torch.tensor([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])


@pytest.fixture
def model(small: ModelConfig) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(small).eval()


@pytest.fixture
def lm(small: ModelConfig) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(257, 16, 24, 3, 2, 0.0, block=small.block, init_std=0.3)
    return LanguageModel(GPTModel(config), byte_tokenizer())


def test_a_prompt_may_be_ids_also_ones_that_begin_inside_a_letter(lm: LanguageModel) -> None:
    ids = lm.tokenizer.encode("aé")
    assert lm.generate(ids, max_new_tokens=9) == lm.generate("aé", max_new_tokens=9)
    inside = lm.tokenizer.encode("aébc")[2:]
    assert lm.tokenizer.encode(lm.tokenizer.decode(inside)) != inside  # the negative control: no text gives these ids
    assert len(lm.generate(inside, max_new_tokens=9)) > 0


def test_half_a_character_is_no_text(lm: LanguageModel) -> None:
    for speak in (lm.generate, lambda text: explain(lm, text)):
        with pytest.raises(DataError, match="lone surrogate"):
            speak("some \ud800 text")


def test_a_small_model_speaks_on_one_core_and_leaves_them_as_they_were(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    model.final_norm.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    with process.threads(2):
        next(generate(model, [1], Sampling(), seeded(1)))
        assert (seen, torch.get_num_threads()) == ([1], 2)
        monkeypatch.setattr(generating, "ONE_CORE_PARAMETERS", 1)
        next(generate(model, [1], Sampling(), seeded(1)))
        assert (seen, torch.get_num_threads()) == ([1, 2], 2)  # the negative control: a large one


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(), Sampling(0.7, top_k=9, top_p=0.8)], ids=str)
@pytest.mark.parametrize("prompt_length", [1, 15, 16, 30])
def test_the_cache_never_changes_the_text(model: GPTModel, sampling: Sampling, prompt_length: int) -> None:
    prompt = torch.randint(61, (prompt_length,), generator=seeded(3)).tolist()
    texts = [
        list(islice(generate(model, prompt, sampling, seeded(1), use_cache=use_cache), 40)) for use_cache in (True, False)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0.9, top_k=30, repetition_penalty=1.2)], ids=str)
@pytest.mark.parametrize("lengths", [[3, 1, 9], [12, 2], [40, 5, 16], [7]], ids=str)
def test_prompts_of_different_lengths_go_on_together_as_they_would_alone(
    model: GPTModel, sampling: Sampling, lengths: list[int]
) -> None:
    prompts = [torch.randint(61, (length,), generator=seeded(length)).tolist() for length in lengths]
    batches = generate_batch(model, prompts, sampling, [seeded(row) for row in range(len(prompts))])
    together = list(islice(batches, 30))  # beyond the context of 16 too
    for row, prompt in enumerate(prompts):
        (alone,) = zip(*islice(generate_batch(model, [prompt], sampling, [seeded(row)]), 30), strict=True)
        assert [drawn[row].id for drawn in together] == [drawn.id for drawn in alone]
        logs = [drawn[row].log_probability for drawn in together]
        assert logs == pytest.approx([drawn.log_probability for drawn in alone], abs=1e-5)  # float32


def test_what_pads_a_shorter_prompt_is_seen_by_nothing(model: GPTModel) -> None:
    padding = torch.tensor([3, 0])
    rows = torch.randint(61, (2, 9), generator=seeded(1))
    changed = rows.clone()
    changed[0, :3] = (changed[0, :3] + 1) % 61
    before, after = model.features(rows, None, padding), model.features(changed, None, padding)
    torch.testing.assert_close(before[0, 3:], after[0, 3:])
    torch.testing.assert_close(before[0, 3:], model.features(rows[:1, 3:])[0], atol=1e-5, rtol=1e-5)  # float32
    assert not torch.allclose(model.features(rows)[0, 3:], model.features(changed)[0, 3:])  # without it they are seen


def test_a_drawn_tokens_log_probability_is_the_models_own(model: GPTModel) -> None:
    ids, sampling = [5, 9, 33], Sampling(3.0, top_k=2)
    for (drawn,) in islice(generate_batch(model, [ids], sampling, [seeded(0)]), 10):
        own = torch.log_softmax(model(torch.tensor([ids]))[0, -1], dim=0)
        assert drawn.log_probability == pytest.approx(own[drawn.id].item(), abs=1e-5)  # float32
        ids.append(drawn.id)


def test_greedy_is_what_the_chapters_function_says_also_beyond_the_context(model: GPTModel) -> None:
    prompt = [5, 9, 33]
    theirs = generate_text_simple(model, torch.tensor([prompt]), 40, model.config.context_length)[0, 3:].tolist()
    assert list(islice(generate(model, prompt, Sampling(0), seeded(0)), 40)) == theirs


def test_the_chapters_probabilities_at_its_temperatures_and_k() -> None:
    assert next_probabilities(CHAPTER, Sampling(5.0))[6].item() == pytest.approx(0.0430, abs=5e-5)
    top3 = next_probabilities(CHAPTER, Sampling(1.0, top_k=3))
    assert top3[top3 > 0].tolist() == pytest.approx([0.0615, 0.5775, 0.3610], abs=5e-5)


def test_a_thousand_draws_are_the_chapters() -> None:
    counts = {}
    for temperature in (1.0, 0.1, 5.0):
        torch.manual_seed(123)
        probabilities = next_probabilities(CHAPTER, Sampling(temperature))
        drawn = torch.tensor([torch.multinomial(probabilities, 1).item() for _ in range(1000)])
        counts[temperature] = drawn.bincount(minlength=9).tolist()
    assert counts[1.0] == [73, 0, 0, 582, 2, 0, 0, 343, 0]
    assert (counts[0.1][3], counts[0.1][7]) == (985, 15)
    assert counts[5.0] == [165, 75, 42, 239, 71, 46, 32, 227, 103]


@pytest.mark.parametrize(("k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 0]), (4, [1, 3, 0, 2]), (5, [1, 3, 0, 2, 4])])
def test_top_k_keeps_k_also_where_several_are_as_likely(k: int, kept: list[int]) -> None:
    left = next_probabilities(torch.tensor([1.0, 2.0, 1.0, 2.0, 0.0]), Sampling(1.0, top_k=k))
    assert sorted(left.nonzero().flatten().tolist()) == sorted(kept)


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    probabilities = torch.tensor([0.5, 0.2, 0.2, 0.06, 0.04])
    for top_p, kept in ((0.5, 1), (0.51, 2), (0.7, 2), (0.9, 3), (0.91, 4), (1.0, 5), (1e-6, 1)):
        left = next_probabilities(probabilities.log(), Sampling(1.0, top_p=top_p))
        assert int((left > 0).sum()) == kept, top_p
        assert left.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_without_finite_logits_says_nothing(model: GPTModel, temperature: float) -> None:
    with torch.no_grad():
        model.final_norm.scale[0] = torch.nan
    with pytest.raises(DivergedError, match="no probabilities"):
        next(generate(model, [5], Sampling(temperature), seeded(0)))


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-38, 1e-7, 1e-5])
def test_zero_temperature_takes_the_likeliest_and_so_does_what_is_next_to_it(model: GPTModel, temperature: float) -> None:
    sampling = Sampling(temperature)
    assert next_probabilities(CHAPTER, sampling).tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert next(generate(model, [5], sampling, seeded(0))) == next(generate(model, [5], Sampling(0), seeded(0)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 2},
        {"min_p": 0},
        {"min_p": 1.1},
        {"repetition_penalty": 0.9},
    ],
)
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [[], [61], [-1]])
def test_a_prompt_without_tokens_or_beyond_the_vocabulary_is_refused(model: GPTModel, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match="token"):
        next(generate(model, prompt, Sampling(), seeded(0)))


def test_a_seed_decides_the_text_and_streaming_gives_the_same(lm: LanguageModel) -> None:
    texts = [lm.generate("Once", max_new_tokens=50, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert "".join(lm.stream("Once", max_new_tokens=50, seed=1)) == texts[0]


def test_a_long_prompt_is_cut_to_its_end_with_a_notice(lm: LanguageModel) -> None:
    told: list[str] = []
    long = "".join(lm.stream("x" * 50 + "0123456789abcdef", max_new_tokens=20, notice=told.append))
    assert "66 tokens" in told[0]
    assert long == lm.generate("0123456789abcdef", max_new_tokens=20)


def say(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    monkeypatch.setattr("firstwords.model.language_model.generate", lambda *args, **kwargs: iter(ids))


def test_the_text_ends_at_the_end_of_text(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, [*b"abc", 256, *b"def"])
    assert lm.generate("x") == "abc"


def test_streaming_never_splits_a_character(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, [*"é漢👩".encode()])
    pieces = list(lm.stream("x", max_new_tokens=9))
    assert [piece for piece in pieces if piece] == ["é", "漢", "👩"]


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="257"):
        LanguageModel(GPTModel(ModelConfig(100, 16, 24, 3, 1)), byte_tokenizer())


@pytest.mark.parametrize("text", ["The duck said 9.", STORY[:100]])
def test_explaining_gives_each_tokens_probability_rank_and_the_models_choices(lm: LanguageModel, text: str) -> None:
    found = explain(lm, text)
    ids, T = lm.tokenizer.encode(text), 16
    assert [token.id for token in found.tokens] == ids
    assert found.tokens[0].probability is None
    for place in range(1, len(ids)):
        start = 0 if place <= T else 8 * -(-(place - T) // 8)
        row = torch.softmax(lm.model(torch.tensor([ids[start:place]]))[0, -1].detach(), dim=-1)
        token = found.tokens[place]
        assert token.probability == pytest.approx(row[ids[place]].item(), rel=1e-4)  # float32
        assert token.rank == int((row > row[ids[place]]).sum()) + 1
        assert [guess.id for guess in token.top] == row.topk(5).indices.tolist()
    logs = [token.log_probability for token in found.tokens[1:]]
    assert found.evaluation.nats_per_token == pytest.approx(-sum(logs) / len(logs))  # type: ignore[arg-type]
    assert found.evaluation.n_bytes == len(text.encode()) - 1


def test_explaining_shows_parts_of_characters_without_failing() -> None:
    tokenizer = train_bpe([STORY], 300)
    lm = LanguageModel(GPTModel(ModelConfig(300, 16, 24, 3, 1)), tokenizer)
    assert len(explain(lm, "漢字").tokens) == 6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("amx", [False, True])
def test_a_rounded_layer_gives_one_row_what_it_gives_several(amx: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "has_amx", lambda: amx)
    layers = [torch.nn.Linear(64, 48, bias=bias), torch.nn.Linear(64, 16, bias=bias)]
    rounded = generating.RoundedLinear(layers, torch.bfloat16, packed=False)
    x = torch.randn(1, 3, 64, generator=seeded(0))
    several = rounded(x)
    assert several.shape == (1, 3, 64)
    with generating._as_one_row_is_read(1):
        for place in range(3):
            one = rounded(x[:, place : place + 1])
            # Sums of 64 in another order, rounded to 8 bits; with a bias twice by one of the ways.
            torch.testing.assert_close(one, several[:, place : place + 1], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("amx", [False, True])
def test_one_text_and_several_are_read_in_their_own_way_and_say_the_same_within_bfloat16(
    amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row PyTorch's own products are taken, or oneDNN's with a vector, of several oneDNN's with matrices.

    All sum in float32 and round once.
    """
    monkeypatch.setattr(generating, "has_amx", lambda: amx)
    torch.manual_seed(0)
    lm = LanguageModel(GPTModel(ModelConfig(257, 32, 48, 3, 2)).eval(), byte_tokenizer(), dtype=torch.bfloat16)
    mkldnn: Any = torch.backends.mkldnn
    before, greedy = mkldnn.enabled, Sampling(0)
    for token in range(20):
        (alone,) = next(generate_batch(lm._in_precision(several=False), [[token]], greedy, [seeded(0)]))
        assert mkldnn.enabled == before  # between tokens everything is as it was
        first, second = next(generate_batch(lm._in_precision(several=True), [[token]] * 2, greedy, [seeded(0), seeded(1)]))
        assert first == second
        # Logits of up to 4 are rounded to 2^-7 of them; where two words are so near, either may be the likeliest.
        assert alone.log_probability == pytest.approx(first.log_probability, abs=0.03)


def test_the_copy_that_speaks_is_made_once_and_follows_the_weights(small: ModelConfig) -> None:
    torch.manual_seed(0)
    config = ModelConfig(257, 16, 24, 3, 2, 0.5, block=small.block, init_std=0.3)
    lm = LanguageModel(GPTModel(config).eval(), byte_tokenizer(), dtype=torch.bfloat16)
    greedy = Sampling(0)
    said = lm.generate("a", max_new_tokens=20, sampling=greedy)
    made = lm._in_precision(several=False)
    assert lm.generate("a", max_new_tokens=20, sampling=greedy) == said
    assert lm._in_precision(several=False) is made
    with torch.no_grad():
        lm.model.out_head.weight.neg_()
    changed = lm.generate("a", max_new_tokens=20, sampling=greedy)
    assert changed != said
    assert changed == LanguageModel(lm.model, lm.tokenizer, dtype=torch.bfloat16).generate(
        "a", max_new_tokens=20, sampling=greedy
    )
    lm.model.train()  # dropout of a half must not be heard, and no copy is kept of weights that change
    assert lm.generate("a", max_new_tokens=20, sampling=greedy) == changed
    assert lm.model.training


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    whole = torch.softmax(CHAPTER, dim=0)
    for p in (0.01, 0.3, 1.0):
        found = next_probabilities(CHAPTER, Sampling(1.0, min_p=p))
        kept = whole >= p * whole.max()
        assert torch.equal(found > 0, kept)
        assert torch.allclose(found[kept], whole[kept] / whole[kept].sum())


def test_the_repetition_penalty_makes_seen_tokens_less_likely_and_no_other_more_than_their_share() -> None:
    seen = [3, 2, 3]  # one with a positive and one with a negative logit
    before, after = torch.softmax(CHAPTER, 0), next_probabilities(CHAPTER, Sampling(1.0, repetition_penalty=1.5), seen)
    assert all(after[i] < before[i] for i in seen)
    others = [i for i in range(len(CHAPTER)) if i not in seen]
    ratio = after[others] / before[others]
    assert torch.allclose(ratio, ratio[0].expand(len(others)))  # their order and distances stay
    assert torch.allclose(next_probabilities(CHAPTER, Sampling(1.0, repetition_penalty=1.0), seen), before)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_text_ends_the_text_before_it_and_nothing_of_it_is_let_out(lm: LanguageModel, length: int) -> None:
    whole = lm.generate("a", max_new_tokens=60)
    stop = whole[20 : 20 + length]
    pieces = list(lm.stream("a", max_new_tokens=60, stop=[stop, "never said"]))
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert lm.generate("a", max_new_tokens=60, stop=["never said", whole[-1] + "x"]) == whole
    assert lm.generate("a", max_new_tokens=60, stop=stop) == "".join(pieces)  # one by itself, and not each of its letters
    assert [one.text for one in lm.generate_batch(["a"], max_new_tokens=60, stop=stop)] == ["".join(pieces)]


def test_an_empty_stop_text_is_refused(lm: LanguageModel) -> None:
    for speak in (lm.generate, lambda prompt, stop: list(lm.generate_batch([prompt], stop=stop))):
        with pytest.raises(ConfigError, match="is empty"):
            speak("a", stop=["b", ""])


def test_a_batch_of_texts_is_what_each_prompt_says_alone(lm: LanguageModel) -> None:
    prompts = ["Once", "", "A longer beginning", "x" * 40, "y", "z", "0", "1", "2", "3"]
    whole = lm.generate(prompts[2], max_new_tokens=40, seed=2)
    letter = next(letter for letter in whole if letter.isascii())
    for stop in ((), (letter,)):
        said = list(lm.generate_batch(prompts, max_new_tokens=40, seeds=range(len(prompts)), stop=stop))
        wanted = [lm.generate(prompt, max_new_tokens=40, seed=seed, stop=stop) for seed, prompt in enumerate(prompts)]
        assert [one.text for one in said] == wanted
    assert bytes([said[2].tokens[-1].id]) == letter.encode()  # nothing is kept of what is drawn after an end
    assert len(said[2].tokens) <= 40
