"""What is asked of the machine while a run trains is taken back afterwards."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command import Command, write
from conftest import STORY, TINY
from firstwords import api, resolve
from firstwords.config import run_config
from firstwords.errors import ConfigError
from firstwords.events import Notice
from firstwords.model import loss
from firstwords.planning import known, machine, matmul, measure, process, system
from firstwords.planning.known import Compiling, Known, Learning
from firstwords.planning.plan import Machine, TokenizedText
from firstwords.planning.speed import Speed, guessed
from firstwords.training.events import Event

# A process of its own: what it frees lies in one heap, which the main thread alone has.
CLEARED = """
import json, resource, torch
from firstwords.planning import process

def cleared_share(n_bytes=128 << 20):
    torch.ones(2 * n_bytes, dtype=torch.uint8)  # freed at once: the next one fits into its place
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(n_bytes, dtype=torch.uint8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / n_bytes

shares = [cleared_share()]
with process.memory_kept():
    shares.append(cleared_share())
shares.append(cleared_share())
print(json.dumps(shares))
"""


GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT RUN: no glibc here")
FLUSHES = pytest.mark.skipif(  # there a thread begins with its starter's way to compute
    sys.platform != "linux" or not torch.set_flush_denormal(False), reason="NOT RUN: no such processor or system"
)


@FLUSHES
def test_denormals_are_flushed_in_all_threads_unless_some_ran_before() -> None:
    program = "import sys, torch; from firstwords.planning import process; torch.set_num_threads(2); "
    program += "sys.argv[1:] and torch.randn(1 << 20).mul(2.0)\nwith process.threads(2): print(process.flushes_denormals())"
    said = [
        subprocess.run([sys.executable, "-c", program, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], ["an operation of several threads"])
    ]
    assert said == ["True\n", "False\n"]


@FLUSHES
def test_what_a_process_did_with_denormals_before_is_what_it_does_afterwards() -> None:
    for before in (True, False):
        torch.set_flush_denormal(before)
        with process.threads(1):
            assert process.flushes_denormals(1)
        assert process.flushes_denormals(1) is before


@FLUSHES
def test_a_run_that_goes_on_from_another_model_flushes_denormals_as_one_that_is_resumed(a_run: Path) -> None:
    program = "import sys; from pathlib import Path; from firstwords import loading\n"
    program += "from firstwords.planning import process; loading.read_model(Path(sys.argv[1]))\n"
    program += "with process.threads(2): print(process.flushes_denormals())"
    done = subprocess.run([sys.executable, "-c", program, a_run], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@GLIBC
def test_what_a_step_frees_is_kept_for_the_next_one_and_given_back_at_the_end() -> None:
    ended = subprocess.run([sys.executable, "-c", CLEARED], capture_output=True, text=True, check=True)
    before, inside, after = json.loads(ended.stdout)  # shares of a tensor that the system cleared anew
    assert inside < 0.1
    assert min(before, after) > 0.5


@pytest.mark.parametrize(("quota", "expected"), [(None, 3), (2.5, 2), (0.5, 1), (64.0, 3)])
def test_no_more_threads_compute_than_a_container_has_the_time_of(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(system, "core_quota", lambda *_: quota)
    with process.threads(3):
        assert process.usable_threads() == expected
        with process.threads(None):
            assert torch.get_num_threads() == expected
        with process.threads(4):  # a number that is named is that number
            assert torch.get_num_threads() == 4
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert process.usable_threads() == 3


def test_a_model_that_is_loaded_computes_with_what_a_container_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "story.txt").write_text(STORY)
    api.train(tmp_path / "story.txt", out=tmp_path / "run", steps=1, **TINY)
    monkeypatch.setattr(system, "core_quota", lambda *_: None)
    with process.threads(3):
        api.load(tmp_path / "run")
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(system, "core_quota", lambda *_: 2.5)
        api.load(tmp_path / "run")
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("rates", "dtype"), [((1e11, 1e9), torch.float32), ((1e11, 9e10), torch.bfloat16)])
def test_a_model_is_not_computed_in_a_precision_that_this_processor_has_no_instructions_for(
    rates: tuple[float, float], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    api.train(tmp_path / "story.txt", out=tmp_path / "run", steps=1, **{**TINY, "precision": "bfloat16"})
    monkeypatch.setattr(matmul, "known_rates", lambda *_: dict(zip(("float32", "bfloat16"), rates, strict=True)))
    told: list[str] = []
    assert api.load(tmp_path / "run", notice=told.append).dtype == dtype
    assert [line for line in told if "bfloat16" in line] == (
        ["it learnt in bfloat16, which is slow on this processor: it is computed in float32 here"]
        if dtype == torch.float32
        else []
    )


def test_tiny_numbers_count_as_zero_inside_only() -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("NOT RUN: this processor cannot flush them")
    tiny = torch.tensor([1e-40])
    assert (tiny * 0.5).item() > 0
    with process.threads(None):
        assert (tiny * 0.5).item() == 0
    assert (tiny * 0.5).item() > 0


CPU = torch.device("cpu")


def measured(monkeypatch: pytest.MonkeyPatch, bfloat16: float) -> list[None]:
    """Let measuring give these rates; the list grows with each measurement."""
    times: list[None] = []

    def rates(where: torch.device) -> dict[str, float]:
        times.append(None)
        return {"float32": 1e9, "bfloat16": bfloat16}

    monkeypatch.setattr(matmul, "rates", rates)
    return times


def test_the_precision_is_measured_once_for_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = measured(monkeypatch, 4e9)
    assert [matmul.precision("auto", CPU, tmp_path) for _ in range(3)] == ["bfloat16"] * 3
    assert len(times) == 1
    assert matmul.precision("float32", CPU, tmp_path) == "float32"
    measured(monkeypatch, 1e9)
    assert matmul.precision("auto", CPU, tmp_path) == "bfloat16"  # what is known counts, until doctor measures anew
    assert matmul.precision("auto", CPU) == "float32"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"key": {}, "rates": {"float32": 1, "bfloat16": 9}, "compiling": {}, "learning": {}}',
        b'{"key": KEY, "rates": {"float32": "fast", "bfloat16": 9}, "compiling": {}, "learning": {}}',
        b'{"key": KEY, "rates": {"float32": -1, "bfloat16": 9}, "compiling": {}, "learning": {}}',
        b'{"key": KEY, "rates": {"float32": true, "bfloat16": NaN}, "compiling": {}, "learning": {}}',
        b'{"key": KEY, "rates": [], "compiling": {}, "learning": {}}',
        b'{"key": KEY, "rates": {}, "compiling": 1, "learning": {}}',
        b'{"key": KEY, "rates": {"float32": 1, "bfloat16": 9}, "compiling": {}, "learning": 1}',
    ],
)
def test_what_is_damaged_or_of_another_machine_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    times = measured(monkeypatch, 4e9)
    matmul.precision("auto", CPU, tmp_path)
    (path,) = (tmp_path / known.FOLDER).iterdir()
    good = path.read_bytes()
    write(path, content.replace(b"KEY", json.dumps(machine.key(CPU)).encode()))
    assert matmul.precision("auto", CPU, tmp_path) == "bfloat16"
    assert len(times) == 2
    assert path.read_bytes() == good


def test_what_was_measured_with_other_threads_or_another_pytorch_is_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = measured(monkeypatch, 4e9)
    matmul.precision("auto", CPU, tmp_path)
    with process.threads(2):
        matmul.precision("auto", CPU, tmp_path)
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    matmul.precision("auto", CPU, tmp_path)
    assert len(times) == 3


def test_a_cache_that_cannot_be_written_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = measured(monkeypatch, 4e9)
    place = write(tmp_path / "a file", "in the way")
    assert [matmul.precision("auto", CPU, place) for _ in range(2)] == ["bfloat16"] * 2
    assert len(times) == 2


def test_what_is_known_is_read_as_it_was_written(tmp_path: Path) -> None:
    wanted = Known(
        {"float32": 1.5e11, "bfloat16": 9e11},
        {"0123": Compiling(21.0, -1e-5), "4567": Compiling(9.0, 2e-5)},
        {"bfloat16": Learning(1.7e9, Speed(((run_config().model, 2e-5),)))},
    )
    known.write(tmp_path, {"a": 1}, wanted)
    assert known.read(tmp_path, {"a": 1}) == wanted
    assert known.read(tmp_path, {"a": 2}) == Known()


def test_how_fast_a_machine_learned_is_believed_for_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    found, measured_s = Speed(((run_config().model, 2e-5),)), 1.7e9
    before = Known(learning={"bfloat16": Learning(measured_s, found)})
    for later_s, wanted in ((-1, None), (0, found), (known.BELIEVED_S - 1, found), (known.BELIEVED_S, None)):
        monkeypatch.setattr(known.time, "time", lambda now_s=measured_s + later_s: now_s)
        assert before.speed("bfloat16") == wanted
        assert before.speed("float32") is None


@pytest.mark.parametrize(
    "damage",
    [
        None,
        {},
        {"measured_s": 1, "speed": {"points": []}},
        {"measured_s": 1, "speed": {"points": [1]}},
        {"measured_s": 1, "speed": {"points": [[{"emb_dim": "wide"}, 1e-5]]}},
        {"measured_s": 1, "speed": {"points": [[{}, 0.0]]}},
        {"measured_s": None, "speed": {"points": [[{}, 1e-5]]}},
    ],
)
def test_a_damaged_memory_of_how_fast_a_machine_learned_is_none(tmp_path: Path, damage: object) -> None:
    whole = {"measured_s": 1, "speed": {"points": [[{}, 1e-5]]}}
    known.write(tmp_path, {}, Known())
    (path,) = (tmp_path / known.FOLDER).iterdir()
    kept = {**json.loads(path.read_bytes()), "learning": {"float32": whole, "bfloat16": damage}}
    write(path, json.dumps(kept).encode())
    assert set(known.read(tmp_path, {}).learning) == {"float32"}


def test_compiling_pays_in_long_runs_and_never_where_it_is_slower() -> None:
    faster, slower = Compiling(20.0, 1e-4), Compiling(20.0, -1e-4)
    assert [faster.pays(tokens) for tokens in (1e5, 1e6)] == [False, True]
    assert not slower.pays(1e12)


def test_the_compiled_part_depends_on_the_shape_and_not_on_the_vocabulary() -> None:
    model = run_config().model
    shape = known.shape_of(model, "float32")
    assert known.shape_of(dataclasses.replace(model, vocab_size=999, tied_head=False), "float32") == shape
    others = [
        known.shape_of(model, "bfloat16"),
        *(
            known.shape_of(dataclasses.replace(model, **change), "float32")
            for change in ({"emb_dim": 96}, {"drop_rate": 0.1})
        ),
    ]
    assert shape not in others


def test_on_a_gpu_a_long_run_that_keeps_it_busy_is_compiled() -> None:
    tokens_per_s = 200_000.0
    busy, idle = (known.believed(share, tokens_per_s) for share in (0.3, 0.05))
    assert idle is None
    assert busy is not None
    assert [busy.pays(seconds * tokens_per_s) for seconds in (60, 3600)] == [False, True]


def test_a_gpu_that_cannot_compute_is_not_taken_and_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for the CPU alone, told that there is a GPU, fails as one for another kind does: at its first product."""
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch can use a GPU")
    machine.gpu_fault.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="cuda cannot be used") as failed:
        machine.device("cuda")
    assert "CUDA" in failed.value.why
    assert "--device cpu" in failed.value.do
    told: list[Event] = []
    api.train(
        write(tmp_path / "story.txt", STORY),
        out=tmp_path / "run",
        steps=1,
        listener=told.append,
        **{**TINY, "device": "auto"},
    )
    assert any(isinstance(one, Notice) and "the GPU cannot compute" in one.text for one in told)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cpu"])
@pytest.mark.parametrize("has_triton", [True, False])
def test_compiling_is_believed_in_only_of_a_gpu_that_can(
    device: str, has_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: object() if has_triton and name == "triton" else None)
    config = run_config({"preset": "gpt2-124m", "precision": "bfloat16", "device": device})
    rates = Known(rates={"bfloat16": 8e14, "float32": 5e13})
    speed = Speed(((config.model, 1 / 200_000),))  # a fifth of such products
    found = resolve._compiling(config, rates, speed)
    assert (found is not None) == (has_triton and device != "cpu")
    assert resolve._compiling(config, rates, guessed(4e14)) is None  # nothing was measured
    measured = Compiling(1.0, 1e-9)
    shape = known.shape_of(config.model, "bfloat16")
    assert resolve._compiling(config, dataclasses.replace(rates, compiling={shape: measured}), speed) == measured


def test_what_compiling_takes_and_saves_is_counted_in_what_is_expected() -> None:
    config = run_config({"preset": "laptop", "for_s": 600.0, "precision": "float32", "compile": "auto", "batch_size": 8})
    tokens = TokenizedText("bpe", config.model.vocab_size, 1e7, 3e7, 1e6, 2.0)
    here = Machine(guessed(1e11), "float32")
    rate = here.speed.tokens_per_s(config.model)
    plain, expected = resolve._expected(config, tokens, here, Known())
    assert plain.compile == "off"
    shape = known.shape_of(config.model, "float32")
    pays = Known(compiling={shape: Compiling(takes_s=30.0, saves_s=0.5 / rate)})
    compiled, sooner = resolve._expected(config, tokens, here, pays)
    assert compiled.compile == "on"
    assert 1.8 * expected.steps < sooner.steps < 2 * expected.steps  # twice as fast, thirty seconds later
    slower = Known(compiling={shape: Compiling(takes_s=30.0, saves_s=-0.5 / rate)})
    assert resolve._expected(config, tokens, here, slower) == (plain, expected)
    insisted, later = resolve._expected(dataclasses.replace(config, compile="on"), tokens, here, slower)
    assert insisted.compile == "on"
    assert later.steps < expected.steps


def test_a_run_is_compiled_where_that_was_measured_to_pay(
    tmp_path: Path, command: Command, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda features: features)  # the choice is looked at, not the compiler
    monkeypatch.setattr(loss, "_compiled_softmax", lambda: loss._softmax)
    flags = ["--tokenizer=bytes", "--steps=2", "--batch-size=4", "--threads=1", "--precision=float32", "--device=cpu"]
    flags += ["--model.emb-dim=32", "--model.n-heads=2", "--model.n-layers=1", "--model.ff-dim=64"]
    flags += ["--model.context-length=32"]

    def recorded(out: str) -> str:
        assert command("train", text, "--out", out, *flags).code == 0
        return next(line for line in Path(out, "config.toml").read_text().splitlines() if line.startswith("compile"))

    assert recorded("unknown") == 'compile = "off"'
    model = run_config({"model.emb_dim": 32, "model.n_heads": 2, "model.n_layers": 1, "model.ff_dim": 64}).model
    model = dataclasses.replace(model, context_length=32)
    for number, saves_s in enumerate((1.0, 1e-6)):
        with process.threads(1):
            found = Known({}, {known.shape_of(model, "float32"): Compiling(20.0, saves_s)})
            known.write(tmp_path / "cache", machine.key(CPU), found)
        assert recorded(f"known-{number}") == f'compile = "{"on" if saves_s == 1.0 else "off"}"'


def test_bench_measures_whether_compiling_pays_and_keeps_it(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda features: features)
    monkeypatch.setattr(loss, "_compiled_softmax", lambda: loss._softmax)
    monkeypatch.setattr(measure, "STEPS", 1)
    marks = command("bench", "laptop-small", "--compile", "--json").json["marks"]
    assert [mark["what"] for mark in marks] == [
        "compiling, laptop-small",
        "learning, laptop-small",
        "learning, laptop-small, compiled",
    ]
    (kept,) = (here / "cache" / known.FOLDER).iterdir()
    (compiling,) = json.loads(kept.read_text())["compiling"].values()
    assert compiling["takes_s"] == marks[0]["rate"]
