"""The linear function against torch's own, with everything it can be asked for."""

import pytest
import torch
from torch.nn import functional as F

from parallel import matmul
from parallel.matmul import Again, linear, packed_weights, product_nt, product_nt_fp32, product_nt_plus


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "gaps", "thin"])
def test_product_of_any_strides(layout: str) -> None:
    """fp64 reference; 1e-5 of the largest value."""
    a, b = torch.randn(33, 47), torch.randn(21, 47)
    if layout == "nn":
        b = torch.randn(47, 21).t()
    if layout == "tn":
        a, b = torch.randn(47, 33).t(), torch.randn(47, 21).t()
    if layout == "gaps":
        a, b = torch.randn(33, 60)[:, 5:52], torch.randn(21, 60)[:, 5:52]
    if layout == "thin":
        a, b = torch.randn(1, 47), torch.randn(2, 47)
    expected = a.double() @ b.double().t()
    torch.testing.assert_close(product_nt(a, b).double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_product_of_nothing_is_empty_or_zero() -> None:
    assert product_nt(torch.empty(0, 4), torch.ones(3, 4)).shape == (0, 3)
    assert torch.equal(product_nt(torch.empty(2, 0), torch.empty(3, 0)), torch.zeros(2, 3))


@pytest.mark.parametrize("how", ["onednn", "gaps", "without onednn", "fp64"])
@pytest.mark.parametrize("times", [False, True])
def test_product_with_bias_and_factor(monkeypatch: pytest.MonkeyPatch, how: str, times: bool) -> None:
    """fp64 reference; 1e-5."""
    torch.manual_seed(5)
    monkeypatch.setattr(matmul, "_ONEDNN", matmul._ONEDNN and how != "without onednn")
    a, b, bias = torch.randn(33, 47), torch.randn(21, 60)[:, 5:52], torch.randn(21)
    factor = torch.randn(33, 21) if times else None
    expected = (a.double() @ b.double().t() + bias.double()) * (1.0 if factor is None else factor.double())
    if how != "gaps":
        b = b.contiguous()
    if how == "fp64":
        a, b, bias = a.double(), b.double(), bias.double()
        factor = None if factor is None else factor.double()
    found = product_nt_plus(a, b, bias, factor)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_half_precision_product_is_not_rounded() -> None:
    a, b = torch.randn(8, 300).bfloat16(), torch.randn(5, 300).bfloat16()
    torch.testing.assert_close(product_nt_fp32(a, b), a.float() @ b.float().t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_linear_equals_torch(bias: bool, residual: bool) -> None:
    """fp64 reference gradients, 1e-5 of the largest value."""
    leaves = [torch.randn(12, 7), torch.randn(5, 7), torch.randn(5) if bias else None, torch.randn(12, 5)]
    leaves = [leaf.requires_grad_() if leaf is not None else None for leaf in leaves]
    x, w, b, r = leaves
    assert x is not None and w is not None and r is not None
    seed = torch.randn(12, 5)
    out = linear(x, w, b, r if residual else None)
    out.backward(seed)
    twins = [leaf.detach().double().requires_grad_() if leaf is not None else None for leaf in leaves]
    tx, tw, tb, tr = twins
    assert tx is not None and tw is not None and tr is not None
    expected = F.linear(tx, tw, tb) + (tr if residual else 0)
    expected.backward(seed.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    for leaf, twin in zip(leaves[: 4 if residual else 3], twins, strict=False):
        if leaf is not None and twin is not None:
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=0, atol=2e-5)


def test_input_made_again_gives_the_same_gradient() -> None:
    base = torch.randn(12, 7)
    weight = torch.randn(5, 7, requires_grad=True)
    calls = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * 2

    linear(base * 2, weight).sum().backward()
    expected, weight.grad = weight.grad, None
    out = linear(base * 2, weight, again=Again(fn, (base,)))
    assert not calls
    out.sum().backward()
    assert weight.grad is not None and expected is not None
    assert calls == [1] and torch.equal(weight.grad, expected)


def test_autocast_rounds_operands_and_keeps_a_fp32_residual() -> None:
    x, w, r = torch.randn(6, 8), torch.randn(4, 8, requires_grad=True), torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        plain, summed = linear(x, w), linear(x, w, residual=r)
    assert plain.dtype is torch.bfloat16 and summed.dtype is torch.float32
    torch.testing.assert_close(plain, (x.bfloat16() @ w.detach().bfloat16().t()), rtol=1e-2, atol=1e-2)
    summed.sum().backward()
    assert w.grad is not None and w.grad.dtype is torch.float32


def test_frozen_weight_gets_no_gradient() -> None:
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(4, 8)
    linear(x, w).sum().backward()
    assert x.grad is not None and w.grad is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_packed_weights_give_the_same_product(bias: bool, residual: bool) -> None:
    """Of any number of rows, for rows with gaps between them too; the residual stays as it is."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=draw)
    added = torch.randn(40, generator=draw) if bias else None
    with torch.no_grad(), packed_weights([weight], 64):
        assert matmul.packed_linear(torch.zeros(1, 24), weight) is not None
        for rows in (1, 3, 64, 100):
            x = torch.randn(rows, 48, generator=draw)[:, ::2][:, :24]
            base = torch.randn(rows, 40, generator=draw) if residual else None
            kept = None if base is None else base.clone()
            want = F.linear(x.double(), weight.double(), None if added is None else added.double())
            want = want if base is None else want + base
            torch.testing.assert_close(linear(x, weight, added, base).double(), want, rtol=0, atol=1e-5)
            assert base is None or kept is None or torch.equal(base, kept)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_halves_give_swiglu(bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(40, 24, generator=draw), torch.randn(5, 24, generator=draw)
    added = torch.randn(40, generator=draw) if bias else None
    with torch.no_grad(), packed_weights([], 64, [weight]):
        got = matmul.packed_swiglu(x, weight, added)
        gate, up = F.linear(x.double(), weight.double(), None if added is None else added.double()).chunk(2, -1)
        assert got is not None
        torch.testing.assert_close(got.double(), F.silu(gate) * up, rtol=0, atol=1e-4)
        both = F.linear(x, weight)
        torch.testing.assert_close(linear(x, weight), both, rtol=0, atol=1e-4)  # halves are no copy of the whole
    with torch.no_grad():
        assert matmul.packed_swiglu(x, weight, added) is None


def test_packed_weights_are_never_stale() -> None:
    """One that is changed is used as it lies, gradients never take the copy, and at the end there is none."""
    weight, x = torch.nn.Parameter(torch.ones(8, 8)), torch.ones(2, 8)
    twin = weight.data.clone()
    with packed_weights([weight, twin, weight], 64):
        linear(x, weight).sum().backward()
        assert weight.grad is not None and torch.equal(weight.grad, torch.full((8, 8), 2.0))
        with torch.no_grad():
            assert torch.equal(linear(x, weight), torch.full((2, 8), 8.0))
            with packed_weights([weight], 64):
                pass
            assert matmul.packed_linear(x, weight) is not None  # the inner one leaves what the outer one made
            weight.mul_(3)
            assert torch.equal(linear(x, weight), torch.full((2, 8), 24.0))
            assert matmul.packed_linear(x, weight) is None and matmul.packed_linear(x, twin) is not None
            with torch.autocast("cpu", torch.bfloat16):
                assert matmul.packed_linear(x, twin) is None
                assert linear(x, twin).dtype is torch.bfloat16
    with torch.no_grad():
        assert matmul.packed_linear(x, twin) is None and "packed" not in vars(weight)


def test_what_cannot_be_packed_is_used_as_it_lies() -> None:
    thin, half = torch.ones(2, 8), torch.ones(8, 8, dtype=torch.bfloat16)
    with torch.no_grad(), packed_weights([thin, half], 64):
        for weight in (thin, half):
            assert matmul.packed_linear(torch.ones(3, 8, dtype=weight.dtype), weight) is None
            assert torch.equal(
                linear(torch.ones(3, 8, dtype=weight.dtype), weight).float(), torch.full((3, len(weight)), 8.0)
            )
