"""The verbs as functions: resolve, prepare, drive the loop, save, journal.

Everything that can be refused without torch is refused before torch is imported, which is why the imports that need it
stand inside the functions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from firstwords import store
from firstwords.config import ModelConfig, RunConfig, flag, flatten, from_toml, key_types, run_config, to_toml
from firstwords.errors import ConfigError, DataError, FirstwordsError, NoInputError
from firstwords.model import cost
from firstwords.planning.budget import Budget
from firstwords.runs import folder as run_folder
from firstwords.runs import signals
from firstwords.runs.folder import RunFolder
from firstwords.text import corpus as corpora
from firstwords.text import sources
from firstwords.text.corpus import Corpus, Part
from firstwords.text.sources import Texts
from firstwords.training.events import Listener, Notice, Preparing, Started, ignore

if TYPE_CHECKING:
    from firstwords.insight.explain import Explanation
    from firstwords.model.language_model import LanguageModel
    from firstwords.recorder import Recorder, TrainResult
    from firstwords.runs.checkpoint import Checkpoint
    from firstwords.text.batches import Batches
    from firstwords.training.evaluate import Evaluation
    from firstwords.training.loop import FitConfig, Forward

SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 60, 0.8  # of what the model says during training
EVALUATIONS = 20  # in a run of known length
DEFAULT_FOR_S = 180.0  # of a run whose length nobody gave
# What may change when a run goes on; all else is what the run recorded.
RESUMABLE = frozenset(
    ("steps", "epochs", "for_s", "device", "precision", "threads", "compile", "save_every_s", "keep", "sample_prompt")
)


def train(
    text: str | Path | Sequence[str | Path] = (),
    *,
    out: str | Path | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    listener: Listener = ignore,
    started_s: float | None = None,
    **overrides: Any,
) -> TrainResult:
    """Pretrain a GPT on text and return what came of it.

    Args:
        text: Files and folders, or "-"; none: the built-in text.
        out: The run folder; by default `runs/<name of the text>`, numbered if taken.
        config: A TOML file of configuration keys.
        resume: Go on with the run in `out`.
        listener: Told what happens.
        started_s: When the process began, on `time.perf_counter()`; a time budget counts from there.
        **overrides: Configuration keys: `steps=500`, `model={"n_layers": 6}`.

    Raises:
        FirstwordsError: What is wrong and what to do; see `firstwords.errors`.
    """
    started_s = time.perf_counter() if started_s is None else started_s
    given = flatten(overrides)
    if not isinstance(text, tuple) or text:
        given |= {"text": tuple(map(str, [text] if isinstance(text, str | Path) else text)), "text_sha256": None}
    folder = Path(out) if out is not None else None
    asked = _resumed(folder, config, given) if resume else _new(folder, config, given, listener)
    prepared = _prepare(asked, listener)

    from firstwords.training import loop

    settled = _settled(asked, prepared)
    with asked.run.writing(), signals.stop_requests() as stop:
        if not resume:
            run_folder.require_new(asked.run)  # another process may have begun here meanwhile
        recorder = _begin(asked, settled, prepared, listener, started_s)
        evaluate, sample = _looks(recorder)
        events = loop.fit(
            recorder.state,
            _batches(settled, prepared),
            _fit_config(settled),
            evaluate=evaluate,
            sample=sample,
            forward=_forward(recorder),
            should_stop=stop,
        )
        with recorder.naming_the_last_good_checkpoint():
            for event in events:
                recorder.take(event)
        return recorder.result()


@dataclass(frozen=True)
class _Asked:
    """What the caller wants, before the text and the machine are looked at."""

    run: RunFolder
    config: RunConfig
    texts: Texts | None  # None: what a resumed run recorded
    fixed_vocab: bool  # the vocabulary's size was named


def _new(out: Path | None, config: str | Path | None, given: dict[str, Any], listener: Listener) -> _Asked:
    layers = [] if config is None else [from_toml(_read(Path(config)), str(config))]
    asked = run_config(*layers, given)
    corpora.parse_tokenizer(asked.tokenizer)
    _require_utf8([*asked.text, *([asked.val] if asked.val else [])])
    texts = sources.read(asked.text, encoding=asked.encoding, notice=noticed(listener))
    run = run_folder.new(out, texts.name)
    store.make_folder(run.path)
    return _Asked(run, asked, texts, any("model.vocab_size" in layer for layer in (*layers, given)))


def _resumed(out: Path | None, config: str | Path | None, given: dict[str, Any]) -> _Asked:
    """Return the recorded run with what may change on the way.

    Raises:
        ConfigError: No run is named, or something else than the length and the machine's keys is given.
        NoInputError: There is no run; a fresh one is never begun instead.
    """
    if out is None:
        raise ConfigError("--resume needs --out", where="--resume", do="name the run's folder with --out")
    if config is not None:
        raise ConfigError("a resumed run has its own configuration", where="--config", do="leave --config out")
    run = run_folder.existing(out)
    recorded = from_toml(_read(run.config), str(run.config))
    if "text" in given and list(_absolute(given["text"])) == list(recorded.get("text", ())):
        given = {key: value for key, value in given.items() if not key.startswith("text")}
    for key, value in given.items():
        if (
            key != "text_sha256"
            and key in key_types()
            and key not in RESUMABLE
            and run_config(recorded, {key: value}) != run_config(recorded)
        ):
            raise ConfigError(
                "a resumed run goes on with what it recorded",
                where=flag(key),
                do="leave it out, or begin a new run with another --out",
            )
    return _Asked(run, run_config(recorded, given), None, fixed_vocab=True)


def _prepare(asked: _Asked, listener: Listener) -> Corpus:
    """Return the prepared text of a run.

    Raises:
        DataError: Not the text that the configuration names by its hash, or too short for the context.
    """
    config = asked.config
    prepared = _prepare_anew(config, asked.texts, listener) if asked.texts else _prepare_again(asked, listener)
    if config.text_sha256 not in (None, prepared.text_sha256):
        raise DataError(
            "the text is not the one that the run was made from",
            where=", ".join(config.text) or "text",
            why=f"its SHA-256 is {prepared.text_sha256[:12]}, recorded is {str(config.text_sha256)[:12]}",
            do="restore the text, or begin a new run",
        )
    corpora.require_context(prepared.train, config.model.context_length)
    if not prepared.val.n_tokens:
        listener(Notice("the text is too short for a held-out part: no held-out figures, and the last model is the best"))
    return prepared


def _prepare_again(asked: _Asked, listener: Listener) -> Corpus:
    """Return a resumed run's text: read again, or as it was prepared where the source is gone."""
    recorded = _recorded_corpus(asked.run)
    try:
        if "-" in asked.config.text:
            raise NoInputError("standard input cannot be read again", where="-")
        texts = sources.read(asked.config.text, encoding=asked.config.encoding, notice=noticed(listener))
        return _prepare_anew(asked.config, texts, listener)
    except NoInputError as error:
        if recorded is None or not recorded.is_dir():
            raise
        listener(Notice(f"{error}; going on with the prepared text"))
        return corpora.load(recorded)


def _prepare_anew(config: RunConfig, texts: Texts, listener: Listener) -> Corpus:
    notice = noticed(listener)
    return corpora.prepare(
        texts,
        config.tokenizer,
        cache=cache_folder(),
        val_fraction=config.val_fraction,
        val=None if config.val is None else sources.read([config.val], encoding=config.encoding, notice=notice),
        notice=notice,
        progress=lambda what, share: listener(Preparing(what, share)),
    )


def _recorded_corpus(run: RunFolder) -> Path | None:
    if not run.corpus.is_file():
        return None
    try:
        return cache_folder() / str(json.loads(run.corpus.read_bytes())["folder"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "is damaged", where=str(run.corpus), why=str(error), do="remove it; the text is read again"
        ) from error


def _settled(asked: _Asked, prepared: Corpus) -> RunConfig:
    """Return the configuration with everything decided that was left open: what the run records.

    Raises:
        ConfigError: A vocabulary smaller than the tokenizer's, a missing device, a model beyond the machine's memory.
    """
    import torch

    from firstwords.planning import machine

    config = asked.config
    model = config.model if asked.fixed_vocab else _with_vocab(config.model, prepared.tokenizer.vocab_size)
    if model.vocab_size < prepared.tokenizer.vocab_size:
        raise ConfigError(
            f"{model.vocab_size} is smaller than the tokenizer's {prepared.tokenizer.vocab_size} ids",
            where="--model.vocab-size",
            do="leave it out, or give at least that",
        )
    device = machine.device(config.device)
    steps = config.steps if config.epochs is None else _batches(config, prepared).steps(config.epochs)
    micro = config.micro_batch_size or cost.micro_batch_size(model, config.batch_size)
    needed, there = cost.training_bytes(model, micro), machine.memory_bytes()
    if device.type == "cpu" and there is not None and needed > there:
        raise ConfigError(
            f"training needs about {needed / 1e9:.1f} GB, this machine has {there / 1e9:.1f} GB",
            where="--model.emb-dim",
            do="take a smaller preset, --micro-batch-size or --model.context-length",
        )
    warmup_steps = min(config.optim.warmup_steps, steps // 4) if steps else config.optim.warmup_steps
    return dataclasses.replace(
        config,
        text=_absolute(config.text),
        val=None if config.val is None else _absolute((config.val,))[0],
        tokenizer=_absolute((config.tokenizer,))[0] if Path(config.tokenizer).is_file() else config.tokenizer,
        text_sha256=prepared.text_sha256,
        steps=steps,
        epochs=None,
        for_s=DEFAULT_FOR_S if steps is None and config.for_s is None else config.for_s,
        micro_batch_size=micro,
        eval_every=config.eval_every or (max(1, steps // EVALUATIONS) if steps else None),
        device=str(device),
        precision=machine.precision(config.precision, device),
        threads=config.threads or torch.get_num_threads(),
        compile="off" if config.compile == "auto" else config.compile,
        model=model,
        optim=dataclasses.replace(config.optim, warmup_steps=warmup_steps),
    )


def _require_utf8(names: Sequence[str]) -> None:
    """Raise a DataError for a name that no configuration file can hold."""
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise DataError("the name is not UTF-8", where=ascii(name), do="rename it, or send it to standard input: -")


def _absolute(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path if path == "-" else str(Path(path).absolute()) for path in paths)


def _with_vocab(model: ModelConfig, vocab_size: int) -> ModelConfig:
    return dataclasses.replace(model, vocab_size=vocab_size)


def _begin(asked: _Asked, config: RunConfig, prepared: Corpus, listener: Listener, started_s: float) -> Recorder:
    """Return the record of a run at its first or resumed step; the caller holds the run's lock."""
    import torch

    from firstwords.model.gpt import GPTModel
    from firstwords.planning import machine
    from firstwords.recorder import Recorder
    from firstwords.training.optim import optimizers
    from firstwords.training.state import TrainState

    run, resume, device = asked.run, asked.texts is None, torch.device(config.device)
    assert config.threads is not None
    torch.set_num_threads(config.threads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = GPTModel(config.model).to(device)
    state = TrainState(model, optimizers(model, config.optim, machine.DTYPES[config.precision]))
    state.total_steps, state.eval_every = config.steps, config.eval_every
    fingerprint = machine.fingerprint(device, config.precision, config.compile)
    recorder = Recorder(run, config, prepared, state, fingerprint, listener)
    if resume:
        recorder.restore()
    now_s = time.perf_counter()
    if config.for_s is not None:
        recorder.budget = Budget(started_s + config.for_s - state.elapsed_s, config.for_s, now_s)
    state.elapsed_s += now_s - started_s
    corpus = {"folder": prepared.folder.name, "text_sha256": prepared.text_sha256}
    store.write(run.corpus, store.canonical_json(corpus))
    store.write(run.config, to_toml(config).encode())
    run.metrics.add("resume" if resume else "start", {"step": state.step, "total_steps": state.total_steps})
    listener(Started(run.path, config, prepared, state.step))
    return recorder


def _looks(recorder: Recorder) -> tuple[Callable[[], Evaluation | None], Callable[[int], str]]:
    """Return what the loop asks now and then: how good the model is, and what it says."""
    from firstwords.model.language_model import LanguageModel
    from firstwords.model.sampling import Sampling
    from firstwords.planning import machine
    from firstwords.training.evaluate import evaluate as evaluate_part

    config, corpus, model = recorder.config, recorder.corpus, recorder.state.model
    dtype, sampling = machine.DTYPES[config.precision], Sampling(temperature=SAMPLE_TEMPERATURE)
    lm = LanguageModel(model, corpus.tokenizer, dtype=dtype)

    def sample(step: int) -> str:
        seed = config.seed + step
        return lm.generate(config.sample_prompt, max_new_tokens=SAMPLE_TOKENS, sampling=sampling, seed=seed)

    return lambda: evaluate_part(model, corpus.val, dtype), sample


def _forward(recorder: Recorder) -> Forward:
    import torch

    features = recorder.state.model.features
    return torch.compile(features) if recorder.config.compile == "on" else features


def _batches(config: RunConfig, prepared: Corpus) -> Batches:
    from firstwords.text.batches import Batches

    return Batches(prepared.train, config.model.context_length, config.batch_size, config.seed, shift=config.shift_windows)


def _fit_config(config: RunConfig) -> FitConfig:
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
    )


def load(source: str | Path, *, notice: Callable[[str], None] = lambda _: None) -> LanguageModel:
    """Return the model of a run folder (its best checkpoint) or of a checkpoint folder, with its tokenizer.

    Raises:
        NoInputError: Neither is there.
        DataError: It is damaged.
    """
    found = _checkpoint(Path(source), notice)

    from firstwords.model.gpt import GPTModel
    from firstwords.model.language_model import LanguageModel
    from firstwords.planning import machine
    from firstwords.runs import checkpoint
    from firstwords.text import tokenizer as tokenizers
    from firstwords.training.state import load_model_tensors

    saved = found.json(checkpoint.CONFIG)
    model = GPTModel(ModelConfig(**saved["model"]))
    load_model_tensors(model, found.tensors(checkpoint.MODEL), str(found.folder))
    tokenizer_path = found.folder / checkpoint.TOKENIZER
    tokenizer = tokenizers.from_json(tokenizer_path.read_bytes(), str(tokenizer_path))
    return LanguageModel(model.eval(), tokenizer, found.step, machine.DTYPES[saved["precision"]])


def evaluate(
    source: str | Path,
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    encoding: str | None = None,
    listener: Listener = ignore,
) -> Evaluation:
    """Return how good a model is on a text; by default on the held-out part of its run.

    Raises:
        NoInputError: No such model or text.
        DataError: The text is empty, or the run has no held-out part.
    """
    lm = load(source, notice=noticed(listener))

    from firstwords.training.evaluate import evaluate as evaluate_part

    if text is None:
        part = _held_out(Path(source), listener)
    else:
        paths = [text] if isinstance(text, str | Path) else text
        texts = sources.read(paths, encoding=encoding, notice=noticed(listener))
        part = corpora.prepare(texts, lm.tokenizer, cache=cache_folder(), val_fraction=0.0).train
    evaluation = evaluate_part(lm.model, part, lm.dtype)
    if evaluation is None:
        raise DataError("there is no held-out text to evaluate on", where=str(source), do="name a text")
    return evaluation


def explain(source: str | Path, text: str, *, listener: Listener = ignore) -> Explanation:
    """Return the chapter's six steps on `text`, token by token.

    Raises:
        NoInputError: No such model.
        DataError: Fewer than two tokens.
    """
    lm = load(source, notice=noticed(listener))

    from firstwords.insight.explain import explain as explain_text

    return explain_text(lm, text)


def info(source: str | Path, *, listener: Listener = ignore) -> dict[str, Any]:
    """Return what is in a run or checkpoint.

    Raises:
        NoInputError: Neither is there.
    """
    found = _checkpoint(Path(source), noticed(listener))

    from firstwords.runs import checkpoint

    config, state = found.json(checkpoint.CONFIG), found.json(checkpoint.STATE)
    model = ModelConfig(**config["model"])
    run = RunFolder(Path(source))
    steps = _newest_step(run) if run.exists else found.step
    return {
        "run": str(source),
        "parameters": cost.parameters(model),
        "steps": steps,
        "best_step": state["best_step"],
        "checkpoint": str(found.folder),
        "weights_sha256": found.weights_sha256,
        "precision": config["precision"],
        "config": config["model"],
        "text": run_config(from_toml(_read(run.config), str(run.config))).text if run.exists else None,
    }


def cache_folder() -> Path:
    """Return where prepared texts are kept: `FIRSTWORDS_CACHE`, or the user's cache folder."""
    given = os.environ.get("FIRSTWORDS_CACHE")
    return (Path(given) if given else platformdirs.user_cache_path("firstwords")) / "corpora"


def _checkpoint(source: Path, notice: Callable[[str], None]) -> Checkpoint:
    if not (source / store.MANIFEST).is_file() and not RunFolder(source).exists:
        raise NoInputError("there is no run or checkpoint", where=str(source), do="name a folder that train made")
    from firstwords.runs import checkpoint

    if (source / store.MANIFEST).is_file():
        return checkpoint.Checkpoint(source, store.verify(source))
    run = RunFolder(source)
    newest = checkpoint.newest(run.checkpoints, notice, aside=False)
    if newest is None:
        raise NoInputError("the run has no checkpoint yet", where=str(source), do="go on with train --resume")
    best_step = newest.json(checkpoint.STATE)["best_step"]
    if best_step is None or best_step == newest.step:
        return newest
    try:
        return checkpoint.at_step(run.checkpoints, best_step)
    except FirstwordsError as error:
        notice(f"{error}; using step {newest.step} instead of the best")
        return newest


def _newest_step(run: RunFolder) -> int:
    from firstwords.runs import checkpoint

    return max(int(path.name.removeprefix(checkpoint.PREFIX)) for path in checkpoint.existing(run.checkpoints))


def _held_out(source: Path, listener: Listener) -> Part:
    run = RunFolder(source if (source / "config.toml").is_file() else source.parent.parent)
    if not run.exists:
        raise NoInputError("a checkpoint by itself has no held-out text", where=str(source), do="name a text")
    recorded = _recorded_corpus(run)
    if recorded is not None and recorded.is_dir():
        return corpora.load(recorded).val
    return _prepare(_resumed(run.path, None, {}), listener).val


def noticed(listener: Listener) -> Callable[[str], None]:
    """Return a function that tells a listener a line for a person."""
    return lambda line: listener(Notice(line))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NoInputError("no such file", where=str(path), do="check the name") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("cannot be read", where=str(path), why=str(error)) from error
