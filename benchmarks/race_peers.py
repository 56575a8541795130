"""What a peer comes to on a text in so many seconds: the contenders of `race.py` that are packages, in its own process.

    python benchmarks/race_peers.py bantamtrain|chapter|litgpt|transformers TEXT SECONDS

Prints the bits per byte of the held-out tenth. Each is its package's model and optimizer with the settings that the package
itself shows; what it has no word for (the tokenizer, the batches, the clock) is the same for all. The clock stops when a
peer has learnt: it is not charged with the evaluation, which for some would take all of the time.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from race import split

from record import bfloat16_is_faster

T, B = 256, 16
Ids = torch.Tensor


def precision() -> torch.autocast:
    """Return what makes a peer's matrix products bfloat16 where ours are."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_faster())


def batch(ids: Ids, random: np.random.Generator, rows: int) -> Ids:
    """Return (rows, T + 1) ids from random places."""
    starts = random.integers(0, len(ids) - T - 1, rows)
    return torch.stack([ids[start : start + T + 1] for start in starts])


def shares(seconds: float, started_s: float) -> Iterator[float]:
    """Yield before each update which share of the time is over that is left now."""
    begun_s = time.perf_counter()
    whole_s = seconds - (begun_s - started_s)
    while (share := (time.perf_counter() - begun_s) / whole_s) < 1:
        yield share


def bits_per_byte(model: torch.nn.Module, logits_of: Callable[[Ids], torch.Tensor], held_out: Ids, n_bytes: int) -> float:
    """Return the bits per byte of the held-out ids, each seen from at least half a context but the first ones."""
    nats, stride = 0.0, T // 2
    model.eval()
    with torch.no_grad(), precision():
        for start in range(0, len(held_out) - 1, stride):
            window = held_out[start : start + T + 1]
            skip = 0 if start == 0 else T - stride
            logits = logits_of(window[None, :-1])[0].float()
            if len(window) - 1 > skip:
                nats += F.cross_entropy(logits[skip:], window[1 + skip :], reduction="sum").item()
    return nats / math.log(2) / n_bytes


def bantamtrain(training: str, held_out: str, seconds: float, started_s: float) -> float:
    """ZoomGPT with QK-norm and squared ReLU, its Muon, flush-to-zero, warm-up, stable, decay; a BPE of 1,024."""
    from bantamtrain.device import enable_ftz
    from bantamtrain.models import ZoomGPT
    from bantamtrain.optim import build_optimizer
    from bantamtrain.zoom import lr_at

    from firstwords.text.tokenizer import train_bpe

    enable_ftz()
    torch.manual_seed(1)
    tokenizer = train_bpe([training], 1024)
    ids, rest = torch.tensor(tokenizer.encode(training)), torch.tensor(tokenizer.encode(held_out))
    model = ZoomGPT(vocab=tokenizer.vocab_size, d=192, n_layer=4, n_head=3, qk_norm=True, mlp="relu2")
    optimizer, random = build_optimizer(model, "muon", lr=1.6e-2, weight_decay=0.1), np.random.default_rng(1)
    for share in shares(seconds, started_s):
        rows = batch(ids, random, B)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(share, 1.6e-2, sched="wsd")
        with precision():
            loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return bits_per_byte(model, lambda rows: model.logits(model.hidden(rows)), rest, len(held_out.encode()))


def chapter(training: str, held_out: str, seconds: float, started_s: float) -> float:
    """GPT_CONFIG_124M of the chapter's package, AdamW at 4e-4, batches of 2, GPT-2's tokens."""
    from llms_from_scratch.ch04 import GPTModel

    from firstwords import GPT_CONFIG_124M
    from firstwords.text.tokenizer import gpt2

    torch.manual_seed(123)
    ids, rest = (torch.tensor(gpt2().encode(text)) for text in (training, held_out))
    model, random = GPTModel({**GPT_CONFIG_124M, "context_length": T}), np.random.default_rng(123)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    for _ in shares(seconds, started_s):
        rows = batch(ids, random, 2)
        optimizer.zero_grad()
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
    return bits_per_byte(model, model, rest, len(held_out.encode()))


def litgpt(training: str, held_out: str, seconds: float, started_s: float) -> float:
    """Its smallest model and the defaults of `litgpt pretrain`, but an update for each micro-batch of 4; GPT-2's tokens.

    Its 512 sequences an update would allow none in so short a time; its 2,000 updates of warm-up become a tenth.
    """
    from litgpt import GPT, Config

    from firstwords.text.tokenizer import gpt2

    torch.manual_seed(42)
    ids, rest = (torch.tensor(gpt2().encode(text)) for text in (training, held_out))
    model, random = GPT(Config.from_name("pythia-14m", block_size=T)), np.random.default_rng(42)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, betas=(0.9, 0.95))
    for share in shares(seconds, started_s):
        rows = batch(ids, random, 4)
        for group in optimizer.param_groups:
            cosine = 4e-5 + (4e-4 - 4e-5) * (1 + math.cos(math.pi * share)) / 2
            group["lr"] = 4e-4 * share / 0.1 if share < 0.1 else cosine
        with precision():
            logits = model(rows[:, :-1])
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return bits_per_byte(model, model, rest, len(held_out.encode()))


def transformers(training: str, held_out: str, seconds: float, started_s: float) -> float:
    """GPT2Config's model with the defaults of its Trainer: AdamW at 5e-5, falling to 0, batches of 8; GPT-2's tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from firstwords.text.tokenizer import gpt2

    torch.manual_seed(42)
    ids, rest = (torch.tensor(gpt2().encode(text)) for text in (training, held_out))
    model, random = GPT2LMHeadModel(GPT2Config()).train(), np.random.default_rng(42)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
    for share in shares(seconds, started_s):
        rows = batch(ids, random, 8)
        for group in optimizer.param_groups:
            group["lr"] = 5e-5 * (1 - share)
        with precision():
            logits = model(input_ids=rows[:, :-1]).logits
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return bits_per_byte(model, lambda rows: model(input_ids=rows).logits, rest, len(held_out.encode()))


CONTENDERS = {"bantamtrain": bantamtrain, "chapter": chapter, "litgpt": litgpt, "transformers": transformers}

if __name__ == "__main__":
    STARTED_S = time.perf_counter()
    NAME, TEXT, SECONDS = sys.argv[1:]
    print(CONTENDERS[NAME](*split(Path(TEXT).read_text()), float(SECONDS), STARTED_S))
