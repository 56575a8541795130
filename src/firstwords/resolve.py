"""What the caller wants, the text and the machine become what the run records: everything that was left open is decided."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from firstwords import store
from firstwords.asking import Asked, absolute, no_best
from firstwords.config import Precision, Role, RunConfig, flag, flatten, keys_of, run_config
from firstwords.errors import ConfigError
from firstwords.model import cost
from firstwords.planning import known
from firstwords.text import corpus as corpora
from firstwords.text.corpus import Corpus

if TYPE_CHECKING:
    import torch

    from firstwords.planning.known import Compiling
    from firstwords.planning.plan import Candidate, Machine, TokenizedText
    from firstwords.planning.speed import Speed
    from firstwords.text.batches import Batches
    from firstwords.training.loop import FitConfig

MOST_SAVED_SHARE = 0.9  # of a step's time by compiling: what is measured on one day is held against another day's speed
PACE_SHARE, PACE_S = 0.02, 2.0  # of a time budget, and at most, to learn how fast the machine is now


def settle(
    asked: Asked, prepared: Corpus, difficulty: float, repeated: float = 0.0, started_s: float | None = None
) -> tuple[RunConfig, Candidate]:
    """Return the configuration with everything decided that was left open, which the run records, and what to expect of it.

    Args:
        asked: What the caller wants.
        prepared: The text.
        difficulty: Of the text; see `planning.difficulty`.
        repeated: Of its sample; see `planning.facts`.
        started_s: When the process began, on `time.perf_counter()`; by default now.

    Raises:
        ConfigError: A vocabulary smaller than the tokenizer's, a missing device, a model beyond a CPU's memory, or
            beyond the time budget of a new run.
    """
    from firstwords.planning import machine, matmul, plan, process, recipe

    started_s = time.perf_counter() if started_s is None else started_s
    config = _of_text(asked, prepared)
    device = machine.device(config.device)
    if device.type == "cpu" and asked.was_on_gpu:
        of_a_cpu: dict[str, Any] = {"micro_batch_size": None, "precision": "auto", "compile": "auto"}
        config = dataclasses.replace(config, **{key: of_a_cpu[key] for key in of_a_cpu.keys() - asked.given})
    with process.threads(config.threads):
        cache = store.cache_folder()
        precision = matmul.precision(config.precision, device, cache)
        found = matmul.known_of(device, cache)
        config = dataclasses.replace(config, precision=precision, device=str(device))
        tokens = plan_tokens(prepared, config.tokenizer, difficulty, repeated)
        here = plan.Machine(speed(device, precision, config, found), precision, machine.free_bytes(), device.type != "cpu")
        tokens = dataclasses.replace(tokens, start_s=time.perf_counter() - started_s + recipe.BEGIN_S)
        fitted = functools.partial(_fitted_to, asked, config, prepared)
        is_timed = device.type == "cpu" and config.compile != "on" and config.budget_s is not None
        if device.type == "cuda" or (is_timed and asked.begins):  # all of a resumed run is decided
            _require_memory(fitted(tokens, here), asked)  # before a step of it is tried
            here = _at_this_moment(here, functools.partial(fitted, tokens))
    tokens = dataclasses.replace(tokens, start_s=time.perf_counter() - started_s + recipe.BEGIN_S)
    here = dataclasses.replace(here, free_bytes=machine.free_bytes())
    config = fitted(tokens, here)
    corpora.require_context(prepared.train, config.model.context_length)
    model, batch_size = config.model, config.batch_size
    assert batch_size is not None
    micro = config.micro_batch_size or cost.micro_batch_size(model, batch_size, machine.gpu_bytes(device), precision)
    _require_memory(config, asked)
    config = dataclasses.replace(
        config,
        text=absolute(config.text),
        val=None if config.val is None else absolute((config.val,))[0],
        text_sha256=prepared.text_sha256,
        micro_batch_size=micro,
        threads=config.threads or process.usable_threads(),
    )
    config, expected = _expected(config, tokens, here, found)
    if asked.begins:
        _require_time(expected, config)
    if expected.memory_bytes is None:
        return config, expected
    had_bytes = machine.peak_bytes() or 0  # more where a larger model was taken to measure the speed by
    return config, dataclasses.replace(expected, memory_bytes=max(expected.memory_bytes, had_bytes))


def _of_text(asked: Asked, prepared: Corpus) -> RunConfig:
    """Return what is asked, with as many ids as the text's tokenizer has.

    Raises:
        ConfigError: A vocabulary that is too small, or a best that no held-out text can tell.
    """
    config = asked.config
    if config.until == "best" and not prepared.val.n_tokens:
        raise no_best()
    if "model.vocab_size" not in asked.given:
        config = _with_model(config, vocab_size=prepared.tokenizer.vocab_size)
    if config.model.vocab_size < prepared.tokenizer.vocab_size:
        raise ConfigError(
            f"{config.model.vocab_size} is smaller than the tokenizer's {prepared.tokenizer.vocab_size} ids",
            where="--model.vocab-size",
            do="leave it out, or give at least that",
        )
    return config


def _require_memory(config: RunConfig, asked: Asked) -> None:
    """Raise a ConfigError for what a CPU's memory does not hold; that of a GPU is found out on the way."""
    from firstwords.planning import machine

    micro = config.micro_batch_size or cost.micro_batch_size(config.model, config.batch_size or 1)
    needed, there = cost.training_bytes(config.model, micro, config.precision), machine.memory_bytes()
    if config.on_cpu and there is not None and needed > there:
        where, model = "--model.emb-dim", "model" if config.from_ else "preset"
        do = f"take a smaller {model}, --micro-batch-size or --model.context-length"
        if not asked.begins:  # all else is decided
            where, do = "--micro-batch-size", "take a smaller one, or go on where there is more memory"
        raise ConfigError(
            f"training needs about {needed / 1e9:.1f} GB, this machine has {there / 1e9:.1f} GB", where=where, do=do
        )


def _expected(config: RunConfig, tokens: TokenizedText, here: Machine, found: known.Known) -> tuple[RunConfig, Candidate]:
    """Return the configuration with `compile` on or off, and what to expect of it.

    For `auto` it is on where what compiling saves is known or believed, and is worth it in so long a run.
    """
    from firstwords.planning import plan

    expected = plan.of_config(config, tokens, here)
    compiling = None if config.compile == "off" else _compiling(config, found, here.speed)
    if config.compile == "auto":
        learnt = expected.steps * expected.batch_size * config.model.context_length
        config = dataclasses.replace(config, compile="on" if compiling is not None and compiling.pays(learnt) else "off")
    if compiling is None or config.compile == "off":
        return config, expected
    share = min(MOST_SAVED_SHARE, compiling.saves_s * here.speed.of_run(config))
    tokens = dataclasses.replace(tokens, start_s=tokens.start_s + compiling.takes_s)
    return config, plan.of_config(config, tokens, dataclasses.replace(here, speed=here.speed.quicker(share)))


def _compiling(config: RunConfig, found: known.Known, speed: Speed) -> Compiling | None:
    """Return what compiling takes and saves: as it was measured for this shape, or is believed of a GPU; None: not known.

    Args:
        config: With a device and a precision.
        found: What was measured on this machine.
        speed: Of this machine, uncompiled.
    """
    import torch

    from firstwords.planning import machine

    measured = found.compiling.get(known.shape_of(config.model, config.precision))
    if measured is not None or not speed.points or not machine.compiles_for_gpu(torch.device(config.device)):
        return measured
    tokens_per_s = speed.of_run(config)
    share = tokens_per_s * cost.training_flops(config.model) / found.rates[config.precision]
    return known.believed(share, tokens_per_s)


def speed(device: torch.device, precision: Precision, config: RunConfig, found: known.Known) -> Speed:
    """Return how fast this machine learns: as `firstwords plan` measured it within a day, else guessed in milliseconds."""
    from firstwords.planning import machine, matmul
    from firstwords.planning import speed as speeds

    before = None if config.compile == "on" else found.speed(precision)
    return before or speeds.guessed(matmul.flops_per_s(device, machine.DTYPES[precision]))


def _at_this_moment(here: Machine, fitted: Callable[[Machine], RunConfig]) -> Machine:
    """Return the machine as fast as some steps of what is to be trained show it: a fiftieth of the time.

    The first steps tell how much slower or faster everything is than it was. Where another size is the better one then, it
    is measured as well: what tells sizes apart is only about right. On a GPU another batch is another speed, too.
    """
    from firstwords.planning import measure

    def way(config: RunConfig) -> tuple[str, int | None]:
        return config.preset, None if config.on_cpu else config.batch_size

    measured = list[tuple[str, int | None]]()
    while way(config := fitted(here)) not in measured:
        point = measure.point_now(config, here.speed, min(PACE_S, PACE_SHARE * (config.budget_s or math.inf)))
        if point is not None:
            here = dataclasses.replace(here, speed=here.speed.now(point, others=not measured))
        measured.append(way(config))
    return here


def plan_tokens(prepared: Corpus, tokenizer: str, difficulty: float, repeated: float) -> TokenizedText:
    """Return a prepared text as a plan sees it."""
    from firstwords.planning.plan import TokenizedText

    train = prepared.train
    name = "bpe" if tokenizer == "bpe" else prepared.tokenizer.name
    return TokenizedText(
        name, prepared.tokenizer.vocab_size, len(train.ids), train.n_bytes, prepared.val.n_tokens, difficulty, repeated
    )


def _chosen(config: RunConfig, asked: Asked, tokens: TokenizedText, here: Machine, n_tokens: int) -> RunConfig:
    """Return the configuration with the preset that is recommended, where the size is to be chosen."""
    from firstwords.planning import plan

    for_s = config.budget_s
    if for_s is None or not asked.is_free:
        return config
    able = [preset for preset in plan.PRESETS if plan.can_learn(preset, n_tokens)]
    found = [plan.of_preset(tokens, preset, for_s, here) for preset in able]
    best = plan.recommended(found) or min(found, key=lambda one: one.least_s, default=None)
    if best is None or best.preset == config.preset:
        return config
    other = run_config({"preset": best.preset, "model.vocab_size": config.model.vocab_size})
    return dataclasses.replace(config, preset=best.preset, model=other.model, optim=other.optim)


def _fitted_to(asked: Asked, config: RunConfig, prepared: Corpus, tokens: TokenizedText, here: Machine) -> RunConfig:
    """Return the configuration with all that follows from the text, the time and the machine's speed."""
    chosen = _chosen(config, asked, tokens, here, prepared.train.n_tokens)
    return _fitted(chosen, asked.given, tokens, here, prepared)


def _fitted(config: RunConfig, given: frozenset[str], tokens: TokenizedText, here: Machine, prepared: Corpus) -> RunConfig:
    """Return the configuration with what the run's length decides: batch, steps or time, dropout, and learning rate."""
    from firstwords.planning import recipe

    ring, context_length = tokens.training, config.model.context_length
    for_s, rate = config.budget_s, here.speed.of_run(config)
    learnt = None if config.epochs is None else config.epochs * ring
    if for_s is not None:
        learnt = recipe.expected_tokens(for_s, rate, tokens.overhead)
        if config.eval_tokens is None and "eval_tokens" not in given:  # a resumed run's figures stay of the same tokens
            config = dataclasses.replace(config, eval_tokens=recipe.eval_tokens(for_s, rate))
    micro = config.micro_batch_size or 1  # which fits into a batch whose size nobody named
    batch_size = config.batch_size or micro * max(1, round(recipe.batch_size(context_length, learnt, ring) / micro))
    config = dataclasses.replace(config, batch_size=batch_size, for_s=for_s)
    steps = config.steps if config.epochs is None else batches(config, prepared).steps(config.epochs)
    if steps is not None:
        learnt = steps * batch_size * context_length
    elif for_s is not None:  # now that the batch is known
        learnt = recipe.expected_tokens(for_s, rate, tokens.overhead, recipe.named_rhythm(config, batch_size))
    if learnt is not None and config.preset.startswith("laptop"):
        if "model.drop_rate" not in given:
            config = _with_model(config, drop_rate=recipe.drop_rate(learnt / ring, config.model.emb_dim))
        if "optim.peak_lr" not in given:
            peak_lr = recipe.peak_lr_share(learnt / ring) * config.optim.peak_lr
            config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, peak_lr=peak_lr))
    return dataclasses.replace(config, steps=steps, epochs=None)


def _require_time(expected: Candidate, config: RunConfig) -> None:
    """Raise a ConfigError for a model that is too large to learn anything within the time budget on this machine."""
    if not expected.has_time:
        least_s, smaller = expected.least_s, "" if expected.preset == "laptop-tiny" else ", or a smaller --preset"
        if config.from_ is not None:
            smaller = ", or a smaller model"
        longer = f"{math.ceil(least_s / 60)}m" if least_s > 99 else f"{math.ceil(least_s)}s"
        raise ConfigError(
            "no time is left to learn",
            where=flag("for_s"),
            why=f"first steps and evaluations of {config.from_ or expected.preset} take about {least_s:.0f} s,"
            f" all in there are {expected.elapsed_s:.0f} s",
            do=f"give --for {longer} or more{smaller}",
        )


def _with_model(config: RunConfig, **values: Any) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **values))


def batches(config: RunConfig, prepared: Corpus) -> Batches:
    """Return the batches of a run."""
    from firstwords.text.batches import Batches

    assert config.batch_size is not None
    return Batches(prepared.train, config.model.context_length, config.batch_size, config.seed, shift=config.shift_windows)


def fit_config(config: RunConfig) -> FitConfig:
    """Return what the loop needs of a settled configuration."""
    from firstwords.planning import machine
    from firstwords.training.loop import FitConfig

    assert config.micro_batch_size is not None
    return FitConfig(
        config.optim,
        config.seed,
        config.micro_batch_size,
        config.sample_every,
        config.save_every_s,
        machine.DTYPES[config.precision],
        compiled=config.compile == "on",
    )


def identity(config: RunConfig, prepared: Corpus) -> dict[str, str]:
    """Return the hashes that tell a run from others: with equal ones a checkpoint goes on in the same way, step for step."""
    free = keys_of(Role.RESUMABLE | Role.UNTRAINED | Role.TEXT | Role.FIRST_WEIGHTS)
    fixed = {key: value for key, value in flatten(dataclasses.asdict(config)).items() if key not in free}
    return {
        "config_sha256": store.sha256(store.canonical_json(fixed)),
        "corpus_sha256": prepared.folder.name,
        "tokenizer_sha256": store.sha256(prepared.tokenizer.json),
    }
