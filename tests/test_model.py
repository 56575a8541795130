"""The model: what it may see, what it is made of, and what it costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from conftest import seeded
from firstwords.config import ModelConfig, run_config
from firstwords.errors import ConfigError
from firstwords.model import cost
from firstwords.model.functional import rotate
from firstwords.model.gpt import GPTModel, KVCache, rotary_angles, uninitialised


def model_of(config: ModelConfig) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(config).eval()


def some_tokens(config: ModelConfig, B: int = 2, T: int = 9) -> torch.Tensor:
    return torch.randint(config.vocab_size, (B, T), generator=seeded(1))


def test_changing_a_token_never_changes_earlier_logits_and_does_change_later_ones(small: ModelConfig) -> None:
    model, tokens = model_of(small), some_tokens(small)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % small.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_logits_do_not_depend_on_what_else_is_in_the_batch(small: ModelConfig) -> None:
    model, tokens = model_of(small), some_tokens(small, B=3)
    torch.testing.assert_close(model(tokens)[1:2], model(tokens[1:2]))


@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 5], [3, 1, 1, 4]])
def test_features_through_the_cache_equal_those_of_the_whole(small: ModelConfig, cuts: list[int]) -> None:
    model, tokens = model_of(small), some_tokens(small)
    cache = KVCache(small)
    parts = [model.features(part, cache) for part in tokens.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.features(tokens))  # float32 rounding


def test_more_tokens_than_the_context_are_refused(small: ModelConfig) -> None:
    with pytest.raises(ValueError, match="at most 16"):
        model_of(small)(some_tokens(small, T=17))


def test_a_tied_head_is_the_token_table_itself(small: ModelConfig) -> None:
    tied = model_of(dataclasses.replace(small, tied_head=True))
    untied = model_of(dataclasses.replace(small, tied_head=False))
    assert tied.out_head.weight is tied.tok_emb.weight
    assert untied.out_head.weight is not untied.tok_emb.weight


def test_rotating_keeps_lengths_and_makes_products_depend_on_the_distance_alone() -> None:
    config = ModelConfig(context_length=12, emb_dim=8, n_heads=1, block="qwen3")
    cos, sin = rotary_angles(config)
    q, k = torch.randn(2, 8, generator=seeded(2)).expand(12, 2, 8).unbind(1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    torch.testing.assert_close(q.norm(dim=-1), q[0].norm().expand(12))
    products = q @ k.T  # (12, 12): equal along each diagonal
    for distance in range(-11, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-4)  # float32 angles


def test_dropout_acts_in_training_only(small: ModelConfig) -> None:
    model, tokens = model_of(dataclasses.replace(small, drop_rate=0.5)), some_tokens(small)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_gpt2s_initialisation_scales_what_adds_to_the_residual_stream() -> None:
    model = model_of(ModelConfig(vocab_size=500, context_length=64, emb_dim=128, n_heads=4, n_layers=8, init_std=0.02))
    ratio = float((model.trf_blocks[0].att.out_proj.weight.std() / model.trf_blocks[0].att.W_query.weight.std()).detach())
    assert ratio == pytest.approx(1 / 4, rel=0.03)  # 1 / sqrt(2 * 8), of 16,384 draws


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("init_std", [None, 0.02])
def test_a_table_begins_as_loud_as_is_wanted_and_all_else_as_ever(
    small: ModelConfig, init_std: float | None, *, tied_head: bool
) -> None:
    usual = dataclasses.replace(small, vocab_size=500, init_std=init_std, tied_head=tied_head)
    plain, loud = (model_of(config).state_dict() for config in (usual, dataclasses.replace(usual, table_std=0.3)))
    changed = {name for name, weight in loud.items() if not torch.equal(weight, plain[name])}
    assert changed == {"tok_emb.weight"} | ({"out_head.weight"} if tied_head else set())
    assert float(loud["tok_emb.weight"].std()) == pytest.approx(0.3, rel=0.05)  # of 8,000 draws


def test_bfloat16_autocast_stays_near_float32(small: ModelConfig) -> None:
    model, tokens = model_of(small), some_tokens(small)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens).float()
    exact = model(tokens)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()  # bfloat16 keeps 8 bits: 0.4 % a product, a few products


def test_an_uneven_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="even"):
        ModelConfig(emb_dim=9, n_heads=3, block="qwen3")


def test_estimates_grow_with_what_they_estimate() -> None:
    small, large = run_config().model, run_config({"preset": "laptop-large"}).model
    assert cost.training_bytes(small, 8) < cost.training_bytes(small, 16) < cost.training_bytes(large, 16)
    assert cost.micro_batch_size(small, 48) in (16, 24)
    on_gpus = [cost.micro_batch_size(run_config({"preset": "gpt2-124m"}).model, 64, gb << 30) for gb in (1, 8, 24, 80, 140)]
    assert on_gpus == sorted(on_gpus)
    assert on_gpus[0] == 1
    assert on_gpus[-1] == cost.MOST_GPU_TOKENS // 1024
    chunks = [cost.chunk_bytes(1 << n) for n in range(18, 32)]
    assert chunks == sorted(chunks)
    assert (chunks[0], chunks[-1]) == (cost.FEWEST_CHUNK_BYTES, cost.MOST_CHUNK_BYTES)


@pytest.mark.parametrize("preset", [None, "laptop-mini"])
@pytest.mark.parametrize("init_std", [None, 0.02])
def test_a_model_that_is_to_be_filled_is_built_without_drawing_a_number(
    small: ModelConfig, init_std: float | None, preset: str | None
) -> None:
    shape = run_config({"preset": preset, "model.vocab_size": 300}).model if preset else small
    config = dataclasses.replace(shape, init_std=init_std)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = uninitialised(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config == config
    drawn = GPTModel(config)
    assert not torch.equal(torch.get_rng_state(), before)  # the negative control
    shapes = {name: tensor.shape for name, tensor in drawn.named_parameters()}  # a tied head is named once
    assert {name: tensor.shape for name, tensor in model.named_parameters()} == shapes
    assert all(torch.equal(own, other) for own, other in zip(model.buffers(), drawn.buffers(), strict=True))


def test_probabilities_that_attention_keeps_count_for_the_memory_of_long_contexts() -> None:
    config = run_config({"preset": "laptop", "model.drop_rate": 0.0}).model
    long = dataclasses.replace(config, context_length=32 * cost.SHORT_CONTEXT)  # as many tokens as 32 short sequences have
    # Of each token and each head half of the context, beyond what short contexts have, in two bytes.
    kept = 2 * config.n_layers * config.n_heads * long.context_length * (long.context_length - cost.SHORT_CONTEXT) // 2
    assert cost.training_bytes(long, 1, "bfloat16") - cost.training_bytes(config, 32, "bfloat16") == kept
    assert cost.training_bytes(long, 1, "float32") == cost.training_bytes(config, 32, "float32")  # it keeps none
    gpt2 = run_config({"preset": "gpt2-124m"}).model
    dropped, whole = (cost.attention_bytes(dataclasses.replace(gpt2, drop_rate=rate), 2) for rate in (0.1, 0.0))
    assert dropped == 2 * whole > 0  # those that are left, too
