"""The n-gram model: modified Kneser-Ney as it is written, and lmplz's where that is there."""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from conftest import STORY
from firstwords.insight import ngram
from firstwords.insight.ngram import BYTE_VALUES, NGram, discounts, train

LMPLZ = os.environ.get("FIRSTWORDS_LMPLZ")
DOCUMENTS = [STORY[:900].encode(), b"", b"A", STORY[900:1500].encode(), "Ende gut, alles süß.".encode(), b"A"]


@pytest.fixture(scope="module")
def model() -> NGram:
    return train(DOCUMENTS)


@pytest.mark.parametrize("before", [b"", b"O", b"Once the", b"the duck said ", b"\x00\xff\xfe", b"the\xff", b"qqqqqqqq"])
def test_the_probabilities_after_any_context_sum_to_1(model: NGram, before: bytes) -> None:
    found = model.probabilities(before)
    assert found.shape == (BYTE_VALUES,)
    assert (found > 0).all()
    assert found.sum() == pytest.approx(1, abs=1e-6)  # the tables are float32


def test_every_byte_is_predicted_from_its_own_document_alone(model: NGram) -> None:
    documents = [b"Once there", b"", b"\xf0 the duck said", b"x"]
    found = iter(model.nats(documents))
    for document in documents:
        for i, byte in enumerate(document):
            assert next(found) == pytest.approx(-math.log(model.probabilities(document[:i])[byte]), rel=1e-12)
    assert list(found) == []


def kneser_ney(documents: list[bytes], before: bytes, byte: int) -> float:
    """p of a byte by the book: counts in dictionaries, the recursion of Chen & Goodman's eq. 25."""
    begin = -1
    raw: dict[tuple[int, ...], int] = {}
    for document in documents:
        symbols = (begin, *document)
        for i in range(1, len(symbols)):
            for k in range(1, ngram.ORDER + 1):
                if i + 1 - k >= 0:
                    gram = symbols[i + 1 - k : i + 1]
                    raw[gram] = raw.get(gram, 0) + 1
    counts = {}
    for gram, count in raw.items():
        lower = len(gram) < ngram.ORDER and gram[0] != begin
        counts[gram] = len({other[0] for other in raw if other[1:] == gram}) if lower else count

    def p(context: tuple[int, ...]) -> float:
        k = len(context) + 1
        below = p(context[1:]) if context else 1 / BYTE_VALUES
        seen = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == context and len(gram) == k}
        if not seen:
            return below
        amounts = discounts(np.array([count for gram, count in counts.items() if len(gram) == k]))
        left = sum(amounts[min(count, 3)] for count in seen.values())
        count = seen.get(byte, 0)
        return float((count - amounts[min(count, 3)] + left * below) / sum(seen.values()))

    return p((begin, *before)[-(ngram.ORDER - 1) :])


@pytest.mark.parametrize(
    ("before", "byte"),
    [(b"", b"O"), (b"", b"z"), (b"On", b"c"), (b"Once th", b"e"), (b"Once th", b"a"), (b"zzz", b"e"), (b"o the", b"\xff")],
)
def test_the_probabilities_are_those_of_counts_in_dictionaries(before: bytes, byte: bytes) -> None:
    documents = [STORY[:150].encode(), b"O", b"", STORY[600:700].encode()]
    expected = kneser_ney(documents, before, byte[0])
    assert train(documents).probabilities(before)[byte[0]] == pytest.approx(expected, rel=1e-6)  # float32


def test_a_text_of_two_letters_has_the_probabilities_that_can_be_worked_out_by_hand() -> None:
    """`ab`: every count is 1, every discount the fallback's 0.5, so each order halves what it knows.

    p1(a) = 0.5/2 + 0.5/256: two different bytes, each after one symbol. After the begin, orders 2 only: 0.5 + 0.5 p1(a).
    """
    found = train([b"ab"]).probabilities(b"")
    p1 = 0.5 / 2 + 0.5 / 256
    assert found[ord("a")] == pytest.approx(0.5 + 0.5 * p1, rel=1e-6)
    assert found[ord("b")] == pytest.approx(0.5 * p1, rel=1e-6)
    assert found[ord("c")] == pytest.approx(0.5 * 0.5 / 256, rel=1e-6)


def test_without_a_text_every_byte_costs_8_bits() -> None:
    for nothing in ([], [b"", b""]):
        assert train(nothing).nats([b"any"]) == pytest.approx([math.log(256)] * 3)


def test_the_discounts_are_those_of_the_formula() -> None:
    counts = np.repeat([1, 2, 3, 4, 9], [8, 4, 2, 1, 7])
    y = 8 / (8 + 2 * 4)
    assert discounts(counts) == pytest.approx([0, 1 - 2 * y * 4 / 8, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2])
    assert tuple(discounts(np.array([1, 1, 2, 5]))) == ngram.FALLBACK


def test_the_model_does_not_depend_on_how_many_symbols_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = [STORY[1500:1700].encode(), b"duck"]
    whole = train(DOCUMENTS).nats(held_out)
    for at_once in (1, 7, 1000):
        monkeypatch.setattr(ngram, "AT_ONCE", at_once)
        assert train(DOCUMENTS).nats(held_out).tolist() == whole.tolist()


def test_what_was_read_is_cheaper_than_what_was_not(model: NGram) -> None:
    known, unknown = (model.nats([text]).mean() for text in (DOCUMENTS[0], "山上有一座庙".encode()))
    assert known < 0.5 * math.log(2)
    assert math.log(256) < unknown < np.inf


@pytest.mark.skipif(not LMPLZ, reason="NOT RUN: no lmplz named by FIRSTWORDS_LMPLZ")
@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "pydoc, many documents"])
def test_lmplz_needs_as_many_bits_per_byte(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if name.endswith(".txt"):
        text = (request.getfixturevalue("texts") / name).read_bytes()
        cut = int(0.9 * len(text))
        given, held_out = [text[:cut]], [text[cut:]]
    else:
        from pydoc_data.topics import topics

        documents = [value.encode() for _, value in sorted(topics.items())]
        given, held_out = [d for i, d in enumerate(documents) if i % 10], documents[::10]
    ours = float(train(given).nats(held_out).sum()) / math.log(2) / sum(map(len, held_out))
    theirs = lmplz_bits_per_byte(given, held_out, tmp_path)
    print(f"{name}: ours {ours:.4f}, lmplz {theirs:.4f} bits per byte")
    assert ours == pytest.approx(theirs, rel=0.01)


def lmplz_bits_per_byte(given: list[bytes], held_out: list[bytes], folder: Path) -> float:
    """Bytes as words, a document a line; what `</s>` costs is left out, as no document's end is counted."""
    assert LMPLZ is not None
    lines = ["".join(" ".join(f"{byte:02x}" for byte in text) + "\n" for text in texts) for texts in (given, held_out)]
    with (folder / "model.arpa").open("wb") as arpa:
        command = [LMPLZ, "-o", str(ngram.ORDER), "--discount_fallback", "-S", "1G", "-T", str(folder)]
        subprocess.run(command, input=lines[0].encode(), stdout=arpa, stderr=subprocess.DEVNULL, check=True)
    query = [Path(LMPLZ).with_name("query"), "-v", "word", folder / "model.arpa"]
    said = subprocess.run(query, input=lines[1].encode(), capture_output=True, check=True).stdout.decode()
    words = [word.split(" ") for line in said.splitlines() for word in line.split("\t") if "=" in word]
    logs = [float(log10) for word, _, log10 in words if not word.startswith("</s>")]
    assert len(logs) == sum(map(len, held_out))
    return -sum(logs) * math.log2(10) / len(logs)
