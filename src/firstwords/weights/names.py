"""One table of names for both directions: what another tool calls a tensor, and which of ours hold the same numbers.

Ours are those of Raschka's book (`model.gpt`), which are the chapter's too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import torch
from torch import Tensor

from firstwords.config import ModelConfig
from firstwords.errors import DataError

Dialect = Literal["gpt2", "nanogpt", "qwen3", "chapter", "gguf"]
HEAD = "out_head.weight"
# Buffers that old versions of the tools saved with their weights: masks and angles, which follow from the shape.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".att.mask", ".rotary_emb.inv_freq")
PREFIXES = ("_orig_mod.", "module.")  # of compiled and of distributed models
QKV = ("att.W_query", "att.W_key", "att.W_value")


@dataclass(frozen=True)
class Row:
    """A tensor of theirs and the tensors of ours that it is made of, one below the other.

    Args:
        theirs: Its name.
        ours: None where our model has no such tensor; then theirs must be zeros.
        transposed: Theirs is (in, out), ours (out, in).
        zeros: So many zeros stand for a bias that one side lacks; 0: neither may lack it.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    zeros: int = 0


def table(config: ModelConfig, dialect: Dialect) -> list[Row]:
    """Return a row for each tensor of their model of that shape; a tied head has none."""
    match dialect:
        case "gpt2" | "nanogpt":
            rows = _gpt2_rows(config, transposed=dialect == "gpt2")
        case "qwen3":
            rows = _qwen3_rows(config)
        case "chapter":
            rows = _own_rows(config)
        case "gguf":
            rows = _gguf_rows(config)
        case _ as never:
            assert_never(never)
    if dialect == "chapter":  # whose head is always a tensor of its own
        return [*rows, Row(HEAD, ("tok_emb.weight" if config.tied_head else HEAD,))]
    return rows if config.tied_head else [*rows, Row("output.weight" if dialect == "gguf" else "lm_head.weight", (HEAD,))]


def _gpt2_rows(config: ModelConfig, *, transposed: bool) -> list[Row]:
    C, hidden = config.emb_dim, config.hidden_dim
    rows = [
        Row("transformer.wte.weight", ("tok_emb.weight",)),
        Row("transformer.wpe.weight", ("pos_emb.weight",)),
        *_norm("transformer.ln_f", "final_norm", C),
    ]
    for layer in range(config.n_layers):
        theirs, ours = f"transformer.h.{layer}", f"trf_blocks.{layer}"
        biases = tuple(f"{ours}.{part}.bias" for part in QKV) if config.qkv_bias else ()
        rows += [
            Row(f"{theirs}.attn.c_attn.weight", tuple(f"{ours}.{part}.weight" for part in QKV), transposed),
            Row(f"{theirs}.attn.c_attn.bias", biases, zeros=3 * C),
            *_norm(f"{theirs}.ln_1", f"{ours}.norm1", C),
            *_norm(f"{theirs}.ln_2", f"{ours}.norm2", C),
        ]
        for their_linear, our_linear, outputs in (
            ("attn.c_proj", "att.out_proj", C),
            ("mlp.c_fc", "ff.layers.0", hidden),
            ("mlp.c_proj", "ff.layers.2", C),
        ):
            rows += [
                Row(f"{theirs}.{their_linear}.weight", (f"{ours}.{our_linear}.weight",), transposed),
                Row(f"{theirs}.{their_linear}.bias", (f"{ours}.{our_linear}.bias",), zeros=outputs),
            ]
    return rows


def _norm(theirs: str, ours: str, size: int) -> list[Row]:
    return [Row(f"{theirs}.weight", (f"{ours}.scale",)), Row(f"{theirs}.bias", (f"{ours}.shift",), zeros=size)]


def _qwen3_rows(config: ModelConfig) -> list[Row]:
    parts = {
        "self_attn.o_proj.weight": "att.out_proj.weight",
        "self_attn.q_norm.weight": "att.query_norm.scale",
        "self_attn.k_norm.weight": "att.key_norm.scale",
        "mlp.gate_proj.weight": "ff.gate.weight",
        "mlp.up_proj.weight": "ff.up.weight",
        "mlp.down_proj.weight": "ff.down.weight",
        "input_layernorm.weight": "norm1.scale",
        "post_attention_layernorm.weight": "norm2.scale",
    }
    for letter, ours in zip("qkv", QKV, strict=True):
        parts[f"self_attn.{letter}_proj.weight"] = f"{ours}.weight"
        if config.qkv_bias:
            parts[f"self_attn.{letter}_proj.bias"] = f"{ours}.bias"
    rows = [Row("model.embed_tokens.weight", ("tok_emb.weight",)), Row("model.norm.weight", ("final_norm.scale",))]
    for layer in range(config.n_layers):
        rows += [Row(f"model.layers.{layer}.{name}", (f"trf_blocks.{layer}.{ours}",)) for name, ours in parts.items()]
        if config.qkv_bias:  # their one switch gives the output layer a bias too
            rows.append(Row(f"model.layers.{layer}.self_attn.o_proj.bias", (), zeros=config.emb_dim))
    return rows


def _gguf_rows(config: ModelConfig) -> list[Row]:
    if config.block == "gpt2":
        spelled = {
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "ln_1": "attn_norm",
            "ln_2": "ffn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
            "transformer.h": "blk",
        }
        rows = _gpt2_rows(config, transposed=False)
    else:
        spelled = {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "model.layers": "blk",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
        rows = _qwen3_rows(config)
    return [replace(row, theirs=_respelled(row.theirs, spelled)) for row in rows]


def _respelled(name: str, spelled: Mapping[str, str]) -> str:
    for theirs, gguf in spelled.items():
        if name.startswith(f"{theirs}.") or f".{theirs}." in name:
            name = name.replace(theirs, gguf, 1)
    return name


def _own_rows(config: ModelConfig) -> list[Row]:
    from firstwords.model.gpt import GPTModel

    with torch.device("meta"):
        names = [name for name, _ in GPTModel(config).named_parameters()]
    return [Row(name, (name,)) for name in names if name != HEAD]


def to_theirs(config: ModelConfig, dialect: Dialect, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors under their names."""
    found = {}
    for row in table(config, dialect):
        parts = [ours[name] for name in row.ours]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.zeros(row.zeros)
        found[row.theirs] = whole.T.contiguous() if row.transposed else whole
    return found


def to_ours(
    config: ModelConfig, dialect: Dialect, theirs: Iterable[tuple[str, Tensor]], where: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield our tensors in the order in which theirs come, as views of theirs where they can be.

    Raises:
        DataError: A tensor that no such model has or that is missing; a bias that ours has no place for.
    """
    rows = {row.theirs: row for row in table(config, dialect)}
    for given, tensor in theirs:
        name = _plain(given, rows)
        if name.endswith(BUFFERS) or (config.tied_head and name in ("lm_head.weight", HEAD)):
            continue
        row = rows.pop(name, None)
        if row is None:
            why = f"a {dialect} model of {config.n_layers} blocks has none of that name"
            raise DataError(f"tensor {given[:80]!r} is unknown", where=where, why=why)
        yield from _parts(row, tensor, where)
    for row in rows.values():
        if not row.ours or row.theirs == HEAD:  # zeros that ours has no place for; a head that is the table of tokens
            continue
        if not row.zeros or dialect != "nanogpt":  # nanoGPT leaves all biases out, or none
            raise DataError(f"tensor {row.theirs!r} is missing", where=where)
        for name in row.ours:
            yield name, torch.zeros(row.zeros // len(row.ours))


def _parts(row: Row, tensor: Tensor, where: str) -> Iterator[tuple[str, Tensor]]:
    """Yield ours that a tensor of theirs holds."""
    if not row.ours:
        if tensor.any():
            why = "there is no place for it here"
            raise DataError(f"tensor {row.theirs!r} is a bias that is not zero", where=where, why=why)
        return
    whole = tensor.T if row.transposed else tensor
    if not whole.ndim or len(whole) % len(row.ours):
        raise DataError(f"tensor {row.theirs!r} is not {len(row.ours)} of equal size", where=where)
    yield from zip(row.ours, whole.chunk(len(row.ours)), strict=True)


def bare(name: str) -> str:
    """Return a tensor's name without the prefixes of wrappers, which stand in any order: one may wrap the other."""
    while found := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(found)
    return name


def _plain(name: str, rows: Mapping[str, Row]) -> str:
    """Return a name as the table has it: without the prefixes of wrappers, with that of the language model's body."""
    name = bare(name)
    return f"transformer.{name}" if f"transformer.{name}" in rows else name
