"""Learning rates, what is decayed, and Muon."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from conftest import seeded
from firstwords.config import ModelConfig, OptimConfig
from firstwords.model.gpt import GPTModel
from firstwords.training.optim import learning_rate, optimizers, orthogonal

CONFIG = OptimConfig(peak_lr=1.0, floor_lr=0.1, warmup_steps=10)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_rate_rises_to_its_peak_and_falls_to_its_floor(decay: str) -> None:
    config = dataclasses.replace(CONFIG, decay=decay)  # type: ignore[arg-type]
    rates = [learning_rate(step, config, 100) for step in range(120)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in pairwise(rates[10:101]))
    assert rates[100:] == pytest.approx([0.1] * 20)
    assert rates[55] == pytest.approx(0.55)  # half-way, both shapes are half-way


def test_without_a_known_end_the_rate_stays_at_its_peak() -> None:
    assert [learning_rate(step, CONFIG, None) for step in (10, 1000)] == [1.0, 1.0]


def test_a_cosine_is_a_cosine() -> None:
    assert learning_rate(40, CONFIG, 100) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_matrices_are_decayed(small: ModelConfig, kind: str) -> None:
    model = GPTModel(small)
    groups = [
        group
        for optimizer in optimizers(model, OptimConfig(kind=kind), torch.float32)  # type: ignore[arg-type]
        for group in optimizer.groups
    ]
    owned = [id(p) for group in groups for p in group.parameters]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.ndim >= 2) == (group.weight_decay > 0) for p in group.parameters)


def test_adamw_is_pytorchs_to_the_last_bit(small: ModelConfig) -> None:
    ours, theirs = (GPTModel(small) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    config = OptimConfig(kind="adamw")
    (optimizer,) = optimizers(ours, config, torch.float32)
    groups = [[p for p in theirs.parameters() if (p.ndim >= 2) == is_decayed] for is_decayed in (True, False)]
    reference = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": config.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    random = seeded(0)
    for lr in (0.01, 0.003, 0.02):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=random)
            other.grad = one.grad.clone()
        optimizer.step(lr)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (2, 20, 6)])
def test_orthogonal_keeps_the_singular_vectors_and_evens_the_values(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=seeded(0))
    result = orthogonal(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5  # five iterations bring values of up to 1:20 into about 0.7 to 1.2
    assert values.max() < 1.3
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(result.flatten(1), (U @ Vh).flatten(1))
    assert cosine.min() > 0.97


def test_matrices_of_one_shape_are_updated_as_they_would_be_alone() -> None:
    matrices = torch.randn(3, 8, 12, generator=seeded(1))
    together = orthogonal(matrices)
    for matrix, result in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonal(matrix[None])[0], result, atol=1e-5, rtol=1e-4)  # order of float32 sums
