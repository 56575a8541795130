"""What can be wrong with the place of a run, and with going on with one: nothing is lost, and nothing begun in silence."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import firstwords
from command import TEXT, TINY_FLAGS, Command, Refused, checkpoints, error_of, flip_a_byte, reseal, tree, write
from firstwords import preparing, store
from firstwords.errors import DataError
from firstwords.runs.journal import Journal
from firstwords.training.events import StepDone
from rows import row

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


# The place of the run


@row(43)
def test_a_folder_that_holds_another_run_is_left_alone(refused: Refused, a_run: Path):
    before = tree(a_run)
    error = refused(73, "train", "text.txt", "--out", a_run, *TINY_FLAGS)
    assert (error["where"], tree(a_run)) == (str(a_run), before)
    assert "--resume" in error["do"]


@row(44)
@pytest.mark.parametrize("out", ["taken", "taken/run"])
def test_a_file_where_the_run_should_be_is_left_alone(refused: Refused, text: Path, out: str):
    write(Path("taken"), "precious")
    error = refused(73, "train", text, "--out", out, *TINY_FLAGS)
    assert "taken" in error["where"]
    assert Path("taken").read_text() == "precious"


@row(44)
@pytest.mark.parametrize("place", ["runs", "runs/text"])
def test_a_file_where_the_default_run_should_be_is_left_alone(command: Command, text: Path, place: str):
    write(Path(place), "precious")
    ended = command("train", text, *TINY_FLAGS, "--json")
    if ended.code != 0:  # a free number is as good
        error_of(ended, 73)
    assert Path(place).read_text() == "precious"


def test_a_folder_with_other_files_is_left_alone(refused: Refused, text: Path):
    write(Path("photos/cat.png"), PNG)
    error = refused(73, "train", text, "--out", "photos", *TINY_FLAGS)
    assert error["where"] == "photos"
    assert tree(Path("photos")) == ["cat.png"]


@pytest.mark.parametrize("name", ["corpus.json", "tokenizer.json"])
def test_a_person_s_own_file_of_a_name_that_a_run_uses_is_not_written_over(refused: Refused, text: Path, name: str):
    write(Path("own") / name, "my own")
    assert refused(73, "train", text, "--out", "own", *TINY_FLAGS)["where"] == "own"
    assert (Path("own") / name).read_text() == "my own"


@pytest.mark.parametrize("name", ["text", "stdin"])
def test_of_two_runs_that_begin_at_once_each_has_a_folder(
    command: Command, text: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """The other took the first folder's lock after it was seen to be free."""
    answers = iter([False])
    ask = store.is_locked
    monkeypatch.setattr(store, "is_locked", lambda path: next(answers, None) is None and ask(path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.read_bytes())))  # which can be read once
    store.make_folder(Path("runs") / name)
    with store.lock(Path("runs") / name / "run.lock"):
        ended = command("train", text if name == "text" else "-", *TINY_FLAGS, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["run"] == f"runs/{name}-2"


@row(47)
@pytest.mark.parametrize("arguments", [["--resume"], ["text.txt", *TINY_FLAGS]])
def test_a_run_in_use_names_its_process_and_host(refused: Refused, a_run: Path, arguments: list[str]):
    out = a_run if "--resume" in arguments else Path("fresh").absolute()
    out.mkdir(exist_ok=True)
    hold = "import sys; from pathlib import Path; from firstwords import store\n"
    hold += "with store.lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(out / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        error = refused(73, "train", "--out", out, *arguments)
        holder.stdin.close()
        assert holder.wait() == 0
    assert error["where"] == str(out)
    assert f"pid {holder.pid} on {socket.gethostname()}" in error["why"]


@row(45)
def test_a_place_that_may_not_be_written_is_77(refused: Refused, text: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(os, "mkdir", fail)  # root, as tests often run, may write everywhere
    assert refused(77, "train", text, "--out", "run", *TINY_FLAGS)["where"] == "run"


@row(45)
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_file_system_that_takes_no_writing_is_told_before_any_work(
    refused: Refused, text: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    def fail(path: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", fail)
    monkeypatch.setattr(preparing, "prepare", None)  # the work
    error = refused(77, "train", text, "--out", "run", *TINY_FLAGS)
    assert os.strerror(code) in error["why"]


@row(46)
def test_a_disk_too_small_for_two_checkpoints_is_told_with_both_sizes(
    command: Command, text: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    error = error_of(command("train", text, "--out", "run", *TINY_FLAGS, "--model.ff-dim=65536", "--json"), 74)
    assert error["what"] == "the disk has 0.00 GB free, two checkpoints need 0.15 GB"
    assert error["where"] == "run"
    assert "--out" in error["do"]


# Going on with a run


def test_resume_needs_a_name(refused: Refused):
    assert "--out" in refused(78, "train", "--resume")["do"]


@row(62)
@pytest.mark.parametrize("is_folder", [False, True])
def test_resume_without_a_run_begins_none(refused: Refused, tmp_path: Path, is_folder: bool):
    if is_folder:
        Path("run").mkdir()
    before = tree(tmp_path)
    assert refused(66, "train", "--resume", "--out", "run")["where"] == "run"
    assert tree(tmp_path) == before


@row(51, 64)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--model.emb-dim", "64"),
        ("--seed", "7"),
        ("--tokenizer", "gpt2"),
        ("--batch-size", "8"),
        ("--batch-size", "2"),
        ("--optim.peak-lr", "1"),
    ],
)
def test_resume_refuses_what_the_run_recorded_otherwise(refused: Refused, a_run: Path, name: str, value: str):
    assert refused(78, "train", "--resume", "--out", a_run, name, value)["where"] == name


@row(58)
@pytest.mark.parametrize("length", ["16", "64"])
def test_resume_with_another_context_is_refused(refused: Refused, a_run: Path, length: str):
    error = refused(78, "train", "--resume", "--out", a_run, f"--model.context-length={length}")
    assert error["where"] == "--model.context-length"
    assert "--out" in error["do"]


def test_resume_accepts_what_the_run_recorded(command: Command, a_run: Path):
    assert command("train", "--resume", "--out", a_run, *TINY_FLAGS).code == 0


@pytest.mark.parametrize("shown", [Path, Path.absolute])
def test_resume_accepts_the_name_of_the_run_s_own_text(command: Command, a_run: Path, shown: Callable[[Path], Path]):
    ended = command("train", shown(Path("text.txt")), "--resume", "--out", a_run)
    assert ended.code == 0, ended.err


def test_resume_with_another_text_is_refused(refused: Refused, a_run: Path):
    write(Path("other.txt"), "another text " + TEXT)
    error = refused(65, "train", "other.txt", "--resume", "--out", a_run)
    assert "other.txt" in error["where"]


def test_resume_does_not_pass_over_a_configuration_file_in_silence(command: Command, a_run: Path):
    write(Path("my.toml"), "seed = 7")
    assert command("train", "--resume", "--out", a_run, "--config", "my.toml").code == 78


@pytest.mark.parametrize(
    ("name", "content", "codes"),
    [
        ("config.toml", b"seed = \xff", (65, 78)),
        ("config.toml", b"seed = ", (78,)),
        ("config.toml", b"stesp = 1", (78,)),
        ("corpus.json", b"{", (65,)),
        ("corpus.json", b"{}", (65,)),
        ("metrics.jsonl", b'{"event": "st\xff\n{}\n', (65,)),
    ],
)
@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_damaged_file_of_a_run_is_named(command: Command, a_run: Path, verb: str, name: str, content: bytes, codes: Any):
    write(a_run / name, content)
    ended = command(*(("train", "--resume", "--out", a_run) if verb == "train" else ("eval", a_run)), "--json")
    if verb == "eval" and ended.code == 0:  # it needs less of the run
        return
    assert ended.code in codes
    error_of(ended, ended.code)


@row(40)
def test_resume_with_a_changed_text_says_so(refused: Refused, a_run: Path):
    with Path("text.txt").open("a") as file:
        file.write("one more line\n")
    error = refused(65, "train", "--resume", "--out", a_run, "--steps", "3")
    assert "changed since the run began" in error["what"]
    assert "text.txt" in error["where"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_goes_on(command: Command, a_run: Path, name: str):
    older, newest = checkpoints(a_run)[-2:]
    shutil.copytree(a_run, "whole")
    flip_a_byte(newest / name)
    ended = command("train", "--resume", "--out", a_run, "--json")
    assert ended.code == 0
    aside = list((a_run / "checkpoints").glob(f"damaged-{newest.name}-*"))
    assert len(aside) == 1
    assert aside[0].name in ended.err
    assert newest.name in ended.err
    assert ended.json["steps"] == 2
    whole = command("train", "--resume", "--out", "whole", "--json").json
    assert ended.json["weights_sha256"] == whole["weights_sha256"]
    lines = [json.loads(line) for line in (a_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2]
    assert int(older.name.removeprefix("step-")) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "2"),
        ("step", None),
        ("best_step", [1]),
        ("best_nats", {}),
        ("skipped", 0),
        ("skipped", [1]),
        ("elapsed_s", []),
    ],
)
def test_a_state_of_other_kinds_with_a_manifest_that_fits_is_refused(refused: Refused, a_run: Path, name: str, value: Any):
    newest = checkpoints(a_run)[-1]
    state = json.loads((newest / "state.json").read_bytes()) | {name: value}
    write(newest / "state.json", json.dumps(state))
    reseal(newest)
    error = refused(65, "train", "--resume", "--out", a_run)
    assert name in error["what"]
    assert "state.json" in error["where"]


def test_a_journal_that_is_a_folder_is_named(refused: Refused, a_run: Path):
    (a_run / "metrics.jsonl").unlink()
    (a_run / "metrics.jsonl").mkdir()
    assert "metrics.jsonl" in refused(65, "verify", a_run, "--replay", "1")["where"]


@row(62)
def test_resume_with_only_damaged_checkpoints_is_bad_data_however_often(command: Command, a_run: Path):
    for folder in checkpoints(a_run):
        flip_a_byte(folder / "model.safetensors")
    metrics = (a_run / "metrics.jsonl").read_bytes()
    for _ in range(2):
        error = error_of(command("train", "--resume", "--out", a_run, "--json"), 65)
        assert "damaged" in error["what"]
        assert "step-00000002" in error["why"]
        assert (a_run / "metrics.jsonl").read_bytes() == metrics


def test_a_checkpoint_under_the_name_of_another_step_is_set_aside_and_that_step_saved(command: Command, a_run: Path):
    newest = checkpoints(a_run)[-1]
    shutil.copytree(newest, newest.with_name("step-00000003"))
    assert not command("verify", a_run, "--json").json["ok"]
    ended = command("train", "--resume", "--out", a_run, "--steps=3")
    assert ended.code == 0
    assert "step-00000003" in ended.err
    steps = [json.loads((folder / "manifest.json").read_bytes())["step"] for folder in checkpoints(a_run)]
    assert steps == [int(folder.name[-8:]) for folder in checkpoints(a_run)]
    assert steps[-1] == 3


@pytest.mark.parametrize("lost_bytes", [1, 100, 10_000])
def test_a_journal_that_lost_its_end_is_told_of_and_goes_on_in_whole_lines(command: Command, a_run: Path, lost_bytes: int):
    journal, state = a_run / "metrics.jsonl", checkpoints(a_run)[-1] / "state.json"
    kept = max(0, json.loads(state.read_bytes())["journal_bytes"]["metrics.jsonl"] - lost_bytes)
    write(journal, journal.read_bytes()[:kept])
    ended = command("train", "--resume", "--out", a_run, "--steps=3")
    assert ended.code == 0
    assert "metrics.jsonl: its last lines before step 2 are lost" in ended.err
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line.strip()]
    assert [line["step"] for line in lines if line["event"] == "step"][-1] == 3
    assert command("report", a_run).code == 0
    assert "are lost" not in command("train", "--resume", "--out", a_run, "--steps=4").err  # the negative control


def test_a_run_whose_journal_lost_its_end_is_killed_again_before_its_next_save(command: Command, a_run: Path):
    journal = a_run / "metrics.jsonl"
    state = json.loads((checkpoints(a_run)[-1] / "state.json").read_bytes())
    write(journal, journal.read_bytes()[: state["journal_bytes"]["metrics.jsonl"] - 100])

    def killed(told: object) -> None:
        if isinstance(told, StepDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        firstwords.train(out=a_run, resume=True, steps=3, listener=killed)
    ended = command("train", "--resume", "--out", a_run, "--steps=3")
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line.strip()]
    steps = [line["step"] for line in lines if line["event"] == "step"]
    assert steps == sorted(set(steps))  # each stands once
    assert steps[-1] == 3


def test_a_length_that_no_journal_has_is_not_filled_up(tmp_path: Path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.add("step", {"step": 1})
    before = journal.path.read_bytes()
    with pytest.raises(DataError, match="far shorter"):
        journal.cut(1 << 40)
    assert journal.path.read_bytes() == before
    assert not journal.cut(1000)  # the negative control
    assert journal.size_bytes() == 1000
    assert [line["step"] for line in journal.lines()] == [1]


def test_a_replay_beyond_a_journal_names_no_number_of_steps_below_one(refused: Refused, a_run: Path):
    journal = a_run / "metrics.jsonl"
    write(journal, journal.read_bytes()[:400])
    assert "no step is recorded" in refused(78, "verify", a_run, "--replay=1")["do"]


def test_a_run_that_is_done_took_as_long_as_it_took_however_often_it_is_resumed(command: Command, a_run: Path):
    def stops() -> list[float]:
        lines = map(json.loads, (a_run / "metrics.jsonl").read_text().splitlines())
        return [line["elapsed_s"] for line in lines if line["event"] == "stop"]

    before = stops()
    assert command("train", "--resume", "--out", a_run).code == 0
    assert stops()[-1] == before[-1]
