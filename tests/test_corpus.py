"""A prepared text holds every token once, keeps training and held-out text apart, and is found again by its content."""

from __future__ import annotations

import json
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from conftest import STORY
from firstwords import store
from firstwords.errors import ConfigError, DataError
from firstwords.planning import facts
from firstwords.text import corpus as corpora
from firstwords.text import sources
from firstwords.text import tokenizer as tokenizers
from firstwords.text.corpus import Corpus, Part
from firstwords.text.sources import Document
from firstwords.text.tokenizer import Tokenizer


def prepare(tmp_path: Path, *texts: str, tokenizer: str = "bytes", **options: object) -> Corpus:
    paths = []
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(text.encode())
    return corpora.prepare(sources.read(paths), tokenizer, cache=tmp_path / "cache", **options)  # type: ignore[arg-type]


def documents(part: Part, corpus: Corpus) -> list[str]:
    starts = [*np.flatnonzero(part.ids == corpus.tokenizer.end_of_text), len(part.ids)]
    return [corpus.tokenizer.decode(part.ids[a + 1 : b].tolist()) for a, b in pairwise(starts)]


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2", "bpe:300"])
def test_each_document_is_split_by_characters_and_its_end_held_out(tmp_path: Path, tokenizer: str) -> None:
    texts = [STORY, "ünï" * 33, "short text"]
    corpus = prepare(tmp_path, *texts, tokenizer=tokenizer)
    cuts = [int(0.9 * len(text)) for text in texts]
    assert documents(corpus.train, corpus) == [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    assert documents(corpus.val, corpus) == [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    held_out = sum(len(text[cut:].encode()) for text, cut in zip(texts, cuts, strict=True))
    assert corpus.val.id_bytes[corpus.val.ids].sum() == held_out
    assert corpus.train.n_tokens == len(corpus.train.ids) - 3


def lines(count: int) -> list[str]:
    """Short documents, all different."""
    return [f"the {number}th of them says {number * number}" for number in range(count)]


def as_json_lines(tmp_path: Path, texts: list[str]) -> sources.Texts:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return sources.read([str(path)])


def test_of_many_short_documents_some_are_held_out_whole(tmp_path: Path) -> None:
    texts = [*lines(1000), *lines(1000)[::7]]  # some stand twice
    corpus = corpora.prepare(as_json_lines(tmp_path, texts), "bytes", cache=tmp_path / "cache")
    train, val = documents(corpus.train, corpus), documents(corpus.val, corpus)
    assert sorted(train + val) == sorted(texts)
    assert set(train).isdisjoint(val)
    assert 0.06 < len(val) / len(texts) < 0.14  # 0.1, and four standard deviations of a draw
    more = [*lines(1100)[1000:], *texts]
    again = corpora.prepare(as_json_lines(tmp_path, more), "bytes", cache=tmp_path / "cache")
    assert set(val) <= set(documents(again.val, again))  # what is held out of a text that grows stays so
    planned = facts.read(as_json_lines(tmp_path, texts))
    assert (planned.training_bytes, planned.held_out_bytes) == (corpus.train.n_bytes, corpus.val.n_bytes)


@pytest.mark.parametrize("texts", [lines(99), [line * 80 for line in lines(120)]])
def test_of_few_documents_or_long_ones_each_end_is_held_out(tmp_path: Path, texts: list[str]) -> None:
    corpus = corpora.prepare(as_json_lines(tmp_path, texts), "bytes", cache=tmp_path / "cache")
    assert documents(corpus.train, corpus) == [text[: int(0.9 * len(text))] for text in texts]


def test_short_documents_beside_a_long_one_are_not_cut_in_the_middle(tmp_path: Path) -> None:
    short, long = lines(300), STORY * 3  # far more than a twentieth of the text
    corpus = corpora.prepare(as_json_lines(tmp_path, [*short, long]), "bytes", cache=tmp_path / "cache")
    train, val = documents(corpus.train, corpus), documents(corpus.val, corpus)
    cut = int(0.9 * len(long))
    assert (train[-1], val[-1]) == (long[:cut], long[cut:])
    assert sorted(train[:-1] + val[:-1]) == sorted(short)
    assert 15 < len(val) < 45  # 30, and three standard deviations of a draw
    planned = facts.read(as_json_lines(tmp_path, [*short, long]))
    assert (planned.training_bytes, planned.held_out_bytes) == (corpus.train.n_bytes, corpus.val.n_bytes)


def test_what_many_documents_say_alike_is_learnt_and_the_share_that_is_held_out_stays(tmp_path: Path) -> None:
    said = [f"nothing, for the {number}th time" for number in range(20)]
    marks = corpora.survey(as_json_lines(tmp_path, said)).marks
    often = said[min(range(20), key=marks.__getitem__)]
    assert min(marks) < 0.2 * 2**32  # by its mark alone it would be held out, with all its copies
    texts = [line for text in lines(900) for line in (text, often, often)]
    corpus = corpora.prepare(as_json_lines(tmp_path, texts), "bytes", cache=tmp_path / "cache", held_out=0.2)
    train, val = documents(corpus.train, corpus), documents(corpus.val, corpus)
    assert train.count(often) == 1800
    assert 0.14 < len(val) / 900 < 0.26  # a fifth, and four standard deviations of a draw


def test_only_a_text_that_is_cut_otherwise_has_another_name_than_before_it_was(tmp_path: Path) -> None:
    def names(texts: list[str]) -> tuple[str, str]:
        read = as_json_lines(tmp_path, texts)
        by_marks_alone = corpora._key(corpora.survey(read), None, 0.1, "bytes", (), None)
        return corpora.prepare(read, "bytes", cache=tmp_path / "cache").folder.name, by_marks_alone

    for texts, is_same in (([STORY], True), (lines(500), True), ([*lines(100), *["none"] * 400], False)):
        now, before = names(texts)
        assert (now == before) is is_same


@pytest.mark.parametrize("odd", [[], ["", "", ""], ["misspelt"]])
def test_of_labels_some_are_held_out_and_not_the_odd_one_alone(tmp_path: Path, odd: list[str]) -> None:
    labels = [f"kind {number}" for number in range(12)]
    corpus = corpora.prepare(as_json_lines(tmp_path, [*labels * 50, *odd]), "bytes", cache=tmp_path / "cache")
    train, val = documents(corpus.train, corpus), documents(corpus.val, corpus)
    assert set(train).isdisjoint(val)
    assert 0.05 < sum(label in labels for label in val) / 600 < 0.2  # a twelfth, or two


@pytest.mark.parametrize("share", [0.0005, 0.9])
def test_of_short_documents_none_is_cut_however_small_or_large_the_share(tmp_path: Path, share: float) -> None:
    texts = lines(120) if share < 0.5 else [f"{number % 2} of two" for number in range(120)]
    corpus = corpora.prepare(as_json_lines(tmp_path, texts), "bytes", cache=tmp_path / "cache", held_out=share)
    train, val = documents(corpus.train, corpus), documents(corpus.val, corpus)
    assert sorted(train + val) == sorted(texts)
    assert train
    assert val


def test_a_share_of_nothing_holds_nothing_out_of_short_documents(tmp_path: Path) -> None:
    corpus = corpora.prepare(as_json_lines(tmp_path, lines(500)), "bytes", cache=tmp_path / "cache", held_out=0.0)
    assert corpus.val.n_tokens == 0
    assert corpus.train.n_documents == 500


def test_a_tokenizer_learns_no_word_that_only_two_documents_make(tmp_path: Path) -> None:
    texts = [name * 3 for name in ("ana", "bob", "eve", "kim", "lou")] * 100
    corpus = corpora.prepare(as_json_lines(tmp_path, texts), "bpe:300", cache=tmp_path / "cache")
    words = {word.decode() for word in corpus.tokenizer.ranks if len(word) > 1}
    assert len(words) > 5  # as one document, a run of 4,500 letters, they would not be learnt from
    assert not [word for word in words if not any(word in text for text in set(texts))]


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_documents_that_are_encoded_together_have_the_ids_that_each_has(tmp_path: Path, tokenizer: str) -> None:
    texts = [*lines(3000), STORY * 30, *lines(10)]
    corpus = corpora.prepare(as_json_lines(tmp_path, texts), tokenizer, cache=tmp_path / "cache", held_out=0.0)
    expected = [token for text in texts for token in (corpus.tokenizer.end_of_text, *corpus.tokenizer.encode(text))]
    assert corpus.train.ids.tolist() == expected
    assert (corpus.train.n_documents, corpus.train.n_bytes) == (len(texts), sum(len(text.encode()) for text in texts))


def test_threads_that_encode_share_no_state_of_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, all_at_work, used = Tokenizer.piece_ids, threading.Barrier(2), dict[int, set[int]]()

    def watched(self: Tokenizer, piece: str) -> tokenizers.Ids:
        if threading.get_ident() not in used:
            used[threading.get_ident()] = set()
            all_at_work.wait(60)
        used[threading.get_ident()].add(id(self.encoding))
        return encode(self, piece)

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(Tokenizer, "piece_ids", watched)
    prepare(tmp_path, "".join(lines(9000)), tokenizer="gpt2", held_out=0.0)
    first, second = used.values()
    assert (len(first), len(second)) == (1, 1)
    assert first != second


def test_on_many_cores_few_threads_have_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, used = Tokenizer.piece_ids, set[int]()

    def slowly(self: Tokenizer, piece: str) -> tokenizers.Ids:
        used.add(threading.get_ident())
        time.sleep(0.02)  # so that each piece that waits is another thread's
        return encode(self, piece)

    monkeypatch.setattr(os, "cpu_count", lambda: 100)
    monkeypatch.setattr(Tokenizer, "piece_ids", slowly)
    prepare(tmp_path, "a line.\n" * (40 * tokenizers.PIECE_CHARS // 8), tokenizer="bytes", held_out=0.0)
    assert 2 < len(used) <= corpora.MOST_ENCODERS


def test_the_share_that_is_done_never_falls_within_a_pass() -> None:
    """A budget takes a fall for the next pass, and never sees how long this one takes."""
    told: list[float | None] = []
    texts = [
        Document(str(i), lambda: iter(["a" * 95, "b" * 5])) for i in range(20)
    ]  # the last piece lies in what is held out
    slices = corpora._Slices(texts, None, [90] * 20, 20 * 90, lambda _, share: told.append(share))
    assert sum(len(piece) for text in slices for piece in text.pieces()) == 20 * 90
    shares = [share for share in told if share is not None]
    assert shares == sorted(shares)
    assert len(set(shares)) > 20


@pytest.mark.parametrize("more", [1, -1])
def test_a_text_of_other_documents_than_a_moment_before_is_told(tmp_path: Path, more: int) -> None:
    texts = [Document(str(i), lambda: iter(["a text of some words "])) for i in range(9)]
    changed: list[None] = []

    class Growing(list[Document]):
        n_bytes = None

        def __iter__(self) -> Iterator[Document]:
            changed.append(None)
            return iter(texts[: 5 + more * (len(changed) > 1)])

    with pytest.raises(DataError, match="changed while being read"):
        corpora.prepare(Growing(), "bytes", cache=tmp_path)
    changed.clear()
    with pytest.raises(DataError, match="changed while being read"):
        facts.read(Growing())
    more = 0  # the negative control
    assert corpora.prepare(Growing(), "bytes", cache=tmp_path).train.n_tokens


def test_a_tokenizer_without_a_size_gets_the_one_that_fits_the_training_text(tmp_path: Path) -> None:
    sizes = [corpora.fitting_vocab_size(10**n) for n in range(12)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (corpora.SMALLEST_FITTING, corpora.LARGEST_FITTING)
    found = [corpora.fitting_vocab_size(n) for n in (100_000, 380_000, 1_000_000, 4_000_000, 11_000_000)]
    assert found == [512, 1024, 2048, 2048, 4096]  # docs/recipe.md
    random = np.random.default_rng(0)  # words enough that no tokenizer runs out of pairs
    text = " ".join("".join(map(chr, random.integers(97, 123, 5))) for _ in range(80_000))
    size = corpora.fitting_vocab_size(int(0.9 * len(text)))
    assert corpora.SMALLEST_FITTING < size < corpora.LARGEST_FITTING
    fitting, named = (prepare(tmp_path, text, tokenizer=name).tokenizer for name in ("bpe", f"bpe:{size}"))
    assert fitting.ranks == named.ranks


def test_of_a_large_text_a_tokenizer_is_trained_on_pieces_at_even_distances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stretches = [f"{word} " * 40_000 for word in ("first", "second", "third", "fourth")]
    text = "".join(stretches)
    whole = prepare(tmp_path, text, tokenizer="bpe:300", held_out=0.0).tokenizer
    monkeypatch.setattr(corpora, "BPE_CHARS", len(text) // 2)
    half = prepare(tmp_path / "half", text, tokenizer="bpe:300", held_out=0.0).tokenizer
    every_second = tokenizers.train_bpe([*tokenizers.safe_pieces([text])][::2], 300)
    assert half.ranks == every_second.ranks
    assert half.ranks.keys() == whole.ranks.keys()  # all stretches are seen, each long enough for two pieces
    assert prepare(tmp_path / "half", text, tokenizer="bpe:300", held_out=0.0).train.n_bytes == len(text)


def test_a_trained_tokenizer_never_sees_held_out_text(tmp_path: Path) -> None:
    training, held_out = "abc " * 900, "xyz " * 100
    corpus = prepare(tmp_path, training + held_out, tokenizer="bpe:270")
    words = set(corpus.tokenizer.ranks)
    assert b" abc" in words
    assert not any(b"xy" in word for word in words)


def test_a_separate_held_out_text_leaves_all_of_the_text_to_training(tmp_path: Path) -> None:
    (tmp_path / "val.md").write_text("held out")
    corpus = prepare(tmp_path, STORY, held_out=sources.read([tmp_path / "val.md"]))
    assert documents(corpus.train, corpus) == [STORY]
    assert documents(corpus.val, corpus) == ["held out"]


def test_documents_that_are_learnt_from_and_held_out_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    for name, text in (("a", "held out"), ("b", "other"), ("c", "")):
        (tmp_path / f"{name}.md").write_text(text)
    held_out = sources.read([tmp_path / "a.md", tmp_path / "b.md"])
    prepare(tmp_path, STORY, "held out", STORY, held_out=held_out, notice=told.append)
    assert told == ["1 document is both learnt from and held out: the held-out figures will be too good"]
    prepare(tmp_path, STORY, "held out ", held_out=held_out, notice=told.append)  # the negative control
    assert len(told) == 1


def test_the_same_content_is_found_again_under_another_name_and_changed_content_is_not(tmp_path: Path) -> None:
    first = prepare(tmp_path, STORY)
    (tmp_path / "renamed.txt").write_text(STORY)
    again = corpora.prepare(sources.read([tmp_path / "renamed.txt"]), "bytes", cache=tmp_path / "cache")
    changed = prepare(tmp_path, STORY + "!")
    assert first.folder == again.folder != changed.folder
    assert len({prepare(tmp_path, STORY, tokenizer=name).folder for name in ("bytes", "bpe:300", "bpe:301")}) == 3


def test_where_documents_end_is_part_of_the_content(tmp_path: Path) -> None:
    assert prepare(tmp_path, "ab", "c").folder != prepare(tmp_path, "a", "bc").folder


def test_a_damaged_cache_is_set_aside_and_made_again(tmp_path: Path) -> None:
    good = prepare(tmp_path, STORY)
    path = good.folder / "train.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    told: list[str] = []
    again = prepare(tmp_path, STORY, notice=told.append)
    assert len(told) == 1
    assert "SHA-256" in told[0]
    assert any(p.name.startswith("damaged-") for p in (tmp_path / "cache").iterdir())
    assert documents(again.train, again) == [STORY[: int(0.9 * len(STORY))]]


def test_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    good = prepare(tmp_path, STORY)
    ids = np.array([256, 5, 999], "<u2").tobytes()
    part = {"ids": 3, "bytes": 2, "documents": 1, "dtype": "<u2"}
    store.publish(
        tmp_path / "bad",
        {"tokenizer.json": [good.tokenizer.json], "train.bin": [ids], "val.bin": [ids]},
        lambda: {"train": part, "val": part, "text_sha256": ""},
    )
    with pytest.raises(DataError, match="999") as raised:
        corpora.load(tmp_path / "bad")
    assert "token 2" in raised.value.where


def test_ids_that_two_bytes_cannot_hold_get_four(tmp_path: Path) -> None:
    singles = [bytes([byte]) for byte in range(256)]
    ranks = {word: rank for rank, word in enumerate([*singles, *(a + b for a in singles for b in singles)])}
    wide = Tokenizer("pairs", ranks)  # 65,793 ids
    (tmp_path / "a.txt").write_text(STORY)
    corpus = corpora.prepare(sources.read([tmp_path / "a.txt"]), wide, cache=tmp_path / "cache")
    assert corpus.train.ids.dtype == np.dtype("<u4")
    assert corpus.train.ids.max() == wide.end_of_text == 65792
    assert documents(corpus.train, corpus) == [STORY[: int(0.9 * len(STORY))]]
    assert prepare(tmp_path, STORY, tokenizer="gpt2").train.ids.dtype == np.dtype("<u2")


def test_two_processes_may_prepare_one_text_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tmp_path, STORY)
    hidden = first.folder.with_name("hidden")
    first.folder.rename(hidden)
    publish = store.publish

    def overtaken(*args: object) -> object:
        hidden.rename(first.folder)
        return publish(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "publish", overtaken)
    assert prepare(tmp_path, STORY).folder == first.folder


def test_what_a_killed_preparation_left_is_removed_after_a_day_and_not_before(tmp_path: Path) -> None:
    yesterday = time.time() - corpora.ABANDONED_S - 60
    old, young, at_work = (f"tmp-{number}-x0123abcd" for number in range(3))
    for name, age in ((old, yesterday), (young, None), (at_work, None), ("tmp-a-person-s-own", yesterday)):
        folder = tmp_path / "cache" / name
        folder.mkdir(parents=True)
        (folder / "train.bin").write_bytes(b"ids")
        if age is not None:
            os.utime(folder / "train.bin", (age, age))
        os.utime(folder, (yesterday, yesterday) if name != young else None)
    corpus = prepare(tmp_path, STORY)
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {young, at_work, "tmp-a-person-s-own", corpus.folder.name}


def test_text_that_is_only_white_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="white space"):
        prepare(tmp_path, " \n\t " * 10)


@pytest.mark.parametrize("name", ["gtp2", "bpe:", "bpe:12x", "bpe:100", "missing/tokenizer.json"])
def test_an_unknown_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        prepare(tmp_path, STORY, tokenizer=name)


def test_a_text_of_fewer_than_ten_characters_has_no_held_out_part(tmp_path: Path) -> None:
    corpus = prepare(tmp_path, "x")
    assert (corpus.train.n_tokens, corpus.val.n_tokens) == (0, 1)  # int(0.9 * 1) is 0
    assert prepare(tmp_path, STORY, held_out=0.0).val.n_tokens == 0


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    def peak_bytes(size: int) -> int:
        path = tmp_path / f"{size}.txt"
        path.write_text("the quick brown fox " * (size // 20))
        tracemalloc.start()
        corpora.prepare(sources.read([path]), "bpe:300", cache=tmp_path / "cache")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    # 4 MiB more text may not cost 2 MiB more memory: pieces are 1 MiB, and one in flight more or less is noise; a text of
    # fewer than are in flight takes less
    assert peak_bytes(8 << 20) < peak_bytes(4 << 20) + (2 << 20)


def test_a_long_document_is_given_back_without_a_number_of_python_for_each_of_its_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(corpora, "IDS_AT_ONCE", 1000)
    text, tokenizer = STORY.encode() * 100, tokenizers.byte_tokenizer()
    part = corpora.part_of([text], tokenizer)
    assert len(part.ids) > 100 * corpora.IDS_AT_ONCE
    tracemalloc.start()
    found = corpora.documents(part, tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [text]
    # A copy of the ids (4 bytes each, and a truth), the text twice; a list alone has a pointer of 8 bytes for each.
    assert peak < 9 * len(part.ids)


@pytest.mark.parametrize("again", ["written", "replaced"])
def test_a_file_that_another_of_the_same_length_replaces_meanwhile_is_told(tmp_path: Path, again: str) -> None:
    """Else the ids of the new text would be kept under the hash of the old one."""
    file, old, new = tmp_path / "a.txt", "alpha beta " * 200, "gamma delta" * 200
    file.write_text(old)

    def meanwhile(*_: object) -> None:
        if again == "replaced":
            (tmp_path / "b.txt").write_text(new)
            os.utime(tmp_path / "b.txt", ns=(0, time.time_ns() + 2 * 10**9))  # a clock may tell no two moments apart
            (tmp_path / "b.txt").replace(file)
        else:
            file.write_text(new)
            os.utime(file, ns=(0, time.time_ns() + 2 * 10**9))  # a clock of whole seconds would be as before

    with pytest.raises(DataError, match="changed while being read"):
        corpora.prepare(sources.read([file]), "bytes", cache=tmp_path / "cache", check=meanwhile)
    file.write_text(old)
    found = corpora.prepare(sources.read([file]), "bytes", cache=tmp_path / "cache")
    assert found.tokenizer.decode(found.train.ids[1:6].tolist()) == "alpha"
