"""The contract of the command line: what scripts, and people who pipe, may rely on."""

from __future__ import annotations

import io
import json
import os
import pickletools
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import firstwords
from command import TEXT, TINY_FLAGS, Command, Ended
from firstwords import api, errors, store
from firstwords.app.cli import main
from firstwords.events import Preparing, Told
from firstwords.model.language_model import LanguageModel
from firstwords.runs.journal import Journal
from firstwords.text import corpus
from firstwords.training import loop
from firstwords.watching import Watcher

FIGURES = {"nats_per_token", "perplexity", "bits_per_byte"}
TRAIN_KEYS = {
    "run",
    "steps",
    "tokens",
    "elapsed_s",
    "tokens_per_s",
    "best_step",
    "last",
    "weights_sha256",
    "precision",
    "seed",
}
STEP_KEYS = {"event", "step", "tokens", "nats_per_token", "lr", "grad_norm", "tokens_per_s", "elapsed_s"}
CHECKPOINT_FILES = [
    "config.json",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "tokenizer.json",
]


@pytest.fixture(autouse=True)
def _text(text: Path) -> None:
    """Every test stands beside text.txt."""


@pytest.fixture
def command(command: Command) -> Command:
    """Run a command in this process; it must succeed."""

    def run(*arguments: str | Path) -> Ended:
        ended = command(*arguments)
        assert ended.code == 0, ended.err
        return ended

    return run


@pytest.fixture
def a_run(command: Command) -> Path:
    command("train", "text.txt", "--out", "run", *TINY_FLAGS)
    return Path("run")


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [line for line in map(json.loads, lines) if line["event"] == name]


def config(run: Path) -> dict[str, Any]:
    return tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))


# JSON


def test_train_says_what_came_of_it(command: Command):
    found = command("train", "text.txt", "--out", "run", *TINY_FLAGS, "--json", "--seed", "7").json
    assert found.keys() >= TRAIN_KEYS | FIGURES
    assert found["last"].keys() >= {"train_nats_per_token", "nats_per_token"}
    assert (found["run"], found["steps"], found["seed"], found["precision"]) == ("run", 2, 7, "float32")
    assert found["tokens"] == 2 * 4 * 32
    files = json.loads(Path("run/checkpoints/step-00000002/manifest.json").read_bytes())["files"]
    assert found["weights_sha256"] == files["model.safetensors"]["sha256"]


def test_a_text_without_a_held_out_part_has_null_figures_and_the_last_model_is_the_best(command: Command):
    ended = command("train", "text.txt", "--out", "run", *TINY_FLAGS, "--json", "--val-fraction", "0")
    assert [ended.json[key] for key in sorted(FIGURES)] == [None] * 3
    assert ended.json["last"]["nats_per_token"] is None
    assert ended.json["best_step"] == 2
    assert "held-out" in ended.err


def test_eval_of_a_run_gives_the_figures_that_train_gave(command: Command):
    trained = command("train", "text.txt", "--out", "run", *TINY_FLAGS, "--json").json
    found = command("eval", "run", "--json").json
    assert found.keys() >= FIGURES | {"n_tokens", "n_bytes"}
    assert {key: found[key] for key in FIGURES} == {key: trained[key] for key in FIGURES}
    best = command("eval", f"run/checkpoints/step-{trained['best_step']:08d}", "--json").json
    assert {**best, "scale": None} == {**found, "scale": None}  # there the model has the name that it was called by


def test_eval_of_a_text_counts_its_bytes(command: Command, a_run: Path):
    Path("other.txt").write_text("süß\n", encoding="utf-8")
    found = command("eval", a_run, "other.txt", "--json").json
    assert (found["n_bytes"], found["n_tokens"]) == (6, 6)
    assert found["perplexity"] == pytest.approx(2.718281828459045 ** found["nats_per_token"])
    both = command("eval", a_run, "other.txt", "text.txt", "--json").json
    assert both["n_bytes"] == 6 + len(TEXT.encode())


def test_generate_gives_texts_without_the_prompt(command: Command, a_run: Path):
    arguments = ("generate", a_run, "--prompt", "The 1.", "--max-new-tokens", "5", "--temperature", "1", "--json")
    found = command(*arguments, "--samples", "3", "--seed", "5").json
    assert found.keys() >= {"texts", "tokens_per_s"}
    assert len(found["texts"]) == 3
    lm = firstwords.load(a_run)
    sampling = firstwords.Sampling(temperature=1.0)
    assert found["texts"] == [lm.generate("The 1.", max_new_tokens=5, sampling=sampling, seed=s) for s in (5, 6, 7)]


def test_prompts_are_answered_in_their_order_with_their_tokens_and_log_probabilities(command: Command, a_run: Path):
    arguments = ("generate", a_run, "--prompt", "The 1.", "--prompt", "word of", "--max-new-tokens", "5")
    found = command(*arguments, "--samples", "2", "--json").json
    lm = firstwords.load(a_run)
    wanted = [(prompt, seed) for prompt in ("The 1.", "word of") for seed in (123, 124)]
    assert found["texts"] == [lm.generate(prompt, max_new_tokens=5, seed=seed) for prompt, seed in wanted]
    said = [b"".join(lm.tokenizer.token_bytes(token["id"]) for token in tokens) for tokens in found["tokens"]]
    assert [text.decode(errors="replace") for text in said] == found["texts"]
    assert all(token["log_probability"] < 0 for tokens in found["tokens"] for token in tokens)
    shown = command(*arguments).out
    assert shown.index("The 1.") < shown.index("---") < shown.index("word of")


def test_the_same_seed_says_the_same_and_another_does_not(command: Command, a_run: Path):
    said = [command("generate", a_run, "--seed", seed, "--json").json["texts"] for seed in ("1", "1", "2")]
    assert said[0] == said[1] != said[2]


def test_top_k_of_one_and_temperature_zero_both_take_the_likeliest(command: Command, a_run: Path):
    greedy = [("--top-k", "1"), ("--temperature", "0"), ("--top-p", "1e-9")]
    said = {command("generate", a_run, "--prompt", "a", *how, "--json").json["texts"][0] for how in greedy}
    assert len(said) == 1


def test_explain_gives_each_token_and_what_they_come_to(command: Command, a_run: Path):
    found = command("explain", a_run, "word", "--json").json
    assert found.keys() >= FIGURES | {"tokens"}
    assert all(token.keys() >= {"id", "text", "probability", "log_probability", "rank", "top"} for token in found["tokens"])
    assert [token["text"] for token in found["tokens"]] == list("word")
    assert (found["tokens"][0]["probability"], found["tokens"][0]["log_probability"]) == (None, None)
    predicted = found["tokens"][1:]
    assert all(set(guess) == {"id", "text", "probability"} for token in predicted for guess in token["top"])
    assert all(token["rank"] >= 1 for token in predicted)
    assert found["nats_per_token"] == pytest.approx(-sum(token["log_probability"] for token in predicted) / 3)


def test_info_says_what_is_in_a_run_and_in_a_checkpoint(command: Command, a_run: Path):
    found = command("info", a_run, "--json").json
    assert found.keys() >= {"parameters", "config", "steps", "best_step"}
    assert found["parameters"] == sum(parameter.numel() for parameter in firstwords.load(a_run).model.parameters())
    assert (found["steps"], found["config"]["emb_dim"]) == (2, 32)
    assert command("info", a_run / "checkpoints/step-00000001", "--json").json["steps"] == 1
    for source in (a_run, a_run / "checkpoints/step-00000001"):
        shown = command("info", source).out
        assert "parameters" in shown
        assert "None" not in shown


# Standard output and standard error


@pytest.mark.parametrize("verb", [["eval", "run"], ["generate", "run"], ["explain", "run", "a text"], ["info", "run"]])
def test_results_go_to_standard_output_alone(command: Command, a_run: Path, verb: list[str]):
    ended = command(*verb)
    assert ended.out.strip()
    assert ended.err == ""


def test_progress_goes_to_standard_error_in_plain_lines_and_results_to_standard_output(command: Command):
    ended = command("train", "text.txt", "--out", "run", *TINY_FLAGS)
    assert "held-out" in ended.out
    assert "firstwords generate run" in ended.out
    assert "step      2/2" in ended.err
    assert "step      2/2" not in ended.out
    assert "tokens/s" not in ended.out
    assert not {"\x1b", "\r"} & set(ended.out + ended.err)


def test_on_a_terminal_progress_is_a_live_line_and_results_are_the_same(command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    plain = command("train", "text.txt", "--out", "plain", *TINY_FLAGS, "--json")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    live = command("train", "text.txt", "--out", "live", *TINY_FLAGS, "--json")
    assert "\x1b[" in live.err
    assert "\x1b" not in live.out
    assert live.json["weights_sha256"] == plain.json["weights_sha256"]


@pytest.mark.parametrize(
    ("verb", "where", "name", "do"),
    [
        (("generate", "run"), api, "load", ""),
        (("train", "text.txt", "--out", "new", *TINY_FLAGS), corpus, "prepare", ""),
        (
            ("train", "text.txt", "--out", "new", *TINY_FLAGS),
            loop,
            "train_step",
            "to go on: firstwords train --resume --out new",
        ),
    ],
)
def test_ctrl_c_advises_to_go_on_where_there_is_something_to_go_on_with(
    a_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: tuple[str, ...],
    where: Any,
    name: str,
    do: str,
):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, interrupted)
    assert main([*verb, "--json"]) == 130
    assert Ended(130, *capsys.readouterr()).json["error"]["do"] == do


def test_ctrl_c_while_the_program_is_being_read_is_no_traceback():
    program = "import sys\nclass Stop:\n  def find_spec(name, *_):\n    if name == 'tomllib': raise KeyboardInterrupt\n"
    program += "sys.meta_path.insert(0, Stop)\nfrom firstwords.__main__ import entry; entry()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


def test_what_a_run_says_at_its_end_goes_on_from_the_prompt_of_its_samples(command: Command, a_run: Path):
    ended = command("train", "text.txt", "--out", "new", *TINY_FLAGS, "--sample-prompt", "The word")
    said = ended.out.partition("it says:\n")[2]
    assert said.startswith("The word")


def test_without_held_out_text_no_held_out_figure_is_promised(command: Command, a_run: Path):
    tiny = ("train", "text.txt", *TINY_FLAGS)
    assert "held out" not in command(*tiny, "--out", "none", "--val-fraction", "0").err.partition("plan ")[2].splitlines()[0]
    assert "held out" in command(*tiny, "--out", "some").err.partition("plan ")[2].splitlines()[0]  # the negative control


def test_generate_shows_the_prompt_and_goes_on_from_it(command: Command, a_run: Path):
    arguments = ("generate", a_run, "--prompt", "The 1.", "--max-new-tokens", "9", "--top-k", "1")
    (said,) = command(*arguments, "--json").json["texts"]
    shown = command(*arguments).out
    assert shown.startswith("The 1.")
    assert all(word in shown for word in said.split() if word.isprintable())


def test_what_is_said_stands_there_to_the_letter(command: Command, a_run: Path):
    prompt = "if :key: a[0:100:2]\tb\t:x:\n\tc"
    assert command("generate", a_run, "--prompt", prompt, "--max-new-tokens", "1").out.startswith(prompt)
    assert command("generate", a_run, "--prompt", prompt, "--max-new-tokens", "1", "--samples", "2").out.startswith(prompt)


def test_a_text_may_stand_behind_a_flag(command: Command, a_run: Path):
    Path("other.txt").write_text("other words\n", encoding="utf-8")
    before = command("eval", a_run, "other.txt", "text.txt", "--no-baselines", "--json").json
    around = command("eval", a_run, "other.txt", "--no-baselines", "text.txt", "--json").json
    behind = command("eval", a_run, "--no-baselines", "other.txt", "text.txt", "--json").json
    assert before["n_bytes"] == around["n_bytes"] == behind["n_bytes"]
    against = command("eval", a_run, "--no-baselines", "--json", "--against", a_run, "--", "other.txt", "text.txt").json
    assert (against["n_bytes"], len(against["scale"])) == (before["n_bytes"], 2)
    assert main(["eval", str(a_run), "--no-baseline", "other.txt"]) == 2  # the negative control: a flag that is none


def test_a_model_beside_a_run_s_folders_is_not_judged_on_that_run_s_text(
    command: Command, a_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command("export", a_run, "--to", "hf", "--out", "run/deep/model")
    assert main(["eval", "run/deep/model"]) == 66
    monkeypatch.chdir("run/checkpoints")
    assert command("eval", "step-00000002", "--json").code == 0  # a checkpoint of the run, named from beside it
    monkeypatch.chdir("..")
    assert main(["eval", "deep/model"]) == 66
    assert "has no held-out text" in capsys.readouterr().err


def test_standard_input_is_not_read_twice(a_run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(a_run), "-", "--tasks"]) == 78
    assert "can be read only once" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE to speak of")
def test_a_reader_that_leaves_ends_the_program_in_silence_as_a_signal_would(a_run: Path):
    arguments = [sys.executable, "-m", "firstwords", "generate", "run", "--max-new-tokens", "100", "--samples", "1000"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as speaker:
        assert speaker.stdout.read(10)
        speaker.stdout.close()
        said = speaker.stderr.read()
        assert (speaker.wait(timeout=30), said) == (141, b"")


@pytest.mark.parametrize("code_page", ["cp1252", "ascii"])
def test_an_old_code_page_costs_no_result(a_run: Path, code_page: str):
    """As Windows has it for output that goes into a file: a letter of Russian and the sign of a new line are not in it."""
    explain = [sys.executable, "-m", "firstwords", "explain", "run", "Привет"]
    named = subprocess.run(explain, capture_output=True, env={**os.environ, "PYTHONIOENCODING": code_page}, check=False)
    assert (named.returncode, named.stderr) == (0, b"")
    by_locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    in_a_file = subprocess.run([*explain[:-1], "two\nlines"], capture_output=True, env=by_locale, check=False)
    assert in_a_file.returncode == 0
    assert "⏎" in in_a_file.stdout.decode("utf-8")


# The program


def test_the_version_is_the_package_s():
    for program in ([sys.executable, "-m", "firstwords"], [str(Path(sys.executable).with_name("firstwords"))]):
        done = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"firstwords {firstwords.__version__}\n"


def test_help_names_every_verb_and_every_key(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("train", "eval", "generate", "explain", "info"))
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    flags = "--out --for --steps --epochs --val --val-fraction --tokenizer --preset --config --resume --seed --device"
    flags += " --precision --threads --compile --save-every --keep --model.n-layers --optim.peak-lr"
    assert [flag for flag in flags.split() if f"{flag} " not in shown and f"{flag}\n" not in shown] == []


# Where a run goes


def test_a_run_is_named_after_its_text_and_numbered_if_taken(command: Command):
    assert [command("train", "text.txt", *TINY_FLAGS, "--json").json["run"] for _ in range(3)] == [
        "runs/text",
        "runs/text-2",
        "runs/text-3",
    ]


def test_a_folder_in_which_another_process_begins_is_taken(command: Command):
    store.make_folder(Path("runs/text"))
    with store.lock(Path("runs/text/run.lock")):
        assert command("train", "text.txt", *TINY_FLAGS, "--json").json["run"] == "runs/text-2"
    assert command("train", "text.txt", *TINY_FLAGS, "--json").json["run"] == "runs/text"  # the negative control


def test_a_run_has_its_folder_to_itself_from_before_its_text_is_prepared(here: Path):
    held = list[bool]()

    def look(told: Told) -> None:
        if isinstance(told, Preparing):
            held.append(store.is_locked(Path("run/run.lock")))

    api.train("text.txt", out="run", listener=look, steps=1, batch_size=1, preset="laptop-tiny", report=False)
    assert len(held) > 1
    assert all(held)
    assert not store.is_locked(Path("run/run.lock"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="NOT RUN: there is no disk that is always full")
@pytest.mark.parametrize(("named", "code"), [("text.txt", 0), ("missing.txt", 66)])
def test_what_cannot_be_told_neither_ends_a_run_nor_changes_its_exit_code(here: Path, named: str, code: int):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "firstwords", "train", named, "--out", "run", *TINY_FLAGS]
        ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=full, check=False)
    assert ended.returncode == code
    assert bool(list(Path().glob("run/checkpoints/step-*2"))) is (code == 0)


def test_a_command_to_repeat_is_quoted_as_this_system_s_shell_takes_it(monkeypatch: pytest.MonkeyPatch):
    words = ("firstwords", "train", "my notes", "runs\\notes", "R&D")
    assert shlex.split(errors.quoted(*words)) == list(words)
    monkeypatch.setattr(errors.os, "name", "nt")
    windows = errors.quoted(*words)
    monkeypatch.undo()
    assert windows == 'firstwords train "my notes" runs\\notes "R&D"'


@pytest.mark.parametrize(("texts", "name"), [(["-"], "stdin"), (["notes"], "notes"), (["text.txt", "notes"], "text")])
def test_folders_and_standard_input_give_a_run_its_name(
    command: Command, monkeypatch: pytest.MonkeyPatch, texts: list[str], name: str
):
    Path("notes").mkdir()
    Path("notes/a.md").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert command("train", *texts, *TINY_FLAGS, "--json").json["run"] == f"runs/{name}"


def test_an_empty_folder_is_free(command: Command):
    Path("run").mkdir()
    assert command("train", "text.txt", "--out", "run", *TINY_FLAGS, "--json").json["run"] == "run"


def test_a_refused_run_leaves_no_number_taken(command: Command):
    assert main(["train", "text.txt", *TINY_FLAGS, "--model.context-length=99999"]) == 65
    assert command("train", "text.txt", *TINY_FLAGS, "--json").json["run"] == "runs/text"


# Configuration


def test_flags_win_over_the_file_which_wins_over_the_preset_which_wins_over_the_defaults(command: Command):
    Path("my.toml").write_text(
        'preset = "laptop-small"\nbatch_size = 3\nkeep = 5\n[model]\nn_layers = 2\nff_dim = 64\nemb_dim = 32\n'
    )
    command("train", "text.txt", "--config", "my.toml", "--out", "run", "--steps=1", "--threads=1", "--precision=float32",
            "--tokenizer=bytes", "--batch-size=5", "--model.n-layers=1", "--model.context-length=32")  # fmt: skip
    found = config(Path("run"))
    assert (found["batch_size"], found["model"]["n_layers"]) == (5, 1)  # flags
    assert (found["keep"], found["model"]["ff_dim"], found["preset"]) == (5, 64, "laptop-small")  # file
    assert (found["model"]["n_heads"], found["optim"]["kind"]) == (2, "muon")  # preset
    assert (found["val_fraction"], found["seed"], found["optim"]["beta1"]) == (0.1, 123, 0.9)  # defaults


def test_a_preset_on_the_command_line_replaces_the_file_s_and_the_file_s_keys_stay(command: Command):
    Path("my.toml").write_text('preset = "laptop"\n[model]\nn_layers = 1\n')
    arguments = ("--steps=1", "--threads=1", "--precision=float32", "--tokenizer=bytes", "--model.context-length=32")
    command("train", "text.txt", "--config", "my.toml", "--preset", "laptop-small", "--out", "run", *arguments)
    found = config(Path("run"))
    assert (found["preset"], found["model"]["emb_dim"], found["model"]["n_layers"]) == ("laptop-small", 128, 1)


def test_a_length_on_the_command_line_replaces_the_file_s(command: Command):
    Path("my.toml").write_text("steps = 1000000\n")
    tiny = [word for word in TINY_FLAGS if not word.startswith("--steps")]
    command("train", "text.txt", "--config", "my.toml", "--out", "run", *tiny, "--epochs", "0.1")
    assert config(Path("run"))["steps"] == 3  # a tenth of 101 windows of 32, 4 at a time


@pytest.mark.parametrize(("time", "expected_s"), [("90", 90.0), ("90s", 90.0), ("3m", 180.0), ("1h", 3600.0), ("0.5", 0.5)])
def test_times_have_units(command: Command, time: str, expected_s: float):
    command("train", "text.txt", "--out", "run", *TINY_FLAGS, "--steps=1", "--save-every", time)
    assert config(Path("run"))["save_every_s"] == expected_s


@pytest.mark.parametrize("extra", [[], ["--tokenizer=bpe:300", "--model.drop-rate=0.1", "--val=text.txt", "--seed=9"]])
def test_training_from_a_run_s_own_configuration_repeats_it(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, extra: list[str]
):
    first = command("train", "text.txt", "--out", "run", *TINY_FLAGS, *extra, "--steps=4", "--json").json
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = command("train", "--config", tmp_path / "run/config.toml", "--out", "again", "--json").json
    same = (TRAIN_KEYS | FIGURES) - {"run", "elapsed_s", "tokens_per_s"}
    assert {key: again[key] for key in same} == {key: first[key] for key in same}
    assert config(tmp_path / "elsewhere/again") == config(tmp_path / "run")


@pytest.mark.parametrize("key", ["val", "tokenizer"])
def test_files_that_a_run_needs_are_recorded_so_that_it_goes_on_from_any_folder(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, a_run: Path, key: str
):
    files = {"val": "text.txt", "tokenizer": "run/checkpoints/step-00000002/tokenizer.json"}
    command("train", "text.txt", "--out", "other", *TINY_FLAGS, f"--{key}", files[key])
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    command("train", "--resume", "--out", tmp_path / "other", "--steps=3")


def test_training_from_a_run_s_configuration_notices_a_changed_text(command: Command, a_run: Path):
    Path("text.txt").write_text(TEXT + "one more line\n", encoding="utf-8")
    assert main(["train", "--config", "run/config.toml", "--out", "again"]) == 65


# The run folder


def test_a_run_folder_holds_what_the_design_names(a_run: Path):
    assert {path.name for path in a_run.iterdir()} == {
        "config.toml",
        "corpus.json",
        "checkpoints",
        "metrics.jsonl",
        "samples.jsonl",
        "run.lock",
    }
    for folder in (a_run / "checkpoints").iterdir():
        assert sorted(path.name for path in folder.iterdir()) == CHECKPOINT_FILES


def test_a_run_s_configuration_names_its_text_by_path_and_hash_and_leaves_nothing_open(a_run: Path):
    found = config(a_run)
    assert found["text"] == [str(Path("text.txt").absolute())]
    corpus = json.loads((a_run / "corpus.json").read_bytes())
    assert found["text_sha256"] == corpus["text_sha256"]
    assert (Path(os.environ["FIRSTWORDS_CACHE"]) / "corpora" / corpus["folder"]).is_dir()
    assert "auto" not in (found["device"], found["precision"], found["compile"])
    assert found["threads"] == 1


def test_no_file_of_a_run_is_a_pickle_or_a_zip(a_run: Path):
    files = [path for path in a_run.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert not zipfile.is_zipfile(path)
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))


def test_the_best_and_the_last_two_checkpoints_stay(command: Command):
    found = command("train", "text.txt", "--out", "run", *TINY_FLAGS, "--steps=6", "--json", "--eval-every=1").json
    kept = {int(path.name.removeprefix("step-")) for path in Path("run/checkpoints").iterdir()}
    assert kept == {5, 6} | {found["best_step"]}


# The journals


def test_each_step_stands_in_the_journal_once_with_its_keys(a_run: Path):
    steps = events(a_run, "step")
    assert [step["step"] for step in steps] == [1, 2]
    assert [step["tokens"] for step in steps] == [128, 256]
    assert all(step.keys() >= STEP_KEYS for step in steps)
    assert all(isinstance(step[key], int | float) for step in steps for key in STEP_KEYS - {"event"})


def test_every_evaluation_stands_in_the_journal_with_the_first_and_last_step(command: Command):
    found = command("train", "text.txt", "--out", "run", *TINY_FLAGS, "--steps=5", "--json", "--eval-every=3").json
    evaluations = events(Path("run"), "evaluation")
    assert [evaluation["step"] for evaluation in evaluations] == [0, 3, 5]
    assert all(evaluation.keys() >= FIGURES | {"best"} for evaluation in evaluations)
    lowest = min(evaluations, key=lambda evaluation: evaluation["nats_per_token"])
    assert (found["best_step"], found["nats_per_token"]) == (lowest["step"], lowest["nats_per_token"])
    assert [evaluation["step"] for evaluation in evaluations if evaluation["best"]][-1] == found["best_step"]
    assert found["last"]["nats_per_token"] == evaluations[-1]["nats_per_token"]
    assert found["last"]["train_nats_per_token"] == evaluations[-1]["train_nats_per_token"]


def test_a_run_s_journal_begins_with_start_and_ends_with_stop(a_run: Path):
    lines = [json.loads(line)["event"] for line in (a_run / "metrics.jsonl").read_text().splitlines()]
    assert (lines[0], lines[-1], lines.count("start"), lines.count("stop")) == ("start", "stop", 1, 1)
    assert set(lines) <= {"start", "step", "evaluation", "memorisation", "sample", "save", "plan", "resume", "stop"}
    assert [save["step"] for save in events(a_run, "save")] == [0, 1, 2]


def test_a_time_budget_is_planned_and_the_plan_is_in_the_journal(command: Command):
    tiny = [word for word in TINY_FLAGS if not word.startswith("--steps")]
    found = command("train", "text.txt", "--out", "run", *tiny, "--for", "1s", "--json").json
    plans = events(Path("run"), "plan")
    assert plans
    assert plans[-1]["total_steps"] == found["steps"] == events(Path("run"), "step")[-1]["step"]
    assert config(Path("run"))["for_s"] == 1.0


def test_what_a_killed_run_wrote_after_its_checkpoint_is_cut_and_each_step_stands_once(command: Command, a_run: Path):
    whole = command("train", "text.txt", "--out", "whole", *TINY_FLAGS, "--steps=4", "--eval-every=1", "--json").json
    with (a_run / "metrics.jsonl").open("a") as metrics, (a_run / "samples.jsonl").open("a") as samples:
        metrics.write('{"event": "step", "step": 3}\n{"event": "st')
        samples.write('{"event": "sample", "step": 3, "text": "never')
    ended = command("train", "--resume", "--out", a_run, "--steps=4", "--json")
    assert [step["step"] for step in events(a_run, "step")] == [1, 2, 3, 4]
    assert [sample["step"] for sample in Journal(a_run / "samples.jsonl").lines()] == [0, 1, 2, 3, 4]
    assert [resume["step"] for resume in events(a_run, "resume")] == [2]
    assert ended.json["tokens"] == whole["tokens"]


def test_a_run_without_a_checkpoint_begins_again_and_says_so(command: Command):
    first = command("train", "text.txt", "--out", "run", *TINY_FLAGS, "--json").json
    for path in Path("run/checkpoints").iterdir():
        path.rename(f"damaged-{path.name}")
    Path("run/metrics.jsonl").unlink()  # as if it was never saved
    again = command("train", "--resume", "--out", "run", "--json")
    assert "step 0" in again.err
    assert again.json["weights_sha256"] == first["weights_sha256"]
    assert [step["step"] for step in events(Path("run"), "step")] == [1, 2]


def test_samples_stand_in_their_own_journal(a_run: Path):
    samples = list(Journal(a_run / "samples.jsonl").lines())
    assert [sample["step"] for sample in samples] == [0, 1, 2]
    assert all(isinstance(sample["text"], str) for sample in samples)
    assert [sample["step"] for sample in events(a_run, "sample")] == [0, 1, 2]


def test_a_journal_line_without_its_step_ends_nothing(command: Command, a_run: Path):
    with (a_run / "metrics.jsonl").open("r+b") as file:
        lines = file.read().splitlines(keepends=True)
        first = next(number for number, line in enumerate(lines) if b'"event": "evaluation"' in line)
        short = b'{"event": "evaluation"}'
        lines[first] = short.ljust(len(lines[first]) - 1) + b"\n"
        lines[0] = b" " * (len(lines[0]) - 1) + b"\n"  # and one that was taken out, in the way that is advised
        file.seek(0)
        file.write(b"".join(lines))
    assert command("train", "--resume", "--out", a_run, "--steps", "3").code == 0
    assert command("export", a_run, "--to", "hf", "--out", "out").code in (0, 78)
    assert command("report", a_run).code == 0


def test_a_journal_gives_back_every_text_that_a_model_may_say(tmp_path: Path):
    journal = Journal(tmp_path / "samples.jsonl")
    texts = ["a\u2028b\u2029c", "\x85", "\r\n", "\x0b\x0c\x1c\x1d\x1e", "süß 👧", '"\\']
    for text in texts:
        journal.add("sample", {"text": text})
    assert [line["text"] for line in journal.lines()] == texts


# The same in Python


def test_the_python_verbs_give_what_the_command_line_gives(command: Command, capsys: pytest.CaptureFixture[str]):
    shown = command("train", "text.txt", "--out", "run", *TINY_FLAGS, "--json").json
    model = {"emb_dim": 32, "n_heads": 2, "n_layers": 1, "ff_dim": 64, "context_length": 32}
    options = {"steps": 2, "batch_size": 4, "threads": 1, "precision": "float32", "device": "cpu", "model": model}
    result = firstwords.train("text.txt", out="same", tokenizer="bytes", progress=False, **options)
    assert capsys.readouterr() == ("", "")
    assert (result.weights_sha256, result.bits_per_byte) == (shown["weights_sha256"], shown["bits_per_byte"])
    assert firstwords.evaluate("same").bits_per_byte == shown["bits_per_byte"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="NOT RUN: there is no disk that is always full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_result_that_cannot_be_told_is_an_error_of_the_disk(a_run: Path, more: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "firstwords", "info", str(a_run), *more]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 74
    assert "Exception ignored" not in ended.stderr


def test_where_colours_are_not_wanted_none_are_explained(
    a_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> str:
        capsys.readouterr()
        assert main(["explain", str(a_run), "some words here"]) == 0
        return capsys.readouterr().out

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "surprise in nats" in said()  # the negative control
    monkeypatch.setenv("NO_COLOR", "1")
    assert "surprise in nats" not in said()


def test_an_encoding_without_a_text_to_read_is_refused(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(a_run), "--encoding", "latin-1"]) == 78
    assert "--encoding: there is no text" in capsys.readouterr().err


def test_who_stops_a_finished_run_s_last_words_is_not_told_to_go_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "generate", interrupted)
    monkeypatch.setattr(Watcher, "sample", lambda *_: "")
    assert main(["train", "text.txt", "--out", "run", *TINY_FLAGS]) == 130
    said = capsys.readouterr()
    assert "go on     firstwords train" in said.out  # longer, before it spoke
    assert "--resume" not in said.err
