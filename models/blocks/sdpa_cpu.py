"""Packed attention on the CPU in one autograd function: rotation, a fused kernel per piece, one gradient buffer.

Around torch's public function the same work costs a copy of every slice and, in the backward, a zeroed full-size
gradient for each document. Kept for the backward: the rotated q|k|v rows (in the projection's own buffer), the output
(which the next layer keeps anyway) and one number a query and head.
"""

from typing import Any

import torch

from models.blocks.kernels import attend, attend_backward
from models.blocks.pieces import Piece
from models.blocks.rope import rotate_, rotate_into


def _heads(rows: torch.Tensor, start: int, stop: int, docs: int, dim: int) -> torch.Tensor:
    """rows [T, heads * K] -> [docs, heads, length, K], a view."""
    return rows[start:stop].view(docs, (stop - start) // docs, -1, dim).transpose(1, 2)


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        parts: tuple[int, int, int],
        dim: int,
        pieces: tuple[Piece, ...],
        causal: bool,
    ) -> torch.Tensor:
        qkv = qkv.detach()  # overwritten below: the projection does not keep its output
        if cos is not None and sin is not None:
            rotate_(qkv[:, : parts[0] + parts[1]].unflatten(1, (-1, dim)), cos.to(qkv.dtype), sin.to(qkv.dtype))
        q, k, v = qkv.split(parts, 1)
        out = None if len(pieces) == 1 else qkv.new_empty(qkv.shape[0], parts[0])
        log_sums = []
        for p in pieces:
            qp = _heads(q, p.q_start, p.q_stop, p.docs, dim)
            kp, vp = (_heads(x, p.k_start, p.q_stop, p.docs, dim) for x in (k, v))
            got, log_sum = attend(qp, kp, vp, causal and p.mask is None, p.mask, None)
            rows = got.transpose(1, 2).reshape(p.q_stop - p.q_start, parts[0])
            if out is None:
                out = rows
            else:
                out[p.q_start : p.q_stop] = rows
            log_sums.append(log_sum)
        assert out is not None
        ctx.save_for_backward(qkv, out, cos, sin, *log_sums)
        ctx.parts, ctx.dim, ctx.pieces, ctx.causal = parts, dim, pieces, causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, out, cos, sin, *log_sums = ctx.saved_tensors
        parts, dim = ctx.parts, ctx.dim
        if cos is not None:
            cos, sin = cos.to(qkv.dtype), -sin.to(qkv.dtype)
        q, k, v = qkv.split(parts, 1)
        overlap = any(p.mask is not None for p in ctx.pieces)
        grads = torch.zeros_like(qkv) if overlap else torch.empty_like(qkv)
        gq, gk, gv = grads.split(parts, 1)
        for p, log_sum in zip(ctx.pieces, log_sums, strict=True):
            q_range, k_range = (p.q_start, p.q_stop, p.docs, dim), (p.k_start, p.q_stop, p.docs, dim)
            dq, dk, dv = attend_backward(
                _heads(grad, *q_range), _heads(q, *q_range), _heads(k, *k_range), _heads(v, *k_range),
                _heads(out, *q_range), log_sum, ctx.causal and p.mask is None, p.mask, None,
            )  # fmt: skip
            dq, dk, dv = (d.transpose(1, 2).flatten(0, 1) for d in (dq, dk, dv))
            queries, keys = slice(p.q_start, p.q_stop), slice(p.k_start, p.q_stop)
            if cos is None:
                assert p.mask is None, "blocks under a window are of turned heads"
                gq[queries], gk[keys], gv[keys] = dq.flatten(1), dk.flatten(1), dv.flatten(1)
                continue
            rotate_into(gq[queries].unflatten(1, (-1, dim)), dq, cos[queries], sin[queries])
            if p.mask is None:
                rotate_into(gk[keys].unflatten(1, (-1, dim)), dk, cos[keys], sin[keys])
                gv[keys] = dv.flatten(1)
            else:  # keys are shared by neighbouring blocks of queries
                rotate_(dk, cos[keys], sin[keys])
                gk[keys] += dk.flatten(1)
                gv[keys] += dv.flatten(1)
        return grads, None, None, None, None, None, None


def cpu_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    queries: int,
    groups: int,
    dim: int,
    pieces: tuple[Piece, ...],
    causal: bool = True,
) -> torch.Tensor:
    """Rotate q and k in `qkv [T, (H + 2G) K]` (overwritten) and attend within each piece -> [T, H K].

    Args:
        cos, sin: [T, K / 2]; None leaves q and k as they are.
        causal: a token sees those before it; else all of its document (pieces without masks only).
    """
    return _CpuAttention.apply(qkv, cos, sin, (queries * dim, groups * dim, groups * dim), dim, pieces, causal)
