"""`parallel.low_rank` for stacked experts: each row goes through the frozen weight of its expert and that expert's
adapter beside it, x W_e^T + s (x A_e^T) B_e^T.

A [E, r, I] and B [E, O, r] are dealt out over the ranks like the experts, and cut over tp as there: of gate|up A is
whole and B cut along the outputs, of down A is cut along the inputs and B is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from parallel.experts import Dispatch, experts_gradient, grouped_products, has_grouped_kernel, pieces
from parallel.low_rank import Packed, dense
from parallel.matmul import Again, compute_dtype


class _FrozenExperts(torch.autograd.Function):
    """See `frozen_experts`. Keeps leaves as they are, as `_FrozenLinear` does, and for the same reason."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        weight: torch.Tensor | Packed,
        scale: float,
        plan: Dispatch,
        again: Again | None,
    ) -> torch.Tensor:
        ctx.dtype, ctx.rows_dtype, ctx.plan, ctx.scale = compute_dtype(rows), rows.dtype, plan, scale
        ctx.weight, ctx.a, ctx.b, ctx.again = weight, a, b, again.fn if again else None
        rows = rows.to(ctx.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            whole = dense(weight, ctx.dtype)
            ctx.grouped = has_grouped_kernel(rows, whole, *(each for each in (a, b) if each is not None))
            parts = pieces(rows, plan, ctx.grouped)
            outs = grouped_products(parts, whole, plan, ctx.grouped)
            if a is not None and b is not None:
                hs = grouped_products(parts, a.to(ctx.dtype), plan, ctx.grouped)
                for out, more in zip(outs, grouped_products(hs, b.to(ctx.dtype), plan, ctx.grouped), strict=True):
                    out.add_(more, alpha=scale)
                ctx.save_for_backward(_joined(hs), *(again.tensors if again else (rows,)))
        return _joined(outs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_rows, need_a, need_b = ctx.needs_input_grad[:3]
        plan, grouped, dtype, scale = ctx.plan, ctx.grouped, ctx.dtype, ctx.scale
        a, b = ctx.a, ctx.b
        grad_rows = grad_a = grad_b = None
        with torch.autocast(grad.device.type, enabled=False):
            grads, grad_hs = pieces(grad.to(dtype), plan, grouped), []
            if a is not None:
                grad_hs = grouped_products(grads, b.to(dtype).transpose(1, 2), plan, grouped)
                grad_hs = [each.mul_(scale) for each in grad_hs]
            if need_rows:
                found = grouped_products(grads, dense(ctx.weight, dtype).transpose(1, 2), plan, grouped)
                if a is not None:
                    more = grouped_products(grad_hs, a.to(dtype).transpose(1, 2), plan, grouped)
                    found = [each.add_(other) for each, other in zip(found, more, strict=True)]
                grad_rows = _joined(found).to(ctx.rows_dtype)
            if a is not None:
                h, *kept = ctx.saved_tensors
                if need_a:
                    grad_a = experts_gradient(a, grad_hs, partial(_rows_again, ctx, kept), plan, grouped)
                if need_b:
                    grad_b = experts_gradient(b, grads, lambda: pieces(h * scale, plan, grouped), plan, grouped)
        return grad_rows, grad_a, grad_b, None, None, None, None


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _rows_again(ctx: Any, kept: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    rows = ctx.again(*kept) if ctx.again else kept[0]
    return pieces(rows.to(ctx.dtype), ctx.plan, ctx.grouped)


def frozen_experts(
    rows: torch.Tensor,
    weight: torch.Tensor | Packed,
    pair: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    plan: Dispatch,
    again: Again | None = None,
) -> torch.Tensor:
    """Every row through the weight of its expert with the adapter beside it; differentiable by rows, A and B.

    Args:
        rows: [M, I], sorted by the experts that live here.
        weight: [E, O, I], frozen.
        pair: A [E, r, I] and B [E, O, r] as they lie here; None for the weight alone.
        again: how the backward makes `rows` again; without it they are kept where A is trained.

    Returns:
        [M, O].
    """
    return _FrozenExperts.apply(rows, *(pair or (None, None)), weight, scale, plan, again)
