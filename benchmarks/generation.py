"""How fast GPT-2 124M speaks, one token after another for one prompt: firstwords beside transformers, both with a cache.

    python benchmarks/generation.py [--rounds 3] [--tokens 200] [--write]

Random weights, the likeliest token each time. What a command line does is counted: for us, bringing the weights into low
precision too. Every contender runs in a process of its own, one after another; the median over all rounds counts. The limit
is how often this machine can read weights of that size. Each kind of processor has a table; see `record.kind`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

from record import interleaved, kind, measured, report

PROMPT = "Every effort moves you"
Speak = Callable[[int], object]
READING = "the machine's memory"


def firstwords(dtype: torch.dtype) -> Speak:
    from firstwords.config import run_config
    from firstwords.model.gpt import GPTModel
    from firstwords.model.language_model import LanguageModel
    from firstwords.model.sampling import Sampling
    from firstwords.text.tokenizer import gpt2

    lm = LanguageModel(GPTModel(run_config({"preset": "gpt2-124m"}).model), gpt2(), dtype=dtype)
    return lambda tokens: lm.generate(PROMPT, max_new_tokens=tokens, sampling=Sampling(temperature=0))


def transformers(dtype: torch.dtype) -> Speak:
    from transformers import GPT2Config, GPT2LMHeadModel

    from firstwords.text.tokenizer import gpt2

    model = GPT2LMHeadModel(GPT2Config()).to(dtype).eval()
    ids = torch.tensor([gpt2().encode(PROMPT)])
    end = model.config.eos_token_id
    return lambda tokens: model.generate(
        ids,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=end,
        attention_mask=torch.ones_like(ids),
    )


CONTENDERS: dict[str, Callable[[], Speak]] = {
    "firstwords, bfloat16": lambda: firstwords(torch.bfloat16),
    "firstwords, float32": lambda: firstwords(torch.float32),
    "transformers, bfloat16": lambda: transformers(torch.bfloat16),
    "transformers, float32": lambda: transformers(torch.float32),
}


def run(name: str, tokens: int) -> dict[str, float]:
    """Return the seconds that so many tokens take, after a few that are not counted."""
    torch.manual_seed(1)
    if name == READING:
        from firstwords.planning.measure import reading_rate

        return {"bytes_per_s": reading_rate()}
    speak = CONTENDERS[name]()
    speak(4)
    started_s = time.perf_counter()
    speak(tokens)
    return {"took_s": time.perf_counter() - started_s}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--tokens", type=int, default=200)
    options.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options.add_argument("--run", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.run:
        measured(run(given.run, given.tokens))
        return

    from firstwords.config import run_config
    from firstwords.model import cost

    found = interleaved([READING, *CONTENDERS], given.rounds, __file__, sys.argv[1:])
    weights = 2 * cost.parameters(run_config({"preset": "gpt2-124m"}).model)  # bytes in bfloat16
    rate = found.pop(READING)["bytes_per_s"]
    rows = [["the limit: reading the weights in bfloat16", f"{rate / weights:.0f}", f"{rate / 1e9:.0f} GB/s", ""]]
    ours = next(iter(found.values()))["took_s"]
    for name, figures in found.items():
        rows.append([name, f"{given.tokens / figures['took_s']:.0f}", "", f"{figures['took_s'] / ours:.2f}"])
    head = ["", "tokens/s", "", "times as long as ours"]

    which, where = kind()
    report(f"generation-{which}", f"GPT-2 124M speaks {given.tokens} tokens, {where}", head, rows, write=given.write)


if __name__ == "__main__":
    main()
