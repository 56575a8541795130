"""How fast this machine learns: measured on real training steps, or guessed from its matrix products; for any shape.

A shape that was measured is as fast as that; one of another vocabulary takes as much more as the same shape did that was
measured with two; any other needs its operations at the rate of the measured shape that is nearest to it in width, as much
more or less of it as wider products are more efficient. What an update by Muon takes is the same for any number of tokens,
an update by AdamW takes next to nothing.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields
from typing import Any

from firstwords.config import ModelConfig, Role, RunConfig
from firstwords.model import cost

PRODUCT_SHARE = 0.58  # of the machine's matrix products that a model of `WIDE` channels reaches, about
# Narrower ones reach less: 0.44 to 0.48 of its rate at 64 channels, 0.6 at 96, 0.77 at 128; 384 and 768 reach as much.
WIDE, WIDTH_POWER = 192, 2 / 3
UPDATE_TOKENS = 2048  # of the steps that are measured
DROPPING_SHARE = 0.89  # of its speed that a model keeps which drops numbers: 0.90 at a tenth of them, 0.88 at a fifth
Point = tuple[ModelConfig, float]  # a shape; seconds a token, as by Muon in updates of UPDATE_TOKENS, without dropout


@dataclass(frozen=True)
class Speed:
    """What was measured; or, where nothing was, the operations a second that learning is believed to reach."""

    points: tuple[Point, ...] = ()
    flops_per_s: float = 0.0

    def of_run(self, config: RunConfig, batch_size: int | None = None) -> float:
        """Return how many tokens a second such a run learns from.

        Args:
            config: With a shape and an optimizer.
            batch_size: Sequences of an update; None: not known, `UPDATE_TOKENS` are.
        """
        tokens = UPDATE_TOKENS if batch_size is None else batch_size * config.model.context_length
        return self.tokens_per_s(config.model, _muon_tokens(config, tokens))

    def tokens_per_s(self, model: ModelConfig, muon_tokens: float = UPDATE_TOKENS) -> float:
        """Return how many tokens a second a model of this shape learns from.

        Args:
            model: The shape.
            muon_tokens: From how many tokens Muon makes an update; infinitely many where it makes none.
        """
        return _kept(model) * self._measured(model) * _operations(model) / _operations(model, muon_tokens)

    def now(self, point: Point, *, others: bool) -> Speed:
        """Return the speed of this machine where one shape was measured anew.

        Args:
            point: What was measured.
            others: Whether all other shapes are taken to be as much slower or faster than they were.
        """
        model, token_s = point
        times = token_s * self._measured(model)
        points = tuple(
            (shape, was_s * times if others or same_layers(shape, model) else was_s) for shape, was_s in self.points
        )
        return Speed(points if any(same_layers(shape, model) for shape, _ in points) else (*points, point))

    def quicker(self, saved_share: float) -> Speed:
        """Return the speed of a machine to which every token takes so much less of its time."""
        left = 1 - saved_share
        return Speed(tuple((shape, token_s * left) for shape, token_s in self.points), self.flops_per_s / left)

    def _measured(self, model: ModelConfig) -> float:
        if not self.points:
            return self.flops_per_s * _efficiency(model) / _operations(model)
        shape, token_s = min(self.points, key=lambda point: _distance(point[0], model))
        if not same_layers(shape, model):
            more_efficient = _efficiency(model) / _efficiency(shape)
            return more_efficient * _operations(shape) / _operations(model) / token_s
        more_flops = cost.training_flops(model) - cost.training_flops(shape)
        return 1 / (token_s + more_flops / self._head_flops_per_s(token_s / _operations(shape)))

    def _head_flops_per_s(self, flop_s: float) -> float:
        """Return how fast more words are learnt from; where no shape was measured with two vocabularies, 1 / `flop_s`."""
        for (a, a_s), (b, b_s) in itertools.combinations(self.points, 2):
            flops = cost.training_flops(b) - cost.training_flops(a)
            if same_layers(a, b) and flops * (b_s - a_s) > 0:
                return max(flops / (b_s - a_s), 1 / flop_s)  # the widest product of all is not the least efficient
        return 1 / flop_s


def point(config: RunConfig, rows: int, step_s: float) -> Point:
    """Return the point of a run's shape from the seconds of a whole step on so many sequences."""
    tokens = rows * config.model.context_length
    times = _operations(config.model) / _operations(config.model, _muon_tokens(config, tokens))
    return config.model, _kept(config.model) * times * step_s / tokens


def guessed(flops_per_s: float) -> Speed:
    """Return the speed of a machine of which only the matrix products are known."""
    return Speed(flops_per_s=PRODUCT_SHARE * flops_per_s)


def _muon_tokens(config: RunConfig, update_tokens: int) -> float:
    return update_tokens if config.optim.kind == "muon" else math.inf


def _operations(model: ModelConfig, muon_tokens: float = UPDATE_TOKENS) -> float:
    """Return the operations that a token takes, with its share of an update by Muon, which each has in a point."""
    return cost.training_flops(model) + cost.update_flops(model) / muon_tokens


def _kept(model: ModelConfig) -> float:
    return DROPPING_SHARE if model.drop_rate else 1.0


def _efficiency(model: ModelConfig) -> float:
    """Return the share of what wide products reach, about, by the width of a model's."""
    return float(min(1.0, (model.emb_dim / WIDE) ** WIDTH_POWER))


def _distance(shape: ModelConfig, model: ModelConfig) -> tuple[bool, float, float]:
    wider, more_words = (math.log(a / b) for a, b in ((shape.emb_dim, model.emb_dim), (shape.vocab_size, model.vocab_size)))
    return not same_layers(shape, model), abs(wider), abs(more_words)


def same_layers(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two shapes take the same time, but for their vocabularies: the rest only changes numbers."""
    return timed(a) == timed(b)


def timed(model: ModelConfig) -> dict[str, Any]:
    """Return what of a shape a step takes time for, but for the vocabulary and what is dropped."""
    timeless = Role.TIMELESS | Role.FIRST_WEIGHTS
    return {field.name: getattr(model, field.name) for field in fields(model) if not field.metadata["role"] & timeless}
