"""A batch is a function of (corpus, seed, step): nothing to save, nothing to skip on resume.

The training stream is a ring of N ids. In each epoch it is cut into windows of `context_length` targets from a phase drawn
from (seed, epoch), and the windows are taken in an order drawn from the same. Every id is a target exactly once an epoch;
the target after the last id is the `<|endoftext|>` that opens the stream. The phase shows the model each word in ever other
places, which delays learning by heart; without it the cuts are the same in each epoch, as in the chapter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from firstwords.text.corpus import Part

IGNORE = -100  # a target that is not counted; PyTorch's own value


@dataclass(frozen=True)
class Batch:
    """Sequences of one optimizer step."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORE where a window is shorter than the context
    n_targets: int  # counted targets

    def rows(self, end: int) -> Batch:
        """Return the first `end` sequences."""
        return Batch(self.tokens[:end], self.targets[:end], int((self.targets[:end] != IGNORE).sum()))


@dataclass(frozen=True)
class Batches:
    """The batches of a training part, which must hold a context and its target (`corpus.require_context`)."""

    part: Part
    context_length: int
    batch_size: int
    seed: int
    shift: bool = True  # cut at another phase in each epoch

    @property
    def windows_per_epoch(self) -> int:
        """Windows that cut the ring once."""
        return -(-len(self.part.ids) // self.context_length)

    def steps(self, epochs: float) -> int:
        """Return the optimizer steps of so many epochs, at least 1."""
        return max(1, -(-int(epochs * self.windows_per_epoch) // self.batch_size))

    def __call__(self, step: int) -> Batch:
        """Return the batch of the update after `step` updates."""
        first = step * self.batch_size
        rows = [self._window(sample) for sample in range(first, first + self.batch_size)]
        tokens, targets = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return Batch(tokens, targets, int((targets != IGNORE).sum()))

    def _window(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets of one sequence of the endless stream of samples, (T,) int64 each."""
        epoch, place = divmod(sample, self.windows_per_epoch)
        phase, order = epoch_order(self.seed, epoch, self.windows_per_epoch, self.context_length)
        ring, T, phase = len(self.part.ids), self.context_length, phase if self.shift else 0
        start = int(order[place]) * T
        ids = self.part.ids[(phase + start + np.arange(T + 1)) % ring].astype(np.int64)
        targets = ids[1:].copy()
        targets[max(0, ring - start) :] = IGNORE  # the last window has only what is left of the ring
        return ids[:-1], targets


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n_windows: int, context_length: int) -> tuple[int, np.ndarray]:
    """Return the phase (0 to context_length - 1) and the order of the windows of an epoch."""
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return int(random.integers(context_length)), random.permutation(n_windows)
