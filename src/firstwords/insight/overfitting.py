"""Has a run turned: does it, since its best evaluation, only get worse on new text?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PATIENCE = 3  # evaluations since the best
PATIENT_SHARE = 0.1  # of the steps so far, that lie since the best: where evaluations follow closely, three say little
WORSE = 1.005  # the mean of the last ones, in units of the best: less is the noise of a loss that has come to rest

LEAST_SAID = 0.005  # share of the output that is copied


@dataclass(frozen=True)
class Turned:
    """The best is behind for good."""

    step: int  # of the best evaluation
    best_nats: float  # per token, held-out
    last_nats: float


def turning_point(history: Sequence[tuple[int, float]]) -> Turned | None:
    """Return what to say of a run whose held-out loss has turned, by its evaluations (step, nats per token) so far.

    It has where the last PATIENCE evaluations all come after the best and at least a tenth of the steps do, where their mean
    is at least 0.5 % above the best, and where the last of all is the worst since. The chapter's own run, with its best at
    step 50 of 90 and two earlier bests that worse evaluations followed, turns at step 65.

    Source: stopping after so many evaluations without progress, Prechelt 1998, "Early stopping - but when?", class UP.
    """
    *_, found = [None, *_verdicts(history)]
    return found


def just_turned(history: Sequence[tuple[int, float]]) -> Turned | None:
    """Return what `turning_point` does where the last evaluation is the first of which it says so."""
    *earlier, found = [None, *_verdicts(history)]
    return None if any(earlier) else found


def _verdicts(history: Sequence[tuple[int, float]]) -> Iterator[Turned | None]:
    """Yield after each evaluation whether the run has turned."""
    best_step, best_nats, worst_nats, since = 0, math.inf, -math.inf, list[float]()
    for step, nats in history:
        if nats < best_nats:
            best_step, best_nats, worst_nats, since = step, nats, -math.inf, []
        else:
            worst_nats = max(worst_nats, nats)
            since.append(nats)
        behind = len(since) >= PATIENCE and step - best_step >= PATIENT_SHARE * step
        worse = behind and statistics.mean(since[-PATIENCE:]) >= WORSE * best_nats and nats == worst_nats
        yield Turned(best_step, best_nats, nats) if worse else None


def sentence(found: Turned, copied_share: float | None) -> str:
    """Return what a person should know: since when, how much worse, and how much of the output is copied, where any is."""
    copied = f"; {copied_share:.0%} of its output is copied" if copied_share and copied_share >= LEAST_SAID else ""
    how_much = f"{found.best_nats:.2f} -> {found.last_nats:.2f} nats a token"
    return f"since step {found.step} it only gets worse on new text ({how_much}){copied}"
