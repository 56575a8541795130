"""Models come in from other tools and go out to them, and are the same models there: logits, ids, weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import TINY_FLAGS, Command, Refused, write
from firstwords import api
from firstwords.config import ModelConfig
from firstwords.errors import CannotCreateError, ConfigError, DataError, DivergedError
from firstwords.model.gpt import GPTModel
from firstwords.model.language_model import LanguageModel
from firstwords.text.tokenizer import byte_tokenizer, gpt2, train_bpe
from firstwords.weights import export, names, reader, shapes

TOLERANCE = 1e-5  # of logits up to 1; float32 sums in another order were seen to differ by 5e-7
GPT2 = ModelConfig(257, 32, 64, 4, 3, 0.0, qkv_bias=True, tied_head=True, init_std=0.1)
QWEN3 = dataclasses.replace(GPT2, block="qwen3", qkv_bias=False, norm_eps=1e-6, ff_dim=96)
SHAPES = {
    "gpt2": GPT2,
    "gpt2 untied, no qkv bias": dataclasses.replace(GPT2, tied_head=False, qkv_bias=False),
    "gpt2 narrow": dataclasses.replace(GPT2, ff_dim=80),
    "gpt2 exact GELU": dataclasses.replace(GPT2, gelu_exact=True),
    "qwen3": QWEN3,
    "qwen3 untied": dataclasses.replace(QWEN3, tied_head=False, rope_base=1e6),
    "qwen3 with biases": dataclasses.replace(QWEN3, qkv_bias=True),
}
STRINGS = ["", "a", "Grüße, 世界 🙂", "\x00\x1b\r\n\t ", "<|endoftext|>", " two  spaces", "don't 1234567 +-*/", "e\u0301"]


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a foreign package warns of is not ours to mend
            module = pytest.importorskip("transformers")
            for name in ("GPT2Config", "GPT2LMHeadModel", "Qwen3Config", "Qwen3ForCausalLM", "AutoTokenizer"):
                getattr(module, name)
            yield module


def drawn(config: ModelConfig) -> LanguageModel:
    """A model with every parameter drawn, norms and biases too, so that none can be mixed up unnoticed."""
    generator = torch.Generator().manual_seed(123)
    model = GPTModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("scale") else 0.0, 0.1, generator=generator)
    return LanguageModel(model, byte_tokenizer())


def ids() -> torch.Tensor:
    return torch.randint(256, (20, 32), generator=torch.Generator().manual_seed(1))  # 20 prompts


@torch.no_grad()
def distance(ours: GPTModel, theirs: Any) -> float:
    return float((ours(ids()) - theirs(ids()).logits).abs().max())


def same(a: GPTModel, b: GPTModel) -> bool:
    weights = dict(b.named_parameters())
    names_of = [name for name, _ in a.named_parameters()]
    return names_of == list(weights) and all(torch.equal(p, weights[name]) for name, p in a.named_parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_exported_is_the_same_model_in_transformers_and_comes_back_the_same(
    shape: str, tmp_path: Path, transformers: Any
) -> None:
    lm = drawn(SHAPES[shape])
    assert export.to_hf(lm, tmp_path / "hf", "card")[0] <= TOLERANCE
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True).eval()
    assert distance(lm.model, theirs) <= TOLERANCE
    back = reader.read(tmp_path / "hf")
    assert back.model.config == lm.model.config
    assert back.tokenizer.ranks == lm.tokenizer.ranks
    assert same(back.model, lm.model)


def test_a_bias_that_transformers_has_trained_comes_back(tmp_path: Path, transformers: Any) -> None:
    lm = drawn(SHAPES["gpt2 untied, no qkv bias"])
    export.to_hf(lm, tmp_path / "hf", "card")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    theirs(ids(), labels=ids()).loss.backward()
    torch.optim.SGD(theirs.parameters(), 0.1).step()
    theirs.eval().save_pretrained(tmp_path / "trained")
    back = reader.read(tmp_path / "trained", tokenizer="bytes").model
    assert back.config == dataclasses.replace(lm.model.config, qkv_bias=True)
    assert distance(back, theirs) <= TOLERANCE
    with torch.no_grad():
        back.get_parameter("trf_blocks.0.att.W_value.bias").zero_()
    assert distance(back, theirs) > TOLERANCE  # the negative control


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), train_bpe(["the cat sat on the mat, the cat " * 50], 300)])
def test_their_tokenizer_gives_our_ids(tokenizer: Any, tmp_path: Path, transformers: Any) -> None:
    lm = dataclasses.replace(drawn(dataclasses.replace(GPT2, vocab_size=300)), tokenizer=tokenizer)
    export.to_hf(lm, tmp_path / "hf", "card")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # version 4 would add token types by itself
    random = torch.Generator().manual_seed(2)
    drawn_strings = ["".join(map(chr, torch.randint(1, 0x3000, (20,), generator=random).tolist())) for _ in range(200)]
    for text in (*STRINGS, *drawn_strings):
        plain = text.replace("<|endoftext|>", "< |endoftext|>")  # theirs takes the word for the token itself
        assert theirs(plain, add_special_tokens=False).input_ids == tokenizer.encode(plain)
    assert theirs("<|endoftext|>").input_ids == [tokenizer.end_of_text]


@pytest.mark.parametrize("wrapped", [False, True], ids=["whole", "without its prefix, with masks"])
def test_a_model_of_transformers_comes_in(wrapped: bool, tmp_path: Path, transformers: Any) -> None:
    settings = {"vocab_size": 257, "n_positions": 32, "n_embd": 64, "n_head": 4, "n_layer": 3}
    torch.manual_seed(3)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, bos_token_id=None, eos_token_id=None)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    if wrapped:  # as OpenAI's own weights lie on the hub
        state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
        state.pop("lm_head.weight")
        state |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril().bool() for layer in range(3)}
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    lm = reader.read(tmp_path / "hf", tokenizer="bytes")
    assert distance(lm.model, theirs) <= TOLERANCE
    assert lm.model.out_head.weight is lm.model.tok_emb.weight


def test_a_sharded_qwen3_comes_in(tmp_path: Path, transformers: Any) -> None:
    settings = shapes.to_hf(QWEN3, 256)
    settings.pop(shapes.OWN)
    torch.manual_seed(4)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings)).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert distance(reader.read(tmp_path / "hf", tokenizer="bytes").model, theirs) <= TOLERANCE


def test_nanogpts_checkpoint_comes_in_with_its_own_gelu(tmp_path: Path, transformers: Any) -> None:
    settings = {"vocab_size": 257, "n_positions": 32, "n_embd": 64, "n_head": 4, "n_layer": 3, "activation_function": "gelu"}
    torch.manual_seed(5)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, bos_token_id=None, eos_token_id=None)).eval()
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # nanoGPT's linear layers are PyTorch's
    state = {f"module._orig_mod.{n}": t.T.contiguous() if n.endswith(turned) else t for n, t in theirs.state_dict().items()}
    arguments = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 32, "bias": True, "vocab_size": 257, "dropout": 0.0}
    torch.save({"model": state, "model_args": arguments, "iter_num": 7}, tmp_path / "ckpt.pt")
    lm = reader.read(tmp_path / "ckpt.pt", tokenizer="bytes")
    assert distance(lm.model, theirs) <= TOLERANCE
    wrong = GPTModel(dataclasses.replace(lm.model.config, gelu_exact=False)).eval()
    wrong.load_state_dict(lm.model.state_dict())
    assert distance(wrong, theirs) > TOLERANCE


def test_nanogpts_checkpoint_without_biases_comes_in(tmp_path: Path) -> None:
    lm = drawn(dataclasses.replace(GPT2, qkv_bias=False, gelu_exact=True))
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if name.endswith(("bias", "shift")):
                parameter.zero_()
    theirs = names.to_theirs(lm.model.config, "nanogpt", dict(lm.model.named_parameters()))
    state = {name: tensor.detach().clone() for name, tensor in theirs.items() if not name.endswith("bias")}
    arguments = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 32, "bias": False, "vocab_size": 257}
    torch.save({"model": state, "model_args": arguments}, tmp_path / "ckpt.pt")
    assert same(reader.read(tmp_path / "ckpt.pt", tokenizer="bytes").model, lm.model)


@pytest.mark.parametrize("tied", [True, False])
def test_the_chapters_state_dict_goes_out_and_comes_back(tied: bool, tmp_path: Path) -> None:
    lm = drawn(dataclasses.replace(GPT2, tied_head=tied))
    assert export.to_pth(lm, tmp_path / "model.pth") == 0
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert {name for name in state if not name.endswith("att.mask")} == {*dict(lm.model.named_parameters()), names.HEAD}
    assert torch.equal(state["trf_blocks.0.att.mask"], torch.triu(torch.ones(32, 32), diagonal=1))
    back = reader.read(tmp_path / "model.pth", tokenizer="bytes", n_heads=4)
    assert same(back.model, lm.model)
    assert (back.model.out_head.weight is back.model.tok_emb.weight) == tied
    with pytest.raises(ConfigError, match="--n-heads"):
        reader.read(tmp_path / "model.pth", tokenizer="bytes")


@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_the_chapters_state_dict_is_written_only_under_a_name_by_which_it_is_known_again(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give model\.pth"):
        export.to_pth(drawn(GPT2), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_chapters_state_dict_takes_no_more_room_than_its_numbers(tmp_path: Path) -> None:
    lm = drawn(dataclasses.replace(GPT2, tied_head=False))
    table = lm.model.tok_emb.weight
    table.data = torch.cat((table.data, table.data))[: len(table)]  # as a model from elsewhere, a view of what was read
    export.to_pth(lm, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    about_them = 1024 * len(state)  # names, headers, and padding to 64 bytes
    assert (tmp_path / "model.pth").stat().st_size < sum(tensor.nbytes for tensor in state.values()) + about_them


def chapters_state(lm: LanguageModel, prefix: str = "") -> dict[str, torch.Tensor]:
    state = names.to_theirs(lm.model.config, "chapter", dict(lm.model.named_parameters()))
    return {prefix + name: tensor.detach().clone() for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("tied", [True, False])
def test_the_state_dict_of_a_compiled_or_distributed_model_comes_in(prefix: str, tied: bool, tmp_path: Path) -> None:
    lm = drawn(dataclasses.replace(GPT2, tied_head=tied))
    torch.save(chapters_state(lm, prefix), tmp_path / "model.pth")
    back = reader.read(tmp_path / "model.pth", tokenizer="bytes", n_heads=4)
    assert back.model.config.tied_head == tied
    assert same(back.model, lm.model)


def test_the_chapters_state_dict_as_safetensors_is_a_model_too(tmp_path: Path, command: Command) -> None:
    lm, path = drawn(GPT2), tmp_path / "model.safetensors"
    save_file(chapters_state(lm), path)
    assert same(reader.read(path, tokenizer="bytes", n_heads=4).model, lm.model)
    with pytest.raises(ConfigError, match="--n-heads"):  # and not: there is no run
        api.load(path)
    assert command("import", path, "--n-heads", "4", "--tokenizer", "bytes", "--out", "mine").code == 0
    assert same(api.load("mine").model, lm.model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_state_dict_with_other_names_than_the_chapters_is_refused(name: str, tmp_path: Path) -> None:
    state = {"transformer.wte.weight": torch.zeros(257, 64), "lm_head.weight": torch.ones(257, 64)}
    if name.endswith(".bin"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    with pytest.raises(DataError, match=r"no model of the chapter's.*tok_emb\.weight.*config\.json") as told:
        reader.read(tmp_path / name, tokenizer="bytes")
    assert told.value.where == str(tmp_path / name)


def test_heads_that_cannot_share_the_width_are_told_with_those_that_can(tmp_path: Path) -> None:
    torch.save(chapters_state(drawn(GPT2)), tmp_path / "model.pth")
    with pytest.raises(ConfigError) as told:
        reader.read(tmp_path / "model.pth", tokenizer="bytes", n_heads=7)
    assert told.value.where == "--n-heads"
    assert told.value.do.endswith(": 1, 2, 4, 8, 16, 32, 64")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_merges_of_their_own_beside_a_model_of_gpt2s_size_are_not_taken_for_gpt2s(end: str, tmp_path: Path) -> None:
    lm = drawn(dataclasses.replace(GPT2, vocab_size=50257, emb_dim=16, n_layers=1))
    export.to_hf(dataclasses.replace(lm, tokenizer=gpt2()), tmp_path / "hf", "card")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    first, second, *rest = (" ".join(pair) for pair in json.loads(gpt2().json)["model"]["merges"])

    def put(*merges: str) -> None:
        write(tmp_path / "hf" / "merges.txt", end.join(["#version: 0.2", *merges, ""]))

    put(first, second, *rest)
    assert reader.read(tmp_path / "hf").tokenizer.name == "gpt2"
    for others in ([second, first, *rest], [first, second, *rest[:-1]], []):
        put(*others)
        with pytest.raises(ConfigError, match="save_pretrained"):
            reader.read(tmp_path / "hf")
    assert reader.read(tmp_path / "hf", tokenizer="gpt2").tokenizer.name == "gpt2"  # who names one decides


def test_another_tokenizer_beside_a_state_dict_is_kept(tmp_path: Path) -> None:
    lm, beside = drawn(GPT2), tmp_path / "model.tokenizer.json"
    write(beside, "mine")
    with pytest.raises(CannotCreateError, match=r"model\.tokenizer\.json"):
        export.to_pth(lm, tmp_path / "model.pth")
    assert list(tmp_path.iterdir()) == [beside]
    beside.write_bytes(lm.tokenizer.json)  # the same is no other
    assert export.to_pth(lm, tmp_path / "model.pth") == 0


def test_another_tool_s_manifest_beside_a_model_is_none_of_ours(tmp_path: Path) -> None:
    export.to_hf(drawn(GPT2), tmp_path / "hf", "card")
    write(tmp_path / "hf" / "manifest.json", '{"x": 1}')
    assert api.load(tmp_path / "hf").model.config.emb_dim == GPT2.emb_dim


def test_a_damaged_checkpoint_is_no_model_from_elsewhere(a_run: Path) -> None:
    folder = a_run / "checkpoints/step-00000002"
    write(folder / "manifest.json", '{"x": 1}')
    with pytest.raises(DataError, match=r"manifest\.json"):
        api.load(folder)


def test_what_is_no_model_to_import_is_called_what_it_is(a_run: Path, command: Command, refused: Refused) -> None:
    assert command("export", a_run, "--to", "gguf", "--out", "m.gguf").code == 0
    assert "GGUF" in refused(65, "import", "m.gguf", "--out", "new")["what"]
    assert "used as it is" in refused(65, "import", a_run, "--out", "new")["do"]
    assert "used as it is" in refused(65, "import", next((a_run / "checkpoints").iterdir()), "--out", "new")["do"]
    write(Path("empty.safetensors"), b"")
    assert "has 0 bytes" in refused(65, "import", "empty.safetensors", "--out", "new")["why"]


def test_the_logits_of_an_export_may_differ_by_the_order_of_sums_and_by_its_kind_s_rounding(tmp_path: Path) -> None:
    lm = drawn(dataclasses.replace(GPT2, tied_head=False))
    with torch.no_grad():
        lm.model.out_head.weight.mul_(100 / lm.model(export._ids(lm)).abs().max())
        logits = lm.model(export._ids(lm))
    assert export._require_equal(lm, logits + 5e-3, tmp_path) <= 6e-3
    for difference, allowed in ((2e-2, None), (1.5, 1.0)):
        with pytest.raises(DataError, match="not the same model"):
            export._require_equal(lm, logits + difference, tmp_path, allowed)


def test_a_context_whose_angles_are_far_more_than_the_weights_is_refused(tmp_path: Path) -> None:
    export.to_hf(drawn(dataclasses.replace(QWEN3, n_heads=1)), tmp_path / "out", "card")
    described = json.loads((tmp_path / "out/config.json").read_text())
    described.pop("firstwords", None)
    (tmp_path / "out/config.json").write_text(json.dumps({**described, "max_position_embeddings": 1 << 20}))
    with pytest.raises(DataError, match="angles"):
        reader.read(tmp_path / "out")


def test_transformers_draws_from_all_tokens_of_what_is_exported(tmp_path: Path, transformers: Any) -> None:
    export.to_hf(drawn(QWEN3), tmp_path / "out", "card")
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.top_k, settings.temperature, settings.do_sample) == (0, 0.8, True)


@pytest.mark.parametrize("key", ["n_layer", "vocab_size"])
def test_a_config_that_asks_for_more_than_the_weights_is_refused_before_a_model_is_built(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = drawn(GPT2)
    export.to_hf(lm, tmp_path / "hf", "card")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    config.pop(shapes.OWN)
    path.write_text(json.dumps({**config, key: 1024 * config[key]}))
    monkeypatch.setattr(reader, "uninitialised", lambda config: pytest.fail("a model was built"))
    with pytest.raises(DataError, match="its configuration needs"):
        reader.read(tmp_path / "hf", tokenizer="bytes")


@pytest.mark.parametrize("other", [{"gelu_exact": True}, {"gelu_cubic": 0.44715}, {"norm_eps": 1e-6}], ids=str)
def test_another_gelu_or_norm_than_the_chapter_s_is_refused_before_anything_is_written(
    other: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="of another shape"):
        export.to_pth(drawn(dataclasses.replace(GPT2, **other)), tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())


# What must be noticed


def damaged(change: Callable[[dict[str, torch.Tensor]], object], folder: Path) -> Path:
    """An export of which one tensor was changed afterwards."""
    export.to_hf(drawn(GPT2), folder, "card")

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("transformer.h.1.ln_1.bias"), "missing"),
        (lambda tensors: tensors.update(surplus=torch.zeros(1)), "unknown"),
        (lambda tensors: tensors.update({"transformer.wpe.weight": torch.zeros(31, 64)}), "shape"),
        (lambda tensors: tensors.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(64, 64)}), "equal size|shape"),
    ],
    ids=["missing", "unknown", "shape", "joined"],
)
def test_wrong_tensors_are_refused(change: Callable[..., object], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        reader.read(damaged(change, tmp_path / "hf"))


def test_what_is_wrong_in_a_pickled_file_is_told_by_its_own_name(tmp_path: Path) -> None:
    damaged(lambda tensors: tensors.update(surplus=torch.zeros(1)), tmp_path / "hf")
    torch.save(load_file(tmp_path / "hf/model.safetensors"), tmp_path / "hf/pytorch_model.bin")
    (tmp_path / "hf/model.safetensors").unlink()
    with pytest.raises(DataError, match=r"hf/pytorch_model\.bin: .*surplus"):
        reader.read(tmp_path / "hf")


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_type": "llama"},
        {"model_type": None},
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"n_head": 5},
        {"n_embd": None},
    ],
    ids=str,
)
def test_a_model_that_ours_cannot_be_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    export.to_hf(drawn(GPT2), tmp_path / "hf", "card")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config.pop(shapes.OWN)
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **wrong}))
    with pytest.raises((DataError, ConfigError)):
        reader.read(tmp_path / "hf")


def test_an_impossible_shape_is_told_of_the_file_and_not_of_a_flag_that_nobody_gave(tmp_path: Path) -> None:
    export.to_hf(drawn(GPT2), tmp_path / "hf", "card")
    place = tmp_path / "hf" / "config.json"
    config = json.loads(place.read_text())
    config.pop(shapes.OWN)
    place.write_text(json.dumps({**config, "n_inner": 0}))
    with pytest.raises(ConfigError) as told:
        reader.read(tmp_path / "hf")
    assert told.value.where == f"{place}, ff_dim"


@pytest.mark.parametrize("wrong", [{"num_key_value_heads": 2}, {"head_dim": 32}, {"attention_bias": True}], ids=str)
def test_a_qwen3_that_ours_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    config = shapes.to_hf(QWEN3, 256)
    config.pop(shapes.OWN)
    assert shapes.from_hf(config, "here")[0] == dataclasses.replace(QWEN3, init_std=0.1)
    with pytest.raises(DataError):
        shapes.from_hf({**config, **wrong}, "here")


@pytest.mark.parametrize(
    ("config", "changed", "ours"),
    [
        (QWEN3, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_base": 1e6}),
        (QWEN3, {"max_position_embeddings": 7}, {"context_length": 7}),
        (GPT2, {"activation_function": "gelu", "layer_norm_epsilon": 1e-3}, {"gelu_exact": True, "norm_eps": 1e-3}),
    ],
    ids=str,
)
def test_what_another_tool_changed_counts_and_not_our_own_words_of_before(
    config: ModelConfig, changed: dict[str, Any], ours: dict[str, Any]
) -> None:
    written = shapes.to_hf(config, 256)
    assert shapes.from_hf(written, "here")[0] == config
    read = shapes.from_hf({**written, **changed}, "here")[0]
    assert {key: getattr(read, key) for key in ours} == ours
    assert shapes.from_hf({**written, "eos_token_id": 3, "dtype": "bfloat16"}, "here")[0] == config  # no logit of these


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (QWEN3, {"rope_parameters": {"rope_theta": [1]}}),
        (QWEN3, {"rope_parameters": None, "rope_scaling": "x"}),
        (QWEN3, {"num_attention_heads": "2"}),
        (GPT2, {"activation_function": ["gelu"]}),
    ],
    ids=str,
)
def test_a_setting_of_another_kind_is_bad_data(config: ModelConfig, wrong: dict[str, Any]) -> None:
    written = shapes.to_hf(config, 256)
    with pytest.raises(DataError, match=r"another kind|does not say|has"):
        shapes.from_hf({**written, **wrong}, "here")


def test_what_does_not_give_our_logits_is_not_called_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = names.to_theirs

    def untransposed(*arguments: Any) -> dict[str, torch.Tensor]:
        found = right(*arguments)
        square = "transformer.h.1.attn.c_proj.weight"  # any shape check lets it pass
        return {**found, square: found[square].T.contiguous()}

    monkeypatch.setattr(names, "to_theirs", untransposed)
    with pytest.raises(DataError, match="not the same model"):
        export.to_hf(drawn(GPT2), tmp_path / "hf", "card")


def test_without_transformers_our_own_reader_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    told: list[str] = []
    read_back = export.to_hf(drawn(GPT2), tmp_path / "hf", "card", told.append)
    assert (read_back, told) == ((0, "firstwords"), [])  # the very same computation


def test_a_transformers_that_does_not_know_the_model_leaves_the_reading_back_to_us(
    a_run: Path, command: Command, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.delitem(CONFIG_MAPPING._mapping, "qwen3")  # as in one from before Qwen3
    ended = command("export", a_run, "--to", "hf", "--out", "hf", "--json")
    assert (ended.json["read_back_by"], ended.json["max_logit_difference"]) == ("firstwords", 0)
    assert "transformers cannot read it" in ended.err


def test_a_model_whose_numbers_are_not_finite_is_neither_imported_nor_gone_on_with(
    tmp_path: Path, text: Path, refused: Refused
) -> None:
    folder = damaged(lambda tensors: tensors["transformer.ln_f.bias"].fill_(math.nan), tmp_path / "nan")
    assert "final_norm.shift" in refused(65, "import", folder, "--out", "mine")["why"]
    assert not Path("mine").exists()
    assert "not finite" in refused(65, "export", folder, "--to", "hf", "--out", "theirs")["what"]
    assert not Path("theirs").exists()
    machine = ("--steps", "2", "--batch-size", "2", "--threads", "1", "--precision", "float32", "--device", "cpu")
    assert "not finite" in refused(65, "train", text, "--from", folder, "--out", "run", *machine)["what"]
    assert not Path("run").exists()


def test_a_model_whose_numbers_are_not_finite_is_not_judged(tmp_path: Path) -> None:
    folder = damaged(lambda tensors: tensors["transformer.ln_f.bias"].fill_(math.nan), tmp_path / "out")
    (tmp_path / "text.txt").write_text("some text to judge it on")
    for judge in (api.evaluate, api.scale):
        with pytest.raises(DivergedError, match="no probabilities"):
            judge(folder, tmp_path / "text.txt")
    with pytest.raises(DivergedError, match="no probabilities"):
        api.explain(folder, "some text")


def test_the_notes_gelu_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GELU"):
        export.to_hf(drawn(dataclasses.replace(GPT2, gelu_cubic=0.44715)), tmp_path / "hf", "card")


# The verbs


def test_a_run_goes_out_and_comes_back_with_the_same_weights(command: Command, text: Path) -> None:
    assert command("train", text, "--out", "run", *TINY_FLAGS).code == 0
    out = command("export", "run", "--to", "hf", "--out", "hf", "--json")
    assert out.json["max_logit_difference"] <= TOLERANCE
    assert out.json["read_back_by"] == ("transformers" if importlib.util.find_spec("transformers") else "firstwords")
    assert "held-out bits per byte" in Path("hf/README.md").read_text()
    back = command("import", "hf", "--out", "back", "--json")
    for source, trained_here in (("run", True), (next(Path("run/checkpoints").glob("step-*")), True), ("back", False)):
        card = f"card-{trained_here}-{Path(source).name}"
        assert command("export", source, "--to", "hf", "--out", card).code == 0
        assert ("one person's text" in Path(card, "README.md").read_text()) == trained_here
    assert back.json["weights_sha256"] == command("info", "run", "--json").json["weights_sha256"]
    for verb in (("generate", "--max-new-tokens", "5"), ("eval", str(text)), ("info",)):
        for model in ("back", "hf"):
            assert command(verb[0], model, *verb[1:], "--json").code == 0
    described = command("info", "hf", "--json").json
    assert described["config"]["emb_dim"] == 32
    assert described["parameters"] == command("info", "run", "--json").json["parameters"]


def test_the_verbs_refuse_what_cannot_be(refused: Refused, command: Command, text: Path) -> None:
    assert command("train", text, "--out", "run", *TINY_FLAGS).code == 0
    refused(78, "export", "run", "--to", "onnx", "--out", "x")
    refused(78, "export", "run", "--to", "pth", "--out", "x")  # a modern block
    refused(73, "export", "run", "--to", "hf", "--out", "run")
    refused(73, "import", "run", "--out", "run")
    refused(66, "import", "nothing", "--out", "x")
    refused(65, "import", text, "--out", "x")


def test_loading_from_python_takes_a_model_from_elsewhere(tmp_path: Path) -> None:
    lm = drawn(QWEN3)
    export.to_hf(lm, tmp_path / "hf", "card")
    said = api.load(tmp_path / "hf").generate("a", max_new_tokens=5, seed=1)
    assert said == lm.generate("a", max_new_tokens=5, seed=1)


# Files for llama.cpp


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("shape", ["gpt2", "gpt2 untied, no qkv bias", "qwen3", "qwen3 untied"])
def test_a_gguf_file_holds_the_same_model(shape: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    lm = drawn(SHAPES[shape])
    difference = export.to_gguf(lm, tmp_path / "model.gguf", kind)
    if kind == "f32":
        assert difference == 0  # nothing is rounded, and nothing is computed in another order
    else:  # the rounding must show, or it was not done
        assert 0 < difference < 0.1


def test_a_gguf_file_names_every_word_and_merge_of_the_tokenizer(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    trained = train_bpe(["the cat sat on the mat, the cat " * 50], 300)
    for tokenizer in (byte_tokenizer(), trained):
        lm = dataclasses.replace(drawn(dataclasses.replace(GPT2, vocab_size=310)), tokenizer=tokenizer)
        export.to_gguf(lm, tmp_path / f"{tokenizer.vocab_size}.gguf", "f32")
        fields = gguf.GGUFReader(tmp_path / f"{tokenizer.vocab_size}.gguf").fields
        words, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
        model = json.loads(tokenizer.json)["model"]
        assert {word: number for number, word in enumerate(words[: tokenizer.vocab_size])} == model["vocab"]
        assert len(words) == len(set(words)) == 310
        assert merges == ([" ".join(pair) for pair in model["merges"]] or ["ÿ ÿ"])
        assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.end_of_text


def test_a_gguf_file_with_blocks_says_which_version_of_them(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for kind, wanted in (("q8_0", gguf.GGML_QUANT_VERSION), ("f16", None), ("f32", None)):
        export.to_gguf(drawn(GPT2), tmp_path / f"{kind}.gguf", kind)
        fields = gguf.GGUFReader(tmp_path / f"{kind}.gguf").fields
        told = fields.get("general.quantization_version")
        assert (None if told is None else told.contents()) == wanted


def test_what_llama_cpp_cannot_be_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for shape in ("gpt2 exact GELU", "qwen3 with biases"):
        with pytest.raises(ConfigError, match="--to gguf"):
            export.to_gguf(drawn(SHAPES[shape]), tmp_path / "model.gguf", "f32")
    with pytest.raises(ConfigError, match="--type"):
        export.to_gguf(drawn(GPT2), tmp_path / "model.gguf", "q4")
    assert not (tmp_path / "model.gguf").exists()


def test_a_model_keeps_its_own_tokenizer(here: Path, refused: Refused, command: Command) -> None:
    export.to_hf(drawn(GPT2), here / "model", "card")
    assert command("import", "model", "--out", "same", "--tokenizer", "model/tokenizer.json").code == 0
    error = refused(78, "import", "model", "--out", "run", "--tokenizer", "gpt2")
    assert "another tokenizer" in error["what"]
    assert not Path("run").exists()
    write(here / "model/tokenizer.json", "{}")  # which nothing can be made of
    assert "would mean other texts" in refused(65, "import", "model", "--out", "run")["do"]
    named = command("import", "model", "--out", "named", "--tokenizer", "bytes")
    assert named.code == 0
    assert "its ids are taken to be those of bytes" in named.err


def test_the_card_of_a_model_with_learned_positions_asks_for_no_more_tokens_than_it_can_see() -> None:
    short, long = (export.model_card("m", {}, length, trained_here=True) for length in (32, 1024))
    assert "max_new_tokens=31)" in short
    assert "max_new_tokens=100)" in long


def test_heads_are_asked_for_only_where_the_source_does_not_say_them(here: Path, refused: Refused) -> None:
    export.to_hf(drawn(GPT2), here / "model", "card")
    assert "says itself" in refused(78, "import", "model", "--out", "run", "--n-heads", "7")["what"]


def test_heads_that_are_taken_for_granted_are_told_and_others_come_with_the_export(tmp_path: Path, command: Command) -> None:
    wide = dataclasses.replace(GPT2, emb_dim=768, n_heads=8, n_layers=1)
    export.to_pth(drawn(wide), tmp_path / "model.pth")
    told: list[str] = []
    tokenizer = str(tmp_path / "model.tokenizer.json")
    assert reader.read(tmp_path / "model.pth", tokenizer=tokenizer, notice=told.append).model.config.n_heads == 12
    assert any("taken to have GPT-2's 12 heads" in line for line in told)
    told.clear()
    assert reader.read(tmp_path / "model.pth", tokenizer=tokenizer, n_heads=8, notice=told.append).model.config.n_heads == 8
    assert not told
    export.to_hf(drawn(wide), tmp_path / "model", "card")
    assert "--n-heads 8" in command("export", "model", "--to", "pth", "--out", "again.pth").err


def test_weights_of_a_checkpoint_are_not_read_without_what_stands_beside_them(a_run: Path, refused: Refused) -> None:
    (weights,) = list(a_run.glob("checkpoints/step-00000002/model.safetensors"))
    assert str(weights.parent) in refused(78, "generate", weights)["do"]
    write(weights.parent / "manifest.json", "{}")  # the negative control: another tool's, beside weights of another kind
    assert refused(65, "generate", weights)["what"] != "is a part of what firstwords made"
