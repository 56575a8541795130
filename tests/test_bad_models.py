"""What can be wrong with a model and what it is asked: it is refused, or told and done with what is whole."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import firstwords
from command import TINY_FLAGS, Command, Refused, checkpoints, error_of, flip_a_byte, reseal, tree, write
from firstwords import reading, store
from firstwords.errors import DataError, NoInputError, StorageError
from firstwords.model.generate import Sampling, generate
from firstwords.runs.folder import RunFolder
from firstwords.text.tokenizer import gpt2
from firstwords.training import loop
from firstwords.weights import pickled
from rows import row


def spoil_ids(folder: Path, part: str) -> None:
    """Put an id beyond the vocabulary of bytes into a prepared text whose checksums hold."""
    path = folder / f"{part}.bin"
    data = bytearray(path.read_bytes())
    data[20:22] = (60_000).to_bytes(2, "little")
    path.write_bytes(data)
    reseal(folder)
    store.verify(folder)


@row(53)
def test_an_id_beyond_the_vocabulary_in_a_prepared_text_is_bad_data(refused: Refused, a_run: Path, cache: Path):
    (folder,) = cache.iterdir()
    spoil_ids(folder, "val")
    error = refused(65, "eval", a_run)
    assert "token id 60000 is beyond the vocabulary of 257" in error["what"]
    assert error["where"] == f"{folder / 'val.bin'}, token 10"


@row(53)
def test_training_prepares_a_text_again_whose_ids_are_beyond_the_vocabulary(command: Command, a_run: Path, cache: Path):
    (folder,) = cache.iterdir()
    expected = (folder / "train.bin").read_bytes()
    spoil_ids(folder, "train")
    ended = command("train", "text.txt", "--out", "again", *TINY_FLAGS)
    assert ended.code == 0
    assert "token id 60000 is beyond the vocabulary of 257" in ended.err
    assert f"damaged-{folder.name}" in ended.err
    assert (folder / "train.bin").read_bytes() == expected


def test_a_damaged_prepared_text_is_an_error_of_data(a_run: Path, cache: Path):
    (folder,) = cache.iterdir()
    flip_a_byte(folder / "val.bin")
    with pytest.raises(DataError, match=r"val\.bin"):
        firstwords.evaluate(a_run)


def test_a_prepared_text_whose_files_were_cleaned_away_is_prepared_again(a_run: Path, cache: Path):
    expected, (folder,) = firstwords.evaluate(a_run), cache.iterdir()

    def clean() -> None:  # as what removes old files from a cache does, and leaves folders
        for file in folder.iterdir():
            file.unlink()

    clean()
    assert firstwords.evaluate(a_run) == expected
    clean()
    Path(RunFolder(a_run).recorded_config()["text"][0]).unlink()
    with pytest.raises(NoInputError, match=r"text\.txt"):  # not that a manifest is not there
        firstwords.evaluate(a_run)


@pytest.mark.parametrize("ids", [[257], [-1], [1, 2, 10**6], []])
def test_generating_from_an_id_beyond_the_vocabulary_is_a_wrong_call(a_run: Path, ids: list[int]):
    model = firstwords.load(a_run).model
    with pytest.raises(ValueError, match="vocabulary of 257" if ids else "no token"):
        next(generate(model, ids, Sampling(), torch.Generator()))


@row(66)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("--temperature", value) for value in ("-1", "nan", "inf", "1e400", "abc", "")),
        *(("--top-k", value) for value in ("0", "-1", "258", "1.5", "abc")),
        *(("--top-p", value) for value in ("0", "1.5", "nan", "-1", "abc")),
        *(("--max-new-tokens", value) for value in ("0", "-1", "abc", "1e3", "1000000000000")),
        *(("--samples", value) for value in ("0", "-1", "abc", "9999999999", "100001")),
        *(("--seed", value) for value in ("abc", "9" * 30)),
    ],
)
def test_an_impossible_way_to_speak_is_refused(refused: Refused, a_run: Path, name: str, value: str):
    error = refused(78, "generate", a_run, "--prompt", "The", f"{name}={value}")
    assert error["where"] == name
    assert value in error["what"] or str(float(value)) in error["what"]


@row(66)
def test_temperature_zero_and_the_largest_top_k_are_ways_to_speak(command: Command, a_run: Path):
    arguments = ("generate", a_run, "--prompt", "The", "--max-new-tokens", "5", "--json")
    greedy = {command(*arguments, "--temperature", "0", "--seed", seed).json["texts"][0] for seed in ("1", "2")}
    assert len(greedy) == 1
    assert command(*arguments, "--top-k", "257").code == 0


@row(54)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:260"])
def test_a_prompt_of_characters_that_the_text_never_had_is_spoken_to(command: Command, text: Path, tokenizer: str):
    assert command("train", text, "--out", "run", *TINY_FLAGS, "--tokenizer", tokenizer).code == 0
    for prompt in ("文字", "👩\u200d👧", "\U0010ffff\0"):
        assert command("generate", "run", "--prompt", prompt, "--max-new-tokens", "3").code == 0
        assert command("explain", "run", prompt).code == 0


@row(65)
@pytest.mark.parametrize(
    ("prompt", "notice"),
    [
        ("", None),
        ("x" * 32, None),
        ("x" * 33, "the prompt has 33 tokens; the model sees the last 32 of them"),
        ("x" * 10_000_000, "the prompt has 10000000 tokens; the model sees the last 32 of them"),
    ],
    ids=["empty", "a context", "one more", "10 MB"],
)
def test_a_prompt_of_any_length_is_spoken_to_and_a_cut_is_told(
    command: Command, a_run: Path, prompt: str, notice: str | None
):
    ended = command("generate", a_run, "--prompt", prompt, "--max-new-tokens", "3", "--json")
    assert ended.code == 0
    assert len(ended.json["texts"]) == 1
    assert ended.err.splitlines() == ([f"note: {notice}"] if notice else [])


@row(51)
def test_a_model_whose_tokenizer_was_exchanged_is_bad_data(refused: Refused, a_run: Path):
    for folder in checkpoints(a_run):
        write(folder / "tokenizer.json", gpt2().json)
    for verb in (["generate"], ["explain", "some text"], ["eval"]):
        error = refused(65, verb[0], a_run, *verb[1:])
        assert "tokenizer.json" in error["why"]
    for folder in checkpoints(a_run):
        reseal(folder)
    error = refused(78, "generate", a_run)
    assert "the tokenizer gpt2 has 50257 ids, the model only 257" in error["what"]


@row(51)
def test_a_checkpoint_whose_tokenizer_was_exchanged_is_not_gone_on_with(refused: Refused, a_run: Path):
    for folder in checkpoints(a_run):
        content = (folder / "tokenizer.json").read_bytes()
        write(folder / "tokenizer.json", content.replace(b"}", b" }", 1))
        reseal(folder)
    error = refused(65, "train", "--resume", "--out", a_run, "--steps=3")
    assert "is not the run's tokenizer" in error["why"]
    assert len(re.findall(r"[0-9a-f]{64}", error["why"])) == 2 * len(checkpoints(a_run))


@row(63)
@pytest.mark.parametrize("verb", ["generate RUN", "eval RUN", "info RUN", "explain RUN words", "train --resume --out RUN"])
def test_a_checkpoint_of_a_newer_format_names_both_formats(refused: Refused, a_run: Path, verb: str):
    for folder in checkpoints(a_run):
        reseal(folder, format=store.FORMAT + 1)
    before = tree(a_run / "checkpoints")
    error = refused(65, *(str(a_run) if word == "RUN" else word for word in verb.split()))
    assert f"made by format {store.FORMAT + 1}; this version reads format {store.FORMAT}" in error["why"]
    assert tree(a_run / "checkpoints") == before


@row(63)
def test_a_checkpoint_folder_of_a_newer_format_names_both_formats(command: Command, a_run: Path):
    newest = checkpoints(a_run)[-1]
    reseal(newest, format=store.FORMAT + 1)
    ended = command("generate", newest, "--json")
    assert ended.code == 65
    assert ended.json["error"]["what"] == f"made by format {store.FORMAT + 1}; this version reads format {store.FORMAT}"
    assert ended.json["error"]["where"].startswith(str(newest))


@pytest.mark.parametrize("lacks", ["step", "model.safetensors", "tokenizer.json", "state.json", "config.json"])
@pytest.mark.parametrize("verb", ["generate", "info"])
def test_a_manifest_that_says_too_little_is_no_checkpoints(refused: Refused, a_run: Path, verb: str, lacks: str):
    newest = checkpoints(a_run)[-1]
    files = json.loads((newest / store.MANIFEST).read_bytes())["files"]
    said = {"step": "2"} if lacks == "step" else {"files": {name: one for name, one in files.items() if name != lacks}}
    reseal(newest, **said)
    assert refused(65, verb, newest)["what"] == "is no checkpoint"


@row(64)
def test_checkpoints_of_another_architecture_in_a_run_s_place_are_of_another_run(
    refused: Refused, command: Command, a_run: Path
):
    assert command("train", "text.txt", "--out", "other", *TINY_FLAGS, "--model.emb-dim=16").code == 0
    shutil.rmtree(a_run / "checkpoints")
    shutil.copytree("other/checkpoints", a_run / "checkpoints")
    error = refused(65, "train", "--resume", "--out", a_run, "--steps=3")
    assert error["what"] == "every checkpoint is damaged or of another run"
    assert "step-00000002" in error["why"]


@pytest.mark.parametrize("verb", [["generate"], ["eval"], ["info"], ["explain", "some text"]])
@pytest.mark.parametrize("place", ["nothing", "empty", "text.txt"])
def test_what_is_no_run_is_no_input(refused: Refused, text: Path, verb: list[str], place: str):
    Path("empty").mkdir()
    assert refused(66, verb[0], place, *verb[1:])["where"] == place


@pytest.mark.parametrize("verb", [["generate"], ["eval"], ["report"], ["train", "--resume", "--out"]])
def test_a_misspelt_run_is_guessed_and_no_other_folder(refused: Refused, a_run: Path, verb: list[str]):
    misspelt = a_run.with_name(a_run.name + "s")
    assert refused(66, *verb, misspelt)["do"] == f"did you mean {a_run}?"
    Path("notes").mkdir()
    assert "did you mean" not in refused(66, *verb, "note")["do"]


def test_a_folder_that_may_not_be_looked_into_is_no_guess(a_run: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", denied)
    assert reading.nearest(a_run.with_name(a_run.name + "s"), lambda path: path.is_file()) is None


def test_a_run_without_a_checkpoint_is_no_input(refused: Refused, a_run: Path):
    shutil.rmtree(a_run / "checkpoints")
    assert "put them back" in refused(66, "generate", a_run)["do"]
    (a_run / "metrics.jsonl").unlink()  # as before the first save
    assert f"--resume --out {a_run}" in refused(66, "generate", a_run)["do"]


@pytest.mark.parametrize("verb", [["generate", "--max-new-tokens", "3"], ["eval"], ["info"], ["explain", "some text"]])
def test_a_damaged_newest_checkpoint_is_told_and_an_older_one_used(command: Command, a_run: Path, verb: list[str]):
    flip_a_byte(checkpoints(a_run)[-1] / "model.safetensors")
    before = tree(a_run)
    ended = command(verb[0], a_run, *verb[1:])
    assert ended.code == 0
    assert "step-00000002" in ended.err
    assert "older" in ended.err
    assert tree(a_run) == before


@row(62)
@pytest.mark.parametrize("verb", [["generate"], ["eval"], ["info"], ["explain", "some text"]])
@pytest.mark.parametrize("is_checkpoint", [False, True])
def test_nothing_but_damaged_checkpoints_is_bad_data(refused: Refused, a_run: Path, verb: list[str], is_checkpoint: bool):
    for folder in checkpoints(a_run):
        flip_a_byte(folder / "model.safetensors")
    error = refused(65, verb[0], checkpoints(a_run)[0] if is_checkpoint else a_run, *verb[1:])
    assert "damaged" in error["what"]
    assert "model.safetensors" in error["where"] + error["why"]


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_of_fewer_than_two_tokens_cannot_be_explained(refused: Refused, a_run: Path, text: str):
    assert "fewer than two tokens" in refused(65, "explain", a_run, text)["what"]


def test_evaluating_on_a_text_that_is_not_there_is_no_input(refused: Refused, a_run: Path):
    assert "text.txt" in refused(66, "eval", a_run, "texd.txt")["do"]


@row(61)
@pytest.mark.parametrize("is_gradient", [False, True])
def test_diverged_training_names_the_step_and_leaves_the_last_good_checkpoint(
    command: Command, a_run: Path, monkeypatch: pytest.MonkeyPatch, is_gradient: bool
):
    target_nats = loop.target_nats
    n_calls = 0

    def diverging(*arguments: Any, **named: bool) -> torch.Tensor:
        nonlocal n_calls
        n_calls += 1
        nats = target_nats(*arguments, **named)
        if n_calls < 3:
            return nats
        return nats + 0 * (nats - nats).sqrt() if is_gradient else nats * float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "target_nats", diverging)
        ended = command("train", "text.txt", "--out", "other", *TINY_FLAGS, "--json", "--steps", "5")
    error = error_of(ended, 70)
    assert error["where"] == "step 3"
    assert "--optim.peak-lr" in error["do"]
    named = Path(re.search(r"the last good checkpoint is (\S+)", error["why"])[1])
    assert named == checkpoints(Path("other"))[-1]
    assert named.name == "step-00000002"
    assert is_finite(named)
    assert command("generate", "other", "--max-new-tokens", "3").code == 0


def is_finite(checkpoint: Path) -> bool:
    return all(bool(weight.isfinite().all()) for weight in firstwords.load(checkpoint).model.parameters())


@row(61)
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("is_held_out", [True, False])
def test_a_rate_far_too_high_is_diverged_at_whatever_step_and_leaves_finite_weights(
    command: Command, text: Path, steps: int, is_held_out: bool
):
    shape = ["--model.block=gpt2", "--optim.kind=adamw", "--optim.peak-lr=1e12", "--optim.warmup-steps=0"]
    val = [] if is_held_out else ["--val-fraction=0"]
    ended = command("train", text, "--out", "run", *TINY_FLAGS, *shape, *val, "--steps", str(steps), "--json")
    error = error_of(ended, 70)
    assert re.search(r"step \d+", error["where"])
    assert "--optim.peak-lr" in error["do"]
    assert all(is_finite(folder) for folder in Path("run/checkpoints").glob("step-*"))
    assert command("generate", "run", "--max-new-tokens", "3").code == 0


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_pointer_of_git_lfs_in_place_of_weights_is_known(here: Path, refused: Refused, name: str) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548105171\n"
    write(here / name, pointer)
    assert "git lfs pull" in refused(65, "import", name, "--out", "run")["do"]


def test_a_disk_that_is_full_is_not_the_fault_of_the_file_that_is_read(here: Path) -> None:
    told = json.dumps({"what": "the disk is full", "where": "/tmp/x", "why": "no space", "do": "free some"}).encode()
    error = pickled._refusal(told, here / "model.pth", StorageError.exit_code)
    assert (type(error), error.where) == (StorageError, "/tmp/x")
    of_the_file = json.dumps({"what": "is damaged", "where": "", "why": "", "do": ""}).encode()
    error = pickled._refusal(of_the_file, here / "model.pth", DataError.exit_code)
    assert (type(error), error.where) == (DataError, str(here / "model.pth"))
