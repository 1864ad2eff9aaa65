"""The chunked loss against torch's cross-entropy on whole logits, and what it holds in memory."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.linear_loss import linear_loss
from parallel.matmul import product_nt_fp32


def case(tokens: int, dim: int, vocab: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, dim, generator=draw)
    weight = torch.randn(vocab, dim, generator=draw) * scale
    targets = torch.randint(0, vocab, (tokens,), generator=draw)
    targets[::3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_equals_cross_entropy(chunk: int) -> None:
    """fp32: loss to 1e-6 relative, gradients to 1e-6 of their largest value."""
    hidden, weight, targets = case(64, 16, 50)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    (expected.sum() * 0.25).backward()
    want_h, want_w = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    loss, losses = linear_loss(hidden, weight, targets, 0.25, chunk)
    (loss * 2.0).backward()
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.item(), 0.25 * expected.sum().item(), rtol=1e-6, atol=0)
    for got, want in ((hidden.grad, want_h), (weight.grad, want_w)):
        assert got is not None and want is not None
        torch.testing.assert_close(got, 2.0 * want, rtol=0, atol=2e-6 * want.abs().max().item())


def test_far_logits_neither_overflow_nor_vanish() -> None:
    hidden, weight, targets = case(9, 16, 50, scale=200.0)
    losses = linear_loss(hidden, weight, targets)[1]
    expected = F.cross_entropy((hidden @ weight.T).double(), targets, reduction="none")
    assert expected.max() > 500
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_nothing_supervised_gives_zero_and_zero_gradients() -> None:
    hidden, weight, targets = case(6, 8, 20)
    loss, losses = linear_loss(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0 and losses.abs().sum() == 0
    assert hidden.grad is not None and hidden.grad.abs().sum() == 0
    assert weight.grad is not None and weight.grad.abs().sum() == 0


def test_without_gradients_only_the_loss_is_made(monkeypatch) -> None:
    """43 of 64 tokens have a target: six chunks of 8, a product each."""
    hidden, weight, targets = case(64, 16, 50)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none").detach()
    products = []

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products.append(a.shape[0])
        return product_nt_fp32(a, b)

    monkeypatch.setattr("parallel.linear_loss.product_nt_fp32", counted)
    monkeypatch.setattr("parallel.vocab_rows.product_nt_fp32", counted)
    with torch.no_grad():
        _, losses = linear_loss(hidden, weight, targets, 1.0, 8)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert products == [8, 8, 8, 8, 8, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_logits_in_fp32(dtype: torch.dtype) -> None:
    """Against fp32 on the same rounded inputs: the loss is exact to fp32, gradients to the input dtype's rounding."""
    hidden, weight, targets = case(64, 16, 50)
    half_h, half_w = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    loss, losses = linear_loss(half_h, half_w, targets, 1.0, 16)
    loss.backward()
    full_h, full_w = half_h.detach().float().requires_grad_(), half_w.detach().float().requires_grad_()
    expected = F.cross_entropy(full_h @ full_w.T, targets, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-6, atol=1e-5)
    for got, want in ((half_h.grad, full_h.grad), (half_w.grad, full_w.grad)):
        assert got is not None and want is not None and got.dtype is dtype
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operator made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_of_all_tokens_never_exist() -> None:
    tokens, dim, vocab, chunk = 512, 8, 1000, 32
    hidden, weight, targets = case(tokens, dim, vocab)
    with Largest() as seen:
        linear_loss(hidden, weight, targets, 1.0, chunk)[0].backward()
    assert seen.numel == chunk * vocab
    with Largest() as whole:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    assert whole.numel == tokens * vocab, "the meter does not see whole logits"


def test_tokens_without_target_cost_no_logits() -> None:
    hidden, weight, targets = case(512, 8, 1000)
    targets[5:] = -100
    with Largest() as seen:
        linear_loss(hidden, weight, targets, 1.0, 512)[0].backward()
    supervised = int((targets != -100).sum())
    assert seen.numel == max(supervised * 1000, 1000 * 8)
