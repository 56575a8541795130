"""What is the same on a GPU, and what a GPU decides; left out where there is none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import STORY, TINY, journal, seeded
from firstwords import api
from firstwords.config import ModelConfig, run_config
from firstwords.events import Notice, Told
from firstwords.model import loss
from firstwords.model.loss import IGNORE, target_nats, token_figures
from firstwords.planning import machine, matmul, trust
from firstwords.planning.trust import Way
from firstwords.training import state as states
from test_trust import a_batch, a_model, products_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: no GPU here"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),  # of PyTorch's own compiler
    pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning"),  # it advises less accuracy
]
GPU = torch.device("cuda")
WIDE = {"vocab_size": 5003, "context_length": 128, "emb_dim": 256, "n_heads": 4, "n_layers": 2, "ff_dim": 512}
ON_GPU = {**TINY, "device": "cuda", "batch_size": 16, "steps": 12}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(torch.dist(found.cpu().float(), wanted.float()) / torch.linalg.vector_norm(wanted.float()))


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    return path


@pytest.fixture(params=["gpt2", "qwen3"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return dataclasses.replace(run_config({"preset": "laptop"}).model, block=request.param, **WIDE)


@pytest.mark.parametrize("rows_at_once", [1500, 217])  # in the second case the last chunk is smaller
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])  # their own rounding
def test_loss_and_gradients_are_those_of_the_plain_loss(
    compiled: bool, dtype: torch.dtype, limit: float, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    C, V = 64, 5003  # no multiple of what a GPU likes
    total = torch.cuda.get_device_properties(GPU).total_memory
    monkeypatch.setattr(loss, "GPU_CHUNK_SHARE", rows_at_once * (V + loss.ALIGNED) * dtype.itemsize / total)
    features, weight = (torch.randn(*shape, generator=seeded(0)) for shape in ((3, 500, C), (V, C)))
    targets = torch.randint(V, (3, 500), generator=seeded(1))
    targets[1, 7:400] = IGNORE
    given = [tensor.requires_grad_() for tensor in (features, weight)]
    wanted = F.cross_entropy((features @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    wanted_gradients = torch.autograd.grad(wanted, given)
    ours = [tensor.detach().to(GPU).requires_grad_() for tensor in given]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        nats = target_nats(ours[0], ours[1], targets.to(GPU), compiled=compiled)
        single, ranks = token_figures(ours[0], ours[1], targets.to(GPU))
    assert nats.item() == pytest.approx(wanted.item(), rel=limit)
    assert single.sum().item() == pytest.approx(wanted.item(), rel=limit)
    logits = features @ weight.T
    own = logits.gather(-1, targets.clamp(min=0)[..., None])
    wanted_ranks = ((logits > own).sum(-1) + 1) * (targets != IGNORE)
    apart = (ranks.cpu() - wanted_ranks).abs().float().mean()
    assert apart < (0.1 if dtype == torch.float32 else 50)  # of 5,003: bfloat16 moves logits, and makes some equal
    assert bool(((ranks == 0).cpu() == (targets == IGNORE)).all())
    for found, gradient in zip(torch.autograd.grad(nats, ours), wanted_gradients, strict=True):
        assert relative(found, gradient) < limit


def test_features_are_those_of_the_processor(config: ModelConfig) -> None:
    model, tokens = a_model(config).eval(), a_batch(config).tokens
    wanted = model.features(tokens).detach()
    assert relative(model.to(GPU).features(tokens.to(GPU)).detach(), wanted) < 1e-5  # float32's own rounding


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_the_gpu_computes_is_trusted(config: ModelConfig, precision: str, compiled: str) -> None:
    found = trust.check(a_model(config).to(GPU), a_batch(config, rows=8), Way("cuda", precision, compiled))  # type: ignore[arg-type]
    assert found is not None
    assert found.problem == ""
    assert found.gradient_difference > 1e-8  # something was compared


def test_products_that_lose_accuracy_are_refused_on_the_gpu(config: ModelConfig) -> None:
    with products_of(bits=2):
        found = trust.check(a_model(config).to(GPU), a_batch(config), Way("cuda", "bfloat16", "off"))
    assert found is not None
    assert "gradients differ by" in found.problem


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_found_on_the_gpu(config: ModelConfig, value: float) -> None:
    state = states.new_state(config, run_config().optim, 0, "cuda", torch.float32)
    assert bool(states.all_finite(state))
    state.model.trf_blocks[1].att.out_proj.weight.data[3, 4] = value  # type: ignore[union-attr, index]
    assert not bool(states.all_finite(state))


def test_a_gpu_with_instructions_for_bfloat16_uses_them() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("NOT RUN: this GPU has none")
    assert matmul.precision("auto", machine.device("auto")) == "bfloat16"


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_run_learns_goes_on_and_speaks(story: Path, tmp_path: Path, compiled: str) -> None:
    options = {**ON_GPU, "precision": "bfloat16", "compile": compiled, "report": True}
    whole = api.train(story, out=tmp_path / "whole", **options)
    api.train(story, out=tmp_path / "parts", **(options | {"steps": 6}))
    api.train(out=tmp_path / "parts", resume=True, steps=12)
    assert (tmp_path / "whole/report.html").is_file()
    losses = [[line["nats_per_token"] for line in journal(tmp_path / name, "step")] for name in ("whole", "parts")]
    assert losses[0][-1] < losses[0][0] - 0.5
    assert whole.steps == len(losses[0]) == len(losses[1]) == 12
    assert api.load(tmp_path / "whole").generate("One", max_new_tokens=5)


def test_memory_that_really_runs_out_halves_the_micro_batch(story: Path, tmp_path: Path) -> None:
    shape = {**TINY["model"], "context_length": 512, "emb_dim": 512, "n_layers": 4, "ff_dim": 2048}
    options = {**ON_GPU, "steps": 3, "batch_size": 256, "micro_batch_size": 256, "model": shape}
    told: list[Told] = []
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(3e9 / total)
    try:
        api.train(story, out=tmp_path / "run", listener=told.append, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(journal(tmp_path / "run", "step")) == 3
    assert journal(tmp_path / "run", "memory")
    assert any("memory ran out" in notice.text for notice in told if isinstance(notice, Notice))
