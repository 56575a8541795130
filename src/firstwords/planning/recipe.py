"""The part of the recipe that depends on how long a run is. Where its numbers come from: docs/recipe.md."""

from __future__ import annotations

import math

from firstwords.config import ModelConfig
from firstwords.model import cost

START_S = 4.0  # of a time budget pass before the first step, about
PRODUCT_SHARE = 0.43  # of the machine's matrix products, about, that a small model reaches from there on, all in
BATCH_TOKENS, RUN_TOKENS = 4096, 2.5e6  # an update of the first suits a run of the second
FEWEST_TOKENS = 1024  # an update
DROP_RATES = ((7, 0.1), (30, 0.2))  # dropout from so many epochs on


def expected_tokens(model: ModelConfig, for_s: float, flops_per_s: float) -> float:
    """Return from how many tokens a run of so many seconds will learn, about.

    Args:
        model: Its shape.
        for_s: The time budget, all in.
        flops_per_s: Of this machine's matrix products, in the run's precision.
    """
    return max(1.0, for_s - START_S) * PRODUCT_SHARE * flops_per_s / cost.training_flops(model)


def batch_size(context_length: int, run_tokens: float | None) -> int:
    """Return how many sequences an update should have: a power of two.

    The noise of a gradient matters less the further a run gets, so an update's tokens grow as the square root of the run's.

    Args:
        context_length: Tokens of a sequence.
        run_tokens: From which the run learns in all; None: not known.
    """
    tokens = BATCH_TOKENS * math.sqrt((run_tokens or RUN_TOKENS) / RUN_TOKENS)
    return 1 << max(0, round(math.log2(max(FEWEST_TOKENS, tokens) / context_length)))


def drop_rate(epochs: float) -> float:
    """Return the dropout for a run that reads its text so often: a text that is read often is learnt by heart."""
    return max((rate for least, rate in DROP_RATES if epochs >= least), default=0.0)
