"""What `firstwords.text.sources` promises: texts come back exactly, and everything else is refused with a reason."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import socket
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from firstwords import store
from firstwords.errors import (
    ConfigError,
    DataError,
    FirstwordsError,
    NoInputError,
    PermissionDeniedError,
    StorageError,
)
from firstwords.text.sources import PIECE_BYTES, Texts, read

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def contents(texts: Texts) -> list[str]:
    return ["".join(document.pieces()) for document in texts]


def names(texts: Texts) -> list[str]:
    return [document.name for document in texts]


def error_of(kind: type[FirstwordsError], *paths: str | Path, **options: Any) -> FirstwordsError:
    """Read everything; return the error, which must be of exactly this kind and say where and what to do."""
    with pytest.raises(kind) as caught:
        contents(read(paths, **options))
    assert caught.type is kind
    assert caught.value.what
    assert caught.value.where
    assert caught.value.do
    return caught.value


def stdin_holding(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


# What is read


def test_no_paths_is_the_topics_of_pydoc_as_one_document():
    texts = read([])
    assert (texts.name, names(texts)) == ("pydoc-topics", ["pydoc_data.topics"])
    assert 300_000 < len(contents(texts)[0]) < 1_000_000
    assert contents(texts) == contents(texts)


@pytest.mark.parametrize(
    "text",
    [
        "a\r\nb\rc\n\u2028d\x85",
        "👩\u200d👩\u200d👧 e\u0301",
        "\u202eשלום\u202c مرحبا",
        "in\ufeffside",
        "\x1b[31m<|endoftext|>",
        "a",
    ],
)
def test_a_text_comes_back_exactly(tmp_path: Path, text: str):
    assert contents(read([write(tmp_path / "a.txt", text)])) == [text]


@pytest.mark.parametrize("shift", range(5))
def test_characters_across_the_border_of_two_pieces_come_back_exactly(tmp_path: Path, shift: int):
    text = "x" * (PIECE_BYTES - 4 + shift) + "👩\u200d👩\u200d👧\r\nשלום"
    document = next(iter(read([write(tmp_path / "a.txt", text)])))
    pieces = list(document.pieces())
    assert len(pieces) == 2
    assert "".join(pieces) == text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_is_obeyed_and_dropped_and_said_unless_utf8(tmp_path: Path, encoding: str):
    path = write(tmp_path / "a.txt", "\ufeffé👧\n\ufeff".encode(encoding))
    notices: list[str] = []
    assert contents(read([path], notice=notices.append)) == ["é👧\n\ufeff"]
    assert [encoding in notice for notice in notices] == ([] if encoding == "utf-8" else [True])
    assert contents(read([path], encoding=encoding)) == ["é👧\n\ufeff"]


@pytest.mark.parametrize("encoding", ["cp1252", "Latin-1", "utf-16-le", "utf-16", "utf-7", "UTF8"])
def test_encoding_overrides_the_default(tmp_path: Path, encoding: str):
    assert contents(read([write(tmp_path / "a.txt", "café\r\n".encode(encoding))], encoding=encoding)) == ["café\r\n"]


@pytest.mark.parametrize(("content", "told"), [("café".encode(), 1), ("café".encode("cp1252"), 0), (b"coffee", 0)])
def test_a_file_of_utf8_that_is_read_in_the_named_encoding_is_told(tmp_path: Path, content: bytes, told: int):
    notices: list[str] = []
    read([write(tmp_path / "a.txt", content)], encoding="cp1252", notice=notices.append)
    assert [("UTF-8" in line, "cp1252" in line) for line in notices] == [(True, True)] * told


def test_a_mark_of_another_encoding_than_the_named_one_is_text(tmp_path: Path):
    assert contents(read([write(tmp_path / "a.txt", "\ufeffa")], encoding="cp1252")) == ["ï»¿a"]


def test_texts_can_be_iterated_again_and_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stdin_holding(monkeypatch, "línea\n".encode() * 300_000)
    texts = read([write(tmp_path / "a.txt", "one"), "-", write(tmp_path / "b.jsonl", '{"text": "two"}\n')])
    expected = ["one", "línea\n" * 300_000, "two"]
    assert contents(texts) == expected
    assert contents(texts) == expected
    for left, right in zip(texts, texts, strict=True):
        assert all(a == b for a, b in zip(left.pieces(), right.pieces(), strict=True))
        assert list(left.pieces()) == list(left.pieces())
    assert (texts.name, names(texts)[1]) == ("a", "standard input")


def test_a_folder_is_searched_in_sorted_order_without_hidden_and_other_files(tmp_path: Path):
    for name in ["b.txt", "a/z.md", "a.TXT", "a/b/c.jsonl.gz", ".hidden.txt", ".git/x.txt", "code.py", "é.md.gz"]:
        text = '{"text": "json"}' if "jsonl" in name else name
        write(tmp_path / "notes" / name, gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text)
    texts = read([tmp_path / "notes"])
    assert texts.name == "notes"
    assert contents(texts) == ["a.TXT", "json", "a/z.md", "b.txt", "é.md.gz"]


def test_what_a_folder_holds_that_is_not_read_is_said(tmp_path: Path):
    for name in ("a.py", "b.py", "c.org", "Makefile", ".hidden", "README.md"):
        write(tmp_path / name, "some text")
    told: list[str] = []
    assert len(list(read([tmp_path], notice=told.append))) == 1
    (line,) = told
    assert "other files are not read, 4 of .py, " in line
    assert ".org" in line
    for name in ("a.py", "b.py", "c.org", "Makefile"):
        (tmp_path / name).unlink()
    read([tmp_path], notice=pytest.fail)  # the negative control


def test_a_run_in_the_text_s_folder_is_no_text(tmp_path: Path):
    write(tmp_path / "a.txt", "a")
    for run in (tmp_path / "runs/b", tmp_path / "c"):
        write(run / "config.toml", "")
        write(run / "samples.jsonl", '{"event": "sample", "text": "what the model said"}')
        write(run / "notes.txt", "")
        (run / "checkpoints").mkdir()
    write(tmp_path / "d/config.toml", "")  # the negative control: of another tool
    write(tmp_path / "d/d.txt", "d")
    told: list[str] = []
    assert contents(read([tmp_path], notice=told.append)) == ["a", "d"]
    assert ["it is a run" in line for line in told] == [True, True, False]
    assert ".toml" in told[2]
    error_of(NoInputError, tmp_path / "c")


def test_links_to_files_are_followed_and_links_to_folders_are_said(tmp_path: Path):
    write(tmp_path / "real/a.txt", "a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").symlink_to(tmp_path / "real/a.txt")
    (tmp_path / "folder/round").symlink_to(tmp_path / "folder")
    notices: list[str] = []
    assert contents(read([tmp_path / "folder"], notice=notices.append)) == ["a"]
    assert len(notices) == 1
    assert "round" in notices[0]


def test_a_named_file_of_any_suffix_is_text(tmp_path: Path):
    assert contents(read([write(tmp_path / "main.py", "print()")])) == ["print()"]


def test_gzip_is_known_by_its_first_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed = gzip.compress("ä".encode() * 10, mtime=0) + gzip.compress(b"!", mtime=0)
    stdin_holding(monkeypatch, packed)
    assert contents(read([write(tmp_path / "a.txt", packed), "-"])) == ["ä" * 10 + "!"] * 2


def test_jsonl_gives_a_document_a_line(tmp_path: Path):
    lines = ['{"text": "a\\nb", "id": 1}\r\n', "\n", " \n", '{"text": "\u2028\\ud83d\\udc67"}\n', '{"text": ""}']
    path = write(tmp_path / "a.jsonl", "\ufeff" + "".join(lines))
    assert contents(read([path])) == ["a\nb", "\u2028👧", ""]
    assert names(read([path])) == [f"{path}:1", f"{path}:4", f"{path}:5"]


def test_jsonl_lines_across_pieces_come_back_exactly(tmp_path: Path):
    texts = ["é" * PIECE_BYTES, "b" * 10, "c" * (PIECE_BYTES + 1)]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    assert contents(read([path])) == texts
    assert [len(list(document.pieces())) for document in read([path])] == [1, 1, 2]


def test_only_plain_utf8_is_as_long_on_disk_as_it_is_read(tmp_path: Path):
    """By it is told how far a pass is: UTF-16 would be half-way at its end, and be taken for too large."""
    plain = write(tmp_path / "plain.txt", "süß")
    assert read([plain, plain]).n_bytes == 2 * len("süß".encode())
    others = {"a.txt": "süß".encode("utf-16"), "b.txt": gzip.compress(b"a"), "c.jsonl": b'{"text": "a"}\n'}
    for name, data in others.items():
        assert read([plain, write(tmp_path / name, data)]).n_bytes is None
    assert read([plain], encoding="latin-1").n_bytes is None


def test_texts_have_short_names_and_are_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "v1.2 notes/my text.v2.txt.gz", gzip.compress(b"a", mtime=0))
    monkeypatch.chdir(tmp_path / "v1.2 notes")
    texts = read(["my text.v2.txt.gz"])
    monkeypatch.chdir("/")
    assert texts.name == "my text.v2"
    assert contents(texts) == ["a"]
    monkeypatch.chdir(tmp_path / "v1.2 notes")
    assert [read([path]).name for path in (".", "../v1.2 notes", tmp_path / "v1.2 notes/../v1.2 notes")] == [
        "v1.2 notes"
    ] * 3


@pytest.mark.parametrize(
    "name", ["a\nb.txt", "\x1b[31m.txt", "-x.txt", "it's é.txt", os.fsdecode(b"\xff.txt"), "ä" * 125 + ".txt"]
)
def test_strange_names_work_and_are_shown_escaped(tmp_path: Path, name: str):
    texts = read([write(tmp_path / name, "a")])
    assert contents(texts) == ["a"]
    assert names(texts)[0].isprintable()
    assert texts.name.isprintable()


def test_a_few_nul_characters_are_text(tmp_path: Path):
    assert contents(read([write(tmp_path / "a.txt", "a" * 99 + "\0")])) == ["a" * 99 + "\0"]


@pytest.mark.parametrize("head", ["<!DOCTYPE HTML>", "\n <html lang=en>"])
def test_a_page_is_read_with_a_notice(tmp_path: Path, head: str):
    notices: list[str] = []
    assert contents(read([write(tmp_path / "a.txt", head)], notice=notices.append)) == [head]
    assert "HTML" in notices[0]


JAPANESE = "山の上に寺がある。\n"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", JAPANESE.encode("iso2022_jp"), "ISO-2022-JP"),
        ("a.txt", JAPANESE.encode(), None),
        ("dump.gz", gzip.compress(b'{"text": "one"}\n{"text": "two"}\n', mtime=0), "lines of JSON"),
        ("dump.jsonl", b'{"text": "one"}\n{"text": "two"}\n', None),
        ("a.txt", b'{"text": is how it begins\nand goes on', None),
        ("a.txt", b'{"other": "one"}\n', None),
    ],
)
def test_what_is_no_prose_by_its_beginning_is_told(tmp_path: Path, name: str, content: bytes, told: str | None) -> None:
    notices: list[str] = []
    assert contents(read([write(tmp_path / name, content)], notice=notices.append))
    assert [told in line for line in notices if told] == ([True] if told else [])
    assert told or not notices


def test_the_mark_of_utf8_in_an_encoding_s_name_is_no_other_encoding(tmp_path: Path) -> None:
    notices: list[str] = []
    path = write(tmp_path / "a.txt", "\ufeffcafé".encode())
    assert contents(read([path], encoding="utf-8-sig", notice=notices.append)) == ["café"]
    assert not notices


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_memory_does_not_grow_with_a_file_of_one_line(tmp_path: Path, suffix: str):
    path = tmp_path / f"long{suffix}"
    with gzip.open(path, "wb", compresslevel=1) if suffix.endswith(".gz") else path.open("wb") as file:
        for _ in range(64):
            file.write(b"x" * 2**20)
    tracemalloc.start()
    try:
        n_characters = sum(len(piece) for document in read([path]) for piece in document.pieces())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_characters == 64 * 2**20
    assert peak < 16 * 2**20


def test_an_unfinished_iteration_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stdin_holding(monkeypatch, b"a" * 3 * PIECE_BYTES)
    for document in read([write(tmp_path / "a.txt", "a" * 3 * PIECE_BYTES), "-"]):
        assert next(document.pieces())  # an open file would be a ResourceWarning, which is an error here


# What is refused at once


def test_standard_input_that_is_closed_is_no_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it then
    assert error_of(NoInputError, "-").what == "is closed"


def test_a_missing_file_names_the_nearest(tmp_path: Path):
    write(tmp_path / "shakespeare.txt", "a")
    error = error_of(NoInputError, tmp_path / "shakespear.txt")
    assert (error.what, error.do) == ("no such file", f"did you mean {tmp_path / 'shakespeare.txt'}?")


@pytest.mark.parametrize("name", ["", "no/such/folder/a.txt", "file.txt/a.txt", "x" * 300])
def test_a_path_to_nothing_is_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file.txt", "a")
    error_of(NoInputError, name)


def test_a_link_that_leads_nowhere_is_not_its_own_nearest_name(tmp_path: Path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.md")
    assert "did you mean" not in error_of(NoInputError, tmp_path / "a.txt").do


def test_a_loop_of_links_is_no_input(tmp_path: Path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    error_of(NoInputError, tmp_path / "a.txt")
    error_of(NoInputError, tmp_path)


def test_a_folder_without_text_names_the_suffixes(tmp_path: Path):
    write(tmp_path / "a.csv", "a")
    assert ".txt, .md, .jsonl" in error_of(NoInputError, tmp_path).why


def test_a_pipe_socket_or_device_is_no_input_and_never_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    os.mkfifo("pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        for path in ["pipe.txt", "socket.txt", "/dev/zero", "/dev/random", "."]:
            assert error_of(NoInputError, path).what == "not a regular file"


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.EACCES, PermissionDeniedError), (errno.EPERM, PermissionDeniedError), (errno.EIO, StorageError)],
)
def test_a_failure_of_the_system_has_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: Any):
    path = write(tmp_path / "a.txt", "a")

    def fail(self: Path, mode: str) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "open", fail)  # root, as tests often run, may read everything
    assert error_of(kind, path).why == os.strerror(code)


def test_an_empty_file_is_refused_if_named_and_skipped_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stdin_holding(monkeypatch, b"")
    empty = write(tmp_path / "empty.txt", "")
    for path in [
        empty,
        tmp_path,
        "-",
        write(tmp_path / "empty.md.gz", gzip.compress(b"", mtime=0)),
        write(tmp_path / "bom.md", "\ufeff"),
    ]:
        assert error_of(DataError, path).what == "is empty (0 bytes)"
    write(tmp_path / "full.txt", "a")
    notices: list[str] = []
    assert contents(read([tmp_path], notice=notices.append)) == ["a"]
    assert len(notices) == 1  # however many there are
    assert "and 2 more: skipped, empty (0 bytes)" in notices[0]
    (tmp_path / "link.txt").symlink_to("gone.txt")
    error = error_of(NoInputError, tmp_path)
    assert (error.where, error.why) == (str(tmp_path / "link.txt"), "it leads to gone.txt")


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (PNG, "PNG"),
        (b"{\\rtf1\\ansi A text.}", "RTF"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"GIF89a", "GIF"),
        (b"%PDF-1.7\n", "PDF"),
        (b"PK\x03\x04", "ZIP"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"\xfd7zXZ\x00", "xz"),
        (b"BZh91AY&SY", "bzip2"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (gzip.compress(gzip.compress(b"a", mtime=0), mtime=0), "gzip"),
        (b"\x7fELF\x02", "ELF"),
        (b"SQLite format 3\x00", "SQLite"),
        (b"PAR1\x15", "Parquet"),
        (b'@\x00\x00\x00\x00\x00\x00\x00{"', "safetensors"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_what_is_no_text_is_named_by_its_first_bytes(tmp_path: Path, head: bytes, kind: str):
    path = write(tmp_path / "it's.txt", head)
    for named in (path, tmp_path):
        with pytest.raises(DataError, match=kind):
            read([named])
    error = error_of(DataError, path, encoding="latin-1")
    assert kind in error.what
    assert "{" not in error.do.replace('{"text"', "")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_names_the_flag_that_reads_it(tmp_path: Path, encoding: str):
    path = write(tmp_path / "a.txt", "Grüße, dear reader".encode(encoding))
    with pytest.raises(DataError, match=f"--encoding {encoding}$"):
        read([path])
    assert contents(read([path], encoding=encoding)) == ["Grüße, dear reader"]


def test_many_nul_bytes_are_binary(tmp_path: Path):
    for content in (b"a" * 97 + b"\0\0", bytes(100), "abc".encode("utf-32-le")):
        assert "binary" in error_of(DataError, write(tmp_path / "a.txt", content)).what


@pytest.mark.parametrize(
    ("name", "near"), [("utf-9", "utf"), ("latin-11", "latin"), ("base64", ""), ("undefined", ""), ("\x1b", "")]
)
def test_an_unknown_encoding_is_an_error_of_configuration(name: str, near: str):
    error = error_of(ConfigError, encoding=name)
    assert near in error.do
    assert error.what.isprintable()


# What is refused on the way


@pytest.mark.parametrize(
    ("before", "bad"),
    [
        (b"ab\ncd", b"\xe9!"),
        ("é\r\n\n".encode(), b"\xff"),
        (b"a" * (PIECE_BYTES - 2) + b"\n", b"\xe2\x82"),
        (b"\n" * PIECE_BYTES, b"\xc0\x80"),
        (b"a" * (PIECE_BYTES - 1), b"\xed\xa0\x80\xed\xb0\x80"),
        (b"", b"\xf5\x80\x80\x80"),
    ],
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_an_invalid_byte_is_named_with_its_offset_and_line(tmp_path: Path, bom: bytes, before: bytes, bad: bytes):
    path = write(tmp_path / "a.txt", bom + before + bad)
    error = error_of(DataError, path)
    line, offset = before.count(b"\n") + 1, len(bom + before)
    assert error.where == f"{path}, line {line}, byte offset {offset}"
    assert error.what == f"byte 0x{bad[0]:02X} is not valid utf-8"
    assert "--encoding" in error.do


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Une fenêtre fermée, là-bas “où” l’été brûle – déjà."),
        ("cp1252", "Übermäßig große Füße, Öl, ä und ü. Straße."),
        ("gb18030", "从前有一座山，山上有一座庙，庙里有个老和尚。"),
        ("shift_jis", "吾輩は猫である。名前はまだ無い。カタカナ"),
        ("euc_jp", "吾輩は猫である。名前はまだ無い。カタカナ"),
        ("big5", "從前有一座山，山上有一座廟，廟裡有個老和尚。"),
        ("euc_kr", "옛날 옛적에 호랑이가 담배를 피우던 시절에"),
        ("cp1251", "Все счастливые семьи похожи друг на друга."),
    ],
)
@pytest.mark.parametrize("before", ["", "The first words: "])
def test_the_guessed_encoding_is_called_a_guess_and_reads_the_file(tmp_path: Path, encoding: str, text: str, before: str):
    path = write(tmp_path / "a.txt", (before + text * 20).encode(encoding))
    error = error_of(DataError, path)
    assert error.do.endswith(f"looks like {encoding} (a guess): try --encoding {encoding}")
    assert contents(read([path], encoding=encoding)) == [before + text * 20]


def test_a_damaged_byte_in_utf8_is_not_taken_for_another_encoding(tmp_path: Path):
    text = "从前有一座山".encode()
    error = error_of(DataError, write(tmp_path / "a.txt", text + b"\xff" + text))
    assert "guess" not in error.do


def test_a_text_cut_inside_a_character_says_so(tmp_path: Path):
    error = error_of(DataError, write(tmp_path / "a.txt", "山".encode()[:2]))
    assert error.why == "unexpected end of data"
    assert "cut short" in error.do


@pytest.mark.parametrize(
    ("content", "encoding"),
    [(b"a\x81", "shift_jis"), (b"a\x81", "cp1252"), (b"ab", "utf-16"), (b"a\x00b", "utf-16-le")],
)
def test_text_that_is_not_in_the_named_encoding_is_refused(tmp_path: Path, content: bytes, encoding: str):
    assert encoding in error_of(DataError, write(tmp_path / "a.txt", content), encoding=encoding).what


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{bad}", "Expecting property name"),
        ('{"text": "cut', "Unterminated string"),
        ('["text"]', "it is a list"),
        ("null", "it is a NoneType"),
        ('{"body": 1, "\\u001b": 2}', r"the keys are: body, \x1b"),
        ("{}", "the keys are: none"),
        ('{"text": null}', "it is a NoneType"),
        ('{"text": ["a"]}', "it is a list"),
        (r'{"text": "a\ud800"}', r"\ud800"),
        ("[" * 100_000, "recursion"),
        ('{"n": ' + "1" * 5000 + "}", "digits"),
    ],
)
def test_a_jsonl_line_without_a_text_is_named(tmp_path: Path, line: str, says: str):
    path = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n\n{line}')
    error = error_of(DataError, path)
    assert error.where.startswith(f"{path}:3")
    assert says in error.why
    assert str(error).isprintable()


def test_bad_json_has_its_column(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"text": }\n')
    assert error_of(DataError, path).where == f"{path}:1, column 10"


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
@pytest.mark.parametrize("change", [b"", b"a longer text than before" * 9, PNG])
def test_a_file_that_changes_in_size_is_refused(tmp_path: Path, suffix: str, change: bytes):
    def packed(content: bytes) -> bytes:
        return gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content

    path = write(tmp_path / f"a{suffix}", packed("some téxt".encode()))
    texts = read([path])
    write(path, packed(change))
    with pytest.raises(DataError) as caught:
        contents(texts)
    assert change == PNG or caught.value.what == "changed while being read"


def test_a_file_that_is_gone_is_no_input(tmp_path: Path):
    path = write(tmp_path / "a.txt", "a")
    texts = read([path])
    path.unlink()
    with pytest.raises(NoInputError):
        contents(texts)


@pytest.mark.parametrize("n_kept", [3, 15, -9, -3])
def test_gzip_cut_short_is_damaged(tmp_path: Path, n_kept: int):
    path = write(tmp_path / "a.txt.gz", gzip.compress(os.urandom(1000).hex().encode(), mtime=0)[:n_kept])
    assert error_of(DataError, path).what == "damaged gzip data"


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b"a", mtime=0) + b"rest", gzip.compress(b"ab", mtime=0)[:-6] + b"123456"]
)
def test_what_is_not_whole_gzip_is_damaged(tmp_path: Path, content: bytes):
    assert error_of(DataError, write(tmp_path / "a.txt.gz", content)).what == "damaged gzip data"


def test_what_was_exported_into_a_folder_of_texts_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("A text.")
    store.publish(tmp_path / "model", {"README.md": [b"A card."]}, lambda: {"kind": "export"})
    (tmp_path / "own").mkdir()
    (tmp_path / "own/manifest.json").write_text("{}")
    (tmp_path / "own/more.md").write_text("Another text.")
    told: list[str] = []
    texts = read([tmp_path], notice=told.append)
    assert contents(texts) == ["A text.", "Another text."]  # a manifest of somebody else's is none
    assert any("model: skipped, it is what firstwords made (export)" in line for line in told)


@pytest.mark.parametrize("name", ["...txt", "..txt", "....md"])
def test_a_file_whose_name_is_dots_gives_a_run_a_name_of_its_own(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("A text.")
    assert read([tmp_path / name]).name.strip(".") not in ("", ".", "..")
