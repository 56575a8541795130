"""The part of the recipe that depends on how long a run is. Where its numbers come from: docs/recipe.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from firstwords.config import RunConfig
from firstwords.insight.memorisation import memorisation_s
from firstwords.planning import budget
from firstwords.training.evaluate import cost_in_tokens

START_S = 4.0  # pass before the first evaluation, about, but for preparing the text
BEGIN_S = 0.8  # of them, when everything is decided: the first table, the first save, and the check of the device
SPOKEN_S = 0.3  # an evaluation's samples are drawn and looked up in: 0.2 s on a fast machine, 0.8 on a slow one
ALL_EVALUATIONS_SHARE = 0.25  # of the time of its steps, at most, a run of known length takes for its evaluations
EVALUATION_SHARE, FEWEST_HELD_OUT = 0.05, 2048  # of a run's time for one evaluation, and its held-out tokens at least
HELD_OUT_TOKENS = 65536  # that a run judges itself by, at most: the mean of so many is known to about 0.4 %
FIRST_TOKENS = 2048  # and at step 0, when nothing is learnt that would be worth more time
UNSURE = 2.0  # times as slow as it is, a machine may be guessed to be for a model of which no step fits into a measurement
NEAR_SHARE = 1e-3  # of the time that a number of tokens takes, to which it is looked for
BATCH_TOKENS, RUN_TOKENS = 4096, 2.5e6  # an update of the first suits a run of the second
FEWEST_TOKENS = 1024  # an update
FRESH_EPOCHS = 5.0  # what there is to learn from a text is worth no more readings of it; see the law's R*
UNDROPPED_EPOCHS = 7  # below, nothing is dropped
DROP_RATE, DROP_EPOCHS, DROP_CHANNELS = 0.1, 8, 128  # of so many epochs, from so many channels on
DROP_GROWTH, MOST_DROPPED = 0.2, 0.4  # for each e-fold of epochs; at most
FAST_EPOCHS = 14  # as many are learnt at the full learning rate


def eval_tokens(for_s: float, tokens_per_s: float) -> int:
    """Return the most held-out tokens that an evaluation of a run of so many seconds uses: a power of two.

    As many as are wanted where an evaluation takes a small share of the time; on a slow machine, or in seconds, fewer.
    """
    affordable = EVALUATION_SHARE * for_s * tokens_per_s / (cost_in_tokens(1.0) - cost_in_tokens(0.0))
    return 1 << math.floor(math.log2(min(HELD_OUT_TOKENS, max(FEWEST_HELD_OUT, affordable))))


def held_out_tokens(step: int, config: RunConfig) -> int:
    """Return the most held-out tokens that a run's evaluation at a step uses.

    Fewer at step 0, but for a model that has learnt before: that may stay the best, and is held against later ones.
    """
    most = config.eval_tokens or HELD_OUT_TOKENS
    return min(most, FIRST_TOKENS) if step == 0 and config.from_ is None else most


def evaluation_s(for_s: float, tokens_per_s: float, held_out_tokens: float) -> float:
    """Return how long an evaluation with its samples takes in such a run, about."""
    judged = min(held_out_tokens, eval_tokens(for_s, tokens_per_s))
    return SPOKEN_S + cost_in_tokens(judged) / tokens_per_s


@dataclass(frozen=True)
class Overhead:
    """What a run does beside learning.

    Args:
        held_out_tokens: Of the text, which it judges itself by.
        text_bytes: Of the training text, in which what it says at the end is looked up.
        start_s: From the start of the process to the first evaluation.
    """

    held_out_tokens: float
    text_bytes: float = 0.0
    start_s: float = START_S


def expected_tokens(for_s: float, tokens_per_s: float, overhead: Overhead, every_tokens: float | None = None) -> float:
    """Return from how many tokens a run of so many seconds will learn, about.

    Args:
        for_s: The time budget, all in.
        tokens_per_s: At which this machine learns.
        overhead: What else takes time.
        every_tokens: From one evaluation to the next, where that was named.
    """
    return tokens_per_s * max(1.0, _learning_s(for_s, tokens_per_s, overhead, every_tokens))


def elapsed_s(tokens: float, tokens_per_s: float, overhead: Overhead) -> float:
    """Return how long a run on so many tokens takes, all in, about: the inverse of `expected_tokens`."""
    least_s = overhead.start_s + budget.END_S + tokens / tokens_per_s
    rest_s = memorisation_s(overhead.text_bytes) + 4 * (SPOKEN_S + cost_in_tokens(HELD_OUT_TOKENS) / tokens_per_s)
    low_s, high_s = least_s, 2 * least_s + rest_s
    while high_s - low_s > NEAR_SHARE * high_s:
        middle_s = (low_s + high_s) / 2
        enough = tokens_per_s * _learning_s(middle_s, tokens_per_s, overhead) >= tokens
        low_s, high_s = (low_s, middle_s) if enough else (middle_s, high_s)
    return high_s


def named_rhythm(config: RunConfig, batch_size: int) -> float | None:
    """Return from how many tokens a run learns between two evaluations; None where nobody named that."""
    return None if config.eval_every is None else config.eval_every * batch_size * config.model.context_length


def eval_every(config: RunConfig, n_held_out: float) -> int | None:
    """Return after how many steps a run judges itself; None where that is planned with its time.

    One of known length that does not say: twenty times, or as often as that takes little of its time.

    Args:
        config: With a batch.
        n_held_out: Tokens of the held-out text.
    """
    if config.eval_every is not None or config.steps is None:
        return config.eval_every
    evaluations, judged = float(budget.MOST_EVALUATIONS), min(n_held_out, held_out_tokens(config.steps, config))
    if judged > FIRST_TOKENS:  # fewer cost next to nothing
        learnt = config.steps * (config.batch_size or 1) * config.model.context_length
        evaluations = min(evaluations, ALL_EVALUATIONS_SHARE * learnt / cost_in_tokens(judged))
    return max(1, int(config.steps / max(1.0, evaluations)))


def steps_s(tokens: float, tokens_per_s: float, overhead: Overhead, evaluations: int, held_out_tokens: float) -> float:
    """Return how long a run of known length takes, all in, about.

    Args:
        tokens: From which it learns.
        tokens_per_s: At which this machine learns.
        overhead: What else takes time.
        evaluations: Evaluations after the first.
        held_out_tokens: Of one of them, at most.
    """
    first, each = (min(overhead.held_out_tokens, most) for most in (FIRST_TOKENS, held_out_tokens))
    judged = cost_in_tokens(first) + evaluations * cost_in_tokens(each)
    end_s = budget.END_S + memorisation_s(overhead.text_bytes)
    return overhead.start_s + (tokens + judged) / tokens_per_s + (1 + evaluations) * SPOKEN_S + end_s


def least_s(for_s: float, tokens_per_s: float, step_tokens: int, overhead: Overhead) -> float:
    """Return how long such a run takes at least, once it has started: its steps to a plan, between two evaluations."""
    judged = (min(overhead.held_out_tokens, most) for most in (FIRST_TOKENS, eval_tokens(for_s, tokens_per_s)))
    return ((budget.WARM_STEPS + 1) * step_tokens + sum(map(cost_in_tokens, judged))) / tokens_per_s


def _learning_s(for_s: float, tokens_per_s: float, overhead: Overhead, every_tokens: float | None = None) -> float:
    """Return the seconds of a run in which it learns, about; below 0 where there is no time for more than the rest."""
    each_s, last_s = evaluation_s(for_s, tokens_per_s, overhead.held_out_tokens), memorisation_s(overhead.text_bytes)
    first_s = SPOKEN_S + cost_in_tokens(min(overhead.held_out_tokens, FIRST_TOKENS)) / tokens_per_s
    end_s = budget.END_S + (last_s if budget.has_room_for(last_s, for_s) else 0.0)
    left_s = for_s - overhead.start_s - first_s - end_s
    if every_tokens is not None:
        return min(left_s - each_s, left_s / (1 + each_s * tokens_per_s / every_tokens))  # one is after the last step
    return left_s - budget.evaluations_within(for_s, each_s) * each_s


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


def drop_rate(epochs: float, channels: int) -> float:
    """Return the dropout for a run that reads its text so often: a text that is read often is learnt by heart.

    It grows with the logarithm of the epochs, and with the channels of a narrow model: such a one learns less by heart,
    and has few to spare.

    Args:
        epochs: Readings of the text in all.
        channels: Of the model.
    """
    if epochs < UNDROPPED_EPOCHS:
        return 0.0
    share = min(1.0, channels / DROP_CHANNELS)
    return round(min(MOST_DROPPED, share * (DROP_RATE + DROP_GROWTH * math.log(epochs / DROP_EPOCHS))), 2)


def peak_lr_share(epochs: float) -> float:
    """Return the share of its learning rate for a run that reads its text so often.

    At the full rate a short text is known by heart after some fourteen epochs, between two evaluations of a long run. At a
    rate that falls as the epochs grow, the best weights come later, are found, and are better.
    """
    return min(1.0, FAST_EPOCHS / epochs) if epochs > 0 else 1.0
