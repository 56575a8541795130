"""How a run goes, while it goes: a live line with a small chart on a terminal; elsewhere plain lines, a few a minute."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from firstwords.app import plans
from firstwords.app.words import count, duration, one_line, sparkline, visible
from firstwords.events import Notice, Planned, Preparing, RolledBack, Started, Told
from firstwords.model import cost
from firstwords.training.events import Evaluated, Sampled, StepDone

PLAIN_LINE_EVERY_S = 10.0
SHOWN_STEPS = 20  # the loss and speed that are shown are means over so many
WIDTH, BAR = 40, 8  # columns of the small chart, and of the bar


class PlainDisplay:
    """Progress as plain lines."""

    def __init__(self, console: RichConsole) -> None:
        self.console = console
        self.config_steps: int | None = None
        self.for_s: float | None = None
        self.first: StepDone | None = None
        self.recent: deque[StepDone] = deque(maxlen=SHOWN_STEPS)
        self.held_out: float | None = None
        self._line_s = -PLAIN_LINE_EVERY_S
        self._what = ""

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        return

    def tell(self, told: Told) -> None:
        """Show one thing that happened."""
        match told:
            case Notice(text):
                self.line(Text(f"note: {visible(text)}", "yellow"))
            case Preparing(what, share):
                self.preparing(what, share)
            case Started():
                self.config_steps, self.for_s = told.config.steps, told.config.for_s
                self.line(Text("\n".join(_introduction(told)), "bold"))
            case Planned(_, total_steps, _):
                self.config_steps = total_steps
            case RolledBack(step, _, first, last, reason):
                self.first = None
                self.recent.clear()
                self.line(Text(f"{visible(reason)}; going on from step {step} without batches {first} to {last}", "yellow"))
            case StepDone():
                self.first = self.first or told
                self.recent.append(told)
                self.stepped(told)
            case Evaluated(step, _, evaluation, best) if evaluation is not None:
                self.held_out = evaluation.bits_per_byte
                mark = " (best so far)" if best else ""
                self.line(Text(f"step {step:>6}  held-out {evaluation.bits_per_byte:.3f} bits/byte{mark}", "cyan"))
            case Sampled(_, text):
                self.line(Text.assemble("             ", (f"{one_line(text)}", "italic")))

    def line(self, text: Text) -> None:
        """Show one line for good; a reader who has left, or a full disk below it, must not end a run."""
        with suppress(OSError):
            self.console.print(text)

    def preparing(self, what: str, share: float | None) -> None:
        """Show what is done before training, when it begins and then now and then."""
        now_s = time.perf_counter()
        if what != self._what or now_s - self._line_s >= PLAIN_LINE_EVERY_S:
            self._what, self._line_s = what, now_s
            self.line(Text(f"{visible(what)}: {share:.0%}" if share else visible(what)))

    def stepped(self, done: StepDone) -> None:
        """Show the numbers now and then."""
        now_s = time.perf_counter()
        if now_s - self._line_s >= PLAIN_LINE_EVERY_S or done.step == self.config_steps:
            self._line_s = now_s
            self.line(Text(self.numbers(done)))

    def numbers(self, done: StepDone) -> str:
        """Return step, loss, speed and time left as one line."""
        held_out = "" if self.held_out is None else f"  held-out {self.held_out:.3f} bits/byte"
        return f"step {done.step:>6}{self._course(done, held_out)}"

    def _course(self, done: StepDone, held_out: str = "") -> str:
        of = f"/{self.config_steps}" if self.config_steps else ""
        loss = statistics.mean(step.nats_per_token for step in self.recent)
        took_s = [step.took_s for step in self.recent]
        speed = sum(step.tokens_per_s * step.took_s for step in self.recent) / max(sum(took_s), 1e-9)
        left_s = self._left_s(done)
        left = "" if left_s is None else f"  {duration(left_s)} left"  # before what a narrow terminal cuts off
        return f"{of}{left}  loss {loss:.3f} nats/token{held_out}  {speed:,.0f} tokens/s"

    def _left_s(self, done: StepDone) -> float | None:
        """Return the seconds left: of the time budget, or of the steps at the speed since the first one seen."""
        if self.for_s is not None:
            return self.for_s - done.elapsed_s
        if self.config_steps is None or self.first is None or done.step == self.first.step:
            return None
        since = (done.elapsed_s - self.first.elapsed_s) / (done.step - self.first.step)
        return since * (self.config_steps - done.step)


@dataclass
class Curve:
    """The course of a number over a run, in at most `2 * WIDTH` points: when there are more, each two become their mean."""

    points: list[float] = field(default_factory=list)
    _each: int = 1  # values that a point is the mean of
    _values: list[float] = field(default_factory=list)  # of the next point

    def add(self, value: float) -> None:
        """Take note of the next value."""
        self._values.append(value)
        if len(self._values) < self._each:
            return
        self.points.append(statistics.mean(self._values))
        self._values = []
        if len(self.points) > 2 * WIDTH:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            self._values = [self.points[-1]] * self._each if len(self.points) % 2 else []
            self.points, self._each = [(a + b) / 2 for a, b in pairs], 2 * self._each


class _Live(Progress):
    """A bar with lines below it."""

    below: tuple[Text, ...] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from self.below


class LiveDisplay(PlainDisplay):
    """Progress as a live line at the bottom of the terminal, with the curves so far and what the model said last."""

    def __init__(self, console: RichConsole) -> None:
        super().__init__(console)
        text = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
        columns = (BarColumn(bar_width=BAR, table_column=Column(min_width=BAR)), text)
        self.bar = _Live(*columns, console=console, transient=True, expand=True)
        self.training, self.evaluations, self.said = Curve(), Curve(), ""
        self._task: TaskID | None = None
        self._total: float | None = None

    def __enter__(self) -> LiveDisplay:
        with suppress(OSError):
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self.bar.stop()

    def tell(self, told: Told) -> None:
        """Show one thing that happened; what the model says takes the place of what it said before."""
        match told:
            case Sampled(_, text):
                self.said = one_line(text)
                self.bar.below = self._below()
                return
            case StepDone():
                self.training.add(told.nats_per_token)
            case Evaluated(_, _, evaluation, _) if evaluation is not None:
                self.evaluations.add(evaluation.bits_per_byte)
        super().tell(told)

    def line(self, text: Text) -> None:
        """Show one line for good, above the live one."""
        with suppress(OSError):
            self.bar.console.print(text)

    def preparing(self, what: str, share: float | None) -> None:
        """Show what is done before training."""
        self._show(visible(what), share, 1.0)

    def numbers(self, done: StepDone) -> str:
        """Return step, loss, speed and time left as one line; the held-out figure stands below it."""
        return f"step {done.step}{self._course(done)}"

    def stepped(self, done: StepDone) -> None:
        """Show the numbers of every step."""
        self.bar.below = self._below()
        self._show(self.numbers(done), done.step, self.config_steps)

    def _below(self) -> tuple[Text, ...]:
        """Return the lines below the numbers: the training loss, the held-out figure, and what the model said."""
        width = min(WIDTH, len(self.training.points))
        lines = []
        for name, points, unit, style in (
            ("training", self.training.points, "nats/token", "blue"),
            ("held-out", self.evaluations.points, "bits/byte", "yellow"),
        ):
            if points and width:
                course = f"  {points[0]:.2f} -> {points[-1]:.2f} {unit}"
                lines.append([(f"  {name}  ", "dim"), (sparkline(points, width), style), (course, "dim")])
        if self.said:
            lines.append([("  it says   ", "dim"), (self.said, "italic")])
        return tuple(Text.assemble(*line, no_wrap=True, overflow="ellipsis") for line in lines)

    def _show(self, description: str, completed: float | None, total: float | None) -> None:
        total = None if completed is None else total
        with suppress(OSError):
            if self._task is not None and total is None and self._total is not None:  # to rich no total is the one before
                self.bar.remove_task(self._task)
                self._task = None
            if self._task is None:
                self._task = self.bar.add_task(description, total=total)
            self.bar.update(self._task, description=description, completed=completed or 0, total=total)
            self._total = total


def _introduction(told: Started) -> list[str]:
    """Return the lines that say what will be trained on what."""
    config, corpus = told.config, told.corpus
    shape = f"{config.model.n_layers} layers of {config.model.emb_dim}, context {config.model.context_length}"
    origin = config.preset if config.from_ is None else f"from {visible(config.from_)}"
    length = count(config.steps, "step") if config.steps else f"for {duration(config.for_s or 0)}"
    return [
        f"text   {corpus.train.n_tokens:,} tokens to learn from, {corpus.val.n_tokens:,} held out ({config.tokenizer})",
        f"model  {cost.parameters(config.model):,} parameters: {shape} ({origin})",
        f"run    {visible(str(told.run))}, {length} of {config.batch_size} sequences, {config.precision},"
        f" {count(config.threads or 1, 'thread')}" + (f", from step {told.step}" if told.step else ""),
        *plans.expectation(told.predicted),
    ]
