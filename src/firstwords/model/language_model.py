"""A model with its tokenizer: text in, text out."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from firstwords.errors import ConfigError, Notify, ignore_line
from firstwords.model.generate import Drawn, generate, generate_batch, in_precision
from firstwords.model.gpt import GPTModel, evaluating
from firstwords.model.sampling import Sampling, stop_texts
from firstwords.text.tokenizer import Tokenizer

ROWS_AT_ONCE = 8  # of a batch of prompts: their keys and values fill half a gigabyte for GPT-2 124M


@dataclass(frozen=True)
class Said:
    """A text that was drawn, and its tokens, to the one that ended it where one did."""

    text: str
    tokens: tuple[Drawn, ...]


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
    _rounded: dict[tuple[int, bool], GPTModel] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        prompt: str | Sequence[int] = "",
        *,
        max_new_tokens: int = 200,
        sampling: Sampling | None = None,
        seed: int = 123,
        stop: str | Sequence[str] = (),
    ) -> str:
        """Return what the model says after `prompt`, a text or ids, which is not repeated; an empty one opens a document."""
        return "".join(self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop))

    def stream(
        self,
        prompt: str | Sequence[int] = "",
        *,
        max_new_tokens: int = 200,
        sampling: Sampling | None = None,
        seed: int = 123,
        stop: str | Sequence[str] = (),
        notice: Notify = ignore_line,
    ) -> Iterator[str]:
        """Yield the same text as it is drawn, never splitting a character; ends at `<|endoftext|>` and before a stop text.

        Args:
            prompt: A text or ids. Its last `context_length` tokens are used; a notice tells of a cut.
            max_new_tokens: At most so many tokens.
            sampling: By default temperature 0.8.
            seed: The same seed gives the same text.
            stop: A text, or texts, before which it ends; what may be the beginning of one is held back until it is known.
            notice: Told what a person should know.

        Raises:
            ConfigError: `max_new_tokens` below 1, or an empty stop text.
        """
        ids, stop = self._prompt_ids(prompt, max_new_tokens, notice), stop_texts(stop)
        generator = torch.Generator().manual_seed(seed)
        model = self._in_precision(several=False)
        drawn = islice(generate(model, ids, sampling or Sampling(), generator), max_new_tokens)
        with evaluating(self.model):
            yield from _until(self._decoded(drawn), stop)

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 200,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        notice: Notify = ignore_line,
    ) -> Iterator[Said]:
        """Yield what the model says after each prompt: in float32 what `generate` says after it, in a fraction of the time.

        Args:
            prompts: Of any lengths.
            max_new_tokens: At most so many tokens each.
            sampling: By default temperature 0.8.
            seeds: One for each prompt; by default 123, 124, ...
            stop: A text, or texts, before which one ends.
            notice: Told what a person should know.

        Raises:
            ConfigError: `max_new_tokens` below 1, or an empty stop text.
        """
        ids = [self._prompt_ids(prompt, max_new_tokens, notice) for prompt in prompts]
        seeds, stop = range(123, 123 + len(ids)) if seeds is None else seeds, stop_texts(stop)
        model = self._in_precision(several=len(ids) > 1)
        with evaluating(self.model):
            for start in range(0, len(ids), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
                batches = generate_batch(model, ids[rows], sampling or Sampling(), generators)
                yield from self._said(islice(batches, max_new_tokens), len(ids[rows]), stop)

    def _said(self, batches: Iterator[list[Drawn]], n_rows: int, stop: Sequence[str]) -> list[Said]:
        """Return the texts of rows that are drawn together; a row that has ended is drawn on unheard until all have."""
        tokens: list[list[Drawn]] = [[] for _ in range(n_rows)]
        going_on = set(range(n_rows))
        for drawn in batches:
            for row in sorted(going_on):
                tokens[row].append(drawn[row])
                if self._has_ended(tokens[row], [word.encode() for word in stop]):
                    going_on.discard(row)
            if not going_on:
                break
        return [Said("".join(_until(self._decoded(one.id for one in row), stop)), tuple(row)) for row in tokens]

    def _has_ended(self, tokens: Sequence[Drawn], stop: Sequence[bytes]) -> bool:
        """Whether the last token is `<|endoftext|>` or completes a stop text; a token is a byte at least."""
        tail = b"".join(self._bytes(one.id) for one in tokens[-max(map(len, stop), default=1) :])
        return tokens[-1].id == self.tokenizer.end_of_text or any(word in tail for word in stop)

    def _prompt_ids(self, prompt: str | Sequence[int], max_new_tokens: int, notice: Notify) -> list[int]:
        """Return the ids that the model sees of a prompt."""
        if max_new_tokens < 1:
            raise ConfigError(f"cannot be {max_new_tokens}", where="--max-new-tokens", do="allowed: from 1")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        ids, limit = ids or [self.tokenizer.end_of_text], self.model.config.context_length
        if len(ids) > limit:
            notice(f"the prompt has {len(ids)} tokens; the model sees the last {limit} of them")
        return ids[-limit:]

    def _bytes(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token) if token < self.tokenizer.vocab_size else b""  # a table may have spare rows

    def _decoded(self, tokens: Iterator[int]) -> Iterator[str]:
        """Yield the text of tokens up to `<|endoftext|>`, whole characters at a time."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if token == self.tokenizer.end_of_text:
                break
            yield decoder.decode(self._bytes(token))
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _in_precision(self, *, several: bool) -> GPTModel:
        """Return the model as it speaks, one text or several; made once for weights that nobody trains."""
        key = sum(parameter._version for parameter in self.model.parameters()), several
        if key not in self._rounded:
            self._rounded.clear()
            with evaluating(self.model):  # a copy is made in that mode too
                made = in_precision(self.model, self.dtype, several=several)
            if self.model.training:  # the copy would only take memory until the weights change
                return made
            self._rounded[key] = made
        return self._rounded[key]


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
