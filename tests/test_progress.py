"""What a person sees while a run goes on, and a text in the colours of its surprise."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console as RichConsole
from rich.text import Text

from command import ESC, Command
from conftest import STORY, TINY
from firstwords import api
from firstwords.app.console import Console
from firstwords.app.console import train as console_train
from firstwords.app.progress import BAR, WIDTH, Curve, LiveDisplay, PlainDisplay
from firstwords.app.words import BLOCKS, one_line, sparkline
from firstwords.events import Planned, Preparing
from firstwords.insight.surprise import HOTTEST, heat
from firstwords.planning.measure import BenchResult
from firstwords.training.events import Sampled, StepDone


def step(number: int, nats: float = 1.0) -> StepDone:
    return StepDone(number, number, nats, 1e-3, 1.0, 10.0, 0.1, number * 0.1)


def test_the_speed_that_is_shown_is_tokens_over_time() -> None:
    display = PlainDisplay(RichConsole(file=io.StringIO()))
    fast, slow = step(1), dataclasses.replace(step(2), tokens_per_s=0.1, took_s=10.0)  # one token each
    display.recent.extend([fast, slow])
    assert "  0 tokens/s" in display.numbers(slow)  # 2 tokens in 10.1 s; the mean of both rates is 5


class Screen(io.StringIO):
    """A terminal, as Python asks for one."""

    def isatty(self) -> bool:
        return True


HIDE_CURSOR = f"{ESC}[?25l"


def live(width: int = 100) -> LiveDisplay:
    return LiveDisplay(RichConsole(file=io.StringIO(), force_terminal=True, width=width))


def test_a_terminal_that_cannot_be_drawn_on_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, lines in (("dumb", True), ("xterm", False)):
        monkeypatch.setenv("TERM", kind)
        shown, console = Screen(), Console()
        console.err = RichConsole(file=shown, width=100)  # type: ignore[assignment]
        with console.progress() as tell:
            tell(Preparing("reading", 0.5))
            assert ("reading: 50%\n" in shown.getvalue()) is lines


def below(display: LiveDisplay) -> list[str]:
    return [line.plain for line in display.bar.below]


@pytest.mark.parametrize("width", [1, 7, 40])
def test_a_sparkline_is_as_wide_as_asked_and_as_high_as_its_values(width: int) -> None:
    assert len(sparkline([3.0, 1.0, 2.0], width)) == width
    assert sparkline([8.0, 1.0], 2) == BLOCKS[-1] + BLOCKS[0]
    assert sparkline([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 8) == BLOCKS
    assert sparkline([5.0, 5.0], 2) == 2 * BLOCKS[0]
    assert sparkline([], width) == ""


def test_a_curve_of_any_length_is_few_points_that_keep_the_mean() -> None:
    for n in (1, 2 * WIDTH, 2 * WIDTH + 1, 1000, 64 * WIDTH):
        curve = Curve()
        for i in range(n):
            curve.add(float(i))
        assert len(curve.points) <= 2 * WIDTH
        assert curve.points == sorted(curve.points)
        # what waits for its point to be full is left out: at most a point's worth at the end
        assert sum(curve.points) / len(curve.points) == pytest.approx((n - 1) / 2, abs=n / WIDTH)


def test_the_live_display_draws_the_curves_and_shows_the_newest_sample_in_the_place_of_the_last() -> None:
    display = live()
    with display:
        for number in range(1, 9):
            display.tell(step(number, 9.0 - number))
        display.tell(Sampled(8, "first\nwords"))
        display.tell(Sampled(9, f"second {ESC}[2J"))
    training, said = below(display)
    assert "█▇▆▅▄▃▂▁  8.00 -> 1.00 nats/token" in training
    assert said.strip() == r"it says   second \x1b[2J"
    assert "first" not in said


@pytest.mark.parametrize("word", ["word ", "漢字"])
def test_a_long_sample_takes_one_line_of_the_terminal(word: str) -> None:
    display = live(width=50)
    display.tell(Sampled(1, word * 1000))
    (said,) = display.bar.below
    assert len(display.console.render_lines(said, pad=False)) == 1


def shown_bar(display: LiveDisplay, width: int) -> str:
    console = RichConsole(file=io.StringIO(), force_terminal=True, width=width)
    return "".join(segment.text for segment in console.render_lines(display.bar)[0])


def test_the_bar_is_full_only_where_all_is_done() -> None:
    display = live()
    for what, share in (("reading the text", 0.3), ("tokenizing", 1.0)):
        display.tell(Preparing(what, share))
        (task,) = display.bar.tasks
        assert task.percentage == pytest.approx(100 * share)
    for unknown in (Preparing("starting PyTorch", None), step(1), step(2)):  # a time budget is no plan yet
        display.tell(unknown)
        (task,) = display.bar.tasks
        assert task.total is None
    display.tell(Planned(3, 10, 5))
    display.tell(step(3))
    (task,) = display.bar.tasks
    assert (task.completed, task.total) == (3, 10)


def test_the_bar_and_the_numbers_fit_into_eighty_columns() -> None:
    display = live()
    display.tell(Planned(0, 3880, 500))
    for number in (1200, 1201):
        display.tell(dataclasses.replace(step(number, 3.217), tokens_per_s=41234.0, elapsed_s=number * 0.1))
    for width in (80, 50):
        line = shown_bar(display, width)
        assert line.count("━") + line.count("╸") + line.count("╺") == BAR
        assert ("tokens/s" in line) is (width == 80)  # what a narrow terminal cuts off


def test_a_run_told_to_a_live_display_leaves_its_curves(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    display = live()
    with display:
        api.train(tmp_path / "story.txt", out=tmp_path / "run", listener=display.tell, steps=4, eval_every=2, **TINY)
    assert [line.split()[0] for line in below(display)] == ["training", "held-out", "it"]


def test_a_listener_of_one_s_own_takes_the_display_s_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    heard: list[object] = []
    console_train(tmp_path / "story.txt", out=tmp_path / "run", listener=heard.append, steps=2, **TINY)
    assert heard
    assert capsys.readouterr().err == ""


def test_where_there_is_no_terminal_samples_are_lines() -> None:
    out = io.StringIO()
    PlainDisplay(RichConsole(file=out)).tell(Sampled(1, "words"))
    assert out.getvalue().strip() == "words"


def test_a_log_that_is_to_have_colours_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for file, drawn in ((io.StringIO(), False), (Screen(), True)):  # and the negative control
        console = Console()
        console.err = RichConsole(file=file, width=100)  # type: ignore[assignment]
        assert console.err.is_terminal
        with console.progress() as tell:
            tell(Preparing("reading", 0.5))
        console.benched(iter(()))
        assert (HIDE_CURSOR in file.getvalue()) is drawn


def test_each_figure_of_a_machine_has_a_line_of_its_own_where_a_spinner_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen, console = Screen(), Console()
    console.out, console.err = (RichConsole(file=screen, width=100) for _ in range(2))  # type: ignore[assignment]
    console.benched(iter([BenchResult(f"products {i}", 1e3, "GFLOP/s") for i in range(3)]))
    lines = [line.rpartition(f"{ESC}[2K")[2] for line in screen.getvalue().splitlines()]
    assert sum(line.startswith("products ") for line in lines) == 3


def test_a_line_s_end_of_windows_is_shown_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_line("a\r\nb\rc") == r"a⏎b\rc"
    Console().speaks("one\r\n", iter(["two\r", "\nthree"]))
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_heat_follows_surprise() -> None:
    assert heat(None) == heat(0.0) == 0.0
    assert heat(-HOTTEST / 2) == 0.5
    assert heat(-2 * HOTTEST) == 1.0


def test_explain_colours_the_text_on_a_terminal_only(command: Command, a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"The word{ESC}[2J\n of"
    plain = command("explain", a_run, text).out
    assert "surprise in nats" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = command("explain", a_run, text).out
    shown, _, _ = coloured.partition("surprise in nats")
    assert Text.from_ansi(shown).plain.strip() == r"The word\x1b[2J⏎" + "\n of"
    assert f"{ESC}[30;48;2" in shown or f"{ESC}[37;48;2" in shown
    assert f"{ESC}[2J" not in coloured


def test_a_run_whose_best_is_long_past_is_not_told_to_take_more_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    result = api.train(tmp_path / "story.txt", out=tmp_path / "run", steps=2, **TINY)
    for best_step, advice in ((60, "firstwords train --resume"), (40, "with more text, or a smaller --preset")):
        Console().trained(dataclasses.replace(result, steps=95, best_step=best_step))
        assert f"go on     {advice}" in capsys.readouterr().out
