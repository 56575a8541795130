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

ROWS_AT_ONCE = 8192  # rows of the head whose gradient is formed together: products of that size are the fastest
TINY, HUGE = 1e-30, 1e30  # far above the smallest float32 and below the largest
PIECE_BYTES = 2 << 20  # of float32 log-probabilities: what passes over them finds them in the CPU's cache
RANK_BYTES = 16  # that ranking takes for each logit: PyTorch sums truths as numbers of eight bytes
GPU_CHUNK_SHARE = 1 / 80  # of a GPU's memory for logits at once: fewer of them leave it waiting between products
ALIGNED = 64  # a GPU's products are seven times as fast with a multiple of so many rows as with GPT-2's 50,257


def target_nats(features: Tensor, head_weight: Tensor, targets: Tensor, *, compiled: bool = False) -> Tensor:
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
    counted = (targets.flatten() != IGNORE).nonzero()[:, 0]  # of windows that overlap, half
    rows, wanted = features.flatten(0, -2)[counted].to(_dtype(features)), targets.flatten()[counted]
    head, vocab_size = _padded_head(head_weight, rows.dtype), len(head_weight)
    ids = torch.arange(vocab_size, device=features.device)
    for chunk, padded in _logits(rows, head, RANK_BYTES if ranked else head.element_size()):
        places, target, logits = counted[chunk], wanted[chunk], padded[:, :vocab_size]
        if _on_cpu(head):
            nats[places] = _nats_on_cpu(logits, target)
        else:
            nats[places] = _nats_on_gpu(padded, target, vocab_size, _softmax, gradient=False)
        if ranked:
            own = logits.gather(1, target[:, None])
            ahead = torch.where(ids < target[:, None], logits >= own, logits > own)
            ranks[places] = ahead.sum(1) + 1
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


def _logits(rows: Tensor, head: Tensor, item_bytes: int, *, vocab_major: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Yield one chunk of the rows after the other, with its logits (N, V') where those of the last one stood.

    What a chunk leaves free the next one may not fit into, as something small has come to lie there: with room of its own
    for each, a run would need that of one more now and then, for minutes.

    Args:
        rows: (N, C).
        head: (V', C), as `_padded_head` gives it.
        item_bytes: That a logit takes, with what is formed of it.
        vocab_major: The logits of an id stand together in memory, not those of a token; see `_nats_vocab_major`.
    """
    most_bytes = chunk_bytes(head.nbytes)
    if head.device.type == "cuda":
        most_bytes = int(GPU_CHUNK_SHARE * torch.cuda.get_device_properties(head.device).total_memory)
    chunks = _chunks(len(rows), len(head) * item_bytes, most_bytes)
    space = rows.new_empty(max((end - start for start, end in chunks), default=0) * len(head))
    for start, end in chunks:
        shape = (len(head), end - start) if vocab_major else (end - start, len(head))
        logits, part = space[: (end - start) * len(head)].view(shape), rows[start:end]
        yield slice(start, end), torch.mm(head, part.T, out=logits).T if vocab_major else torch.mm(part, head.T, out=logits)


def _padded_head(head_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the head in the precision of products, on a GPU padded with rows of zeros to a size that its products like."""
    head, n_padding = head_weight.to(dtype), -len(head_weight) % ALIGNED
    return F.pad(head, (0, 0, 0, n_padding)) if head.device.type == "cuda" and n_padding else head


def _on_cpu(head: Tensor) -> bool:
    return head.device.type == "cpu"


def _nats_on_cpu(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the nats (N) of the targets, each of them counted, float32, of logits (N, V) on a CPU."""
    nats, picked = torch.empty(len(targets), device=logits.device), targets[:, None]
    rows = max(1, PIECE_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(targets), rows):
        piece = slice(start, start + rows)
        wide, target = logits[piece].float(), picked[piece]
        probability = torch.softmax(wide, dim=-1).gather(1, target)
        nats[piece] = -probability.log()[:, 0]
        if bool((probability < TINY).any()):  # where a probability is no more than rounding, its logarithm is not
            nats[piece] = -torch.log_softmax(wide, dim=-1).gather(1, target)[:, 0]
    return nats


def _nats_vocab_major(logits: Tensor, targets: Tensor, rows: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nats (N) of the targets, float32, and a scale (N, 1) by which `logits` become d nats / d logits.

    With e_v = exp(logit_v - shift) and E = Σ e_v of all ids but the target t, it is nats = log(1 + E/e_t); and
    d nats / d logit_v is e_v / (E + e_t), of the target -E / (E + e_t): of both the numerators take the place of the logits.
    The shift is the target's own logit, so that e_t is 1 and no digit of a small E is lost; the largest logit where E would
    be too large for that.

    The logits of an id stand together in memory: two of the three products then read what they multiply as it stands, and
    all of it takes two thirds of the time where a head is as large as GPT-2's and products in bfloat16 are fast.

    Args:
        logits: (N, V), a view of (V, N).
        targets: (N).
        rows: (N, C), of which the logits were formed.
        head: (V, C), with which they were.
    """
    target = torch.arange(len(targets)), targets.clamp(min=0)
    own = shift = logits[target].float()
    others = _exponentials(logits, target, shift)
    if not bool((others < HUGE).all()):
        torch.mm(head, rows.T, out=logits.T)
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


def _nats_on_gpu(
    logits: Tensor, targets: Tensor, vocab_size: int, softmax: Callable[..., Tensor], *, gradient: bool
) -> Tensor:
    """Return what `_nats_on_cpu` does, in a form that never waits for a GPU.

    Args:
        logits: (N, V'), of which those from `vocab_size` on are padding. With `gradient`, they become
            d nats / d logits = softmax(logits) - onehot(target), and 0 in the padding and where the target is not counted.
        targets: (N).
        vocab_size: V.
        softmax: `_softmax`, as it is or compiled.
        gradient: Whether it is wanted.
    """
    logits[:, vocab_size:] = -torch.inf
    counted, picked = targets != IGNORE, targets.clamp(min=0)[:, None]
    nats = softmax(logits, picked, counted, gradient=gradient)
    if gradient:
        logits.scatter_(1, picked, (torch.expm1(-nats) * counted)[:, None].to(logits.dtype))
    return nats * counted


def _softmax(logits: Tensor, picked: Tensor, counted: Tensor, *, gradient: bool) -> Tensor:
    """Return the nats (N) of the picked ids (N, 1); with `gradient`, counted rows of logits become probabilities."""
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
        rows, head = features.to(dtype), _padded_head(weight, dtype)
        d_features, d_weight = ctx.gradients = torch.zeros_like(features), torch.empty_like(weight)
        vocab_major = _on_cpu(head)
        softmax = _compiled_softmax() if compiled and not vocab_major else _softmax
        nats = torch.zeros(
            (), dtype=torch.float64 if features.device.type != "mps" else torch.float32, device=features.device
        )
        for chunk, logits in _logits(rows, head, head.element_size(), vocab_major=vocab_major):
            given, scale = rows[chunk], None
            if vocab_major:
                chunk_nats, scale = _nats_vocab_major(logits, targets[chunk], given, head)
            else:
                chunk_nats = _nats_on_gpu(logits, targets[chunk], len(weight), softmax, gradient=True)
            nats += chunk_nats.sum()
            _add_gradients(d_features[chunk], given, d_weight, head, logits, scale, first=chunk.start == 0)
        return nats.float()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if not ctx.gradients:
            raise RuntimeError("the gradient of target_nats was taken already; it is formed once and scaled in place")
        (d_features, d_weight), ctx.gradients = ctx.gradients, ()  # nobody else holds them: autograd need not copy
        return d_features.mul_(upstream[0]), d_weight.mul_(upstream[0]), None, None, None


def _add_gradients(
    d_rows: Tensor, rows: Tensor, d_weight: Tensor, head: Tensor, d_logits: Tensor, scale: Tensor | None, *, first: bool
) -> None:
    """Add what d nats / d logits means for the rows (N, C) and the head (V', C), set by the first chunk.

    `d_weight` is (V, C), without the padding; d nats / d logits is `d_logits` (N, V') times the scale (N, 1).
    """
    height = ROWS_AT_ONCE if _on_cpu(head) else len(head)
    scaled = rows if scale is None else (rows * scale).to(rows.dtype)
    space = head.new_empty(min(height, len(head)), head.shape[1])  # one place for all; see `_logits`
    for start in range(0, len(head), height):
        block = slice(start, min(start + height, len(head)))
        d_rows += d_logits[:, block] @ head[block]
        d_block = torch.mm(d_logits[:, block].T, scaled, out=space[: block.stop - start])[: len(d_weight) - start]
        if first:
            d_weight[block] = d_block
        else:
            _add(d_weight[block], d_block)
    if scale is not None:
        d_rows *= scale


def _add(place: Tensor, part: Tensor) -> None:
    """Add a part to a place, (N, C) both; on a CPU piece by piece, for it copies what is of lower precision first."""
    rows = max(1, PIECE_BYTES // (4 * part.shape[1])) if _on_cpu(place) else len(part)
    for of_place, of_part in zip(torch.split(place, rows), torch.split(part, rows), strict=True):
        of_place.add_(of_part)
