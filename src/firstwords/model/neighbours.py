"""Half of a new token embedding is initialised from the text: tokens that stand beside the same ones begin alike.

In minutes most words are met a few times each, and a table drawn at random has to learn from those alone what they are
like. Counting who stands beside whom says much of it before the first step: the factors of neighbours' pointwise mutual
information (PMI) are what word2vec learns (Levy & Goldberg 2014, "Neural word embedding as implicit matrix factorization").

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
from firstwords.model import induction
from firstwords.model.gpt import GPTModel
from firstwords.text import corpus

MOST_CELLS = 1 << 22  # V * K
MOST_TOKENS = 1 << 20  # of the text that are looked at, in `CHUNKS` evenly spread parts
CHUNKS = 16
PSEUDOCOUNT = 1.0  # to every count, so that a pair seen once by chance says little
SHARE = 0.5  # of the table's variance that comes from the text
OVERSAMPLING = 8  # directions more than are wanted make those more exact: Halko et al. 2011 (arXiv:0909.4061)

Ids = np.ndarray[Any, Any]


def directions(ids: Ids, config: ModelConfig, seed: int) -> Tensor:
    """Return a direction for each token, (V, C); near for tokens with the same ones beside them.

        M_ab = log((n_ab + 1) / (n_a n_b / N + 1)),    M = U S Wᵀ,    rows of U √S, brought to length 1

    n_ab counts how often b, one of the K most frequent tokens, stands right after a, n_a and n_b its sums over all b and all
    a, N over both; and, in as many columns more, right before it. The directions are turned at random, so that no channel is
    better than another. Of a token that does not stand in the text nothing is known: its row is 0.

    Args:
        ids: Of the training text; up to `MOST_TOKENS` from all over it are looked at.
        config: Of the model that the table is for.
        seed: Of the random numbers; the process's generator is left as it was.
    """
    V, C, ids = config.vocab_size, config.emb_dim, _spread(ids)
    K = min(V, max(1, MOST_CELLS // V))
    frequency = np.bincount(ids, minlength=V)
    frequent = np.argsort(-frequency, kind="stable")[:K]
    column = np.full(V, K)  # one more, for all others
    column[frequent] = np.arange(K)
    beside = torch.cat((_pmi(ids[:-1], column[ids[1:]], V, K), _pmi(ids[1:], column[ids[:-1]], V, K)), dim=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, S, _ = torch.svd_lowrank(beside, q=min(C + OVERSAMPLING, *beside.shape))
        axes = nn.init.orthogonal_(torch.empty(C, C))
    rows = F.normalize(U[:, :C] * S[:C].sqrt())
    rows[torch.from_numpy(frequency == 0)] = 0  # of rounding errors alone, at whatever length
    turned: Tensor = rows @ axes[: rows.shape[1]]
    return turned


def _spread(ids: Ids) -> Ids:
    """Return at most `MOST_TOKENS` ids, in parts from all over the text."""
    ranges = corpus.evenly(len(ids), CHUNKS, MOST_TOKENS // CHUNKS)
    return np.concatenate([ids[start:end] for start, end in ranges]).astype(np.int64)


def _pmi(tokens: Ids, columns: Ids, vocab_size: int, K: int) -> Tensor:
    """Return by how much likelier each of the K is beside a token than elsewhere, (V, K): the logarithm, M above."""
    pairs = np.bincount(tokens * (K + 1) + columns, minlength=vocab_size * (K + 1)).reshape(vocab_size, K + 1)
    counts = torch.from_numpy(pairs).float()
    expected = torch.outer(counts.sum(1), counts.sum(0) / max(1, len(tokens)))
    return counts.add_(PSEUDOCOUNT).div_(expected.add_(PSEUDOCOUNT)).log_()[:, :K]


@torch.no_grad()
def mix_into_embedding(model: GPTModel, directions: Tensor) -> None:
    """Mix what `directions` found into the token embedding of a new model: half of its variance, beside what was drawn.

    What all tokens have in common stays (`model.induction`), and so does a token of which nothing is known. An output head
    that began as a copy of the table goes with it.

    Args:
        model: As it was drawn.
        directions: What `directions` returns.
    """
    config, table, known = model.config, model.tok_emb.weight, directions.any(dim=1)
    if not known.any():
        return
    common, alike = F.normalize(table.mean(0), dim=0), directions[known]
    alike = alike - alike.mean(0)
    alike -= torch.outer(alike @ common, common)
    for rows in (table, model.out_head.weight) if induction.copies_table(config) else (table,):
        mean = rows[known].mean(0)
        own = rows[known] - mean
        rows[known] = mean + math.sqrt(1 - SHARE) * own + math.sqrt(SHARE * config.emb_dim) * own.std() * alike
