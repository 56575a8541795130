"""Our model as lm-eval's, EleutherAI's harness: what it asks of its own `hf` model, with the same answers.

Needs lm-eval; `api.lm_eval_model` says so where it is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from firstwords.errors import ConfigError
from firstwords.insight.likelihood import Continuation, likelihoods
from firstwords.model.language_model import LanguageModel
from firstwords.model.sampling import Sampling

MAX_GEN_TOKS = 256  # the default of lm-eval's `hf` model


class HarnessModel(TemplateLM):  # type: ignore[misc] # lm-eval has no types
    """A `LanguageModel`, in float32, for `lm_eval.simple_evaluate(model=...)`."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self.lm = dataclasses.replace(lm, dtype=torch.float32)
        self._device = lm.model.tok_emb.weight.device

    @property
    def eot_token_id(self) -> int:
        """`<|endoftext|>`, which also stands before a text without context."""
        return self.lm.tokenizer.end_of_text

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self.lm.model.config.context_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:  # noqa: ARG002
        """Return the ids of a text; nothing is added, as with the tokenizer that we export."""
        return self.lm.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:  # noqa: ARG002
        asked = [Continuation(tuple(context), tuple(ids)) for _, context, ids in requests]
        answers = [(-found.nats, found.greedy) for found in likelihoods(self.lm, asked)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Return the log-likelihood of whole texts, in lm-eval's windows: each id counted once, the last window full."""
        asked, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows = [Continuation(tuple(a), tuple(b)) for a, b in map(utils.make_disjoint_window, rolling)]
            asked += windows
            owner += [number] * len(windows)
        sums = [0.0] * len(requests)
        for number, found in zip(owner, likelihoods(self.lm, asked), strict=True):
            sums[number] -= found.nats
        for request, answer in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Return what the model says after each context, up to the task's stop texts.

        The context is cut from the left until so many new tokens fit behind it.

        Raises:
            ConfigError: More new tokens than the model's context has room for.
        """
        said = []
        for request in requests:
            context, options = request.args
            options = normalize_gen_kwargs(options, MAX_GEN_TOKS)
            until, count = handle_stop_sequences(options.get("until"), eos=None), options["max_gen_toks"]
            if count >= self.max_length:
                why = f"its context of {self.max_length} has no room for {count} new tokens and a text before them"
                raise ConfigError(
                    "the model cannot answer this task", where="max_gen_toks", why=why, do="give a smaller one"
                )
            ids = self.tok_encode(context)[-(self.max_length - count) :]
            text = self.lm.generate(
                ids,  # a cut may lie inside a letter, which no text could begin with
                max_new_tokens=count,
                sampling=Sampling(
                    temperature=options.get("temperature", 0.0), top_k=options.get("top_k"), top_p=options.get("top_p")
                ),
                stop=[text for text in until if text],
            )
            said.append(postprocess_generated_text(text, until, None))
            self.cache_hook.add_partial("generate_until", request.args, said[-1])
        return said
