"""A model on held-out text: every token counted once, seen from at least half a context where its document allows.

What is judged while a run goes on is a spread of the held-out text that costs little; `firstwords eval` judges all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from firstwords.errors import DivergedError
from firstwords.model.cost import EVALUATED_AT_ONCE
from firstwords.model.gpt import GPTModel, evaluating
from firstwords.model.loss import bits_per_byte, perplexity, token_figures, token_nats
from firstwords.text.batches import IGNORE, Batch
from firstwords.text.corpus import Part

TRAINING_TOKENS = 512  # that the training figure of an evaluation is made from, at least


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on a text."""

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    n_tokens: int
    n_bytes: int

    @classmethod
    def of(cls, nats: float, n_tokens: int, n_bytes: int) -> Evaluation:
        """Return the figures that follow from the summed nats."""
        return cls.of_mean(nats / n_tokens, n_tokens, n_bytes)

    @classmethod
    def of_mean(cls, nats_per_token: float, n_tokens: int, n_bytes: int) -> Evaluation:
        """Return the figures that follow from the mean, to the last bit the same as when it was measured."""
        bits = bits_per_byte(nats_per_token * n_tokens, n_bytes)
        return cls(nats_per_token, perplexity(nats_per_token), bits, n_tokens, n_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON has them; a perplexity beyond the largest number is None."""
        return {**asdict(self), "perplexity": self.perplexity if math.isfinite(self.perplexity) else None}

    def require_finite(self, model: str) -> None:
        """Raise a DivergedError where the model has no probabilities, which are then no figures of it either."""
        if not math.isfinite(self.nats_per_token):
            why = "its weights or logits are not finite"
            raise DivergedError("the model gives no probabilities", where=model, why=why)


@dataclass(frozen=True)
class Window:
    """`length` inputs from `start`, of which the targets from `skip` on are counted."""

    start: int
    length: int
    skip: int

    @property
    def counted(self) -> slice:
        """Where the counted targets stand in the stream."""
        return slice(self.start + self.skip + 1, self.start + self.length + 1)


def windows(starts: np.ndarray, ends: np.ndarray, context_length: int) -> Iterator[Window]:
    """Yield the windows over documents [start, end) of a stream, `<|endoftext|>` at each start.

    The first window of a document counts all its targets; each later one starts half a context further and counts those
    that no earlier one did.
    """
    n_targets = ends - starts - 1
    counts = _counts_of_windows(n_targets, context_length)
    for start, targets, count in zip(starts.tolist(), n_targets.tolist(), counts.tolist(), strict=True):
        for place in range(count):
            yield _window(start, targets, place, context_length)


def _counts_of_windows(n_targets: np.ndarray, context_length: int) -> np.ndarray:
    """Return how many windows documents of so many targets have."""
    later = -(-(n_targets - context_length) // _stride(context_length))
    return np.where(n_targets > 0, 1 + np.maximum(0, later), 0)


def _window(start: int, n_targets: int, place: int, context_length: int) -> Window:
    """Return the window that is the `place`-th of a document."""
    stride = _stride(context_length)
    skip = context_length - stride if place else 0
    return Window(start + place * stride, min(context_length, n_targets - place * stride), skip)


def _stride(context_length: int) -> int:
    return max(1, context_length // 2)


@torch.no_grad()
def evaluate(
    model: GPTModel, part: Part, dtype: torch.dtype = torch.float32, *, most_tokens: int | None = None
) -> Evaluation | None:
    """Return the model's figures on a part, or None where it has no token. Deterministic.

    Args:
        model: Evaluated without dropout; left in the mode it came in.
        part: Every token of it is counted, or about `most_tokens`, evenly spread.
        dtype: Of the matrix products.
        most_tokens: The same ones in every call.
    """
    if not part.n_tokens:
        return None
    plan = _chosen_windows(part, model.config.context_length, most_tokens)
    with evaluating(model):
        nats = sum(_nats(model, part, group, dtype) for group in _groups(plan))
    return Evaluation.of(nats, *_counts(part, plan))


@dataclass(frozen=True)
class TokenFigures:
    """Every token of a part as a model sees it, in the order of the text."""

    evaluation: Evaluation  # that `evaluate` gives
    bytes_before: np.ndarray[Any, Any]  # (N,) bytes of the part's text before the token
    nats: np.ndarray[Any, Any]  # (N,) float32
    ranks: np.ndarray[Any, Any]  # (N,) 1: the model's first choice
    position_nats: np.ndarray[Any, Any]  # (T,) summed over all windows, what `evaluate` leaves out of each as well
    position_tokens: np.ndarray[Any, Any]  # (T,) how many; the target at i is predicted from i + 1 tokens


@torch.no_grad()
def evaluate_tokens(model: GPTModel, part: Part, dtype: torch.dtype = torch.float32) -> TokenFigures | None:
    """Return what `evaluate` sums up, token by token, or None where the part has no token."""
    if not part.n_tokens:
        return None
    plan = _chosen_windows(part, model.config.context_length, None)
    nats, ranks = np.zeros(len(part.ids), np.float32), np.zeros(len(part.ids), np.int32)
    at, total = np.zeros((2, model.config.context_length)), 0.0
    with evaluating(model):
        for group in _groups(plan):
            tokens, targets = _stacked(model, part, group, skipping=False)
            with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
                found = token_figures(model.features(tokens), model.out_head.weight, targets)
            group_nats, group_ranks = (figures.cpu().numpy() for figures in found)
            for row, window in enumerate(group):
                counted = slice(window.skip, window.length)
                nats[window.counted], ranks[window.counted] = group_nats[row, counted], group_ranks[row, counted]
                at[:, : window.length] += group_nats[row, : window.length], np.ones(window.length)
                total += float(group_nats[row, counted].sum(dtype=np.float64))
    sizes, is_text = part.id_bytes[part.ids], part.ids != separator(part)
    bytes_before = (np.cumsum(sizes) - sizes)[is_text]
    evaluation = Evaluation.of(total, *_counts(part, plan))
    return TokenFigures(evaluation, bytes_before, nats[is_text], ranks[is_text], *at)


def of_mean(nats_per_token: float, part: Part, context_length: int, most_tokens: int | None) -> Evaluation:
    """Return the figures that belong to a mean that `evaluate` gave."""
    return Evaluation.of_mean(nats_per_token, *_counts(part, _chosen_windows(part, context_length, most_tokens)))


def cost_in_tokens(held_out_tokens: float) -> float:
    """Return from how many tokens a run could learn while it judges itself by so many, about.

    The windows overlap by half, and a forward pass takes a third of a step.
    """
    return (2 * held_out_tokens + TRAINING_TOKENS) / 3


def _chosen_windows(part: Part, context_length: int, most_tokens: int | None) -> list[Window]:
    """Return the windows that are evaluated, the longest first; of a long part no other is made."""
    starts = np.flatnonzero(part.ids == separator(part))
    ends = np.append(starts[1:], len(part.ids))
    if most_tokens is None or part.n_tokens <= most_tokens:
        plan = list(windows(starts, ends, context_length))
    else:
        n_targets = ends - starts - 1
        counts = _counts_of_windows(n_targets, context_length)
        until = np.cumsum(counts)  # so many windows up to each document's end
        picked = np.array(_spread(int(until[-1]), most_tokens / part.n_tokens))
        documents = np.searchsorted(until, picked, side="right")
        places = picked - (until - counts)[documents]
        chosen = zip(starts[documents].tolist(), n_targets[documents].tolist(), places.tolist(), strict=True)
        plan = [_window(*one, context_length) for one in chosen]
    return sorted(plan, key=lambda window: -window.length)


def _groups(plan: list[Window]) -> Iterator[list[Window]]:
    """Yield the windows, the longest first, `EVALUATED_AT_ONCE` tokens together: of short documents there are many."""
    first = 0
    while first < len(plan):
        rows = max(1, EVALUATED_AT_ONCE // plan[first].length)
        yield plan[first : first + rows]
        first += rows


def _counts(part: Part, plan: list[Window]) -> tuple[int, int]:
    """Return the number of counted targets and of the bytes that they stand for."""
    n_bytes = sum(int(part.id_bytes[part.ids[window.counted]].sum()) for window in plan)
    return sum(window.length - window.skip for window in plan), n_bytes


def _spread(n_windows: int, share: float) -> list[int]:
    """Return about that share of so many windows, at even distances; where it is less than one, the one in the middle."""
    return [int((i + 0.5) / share) for i in range(int(n_windows * share))] or [n_windows // 2]


@torch.no_grad()
def evaluate_training(model: GPTModel, batches: Callable[[int], Batch], step: int, dtype: torch.dtype) -> float:
    """Return the nats per token, without dropout, of the batches learnt last (at step 0: of the first ones).

    Args:
        model: Left in the mode it came in.
        batches: The batch of the update after so many updates.
        step: Updates done.
        dtype: Of the matrix products.
    """
    first, device = batches(max(0, step - 1)), model.tok_emb.weight.device
    count = max(1, TRAINING_TOKENS // first.tokens.numel())
    seen = [batches(step) for step in range(max(0, step - count), step or count)]
    rows = max(1, EVALUATED_AT_ONCE // first.tokens.shape[1])
    inputs, wanted = torch.cat([batch.tokens for batch in seen]), torch.cat([batch.targets for batch in seen])
    groups = zip(torch.split(inputs, rows), torch.split(wanted, rows), strict=True)
    with evaluating(model):
        nats = sum(_group_nats(model, tokens.to(device), targets.to(device), dtype) for tokens, targets in groups)
    return nats / sum(batch.n_targets for batch in seen)


def separator(part: Part) -> int:
    """Return the id that separates documents: the first of every stream."""
    return int(part.ids[0])


def _nats(model: GPTModel, part: Part, group: list[Window], dtype: torch.dtype) -> float:
    """Return the summed nats of the counted targets of some windows, the longest first."""
    return _group_nats(model, *_stacked(model, part, group, skipping=True), dtype)


def _stacked(model: GPTModel, part: Part, group: list[Window], *, skipping: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and targets (B, T) of some windows, the longest first; with `skipping` only what is counted."""
    tokens = np.zeros((len(group), group[0].length), np.int64)
    targets = np.full_like(tokens, IGNORE)
    for row, window in enumerate(group):
        ids, skip = part.ids[window.start : window.start + window.length + 1], window.skip if skipping else 0
        tokens[row, : window.length] = ids[:-1]
        targets[row, skip : window.length] = ids[1 + skip :]
    device = model.tok_emb.weight.device
    return torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device)


def _group_nats(model: GPTModel, tokens: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the summed nats of the counted targets (B, T)."""
    with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        nats = token_nats(model.features(tokens), model.out_head.weight, targets)
    return float(nats.cpu().double().sum())
