"""The chapter's six steps on any text: logits, probabilities, those of the targets, their logs, the mean, its negative."""

from __future__ import annotations

import codecs
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from firstwords.errors import DataError
from firstwords.model.gpt import evaluating
from firstwords.model.language_model import LanguageModel
from firstwords.text.tokenizer import Tokenizer
from firstwords.training.evaluate import Evaluation, Window, windows

TOP = 5


@dataclass(frozen=True)
class Guess:
    """A token that the model would have said."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class TokenExplained:
    """One token of the text. The first has no probability: nothing stands before it."""

    id: int
    text: str  # of the token alone; of a part of a letter its bytes: \xd0
    completes: str  # the letters that are whole with it: of all tokens together, the text
    probability: float | None = None
    log_probability: float | None = None
    logit: float | None = None  # softmax: e^logit / sum of e^logits = probability
    rank: int | None = None  # 1: the model's first choice
    top: tuple[Guess, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """A text, token by token, and what the tokens come to."""

    tokens: tuple[TokenExplained, ...]
    evaluation: Evaluation

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON of the command line's contract."""
        figures = self.evaluation.as_dict()
        return {"tokens": [asdict(token) for token in self.tokens], **figures}


@torch.no_grad()
def explain(lm: LanguageModel, text: str) -> Explanation:
    """Return every token of `text` with its probability given those before it.

    A text longer than the context is read in the windows of `evaluate`: each token is predicted from at least half a
    context. Computed in float32.

    Raises:
        DataError: Fewer than two tokens; the first is never predicted.
        DivergedError: The model's numbers are not finite.
    """
    ids = lm.tokenizer.encode(text)
    if len(ids) < 2:
        raise DataError("the text has fewer than two tokens", where="TEXT", why="the first token is not predicted")
    letters = _letters(lm.tokenizer, ids)
    tokens = [TokenExplained(ids[0], _show(lm.tokenizer, ids[0]), letters[0])]
    with evaluating(lm.model):
        for window in windows(np.array([0]), np.array([len(ids)]), lm.model.config.context_length):
            tokens += _explain_window(lm, ids, letters, window)
    nats = -sum(token.log_probability or 0.0 for token in tokens)
    n_bytes = sum(len(lm.tokenizer.token_bytes(token)) for token in ids[1:])
    evaluation = Evaluation.of(nats, len(ids) - 1, n_bytes)
    evaluation.require_finite("")
    return Explanation(tuple(tokens), evaluation)


def _letters(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the letters that each token completes: of some writings a letter takes several tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.token_bytes(token)) for token in ids]


def _explain_window(lm: LanguageModel, ids: list[int], letters: list[str], window: Window) -> list[TokenExplained]:
    inputs = torch.tensor([ids[window.start : window.start + window.length]], device=lm.model.tok_emb.weight.device)
    logits = lm.model(inputs)[0, window.skip :].float().cpu()  # (counted targets, V)
    log_probabilities = torch.log_softmax(logits, dim=-1)
    predicted = slice(window.start + window.skip + 1, window.start + window.length + 1)
    rows = zip(ids[predicted], letters[predicted], logits, log_probabilities, strict=True)
    return [_explain_token(lm.tokenizer, id_, letter, float(row[id_]), logs) for id_, letter, row, logs in rows]


def _explain_token(
    tokenizer: Tokenizer, target: int, completes: str, logit: float, log_probabilities: torch.Tensor
) -> TokenExplained:
    own = log_probabilities[target]
    best = log_probabilities[: tokenizer.vocab_size].topk(min(TOP, tokenizer.vocab_size))
    ahead = int((log_probabilities > own).sum()) + int((log_probabilities[:target] == own).sum())  # as `loss.token_figures`
    return TokenExplained(
        target,
        _show(tokenizer, target),
        completes,
        float(own.exp()),
        float(own),
        logit,
        ahead + 1,
        tuple(
            Guess(token, _show(tokenizer, token), float(np.exp(value)))
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ),
    )


def _show(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="backslashreplace")
