"""What is learnt by heart is found, all of it and where it stands; what is not is not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import Command
from conftest import OTHER, STORY, TINY, journal, outcome
from firstwords import api, judging, watching
from firstwords.errors import ConfigError
from firstwords.events import Measured, Notice, Told
from firstwords.insight import memorisation
from firstwords.insight.memorisation import COPIED, GRAM, SHORTEST, Meter, Place, Samples, TrainingText, copies
from firstwords.insight.overfitting import Turned, just_turned, sentence, turning_point
from firstwords.insight.variety import WORD, distinct, repeated
from firstwords.recorder import TrainResult
from firstwords.text import corpus, sources
from firstwords.text.corpus import Part
from firstwords.text.tokenizer import Tokenizer, byte_tokenizer, gpt2, train_bpe
from firstwords.training.events import SaveDue

# The chapter's own run: step, held-out nats per token.
CHAPTER = [9.924, 8.332, 7.042, 6.596, 6.508, 6.378, 6.263, 6.285, 6.130, 6.183]
CHAPTER += [6.123, 6.150, 6.133, 6.186, 6.230, 6.251, 6.278, 6.373]
CHAPTER_RUN = [(5 * i, nats) for i, nats in enumerate(CHAPTER)]


def part(documents: list[str], tokenizer: Tokenizer) -> Part:
    ids = [token for document in documents for token in (tokenizer.end_of_text, *tokenizer.encode(document))]
    return Part(np.array(ids, "<u2"), tokenizer.id_bytes, len(documents))


def text(*documents: str, tokenizer: Tokenizer | None = None) -> TrainingText:
    tokenizer = tokenizer or byte_tokenizer()
    return TrainingText(part(list(documents), tokenizer), tokenizer)


def spans(sample: str, documents: list[str]) -> Iterator[tuple[int, int]]:
    """From each character, the end of the longest span that a document holds; by trying all."""
    for start in range(len(sample)):
        end = start
        while end < len(sample) and any(sample[start : end + 1] in document for document in documents):
            end += 1
        if len(sample[start:end].encode()) >= SHORTEST:
            yield start, end


def slowly(samples: list[str], documents: list[str]) -> tuple[int, float, float | None]:
    """Length of the longest copy, copied share, novel 8-grams; by trying all."""
    found = [list(spans(sample, documents)) for sample in samples]
    counts = [
        [(a, b) for a, b in of if b - a in (len(one), *range(COPIED, b + 1))] for one, of in zip(samples, found, strict=True)
    ]
    inside = [{i for start, end in of for i in range(start, end)} for of in counts]
    grams = []
    for sample in samples:
        words = [match.span() for match in WORD.finditer(sample)]
        grams += [sample[a[0] : b[1]] for a, b in zip(words, words[GRAM - 1 :], strict=False)]
    grams = [gram for gram in grams if len(gram.encode()) >= SHORTEST]
    novel = [not any(gram in document for document in documents) for gram in grams]
    longest = max((end - start for of in found for start, end in of), default=0)
    return longest, sum(map(len, inside)) / max(1, sum(map(len, samples))), sum(novel) / len(novel) if novel else None


def babble(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(length))


def planted(rng: random.Random, alphabet: str, documents: list[str]) -> str:
    """Pieces of the documents with pieces of nothing between them."""
    pieces = []
    for _ in range(rng.randrange(4)):
        source = rng.choice(documents)
        start = rng.randrange(len(source) + 1)
        pieces += [source[start : start + rng.randrange(90)], babble(rng, alphabet, rng.randrange(9))]
    return "".join(pieces)


@pytest.mark.parametrize("alphabet", ["ab", "ab c ", "aß→𝄞 ", "one two ", "天地玄黄"])
def test_what_is_found_is_what_trying_all_finds(alphabet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(alphabet)
    monkeypatch.setattr(memorisation, "IDS_AT_ONCE", 64)  # so that spans lie across the seams
    monkeypatch.setattr(memorisation, "PAIRS_AT_ONCE", 5)
    for trial in range(40):
        monkeypatch.setattr(memorisation, "KEPT_BYTES", 0 if trial % 2 else 1 << 20)
        documents = [babble(rng, alphabet, rng.randrange(300)) for _ in range(1 + trial % 3)]
        samples = [planted(rng, alphabet, documents) for _ in range(3)]
        of = text(*documents)
        for _ in range(2):  # decoded, and from memory
            found = copies(samples, of)
            assert (len(found.longest), found.share, found.novel_8grams) == slowly(samples, documents)
            if found.place is not None:
                there = documents[found.place.document][found.place.character :]
                assert there.startswith(found.longest)


def test_short_documents_that_are_said_whole_are_copied_and_parts_of_other_lines_are_not() -> None:
    lines = [f"question {n}: why is {n * n} so large?" for n in range(300)]  # each far shorter than COPIED
    assert copies(lines[::50], text(*lines)).share == 1.0
    others = [f"question {n}: why is {n * n + 1} so small?" for n in range(7)]
    assert copies(others, text(*lines)).share == 0.0
    assert copies([lines[7], others[0], ""], text(*lines)).share == len(lines[7]) / (len(lines[7]) + len(others[0]))


def test_what_short_documents_end_alike_is_copied_of_held_out_text_as_well() -> None:
    """What is said goes on from a prompt, so that held-out text is held against it without one too."""
    lines = [f"item {n} ends as all of these do, with one word" for n in range(100, 400)]
    learnt, held_out = (part(some, gpt2()) for some in (lines[:250], lines[250:]))
    found = Meter(learnt, held_out, gpt2(), 60).measure([line[len("item 100 ends as") :] for line in lines[250:260]], None)
    assert (found.copied_share, found.held_out_copied_share) == (1.0, 1.0)
    assert isinstance(found.copied_share, float)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), gpt2(), train_bpe([STORY], 300)], ids=lambda made: made.name)
def test_the_figures_do_not_depend_on_the_tokenizer(tokenizer: Tokenizer) -> None:
    samples = [STORY[700:800] + " and so on", "Einst waren Enten süß → 𝄞"]
    found = copies(samples, text("Vorher: süß 𝄞.", STORY, tokenizer=tokenizer))
    assert found == copies(samples, text("Vorher: süß 𝄞.", STORY))
    assert found.longest == samples[0][:100]
    assert found.place == Place(1, STORY.index(samples[0][:100]))


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs of equal places were followed, so far."""
    count, follow = [0], Samples._follow

    def counted(self: Samples, words: Any, at: Any, own: Any, base: int) -> None:
        count[0] += len(at)
        follow(self, words, at, own, base)

    monkeypatch.setattr(Samples, "_follow", counted)
    return count


def test_what_a_table_has_between_its_words_is_not_followed_everywhere(followed: list[int]) -> None:
    rows = (f"{name:<60}{number:<60}|\n" for number, name in enumerate(("alpha", "beta", "gamma") * 200))
    whole = "".join(rows)
    found = copies([whole[30:2000]], text(whole))
    assert (found.longest, found.share) == (whole[30:2000], 1.0)  # through its runs, from what stands between them
    assert followed[0] < 2 * len(whole)  # from every place of a run to every other it would be a hundred times as many
    assert copies([" " * 500], text(whole + " " * 500)).longest == ""
    assert copies(["a word" + " " * 500 + "a word"], text(whole + "a word" + " " * 500 + "a word")).share == 1.0


@pytest.mark.parametrize("unit", ["0, ", "─", "null,", "0x00, ", "x = 0; "], ids=lambda unit: f"{len(unit.encode())} bytes")
def test_what_repeats_with_any_short_period_is_not_followed_everywhere(unit: str, followed: list[int]) -> None:
    run = unit * (1000 // len(unit.encode()))
    whole = "".join(f"{name} of {number}:{run}\n" for number, name in enumerate(("alpha", "beta", "gamma") * 20))
    sample = whole[500:5000]
    found = copies([sample], text(whole))
    assert (found.longest, found.share) == (sample, 1.0)
    assert followed[0] < len(whole)
    assert copies([run], text(whole + run)).longest == ""


def test_a_span_does_not_reach_from_one_document_into_the_next() -> None:
    ends, begins = "the last words of the first document", "and the first words of the second document"
    assert copies([ends + begins], text(ends, begins)).longest == begins
    assert copies([ends + begins], text(ends + begins)).longest == ends + begins


def test_a_model_that_recites_scores_all_and_a_uniform_one_nothing() -> None:
    tokenizer, rng = byte_tokenizer(), random.Random(1)
    meter = Meter(part([STORY[:3000]], tokenizer), part([OTHER], tokenizer), tokenizer, n_tokens=200)
    reciting = meter.measure([STORY[start : start + 200] for start in (0, 500, 2700)], gap=1.0)
    assert (reciting.copied_share, reciting.novel_8grams, reciting.longest_copy_chars) == (1.0, 0.0, 200)
    uniform = meter.measure(
        [bytes(rng.randrange(256) for _ in range(200)).decode(errors="replace") for _ in range(3)], gap=None
    )
    assert (uniform.copied_share, uniform.longest_copy, uniform.place) == (0.0, "", None)


def test_held_out_text_is_the_yardstick() -> None:
    tokenizer = byte_tokenizer()
    found = Meter(part([STORY], tokenizer), part([STORY[500:900]], tokenizer), tokenizer, 100).measure(["x" * 100], None)
    assert found.held_out_copied_share == 1.0
    assert found.held_out_novel_8grams == 0.0
    assert (found.repeated, found.held_out_repeated) == (0.99, 0.0)
    assert found.distinct is None  # one word has no neighbour
    assert found.held_out_distinct is not None


@pytest.mark.parametrize("n_tokens", [1, 7, 5000])
def test_short_and_empty_texts_have_figures_too(n_tokens: int) -> None:
    tokenizer = byte_tokenizer()
    nothing = Part(np.empty(0, "<u2"), tokenizer.id_bytes, 0)
    for train in (nothing, part(["a"], tokenizer), part([STORY], tokenizer)):
        for val in (nothing, part(["b"], tokenizer), part(["", ""], tokenizer)):
            for samples in ([], [""], ["", "a"], ["a b c d e f g h"]):
                found = Meter(train, val, tokenizer, n_tokens).measure(samples, None)
                assert (found.copied_share, found.longest_copy, found.novel_8grams) == (0.0, "", None)
                json.dumps(found.as_dict(), allow_nan=False)


def test_loops_are_found_and_doubled_letters_are_none() -> None:
    assert repeated("") == repeated("llama, no no") == repeated("abcdefgh") == 0.0
    assert repeated("-" * 100) == 0.99
    assert repeated("and the " * 4) == 24 / 32
    assert repeated("Once. Twice, and then again and then again!") == len(" and then again") / 43
    assert repeated("süß → 𝄞! süß → 𝄞! ") == 0.5


def test_variety_is_the_share_of_different_pairs_of_words() -> None:
    assert distinct("") is distinct("word") is None
    assert distinct("a b c d") == 1.0
    assert distinct("the duck, the duck - the duck") == 2 / 5
    assert distinct("天地天地") == 2 / 3
    assert WORD.findall("don't stop 'em, naïve Σ1") == ["don't", "stop", "em", "naïve", "Σ1"]


def test_the_chapters_run_turns_once_after_its_best() -> None:
    said = [(step, found) for end, (step, _) in enumerate(CHAPTER_RUN, 1) if (found := just_turned(CHAPTER_RUN[:end]))]
    assert said == [(65, Turned(50, 6.123, 6.186))]
    assert turning_point(CHAPTER_RUN) == Turned(50, 6.123, 6.373)
    assert sentence(Turned(50, 6.123, 6.373), 0.871) == (
        "since step 50 it only gets worse on new text (6.12 -> 6.37 nats a token); 87% of its output is copied"
    )
    for nothing in (None, 0.0, 0.004):
        assert (
            sentence(Turned(50, 6.123, 6.373), nothing)
            == "since step 50 it only gets worse on new text (6.12 -> 6.37 nats a token)"
        )


@pytest.mark.parametrize(
    "nats",
    [
        [],
        [3.0],
        [9 - 0.3 * i for i in range(20)],  # learns
        [3.0 + 0.001 * (-1) ** i for i in range(20)],  # has come to rest
        [5.0, 4.0, 4.1, 4.2],  # two evaluations say little
        [5.0, 4.0, 4.5, 4.4, 4.3],  # is recovering
    ],
)
def test_a_run_that_has_not_turned_is_left_in_peace(nats: list[float]) -> None:
    history = [(10 * i, value) for i, value in enumerate(nats)]
    assert all(turning_point(history[:end]) is None for end in range(len(history) + 1))


def test_close_evaluations_are_not_enough() -> None:
    history = [(step, 9 - step / 100 if step <= 200 else 7 + (step - 200) / 100) for step in range(230)]
    said = [step for end, (step, _) in enumerate(history, 1) if just_turned(history[:end])]
    assert said == [223]  # the first of which a tenth lies behind the best


OPTIONS: dict[str, Any] = {**TINY, "steps": 32, "eval_every": 4, "save_every_s": 0.0}
OPTIONS["optim"] = {"kind": "muon", "peak_lr": 0.05, "warmup_steps": 2}


def train(folder: Path, name: str, **options: Any) -> TrainResult:
    story, other = folder / "story.txt", folder / "other.txt"
    story.write_text(STORY)
    other.write_text(STORY[::-1][:900])
    return api.train(story, out=folder / name, **{**OPTIONS, "val": str(other), **options})


@dataclass(frozen=True)
class Whole:
    """A run to its end, and what it told."""

    folder: Path
    result: TrainResult
    told: list[Told]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, told = tmp_path_factory.mktemp("whole"), list[Told]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTWORDS_CACHE", str(folder / "cache"))
        return Whole(folder / "run", train(folder, "run", listener=told.append), told)


def test_a_run_measures_itself_at_every_evaluation_and_speaks_once(whole: Whole) -> None:
    lines, told = journal(whole.folder, "memorisation"), whole.told
    assert [line["step"] for line in lines] == [line["step"] for line in journal(whole.folder, "evaluation")]
    keys = "step longest_copy longest_copy_chars place copied_share novel_8grams held_out_novel_8grams gap"
    keys += " repeated held_out_repeated distinct held_out_distinct"
    assert set(keys.split()) <= set(lines[0])
    for line in lines:
        if line["place"]:
            assert STORY[line["place"]["character"] :].startswith(line["longest_copy"])
    assert [event.step for event in told if isinstance(event, Measured)] == [line["step"] for line in lines]
    said = [event.text for event in told if isinstance(event, Notice) and "only gets worse" in event.text]
    assert len(said) == 1


def test_a_draft_beside_a_later_one_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SAMPLE_TOKENS", 2 * COPIED)  # and bytes: as long as a span that counts
    for name, text in (("first.txt", STORY[: 3 * len(STORY) // 4]), ("second.txt", STORY)):
        (tmp_path / name).write_text(text)
    told = list[Told]()
    train_both = {**OPTIONS, "eval_every": 2, "steps": 4}
    api.train([tmp_path / "first.txt", tmp_path / "second.txt"], out=tmp_path / "run", listener=told.append, **train_both)
    notices = [event.text for event in told if isinstance(event, Notice)]
    assert len([text for text in notices if "word for word, is in what it learns from too" in text]) == 1
    told.clear()
    api.train(tmp_path / "second.txt", out=tmp_path / "alone", listener=told.append, **train_both)  # the negative control
    assert not [event for event in told if isinstance(event, Notice) and "word for word" in event.text]


def test_a_manual_repeats_itself_less_than_would_be_told(tmp_path: Path) -> None:
    prepared = corpus.prepare(sources.read([]), "gpt2", cache=tmp_path)  # Python's own reference
    share = Meter(prepared.train, prepared.val, prepared.tokenizer, 60).measure(["a"], None).held_out_copied_share
    assert share is not None
    assert 0.05 < share < watching.OVERLAP_SHARE


def test_the_meter_changes_nothing_in_training(whole: Whole, tmp_path: Path) -> None:
    without = train(tmp_path, "without", meter=False)
    assert without.weights_sha256 == whole.result.weights_sha256
    assert without.last == whole.result.last
    assert journal(tmp_path / "without", "memorisation") == []
    assert journal(tmp_path / "without", "step", "evaluation") == journal(whole.folder, "step", "evaluation")


class KilledError(Exception):
    """Stands for the end of the process."""


def test_until_best_stops_with_the_best_kept_and_a_resumed_run_stops_there_too(whole: Whole, tmp_path: Path) -> None:
    ended = train(tmp_path, "stopped", until="best")
    assert ended.stopped == "best"
    assert ended.steps < whole.result.steps
    assert (ended.best_step, ended.weights_sha256) == (whole.result.best_step, whole.result.weights_sha256)
    expected = outcome(tmp_path / "stopped")
    for step in (0, ended.best_step + 1, ended.steps):

        def killed(told: Told, step: int = step) -> None:
            if isinstance(told, SaveDue) and told.step == step:
                raise KilledError

        with pytest.raises(KilledError):
            train(tmp_path, f"killed {step}", until="best", listener=killed)
        assert api.train(out=tmp_path / f"killed {step}", resume=True).stopped == "best"
        assert outcome(tmp_path / f"killed {step}") == expected


def test_a_run_that_stopped_at_its_best_goes_on_only_when_it_is_told_to(whole: Whole, tmp_path: Path) -> None:
    ended, told = train(tmp_path, "run", until="best"), list[Told]()
    again = api.train(out=tmp_path / "run", resume=True, listener=told.append)
    assert (again.stopped, again.steps) == ("best", ended.steps)
    assert any("--until end" in event.text for event in told if isinstance(event, Notice))
    assert [line["reason"] for line in journal(tmp_path / "run", "stop")] == ["best"]  # its last save was before that
    assert api.train(out=tmp_path / "run", resume=True, until="end").stopped == "done"
    assert outcome(tmp_path / "run")["weights"] == outcome(whole.folder)["weights"]


def test_until_best_without_held_out_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no held-out text"):
        train(tmp_path, "run", until="best", val=None, val_fraction=0.0)
    assert not (tmp_path / "cache/corpora").exists()  # before the text is prepared


def test_eval_says_how_much_is_learnt_by_heart(a_run: Path, command: Command) -> None:
    found = command("eval", a_run, "--json").json["memorisation"]
    assert found == api.memorisation(a_run).as_dict()  # type: ignore[union-attr]
    assert found["gap"] == pytest.approx(0, abs=1)  # two steps; the two parts are of one kind
    assert "copied of what it says 0%" in command("eval", a_run).out


def test_a_model_is_not_read_where_its_text_is_not_there(a_run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(cache)
    monkeypatch.setattr(judging, "load", lambda *_, **__: pytest.fail("the model was read"))
    assert api.memorisation(a_run) is None


def test_a_text_that_is_not_kept_is_measured_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorisation, "KEPT_BYTES", 0)
    train(tmp_path, "run", steps=4, eval_every=2)
    assert [line["step"] for line in journal(tmp_path / "run", "memorisation")] == [4]


@pytest.mark.parametrize(("bytes_per_s", "has_room"), [(1e9, True), (1.0, False)])
def test_a_time_budget_without_room_for_it_leaves_a_long_text_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_per_s: float, has_room: bool
) -> None:
    monkeypatch.setattr(memorisation, "KEPT_BYTES", 0)
    monkeypatch.setattr(memorisation, "PASSED_BYTES_PER_S", bytes_per_s)
    told = list[str]()
    length = {"for_s": 2.0, "steps": None, "eval_every": None}
    train(tmp_path, "run", **length, listener=lambda event: told.append(getattr(event, "text", "")))
    assert bool(journal(tmp_path / "run", "memorisation")) == has_room
    assert any("firstwords eval" in line for line in told) != has_room


def test_a_piece_of_held_out_text_is_of_one_document_and_begins_where_one_it_would_reach_into_does() -> None:
    """As a sample is: a joint of two documents would count as words that nobody put together."""
    tokenizer = byte_tokenizer()
    short = [f"yes number {n} is quite all right by me" for n in range(100, 400)]
    pieces = memorisation.held_out_pieces(part(short, tokenizer), tokenizer, 200)
    assert len(pieces) > 10
    assert set(pieces) <= set(short)
    found = Meter(part(short, tokenizer), part(short, tokenizer), tokenizer, 200).measure(["x"], None)
    assert found.held_out_novel_8grams == 0  # it is the training text
    long = memorisation.held_out_pieces(part([STORY * 40], tokenizer), tokenizer, 200)
    assert {len(piece.encode()) for piece in long} == {200}  # the negative control: nothing is shortened
