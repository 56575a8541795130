"""How gradients become updates: AdamW, Muon, what is decayed, and the learning rate of a step."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from firstwords.config import OptimConfig
from firstwords.model.cost import NEWTON_SCHULZ_STEPS
from firstwords.model.gpt import GPTModel

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024, "Muon: an optimizer for hidden layers").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


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


def optimizers(model: GPTModel, config: OptimConfig, dtype: torch.dtype) -> tuple[torch.optim.Optimizer, ...]:
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
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = model.tok_emb.weight.device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(
        groups, lr=config.peak_lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused or None
    )
    if not for_muon:
        return (adamw,)
    return (Muon(for_muon, config.peak_lr, config.momentum, config.weight_decay, dtype), adamw)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by the nearest (semi-)orthogonal one.

        m ← μ m + (1 - μ) g;   u = (1 - μ) g + μ m;   W ← W (1 - lr λ) - lr · 0.2 √max(rows, columns) · UVᵀ of u

    The factor gives updates the size that AdamW's have, so both share one learning rate (Liu et al. 2025,
    arXiv:2502.16982). Matrices of one shape are iterated together, in `dtype`.

    Source: Jordan et al. 2024.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                factor = 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update.to(parameter.dtype), alpha=group["lr"] * factor)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        mean: Tensor = state["momentum"]
        mean.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum).to(self.dtype)


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
