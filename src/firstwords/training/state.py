"""All that a run must save to go on bit for bit, in one registry.

What is a function of (seed, step) is not state: the batch, the learning rate, dropout's random numbers, the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from firstwords.config import ModelConfig, OptimConfig
from firstwords.errors import DataError
from firstwords.model.gpt import GPTModel, load_weights
from firstwords.model.neighbours import mix_into_embedding
from firstwords.text.batches import Batch
from firstwords.training.optim import Optimizer, optimizers

# The registry: every scalar of TrainState that is saved, and its kind. The tensors are the model's and the optimizers'.
SCALARS = {
    "step": int,
    "tokens": int,
    "elapsed_s": int | float,
    "total_steps": int | None,
    "eval_every": int | None,
    "best_step": int | None,
    "best_nats": int | float | None,
    "skipped": list,
}


@dataclass
class TrainState:
    """A run at one moment."""

    model: GPTModel
    optimizers: tuple[Optimizer, ...]
    step: int = 0  # updates done
    tokens: int = 0  # targets learnt from
    elapsed_s: float = 0.0  # of training in all, over every resume
    total_steps: int | None = None  # None until a time budget has become steps
    eval_every: int | None = None
    best_step: int | None = None
    best_nats: float | None = None  # held-out nats per token at best_step
    skipped: list[list[int]] = field(default_factory=list)  # [first, last] batches that roll-backs left out, in order


def new_state(
    model_config: ModelConfig,
    optim_config: OptimConfig,
    seed: int,
    device: str,
    dtype: torch.dtype,
    start: Mapping[str, Tensor] | None = None,
    directions: Tensor | None = None,
) -> TrainState:
    """Return a run at step 0: weights drawn from `seed`, the process's generator left as it was.

    Args:
        model_config: The shape.
        optim_config: The optimizers.
        seed: Of the weights.
        device: Where the model lives; the weights are drawn on the CPU.
        dtype: Of Muon's matrix products.
        start: Weights to begin with instead.
        directions: That the table of tokens begins with, (V, C), where nothing is to begin with; see `model.neighbours`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTModel(model_config)
    if directions is not None:
        mix_into_embedding(model, directions)
    model.to(device)
    if start is not None:
        load_weights(model, start.items(), "the weights to begin with")
    return TrainState(model, optimizers(model, optim_config, dtype))


def batch_index(step: int, skipped: list[list[int]]) -> int:
    """Return which batch the update after `step` updates takes: the step itself, where none was left out."""
    index = step
    for first, last in skipped:
        if index >= first:
            index += last - first + 1
    return index


def without_skipped(batches: Callable[[int], Batch], state: TrainState) -> Callable[[int], Batch]:
    """Return the batch of each step as `state` has it at the time of the call, without those that were left out."""
    return lambda step: batches(batch_index(step, state.skipped))


@torch.no_grad()
def all_finite(state: TrainState) -> Tensor:
    """Whether every weight and every number of the optimizers is finite: a truth on the model's device.

    Reads each once, which takes about a hundredth of a step, and a tenth of one of few tokens: by its sum, or on CUDA by the
    largest, which it finds in few calls.
    """
    tensors = [
        tensor
        for optimizer in state.optimizers
        for parameter in optimizer.parameters
        for tensor in (parameter, *optimizer.state.get(parameter, {}).values())
    ]
    if tensors[0].device.type == "cuda":
        return torch.nn.utils.get_total_norm(tensors, math.inf).isfinite()
    return torch.stack([tensor.sum().float() for tensor in tensors]).isfinite().all()


def optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return the optimizers' tensors as `parameter/kind`: `tok_emb.weight/exp_avg`."""
    return {
        f"{name}/{key}": value
        for name, parameter, optimizer in _owners(state)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizers back what `optimizer_tensors` returned, and nothing else.

    Raises:
        DataError: A tensor of no parameter, or of another shape than its parameter.
    """
    for optimizer in state.optimizers:
        optimizer.state.clear()
    by_name = {name: (parameter, optimizer) for name, parameter, optimizer in _owners(state)}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        if name not in by_name or value.shape not in (by_name[name][0].shape, torch.Size()):
            raise DataError(f"tensor {key[:80]!r} belongs to no parameter", where="optimizer.safetensors")
        parameter, optimizer = by_name[name]
        # A copy: a file that is still in use could not be removed everywhere.
        optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)


def scalars(state: TrainState) -> dict[str, Any]:
    """Return the registered scalars."""
    return {name: getattr(state, name) for name in SCALARS}


def load_scalars(state: TrainState, values: Mapping[str, Any]) -> None:
    """Set the registered scalars.

    Raises:
        DataError: One is missing or of another kind.
    """
    for name, kind in SCALARS.items():
        if name not in values:
            raise DataError(f"the saved state has no {name!r}", where="state.json")
        if not isinstance(values[name], kind) or (kind is list and not all(map(_is_range, values[name]))):
            raise DataError(f"the saved {name!r} is none", where="state.json", why=f"it is {str(values[name])[:80]!r}")
        setattr(state, name, values[name])


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(number, int) for number in value)


def _owners(state: TrainState) -> Iterator[tuple[str, torch.nn.Parameter, Optimizer]]:
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    for optimizer in state.optimizers:
        for parameter in optimizer.parameters:
            yield names[id(parameter)], parameter, optimizer
