"""A batch is a function of (corpus, seed, step), and every token is a target once an epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from firstwords.text.batches import IGNORE, Batches
from firstwords.text.corpus import Part

T = 8


def batches(n: int, batch_size: int = 1, seed: int = 1, *, shift: bool = True) -> Batches:
    """Batches over a ring of ids that are all different, so that each names its place."""
    return Batches(Part(np.arange(n, dtype="<u2"), np.ones(n), n_documents=1), T, batch_size, seed, shift)


@pytest.mark.parametrize("n", [T + 2, 3 * T, 3 * T + 1, 10 * T - 1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_id_is_a_target_exactly_once_an_epoch(n: int, seed: int) -> None:
    made = batches(n, seed=seed)
    for epoch in range(3):
        steps = range(epoch * made.windows_per_epoch, (epoch + 1) * made.windows_per_epoch)
        seen = Counter(int(t) for step in steps for t in made(step).targets.flatten() if t != IGNORE)
        assert seen == Counter(range(n))


def test_each_target_is_the_id_after_its_input_round_the_ring() -> None:
    n, made = 5 * T + 3, batches(5 * T + 3, batch_size=4)
    for step in range(6):
        batch = made(step)
        counted = batch.targets != IGNORE
        assert torch.equal(batch.targets[counted], ((batch.tokens + 1) % n)[counted])
        assert batch.n_targets == int(counted.sum())


def test_batches_of_another_size_hold_the_same_samples_in_the_same_order() -> None:
    whole = torch.cat([batches(9 * T, batch_size=6)(step).tokens for step in range(4)])
    halves = torch.cat([batches(9 * T, batch_size=3)(step).tokens for step in range(8)])
    assert torch.equal(whole, halves)


def test_seed_and_epoch_change_the_order_and_the_phase() -> None:
    def first_tokens(seed: int, epoch: int) -> tuple[int, ...]:
        made = batches(20 * T, seed=seed)
        start = epoch * made.windows_per_epoch
        return tuple(int(made(step).tokens[0, 0]) for step in range(start, start + made.windows_per_epoch))

    assert first_tokens(1, 0) == first_tokens(1, 0)
    assert len({first_tokens(seed, epoch) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_without_a_shift_every_epoch_has_the_chapters_windows() -> None:
    made = batches(5 * T, shift=False)
    for epoch in range(3):
        starts = [int(made(step).tokens[0, 0]) for step in range(5 * epoch, 5 * epoch + 5)]
        assert sorted(starts) == [0, T, 2 * T, 3 * T, 4 * T]


def test_so_many_epochs_take_so_many_steps() -> None:
    made = batches(10 * T, batch_size=4)
    assert made.windows_per_epoch == 10
    assert [made.steps(epochs) for epochs in (0.01, 1, 2, 2.5)] == [1, 3, 5, 7]
