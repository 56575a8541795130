"""What is asked of the machine while a run trains is taken back afterwards."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from firstwords.planning import machine

N_BYTES = 256 << 20


def cleared_bytes() -> int:
    """Return how much memory the system clears for a large tensor that was freed a moment ago."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(N_BYTES, dtype=torch.uint8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT RUN: no glibc here")
def test_what_a_step_frees_is_kept_for_the_next_one_and_given_back_at_the_end() -> None:
    assert cleared_bytes() > N_BYTES // 2
    with machine.memory_kept():
        assert cleared_bytes() < N_BYTES // 10
    assert cleared_bytes() > N_BYTES // 2


def test_tiny_numbers_count_as_zero_inside_only() -> None:
    tiny = torch.tensor([1e-40])
    if not torch.set_flush_denormal(True):
        pytest.skip("NOT RUN: this processor cannot flush them")
    torch.set_flush_denormal(False)
    assert (tiny * 0.5).item() > 0
    with machine.threads(None):
        assert (tiny * 0.5).item() == 0
    assert (tiny * 0.5).item() > 0
