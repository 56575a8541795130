"""What can be wrong with a command line or configuration: the key, the value and what is allowed are named."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command import ESC, TEXT, TINY_FLAGS, Command, Refused, error_of, write
from firstwords import api
from firstwords.app.cli import main
from firstwords.config_file import from_toml
from firstwords.text.tokenizer import Tokenizer, train_bpe
from rows import row

# The command line and the configuration


@row(55)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--stesp", "2"], "--steps"),
        (["train", "--model.n-layer", "2"], "--model.n-layers"),
        (["generate", "run", "--tempratur", "1"], "--temperature"),
        (["train", "--steps"], "--help"),
        (["trian"], "train"),
        (["explain", "run"], "--help"),
        (["train", "--" + ESC], "--help"),
        ([], "--help"),
    ],
)
def test_a_command_line_that_does_not_parse_is_2_and_helps(refused: Refused, arguments: list[str], says: str):
    assert says in refused(2, *arguments)["do"]


def test_far_more_threads_than_cores_are_refused(refused: Refused, text: Path):
    assert (
        str(os.cpu_count()) in refused(78, "train", text, "--threads", str(9 * (os.cpu_count() or 1)), "--out", "run")["why"]
    )


@row(55, 56)
@pytest.mark.parametrize(
    ("toml", "where", "do"),
    [
        ("stesp = 2", "my.toml, stesp", "did you mean 'steps'?"),
        ("[model]\nn_layer = 2", "model.n_layer", "did you mean 'model.n_layers'?"),
        ("[optimizer]\npeak_lr = 2", "optimizer.peak_lr", "did you mean 'optim.peak_lr'?"),
        ("steps = 0", "--steps", "from 1"),
        ("steps = " + "9" * 400, "--steps", "from 1"),
        ("steps = 0x" + "f" * 5000, "--steps", "from 1"),  # which Python cannot write in base 10
        ("[optim]\npeak_lr = " + "9" * 400, "optim.peak_lr", "from 1e-12"),
        ("precision = 0x" + "f" * 5000, "my.toml, precision", "shorter"),
        ("text = [0x" + "f" * 5000 + "]", "my.toml, text", "shorter"),
        ("steps = 1.5", "my.toml, steps", ""),
        ("steps = true", "my.toml, steps", ""),
        ("seed = -1", "--seed", "from 0"),
        ("[optim]\npeak_lr = nan", "--optim.peak-lr", "from 1e-12"),
        ("[optim]\npeak_lr = -inf", "--optim.peak-lr", "from 1e-12"),
        ("[model]\ntied_head = 1", "my.toml, model.tied_head", ""),
        ("steps = [1]", "my.toml, steps", ""),
        ("precision = ['float32']", "my.toml, precision", "float32"),
        ("for_s = 'soon'", "my.toml, for_s", "90s"),
        ("model = 5", "my.toml, model", "[model]"),
        ("text = 'text.txt'", "my.toml, text", "give a list"),
    ],
)
def test_a_bad_key_of_a_configuration_file_is_named(refused: Refused, text: Path, toml: str, where: str, do: str):
    write(Path("my.toml"), toml)
    tiny = [word for word in TINY_FLAGS if not word.startswith(("--steps", "--precision"))]
    error = refused(78, "train", text, "--config", "my.toml", "--out", "run", *tiny)
    assert where in error["where"]
    assert do in error["do"]
    assert not Path("run").exists()


@pytest.mark.parametrize(("toml", "codes"), [("text = 'text.txt'", (0, 78)), ("text = 5", (78,)), ("text = [5]", (78, 66))])
def test_the_texts_of_a_configuration_file_are_names(command: Command, text: Path, toml: str, codes: tuple[int, ...]):
    write(Path("my.toml"), toml)
    ended = command("train", "--config", "my.toml", "--out", "run", *TINY_FLAGS)
    assert ended.code in codes, ended.err  # one name may stand for a list, but never be taken for its letters


@pytest.mark.parametrize("toml", ["steps = ", "[model", "steps = 1\nsteps = 2", '"' * 3, "[[[[", "\0"])
def test_a_configuration_that_is_no_toml_names_file_and_line(refused: Refused, text: Path, toml: str):
    write(Path("my.toml"), toml)
    error = refused(78, "train", text, "--config", "my.toml", "--out", "run")
    assert error["where"] == "my.toml"
    assert re.search(r"line \d|end of document", error["why"])


@pytest.mark.parametrize(("content", "code"), [(None, 66), (b"\xff\xfe\x00", 65)])
def test_a_configuration_file_that_cannot_be_read(refused: Refused, text: Path, content: bytes | None, code: int):
    if content is not None:
        write(Path("my.toml"), content)
    assert refused(code, "train", text, "--config", "my.toml", "--out", "run")["where"] == "my.toml"


@row(56)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("--steps", value) for value in ("-1", "0", "1000000001", "9" * 30, "9" * 400)),
        ("--micro-batch-size", "9" * 400),
        ("--eval-every", "9" * 400),
        ("--sample-every", "9" * 400),
        ("--eval-tokens", "9" * 400),
        *(("--optim.peak-lr", value) for value in ("-1", "0", "nan", "inf", "-inf", "1e400", "1e13")),
        ("--optim.floor-lr", "-1"),
        ("--optim.beta2", "1"),
        ("--epochs", "-1"),
        ("--for", "0"),
        ("--val-fraction", "1"),
        ("--batch-size", "0"),
        ("--threads", "0"),
        ("--seed", "-1"),
        ("--keep", "1"),
        ("--model.drop-rate", "1"),
        ("--model.context-length", "0"),
        ("--model.vocab-size", "1"),
        ("--model.init-std", "nan"),
        ("--tokenizer", "bpe:10"),
        ("--tokenizer", "bpe:99999999"),
    ],
)
def test_an_impossible_number_names_the_allowed_range(refused: Refused, text: Path, name: str, value: str):
    tiny = [word for word in TINY_FLAGS if not (name in ("--for", "--epochs") and word.startswith("--steps"))]
    error = refused(78, "train", text, "--out", "run", *tiny, f"{name}={value}")
    assert error["where"] == name
    assert re.search(r"allowed: (from|above) \S+", error["do"])
    assert not Path("run").exists()


@row(56)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("--steps", value) for value in ("abc", "nan", "inf", "1e400", "1.5", "", "0x10", "9" * 5000)),
        *(("--optim.peak-lr", value) for value in ("abc", "", "1e-3x")),
        ("--model.tied-head", "maybe"),
        ("--save-every", "soon"),
    ],
)
def test_what_is_not_of_a_key_s_type_is_named(refused: Refused, text: Path, name: str, value: str):
    error = refused(78, "train", text, "--out", "run", *TINY_FLAGS, f"{name}={value}")
    assert error["where"] == name
    assert repr(value) in error["what"]


@row(57)
def test_a_width_that_its_heads_cannot_share_offers_the_nearest(refused: Refused, command: Command, text: Path):
    error = refused(78, "train", text, "--out", "run", *TINY_FLAGS, "--model.emb-dim", "34", "--model.n-heads", "4")
    assert "34 channels" in error["what"]
    widths, heads = (re.findall(r"\d+", part) for part in error["do"].split(";"))
    assert (widths, heads) == (["32", "40"], ["1", "17"])
    for width in widths:
        assert (
            command("train", text, "--out", width, *TINY_FLAGS, "--model.emb-dim", width, "--model.n-heads", "4").code == 0
        )


@row(57)
def test_an_odd_head_cannot_be_rotated_and_the_nearest_widths_are_offered(refused: Refused, text: Path):
    error = refused(78, "train", text, *TINY_FLAGS, "--model.emb-dim", "30")
    assert "28 and 32" in error["do"]


def test_a_micro_batch_that_does_not_divide_offers_the_nearest(refused: Refused, text: Path):
    error = refused(78, "train", text, *TINY_FLAGS, "--batch-size", "12", "--micro-batch-size", "5")
    assert "4 and 6" in error["do"]


@pytest.mark.parametrize("micro", [3, 64])
def test_a_batch_that_nobody_named_is_a_multiple_of_the_micro_batch_that_is_named(command: Command, text: Path, micro: int):
    tiny = [word for word in TINY_FLAGS if not word.startswith("--batch-size")]
    ended = command("train", text, "--out", "run", *tiny, "--micro-batch-size", str(micro))
    assert ended.code == 0, ended.err
    recorded = from_toml(Path("run/config.toml").read_text(), "config.toml")
    assert recorded["micro_batch_size"] == micro
    assert recorded["batch_size"] % micro == 0


def test_the_keys_of_a_file_that_come_before_a_preset_that_is_named_are_told(command: Command, a_run: Path):
    again = ("train", "text.txt", "--config", a_run / "config.toml", "--steps", "1", "--out")
    ended = command(*again, "large", "--preset", "laptop-large")
    assert ended.code == 0
    assert "comes before --preset laptop-large" in ended.err
    assert "--model.emb-dim" in ended.err
    assert "--model.tied-head" not in ended.err  # the file and the preset have the same
    assert "comes before" not in command(*again, "plain").err  # the negative control


@row(56, 59)
@pytest.mark.parametrize(
    ("name", "value", "do"),
    [
        ("--preset", "labtop", "did you mean 'laptop'?"),
        ("--preset", ESC, "known: "),
        ("--tokenizer", "gpt3", "gpt2"),
        ("--tokenizer", "bpe:many", "bpe:N"),
        ("--tokenizer", "no/such.json", "tokenizer.json"),
        ("--precision", "float16", "float"),
        ("--device", "gpu", "cuda"),
        ("--device", "cpu:7", "cpu"),
        ("--device", "", "cpu"),
        ("--device", "cuda:x", "cuda"),
        ("--compile", "yes", "on"),
        ("--model.block", "llama", "gpt2"),
        ("--optim.kind", "adam", "adamw"),
    ],
)
def test_an_unknown_name_offers_known_ones(refused: Refused, text: Path, name: str, value: str, do: str):
    error = refused(78, "train", text, *TINY_FLAGS, name, value)
    assert name.removeprefix("--") in error["where"]
    assert do in error["do"]


def test_a_name_that_no_system_takes_is_told_as_any_other(refused: Refused, here: Path):
    assert refused(66, "train", "x" * 300, "--out", "new")["what"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="its names are text")
def test_a_folder_whose_name_is_no_text_hinders_nothing_that_is_not_in_it(
    a_run: Path, command: Command, monkeypatch: pytest.MonkeyPatch
):
    text, run = Path("text.txt").absolute(), a_run.absolute()
    Path(NO_TEXT).mkdir()
    monkeypatch.chdir(NO_TEXT)
    assert command("train", text, "--out", run.with_name("new"), *TINY_FLAGS).code == 0
    assert command("train", "--resume", "--out", run, "--steps", "3").code == 0
    Path("here.txt").write_text(TEXT)
    assert command("train", "here.txt", "--out", run.with_name("other"), *TINY_FLAGS).code == 65


NO_TEXT = "caf\udce9"  # as Python has the byte 0xe9 of a command line that is UTF-8 elsewhere


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "run", "--samples", "2", "--stop", NO_TEXT),
        ("train", "text.txt", "--out", "new", *TINY_FLAGS, "--special-tokens", NO_TEXT),
        ("train", "text.txt", "--out", "new", *TINY_FLAGS, "--sample-prompt", NO_TEXT),
        ("train", "--resume", "--out", "run", "--sample-prompt", NO_TEXT),
        ("train", "text.txt", "--from", "run", "--steps", "1", "--out", NO_TEXT),
    ],
)
def test_what_is_no_text_is_told_before_anything_is_made(a_run: Path, refused: Refused, arguments: tuple[str, ...]):
    before = (a_run / "config.toml").read_bytes()
    assert "UTF-8" in refused(65, *arguments)["what"]
    assert not any(Path(name).exists() for name in ("new", NO_TEXT))
    assert (a_run / "config.toml").read_bytes() == before


@row(59)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there_is_refused(refused: Refused, text: Path, device: str):
    error = refused(78, "train", text, *TINY_FLAGS, "--device", device)
    assert device in error["what"]
    assert "--device cpu" in error["do"]


@pytest.mark.parametrize("more", [("-",), ("text.txt", "--val", "-")])
def test_standard_input_is_one_text(refused: Refused, text: Path, more: tuple[str, ...]):
    assert refused(78, "train", "-", *more, *TINY_FLAGS)["what"] == "standard input can be read only once"


def test_heads_that_have_no_room_are_told_to_be_left_out(command: Command, text: Path):
    notice = "no room for two heads that copy"  # for which one block is not enough
    assert notice in command("train", text, *TINY_FLAGS, "--model.induction-heads=true").err
    assert notice not in command("train", text, *TINY_FLAGS).err  # the preset's wish is nobody's


@pytest.mark.parametrize("second", [["--for", "1m"], ["--epochs", "2"]])
def test_two_lengths_are_one_too_many(refused: Refused, text: Path, second: list[str]):
    error = refused(78, "train", text, *TINY_FLAGS, *second)
    assert "--steps" in error["what"]
    assert second[0] in error["what"]


@row(60)
def test_a_model_beyond_the_machine_s_memory_says_how_much_it_needs(refused: Refused, text: Path):
    error = refused(78, "train", text, *TINY_FLAGS, "--model.emb-dim", str(2**19), "--model.n-layers", "96")
    assert re.search(r"needs about \d+\.\d GB, this machine has \d+\.\d GB", error["what"])
    assert "smaller" in error["do"]


@pytest.mark.parametrize("word", ["can't allocate memory", "CUDA out of memory. Tried to allocate 2 GiB"])
def test_memory_that_runs_out_is_told_and_another_fault_is_not_hidden(
    refused: Refused, command: Command, text: Path, monkeypatch: pytest.MonkeyPatch, word: str
):
    def fail(error: Exception) -> Callable[..., None]:
        def train(*arguments: Any, **options: Any) -> None:
            raise error

        return train

    for error in (MemoryError(), RuntimeError(f"[enforce fail] {word}\nand a backtrace")):
        monkeypatch.setattr(api, "train", fail(error))
        assert "--micro-batch-size" in refused(78, "train", text)["do"]
    monkeypatch.setattr(api, "train", fail(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="ours"):
        command("train", text)


def test_the_words_of_pytorch_and_numpy_when_memory_runs_out_are_known(
    refused: Refused, text: Path, monkeypatch: pytest.MonkeyPatch
):
    for allocate in (torch.empty, np.empty):
        monkeypatch.setattr(api, "train", lambda *_, allocate=allocate, **__: allocate(1 << 55))
        assert refused(78, "train", text)["what"] == "memory ran out"


def test_a_failure_of_the_system_that_no_module_foresaw_is_no_traceback(refused: Refused, text: Path):
    error = refused(73, "train", text, "--out", "x" * 300, *TINY_FLAGS)
    assert "x" * 300 in error["where"]


@pytest.mark.parametrize(("val", "codes"), [("text.txt", (78,)), ("none", (0,))])
def test_two_held_out_parts_are_one_too_many(command: Command, text: Path, val: str, codes: tuple[int, ...]):
    ended = command("train", text, *TINY_FLAGS, "--val-fraction=0.2", "--val", val, "--json")
    assert ended.code in codes
    if ended.code:
        assert error_of(ended, 78)["where"] == "--val-fraction"
    write(Path("my.toml"), "val = 'text.txt'")
    assert command("train", text, "--config", "my.toml", *TINY_FLAGS, "--val-fraction=0.2", "--val", val).code in codes
    assert command("train", text, "--config", "my.toml", *TINY_FLAGS).code == 0


def spelled(change: Callable[[dict[str, Any]], None]) -> str:
    """A small tokenizer's file with one thing wrong."""
    value = json.loads(train_bpe([TEXT], 262).json)
    change(value["model"])
    ids = value["model"]["vocab"]  # which those of the added tokens follow
    value["added_tokens"] = [one | {"id": ids[one["content"]]} for one in value["added_tokens"] if one["content"] in ids]
    return json.dumps(value)


def ids_that(**changes: int | None) -> Callable[[dict[str, Any]], None]:
    def change(model: dict[str, Any]) -> None:
        for word, token in changes.items():
            del model["vocab"][word]
            model["vocab"] |= {} if token is None else {word: token}

    return change


CUT = spelled(ids_that())[:-9]


@row(49)
@pytest.mark.parametrize("content", ["", "{}", "[]", "no JSON", '{"model": 3}', CUT])
def test_a_file_that_is_no_tokenizer_is_bad_data(refused: Refused, text: Path, content: str):
    write(Path("tokenizer.json"), content)
    error = refused(65, "train", text, *TINY_FLAGS, "--tokenizer", "tokenizer.json")
    assert error["where"] == "tokenizer.json"
    assert error["why"]
    assert "--tokenizer" in error["do"]


@pytest.mark.parametrize("begin", ["", "\ufeff"])
def test_a_comment_may_be_of_dots_and_a_file_begin_as_on_windows(command: Command, text: Path, begin: str):
    flags = "\n".join(f"{key} = {value}" for key, value in {"steps": 1, "batch_size": 4, "threads": 1}.items())
    write(Path("my.toml"), f"{begin}# {'.' * 300}\n{flags}\n")
    flags = [flag for flag in TINY_FLAGS if not flag.startswith(("--steps", "--batch-size", "--threads"))]
    assert command("train", text, "--config", "my.toml", "--out", "run", *flags).code == 0


@pytest.mark.parametrize("another", [["--tokenizer", "gpt2"], ["--special-tokens", "<|user|>"], ["--tokenizer", "bpe:270"]])
def test_a_run_s_own_configuration_takes_another_tokenizer(command: Command, a_run: Path, another: list[str]):
    ended = command("train", "--config", a_run / "config.toml", "--out", "again", *another)
    assert ended.code == 0, ended.err


def test_a_name_that_is_too_long_is_not_there(refused: Refused):
    for verb in (["generate"], ["verify"], ["report"], ["train", "--resume", "--out"]):
        refused(66, *verb, "n" * 300)


@row(50)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (ids_that(a=None), "no word has id"),
        (ids_that(a=1000), "no word has id"),
        (ids_that(a=5), "id 5 stands for "),
        (ids_that(**{"<|endoftext|>": 0}), "id 0 stands for "),
        (ids_that(**{"<|endoftext|>": None}), "must have the last ids"),
        (lambda model: model["merges"].append(model["merges"][0]), "by the ids it must be None"),
        (lambda model: model["merges"].__setitem__(1, model["merges"][0]), "merge 1 is "),
        (lambda model: model["merges"].__setitem__(2, ["qqq", "zzz"]), "merge 2 is ('qqq', 'zzz')"),
        (lambda model: model["merges"].reverse(), "merge 0 is "),
        (
            lambda model: model["vocab"].update({"<|endoftext|>": 262, "zzz": 261}),
            "no merge makes the word b'zzz'",
        ),
    ],
)
def test_a_tokenizer_that_contradicts_itself_names_the_first_fault(
    refused: Refused, text: Path, change: Callable[[dict[str, Any]], None], why: str
):
    write(Path("tokenizer.json"), spelled(change))
    error = refused(65, "train", text, *TINY_FLAGS, "--tokenizer", "tokenizer.json")
    assert error["where"] == "tokenizer.json"
    assert why in error["why"]


@row(52)
def test_more_ids_than_two_bytes_hold_are_prepared_in_four(command: Command, text: Path, cache: Path):
    singles = [bytes([byte]) for byte in range(256)]
    words = [*singles, *(a + b for a in singles for b in singles)]
    write(Path("wide.json"), Tokenizer("pairs", {word: rank for rank, word in enumerate(words)}).json)
    ended = command("train", text, "--out", "run", *TINY_FLAGS, "--tokenizer", "wide.json", "--steps=1")
    assert ended.code == 0, ended.err
    (folder,) = cache.iterdir()
    assert json.loads((folder / "manifest.json").read_bytes())["dtype"] == "<u4"


def test_a_vocabulary_smaller_than_the_tokenizer_s_is_refused(refused: Refused, text: Path):
    error = refused(78, "train", text, *TINY_FLAGS, "--model.vocab-size", "256")
    assert error["where"] == "--model.vocab-size"
    assert "257" in error["what"]


def test_debug_shows_the_traceback_and_changes_nothing_else(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "no-such-file.txt", *TINY_FLAGS, "--debug", "--json"]) == 66
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert json.loads(shown.out.splitlines()[-1])["error"]["code"] == 66
