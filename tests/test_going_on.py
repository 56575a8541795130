"""`train --from`: a model that has learnt already goes on, with its own tokenizer and shape, on another text."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from command import TINY_FLAGS, Command, Refused, write
from conftest import journal
from firstwords import api, pretraining, store
from firstwords.config import ModelConfig, run_config
from firstwords.config_file import from_toml
from firstwords.model.gpt import GPTModel
from firstwords.model.language_model import LanguageModel
from firstwords.planning import system
from firstwords.presets import presets
from firstwords.text.tokenizer import byte_tokenizer, train_bpe
from firstwords.training import state as states
from firstwords.weights import export, hub

GPT2 = ModelConfig(257, 32, 32, 2, 1, 0.0, qkv_bias=True, tied_head=True, init_std=0.1)
OTHER = "".join(f"Line {n} of another text, and {n * n} more.\n" for n in range(100))


@pytest.fixture
def learnt(here: Path) -> Path:
    """A model from elsewhere, with GPT-2's block."""
    torch.manual_seed(1)
    export.to_hf(LanguageModel(GPTModel(GPT2).eval(), byte_tokenizer()), here / "learnt", "card")
    write(here / "other.txt", OTHER)
    return here / "learnt"


def going_on(*more: str | Path) -> tuple[str | Path, ...]:
    machine = [
        flag for flag in TINY_FLAGS if flag.startswith(("--threads", "--precision", "--device", "--batch-size", "--save"))
    ]
    return ("train", "other.txt", "--from", "learnt", "--out", "run", "--steps", "20", "--keep", "1000", *machine, *more)


def as_never_saved() -> None:
    """Leave of the run what there is before its first save."""
    shutil.rmtree("run/checkpoints")
    Path("run/metrics.jsonl").unlink()


def test_it_begins_where_the_other_model_stands_and_gets_better(learnt: Path, command: Command) -> None:
    before = api.evaluate(learnt, "other.txt").bits_per_byte
    assert command(*going_on()).code == 0
    assert api.evaluate("run", "other.txt").bits_per_byte < before
    begun, lm = api.load("run/checkpoints/step-00000000"), api.load("run")
    for name, parameter in api.load(learnt).model.named_parameters():
        assert torch.equal(parameter, dict(begun.model.named_parameters())[name])
    assert lm.model.config == dataclasses.replace(GPT2, drop_rate=lm.model.config.drop_rate)
    assert lm.tokenizer.ranks == byte_tokenizer().ranks
    assert lm.model.out_head.weight is lm.model.tok_emb.weight


def test_it_is_resumed_as_any_run_also_before_its_first_checkpoint(learnt: Path, command: Command) -> None:
    assert command(*going_on()).code == 0
    wanted = api.info("run")["weights_sha256"]
    as_never_saved()
    assert command("train", "--resume", "--out", "run").code == 0
    assert api.info("run")["weights_sha256"] == wanted
    assert command("train", "--resume", "--out", "run", "--steps", "22").code == 0
    shutil.rmtree(learnt)  # what it began with is in its checkpoints
    assert command("train", "--resume", "--out", "run", "--steps", "24").code == 0


def test_it_is_judged_and_goes_on_where_its_folder_was_moved(learnt: Path, command: Command, cache: Path) -> None:
    assert command(*going_on("--steps", "2")).code == 0
    Path("run").rename("moved")
    for verb in (("eval", "moved"), ("train", "--resume", "--out", "moved", "--steps", "3")):
        shutil.rmtree(cache)  # as on another machine
        ended = command(*verb)
        assert ended.code == 0, ended.err
    assert api.info("moved")["steps"] == 3
    recorded = from_toml(Path("moved/config.toml").read_text(), "config.toml")["tokenizer"]
    assert recorded == str(Path("moved/tokenizer.json").absolute())


@pytest.mark.parametrize("goes_on", [True, False])
def test_the_configuration_of_a_run_that_was_moved_begins_another(learnt: Path, command: Command, goes_on: bool) -> None:
    Path("words.json").write_bytes(byte_tokenizer().json)
    with_a_file = ("train", "other.txt", "--out", "run", *TINY_FLAGS, "--tokenizer", "words.json")
    assert command(*(going_on("--steps", "2") if goes_on else with_a_file)).code == 0
    Path("run").rename("moved")
    Path("words.json").unlink()
    ended = command("train", "--config", "moved/config.toml", "--out", "again")
    assert ended.code == 0, ended.err
    assert api.info("again")["weights_sha256"] == api.info("moved")["weights_sha256"]


def test_it_begins_anew_where_only_weights_were_saved(
    learnt: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk had room for the weights that were the best so far, not for the save that they belong to."""
    assert command(*going_on()).code == 0
    wanted = api.info("run")["weights_sha256"]
    as_never_saved()
    monkeypatch.setattr(states, "optimizer_tensors", lambda _: None)
    assert command("train", "--resume", "--out", "run").code == 0
    monkeypatch.undo()
    monkeypatch.chdir(learnt.parent)
    Path("run/metrics.jsonl").unlink()  # a save that was refused is not journaled
    assert command("train", "--resume", "--out", "run").code == 0
    assert api.info("run")["weights_sha256"] == wanted


def test_a_start_that_is_refused_leaves_the_tokenizer_of_a_run_that_begins(learnt: Path, refused: Refused) -> None:
    store.make_folder(Path("run"))
    store.write(Path("run/tokenizer.json"), b"another run's, which is being prepared")
    with store.lock(Path("run/run.lock")):
        assert "in use" in refused(73, *going_on())["what"]
    assert Path("run/tokenizer.json").read_bytes() == b"another run's, which is being prepared"


def test_a_folder_that_another_start_takes_while_the_model_is_fetched_is_left_to_it(
    learnt: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = pretraining._described

    def fetched(source: str) -> Any:
        write(Path("runs/other/config.toml"), "")  # a run that has ended by then: its lock is free
        return described(source)

    monkeypatch.setattr(pretraining, "_described", fetched)
    given = [word for word in going_on() if word not in ("--out", "run")]
    assert command(*given).code == 0
    assert Path("runs/other-2/config.toml").is_file()


def test_a_number_of_threads_that_is_named_is_that_number_in_a_container_too(
    learnt: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(system, "core_quota", lambda *_: 1.0)
    assert command(*going_on("--steps", "1", "--threads", "2")).code == 0
    state = json.loads(Path("run/checkpoints/step-00000001/state.json").read_text())
    assert state["fingerprint"]["threads"] == 2


def test_its_own_configuration_repeats_it_adapted_as_it_was(learnt: Path, command: Command) -> None:
    assert command(*going_on("--model.context-length", "20", "--model.drop-rate", "0.2")).code == 0
    assert command("train", "--config", "run/config.toml", "--out", "again").code == 0
    assert api.info("again")["config"] == api.info("run")["config"]
    assert api.info("again")["weights_sha256"] == api.info("run")["weights_sha256"]
    assert api.info("run")["config"]["context_length"] == 20


def test_its_beginning_is_judged_by_as_much_as_what_follows(learnt: Path, command: Command) -> None:
    write(Path("other.txt"), OTHER * 20)  # more held-out tokens than a new model is judged by at its beginning
    assert command(*going_on("--steps", "2")).code == 0
    assert command("train", "other.txt", *TINY_FLAGS, "--out", "new").code == 0  # the negative control
    went_on, new = ([line["n_tokens"] for line in journal(Path(name), "evaluation")] for name in ("run", "new"))
    assert went_on[0] == went_on[-1]
    assert new[0] < new[-1]


@pytest.mark.parametrize("context_length", [8, 20, 32, 50])
def test_the_context_can_be_cut_or_stretched(context_length: int, learnt: Path, command: Command) -> None:
    assert command(*going_on("--model.context-length", str(context_length))).code == 0
    positions = api.load("run/checkpoints/step-00000000").model.pos_emb
    source = api.load(learnt).model.pos_emb
    assert positions is not None
    assert source is not None
    assert len(positions.weight) == context_length
    if context_length <= 32:
        assert torch.equal(positions.weight, source.weight[:context_length])
    else:  # the ends stay, and what lies between lies between its neighbours
        assert torch.allclose(positions.weight[[0, -1]], source.weight[[0, -1]])
        assert positions.weight.max() <= source.weight.max()


def test_a_files_optimizer_is_taken_where_the_other_models_shape_stays(learnt: Path, command: Command) -> None:
    write(Path("mine.toml"), "[optim]\npeak_lr = 1e-4\nweight_decay = 0.3\n")
    assert command(*going_on("--config", "mine.toml", "--optim.weight-decay", "0.2")).code == 0
    config = run_config(from_toml(Path("run/config.toml").read_text(), "config.toml"))
    assert (config.optim.peak_lr, config.optim.weight_decay) == (1e-4, 0.2)
    assert config.optim.kind == "adamw", "what goes on learns gently, but for what is named"
    assert config.model.emb_dim == GPT2.emb_dim


def test_a_preset_beside_another_model_is_told_to_say_only_how(learnt: Path, command: Command) -> None:
    assert "says only how it is trained" in command(*going_on("--steps", "1", "--preset", "laptop-tiny")).err


def test_what_would_make_another_model_of_it_is_refused(learnt: Path, refused: Refused) -> None:
    refused(78, *going_on("--model.emb-dim", "64"))
    refused(78, *going_on("--tokenizer", "gpt2"))
    for key in ("--model.induction-heads", "--model.table-from-text"):
        refused(78, *going_on(key, "true"))  # would be drawn over by what it goes on from
    refused(66, "train", "other.txt", "--from", "nothing", "--out", "run")
    assert refused(66, "train", "misspelt.txt", "--from", "nothing")["where"] == "misspelt.txt"  # before it is fetched
    assert refused(78, *going_on("--threads", "4000"), "--from", "nothing")["where"] == "--threads"
    assert set(hub.PRESETS) < presets().keys()
    for name, is_preset in (("gpt2-355m", True), ("gpt2-notes", False), ("laptop", False)):
        for mistaken in (("train", "other.txt", "--from", name), ("import", name)):
            assert ("gpt2-medium" in refused(66, *mistaken, "--out", "run")["do"]) is is_preset


@pytest.mark.parametrize("block", ["gpt2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_special_tokens_leave_the_logits_of_all_others_as_they_were(
    block: str, tied: bool, here: Path, command: Command
) -> None:
    torch.manual_seed(1)
    shape = dataclasses.replace(GPT2, block=block, tied_head=tied, qkv_bias=block == "gpt2")
    before = LanguageModel(GPTModel(shape).eval(), byte_tokenizer())
    export.to_hf(before, here / "learnt", "card")
    write(here / "other.txt", "".join(f"<|user|>{n}?<|bot|>{n * n}.\n" for n in range(200)))
    assert command(*going_on("--special-tokens", "<|user|>,<|bot|>")).code == 0
    begun, lm = api.load("run/checkpoints/step-00000000"), api.load("run")
    assert lm.tokenizer.special == ("<|user|>", "<|bot|>")
    assert len(lm.model.tok_emb.weight) == len(lm.model.out_head.weight) == 259
    ids = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(begun.model(ids)[..., :257], before.model(ids))  # not one bit of them
    assert not torch.equal(lm.model.tok_emb.weight[257], begun.model.tok_emb.weight[257])  # they are learnt from then on
    assert command("train", "--resume", "--out", "run", "--steps", "22").code == 0
    assert command("export", "run", "--to", "hf", "--out", "hf").code == 0
    assert api.load("hf").tokenizer.special == lm.tokenizer.special


def test_a_run_keeps_its_own_tokenizer_where_another_run_has_its_old_place(here: Path, command: Command) -> None:
    write(here / "text.txt", OTHER)
    machine = [flag for flag in TINY_FLAGS if not flag.startswith(("--tokenizer", "--steps"))]
    for name, size in (("one", 300), ("two", 280)):
        write(here / f"{name}.json", train_bpe([OTHER], size).json.decode())
    command("train", "text.txt", "--out", "run", "--tokenizer", "one.json", "--steps", "2", *machine)
    Path("run").rename("old")
    command("train", "text.txt", "--out", "run", "--tokenizer", "two.json", "--steps", "2", *machine)
    assert command("train", "--config", "old/config.toml", "--out", "again", *machine).code == 0
    assert command("train", "--resume", "--out", "old", "--steps", "3").code == 0  # which writes where it is by now
    assert api.load("again").tokenizer.sha256 == api.load("old").tokenizer.sha256 != api.load("run").tokenizer.sha256
