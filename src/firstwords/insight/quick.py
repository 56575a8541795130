"""What a run has a moment for: its scale, beginnings for the samples that are measured, the passage that its report shows.

Needs no torch until it is asked for one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from firstwords.text import corpus as corpora
from firstwords.text.corpus import Corpus

if TYPE_CHECKING:
    from firstwords.insight.explain import Explanation
    from firstwords.model.language_model import LanguageModel
    from firstwords.training.evaluate import TokenFigures

MOST_IDS, MOST_HELD_OUT = 1_500_000, 50_000  # of texts on which the report at the end of a run has a scale: seconds


def scale(lm: LanguageModel, corpus: Corpus, name: str, tokens: TokenFigures | None = None) -> dict[str, Any] | None:
    """Return the scale of a model on the held-out text of its run, where that takes a moment; else None.

    Args:
        lm: The model.
        corpus: The run's text.
        name: What the model is called.
        tokens: What `evaluate_tokens` returns for them; by default found anew.
    """
    from firstwords.insight import scale as scales
    from firstwords.insight.baselines import Given, baselines
    from firstwords.training.evaluate import evaluate_tokens

    if not scale_tokens(corpus, None):
        return None
    tokens = tokens or evaluate_tokens(lm.model, corpus.val, lm.dtype)
    if tokens is None:
        return None
    held_out = corpora.documents(corpus.val, lm.tokenizer)
    blocks = scales.Blocks.of([len(document) for document in held_out])
    rows = list(baselines(held_out, Given.of(corpus), blocks.starts, quick=True))
    return scales.scale(name, tokens, (), rows, blocks).as_dict()


def scale_tokens(corpus: Corpus, eval_tokens: int | None) -> int:
    """Return how many held-out tokens the scale in a run's report is made from; 0: it has none.

    Args:
        corpus: The text.
        eval_tokens: By how many the run judges itself, at most: where it has no time for more, its report has none either.
    """
    n_held_out = corpus.val.n_tokens
    most = min(MOST_HELD_OUT, eval_tokens or MOST_HELD_OUT)
    return n_held_out if len(corpus.train.ids) <= MOST_IDS and n_held_out <= most else 0


def prompts(corpus: Corpus, first: str, count: int) -> list[str]:
    """Return prompts for samples that are measured: `first`, then the beginnings of held-out text from places evenly spread.

    All samples from `<|endoftext|>` would begin as the documents do, which a model learns by heart before all else.
    """
    from firstwords.insight.memorisation import PROMPT_TOKENS, held_out_pieces

    held_out = held_out_pieces(corpus.val, corpus.tokenizer, PROMPT_TOKENS, count - 1)
    return [first, *held_out, *[first] * (count - 1 - len(held_out))]


def passage_explained(lm: LanguageModel, corpus: Corpus) -> Explanation | None:
    """Return a held-out passage as a model sees it; None where there is none."""
    from firstwords.insight import surprise
    from firstwords.insight.explain import explain

    passage = surprise.passage(corpus.val, lm.tokenizer) if corpus.val.n_tokens else None
    return None if passage is None else explain(lm, passage)
