"""Static pictures for papers, by matplotlib: the chapter's loss plot and its temperature plot.

The chapter is "Pretraining on Unlabeled Data" of Raschka's *Build a Large Language Model (From Scratch)*, 5.2 and 5.3.1.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import torch

from firstwords.errors import ConfigError, DataError
from firstwords.insight.record import Record
from firstwords.model.gpt import evaluating
from firstwords.model.language_model import LanguageModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPERATURES = (1.0, 0.1, 5.0)  # the chapter's
SHOWN_TOKENS = 9  # as many as its toy vocabulary has
DPI = 200
LOSS_PLOT, TEMPERATURE_PLOT = "loss-plot", "temperature-plot"  # names of files
MADE_BY = {"png": {"Software": "firstwords report"}, "pdf": {"Creator": "firstwords report"}}
MARK = b"firstwords report", 1 << 20  # how a picture of ours is known: this in so many first bytes


def require_matplotlib(where: str) -> None:
    """Raise a ConfigError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        why, do = "the package matplotlib is not installed", "pip install 'firstwords[plot]'"
        raise ConfigError("cannot be drawn", where=where, why=why, do=do) from error


def loss_plot(record: Record) -> Figure:
    """Return training and held-out loss over epochs (below) and tokens seen (above); over steps where epochs are unknown.

    Raises:
        DataError: The run has not been evaluated.
    """
    figure, axes = _figure()
    table = record.evaluations
    below = "epochs" if "epochs" in table else "step"
    if not table.get("train_nats_per_token"):
        raise DataError("the run has no evaluation to draw", where=record.name)
    x = _numbers(table[below])
    axes.plot(x, _numbers(table["train_nats_per_token"]), label="training")
    if "nats_per_token" in table:
        axes.plot(x, _numbers(table["nats_per_token"]), linestyle="-.", label="held out")
    axes.set(xlabel="epochs" if below == "epochs" else "steps", ylabel="loss, nats per token")
    axes.legend(frameon=False)
    if "tokens" in table:
        above = axes.twiny()
        above.plot(_numbers(table["tokens"]), _numbers(table["train_nats_per_token"]), alpha=0)  # only for the axis's range
        above.set_xlabel("tokens seen")
    return figure


@torch.no_grad()
def temperature_plot(lm: LanguageModel, prompt: str) -> Figure:
    """Return softmax(logits / T) of the likeliest next tokens after a prompt, among themselves, for each temperature."""
    figure, axes = _figure()
    ids = lm.tokenizer.encode(prompt)[-lm.model.config.context_length :] or [lm.tokenizer.end_of_text]
    with evaluating(lm.model):
        logits = lm.model(torch.tensor([ids], device=lm.model.tok_emb.weight.device))[0, -1].float().cpu()
    best = logits[: lm.tokenizer.vocab_size].topk(min(SHOWN_TOKENS, lm.tokenizer.vocab_size))
    width = 0.8 / len(TEMPERATURES)
    for i, temperature in enumerate(TEMPERATURES):
        p = torch.softmax(best.values / temperature, dim=-1).tolist()
        axes.bar([place + (i - 1) * width for place in range(len(p))], p, width, label=f"temperature {temperature:g}")
    names = [repr(lm.tokenizer.token_bytes(token).decode(errors="replace"))[1:-1] for token in best.indices.tolist()]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
    axes.set_ylabel(f"probability among these {len(names)}")
    axes.set_title(f"the next token after {prompt!r}", parse_math=False)
    axes.legend(frameon=False)
    return figure


def drawn(figure: Figure, kind: str) -> bytes:
    """Return a figure as a PNG or PDF file."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its font lacks a character, which a box then stands for
        figure.savefig(file, format=kind, dpi=DPI, bbox_inches="tight", metadata=MADE_BY[kind])
    return file.getvalue()


def _figure() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.5))
    return figure, figure.subplots()


def _numbers(column: list[Any]) -> list[float]:
    return [float("nan") if value is None else value for value in column]
