"""One name a key, one place a range, and TOML that reads back as it was written."""

from __future__ import annotations

import re

import pytest

from firstwords.config import Block, ModelConfig, flatten, key_types, run_config
from firstwords.config_file import from_toml, to_toml
from firstwords.errors import ConfigError
from firstwords.presets import GPT_CONFIG_124M, presets


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_reads_back_from_its_own_toml(name: str) -> None:
    config = run_config({"preset": name, "seed": 7})
    assert run_config(from_toml(to_toml(config), "config.toml")) == config


def test_a_value_of_none_survives_toml_although_its_preset_has_one() -> None:
    config = run_config({"optim.max_grad_norm": "none"})
    assert config.optim.max_grad_norm is None
    assert run_config(from_toml(to_toml(config), "config.toml")).optim.max_grad_norm is None


def test_later_layers_win_over_earlier_ones_and_all_over_the_preset() -> None:
    config = run_config({"batch_size": 3, "seed": 1}, {"seed": "2"})
    assert (config.batch_size, config.seed, config.model.emb_dim) == (3, 2, presets()["laptop"]["model.emb_dim"])


@pytest.mark.parametrize("length", [{"steps": 5}, {"epochs": 1.5}, {"for_s": "2m"}])
def test_the_newest_word_on_how_long_to_train_replaces_the_others(length: dict[str, object]) -> None:
    config = run_config({"preset": "chapter", "epochs": 10}, length)
    given = [name for name in ("steps", "epochs", "for_s") if getattr(config, name) is not None]
    assert given == list(length)


def test_a_model_config_may_stand_where_its_keys_may() -> None:
    model = ModelConfig(n_layers=3, emb_dim=96)
    assert flatten({"model": model, "seed": 2}) == {**flatten({"model": vars(model)}), "seed": 2}


def test_the_chapters_dict_is_a_model_config() -> None:
    config = ModelConfig(**GPT_CONFIG_124M)  # type: ignore[arg-type]
    assert (config.context_length, config.block, config.tied_head, config.gelu_cubic) == (256, "gpt2", False, 0.044715)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.n_layer", 3, "model.n_layers"),
        ("steps", "many", "whole number"),
        ("steps", 2.5, "whole number"),
        ("steps", 0, "from 1"),
        ("optim.peak_lr", "nan", "allowed"),
        ("optim.peak_lr", "1e999", "allowed"),
        ("batch_size", True, "whole number"),
        ("precision", "flaot32", "float32"),
        ("preset", "labtop", "laptop"),
        ("for_s", "3 weeks", "3m"),
        ("model.emb_dim", 100, "96 and 102"),
        ("model.tied_head", "maybe", "true or false"),
        ("text", 3, "list"),
    ],
)
def test_an_unknown_key_or_impossible_value_is_refused_with_what_would_do(key: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_config({key: value})


def test_micro_batches_must_divide_the_batch() -> None:
    with pytest.raises(ConfigError, match="4 and 8"):
        run_config({"batch_size": 16, "micro_batch_size": 5})


def test_times_are_read_as_people_write_them() -> None:
    assert [run_config({"for_s": text}).for_s for text in ("90", "90s", "3m", "1.5h", 45)] == [90, 90, 180, 5400, 45]


def test_every_key_has_a_type_that_can_be_converted() -> None:
    assert len(key_types()) > 40


@pytest.mark.parametrize(
    ("device", "on_cpu"), [("cpu", True), ("cpu:0", True), ("cuda", False), ("cuda:1", False), ("mps", False)]
)
def test_a_device_is_a_processor_whatever_its_number(device: str, on_cpu: bool) -> None:
    assert run_config({"device": device}).on_cpu is on_cpu


@pytest.mark.parametrize("block", ["gpt2", "qwen3"])
@pytest.mark.parametrize("emb_dim", [99, 100, 101])
def test_the_widths_that_are_named_for_a_wrong_one_are_right(block: Block, emb_dim: int) -> None:
    n_heads = 3 if block == "qwen3" else 7
    with pytest.raises(ConfigError, match="the nearest widths are") as refused:
        ModelConfig(emb_dim=emb_dim, n_heads=n_heads, block=block)
    widths, heads = (re.findall(r"\d+", part) for part in f"{refused.value.do};".split(";")[:2])
    assert len(widths) == 2
    for width in map(int, widths):
        assert ModelConfig(emb_dim=width, n_heads=n_heads, block=block).emb_dim == width
    assert bool(heads) is (block == "gpt2" or emb_dim % 2 == 0)  # no head of an odd width is of an even size
    for number in map(int, heads):
        assert ModelConfig(emb_dim=emb_dim, n_heads=number, block=block).n_heads == number


def test_a_context_whose_angles_would_fill_the_memory_is_refused_with_what_is_allowed() -> None:
    shape = {"block": "qwen3", "emb_dim": 512, "n_heads": 1}
    with pytest.raises(ConfigError, match="up to 131,072"):
        ModelConfig(**shape, context_length=131_073)  # type: ignore[arg-type]
    assert ModelConfig(**shape, context_length=131_072).head_dim == 512  # type: ignore[arg-type]
    assert ModelConfig(**{**shape, "block": "gpt2"}, context_length=131_073).head_dim == 512  # type: ignore[arg-type]
