"""What could be trained on this text in this time on this machine, how good it would be, and which of it to take.

Pure: the text's facts, the machine's speed and its free memory come in, a table comes out. A run that chooses nothing takes
the same recommendation, from the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from firstwords.config import ModelConfig, Precision, Role, RunConfig, as_drawn, keys_of, run_config
from firstwords.errors import DataError
from firstwords.model import cost, induction
from firstwords.planning import prediction, recipe
from firstwords.planning.facts import TextFacts
from firstwords.planning.prediction import Prediction, Situation
from firstwords.planning.recipe import Overhead, held_out_tokens
from firstwords.planning.speed import Speed
from firstwords.text import corpus as corpora
from firstwords.text import tokenizer as tokenizers
from firstwords.text.tokenizer import Tokenizer

# Among these a run that names none chooses.
PRESETS = ("laptop-tiny", "laptop-mini", "laptop-small", "laptop", "laptop-large")
CHOICES = (*(("bpe", preset) for preset in PRESETS), ("bytes", "laptop"), ("gpt2", "gpt2-124m"))
BETTER = 0.98  # of the expected bits per byte of `laptop`, or of a larger preset, at which another is taken instead
FREE_SHARE = 0.9  # of the free memory may be planned for
FEW_EPOCHS, MANY_EPOCHS = 4, 15  # Muennighoff et al. 2023: until the first, a text read again is worth almost a new one
BITS_A_PARAMETER = 3.6  # that a GPT can hold of a text: Morris et al. 2025 (arXiv:2505.24832)
SMALL_TEXT_BYTES = 20 << 20  # below it a model that has read much else knows more English than the text can teach
PREPARED_BYTES_PER_S = 5e6  # of a text that is read, cut and written; measured on 53 MB, two cores
UNTRIED_RECIPE, UNTRIED_TOKENIZER = "a recipe that was not tried", "a tokenizer that was not tried"
UNTRIED_TEXT = "a text that repeats itself a lot"
Risk = Literal["low", "some", "high"]


@dataclass(frozen=True)
class TokenizedText:
    """A text as a tokenizer makes it, as far as a plan depends on it."""

    tokenizer: str
    vocab_size: int
    training: float  # tokens
    training_bytes: float
    held_out: float  # tokens
    difficulty: float  # of the text; see `planning.difficulty`
    repeated: float = 0.0  # of the text's sample
    start_s: float = recipe.START_S  # from the start of the process to the first evaluation

    @property
    def overhead(self) -> Overhead:
        """What a run on it does beside learning."""
        return Overhead(self.held_out, self.training_bytes, self.start_s)


@dataclass(frozen=True)
class Machine:
    """What a plan depends on of the machine."""

    speed: Speed
    precision: Precision
    free_bytes: int | None = None  # None: the system does not tell
    on_gpu: bool = False  # whose memory nothing is foretold of


@dataclass(frozen=True)
class Candidate:
    """One thing that could be trained, and what would come of it."""

    tokenizer: str
    preset: str
    parameters: int
    batch_size: int
    fits: bool
    memory_bytes: int | None  # of the process; None where a GPU learns
    tokens_per_s: float  # all in
    steps: int
    epochs: float
    elapsed_s: float
    least_s: float  # that first steps and evaluations take of a time budget; 0 without one
    expected: Prediction | None  # None: the law does not know a model that has learnt elsewhere
    by_heart: Risk

    @property
    def has_time(self) -> bool:
        """Whether it learns anything within its time budget, as far as can be guessed: a run that would not is refused."""
        return self.least_s <= recipe.UNSURE * self.elapsed_s

    def as_dict(self) -> dict[str, Any]:
        """Return the candidate as JSON has it."""
        expected, values = self.expected, dict(vars(self))
        del values["expected"], values["least_s"]
        return {
            **values,
            "has_time": self.has_time,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "epochs": round(self.epochs, 3),
            "elapsed_s": round(self.elapsed_s, 1),
            "bits_per_byte": expected and expected.range,
            "beyond": list(expected.beyond) if expected else [],
        }


def of_preset(tokens: TokenizedText, preset: str, for_s: float, machine: Machine) -> Candidate:
    """Return what a preset comes to on a text within a time budget."""
    named = {"preset": preset, "tokenizer": tokens.tokenizer, "model.vocab_size": tokens.vocab_size}
    config = run_config(named, {"for_s": for_s, "precision": machine.precision})
    found = of_config(config, tokens, machine)
    model = _dropping(config.model, preset, found.epochs)
    if model == config.model:
        return found
    return of_config(replace(config, model=model, batch_size=found.batch_size), tokens, machine)


def _dropping(model: ModelConfig, preset: str, epochs: float) -> ModelConfig:
    """Return the model that a run of a preset has which reads its text so often."""
    return replace(model, drop_rate=recipe.drop_rate(epochs, model.emb_dim)) if preset in PRESETS else model


def of_config(config: RunConfig, tokens: TokenizedText, machine: Machine) -> Candidate:
    """Return what a configuration comes to on a text.

    Args:
        config: With a time budget, or with a batch and steps.
        tokens: The text.
        machine: The machine.
    """
    model, rate = config.model, machine.speed.of_run(config)

    def learnt_at(rate: float, batch_size: int | None) -> float:
        if config.for_s is not None:
            every = None if batch_size is None else recipe.named_rhythm(config, batch_size)
            return recipe.expected_tokens(config.for_s, rate, tokens.overhead, every)
        return float((config.steps or 0) * (config.batch_size or 1) * model.context_length)

    batch_size = config.batch_size or recipe.batch_size(model.context_length, learnt_at(rate, None), tokens.training)
    rate = machine.speed.of_run(config, batch_size)
    learnt = learnt_at(rate, batch_size)
    steps = max(1, int(learnt / (batch_size * model.context_length)))
    evaluations = math.ceil(steps / (recipe.eval_every(config, tokens.held_out) or steps))
    elapsed_s = config.for_s or recipe.steps_s(learnt, rate, tokens.overhead, evaluations, held_out_tokens(steps, config))
    micro, epochs = config.micro_batch_size or cost.micro_batch_size(model, batch_size), learnt / max(1.0, tokens.training)
    step_tokens = batch_size * model.context_length
    least_s = 0.0 if config.for_s is None else recipe.least_s(config.for_s, rate, step_tokens, tokens.overhead)
    memory = cost.training_bytes(model, micro, config.precision)
    mapped = cost.mapped_bytes(model.vocab_size, tokens.training, learnt / model.context_length)
    return Candidate(
        tokenizer=tokens.tokenizer,
        preset=config.preset,
        parameters=cost.parameters(model),
        batch_size=batch_size,
        fits=machine.on_gpu or machine.free_bytes is None or memory <= FREE_SHARE * machine.free_bytes,
        memory_bytes=None if machine.on_gpu else memory + mapped,
        tokens_per_s=steps * batch_size * model.context_length / elapsed_s,
        steps=steps,
        epochs=epochs,
        elapsed_s=elapsed_s,
        least_s=least_s,
        expected=_expected(config, tokens, learnt),
        by_heart=by_heart(epochs, cost.parameters(model), tokens),
    )


def _expected(config: RunConfig, tokens: TokenizedText, learnt: float) -> Prediction | None:
    if config.from_ is not None:
        return None
    situation = _situation(tokens, config.model, learnt * bytes_a_token(tokens))
    untaught = math.log2(config.model.vocab_size) / bytes_a_token(tokens)  # all words alike: what training begins with
    return prediction.law().predict(situation, untried(config, tokens)).at_most(untaught)


def _situation(tokens: TokenizedText, model: ModelConfig, read_bytes: float) -> Situation:
    """Return what is foretold from, for a model that learns from so many bytes of a text."""
    return Situation(
        tokens.difficulty,
        tokens.training_bytes,
        read_bytes,
        cost.parameters(model),
        tokens.repeated,
        induction_heads=induction.applies(model),
        table_from_text=model.table_from_text and not model.tied_head,
    )


def bytes_a_token(tokens: TokenizedText) -> float:
    """Return the bytes of the text that a token stands for."""
    return tokens.training_bytes / max(1.0, tokens.training)


def untried(config: RunConfig, tokens: TokenizedText) -> tuple[str, ...]:
    """Return in what a configuration differs in kind from all runs that the law was fitted to."""
    differs = {
        UNTRIED_RECIPE: config.preset not in PRESETS or not (_begins_as_tried(config) and _learns_as_tried(config)),
        UNTRIED_TOKENIZER: not tokens.tokenizer.startswith("bpe"),
        UNTRIED_TEXT: tokens.repeated > prediction.MOST_REPEATED,
    }
    return tuple(name for name, is_so in differs.items() if is_so)


def _begins_as_tried(config: RunConfig) -> bool:
    """Whether its table and heads begin as its preset's; or as drawn, and tied, which each preset was tried with too."""
    preset = run_config({"preset": config.preset}).model
    drawn = run_config({"preset": config.preset, "model.tied_head": True}, as_drawn()).model
    return _beginning(config.model) in map(_beginning, (preset, drawn))


def _learns_as_tried(config: RunConfig) -> bool:
    """Whether its blocks and its optimizer are its preset's; a learning rate may be lower, as it is for short texts."""
    preset = run_config({"preset": config.preset})
    same_optim = replace(config.optim, peak_lr=preset.optim.peak_lr) == preset.optim
    return same_optim and config.optim.peak_lr <= preset.optim.peak_lr and config.model.block == preset.model.block


def _beginning(model: ModelConfig) -> list[Any]:
    return [model.tied_head, *(getattr(model, key.removeprefix("model.")) for key in sorted(keys_of(Role.FIRST_WEIGHTS)))]


def by_heart(epochs: float, parameters: int, tokens: TokenizedText) -> Risk:
    """Return the risk that a model learns its text by heart: how often it reads it, and how much of it it can hold."""
    can_hold = BITS_A_PARAMETER * parameters / max(1.0, tokens.difficulty * tokens.training_bytes)
    if epochs <= FEW_EPOCHS:
        return "low"
    return "high" if epochs > MANY_EPOCHS and can_hold > 0.5 else "some"


def can_learn(preset: str, n_tokens: float) -> bool:
    """Whether so many tokens of a text are a context of a preset and its target."""
    return run_config({"preset": preset}).model.context_length < n_tokens


def recommended(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate to take: `laptop` with a vocabulary of the text's own, unless another is clearly better.

    Only what fits into memory and time, and whose recipe was tried, is recommended; and instead of `laptop` only what lies
    beyond nothing that was tried which `laptop` does not lie beyond too, such as by its text, or in a shorter run: the less
    a run learns from, the smaller is what it learns best. Of several that are expected to be nearly as good as the best,
    the largest is taken; docs/recipe.md has what both came to.
    """
    known = _eligible(candidates)
    usual = next((one for one in known if one.preset == "laptop"), None)
    if usual is None:
        return min(known, key=_bits, default=None)
    shared = {prediction.SHORTER_RUN, *(usual.expected.beyond if usual.expected else ())}
    as_sure = [one for one in known if one.expected and shared.issuperset(one.expected.beyond)]
    better = [one for one in as_sure if _bits(one) < BETTER * _bits(usual)]
    best = min(map(_bits, better), default=0.0)
    return max((one for one in better if BETTER * _bits(one) <= best), key=lambda one: one.parameters, default=usual)


def _bits(candidate: Candidate) -> float:
    return candidate.expected.mid if candidate.expected else math.inf


def time_for(tokens: TokenizedText, preset: str, bits: float, machine: Machine) -> float | None:
    """Return the seconds in which a preset would be as good as `bits`, most likely; None: in none."""
    config = run_config({"preset": preset, "model.vocab_size": tokens.vocab_size})
    n_bytes = prediction.law().text_for(bits, _situation(tokens, config.model, 0.0))
    if n_bytes is None:
        return None
    learnt = n_bytes / bytes_a_token(tokens)
    config = replace(config, model=_dropping(config.model, preset, learnt / max(1.0, tokens.training)))
    batch_size = recipe.batch_size(config.model.context_length, learnt, tokens.training)
    return recipe.elapsed_s(learnt, machine.speed.of_run(config, batch_size), tokens.overhead)


@dataclass(frozen=True)
class Plan:
    """All candidates for a text, and which of them to take."""

    machine: dict[str, Any]
    text: dict[str, Any]
    candidates: tuple[Candidate, ...]
    recommended: Candidate | None
    why: str
    hint: str | None
    target: float | None = None  # bits per byte that were wished for

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON has it."""
        return {
            "machine": self.machine,
            "text": self.text,
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            "recommended": self.recommended and self.recommended.as_dict(),
            "why": self.why,
            "hint": self.hint,
            "target_bits_per_byte": self.target,
        }


def tokenized(facts: TextFacts) -> dict[str, TokenizedText]:
    """Return a text as each tokenizer of `CHOICES` makes it, estimated from its sample."""
    known = {name: _tokenizer(name, facts) for name in dict.fromkeys(name for name, _ in CHOICES)}
    seen = b"".join(facts.sample.held_out or facts.sample.training).decode(errors="ignore")
    difficulty, found = facts.sample.difficulty(known["bpe"]), {}
    repeated, start_s = facts.sample.repeated, recipe.START_S + facts.n_bytes / PREPARED_BYTES_PER_S
    for name, tokenizer in known.items():
        share = len(tokenizer.encode(seen)) / len(seen.encode())  # tokens a byte
        training, held_out = share * facts.training_bytes + facts.n_documents, share * facts.held_out_bytes
        size, n_bytes = tokenizer.vocab_size, facts.training_bytes
        found[name] = TokenizedText(name, size, training, n_bytes, held_out, difficulty, repeated, start_s)
    return found


def _tokenizer(name: str, facts: TextFacts) -> Tokenizer:
    match name:
        case "gpt2":
            return tokenizers.gpt2()
        case "bytes":
            return tokenizers.byte_tokenizer()
        case _:
            size = corpora.fitting_vocab_size(facts.training_chars)
            return tokenizers.train_bpe((chunk.decode(errors="ignore") for chunk in facts.sample.training), size)


def plan(facts: TextFacts, machine: Machine, for_s: float, target: float | None = None) -> Plan:
    """Return what each of `CHOICES` comes to within a time budget, or in the time that it takes to be as good as wished.

    Args:
        facts: The text.
        machine: The machine.
        for_s: The time budget.
        target: Bits per byte to reach instead; what never gets there is left out.

    Raises:
        DataError: No candidate could learn from so short a text.
    """
    texts = tokenized(facts)
    able = [(name, preset) for name, preset in CHOICES if can_learn(preset, texts[name].training - facts.n_documents)]
    if not any(name == "bpe" for name, _ in able):
        what = f"about {texts['bpe'].training:,.0f} tokens to learn from are less than a context of any candidate"
        raise DataError(what, where="text", why="no candidate could learn from them", do="give more text")
    times = {choice: for_s if target is None else time_for(texts[choice[0]], choice[1], target, machine) for choice in able}
    found = [of_preset(texts[name], preset, s, machine) for (name, preset), s in times.items() if s is not None]
    best = recommended(found) if target is None else soonest(found)
    return Plan(
        machine={"precision": machine.precision, "free_bytes": machine.free_bytes},
        text=_described(facts, texts),
        candidates=tuple(found),
        recommended=best,
        why=why(best, found, target),
        hint=hint(facts),
        target=target,
    )


def soonest(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return what reaches a target first, of what fits and whose recipe was tried."""
    return min(_eligible(candidates), key=lambda one: one.elapsed_s, default=None)


def _eligible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return what fits and whose recipe was tried, with a vocabulary of the text's own; where none has one, with another."""
    known = [one for one in candidates if one.fits and one.has_time and one.preset in PRESETS]
    return [one for one in known if one.tokenizer.startswith("bpe")] or known


def why(best: Candidate | None, candidates: Sequence[Candidate], target: float | None) -> str:
    """Return in words why a candidate is recommended, or why none is."""
    if best is None and target is not None:
        return f"no candidate that fits is expected to reach {target} bits per byte on this text, however long it learns"
    if best is None and any(one.fits for one in candidates):
        return "no candidate that fits into the free memory has the time for its first steps"
    if best is None:
        return "none of the candidates fits into the free memory"
    if target is not None:
        return f"it is expected to reach {target} bits per byte first"
    if best.preset == "laptop":
        return f"no other that fits and was tried is expected to be better by more than {1 - BETTER:.0%}"
    usual = next((one for one in candidates if (one.tokenizer, one.preset) == ("bpe", "laptop")), None)
    if usual is None:
        return "it is expected to be the best of those that can learn from so short a text"
    if not (usual.fits and usual.has_time):
        return "it is expected to be the best of those that fit into memory and time"
    gain = f"it is expected to be better than laptop by {1 - _bits(best) / _bits(usual):.0%}"
    near = [one for one in _eligible(candidates) if BETTER * _bits(best) <= _bits(one) < _bits(best)]
    return f"{gain}, and a smaller one to be better still by no more than {1 - BETTER:.0%}" if near else gain


def hint(facts: TextFacts) -> str | None:
    """Return a hint where a model that has read much English would be likely to do better; None elsewhere."""
    if not facts.is_english_prose or facts.n_bytes > SMALL_TEXT_BYTES:
        return None
    return (
        "this looks like English prose, and a small text of it: starting from GPT-2 (--from gpt2) would be likely to do"
        " better, at more memory and time a step; a hint, not measured here"
    )


def _described(facts: TextFacts, texts: dict[str, TokenizedText]) -> dict[str, Any]:
    any_one = next(iter(texts.values()))
    return {
        "n_bytes": facts.n_bytes,
        "n_documents": facts.n_documents,
        "scripts": {name: round(share, 3) for name, share in facts.scripts.items()},
        "repeated": round(any_one.repeated, 4),
        "difficulty": round(any_one.difficulty, 3),
        "tokens": {name: round(tokens.training + tokens.held_out) for name, tokens in texts.items()},
        "vocab_size": {name: tokens.vocab_size for name, tokens in texts.items()},
    }
