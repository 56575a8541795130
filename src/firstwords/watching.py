"""How a run looks at its own model as it learns: how good it is, what it says, and how much of that is copied."""

from __future__ import annotations

from collections.abc import Callable

from firstwords.errors import DivergedError
from firstwords.events import Notice, Preparing
from firstwords.insight import memorisation, quick
from firstwords.insight.memorisation import Memorisation, Meter
from firstwords.model.language_model import LanguageModel
from firstwords.model.sampling import Sampling
from firstwords.planning import budget, machine, recipe
from firstwords.recorder import Recorder
from firstwords.text.batches import Batch
from firstwords.training import evaluate
from firstwords.training.evaluate import Evaluation, TokenFigures
from firstwords.training.events import Evaluated
from firstwords.training.loop import diverged

SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 60, 0.8  # of what the model says
# Of the held-out text that is learnt from too, from which on that is told: of manuals it is a fifth by itself. Another text
# that a person names is told of sooner (`loading.LEARNT_SHARE`): it was to be one that the model has not seen.
OVERLAP_SHARE = 1 / 3
METER_SAMPLES = 4  # drawn together at an evaluation; the first is the one that is shown


class Watcher:
    """What the loop asks at a step, and what the recorder has measured.

    Args:
        recorder: Of the run; it is told where no time is left to measure what is copied.
        batches: That the model learns from at each step.
    """

    def __init__(self, recorder: Recorder, batches: Callable[[int], Batch]) -> None:
        config, corpus, state = recorder.config, recorder.corpus, recorder.state
        self._recorder, self._batches, self._config, self._corpus = recorder, batches, config, corpus
        self._lm = LanguageModel(state.model, corpus.tokenizer, dtype=machine.DTYPES[config.precision])
        self._sampling = Sampling(temperature=SAMPLE_TEMPERATURE)
        self._meter = Meter(corpus.train, corpus.val, corpus.tokenizer, SAMPLE_TOKENS)
        self.last_tokens: TokenFigures | None = None  # of the evaluation at the last step, where the report has a scale
        self._has_told_of_overlap = False
        self._drawn: dict[int, str] = {}  # what was said when it was measured, at that step

    def evaluate(self, step: int) -> tuple[float, Evaluation | None]:
        """Return the nats per token on what was just learnt, and the figures on held-out text; None where there is none."""
        model, dtype, held_out = self._lm.model, self._lm.dtype, self._corpus.val
        trained = evaluate.evaluate_training(model, self._batches, step, dtype)
        is_last = step == self._recorder.state.total_steps
        if is_last and self._config.report and quick.scale_tokens(self._corpus, self._config.eval_tokens):
            tokens = self.last_tokens = evaluate.evaluate_tokens(model, held_out, dtype)
            return trained, None if tokens is None else tokens.evaluation
        most = recipe.held_out_tokens(step, self._config)
        return trained, evaluate.evaluate(model, held_out, dtype, most_tokens=most)

    def sample(self, step: int) -> str:
        """Return what the model says; at a step where that was measured, the first of those samples."""
        if step in self._drawn:
            return self._drawn.pop(step)
        prompt, seed = self._config.sample_prompt, self._config.seed + step
        return self._lm.generate(prompt, max_new_tokens=SAMPLE_TOKENS, sampling=self._sampling, seed=seed)

    def measure(self, event: Evaluated, at_last: bool) -> Memorisation | None:
        """Return how much of what the model says is copied; None where that is not asked now, or takes too long.

        Args:
            event: The evaluation.
            at_last: It is the last one, or the run has turned: a text that takes long to go through is looked in only then.

        Raises:
            DivergedError: The model gives no probabilities.
        """
        every = self._config.sample_every
        is_due = every is None or event.step % every == 0  # a sample is drawn then in any case
        if not (at_last or (is_due and self._meter.text.is_kept)) or not self._has_time():
            return None
        if not self._meter.text.is_kept:
            self._recorder.listener(Preparing("looking for what it says in the training text", None))
        samples, held_out = self._said(event.step), event.evaluation
        self._drawn = {event.step: samples[0]}
        gap = held_out.nats_per_token - event.train_nats_per_token if held_out else None
        found = self._meter.measure(samples, gap)
        self._tell_of_overlap(found.held_out_copied_share or 0.0)
        return found

    def _tell_of_overlap(self, share: float) -> None:
        """Say once that much of the held-out text is learnt from too, as that of a draft beside a later one."""
        if share >= OVERLAP_SHARE and not self._has_told_of_overlap:
            self._has_told_of_overlap = True
            what = f"about {share:.0%} of the held-out text, word for word, is in what it learns from too"
            self._recorder.listener(Notice(f"{what}: the held-out figures will be too good"))

    def _has_time(self) -> bool:
        left = self._recorder.budget  # of the time that this process has
        if left is None or budget.has_room_for(memorisation.memorisation_s(self._corpus.train.n_bytes), left.total_s):
            return True
        run = self._recorder.run.path
        self._recorder.listener(
            Notice(f"no time is left to look up what it says in so long a text: firstwords eval {run} does")
        )
        return False

    def _said(self, step: int) -> list[str]:
        prompts = quick.prompts(self._corpus, self._config.sample_prompt, METER_SAMPLES)
        seeds = [self._config.seed + step + row for row in range(METER_SAMPLES)]
        try:
            said = self._lm.generate_batch(prompts, max_new_tokens=SAMPLE_TOKENS, sampling=self._sampling, seeds=seeds)
            return [one.text for one in said]
        except DivergedError as error:
            raise diverged(error.what, step) from error
