"""A device that computes something else is noticed before the first step and left; memory that runs out ends no run."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from command import Command
from conftest import STORY, TINY, journal, seeded
from firstwords import api
from firstwords.config import ModelConfig, presets, run_config
from firstwords.model.gpt import GPTModel
from firstwords.planning import trust
from firstwords.planning.trust import Way
from firstwords.runs.folder import RunFolder
from firstwords.text.batches import Batch
from firstwords.training.events import Notice, Told
from firstwords.training.state import TrainState, initial

BFLOAT16 = Way("cpu", "bfloat16", "off")
FLOAT32 = Way("cpu", "float32", "off")


def a_batch(config: ModelConfig, rows: int = 4) -> Batch:
    ids = torch.randint(config.vocab_size, (rows, config.context_length), generator=seeded(1))
    return Batch(ids, ids.roll(-1, 1), ids.numel())


def a_model(config: ModelConfig, seed: int = 0) -> GPTModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTModel(config)


def rounded(x: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(x.float())
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).to(x.dtype)


@contextmanager
def products_of(bits: int) -> Iterator[None]:
    """Let every layer's product lose accuracy inside, as a faulty kernel would, on its way forward and back."""
    whole = F.linear

    def faulty(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = whole(x, weight, bias)
        lost = rounded(y.detach(), bits) - y.detach()
        return y + lost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", faulty)
        yield
