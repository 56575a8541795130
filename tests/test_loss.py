"""The fused head and loss equals the plain one, value and gradient, however it is cut."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from conftest import seeded
from firstwords.model import loss
from firstwords.model.loss import IGNORE, bits_per_byte, perplexity, target_nats, token_nats

B, T, C, V = 2, 7, 12, 50


@pytest.fixture(params=[1, 3, 1000], ids=["chunks of 1", "chunks of 3", "one chunk"])
def inputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    monkeypatch.setattr(loss, "chunk_bytes", lambda table_bytes: 4 * V * request.param)
    monkeypatch.setattr(loss, "PIECE_BYTES", 4 * V * 2)
    generator = seeded(0)
    features = torch.randn(B, T, C, generator=generator, requires_grad=True)
    weight = torch.randn(V, C, generator=generator, requires_grad=True)
    targets = torch.randint(V, (B, T), generator=generator)
    targets[0, 2] = targets[1, 6] = IGNORE
    return features, weight, targets


def plain(features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((features @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")


def test_value_and_gradients_equal_those_of_the_plain_loss(inputs: tuple[torch.Tensor, ...]) -> None:
    features, weight, _ = inputs
    wanted = torch.autograd.grad(plain(*inputs) * 0.3, (features, weight))
    ours = target_nats(*inputs)
    torch.testing.assert_close(ours, plain(*inputs))  # float32 rounding of a sum of 12
    torch.testing.assert_close(torch.autograd.grad(ours * 0.3, (features, weight)), wanted)


def test_the_nats_of_tokens_sum_to_the_loss_and_ignored_ones_are_zero(inputs: tuple[torch.Tensor, ...]) -> None:
    nats = token_nats(*inputs)
    torch.testing.assert_close(nats.sum(), plain(*inputs).detach())
    assert nats[0, 2] == nats[1, 6] == 0
    assert (nats > 0).sum() == B * T - 2


def test_the_forms_for_a_cpu_and_for_a_gpu_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a target that is all but certain, and with one that is so unlikely that the sum of the others is too large."""
    monkeypatch.setattr(loss, "PIECE_BYTES", 4 * 9 * 8)
    rows, head, padding = torch.eye(9), 3 * torch.randn(V, 9, generator=seeded(0)), 14
    head[0, 4], head[0, 5] = 300.0, -300.0
    targets = torch.tensor([0, 7, IGNORE, V - 1, 0, 0, 1, 2, 3])
    padded = F.pad(rows @ head.T, (0, padding))
    wanted, counted = torch.zeros(9), targets != IGNORE
    wanted[counted] = loss._nats_on_cpu(padded[counted, :V], targets[counted])
    torch.testing.assert_close(loss._nats_on_gpu(padded.clone(), targets, V, loss._softmax, gradient=False), wanted)
    torch.testing.assert_close(loss._nats_on_gpu(padded, targets, V, loss._softmax, gradient=True), wanted)
    assert not padded[:, V:].any()  # so that products may count them
    for certain in (False, True):  # alone, no sum is too large
        chosen = slice(0, 5) if certain else slice(0, 9)
        logits = (head @ rows[chosen].T).T
        nats, scale = loss._nats_vocab_major(logits, targets[chosen], rows[chosen], head)
        torch.testing.assert_close(nats, wanted[chosen])  # float32 rounding of an exponential
        torch.testing.assert_close(logits * scale, padded[chosen, :V])
        assert nats[2] == 0


@pytest.mark.parametrize("padding", [0, 14])
def test_padding_of_the_head_changes_nothing(
    inputs: tuple[torch.Tensor, ...], padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    features, weight, targets = inputs
    wanted = torch.autograd.grad(plain(*inputs), (features, weight))
    monkeypatch.setattr(loss, "_padded_head", lambda head, dtype: F.pad(head.to(dtype), (0, 0, 0, padding)))
    monkeypatch.setattr(loss, "_on_cpu", lambda _: False)
    ours = target_nats(*inputs)
    torch.testing.assert_close(ours, plain(*inputs))
    torch.testing.assert_close(torch.autograd.grad(ours, (features, weight)), wanted)
    nats, ranks = loss.token_figures(*inputs)
    torch.testing.assert_close(nats.sum(), ours.detach())
    logits = features @ weight.T
    own = logits.gather(-1, targets.clamp(min=0)[..., None])
    assert torch.equal(ranks, ((logits > own).sum(-1) + 1) * (targets != IGNORE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_token_has_a_rank_of_its_own_and_the_first_is_argmax_s(dtype: torch.dtype) -> None:
    features, weight = torch.ones(V, 1, dtype=dtype), torch.randn(V, 1, generator=seeded(0)).to(dtype)
    weight[7:11] = weight.max()  # more than one would be the first choice
    weight[20:22] = 0.0
    _, ranks = loss.token_figures(features, weight, torch.arange(V))
    logits = weight[:, 0]
    assert sorted(ranks.tolist()) == list(range(1, V + 1))
    assert ranks[logits.argmax()] == 1
    assert torch.equal(ranks.argsort(), logits.sort(descending=True, stable=True).indices)


def test_all_chunks_logits_stand_in_the_same_memory(
    inputs: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    for name in ("_nats_on_cpu", "_nats_vocab_major"):
        nats_of = getattr(loss, name)

        def nats(logits: torch.Tensor, *given: torch.Tensor, nats_of: Callable[..., object] = nats_of) -> object:
            held.append(logits)  # what is held is not free for the next chunk
            return nats_of(logits, *given)

        monkeypatch.setattr(loss, name, nats)
    for figure in (target_nats, token_nats):
        held.clear()
        figure(*inputs)
        assert len({logits.data_ptr() for logits in held}) == 1 <= len(held)


def test_a_second_backward_is_refused_instead_of_being_wrong(inputs: tuple[torch.Tensor, ...]) -> None:
    nats = target_nats(*inputs)
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already"):
        nats.backward()


def test_bfloat16_products_stay_within_their_own_error(inputs: tuple[torch.Tensor, ...]) -> None:
    features, weight, _ = inputs
    exact = torch.autograd.grad(target_nats(*inputs), (features, weight))
    with torch.autocast("cpu", torch.bfloat16):
        rough_nats = target_nats(*inputs)
    rough = torch.autograd.grad(rough_nats, (features, weight))
    assert rough_nats.item() == pytest.approx(plain(*inputs).item(), rel=0.01)  # 8 bits: 0.4 % a logit
    for a, b in zip(rough, exact, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("low", [False, True])
def test_an_all_but_impossible_target_has_finite_nats_and_gradients(low: bool) -> None:
    """Its probability is 0 in float32; the numbers here are exact in bfloat16 too."""
    features, weight = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[1.0], [0.0], [-1.0]])
    for target, nats in ((0, 0.0), (1, 200.0), (2, 400.0)):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            ours = target_nats(features, weight, torch.tensor([target]))
        assert ours.item() == pytest.approx(nats, abs=1e-4)
        (gradient,) = torch.autograd.grad(ours, features)
        assert gradient.item() == pytest.approx(1 - weight[target].item())  # the likely word's less the target's
        assert token_nats(features, weight, torch.tensor([target])).item() == pytest.approx(nats, abs=1e-4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="fit"):
        target_nats(torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 4, dtype=torch.long))


def test_a_uniform_model_over_bytes_costs_eight_bits_a_byte() -> None:
    assert bits_per_byte(nats=100 * math.log(256), n_bytes=100) == pytest.approx(8.0)
    assert perplexity(math.log(256)) == pytest.approx(256.0)
    assert perplexity(1e6) == math.inf
