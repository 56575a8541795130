"""A model with its tokenizer: text in, text out."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from firstwords.errors import ConfigError
from firstwords.model.generate import generate, in_precision
from firstwords.model.gpt import GPTModel
from firstwords.model.sampling import Sampling
from firstwords.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class LanguageModel:
    """What `firstwords.load` returns.

    Raises:
        ConfigError: The tokenizer has ids that the model has no row for.
    """

    model: GPTModel
    tokenizer: Tokenizer
    step: int = 0  # updates that the weights have behind them
    dtype: torch.dtype = torch.float32  # of the matrix products, in whatever it does
    _rounded: dict[int, GPTModel] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows, ids = self.model.config.vocab_size, self.tokenizer.vocab_size
        if ids > rows:
            raise ConfigError(
                f"the tokenizer {self.tokenizer.name} has {ids} ids, the model only {rows}",
                where="model.vocab_size",
                do=f"use {ids} or more, or the tokenizer that the model was made with",
            )

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 200,
        sampling: Sampling | None = None,
        seed: int = 123,
        stop: Sequence[str] = (),
    ) -> str:
        """Return what the model says after `prompt` (which is not repeated); an empty prompt opens a document."""
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop))

    def stream(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 200,
        sampling: Sampling | None = None,
        seed: int = 123,
        stop: Sequence[str] = (),
        notice: Callable[[str], None] = lambda _: None,
    ) -> Iterator[str]:
        """Yield the same text as it is drawn, never splitting a character; ends at `<|endoftext|>` and before a stop text.

        Args:
            prompt: Its last `context_length` tokens are used; a notice tells of a cut.
            max_new_tokens: At most so many tokens.
            sampling: By default temperature 0.8.
            seed: The same seed gives the same text.
            stop: Texts before which it ends; what may be the beginning of one is held back until it is known.
            notice: Told what a person should know.

        Raises:
            ConfigError: `max_new_tokens` below 1.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"cannot be {max_new_tokens}", where="--max-new-tokens", do="allowed: from 1")
        ids, limit = self.tokenizer.encode(prompt) or [self.tokenizer.end_of_text], self.model.config.context_length
        if len(ids) > limit:
            notice(f"the prompt has {len(ids)} tokens; the model sees the last {limit} of them")
            ids = ids[-limit:]
        generator = torch.Generator().manual_seed(seed)
        was_training = self.model.training
        model = self._in_precision()
        drawn = islice(generate(model, ids, sampling or Sampling(), generator), max_new_tokens)
        try:
            yield from _until(self._decoded(drawn), stop)
        finally:
            self.model.train(was_training)

    def _decoded(self, tokens: Iterator[int]) -> Iterator[str]:
        """Yield the text of tokens up to `<|endoftext|>`, whole characters at a time."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if token == self.tokenizer.end_of_text:
                break
            if token < self.tokenizer.vocab_size:  # a table may have spare rows
                yield decoder.decode(self.tokenizer.token_bytes(token))
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _in_precision(self) -> GPTModel:
        """Return the model as it speaks, in eval mode; made once for weights that nobody trains."""
        is_trained, version = self.model.training, sum(parameter._version for parameter in self.model.parameters())
        self.model.eval()
        if version not in self._rounded:
            self._rounded.clear()
            made = in_precision(self.model, self.dtype)
            if is_trained:  # the copy would only take memory until the weights change
                return made
            self._rounded[version] = made
        return self._rounded[version]


def _until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Yield the pieces of a text up to the first of the stop texts in it."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(word) for word in stop if word in held]
        if found:
            yield held[: min(found)]
            return
        keep = max((n for word in stop for n in range(1, len(word)) if held.endswith(word[:n])), default=0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    if held:
        yield held


def text_to_token_ids(text: str, tokeniser: object) -> torch.Tensor:
    """Return the ids of `text` as (1, T); `tokeniser` is a `tiktoken.Encoding`. The chapter's function."""
    return torch.tensor(tokeniser.encode(text, allowed_special={"<|endoftext|>"})).unsqueeze(0)  # type: ignore[attr-defined]


def token_ids_to_text(token_ids: torch.Tensor, tokeniser: object) -> str:
    """Return the text of ids (1, T) or (T); `tokeniser` is a `tiktoken.Encoding`. The chapter's function."""
    text: str = tokeniser.decode(token_ids.squeeze(0).tolist())  # type: ignore[attr-defined]
    return text
