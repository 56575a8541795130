"""How likely a model holds what goes on after a context, and whether it would say just that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from firstwords.insight.tasks import Item, Task, TaskScore
from firstwords.model.gpt import GPTModel, evaluating
from firstwords.model.language_model import LanguageModel
from firstwords.model.loss import token_figures
from firstwords.text.batches import IGNORE
from firstwords.text.tokenizer import Tokenizer

TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Continuation:
    """Ids whose likelihood is asked for, after at least one id that is not."""

    context: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """What a model makes of a continuation."""

    nats: float  # -log of its probability
    greedy: bool  # every id of it is the likeliest after those before it


@dataclass(frozen=True)
class _Row:
    request: int
    inputs: tuple[int, ...]
    targets: tuple[int, ...]  # of the last inputs


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Continuation:
    """Return the ids of a continuation as they are in the whole text; after nothing, `<|endoftext|>` stands before it.

    Spaces that a context ends with go to the continuation, where GPT-2's tokens have them. lm-eval's own rules.
    """
    before = tokenizer.encode(context.rstrip())
    ids = tokenizer.encode(context + continuation)[len(before) :] or tokenizer.encode(continuation)
    return Continuation(tuple(before or [tokenizer.end_of_text]), tuple(ids))


def answer(lm: LanguageModel, tasks: Sequence[Task]) -> tuple[TaskScore, ...]:
    """Return how many questions the model answers rightly: with the likeliest choice, or by saying the only one itself.

    As lm-eval's `acc`: likelihoods are those of whole choices, not of their mean token; of equal ones the first is taken.
    """
    asked = list(dict.fromkeys((item.context, choice) for task in tasks for item in task.items for choice in item.choices))
    found = dict(zip(asked, likelihoods(lm, [encode_pair(lm.tokenizer, *pair) for pair in asked]), strict=True))

    def is_right(item: Item) -> bool:
        choices = [found[item.context, choice] for choice in item.choices]
        if len(choices) == 1:
            return choices[0].greedy
        return min(range(len(choices)), key=lambda place: choices[place].nats) == item.answer

    return tuple(TaskScore.of(task, sum(map(is_right, task.items))) for task in tasks)


@torch.no_grad()
def likelihoods(lm: LanguageModel, requests: Sequence[Continuation]) -> list[Likelihood]:
    """Return what the model makes of each continuation, in float32.

    It sees the last `context_length` ids, and of a continuation longer than that each id after at least half as many.

    Raises:
        ValueError: An empty context or continuation.
    """
    limit, device = lm.model.config.context_length, lm.model.tok_emb.weight.device
    if not all(request.context and request.ids for request in requests):
        raise ValueError("a context or a continuation has no token")
    rows = [row for number, request in enumerate(requests) for row in _rows(number, request, limit)]
    rows.sort(key=lambda row: -len(row.inputs))
    nats, greedy = [0.0] * len(requests), [True] * len(requests)
    with evaluating(lm.model):
        while rows:
            count = max(1, TOKENS_AT_ONCE // len(rows[0].inputs))
            group, rows = rows[:count], rows[count:]
            for row, (row_nats, row_greedy) in zip(group, _judged(lm.model, group, device), strict=True):
                nats[row.request] += row_nats
                greedy[row.request] &= row_greedy
    return [Likelihood(*pair) for pair in zip(nats, greedy, strict=True)]


def _rows(number: int, request: Continuation, limit: int) -> Iterator[_Row]:
    whole, left = request.context + request.ids, len(request.ids)
    stride = limit if left <= limit else -(-limit // 2)
    end = len(whole)
    while left:
        count = min(left, stride)
        yield _Row(number, whole[max(0, end - 1 - limit) : end - 1], whole[end - count : end])
        end, left = end - count, left - count


def _judged(model: GPTModel, rows: Sequence[_Row], device: torch.device) -> Iterator[tuple[float, bool]]:
    """Yield nats and greediness of each row, the longest first."""
    tokens = torch.zeros(len(rows), len(rows[0].inputs), dtype=torch.long)
    targets = torch.full_like(tokens, IGNORE)
    for number, row in enumerate(rows):
        length = len(row.inputs)
        tokens[number, :length] = torch.tensor(row.inputs)
        targets[number, length - len(row.targets) : length] = torch.tensor(row.targets)
    found = token_figures(model.features(tokens.to(device)), model.out_head.weight, targets.to(device))
    nats, ranks = (figures.cpu()[targets != IGNORE] for figures in found)
    lengths = [len(row.targets) for row in rows]
    for row_nats, row_ranks in zip(torch.split(nats.double(), lengths), torch.split(ranks, lengths), strict=True):
        yield float(row_nats.sum()), bool((row_ranks == 1).all())
