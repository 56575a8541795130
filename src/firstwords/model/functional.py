"""Operations of a block, in a form that is fast on a CPU too; on a GPU they are PyTorch's own fused ones.

Shapes: B batch, T tokens, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

Activation = Literal["none", "gelu", "swiglu"]
QUERIES_AT_ONCE = 128  # of two such parts a quarter of the work is masked and left out, of many parts nearly half
FEW_TOKENS = 256  # up to which probabilities kept for the gradient are a tenth of all that is, as in preset laptop
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FEW_ROWS = 64  # below, joining the weights of several layers costs more than it saves
PART_NUMBERS = 1 << 17  # of a large layer's weights, that a core reads at once where few rows are multiplied
PIECE_NUMBERS = 1 << 19  # that several passes follow each other over while they are in the CPU's cache
GELU_CUBIC = 0.044715  # Hendrycks & Gimpel 2016, arXiv:1606.08415
GELU_LINEAR = 2 * math.sqrt(2 / math.pi)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """Return softmax(QKᵀ/√D) V (Vaswani et al. 2017, eq. 1), (B, H, T, D), where each token sees itself and those before.

    On a CPU the plain products are used where they are faster: in bfloat16 they take half the time of PyTorch's fused
    kernel, in float32 with their gradient nine tenths; and that kernel drops nothing, what PyTorch has in its place takes
    half as long again. But it keeps no probabilities, so in float32 it is used where there are many, or nothing is learnt.

    Args:
        q: (B, H, T, D) queries, of the last T of S tokens.
        k: (B, H, S, D) keys.
        v: (B, H, S, D) values.
        dropout: Of the probabilities.
        mask: (B, 1, T, S), true where a token may look, where that is not all that stands before it; see `padding_mask`.
    """
    T, S = q.shape[2], k.shape[2]
    if mask is not None:
        with _any_shape(q.device):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    pays = q.dtype == torch.bfloat16 or dropout > 0 or (torch.is_grad_enabled() and T <= FEW_TOKENS)
    if q.device.type == "cpu" and pays and T == S and not torch.compiler.is_compiling():
        return _attention_by_products(q, k, v, dropout)
    mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    with _any_shape(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S, dropout_p=dropout)


def _any_shape(device: torch.device) -> AbstractContextManager[None]:
    """Leave out cuDNN's attention inside where nothing is learnt: it is planned anew for each shape, for 0.1 s.

    Steps have one shape, texts that grow have ever new ones.
    """
    return nullcontext() if torch.is_grad_enabled() or device.type != "cuda" else sdpa_kernel(UNPLANNED)


def padding_mask(padding: Tensor, T: int, S: int) -> Tensor:
    """Return (B, 1, T, S): which of S tokens the last T of them see, where row b begins with `padding[b]` that mean nothing.

    Such a token sees itself, for a softmax over nothing is not a number; nothing else sees it.
    """
    keys = torch.arange(S, device=padding.device)
    queries = keys[S - T :, None]  # (T, 1)
    real = keys >= padding[:, None, None]  # (B, 1, S)
    return ((keys <= queries) & (real | (keys == queries)))[:, None]


def _attention_by_products(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    y: Tensor = _Attention.apply(*(x.flatten(0, 1) for x in (q, k, v)), dropout)  # type: ignore[no-untyped-call]
    return y.view(v.shape)


class _Attention(torch.autograd.Function):
    """O = P' V, P' what `drop` leaves of P = softmax(Q Kᵀ/√D), over a part of the queries after the other.

    d V = P'ᵀ d O; d P' = d O Vᵀ; d S = (P' d P' - P Σ P' d P')/√D; d Q = d S K; d K = d Sᵀ Q. Composed of single operations
    it would give d K in an order in which it is slow to read, and fill what a part of the queries does not see with zeros.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        T, D = q.shape[1:]
        ctx.parts = [(start, min(T, start + QUERIES_AT_ONCE)) for start in range(0, T, QUERIES_AT_ONCE)]
        outputs, saved = [], list[Tensor]()
        for start, end in ctx.parts:
            future = torch.full((end - start, end), -torch.inf, dtype=q.dtype).triu(start + 1)
            scores = torch.baddbmm(future, q[:, start:end], k[:, :end].mT, alpha=D**-0.5)
            probs = torch.softmax(scores, dim=-1)
            dropped = drop(probs, dropout)
            outputs.append(dropped @ v[:, :end])
            saved += [probs, dropped] if any(ctx.needs_input_grad) else []  # of all, these alone grow with T²
        ctx.save_for_backward(q, k, v, *saved)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *saved = ctx.saved_tensors
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for (start, end), probs, dropped in reversed(list(zip(ctx.parts, saved[::2], saved[1::2], strict=True))):
            d_y, seen = upstream[0][:, start:end], slice(0, end)
            d_scores = _softmax_backward(probs, dropped, d_y @ v[:, seen].mT)
            d_q[:, start:end] = d_scores @ k[:, seen]
            of_k, of_v = d_scores.mT @ q[:, start:end], dropped.mT @ d_y
            if end == k.shape[1]:  # the last part sees all, and is the first one here
                d_k, d_v = of_k, of_v
            else:
                d_k[:, seen].add_(of_k)
                d_v[:, seen].add_(of_v)
        scale = q.shape[-1] ** -0.5
        return d_q.mul_(scale), d_k.mul_(scale), d_v, None


def _softmax_backward(probs: Tensor, dropped: Tensor, d_dropped: Tensor) -> Tensor:
    """Return the gradient of the scores whose softmax are `probs`, where `drop` made `dropped` of them."""
    if dropped is probs:
        d_scores: Tensor = torch.ops.aten._softmax_backward_data(d_dropped, probs, -1, probs.dtype)
        return d_scores
    d_scores = d_dropped.mul_(dropped)
    return d_scores.sub_(probs * d_scores.sum(-1, keepdim=True))


def drop(x: Tensor, rate: float) -> Tensor:
    """Return x with each number set to 0 with probability `rate` and the others divided by 1 - rate.

    Source: Srivastava et al. 2014. On a CPU 16 random bits decide on a number, so the rate is a multiple of 2^-16;
    PyTorch's own dropout draws a number for each and takes four times as long.
    """
    if rate == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return torch.where(bits >= round(rate * 2**16) - 2**15, x * (1 / (1 - rate)), 0.0)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * scale over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        x: (..., C).
        scale: (C), float32.
        eps: Keeps the root from zero.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, scale.shape, scale.to(x.dtype), eps)
    x = x.contiguous()  # a head's tokens stand apart in memory, and every pass over them as they are takes longer
    if not torch.is_grad_enabled():
        return _normed(x, scale, eps)[0]
    y: Tensor = _RMSNorm.apply(x, scale, eps)  # type: ignore[no-untyped-call]
    return y


def _normed(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed x, and 1 / sqrt(mean(x²) + eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r).mul_(scale).to(x.dtype), r


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x²) + eps) and h = scale * d y: d x = r (h - x r² mean(h x)); d scale = Σ d y x r.

    LayerNorm's own backward, given a mean of 0, computes all of it and subtracts r mean(h) besides, which is added again:
    a third of the time of PyTorch's RMSNorm, which is composed of single operations on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        y, r = _normed(x, scale, eps)
        ctx.save_for_backward(x, scale, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, r = ctx.saved_tensors
        d_y = upstream[0].to(x.dtype).contiguous()
        d_x, d_scale, _ = torch.ops.aten.native_layer_norm_backward(
            d_y, x, scale.shape, torch.zeros_like(r), r, scale, None, [True, True, False]
        )
        mean = (d_y @ scale.to(x.dtype)).unsqueeze(-1) / x.shape[-1]
        return d_x.add_(mean * r), d_scale, None


def rotary_rates(channels: int, base: float) -> Tensor:
    """Return by how much each channel pair (i, i + D/2) turns from one position to the next, base^(-2i/D), (D/2)."""
    rates: Tensor = base ** -(torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    return rates


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of (B, H, T, D) by the angles of their positions.

    Args:
        x: (B, H, T, D).
        cos: (T, D), the cosines of the angles, twice.
        sin: (T, D), their sines, first with the other sign.

    Source: Su et al. 2021, arXiv:2104.09864; the pairs are those of Llama's and Qwen's code.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if torch.compiler.is_compiling():
        return x * cos + torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1) * sin
    if not torch.is_grad_enabled():
        return _turned(x, cos, sin)
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


class Absorbed(nn.Module):
    """A layer whose weights are in the one before it, which answers for both; see `generate.in_precision`."""


def linear(x: Tensor, layers: Sequence[nn.Module], activation: Activation = "none") -> Tensor:
    """Return what the layers give for the activation of x, side by side in (..., Σ C'): one matrix product for all of them.

    On a CPU it keeps for the gradient neither what the activation gives nor, in low precision, the weights as
    converted to it, and forms both again: a twenty-fifth more time for a step, a third less memory for what is kept.

    Args:
        x: (..., C), for swiglu (..., 2 C).
        layers: At least one; all read the same channels. Layers of another kind are asked one by one.
        activation: none; gelu, in its tanh form; or swiglu, silu(first half) * second half.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    plain = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if x.numel() // x.shape[-1] < FEW_ROWS or len(plain) < len(layers):
        activated = _activated(activation, x)
        return _joined([_applied(layer, activated) for layer in layers if not isinstance(layer, Absorbed)], dim=-1)
    weights: list[Tensor] = [layer.weight for layer in plain]
    biases: list[Tensor] = [layer.bias for layer in plain if layer.bias is not None]
    by_autograd = dtype == torch.float32 and activation == "none"
    if x.device.type != "cpu" or by_autograd or torch.compiler.is_compiling():
        return F.linear(_activated(activation, x), _joined(weights), _joined(biases) if biases else None)
    y: Tensor = _Linear.apply(activation, dtype, len(layers), x, *weights, *biases)  # type: ignore[no-untyped-call]
    return y


def _applied(layer: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(layer, nn.Linear):
        y: Tensor = layer(x)
        return y
    n_parts = 1 << (layer.weight.numel() // PART_NUMBERS).bit_length() >> 1  # a power of two: most shapes are multiples
    alike = x.dtype == layer.weight.dtype == torch.float32 and layer.weight.is_contiguous()
    if n_parts < 2 or not alike or x.device.type != "cpu" or torch.is_grad_enabled() or torch.get_num_threads() == 1:
        return F.linear(x, layer.weight, layer.bias)
    y = _in_parts(x.flatten(0, -2), layer.weight, n_parts).view(*x.shape[:-1], -1)
    return y if layer.bias is None else y + layer.bias


def _in_parts(x: Tensor, weight: Tensor, n_parts: int) -> Tensor:
    """Return x Wᵀ, (N, C'), for (N, C) and the weights (C', C) in so many parts, each read by one core.

    In one product of a single row one core alone reads all the weights, and where N is 2 to 64 all cores do, but late.
    """
    height = len(weight) // n_parts
    end = n_parts * height
    y = torch.bmm(x.expand(n_parts, *x.shape), weight[:end].view(n_parts, height, -1).mT)  # (parts, N, height)
    y = y.transpose(0, 1).reshape(len(x), end)
    return y if end == len(weight) else torch.cat((y, F.linear(x, weight[end:])), dim=1)


class _Linear(torch.autograd.Function):
    """y = a Wᵀ + b, a = activation(x), W all layers' weights in one: d a = d y W, d W = d yᵀ a, d b = Σ d y."""

    @staticmethod
    def forward(
        ctx: Any, activation: Activation, dtype: torch.dtype, n_layers: int, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.activation, ctx.dtype, ctx.n_layers, ctx.needs_x = activation, dtype, n_layers, ctx.needs_input_grad[3]
        ctx.dtypes = [given.dtype for given in (x, *parameters)]
        x = x.to(dtype)
        ctx.save_for_backward(x, *parameters)
        weights, biases = parameters[:n_layers], parameters[n_layers:]
        bias = stacked(biases, dtype) if biases else None
        return F.linear(_activated(activation, x), stacked(weights, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        weights, biases = parameters[: ctx.n_layers], parameters[ctx.n_layers :]
        d_y, heights = upstream[0].flatten(0, -2), [len(w) for w in weights]
        if ctx.needs_x:
            d_a = (d_y @ stacked(weights, ctx.dtype)).view(*upstream[0].shape[:-1], -1)
            activated, d_x = _activation_and_gradient(ctx.activation, x, d_a)
            del d_a
        else:
            activated, d_x = _activated(ctx.activation, x), None
        d_weights = torch.split(d_y.T @ activated.flatten(0, -2), heights)
        d_biases = torch.split(d_y.sum(0), heights) if biases else ()
        gradients = [d_x, *d_weights, *d_biases]
        cast = [None if d is None else d.to(dtype) for d, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, *cast


def stacked(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return all their rows in one tensor."""
    return _joined([tensor.to(dtype) for tensor in tensors])


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _activated(activation: Activation, x: Tensor) -> Tensor:
    match activation:
        case "none":
            return x
        case "gelu":
            return gelu(x)
        case "swiglu":
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up
        case _ as never:
            assert_never(never)


def _activation_and_gradient(activation: Activation, x: Tensor, d_a: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_activated` does, and the gradient of x, where its own is `d_a`, which may be written over."""
    match activation:
        case "none":
            return x, d_a
        case "gelu":
            return _gelu_and_gradient(x, d_a)
        case "swiglu":
            d_x = torch.empty_like(x)
            (gate, up), (d_gate, d_up) = x.chunk(2, dim=-1), d_x.chunk(2, dim=-1)
            opened = F.silu(gate)
            torch.mul(opened, d_a, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_a.mul_(up), gate, grad_input=d_gate)
            return opened.mul_(up), d_x
        case _ as never:
            assert_never(never)


def gelu(x: Tensor) -> Tensor:
    """Return x σ(z), z = 2 sqrt(2/π) (x + 0.044715 x³): GELU in its tanh form, as σ(z) = (1 + tanh(z/2)) / 2.

    PyTorch asks for the tanh itself, which takes three times as long as σ, but does it in one call: better for few numbers.
    What autograd is to follow cannot be written piece by piece; a layer asks for `_gelu_and_gradient` instead.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu" or x.numel() < PIECE_NUMBERS:
        return F.gelu(x, approximate="tanh")
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for of_x, of_y in zip(_pieces(x), _pieces(y), strict=True):
        wide = of_x.to(_wide(x))
        _put_product(_gelu_logits(wide).sigmoid_(), wide, of_y)
    return y


def _gelu_and_gradient(x: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    """Return y = `gelu`(x), and d x = d y (σ + (3 z - 2 a x) σ (1 - σ)), a = 2 sqrt(2/π), which takes the place of `d_y`."""
    if x.numel() < PIECE_NUMBERS:
        d_x: Tensor = torch.ops.aten.gelu_backward(d_y, x, approximate="tanh")
        return gelu(x), d_x
    y, d_x = torch.empty_like(x, memory_format=torch.contiguous_format), d_y.contiguous()
    for of_x, of_y, of_d_x in zip(_pieces(x), _pieces(y), _pieces(d_x), strict=True):
        wide = of_x.to(_wide(x))
        z = _gelu_logits(wide)
        share = z.sigmoid()
        z.sub_(wide, alpha=2 / 3 * GELU_LINEAR)
        torch.ops.aten.sigmoid_backward.grad_input(z, share, grad_input=z)
        _put_product(torch.add(share, z, alpha=3, out=z), of_d_x.to(_wide(x)), of_d_x)
        _put_product(share, wide, of_y)
    return y, d_x


def _gelu_logits(x: Tensor) -> Tensor:
    linear = torch.tensor(GELU_LINEAR, dtype=x.dtype)
    return torch.addcmul(linear, x, x, value=GELU_LINEAR * GELU_CUBIC).mul_(x)


def _put_product(a: Tensor, b: Tensor, place: Tensor) -> None:
    """Set a place to a b; where it is of lower precision, a is written over, for PyTorch would make room for the product."""
    if place.dtype == a.dtype:
        torch.mul(a, b, out=place)
    else:
        place.copy_(a.mul_(b))


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x.reshape(-1), PIECE_NUMBERS)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
