"""The scale: figures that are right, intervals that are honest, words that follow from them."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from command import TINY_FLAGS, Command, Refused, write
from conftest import STORY
from firstwords import api
from firstwords.config import ModelConfig
from firstwords.insight import baselines as base
from firstwords.insight import memorisation
from firstwords.insight import scale as scales
from firstwords.insight.baselines import Baseline, Given, baselines
from firstwords.insight.explain import explain
from firstwords.insight.scale import Blocks, Interval, ScaleEntry, byte_nats, interval
from firstwords.model.gpt import GPTModel
from firstwords.model.language_model import LanguageModel
from firstwords.text import corpus as corpora
from firstwords.text import tokenizer as tokenizers
from firstwords.training.evaluate import TokenFigures, evaluate, evaluate_tokens

HELD_OUT = [STORY[:2000].encode(), "Ende gut, alles süß. 山上有一座庙\n".encode(), STORY[4000:].encode()]


def tokens_of(model: GPTModel, tokenizer: tokenizers.Tokenizer) -> TokenFigures:
    found = evaluate_tokens(model, corpora.part_of(HELD_OUT, tokenizer))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(ModelConfig(257, 16, 24, 3, 2, 0.0, init_std=0.2)).eval()


@pytest.fixture(scope="module")
def seen(model: GPTModel) -> TokenFigures:
    return tokens_of(model, tokenizers.byte_tokenizer())


def blocks() -> Blocks:
    return Blocks.of([len(document) for document in HELD_OUT])


def test_documents_come_back_from_a_part_as_they_were() -> None:
    for tokenizer in (tokenizers.byte_tokenizer(), tokenizers.gpt2()):
        part = corpora.part_of(HELD_OUT, tokenizer)
        assert corpora.documents(part, tokenizer) == HELD_OUT
        last = corpora.documents(part, tokenizer, 1000)
        assert HELD_OUT[-1].endswith(b"".join(last))
        assert 1000 - 16 < sum(map(len, last)) <= 1000  # no token of GPT-2's there is longer than 16 bytes
        assert corpora.documents(part, tokenizer, 10**6) == HELD_OUT


def test_token_by_token_is_what_evaluate_sums_up(model: GPTModel, seen: TokenFigures) -> None:
    part = corpora.part_of(HELD_OUT, tokenizers.byte_tokenizer())
    summed = evaluate(model, part)
    assert summed is not None
    assert seen.evaluation.n_bytes == summed.n_bytes == sum(map(len, HELD_OUT))
    assert seen.evaluation.nats_per_token == pytest.approx(summed.nats_per_token, rel=1e-6)  # order of float32 sums
    assert seen.nats.mean(dtype=np.float64) == pytest.approx(summed.nats_per_token, rel=1e-6)
    assert seen.bytes_before.tolist() == list(range(summed.n_bytes))  # a byte a token


def test_ranks_and_nats_are_those_of_the_logits(model: GPTModel, seen: TokenFigures) -> None:
    first = torch.tensor([[256, *HELD_OUT[0][:9]]])  # <|endoftext|> and the begin of a document: one window sees it all
    logits = torch.log_softmax(model(first)[0], dim=-1)
    for i, byte in enumerate(HELD_OUT[0][:10]):
        assert seen.nats[i] == pytest.approx(-logits[i, byte].item(), rel=1e-5)  # float32
        assert seen.ranks[i] == 1 + int((logits[i] > logits[i, byte]).sum())


def test_who_knows_nothing_is_right_where_the_first_of_all_words_is(model: GPTModel) -> None:
    undecided, tokenizer = copy.deepcopy(model), tokenizers.byte_tokenizer()
    torch.nn.init.zeros_(undecided.out_head.weight)  # all logits are equal, and argmax is 0
    wanted = [byte + 1 for byte in b"".join(HELD_OUT)]
    assert tokens_of(undecided, tokenizer).ranks.tolist() == wanted
    told = explain(LanguageModel(undecided, tokenizer), HELD_OUT[0].decode())
    assert [token.rank for token in told.tokens[1:]] == wanted[1 : len(HELD_OUT[0])]


def test_the_loss_by_position_is_a_mean_over_all_windows(model: GPTModel, seen: TokenFigures) -> None:
    found = scales.by_position(seen)
    assert [(p.first, p.last) for p in found] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16)]
    windows = sum(1 + max(0, math.ceil((len(text) - 16) / 8)) for text in HELD_OUT)
    assert found[0].n_tokens == windows
    ids = np.concatenate([[256], np.frombuffer(HELD_OUT[0], np.uint8)])
    assert seen.position_nats.sum() > seen.nats.sum()  # what is skipped is in it
    assert int(seen.position_tokens.sum()) > len(ids)


def test_a_model_beside_itself_is_not_to_be_told_from_itself(seen: TokenFigures) -> None:
    found = scales.scale("a", seen, [("b", seen)], [], blocks())
    (difference,) = found.differences
    assert (difference.bits_per_byte, difference.interval) == (0, Interval(0, 0))
    assert found.words == ("not to be told from b: +0.00 ± 0.00 bits per byte",)
    noise = np.random.default_rng(0).normal(0, 0.1, len(seen.nats)).astype(np.float32)
    twin = TokenFigures(
        seen.evaluation, seen.bytes_before, seen.nats + noise, seen.ranks, seen.position_nats, seen.position_tokens
    )
    around = scales.scale("a", seen, [("b", twin)], [], blocks()).differences[0].interval
    assert around is not None
    assert around.low < 0 < around.high


def test_a_real_difference_is_told_although_the_blocks_differ_more(seen: TokenFigures) -> None:
    worse = dataclasses.replace(seen, nats=seen.nats * np.float32(1.05))
    nats = (byte_nats(seen), byte_nats(worse))
    own, other = (interval(blocks().sums(each), blocks().n_bytes) for each in nats)
    between = interval(blocks().sums(nats[1] - nats[0]), blocks().n_bytes)
    assert own is not None
    assert other is not None
    assert between is not None
    assert between.low > 0
    assert between.half < own.half / 2  # pairing takes out what makes a block hard for both


def test_models_with_other_tokenizers_are_compared_on_the_same_bytes(seen: TokenFigures) -> None:
    tokenizer = tokenizers.gpt2()
    uniform = GPTModel(ModelConfig(tokenizer.vocab_size, 16, 8, 2, 1, 0.0))
    torch.nn.init.zeros_(uniform.out_head.weight)
    found = tokens_of(uniform.eval(), tokenizer)
    assert found.evaluation.n_bytes == seen.evaluation.n_bytes
    per_byte = byte_nats(found)
    assert np.count_nonzero(per_byte) == found.evaluation.n_tokens
    assert per_byte[per_byte > 0] == pytest.approx(math.log(50257), rel=1e-5)  # float32
    assert blocks().sums(per_byte).sum() == pytest.approx(found.evaluation.nats_per_token * found.evaluation.n_tokens)


def test_uniform_is_8_bits_and_every_mark_is_on_the_axis_in_order(seen: TokenFigures) -> None:
    given = Given(len(STORY), lambda most: [STORY.encode()[-most:]])
    rows = list(baselines(HELD_OUT, given, blocks().starts))
    found = scales.scale("model", seen, [], rows, blocks()).as_dict()
    bits = [mark["bits_per_byte"] for mark in found["scale"]]
    assert bits == sorted(bits)
    uniform = next(mark for mark in found["scale"] if mark["name"] == "uniform")
    assert (uniform["bits_per_byte"], uniform["low"], uniform["high"]) == (8.0, 8.0, 8.0)
    names = {mark["name"] for mark in found["scale"]}
    assert {"model", "xz alone", "bzip2 alone", "xz given the training text", "n-gram of the training text"} <= names
    assert len(found["differences"]) == len(found["scale"]) - 1
    told = [row for row in rows if row.block_nats is not None]
    assert {"uniform", "n-gram of the training text"} <= {row.name for row in told}
    for row in told:  # what the blocks cost is what the whole costs
        assert len(row.block_nats) == len(blocks().starts)  # type: ignore[arg-type]
        whole_bits = row.block_nats.sum() / math.log(2)  # type: ignore[union-attr]
        assert whole_bits / len(b"".join(HELD_OUT)) == pytest.approx(row.bits_per_byte)
    alone, after = (row.bits_per_byte for row in rows if row.name.startswith("xz"))
    assert after < alone / 4  # nearly all of it was there already
    assert {row.name for row in baselines(HELD_OUT, None, blocks().starts)} & names == {
        row.name for row in rows if "training" not in row.name
    }


@pytest.mark.parametrize(("program", "size"), [("xz -9e", base.xz_bytes), ("bzip2 -9", base.bzip2_bytes)])
def test_sizes_are_those_of_the_programs(program: str, size: object) -> None:
    if not shutil.which(program.split()[0]):
        pytest.skip(f"NOT RUN: {program} is not installed")
    text = Path(tokenizers.__file__).read_bytes() * 3
    made = subprocess.run([*program.split(), "-c"], input=text, capture_output=True, check=True).stdout
    assert size(text) == len(made)  # type: ignore[operator]


def test_ppmd_is_left_out_where_its_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec("pyppmd") is not None
    names = [row.name for row in baselines(HELD_OUT, None, blocks().starts)]
    assert ("PPMd alone" in names) == there
    if there:
        sizes = base.ppmd_bytes(b"".join(HELD_OUT), b"", blocks().starts)
        whole = base.ppmd_bytes(b"".join(HELD_OUT), b"", np.array([0]))
        assert sizes is not None
        assert whole is not None
        assert sizes.sum() == whole.sum()


@pytest.mark.parametrize(
    ("lengths", "starts", "caveat"),
    [
        ([100], [0], scales.TOO_SHORT),  # too short for blocks
        ([30000], [1000 * i for i in range(30)], scales.ONE_STRETCH),  # one document is cut
        ([2560], [256 * i for i in range(10)], scales.ONE_STRETCH),  # but not into crumbs
        ([500] * 60, [1000 * i for i in range(30)], None),  # whole documents go together
        ([2000] * 15, [2000 * i for i in range(15)], None),  # and are not cut
    ],
)
def test_blocks_are_few_and_long_and_keep_documents_whole(lengths: list[int], starts: list[int], caveat: str | None) -> None:
    found = Blocks.of(lengths)
    assert found.starts.tolist() == starts
    assert found.n_bytes.sum() == sum(lengths)
    assert found.caveat == caveat


@pytest.mark.parametrize(("n_bytes", "known"), [(1, set[str]()), (5000, {"xz"}), (20_000, {"xz", "bzip2"})])
def test_a_compressor_that_is_given_the_rest_is_left_out_where_its_size_tells_nothing(n_bytes: int, known: set[str]) -> None:
    rest, text = (STORY * 40).encode(), (STORY * 40)[::-1].encode()[:n_bytes]
    found = list(baselines([text], Given(len(rest), lambda _: [rest]), np.array([0])))
    assert {one.name.split()[0] for one in found if "given" in one.name and "PPMd" not in one.name} == known
    assert all(one.bits_per_byte > 0 for one in found)


def test_blocks_of_any_documents_cover_the_text_once() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths = (random.pareto(1.0, random.integers(1, 200)) * 300 + 1).astype(int).tolist()
        found = Blocks.of(lengths)
        assert found.starts[0] == 0
        assert found.n_bytes.sum() == sum(lengths)
        assert len(found.starts) <= 31
        assert len(found.starts) == 1 or found.n_bytes.min() >= scales.SHORTEST_BLOCK / 2


@pytest.mark.parametrize("n_blocks", [5, 7, 12, 30])
def test_the_interval_covers_the_truth_in_about_95_of_100_cases(n_blocks: int) -> None:
    """Blocks of skewed cost, as texts have; with the normal distribution's quantile 5 cover 86 %."""
    random, hits = np.random.default_rng(1), 0
    for _ in range(400):
        found = interval(random.gamma(4, 1, n_blocks) * 1000 * math.log(2), np.full(n_blocks, 1000))
        assert found is not None
        hits += found.low <= 4 <= found.high
    assert (
        0.915 <= hits / 400 <= 0.98
    )  # three standard errors of 400 draws on either side, and skewness, which costs half a %


def test_equal_blocks_and_one_that_differs_have_an_interval_about_as_wide_as_what_they_cost() -> None:
    """A bootstrap that divides by the error of each resample made it dozens of bits wide."""
    cost = np.array([4.0, 4.01, 4.0, 3.99, 4.0, 4.0, 6.0])
    found = interval(cost * 300 * math.log(2), np.full(7, 300))
    assert found is not None
    assert 1 < found.high - found.low < 2


@pytest.mark.parametrize(("degrees", "tables"), [(4, 2.7764), (6, 2.4469), (9, 2.2622), (14, 2.1448), (29, 2.0452)])
def test_students_quantile_is_that_of_the_tables(degrees: int, tables: float) -> None:
    assert scales.students_quantile(degrees) == pytest.approx(tables, rel=0.003)  # what is left out of its series


def test_the_interval_is_the_same_each_time_and_follows_the_unit() -> None:
    nats, n_bytes = np.random.default_rng(0).gamma(4, 1, 12), np.arange(100, 112)
    one, same, double = (interval(x, n_bytes) for x in (nats, nats.copy(), 2 * nats))
    assert one == same
    assert one is not None
    assert double is not None
    assert double.low == pytest.approx(2 * one.low)
    assert interval(nats[:4], n_bytes[:4]) is None  # too few to speak
    alike = interval(np.full(9, 5.0), np.full(9, 10))
    assert alike is not None
    assert (alike.low, alike.high) == (pytest.approx(0.5 / math.log(2)),) * 2


def test_words_follow_from_the_differences() -> None:
    said = scales.words(
        [
            ScaleEntry("gpt2", "other", -0.3, Interval(-0.35, -0.25)),
            ScaleEntry("uniform", "uniform", 6.0, Interval(5.9, 6.1)),
            ScaleEntry("xz alone", "compressor", 1.0, None),
            ScaleEntry("bzip2 alone", "compressor", 0.8, None),
            ScaleEntry("n-gram of the training text", "n-gram", 0.21, Interval(0.19, 0.23)),
        ]
    )
    assert said == [
        "better than an n-gram of the training text, by 0.21 ± 0.02 bits per byte",
        "better than bzip2 alone, by 0.80 bits per byte",
        "worse than gpt2, by 0.30 ± 0.05 bits per byte; for such a text that one is the better",
    ]
    (doubt,) = scales.words([ScaleEntry("b", "other", 0.01, Interval(-0.02, 0.04))])
    assert doubt == "not to be told from b: +0.01 ± 0.03 bits per byte"


def test_a_baseline_without_costs_by_byte_has_no_interval(seen: TokenFigures) -> None:
    found = scales.scale("a", seen, [], [Baseline("xz alone", "compressor", 2.0)], blocks())
    mark = next(mark for mark in found.marks if mark.kind == "compressor")
    assert mark.interval is None
    assert mark.as_dict()["low"] is None


def test_eval_shows_the_scale_and_keeps_its_keys(command: Command, a_run: Path) -> None:
    found = command("eval", a_run, "--json", "--against", a_run, "run/checkpoints/step-00000002").json
    old = api.evaluate(a_run).as_dict()
    assert {key: found[key] for key in old} == pytest.approx(old, rel=1e-6)
    assert {"interval", "accuracy", "by_position", "scale", "differences", "words"} <= set(found)
    assert 0 <= found["accuracy"]["top1"] <= found["accuracy"]["top5"] <= 1
    assert [d["bits_per_byte"] for d in found["differences"] if d["name"] == str(a_run)] == [0]
    assert "n-gram of the training text" in {mark["name"] for mark in found["scale"]}
    plain = command("eval", a_run)
    assert all(line in plain.out for line in command("eval", a_run, "--json").json["words"])
    assert "uniform" in plain.out
    assert scales.TOO_SHORT in plain.out  # 339 bytes
    few = command("eval", a_run, "--no-baselines", "--json").json
    assert [mark["kind"] for mark in few["scale"]] == ["model"]


def test_without_its_training_text_a_model_is_judged_and_the_gap_is_named(
    command: Command, a_run: Path, cache: Path
) -> None:
    shutil.rmtree(cache)
    Path("text.txt").rename("moved.txt")
    ended = command("eval", a_run, "moved.txt")
    assert ended.code == 0
    assert "given" not in ended.out
    assert "n-gram" not in ended.out
    assert "not here" in ended.err


def test_a_text_that_it_learnt_from_is_told_to_be_that(command: Command, a_run: Path, text: Path, cache: Path) -> None:
    write(Path("other.txt"), "other words\n" * 9)
    assert "the very text that it learnt from" in command("eval", a_run, text).err
    write(Path("part.txt"), "A new beginning, and then: " + text.read_text()[200:1200])
    assert re.search(
        r"\b[89]\d% of this text, word for word, is what \S+ learnt from", command("eval", a_run, "part.txt").err
    )
    write(Path("half.txt"), text.read_text()[:250] + "".join(f"{n * n * n} is new. " for n in range(20)))
    assert re.search(r"about [3-6]\d% of this text", command("eval", a_run, "half.txt").err)  # not of its first tokens alone
    assert "learnt from" not in command("eval", a_run, "other.txt").err  # the negative control
    shutil.rmtree(cache)
    assert "learnt from" not in command("eval", a_run, "other.txt").err  # it is prepared again
    write(a_run / "corpus.json", "{")
    assert command("eval", a_run, "other.txt").code == 0
    text.unlink()
    shutil.rmtree(cache)
    assert "nothing on the scale is given it" in command("eval", a_run, "other.txt").err


def test_that_lines_of_a_text_of_short_documents_are_what_it_learnt_is_told(command: Command, here: Path) -> None:
    lines = [json.dumps({"text": f"question {n}: why is {n * n} so large?"}) for n in range(400)]
    write(Path("lines.jsonl"), "\n".join(lines))
    write(Path("some.jsonl"), "\n".join(lines[::2]))
    write(Path("others.jsonl"), "\n".join(lines).replace("large", "small"))
    assert command("train", "lines.jsonl", "--out", "run", *TINY_FLAGS).code == 0
    told = command("eval", "run", "some.jsonl", "--no-baselines").err
    assert re.search(r"\b(8\d|9\d|100)% of this text, word for word, is what run learnt from", told)
    assert "learnt from" not in command("eval", "run", "others.jsonl", "--no-baselines").err  # the negative control


def test_what_a_model_learnt_before_it_went_on_with_another_text_is_told_of(
    command: Command, a_run: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Path("other.txt"), "".join(f"{n * n * n} is another line. " for n in range(200)))
    write(Path("part.txt"), text.read_text()[100:1500])
    went_on = ("train", "other.txt", "--from", a_run, "--steps", "2")
    assert "learnt from" not in command(*went_on, "--out", "second").err  # the negative control
    said = r"\b(9\d|100)% of {}, word for word, is what \S*{} learnt from"
    assert re.search(said.format("this text", "second"), command("eval", "second", "part.txt", "--no-baselines").err)
    told = command(*went_on, "--val", "part.txt", "--out", "third").err
    assert re.search(said.format("the held-out text", a_run.name), told)
    monkeypatch.setattr(memorisation, "memorisation_s", lambda _: 9.0)  # as of a text that is long, beside such a budget
    short = ("train", "other.txt", "--from", a_run, "--for", "3s", "--val", "part.txt", "--out", "fourth")
    assert "learnt from" not in command(*short).err


def test_a_damaged_journal_costs_no_figure(command: Command, a_run: Path) -> None:
    (a_run / "metrics.jsonl").write_text("{}\n{\n{}\n")
    ended = command("eval", a_run, "--json")
    assert ended.json["memorisation"]["gap"] is None
    assert "metrics.jsonl" in ended.err


def test_a_model_to_compare_with_that_is_not_there_is_refused(refused: Refused, a_run: Path) -> None:
    assert refused(66, "eval", a_run, "--against", "no-such-run")["where"] == "no-such-run"


def test_a_model_that_learnt_the_text_which_both_are_held_against_is_told_of(
    command: Command, a_run: Path, text: Path
) -> None:
    assert command("train", text, "--out", "all", *TINY_FLAGS, "--val-fraction", "0").code == 0
    assert command("train", text, "--out", "alike", *TINY_FLAGS, "--seed", "9").code == 0
    ended = command("eval", a_run, "--against", "all", "--no-baselines")
    assert re.search(r"\b(9\d|100)% of this text, word for word, is what all learnt from", ended.err)
    assert "learnt from" not in command("eval", a_run, "--against", "alike", "--no-baselines").err  # the negative control
