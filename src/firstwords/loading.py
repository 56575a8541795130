"""A model, and the text that it learnt from or is judged on, from wherever a person names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firstwords import asking, preparing, reading, store
from firstwords.config import model_config
from firstwords.errors import DataError, FirstwordsError, NoInputError, Notify, ignore_line, quoted
from firstwords.events import Listener, Notice, Preparing, notices_to
from firstwords.model import cost
from firstwords.runs.folder import RunFolder
from firstwords.text import corpus as corpora
from firstwords.text import sources
from firstwords.text.corpus import Corpus, Part
from firstwords.weights import archive

if TYPE_CHECKING:
    from torch import Tensor

    from firstwords.model.gpt import GPTModel
    from firstwords.model.language_model import LanguageModel
    from firstwords.runs.checkpoint import Checkpoint
    from firstwords.text.tokenizer import Tokenizer

LOOKED_UP_PIECES, LOOKED_UP_TOKENS = 32, 200  # of a text that are looked for in what a model learnt from, all of a short one
LEARNT_SHARE = 0.1  # of a text that is found there, from which on that is told: set phrases and quotations are less
MODEL_SUFFIXES = (*archive.SUFFIXES, ".safetensors")  # of files that are a model by themselves


def load(source: str | Path, *, notice: Notify = ignore_line) -> LanguageModel:
    """Return the model of a run folder (its best checkpoint), of a checkpoint folder, or from elsewhere, with its tokenizer.

    From then on this process computes with no more threads than a container has the time of, which PyTorch does not know,
    and numbers below 1e-38 count as 0 (`planning.process.flush_denormals`). A model that learnt in bfloat16 is computed in
    float32 on a CPU without instructions for it.

    Raises:
        NoInputError: None of them is there.
        DataError: It is damaged.
    """
    lm = read_model(source, notice)

    import torch

    from firstwords.planning import matmul, process

    torch.set_num_threads(process.usable_threads())
    dtype = matmul.computable(lm.dtype, store.cache_folder())
    if dtype == lm.dtype:
        return lm
    notice("it learnt in bfloat16, which is slow on this processor: it is computed in float32 here")
    return dataclasses.replace(lm, dtype=dtype)


def read_model(source: str | Path, notice: Notify = ignore_line) -> LanguageModel:
    """Return what `load` does, and leave the threads and the precision to the run that goes on."""
    source = locate(source, notice)
    found = None if is_foreign(source) else checkpoint_of(source, notice)

    from firstwords.planning import machine, process

    process.flush_denormals()
    if found is None:
        from firstwords.weights import reader

        return reader.read(source, notice=notice)

    from firstwords.model.language_model import LanguageModel
    from firstwords.runs import checkpoint
    from firstwords.text import tokenizer as tokenizers

    saved = found.json(checkpoint.CONFIG)
    model = _restored(saved.get("model"), found.tensors(checkpoint.MODEL), str(found.folder))
    tokenizer = tokenizers.read(found.folder / checkpoint.TOKENIZER)
    return LanguageModel(model.eval(), tokenizer, found.step, machine.dtype_of(saved.get("precision"), str(found.folder)))


def _restored(described: Any, tensors: Mapping[str, Tensor], where: str) -> GPTModel:
    """Return the model that a checkpoint describes, with its weights.

    The shape is held against the size of the weights before a model of it is built: a file of a few bytes cannot ask for
    a thousand million layers.

    Raises:
        ConfigError: An impossible shape.
        DataError: Weights of another shape.
    """
    from firstwords.model.gpt import load_weights, uninitialised

    config = model_config(described, where)
    wanted, there = cost.parameters(config), sum(tensor.numel() for tensor in tensors.values())
    if wanted != there:
        raise DataError(f"has {there} parameters, its configuration needs {wanted}", where=where)
    model = uninitialised(config)
    load_weights(model, tensors.items(), where)
    return model


def require_finite(lm: LanguageModel, source: str | Path) -> None:
    """Raise a DataError for a model that holds numbers which are not finite: it gives no probabilities."""
    wrong = next((name for name, one in lm.model.named_parameters() if not bool(one.isfinite().all())), None)
    if wrong is not None:
        raise DataError("holds numbers that are not finite", where=str(source), why=f"in {wrong}", do="name another model")


def named_texts(text: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """Return the paths that were named.

    Raises:
        NoInputError: An empty sequence, such as a pattern that no file matched; it does not mean the built-in text.
    """
    paths = tuple(map(str, [text] if isinstance(text, str | Path) else text))
    if not paths:
        raise NoInputError("no text is named", where="text", do="name files or folders, or leave it out")
    return paths


def model_and_text(
    source: str | Path,
    text: str | Path | Sequence[str | Path] | None,
    encoding: str | None,
    listener: Listener,
    *,
    others: Sequence[str | Path] = (),
    look_up: bool = False,
) -> tuple[LanguageModel, Part]:
    """Return a model and the text that it is to be judged on; what is not there is told before anything is loaded.

    Args:
        source: As for `load`.
        text: None: the held-out part of its run.
        encoding: Of the text.
        listener: Told where the text is what the model learnt from.
        others: Models that must be there too.
        look_up: Look whether parts of it are, which takes a pass over all that it learnt from.
    """
    require_there(Path(source))
    if text is None and not run_of(Path(source)).exists:
        raise NoInputError("a model by itself has no held-out text", where=str(source), do="name a text")
    texts = None if text is None else sources.read(named_texts(text), encoding=encoding, notice=notices_to(listener))
    for other in others:
        require_there(locate(other, notices_to(listener)))
    lm = load(source, notice=notices_to(listener))
    if texts is None:
        return lm, _held_out(Path(source), listener)
    prepared = corpora.prepare(texts, lm.tokenizer, cache=corpora.cache_folder(), held_out=0.0)
    if prepared.text_sha256 == _learnt_sha256(run_of(Path(source))):
        listener(Notice("this is the very text that it learnt from: such figures say nothing of any other"))
    elif look_up:
        tell_of_learnt_text(source, prepared.train, lm.tokenizer, listener)
    return lm, prepared.train


def tell_of_learnt_text(
    source: str | Path,
    judged: Part,
    tokenizer: Tokenizer,
    listener: Listener,
    *,
    name: str = "this text",
    within_s: float | None = None,
) -> None:
    """Say so where much of a text that a model is judged on stands in what it learnt from, as far as that is here.

    Args:
        source: The model.
        judged: The text.
        tokenizer: Of its ids.
        listener: Told so.
        name: What the text is called.
        within_s: A time budget: what takes too much of it is not gone through.
    """
    from firstwords.insight.memorisation import TrainingText, copied_share, memorisation_s
    from firstwords.planning import budget

    ranges = corpora.evenly(len(judged.ids), LOOKED_UP_PIECES, LOOKED_UP_TOKENS)  # from all over it
    pieces = [piece for start, end in ranges for piece in corpora.split_at_ends(judged.ids[start:end], tokenizer)]
    samples = [tokenizer.decode(piece.tolist()) for piece in pieces]
    for learnt in _learnt_texts(Path(source)):
        text = TrainingText(learnt.train, learnt.tokenizer)
        if within_s is not None and not budget.has_room_for(memorisation_s(learnt.train.n_bytes), within_s):
            continue
        if not text.is_kept:
            listener(Preparing(f"looking for the text in what {source} learnt from", None))
        share = copied_share(samples, text)
        if share >= LEARNT_SHARE:
            what = f"about {share:.0%} of {name}, word for word, is what {source} learnt from"
            listener(Notice(f"{what}: such figures say little of any other"))
            return


def _learnt_texts(source: Path) -> Iterator[Corpus]:
    """Yield the prepared texts that a model learnt from, as far as they are here: its run's, then those before `--from`."""
    seen = set[Path]()
    while (run := run_of(source)).exists and (path := run.path.absolute()) not in seen:
        seen.add(path)
        found = kept_corpus(source)
        if found is not None:
            yield found
        try:
            began_from = run.recorded_config().get("from_")
        except FirstwordsError:
            return
        if not isinstance(began_from, str) or not Path(began_from).is_absolute():  # random weights, or GPT-2's
            return
        source = Path(began_from)


def _learnt_sha256(run: RunFolder) -> str | None:
    """Return the SHA-256 of the text of a run; None where it is not known."""
    try:
        return reading.read_json(run.corpus).get("text_sha256") if run.corpus.is_file() else None
    except DataError:
        return None


def locate(source: str | Path, notice: Notify) -> Path:
    """Return where a model is; one of GPT-2's names is fetched, unless something of that name is here."""
    from firstwords.weights import hub

    if str(source) in hub.NAMES and not Path(source).exists():
        return hub.fetch(str(source), store.cache_folder() / "hub.json", notice)
    return Path(source)


def is_foreign(source: Path) -> bool:
    """Whether a model from elsewhere is there: no run, no checkpoint of ours."""
    by_itself = source.is_file() and source.suffix in MODEL_SUFFIXES
    if RunFolder(source).exists or not (by_itself or (source / "config.json").is_file()):
        return False
    if not (source / store.MANIFEST).is_file():
        return True
    try:
        return store.read_manifest(source).get("kind") != "checkpoint"
    except DataError:  # damaged, or another tool's file of that name
        return "model_type" in reading.read_json(source / "config.json")


def require_there(source: Path) -> None:
    """Raise a NoInputError where no model is; one of GPT-2's names is there, whether it was fetched yet or not."""
    from firstwords.weights import hub

    there = str(source) in hub.NAMES or is_foreign(source) or (source / store.MANIFEST).is_file()
    if not (there or RunFolder(source).exists):
        near = reading.nearest(source, _looks_like_a_model)
        do = f"did you mean {near}?" if near else hub.meant(str(source)) or "name a folder that train made"
        raise NoInputError("there is no run or checkpoint", where=str(source), do=do)


def _looks_like_a_model(path: Path) -> bool:
    if path.suffix in MODEL_SUFFIXES and path.is_file():
        return True
    return RunFolder(path).exists or any((path / name).is_file() for name in (store.MANIFEST, "config.json"))


def checkpoint_of(source: Path, notice: Notify) -> Checkpoint:
    """Return the best checkpoint of a run, or the one that a folder is.

    Raises:
        NoInputError: Neither is there.
        DataError: It is damaged.
    """
    require_there(source)
    from firstwords.runs import checkpoint

    if (source / store.MANIFEST).is_file():
        return checkpoint.of_manifest(source, store.verify(source, from_disk=True))
    run = RunFolder(source)
    found = checkpoint.best(run.checkpoints, notice)
    if found is None and run.was_saved:
        what, why = "no checkpoint is there", "the run was saved, so they were removed or not copied"
        raise NoInputError(what, where=str(run.checkpoints), why=why, do="put them back, or begin a new run")
    if found is None:
        do = quoted("firstwords", "train", "--resume", "--out", str(source))
        raise NoInputError("the run has no checkpoint yet", where=str(source), do=f"go on with it: {do}")
    return found


def kept_corpus(source: Path) -> Corpus | None:
    """Return the prepared text of the run that a source is or belongs to; None where it is not here, or damaged."""
    run = run_of(source)
    try:
        recorded = run.recorded_corpus() if run.exists else None
        return None if recorded is None else corpora.load(recorded)
    except (DataError, NoInputError):
        return None


def _held_out(source: Path, listener: Listener) -> Part:
    part = prepared_text(run_of(source), listener).val
    if not part.n_tokens:
        raise DataError("there is no held-out text to evaluate on", where=str(source), do="name a text")
    return part


def prepared_text(run: RunFolder, listener: Listener) -> Corpus:
    """Return the prepared text of a run, made again where the cache has lost it."""
    recorded = run.recorded_corpus()
    if recorded is not None and corpora.is_there(recorded):
        return corpora.load(recorded)
    return preparing.prepare(asking.resumed(run.path, None, {}), listener)


def run_of(source: Path) -> RunFolder:
    """Return the run that a source is, or is a checkpoint of; else one that does not exist."""
    if RunFolder(source).exists:
        return RunFolder(source)
    parent = source.absolute().parent
    run = RunFolder(parent.parent)
    return run if run.checkpoints == parent else RunFolder(source)
