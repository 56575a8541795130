"""The chapter's numbers: those that it publishes, and those of the notes, whose GELU has another coefficient."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from torch import Tensor

from firstwords import GPT_CONFIG_124M, generate_text_simple, gpt2_tokenizer, text_to_token_ids, token_ids_to_text
from firstwords.config import ModelConfig, run_config
from firstwords.model import cost
from firstwords.model.gpt import GELU, GPTModel
from firstwords.model.loss import perplexity, target_nats
from firstwords.text.sources import read
from firstwords.text.tokenizer import gpt2

# On one worker, so that the models of 124M parameters are built once.
pytestmark = pytest.mark.xdist_group("gpt2-124m")

INPUTS = torch.tensor([[16833, 3626, 6100], [40, 1107, 588]])
TARGETS = torch.tensor([[3626, 6100, 345], [1107, 588, 11311]])
# The values are printed with 4 decimals, so they may be 0.5e-4 off; 0.1e-4 is for float32 sums in another CPU's order.
FOUR_DECIMALS = 0.6e-4
PERPLEXITY = 0.1  # one float32 step of a loss of 10.79 is 0.046 of perplexity
PUBLISHED, NOTES = 0.044715, 0.44715  # the cubic coefficient of GELU


@dataclass(frozen=True)
class Numbers:
    """What the chapter prints of the untrained model."""

    babble: str
    argmax: tuple[int, ...]
    argmax_text: str
    probabilities: tuple[str, ...]  # of the six targets, as printed
    logs: tuple[float, ...]
    cross_entropy: float
    perplexity: float


SAME_GUESSES = (16657, 339, 42826, 49906, 29669, 41751)
EXPECTED = {
    PUBLISHED: Numbers(
        babble="Every effort moves you rentingetic wasnم refres RexMeCHicular stren",
        argmax=SAME_GUESSES,
        argmax_text=" Armed heNetflix",
        probabilities=("7.4541e-05", "3.1061e-05", "1.1563e-05", "1.0337e-05", "5.6776e-05", "4.7559e-06"),
        logs=(-9.5042, -10.3796, -11.3677, -11.4798, -9.7764, -12.2561),
        cross_entropy=10.7940,
        perplexity=48725.82,
    ),
    NOTES: Numbers(
        babble="Every effort moves you rentingetic wasnم refres RexAngel infieldcigans",
        argmax=SAME_GUESSES,
        argmax_text=" Armed heNetflix",
        probabilities=("7.2671e-05", "3.1046e-05", "1.1696e-05", "1.0426e-05", "5.4604e-05", "4.7716e-06"),
        logs=(-9.5296, -10.3800, -11.3563, -11.4712, -9.8154, -12.2528),
        cross_entropy=10.8009,
        perplexity=49064.168,
    ),
}
# The first and last three probabilities of each place of the first input, which only the notes print.
NOTES_EDGES = (
    ("1.9582e-05", "1.5537e-05", "1.1597e-05", "2.2041e-05", "7.0134e-06", "1.8575e-05"),
    ("9.3378e-06", "1.0149e-05", "7.7960e-06", "2.8831e-05", "6.1058e-06", "1.2983e-05"),
    ("2.8943e-05", "8.6889e-06", "1.5495e-05", "3.6617e-05", "1.3867e-05", "1.2969e-05"),
)
BLOCK = """\
    ({}): TransformerBlock(
      (att): MultiHeadAttention(
        (W_query): Linear(in_features=768, out_features=768, bias=False)
        (W_key): Linear(in_features=768, out_features=768, bias=False)
        (W_value): Linear(in_features=768, out_features=768, bias=False)
        (out_proj): Linear(in_features=768, out_features=768, bias=True)
        (dropout): Dropout(p=0.1, inplace=False)
      )
      (ff): FeedForward(
        (layers): Sequential(
          (0): Linear(in_features=768, out_features=3072, bias=True)
          (1): GELU()
          (2): Linear(in_features=3072, out_features=768, bias=True)
        )
      )
      (norm1): LayerNorm()
      (norm2): LayerNorm()
      (drop_shortcut): Dropout(p=0.1, inplace=False)
    )
"""
BEFORE_BLOCKS = """\
GPTModel(
  (tok_emb): Embedding(50257, 768)
  (pos_emb): Embedding(256, 768)
  (drop_emb): Dropout(p=0.1, inplace=False)
  (trf_blocks): Sequential(
"""
AFTER_BLOCKS = """\
  )
  (final_norm): LayerNorm()
  (out_head): Linear(in_features=768, out_features=50257, bias=False)
)"""


@dataclass(frozen=True)
class Seen:
    """What our model gives where the chapter prints something; small, so that the model itself can go."""

    babble: str
    probabilities: Tensor  # (2, 3, V)
    cross_entropy: float


@dataclass(frozen=True)
class Untrained:
    """The chapter's model after `torch.manual_seed(123)`."""

    tree: str
    n_parameters: int
    by_cubic: dict[float, Seen]


def built(config: dict[str, Any]) -> GPTModel:
    torch.manual_seed(123)
    return GPTModel(config).eval()


def count(model: GPTModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def seen(model: GPTModel, tokeniser: tiktoken.Encoding) -> Seen:
    prompt = text_to_token_ids("Every effort moves you", tokeniser)
    logits = model(INPUTS)
    return Seen(
        token_ids_to_text(generate_text_simple(model, prompt, 10, 256), tokeniser),
        torch.softmax(logits, dim=-1),
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten()).item(),
    )


@pytest.fixture(scope="session")
def tokeniser() -> tiktoken.Encoding:
    return gpt2_tokenizer()


@pytest.fixture(scope="session")
def untrained(tokeniser: tiktoken.Encoding) -> Untrained:
    """Build the 124M model once: the coefficient of GELU is no weight, so it can be changed in place."""
    model = built(GPT_CONFIG_124M)
    by_cubic = {}
    for cubic in (PUBLISHED, NOTES):
        for module in model.modules():
            if isinstance(module, GELU):
                module.cubic = cubic
        by_cubic[cubic] = seen(model, tokeniser)
    return Untrained(str(model), count(model), by_cubic)


@pytest.fixture(scope="module")
def long_context() -> GPTModel:
    """Chapter 4's model, which sees 1,024 tokens."""
    return built(GPT_CONFIG_124M | {"context_length": 1024})


def at_targets(probabilities: Tensor) -> Tensor:
    return probabilities.gather(-1, TARGETS.unsqueeze(-1)).flatten()


def furthest_digit(values: Tensor, printed: tuple[str, ...]) -> int:
    """Return by how many units of the last printed digit a value differs from its print, at most."""
    pairs = [(Decimal(f"{value:.4e}"), Decimal(text)) for value, text in zip(values.tolist(), printed, strict=True)]
    return max(int(abs(ours - theirs) / Decimal(1).scaleb(theirs.as_tuple().exponent)) for ours, theirs in pairs)


# The untrained model


@pytest.mark.parametrize("cubic", EXPECTED)
def test_untrained_model_babbles_the_chapters_text(untrained: Untrained, cubic: float) -> None:
    assert untrained.by_cubic[cubic].babble == EXPECTED[cubic].babble


@pytest.mark.parametrize("cubic", EXPECTED)
def test_likeliest_tokens_are_the_chapters(untrained: Untrained, cubic: float, tokeniser: tiktoken.Encoding) -> None:
    argmax = untrained.by_cubic[cubic].probabilities.argmax(dim=-1)
    assert tuple(argmax.flatten().tolist()) == EXPECTED[cubic].argmax
    assert token_ids_to_text(argmax[0], tokeniser) == EXPECTED[cubic].argmax_text


@pytest.mark.parametrize("cubic", EXPECTED)
def test_target_probabilities_are_within_one_of_the_last_printed_digit(untrained: Untrained, cubic: float) -> None:
    # Ours was seen as 7.4540e-05 where the chapter prints 7.4541e-05: float32 sums in another order.
    assert furthest_digit(at_targets(untrained.by_cubic[cubic].probabilities), EXPECTED[cubic].probabilities) <= 1


@pytest.mark.parametrize("place", range(3))
def test_probabilities_of_the_first_input_are_those_of_the_notes(untrained: Untrained, place: int) -> None:
    row = untrained.by_cubic[NOTES].probabilities[0, place]
    assert furthest_digit(torch.cat((row[:3], row[-3:])), NOTES_EDGES[place]) <= 1


@pytest.mark.parametrize("cubic", EXPECTED)
def test_six_steps_give_the_chapters_logs_cross_entropy_and_perplexity(untrained: Untrained, cubic: float) -> None:
    ours, expected = untrained.by_cubic[cubic], EXPECTED[cubic]
    logs = torch.log(at_targets(ours.probabilities))
    assert logs.tolist() == pytest.approx(expected.logs, abs=FOUR_DECIMALS)
    assert -logs.mean().item() == pytest.approx(expected.cross_entropy, abs=FOUR_DECIMALS)
    assert ours.cross_entropy == pytest.approx(expected.cross_entropy, abs=FOUR_DECIMALS)
    assert ours.cross_entropy == pytest.approx(-logs.mean().item(), rel=1e-6)  # float32 rounds at 6e-8, some 10 times
    assert perplexity(ours.cross_entropy) == pytest.approx(expected.perplexity, abs=PERPLEXITY)


def test_the_two_sets_of_numbers_are_told_apart_by_the_tolerances() -> None:
    published, notes = EXPECTED[PUBLISHED], EXPECTED[NOTES]
    assert abs(published.cross_entropy - notes.cross_entropy) > 100 * FOUR_DECIMALS
    assert abs(published.perplexity - notes.perplexity) > 100 * PERPLEXITY
    assert furthest_digit(torch.tensor([float(text) for text in notes.probabilities]), published.probabilities) > 100


def test_gelu_cubic_of_the_config_reaches_every_block_and_defaults_to_gpt2s() -> None:
    small = {"vocab_size": 11, "context_length": 4, "emb_dim": 8, "n_heads": 2, "n_layers": 3}
    for config, expected in ((small, PUBLISHED), (small | {"gelu_cubic": NOTES}, NOTES)):
        assert [module.cubic for module in GPTModel(config).modules() if isinstance(module, GELU)] == 3 * [expected]


def test_gelu_is_its_formula_for_any_coefficient() -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    for cubic in (PUBLISHED, NOTES):
        formula = x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + cubic * x.pow(3))))
        torch.testing.assert_close(GELU(cubic)(x), formula, rtol=0, atol=1e-14)  # float64 rounds at 1e-16, some 10 times


def test_fused_loss_is_the_chapters_cross_entropy(long_context: GPTModel) -> None:
    with torch.no_grad():
        features = long_context.features(INPUTS)
        nats = target_nats(features, long_context.out_head.weight, TARGETS)
        whole = torch.nn.functional.cross_entropy(long_context.out_head(features).flatten(0, 1), TARGETS.flatten())
    # Both are float32, which rounds at 6e-8, and sum the vocabulary in orders of their own.
    assert nats.item() / TARGETS.numel() == pytest.approx(whole.item(), rel=1e-6)


def test_printed_model_is_the_chapters_tree(untrained: Untrained) -> None:
    assert untrained.tree == BEFORE_BLOCKS + "".join(BLOCK.format(layer) for layer in range(12)) + AFTER_BLOCKS


def test_chapter_4s_model_goes_on_with_the_chapters_ids(long_context: GPTModel, tokeniser: tiktoken.Encoding) -> None:
    ids = generate_text_simple(long_context, text_to_token_ids("Hello, I am", tokeniser), 10, 1024)
    new = [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]
    assert ids.tolist() == [[15496, 11, 314, 716, *new]]


# Tokens


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Every effort moves you", [6109, 3626, 6100, 345]),
        ("Hello, I am", [15496, 11, 314, 716]),
        ("Hello, world. Is this-- a test?", [15496, 11, 995, 13, 1148, 428, 438, 257, 1332, 30]),
    ],
)
def test_texts_have_the_chapters_ids_and_come_back(text: str, ids: list[int], tokeniser: tiktoken.Encoding) -> None:
    assert text_to_token_ids(text, tokeniser).tolist() == [ids]
    assert token_ids_to_text(torch.tensor([ids]), tokeniser) == text
    assert gpt2().encode(text) == ids


def test_examples_are_the_chapters_words(tokeniser: tiktoken.Encoding) -> None:
    assert [token_ids_to_text(row, tokeniser) for row in INPUTS] == ["every effort moves", "I really like"]
    assert [token_ids_to_text(row, tokeniser) for row in TARGETS] == [" effort moves you", " really like chocolate"]


def test_the_verdict_has_the_chapters_characters_and_tokens(texts: Path) -> None:
    (document,) = read([texts / "the-verdict.txt"])
    text = "".join(document.pieces())
    assert len(text) == 20_479
    assert len(gpt2().encode(text)) == 5_145


# Parameters


def test_chapter_model_has_162_million_parameters(untrained: Untrained) -> None:
    assert untrained.n_parameters == 162_419_712
    assert cost.parameters(ModelConfig(**GPT_CONFIG_124M)) == 162_419_712


def test_model_of_1024_tokens_has_163_million_parameters_and_124_with_a_tied_head(long_context: GPTModel) -> None:
    assert count(long_context) == 163_009_536
    assert count(long_context) - long_context.out_head.weight.numel() == 124_412_160
    assert cost.parameters(ModelConfig(tied_head=False)) == 163_009_536
    assert cost.parameters(ModelConfig(tied_head=True)) == 124_412_160


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-355m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1558m", 1_557_611_200),
    ],
)
def test_presets_have_the_parameters_of_gpt2s_releases(preset: str, expected: int) -> None:
    assert cost.parameters(run_config({"preset": preset}).model) == expected


@pytest.mark.parametrize("block", ["gpt2", "qwen3"])
@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("ff_dim", [None, 20])
def test_counted_parameters_are_those_of_the_model(block: Any, tied_head: bool, qkv_bias: bool, ff_dim: int | None) -> None:
    # Sizes without common factors, so that no term can stand for another.
    config = ModelConfig(
        vocab_size=53,
        context_length=7,
        emb_dim=24,
        n_heads=2,
        n_layers=3,
        block=block,
        tied_head=tied_head,
        qkv_bias=qkv_bias,
        ff_dim=ff_dim,
    )
    assert cost.parameters(config) == count(GPTModel(config))
