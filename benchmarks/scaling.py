"""What a training step costs as the batch, the context, the model and the vocabulary grow, one at a time.

    python benchmarks/scaling.py [--rounds 3] [--steps 3] [--write]

Every configuration runs in a process of its own, one after another, round after round; the median over all rounds counts.
The share is of the limit: the operations that a step needs (Chowdhery et al. 2022) at the rate of this machine's products.
"""

from __future__ import annotations

import argparse
import resource
import sys
from typing import Any

from record import interleaved, measured, report

MACHINE = "the machine's matrix products"
BASE: dict[str, Any] = {"preset": "laptop", "model.vocab_size": 2048, "rows": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "2 blocks of 128": {"model.emb_dim": 128, "model.n_heads": 2, "model.ff_dim": 352, "model.n_layers": 2},
    "6 blocks of 384": {"model.emb_dim": 384, "model.n_heads": 6, "model.ff_dim": 1024, "model.n_layers": 6},
    "8 blocks of 512": {"model.emb_dim": 512, "model.n_heads": 8, "model.ff_dim": 1408, "model.n_layers": 8},
}
CASES: dict[str, dict[str, Any]] = {
    "the recipe: 4 blocks of 192, context 256, batch 16, 2,048 ids": {},
    **{f"batch {rows}": {"rows": rows} for rows in (2, 4, 8, 32, 64)},
    **{f"context {T}, batch {4096 // T}": {"model.context_length": T, "rows": 4096 // T} for T in (64, 128, 512, 1024)},
    **SHAPES,
    **{f"{size:,} ids": {"model.vocab_size": size} for size in (512, 8192, 50257)},
    "dropout 0.1": {"model.drop_rate": 0.1},
}


def run(name: str, steps: int) -> dict[str, float]:
    """Return what one case costs, in this process."""
    import torch

    from firstwords.config import run_config
    from firstwords.model import cost
    from firstwords.planning import machine, matmul, measure, process

    precision = matmul.precision("auto", torch.device("cpu"))
    if name == MACHINE:
        return {"rate": measure.matmul_flops_per_s(machine.DTYPES[precision])}
    case = {**BASE, "device": "cpu", "precision": precision, **CASES[name]}
    rows = case.pop("rows")
    config = run_config(case)
    with process.threads(None):
        step_s = measure.step_s(config, rows, steps)
    tokens = rows * config.model.context_length
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"step_s": step_s, "tokens": tokens, "flops": tokens * cost.training_flops(config.model), "peak": peak}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options.add_argument("--run", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.run:
        measured(run(given.run, given.steps))
        return
    found = interleaved([MACHINE, *CASES], given.rounds, __file__, sys.argv[1:])
    rate, rows = found.pop(MACHINE)["rate"], []
    for name, figures in found.items():
        share = figures["flops"] / rate / figures["step_s"]
        speed = f"{figures['tokens'] / figures['step_s']:,.0f}"
        rows.append([name, f"{figures['step_s'] * 1e3:.0f} ms", speed, f"{share:.0%}", f"{figures['peak'] / 1e9:.2f} GB"])
    title = "What a training step costs as one thing grows"
    report("scaling", title, ["", "a step", "tokens/s", "of the limit", "peak memory"], rows, write=given.write)


if __name__ == "__main__":
    main()
