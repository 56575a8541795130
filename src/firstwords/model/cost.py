"""What a model costs: parameters, operations, bytes. Formulas; their factors were measured once, not on this machine."""

from __future__ import annotations

from firstwords.config import NEWTON_SCHULZ_STEPS, ModelConfig, Precision

SHORT_CONTEXT = 256  # of the models whose activations were measured
PROCESS_BYTES = {2: 350 << 20, 4: 300 << 20}  # Python, PyTorch with products of numbers of so many bytes, a prepared text
MAPPED_BYTES = 64 << 10  # that Linux maps at once around what is read of a file
# Of each activation that is kept for backward, by block and the bytes of a number.
ACTIVATION_BYTES = {("qwen3", 2): 2.2, ("qwen3", 4): 3.0, ("gpt2", 2): 1.8, ("gpt2", 4): 4.0}
EVALUATED_AT_ONCE = 2048  # tokens; fixed, so that no figure depends on a run's batch. 8,192: a twentieth faster, 150 MB more
FEWEST_CHUNK_BYTES = 16 << 20  # of logits
MOST_CHUNK_BYTES = 128 << 20
CHUNK_HEADS = 8  # times the head's bytes: each chunk adds once to the gradient of the whole head, so few are better
MOST_CPU_TOKENS = 8192  # in a micro-batch: more are no faster
CPU_ACTIVATION_BYTES = 8.0  # by which its size is chosen: more than is needed
CPU_ROOM_BYTES = 4 << 30  # for all that is kept
MOST_GPU_TOKENS = 65536  # in a micro-batch
GPU_ACTIVATION_BYTES = 3.0  # in bfloat16; measured as 1.7 to 2.6 with the logits
GPU_ROOM_SHARE = 0.7  # of the memory that weights and optimizers leave, for all that is kept
LOGITS_SHARE = 2.0  # of a chunk of logits, with what is formed of it


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


def read_parameters(config: ModelConfig) -> int:
    """Return the number of parameters that are read for each token that is generated: of what is looked up, next to none."""
    looked_up = 0 if config.tied_head else config.vocab_size * config.emb_dim
    if config.block == "gpt2":
        looked_up += config.context_length * config.emb_dim
    return parameters(config) - looked_up


def training_flops(config: ModelConfig) -> int:
    """Return the operations that learning from one token takes: 6 a weight of a matrix, 12 C T a layer for attention.

    Source: Chowdhery et al. 2022 (arXiv:2204.02311), appendix B, where attention counts without its mask. Tables of
    embeddings are looked up, not multiplied; the head is multiplied.
    """
    C, hidden = config.emb_dim, config.hidden_dim
    layer = 4 * C * C + (3 if config.block == "qwen3" else 2) * C * hidden
    weights = config.n_layers * layer + C * config.vocab_size
    return 6 * weights + 12 * config.n_layers * C * config.context_length


def update_flops(config: ModelConfig) -> int:
    """Return the operations that an update by Muon takes, however many tokens it learns from.

    An iteration of Newton and Schulz on a matrix of m rows and n >= m columns: X Xᵀ and its product with X of 2 m² n each,
    A² of 2 m³; see `training.optim.orthogonal`.
    """

    def iteration(rows: int, columns: int) -> int:
        m, n = sorted((rows, columns))
        return 4 * m * m * n + 2 * m * m * m

    C, hidden = config.emb_dim, config.hidden_dim
    layer = 4 * iteration(C, C) + (3 if config.block == "qwen3" else 2) * iteration(C, hidden)
    return NEWTON_SCHULZ_STEPS * config.n_layers * layer


def activations_per_token(config: ModelConfig) -> int:
    """Return the numbers that a token leaves for backward: about 20 C + 6 hidden channels a layer, by the modules."""
    return config.n_layers * (20 * config.emb_dim + 6 * config.hidden_dim)


def attention_bytes(config: ModelConfig, item: int) -> float:
    """Return what a token's attention leaves for backward on a CPU, beyond what `ACTIVATION_BYTES` has of short contexts.

    Of all that is kept, the probabilities alone grow with the context: a token's are those of half of it, and of half of the
    queries that are treated together. See `functional.causal_attention`, which keeps none of long contexts in float32 where
    nothing is dropped, and those that are left too where something is.

    Args:
        config: The shape.
        item: Bytes of a number.
    """
    dropped = config.block == "gpt2" and config.drop_rate > 0
    if item == 4 and not dropped:
        return 0.0
    longer = max(0, config.context_length - SHORT_CONTEXT) / 2
    return item * config.n_layers * config.n_heads * longer * (1 + dropped)


def training_bytes(config: ModelConfig, micro_batch_size: int, precision: Precision = "float32") -> int:
    """Return about the peak memory of a process that trains on a CPU, in bytes.

    Python with PyTorch; weights, gradients, AdamW's two means (or Muon's one, and its work) and a copy of the best weights,
    20 bytes a parameter; what a micro-batch leaves for backward; the logits of it, or of an evaluation. The factors are
    measured: less is kept than the modules compute, as much of it is formed a second time.
    """
    item = 2 if precision == "bfloat16" else 4
    tokens = micro_batch_size * config.context_length
    kept = tokens * (ACTIVATION_BYTES[config.block, item] * activations_per_token(config) + attention_bytes(config, item))
    at_once = max(EVALUATED_AT_ONCE, tokens)
    chunk = chunk_bytes(config.vocab_size * config.emb_dim * item)
    logits = LOGITS_SHARE * min(chunk, at_once * config.vocab_size * item)
    return int(PROCESS_BYTES[item] + 20 * parameters(config) + kept + logits)


def mapped_bytes(vocab_size: int, text_tokens: float, windows: float) -> int:
    """Return about how much of a text's ids counts for the peak of a process that reads so many windows of them.

    They are read where they lie on the disk: the system takes those pages back where memory is short, so that they need not
    fit into it.
    """
    id_bytes = 2 if vocab_size <= 1 << 16 else 4
    return int(min(id_bytes * text_tokens, MAPPED_BYTES * windows))


def chunk_bytes(head_bytes: int) -> int:
    """Return the bytes of logits that are formed at once, at most, for a head of so many bytes.

    What a chunk leaves free between other things, the next one may not fit into: small ones need less memory in the end.
    """
    return min(MOST_CHUNK_BYTES, max(FEWEST_CHUNK_BYTES, CHUNK_HEADS * head_bytes))


def checkpoint_bytes(config: ModelConfig) -> int:
    """Return the size of a checkpoint: weights and AdamW's two means in float32 (Muon's one mean is less)."""
    return 12 * parameters(config)


def micro_batch_size(
    config: ModelConfig, batch_size: int, gpu_bytes: int | None = None, precision: Precision = "bfloat16"
) -> int:
    """Return how many sequences are learnt from at once: the largest divisor of `batch_size` that has room.

    Args:
        config: The shape.
        batch_size: Sequences of an update.
        gpu_bytes: What a GPU has left; None: a CPU learns.
        precision: Of a GPU's products.
    """
    attention = attention_bytes(config, 2) if gpu_bytes is None else 0.0
    most_tokens, activation_bytes, room_bytes = MOST_CPU_TOKENS, CPU_ACTIVATION_BYTES, float(CPU_ROOM_BYTES)
    if gpu_bytes is not None:
        most_tokens, activation_bytes = MOST_GPU_TOKENS, GPU_ACTIVATION_BYTES * (1 if precision == "bfloat16" else 2)
        room_bytes = GPU_ROOM_SHARE * (gpu_bytes - 20 * parameters(config))

    def fits(rows: int) -> bool:
        tokens = rows * config.context_length
        kept = tokens * (activation_bytes * activations_per_token(config) + attention)
        return tokens <= most_tokens and kept <= room_bytes

    return max((rows for rows in range(1, batch_size + 1) if batch_size % rows == 0 and fits(rows)), default=1)
