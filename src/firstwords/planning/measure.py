"""How fast this machine is, and how fast firstwords is on it: measured on the real thing, as rates.

The limits are what the machine does at best: its matrix products while learning, its memory while speaking.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from firstwords import store
from firstwords.config import Precision, RunConfig, run_config
from firstwords.errors import ConfigError
from firstwords.model import cost
from firstwords.model.generate import generate, in_precision
from firstwords.model.gpt import GPTModel
from firstwords.model.sampling import Sampling
from firstwords.planning import known, machine, matmul, process, recipe
from firstwords.planning import speed as speeds
from firstwords.planning.known import Compiling
from firstwords.planning.speed import UPDATE_TOKENS, Point, Speed
from firstwords.text import corpus, sources
from firstwords.text.batches import Batch
from firstwords.text.tokenizer import gpt2
from firstwords.training import loop, state

CPU = torch.device("cpu")
ROWS, CONTEXT = 8, 256  # of the batches that are learnt from
BPE_WORDS = 2048  # in a tokenizer that is trained on the text
MEASURED = (  # with so many words
    ("laptop-tiny", 2048),
    ("laptop-mini", 2048),
    ("laptop-small", 2048),
    ("laptop", 2048),
    ("laptop", 8192),
    ("laptop-large", 2048),
)
MEASURED_STEPS, MEASURED_S = 3, 1.2  # of each; fewer where so many seconds are over
PACE_STEPS = 5  # by which a time budget learns how fast the machine is now, at most
STEPS, SPOKEN, PREPARED_BYTES = 5, 64, 32 << 20  # how much work a mark is measured on
WARM_SPOKEN = 2  # tokens that are not counted: they make room
SIDES = (1024, 2048, 4096)  # of square matrices; which is fastest depends on the machine
PRODUCT_S = 1.0  # is long for one of them: of larger ones, nothing is learnt that is worth the time
READ_BYTES, READ_AGAIN_BYTES = 1 << 30, 4 << 30  # at once, and in all where that is more often than a few times
WARM_STEPS = 1  # allocate memory, and are not counted
GPU_WARM_STEPS, GPU_WARM_S = 3, 3.0  # load kernels too, which takes a second; no further one begins after so many
GPU_SIDES, GPU_PRODUCTS = (4096, 8192), 10  # so many products are asked for at once: asking takes as long as a small one
BUSY_TOKENS = 16384  # a GPU is hardly done sooner with fewer


@dataclass(frozen=True)
class BenchResult:
    """One thing that this machine did, how fast, and how fast it could be."""

    what: str
    rate: float
    unit: str
    limit: float | None = None  # in the same unit

    def as_dict(self) -> dict[str, Any]:
        """Return the mark as JSON has it; `share` is of the limit."""
        return {**asdict(self), "share": None if self.limit is None else self.rate / self.limit}


def bench_config(preset: str, precision: Precision) -> RunConfig:
    """Return the configuration that a preset is measured with: its shape, with a short context and a small batch."""
    config = run_config({"preset": preset})
    vocab_size = BPE_WORDS if config.tokenizer == "bpe" else gpt2().vocab_size
    shape = {"model.vocab_size": vocab_size, "model.context_length": min(CONTEXT, config.model.context_length)}
    return run_config({"preset": preset, "precision": precision, "device": str(machine.device("auto")), **shape})


def learning_speed(device: torch.device, precision: Precision) -> Speed:
    """Return how fast a device learns, from whole training steps of some sizes: ten seconds at most, about."""
    guess = speeds.guessed(matmul.flops_per_s(device, machine.DTYPES[precision]))
    return Speed(tuple(_point(preset, n_words, device, precision, guess) for preset, n_words in MEASURED))


def point_now(config: RunConfig, before: Speed, most_s: float) -> Point | None:
    """Return how fast this machine learns at this moment, from some steps of what is to be trained.

    What others do on a machine changes from one hour to the next: a laptop in its case, a rented part of a server.

    Args:
        config: Settled as far as device, shape, optimizer, precision and batch go.
        before: What was measured or guessed before: how many sequences a step may have.
        most_s: The seconds that this may take, about; None is returned where one sequence takes too long.
    """
    T, limit = config.model.context_length, config.batch_size or ROWS
    if machine.device(config.device).type == "cuda":
        limit = config.micro_batch_size or _gpu_rows(config, limit)
    else:
        limit = config.micro_batch_size or cost.micro_batch_size(config.model, limit)
    rows = _rows(before.of_run(config), T, most_s, limit)
    if not rows:
        return None
    rows, took_s = _fitting_step_s(config, rows, PACE_STEPS, most_s)
    return speeds.point(config, rows, took_s)


def _fitting_step_s(config: RunConfig, rows: int, steps: int, most_s: float) -> tuple[int, float]:
    """Return with how many sequences a step was measured, fewer where a device's memory runs out, and its `step_s`."""
    while True:
        with suppress(loop.TooLargeError):  # which holds on to the step's memory until it is gone
            return rows, step_s(config, rows, steps, most_s)
        rows //= 2


def _gpu_rows(config: RunConfig, batch_size: int) -> int:
    """Return from how many sequences of a batch a GPU learns at once."""
    room_bytes = machine.gpu_bytes(machine.device(config.device))
    return cost.micro_batch_size(config.model, batch_size, room_bytes, config.precision)


def _point(preset: str, n_words: int, device: torch.device, precision: Precision, guess: Speed) -> Point:
    named = {"preset": preset, "model.vocab_size": n_words, "precision": precision, "device": str(device)}
    config = run_config(named)
    model = config.model
    most = UPDATE_TOKENS // model.context_length
    if device.type != "cpu":
        most = _gpu_rows(config, recipe.BATCH_TOKENS // model.context_length)
    rows = max(1, _rows(guess.of_run(config), model.context_length, MEASURED_S, most))
    rows, took_s = _fitting_step_s(config, rows, MEASURED_STEPS, MEASURED_S)
    return speeds.point(config, rows, took_s)


def _rows(tokens_per_s: float, context_length: int, most_s: float, limit: int) -> int:
    """Return of how many sequences a step can be, one to warm up with and one more within `most_s`; 0: of none."""
    row_s = context_length / tokens_per_s
    return min(limit, max(int(most_s / (WARM_STEPS + 1) / row_s), int(row_s < most_s)))


def marks(presets: Sequence[str], cache: Path) -> Iterator[BenchResult]:
    """Yield where firstwords stands on this machine: its limits, then what is done with a model of each preset.

    Learning is bounded by the matrix products that it must do, speaking by reading every weight once for each token. A GPU
    learns; the CPU speaks, as after `firstwords.load`.
    """
    device = machine.device("auto")
    precision = matmul.precision("auto", device, cache)  # as a run has it
    configs = {name: bench_config(name, precision) for name in presets}
    rates = {name: matmul_flops_per_s(dtype, device) for name, dtype in machine.DTYPES.items()}
    for name, rate in rates.items():
        yield BenchResult(f"matrix products, {name}", rate / 1e9, "GFLOP/s")
    yield BenchResult("reading memory", reading_rate() / 1e9, "GB/s")
    for name, config in configs.items():
        model, rows = config.model, _bench_rows(config)
        limit = rates[config.precision] / cost.training_flops(model)
        rate = rows * model.context_length / step_s(config, rows, STEPS)
        yield BenchResult(f"learning, {name}", rate, "tokens/s", limit)
        weight_bytes = cost.read_parameters(model) * machine.DTYPES[config.precision].itemsize
        limit = reading_rate(weight_bytes) / weight_bytes
        yield BenchResult(f"speaking, {name}", speaking_rate(config, SPOKEN), "tokens/s", limit)
    yield BenchResult("a text becomes GPT-2's tokens", preparing_rate(PREPARED_BYTES) / 1e6, "MB/s")


def compiled_marks(presets: Sequence[str], cache: Path) -> Iterator[BenchResult]:
    """Yield what compiling a model of each preset takes, how fast it learns as it is, and how fast compiled.

    It is kept for runs of the same shape, which `--compile auto` then compiles where they are long enough.

    Raises:
        ConfigError: It cannot be compiled here.
    """
    device = machine.device("auto")
    key, precision = machine.key(device), matmul.precision("auto", device, cache)
    for name in presets:
        context_length, config = run_config({"preset": name}).model.context_length, bench_config(name, precision)
        config = replace(config, model=replace(config.model, context_length=context_length))
        rows = _bench_rows(config)
        tokens = rows * config.model.context_length
        plain, compiled = training_step(config, rows), training_step(config, rows, compiled=True)
        plain()
        plain_s = seconds(plain, STEPS)
        try:
            first_s = seconds(compiled, 1)
        except RuntimeError as error:
            raise ConfigError("cannot be compiled", where=name, why=str(error).strip().partition("\n")[0]) from error
        compiled_s = seconds(compiled, STEPS)
        found = Compiling(max(0.0, first_s - compiled_s), (plain_s - compiled_s) / tokens)
        before = known.read(cache, key)
        shape = known.shape_of(config.model, config.precision)
        known.write(cache, key, replace(before, compiling={**before.compiling, shape: found}))
        yield BenchResult(f"compiling, {name}", found.takes_s, "s")
        yield BenchResult(f"learning, {name}", tokens / plain_s, "tokens/s")
        yield BenchResult(f"learning, {name}, compiled", tokens / compiled_s, "tokens/s")


def _bench_rows(config: RunConfig) -> int:
    """Return how many sequences a model is measured with: `ROWS` of `CONTEXT`, in tokens, or what keeps a GPU busy."""
    device, T = torch.device(config.device), config.model.context_length
    if device.type == "cpu":
        return max(1, ROWS * CONTEXT // T)
    return _gpu_rows(config, max(1, BUSY_TOKENS // T))


def seconds(work: Callable[[], object], times: int, most_s: float = math.inf) -> float:
    """Return the median seconds of so many calls, or of fewer where they have taken `most_s` by then."""
    took_s: list[float] = []
    while len(took_s) < times and (not took_s or sum(took_s) < most_s):
        started_s = time.perf_counter()
        work()
        took_s.append(time.perf_counter() - started_s)
    return statistics.median(took_s)


def matmul_flops_per_s(dtype: torch.dtype, device: torch.device = CPU) -> float:
    """Return the operations a second of square matrix products, of the size that is fastest.

    A CPU without instructions for `dtype` is a hundred times slower: one product of the smallest size says that.
    """
    if device.type != "cpu":
        return max(_gpu_matmul_flops_per_s(dtype, device, side) for side in GPU_SIDES)
    rates = []
    for side in SIDES:
        a = torch.randn(side, side).to(dtype)
        product_s = seconds(lambda: a @ a, 1)  # noqa: B023
        if product_s < PRODUCT_S:
            product_s = min(product_s, seconds(lambda: a @ a, max(3, 20 * SIDES[0] ** 3 // side**3)))  # noqa: B023
        rates.append(2 * side**3 / product_s)
        if product_s >= PRODUCT_S:
            break
    return max(rates)


def _gpu_matmul_flops_per_s(dtype: torch.dtype, device: torch.device, side: int) -> float:
    a = torch.randn(side, side).to(device, dtype)

    def some() -> None:
        for _ in range(GPU_PRODUCTS):
            b = a @ a
        float(b[0, 0])  # waits for all of them

    some()
    return GPU_PRODUCTS * 2 * side**3 / seconds(some, STEPS)


def reading_rate(n_bytes: int = READ_BYTES) -> float:
    """Return the bytes a second at which all threads together read so many bytes again and again, at their best.

    A small model's weights stay in the CPU's cache, which is read faster than memory.
    """
    n_bytes = min(n_bytes, READ_BYTES)
    numbers = torch.ones(n_bytes // 4)
    return n_bytes / min(seconds(numbers.sum, 1) for _ in range(max(5, READ_AGAIN_BYTES // n_bytes)))


def step_s(config: RunConfig, rows: int, steps: int, most_s: float = math.inf) -> float:
    """Return the median seconds of whole training steps, on random ids.

    Args:
        config: Settled as far as device, shape, optimizer and precision go.
        rows: Sequences of a batch.
        steps: So many are measured, after one that is not counted, or some on a GPU.
        most_s: No step begins after so many seconds; where the first one took longer, it counts. Those of a GPU that are
            not counted have seconds of their own.
    """
    step = training_step(config, rows)
    if machine.device(config.device).type != "cpu":
        seconds(step, GPU_WARM_STEPS, GPU_WARM_S)
        return seconds(step, steps, most_s)
    with process.memory_kept():
        warm_s = WARM_STEPS * seconds(step, WARM_STEPS)
        return warm_s / WARM_STEPS if warm_s > most_s else seconds(step, steps, most_s - warm_s)


def training_step(
    config: RunConfig, rows: int, *, compiled: bool = False, micro_batch_size: int | None = None
) -> Callable[[], tuple[float, float]]:
    """Return what does one training step of a new model, on the same random ids, each time it is called.

    Args:
        config: As for `step_s`.
        rows: As for `step_s`.
        compiled: Compile it, the first time.
        micro_batch_size: Learn from so many sequences at once; by default from all.
    """
    model, dtype, shape = config.model, machine.DTYPES[config.precision], (rows, config.model.context_length)
    learned = state.new_state(model, config.optim, config.seed, str(machine.device(config.device)), dtype)
    ids = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(config.seed))
    batch = Batch(ids, ids.roll(-1, 1), ids.numel())
    fit = loop.FitConfig(config.optim, config.seed, micro_batch_size or rows, None, None, dtype, compiled)
    forward = loop.forward_of(learned.model, compiled=compiled)
    return lambda: loop.train_step(learned, batch, fit, config.optim.peak_lr, forward)


def speaking_rate(config: RunConfig, tokens: int) -> float:
    """Return the tokens a second of one text from a new model, the likeliest token each time; none of them ends the text."""
    model = in_precision(GPTModel(config.model).eval(), machine.DTYPES[config.precision], several=False)
    said = generate(model, [0], Sampling(temperature=0), torch.Generator())
    list(islice(said, WARM_SPOKEN))
    return tokens / seconds(lambda: list(islice(said, tokens)), 1)


def preparing_rate(n_bytes: int) -> float:
    """Return the bytes a second at which the built-in text, repeated, becomes GPT-2's tokens."""
    gpt2()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        once = "".join(piece for document in sources.read([]) for piece in document.pieces()).encode()
        store.write(text, once * max(1, n_bytes // len(once)))
        prepare = lambda: corpus.prepare(sources.read([str(text)]), "gpt2", cache=Path(folder) / "cache")  # noqa: E731
        return text.stat().st_size / seconds(prepare, 1)
