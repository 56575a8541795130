"""Models from elsewhere and for elsewhere: import and export.

What can be refused without torch is refused before it is imported; see `api`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstwords import store
from firstwords.config import did_you_mean, run_config
from firstwords.errors import CannotCreateError, ConfigError, DataError
from firstwords.events import Listener, Notice, Preparing, ignore_event, notices_to
from firstwords.loading import is_foreign, load, locate, require_finite, run_of
from firstwords.model import cost
from firstwords.presets import CHAPTER_PROMPT
from firstwords.reading import number
from firstwords.runs.folder import RunFolder

EXPORTS = ("hf", "gguf", "pth")
KNOWN_SENTENCE = f"{CHAPTER_PROMPT} forward, and what you learn on the way stays with you."


@dataclass(frozen=True)
class Imported:
    """What came of an import: the checkpoint folder, and what the model makes of a sentence and a prompt known to all."""

    run: str
    weights_sha256: str
    parameters: int
    nats_per_token: float
    prompt: str
    greedy: str
    published: str  # what others say of a model of that name; empty where nothing is known


@dataclass(frozen=True)
class Exported:
    """What came of an export."""

    path: str
    read_back_by: str  # transformers where it is installed and can, else firstwords
    max_logit_difference: float  # between what was read back and ours


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | None = None,
    n_heads: int | None = None,
    listener: Listener = ignore_event,
) -> Imported:
    """Make a model from elsewhere ours: a checkpoint folder, with which every verb can go on.

    Args:
        source: gpt2, gpt2-medium, gpt2-large or gpt2-xl; a folder for transformers (GPT-2 or Qwen3), the chapter's `.pth`,
            the same as `.safetensors`, or nanoGPT's `ckpt.pt`.
        out: The folder to be made.
        tokenizer: Where the source has none: gpt2, bytes, or a `tokenizer.json`.
        n_heads: Of a state dict, which does not say it; by default those of GPT-2's size.
        listener: Told what happens.

    Raises:
        NoInputError: Nothing is there.
        DataError: It is damaged, or a model that ours cannot be.
        ConfigError: It does not say enough, or says otherwise than what is given.
        CannotCreateError: `out` exists.
    """
    if store.exists(Path(out)):
        raise CannotCreateError("is there already", where=str(out), do="give another --out")
    listener(Preparing("reading the weights", None))

    from firstwords.insight.explain import explain as explain_text
    from firstwords.model.sampling import Sampling
    from firstwords.runs import checkpoint
    from firstwords.weights import reader

    notice = notices_to(listener)
    place = locate(source, notice)
    if (place / store.MANIFEST).is_file() and not is_foreign(place):
        raise DataError("is a checkpoint of firstwords already", where=str(source), do="it is used as it is, as a run is")
    lm = reader.read(place, tokenizer=tokenizer, n_heads=n_heads, notice=notice)
    require_finite(lm, source)
    store.make_folder(Path(out).absolute().parent)
    saved = checkpoint.publish(Path(out), lm.model.tensors(), dataclasses.asdict(lm.model.config), lm.tokenizer.json)
    return Imported(
        run=str(out),
        weights_sha256=saved.weights_sha256,
        parameters=cost.parameters(lm.model.config),
        nats_per_token=explain_text(lm, KNOWN_SENTENCE).evaluation.nats_per_token,
        prompt=CHAPTER_PROMPT,
        greedy=lm.generate(CHAPTER_PROMPT, max_new_tokens=8, sampling=Sampling(temperature=0)),
        published=_published(str(source)) if place != Path(source) else "",  # not of a folder that is only called so
    )


def _published(name: str) -> str:
    """Return what the chapter prints of one of GPT-2's names."""
    from firstwords.weights.hub import PUBLISHED

    if name not in PUBLISHED:
        return ""
    training, held_out, greedy = PUBLISHED[name]
    says = f"{CHAPTER_PROMPT!r} goes on with {greedy!r}; " if greedy else ""
    return f"{says}the-verdict.txt: {training} nats per token on its first nine tenths, {held_out} on the rest"


def export(
    source: str | Path, to: str, out: str | Path, *, kind: str | None = None, listener: Listener = ignore_event
) -> Exported:
    """Write a model for another tool, read it back, and compare its logits with ours.

    Args:
        source: As for `load`.
        to: `hf`, a folder for transformers; `gguf`, a file for llama.cpp; `pth`, a file for the chapter's code.
        out: The folder or file to be made.
        kind: Of a GGUF file's matrices: f32 (by default), f16 or q8_0.
        listener: Told what happens.

    Raises:
        ConfigError: An unknown `to`, or a model that the other tool cannot have.
        CannotCreateError: `out` exists.
        DataError: What was written does not give our logits.
    """
    if to not in EXPORTS:
        raise ConfigError(f"no format {to!r}", where="--to", do=did_you_mean(to, EXPORTS))
    if kind is not None and to != "gguf":
        raise ConfigError("only a GGUF file has kinds", where="--type", do="leave it out")
    if store.exists(Path(out)):
        raise CannotCreateError("is there already", where=str(out), do="give another --out")
    lm = load(source, notice=notices_to(listener))
    require_finite(lm, source)

    import torch

    from firstwords.weights import export as exporting
    from firstwords.weights import shapes

    lm = dataclasses.replace(lm, dtype=torch.float32)
    store.make_folder(Path(out).absolute().parent)
    listener(Preparing("writing, and reading it back", None))
    read_by = "firstwords"
    if to == "pth":
        difference = exporting.to_pth(lm, Path(out))
        heads = lm.model.config.n_heads
        if shapes.KNOWN_HEADS.get(lm.model.config.emb_dim, heads) != heads:
            listener(Notice(f"{out} cannot say that the model has {heads} heads: who reads it must, as --n-heads {heads}"))
    elif to == "gguf":
        difference = exporting.to_gguf(lm, Path(out), kind or "f32")
    else:
        config, trained_here = lm.model.config, run_of(Path(source)).exists
        figures = {**exporting.figures_of(config, cost.parameters(config)), **_figures(Path(source), lm.step)}
        card = exporting.model_card(str(source), figures, config.context_length, trained_here=trained_here)
        difference, read_by = exporting.to_hf(lm, Path(out), card, notices_to(listener))
    return Exported(str(out), read_by, difference)


def _figures(source: Path, at_step: int) -> dict[str, Any]:
    """Return what a run knows of its model at a step, for its card: how good it was held to be."""
    run = RunFolder(source)
    if not run.exists:
        return {}
    last: dict[str, Any] = {}
    for at, line in run.metrics.of_steps("evaluation", "step"):
        if at == at_step:
            last[line["event"]] = line
    found, step = last.get("evaluation", {}), last.get("step", {})
    text = run_config(run.recorded_config()).text
    figures: dict[str, Any] = {"text": ", ".join(Path(name).name for name in text) or "Python's own reference"}
    bits = number(found.get("bits_per_byte"))
    tokens, elapsed_s = number(step.get("tokens")), number(step.get("elapsed_s"))
    if bits is not None:
        figures["held-out bits per byte"] = f"{bits:.3f} (step {at_step})"
    if tokens is not None and elapsed_s is not None:
        figures["learnt from"] = f"{tokens:,} tokens in {elapsed_s:.0f} s"
    return figures
