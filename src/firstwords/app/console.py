"""What a person sees: progress on standard error, results on standard output. Only this and `progress` print."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.box
from rich.console import Console as RichConsole
from rich.segment import Segment, Segments
from rich.status import Status
from rich.style import Style
from rich.table import Table
from rich.text import Text

from firstwords import api, store
from firstwords.app import plans
from firstwords.app.progress import LiveDisplay, PlainDisplay
from firstwords.app.words import count, duration, one_line, visible
from firstwords.errors import FirstwordsError, quoted
from firstwords.events import Listener, Started, Told, Trained
from firstwords.model.sampling import Sampling
from firstwords.runs.folder import RunFolder

if TYPE_CHECKING:
    from firstwords.api import Exported, Imported, Reported
    from firstwords.insight.explain import Explanation, TokenExplained
    from firstwords.insight.memorisation import Memorisation
    from firstwords.insight.scale import Scale
    from firstwords.insight.tasks import TaskScore
    from firstwords.model.generate import Drawn
    from firstwords.model.language_model import LanguageModel, Said
    from firstwords.planning.doctor import Diagnosis
    from firstwords.planning.measure import BenchResult
    from firstwords.planning.plan import Plan
    from firstwords.recorder import TrainResult
    from firstwords.text.tokenizer import Tokenizer
    from firstwords.training.evaluate import Evaluation
    from firstwords.verifying import Verdict

LAST_WORDS = 120  # tokens that a model says at the end of its run
SHOWN_WHOLE = 100  # from here on a rate is shown without decimals
BAR_PER_BIT, LONGEST_BAR_BITS = 2, 12  # of the scale of bits per byte, where 8 is chance
LEVELS = {"ok": "green", "warn": "yellow", "bad": "red"}
GOOD, FAIR = 0.5, 0.05  # probabilities from which a token is shown green, yellow
# How the surprise map is coloured, from the heat that stands first on: in many colours, and in sixteen.
HEATS = (
    (0.0, ("", "")),
    (0.125, ("black on #fff1c2", "yellow")),
    (0.25, ("black on #ffd48a", "black on yellow")),
    (0.5, ("black on #f79d5c", "black on bright_red")),
    (0.8, ("white on #c1401f", "bold white on red")),
)


class _Output(RichConsole):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which knows the exit code, that the reader has gone."""
        raise BrokenPipeError


class Console:
    """The two outputs of the program.

    Args:
        as_json: Results are one JSON object, the last line of standard output.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out = _Output(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.err = _Output(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.begun: Path | None = None  # the run that goes on
        self._lm: LanguageModel | None = None  # what the run that just ended has in memory

    @contextmanager
    def progress(self) -> Iterator[Listener]:
        """Yield a listener that shows what it is told while inside."""
        display = LiveDisplay(self.err) if self._is_live else PlainDisplay(self.err)

        def tell(told: Told) -> None:
            if isinstance(told, Trained):
                self._lm = told.lm
                return
            self.begun = told.run if isinstance(told, Started) else self.begun
            display.tell(told)

        with display:
            yield tell

    @property
    def _is_live(self) -> bool:
        """Whether what standard error shows can be drawn anew; a log that is to have colours (FORCE_COLOR) cannot."""
        is_terminal = getattr(self.err.file, "isatty", bool)()
        return self.err.is_terminal and is_terminal and not (self.err.is_jupyter or self.err.is_dumb_terminal)

    @contextmanager
    def _waiting(self, words: str) -> Iterator[Status | None]:
        """Show that something goes on while inside, where it can be wiped away afterwards."""
        with self.err.status(words) if self._is_live else nullcontext() as status:
            yield status

    def notice(self, line: str) -> None:
        """Show a line that a person should read."""
        self.err.print(Text(f"note: {visible(line)}", style="yellow"))

    def error(self, error: FirstwordsError) -> None:
        """Show an error: what, where, why, what to do."""
        if self.as_json:
            self._json({"error": error.as_dict()})
            return
        head = f"{error.where}: {error.what}" if error.where else error.what
        self.err.print(Text.assemble(("error: ", "bold red"), visible(head)))
        for part in (error.why, error.do):
            if part:
                self.err.print(f"  {visible(part)}")

    def trained(self, result: TrainResult) -> None:
        """Show what came of a run, and the commands to go on with."""
        if result.stopped in ("done", "best"):
            self.begun = None  # it is over: who stops what follows has nothing to go on with
        if self.as_json:
            self._json(vars(result))
            return
        run = visible(quoted(result.run))
        if result.bits_per_byte is not None and result.perplexity is not None:
            self.out.print(
                f"\nheld-out  {result.bits_per_byte:.3f} bits per byte; unsure among {result.perplexity:.1f} tokens"
                f" (best checkpoint: step {result.best_step})"
            )
        self.out.print(f"run       {run}: {count(result.steps, 'step')} in {duration(result.elapsed_s)}")
        if result.stopped == "best":
            self.out.print(f"stopped   its best was behind; to go on: firstwords train --resume --out {run} --until end")
        elif result.stopped != "done":
            self.out.print(f"stopped   by {result.stopped}; go on: firstwords train --resume --out {run}")
            return
        elif result.bits_per_byte is not None and 2 * result.best_step < result.steps:
            why = f"its best was at step {result.best_step}: more steps will hardly help"
            self.out.print(f"go on     with more text, or a smaller --preset; {why}")
        else:
            self.out.print(f"go on     firstwords train --resume --out {run} --steps {2 * result.steps}")
        if result.predicted is not None:
            self.out.print(f"predicted {plans.comparison(result, result.predicted)}")
        self.out.print(f'speak     firstwords generate {run} --prompt "..."')
        self.out.print(f'explain   firstwords explain {run} "..."')
        report = RunFolder(Path(result.run)).report
        if report.exists():
            self.out.print(f"report    {visible(str(report))}")
        lm = self._lm or api.load(result.run)

        from firstwords.watching import SAMPLE_TEMPERATURE

        self.out.print("\nit says:")
        prompt = RunFolder(Path(result.run)).recorded_config().get("sample_prompt", "")
        said = lm.generate(prompt, max_new_tokens=LAST_WORDS, sampling=Sampling(temperature=SAMPLE_TEMPERATURE))
        self._to_the_letter(prompt, "bold")
        self._to_the_letter(f"{said}\n")

    def _to_the_letter(self, text: str, style: str = "") -> None:
        """Show what a model read or says as it is; printed in the usual way, its tabs would become spaces.

        But for carriage returns: half of a line's end on Windows, they say nothing there, and alone they steer a terminal.
        """
        self.out.print(Segments([Segment(visible(text.replace("\r", "")), Style.parse(style))]))

    def planned(self, found: Plan, text: Sequence[str], encoding: str | None = None) -> None:
        """Show what could be trained, and what to take."""
        if self.as_json:
            self._json(found.as_dict())
            return
        self.out.print("\n".join(plans.text_lines(found)))
        if found.candidates:  # none where a target is beyond all of them
            self.out.print(_candidate_table(found))
            self.out.print("bits/byte: held-out, in four runs of five; by heart: will it learn the text itself?")
        beyond = dict.fromkeys(word for one in found.candidates if one.expected for word in one.expected.beyond)
        if not all(one.fits for one in found.candidates):
            self.out.print("! more memory than is free")
        if not all(one.has_time for one in found.candidates):
            self.out.print("none: no time for more than its first steps, so train refuses it")
        if beyond:
            self.out.print(f"* a wide guess: {', '.join(beyond)}")
        self.out.print(f"\ntake      {plans.taken(found)}\nbecause   {found.why}")
        if found.recommended is not None:
            self.out.print(f"train     {visible(quoted(*plans.command(found, found.recommended, text, encoding)))}")
        if found.hint:
            self.out.print(f"hint      {found.hint}")

    def evaluated(self, found: Scale | None, scores: Sequence[TaskScore] | None, memorised: Memorisation | None) -> None:
        """Show how good a model is and what that is worth: on a text, at tasks, or both; how much is learnt by heart."""
        if self.as_json:
            tasks = {} if scores is None else {"tasks": [score.as_dict() for score in scores]}
            memorisation = None if memorised is None else memorised.as_dict()
            figures = {} if found is None else {**found.as_dict(), "memorisation": memorisation}
            self._json({**figures, **tasks})
            return
        if found is not None:
            self._scaled(found)
        if memorised is not None:
            self._memorised(memorised)
        if scores is not None:
            self.out.print(_task_table(scores))

    def _memorised(self, found: Memorisation) -> None:
        def beside(share: float, natural: float | None) -> str:
            return f"{share:.0%}" if natural is None else f"{share:.0%} (held-out text: {natural:.0%})"

        self.out.print(f"copied of what it says {beside(found.copied_share, found.held_out_copied_share)}")
        if found.place is not None:
            self.out.print(f"longest copy          {found.longest_copy_chars} characters, from {found.place.words}")
            self.out.print(f"                      '{one_line(found.longest_copy)}'")
        self.out.print(f"goes round in circles {beside(found.repeated, found.held_out_repeated)}")

    def explained(self, explanation: Explanation, page: str | None = None) -> None:
        """Show the six steps: the text in the colours of its surprise, a table of the tokens, what they come to."""
        if self.as_json:
            self._json(explanation.as_dict())
            return
        if page is not None:
            self.out.print(f"page      {visible(page)}")
        if self.out.is_terminal and self.out.color_system is not None and not self.out.no_color:
            column = 1 if self.out.color_system in ("standard", "windows") else 0  # of few colours
            self.out.print(_surprise_map(explanation, column), _legend(column), sep="\n\n")
        table = Table(box=rich.box.SIMPLE_HEAD)
        for heading in ("token", "id", "probability", "log", "rank"):
            table.add_column(heading, justify="left" if heading == "token" else "right")
        table.add_column("it would rather have said")
        for token in explanation.tokens:
            table.add_row(*_explained_row(token))
        self.out.print(table)
        mean = explanation.evaluation.nats_per_token
        self.out.print(f"mean log probability  {-mean:.4f}\ncross-entropy         {mean:.4f} (its negative)")
        self._figures(explanation.evaluation)

    def reported(self, found: Reported) -> None:
        """Say where the report is."""
        if self.as_json:
            self._json(vars(found))
            return
        self.out.print(
            f"report    {visible(found.report)} ({found.size_bytes / 1e6:.1f} MB; any browser opens it, without a network)"
        )
        for picture in found.pictures:
            self.out.print(f"picture   {visible(picture)}")

    def speaks(self, prompt: str, stream: Iterator[str]) -> None:
        """Show a text as it is drawn."""
        self._to_the_letter(prompt, "bold")
        for piece in stream:
            self._to_the_letter(piece)
        self.out.print()

    def spoke(self, prompts: Sequence[str], said: Iterator[Said], tokenizer: Tokenizer) -> None:
        """Show texts that are drawn several at once."""
        texts, started_s = [], time.perf_counter()
        for number, (prompt, text) in enumerate(zip(prompts, said, strict=True)):
            texts.append(text)
            if not self.as_json:
                self._to_the_letter(("\n---\n" if number else "") + prompt, "bold")
                self._to_the_letter(text.text + "\n")
        if self.as_json:
            tokens = [[_token(one, tokenizer) for one in text.tokens] for text in texts]
            speed = round(sum(map(len, tokens)) / (time.perf_counter() - started_s), 1)
            self._json({"texts": [text.text for text in texts], "tokens": tokens, "tokens_per_s": speed})

    def described(self, found: Mapping[str, Any]) -> None:
        """Show what is in a run."""
        if self.as_json:
            self._json(found)
            return
        for key, value in found.items():
            match value:
                case None:
                    continue
                case dict():
                    shown = ", ".join(f"{name} {part}" for name, part in value.items() if part is not None)
                case tuple():
                    shown = ", ".join(value) or "the built-in text"
                case int():
                    shown = f"{value:,}"
                case _:
                    shown = str(value)
            self.out.print(f"{key:15} {visible(shown)}")

    def verified(self, found: Verdict) -> None:
        """Show what is whole and what is not."""
        if self.as_json:
            self._json(found.as_dict())
            return
        for part in (*found.checkpoints, replace(found.corpus, name=f"prepared text {found.corpus.name}")):
            self.out.print(Text(f"{part.name}: {'OK' if part.ok else visible(part.problem)}", "" if part.ok else "red"))
        if found.replay is not None:
            said = "the same to the last bit" if found.replay.ok else visible(found.replay.problem)
            self.out.print(f"replay of steps {found.replay.from_step + 1} to {found.replay.to_step}: {said}")

    def imported(self, found: Imported) -> None:
        """Show what was imported, and how to go on."""
        if self.as_json:
            self._json(vars(found))
            return
        run = visible(quoted(found.run))
        self.out.print(f"imported  {found.parameters:,} parameters into {run}")
        self.out.print(f"it says   {visible(found.prompt)}{one_line(found.greedy)}")
        self.out.print(
            f"it knows  {found.nats_per_token:.4f} nats per token on a sentence of ours (untrained: the logarithm of"
        )
        self.out.print("          its vocabulary)")
        if found.published:
            self.out.print(f"published {found.published} (the chapter's figures, not run here)")
        self.out.print(f'speak     firstwords generate {run} --prompt "..."')

    def exported(self, found: Exported) -> None:
        """Show what was exported, and what the comparison gave."""
        if self.as_json:
            self._json(vars(found))
            return
        self.out.print(f"exported  {visible(found.path)}")
        self.out.print(
            f"compared  read back by {found.read_back_by}: its logits differ by at most {found.max_logit_difference:.1e}"
        )

    def benched(self, marks: Iterator[BenchResult]) -> None:
        """Show what this machine does, as it is measured."""
        found = []
        with self._waiting("measuring") as status:
            for mark in marks:
                found.append(mark)
                if status is not None:  # both may be one terminal
                    status.stop()
                of = "" if mark.limit is None else f"  {mark.rate / mark.limit:4.0%} of this machine's limit"
                rate = f"{mark.rate:,.0f}" if mark.rate >= SHOWN_WHOLE else f"{mark.rate:.1f}"
                (self.err if self.as_json else self.out).print(f"{mark.what:32} {rate:>8} {mark.unit:9}{of}")
                if status is not None:
                    status.start()
        if self.as_json:
            self._json({"marks": [mark.as_dict() for mark in found]})

    def _scaled(self, found: Scale) -> None:
        self._figures(found.evaluation)
        self.out.print(f"first choice          {found.top1:.1%} of the tokens; among the first five {found.top5:.1%}")
        losses = "  ".join(f"{position.last}: {position.nats_per_token:.2f}" for position in found.by_position)
        self.out.print(f"nats by position      {losses}")
        self.out.print(_scale_table(found))
        for line in (*found.words, *([found.caveat] if found.caveat else [])):
            self.out.print(visible(line))

    def examined(self, examine: Callable[[], Diagnosis]) -> Diagnosis:
        """Show what a machine is and what is wrong with it, and return that."""
        with self._waiting("looking and measuring"):
            found = examine()
        if self.as_json:
            self._json(found.as_dict())
            return found
        for name, value in _described_machine(found):
            self.out.print(f"{name:9} {visible(value)}")
        for finding in found.findings:
            do = f": {finding.do}" if finding.do else ""
            self.out.print(Text(f"{finding.level:9} {visible(finding.what)}{visible(do)}", LEVELS[finding.level]))
        return found

    def _figures(self, found: Evaluation) -> None:
        self.out.print(f"bits per byte         {found.bits_per_byte:.4f}")
        self.out.print(f"perplexity            {found.perplexity:.2f} (unsure among so many tokens)")
        self.out.print(f"nats per token        {found.nats_per_token:.4f}")
        self.out.print(f"on                    {found.n_tokens:,} tokens, {found.n_bytes:,} bytes")

    def _json(self, value: Mapping[str, Any]) -> None:
        if sys.stdout is not None:  # closed by whoever started us: then what is said goes nowhere
            sys.stdout.write(json.dumps(store.without_infinities(value), ensure_ascii=True, allow_nan=False) + "\n")
            sys.stdout.flush()


def _candidate_table(found: Plan) -> Table:
    """Return what could be trained as a table, what to take in bold."""
    table = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    speed = "tokens/s" if found.target is None else "time"
    for heading in ("candidate", "batch", "memory", speed, "steps", "epochs", "bits/byte", "by heart"):
        table.add_column(heading, justify="left" if heading in ("candidate", "by heart") else "right", no_wrap=True)
    for candidate in found.candidates:
        style = "bold" if candidate == found.recommended else None
        table.add_row(*plans.row(candidate, with_time=found.target is not None), style=style)
    return table


def _task_table(scores: Sequence[TaskScore]) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD)
    for heading in ("task", "right", "95 % interval", "by chance", "questions"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for score in scores:
        interval = f"{score.low:.1%} to {score.high:.1%}"
        row = (f"{score.accuracy:.1%}", interval, f"{score.chance:.1%}", f"{score.n_items:,}")
        table.add_row(visible(score.name), *row)
    return table


def _token(drawn: Drawn, tokenizer: Tokenizer) -> dict[str, Any]:
    known = drawn.id < tokenizer.vocab_size  # a table may have spare rows
    text = tokenizer.token_bytes(drawn.id).decode(errors="replace") if known else ""
    return {"id": drawn.id, "text": text, "log_probability": drawn.log_probability}


def _scale_table(found: Scale) -> Table:
    """Return the scale as a table, the best first; the bars are as long as the bits per byte."""
    table = Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("bits per byte of this text")
    table.add_column("", justify="right")
    table.add_column("95 %", justify="right")
    table.add_column("", no_wrap=True)
    for mark in found.marks:
        around = "" if mark.interval is None else f"{mark.interval.low:.3f} to {mark.interval.high:.3f}"
        bar = "█" * max(1, round(mark.bits_per_byte * BAR_PER_BIT)) if mark.bits_per_byte <= LONGEST_BAR_BITS else "█…"
        style = "bold green" if mark.kind == "model" else ""
        table.add_row(one_line(mark.name), f"{mark.bits_per_byte:.3f}", around, bar, style=style)
    return table


def _surprise_map(explanation: Explanation, column: int) -> Text:
    """Return the text with each token coloured by -log p."""
    from firstwords.insight.surprise import PART, heat

    shown = Text()
    for token in explanation.tokens:
        styles = [styles for least, styles in HEATS if heat(token.log_probability) >= least][-1]
        shown.append(visible(token.completes or PART).replace("\n", "⏎\n"), styles[column])
    return shown


def _legend(column: int) -> Text:
    """Return what the colours of the map mean, in nats."""
    from firstwords.insight.surprise import HOTTEST

    shown = Text("surprise in nats, from: ", "dim")
    for least, styles in HEATS[1:]:
        shown.append(f" {least * HOTTEST:g} ", styles[column])
    return shown


def _described_machine(found: Diagnosis) -> Iterator[tuple[str, str]]:
    machine, torch, uses = found.machine, found.torch, found.uses
    cores = f"{machine.usable_cores} of {machine.cores} cores"
    quota = "" if machine.core_quota is None else f", the time of {machine.core_quota:g}"
    yield "machine", f"{machine.name}, Python {machine.python}"
    yield "processor", f"{machine.processor}, {cores}{quota}; {' '.join(machine.instructions)}"
    if machine.memory_bytes is not None:
        free = "" if machine.available_bytes is None else f", {machine.available_bytes / 1e9:.1f} GB free"
        yield "memory", f"{machine.memory_bytes / 1e9:.1f} GB{free}"
    for place in found.places:
        yield place.what, f"{place.path}: {place.free_bytes / 1e9:.1f} GB free"
    folder, size = found.compile_cache
    yield "compiler", found.compiler or f"there; what it made is in {folder}: {size / 1e6:.0f} MB"
    if torch is not None:
        threads = count(torch.threads, "thread")
        yield "PyTorch", f"{torch.version}, built for {torch.built_for}, {torch.capability}, {threads}"
        yield "devices", ", ".join(f"{name} ({what})" for name, what in torch.devices.items())
    if found.rates:
        yield "measured", ", ".join(f"{mark.what} {mark.rate:,.0f} {mark.unit}" for mark in found.rates)
    if uses:
        threads = count(uses["threads"], "thread")
        yield "uses", f"{uses['device']} in {uses['precision']}, {threads}, compile {uses['compile']}"


def _explained_row(token: TokenExplained) -> tuple[Text | str, ...]:
    if token.probability is None:
        return Text(one_line(token.text), "dim"), str(token.id), "", "", "", Text("(nothing stands before it)", "dim")
    style = "green" if token.probability >= GOOD else "yellow" if token.probability >= FAIR else "red"
    rather = "  ".join(f"{one_line(guess.text)!r} {guess.probability:.0%}" for guess in token.top)
    return (
        Text(one_line(token.text), style),
        str(token.id),
        f"{token.probability:.2e}",
        f"{token.log_probability:.4f}",
        f"{token.rank:,}",
        Text(rather),
    )


def train(text: Any = None, *, progress: bool = True, **options: Any) -> TrainResult:
    """Pretrain a GPT on text, showing how it goes; otherwise as `firstwords.api.train`, whose arguments it takes.

    Args:
        text: Files and folders, or "-"; None: the built-in text.
        progress: Show progress on standard error, unless a `listener` is told of it.
        **options: `out`, `config`, `resume`, and any configuration key.

    Raises:
        FirstwordsError: What is wrong and what to do.
    """
    if not progress or "listener" in options:
        return api.train(text, **options)
    with Console().progress() as listener:
        return api.train(text, listener=listener, **options)
