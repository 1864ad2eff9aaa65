"""Norm and SwiGLU against plain torch, forward and gradients."""

import pytest
import torch
from torch.nn import functional as F

from models.blocks.mlp import _Swiglu, swiglu_product
from models.blocks.norm import RMSNorm, _RMSNorm
from parallel.sharding import SINGLE


def test_norm_gradients_in_fp64() -> None:
    """gradcheck would run the fp32 inside; so fp32 against torch's rms_norm in fp64, 1e-5."""
    x, w = torch.randn(9, 24) * 3, torch.randn(24)
    seed = torch.randn(9, 24)
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    out, _ = _RMSNorm.apply(a, b, 1e-3, torch.float32)
    out.backward(seed)
    c, d = x.double().requires_grad_(), w.double().requires_grad_()
    expected = F.rms_norm(c, (24,), d, 1e-3)
    expected.backward(seed.double())
    for got, want in ((out, expected), (a.grad, c.grad), (b.grad, d.grad)):
        assert got is not None
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_norm_of_strided_heads() -> None:
    """q/k norm reads a view of the fused projection."""
    rows, w = torch.randn(5, 40), torch.randn(8)
    a, b = rows.clone().requires_grad_(), w.clone().requires_grad_()
    out, _ = _RMSNorm.apply(a[:, 8:32].unflatten(1, (-1, 8)), b, 1e-6, torch.float32)
    c, d = rows.clone().requires_grad_(), w.clone().requires_grad_()
    expected = F.rms_norm(c[:, 8:32].unflatten(1, (-1, 8)), (8,), d, 1e-6)
    seed = torch.randn_like(expected)
    out.backward(seed)
    expected.backward(seed)
    for got, want in ((out, expected), (a.grad, c.grad), (b.grad, d.grad)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_norm_computes_in_fp32_for_half_input() -> None:
    x = torch.randn(4, 64).bfloat16() * 300  # squares of fp16 or bf16 would overflow or round
    norm = RMSNorm(64, 1e-5, SINGLE)
    torch.nn.init.ones_(norm.weight)
    out, _ = norm(x)
    expected = F.rms_norm(x.float(), (64,), None, 1e-5)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, expected.bfloat16())


def test_norm_made_again_is_bitwise_the_same() -> None:
    norm = RMSNorm(16, 1e-5, SINGLE)
    torch.nn.init.normal_(norm.weight)
    out, again = norm(torch.randn(6, 16), again=True)
    assert again is not None and torch.equal(again.fn(*again.tensors), out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_swiglu(dtype: torch.dtype) -> None:
    x = torch.randn(7, 12, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    gate, up = b.chunk(2, -1)
    expected, out = F.silu(gate) * up, _Swiglu.apply(a)
    seed = torch.randn_like(expected)
    out.backward(seed)
    expected.backward(seed)
    assert torch.equal(out, swiglu_product(x))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(a.grad, b.grad)
