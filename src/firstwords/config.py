"""What a run is made of, as frozen dataclasses. Parts of the program get parts of it.

A key has one name everywhere: `steps` is `--steps` on the command line and `steps = ` in TOML; `model.n_layers` is
`--model.n-layers` and `n_layers` under `[model]`. Keys that end in `_s` are times in seconds and lose the suffix as a flag:
`save_every_s` is `--save-every`, and takes `90`, `90s`, `3m` or `1h`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from firstwords.errors import ConfigError
from firstwords.presets import Overrides, presets

Block = Literal["gpt2", "qwen3"]
OptimizerKind = Literal["adamw", "muon"]
Decay = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]
Compile = Literal["auto", "on", "off"]
OnNan = Literal["stop", "rollback"]
Until = Literal["end", "best"]
NONE = "none"
NONES = (NONE, "auto")  # what stands for "no value" where TOML and flags have no None
DEFAULT_FOR_S = 180.0  # of a run whose length nobody gave
MOST_ANGLES = 2**26  # of rotary positions, of which a model keeps cosine and sine: half a gigabyte
NEWTON_SCHULZ_STEPS = 5  # that Muon iterates


class Role(Flag):
    """What a key is in the life of a run, beside its value."""

    ORDINARY = 0  # weights depend on it, and a run goes on with what it recorded
    RESUMABLE = auto()  # may change when a run goes on
    UNTRAINED = auto()  # no weight depends on it
    TEXT = auto()  # makes the prepared text, which has a hash of its own, and what a tokenizer learns from
    PLACE = auto()  # recorded with the folders that it is in, where it is a file
    FIRST_WEIGHTS = auto()  # says only how a new model begins
    ADAPTABLE = auto()  # of a model: may be another when training goes on from it
    TIMELESS = auto()  # of a model: a step takes the same time, but for the size of the vocabulary, and dropping at all


def option(
    default: Any, meaning: str, *, least: float | None = None, most: float | None = None, role: Role = Role.ORDINARY
) -> Any:
    """Return a dataclass field with its meaning (shown by `--help`), its allowed range and its role."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "least": least, "most": most, "role": role})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT. The defaults are the chapter's."""

    vocab_size: int = option(
        50257, "size of the vocabulary; by default the tokenizer's", least=2, most=2**31, role=Role.TIMELESS
    )
    context_length: int = option(1024, "tokens that the model sees at once", least=1, most=2**20, role=Role.ADAPTABLE)
    emb_dim: int = option(768, "channels", least=1, most=2**20)
    n_heads: int = option(12, "attention heads", least=1, most=2**16)
    n_layers: int = option(12, "transformer blocks", least=1, most=2**14)
    drop_rate: float = option(
        0.1,
        "dropout; a laptop preset's grows with how often the text is read",
        least=0.0,
        most=0.999,
        role=Role.ADAPTABLE | Role.TIMELESS,
    )
    qkv_bias: bool = option(False, "bias in the query, key and value layers")
    block: Block = option("gpt2", "gpt2: LayerNorm, learned positions, GELU; qwen3: RMSNorm, rotary, QK-norm, SwiGLU")
    tied_head: bool = option(False, "the output head shares the weights of the token embedding")
    ff_dim: int | None = option(None, "width of the feed-forward layer; none: 4 x emb_dim", least=1, most=2**22)
    gelu_cubic: float = option(0.044715, "coefficient in GELU's tanh form (arXiv:1606.08415)", least=0.0, most=10.0)
    gelu_exact: bool = option(False, "GELU by the normal distribution itself, as nanoGPT has it, not in tanh form")
    rope_base: float = option(10000.0, "base of the rotary angles", least=1.0, most=1e9, role=Role.TIMELESS)
    norm_eps: float = option(1e-5, "epsilon of the norms", least=1e-12, most=1.0, role=Role.TIMELESS)
    init_std: float | None = option(
        None, "std of GPT-2's initialisation; none: PyTorch's own", least=0.0, most=10.0, role=Role.ADAPTABLE | Role.TIMELESS
    )
    table_std: float | None = option(
        None,
        "std of the token embedding's initialisation; none: as init_std says",
        least=0.0,
        most=10.0,
        role=Role.FIRST_WEIGHTS,
    )
    table_from_text: bool = option(
        False,
        "initialise half of the token embedding from what stands beside each token in the text",
        role=Role.FIRST_WEIGHTS,
    )
    induction_heads: bool = option(
        False, "begin with two heads that copy, in a qwen3 that has room for them", role=Role.FIRST_WEIGHTS
    )

    def __post_init__(self) -> None:
        _check_ranges(self, "model.")
        pairs = 2 if self.block == "qwen3" else 1
        what = ""
        if self.emb_dim % self.n_heads:
            what = f"{self.emb_dim} channels cannot be shared by {self.n_heads} heads"
        elif self.head_dim % pairs:
            what = f"rotary positions need an even head size, not {self.head_dim}"
        if what:
            do = f"the nearest widths are {nearest_multiples(self.emb_dim, pairs * self.n_heads)}"
            if self.emb_dim % pairs == 0:
                heads = nearest_divisors(self.emb_dim // pairs, self.n_heads)
                do += f"; or --model.n-heads {heads.replace(' and ', ' or ')}"
            raise ConfigError(what, where="--model.emb-dim", do=do)
        if self.block == "qwen3" and self.context_length * self.head_dim > MOST_ANGLES:
            what = f"{self.context_length:,} tokens are too many for heads of {self.head_dim} channels"
            do = f"allowed: up to {MOST_ANGLES // self.head_dim:,}"
            raise ConfigError(what, where="--model.context-length", why="their angles would fill the memory", do=do)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.emb_dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Channels inside the feed-forward layer."""
        return self.ff_dim or 4 * self.emb_dim


@dataclass(frozen=True)
class OptimConfig:
    """How gradients become updates, and the learning rate over the run."""

    kind: OptimizerKind = option("adamw", "muon: Muon for the blocks' matrices, AdamW for the rest")
    peak_lr: float = option(
        6e-4, "highest learning rate; a laptop preset's falls where a text is read very often", least=1e-12, most=1e12
    )
    floor_lr: float = option(0.0, "learning rate that the run falls to", least=0.0, most=1e12)
    warmup_steps: int = option(100, "steps of linear warm-up", least=0, most=10**9)
    decay: Decay = option("cosine", "shape of the way from peak_lr to floor_lr")
    weight_decay: float = option(0.1, "weight decay of matrices; norms and biases are not decayed", least=0.0, most=100.0)
    beta1: float = option(0.9, "AdamW's mean of gradients", least=0.0, most=0.9999)
    beta2: float = option(0.95, "AdamW's mean of squared gradients", least=0.0, most=0.99999)
    eps: float = option(1e-8, "AdamW's epsilon", least=0.0, most=1.0)
    momentum: float = option(0.95, "Muon's momentum", least=0.0, most=0.9999)
    max_grad_norm: float | None = option(1.0, "gradients are clipped to this norm; none: never", least=1e-9, most=1e9)

    def __post_init__(self) -> None:
        _check_ranges(self, "optim.")


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `None` means: decided from the text and the machine before step 1, and then recorded."""

    text: tuple[str, ...] = option((), "files and folders of text, or -; none: the built-in text", role=Role.TEXT)
    text_sha256: str | None = option(None, "the text that this run was made from; checked when given", role=Role.UNTRAINED)
    encoding: str | None = option(None, "encoding of the text files; by default recognised", role=Role.TEXT)
    val: str | None = option(None, "a held-out text; by default a share of the text itself", role=Role.TEXT | Role.PLACE)
    val_fraction: float = option(
        0.1,
        "share that is held out: the end of each document, or of many short documents some whole ones",
        least=0.0,
        most=0.9,
        role=Role.TEXT,
    )
    tokenizer: str = option(
        "bpe",
        "gpt2, bytes, bpe (trained on the text, of a size that fits it), bpe:N, or a run's tokenizer.json",
        role=Role.TEXT | Role.PLACE,
    )
    special_tokens: str = option(
        "", "texts that become tokens of their own, separated by commas: <|user|>,<|bot|>", role=Role.TEXT
    )
    from_: str | None = option(
        None,
        "a model to go on from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a run, a folder for transformers, a .pth",
        role=Role.PLACE,
    )
    preset: str = option(
        "laptop",
        "a named recipe, which the other keys override; by default laptop, or what suits a time budget",
        role=Role.UNTRAINED,
    )
    steps: int | None = option(None, "optimizer updates", least=1, most=10**9, role=Role.RESUMABLE)
    epochs: float | None = option(None, "passes over the training text", least=1e-6, most=1e6, role=Role.RESUMABLE)
    for_s: float | None = option(
        None,
        "train for this long, all in; by default 3m, without --steps and --epochs",
        least=1.0,
        most=1e9,
        role=Role.RESUMABLE,
    )
    until: Until = option(
        "end", "end, or best: stop when the held-out loss has turned, a few evaluations after its best", role=Role.RESUMABLE
    )
    meter: bool = option(
        True,
        "measure with the evaluations how much of what the model says is copied from the training text",
        role=Role.RESUMABLE,
    )
    shift_windows: bool = option(True, "cut the text into sequences at another place in each epoch")
    batch_size: int | None = option(None, "sequences per update; by default from the run's length", least=1, most=2**20)
    micro_batch_size: int | None = option(
        None, "sequences per forward pass; by default from the model's size", least=1, most=2**20, role=Role.RESUMABLE
    )
    eval_every: int | None = option(
        None,
        "steps between evaluations; by default a twentieth of the run, or more where that is short",
        least=1,
        most=10**9,
        role=Role.RESUMABLE,
    )
    eval_tokens: int | None = option(
        None,
        "held-out tokens of an evaluation, at most; by default from the time",
        least=1,
        most=10**15,
        role=Role.UNTRAINED,
    )
    sample_every: int | None = option(
        None, "steps between samples; by default with the evaluations", least=1, most=10**9, role=Role.UNTRAINED
    )
    sample_prompt: str = option(
        "", "how the samples during training begin; by default as a document does", role=Role.RESUMABLE
    )
    save_every_s: float | None = option(
        None,
        "time between checkpoints; by default a minute, or 50 times what the faster of the last two saves took",
        least=0.0,
        most=1e9,
        role=Role.RESUMABLE,
    )
    on_nan: OnNan = option(
        "stop", "when training diverges: stop, or go back to a checkpoint and leave its batches out", role=Role.RESUMABLE
    )
    keep: int = option(2, "newest checkpoints that are kept beside the best", least=2, most=10**6, role=Role.RESUMABLE)
    report: bool = option(True, "write report.html at the end of the run", role=Role.RESUMABLE)
    seed: int = option(123, "seed of the first weights, the order of the text and dropout", least=0, most=2**63 - 1)
    device: str = option("auto", "cpu, cuda, cuda:1, mps", role=Role.RESUMABLE)
    precision: Precision = option(
        "auto", "precision of the matrix products; auto: what is faster on this machine", role=Role.RESUMABLE
    )
    threads: int | None = option(
        None, "CPU threads; by default as many as there are cores to use", least=1, most=4096, role=Role.RESUMABLE
    )
    compile: Compile = option(
        "auto",
        "torch.compile; auto: where `bench --compile` measured that it pays, or a GPU is busy for long",
        role=Role.RESUMABLE,
    )
    trust_device: bool = option(
        False, "train on a device whose gradients differ from those of the CPU all the same", role=Role.RESUMABLE
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        _check_ranges(self, "")
        lengths = [name for name in ("steps", "epochs", "for_s") if getattr(self, name) is not None]
        if len(lengths) > 1:
            names = " and ".join(flag(name) for name in lengths)
            raise ConfigError(f"{names} both say how long to train", where=flag(lengths[1]), do="give one of them")
        if self.micro_batch_size and self.batch_size and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"a batch of {self.batch_size} does not divide into micro-batches of {self.micro_batch_size}",
                where="--micro-batch-size",
                do=f"the nearest are {nearest_divisors(self.batch_size, self.micro_batch_size)}",
            )

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU learns, once the device is decided."""
        return self.device.startswith("cpu")

    @property
    def budget_s(self) -> float | None:
        """The seconds that the run may take; None where it counts steps or epochs."""
        return self.for_s or (DEFAULT_FOR_S if self.steps is None and self.epochs is None else None)

    @property
    def special(self) -> tuple[str, ...]:
        """The texts that become tokens of their own."""
        return tuple(dict.fromkeys(filter(None, self.special_tokens.split(","))))


PARTS: tuple[tuple[str, type], ...] = (("", RunConfig), ("model.", ModelConfig), ("optim.", OptimConfig))
PART_NAMES = ("model", "optim")


def run_config(*layers: Overrides) -> RunConfig:
    """Return the configuration that the layers make, each overriding those before it, over the preset that they name.

    Raises:
        ConfigError: An unknown key or preset (the nearest is offered), a value of the wrong type or out of its range.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        given |= layer
    by_name = presets()
    preset = str(given.get("preset", RunConfig.preset))
    if preset not in by_name:
        raise ConfigError(f"no preset {preset!r}", where="--preset", do=did_you_mean(preset, by_name))
    given = _one_length({**by_name[preset], **given}, layers)
    parts: dict[str, dict[str, Any]] = {"": {}, "model": {}, "optim": {}}
    types_of = key_types()
    for key, value in given.items():
        require_known(key, types_of)
        part, _, name = key.rpartition(".")
        parts[part][name] = convert(key, value, types_of[key])
    return RunConfig(**parts[""], model=ModelConfig(**parts["model"]), optim=OptimConfig(**parts["optim"]))


def model_config(saved: Any, where: str) -> ModelConfig:
    """Return the shape of a model as a file has it: what `dataclasses.asdict` made of it.

    Raises:
        ConfigError: No table, an unknown key, a value of the wrong type or out of its range.
    """
    if not isinstance(saved, Mapping):
        raise ConfigError("has no table of the model's shape", where=where)
    kinds = get_type_hints(ModelConfig)
    if unknown := sorted(saved.keys() - kinds.keys()):
        raise ConfigError(f"unknown key {unknown[0][:80]!r}", where=where, do=did_you_mean(unknown[0][:80], kinds))
    try:
        return ModelConfig(**{name: convert(f"model.{name}", value, kinds[name]) for name, value in saved.items()})
    except ConfigError as error:  # told of the file, not of a flag that nobody gave
        key = error.where.removeprefix("--model.").replace("-", "_")
        raise ConfigError(error.what, where=f"{where}, {key}", why=error.why, do=error.do) from error


def _one_length(given: dict[str, Any], layers: Iterable[Overrides]) -> dict[str, Any]:
    """Return `given` with only the newest layer's word on how long to train: `--for` replaces a file's `steps`."""
    lengths = ("steps", "epochs", "for_s")
    named = [[name for name in lengths if layer.get(name) not in (None, *NONES)] for layer in layers]
    newest = next((names for names in reversed(named) if names), None)
    return {key: value for key, value in given.items() if newest is None or key not in lengths or key in newest}


@functools.cache  # to find out what the annotations say takes milliseconds, and every key of every command asks
def key_types() -> Mapping[str, Any]:
    """Return every dotted key of a run's configuration with its type."""
    return types.MappingProxyType(
        {
            prefix + name: kind
            for prefix, part in PARTS
            for name, kind in get_type_hints(part).items()
            if name not in PART_NAMES
        }
    )


@functools.cache
def fields_by_key() -> Mapping[str, dataclasses.Field[Any]]:
    """Return every dotted key with its dataclass field (default, meaning, range), in the order of the help page."""
    return types.MappingProxyType(
        {
            prefix + field.name: field
            for prefix, part in PARTS
            for field in dataclasses.fields(part)
            if field.name not in PART_NAMES
        }
    )


@functools.cache
def keys_of(role: Role) -> frozenset[str]:
    """Return the dotted keys that have a role, or one of several."""
    return frozenset(key for key, field in fields_by_key().items() if field.metadata["role"] & role)


def as_drawn() -> Overrides:
    """Return what makes the first weights of any model random: the chapter's way, which the defaults are."""
    fields = fields_by_key()
    return {key: fields[key].default for key in fields if key in keys_of(Role.FIRST_WEIGHTS)}


def choices(key: str) -> tuple[str, ...]:
    """Return the values that a key can have where they are few; empty otherwise."""
    kind = key_types()[key]
    if key == "preset":
        return tuple(presets())
    if kind is bool:
        return "true", "false"
    return tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()


def flag(key: str) -> str:
    """Return the command line's spelling of a key: `save_every_s` -> `--save-every`, `text` -> `TEXT`."""
    if key == "text":
        return "TEXT"
    return "--" + key.removesuffix("_s").rstrip("_").replace("_", "-")


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables, or configurations such as a `ModelConfig`, as one with dotted keys, and paths as text."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        within = dataclasses.asdict(value) if isinstance(value, ModelConfig | OptimConfig) else value
        if isinstance(within, Mapping):
            flat |= flatten(within, f"{prefix}{key}.")
        else:
            flat[prefix + key] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return flat


def require_known(key: str, known: Iterable[str]) -> None:
    """Raise a ConfigError for a key that is unknown, with the nearest that is known."""
    if key not in known:
        raise ConfigError(f"unknown key {key!r}", where=key, do=did_you_mean(key, known))


def convert(key: str, value: Any, wanted: Any) -> Any:
    """Return `value` (text from a flag, or a TOML value) as the type that `key` has.

    Raises:
        ConfigError: It cannot be one.
    """
    options = [kind for kind in get_args(wanted) if kind is not type(None)] if _is_union(wanted) else [wanted]
    if _is_union(wanted) and (value is None or value in NONES):
        return None
    kind = options[0]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"cannot be {value!r}", where=flag(key), do=did_you_mean(str(value), get_args(kind)))
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{value!r} is no list", where=flag(key), do="give a list of files and folders")
        return tuple(str(item) for item in value)
    if key.endswith("_s") and isinstance(value, str):
        return seconds(value, key)
    try:
        return _plain(value, kind)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{value!r} is no {_KINDS[kind]}", where=flag(key), do=_allowed(fields_by_key()[key])) from error


_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def _plain(value: Any, kind: Any) -> Any:
    if kind is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value)
    wrong = {bool: not isinstance(value, bool), str: not isinstance(value, str), int: isinstance(value, float)}
    if wrong.get(kind) or (kind is not bool and isinstance(value, bool)):
        raise TypeError
    return kind(value)


def seconds(text: str, key: str = "time") -> float:
    """Return a time in seconds: `90`, `90s`, `3m`, `1.5h`.

    Raises:
        ConfigError: The text is no time.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)?", text.strip())
    if not match:
        raise ConfigError(f"{text!r} is no time", where=flag(key), do="write 90, 90s, 3m or 1h")
    return float(match[1]) * {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600}[match[2]]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return what to do about an unknown name: the nearest known one, or all of them."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else "known: " + ", ".join(known)


def nearest_multiples(value: int, of: int) -> str:
    """Return the multiples of `of` around `value`, for a message."""
    below = value // of * of
    return " and ".join(str(good) for good in (below, below + of) if good > 0)


def nearest_divisors(value: int, to: int) -> str:
    """Return the divisors of `value` around `to`, for a message."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    near = {max(d for d in divisors if d <= to), min((d for d in divisors if d >= to), default=value)}
    return " and ".join(map(str, sorted(near)))


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _check_ranges(part: Any, prefix: str) -> None:
    """Raise a ConfigError for the first number of a dataclass that is outside its field's range."""
    for field in dataclasses.fields(part):
        value, least, most = getattr(part, field.name), field.metadata.get("least"), field.metadata.get("most")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        is_number = isinstance(value, int) or math.isfinite(value)  # no float holds a whole number of 400 digits
        if not is_number or (least is not None and value < least) or (most is not None and value > most):
            raise ConfigError(f"cannot be {_shown(value)}", where=flag(prefix + field.name), do=_allowed(field))


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # as in `from_toml`
        return "so long a number"


def _allowed(field: dataclasses.Field[Any]) -> str:
    """Return what a field may be, for a message."""
    least, most = field.metadata["least"], field.metadata["most"]
    if least is None and most is None:
        return f"it means: {field.metadata['meaning']}"
    return " ".join(("allowed: from", str(least), *(() if most is None else ("to", str(most)))))
