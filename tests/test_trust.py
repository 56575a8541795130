"""A device that computes something else is noticed before the first step and left; memory that runs out ends no run."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from command import TINY_FLAGS, Command
from conftest import STORY, TINY, journal, seeded
from firstwords import api
from firstwords.config import ModelConfig, run_config
from firstwords.events import Notice, Told
from firstwords.model import loss
from firstwords.model.gpt import GPTModel
from firstwords.planning import machine, trust
from firstwords.planning.trust import Way
from firstwords.presets import presets
from firstwords.runs.folder import RunFolder
from firstwords.text.batches import Batch
from firstwords.training.state import TrainState, new_state

BFLOAT16 = Way("cpu", "bfloat16", "off")
FLOAT32 = Way("cpu", "float32", "off")


def a_batch(config: ModelConfig, rows: int = 4) -> Batch:
    ids = torch.randint(config.vocab_size, (rows, config.context_length), generator=seeded(1))
    return Batch(ids, ids.roll(-1, 1), ids.numel())


def a_model(config: ModelConfig, seed: int = 0) -> GPTModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTModel(config)


def rounded(x: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(x.float())
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).to(x.dtype)


@contextmanager
def products_of(bits: int) -> Iterator[None]:
    """Let every layer's product lose accuracy inside, as a faulty kernel would, on its way forward and back."""
    whole = F.linear

    def faulty(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = whole(x, weight, bias)
        lost = rounded(y.detach(), bits) - y.detach()
        return y + lost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", faulty)
        yield


def shape(name: str) -> ModelConfig:
    config = run_config({"preset": name})
    changes = {"vocab_size": 2048, "context_length": 32, "n_layers": min(4, config.model.n_layers)}
    return dataclasses.replace(config.model, **changes)


def of_width(name: str, width: int) -> ModelConfig:
    return dataclasses.replace(shape(name), emb_dim=width, n_heads=4)


@pytest.mark.parametrize("name", presets())
def test_bfloat16_is_trusted_on_every_preset(name: str) -> None:
    config = shape(name) if name.startswith("laptop") else of_width(name, 128)
    found = trust.check(a_model(config), a_batch(config), BFLOAT16)
    assert found is not None
    assert found.problem == ""
    assert 1e-4 < found.gradient_difference < trust.LIMITS["bfloat16"] / 2  # its own rounding, seen and far from refused


@pytest.mark.parametrize("name", ["laptop-small", "laptop", "laptop-large", "gpt2-124m"])
def test_products_that_lose_accuracy_are_refused(name: str) -> None:
    config = shape(name) if name.startswith("laptop") else of_width(name, 128)
    with products_of(bits=2):
        found = trust.check(a_model(config), a_batch(config), BFLOAT16)
    assert found is not None
    assert found.problem.startswith("cpu in bfloat16: gradients differ by ")
    assert found.gradient_difference > 0.1


def test_a_compiled_model_computes_a_whole_batch_of_which_only_the_beginning_counts(
    small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, rows = list[torch.Size](), 4

    def compiled(features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda tokens: (seen.append(tokens.shape), features(tokens))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(loss, "_compiled_softmax", lambda: loss._softmax)
    config = dataclasses.replace(small, context_length=128)
    batch = a_batch(config, rows)
    found = trust.check(a_model(config), batch, Way("cpu", "float32", "on"))
    assert found is not None
    assert found.problem == ""
    assert found.gradient_difference < 1e-5  # float32's rounding: the same targets counted
    assert seen == [batch.tokens.shape]


def test_the_reference_needs_no_check(small: ModelConfig) -> None:
    assert trust.check(a_model(small), a_batch(small), FLOAT32) is None


def test_a_model_that_is_broken_already_says_nothing_about_the_device(small: ModelConfig) -> None:
    model = a_model(small)
    torch.nn.init.constant_(model.tok_emb.weight, math.nan)
    assert trust.check(model, a_batch(small), BFLOAT16) is None


@pytest.mark.parametrize("context_length", [1, 2, 200])
def test_contexts_of_any_length_can_be_checked(small: ModelConfig, context_length: int) -> None:
    config = dataclasses.replace(small, context_length=context_length)
    found = trust.check(a_model(config), a_batch(config, rows=100 if context_length < 3 else 1), BFLOAT16)
    assert found is not None
    assert found.problem == ""


@pytest.mark.parametrize("training", [True, False])
def test_a_check_changes_nothing(small: ModelConfig, training: bool) -> None:
    config = dataclasses.replace(small, drop_rate=0.3)
    model = a_model(config).train(training)
    model.tok_emb.weight.grad = torch.ones_like(model.tok_emb.weight)
    before, modules = copy.deepcopy(model.state_dict()), [(m.training, getattr(m, "p", None)) for m in model.modules()]
    random = torch.get_rng_state()
    found = [trust.check(model, a_batch(config), BFLOAT16) for _ in range(2)]
    assert dataclasses.replace(found[0], took_s=0.0) == dataclasses.replace(found[1], took_s=0.0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [(m.training, getattr(m, "p", None)) for m in model.modules()] == modules
    assert {name: p.grad.mean().item() for name, p in model.named_parameters() if p.grad is not None} == {
        "tok_emb.weight": 1
    }


@pytest.mark.parametrize("damage", ["nan", "a gradient of another sign", "only one layer's queries", "the loss alone"])
def test_what_differs_is_noticed_however_small_its_place(
    small: ModelConfig, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = trust._gradients
    calls = []

    def faulty(*arguments: Any, **named: bool) -> tuple[float, dict[str, Tensor]]:
        loss, gradients = forms(*arguments, **named)
        calls.append(None)
        if len(calls) == 1:  # the reference
            return loss, gradients
        if damage == "the loss alone":
            return 1.1 * loss, gradients
        name = {"nan": "final_norm.scale", "only one layer's queries": "trf_blocks.1.att.W_query.weight"}.get(damage)
        wrong = {"nan": math.nan}.get(damage, -1.0)
        return loss, {key: g * wrong if name in (None, key) else g for key, g in gradients.items()}

    monkeypatch.setattr(trust, "_gradients", faulty)
    found = trust.check(a_model(small), a_batch(small), BFLOAT16)
    assert found is not None
    assert found.problem


def begun(config: ModelConfig, way: Way, insist: bool = False) -> tuple[Way, list[str]]:
    notices: list[str] = []

    def start(way: Way) -> TrainState:
        return new_state(config, run_config().optim, 1, "cpu", torch.float32)

    arguments: tuple[Callable[[Way], TrainState], Batch, Way] = (start, a_batch(config), way)
    taken, _, _ = trust.first_trusted_state(*arguments, lambda: "bfloat16", insist=insist, notice=notices.append)
    return taken, notices


def test_what_fails_is_left_for_what_is_safer_and_said_in_one_line(small: ModelConfig) -> None:
    assert begun(small, BFLOAT16) == (BFLOAT16, [])
    with products_of(bits=1):
        taken, (line,) = begun(small, BFLOAT16)
        assert taken == FLOAT32
        assert line.startswith("cpu in bfloat16: gradients differ by ")
        assert line.endswith(" % from float32 on the CPU; training on cpu in float32 instead, --trust-device true to insist")
        assert begun(small, BFLOAT16, insist=True)[0] == BFLOAT16


def test_what_cannot_be_compiled_is_trained_as_it_is(small: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(features: Any) -> Callable[[Tensor], Tensor]:
        def first_call(tokens: Tensor) -> Tensor:
            raise RuntimeError("No working C++ compiler found\nand much more")

        return first_call

    monkeypatch.setattr(torch, "compile", no_compiler)
    for insist in (False, True):
        taken, (line,) = begun(small, Way("cpu", "float32", "on"), insist)
        assert taken == FLOAT32
        assert line == (
            "cpu in float32, compiled: cannot do a training step (No working C++ compiler found);"
            " training on cpu in float32 instead"
        )


TRAINED = {**TINY, "precision": "bfloat16", "steps": 3}


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    return path


def test_a_run_on_a_faulty_device_trains_in_float32_and_records_it(story: Path, tmp_path: Path) -> None:
    told: list[Told] = []
    with products_of(bits=1):
        result = api.train(story, out=tmp_path / "faulty", listener=told.append, **TRAINED)
    assert result.precision == "float32"
    assert sum("--trust-device" in notice.text for notice in told if isinstance(notice, Notice)) == 1
    assert 'precision = "float32"' in RunFolder(tmp_path / "faulty").config.read_text()
    (line,) = journal(tmp_path / "faulty", "start")
    assert [check["ok"] for check in line["checks"]] == [False]


def test_a_run_on_a_good_device_is_that_of_a_run_without_a_check(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = api.train(story, out=tmp_path / "checked", **TRAINED)
    (line,) = journal(tmp_path / "checked", "start")
    assert [check["ok"] for check in line["checks"]] == [True]
    monkeypatch.setattr(trust, "check", lambda *_: None)
    assert api.train(story, out=tmp_path / "unchecked", **TRAINED).weights_sha256 == checked.weights_sha256


def test_a_resumed_run_is_checked_on_the_device_that_it_goes_on_with(story: Path, tmp_path: Path) -> None:
    api.train(story, out=tmp_path / "run", **TRAINED)
    with products_of(bits=1):
        api.train(out=tmp_path / "run", resume=True, steps=4)
        api.train(out=tmp_path / "run", resume=True, steps=5, precision="bfloat16", trust_device=True)
    first, second = journal(tmp_path / "run", "resume")
    assert [line["checks"][0]["ok"] for line in (first, second)] == [False, False]
    config = RunFolder(tmp_path / "run").config.read_text()
    assert 'precision = "bfloat16"' in config  # of the second, which insisted


@contextmanager
def memory_for(rows: int) -> Iterator[list[int]]:
    """Let the device's memory run out inside where a micro-batch has more rows; yields the sizes that were tried."""
    features, tried = GPTModel.features, list[int]()

    def within(self: GPTModel, tokens: Tensor, *cached: Any) -> Tensor:
        if not self.training or cached or tokens.shape[1] < self.config.context_length:
            return features(self, tokens, *cached)
        tried.append(len(tokens))
        if len(tokens) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return features(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPTModel, "features", within)
        yield tried


def test_memory_that_runs_out_halves_the_micro_batch_and_the_run_goes_on(story: Path, tmp_path: Path) -> None:
    options = {**TINY, "steps": 4, "batch_size": 12, "micro_batch_size": 12, "model": {**TINY["model"], "drop_rate": 0.0}}
    whole = api.train(story, out=tmp_path / "whole", **options)
    told: list[Told] = []
    with memory_for(rows=3) as tried:
        cut = api.train(story, out=tmp_path / "cut", listener=told.append, **options)
    assert tried[:3] == [12, 6, 3]
    assert set(tried[2:]) == {3}
    assert [line["micro_batch_size"] for line in journal(tmp_path / "cut", "memory")] == [6, 3]
    assert sum("memory ran out" in notice.text for notice in told if isinstance(notice, Notice)) == 2
    losses = [
        [(line["nats_per_token"], line["grad_norm"]) for line in journal(tmp_path / n, "step")] for n in ("whole", "cut")
    ]
    for ours, wanted in zip(losses[1], losses[0], strict=True):
        assert ours == pytest.approx(wanted, rel=1e-3)  # Muon's and AdamW's first steps amplify the order of float32 sums
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)  # the first gradient: only the order of its sums differs
    assert (cut.steps, cut.tokens) == (whole.steps, whole.tokens)
    with memory_for(rows=3) as tried:
        api.train(out=tmp_path / "cut", resume=True, steps=5)
    assert set(tried) == {3}


def test_memory_that_not_even_one_sequence_has_ends_the_run_with_what_to_do(
    command: Command, text: Path, tmp_path: Path
) -> None:
    with memory_for(rows=0):
        ended = command("train", text, "--out", tmp_path / "run", *TINY_FLAGS)
    assert ended.code == 78
    assert "memory ran out" in ended.err
    assert "--model.context-length" in ended.err


def test_a_run_that_leaves_a_gpu_learns_from_as_much_at_once_as_a_cpu_should(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpu_bytes", lambda where: 80 << 30)  # as if there were one
    options, begun = {**TINY, "steps": 1, "batch_size": 512}, trust.first_trusted_state

    def left(*given: Any, **named: Any) -> tuple[Way, TrainState, list[trust.Check]]:
        way, state, _ = begun(*given, **named)
        failed = trust.Check(way, math.inf, math.inf, "", 0.0, failed="it is broken")
        return dataclasses.replace(way, device="cpu:0"), state, [failed]

    def micro_batch_size(name: str, **more: Any) -> str:
        api.train(story, out=tmp_path / name, **options, **more)
        lines = RunFolder(tmp_path / name).config.read_text().splitlines()
        return next(line for line in lines if line.startswith("micro_batch_size"))

    assert micro_batch_size("stays") == "micro_batch_size = 512"
    monkeypatch.setattr(trust, "first_trusted_state", left)
    assert micro_batch_size("leaves") == "micro_batch_size = 256"
    assert micro_batch_size("named", micro_batch_size=512) == "micro_batch_size = 512"
