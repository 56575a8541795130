"""At GPT-2's own sizes, and with other tools' own weights and code: what comes in and what goes out is the same model.

Minutes and gigabytes, and packages that are fetched, so these run only where `make peers` asks for them.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from firstwords import api
from firstwords.config import ModelConfig, run_config
from firstwords.model import cost
from firstwords.model.gpt import GPTModel
from firstwords.model.language_model import LanguageModel
from firstwords.presets import GPT_CONFIG_124M
from firstwords.text.tokenizer import gpt2
from firstwords.weights import export, reader, shapes

PACKAGES = os.environ.get("FIRSTWORDS_PEERS")  # where the other tools' packages are unpacked
TOLERANCE = (
    1e-4  # of logits in float32, whose sums run in another order; the smallest were seen at 1e-6, the largest at 4e-5
)
PROMPTS, STRINGS = 20, 1000
QWEN3 = ModelConfig(50257, 1024, 768, 12, 12, 0.0, block="qwen3", tied_head=True, init_std=0.02, norm_eps=1e-6, ff_dim=2048)

pytestmark = pytest.mark.skipif(PACKAGES is None, reason="make peers")


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a foreign package warns of is not ours to mend
            yield pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def all_cores() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


def prompts(vocab_size: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(vocab_size) for _ in range(draw.randrange(1, 65))] for _ in range(PROMPTS)]


@torch.no_grad()
def distance(ours: GPTModel, theirs: Any) -> float:
    """The largest difference of the logits of 20 prompts."""
    tensors = (torch.tensor([prompt]) for prompt in prompts(ours.config.vocab_size))
    pairs = ((ours(ids), theirs(ids).logits) for ids in tensors)
    return max(float((a - b).abs().max()) for a, b in pairs)


def strings() -> list[str]:
    """A thousand texts of many scripts, with control characters, runs of spaces, and the word for the end of a text."""
    draw = random.Random(2)
    kinds = [(1, 32), (32, 127), (0xA0, 0x250), (0x400, 0x500), (0x600, 0x700), (0x4E00, 0x5000), (0x1F300, 0x1F650)]

    def letter() -> str:
        return draw.choice(" \n\t'’\u3000") if draw.random() < 0.3 else chr(draw.randrange(*draw.choice(kinds)))

    texts = ["".join(letter() for _ in range(draw.randrange(1, 80))) for _ in range(STRINGS - 1)]
    return [*texts, "a<|endoftext|>b"]


def theirs_of(config: ModelConfig, transformers: Any) -> Any:
    """A model of transformers with random weights."""
    torch.manual_seed(3)
    settings = shapes.to_hf(config, 50256)
    settings.pop(shapes.OWN)
    if config.block == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings)).eval()
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt2-355m", "qwen3"])
def test_a_model_of_transformers_comes_in_and_goes_out_again(name: str, tmp_path: Path, transformers: Any) -> None:
    config = QWEN3 if name == "qwen3" else run_config({"preset": name}).model
    theirs = theirs_of(config, transformers)
    theirs.save_pretrained(tmp_path / "theirs")
    lm = reader.read(tmp_path / "theirs", tokenizer="gpt2")
    assert sum(parameter.numel() for parameter in lm.model.parameters()) == cost.parameters(lm.model.config)
    assert (lm.model.out_head.weight is lm.model.tok_emb.weight) == config.tied_head
    there = distance(lm.model, theirs)
    del theirs
    export.to_hf(lm, tmp_path / "ours", "card")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", local_files_only=True).eval()
    back = distance(lm.model, again)
    print(f"\n{name}: logits of {PROMPTS} prompts differ by {there:.1e} coming in, by {back:.1e} going out")
    assert max(there, back) <= TOLERANCE
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours", local_files_only=True)
    for text in strings():
        pieces = text.split("<|endoftext|>")  # theirs takes the word for the token itself, ours is told where it stands
        wanted = [token for piece in pieces for token in [gpt2().end_of_text, *gpt2().encode(piece)]][1:]
        assert tokenizer(text, add_special_tokens=False).input_ids == wanted


def test_gpt2_is_counted_as_the_chapter_counts_it() -> None:
    assert cost.parameters(run_config({"preset": "gpt2-124m"}).model) == 124_439_808
    with torch.device("meta"):  # the chapter's own: no biases of queries, keys and values, but a head, and a context of 256
        assert sum(parameter.numel() for parameter in GPTModel(GPT_CONFIG_124M).parameters()) == 162_419_712


def test_real_weights_of_gpt2s_shape_come_in(tmp_path: Path, transformers: Any) -> None:
    """Of the package microformer-mgm (MIT): eight blocks of 256 channels, a pickled file that was saved on a GPU."""
    (folder,) = Path(str(PACKAGES)).glob("**/general_model")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, local_files_only=True).eval()
    lm = reader.read(folder, tokenizer="bytes")
    found = distance(lm.model, theirs)
    print(f"\nmicroformer-mgm: logits of {PROMPTS} prompts differ by {found:.1e}")
    assert found <= TOLERANCE


def test_the_chapters_own_code_takes_our_state_dict_strictly(tmp_path: Path) -> None:
    chapter = pytest.importorskip("llms_from_scratch.ch04")
    for qkv_bias, tied in ((False, False), (True, True)):
        torch.manual_seed(4)
        config = ModelConfig(**{**GPT_CONFIG_124M, "qkv_bias": qkv_bias, "tied_head": tied, "drop_rate": 0.0})
        lm = LanguageModel(GPTModel(config).eval(), gpt2())
        export.to_pth(lm, tmp_path / f"{qkv_bias}.pth")
        theirs = chapter.GPTModel({**GPT_CONFIG_124M, "qkv_bias": qkv_bias, "drop_rate": 0.0}).eval()
        state = torch.load(tmp_path / f"{qkv_bias}.pth", weights_only=True)
        theirs.load_state_dict(state, strict=True)
        with torch.no_grad():
            for prompt in prompts(config.vocab_size):
                ids = torch.tensor([prompt])
                # Tied to embeddings of variance 1, logits come to hundreds, of which float32 keeps seven digits.
                torch.testing.assert_close(theirs(ids), lm.model(ids), atol=TOLERANCE, rtol=1e-6)


def test_going_on_makes_a_model_from_elsewhere_better(tmp_path: Path, transformers: Any, texts: Path) -> None:
    theirs = theirs_of(ModelConfig(50257, 64, 128, 4, 2, 0.0, qkv_bias=True, tied_head=True, init_std=0.02), transformers)
    theirs.save_pretrained(tmp_path / "theirs")
    gpt2_json = tmp_path / "theirs/tokenizer.json"
    gpt2_json.write_bytes(gpt2().json)
    text = texts / "tinyshakespeare.txt"
    run = api.train(
        text,
        out=tmp_path / "run",
        from_=str(tmp_path / "theirs"),
        steps=100,
        batch_size=8,
        eval_every=100,
        val_fraction=0.02,
    )
    evaluations = [line for line in api.RunFolder(tmp_path / "run").metrics.lines() if line["event"] == "evaluation"]
    assert run.bits_per_byte is not None
    print(f"\nheld-out bits per byte: {evaluations[0]['bits_per_byte']:.3f} before, {run.bits_per_byte:.3f} after 100 steps")
    assert run.bits_per_byte < evaluations[0]["bits_per_byte"] - 1  # the words' frequencies alone are worth that
    lm = api.load(tmp_path / "run")
    assert lm.model.out_head.weight is lm.model.tok_emb.weight
