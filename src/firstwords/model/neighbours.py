"""Tokens that stand in like places of a text begin alike: what stands beside each, as a direction in the table.

In minutes most words are met a few times each, and a table drawn at random has to learn from those alone what they are
like. Counting who stands beside whom in the whole text takes a second and says much of it (Levy & Goldberg 2014, "Neural
word embedding as implicit matrix factorization").

Shapes: V vocabulary, C channels, K the tokens that others are known by.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstwords.config import ModelConfig
from firstwords.model.gpt import GPTModel
from firstwords.model.induction import begins

MOST_PAIRS = 1 << 22  # of tokens, V * K, that are counted
MOST_TOKENS = 1 << 22  # of the text that are looked at, in `CHUNKS` evenly spread parts
CHUNKS = 16
ADDED = 1.0  # to every count, so that a pair seen once by chance says little
SHARE = 0.5  # of the table's variance that comes from the text
SPARE = 8  # more directions than are wanted, for an exact factorisation: Halko et al. 2011 (arXiv:0909.4061)

Ids = np.ndarray[Any, Any]


def directions(ids: Ids, config: ModelConfig, seed: int) -> Tensor:
    """Return a direction for each token, (V, C), rows of length 1; near for tokens with the same ones beside them.

        M_ab = log((n_ab + 1) / (n_a n_b / N + 1)),    rows of U √S,    M = U S Wᵀ

    n_ab counts how often b, one of the K most frequent tokens, stands right after a; and, in as many columns more, right
    before it. The directions are turned at random, so that no channel is better than another.

    Args:
        ids: Of the training text.
        config: Of the model that the table is for.
        seed: Of the random numbers; the process's generator is left as it was.
    """
    V, C, ids = config.vocab_size, config.emb_dim, _spread(ids)
    K = min(V, max(1, MOST_PAIRS // V))
    frequent = np.argsort(-np.bincount(ids, minlength=V), kind="stable")[:K]
    column = np.full(V, K)  # one more, for all others
    column[frequent] = np.arange(K)
    beside = torch.cat((_surprise(ids[:-1], column[ids[1:]], V, K), _surprise(ids[1:], column[ids[:-1]], V, K)), dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, S, _ = torch.svd_lowrank(beside, q=min(C + SPARE, *beside.shape))
        axes = nn.init.orthogonal_(torch.empty(C, C))
    rows = F.normalize(U[:, :C] * S[:C].sqrt())
    turned: Tensor = rows @ axes[: rows.shape[1]]
    return turned


def _spread(ids: Ids) -> Ids:
    """Return at most `MOST_TOKENS` ids, in parts from all over the text."""
    size = MOST_TOKENS // CHUNKS
    if len(ids) <= MOST_TOKENS:
        return np.asarray(ids, dtype=np.int64)
    starts = [i * (len(ids) - size) // (CHUNKS - 1) for i in range(CHUNKS)]
    return np.concatenate([ids[start : start + size] for start in starts]).astype(np.int64)


def _surprise(tokens: Ids, columns: Ids, vocab_size: int, K: int) -> Tensor:
    """Return by how much likelier each of the K is beside a token than elsewhere, (V, K): the logarithm, M above."""
    pairs = np.bincount(tokens * (K + 1) + columns, minlength=vocab_size * (K + 1)).reshape(vocab_size, K + 1)
    counts = torch.from_numpy(pairs).float()
    expected = torch.outer(counts.sum(1), counts.sum(0) / max(1, len(tokens)))
    return counts.add_(ADDED).div_(expected.add_(ADDED)).log_()[:, :K]


@torch.no_grad()
def begin_alike(model: GPTModel, alike: Tensor) -> None:
    """Let the tokens of a new model begin half as they were drawn and half as their neighbours in the text are.

    What all tokens have in common stays, see `model.induction`; and an output head that began as a copy of the table is
    one of this table too.

    Args:
        model: As it was drawn.
        alike: What `directions` returns.
    """
    table, C = model.tok_emb.weight, model.config.emb_dim
    common = F.normalize(table.mean(0), dim=0)
    alike = alike - alike.mean(0)
    alike -= torch.outer(alike @ common, common)
    own_head = not model.config.tied_head and begins(model.config)
    for rows in (table, model.out_head.weight) if own_head else (table,):
        mean = rows.mean(0)
        std = (rows - mean).std()
        rows.sub_(mean).mul_(math.sqrt(1 - SHARE)).add_(math.sqrt(SHARE * C) * std * alike).add_(mean)
