"""Speak: draw the next token, again and again."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstwords.errors import DivergedError
from firstwords.model import cost
from firstwords.model.functional import Absorbed, linear, stacked
from firstwords.model.gpt import GPTModel, KVCache, MultiHeadAttention, SwiGLU
from firstwords.model.sampling import Sampling

# A token of a model below this size is so little work that a second core saves nothing; and where another program uses the
# cores too, waiting for it costs time.
ONE_CORE_PARAMETERS = 4_000_000


def next_probabilities(logits: Tensor, sampling: Sampling, seen: Sequence[int] = ()) -> Tensor:
    """Return the probabilities (V) from which the next token is drawn, for its logits (V) and the ids before it.

    The repetition penalty divides the logits of seen ids where they are positive and multiplies them where they are not
    (Keskar et al. 2019, arXiv:1909.05858); temperature divides all; top-k keeps the k likeliest; top-p keeps the fewest
    likeliest whose sum reaches p (Holtzman et al. 2020, arXiv:1904.09751); min-p keeps what is at least p times as likely as
    the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
    """
    logits = _penalised(logits.float(), sampling, seen)
    if sampling.is_greedy:
        return torch.zeros_like(logits).scatter_(0, logits.argmax(keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits = logits.masked_fill(_beyond(logits, sampling.top_k), -torch.inf)
    probabilities = torch.softmax(logits, dim=-1)
    if sampling.top_p is not None:
        ordered, order = probabilities.sort(descending=True, stable=True)
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p  # the sum before a token already reaches p
        probabilities = probabilities.index_fill(0, order[beyond], 0.0)
    if sampling.min_p is not None:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0.0)
    return probabilities / probabilities.sum()


def _beyond(logits: Tensor, k: int) -> Tensor:
    """Return what is not among the `k` likeliest; of equal ones, which bfloat16 often gives, the first are taken."""
    least = logits.topk(k).values[-1]
    above, level = logits > least, logits == least
    return ~(above | (level & (level.cumsum(0) <= k - above.sum())))


def _penalised(logits: Tensor, sampling: Sampling, seen: Sequence[int]) -> Tensor:
    if sampling.repetition_penalty is None or not seen:
        return logits
    index = torch.tensor(sorted(set(seen)), device=logits.device)
    chosen, penalty = logits[index], sampling.repetition_penalty
    return logits.index_copy(0, index, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


class RoundedLinear(nn.Module):
    """Linear layers for speaking, side by side: a copy of their weights in low precision.

    Args:
        layers: To be copied; all read the same channels, and all have a bias or none has.
        dtype: Of the copy.
        packed: Keep the weights in the order in which oneDNN reads them: it multiplies 2 to 64 rows in half of the time.
    """

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype, *, packed: bool) -> None:
        super().__init__()
        weight = stacked([layer.weight.detach() for layer in layers], dtype)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.dtype, self.bias = dtype, stacked(biases, dtype) if biases else None
        on_cpu = dtype == torch.bfloat16 and weight.device.type == "cpu"
        self.packed = packed and on_cpu and _can_pack()
        self.one_as_vector = on_cpu and has_amx()  # of one row; see `_as_one_row_is_read`
        self.weights = torch.ops.mkldnn._reorder_linear_weight(weight, 1) if self.packed else weight

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., Σ C') for (..., C)."""
        x = x.to(self.dtype)
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weights, self.bias, "none", [], "")
            return y
        if x.numel() > x.shape[-1] or not self.one_as_vector:
            return F.linear(x, self.weights, self.bias)
        row = x.flatten()
        one = torch.mv(self.weights, row) if self.bias is None else torch.addmv(self.bias, self.weights, row)
        return one.view(*x.shape[:-1], -1)


def _can_pack() -> bool:
    """Whether this PyTorch and this CPU have oneDNN's products of bfloat16, as its own compiler uses them."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    there = there and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has units for products of small matrices (Intel's AMX), which oneDNN then uses."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


def in_precision(model: GPTModel, dtype: torch.dtype, *, several: bool) -> GPTModel:
    """Return the model with its matrix products in `dtype`, without gradients; all but their weights is shared with it.

    Speaking reads every weight once a token and is as fast as memory is, so weights of half the size speak at twice the
    speed. Norms and the residual stream stay float32, as in training.

    Args:
        model: Left as it is.
        dtype: Of the products.
        several: For several texts at once.
    """
    if dtype == model.tok_emb.weight.dtype:
        return model
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for layers in _read_together(model):
        memo |= {id(layer): Absorbed() for layer in layers}
        memo[id(layers[0])] = RoundedLinear(layers, dtype, packed=several)  # speaks for all of them
    return copy.deepcopy(model, memo)


def _read_together(model: GPTModel) -> list[list[nn.Linear]]:
    """Return the model's linear layers, in one list those that `functional.linear` is asked for at once."""
    joined: list[list[nn.Linear]] = []
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            joined.append([module.W_query, module.W_key, module.W_value])
        elif isinstance(module, SwiGLU):
            joined.append([module.gate, module.up])
    known = {id(layer) for layers in joined for layer in layers}
    return joined + [[one] for one in model.modules() if isinstance(one, nn.Linear) and id(one) not in known]


@dataclass(frozen=True)
class Drawn:
    """A token, and how likely the model held it before temperature and the like, in nats."""

    id: int
    log_probability: float


def generate(
    model: GPTModel,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    generator: torch.Generator,
    *,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield token ids without end; the caller stops. A batch of one; see `generate_batch`."""
    return (drawn.id for (drawn,) in generate_batch(model, [prompt_ids], sampling, [generator], use_cache=use_cache))


@torch.no_grad()
def generate_batch(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    *,
    use_cache: bool = True,
) -> Iterator[list[Drawn]]:
    """Yield the next token of each prompt, without end; the caller stops.

    The model sees the last `context_length` tokens. While they fit, keys and values are cached; beyond, each token is
    computed from the whole window, as the chapter does, so in float32 the cache never changes the text. Shorter prompts are
    padded at the left with ids that no other sees, so each row goes on as it would alone.

    Args:
        model: In eval mode; see `in_precision`.
        prompts: At least one id each.
        sampling: How the next token is drawn.
        generators: One for each prompt, on the CPU, so that a seed means the same text on every device.
        use_cache: Without, every token is computed from the whole window; slower, the same text.

    Raises:
        ValueError: Empty prompt, or an id beyond the vocabulary.
        DivergedError: The model's numbers are not finite.
    """
    for prompt in prompts:
        check_ids(prompt, model.config.vocab_size)
    device, limit = model.tok_emb.weight.device, model.config.context_length
    rows = [list(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    cache = KVCache(model.config) if use_cache and longest <= limit else None
    while True:
        if longest > limit:
            cache = None
        width = min(longest, limit)
        padding = torch.tensor([max(0, width - len(row)) for row in rows], device=device)
        new = width - (0 if cache is None else cache.length)
        tokens = [([0] * (width - len(row)) + row[-width:])[-new:] for row in rows]
        with _cores(model), _as_one_row_is_read(len(rows) * new):
            features = model.features(torch.tensor(tokens, device=device), cache, padding if padding.any() else None)
            logits = linear(features[:, -1], [model.out_head]).float().cpu()  # (B, V)
            drawn = [
                _drawn(*each, sampling) for each in zip(logits, (row[-limit:] for row in rows), generators, strict=True)
            ]
        for row, one in zip(rows, drawn, strict=True):
            row.append(one.id)
        longest += 1
        yield drawn


@contextmanager
def _cores(model: GPTModel) -> Iterator[None]:
    """Compute inside on one core where the model is small, and otherwise on as many as outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if cost.parameters(model.config) < ONE_CORE_PARAMETERS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _as_one_row_is_read(n_rows: int) -> Iterator[None]:
    """Leave oneDNN out inside where a single row is multiplied.

    PyTorch's own product of weights in low precision with one row reads them as fast as memory is, oneDNN's at two thirds
    of that; of two rows and more oneDNN's is the faster one. Where there is AMX, it is the other way round: oneDNN's product
    with a vector, see `RoundedLinear`, is as fast as memory is, and PyTorch's own takes one and a half times as long.
    """
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.enabled
    mkldnn.enabled = before and (n_rows > 1 or has_amx())
    try:
        yield
    finally:
        mkldnn.enabled = before


def _drawn(logits: Tensor, seen: Sequence[int], generator: torch.Generator, sampling: Sampling) -> Drawn:
    """Draw from the logits (V) of one row."""
    greedy = sampling.is_greedy
    weighed = _penalised(logits, sampling, seen) if greedy else next_probabilities(logits, sampling, seen)
    if not math.isfinite(float(weighed.sum())):
        raise DivergedError("the model gives no probabilities", why="its weights or logits are not finite")
    token = int(weighed.argmax()) if greedy else int(torch.multinomial(weighed, 1, generator=generator))
    return Drawn(token, float(logits[token] - logits.logsumexp(0)))


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise a ValueError for an empty sequence or an id that the model has no row for."""
    if not ids:
        raise ValueError("the prompt has no token")
    beyond = next((token for token in ids if not 0 <= token < vocab_size), None)
    if beyond is not None:
        raise ValueError(f"token id {beyond} is beyond the model's vocabulary of {vocab_size}")


def generate_text_simple(model: torch.nn.Module, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """Return `idx` (B, T) with the `max_new_tokens` likeliest ids after it, as the chapter's function of that name does."""
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx[:, -context_size:])[:, -1, :]
        idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return idx
