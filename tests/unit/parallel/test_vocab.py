"""Log-probabilities, entropy and the best tokens of a cut vocabulary against plain torch on whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parallel import vocab
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
@pytest.mark.parametrize("chunk", [3, 100])
def test_from_hidden_states(pool, size: int, sequence: bool, vocab_size: int, chunk: int) -> None:
    """5 words on 4 ranks leave one with padding only; 14 tokens are no multiple of 4."""
    compare(pool(size).run(tp_cases.distribution, vocab_size, chunk, sequence, False), vocab_size, sequence)


@pytest.mark.parametrize("size", [2, 3])
def test_from_logits(pool, size: int) -> None:
    compare(pool(size).run(tp_cases.distribution, 31, 0, False, True), 31, False)


def test_bf16_inputs_are_computed_in_fp32(pool) -> None:
    """Values as exact as from fp32; gradients are rounded to bf16 on the way (2 %)."""
    found = pool(2).run(tp_cases.distribution, 31, 5, True, False, torch.bfloat16)
    compare(found, 31, True, 2e-2, dtype=torch.bfloat16)


def test_alone() -> None:
    hidden, weight, tokens, seeds = tp_cases.distribution_inputs(31)
    hidden.requires_grad_()
    weight.requires_grad_()
    log_p, entropy = vocab.token_log_probs(hidden, weight, tokens, chunk=4)
    (log_p * seeds[0] + entropy * seeds[1]).sum().backward()
    values, ids = vocab.top_k(hidden, weight, 3)
    found = {"log_p": log_p.detach(), "entropy": entropy.detach(), "values": values, "ids": ids}
    compare([found | {"grad_h": hidden.grad, "grad_w": weight.grad}], 31, False)


@pytest.mark.parametrize("asked", ["log_p", "entropy"])
def test_one_of_the_two_alone_has_its_own_gradient(asked: str) -> None:
    hidden, weight, tokens, _ = tp_cases.distribution_inputs(31)
    grads = []
    for dtype in (torch.float32, torch.float64):
        h = hidden.detach().to(dtype).requires_grad_()
        if dtype is torch.float32:
            log_p, entropy = vocab.token_log_probs(h, weight, tokens)
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
