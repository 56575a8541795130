"""Every text has ids, its ids give it back, and the field's own tools agree."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
import regex
from tokenizers import Tokenizer as HuggingFaceTokenizer

from conftest import STORY
from firstwords.config import run_config
from firstwords.errors import ConfigError, DataError
from firstwords.text import tokenizer as tokenizers
from firstwords.text.tokenizer import (
    KINDS,
    LONGEST_TRAINED,
    PIECE_CHARS,
    Tokenizer,
    byte_tokenizer,
    from_json,
    gpt2,
    train_bpe,
    without_long_runs,
)

TOKENIZERS = [gpt2(), byte_tokenizer(), train_bpe([STORY], 400)]
ODD = [
    "",
    " ",
    "a",
    "<|endoftext|>",
    "\r\n\t ",
    "naïve café",
    "👩‍👩‍👧 עברית العربية",
    "\ufeff\x00\x1b[31m",
    "I'll've 12.5%",
    "漢字かな" * 9,
]


def noise(seed: int, length: int) -> str:
    """Characters of many kinds, with the white space and quotes that split patterns trip over."""
    draw = random.Random(seed)
    kinds = [(32, 127), (0xA0, 0x250), (0x400, 0x500), (0x4E00, 0x5000), (0x1F300, 0x1F650)]
    return "".join(
        draw.choice(" \n\t\u3000'’") if draw.random() < 0.3 else chr(draw.randrange(*draw.choice(kinds)))
        for _ in range(length)
    )


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
@pytest.mark.parametrize("text", [*ODD, STORY, noise(1, 5000)], ids=range(len(ODD) + 2))
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
def test_ids_are_those_of_the_tokenizers_library_reading_our_file(tokenizer: Tokenizer) -> None:
    theirs = HuggingFaceTokenizer.from_str(tokenizer.json.decode())
    for seed in range(20):
        text = noise(seed, 2000) + STORY[:500]
        assert theirs.encode(text).ids == tokenizer.encode(text)
    assert theirs.encode("<|endoftext|>").ids == [tokenizer.end_of_text]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
def test_a_tokenizer_reads_back_from_its_own_file(tokenizer: Tokenizer) -> None:
    again = from_json(tokenizer.json, "tokenizer.json")
    assert (again.name, again.vocab_size, again.sha256) == (tokenizer.name, tokenizer.vocab_size, tokenizer.sha256)


@pytest.mark.parametrize("cut", [1, 7, 1000, PIECE_CHARS - 1, PIECE_CHARS, PIECE_CHARS + 1])
def test_ids_do_not_depend_on_how_a_text_is_cut_and_equal_those_of_the_whole(cut: int) -> None:
    text = noise(3, 3 * PIECE_CHARS if cut > 1000 else 20000)
    for tokenizer in TOKENIZERS[::2]:
        pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
        streamed = [int(token) for ids in tokenizer.stream(pieces) for token in ids]
        assert streamed == tokenizer.encoding.encode_ordinary(text)


def test_a_giant_run_without_a_space_is_encoded_and_left_out_of_training() -> None:
    giant = "a" * (3 * PIECE_CHARS)
    learnt = train_bpe([giant + " " + STORY], 300)
    assert b"aaaa" not in learnt.ranks
    assert learnt.decode(learnt.encode(giant)) == giant


def test_every_run_of_over_a_thousand_of_one_kind_is_found_wherever_it_stands_and_none_that_is_shorter() -> None:
    naive = regex.compile("|".join(rf"{kind}{{{LONGEST_TRAINED + 1},}}" for kind in KINDS))
    drawn, found = random.Random(1), 0
    kinds = ["ab", "é漢", "12", "!-", "!\x1c", "\x1c\x1f", " \n", "\t\u2003", "\u2028 "]
    for _ in range(400):
        run = "".join(drawn.choices(drawn.choice(kinds), k=LONGEST_TRAINED + drawn.randrange(-2, 3)))
        piece = STORY[: drawn.randrange(1200)] + run + STORY[: drawn.randrange(1200)]
        assert without_long_runs(piece) == naive.sub("\n", piece)
        found += without_long_runs(piece) != piece
    assert 100 < found < 300


def test_training_gives_exactly_the_size_asked_for_or_what_the_text_has() -> None:
    assert train_bpe([STORY], 300).vocab_size == 300
    assert train_bpe(["ab ab"], 300).vocab_size == 259  # 256 bytes, "ab", " ab", <|endoftext|>


def test_gpt2s_vocabulary_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "VOCAB_BPE_SHA256", "0" * 64)
    monkeypatch.setattr(tokenizers, "gpt2", tokenizers.gpt2.__wrapped__)  # not the one that was read before
    with pytest.raises(DataError, match="damaged"):
        tokenizers.gpt2_tokenizer()


@pytest.mark.parametrize("size", [0, 256, 2**21])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError):
        train_bpe([STORY], size)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"model": {"vocab": {}, "merges": []}}', b'{"model": 3}', b"[" * 100000]
)
def test_a_file_that_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        from_json(data, "tokenizer.json")


def test_a_tokenizer_whose_merges_are_swapped_is_refused() -> None:
    good = train_bpe([STORY], 300).json.decode()
    start = good.index('"merges":[[') + len('"merges":[')
    first, second, rest = good[start:].split("],", 2)
    with pytest.raises(DataError, match="order"):
        from_json((good[:start] + second + "]," + first + "]," + rest).encode(), "tokenizer.json")


def test_the_last_merge_of_a_word_is_that_of_merging_the_lowest_rank_first() -> None:
    def slowly(word: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 2:
            pairs = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts))]
            lowest, i = min(pairs)
            assert lowest < rank
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    rng = random.Random(1)
    for _ in range(20):
        words = "".join(rng.choice("ab c") * rng.randint(1, 6) for _ in range(3_000))
        ranks = train_bpe([words], 256 + rng.randint(10, 300)).ranks
        merged = [(word, rank) for word, rank in sorted(ranks.items(), key=lambda item: item[1]) if len(word) > 1]
        assert [list(pair) for pair in tokenizers._merges(ranks)] == [slowly(*one, ranks) for one in merged]


def test_a_tokenizer_of_a_very_long_word_takes_no_time_to_speak_of() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"a" * 2**n: 255 + n for n in range(1, 17)}  # by the square of the longest, 65,536, it would be an hour
    data = Tokenizer("bpe", ranks).json
    assert from_json(data, "tokenizer.json").ranks == ranks


def test_a_tokenizer_that_changes_its_text_is_refused() -> None:
    good = train_bpe([STORY], 300).json.decode()
    for changed in (
        good.replace('"normalizer":null', '"normalizer":{"type":"Lowercase"}'),
        good.replace('"add_prefix_space":false', '"add_prefix_space":true'),
    ):
        with pytest.raises(DataError, match="another way"):
            from_json(changed.encode(), "tokenizer.json")


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="300"):
        byte_tokenizer().decode([300])


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.name)
def test_special_tokens_come_after_all_others_and_change_no_other_id(tokenizer: Tokenizer) -> None:
    more = tokenizer.with_special(["<|user|>", "<|bot|>"])
    assert more.vocab_size == tokenizer.vocab_size + 2
    user, bot = tokenizer.vocab_size, tokenizer.vocab_size + 1
    text = "<|user|>naïve café?<|bot|> yes, <|endoftext|>"
    said = [user, *tokenizer.encode("naïve café?"), bot, *tokenizer.encode(" yes, <|endoftext|>")]
    assert more.encode(text) == said
    assert more.decode(said) == text
    assert more.id_bytes[said].sum() == len(text.encode())
    assert tokenizer.encode(text) != said  # without them it is text like any other
    assert more.sha256 != tokenizer.sha256
    again = from_json(more.json, "tokenizer.json")
    assert (again.special, again.sha256, again.encode(text)) == (more.special, more.sha256, said)
    theirs = HuggingFaceTokenizer.from_str(more.json.decode())
    assert theirs.encode("<|user|>naïve<|bot|> yes").ids == more.encode("<|user|>naïve<|bot|> yes")
    assert more.with_special(["<|bot|>"]) is more


@pytest.mark.parametrize("text", ["", "two words", "line\n"])
def test_a_special_token_that_a_long_text_might_be_cut_in_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="special-tokens"):
        byte_tokenizer().with_special([text])


@pytest.mark.parametrize("texts", [["#"], ["¶"], ["<a>", "<a>b"], ["<|endoftext|>s"]])
def test_a_special_token_that_files_or_tools_could_take_for_another_is_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="special-tokens"):
        byte_tokenizer().with_special(texts)
    assert byte_tokenizer().with_special(["<a>", "<b>"]).vocab_size == 259  # the negative control


def test_the_token_between_documents_is_no_special_one() -> None:
    """It would be learnt as the letters it is written with, whatever was asked for."""
    with pytest.raises(ConfigError, match=r"a token already.*\.jsonl"):
        byte_tokenizer().with_special(["<|user|>", "<|endoftext|>"])


def test_a_special_token_that_is_named_twice_is_one() -> None:
    assert run_config({"special_tokens": "<a>,<b>,<a>"}).special == ("<a>", "<b>")


def test_a_special_token_of_two_ids_is_refused() -> None:
    value = json.loads(byte_tokenizer().with_special(["<|user|>"]).json)
    value["added_tokens"][1]["id"] = 258
    with pytest.raises(DataError, match="two ids"):
        from_json(json.dumps(value).encode(), "tokenizer.json")


@pytest.mark.parametrize("key", ["lstrip", "rstrip", "single_word"])
def test_a_special_token_that_depends_on_what_is_beside_it_is_refused(key: str) -> None:
    ours = byte_tokenizer().with_special(["<|user|>"])
    value = json.loads(ours.json)
    value["added_tokens"][1][key] = True
    changed, text = json.dumps(value), "a <|user|> b<|user|>c"
    assert HuggingFaceTokenizer.from_str(changed).encode(text).ids != ours.encode(text)
    with pytest.raises(DataError, match=rf"'<\|user\|>' has {key}"):
        from_json(changed.encode(), "tokenizer.json")
    value["added_tokens"][1][key], value["added_tokens"][0][key] = False, True
    with pytest.raises(DataError, match=rf"'<\|endoftext\|>' has {key}"):
        from_json(json.dumps(value).encode(), "tokenizer.json")


@pytest.mark.parametrize("texts", [["covid", "covid19"], ["   ", "  "], ["<|endoftext|>s"]])
def test_added_tokens_that_tools_find_in_other_places_are_refused(texts: list[str]) -> None:
    theirs = HuggingFaceTokenizer.from_str(byte_tokenizer().json.decode())
    theirs.add_tokens(texts)
    read = from_json(theirs.to_str().encode(), "tokenizer.json")  # as that of a checkpoint from before they were
    with pytest.raises(DataError, match="tools differ in where"):
        tokenizers.require_apart(read, "tokenizer.json")
    apart = byte_tokenizer().with_special(["<a>", "<b>"])
    assert tokenizers.require_apart(apart, "tokenizer.json") is apart  # the negative control


def test_a_tokenizer_that_cannot_encode_every_byte_is_refused() -> None:
    few = Tokenizer("few", {bytes([byte]): i for i, byte in enumerate(b"abc ")})
    with pytest.raises(DataError, match=r"cannot encode every text.*no id for byte 0 "):
        tokenizers.from_json(few.json, "few.json")


def test_an_end_of_text_that_is_only_among_the_added_tokens_is_known() -> None:
    """As the library `tokenizers` writes it where it was added to a finished vocabulary."""
    value = json.loads(byte_tokenizer().json)
    del value["model"]["vocab"]["<|endoftext|>"]
    read = tokenizers.from_json(json.dumps(value).encode(), "added.json")
    assert (read.end_of_text, read.ranks) == (256, byte_tokenizer().ranks)
