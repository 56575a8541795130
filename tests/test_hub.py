"""GPT-2's weights by name: from the cache of the hub, else fetched; without a network it says what to bring."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from command import Command, Refused
from firstwords import api
from firstwords.config import ModelConfig
from firstwords.errors import DataError, NoInputError
from firstwords.model.gpt import GPTModel
from firstwords.model.language_model import LanguageModel
from firstwords.text.tokenizer import byte_tokenizer
from firstwords.weights import export, hub

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's, and no network."""
    from huggingface_hub import constants

    folder = here / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("FIRSTWORDS_CACHE", str(here / "cache"))
    return folder


def put_into(cache: Path, name: str) -> Path:
    """Lay a small model where the hub's library keeps that one, links and all."""
    repository, revision = hub.NAMES[name]
    torch.manual_seed(1)
    config = ModelConfig(257, 32, 32, 2, 1, 0.0, qkv_bias=True, tied_head=True, init_std=0.1)
    made = cache.parent / "made"
    export.to_hf(LanguageModel(GPTModel(config).eval(), byte_tokenizer()), made, "card")
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir()
    for number, file in enumerate(hub.FILES):
        shutil.copy(made / file, place / "blobs" / str(number))
        (snapshot / file).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_name_in_the_cache_is_a_model(cache: Path, command: Command) -> None:
    put_into(cache, "gpt2")
    found = command("import", "gpt2", "--out", "mine", "--json").json
    assert found["parameters"] > 0
    assert "' forward'" in found["published"]
    assert "3.7547" in found["published"]
    assert "not run here" in command("import", "gpt2", "--out", "again").out
    assert command("import", cache.parent / "made", "--out", "other", "--json").json["published"] == ""
    assert command("generate", "gpt2", "--max-new-tokens", "3", "--json").code == 0
    assert api.load("gpt2").model.config.emb_dim == 32


def test_without_a_network_it_says_which_files_to_bring(cache: Path, refused: Refused) -> None:
    said = refused(66, "import", "gpt2-medium", "--out", "mine")["do"]
    assert all(file in said for file in hub.FILES)
    assert "openai-community/gpt2-medium" in said


def test_a_name_that_no_network_knows_is_asked_for_once(
    cache: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")  # a name that never is one (RFC 6761)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert "not known" in refused(66, "import", "gpt2", "--out", "mine")["why"]
    assert not caplog.records  # the hub's library tells of each time that it asks again


def test_a_file_that_changed_since_its_first_use_is_refused(cache: Path) -> None:
    snapshot = put_into(cache, "gpt2")
    api.load("gpt2")
    data = bytearray((snapshot / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (snapshot / "model.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="first used"):
        api.load("gpt2")


def test_half_a_model_in_the_cache_is_no_model(cache: Path) -> None:
    (put_into(cache, "gpt2") / "tokenizer.json").unlink()
    with pytest.raises(NoInputError, match="cannot be fetched"):
        api.load("gpt2")


def test_a_folder_of_that_name_comes_first_and_nothing_is_published_of_it(cache: Path, here: Path, command: Command) -> None:
    put_into(cache, "gpt2")
    shutil.copytree(here / "made", here / "gpt2")
    shutil.rmtree(cache)
    assert api.load("gpt2").model.config.emb_dim == 32
    assert command("import", "gpt2", "--out", "mine", "--json").json["published"] == ""
