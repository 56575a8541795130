"""Two heads that copy from the first step on: they find where the last token stood before, and say what followed it there.

Such induction heads (Olsson et al. 2022, arXiv:2209.11895) are how a transformer uses what stands further back than a few
tokens. They form by themselves, but in minutes on a laptop they do not; what a text repeats is then lost on a model that is
drawn at random. Here they are written into the weights that a new model begins with, and learn on like all others.

Shapes: C channels, D channels of a head, R rank of what a head tells of a token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from firstwords.model.functional import rotary_rates

if TYPE_CHECKING:
    from firstwords.config import ModelConfig
    from firstwords.model.gpt import MultiHeadAttention

COMMON = 0.5  # size of what all tokens have in common, as a share of what each has of its own
WRITTEN, COPIED = 3.0, 3.5  # what the two heads add, in the table's standard deviations; the second at all channels
FAST_PAIRS = 6  # channel pairs by which the token before is told from its neighbours: those that turn fastest
FEWEST_SLOW_PAIRS = 7  # by which a token is told from others wherever it stood
SHARP_BEFORE, SHARP_SAME = 1.75, 1.75  # of the queries, which norms would else keep from choosing one token of many


def applies(config: ModelConfig) -> bool:
    """Whether a new model begins with the two heads: they are wanted, and it has what they take."""
    has_room = config.n_layers >= 2 and config.head_dim >= 2 * FAST_PAIRS and len(_slow(config)) >= FEWEST_SLOW_PAIRS
    return config.induction_heads and config.block == "qwen3" and bool(config.init_std and _table_std(config)) and has_room


def copies_table(config: ModelConfig) -> bool:
    """Whether the output head of a new model begins as a copy of the table: of one with the two heads that is not tied."""
    return applies(config) and not config.tied_head


def _table_std(config: ModelConfig) -> float:
    return (config.init_std or 0.0) if config.table_std is None else config.table_std


@torch.no_grad()
def write_heads(
    config: ModelConfig, table: Tensor, out_head: Tensor, first: MultiHeadAttention, second: MultiHeadAttention
) -> None:
    """Write the two heads into a new model, where they apply.

    All tokens come to have something in common, and the other heads of the two blocks, which share the norm of the queries,
    look more sharply too; their weights stay as they were drawn.

    Block 1 tells each token which one stands before it: queries and keys see only what all tokens have in common, turned
    so that rotary positions make one step back the best; the identity of that token, seen in some directions, is added in
    others. Block 2 looks for tokens whose predecessor is the token at hand, by the channels that positions hardly turn,
    and adds what such a token is. The output head knows it by the same numbers, so it comes to be likelier: one that is not
    tied begins as a copy of the table, and learns on by itself.

    Args:
        config: Of the model.
        table: (V, C), of its tokens.
        out_head: (V, C), by which it tells the next token; the table itself where they are tied.
        first: Of block 1.
        second: Of block 2.
    """
    C, D, std = config.emb_dim, config.head_dim, _table_std(config)
    if copies_table(config):
        out_head.copy_(table)
    directions = nn.init.orthogonal_(torch.empty(C, C, device=table.device))
    common, own = directions[0], directions[1:]
    R = min(D, len(own) // 2)
    identity, before, said = own[:R], own[R : 2 * R], own.roll(-2 * R, 0)[:D]
    table += torch.outer(COMMON * std * math.sqrt(C) - table @ common, common)
    size = (config.init_std or 0.0) * math.sqrt(C * D)  # that the weights of a head are drawn with

    angles = rotary_rates(D, config.rope_base)[:FAST_PAIRS].to(table.device)
    here, one_back = torch.zeros(2, 2, D // 2, device=table.device)  # two channels of each pair
    here[0, :FAST_PAIRS] = 1
    one_back[:, :FAST_PAIRS] = torch.stack((angles.cos(), angles.sin()))
    _set_query_key(first, torch.outer(here.flatten(), common), torch.outer(one_back.flatten(), common), size, SHARP_BEFORE)
    _set_value_output(first, identity, before, WRITTEN * std)

    slow = _slow(config)[: R // 2].to(table.device)
    channels = torch.cat((slow, slow + D // 2))
    mixed = nn.init.orthogonal_(torch.empty(len(channels), R, device=table.device))
    queries, keys = torch.zeros(2, D, C, device=table.device)
    queries[channels], keys[channels] = mixed @ identity, mixed @ before
    _set_query_key(second, queries, keys, size, SHARP_SAME)
    # The fewer of the channels it knows of, the louder it speaks.
    _set_value_output(second, said, said, COPIED * std * math.sqrt(C / D))


def _slow(config: ModelConfig) -> Tensor:
    """Return the channel pairs that turn by less than the angle 1 over half of the context."""
    return (rotary_rates(config.head_dim, config.rope_base) * config.context_length < 2).nonzero().flatten()


def _set_query_key(attention: MultiHeadAttention, queries: Tensor, keys: Tensor, size: float, sharp: float) -> None:
    """Give the first head the directions of its queries and keys, (D, C), brought to one size."""
    attention.W_query.weight[: len(queries)] = queries * (size / queries.norm())
    attention.W_key.weight[: len(keys)] = keys * (size / keys.norm())
    assert attention.query_norm is not None
    attention.query_norm.scale.mul_(sharp)


def _set_value_output(attention: MultiHeadAttention, read: Tensor, written: Tensor, size: float) -> None:
    """Let the first head add, where it looks, what a token has in the directions `read`, (R, C), in those `written`."""
    D = attention.out_proj.in_features // attention.n_heads
    value, out = attention.W_value.weight[:D].zero_(), attention.out_proj.weight[:, :D].zero_()
    value[: len(read)] = math.sqrt(size) * read
    out[:, : len(read)] = math.sqrt(size) * written.T
