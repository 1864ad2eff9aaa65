"""Latent attention on the CPU in one autograd function around torch's flash kernel.

The kernel wants q, k and v of one head size, but values are smaller than keys. Keys and values lie side by side in one
buffer [nope | rope | value]: the kernel's keys are its first K columns, its values the last K. The values' first K - V
columns are then key columns, whose output is dropped and gets a zero gradient: nothing is padded or copied for them.
Torch's public function takes the unfused path for unequal sizes. Forward and backward of the kernel took 1.2 times its
time at 512 tokens, 0.6 times at 2048 (K = 192, V = 128, one thread), and keep no scores.
"""

from typing import Any

import torch

from models.blocks.pieces import Piece
from models.blocks.rope import rotate_pairs_into
from models.config import MLAConfig

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _batched(rows_THK: torch.Tensor, p: Piece) -> torch.Tensor:
    """[T, H, K] -> [docs, H, length, K], a view."""
    return rows_THK[p.q_start : p.q_stop].unflatten(0, (p.docs, -1)).transpose(1, 2)


def _rows(batched: torch.Tensor) -> torch.Tensor:
    """[docs, H, length, K] -> [T, H, K]."""
    return batched.transpose(1, 2).flatten(0, 1)


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        kv: torch.Tensor,
        rope_key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        s: MLAConfig,
        scale: float,
        pieces: tuple[Piece, ...],
    ) -> torch.Tensor:
        key = s.nope_dim + s.rope_dim
        q = q.detach().unflatten(1, (-1, key))  # overwritten below: the projection does not keep its output
        total, heads = q.shape[:2]
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        rotate_pairs_into(q[..., s.nope_dim :], q[..., s.nope_dim :], cos, sin)
        both = q.new_empty(total, heads, key + s.value_dim)
        made = kv.unflatten(1, (heads, -1))
        both[..., : s.nope_dim] = made[..., : s.nope_dim]
        rotated = torch.empty_like(rope_key)[:, None]
        rotate_pairs_into(rotated, rope_key[:, None], cos, sin)
        both[..., s.nope_dim : key] = rotated
        both[..., key:] = made[..., s.nope_dim :]
        k, v = both[..., :key], both[..., s.value_dim :]
        out = q.new_empty(total, heads, s.value_dim)
        log_sums = []
        for p in pieces:
            got, log_sum = _forward(_batched(q, p), _batched(k, p), _batched(v, p), 0.0, True, scale=scale)
            out[p.q_start : p.q_stop] = _rows(got)[..., key - s.value_dim :]
            log_sums.append(log_sum)
        out = out.flatten(1)
        ctx.save_for_backward(q, both, out, cos, sin, *log_sums)
        ctx.sizes, ctx.scale, ctx.pieces = s, scale, pieces
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, both, out, cos, sin, *log_sums = ctx.saved_tensors
        s = ctx.sizes
        nope, key, value = s.nope_dim, s.nope_dim + s.rope_dim, s.value_dim
        total, heads = q.shape[:2]
        back = -sin
        k, v = both[..., :key], both[..., value:]
        wide = q.new_zeros(2, total, heads, key)
        wide[0, ..., key - value :] = grad.unflatten(1, (heads, value))
        wide[1, ..., key - value :] = out.unflatten(1, (heads, value))
        grad_q, grad_kv = torch.empty_like(q), q.new_empty(total, heads, nope + value)
        grad_rope = q.new_empty(total, 1, s.rope_dim)
        for p, log_sum in zip(ctx.pieces, log_sums, strict=True):
            rows = slice(p.q_start, p.q_stop)
            dq, dk, dv = (
                _rows(d)
                for d in _backward(
                    _batched(wide[0], p), _batched(q, p), _batched(k, p), _batched(v, p), _batched(wide[1], p),
                    log_sum, 0.0, True, scale=ctx.scale,
                )
            )  # fmt: skip
            grad_q[rows, :, :nope] = dq[..., :nope]
            rotate_pairs_into(grad_q[rows, :, nope:], dq[..., nope:], cos[rows], back[rows])
            grad_kv[rows, :, :nope] = dk[..., :nope]
            grad_kv[rows, :, nope:] = dv[..., key - value :]
            rotate_pairs_into(grad_rope[rows], dk[..., nope:].sum(1, keepdim=True), cos[rows], back[rows])
        return grad_q.flatten(1), grad_kv.flatten(1), grad_rope.squeeze(1), None, None, None, None, None


def cpu_latent_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    rope_key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sizes: MLAConfig,
    scale: float,
    pieces: tuple[Piece, ...],
) -> torch.Tensor:
    """Rotate and attend within each piece, for value heads no larger than key heads.

    Args:
        q: [T, H K], each head nope | rope; overwritten.
        kv: [T, H (N + V)], each head's key without rotation | its value.
        rope_key: [T, R], the rotated part of the key of all heads, before rotation.
        cos, sin: [T, R / 2].
        scale: factor on the scores.

    Returns:
        [T, H V].
    """
    return _LatentAttention.apply(q, kv, rope_key, cos, sin, sizes, scale, pieces)
