"""What a table of tokens takes from a text: tokens in like places begin alike, the rest of the model as ever."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import STORY
from firstwords import api
from firstwords.config import ModelConfig, run_config
from firstwords.model import neighbours
from firstwords.model.gpt import GPTModel

LAPTOP = dataclasses.replace(run_config({"preset": "laptop"}).model, vocab_size=120)
CLASSES = 4
SAME_CLASS = torch.eye(CLASSES).repeat(LAPTOP.vocab_size // CLASSES, LAPTOP.vocab_size // CLASSES).bool()
TINY = {"preset": "laptop-tiny", "batch_size": 2, "device": "cpu", "report": False, "meter": False}


def text_of_classes(n_tokens: int, seed: int = 1) -> np.ndarray:
    """Return ids of which class c, ids congruent to c, is followed by the next class, whichever of its ids that is."""
    chosen = np.random.default_rng(seed).integers(0, LAPTOP.vocab_size // CLASSES, n_tokens)
    return (CLASSES * chosen + np.arange(n_tokens) % CLASSES).astype(np.uint16)


@pytest.mark.parametrize("n_tokens", [20_000, neighbours.MOST_TOKENS + 100_000])
def test_tokens_with_the_same_neighbours_are_near(n_tokens: int) -> None:
    alike = neighbours.directions(text_of_classes(n_tokens), LAPTOP, seed=3)
    near = alike @ alike.T
    assert near[SAME_CLASS].mean() > 0.4 + near[~SAME_CLASS].mean()
    by_chance = neighbours.directions(np.random.default_rng(1).permutation(text_of_classes(n_tokens)), LAPTOP, seed=3)
    near = by_chance @ by_chance.T
    assert abs(near[SAME_CLASS].mean() - near[~SAME_CLASS].mean()) < 0.1  # nothing in the order of those


@pytest.mark.parametrize("emb_dim", [12, 96, 384])  # more channels than a text tells apart, too
def test_directions_of_what_the_text_has_have_length_1_and_come_from_a_seed(emb_dim: int) -> None:
    ids, config = text_of_classes(5_000) // 3 * 2, dataclasses.replace(LAPTOP, emb_dim=emb_dim)
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    one, again, other = (neighbours.directions(ids, config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)  # the process's generator is where it was
    assert one.shape == (LAPTOP.vocab_size, emb_dim)
    has = torch.from_numpy(np.isin(np.arange(LAPTOP.vocab_size), ids))
    assert torch.allclose(one.norm(dim=1), has.float(), atol=1e-5)
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("vocab_size", [2_000, 50_257, 1_000_000])
def test_a_vocabulary_of_any_size_is_counted_in_bounded_memory(vocab_size: int) -> None:
    ids = np.random.default_rng(1).integers(0, vocab_size, 10_000)
    config = dataclasses.replace(LAPTOP, vocab_size=vocab_size, emb_dim=12)
    tracemalloc.start()  # of NumPy's memory: PyTorch's numbers are copies of half the size
    assert neighbours.directions(ids, config, seed=1).shape == (vocab_size, 12)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Counts of 8 bytes: K + 1 for each token, three more for its frequency and place.
    assert peak < 1.1 * 8 * (neighbours.MOST_CELLS + 4 * vocab_size)


@pytest.mark.parametrize("ids", [[5], [5, 6], [7] * 40])
def test_a_text_that_says_nothing_gives_numbers_all_the_same(ids: list[int]) -> None:
    assert neighbours.directions(np.array(ids), LAPTOP, seed=1).isfinite().all()


def drawn(config: ModelConfig) -> GPTModel:
    torch.manual_seed(7)
    return GPTModel(config).eval()


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("induction_heads", [True, False])
def test_half_of_a_table_is_as_it_was_drawn_and_no_more_is_changed(*, tied_head: bool, induction_heads: bool) -> None:
    config = dataclasses.replace(LAPTOP, tied_head=tied_head, induction_heads=induction_heads)
    plain, begun = drawn(config), drawn(config)
    neighbours.mix_into_embedding(begun, neighbours.directions(text_of_classes(20_000), config, seed=3))
    before, after = plain.state_dict(), begun.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    copied = induction_heads and not tied_head  # such a head begins as the table
    assert changed == {"tok_emb.weight"} | ({"out_head.weight"} if tied_head or copied else set())
    for name in changed:
        rows, were = (table - table.mean(0) for table in (after[name], before[name]))
        assert rows.std() == pytest.approx(float(were.std()), rel=0.1)
        assert F.cosine_similarity(rows, were).mean() == pytest.approx(0.5**0.5, abs=0.05)
        assert torch.allclose(after[name].mean(0), before[name].mean(0), atol=1e-6)  # what they have in common
        shift = rows - math.sqrt(0.5) * were
        near = F.cosine_similarity(shift[:, None], shift[None], dim=-1)
        assert near[SAME_CLASS].mean() > 0.4 + near[~SAME_CLASS].mean()  # each token has its own direction


def test_a_token_that_the_text_does_not_have_begins_as_it_was_drawn() -> None:
    config = dataclasses.replace(run_config({"preset": "laptop"}).model, vocab_size=257)
    plain, begun = drawn(config), drawn(config)
    ids = np.random.default_rng(1).integers(0, 97, 10_000)  # fewer than channels
    neighbours.mix_into_embedding(begun, neighbours.directions(ids, config, seed=1))
    stays = (begun.tok_emb.weight == plain.tok_emb.weight).all(dim=1)
    assert stays.tolist() == [token >= 97 for token in range(257)]


def test_a_run_begins_with_what_its_text_says_and_a_resumed_one_does_not_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(STORY)
    tables = []
    for name, from_text in (("with", True), ("without", False)):
        api.train(text, out=tmp_path / name, steps=2, model={"table_from_text": from_text}, **TINY)
        tables.append(api.load(tmp_path / name / "checkpoints/step-00000000").model.tok_emb.weight)
    assert not torch.equal(*tables)

    def never(*arguments: Any) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(neighbours, "directions", never)
    assert api.train(resume=True, out=tmp_path / "with", steps=4).steps == 4
    with pytest.raises(AssertionError):
        api.train(text, out=tmp_path / "new", steps=2, **TINY)
