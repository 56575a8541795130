"""The part of the recipe that depends on how long a run is. Where its numbers come from: docs/recipe.md."""

from __future__ import annotations

import math

from firstwords.planning import budget
from firstwords.training.evaluate import cost_in_tokens

START_S = 3.5  # pass before the first step, about, but for preparing the text
SPOKEN_TOKENS = 4800  # could be learnt from while an evaluation's samples are drawn and looked up: 0.19 s at 25,000 a second
BATCH_TOKENS, RUN_TOKENS = 4096, 2.5e6  # an update of the first suits a run of the second
FEWEST_TOKENS = 1024  # an update
FRESH_EPOCHS = 5.0  # what there is to learn from a text is worth no more readings of it; see the law's R*
DROP_RATES = ((7, 0.1), (12, 0.2), (20, 0.3), (30, 0.4))  # dropout from so many epochs on
FAST_EPOCHS = 14  # as many are learnt at the full learning rate


def expected_tokens(for_s: float, tokens_per_s: float, held_out_tokens: float, prepared_s: float = 0.0) -> float:
    """Return from how many tokens a run of so many seconds will learn, about.

    Args:
        for_s: The time budget, all in.
        tokens_per_s: At which this machine learns.
        held_out_tokens: Of the text that the run judges itself by.
        prepared_s: How long it takes, or took, to prepare the text.
    """
    look_s = (cost_in_tokens(held_out_tokens) + SPOKEN_TOKENS) / tokens_per_s
    left_s = for_s - START_S - prepared_s - budget.REPORT_S - budget.looks(for_s, look_s) * look_s
    return tokens_per_s * max(1.0, left_s)


def elapsed_s(tokens: float, tokens_per_s: float, held_out_tokens: float, prepared_s: float = 0.0) -> float:
    """Return how long a run on so many tokens takes, all in, about: the inverse of `expected_tokens`."""
    look_s = (cost_in_tokens(held_out_tokens) + SPOKEN_TOKENS) / tokens_per_s
    learnt_s, n_looks = START_S + prepared_s + budget.REPORT_S + tokens / tokens_per_s, budget.FEWEST_LOOKS
    while budget.looks(learnt_s + n_looks * look_s, look_s) > n_looks:
        n_looks += 1
    return learnt_s + n_looks * look_s


def batch_size(context_length: int, run_tokens: float | None, text_tokens: float = math.inf) -> int:
    """Return how many sequences an update should have: a power of two.

    The further a run gets, the more of a gradient is noise, so an update's tokens grow as the square root of the run's.
    Reading a text ever again gets no further, and the noise of few tokens keeps a model from learning it by heart.

    Args:
        context_length: Tokens of a sequence.
        run_tokens: From which the run learns in all; None: not known.
        text_tokens: Of the training text.
    """
    tokens = BATCH_TOKENS * math.sqrt(min(run_tokens or RUN_TOKENS, FRESH_EPOCHS * text_tokens) / RUN_TOKENS)
    return 1 << max(0, round(math.log2(max(FEWEST_TOKENS, tokens) / context_length)))


def drop_rate(epochs: float) -> float:
    """Return the dropout for a run that reads its text so often: a text that is read often is learnt by heart."""
    return max((rate for least, rate in DROP_RATES if epochs >= least), default=0.0)


def peak_lr_share(epochs: float) -> float:
    """Return the share of its learning rate for a run that reads its text so often.

    At the full rate a short text is known by heart after some fourteen epochs, between two evaluations of a long run. At a
    rate that falls as the epochs grow, the best weights come later, are found, and are better.
    """
    return min(1.0, FAST_EPOCHS / epochs) if epochs > 0 else 1.0
