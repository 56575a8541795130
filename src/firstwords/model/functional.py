"""Operations of a block, in a form that is fast on a processor too; on a GPU they are PyTorch's own fused ones.

Shapes: B batch, T tokens, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERIES_AT_ONCE = 256  # so that memory grows with T, not T², and about half of the masked work is left out
FEW_ROWS = 64  # below, joining the weights of several layers costs more than it saves


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Return softmax(QKᵀ/√D) V (Vaswani et al. 2017, eq. 1), (B, H, T, D), where each token sees itself and those before.

    In bfloat16 on a processor the plain products are twice as fast as PyTorch's fused kernel; there they are used.

    Args:
        q: (B, H, T, D) queries, of the last T of S tokens.
        k: (B, H, S, D) keys.
        v: (B, H, S, D) values.
        dropout: Of the probabilities.
    """
    T, S = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and T == S and not torch.compiler.is_compiling():
        return _attention_by_products(q, k, v, dropout)
    mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S, dropout_p=dropout)


def _attention_by_products(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    T, q = q.shape[2], q * q.shape[3] ** -0.5
    size = min(T, QUERIES_AT_ONCE)
    future = torch.full((size, size), -torch.inf, dtype=q.dtype).triu(1)
    parts = []
    for start in range(0, T, size):
        end = min(T, start + size)
        scores = q[:, :, start:end] @ k[:, :, :end].mT
        scores[..., start:] += future[: end - start, : end - start]
        parts.append(F.dropout(torch.softmax(scores, dim=-1), dropout) @ v[:, :, :end])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * scale over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        x: (..., C).
        scale: (C), float32.
        eps: Keeps the root from zero.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        y: Tensor = _RMSNorm.apply(x, scale, eps)  # type: ignore[no-untyped-call]
        return y
    return F.rms_norm(x, scale.shape, scale.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x²) + eps) and h = scale * d y: d x = r (h - x r² mean(h x)); d scale = Σ d y x r.

    LayerNorm's own backward, given a mean of 0, computes all of it and subtracts r mean(h) besides, which is added again:
    a third of the time of PyTorch's RMSNorm, which is composed of single operations on a processor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, r)
        y: Tensor = (x * r).mul_(scale).to(x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, r = ctx.saved_tensors
        d_y = upstream[0].to(x.dtype).contiguous()
        d_x, d_scale, _ = torch.ops.aten.native_layer_norm_backward(
            d_y, x.contiguous(), scale.shape, torch.zeros_like(r), r, scale, None, [True, True, False]
        )
        mean = (d_y @ scale.to(x.dtype)).unsqueeze(-1) / x.shape[-1]
        return d_x.add_(mean * r), d_scale, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of (B, H, T, D) by the angles of their positions, (T, D/2) each.

    Source: Su et al. 2021, arXiv:2104.09864; the pairs are those of Llama's and Qwen's code.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    if torch.compiler.is_compiling():
        return x * cos + torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1) * sin
    y: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(upstream[0], cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    y = x * cos
    for half, other, angle in zip(y.chunk(2, dim=-1), (second, first), sin.chunk(2, dim=-1), strict=True):
        half.addcmul_(other, angle)
    return y


def linear_each(x: Tensor, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
    """Return what each layer gives for the same (..., C), as one matrix product where there are rows enough."""
    if x.numel() // x.shape[-1] < FEW_ROWS:
        return [layer(x) for layer in layers]
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    y = F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
    parts: Sequence[Tensor] = torch.split(y, [len(weight) for weight in weights], dim=-1)
    return parts
