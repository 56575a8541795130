"""What is asked of the machine while a run trains is taken back afterwards."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch

from firstwords.planning import machine

# A process of its own: what it frees lies in one heap, which the main thread alone has.
CLEARED = """
import json, resource, torch
from firstwords.planning import machine

def cleared_share(n_bytes=128 << 20):
    torch.ones(2 * n_bytes, dtype=torch.uint8)  # freed at once: the next one fits into its place
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(n_bytes, dtype=torch.uint8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / n_bytes

shares = [cleared_share()]
with machine.memory_kept():
    shares.append(cleared_share())
shares.append(cleared_share())
print(json.dumps(shares))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT RUN: no glibc here")
def test_what_a_step_frees_is_kept_for_the_next_one_and_given_back_at_the_end() -> None:
    ended = subprocess.run([sys.executable, "-c", CLEARED], capture_output=True, text=True, check=True)
    before, inside, after = json.loads(ended.stdout)  # shares of a tensor that the system cleared anew
    assert inside < 0.1
    assert min(before, after) > 0.5


def test_tiny_numbers_count_as_zero_inside_only() -> None:
    tiny = torch.tensor([1e-40])
    if not torch.set_flush_denormal(True):
        pytest.skip("NOT RUN: this processor cannot flush them")
    torch.set_flush_denormal(False)
    assert (tiny * 0.5).item() > 0
    with machine.threads(None):
        assert (tiny * 0.5).item() == 0
    assert (tiny * 0.5).item() > 0
