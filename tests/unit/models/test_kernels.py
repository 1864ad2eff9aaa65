"""The fused kernels with their log-sum-exp: joined blocks are whole attention, and the CUDA form fits its kernel."""

from typing import Any

import pytest
import torch

from models.blocks.kernels import attend, attend_backward


def heads(length: int, count: int, **how: Any) -> torch.Tensor:
    """[1, count, length, 8], laid out as rows of tokens."""
    if how:
        return torch.empty(length, 1, count, 8, **how).permute(1, 2, 0, 3)
    return torch.randn(length, 1, count, 8, dtype=torch.float64).permute(1, 2, 0, 3)


def test_log_sum_exp_and_backward_of_a_block() -> None:
    """Against the plain formula in float64: grouped keys, a scale, a block of the keys under the whole's statistics."""
    torch.manual_seed(0)
    q, k, v, grad = heads(5, 4), heads(9, 2), heads(9, 2), heads(5, 4)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    wide_k, wide_v = (x.repeat_interleave(2, 1) for x in leaves[1:])
    scores = 0.3 * leaves[0] @ wide_k.transpose(2, 3)
    out = scores.softmax(-1) @ wide_v
    out.backward(grad)
    log_sum = scores.logsumexp(-1).detach()
    found, sums = zip(
        *(attend(q, k[:, :, a:b], v[:, :, a:b], False, None, 0.3) for a, b in ((0, 4), (4, 9))), strict=True
    )
    torch.testing.assert_close(torch.logaddexp(sums[0], sums[1]), log_sum)
    parts = [torch.exp(s - log_sum)[..., None] * o for o, s in zip(found, sums, strict=True)]
    torch.testing.assert_close(parts[0] + parts[1], out.detach())
    first, second = (
        attend_backward(grad, q, k[:, :, a:b], v[:, :, a:b], out.detach(), log_sum, False, None, 0.3)
        for a, b in ((0, 4), (4, 9))
    )
    torch.testing.assert_close(first[0] + second[0], leaves[0].grad)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([first[i], second[i]], 2), leaves[i].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_other_devices_kernel_takes_the_arguments(dtype: torch.dtype, masked: bool) -> None:
    """On the meta device, which has torch's own shape rules of the CUDA kernel and nothing of its numbers."""
    how: dict[str, Any] = {"device": "meta", "dtype": dtype}
    q, k, v = heads(5, 4, **how), heads(7, 2, **how), heads(7, 2, **how)
    mask = torch.zeros(5, 7, device="meta") if masked else None
    out, log_sum = attend(q, k, v, False, mask, None)
    assert out.shape == q.shape and out.dtype is dtype
    assert log_sum.shape == (1, 4, 5) and log_sum.dtype is torch.float32
    grads = attend_backward(out, q, k, v, out, log_sum, False, mask, None)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
