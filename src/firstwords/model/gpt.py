"""GPTModel: token ids in, logits out. One decoder for GPT-2's blocks and for qwen3's.

Shapes: B batch, T tokens, C channels, H heads, D = C / H channels of a head, V vocabulary.
Module and parameter names are those of Raschka's "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from firstwords.config import ModelConfig
from firstwords.errors import DataError
from firstwords.model import induction
from firstwords.model.functional import (
    GELU_CUBIC,
    causal_attention,
    drop,
    gelu,
    linear,
    padding_mask,
    rms_norm,
    rotary_rates,
    rotate,
)

DRAWING = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)  # what PyTorch's modules and ours begin with


class KVCache:
    """Keys and values of the tokens that a model has already seen, one pair for each block.

    Args:
        config: Gives the number of blocks and the most tokens that fit, `context_length`.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.length = 0  # tokens seen by every block
        self._capacity = config.context_length
        self._keys: list[Tensor | None] = [None] * config.n_layers
        self._values: list[Tensor | None] = [None] * config.n_layers

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the (B, H, T, D) of new tokens and return those of all tokens so far, (B, H, length + T, D).

        Those of a single sequence on a CPU become float32: PyTorch's attention of one query is five times as fast with
        them as in bfloat16. Of many sequences they would take too much memory.
        """
        end = self.length + key.shape[2]
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            room = (*key.shape[:2], self._capacity, key.shape[3])
            alone = len(key) == 1 and key.device.type == "cpu"
            dtype = torch.promote_types(key.dtype, torch.float32) if alone else key.dtype
            keys = self._keys[layer] = key.new_empty(room, dtype=dtype)
            values = self._values[layer] = value.new_empty(room, dtype=dtype)
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + shift over the channels (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) for (..., C)."""
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class RMSNorm(nn.Module):
    """Scales the channels to a root mean square of about 1; see `functional.rms_norm`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) for (..., C)."""
        return rms_norm(x, self.scale, self.eps)


class Dropout(nn.Dropout):
    """Drops numbers in training; see `functional.drop`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) for (..., C)."""
        return drop(x, self.p) if self.training else x


class GELU(nn.Module):
    """0.5 x (1 + tanh(sqrt(2/π) (x + cubic x³))), the form that GPT-2 was trained with; or x Φ(x) itself."""

    def __init__(self, cubic: float = GELU_CUBIC, *, exact: bool = False) -> None:
        super().__init__()
        self.cubic, self.exact = cubic, exact

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) for (..., C)."""
        if self.exact:
            return F.gelu(x)
        if self.cubic == GELU_CUBIC:
            return gelu(x)
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + self.cubic * x**3)))


class FeedForward(nn.Module):
    """GPT-2's: widen, GELU, narrow."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(config.emb_dim, config.hidden_dim),
            GELU(config.gelu_cubic, exact=config.gelu_exact),
            nn.Linear(config.hidden_dim, config.emb_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) for (..., C)."""
        widen, act, narrow = self.layers
        assert isinstance(act, GELU)
        if act.exact or act.cubic != GELU_CUBIC:
            y: Tensor = self.layers(x)
            return y
        return linear(linear(x, [widen]), [narrow], "gelu")


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.emb_dim, config.hidden_dim, bias=False)
        self.up = nn.Linear(config.emb_dim, config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.emb_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) for (..., C)."""
        return linear(linear(x, [self.gate, self.up]), [self.down], "swiglu")


def rotary_angles(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * base^(-2i/D), each (context_length, D), as `functional.rotate` takes them.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    rates = rotary_rates(config.head_dim, config.rope_base)
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), rates)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, modern = config.emb_dim, config.block == "qwen3"
        self.layer, self.n_heads = layer, config.n_heads
        self.W_query = nn.Linear(C, C, bias=config.qkv_bias)
        self.W_key = nn.Linear(C, C, bias=config.qkv_bias)
        self.W_value = nn.Linear(C, C, bias=config.qkv_bias)
        self.out_proj = nn.Linear(C, C, bias=not modern)
        # Dropping attention probabilities costs the fused kernel; the modern block drops on the residual ways alone.
        self.dropout = Dropout(0.0 if modern else config.drop_rate)
        # Norms of queries and keys keep the attention logits bounded (Henry et al. 2020, arXiv:2010.04245).
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if modern else None
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if modern else None

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        """Return (B, T, C) for (B, T, C); `angles` turn queries and keys, `cache` holds the tokens before these."""
        B, T, C = x.shape
        q, k, v = (
            y.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)  # (B, H, T, D)
            for y in linear(x, [self.W_query, self.W_key, self.W_value]).chunk(3, dim=-1)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
            q = q.to(k.dtype)
        y = causal_attention(q, k, v, self.dropout.p if self.training else 0.0, mask)
        return linear(y.transpose(1, 2).reshape(B, T, C), [self.out_proj])


class TransformerBlock(nn.Module):
    """x + attention(norm1(x)), then x + feed-forward(norm2(x)), with dropout on both ways."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        norm = RMSNorm if config.block == "qwen3" else LayerNorm
        self.att = MultiHeadAttention(config, layer)
        self.ff = SwiGLU(config) if config.block == "qwen3" else FeedForward(config)
        self.norm1 = norm(config.emb_dim, config.norm_eps)
        self.norm2 = norm(config.emb_dim, config.norm_eps)
        self.drop_shortcut = Dropout(config.drop_rate)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        """Return (B, T, C) for (B, T, C)."""
        x = x + self.drop_shortcut(self.att(self.norm1(x), angles, cache, mask))
        y: Tensor = x + self.drop_shortcut(self.ff(self.norm2(x)))
        return y


class GPTModel(nn.Module):
    """A decoder-only transformer.

    Args:
        config: A `ModelConfig`, or a mapping with its keys, such as `GPT_CONFIG_124M`. The weights come from
            PyTorch's global random generator, in the order in which the chapter's own model draws them.
    """

    pos_emb: nn.Embedding | None
    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: ModelConfig | Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config = config if isinstance(config, ModelConfig) else ModelConfig(**config)
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        match config.block:
            case "gpt2":
                self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
                final_norm: LayerNorm | RMSNorm = LayerNorm(config.emb_dim, config.norm_eps)
            case "qwen3":
                self.pos_emb = None
                for name, table in zip(("rotary_cos", "rotary_sin"), rotary_angles(config), strict=True):
                    self.register_buffer(name, table, persistent=False)
                final_norm = RMSNorm(config.emb_dim, config.norm_eps)
            case _ as never:
                assert_never(never)
        self.drop_emb = Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*(TransformerBlock(config, layer) for layer in range(config.n_layers)))
        self.final_norm = final_norm
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        if config.tied_head:
            self.out_head.weight = self.tok_emb.weight
        if config.init_std is not None:
            initialise(self, config.init_std)
        if config.table_std is not None:
            nn.init.normal_(self.tok_emb.weight, std=config.table_std)
        if not self.tok_emb.weight.is_meta and induction.applies(config):
            first, second = (block.att for block in [*self.trf_blocks][:2] if isinstance(block, TransformerBlock))
            induction.write_heads(config, self.tok_emb.weight, self.out_head.weight, first, second)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name; a tied head is there once, as `tok_emb.weight`."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def features(self, tokens: Tensor, cache: KVCache | None = None, padding: Tensor | None = None) -> Tensor:
        """Return what the head reads, (B, T, C), for the ids (B, T).

        Args:
            tokens: At most `context_length` ids together with those in `cache`.
            cache: Holds the tokens before these, and takes these in.
            padding: (B), so many ids at the left of each row, those in `cache` counted, mean nothing; None: none do.

        Raises:
            ValueError: More tokens than the model can see at once.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens, but the model sees at most {self.config.context_length}")
        # Beside the head's, a dense gradient of the lookup would be mostly zeros, as large as the table; see `train_step`.
        x = F.embedding(tokens, self.tok_emb.weight, sparse=self.config.tied_head and self.training)
        x = x.to(self.final_norm.scale.dtype)  # the residual stream is float32 where the weights are not; see `in_precision`
        angles = mask = None
        if padding is None:
            positions = torch.arange(start, end, device=tokens.device)
        else:
            positions = (torch.arange(start, end, device=tokens.device) - padding[:, None]).clamp_min(0)  # (B, T)
            mask = padding_mask(padding, end - start, end)
        if self.pos_emb is not None:
            x = x + self.pos_emb(positions)
        elif padding is None:
            angles = self.rotary_cos[start:end], self.rotary_sin[start:end]
        else:  # the same for all heads
            angles = self.rotary_cos[positions][:, None], self.rotary_sin[positions][:, None]
        x = self.drop_emb(x)
        for block in self.trf_blocks:
            x = block(x, angles, cache, mask)
        if cache is not None:
            cache.length = end
        y: Tensor = self.final_norm(x)
        return y

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the token after each of the ids (B, T)."""
        logits: Tensor = self.out_head(self.features(tokens))
        return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Drop nothing inside, and leave the model in the mode that it came in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Undrawn(TorchFunctionMode):
    """Leaves a tensor as it is where random numbers would be drawn into it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return [*args, *kwargs.values()][0] if func in DRAWING else func(*args, **kwargs)


def uninitialised(config: ModelConfig) -> GPTModel:
    """Return a model whose weights are what stood in memory: drawing random ones takes GPT-2 a second, in vain."""
    with _Undrawn():
        model = GPTModel(dataclasses.replace(config, induction_heads=False))
    model.config = config
    return model


def load_weights(model: GPTModel, tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Copy weights into a model, one after another.

    Raises:
        DataError: A tensor is unknown, of another shape, or missing.
    """
    own, why = model.tensors(), "it was made with another configuration"
    left = set(own)
    for name, tensor in tensors:
        if name not in own:
            raise DataError(f"tensor {name!r} is unknown", where=where, why=why)
        if own[name].shape != tensor.shape:
            shapes = f"{list(tensor.shape)}, the model needs {list(own[name].shape)}"
            raise DataError(f"tensor {name!r} has shape {shapes}", where=where)
        own[name].copy_(tensor)
        left.discard(name)
    if left:
        raise DataError(f"tensor {min(left)!r} is missing", where=where, why=why)


def initialise(model: GPTModel, std: float) -> None:
    """Draw the weights as GPT-2 does: N(0, std²), biases 0, and what adds to the residual stream scaled by 1/√(2 n_layers).

    Source: Radford et al. 2019, section 2.3; openai/gpt-2, src/model.py.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            residual = name.endswith(("att.out_proj", "ff.layers.2", "ff.down"))
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * model.config.n_layers) if residual else std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
