"""A time budget becomes steps: measured on the first ones, and corrected later.

A plan is made anew after each evaluation, at its half, and where the steps have become slower or faster.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

WARM_STEPS = 2  # the first steps allocate memory and are left out
PROBE_STEPS, PROBE_SHARE = 10, 0.04  # the first plan comes after so many steps, or when they took this share of the budget
EVALUATIONS_SHARE = 0.08  # of the budget, at most, goes into evaluations with their samples and saves
MOST_EVALUATIONS, FEWEST_EVALUATIONS = 20, 1
GROWTH = 1.25  # a plan may grow so much before its evaluations become one more
RECENT = 50  # steps that the speed is measured on
DRIFT_SHARE = 0.015  # of the budget: a plan that is so far behind or ahead is made anew
# What is not a step becomes slower with the steps, but not by more: with every core taken by others, steps took eight times
# as long, for a step goes on when its last thread is done, and what followed the last of them two to five times.
MOST_SLOWED = 4.0
# What the model says at the end, and a report: fixed, the best weights read, and the most of a budget.
END_S, READ_BYTES_PER_S, END_SHARE = 1.2, 4e8, 0.1
LATE_SHARE = 0.02  # of the budget that a whole report may be late; what would be later is left out of it
PREPARING_SHARE = 0.75  # of the budget, at most, may pass until the text is prepared
SURE_S, SURE_SHARE = 3.0, 0.01  # of a pass over a text, from when on its speed tells when it ends


def has_room_for(took_s: float, total_s: float) -> bool:
    """Return whether a budget of `total_s` has room for what takes so many seconds at its end."""
    return took_s <= END_SHARE * total_s


def end_s(total_s: float, checkpoint_bytes: int) -> float:
    """Return how long what follows the last evaluation may take, of a budget of `total_s`."""
    return min(END_S + checkpoint_bytes / READ_BYTES_PER_S, END_SHARE * total_s)


@dataclass
class Preparation:
    """How preparing a text goes, which may be too large for a budget.

    Args:
        started_s: When the process began.
        total_s: The whole budget.
    """

    started_s: float
    total_s: float
    _pass_s: float = 0.0  # when this pass over the text began
    _share: float = math.inf  # of it that was done: the first one begins a pass

    def too_long_s(self, now_s: float, share: float) -> float | None:
        """Return how long it takes from the process's start to the end of this pass, where that leaves no time to learn.

        Args:
            now_s: The time.
            share: Of this pass that is done; less than the last time where a new one begins.
        """
        if share < self._share:
            self._pass_s = now_s
        self._share = share
        took_s = now_s - self._pass_s
        if took_s < SURE_S or share < SURE_SHARE:
            return None
        whole_s = self._pass_s + took_s / share - self.started_s
        return whole_s if whole_s > PREPARING_SHARE * self.total_s else None


@dataclass
class Budget:
    """How the time is going. All times are seconds on one clock.

    What is not a step is counted in seconds of the machine as it was at the first plan: where another program takes the
    cores, it slows that too.

    Args:
        deadline_s: When the process should be done.
        total_s: The whole budget.
        now_s: When training begins.
        evaluation_steps: How many steps take as long as an evaluation, about; believed until one was measured.
        end_s: What follows the last step and its evaluation, on a machine as fast as it was before the first plan.
        scale_steps: How many steps take as long as judging the best weights for the report's scale, about, where those
            are not the last: these are judged by then.
    """

    deadline_s: float
    total_s: float
    now_s: float
    evaluation_steps: float
    end_s: float = 0.0
    scale_steps: float = 0.0
    _steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _n_steps: int = 0
    _evaluations_s: float = 0.0  # spent on evaluations since the first plan; before it: on the first save and sample
    _n_evaluations: int = 0  # since the first plan
    _evaluated: bool = True  # since the last step
    _rest_s: float = 0.0  # spent otherwise between steps: on saves, on samples of their own, by who listens
    _evaluation_s: float = 0.0
    _is_best: bool = True  # the last evaluation
    _first_step_s: float = 0.0  # of the first plan
    _planned_evaluations: int = -1
    _planned_step_s: float = 0.0
    _late_s: float = 0.0  # behind the plan
    _next_plan: int = 0

    def count_evaluation(self, *, is_best: bool = True) -> None:
        """Count an evaluation; its time, and that of what comes with it, is what passes between two steps."""
        self._n_evaluations, self._evaluated, self._is_best = self._n_evaluations + 1, True, is_best
        self._late_s -= self._evaluation_s * self._slowed()

    def step(self, now_s: float, took_s: float) -> bool:
        """Take note of a step and return whether a plan is due."""
        self._n_steps += 1
        if self._n_steps <= WARM_STEPS + 1:
            self._steps_s.clear()
        self._steps_s.append(took_s)
        passed_s, self.now_s = now_s - self.now_s, now_s
        between_s = max(0.0, passed_s - took_s) / self._slowed()
        if self._evaluated:
            self._evaluations_s += between_s
        else:
            self._rest_s += between_s
        self._evaluated = False
        if self._planned_evaluations < 0:
            long = sum(self._steps_s) > PROBE_SHARE * self.total_s
            return self._n_steps >= PROBE_STEPS or (self._n_steps > WARM_STEPS and long)
        self._late_s += passed_s - self._planned_step_s
        drifted = abs(self._late_s) > DRIFT_SHARE * self.total_s
        return drifted or self._n_evaluations > self._planned_evaluations or self._n_steps >= self._next_plan

    def plan(self, done: int, eval_every: int | None) -> tuple[int, int]:
        """Return (total steps, steps between evaluations) that end at the deadline.

        Args:
            done: Updates done.
            eval_every: Where it is fixed already.
        """
        step_s = statistics.fmean(self._steps_s)
        if self._planned_evaluations < 0:
            self._evaluation_s, self._first_step_s = self._evaluations_s + self.evaluation_steps * step_s, step_s
            self._evaluations_s, self._n_evaluations = 0.0, 0
        if self._n_evaluations:
            self._evaluation_s = self._evaluations_s / self._n_evaluations
        evaluation_s = self._evaluation_s * self._slowed()
        scale_s = 0.0 if self._is_best else self.scale_steps * step_s
        step_s += self._rest_s / self._n_steps * self._slowed()
        self._planned_evaluations, self._planned_step_s, self._late_s = self._n_evaluations, step_s, 0.0
        left_s = max(0.0, self.deadline_s - self.now_s - self.end_s * self._slowed() - scale_s)
        if eval_every is None:
            planned = evaluations_within(self.total_s, evaluation_s)
            eval_every = max(self._n_steps + 1, int(GROWTH * max(0.0, left_s - planned * evaluation_s) / step_s / planned))
        steps = max(1, _steps_within(left_s, step_s, evaluation_s, done, eval_every))
        self._next_plan = self._n_steps + max(PROBE_STEPS, steps // 2)
        return done + steps, eval_every

    def has_time_for_scale(self, now_s: float) -> bool:
        """Return whether the best weights can be judged now, after the last step, without ending much too late."""
        step_s = statistics.fmean(self._steps_s) if self._steps_s else 0.0
        end_s = now_s + self.scale_steps * step_s + self.end_s * self._slowed()
        return end_s <= self.deadline_s + LATE_SHARE * self.total_s

    def _slowed(self) -> float:
        """Return how many times as long as at the first plan what is not a step takes now."""
        return min(MOST_SLOWED, statistics.fmean(self._steps_s) / self._first_step_s) if self._first_step_s else 1.0


def evaluations_within(total_s: float, evaluation_s: float) -> int:
    """Return how many evaluations of so many seconds a budget has room for."""
    return min(MOST_EVALUATIONS, max(FEWEST_EVALUATIONS, int(EVALUATIONS_SHARE * total_s / max(evaluation_s, 1e-3))))


def _steps_within(left_s: float, step_s: float, evaluation_s: float, done: int, eval_every: int) -> int:
    """Return how many steps fit, each `eval_every`-th and the last followed by an evaluation."""
    steps = int(left_s / (step_s + evaluation_s / eval_every))

    def needed_s(steps: int) -> float:
        end = done + steps
        return steps * step_s + (end // eval_every - done // eval_every + (end % eval_every > 0)) * evaluation_s

    while steps > 0 and needed_s(steps) > left_s:
        steps -= 1
    return steps
