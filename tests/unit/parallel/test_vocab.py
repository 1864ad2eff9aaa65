"""Log-probabilities, entropy and the best tokens of a cut vocabulary against plain torch on whole logits."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import vocab, vocab_rows
from parallel.sharding import Axis
from parallel.vocab_rows import VocabRows
from tests import tp_cases


def plain(vocab_size: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """In fp64 from the same inputs."""
    hidden, weight, tokens, seeds = tp_cases.distribution_inputs(vocab_size, dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_TV = (hidden @ weight.T).log_softmax(-1)
    asked = tokens != -100
    log_p = log_TV.gather(1, tokens.clamp_min(0)[:, None]).squeeze(1) * asked
    entropy = -(log_TV.exp() * log_TV).sum(-1) * asked
    (log_p * seeds[0] + entropy * seeds[1]).sum().backward()
    values, ids = log_TV.detach().topk(3)
    assert hidden.grad is not None and weight.grad is not None
    return {
        "log_p": log_p.detach(), "entropy": entropy.detach(), "values": values, "ids": ids,
        "grad_h": hidden.grad, "grad_w": weight.grad,
    }  # fmt: skip


def compare(ranks: list[dict[str, Any]], vocab_size: int, sequence: bool, grad_tol: float = 2e-6, **more: Any) -> None:
    """Values to 2e-6 of the largest, gradients to `grad_tol`."""
    want = plain(vocab_size, **more)
    rows = -(-vocab_size // len(ranks))
    for rank, found in enumerate(ranks):
        for name in ("log_p", "entropy", "values"):
            bound = 2e-6 * want[name].abs().max().item()
            torch.testing.assert_close(found[name][:14].double(), want[name], rtol=0, atol=bound)
        assert torch.equal(found["ids"][:14], want["ids"])
        mine = want["grad_w"][rank * rows : (rank + 1) * rows]
        bound = grad_tol * want["grad_w"].abs().max().item()
        torch.testing.assert_close(found["grad_w"][: len(mine)].double(), mine, rtol=0, atol=bound)
        assert not found["grad_w"][len(mine) :].any(), "padding learns"
    grad_h = torch.cat([r["grad_h"] for r in ranks]) if sequence else ranks[-1]["grad_h"]
    assert not grad_h[14:].any()
    bound = grad_tol * want["grad_h"].abs().max().item()
    torch.testing.assert_close(grad_h[:14].double(), want["grad_h"], rtol=0, atol=bound)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("vocab_size", [5, 31])
@pytest.mark.parametrize(("chunk", "keep"), [(3, 7), (100, 0), (100, 100)])
def test_from_hidden_states(pool, size: int, sequence: bool, vocab_size: int, chunk: int, keep: int) -> None:
    """5 words on 4 ranks leave one with padding only; 14 tokens are no multiple of 4."""
    ranks = pool(size).run(tp_cases.distribution, vocab_size, chunk, sequence, False, torch.float32, keep)
    compare(ranks, vocab_size, sequence)


@pytest.mark.parametrize("size", [2, 3])
def test_from_logits(pool, size: int) -> None:
    compare(pool(size).run(tp_cases.distribution, 31, 0, False, True), 31, False)


def test_bf16_inputs_are_computed_in_fp32(pool) -> None:
    """Values as exact as from fp32; gradients are rounded to bf16 on the way (2 %)."""
    found = pool(2).run(tp_cases.distribution, 31, 5, True, False, torch.bfloat16)
    compare(found, 31, True, 2e-2, dtype=torch.bfloat16)


@pytest.mark.parametrize("keep", [0, 4, 7, 14])
def test_alone(keep: int) -> None:
    hidden, weight, tokens, seeds = tp_cases.distribution_inputs(31)
    hidden.requires_grad_()
    weight.requires_grad_()
    log_p, entropy = vocab.token_log_probs(hidden, weight, tokens, chunk=4, keep=keep)
    (log_p * seeds[0] + entropy * seeds[1]).sum().backward()
    values, ids = vocab.top_k(hidden, weight, 3)
    found = {"log_p": log_p.detach(), "entropy": entropy.detach(), "values": values, "ids": ids}
    compare([found | {"grad_h": hidden.grad, "grad_w": weight.grad}], 31, False)


@pytest.mark.parametrize("asked", ["log_p", "entropy"])
@pytest.mark.parametrize("keep", [0, 100])
def test_one_of_the_two_alone_has_its_own_gradient(asked: str, keep: int) -> None:
    hidden, weight, tokens, _ = tp_cases.distribution_inputs(31)
    grads = []
    for dtype in (torch.float32, torch.float64):
        h = hidden.detach().to(dtype).requires_grad_()
        if dtype is torch.float32:
            log_p, entropy = vocab.token_log_probs(h, weight, tokens, keep=keep)
        else:
            log_TV = (h @ weight.double().T).log_softmax(-1)
            log_p = log_TV.gather(1, tokens.clamp_min(0)[:, None]).squeeze(1)[tokens != -100]
            entropy = -(log_TV.exp() * log_TV).sum(-1)[tokens != -100]
        (log_p if asked == "log_p" else entropy).sum().backward()
        grads.append(h.grad)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=0, atol=2e-6 * grads[1].abs().max().item())


def test_nothing_asked_gives_zeros() -> None:
    hidden, weight, tokens, _ = tp_cases.distribution_inputs(31)
    hidden.requires_grad_()
    log_p, entropy = vocab.token_log_probs(hidden, weight, torch.full_like(tokens, -100))
    (log_p.sum() + entropy.sum()).backward()
    assert not log_p.any() and not entropy.any()
    assert hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize(
    ("keep", "products"), [(0, 4 + 3 * 4), (7, 4 + 2 * 4 + 3), (8, 4 + 2 * 4 + 2), (13, 4 + 2 * 4), (100, 4 + 2 * 4)]
)
def test_logits_of_kept_tokens_are_made_once(monkeypatch, keep: int, products: int) -> None:
    """13 tokens in chunks of 4: a product each in the forward, two in the backward, a third where nothing was kept.
    A second backward through the same graph finds nothing kept and gives the same."""
    hidden, weight, tokens = (torch.randn(13, 6), torch.randn(31, 6), torch.arange(13))
    hidden.requires_grad_()
    weight.requires_grad_()
    counted = Counted(monkeypatch)
    log_p, entropy = vocab.token_log_probs(hidden, weight, tokens, chunk=4, keep=keep)
    loss = (log_p * torch.randn(13) + entropy).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert counted.products == products
    for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * b.abs().max().item())


class Counted:
    """Counts the products in which logits and their gradients are made."""

    products = 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (vocab, vocab_rows):
            monkeypatch.setattr(module, "product_nt_fp32", self._wrap(module.product_nt_fp32))

    def _wrap(self, product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(*operands: torch.Tensor) -> torch.Tensor:
            self.products += 1
            return product(*operands)

        return counted


class Alive(TorchDispatchMode):
    """The most tensors of so many elements that lived at the same time."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.most, self.alive = numel, 0, weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.numel:
            self.alive[id(out)] = out
            self.most = max(self.most, len(self.alive))
        return out


@pytest.mark.parametrize(("grad", "keep", "most"), [(True, 0, 2), (True, 16, 6), (True, 64, 17), (False, 64, 2)])
def test_no_more_is_kept_than_asked_and_nothing_without_gradients(grad: bool, keep: int, most: int) -> None:
    """64 tokens in chunks of 4; beside what is kept there are the logits and probabilities of a chunk, of which the
    latter become kept."""
    hidden, weight, tokens = torch.randn(64, 6), torch.randn(31, 6, requires_grad=True), torch.arange(64) % 31
    with torch.set_grad_enabled(grad), Alive(4 * 31) as seen:
        log_p, _ = vocab.token_log_probs(hidden, weight, tokens, chunk=4, keep=keep)
    assert seen.most == most and log_p.requires_grad == grad


def test_a_word_without_probability_has_a_gradient() -> None:
    """Probabilities that are kept and have become 0 in fp32 give the entropy no gradient that is not a number."""
    hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [-200.0], [-0.5]])
    for keep in (0, 1):
        _, entropy = vocab.token_log_probs(hidden, weight, torch.tensor([0]), keep=keep)
        got = torch.autograd.grad(entropy.sum(), hidden)[0].item()
        h = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        log_p = (h * weight[:, 0].double()).log_softmax(0)
        want = torch.autograd.grad(-(log_p.exp() * log_p).sum(), h)[0].item()
        assert got == pytest.approx(want, rel=1e-5)


def test_far_logits_neither_overflow_nor_vanish() -> None:
    logits = torch.tensor([[500.0, -500.0, 499.0], [-700.0, 0.0, -800.0]])
    log_p, entropy = vocab.token_log_probs_of_logits(logits, torch.tensor([1, 2]))
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(log_p.double(), torch.stack([expected[0, 1], expected[1, 2]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-5, atol=1e-6)


def test_logits_of_all_tokens_or_words_never_exist(pool) -> None:
    """512 tokens, 1,000 words on 2 ranks, chunks of 32: no tensor is larger than a chunk's own logits."""
    for rank in pool(2).run(tp_cases.largest_tensor, 512, 8, 1000, 32):
        assert rank == {"token_log_probs": 32 * 500, "top_k": 32 * 500}


@pytest.mark.parametrize(("rank", "first", "rows"), [(0, 0, 3), (1, 3, 2), (2, 5, 0), (3, 5, 0)])
def test_rows_of_a_rank(rank: int, first: int, rows: int) -> None:
    assert VocabRows.of(3, 5, Axis(4, rank)) == VocabRows(Axis(4, rank), first, rows)
    assert VocabRows.of(3, None, Axis(4, rank)).rows == 3
