"""What a model costs: parameters, operations, bytes. Formulas, no measurements."""

from __future__ import annotations

from firstwords.config import ModelConfig


def parameters(config: ModelConfig) -> int:
    """Return the number of distinct parameters; a tied head adds none."""
    C, V, hidden = config.emb_dim, config.vocab_size, config.hidden_dim
    if config.block == "qwen3":
        block = 4 * C * C + 3 * config.qkv_bias * C + 3 * C * hidden + 2 * C + 2 * config.head_dim
        rest = C
    else:
        block = 4 * C * C + 3 * config.qkv_bias * C + C + 2 * C * hidden + hidden + C + 4 * C
        rest = 2 * C + config.context_length * C
    return config.n_layers * block + rest + (1 if config.tied_head else 2) * V * C


def training_flops(config: ModelConfig) -> int:
    """Return the operations that learning from one token takes: 6 a weight of a matrix, 12 C T a layer for attention.

    Source: Chowdhery et al. 2022 (arXiv:2204.02311), appendix B, where attention counts without its mask. Tables of
    embeddings are looked up, not multiplied; the head is multiplied.
    """
    C, hidden = config.emb_dim, config.hidden_dim
    layer = 4 * C * C + (3 if config.block == "qwen3" else 2) * C * hidden
    weights = config.n_layers * layer + C * config.vocab_size
    return 6 * weights + 12 * config.n_layers * C * config.context_length


def training_bytes(config: ModelConfig, micro_batch_size: int) -> int:
    """Return a rough upper estimate of the memory of training, in bytes: state and activations in float32.

    State: weights, gradients and AdamW's two means, 16 bytes a parameter. Activations: about 20 C + 6 hidden channels a
    token and layer are kept for backward (counted from the modules), doubled for what is temporary.
    """
    tokens = micro_batch_size * config.context_length
    kept = config.n_layers * (20 * config.emb_dim + 6 * config.hidden_dim)
    return 16 * parameters(config) + 2 * 4 * tokens * kept


def checkpoint_bytes(config: ModelConfig) -> int:
    """Return the size of a checkpoint: weights and AdamW's two means in float32 (Muon's one mean is less)."""
    return 12 * parameters(config)


def micro_batch_size(config: ModelConfig, batch_size: int) -> int:
    """Return the largest divisor of `batch_size` whose forward pass has at most 8,192 tokens and keeps at most 4 GiB."""
    state = training_bytes(config, 0)

    def fits(rows: int) -> bool:
        return rows * config.context_length <= 8192 and training_bytes(config, rows) - state <= 4 << 30

    return max((rows for rows in range(1, batch_size + 1) if batch_size % rows == 0 and fits(rows)), default=1)
