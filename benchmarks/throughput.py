"""How fast a GPT-2 of 124M parameters learns: firstwords beside its peers, and beside the limit of the machine.

    python benchmarks/throughput.py [--rounds 3] [--device cuda] [--nanogpt CHECKOUT] [--only NAME ...] [--write]

A step is the whole of it: forward, backward, clipping, AdamW, on random ids, without dropout: context 256 and batch 8 on a
processor; on a GPU context 1,024 and the 491,520 tokens of nanoGPT's own recipe, in micro-batches of 32. Every contender
runs in a process of its own, one after another, round after round; the median over all rounds counts. The limit is the
rate of the device's matrix products in the precision in which they are faster, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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

V = 50257
LR, DECAY, CLIP = 1e-4, 0.1, 1.0
Step = Callable[[], object]
KEPT = ExitStack()  # what holds until the process ends
DEVICES = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step is done on."""

    device: str
    T: int
    B: int
    micro: int  # sequences at once

    @classmethod
    def on(cls, device: str) -> Work:
        """Return the usual work on a device."""
        return cls(device, 256, 8, 8) if device == "cpu" else cls(device, 1024, 480, 32)

    def ids(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets (B, T)."""
        drawn = torch.randint(V, (self.B, self.T + 1), generator=torch.Generator().manual_seed(0)).to(self.device)
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()

    def wait(self) -> None:
        """Wait until the device has done what it was asked for."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def plain_step(
    work: Work,
    model: torch.nn.Module,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    dtype: str,
) -> Step:
    """Return the step that all peers' loops share.

    Args:
        work: What it is done on.
        model: To train.
        loss: Nats per token of some inputs and targets.
        optimizer: Its own.
        dtype: Of the matrix products.
    """
    ids = list(zip(*(part.split(work.micro) for part in work.ids()), strict=True))

    def step() -> None:
        for tokens, targets in ids:
            with torch.autocast(work.device, torch.bfloat16) if dtype == "bfloat16" else nullcontext():
                nats = loss(tokens, targets) / len(ids)
            nats.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def adamw(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, **options)


def firstwords(work: Work, dtype: str, *, tied: bool, compiled: bool) -> Step:
    from firstwords.config import run_config
    from firstwords.planning import measure, process

    shape = {"model.context_length": work.T, "model.drop_rate": 0.0, "model.tied_head": tied}
    config = run_config({"preset": "gpt2-124m", "precision": dtype, "device": work.device, **shape})
    KEPT.enter_context(process.memory_kept())  # as in every run
    return measure.training_step(config, work.B, compiled=compiled, micro_batch_size=work.micro)


def nanogpt(work: Work, dtype: str, *, compiled: bool, checkout: Path) -> Step:
    """Its own settings on a GPU: TF32, and a table of 50,304 words, of which it says that it is faster."""
    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    if work.device == "cuda":
        torch.set_float32_matmul_precision("high")
    size = {"vocab_size": V if work.device == "cpu" else 50304, "block_size": work.T}
    model = GPT(GPTConfig(**size, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True)).to(work.device)
    optimizer = model.configure_optimizers(DECAY, LR, (0.9, 0.95), work.device)
    forward = torch.compile(model) if compiled else model
    return plain_step(work, model, lambda tokens, targets: forward(tokens, targets)[1], optimizer, dtype)


def transformers(work: Work, dtype: str, *, compiled: bool = False) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_positions=work.T, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    model = model.to(work.device).train()
    forward = torch.compile(model) if compiled else model
    return plain_step(work, model, lambda ids, _: forward(input_ids=ids, labels=ids).loss, adamw(model), dtype)


def litgpt(work: Work, dtype: str) -> Step:
    from litgpt import GPT, Config

    model = GPT(Config.from_name("pythia-160m", block_size=work.T, padded_vocab_size=V)).to(work.device)
    return whole_logits(model, work, dtype)


def chapter(work: Work, dtype: str) -> Step:
    from llms_from_scratch.ch04 import GPTModel

    shape = {"vocab_size": V, "context_length": work.T, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
    return whole_logits(GPTModel({**shape, "drop_rate": 0.0, "qkv_bias": False}).to(work.device), work, dtype)


def whole_logits(model: torch.nn.Module, work: Work, dtype: str) -> Step:
    loss = lambda ids, targets: F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())  # noqa: E731
    return plain_step(work, model, loss, adamw(model), dtype)


def contenders(work: Work, checkout: Path | None) -> dict[str, Callable[[], Step]]:
    found: dict[str, Callable[[], Step]] = {
        "firstwords, bfloat16": lambda: firstwords(work, "bfloat16", tied=True, compiled=False),
        "firstwords, bfloat16, untied head": lambda: firstwords(work, "bfloat16", tied=False, compiled=False),
        "firstwords, bfloat16, compiled": lambda: firstwords(work, "bfloat16", tied=True, compiled=True),
        "firstwords, float32": lambda: firstwords(work, "float32", tied=True, compiled=False),
        "transformers GPT2LMHeadModel, bfloat16": lambda: transformers(work, "bfloat16"),
        "transformers GPT2LMHeadModel, bfloat16, compiled": lambda: transformers(work, "bfloat16", compiled=True),
        "transformers GPT2LMHeadModel, float32": lambda: transformers(work, "float32"),
        "litgpt pythia-160m shape, bfloat16": lambda: litgpt(work, "bfloat16"),
        "litgpt pythia-160m shape, float32": lambda: litgpt(work, "float32"),
        "the chapter's package, bfloat16": lambda: chapter(work, "bfloat16"),
        "the chapter's package, float32": lambda: chapter(work, "float32"),
    }
    if checkout is not None:
        for dtype in ("bfloat16", "float32"):
            for compiled in (True, False):
                name = f"nanoGPT, {dtype}" + (", compiled" if compiled else "")
                given = {"dtype": dtype, "compiled": compiled, "checkout": checkout}
                found[name] = functools.partial(nanogpt, work, **given)
    return found


def run(work: Work, name: str, checkout: Path | None, steps: int) -> dict[str, float]:
    """Return the median seconds of a step and the peak memory of this process, or of its GPU; it does nothing else."""
    torch.manual_seed(1)
    if name == MACHINE:
        from firstwords.planning.machine import DTYPES
        from firstwords.planning.measure import matmul_flops_per_s

        return {name: matmul_flops_per_s(dtype, torch.device(work.device)) for name, dtype in DTYPES.items()}
    step = contenders(work, checkout)[name]()
    times_s = []
    for _ in range(steps + 1):
        started_s = time.perf_counter()
        step()
        work.wait()
        times_s.append(time.perf_counter() - started_s)
    on_cpu = work.device == "cpu"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_allocated()
    return {"step_s": statistics.median(times_s[1:]), "peak_bytes": peak}


MACHINE = "the device's matrix products"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=3, help="in each round, after one that is not counted")
    options.add_argument("--device", choices=DEVICES, default="cpu")
    options.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    options.add_argument("--only", nargs="*", help="contenders whose names contain one of these")
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options.add_argument("--run", help=argparse.SUPPRESS)
    given = options.parse_args()
    work = Work.on(given.device)
    if given.run:
        measured(run(work, given.run, given.nanogpt, given.steps))
        return

    from firstwords.config import run_config
    from firstwords.model import cost
    from record import interleaved, kind

    names = [n for n in contenders(work, given.nanogpt) if not given.only or any(part in n for part in given.only)]
    found = interleaved([MACHINE, *names], given.rounds, __file__, sys.argv[1:])
    model = dataclasses.replace(run_config({"preset": "gpt2-124m"}).model, context_length=work.T)
    rate, precision = max((rate, name) for name, rate in found.pop(MACHINE).items())
    limit = rate / cost.training_flops(model)
    rows = [[f"the device's {precision} products", f"{limit:,.0f}", "100 %", "", f"{rate / 1e9:,.0f} GFLOP/s"]]
    ours = next(iter(found.values()))["step_s"]
    for name, figures in found.items():
        tokens_per_s = work.B * work.T / figures["step_s"]
        ratio = f"{figures['step_s'] / ours:.2f}"
        memory = f"{figures['peak_bytes'] / 1e9:.1f} GB"
        rows.append([name, f"{tokens_per_s:,.0f}", f"{tokens_per_s / limit:.0%}", ratio, memory])
    which, where = kind(precision) if work.device == "cpu" else ("gpu", f"on one {torch.cuda.get_device_name()}")
    report(
        f"throughput-{which}",
        f"A training step of GPT-2 124M, context {work.T}, batch {work.B}, {where}",
        ["", "tokens/s", "of the limit", "times as long as ours", "peak memory"],
        rows,
        write=given.write,
    )


if __name__ == "__main__":
    main()
