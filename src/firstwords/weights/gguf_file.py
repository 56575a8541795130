"""Our model becomes a GGUF file for llama.cpp, written with the `gguf` package and read back with it.

Names, keys and the tokenizer's parts are those of llama.cpp's architectures `gpt2` and `qwen3` (ggml-org/llama.cpp,
gguf-py/gguf/constants.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from firstwords import reading, store
from firstwords.config import ModelConfig, did_you_mean
from firstwords.errors import ConfigError
from firstwords.model.functional import GELU_CUBIC
from firstwords.model.gpt import GPTModel, load_weights, uninitialised
from firstwords.model.language_model import LanguageModel
from firstwords.weights import names

if TYPE_CHECKING:
    import gguf

# How the matrices are kept, and how far logits may be off then: rounding to 11 bits, or to 8 with a scale for each 32.
KINDS = {"f32": 1e-4, "f16": 0.1, "q8_0": 1.0}
NEVER = "\u00ff \u00ff"  # a merge of the byte 0xFF, which no UTF-8 text has: llama.cpp wants at least one
UNUSED = "[unused{}]"  # rows of the table beyond the tokenizer's ids
Q8_BLOCK = 32


def write(lm: LanguageModel, out: Path, kind: str) -> GPTModel:
    """Write the file and return the model that it holds, read back.

    Args:
        lm: In float32.
        out: The file.
        kind: f32, f16 or q8_0: of the matrices; the rest stays float32.

    Raises:
        ConfigError: llama.cpp's model cannot be of this shape, or `gguf` is not installed.
    """
    gguf = _package()
    _require_possible(lm.model.config, kind)
    config, tensors = lm.model.config, names.to_theirs(lm.model.config, "gguf", lm.model.tensors())
    with tempfile.TemporaryDirectory(prefix="firstwords-") as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, config.block)
        _describe(writer, gguf, config, kind)
        _add_tokenizer(writer, gguf, lm)
        for name, tensor in tensors.items():
            data = tensor.float().contiguous().numpy()
            wanted = _kind_of(name, data, kind, gguf)
            writer.add_tensor(name, gguf.quants.quantize(data, wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        store.write(out, _pieces(path))
    return _read(out, config, gguf)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        why, do = "the package gguf is not installed", "pip install 'firstwords[gguf]'"
        raise ConfigError("cannot be written", where="--to gguf", why=why, do=do) from error
    return gguf


def _require_possible(config: ModelConfig, kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"no kind {kind!r}", where="--type", do=did_you_mean(kind, KINDS))
    why = ""
    if config.block == "qwen3" and config.qkv_bias:
        why = "its qwen3 has no biases in the query, key and value layers"
    elif config.block == "gpt2" and (config.gelu_exact or config.gelu_cubic != GELU_CUBIC):
        why = "its gpt2 has the GELU of GPT-2"
    if why:
        raise ConfigError("llama.cpp's model is another", where="--to gguf", why=why, do="use --to hf")


def _describe(writer: gguf.GGUFWriter, gguf: Any, config: ModelConfig, kind: str) -> None:
    file_types = gguf.LlamaFileType
    types = {"f32": file_types.ALL_F32, "f16": file_types.MOSTLY_F16, "q8_0": file_types.MOSTLY_Q8_0}
    writer.add_file_type(types[kind])
    if kind == "q8_0":  # how such blocks are laid out; llama.cpp wants to be told wherever a file has some
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    if config.block == "qwen3":
        writer.add_head_count_kv(config.n_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_freq_base(config.rope_base)
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)


def _add_tokenizer(writer: gguf.GGUFWriter, gguf: Any, lm: LanguageModel) -> None:
    model = json.loads(lm.tokenizer.json)["model"]
    words: list[str] = sorted(model["vocab"], key=model["vocab"].get)
    spare = lm.model.config.vocab_size - len(words)
    n_special = 1 + len(lm.tokenizer.special)
    kinds = [gguf.TokenType.NORMAL] * (len(words) - n_special) + [gguf.TokenType.CONTROL] * n_special
    kinds += [gguf.TokenType.UNUSED] * spare
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*words, *(UNUSED.format(number) for number in range(spare))])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]] or [NEVER])
    writer.add_bos_token_id(lm.tokenizer.end_of_text)
    writer.add_eos_token_id(lm.tokenizer.end_of_text)
    writer.add_add_bos_token(False)


def _kind_of(name: str, data: np.ndarray[Any, Any], kind: str, gguf: Any) -> Any:
    """Return how a tensor is kept: vectors and positions in float32, and what q8_0's blocks do not divide in float16."""
    types = gguf.GGMLQuantizationType
    if data.ndim < 2 or name.startswith("position_embd") or kind == "f32":
        return types.F32
    return types.Q8_0 if kind == "q8_0" and data.shape[-1] % Q8_BLOCK == 0 else types.F16


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(store.READ_BYTES):
            yield piece


def _read(path: Path, config: ModelConfig, gguf: Any) -> GPTModel:
    """Return the model in a file that was just written."""
    with reading.opening(path):
        held = gguf.GGUFReader(path)
    theirs: list[tuple[str, Tensor]] = []
    for one in held.tensors:
        data = gguf.quants.dequantize(one.data, one.tensor_type)
        theirs.append((one.name, torch.from_numpy(np.array(data, np.float32).reshape(one.shape[::-1].tolist()))))
    model = uninitialised(config)
    load_weights(model, names.to_ours(config, "gguf", theirs, str(path)), str(path))
    return model.eval()
