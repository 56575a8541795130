"""The two heads that a model begins with: they copy at once, and leave the weights of the others as they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from firstwords.config import ModelConfig, run_config
from firstwords.model import induction, neighbours
from firstwords.model.functional import rotate
from firstwords.model.gpt import GPTModel

LAPTOP = dataclasses.replace(run_config({"preset": "laptop"}).model, vocab_size=500)
OTHERS = ("laptop-tiny", "laptop-mini", "laptop-small", "laptop-large")
CASES = {
    "laptop": LAPTOP,
    **{name: dataclasses.replace(run_config({"preset": name}).model, vocab_size=500) for name in OTHERS},
    "short context": dataclasses.replace(LAPTOP, context_length=64),
    "one head": dataclasses.replace(LAPTOP, n_heads=1),
    "an output head of its own": dataclasses.replace(LAPTOP, tied_head=False),
}


def drawn(config: ModelConfig, *, seed: int = 7) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel(config).eval()


@torch.no_grad()
def gained(model: GPTModel, seed: int) -> float:
    """Return by how many nats a token of random ids is likelier where the same ids stand once before."""
    T, generator = model.config.context_length, torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (8, T // 2), generator=generator).repeat(1, 2)
    nats = F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")
    return float(nats[:, : T // 2 - 1].mean() - nats[:, T // 2 :].mean())


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_new_model_finds_what_followed_when_the_last_token_stood_there_before(config: ModelConfig, seed: int) -> None:
    # In ten seeds: at least 0.22 with the heads, at most 0.02 to either side without.
    assert gained(drawn(config, seed=seed), seed) > 0.2
    assert abs(gained(drawn(dataclasses.replace(config, induction_heads=False), seed=seed), seed)) < 0.1


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_the_heads_copy_from_a_table_that_begins_with_what_its_text_says(config: ModelConfig) -> None:
    model, ids = drawn(config), np.random.default_rng(1).zipf(1.2, 50_000) % config.vocab_size
    neighbours.mix_into_embedding(model, neighbours.directions(ids, config, seed=1))
    assert gained(model, seed=1) > 0.2
    shares = shares_of_the_first_head(model)
    assert bool((shares[1:].argmax(-1) == torch.arange(len(shares) - 1)).all())


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_the_first_head_looks_at_the_token_before(config: ModelConfig) -> None:
    """The second could copy something without: what stands where the token at hand stood before."""
    shares = [shares_of_the_first_head(drawn(one)) for one in (config, dataclasses.replace(config, induction_heads=False))]
    assert [float(each.diagonal(-1).mean()) > 0.5 for each in shares] == [True, False]
    assert bool((shares[0][1:].argmax(-1) == torch.arange(len(shares[0]) - 1)).all())


@torch.no_grad()
def shares_of_the_first_head(model: GPTModel, tokens: int = 64) -> torch.Tensor:
    """Return how much the first head of block 1 looks at each of some random ids, (T, T)."""
    block, ids = model.trf_blocks[0], torch.randint(model.config.vocab_size, (1, tokens))
    x, D = block.norm1(model.tok_emb(ids)), model.config.head_dim
    q, k = block.att.query_norm(block.att.W_query(x)[..., :D]), block.att.key_norm(block.att.W_key(x)[..., :D])
    angles = model.rotary_cos[:tokens], model.rotary_sin[:tokens]
    scores = (rotate(q[None], *angles) @ rotate(k[None], *angles).mT)[0, 0] / D**0.5
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)


def test_what_the_heads_do_not_need_is_as_it_was_drawn() -> None:
    plain = drawn(dataclasses.replace(LAPTOP, induction_heads=False)).state_dict()
    copying = drawn(LAPTOP).state_dict()
    changed = {name for name, weight in copying.items() if not torch.equal(weight, plain[name])}
    heads = {f"trf_blocks.{block}.att.{name}" for block in (0, 1) for name in ("W_query.weight", "W_key.weight")}
    heads |= {f"trf_blocks.{block}.att.{name}" for block in (0, 1) for name in ("W_value.weight", "out_proj.weight")}
    tables = {"tok_emb.weight", "out_head.weight"}
    assert changed == heads | {f"trf_blocks.{block}.att.query_norm.scale" for block in (0, 1)} | tables
    shift = copying["tok_emb.weight"] - plain["tok_emb.weight"]
    assert torch.linalg.matrix_rank(shift, rtol=1e-4) == 1  # float32 rounds a weight of that size to 1e-7
    rows = slice(LAPTOP.head_dim, None)  # those of the other heads
    for name in heads:
        new, old = (weights[name].T if "out_proj" in name else weights[name] for weights in (copying, plain))
        assert torch.equal(new[rows], old[rows])
        assert not torch.equal(new[: rows.start], old[: rows.start])


def test_an_output_head_of_its_own_begins_as_the_table_was_drawn() -> None:
    """So that it knows by its logits what the second head says of a token."""
    config = dataclasses.replace(LAPTOP, tied_head=False)
    plain, copying = drawn(dataclasses.replace(config, induction_heads=False)), drawn(config)
    assert torch.equal(copying.out_head.weight, plain.tok_emb.weight)
    assert copying.out_head.weight is not copying.tok_emb.weight
    assert not torch.equal(plain.out_head.weight, plain.tok_emb.weight)


def test_a_seed_decides_on_the_heads() -> None:
    weights = [drawn(LAPTOP, seed=seed).trf_blocks[1].att.W_query.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0][: LAPTOP.head_dim], weights[2][: LAPTOP.head_dim])


@pytest.mark.parametrize(
    "change",
    [
        {"block": "gpt2"},
        {"n_layers": 1},
        {"init_std": None},
        {"table_std": 0.0},  # a table of nothing, of which nothing can be told
        {"n_heads": 16},  # of 12 channels, of which two pairs turn slowly
        {"rope_base": 1.0},  # positions turn all channels alike
    ],
)
def test_a_shape_without_room_for_the_heads_begins_as_ever(change: dict[str, Any]) -> None:
    config = dataclasses.replace(LAPTOP, **change)
    assert not induction.applies(config)
    plain = drawn(dataclasses.replace(config, induction_heads=False)).state_dict()
    assert all(torch.equal(weight, plain[name]) for name, weight in drawn(config).state_dict().items())
