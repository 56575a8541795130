"""Tasks made from a text by rule: the last word of a passage, and sentences beside a spoilt twin.

The last word of a passage is LAMBADA's question (Paperno et al. 2016, arXiv:1606.06031), pairs of sentences that differ in
one place are BLiMP's (Warstadt et al. 2020, arXiv:1912.00582). Whoever wrote the text is taken to have written it well.

All is a function of (text, seed). Answers stand at random places, and rules that put one word for another are used as often
in either direction, so that a model that always prefers the same word, or the shorter sentence, gets what chance gives.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, assert_never, get_args

import numpy as np
import regex

from firstwords import reading
from firstwords.errors import DataError, NoInputError
from firstwords.insight.scale import Z_95
from firstwords.text import corpus as corpora
from firstwords.text.corpus import Part
from firstwords.text.tokenizer import Tokenizer

Rule = Literal["word_order", "spelling", "case", "comma", "article", "agreement"]
ENGLISH: tuple[Rule, ...] = ("article", "agreement")  # the others know no language
MOST_ITEMS = 300  # a share of so many is known to 6 in 100
FEWEST_ITEMS = 20  # below, a share says nothing
CHOICES = 4
PASSAGE_CHARS = (100, 400)  # before the last word: at least, at most
SENTENCE_BYTES = (20, 240)  # with `<|endoftext|>` before it, it fits a context of 256 in any tokenizer
READ_IDS, SLICES = 1 << 18, 64  # of a long text, in so many slices at even distances
SUFFIX = ".jsonl"
ROLLING, ROLLING_CHARS = "text.json", 100_000  # what lm-eval takes bits per byte of

_END = r"""(?:[.!?…](?=[\s"'”’)\]]|\Z)|[。！？])"""  # of a sentence: a mark inside a word, as in `3.5`, is none
_PARAGRAPH = regex.compile(r"\n\r?\n")
_SENTENCE = regex.compile(rf"(?:(?!{_END})[\s\S])++(?:{_END}|\Z)")
_WHOLE = regex.compile(rf"""["'“„«¿¡]?\p{{L}}[\s\S]*{_END}""")
_CAPITAL = regex.compile(r"""["'“„«¿¡]?\p{Lu}""")
_LAST_WORD = regex.compile(rf"(?<=[\p{{L}},;] )\p{{L}}{{3,}}(?={_END})")
_WORD = regex.compile(r"\p{L}+")
_TWO_WORDS = regex.compile(r"(?<![\p{L}'’-])(\p{L}+)(\s)(\p{L}+)(?![\p{L}'’-])")
_INNER_WORD = regex.compile(r"(?<=[\p{L},;] )\p{Ll}{3,}(?!\p{L})")
_LONG_WORD = regex.compile(r"(?<!\p{L})\p{Ll}{5,}(?!\p{L})")
_COMMA = regex.compile(r"(?<=\p{L}),(\s\p{L}+)(?=\s\p{L})")
_ARTICLE = regex.compile(r"(?<!\S)(?:a(?= [bcdfgjklmnpqrstvwxyz])|an(?= [aeio]))")
_VERB = regex.compile(r"(?<=\s)(?:is|are|was|were|has|have|does|do)(?=\s)")
_TWINS = {"a": "an", "is": "are", "was": "were", "has": "have", "does": "do"}
_TWINS |= {second: first for first, second in _TWINS.items()}
_COMMON_ENGLISH = {"the", "and", "of", "to", "a", "in"}
_ENGLISH_SHARE = 0.08  # of the words; of English texts they are about a sixth


@dataclass(frozen=True)
class Item:
    """One question: which of the choices goes on after the context? A single one must be what the model would say itself."""

    context: str  # empty: the beginning of a document
    choices: tuple[str, ...]
    answer: int  # its place among the choices


@dataclass(frozen=True)
class Task:
    """Questions of one kind."""

    name: str
    items: tuple[Item, ...]

    @property
    def chance(self) -> float:
        """What can be had without reading: one of the choices, or the commonest answer of all."""
        if len(self.items[0].choices) > 1:
            return sum(1 / len(item.choices) for item in self.items) / len(self.items)
        return Counter(item.choices for item in self.items).most_common(1)[0][1] / len(self.items)


@dataclass(frozen=True)
class TaskScore:
    """How many questions of a task were answered rightly; `low` and `high` hold the true share in 95 cases of 100."""

    name: str
    accuracy: float
    low: float
    high: float
    chance: float
    n_items: int

    @classmethod
    def of(cls, task: Task, n_right: int) -> TaskScore:
        """Return the figures that follow from the number of right answers."""
        n = len(task.items)
        return cls(task.name, n_right / n, *wilson(n_right, n), task.chance, n)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON has them."""
        return asdict(self)


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n).

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, z2 = n_right / n, Z_95**2 / n
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return max(0.0, (share + z2 / 2 - half) / (1 + z2)), min(1.0, (share + z2 / 2 + half) / (1 + z2))


def documents(part: Part, tokenizer: Tokenizer) -> list[str]:
    """Return the documents of a part; of a long one, slices of them at even distances."""
    found = []
    for start, end in corpora.evenly(len(part.ids), SLICES, READ_IDS // SLICES):
        piece = part.ids[start:end]
        ends = np.flatnonzero(piece == tokenizer.end_of_text)
        found += [
            tokenizer.decode(document[document != tokenizer.end_of_text].tolist()) for document in np.split(piece, ends)
        ]
    return [document for document in found if document]


def make(texts: Sequence[str], seed: int = 123) -> tuple[Task, ...]:
    """Return the tasks that a text has at least `FEWEST_ITEMS` questions for, of at most `MOST_ITEMS` each.

    `last_word`: the model must say it; `last_word_of_4`: or find it among last words of other passages. `word_order`: two
    words swapped; `spelling`: two letters inside a word; `case`: a word inside a sentence with a capital; `comma`: one word
    too late. In English texts also `article` (a, an) and `agreement` (is, are; was, were; has, have; does, do).

    Raises:
        DataError: It has enough of none.
    """
    asked = last_words(texts, seed)
    rules = [rule for rule in get_args(Rule) if rule not in ENGLISH or _is_english(texts)]
    made = [Task("last_word", asked), Task(f"last_word_of_{CHOICES}", among_others(asked, seed))]
    made += [Task(rule, minimal_pairs(texts, rule, seed)) for rule in rules]
    enough = tuple(task for task in made if len(task.items) >= FEWEST_ITEMS)
    if not enough:
        why = f"no rule finds {FEWEST_ITEMS} places in it to ask about"
        do = "name a longer text, of sentences and of words with spaces between them"
        raise DataError("no tasks can be made from the text", where="TEXT", why=why, do=do)
    return enough


def read(folder: Path) -> tuple[Task, ...]:
    """Return the tasks of a folder: of each `NAME.jsonl`, questions as `{"context": ..., "choices": [...], "answer": 0}`.

    Raises:
        NoInputError: No such file is there.
        DataError: A line is no question.
    """
    paths = sorted(folder.glob("*" + SUFFIX)) if folder.is_dir() else []
    if not paths:
        do = "name a folder that eval --tasks-out wrote, or leave it out"
        raise NoInputError(f"there is no folder with a {SUFFIX} file", where=str(folder), do=do)
    return tuple(Task(path.stem, tuple(_items(path))) for path in paths)


def _items(path: Path) -> Iterator[Item]:
    lines = reading.read_bytes(path).splitlines()
    if not lines:
        raise DataError("is empty", where=str(path), do="remove it")
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        found = reading.parse_json(line, where)
        context, choices, answer = found.get("context"), found.get("choices"), found.get("answer", -1)
        texts = [choice for choice in choices if isinstance(choice, str) and choice] if isinstance(choices, list) else []
        is_place = type(answer) is int and 0 <= answer < len(texts)
        if not (isinstance(context, str) and texts == choices and is_place):
            why = "it needs context, a text; choices, texts that are not empty; answer, the place of the right one from 0"
            raise DataError("is no question", where=where, why=why)
        yield Item(context, tuple(texts), answer)


def files(tasks: Sequence[Task], texts: Sequence[str], folder: Path) -> dict[str, list[bytes]]:
    """Return the files of `folder`, by name: those that `read` reads, and what lm-eval needs to ask the same.

    lm-eval knows the tasks as `firstwords_NAME`, all of them as `firstwords`, and `firstwords_text` besides: bits per byte
    of the beginning of the text. Its files are YAML, of which JSON is a part, and name the others by their whole path.

    Raises:
        DataError: The folder's path is no text.
    """
    if not reading.is_utf8(str(folder.absolute())):
        raise DataError("is not UTF-8", where=ascii(str(folder)), why="no YAML can name it", do="give another --tasks-out")
    made: dict[str, list[bytes]] = {}
    for task in tasks:
        made[task.name + SUFFIX] = [_json(asdict(item)) for item in task.items]
        asked: dict[str, Any] = {"output_type": "loglikelihood", "doc_to_target": "{{choices[0]}}"}
        if any(len(item.choices) > 1 for item in task.items):
            asked = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
        asked |= {"doc_to_text": "{{context}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}
        made[task.name + ".yaml"] = [_json(_lm_eval(task.name, folder / (task.name + SUFFIX)) | asked)]
    metrics = [{"metric": name} for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")]
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": metrics,
    }
    made[ROLLING] = [_json({"text": text}) for text in _beginning(texts)]
    made["text.yaml"] = [_json(_lm_eval("text", folder / ROLLING) | rolling)]
    return made


def _lm_eval(name: str, data: Path) -> dict[str, Any]:
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data.absolute())}}, "test_split": "test"}
    return {"task": f"firstwords_{name}", "tag": "firstwords", **where}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _beginning(texts: Iterable[str]) -> Iterator[str]:
    left = ROLLING_CHARS
    for text in texts:
        if text[:left].strip():
            yield text[:left]
        left = max(0, left - len(text))


def last_words(texts: Sequence[str], seed: int) -> tuple[Item, ...]:
    """Return passages, each of which the last word of a sentence is to be said after."""
    least, most = PASSAGE_CHARS
    found = []
    for text in texts:
        for match in _LAST_WORD.finditer(text):
            end = match.start() - 1  # the space belongs to the word, as in GPT-2's tokens
            context = text[max(0, end - most) : end]
            if end > most:
                context = regex.sub(r"^\S*\s+", "", context)
            if len(context) >= least:
                found.append(Item(context, (" " + match[0],), 0))
    return _drawn(found, Random(f"{seed} last_word"))


def among_others(items: Sequence[Item], seed: int) -> tuple[Item, ...]:
    """Return the same questions with three answers of other ones beside each: words as common as the right ones.

    Where the four are not all different the question is left out, not drawn again: of the words that stand together in
    those that are left, each is as often the right one, so that to prefer a common word helps nobody.
    """
    random, words = Random(f"{seed} choices"), [item.choices[0] for item in items]
    if len(set(words)) < CHOICES:
        return ()
    made = []
    for item in items:
        choices = [item.choices[0], *random.choices(words, k=CHOICES - 1)]
        if len(set(choices)) == CHOICES:
            made.append(_shuffled(item.context, choices, random))
    return tuple(made)


def minimal_pairs(texts: Sequence[str], rule: Rule, seed: int) -> tuple[Item, ...]:
    """Return sentences of the text, each beside its twin that the rule spoils."""
    random = Random(f"{seed} {rule}")
    known = {word for text in texts for word in _WORD.findall(text)} if rule == "spelling" else set()
    found: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for sentence in _drawn(dict.fromkeys(_sentences(texts)), random, most=None):
        spoilt = spoil(sentence, rule, random, known)
        if spoilt is not None:
            twin, change = spoilt
            found[change].append(_shuffled("", [sentence, twin], random))
    balanced = [item for (old, new), items in found.items() for item in items[: len(found.get((new, old), ()))]]
    return _drawn(balanced, random)


def spoil(sentence: str, rule: Rule, random: Random, known: set[str]) -> tuple[str, tuple[str, str]] | None:
    """Return a sentence with one fault, and which word became which where the rule has a reverse; None: no place for it.

    Args:
        sentence: Of any language.
        rule: What is done to it.
        random: Draws the place.
        known: Words that a misspelling must not be.
    """
    match rule:
        case "word_order":
            places = [m for m in _TWO_WORDS.finditer(sentence, overlapped=True) if m[1] != m[3] and m[0] == m[0].lower()]
        case "spelling":
            places = list(_LONG_WORD.finditer(sentence))
        case "case":
            places = list(_INNER_WORD.finditer(sentence))
        case "comma":
            places = list(_COMMA.finditer(sentence))
        case "article":
            places = list(_ARTICLE.finditer(sentence))
        case "agreement":
            places = list(_VERB.finditer(sentence))
        case _ as never:
            assert_never(never)
    if not places:
        return None
    place = random.choice(places)
    new, change = _fault(place, rule, random, known)
    return None if new == place[0] else (sentence[: place.start()] + new + sentence[place.end() :], change)


def _fault(place: regex.Match[str], rule: Rule, random: Random, known: set[str]) -> tuple[str, tuple[str, str]]:
    """Return what stands there instead, the same where there is nothing, and which word became which."""
    old: str = place[0]
    match rule:
        case "word_order":
            return place[3] + place[2] + place[1], ("", "")
        case "spelling":
            at = random.randrange(1, len(old) - 2)
            new = old[:at] + old[at + 1] + old[at] + old[at + 2 :]
            return old if new in known else new, ("", "")
        case "case":
            return old.capitalize(), ("", "")
        case "comma":
            return place[1] + ",", ("", "")
        case "article" | "agreement":
            return _TWINS[old], (old, _TWINS[old])
        case _ as never:
            assert_never(never)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield whole sentences; the first of a text may be the end of one, and counts only alone, with a capital letter."""
    least, most = SENTENCE_BYTES
    for text in texts:
        for number, match in enumerate(_SENTENCE.finditer(text)):
            sentence = match[0].strip()
            alone = number == 0 and match.end() == len(text.rstrip())
            begins = number > 0 or (alone and bool(_CAPITAL.match(sentence)))
            fits = begins and least <= len(sentence.encode()) <= most and not _PARAGRAPH.search(sentence)
            if fits and _WHOLE.fullmatch(sentence):
                yield sentence


def _is_english(texts: Sequence[str]) -> bool:
    counts = Counter(word.lower() for text in texts for word in _WORD.findall(text))
    return sum(counts[word] for word in _COMMON_ENGLISH) > _ENGLISH_SHARE * counts.total()


def _drawn(items: Iterable[Any], random: Random, most: int | None = MOST_ITEMS) -> tuple[Any, ...]:
    """Return at most so many of them, at random and in random order."""
    mixed = list(items)
    random.shuffle(mixed)
    return tuple(mixed[:most])


def _shuffled(context: str, choices: Sequence[str], random: Random) -> Item:
    """Return an item with its choices, the first of which is right, in random order."""
    order = random.sample(range(len(choices)), len(choices))
    return Item(context, tuple(choices[i] for i in order), order.index(0))
