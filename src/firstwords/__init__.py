"""Pretrain a GPT on your own text.

import firstwords as fw

run = fw.train("notes/", out="runs/notes", steps=500)
lm = fw.load("runs/notes")
print(lm.generate("Every effort moves you", max_new_tokens=40))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firstwords.api import evaluate as evaluate
    from firstwords.api import explain as explain
    from firstwords.api import info as info
    from firstwords.api import load as load
    from firstwords.api import report as report
    from firstwords.api import verify as verify
    from firstwords.app.console import train as train
    from firstwords.config import ModelConfig as ModelConfig
    from firstwords.errors import FirstwordsError as FirstwordsError
    from firstwords.model.generate import generate_text_simple as generate_text_simple
    from firstwords.model.gpt import GPTModel as GPTModel
    from firstwords.model.language_model import LanguageModel as LanguageModel
    from firstwords.model.language_model import text_to_token_ids as text_to_token_ids
    from firstwords.model.language_model import token_ids_to_text as token_ids_to_text
    from firstwords.model.sampling import Sampling as Sampling
    from firstwords.presets import GPT_CONFIG_124M as GPT_CONFIG_124M
    from firstwords.text.tokenizer import gpt2_tokenizer as gpt2_tokenizer

__version__ = "0.1.0"

# Public name -> where it lives. Imported on first use: `import firstwords` alone costs nothing.
_HOMES = {
    "GPTModel": "firstwords.model.gpt",
    "GPT_CONFIG_124M": "firstwords.presets",
    "FirstwordsError": "firstwords.errors",
    "LanguageModel": "firstwords.model.language_model",
    "ModelConfig": "firstwords.config",
    "Sampling": "firstwords.model.sampling",
    "evaluate": "firstwords.api",
    "explain": "firstwords.api",
    "generate_text_simple": "firstwords.model.generate",
    "gpt2_tokenizer": "firstwords.text.tokenizer",
    "info": "firstwords.api",
    "load": "firstwords.api",
    "report": "firstwords.api",
    "text_to_token_ids": "firstwords.model.language_model",
    "token_ids_to_text": "firstwords.model.language_model",
    "train": "firstwords.app.console",
    "verify": "firstwords.api",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'firstwords' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
