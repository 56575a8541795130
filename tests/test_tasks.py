"""Tasks made by rule: a pair differs in what its rule says; who was told the answers has all, who knows nothing chance."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from command import TINY_FLAGS, Command, Refused, write
from firstwords import api
from firstwords.config import ModelConfig
from firstwords.errors import ConfigError, DataError, NoInputError
from firstwords.insight import tasks
from firstwords.insight.likelihood import Continuation, answer, encode_pair, likelihoods
from firstwords.insight.tasks import Item, Rule, Task
from firstwords.model.gpt import GPTModel
from firstwords.model.language_model import LanguageModel
from firstwords.text import corpus, sources
from firstwords.text.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
GERMAN = "".join(
    f"Im {word} Jahr kaufte die alte Müllerin, wie man {word} erzählt, ein Haus am Ufer und zog dort {word} ein. "
    for word in (a + b for a in ("lange", "schöne", "dunkle", "warme", "helle") for b in ("n", "r", "s", "re", "ste", "rem"))
)


@pytest.fixture(scope="module")
def english() -> list[str]:
    """Python's own reference, which is built in."""
    return ["".join(document.pieces()) for document in sources.read([])]


@pytest.fixture(scope="module")
def made(english: list[str]) -> dict[str, Task]:
    return {task.name: task for task in tasks.make(english)}


def config(context_length: int) -> ModelConfig:
    return ModelConfig(vocab_size=257, context_length=context_length, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0)


def split(item: Item) -> tuple[str, str]:
    """The right sentence and its twin."""
    good, bad = item.choices[item.answer], item.choices[1 - item.answer]
    return good, bad


def test_tasks_are_a_function_of_the_text_and_the_seed(english: list[str], made: dict[str, Task]) -> None:
    assert {task.name: task for task in tasks.make(english)} == made
    others = {task.name: task for task in tasks.make(english, seed=124)}
    assert set(others) == set(made) == {"last_word", "last_word_of_4", *get_args(Rule)}
    assert all(others[name] != made[name] for name in made)


@pytest.mark.parametrize("rule", get_args(Rule))
def test_each_pair_is_a_sentence_of_the_text_and_its_twin_with_one_fault(
    rule: Rule, english: list[str], made: dict[str, Task]
) -> None:
    same = {
        "word_order": lambda text: sorted(tasks._WORD.findall(text)),
        "spelling": sorted,
        "case": str.lower,
        "comma": lambda text: text.replace(",", ""),
        "article": lambda text: [{"an": "a"}.get(word, word) for word in text.split()],
        "agreement": lambda text: [tasks._TWINS[w] if w in ("are", "were", "have", "do") else w for w in text.split()],
    }[rule]
    assert len(made[rule].items) >= 100
    for item in made[rule].items:
        good, bad = split(item)
        assert item.context == ""
        assert any(good in text for text in english)
        assert good != bad
        assert same(good) == same(bad)


@pytest.mark.parametrize("rule", tasks.ENGLISH)
def test_a_word_is_put_for_another_as_often_as_the_other_for_it(rule: str, made: dict[str, Task]) -> None:
    """A model that likes `a` better than `an` everywhere, or short sentences, is right in half of the cases."""
    changes = Counter(
        next(pair for pair in zip(good.split(), bad.split(), strict=True) if pair[0] != pair[1])
        for good, bad in map(split, made[rule].items)
    )
    # 300 of some 1,000 balanced pairs are drawn: five standard deviations of how many go one way
    assert abs(sum(n if len(old) < len(new) else -n for (old, new), n in changes.items())) < 5 * 300**0.5
    assert all((new, old) in changes for (old, new), n in changes.items() if n > 10)


def test_a_misspelt_word_is_none_that_the_text_has(english: list[str], made: dict[str, Task]) -> None:
    known = {word for text in english for word in text.split()}
    for good, bad in map(split, made["spelling"].items):
        (fault,) = [new for old, new in zip(good.split(), bad.split(), strict=True) if old != new]
        assert fault not in known


def test_rules_of_english_are_for_english_texts_only() -> None:
    names = [task.name for task in tasks.make([GERMAN])]
    assert "word_order" in names
    assert not set(tasks.ENGLISH) & set(names)


def test_a_last_word_and_its_passage_stand_in_the_text_and_the_other_choices_are_last_words_too(
    english: list[str], made: dict[str, Task]
) -> None:
    least, most = tasks.PASSAGE_CHARS
    words = {item.choices[0] for item in made["last_word"].items}
    by_context = {asked.context: asked for asked in made["last_word"].items}
    for asked in by_context.values():
        assert any(asked.context + asked.choices[0] in text for text in english)
        assert least <= len(asked.context) <= most
    for choice in made["last_word_of_4"].items:
        assert choice.choices[choice.answer] == by_context[choice.context].choices[0]
        assert len(set(choice.choices)) == 4
        assert set(choice.choices) <= words


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_sentence_does_not_reach_from_one_paragraph_into_the_next(end: str) -> None:
    text = "The first of a text is left out. A heading without an end\n\nA paragraph that goes on. This is one sentence.\n"
    assert list(tasks._sentences([text.replace("\n", end)])) == ["This is one sentence."]


def test_a_text_without_places_to_ask_about_is_refused() -> None:
    with pytest.raises(DataError, match="no tasks"):
        tasks.make(["Too short. It has two sentences only."])
    with pytest.raises(DataError, match="no tasks"):
        tasks.make(["." * 100_000, "one word " * 10_000])  # and at once


class Oracle(GPTModel):
    """A model that knows, after each text that it was told, how it goes on."""

    def __init__(self, told: Sequence[str]) -> None:
        super().__init__(config(1024))
        ids = [(BYTES.end_of_text, *BYTES.encode(text)) for text in told]
        self.next = {row[:n]: row[n] for row in ids for n in range(1, len(row))}
        self.next |= {row[1:n]: row[n] for row in ids for n in range(2, len(row))}
        self.out_head = nn.Linear(257, 257, bias=False)
        nn.init.eye_(self.out_head.weight)

    def features(self, tokens: Tensor, cache: object = None) -> Tensor:
        rows = [tuple(row) for row in tokens.tolist()]
        said = [[self.next.get(row[: n + 1], 0) for n in range(len(row))] for row in rows]
        return 20 * nn.functional.one_hot(torch.tensor(said), 257).float()


def test_who_was_told_the_answers_has_them_all_and_who_was_told_wrong_ones_has_none(made: dict[str, Task]) -> None:
    few = [Task(name, made[name].items[:20]) for name in ("last_word", "last_word_of_4", "word_order", "comma")]
    items = [item for task in few for item in task.items]
    right = Oracle([item.context + item.choices[item.answer] for item in items])
    assert [score.accuracy for score in answer(LanguageModel(right, BYTES), few)] == [1.0] * 4
    wrong = Oracle([item.context + item.choices[item.answer - 1] for item in items if len(item.choices) > 1])
    scores = answer(LanguageModel(wrong, BYTES), few[1:])
    assert [score.accuracy for score in scores] == [0.0] * 3


def test_who_knows_nothing_has_what_chance_gives(made: dict[str, Task]) -> None:
    model = GPTModel(config(512))
    nn.init.zeros_(model.out_head.weight)  # every byte is as likely as any other
    scores = answer(LanguageModel(model, BYTES), list(made.values()))
    for score in scores:
        if score.name == "last_word":
            assert score.accuracy == 0
        else:
            sigma = (score.chance * (1 - score.chance) / score.n_items) ** 0.5
            assert abs(score.accuracy - score.chance) < 4 * sigma  # of eight tasks, once in 2,000 drawings


def test_likelihoods_are_those_of_one_token_at_a_time(small: ModelConfig) -> None:
    torch.manual_seed(0)
    model = GPTModel(dataclasses.replace(small, vocab_size=257)).eval()
    lm = LanguageModel(model, BYTES)
    drawn = torch.randint(0, 61, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    lengths = [(1, 1), (3, 5), (9, 8), (16, 1), (30, 16), (2, 40)]  # the context is 16
    requests = [Continuation(tuple(drawn[:a]), tuple(drawn[a : a + b])) for a, b in lengths]
    greedy = Continuation(requests[1].context, (int(model(torch.tensor([requests[1].context]))[0, -1].argmax()),))
    found = likelihoods(lm, [*requests, greedy])
    assert found[-1].greedy
    assert not found[1].greedy
    for (a, b), likelihood in zip(lengths, found, strict=False):
        nats, whole = 0.0, drawn[: a + b]
        for place in range(a, a + b):
            end = a + b if b <= 16 else place + 1 + (a + b - 1 - place) % 8  # a long one goes eight at a time, from its end
            start = max(0, end - 17)
            logits = model(torch.tensor([whole[start:place]]))[0, -1]
            nats -= torch.log_softmax(logits, dim=-1)[whole[place]].item()
        assert likelihood.nats == pytest.approx(nats, rel=1e-5)  # float32


def test_a_continuation_without_tokens_is_a_wrong_call() -> None:
    lm = LanguageModel(GPTModel(config(16)), BYTES)
    with pytest.raises(ValueError, match="no token"):
        likelihoods(lm, [Continuation((1,), ())])


@pytest.mark.parametrize(
    ("context", "continuation", "before", "after"),
    [("", "ab", [256], "ab"), ("ab", " c", "ab", " c"), ("ab ", "c", "ab", " c"), ("  ", "c", [256], "  c")],
)
def test_spaces_between_context_and_continuation_belong_to_the_continuation(
    context: str, continuation: str, before: str | list[int], after: str
) -> None:
    expected = BYTES.encode(before) if isinstance(before, str) else before
    assert encode_pair(BYTES, context, continuation) == Continuation(tuple(expected), tuple(BYTES.encode(after)))


def test_the_interval_is_wilsons() -> None:
    assert tasks.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # z²/(n + z²) for none of ten
    assert tasks.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert tasks.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_a_long_held_out_text_is_read_in_slices_at_even_distances(english: list[str], tmp_path: Path) -> None:
    long = write(tmp_path / "long.txt", english[0] + "".join(english) * 2)
    part = corpus.prepare(sources.read([long]), "bytes", cache=tmp_path / "cache", held_out=0.0).train
    read = tasks.documents(part, BYTES)
    assert len(read) == tasks.SLICES
    assert (
        sum(len(text.encode()) for text in read) <= 1.01 * tasks.READ_IDS
    )  # a letter that was cut is three bytes of U+FFFD
    whole = long.read_text()
    assert all(text.strip("\ufffd") in whole for text in read)
    assert whole.endswith(read[-1].strip("\ufffd"))


def test_documents_come_apart_where_they_were_joined(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", '{"text": "One süß."}\n{"text": "Two."}\n')
    part = corpus.prepare(sources.read([lines]), "bytes", cache=tmp_path / "cache", held_out=0.0).train
    assert tasks.documents(part, BYTES) == ["One süß.", "Two."]


def test_tasks_that_were_kept_are_asked_again_with_the_same_answers(command: Command, a_run: Path, here: Path) -> None:
    write(here / "german.txt", GERMAN)
    kept = command("eval", a_run, "german.txt", "--tasks-out", "kept", "--json")
    assert kept.code == 0
    assert {"bits_per_byte", "tasks"} <= set(kept.json)
    again = command("eval", a_run, "--tasks", "kept", "--json")
    assert set(again.json) == {"tasks"}
    by_name = {score["name"]: score for score in kept.json["tasks"]}
    assert {score["name"]: score for score in again.json["tasks"]} == by_name
    assert {"last_word", "word_order", "case"} <= set(by_name)
    assert set(by_name["case"]) == {"name", "accuracy", "low", "high", "chance", "n_items"}
    plain = command("eval", a_run, "german.txt", "--tasks")
    assert "95 % interval" in plain.out
    assert "bits per byte" in plain.out
    assert all(name in plain.out for name in by_name)


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"context": "", "choices": [], "answer": 0}',
        '{"context": "", "choices": ["a", ""], "answer": 0}',
        '{"context": "", "choices": ["a", "b"], "answer": 2}',
        '{"context": "", "choices": ["a", "b"], "answer": true}',
        '{"context": 1, "choices": ["a", "b"], "answer": 0}',
        "[1]",
        "",
    ],
)
def test_a_line_that_is_no_question_is_refused(line: str, refused: Refused, a_run: Path, here: Path) -> None:
    good = json.dumps({"context": "The 5. word", "choices": [" of", " fo"], "answer": 0})
    write(here / "own/mine.jsonl", f"{good}\n{line}\n")
    assert "mine.jsonl, line 2" in refused(65, "eval", a_run, "--tasks", "own")["where"]
    write(here / "own/mine.jsonl", f"{good}\n")
    assert [task.items for task in tasks.read(here / "own")] == [(Item("The 5. word", (" of", " fo"), 0),)]  # the control


def test_tasks_are_refused_where_they_cannot_be(refused: Refused, a_run: Path, here: Path) -> None:
    refused(66, "eval", a_run, "--tasks", "no-such-folder")
    refused(65, "eval", a_run, "--tasks")  # its held-out text is too short
    write(here / "taken", "precious")
    refused(73, "eval", a_run, "--tasks-out", "taken")
    refused(78, "eval", a_run, "text.txt", "--tasks", "kept")
    refused(78, "eval", a_run, "--tasks", "kept", "--no-baselines")
    refused(78, "eval", a_run, "--tasks", "kept", "--against", a_run)
    with pytest.raises(ConfigError, match="its own tasks"):
        api.evaluate_tasks(a_run, folder="kept", out="again")
    write(here / "own/mine.jsonl", "")
    refused(65, "eval", a_run, "--tasks", "own")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_where_lm_eval_is_missing_the_error_says_what_to_install() -> None:
    with pytest.raises(NoInputError, match=r"firstwords\[lm-eval\]"):
        api.lm_eval_model("any")


def test_a_run_without_held_out_text_is_told_to_have_none(command: Command, refused: Refused, text: Path) -> None:
    assert command("train", text, "--out", "run", *TINY_FLAGS, "--val-fraction", "0").code == 0
    for asked in ([], ["--tasks"]):
        assert refused(65, "eval", "run", *asked)["what"] == "there is no held-out text to evaluate on"


def test_to_say_the_commonest_word_where_it_is_offered_helps_nobody() -> None:
    """Of the words that stand together in a question each is as often the right one, however common it is."""
    asked = [Item("c", (" sir",), 0)] * 1800 + [Item("c", (f" w{n % 40}",), 0) for n in range(1200)]
    offered = [item for item in tasks.among_others(asked, 123) if " sir" in item.choices]
    right = sum(item.choices[item.answer] == " sir" for item in offered)
    assert len(offered) > 100
    chance = 1 / tasks.CHOICES
    assert abs(right / len(offered) - chance) < 4 * (chance * (1 - chance) / len(offered)) ** 0.5  # four standard deviations


def test_documents_of_one_sentence_make_tasks() -> None:
    sentences = [f"The old man number {n} walked slowly down to the river, alone." for n in range(2000)]
    assert tasks.make(sentences)
    assert list(tasks._sentences(["and so the end of one comes. It is followed by another one."])) == [
        "It is followed by another one."
    ]


def test_a_folder_that_no_yaml_can_name_is_refused(made: dict[str, Task], english: list[str]) -> None:
    assert tasks.files(tuple(made.values()), english, Path("tasks"))  # the negative control
    with pytest.raises(DataError, match="is not UTF-8"):
        tasks.files(tuple(made.values()), english, Path("caf\udce9"))
