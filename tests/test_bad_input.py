"""What a person can get wrong: each mistake ends with its exit code and says what is wrong, where, and why or what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import firstwords
from firstwords import store
from firstwords.app.cli import main
from firstwords.app.console import visible
from firstwords.errors import DataError
from firstwords.model.generate import Sampling, generate
from firstwords.training import loop

TINY = ["--tokenizer=bytes", "--steps=2", "--batch-size=4", "--threads=1", "--precision=float32", "--device=cpu"]
TINY += ["--save-every=0s"]
TINY += ["--model.emb-dim=32", "--model.n-heads=2", "--model.n-layers=1", "--model.ff-dim=64", "--model.context-length=32"]
TEXT = "".join(f"The {n}. word of the text is {n * n}.\n" for n in range(100))
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
ESC = "\x1b"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


Command = Callable[..., Ended]
Refused = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIRSTWORDS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache/corpora"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process."""

    def run(*arguments: str | Path) -> Ended:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        ended = Ended(code, *capsys.readouterr())
        assert "Traceback" not in ended.out + ended.err
        assert ESC not in ended.out + ended.err
        return ended

    return run


@pytest.fixture
def refused(command: Command) -> Refused:
    """Run a command that must fail with `code`, plainly and with --json, and return the error."""

    def run(code: int, *arguments: str | Path) -> dict[str, Any]:
        plain = command(*arguments)
        assert plain.code == code, plain.err
        error = error_of(command(*arguments, "--json"), code)
        assert all(visible(error[part]) in plain.err for part in ("what", "where", "why", "do"))
        return error

    return run


def error_of(ended: Ended, code: int) -> dict[str, Any]:
    """Return the error of a command that ran with --json, which must be complete."""
    assert ended.code == code, ended.out + ended.err
    assert set(ended.json) == {"error"}
    error: dict[str, Any] = ended.json["error"]
    assert set(error) == {"code", "what", "where", "why", "do"}
    assert error["code"] == code
    assert error["what"]
    assert error["where"]
    assert error["why"] or error["do"], error
    return error


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write(tmp_path / "text.txt", TEXT)


@pytest.fixture(scope="module")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a text, a run of two steps on it, and the cache that goes with them."""
    place = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTWORDS_CACHE", str(place / "cache"))
        patch.chdir(place)
        write(place / "text.txt", TEXT)
        assert main(["train", "text.txt", "--out", "run", *TINY]) == 0
    return place


@pytest.fixture
def a_run(_template: Path, tmp_path: Path) -> Path:
    """A run of two steps, with checkpoints of both, that the test may spoil. Its text is `text.txt` beside it."""
    for path in _template.iterdir():
        if path.is_dir():
            shutil.copytree(path, tmp_path / path.name)
        else:
            shutil.copy(path, tmp_path / path.name)
    config = tmp_path / "run/config.toml"
    write(config, config.read_text().replace(str(_template), str(tmp_path)))
    return tmp_path / "run"


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def checkpoints(run: Path) -> list[Path]:
    found = sorted((run / "checkpoints").glob("step-*"))
    assert len(found) >= 2
    return found


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# The text


def test_a_missing_text_offers_the_nearest_name_and_makes_no_run(refused: Refused, text: Path):
    error = refused(66, "train", text.with_name("texd.txt"), "--out", "run", *TINY)
    assert (error["what"], error["where"]) == ("no such file", str(text.with_name("texd.txt")))
    assert str(text) in error["do"]
    assert not Path("run").exists()


def test_a_name_with_a_nul_is_no_file(refused: Refused):
    assert "\0" not in refused(66, "train", "a\0b.txt", *TINY)["where"]


def test_a_folder_without_text_is_no_input(refused: Refused, tmp_path: Path):
    write(tmp_path / "notes/a.csv", "a")
    error = refused(66, "train", "notes", *TINY)
    assert error["where"] == "notes"
    assert ".txt" in error["why"]


@pytest.mark.parametrize(("content", "says"), [("", "empty"), (" \n\t\u2003\r\n" * 500, "white space")])
@pytest.mark.parametrize("verb", ["train", "eval", "val"])
def test_a_text_without_words_is_bad_data(refused: Refused, a_run: Path, content: str, says: str, verb: str):
    write(Path("blank.txt"), content)
    arguments = {
        "train": ("train", "blank.txt", *TINY),
        "eval": ("eval", a_run, "blank.txt"),
        "val": ("train", "text.txt", "--val", "blank.txt", *TINY),
    }
    assert says in refused(65, *arguments[verb])["what"]


def test_a_text_shorter_than_a_context_names_the_largest_context_that_fits(refused: Refused, command: Command):
    write(Path("short.txt"), "twenty characters ..")
    error = refused(65, "train", "short.txt", "--out", "run", *TINY)
    assert "a context of 32 needs 33" in error["what"]
    largest = int(re.search(r"--model\.context-length (\d+)", error["do"])[1])
    refused(65, "train", "short.txt", "--out", "run", *TINY, "--model.context-length", str(largest + 1))
    assert command("train", "short.txt", "--out", "run", *TINY, "--model.context-length", str(largest)).code == 0


def test_a_text_of_one_character_asks_for_more(refused: Refused):
    write(Path("one.txt"), "a")
    assert refused(65, "train", "one.txt", *TINY)["do"].startswith("give more text")


def test_wrong_bytes_name_their_place_and_the_encoding_that_reads_them(refused: Refused, command: Command):
    before = "The first words.\n" * 100
    write(Path("latin.txt"), (before + "Une fenêtre fermée, là-bas.\n" * 20).encode("cp1252"))
    error = refused(65, "train", "latin.txt", "--out", "run", *TINY)
    assert error["where"] == f"latin.txt, line 101, byte offset {len(before) + 7}"
    flag = re.search(r"--encoding \w+", error["do"])[0]
    assert command("train", "latin.txt", "--out", "run", *TINY, *flag.split()).code == 0
    assert command("eval", "run", "latin.txt", *flag.split()).code == 0


@pytest.mark.parametrize(
    ("head", "kind"), [(PNG, "PNG"), (b"%PDF-1.7\n", "PDF"), (b"PK\x03\x04", "ZIP"), (b"\x7fELF\x02", "ELF")]
)
@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_binary_file_is_called_by_its_kind(refused: Refused, a_run: Path, head: bytes, kind: str, verb: str):
    write(Path("binary.txt"), head + bytes(100))
    error = refused(65, *(("train", "binary.txt", *TINY) if verb == "train" else ("eval", a_run, "binary.txt")))
    assert kind in error["what"]
    assert error["where"] == "binary.txt"


@pytest.mark.parametrize("line", ["{bad}", "[1]", "{}", '{"text": 1}'])
def test_a_bad_line_of_json_is_named_by_its_number(refused: Refused, line: str):
    write(Path("a.jsonl"), f'{{"text": "good"}}\n{{"text": "good"}}\n{line}\n')
    assert refused(65, "train", "a.jsonl", *TINY)["where"].startswith("a.jsonl:3")


def test_an_unknown_encoding_offers_the_nearest(refused: Refused, text: Path):
    assert "did you mean" in refused(78, "train", text, *TINY, "--encoding", "utf-9")["do"]


# The command line and the configuration


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


@pytest.mark.parametrize(
    ("toml", "where", "do"),
    [
        ("stesp = 2", "stesp", "did you mean 'steps'?"),
        ("[model]\nn_layer = 2", "model.n_layer", "did you mean 'model.n_layers'?"),
        ("[optimizer]\npeak_lr = 2", "optimizer.peak_lr", "did you mean 'optim.peak_lr'?"),
        ("steps = 0", "--steps", "from 1"),
        ("steps = 1.5", "--steps", ""),
        ("steps = true", "--steps", ""),
        ("seed = -1", "--seed", "from 0"),
        ("[optim]\npeak_lr = nan", "--optim.peak-lr", "from 1e-12"),
        ("[optim]\npeak_lr = -inf", "--optim.peak-lr", "from 1e-12"),
        ("[model]\ntied_head = 1", "--model.tied-head", ""),
        ("steps = [1]", "--steps", ""),
        ("precision = ['float32']", "--precision", "float32"),
        ("for_s = 'soon'", "--for", "90s"),
        ("model = 5", "model", "did you mean 'model."),
    ],
)
def test_a_bad_key_of_a_configuration_file_is_named(refused: Refused, text: Path, toml: str, where: str, do: str):
    write(Path("my.toml"), toml)
    tiny = [word for word in TINY if not word.startswith(("--steps", "--precision"))]
    error = refused(78, "train", text, "--config", "my.toml", "--out", "run", *tiny)
    assert where in error["where"]
    assert do in error["do"]
    assert not Path("run").exists()


@pytest.mark.parametrize(("toml", "codes"), [("text = 'text.txt'", (0, 78)), ("text = 5", (78,)), ("text = [5]", (78, 66))])
def test_the_texts_of_a_configuration_file_are_names(command: Command, text: Path, toml: str, codes: tuple[int, ...]):
    write(Path("my.toml"), toml)
    ended = command("train", "--config", "my.toml", "--out", "run", *TINY)
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("--steps", value) for value in ("-1", "0", "1000000001")),
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
    tiny = [word for word in TINY if not (name in ("--for", "--epochs") and word.startswith("--steps"))]
    error = refused(78, "train", text, "--out", "run", *tiny, f"{name}={value}")
    assert error["where"] == name
    assert re.search(r"allowed: (from|above) \S+", error["do"])
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("--steps", value) for value in ("abc", "nan", "inf", "1e400", "1.5", "", "0x10")),
        *(("--optim.peak-lr", value) for value in ("abc", "", "1e-3x")),
        ("--model.tied-head", "maybe"),
        ("--save-every", "soon"),
    ],
)
def test_what_is_not_of_a_key_s_type_is_named(refused: Refused, text: Path, name: str, value: str):
    error = refused(78, "train", text, "--out", "run", *TINY, f"{name}={value}")
    assert error["where"] == name
    assert repr(value) in error["what"]


def test_a_width_that_its_heads_cannot_share_offers_the_nearest(refused: Refused, command: Command, text: Path):
    error = refused(78, "train", text, "--out", "run", *TINY, "--model.emb-dim", "34", "--model.n-heads", "4")
    assert "34 channels" in error["what"]
    widths = re.findall(r"\d+", error["do"])
    assert widths == ["32", "36"]
    assert command("train", text, "--out", "run", *TINY, "--model.emb-dim", "32", "--model.n-heads", "4").code == 0


def test_an_odd_head_cannot_be_rotated_and_the_nearest_widths_are_offered(refused: Refused, text: Path):
    error = refused(78, "train", text, *TINY, "--model.emb-dim", "30")
    assert "28 and 32" in error["do"]


def test_a_micro_batch_that_does_not_divide_offers_the_nearest(refused: Refused, text: Path):
    error = refused(78, "train", text, *TINY, "--batch-size", "12", "--micro-batch-size", "5")
    assert "4 and 6" in error["do"]


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
    error = refused(78, "train", text, *TINY, name, value)
    assert name.removeprefix("--") in error["where"]
    assert do in error["do"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there_is_refused(refused: Refused, text: Path, device: str):
    error = refused(78, "train", text, *TINY, "--device", device)
    assert device in error["what"]
    assert "--device cpu" in error["do"]


@pytest.mark.parametrize("second", [["--for", "1m"], ["--epochs", "2"]])
def test_two_lengths_are_one_too_many(refused: Refused, text: Path, second: list[str]):
    error = refused(78, "train", text, *TINY, *second)
    assert "--steps" in error["what"]
    assert second[0] in error["what"]


def test_a_model_beyond_the_machine_s_memory_says_how_much_it_needs(refused: Refused, text: Path):
    error = refused(78, "train", text, *TINY, "--model.emb-dim", str(2**19), "--model.n-layers", "96")
    assert re.search(r"needs about \d+\.\d GB, this machine has \d+\.\d GB", error["what"])
    assert "smaller" in error["do"]


def test_a_file_that_is_no_tokenizer_is_bad_data(refused: Refused, text: Path):
    write(Path("tokenizer.json"), "{}")
    assert "tokenizer.json" in refused(65, "train", text, *TINY, "--tokenizer", "tokenizer.json")["where"]


def test_a_vocabulary_smaller_than_the_tokenizer_s_is_refused(refused: Refused, text: Path):
    error = refused(78, "train", text, *TINY, "--model.vocab-size", "256")
    assert error["where"] == "--model.vocab-size"
    assert "257" in error["what"]


def test_debug_shows_the_traceback_and_changes_nothing_else(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "no-such-file.txt", *TINY, "--debug", "--json"]) == 66
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert json.loads(shown.out.splitlines()[-1])["error"]["code"] == 66


# The place of the run


def test_a_folder_that_holds_another_run_is_left_alone(refused: Refused, a_run: Path):
    before = tree(a_run)
    error = refused(73, "train", "text.txt", "--out", a_run, *TINY)
    assert (error["where"], tree(a_run)) == (str(a_run), before)
    assert "--resume" in error["do"]


@pytest.mark.parametrize("out", ["taken", "taken/run"])
def test_a_file_where_the_run_should_be_is_left_alone(refused: Refused, text: Path, out: str):
    write(Path("taken"), "precious")
    error = refused(73, "train", text, "--out", out, *TINY)
    assert "taken" in error["where"]
    assert Path("taken").read_text() == "precious"


@pytest.mark.parametrize("place", ["runs", "runs/text"])
def test_a_file_where_the_default_run_should_be_is_left_alone(command: Command, text: Path, place: str):
    write(Path(place), "precious")
    ended = command("train", text, *TINY, "--json")
    if ended.code != 0:  # a free number is as good
        error_of(ended, 73)
    assert Path(place).read_text() == "precious"


def test_a_folder_with_other_files_is_left_alone(refused: Refused, text: Path):
    write(Path("photos/cat.png"), PNG)
    error = refused(73, "train", text, "--out", "photos", *TINY)
    assert error["where"] == "photos"
    assert tree(Path("photos")) == ["cat.png"]


@pytest.mark.parametrize("arguments", [["--resume"], ["text.txt", *TINY]])
def test_a_run_in_use_names_its_process_and_host(refused: Refused, a_run: Path, arguments: list[str]):
    out = a_run if "--resume" in arguments else Path("fresh").absolute()
    out.mkdir(exist_ok=True)
    hold = "import sys; from pathlib import Path; from firstwords import store\n"
    hold += "with store.lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(out / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        error = refused(73, "train", "--out", out, *arguments)
        holder.stdin.close()
        assert holder.wait() == 0
    assert error["where"] == str(out)
    assert f"pid {holder.pid} on {socket.gethostname()}" in error["why"]


def test_a_place_that_may_not_be_written_is_77(refused: Refused, text: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(os, "mkdir", fail)  # root, as tests often run, may write everywhere
    assert refused(77, "train", text, "--out", "run", *TINY)["where"] == "run"


# Going on with a run


def test_resume_needs_a_name(refused: Refused):
    assert "--out" in refused(78, "train", "--resume")["do"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_resume_without_a_run_begins_none(refused: Refused, tmp_path: Path, is_folder: bool):
    if is_folder:
        Path("run").mkdir()
    before = tree(tmp_path)
    assert refused(66, "train", "--resume", "--out", "run")["where"] == "run"
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("--model.emb-dim", "64"), ("--seed", "7"), ("--tokenizer", "gpt2"), ("--batch-size", "8"), ("--optim.peak-lr", "1")],
)
def test_resume_refuses_what_the_run_recorded_otherwise(refused: Refused, a_run: Path, name: str, value: str):
    assert refused(78, "train", "--resume", "--out", a_run, name, value)["where"] == name


def test_resume_accepts_what_the_run_recorded(command: Command, a_run: Path):
    assert command("train", "--resume", "--out", a_run, *TINY).code == 0


@pytest.mark.parametrize("shown", [Path, Path.absolute])
def test_resume_accepts_the_name_of_the_run_s_own_text(command: Command, a_run: Path, shown: Callable[[Path], Path]):
    ended = command("train", shown(Path("text.txt")), "--resume", "--out", a_run)
    assert ended.code == 0, ended.err


def test_resume_with_another_text_is_refused(refused: Refused, a_run: Path):
    write(Path("other.txt"), TEXT)
    error = refused(78, "train", "other.txt", "--resume", "--out", a_run)
    assert "text" in error["where"]


def test_resume_does_not_pass_over_a_configuration_file_in_silence(command: Command, a_run: Path):
    write(Path("my.toml"), "seed = 7")
    assert command("train", "--resume", "--out", a_run, "--config", "my.toml").code == 78


@pytest.mark.parametrize(
    ("name", "content", "codes"),
    [
        ("config.toml", b"seed = \xff", (65, 78)),
        ("config.toml", b"seed = ", (78,)),
        ("config.toml", b"stesp = 1", (78,)),
        ("corpus.json", b"{", (65,)),
        ("corpus.json", b"{}", (65,)),
        ("metrics.jsonl", b'{"event": "st\xff\n{}\n', (65,)),
    ],
)
@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_damaged_file_of_a_run_is_named(command: Command, a_run: Path, verb: str, name: str, content: bytes, codes: Any):
    write(a_run / name, content)
    ended = command(*(("train", "--resume", "--out", a_run) if verb == "train" else ("eval", a_run)), "--json")
    if verb == "eval" and ended.code == 0:  # it needs less of the run
        return
    assert ended.code in codes
    error_of(ended, ended.code)


def test_resume_with_a_changed_text_says_so(refused: Refused, a_run: Path):
    with Path("text.txt").open("a") as file:
        file.write("one more line\n")
    error = refused(65, "train", "--resume", "--out", a_run, "--steps", "3")
    assert "changed since the run began" in error["what"]
    assert "text.txt" in error["where"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_goes_on(command: Command, a_run: Path, name: str):
    older, newest = checkpoints(a_run)[-2:]
    shutil.copytree(a_run, "whole")
    flip_a_byte(newest / name)
    ended = command("train", "--resume", "--out", a_run, "--json")
    assert ended.code == 0
    aside = list((a_run / "checkpoints").glob(f"damaged-{newest.name}-*"))
    assert len(aside) == 1
    assert aside[0].name in ended.err
    assert newest.name in ended.err
    assert ended.json["steps"] == 2
    whole = command("train", "--resume", "--out", "whole", "--json").json
    assert ended.json["weights_sha256"] == whole["weights_sha256"]
    lines = [json.loads(line) for line in (a_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2]
    assert int(older.name.removeprefix("step-")) == 1


def test_resume_with_only_damaged_checkpoints_is_bad_data_however_often(command: Command, a_run: Path):
    for folder in checkpoints(a_run):
        flip_a_byte(folder / "model.safetensors")
    metrics = (a_run / "metrics.jsonl").read_bytes()
    for _ in range(2):
        error = error_of(command("train", "--resume", "--out", a_run, "--json"), 65)
        assert "damaged" in error["what"]
        assert "step-00000002" in error["why"]
        assert (a_run / "metrics.jsonl").read_bytes() == metrics


# What the model cannot do


def spoil_ids(folder: Path, part: str) -> None:
    """Put an id beyond the vocabulary of bytes into a prepared text whose checksums hold."""
    path = folder / f"{part}.bin"
    data = bytearray(path.read_bytes())
    data[20:22] = (60_000).to_bytes(2, "little")
    path.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"][path.name]["sha256"] = store.sha256(bytes(data))
    del manifest["sha256"]
    manifest["sha256"] = store.sha256(store.canonical_json(manifest))
    (folder / "manifest.json").write_bytes(store.canonical_json(manifest))
    store.verify(folder)


def test_an_id_beyond_the_vocabulary_in_a_prepared_text_is_bad_data(refused: Refused, a_run: Path, cache: Path):
    (folder,) = cache.iterdir()
    spoil_ids(folder, "val")
    error = refused(65, "eval", a_run)
    assert "token id 60000 is beyond the vocabulary of 257" in error["what"]
    assert error["where"] == f"{folder / 'val.bin'}, token 10"


def test_training_prepares_a_text_again_whose_ids_are_beyond_the_vocabulary(command: Command, a_run: Path, cache: Path):
    (folder,) = cache.iterdir()
    expected = (folder / "train.bin").read_bytes()
    spoil_ids(folder, "train")
    ended = command("train", "text.txt", "--out", "again", *TINY)
    assert ended.code == 0
    assert "token id 60000 is beyond the vocabulary of 257" in ended.err
    assert f"damaged-{folder.name}" in ended.err
    assert (folder / "train.bin").read_bytes() == expected


@pytest.mark.parametrize("ids", [[257], [-1], [1, 2, 10**6], []])
def test_generating_from_an_id_beyond_the_vocabulary_is_a_wrong_call(a_run: Path, ids: list[int]):
    model = firstwords.load(a_run).model
    with pytest.raises(ValueError, match="vocabulary of 257" if ids else "no token"):
        next(generate(model, ids, Sampling(), torch.Generator()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("--temperature", value) for value in ("-1", "nan", "inf", "1e400", "abc", "")),
        *(("--top-k", value) for value in ("0", "-1", "1.5", "abc")),
        *(("--top-p", value) for value in ("0", "1.5", "nan", "-1", "abc")),
        *(("--max-new-tokens", value) for value in ("0", "-1", "abc", "1e3")),
        *(("--samples", value) for value in ("0", "-1", "abc")),
        *(("--seed", value) for value in ("abc", "9" * 30)),
    ],
)
def test_an_impossible_way_to_speak_is_refused(refused: Refused, a_run: Path, name: str, value: str):
    error = refused(78, "generate", a_run, "--prompt", "The", f"{name}={value}")
    assert error["where"] == name
    assert value in error["what"] or str(float(value)) in error["what"]


@pytest.mark.parametrize("verb", [["generate"], ["eval"], ["info"], ["explain", "some text"]])
@pytest.mark.parametrize("place", ["nothing", "empty", "text.txt"])
def test_what_is_no_run_is_no_input(refused: Refused, text: Path, verb: list[str], place: str):
    Path("empty").mkdir()
    assert refused(66, verb[0], place, *verb[1:])["where"] == place


def test_a_run_without_a_checkpoint_is_no_input(refused: Refused, a_run: Path):
    shutil.rmtree(a_run / "checkpoints")
    assert "--resume" in refused(66, "generate", a_run)["do"]


@pytest.mark.parametrize("verb", [["generate", "--max-new-tokens", "3"], ["eval"], ["info"], ["explain", "some text"]])
def test_a_damaged_newest_checkpoint_is_told_and_an_older_one_used(command: Command, a_run: Path, verb: list[str]):
    flip_a_byte(checkpoints(a_run)[-1] / "model.safetensors")
    before = tree(a_run)
    ended = command(verb[0], a_run, *verb[1:])
    assert ended.code == 0
    assert "step-00000002" in ended.err
    assert "older" in ended.err
    assert tree(a_run) == before


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
    assert f"{len(text)} token" in refused(65, "explain", a_run, text)["what"]


def test_evaluating_on_a_text_that_is_not_there_is_no_input(refused: Refused, a_run: Path):
    assert "text.txt" in refused(66, "eval", a_run, "texd.txt")["do"]


@pytest.mark.parametrize("is_gradient", [False, True])
def test_diverged_training_names_the_step_and_leaves_the_last_good_checkpoint(
    command: Command, a_run: Path, monkeypatch: pytest.MonkeyPatch, is_gradient: bool
):
    target_nats = loop.target_nats
    n_calls = 0

    def diverging(*arguments: Any) -> torch.Tensor:
        nonlocal n_calls
        n_calls += 1
        nats = target_nats(*arguments)
        if n_calls < 3:
            return nats
        return nats + 0 * (nats - nats).sqrt() if is_gradient else nats * float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "target_nats", diverging)
        ended = command("train", "text.txt", "--out", "other", *TINY, "--json", "--steps", "5")
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


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("is_held_out", [True, False])
def test_a_rate_far_too_high_is_diverged_at_whatever_step_and_leaves_finite_weights(
    command: Command, text: Path, steps: int, is_held_out: bool
):
    shape = ["--model.block=gpt2", "--optim.kind=adamw", "--optim.peak-lr=1e12", "--optim.warmup-steps=0"]
    val = [] if is_held_out else ["--val-fraction=0"]
    ended = command("train", text, "--out", "run", *TINY, *shape, *val, "--steps", str(steps), "--json")
    error = error_of(ended, 70)
    assert re.search(r"step \d+", error["where"])
    assert "--optim.peak-lr" in error["do"]
    assert all(is_finite(folder) for folder in Path("run/checkpoints").glob("step-*"))
    assert command("generate", "run", "--max-new-tokens", "3").code == 0


# What is shown


@pytest.mark.parametrize("name", [f"{ESC}[31mred.txt", "a\nb.txt", "\x9b31m.txt"])
def test_control_characters_of_a_text_s_name_are_shown_escaped(command: Command, tmp_path: Path, name: str):
    write(tmp_path / name, TEXT)
    ended = command("train", name, *TINY)  # which refuses a bare escape character in the output
    assert ended.code == 0
    assert "\x9b" not in ended.out + ended.err
    assert command("train", name + "x", *TINY).code == 66


def test_a_text_whose_name_is_not_utf8_is_learnt_from_or_refused(command: Command, tmp_path: Path):
    name = os.fsdecode(b"caf\xe9.txt")
    write(tmp_path / name, TEXT)
    assert command("train", name, *TINY).code in (0, 65, 66, 78)


def test_control_characters_of_a_run_s_name_are_shown_escaped(command: Command, text: Path):
    out = f"{ESC}]0;title\x07run"
    ended = command("train", text, "--out", out, *TINY)
    assert ended.code == 0
    assert r"\x1b]0;title\x07run" in ended.out
    for verb in (["info"], ["eval"]):
        assert command(*verb, out).code == 0
    assert command("train", text, "--out", out, *TINY).code == 73


def test_control_characters_that_a_model_says_are_shown_escaped(command: Command, a_run: Path):
    ended = command("generate", a_run, "--prompt", f"{ESC}[2J\0", "--max-new-tokens", "300", "--temperature", "2")
    assert ended.code == 0
    assert r"\x1b[2J\x00" in ended.out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", ended.out)
    ended = command("explain", a_run, f"{ESC}[2J\0")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", ended.out)


# Without torch


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (0, ["--help"]),
        (2, ["train", "--stesp", "2"]),
        (66, ["train", "no-such-file.txt"]),
        (78, ["train", "text.txt", "--preset", "labtop"]),
        (78, ["train", "text.txt", "--steps", "0"]),
        (78, ["train", "text.txt", "--model.emb-dim", "33", "--model.n-heads", "2"]),
        (66, ["train", "--resume", "--out", "run"]),
        (65, ["train", "short.txt", "--tokenizer", "bytes"]),
        (66, ["generate", "no-such-run"]),
        (78, ["generate", "no-such-run", "--samples", "0"]),
    ],
)
def test_a_mistake_that_needs_no_torch_is_told_before_torch_is_imported(code: int, arguments: list[str], text: Path):
    write(Path("short.txt"), "short")
    program = "import sys; from firstwords.app.cli import main\ntry: code = main(sys.argv[1:])\n"
    program += "except SystemExit as left: code = left.code\nprint(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{code} False", done.stderr


def test_a_damaged_prepared_text_is_an_error_of_data(a_run: Path, cache: Path):
    (folder,) = cache.iterdir()
    flip_a_byte(folder / "val.bin")
    with pytest.raises(DataError, match=r"val\.bin"):
        firstwords.evaluate(a_run)
