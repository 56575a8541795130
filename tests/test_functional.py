"""What is written out by hand equals PyTorch's own composition, value and gradient, in each precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import seeded
from firstwords.model import functional
from firstwords.model.functional import causal_attention, drop, linear, rms_norm, rotate
from firstwords.planning import process

B, H, T, D = 2, 3, 12, 8
Operation = Callable[..., Tensor]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype, requires_grad=True)


def with_gradients(operation: Operation, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    y = operation(*inputs)
    upstream = torch.randn(y.shape, generator=seeded(9)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, inputs, upstream)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("queries_at_once", [5, 12, 100], ids=["three parts", "one part", "fewer tokens than a part"])
def test_attention_by_products_is_as_near_to_the_exact_one_as_the_fused_kernel(
    queries_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "QUERIES_AT_ONCE", queries_at_once)
    inputs = tuple(drawn(B, H, T, D, dtype=torch.float64, seed=seed) for seed in range(3))
    rough = tuple(x.detach().bfloat16().requires_grad_() for x in inputs)
    exact = with_gradients(plain_attention, tuple(x.detach().double().requires_grad_() for x in rough))
    ours, fused = with_gradients(causal_attention, rough), with_gradients(plain_attention, rough)
    for a, b, c in zip(ours, fused, exact, strict=True):
        assert error(a, c) < 0.01  # bfloat16 has 8 bits, 0.4 % of a number
        assert error(a, c) < 2 * error(b, c)


@pytest.mark.parametrize("queries_at_once", [5, 12], ids=["three parts", "one part"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_gradient_of_attention_by_products_is_that_of_its_formula(
    queries_at_once: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "QUERIES_AT_ONCE", queries_at_once)
    inputs = tuple(drawn(1, 2, T, 4, dtype=torch.float64, seed=seed) for seed in range(3))  # each number is moved by itself

    def seeded_attention(*x: Tensor) -> Tensor:
        torch.manual_seed(0)  # so that the same is dropped each time
        return functional._attention_by_products(*x, dropout)

    assert torch.autograd.gradcheck(seeded_attention, inputs)


def test_probabilities_are_kept_in_float32_only_of_few_tokens_and_to_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "FEW_TOKENS", T)
    asked, by_products = [], functional._attention_by_products
    monkeypatch.setattr(functional, "_attention_by_products", lambda *x: asked.append(x[0]) or by_products(*x))

    def asks(tokens: int, dtype: torch.dtype) -> bool:
        asked.clear()
        causal_attention(*(drawn(B, H, tokens, D, seed=seed).to(dtype) for seed in range(3)))
        return bool(asked)

    assert [asks(tokens, torch.float32) for tokens in (T, T + 1)] == [True, False]
    assert asks(T + 1, torch.bfloat16)
    with torch.no_grad():
        assert [asks(T, dtype) for dtype in (torch.float32, torch.bfloat16)] == [False, True]


def test_no_token_sees_a_later_one_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "QUERIES_AT_ONCE", 5)
    q, k, v = (drawn(B, H, T, D, seed=seed).detach().bfloat16() for seed in range(3))
    before = causal_attention(q, k, v)
    for x in (k, v):
        x[:, :, 7:] = 100.0
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.equal(before[:, :, 7:], after[:, :, 7:])


def test_new_tokens_see_those_before_and_themselves() -> None:
    q, k, v = (drawn(B, H, T, D, seed=seed) for seed in range(3))
    whole = causal_attention(q, k, v)
    torch.testing.assert_close(causal_attention(q[:, :, 9:], k, v), whole[:, :, 9:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_drops_as_many_probabilities_as_asked(dtype: torch.dtype) -> None:
    q, k = torch.zeros(2, B, H, 200, D).to(dtype)
    v = torch.eye(200).expand(B, H, 200, 200).to(dtype)  # so that what comes out is the probabilities
    dropped = causal_attention(q, k, v, dropout=0.25)
    share = float((dropped[:, :, -1] == 0).float().mean())
    assert share == pytest.approx(0.25, abs=0.06)  # of 1,200 draws: five standard deviations
    assert not (causal_attention(q, k, v)[:, :, -1] == 0).any()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_as_many_as_asked_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    y = drop(x, rate)
    assert float((y == 0).float().mean()) == pytest.approx(rate, abs=0.003)  # of a million draws: six standard deviations
    assert y.max().item() == pytest.approx(1 / (1 - rate))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
    torch.manual_seed(0)
    assert torch.equal(drop(x, rate), y)
    assert not torch.equal(drop(x, rate), y)
    lag_1 = torch.corrcoef((y.detach() == 0).float().flatten().unfold(0, 2, 1).T)[0, 1]
    assert abs(float(lag_1)) < 0.006  # neighbours come from the bits of one number and must not know of each other


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.01)], ids=str
)  # a few times what the type can tell apart
def test_rms_norm_equals_pytorch_s(dtype: torch.dtype, tolerance: float) -> None:
    x, scale = drawn(4, 5, 24, dtype=torch.float64), drawn(24, dtype=torch.float64, seed=1)
    exact = with_gradients(lambda x, scale: F.rms_norm(x, (24,), scale, 1e-6), (x, scale))
    wide = torch.promote_types(dtype, torch.float32)
    inputs = x.detach().to(dtype).requires_grad_(), scale.detach().to(wide).requires_grad_()
    for a, b in zip(with_gradients(lambda x, scale: rms_norm(x, scale, 1e-6), inputs), exact, strict=True):
        assert error(a, b) < tolerance


def test_the_gradient_of_rms_norm_holds_for_parts_of_a_tensor() -> None:
    """A query is a part of a product, not contiguous."""
    x, scale = drawn(4, 5, 3, 8, dtype=torch.float64), drawn(8, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda x, scale: rms_norm(x[:, :, 1:].transpose(1, 2), scale, 1e-6), (x, scale))


def tables(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the angles (T, D/2) as `rotate` takes them."""
    return torch.cat((angles.cos(), angles.cos()), dim=-1), torch.cat((-angles.sin(), angles.sin()), dim=-1)


def test_the_gradient_of_a_rotation_is_the_rotation_back() -> None:
    angles = drawn(T, D // 2, dtype=torch.float64).detach()
    x = drawn(B, H, T, D, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, *tables(angles)), (x,))
    turned = rotate(x, *tables(angles))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[..., 0], x[..., 0] * angles[:, 0].cos() - x[..., D // 2] * angles[:, 0].sin())


@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [2, functional.FEW_ROWS])
def test_layers_together_give_what_each_gives(
    rows: int, dtype: torch.dtype, activation: Any, monkeypatch: pytest.MonkeyPatch, *, bias: bool
) -> None:
    monkeypatch.setattr(functional, "PIECE_NUMBERS", 100)  # of 384 where the rows are not few
    torch.manual_seed(0)
    layers = [nn.Linear(6, width, bias=bias) for width in (4, 3, 5)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    x = drawn(2, rows // 2, 12 if activation == "swiglu" else 6)

    def each(x: Tensor, *_: Tensor) -> Tensor:
        act = {
            "none": lambda x: x,
            "gelu": lambda x: F.gelu(x, approximate="tanh"),
            "swiglu": lambda x: F.silu(x[..., :6]) * x[..., 6:],
        }
        activated = act[activation](x)
        return torch.cat([layer(activated) for layer in layers], dim=-1)

    def together(x: Tensor, *_: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return linear(x, layers, activation)

    everything = (x, *parameters)
    exact = with_gradients(each, everything)
    for a, b in zip(with_gradients(together, everything), exact, strict=True):
        assert error(a, b) < (1e-6 if dtype == torch.float32 else 0.012)  # 8 bits in each of a few roundings


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 2e-14), (torch.float32, 5e-6), (torch.bfloat16, 2**-8)], ids=str
)
def test_gelu_in_pieces_equals_pytorch_s_and_so_does_its_gradient(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 - σ is known to the last digit of 1 and taken up to forty times, as in PyTorch; bfloat16 is rounded at the end."""
    monkeypatch.setattr(functional, "PIECE_NUMBERS", 100)
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64).to(dtype).view(7, 143).T  # no multiple, and not in order
    d_y = drawn(*x.shape, dtype=torch.float64).detach().to(dtype)
    exact_x = x.double().requires_grad_()
    exact = F.gelu(exact_x, approximate="tanh")
    exact_d_x = torch.autograd.grad(exact, exact_x, d_y.double())[0]
    with torch.no_grad():
        alone = functional.gelu(x)
        y, d_x = functional._gelu_and_gradient(x, d_y.clone())
    assert torch.equal(y, alone)
    for a, b in ((y, exact), (d_x, exact_d_x)):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2 * tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_for_the_gradient_is_only_what_a_layer_was_given(dtype: torch.dtype, activation: Any) -> None:
    """No copy of the weights in low precision, and not what the activation gave."""
    layer, kept = nn.Linear(64, 64), set[int]()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    x = drawn(128, 128 if activation == "swiglu" else 64).detach().to(dtype).requires_grad_()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        linear(x, [layer], activation)
    assert kept == {tensor.untyped_storage().data_ptr() for tensor in (x, layer.weight, layer.bias)}


def test_a_compiled_block_uses_pytorch_s_own_operations() -> None:
    """What a compiler fuses is faster than what is written by hand; both must say the same."""
    x, scale = drawn(4, 5, 24), drawn(24, seed=1)
    compiled = torch.compile(rms_norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, scale, 1e-6), rms_norm(x, scale, 1e-6))
    angles = drawn(T, D // 2).detach()
    q = drawn(B, H, T, D)
    turned = torch.compile(rotate, backend="eager", fullgraph=True)(q, *tables(angles))
    torch.testing.assert_close(turned, rotate(q, *tables(angles)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_gradient_the_same_comes_to_the_last_bit(dtype: torch.dtype) -> None:
    x, scale, q = drawn(4, 5, 24).to(dtype), drawn(24, seed=1), drawn(B, H, T, D, seed=2).to(dtype)
    angles = tables(drawn(T, D // 2).detach())
    learning = rms_norm(x, scale, 1e-6), rotate(q, *angles)
    assert all(tensor.requires_grad for tensor in learning)
    with torch.no_grad():
        speaking = rms_norm(x, scale, 1e-6), rotate(q, *angles)
    assert all(torch.equal(*pair) for pair in zip(learning, speaking, strict=True))


@pytest.mark.parametrize("shape", [(1021, 257), (768, 1024)], ids=["prime", "a multiple"])
@pytest.mark.parametrize("lead", [(1,), (1, 1), (3, 7)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_of_a_large_layer_come_to_the_same_in_parts(
    shape: tuple[int, int], lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, *, bias: bool
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(shape[1], shape[0], bias=bias), torch.randn(*lead, shape[1])
    parts, whole = [], functional._in_parts
    monkeypatch.setattr(functional, "_in_parts", lambda *given: parts.append(given[2]) or whole(*given))
    with torch.no_grad(), process.threads(2):
        found = linear(x, [layer])
        assert found.shape == (*lead, shape[0])
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)  # sums of some hundred numbers near 1, in float32
    assert parts == [1 << (shape[0] * shape[1] // functional.PART_NUMBERS).bit_length() - 1]


def test_one_core_and_a_gradient_have_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_in_parts", lambda *_: pytest.fail("in parts"))
    layer, x = nn.Linear(1024, 512), torch.randn(1, 1024)
    with torch.no_grad(), process.threads(1):
        assert torch.equal(linear(x, [layer]), layer(x))
    with process.threads(2):
        linear(x, [layer]).sum().backward()
        with torch.no_grad(), pytest.raises(pytest.fail.Exception):
            linear(x, [layer])  # the negative control
