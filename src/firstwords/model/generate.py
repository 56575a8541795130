"""Speak: draw the next token, again and again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from firstwords.errors import DivergedError
from firstwords.model.gpt import GPTModel, KVCache
from firstwords.model.sampling import Sampling


def next_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities (V) from which the next token is drawn, for its logits (V).

    Temperature divides the logits; top-k keeps the k likeliest; top-p keeps the fewest likeliest whose sum reaches p
    (Holtzman et al. 2020, arXiv:1904.09751).
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(0, logits.argmax(keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities = torch.softmax(logits, dim=-1)
    if sampling.top_p is not None:
        ordered, order = probabilities.sort(descending=True, stable=True)
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p  # the sum before a token already reaches p
        probabilities = probabilities.index_fill(0, order[beyond], 0.0)
    return probabilities / probabilities.sum()


def in_precision(model: GPTModel, dtype: torch.dtype) -> GPTModel:
    """Return the model with the weights of its matrix products in `dtype`; all else is shared with it.

    Speaking reads every weight once a token and is as fast as memory is, so weights of half the size speak at twice the
    speed. Norms and the residual stream stay float32, as in training.
    """
    if dtype == model.final_norm.scale.dtype:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    cast = {
        id(module.weight): nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    }
    return copy.deepcopy(model, {**shared, **cast})


@torch.no_grad()
def generate(
    model: GPTModel,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    generator: torch.Generator,
    *,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield token ids without end; the caller stops.

    The model sees the last `context_length` tokens. While they fit, keys and values are cached; beyond, each token is
    computed from the whole window, as the chapter does, so in float32 the cache never changes the text.

    Args:
        model: In eval mode; see `in_precision`.
        prompt_ids: At least one id.
        sampling: How the next token is drawn.
        generator: On the CPU, so that a seed means the same text on every device.
        use_cache: Without, every token is computed from the whole window; slower, the same text.

    Raises:
        ValueError: Empty prompt, or an id beyond the vocabulary.
        DivergedError: The model's numbers are not finite.
    """
    check_ids(prompt_ids, model.config.vocab_size)
    weight, limit = model.out_head.weight, model.config.context_length
    device, low = weight.device, weight.dtype != torch.float32
    ids = list(prompt_ids)
    cache = KVCache(model.config) if use_cache and len(ids) <= limit else None
    while True:
        if len(ids) > limit:
            cache = None
        seen = ids[cache.length :] if cache is not None else ids[-limit:]
        with torch.autocast(device.type, weight.dtype, enabled=low, cache_enabled=False):
            features = model.features(torch.tensor([seen], device=device), cache)
            logits = model.out_head(features[0, -1])
        probabilities = next_probabilities(logits, sampling).cpu()
        if not torch.isfinite(probabilities).all():
            raise DivergedError("the model gives no probabilities", why="its weights or logits are not finite")
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        yield ids[-1]


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
