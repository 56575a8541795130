"""The shape of a model as other tools describe it <-> `ModelConfig`. What ours cannot be is refused, never approximated."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from firstwords.config import ModelConfig, model_config
from firstwords.errors import ConfigError, DataError
from firstwords.model.functional import GELU_CUBIC
from firstwords.weights.names import HEAD, Dialect

OWN = "firstwords"  # the key in config.json under which our own configuration travels
DROPOUTS = frozenset(("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"))
# In a config.json, what changes no logit: with anything else changed, our own configuration there is out of date.
NO_SHAPE = frozenset((OWN, "architectures", "dtype", "bos_token_id", "eos_token_id", "initializer_range")) | DROPOUTS
KNOWN_HEADS = {768: 12, 1024: 16, 1280: 20, 1600: 25}  # of GPT-2's releases (Radford et al. 2019)
MOST_TOLD_HEADS = 128  # that a message names
GELUS = {"gelu_new": False, "gelu_pytorch_tanh": False, "gelu": True}  # their names; whether it is the exact one
QWEN_ROPE_BASE = 10_000.0  # transformers' default


def from_hf(config: Mapping[str, Any], where: str) -> tuple[ModelConfig, Dialect]:
    """Return the shape in a `config.json` of transformers, and whose names its tensors have.

    Raises:
        DataError: Another kind of model, or one with something that ours does not have.
        ConfigError: An impossible shape.
    """
    kind = config.get("model_type")
    if kind is None:
        raise DataError("says of no model what it is", where=where, why="model_type is missing", do="name another model")
    if kind not in ("gpt2", "qwen3"):
        raise DataError(f"is a model of type {str(kind)[:80]!r}", where=where, why="gpt2 and qwen3 can be read")
    dialect: Dialect = "gpt2" if kind == "gpt2" else "qwen3"
    if OWN in config and not _is_changed(own := model_config(config[OWN], where), config):
        return own, dialect
    try:
        saved = _gpt2(config, where) if kind == "gpt2" else _qwen3(config, where)
    except KeyError as error:
        raise DataError(f"does not say {error}", where=where) from error
    except (TypeError, AttributeError, ValueError) as error:
        raise DataError("has a setting of another kind than it should be", where=where, why=str(error)) from error
    return model_config({**dataclasses.asdict(ModelConfig()), **saved}, where), dialect


def _is_changed(own: ModelConfig, config: Mapping[str, Any]) -> bool:
    """Whether another tool has changed the model since its own configuration was put into a `config.json`."""
    written = to_hf(own, own.vocab_size - 1)
    return any(config.get(key, value) != value for key, value in written.items() if key not in NO_SHAPE)


def _gpt2(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    _require(config, where, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    gelu = config.get("activation_function", "gelu_new")
    if gelu not in GELUS:
        raise DataError(f"has the activation {str(gelu)[:80]!r}", where=where, why=f"known: {', '.join(GELUS)}")
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["n_positions"],
        "emb_dim": config["n_embd"],
        "n_heads": config["n_head"],
        "n_layers": config["n_layer"],
        "ff_dim": config.get("n_inner"),
        "drop_rate": config.get("resid_pdrop", 0.1),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "init_std": config.get("initializer_range", 0.02),
        "gelu_exact": GELUS[gelu],
        "qkv_bias": True,
        "tied_head": config.get("tie_word_embeddings", True),
        "block": "gpt2",
    }


def _qwen3(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _require(config, where, hidden_act="silu", use_sliding_window=False, attention_bias=False)
    _require(config, where, num_key_value_heads=heads, head_dim=width // heads if heads else width)
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise DataError("stretches its rotary positions", where=where, why="ours do not")
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "emb_dim": width,
        "n_heads": heads,
        "n_layers": config["num_hidden_layers"],
        "ff_dim": config["intermediate_size"],
        "drop_rate": 0.0,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "init_std": config.get("initializer_range", 0.02),
        "rope_base": float(rope.get("rope_theta", config.get("rope_theta", QWEN_ROPE_BASE))),
        "qkv_bias": False,
        "tied_head": config.get("tie_word_embeddings", False),
        "block": "qwen3",
    }


def _require(config: Mapping[str, Any], where: str, **wanted: Any) -> None:
    """Raise a DataError for the first setting that is there and is not the one that ours has."""
    for key, value in wanted.items():
        if config.get(key, value) not in (value, None):
            why = f"ours has {value!r}"
            raise DataError(f"has {key} = {str(config[key])[:80]!r}", where=where, why=why, do="take another model")


def to_hf(config: ModelConfig, end_of_text: int) -> dict[str, Any]:
    """Return the `config.json` for transformers; our own configuration travels in it.

    Raises:
        ConfigError: A GELU that transformers has no name for.
    """
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "tie_word_embeddings": config.tied_head}
    common = {"vocab_size": config.vocab_size, "initializer_range": config.init_std or 0.02, "dtype": "float32", **ends}
    own = {OWN: dataclasses.asdict(config)}
    if config.block == "qwen3":
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": config.emb_dim,
            "intermediate_size": config.hidden_dim,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.context_length,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "hidden_act": "silu",
            "attention_bias": config.qkv_bias,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            **common,
            **own,
        }
    if not config.gelu_exact and config.gelu_cubic != GELU_CUBIC:
        why = f"it is {config.gelu_cubic}, every other tool has {GELU_CUBIC}"
        raise ConfigError("no other tool has this GELU", where="model.gelu_cubic", why=why, do="it cannot be exported")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": config.context_length,
        "n_embd": config.emb_dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.ff_dim,
        "activation_function": "gelu" if config.gelu_exact else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.drop_rate,
        "embd_pdrop": config.drop_rate,
        "attn_pdrop": config.drop_rate,
        **common,
        **own,
    }


def from_nanogpt(arguments: Mapping[str, Any], where: str) -> ModelConfig:
    """Return the shape in the `model_args` of nanoGPT's checkpoint: GELU is the exact one, the head is tied."""
    try:
        saved = {
            "vocab_size": arguments["vocab_size"],
            "context_length": arguments["block_size"],
            "emb_dim": arguments["n_embd"],
            "n_heads": arguments["n_head"],
            "n_layers": arguments["n_layer"],
            "drop_rate": arguments.get("dropout", 0.0),
            "qkv_bias": bool(arguments.get("bias", True)),
            "gelu_exact": True,
            "tied_head": True,
            "init_std": 0.02,
        }
    except KeyError as error:
        raise DataError(f"its model_args do not say {error}", where=where) from error
    return model_config({**dataclasses.asdict(ModelConfig()), **saved}, where)


def from_tensors(shapes: Mapping[str, tuple[int, ...]], n_heads: int | None, *, tied: bool, where: str) -> ModelConfig:
    """Return the shape of a state dict with the chapter's names, which says all but the number of heads.

    Raises:
        DataError: A tensor that shows the shape is missing.
        ConfigError: The number of heads is neither given nor that of a known width, or does not divide the width.
    """
    try:
        vocab_size, emb_dim = shapes["tok_emb.weight"]
        context_length, ff_dim = shapes["pos_emb.weight"][0], shapes["trf_blocks.0.ff.layers.0.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        do = "of a model for transformers, name the folder with its config.json"
        raise DataError("is no model of the chapter's", where=where, why=why, do=do) from error
    layers = [int(found[1]) for name in shapes if (found := re.match(r"trf_blocks\.(\d{1,6})\.", name))]
    heads = n_heads or KNOWN_HEADS.get(emb_dim)
    if heads is None:
        why = f"the weights do not tell, and {emb_dim} is no width of GPT-2's"
        do = f"firstwords import {where} --n-heads N --out RUN makes it ours"
        raise ConfigError("how many heads has it?", where="--n-heads", why=why, do=do)
    if emb_dim % heads:
        possible = ", ".join(str(n) for n in range(1, min(emb_dim, MOST_TOLD_HEADS) + 1) if emb_dim % n == 0)
        what = f"{heads} heads cannot share the model's {emb_dim} channels"
        raise ConfigError(what, where="--n-heads", do=f"give the number that it was trained with: {possible}")
    saved = {
        "vocab_size": vocab_size,
        "context_length": context_length,
        "emb_dim": emb_dim,
        "n_heads": heads,
        "n_layers": max(layers) + 1,
        "ff_dim": None if ff_dim == 4 * emb_dim else ff_dim,
        "qkv_bias": "trf_blocks.0.att.W_query.bias" in shapes,
        "tied_head": tied or HEAD not in shapes,
    }
    return model_config({**dataclasses.asdict(ModelConfig()), **saved}, where)
