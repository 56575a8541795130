"""A model from elsewhere becomes ours: a folder of transformers, the chapter's state dict, nanoGPT's `ckpt.pt`."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from firstwords import reading, store
from firstwords.config import ModelConfig
from firstwords.errors import ConfigError, DataError, NoInputError, Notify, ignore_line
from firstwords.model import cost
from firstwords.model.gpt import GPTModel, load_weights, uninitialised
from firstwords.model.language_model import LanguageModel
from firstwords.runs import tensor_file
from firstwords.text import corpus
from firstwords.text import tokenizer as tokenizers
from firstwords.text.tokenizer import Tokenizer
from firstwords.weights import folder, hub, names, pickled, shapes
from firstwords.weights.folder import Weights
from firstwords.weights.names import HEAD, Dialect, bare
from firstwords.weights.pickled import Pickled

CONFIG, TOKENIZER, MERGES, PICKLED = "config.json", "tokenizer.json", "merges.txt", "pytorch_model.bin"
NANOGPT_SHAPE = "model_args"
MOST_EXTRA_ANGLES = 1 << 25  # of rotary positions, beside what the weights themselves take: 131,072 tokens of heads of 128
GPT2_ROWS = (50257, 50304)  # of a table for GPT-2's tokens: exact, and as nanoGPT rounds it up


def read(
    source: Path, *, tokenizer: str | None = None, n_heads: int | None = None, notice: Notify = ignore_line
) -> LanguageModel:
    """Return the model with its tokenizer, in float32. Its weights are read one tensor at a time.

    Args:
        source: A folder with `config.json` and weights, a file of `torch.save`, a `.safetensors` with the chapter's names.
        tokenizer: Where the source has none: gpt2, bytes, or the path of a `tokenizer.json`.
        n_heads: Of a state dict, which does not say it; by default those of GPT-2's size.
        notice: Told of what was assumed.

    Raises:
        NoInputError: Nothing is there.
        DataError: It is damaged, or a model that ours cannot be.
        ConfigError: It does not say enough, its heads or its tokenizer, or says otherwise than what is given.
    """
    if not source.exists():
        raise NoInputError("there is nothing", where=str(source), do=hub.meant(str(source)) or "check the name")
    if source.is_dir() and not (source / CONFIG).is_file():
        do = "name the folder with its config.json, or a .pth; what train made is used as it is"
        raise DataError(f"has no {CONFIG}", where=str(source), do=do)
    with _opened(source, n_heads, notice) as (config, dialect, weights):
        model = _filled(config, dialect, weights)
    return LanguageModel(model.eval(), _tokenizer(source, tokenizer, config, notice))


@contextmanager
def _opened(source: Path, n_heads: int | None, notice: Notify) -> Iterator[tuple[ModelConfig, Dialect, Weights]]:
    with tempfile.TemporaryDirectory(prefix="firstwords-") as name:
        if source.is_dir():
            config, dialect = shapes.from_hf(reading.read_json(source / CONFIG), str(source / CONFIG))
            only_pickled = (source / PICKLED).is_file() and not any(source.glob(f"*{folder.WHOLE}*"))
            found = _unpickled(source / PICKLED, name).weights if only_pickled else folder.find(source)
            if dialect == "gpt2" and not config.qkv_bias:  # transformers trains the zeros that stand for it in an export
                config = dataclasses.replace(config, qkv_bias=_has_qkv_bias(found))
            _require_no_heads(n_heads, source)
            yield config, dialect, found
            return
        if source.suffix == tensor_file.SUFFIX:
            if _is_ours(source.parent):
                why, do = "its shape stands beside it", f"name the folder: {source.parent}"
                raise ConfigError("is a part of what firstwords made", where=str(source), why=why, do=do)
            found = folder.find(source)
            yield _chapter_shape(found, n_heads, notice), "chapter", found
            return
        taken = _unpickled(source, name)
        if isinstance(arguments := taken.scalars.get(NANOGPT_SHAPE), dict):
            _require_no_heads(n_heads, source)
            yield shapes.from_nanogpt(arguments, str(source)), "nanogpt", taken.weights
            return
        yield _chapter_shape(taken.weights, n_heads, notice), "chapter", taken.weights


def _unpickled(source: Path, temporary: str) -> Pickled:
    """Return what is in a pickled file, by whose name its faults are told, and not by that of the copy."""
    taken = pickled.convert(source, Path(temporary) / "out")
    return dataclasses.replace(taken, weights=dataclasses.replace(taken.weights, where=str(source)))


def _is_ours(folder: Path) -> bool:
    """Whether a folder was published by firstwords: another tool may have a manifest too."""
    try:
        return (folder / store.MANIFEST).is_file() and bool(store.read_manifest(folder))
    except DataError:
        return False


def _require_no_heads(n_heads: int | None, source: Path) -> None:
    if n_heads is not None:
        raise ConfigError(
            "the source says itself how many heads it has", where="--n-heads", why=str(source), do="leave it out"
        )


def _chapter_shape(weights: Weights, n_heads: int | None, notice: Notify) -> ModelConfig:
    described = {bare(name): one.shape for name, one in weights.described.items()}
    tied = HEAD in described and described[HEAD] == described.get("tok_emb.weight") and _is_tied(weights)
    config = shapes.from_tensors(described, n_heads, tied=tied, where=weights.where)
    if n_heads is None:
        heads = f"with {config.emb_dim} channels it is taken to have GPT-2's {config.n_heads} heads"
        notice(f"{weights.where} does not say how many heads it has; {heads}: if it has others, import it with --n-heads")
    return config


def _is_tied(weights: Weights) -> bool:
    """Whether the head holds the very numbers of the table of tokens, as in GPT-2."""
    two = {bare(name): tensor for name, tensor in weights.tensors() if bare(name) in (HEAD, "tok_emb.weight")}
    return torch.equal(two[HEAD], two["tok_emb.weight"])


def _has_qkv_bias(weights: Weights) -> bool:
    return any(bool(tensor.any()) for name, tensor in weights.tensors() if name.endswith(".attn.c_attn.bias"))


def _filled(config: ModelConfig, dialect: Dialect, weights: Weights) -> GPTModel:
    """Return the model with the weights in it, one tensor after another."""
    needed, there = cost.parameters(config), sum(math.prod(tensor.shape) for tensor in weights.described.values())
    if needed > 2 * there:  # before a model of that size is built; biases that it has none of, which become zeros, are few
        raise DataError(f"has {there:,} numbers, its configuration needs {needed:,}", where=weights.where)
    if config.block == "qwen3" and 2 * config.context_length * config.head_dim > MOST_EXTRA_ANGLES + there:
        what = f"has {there:,} numbers, and a context of {config.context_length:,}, whose angles need many more"
        raise DataError(what, where=weights.where, do="lower max_position_embeddings in its config.json")
    model = uninitialised(config)
    load_weights(model, names.to_ours(config, dialect, weights.tensors(), weights.where), weights.where)
    return model


def _tokenizer(source: Path, given: str | None, config: ModelConfig, notice: Notify) -> Tokenizer:
    own = source / TOKENIZER
    if given is not None:
        kind, _ = corpus.parse_tokenizer(given)
        if kind == "bpe":
            raise ConfigError("a model has its tokenizer already", where="--tokenizer", do="name gpt2, bytes or a file")
        named = corpus.make_tokenizer(given, (), 0)
        try:
            differs = own.is_file() and tokenizers.read(own).sha256 != named.sha256
        except DataError as error:  # which is why another is named
            notice(f"{error.where}: {error.what}; its ids are taken to be those of {given}")
            return named
        if differs:
            why = f"its own is {own}, and its ids mean other texts in another"
            raise ConfigError("the model has another tokenizer", where="--tokenizer", why=why, do="leave it out")
        return named
    if own.is_file():
        try:
            return tokenizers.require_apart(tokenizers.read(own), str(own))
        except DataError as error:
            do = "import another model: with another tokenizer, its ids would mean other texts"
            raise DataError(error.what, where=error.where, why=error.why, do=do) from error
    merges = source / MERGES
    if merges.is_file() and not tokenizers.are_gpt2s_merges(reading.read_bytes(merges)):
        why = f"its {MERGES} is not GPT-2's, and it has no {TOKENIZER}"
        do = f"AutoTokenizer.from_pretrained({str(source)!r}).save_pretrained({str(source)!r}) of transformers writes one"
        raise ConfigError("which tokenizer has it?", where=str(source), why=why, do=do)
    if config.vocab_size in GPT2_ROWS:
        notice(f"{source} has no tokenizer.json; with {config.vocab_size} ids it is taken to have GPT-2's")
        return tokenizers.gpt2()
    why = f"it has no {TOKENIZER}, and {config.vocab_size} ids are not GPT-2's"
    do = f"firstwords import {source} --tokenizer NAME --out RUN makes it ours"
    raise ConfigError("which tokenizer has it?", where=str(source), why=why, do=do)
