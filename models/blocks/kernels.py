"""Attention kernels as forward and backward, with the log-sum-exp of each query handed out: torch's fused ones, and on
a CPU our own where that is faster.

Blocks of keys are joined by it: the backward of one block takes the output and log-sum-exp over *all* blocks.
Shapes: q [N, H, Q, K], k and v [N, G, S, K]; log-sum-exp fp32 [N, H, Q]; mask [Q, S], 0 or -inf. G divides H.
"""

import torch
from torch.nn import functional as F

from models.blocks import blocked_attention

_aten = torch.ops.aten
_LSE_ROWS = 32
"""The CUDA kernel keeps log-sum-exps in rows of a multiple of this many queries."""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [N, H, Q, K] and log-sum-exp [N, H, Q]. `causal` needs Q = S; `scale` None is 1 / sqrt(K)."""
    if mask is None and blocked_attention.pays(q, k):
        return blocked_attention.attend(q, k, v, causal, scale)
    mask = None if mask is None else mask.to(q.dtype)
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    k, v = (_each_query(x, q.shape[1]) for x in (k, v))
    out, log_sum, _, _ = _aten._scaled_dot_product_efficient_attention(
        q, k, v, _bias(mask, q, k), True, 0.0, causal, scale=scale
    )
    return out, log_sum[..., : q.shape[2]]


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from that of the output."""
    if mask is None and blocked_attention.pays(q, k):
        return blocked_attention.attend_backward(grad, q, k, v, out, log_sum, causal, scale)
    mask = None if mask is None else mask.to(q.dtype)
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum, 0.0, causal, attn_mask=mask, scale=scale
        )
    groups = k.shape[1]
    k, v = (_each_query(x, q.shape[1]) for x in (k, v))
    # Rows that pad the log-sum-exp count as infinite: their weights vanish.
    log_sum = F.pad(log_sum, (0, -log_sum.shape[2] % _LSE_ROWS), value=float("inf")).contiguous()
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of dropout
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, _bias(mask, q, k), out, log_sum, unused, unused, 0.0, [True, True, True, False], causal,
        scale=scale,
    )  # fmt: skip
    return dq, *(d.unflatten(1, (groups, -1)).sum(2) for d in (dk, dv))


def _each_query(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values once for each query head: the CUDA kernel knows no groups."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _bias(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The mask as the CUDA kernel wants it: rows that start at a multiple of 16 elements, one for each head."""
    if mask is None:
        return None
    keys = k.shape[2]
    return F.pad(mask, (0, -keys % 16))[:, :keys].expand(q.shape[0], q.shape[1], q.shape[2], keys)
