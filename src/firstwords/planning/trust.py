"""Does this device compute what it should? A part of the first batch, held against float32 on the CPU before step 1.

A device can be wrong without a word: a kernel that loses accuracy, a compiler that reorders too much. The loss then still
falls, and the model is worse than it should be.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from firstwords.config import Compile, Precision
from firstwords.errors import Notify
from firstwords.model.gpt import Dropout, GPTModel
from firstwords.model.loss import target_nats
from firstwords.planning import machine
from firstwords.text.batches import IGNORE, Batch
from firstwords.training.loop import forward_of
from firstwords.training.state import TrainState

ROWS, TOKENS = 2, 64  # of the batch; with fewer tokens products are formed in another way than in training
# How far the gradient of one kind of weights may be from float32's, in norms. bfloat16 itself was 0.3 to 2.4 % away in every
# preset up to 124M, new and trained; with products of 4 bits it was 4 to 12 %, of 2 bits 19 to 42 %. TF32 has 8 times
# bfloat16's accuracy.
LIMITS = {"bfloat16": 0.06, "float32": 0.01}
LOSS_LIMIT = 0.01  # of the loss; bfloat16 moved it by 0.0015 at most
LEAST_SHARE = (
    0.03  # of the whole gradient's norm: kinds with less are rounding, such as the queries of a context of one token
)
REFERENCE = "float32 on the CPU"


@dataclass(frozen=True)
class Way:
    """How the numbers of a run are computed."""

    device: str
    precision: Precision
    compile: Compile

    @property
    def on_cpu(self) -> bool:
        """Whether it is computed on the CPU."""
        return torch.device(self.device).type == "cpu"

    def __str__(self) -> str:
        return f"{self.device} in {self.precision}" + (", compiled" if self.compile == "on" else "")


@dataclass(frozen=True)
class Check:
    """What a way of computing gave, beside what float32 on the CPU gives."""

    way: Way
    loss_difference: float  # as a share of the loss
    gradient_difference: float  # |g - reference| / |reference|, for the kind of weights where it is largest
    kind: str  # of weights
    took_s: float
    failed: str = ""  # why there is nothing to compare

    @property
    def problem(self) -> str:
        """What is wrong, for a person; empty where nothing is."""
        if self.failed:
            return f"{self.way}: cannot do a training step ({self.failed})"
        if not self.gradient_difference <= LIMITS[self.way.precision]:  # NaN is no less
            return f"{self.way}: gradients differ by {100 * self.gradient_difference:.0f} % from {REFERENCE}"
        if not self.loss_difference <= LOSS_LIMIT:
            return f"{self.way}: the loss differs by {100 * self.loss_difference:.0f} % from {REFERENCE}"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """Return the check as the journal has it."""
        figures = {**asdict(self.way), **asdict(self), "ok": not self.problem}
        del figures["way"]
        return figures


def first_trusted_state(
    start: Callable[[Way], TrainState],
    batch: Batch,
    way: Way,
    cpu_precision: Callable[[], Precision],
    *,
    insist: bool,
    notice: Notify,
) -> tuple[Way, TrainState, list[Check]]:
    """Return how a run is computed, its state at step 0 there, and what was checked.

    A way that fails is left for a safer one: not compiled, then the CPU, then float32.

    Args:
        start: Returns the run at step 0 for a way of computing.
        batch: The first micro-batch.
        way: That is wanted.
        cpu_precision: Asked only where another device fails.
        insist: Take a way that computes something else all the same; one that cannot compute at all is still left.
        notice: Told of a way that fails.
    """
    checks: list[Check] = []
    while True:
        state = start(way)
        found = check(state.model, batch, way)
        if found is None:
            return way, state, checks
        checks.append(found)
        if not found.problem:
            return way, state, checks
        if insist and not found.failed:
            notice(f"{found.problem}; --trust-device insists on it")
            return way, state, checks
        way = _safer(way, cpu_precision)
        notice(f"{found.problem}; training on {way} instead" + ("" if found.failed else ", --trust-device true to insist"))


def _safer(way: Way, cpu_precision: Callable[[], Precision]) -> Way:
    if way.compile == "on":
        return replace(way, compile="off")
    return Way("cpu", "float32" if way.on_cpu else cpu_precision(), "off")


def check(model: GPTModel, batch: Batch, way: Way) -> Check | None:
    """Return how far loss and gradients of a part of `batch` are from those of float32 on the CPU.

    The norm of the difference bounds the angle too: a share d of the reference means a cosine of at least sqrt(1 - d²).
    Weights, their gradients and random generators stay as they are; dropout is off.

    Args:
        model: On the device of `way`.
        batch: A micro-batch; a compiled model computes all of it, because it is compiled for its shape.
        way: How the numbers would be computed.

    Returns:
        None where `way` is the reference itself, or where the reference is not finite and tells nothing.
    """
    if way == Way(way.device, "float32", "off") and way.on_cpu:
        return None
    started_s = time.perf_counter()
    part, compiled = _part(batch), way.compile == "on"
    reference = model if way.on_cpu else copy.deepcopy(model).to("cpu")
    loss, gradients = _gradients(reference, *part, torch.float32)
    if not math.isfinite(loss):
        return None
    judged = _alone(batch, part[1]) if compiled else part
    try:
        found_loss, found = _gradients(model, *judged, machine.DTYPES[way.precision], compiled=compiled)
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
        return Check(way, math.inf, math.inf, "", time.perf_counter() - started_s, failed=reason)
    kind, difference = _largest_difference(gradients, found)
    return Check(way, abs(found_loss - loss) / loss, difference, kind, time.perf_counter() - started_s)


def _part(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the beginnings of the first sequences, with at least `TOKENS` tokens where the batch has them."""
    rows, length = batch.tokens.shape
    rows = min(rows, max(ROWS, -(-TOKENS // length)))
    part = slice(rows), slice(-(-TOKENS // rows))
    return batch.tokens[part], batch.targets[part]


def _alone(batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the whole batch, of which only the targets (B', T') of its beginning count: no token sees those after it."""
    alone = torch.full_like(batch.targets, IGNORE)
    alone[: targets.shape[0], : targets.shape[1]] = targets
    return batch.tokens, alone


def _gradients(
    model: GPTModel, tokens: Tensor, targets: Tensor, dtype: torch.dtype, *, compiled: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Return the nats per token and the gradient of every weight, both on the CPU, as a training step forms them."""
    parameters, device = dict(model.named_parameters()), model.tok_emb.weight.device
    counted = int((targets != IGNORE).sum())
    with _without_dropout(model), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        features = forward_of(model, compiled=compiled)(tokens.to(device))
        nats = target_nats(features, model.out_head.weight, targets.to(device), compiled=compiled)
    gradients = torch.autograd.grad(nats / max(1, counted), list(parameters.values()))
    return float(nats.detach()) / max(1, counted), {name: g.to("cpu") for name, g in zip(parameters, gradients, strict=True)}


@contextmanager
def _without_dropout(model: GPTModel) -> Iterator[None]:
    """Train inside as if every dropout were 0, so that no random number is drawn."""
    training = model.training
    rates = [(module, module.p) for module in model.modules() if isinstance(module, Dropout)]
    model.train()
    for module, _ in rates:
        module.p = 0.0
    try:
        yield
    finally:
        for module, rate in rates:
            module.p = rate
        model.train(training)


def _largest_difference(reference: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[str, float]:
    """Return the kind of weights whose gradients differ most, and by how much; NaN counts as most."""
    apart: dict[str, float] = defaultdict(float)
    squares: dict[str, float] = defaultdict(float)
    for name, gradient in reference.items():
        kind = _kind(name)
        apart[kind] += float(torch.dist(gradient, found[name].to(gradient.dtype))) ** 2
        squares[kind] += float(torch.linalg.vector_norm(gradient)) ** 2
    least = max(LEAST_SHARE**2 * sum(squares.values()), 1e-30)
    differences = {kind: math.sqrt(apart[kind] / max(squares[kind], least)) for kind in squares}
    return max(differences.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])


def _kind(name: str) -> str:
    """Return which kind of weights a parameter belongs to: few enough that one small tensor's rounding does not decide."""
    for part, kind in (("norm", "norms"), ("bias", "biases"), ("emb", "embeddings"), ("out_head", "head")):
        if part in name:
            return kind
    if ".att." in name:
        return "queries and keys" if "W_query" in name or "W_key" in name else "values and outputs"
    return "feed-forward"
