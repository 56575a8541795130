"""Our model becomes another tool's: a folder for transformers, a file for llama.cpp, a state dict for the chapter's code.

Whatever is written is read back, by the other tool where it is installed, and its logits are compared with ours.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstwords import reading, store
from firstwords.config import ModelConfig
from firstwords.errors import CannotCreateError, ConfigError, DataError, Notify, ignore_line
from firstwords.model.functional import GELU_CUBIC
from firstwords.model.language_model import LanguageModel
from firstwords.runs.tensor_file import safetensors_bytes
from firstwords.text.tokenizer import END_OF_TEXT
from firstwords.weights import archive, folder, gguf_file, names, reader, shapes

SHARD_BYTES = 5 * 10**9  # transformers' own limit
TOLERANCE = 1e-4  # of the largest logit, or of 1, in float32
COMPARED_TOKENS = 32


def to_hf(lm: LanguageModel, out: Path, card: str, notice: Notify = ignore_line) -> tuple[float, str]:
    """Publish the folder `out` for transformers; return how far its logits are from ours at most, and who read it back.

    Args:
        lm: In float32.
        out: Must not exist.
        card: The text of README.md.
        notice: Told where transformers is there and cannot read it back.

    Raises:
        CannotCreateError: `out` exists.
        ConfigError: Another tool cannot have this model.
        DataError: What was written does not give our logits.
    """
    config, end = lm.model.config, lm.tokenizer.end_of_text
    theirs = shapes.to_hf(config, end)
    tensors = names.to_theirs(config, "gpt2" if config.block == "gpt2" else "qwen3", lm.model.tensors())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context_length,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # before version 5, transformers adds a third that spoils ours
    }
    # Without a word on k, transformers draws from the 50 likeliest.
    speaking = {"bos_token_id": end, "eos_token_id": end, "do_sample": True, "temperature": 0.8, "top_k": 0}
    files: dict[str, Any] = {
        "config.json": [_json(theirs)],
        "generation_config.json": [_json(speaking)],
        "tokenizer.json": [lm.tokenizer.json],
        "tokenizer_config.json": [_json(settings)],
        "README.md": [card.encode(errors="replace")],
        **_shards(tensors),
    }
    store.publish(out, files, lambda: {"kind": "export"})
    logits, reader_of_it = _logits_read_back(lm, out, notice)
    return _require_equal(lm, logits, out), reader_of_it


def to_pth(lm: LanguageModel, out: Path) -> float:
    """Write the chapter's state dict to the file `out` and return the largest difference between its logits and ours.

    The only place where something is pickled: plain tensors, for a tool that reads nothing else.

    Raises:
        CannotCreateError: `out` exists, or another tokenizer beside it.
        ConfigError: The chapter's model cannot be of this shape.
        DataError: What was written does not give our logits.
    """
    config = lm.model.config
    if out.suffix not in archive.SUFFIXES:  # by which it would not be known again
        raise ConfigError("is no name for such a file", where="--out", why=str(out), do=f"give {out.stem or 'model'}.pth")
    beside = out.with_suffix(".tokenizer.json")
    for place in (out, beside):
        if store.exists(place) and not (place == beside and reading.read_bytes(beside) == lm.tokenizer.json):
            raise CannotCreateError("is there already", where=str(place), do="give another --out")
    of_gpt2 = config.block == "gpt2" and config.hidden_dim == 4 * config.emb_dim
    epsilon = ModelConfig().norm_eps
    if not of_gpt2 or config.gelu_exact or config.gelu_cubic != GELU_CUBIC or config.norm_eps != epsilon:
        why = f"it has GPT-2's block and GELU, norm_eps = {epsilon:g}, a feed-forward layer four times as wide as the model"
        raise ConfigError("the chapter's model is of another shape", where="--to pth", why=why, do="use --to hf")
    mask = torch.triu(torch.ones(config.context_length, config.context_length), diagonal=1)
    tensors = {
        **{name: _alone(tensor) for name, tensor in names.to_theirs(config, "chapter", lm.model.tensors()).items()},
        **{f"trf_blocks.{layer}.att.mask": mask.clone() for layer in range(config.n_layers)},
    }
    file = io.BytesIO()
    torch.save(tensors, file)
    store.write(out, [file.getbuffer()])
    del file, tensors  # before the model is read back, which takes as much memory again
    store.write(beside, lm.tokenizer.json)
    back = reader.read(out, tokenizer=str(beside), n_heads=config.n_heads)
    with torch.no_grad():
        return _require_equal(lm, back.model(_ids(lm)), out)


def to_gguf(lm: LanguageModel, out: Path, kind: str) -> float:
    """Write a GGUF file for llama.cpp and return the largest difference between its logits, read back, and ours.

    Args:
        lm: In float32.
        out: The file to be made.
        kind: f32, f16 or q8_0, of its matrices.

    Raises:
        ConfigError: llama.cpp cannot have this model.
        DataError: What was written is further from ours than its rounding allows.
    """
    model = gguf_file.write(lm, out, kind)
    with torch.no_grad():
        return _require_equal(lm, model(_ids(lm)), out, gguf_file.KINDS[kind])


def model_card(name: str, figures: Mapping[str, Any], context_length: int, *, trained_here: bool) -> str:
    """Return a README.md with a model's own figures; of one from elsewhere it does not say how it came to be."""
    count = max(1, min(100, context_length - 1))  # beyond its context, one with learned positions fails
    told = [
        "A small language model, pretrained with firstwords on one person's text. It continues text; it was not taught to",
        "answer questions, and it repeats what its text says, be it right or wrong.",
    ]
    if not trained_here:
        told = [
            "A language model from elsewhere, which firstwords only wrote in this form. It continues text, and repeats what",
            "its text said, be it right or wrong.",
        ]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {Path(name).name}",
        "",
        *told,
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in figures.items()),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")',
        'ids = tokenizer("<|endoftext|>", return_tensors="pt").input_ids',
        f"print(tokenizer.decode(model.generate(ids, max_new_tokens={count})[0]))",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor that is all of its storage, for a file would hold all of it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _shards(tensors: Mapping[str, Tensor]) -> dict[str, Iterator[store.Bytes] | list[bytes]]:
    """Return the weights' files by name: one, or as many as `SHARD_BYTES` asks for and their index."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        n_bytes = tensor.numel() * tensor.element_size()
        if size and size + n_bytes > SHARD_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += n_bytes
    metadata = {"format": "pt"}  # transformers asks for it
    if len(parts) == 1:
        return {folder.WHOLE: safetensors_bytes(tensors, metadata)}
    files = {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, start=1)}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, part in files.items() for name in part}}
    return {**{file: safetensors_bytes(part, metadata) for file, part in files.items()}, folder.INDEX: [_json(index)]}


def _ids(lm: LanguageModel) -> Tensor:
    """Return ids of all parts of the vocabulary, (1, T)."""
    config = lm.model.config
    length = min(COMPARED_TOKENS, config.context_length)
    return torch.linspace(0, min(config.vocab_size, lm.tokenizer.vocab_size) - 1, length).long()[None]


def _logits_read_back(lm: LanguageModel, out: Path, notice: Notify) -> tuple[Tensor, str]:
    """Return the logits of the exported model, and who read it: we ourselves where transformers is not there or too old."""
    if importlib.util.find_spec("transformers"):
        try:
            model = _their_model(out)
        except (ImportError, ValueError, KeyError) as error:  # an older one does not know every type of model
            why = str(error).strip().partition("\n")[0][:200]
            notice(f"transformers cannot read it ({why}), so firstwords itself reads it back")
        else:
            with torch.no_grad():  # it comes in eval mode
                return model(_ids(lm)).logits, "transformers"
    with torch.no_grad():
        return reader.read(out).model(_ids(lm)), "firstwords"


def _their_model(out: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    with _without_progress(logging):  # its own, of reading what was just written
        return AutoModelForCausalLM.from_pretrained(out, local_files_only=True, dtype=torch.float32)


@contextmanager
def _without_progress(logging: Any) -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _require_equal(lm: LanguageModel, logits: Tensor, out: Path, allowed: float | None = None) -> float:
    """Return by how much logits differ from ours. None allows for another order of sums, which grows with what is summed."""
    with torch.no_grad():
        ours = lm.model(_ids(lm))
    difference = float((ours - logits).abs().max())
    allowed = TOLERANCE * max(1.0, float(ours.abs().max())) if allowed is None else allowed
    if not math.isfinite(difference) or difference > allowed:
        why = f"its logits differ from ours by {difference:.2g}, {allowed:.1g} is allowed"
        raise DataError("what was written is not the same model", where=str(out), why=why, do="do not use it; report this")
    return difference


def figures_of(config: ModelConfig, parameters: int) -> dict[str, Any]:
    """Return what a model card says of a shape."""
    return {
        "parameters": f"{parameters:,}",
        "blocks": f"{config.n_layers} of {config.emb_dim} channels, {config.n_heads} heads ({config.block})",
        "context": f"{config.context_length} tokens",
        "vocabulary": f"{config.vocab_size} ids",
    }
