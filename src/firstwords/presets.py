"""Named recipes, from which a configuration begins. Where their numbers come from: docs/recipe.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Dotted key -> value: `{"steps": 500, "model.n_layers": 6}`. Values may still be text, as flags are.
Overrides = Mapping[str, Any]

SHORTEST_CONTEXT = 128  # of the presets that a run which names none may take

GPT_CONFIG_124M: dict[str, int | float | bool] = {
    "vocab_size": 50257,
    "context_length": 256,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}
CHAPTER_PROMPT = "Every effort moves you"

LAPTOP: Overrides = {  # what all presets for a laptop share
    "tokenizer": "bpe",
    "model.block": "qwen3",
    "model.context_length": 256,
    "model.emb_dim": 192,
    "model.n_heads": 3,
    "model.n_layers": 4,
    "model.ff_dim": 512,
    "model.drop_rate": 0.0,
    "model.tied_head": True,
    "model.norm_eps": 1e-6,
    "model.init_std": 0.02,
    "model.table_from_text": True,
    "model.induction_heads": True,
    "optim.kind": "muon",
    "optim.peak_lr": 8e-3,
    "optim.warmup_steps": 20,
    "optim.weight_decay": 1.0,
    "optim.decay": "linear",
}
# A table of few channels cannot be good at both ends of a model, and one that is not the output head too begins louder:
# docs/recipe.md.
SMALLER: Overrides = {**LAPTOP, "model.tied_head": False, "model.table_std": 0.1}
GPT2: Overrides = {"tokenizer": "gpt2", "model.qkv_bias": True, "model.tied_head": True, "model.init_std": 0.02}


def _gpt2(emb_dim: int, n_heads: int, n_layers: int) -> Overrides:
    return {**GPT2, "model.emb_dim": emb_dim, "model.n_heads": n_heads, "model.n_layers": n_layers}


def _smaller(emb_dim: int, n_heads: int, n_layers: int) -> Overrides:
    """Return the recipe for a machine, or a time, in which few tokens are learnt from: in shorter sequences."""
    shape = {"emb_dim": emb_dim, "n_heads": n_heads, "n_layers": n_layers, "ff_dim": 16 * round(emb_dim / 6)}
    return {**SMALLER, **{f"model.{key}": value for key, value in shape.items()}, "model.context_length": SHORTEST_CONTEXT}


def presets() -> dict[str, Overrides]:
    """Return every preset by name. `gpt2-*` are the shapes of GPT-2's releases (Radford et al. 2019, table 2)."""
    return {
        "laptop": LAPTOP,
        "laptop-tiny": _smaller(64, 1, 2),
        "laptop-mini": _smaller(96, 2, 3),
        "laptop-small": {**SMALLER, "model.emb_dim": 128, "model.n_heads": 2, "model.ff_dim": 352},
        "laptop-large": {
            **LAPTOP,
            "model.emb_dim": 384,
            "model.n_heads": 6,
            "model.n_layers": 6,
            "model.ff_dim": 1024,
            "optim.peak_lr": 3e-3,
        },
        "chapter": {
            **{f"model.{key}": value for key, value in GPT_CONFIG_124M.items() if key != "vocab_size"},
            "tokenizer": "gpt2",
            "batch_size": 2,
            "epochs": 10,
            "eval_every": 5,
            "eval_tokens": 5 * 2 * 256,  # its batches of an evaluation; the-verdict's held-out part has fewer
            "sample_every": 9,
            "shift_windows": False,
            "optim.peak_lr": 4e-4,
            "optim.warmup_steps": 0,
            "optim.decay": "constant",
            "optim.beta2": 0.999,
            "optim.max_grad_norm": None,
        },
        "gpt2-124m": _gpt2(768, 12, 12),
        "gpt2-355m": _gpt2(1024, 16, 24),
        "gpt2-774m": _gpt2(1280, 20, 36),
        "gpt2-1558m": _gpt2(1600, 25, 48),
    }
