"""How gradients become updates: AdamW, Muon, what is decayed, and the learning rate of a step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from firstwords.config import NEWTON_SCHULZ_STEPS, OptimConfig
from firstwords.model.gpt import GPTModel

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024, "Muon: an optimizer for hidden layers").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
FUSED = ("cpu", "cuda")  # devices on which PyTorch has one pass for all of AdamW's


def learning_rate(step: int, config: OptimConfig, total_steps: int | None) -> float:
    """Return the learning rate for `step`: linear warm-up, then down to `floor_lr`.

        peak_lr * (step + 1) / warmup_steps                  for step < warmup_steps
        floor_lr + (peak_lr - floor_lr) * (1 + cos(pi t))/2  after, t from 0 to 1 (cosine)
        floor_lr + (peak_lr - floor_lr) * (1 - t)            after (linear)

    Args:
        step: Updates already done; the first update uses step 0 (and a rate above 0).
        config: Its `warmup_steps` count updates, and are at most a quarter of a known run.
        total_steps: Updates of the whole run; after them the rate stays at `floor_lr`. None: not known yet, no decay.

    Source: cosine, Loshchilov & Hutter 2017 (arXiv:1608.03983); linear to zero, Defazio et al. 2023 (arXiv:2310.07831).
    """
    warmup_steps = config.warmup_steps if total_steps is None else min(config.warmup_steps, total_steps // 4)
    if step < warmup_steps:
        return config.peak_lr * (step + 1) / warmup_steps
    if total_steps is None:
        return config.peak_lr
    t = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    match config.decay:
        case "cosine":
            share = (1 + math.cos(math.pi * t)) / 2
        case "linear":
            share = 1 - t
        case "constant":
            return config.peak_lr
        case _ as never:
            assert_never(never)
    return config.floor_lr + (config.peak_lr - config.floor_lr) * share


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters that are decayed alike."""

    parameters: list[nn.Parameter]
    weight_decay: float


class Optimizer(ABC):
    """What turns the gradients of its parameters into updates, and what it keeps of each parameter to do so.

    Not a torch.optim.Optimizer: building one of those imports PyTorch's compiler, a second or two before the first step.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter that it updates."""
        return (parameter for group in self.groups for parameter in group.parameters)

    def make_room(self) -> None:
        """Begin what is kept of each parameter, where it has not begun.

        What is kept for the whole run should lie together, below all that a step forms and frees: begun in a first step,
        it takes the places that this one frees here and there, and the next step does not fit into what is left of them.
        """
        for parameter in self.parameters:
            self._kept(parameter)

    @abstractmethod
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""

    @abstractmethod
    def _kept(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return what is kept of a parameter, begun where it has not."""


def optimizers(model: GPTModel, config: OptimConfig, dtype: torch.dtype) -> tuple[Optimizer, ...]:
    """Return the optimizers of a model's parameters, each parameter in one of them.

    Matrices and tables are decayed; norms and biases are not. With `muon`, the matrices of the blocks are Muon's.

    Args:
        model: On its final device.
        config: What to build.
        dtype: Of Muon's matrix products; the run's precision.
    """
    hidden = list(model.trf_blocks.parameters())
    for_muon = [p for p in hidden if p.ndim == 2] if config.kind == "muon" else []
    chosen = set(map(id, for_muon))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = (
        Group([p for p in rest if p.ndim >= 2], config.weight_decay),
        Group([p for p in rest if p.ndim < 2], 0.0),
    )
    by_adam = AdamW(groups, config.beta1, config.beta2, config.eps)
    return (Muon(for_muon, config.momentum, config.weight_decay, dtype), by_adam) if for_muon else (by_adam,)


class AdamW(Optimizer):
    """Adam with decoupled weight decay, as PyTorch computes it.

    Source: Loshchilov & Hutter 2019 (arXiv:1711.05101).
    """

    def __init__(self, groups: Sequence[Group], beta1: float, beta2: float, eps: float) -> None:
        super().__init__(groups)
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        for group in self.groups:
            parameters: list[Tensor] = [p for p in group.parameters if p.grad is not None]
            if not parameters:
                continue
            kept = [self._kept(p) for p in parameters]
            adamw(
                parameters,
                [p.grad for p in parameters if p.grad is not None],
                [state["exp_avg"] for state in kept],
                [state["exp_avg_sq"] for state in kept],
                [],
                [state["step"] for state in kept],
                fused=parameters[0].device.type in FUSED,
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=lr,
                weight_decay=group.weight_decay,
                eps=self.eps,
                maximize=False,
            )

    def _kept(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


class Muon(Optimizer):
    """Momentum whose matrix is replaced by the nearest (semi-)orthogonal one.

        m ← μ m + (1 - μ) g;   u = (1 - μ) g + μ m;   W ← W (1 - lr λ) - lr · 0.2 √max(rows, columns) · UVᵀ of u

    The factor gives updates the size that AdamW's have, so both share one learning rate (Liu et al. 2025,
    arXiv:2502.16982). Matrices of one shape are iterated together, in `dtype`.

    Source: Jordan et al. 2024.
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__([Group(parameters, weight_decay)])
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        for group in self.groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group.parameters:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = orthogonal(torch.stack([self._averaged(p) for p in parameters]))
                factor = 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - lr * group.weight_decay)
                    parameter.sub_(update.to(parameter.dtype), alpha=lr * factor)

    def _averaged(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        mean = self._kept(parameter)["momentum"]
        mean.lerp_(parameter.grad, 1 - self.momentum)
        return parameter.grad.lerp(mean, self.momentum).to(self.dtype)

    def _kept(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state


def orthogonal(matrices: Tensor) -> Tensor:
    """Return, for matrices (N, rows, columns), approximately U Vᵀ of their singular value decompositions.

    Singular values end between about 0.7 and 1.2, near enough for an update.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    X: Tensor = matrices.mT.contiguous() if tall else matrices
    X = X / (X.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(X.dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A²) X
    return X.mT if tall else X
