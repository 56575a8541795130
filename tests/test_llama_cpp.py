"""llama.cpp says what we say: the same ids for a prompt, the same likeliest tokens after it.

Needs node and a folder with `node_modules/node-llama-cpp`, named by FIRSTWORDS_NODE_MODULES: see `make llama-cpp`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from itertools import islice
from pathlib import Path

import pytest
import torch

from firstwords import api
from firstwords.model.generate import generate
from firstwords.model.sampling import Sampling
from firstwords.weights import export

HERE, MODULES = Path(__file__).parent, os.environ.get("FIRSTWORDS_NODE_MODULES")
PROMPTS = ["The statement", " a   b\n\n\tdon't 12345 Grüße", "class"]
COUNT = 64
pytestmark = pytest.mark.skipif(not MODULES or not shutil.which("node"), reason="NOT RUN: no llama.cpp named")
SMALL = {"emb_dim": 64, "n_heads": 2, "n_layers": 2, "context_length": 128}
RUNS = {
    "qwen3, bpe": {"tokenizer": "bpe:600", "model": SMALL},
    "qwen3, bytes": {"tokenizer": "bytes", "model": SMALL},
    "gpt2, bpe": {"tokenizer": "bpe:600", "preset": "gpt2-124m", "model": SMALL},
    "gpt2, GPT-2's tokens": {"preset": "gpt2-124m", "model": SMALL},
    "gpt2, untied": {"tokenizer": "bytes", "preset": "chapter", "epochs": None, "model": SMALL},
}


@pytest.mark.parametrize("run", RUNS)
def test_llama_cpp_gives_our_ids_and_our_likeliest_tokens(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTWORDS_CACHE", str(tmp_path / "cache"))
    api.train(out=tmp_path / "run", steps=60, eval_every=60, batch_size=8, precision="float32", **RUNS[run])  # type: ignore[arg-type]
    lm = api.load(tmp_path / "run")
    export.to_gguf(lm, tmp_path / "model.gguf", "f32")
    for prompt in PROMPTS:
        command = ["node", HERE / "llama_cpp.mjs", tmp_path / "model.gguf", prompt, str(COUNT)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        theirs, ids = json.loads(ended.stdout.splitlines()[-1]), lm.tokenizer.encode(prompt)
        assert theirs["ids"] == ids
        ours = list(islice(generate(lm.model, ids, Sampling(0), torch.Generator()), COUNT))
        end = ours.index(lm.tokenizer.end_of_text) if lm.tokenizer.end_of_text in ours else COUNT
        assert theirs["said"][:end] == ours[:end]
