"""What can be wrong with a text: it is refused with its exit code and what to do, or learnt exactly as it is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from command import ESC, TEXT, TINY, Command, Refused, write

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


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
