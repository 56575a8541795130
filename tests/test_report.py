"""The report says what the journal and `explain` say, whatever they say, and what it shows can do no harm."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command import TINY_FLAGS, Command, Refused, error_of, write
from conftest import OTHER, STORY, TINY, journal
from firstwords import api
from firstwords.events import Notice, Told, Trained
from firstwords.insight import report, surprise
from firstwords.insight.explain import Explanation, Guess, TokenExplained
from firstwords.insight.record import MOST_POINTS, read
from firstwords.insight.report import _plotly, explained
from firstwords.runs.folder import RunFolder
from firstwords.runs.journal import Journal
from firstwords.text.corpus import Part
from firstwords.text.tokenizer import byte_tokenizer
from firstwords.training import evaluate
from firstwords.training.evaluate import Evaluation

HOSTILE = "</script><script>alert(1)</script><img src=http://evil.example onerror=alert(1)>\u2028--><!-- &amp; ]]> ${x} "
MEMORISATION = {
    "step": 4,
    "longest_copy": f"what it copied {HOSTILE}",
    "longest_copy_chars": 120,
    "place": {"document": 0, "character": 6},
    "copied_share": 0.87,
    "novel_8grams": 0.1,
    "held_out_novel_8grams": 0.9,
    "gap": 0.5,
    "repeated": 0.2,
    "held_out_repeated": 0.1,
    "distinct": 0.4,
    "held_out_distinct": 0.6,
}


class Page(HTMLParser):
    """A page as a browser takes it apart: elements with their attributes, and what stands in scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.data: dict[str, Any] = json.loads(self.scripts[0]) if self.scripts else {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.elements}

    @property
    def fetched(self) -> list[str]:
        """The addresses that a browser would ask for."""
        names = ("src", "href", "action", "data", "srcset", "poster", "background")
        return [value or "" for _, attributes in self.elements for name, value in attributes.items() if name in names]


def page(path: Path) -> Page:
    """The page, with another script in place of plotly.js, whose five million characters take a second to read."""
    return Page(path.read_text(encoding="utf-8").replace(_plotly(), "plotly.js"))


def trained(folder: Path, text: str = STORY, **options: Any) -> Path:
    write(folder / "text.txt", text)
    options = {**TINY, "report": True, "steps": 4, "eval_every": 2, **options}
    out = options.pop("out", folder / "run")
    return Path(api.train(folder / "text.txt", out=out, **options).run)


def test_a_page_fetches_nothing_and_lets_only_its_own_scripts_run(tmp_path: Path) -> None:
    found = Page((trained(tmp_path) / "report.html").read_text(encoding="utf-8"))
    assert found.fetched == ["data:,"]
    assert Page('<img src="http://a.example">').fetched == ["http://a.example"]  # the negative control
    (policy,) = (str(a["content"]) for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert not {"connect-src", "font-src", "frame-src", "media-src", "object-src", "worker-src"} & set(rules)
    digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in found.scripts[1:]]
    assert rules["script-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert "http" not in policy
    style = (tmp_path / "run/report.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_it_is_small_enough_to_be_sent(tmp_path: Path) -> None:
    assert (trained(tmp_path) / "report.html").stat().st_size < 6e6


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    text = "".join(f"{HOSTILE}{n}\n" for n in range(40))
    run = trained(tmp_path, text, out=tmp_path / "<b>run & co", sample_prompt=HOSTILE)
    Journal(run / "samples.jsonl").add("sample", {"step": 4, "text": HOSTILE})
    Journal(run / "metrics.jsonl").add("memorisation", MEMORISATION)
    scale = {"scale": [{"name": HOSTILE, "bits_per_byte": 2.0, "low": 1.9, "high": 2.1}], "words": [HOSTILE]}
    api.report(run, scale=scale, predicted={"steps": HOSTILE})
    found = page(run / "report.html")
    assert len(found.scripts) == 3  # the data, plotly.js, and ours
    assert found.scripts[1] == "plotly.js"
    assert {tag for tag, _ in found.elements} & {"img", "iframe", "object", "embed", "form", "base", "b"} == {"b"}
    assert len([tag for tag, _ in found.elements if tag == "b"]) == 2  # the large figure's, and the interval's on the scale
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert found.fetched == ["data:,"]
    assert found.text.count(HOSTILE.strip()) >= 4  # prompt, sample, place, scale's name and words
    assert "<b>run & co" in found.text
    assert HOSTILE[:20] in "".join(token["text"] for token in found.data["explanation"]["tokens"])


def test_its_numbers_are_the_journals(tmp_path: Path) -> None:
    run = trained(tmp_path)
    (found,) = page(run / "report.html").data["runs"]
    lines = [line for line in RunFolder(run).metrics.lines() if line["event"] == "step"]
    for name in ("step", "tokens", "elapsed_s", "nats_per_token", "lr", "grad_norm", "tokens_per_s"):
        assert found["steps"][name] == [line[name] for line in lines]
    evaluations = journal(run, "evaluation")
    for name in ("step", "nats_per_token", "bits_per_byte", "train_nats_per_token"):
        assert found["evaluations"][name] == [line[name] for line in evaluations]
    tokens = {0: 0, **{line["step"]: line["tokens"] for line in lines}}
    assert found["evaluations"]["tokens"] == [tokens[line["step"]] for line in evaluations]


def test_training_bits_per_byte_are_nats_over_the_bytes_of_the_training_text(tmp_path: Path) -> None:
    (found,) = page(trained(tmp_path) / "report.html").data["runs"]
    table = found["evaluations"]
    ratio = [bits / nats for bits, nats in zip(table["train_bits_per_byte"], table["train_nats_per_token"], strict=True)]
    assert ratio == pytest.approx([1.4426950408889634] * len(ratio))  # 1 / ln 2: here a token is a byte


def test_the_map_says_what_explain_says_of_the_same_passage(command: Command, tmp_path: Path) -> None:
    run = trained(tmp_path)
    shown = page(run / "report.html")
    passage = "".join(token["text"] for token in shown.data["explanation"]["tokens"])
    assert passage in STORY[int(0.9 * len(STORY)) :]
    assert shown.data["explanation"] == command("explain", run, passage, "--json").json
    tokens = [attributes for _, attributes in shown.elements if attributes.get("class") == "token"]
    assert [attributes["data-i"] for attributes in tokens] == [str(i) for i in range(len(passage))]


def test_the_map_of_a_run_whose_best_is_not_its_last_is_the_bests(command: Command, tmp_path: Path) -> None:
    other = "".join(chr(0x4E00 + 7919 * n % 20000) for n in range(300))  # a text unlike STORY: it only gets worse
    run = trained(tmp_path, val=str(write(tmp_path / "val.txt", other)), steps=20, eval_every=2, optim={"peak_lr": 0.1})
    assert api.info(run)["best_step"] < 20
    explanation = page(run / "report.html").data["explanation"]
    passage = b"".join(bytes([token["id"]]) for token in explanation["tokens"]).decode()
    assert explanation == command("explain", run, passage, "--json").json


def test_a_logit_is_the_models_own(tmp_path: Path) -> None:
    lm, ids = api.load(trained(tmp_path)), list(STORY[:20].encode())
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids]))[0]
    said = api.explain(tmp_path / "run", STORY[:20]).tokens
    assert [token.logit for token in said[1:]] == [float(logits[i, token]) for i, token in enumerate(ids[1:])]
    normalisers = [token.logit - token.log_probability for token in said[1:]]
    assert normalisers == pytest.approx(torch.logsumexp(logits[:-1], -1).tolist(), abs=1e-5)  # float32's rounding


def test_a_run_without_held_out_text_is_reported_without_a_map(tmp_path: Path) -> None:
    found = page(trained(tmp_path, val_fraction=0.0) / "report.html")
    assert found.data["explanation"] is None
    assert [line["column"] for line in found.data["charts"][0]["lines"]] == ["nats_per_token", "train_nats_per_token"]
    assert "nothing to map" in found.text


def test_the_map_is_of_a_document_that_is_long_enough_or_of_the_longest() -> None:
    tokenizer = byte_tokenizer()
    end, long = tokenizer.end_of_text, b"So it goes on. " * 60

    def of(*documents: bytes) -> str | None:
        ids = np.array([token for document in documents for token in (end, *document)])
        return surprise.passage(Part(ids, np.ones(257, dtype=np.int64), len(documents)), tokenizer)

    assert of(b"ok", b" yes.", long, long[::-1]) == of(long)
    assert of(b"no", b"A short one.", b"ok") == "short one."
    assert of(b"", b"") is None


def test_a_run_of_one_step_is_reported(tmp_path: Path) -> None:
    (found,) = page(trained(tmp_path, steps=1) / "report.html").data["runs"]
    assert found["steps"]["step"] == [1]
    assert found["evaluations"]["step"] == [0, 1]


def test_a_resumed_run_is_reported_whole(tmp_path: Path) -> None:
    run = trained(tmp_path, steps=2)
    api.train(out=run, resume=True, steps=5)
    (found,) = page(run / "report.html").data["runs"]
    assert found["steps"]["step"] == [1, 2, 3, 4, 5]


def test_a_report_that_cannot_be_written_costs_no_run(tmp_path: Path) -> None:
    told: list[Told] = []

    def hinder(event: Told) -> None:
        told.append(event)
        write(tmp_path / "run/report.html/taken", "a folder where the report should be")

    run = trained(tmp_path, listener=hinder)
    (notice,) = [event.text for event in told if isinstance(event, Notice)]
    assert notice.startswith("the report could not be written")
    assert f"firstwords report {run}" in notice
    assert journal(run, "stop")[-1]["reason"] == "done"


@pytest.mark.parametrize(("steps", "is_last"), [(30, False), (1, True)])
def test_whoever_listens_is_given_the_best_model_at_the_end(tmp_path: Path, steps: int, is_last: bool) -> None:
    told: list[Told] = []
    other = write(tmp_path / "other.txt", OTHER)
    run = trained(tmp_path, listener=told.append, steps=steps, val=str(other), optim={"peak_lr": 0.1})
    (lm,) = [event.lm for event in told if isinstance(event, Trained)]
    kept = api.load(run)
    assert (lm.step, lm.dtype) == (kept.step, kept.dtype)
    assert (lm.step == journal(run, "stop")[-1]["step"]) is is_last
    for name, weight in kept.model.named_parameters():
        assert torch.equal(lm.model.get_parameter(name), weight)


def test_no_report_is_written_where_none_is_wanted(tmp_path: Path) -> None:
    assert not (trained(tmp_path, report=False) / "report.html").exists()


def test_the_sections_that_a_run_has_nothing_for_are_left_out(tmp_path: Path) -> None:
    run = trained(tmp_path, val_fraction=0.0, meter=False)
    optional = {"scale", "memorisation"}
    assert page(run / "report.html").ids & optional == set()
    Journal(run / "metrics.jsonl").add("memorisation", MEMORISATION)
    rows = [{"name": "uniform", "bits_per_byte": 8.0, "low": None, "high": None}]
    scale = {"scale": rows, "words": ["better than chance"], "caveat": "of a few stretches"}
    api.report(run, scale=scale, predicted={"bits_per_byte": [2, 2.5, 3], "memory_bytes": 10**9})
    found = page(run / "report.html")
    assert found.ids >= optional | {"plan"}
    assert found.data["runs"][0]["memorisation"]["copied_share"] == [0.87]
    assert "document 1, character 7" in found.text
    assert str(MEMORISATION["longest_copy"]).strip() in found.text
    assert "better than chance" in found.text
    assert "of a few stretches" in found.text
    measured = [line for line in RunFolder(run).metrics.lines() if line["event"] == "evaluation"]  # `journal` leaves it out
    assert f"{measured[-1]['memory_bytes']:,} bytes" in found.text, "beside what was planned"
    assert "2.5 (2 to 3)" in found.text


@pytest.mark.parametrize("eval_tokens", [64, None])
def test_a_scale_of_more_than_the_run_judged_itself_by_says_so(eval_tokens: int | None, tmp_path: Path) -> None:
    run = trained(tmp_path, eval_tokens=eval_tokens)
    api.report(run)
    judged, there = journal(run, "evaluation")[-1]["n_tokens"], api.scale(run, with_baselines=False).evaluation.n_tokens
    said = f"Of all {there:,} held-out tokens; the figure at the top is of the {judged:,} by which"
    assert (said in page(run / "report.html").text) == (judged < there) == (eval_tokens is not None)


def test_the_plan_of_a_time_budget_stands_beside_what_came(tmp_path: Path) -> None:
    run = trained(tmp_path, steps=None, for_s=2, eval_every=None)
    found = page(run / "report.html")
    assert "plan" in found.ids
    assert f"{journal(run, 'plan')[-1]['total_steps']:,}" in found.text


def test_what_was_expected_of_a_shorter_run_is_not_held_against_a_longer_one(tmp_path: Path) -> None:
    run = trained(tmp_path)
    api.report(run)
    assert "plan" in page(run / "report.html").ids
    api.train(out=run, resume=True, steps=2 * api.info(run)["steps"])
    api.report(run)
    assert "plan" not in page(run / "report.html").ids


def test_a_long_run_is_shown_by_means(tmp_path: Path) -> None:
    run = trained(tmp_path)
    n = 2 * MOST_POINTS + 1
    lines = [{"event": "step", "step": i, "tokens": i, "nats_per_token": float(i), "elapsed_s": i} for i in range(1, n + 1)]
    write(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    found = read(RunFolder(run), None)
    assert found.every == 3
    assert found.steps["step"][:2] == [3, 6]
    assert found.steps["nats_per_token"][:2] == [2.0, 5.0]
    assert found.steps["step"][-1] == n


def test_the_record_of_a_long_run_takes_little_memory(tmp_path: Path) -> None:
    run, n = trained(tmp_path), 8_000
    line = {"event": "step", "nats_per_token": 1.5, "lr": 1e-3, "grad_norm": 2.5, "tokens_per_s": 1e4, "took_s": 0.1}
    lines = [json.dumps({**line, "step": i, "tokens": i * 2048, "elapsed_s": i / 10}) + "\n" for i in range(n)]
    write(run / "metrics.jsonl", "".join(lines))
    tracemalloc.start()
    found = read(RunFolder(run), None)
    peak = tracemalloc.get_traced_memory()[1]
    kept = list(RunFolder(run).metrics.lines())  # the negative control: what they take as lines
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept) == n
    assert found.steps["step"][-1] == n - 1
    assert peak < n * 100 + (1 << 20)  # seven numbers of eight bytes, with room to grow; and what is shown
    assert whole > n * 500


def test_a_journal_of_strange_values_is_shown_without_them(command: Command, tmp_path: Path) -> None:
    run = trained(tmp_path)
    strange = {
        "step": HOSTILE,
        "tokens": [],
        "nats_per_token": {},
        "lr": True,
        "bits_per_byte": "2",
        "text": 3,
        "best": True,
    }
    for event in ("step", "evaluation", "memorisation", "plan", "stop"):
        Journal(run / "metrics.jsonl").add(event, strange)
    Journal(run / "samples.jsonl").add("sample", strange)
    assert command("report", run).code == 0
    (found,) = page(run / "report.html").data["runs"]
    assert found["steps"]["lr"][-1] is None


def test_two_runs_stand_beside_each_other(command: Command, tmp_path: Path) -> None:
    runs = [trained(tmp_path, out=tmp_path / name, seed=seed) for name, seed in (("one", 1), ("two", 2))]
    done = command("report", *runs, "--json")
    assert Path(done.json["report"]) == Path("comparison.html")
    found = page(Path("comparison.html"))
    assert [run["name"] for run in found.data["runs"]] == ["one", "two"]
    for chart in found.data["charts"]:
        assert {line["run"] for line in chart["lines"]} == {0, 1}
    assert found.ids & {"map", "samples"} == set()
    assert "seed" in found.text
    assert "not judged on the same text" not in found.text  # the negative control of the next


def test_runs_on_different_texts_are_told_not_to_compare(command: Command, tmp_path: Path) -> None:
    runs = [trained(tmp_path, out=tmp_path / "one"), trained(tmp_path, out=tmp_path / "two", val_fraction=0.2)]
    assert command("report", *runs).code == 0
    assert "not judged on the same text" in page(Path("comparison.html")).text


def test_runs_on_different_texts_compare_where_their_held_out_text_is_the_same(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "val.txt", OTHER)
    texts, val = (STORY, f"{STORY}And so on."), str(tmp_path / "val.txt")
    runs = [trained(tmp_path, text, out=tmp_path / name, val=val) for name, text in zip(("one", "two"), texts, strict=True)]
    assert command("report", *runs).code == 0
    assert "not judged on the same text" not in page(Path("comparison.html")).text


def test_runs_that_judged_themselves_by_more_or_less_of_a_text_are_told_what_compares_them(
    command: Command, tmp_path: Path
) -> None:
    runs = [trained(tmp_path, out=tmp_path / name, eval_tokens=n) for name, n in (("one", None), ("two", 64))]
    assert command("report", *runs).code == 0
    assert "by more and by less of the held-out text" in page(Path("comparison.html")).text
    assert command("report", runs[0], runs[0], "--out", "same.html").code == 0  # the negative control
    assert "by less" not in page(Path("same.html")).text


def test_runs_with_one_tokenizer_have_the_same_tokens_wherever_its_file_lies(command: Command, tmp_path: Path) -> None:
    first = trained(tmp_path, out=tmp_path / "first", tokenizer="bpe:300")
    own = str(next((first / "checkpoints").iterdir()) / "tokenizer.json")
    runs = [trained(tmp_path, out=tmp_path / name, seed=seed, tokenizer=own) for name, seed in (("one", 1), ("two", 2))]
    assert command("report", *runs).code == 0
    found = page(Path("comparison.html")).text
    assert "tokens are not the same" not in found
    assert "tokenizer.json" not in found
    runs[1] = trained(tmp_path, out=tmp_path / "bytes")  # the negative control
    assert command("report", *runs).code == 0
    assert "tokens are not the same" in page(Path("comparison.html")).text
    for run in runs:  # and where no checkpoint tells, the configurations do
        shutil.rmtree(run / "checkpoints")
    assert command("report", *runs).code == 0
    assert "tokens are not the same" in page(Path("comparison.html")).text


def test_runs_of_one_name_are_told_apart_by_their_folders(command: Command, tmp_path: Path) -> None:
    runs = [trained(tmp_path, out=tmp_path / folder / "run", seed=seed) for folder, seed in (("one", 1), ("two", 2))]
    assert command("report", *runs).code == 0
    assert [run["name"] for run in page(Path("comparison.html")).data["runs"]] == list(map(str, runs))


def test_the_steps_that_were_planned_stand_beside_those_that_came(tmp_path: Path) -> None:
    run = trained(tmp_path)
    steps = str(len(journal(run, "step")))
    cells = re.search(r"<td>steps</td><td>([^<]*)</td><td>([^<]*)</td>", (run / "report.html").read_text())
    assert cells is not None
    assert cells.groups() == (steps, steps)


def test_a_run_that_is_not_there_is_told(refused: Refused, here: Path) -> None:
    assert refused(66, "report", "no-such-run")["where"] == "no-such-run"


def test_a_file_that_is_no_report_is_never_replaced(refused: Refused, command: Command, a_run: Path) -> None:
    write(Path("precious.txt"), "precious")
    assert refused(73, "report", a_run, "--out", "precious.txt")["where"] == "precious.txt"
    assert refused(73, "explain", a_run, "a text", "--html", "precious.txt")["where"] == "precious.txt"
    write(Path("comparison.html"), "precious")
    assert refused(73, "report", a_run, a_run)["where"] == "comparison.html"
    assert {Path(name).read_text() for name in ("precious.txt", "comparison.html")} == {"precious"}
    for _ in range(2):  # one of ours is
        assert command("report", a_run, "--out", "new/page.html").code == 0
        assert command("explain", a_run, "a text", "--html", "new/text.html").code == 0


def test_a_report_without_the_prepared_text_reads_the_text_again(command: Command, a_run: Path, cache: Path) -> None:
    assert command("report", a_run).code == 0
    whole = page(a_run / "report.html").data["explanation"]
    shutil.rmtree(cache)
    assert command("report", a_run).code == 0
    assert page(a_run / "report.html").data["explanation"] == whole
    shutil.rmtree(cache)
    Path("text.txt").unlink()
    done = command("report", a_run)
    assert done.code == 0
    assert "text.txt" in done.err
    assert page(a_run / "report.html").data["explanation"] is None


def test_a_run_that_has_no_checkpoint_yet_is_reported_without_a_map(command: Command, a_run: Path) -> None:
    shutil.rmtree(a_run / "checkpoints")
    done = command("report", a_run)
    assert done.code == 0
    assert "no checkpoint" in done.err


def test_a_page_of_one_text_holds_what_explain_says(command: Command, a_run: Path) -> None:
    said = command("explain", a_run, HOSTILE, "--html", "page.html", "--json").json
    found = page(Path("page.html"))
    assert found.data["explanation"] == said
    assert len(found.scripts) == 2  # the data and ours: without charts there is no plotly.js
    assert Path("page.html").stat().st_size < 1e6


def test_a_letter_of_several_tokens_is_shown_whole_with_the_last_of_them(command: Command, a_run: Path) -> None:
    text = "süß: 字, €"
    found = command("explain", a_run, text, "--html", "page.html", "--json").json
    assert "".join(token["completes"] for token in found["tokens"]) == text
    assert [token["text"] for token in found["tokens"]][1:3] == ["\\xc3", "\\xbc"]
    shown = page(Path("page.html")).text
    assert "\ufffd" not in shown
    assert "s·ü·ß:" in "".join(shown.split())
    assert "··字" in "".join(shown.split())


def test_a_token_and_a_name_may_be_anything() -> None:
    hostile = TokenExplained(1, HOSTILE, HOSTILE, 0.5, -0.7, 0.0, 1, (Guess(1, HOSTILE, 0.5),))
    tokens = (TokenExplained(0, HOSTILE, HOSTILE), hostile)
    explanation = Explanation(tokens, Evaluation.of(0.7, 1, 9))
    found = Page(b"".join(explained(explanation, f"<!--<script>{HOSTILE}")).decode())
    assert "<" not in found.scripts[0]
    assert len(found.scripts) == 2
    assert "img" not in {tag for tag, _ in found.elements}
    assert found.text.count(HOSTILE) == 4  # both tokens, and the name as title and heading
    assert found.data["explanation"] == json.loads(json.dumps(explanation.as_dict()))


def test_pictures_without_matplotlib_are_refused_with_what_to_install(
    refused: Refused, a_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = refused(78, "report", a_run, "--png", "figures")
    assert "firstwords[plot]" in error["do"]


def test_pictures_are_of_one_run(refused: Refused, a_run: Path) -> None:
    assert refused(78, "report", a_run, a_run, "--pdf", "figures")["where"] == "--pdf"


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_pictures_are_drawn(command: Command, refused: Refused, a_run: Path, kind: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    done = command("report", a_run, f"--{kind}", "figures", "--json")
    names = sorted(Path("figures").iterdir())
    assert done.json["pictures"] == [str(name) for name in names]
    assert [name.name for name in names] == [f"loss-plot.{kind}", f"temperature-plot.{kind}"]
    assert all(name.read_bytes().startswith(magic) for name in names)
    assert command("report", a_run, f"--{kind}", "figures").code == 0  # one of ours is replaced
    write(names[1], "precious")
    assert refused(73, "report", a_run, f"--{kind}", "figures")["where"] == str(names[1])
    assert names[1].read_text() == "precious"


def test_the_temperature_plot_shows_the_softmax_of_the_likeliest_tokens(a_run: Path) -> None:
    pytest.importorskip("matplotlib")
    from firstwords.insight import pictures

    lm = api.load(a_run)
    (axes,) = pictures.temperature_plot(lm, "The").axes
    with torch.no_grad():
        logits = lm.model(torch.tensor([list(b"The")]))[0, -1].topk(9).values
    bars = [[bar.get_height() for bar in container] for container in axes.containers]
    wanted = [torch.softmax(logits / temperature, -1).tolist() for temperature in (1, 0.1, 5)]
    assert [height for one in bars for height in one] == pytest.approx([p for one in wanted for p in one])


def test_a_report_is_written_by_the_command_line_and_named(command: Command, here: Path) -> None:
    write(here / "text.txt", STORY)
    done = command("train", "text.txt", "--out", "run", *TINY_FLAGS, "--report=true")
    assert f"report    {Path('run/report.html')}" in done.out
    assert Path("run/report.html").exists()


def test_a_run_ends_with_its_scale_its_meter_and_what_was_expected_of_it(tmp_path: Path) -> None:
    run = trained(tmp_path)
    at_end = page(run / "report.html")
    assert at_end.ids >= {"scale", "memorisation", "plan"}
    titles = {chart["title"] for chart in at_end.data["charts"]}
    assert titles >= {"Learning rate", "Gradient norm", "Speed", "Memory", "Longest copy", "Share of samples", "Gap"}
    assert all(value > 1e8 for value in at_end.data["runs"][0]["evaluations"]["memory_bytes"])  # PyTorch alone takes more
    assert "n-gram of the training text" in at_end.text
    api.report(run)
    assert page(run / "report.html").ids == at_end.ids


@pytest.mark.parametrize(("eval_tokens", "judged"), [(None, 1), (64, 0)])
def test_the_last_weights_are_judged_once_and_have_a_scale_where_all_tokens_are_judged(
    eval_tokens: int | None, judged: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []

    def counted(*given: Any) -> evaluate.TokenFigures | None:
        calls.append(None)
        return evaluate_tokens(*given)

    evaluate_tokens = evaluate.evaluate_tokens
    monkeypatch.setattr(evaluate, "evaluate_tokens", counted)
    run = trained(tmp_path, eval_every=4, eval_tokens=eval_tokens)
    first, last = journal(run, "evaluation")
    assert last["best"]
    assert len(calls) == judged
    assert ("scale" in page(run / "report.html").ids) == bool(judged)
    assert (last["n_tokens"] <= 64) == (eval_tokens == 64)
    assert first["n_tokens"] <= last["n_tokens"]


def test_a_short_passage_is_not_cut_down_to_its_last_line() -> None:
    tokenizer = byte_tokenizer()
    asked = b"Question: " + b"what is it " * 25

    def of(document: bytes) -> str:
        ids = np.array([tokenizer.end_of_text, *document])
        return surprise.passage(Part(ids, np.ones(257, dtype=np.int64), 1), tokenizer) or ""

    for answer in (b"\nAnswer: yes", b"\n7"):
        assert of(asked + answer).endswith("what is it" + " " + answer.decode())
    assert of(b"half a line\n" + asked).startswith("Question")  # the negative control: what leaves most of it is cut


def test_the_line_ends_of_windows_break_a_line_once() -> None:
    """A browser takes a carriage return for a line break of its own."""
    assert "\r" not in report._token(1, "\r\n", 0.5)
    assert report._token(1, "\r\n", 0.5) == report._token(1, "\n", 0.5)
    assert ">␍<" in report._token(1, "\r", 0.5)  # a token by itself


def test_a_run_is_called_by_its_folder_where_it_is_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path)
    monkeypatch.chdir(run)
    api.report(".", out="again.html")
    assert f"<span>{run.name}</span>" in Path("again.html").read_text()


def test_lines_of_a_journal_that_lack_numbers_end_nothing(a_run: Path, command: Command) -> None:
    step = api.info(a_run)["best_step"]
    lines: tuple[dict[str, Any], ...] = (
        {"event": "evaluation", "step": step, "nats_per_token": 3.0},
        {"event": "start", "predicted": 5},
        {"event": "step", "step": step},
    )
    with (a_run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    for arguments in (("eval", a_run), ("report", a_run), ("export", a_run, "--to", "hf", "--out", "model")):
        assert command(*arguments).code == 0


@pytest.mark.skipif(sys.platform == "darwin", reason="NOT RUN: macOS has no such names")
def test_a_run_whose_name_is_not_utf_8_is_reported_and_else_refused(a_run: Path, command: Command) -> None:
    moved = a_run.rename(os.fsdecode(b"caf\xe9"))
    assert command("report", moved, "--out", "page.html").code == 0
    assert "caf?" in Path("page.html").read_text()
    for arguments in (("explain", moved, "some words"), ("export", moved, "--to", "hf", "--out", "model")):
        assert "not valid UTF-8" in error_of(command(*arguments, "--json"), 65)["why"]  # safetensors cannot open it
