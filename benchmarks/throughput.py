"""How fast a GPT-2 of 124M parameters learns: firstwords beside its peers, and beside the limit of the machine.

    python benchmarks/throughput.py [--rounds 3] [--nanogpt CHECKOUT] [--only NAME ...] [--write]

A step is the whole of it: forward, backward, clipping, AdamW, on random ids, context 256, batch 8, without dropout. Every
contender runs in a process of its own, one after another, round after round; the median over all rounds counts. The
limit is the rate of this machine's bfloat16 matrix products, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from record import measured, report

V, T, B = 50257, 256, 8
LR, DECAY, CLIP = 1e-4, 0.1, 1.0
Step = Callable[[], object]
KEPT = ExitStack()  # what holds until the process ends


def ids() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def plain_step(
    model: torch.nn.Module, loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, dtype: str
) -> Step:
    """Return the step that all peers' loops share."""

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            nats = loss()
        nats.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def adamw(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, **options)


def firstwords(dtype: str, *, tied: bool, compiled: bool) -> Step:
    from firstwords.config import run_config
    from firstwords.planning import machine, measure

    shape = {"model.context_length": T, "model.drop_rate": 0.0, "model.tied_head": tied}
    config = run_config({"preset": "gpt2-124m", "precision": dtype, **shape})
    KEPT.enter_context(machine.memory_kept())  # as in every run
    return measure.training_step(config, B, torch.compile if compiled else lambda features: features)


def nanogpt(dtype: str, *, compiled: bool, checkout: Path) -> Step:
    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True))
    optimizer = model.configure_optimizers(DECAY, LR, (0.9, 0.95), "cpu")
    forward, (tokens, targets) = torch.compile(model) if compiled else model, ids()
    return plain_step(model, lambda: forward(tokens, targets)[1], optimizer, dtype)


def transformers(dtype: str) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_positions=T, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
    tokens, _ = ids()
    return plain_step(model, lambda: model(input_ids=tokens, labels=tokens).loss, adamw(model), dtype)


def litgpt(dtype: str) -> Step:
    from litgpt import GPT, Config

    model, (tokens, targets) = GPT(Config.from_name("pythia-160m", block_size=T, padded_vocab_size=V)), ids()
    return plain_step(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()), adamw(model), dtype)


def chapter(dtype: str) -> Step:
    from llms_from_scratch.ch04 import GPTModel

    shape = {"vocab_size": V, "context_length": T, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
    model, (tokens, targets) = GPTModel({**shape, "drop_rate": 0.0, "qkv_bias": False}), ids()
    return plain_step(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()), adamw(model), dtype)


def contenders(checkout: Path | None) -> dict[str, Callable[[], Step]]:
    found: dict[str, Callable[[], Step]] = {
        "firstwords, bfloat16": lambda: firstwords("bfloat16", tied=True, compiled=False),
        "firstwords, bfloat16, untied head": lambda: firstwords("bfloat16", tied=False, compiled=False),
        "firstwords, bfloat16, compiled": lambda: firstwords("bfloat16", tied=True, compiled=True),
        "firstwords, float32": lambda: firstwords("float32", tied=True, compiled=False),
        "transformers GPT2LMHeadModel, bfloat16": lambda: transformers("bfloat16"),
        "transformers GPT2LMHeadModel, float32": lambda: transformers("float32"),
        "litgpt pythia-160m shape, bfloat16": lambda: litgpt("bfloat16"),
        "litgpt pythia-160m shape, float32": lambda: litgpt("float32"),
        "the chapter's package, bfloat16": lambda: chapter("bfloat16"),
        "the chapter's package, float32": lambda: chapter("float32"),
    }
    if checkout is not None:
        for dtype in ("bfloat16", "float32"):
            for compiled in (True, False):
                name = f"nanoGPT, {dtype}" + (", compiled" if compiled else "")
                found[name] = lambda dtype=dtype, compiled=compiled: nanogpt(dtype, compiled=compiled, checkout=checkout)  # type: ignore[misc]
    return found


def run(name: str, checkout: Path | None, steps: int) -> dict[str, float]:
    """Return the median seconds of a step and the peak memory of this process, which does nothing else."""
    torch.manual_seed(1)
    if name == MACHINE:
        from firstwords.planning.measure import product_rate

        return {"rate": product_rate(torch.bfloat16)}
    step = contenders(checkout)[name]()
    times_s = []
    for _ in range(steps + 1):
        started_s = time.perf_counter()
        step()
        times_s.append(time.perf_counter() - started_s)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"step_s": statistics.median(times_s[1:]), "peak_bytes": peak}


MACHINE = "the machine's matrix products"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=3, help="in each round, after one that is not counted")
    options.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    options.add_argument("--only", nargs="*", help="contenders whose names contain one of these")
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options.add_argument("--run", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.run:
        measured(run(given.run, given.nanogpt, given.steps))
        return

    from firstwords.config import run_config
    from firstwords.model import cost
    from record import interleaved

    names = [n for n in contenders(given.nanogpt) if not given.only or any(part in n for part in given.only)]
    found = interleaved([MACHINE, *names], given.rounds, __file__, sys.argv[1:])
    model = dataclasses.replace(run_config({"preset": "gpt2-124m"}).model, context_length=T)
    rate = found.pop(MACHINE)["rate"]
    limit = rate / cost.training_flops(model)
    rows = [["the machine's bfloat16 products", f"{limit:,.0f}", "100 %", "", f"{rate / 1e9:,.0f} GFLOP/s"]]
    ours = next(iter(found.values()))["step_s"]
    for name, figures in found.items():
        tokens_per_s = B * T / figures["step_s"]
        ratio = f"{figures['step_s'] / ours:.2f}"
        memory = f"{figures['peak_bytes'] / 1e9:.1f} GB"
        rows.append([name, f"{tokens_per_s:,.0f}", f"{tokens_per_s / limit:.0%}", ratio, memory])
    report(
        "throughput",
        f"A training step of GPT-2 124M, context {T}, batch {B}",
        ["", "tokens/s", "of the limit", "times as long as ours", "peak memory"],
        rows,
        write=given.write,
    )


if __name__ == "__main__":
    main()
