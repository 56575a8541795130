"""How wrong the model is: the nats of the targets, and what is printed of them.

The head and the loss are one operation over chunks of tokens, so the (B, T, V) logits of a large vocabulary are never whole
in memory. The gradients are formed on the way forward, while a chunk's logits are there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firstwords.model.cost import chunk_bytes
from firstwords.text.batches import IGNORE

WORDS_AT_ONCE = 8192  # rows of the table whose gradient is formed together: products of that size are the fastest
TINY, HUGE = 1e-30, 1e30  # far above the smallest float32 and below the largest
PIECE_BYTES = 2 << 20  # of float32 log-probabilities: what passes over them finds them in the processor's cache
RANK_BYTES = 16  # that ranking takes for each logit: PyTorch sums truths as numbers of eight bytes
GPU_CHUNK_SHARE = 1 / 80  # of a GPU's memory for logits at once: fewer of them leave it waiting between products
ALIGNED = 64  # a GPU's products are seven times as fast with a multiple of so many words as with GPT-2's 50,257


def target_nats(features: Tensor, head_weight: Tensor, targets: Tensor, compiled: bool = False) -> Tensor:
    """Return the summed cross-entropy of the targets, in nats: Σ (log Σ_v exp(logit_v) - logit_target).

    A sum, not a mean: callers divide once by the number of counted targets of the whole batch, so the gradient does not
    depend on how the batch was cut. The softmax is float32; the matrix products follow autocast.

    Args:
        features: (..., C), what the model gives before its head.
        head_weight: (V, C).
        targets: (...) ids; those equal to `IGNORE` add nothing.
        compiled: Compile what passes over the logits of a GPU.

    Raises:
        ValueError: `features` and `targets` disagree on their leading shape.
        RuntimeError: In a second backward through the same loss.
    """
    if features.shape[:-1] != targets.shape:
        raise ValueError(f"features {tuple(features.shape)} do not fit targets {tuple(targets.shape)}")
    if not (torch.is_grad_enabled() and (features.requires_grad or head_weight.requires_grad)):
        return token_nats(features, head_weight, targets).sum()
    nats: Tensor = _ChunkedNats.apply(  # type: ignore[no-untyped-call]
        features.flatten(0, -2), head_weight, targets.flatten(), _dtype(features), compiled
    )
    return nats


def token_nats(features: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """Return the nats of each target, (...) float32, 0 where it is `IGNORE`. No gradient."""
    return token_figures(features, head_weight, targets, ranked=False)[0]


@torch.no_grad()
def token_figures(features: Tensor, head_weight: Tensor, targets: Tensor, *, ranked: bool = True) -> tuple[Tensor, Tensor]:
    """Return the nats of each target, as `token_nats`, and its rank among all tokens, (...) int64: 1 is the first choice.

    Of equal logits, of which bfloat16 gives many, the smaller id comes first, as for argmax: two cannot be the first choice.
    Without `ranked`, and where a target is `IGNORE`, the rank is 0.
    """
    nats = torch.zeros(targets.numel(), device=features.device)
    ranks = torch.zeros(targets.numel(), dtype=torch.int64, device=features.device)
    rows, flat = features.flatten(0, -2).to(_dtype(features)), targets.flatten()
    table, n_words = _table(head_weight, rows.dtype), len(head_weight)
    ids = torch.arange(n_words, device=features.device)
    for chunk, padded in _logits(rows, table, RANK_BYTES if ranked else table.element_size()):
        wanted, logits = flat[chunk], padded[:, :n_words]
        if _on_processor(table):
            nats[chunk] = _nats(logits, wanted)
        else:
            nats[chunk] = _nats_in_one(padded, wanted, n_words, _softmax, gradient=False)
        if ranked:
            word = wanted.clamp(min=0)[:, None]
            own = logits.gather(1, word)
            ahead = torch.where(ids < word, logits >= own, logits > own)
            ranks[chunk] = (ahead.sum(1) + 1) * (wanted != IGNORE)
    return nats.view(targets.shape), ranks.view(targets.shape)


def perplexity(nats_per_token: float) -> float:
    """Return exp(nats per token): among how many tokens the model is unsure."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Return the bits that the model needs for each byte of UTF-8: nats / ln 2 / bytes. Comparable across tokenizers."""
    return nats / math.log(2) / n_bytes


def _dtype(features: Tensor) -> torch.dtype:
    device = features.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype


def _chunks(n: int, row_bytes: int, most_bytes: int) -> list[tuple[int, int]]:
    """Return [start, end) of chunks of n rows, as equal as can be, of at most `most_bytes` each where a row is not more."""
    count = -(-n * row_bytes // most_bytes)
    size = -(-n // max(1, min(n, count)))
    return [(start, min(n, start + size)) for start in range(0, n, max(1, size))]


def _logits(rows: Tensor, table: Tensor, item_bytes: int, *, by_words: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Yield one chunk of the rows after the other, with its logits (N, V') where those of the last one stood.

    What a chunk leaves free the next one may not fit into, as something small has come to lie there: with room of its own
    for each, a run would need that of one more now and then, for minutes.

    Args:
        rows: (N, C).
        table: (V', C), as `_table` gives it.
        item_bytes: That a logit takes, with what is formed of it.
        by_words: The logits of a word stand together in memory, not those of a token; see `_nats_by_words`.
    """
    most_bytes = chunk_bytes(table.nbytes)
    if table.device.type == "cuda":
        most_bytes = int(GPU_CHUNK_SHARE * torch.cuda.get_device_properties(table.device).total_memory)
    chunks = _chunks(len(rows), len(table) * item_bytes, most_bytes)
    space = rows.new_empty(max((end - start for start, end in chunks), default=0) * len(table))
    for start, end in chunks:
        shape = (len(table), end - start) if by_words else (end - start, len(table))
        logits, part = space[: (end - start) * len(table)].view(shape), rows[start:end]
        yield slice(start, end), torch.mm(table, part.T, out=logits).T if by_words else torch.mm(part, table.T, out=logits)


def _table(head_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the table of words in the precision of products, on a GPU with as many words of zeros as its products like."""
    table, spare = head_weight.to(dtype), -len(head_weight) % ALIGNED
    return F.pad(table, (0, 0, 0, spare)) if table.device.type == "cuda" and spare else table


def _on_processor(table: Tensor) -> bool:
    return table.device.type == "cpu"


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the nats (N) of the targets, float32, of logits (N, V) on a processor."""
    nats = torch.empty(len(targets), device=logits.device)
    picked = targets.clamp(min=0)[:, None]
    rows = max(1, PIECE_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(targets), rows):
        piece = slice(start, start + rows)
        wide, word = logits[piece].float(), picked[piece]
        probability = torch.softmax(wide, dim=-1).gather(1, word)
        nats[piece] = -probability.log()[:, 0]
        if bool((probability < TINY).any()):  # where a probability is no more than rounding, its logarithm is not
            nats[piece] = -torch.log_softmax(wide, dim=-1).gather(1, word)[:, 0]
    return nats * (targets != IGNORE)


def _nats_by_words(logits: Tensor, targets: Tensor, rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nats (N) of the targets, float32, and a scale (N, 1) by which `logits` become d nats / d logits.

    With e_v = exp(logit_v - shift) and E = Σ e_v of all words but the target t, it is nats = log(1 + E/e_t); and
    d nats / d logit_v is e_v / (E + e_t), of the target -E / (E + e_t): of both the numerators take the place of the logits.
    The shift is the target's own logit, so that e_t is 1 and no digit of a small E is lost; the largest logit where E would
    be too large for that.

    The logits of a word stand together in memory: two of the three products then read what they multiply as it stands, and
    all of it takes two thirds of the time where a table is as large as GPT-2's and products in bfloat16 are fast.

    Args:
        logits: (N, V), a view of (V, N).
        targets: (N).
        rows: (N, C), of which the logits were formed.
        table: (V, C), with which they were.
    """
    target = torch.arange(len(targets)), targets.clamp(min=0)
    own = shift = logits[target].float()
    others = _exponentials(logits, target, shift)
    if not bool((others < HUGE).all()):
        torch.mm(table, rows.T, out=logits.T)
        shift = logits.amax(1).float()
        others = _exponentials(logits, target, shift)
    logits[target] = -others.to(logits.dtype)
    counted = targets != IGNORE
    nats = F.softplus(others.log() + (shift - own))
    return nats * counted, (counted / (others + torch.exp(own - shift)))[:, None]


def _exponentials(logits: Tensor, target: tuple[Tensor, Tensor], shift: Tensor) -> Tensor:
    """Put exp(logit - shift) in the place of logits (N, V), 0 in that of the targets, and return each token's sum (N)."""
    logits[target] = -torch.inf  # scatter_ would copy all of them
    sums = torch.zeros_like(shift)
    pieces = torch.split(logits.T, max(1, PIECE_BYTES // (4 * len(shift))))
    space = torch.empty_like(pieces[0], dtype=torch.float32)
    for piece in pieces:
        wide = piece if piece.dtype == torch.float32 else space[: len(piece)].copy_(piece)
        sums += wide.sub_(shift).exp_().sum(0)
        if wide is not piece:
            piece.copy_(wide)
    return sums


def _nats_in_one(logits: Tensor, targets: Tensor, n_words: int, softmax: Callable[..., Tensor], *, gradient: bool) -> Tensor:
    """Return what `_nats` does, in a form that never waits for a GPU.

    Args:
        logits: (N, V'), of which those from `n_words` on are of no word. With `gradient`, they become
            d nats / d logits = softmax(logits) - onehot(target), and 0 where there is no word or the target is not counted.
        targets: (N).
        n_words: V.
        softmax: `_softmax`, as it is or compiled.
        gradient: Whether it is wanted.
    """
    logits[:, n_words:] = -torch.inf
    counted, picked = targets != IGNORE, targets.clamp(min=0)[:, None]
    nats = softmax(logits, picked, counted, gradient=gradient)
    if gradient:
        logits.scatter_(1, picked, (torch.expm1(-nats) * counted)[:, None].to(logits.dtype))
    return nats * counted


def _softmax(logits: Tensor, picked: Tensor, counted: Tensor, *, gradient: bool) -> Tensor:
    """Return the nats (N) of the picked words (N, 1); with `gradient`, counted rows of logits become probabilities."""
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    nats = -log_probabilities.gather(1, picked)[:, 0]
    if gradient:
        logits.copy_(log_probabilities.exp() * counted[:, None])
    return nats


@functools.cache
def _compiled_softmax() -> Callable[..., Tensor]:
    return torch.compile(_softmax)


class _ChunkedNats(torch.autograd.Function):
    """Head and cross-entropy in one."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, compiled: bool) -> Tensor:
        rows, table = features.to(dtype), _table(weight, dtype)
        d_features, d_weight = ctx.gradients = torch.zeros_like(features), torch.empty_like(weight)
        by_words = _on_processor(table)
        softmax = _compiled_softmax() if compiled and not by_words else _softmax
        nats = torch.zeros(
            (), dtype=torch.float64 if features.device.type != "mps" else torch.float32, device=features.device
        )
        for chunk, logits in _logits(rows, table, table.element_size(), by_words=by_words):
            given, scale = rows[chunk], None
            if by_words:
                chunk_nats, scale = _nats_by_words(logits, targets[chunk], given, table)
            else:
                chunk_nats = _nats_in_one(logits, targets[chunk], len(weight), softmax, gradient=True)
            nats += chunk_nats.sum()
            _add_gradients(d_features[chunk], given, d_weight, table, logits, scale, first=chunk.start == 0)
        return nats.float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if not ctx.gradients:
            raise RuntimeError("the gradient of target_nats was taken already; it is formed once and scaled in place")
        (d_features, d_weight), ctx.gradients = ctx.gradients, ()  # nobody else holds them: autograd need not copy
        return d_features.mul_(upstream[0]), d_weight.mul_(upstream[0]), None, None, None


def _add_gradients(
    d_rows: Tensor, rows: Tensor, d_weight: Tensor, table: Tensor, d_logits: Tensor, scale: Tensor | None, *, first: bool
) -> None:
    """Add what d nats / d logits means for the rows (N, C) and the table (V', C), set by the first chunk.

    `d_weight` is (V, C), without the words to spare; d nats / d logits is `d_logits` (N, V') times the scale (N, 1).
    """
    words_at_once = WORDS_AT_ONCE if _on_processor(table) else len(table)
    scaled = rows if scale is None else (rows * scale).to(rows.dtype)
    space = table.new_empty(min(words_at_once, len(table)), table.shape[1])  # one place for all; see `_logits`
    for start in range(0, len(table), words_at_once):
        words = slice(start, min(start + words_at_once, len(table)))
        d_rows += d_logits[:, words] @ table[words]
        d_words = torch.mm(d_logits[:, words].T, scaled, out=space[: words.stop - start])[: len(d_weight) - start]
        if first:
            d_weight[words] = d_words
        else:
            _add(d_weight[words], d_words)
    if scale is not None:
        d_rows *= scale


def _add(place: Tensor, part: Tensor) -> None:
    """Add a part to a place, (N, C) both; on a processor piece by piece, for it copies what is of lower precision first."""
    rows = max(1, PIECE_BYTES // (4 * part.shape[1])) if _on_processor(place) else len(part)
    for of_place, of_part in zip(torch.split(place, rows), torch.split(part, rows), strict=True):
        of_place.add_(of_part)
