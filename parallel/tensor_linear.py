"""The linear function at the entry of a tensor-parallel block: its input is whole or gathered from the ranks' rows, and
the sum of the input's gradient over the ranks runs while the weight's gradient is computed."""

from typing import Any

import torch

from parallel.collectives import Pending, start_all_reduce, start_gather_rows, start_scatter_rows
from parallel.later import put_off, weight_gradient_now_or_later
from parallel.matmul import Again, compute_dtype, linear, packed_linear, product_nt, weight_gradient
from parallel.sharding import Place


class _ColumnLinear(torch.autograd.Function):
    """x W^T + b on this rank's outputs. Where the weight is trained, keeps `x` as it came (its own rows only, under
    sequence parallel), or what `again` needs to make it; the backward gathers the rows a second time. Keeps the leaf
    `weight` itself, as `matmul._Linear` does, and for the same reason."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        again: Again | None,
        place: Place,
    ) -> torch.Tensor:
        dtype = compute_dtype(x)
        ctx.dtype, ctx.x_dtype, ctx.place, ctx.weight = dtype, x.dtype, place, weight
        ctx.again = again.fn if again else None
        x = x.to(dtype)
        kept = again.tensors if again else (x,)
        ctx.save_for_backward(weight, *(kept if ctx.needs_input_grad[1] else ()))
        if place.splits_rows:
            x = start_gather_rows(x, place.tp).wait()
        with torch.autocast(x.device.type, enabled=False):
            out = product_nt(x, weight.to(dtype))
            if bias is not None:
                out += bias
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        place, again, dtype, leaf = ctx.place, ctx.again, ctx.dtype, ctx.weight
        grad_c = grad.to(dtype)

        def input_rows() -> Pending:
            x = again(*kept).to(dtype) if again else kept[0]
            return start_gather_rows(x, place.tp) if place.splits_rows else Pending(None, lambda: x)

        def compute() -> torch.Tensor:
            with torch.autocast(grad.device.type, enabled=False):
                return weight_gradient(grad_c, (early or input_rows()).wait()).to(leaf.dtype)

        with torch.autocast(grad.device.type, enabled=False):
            # Gathered beside the product below, unless the weight waits: then its own rows are kept, and gathered then.
            early = input_rows() if need_w and place.splits_rows and not put_off(leaf) else None
            pending = None
            if need_x:
                grad_x = product_nt(grad_c, weight.to(dtype).t())
                start = start_scatter_rows if place.splits_rows else start_all_reduce
                pending = start(grad_x, place.tp)
            grad_w = weight_gradient_now_or_later(leaf, compute) if need_w else None
            grad_b = grad.sum(0, dtype=torch.float32).to(weight.dtype) if need_b else None
        return pending.wait().to(ctx.x_dtype) if pending else None, grad_w, grad_b, None, None


def column_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    place: Place,
    again: Again | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias` for a `weight [O / tp, I]` cut over its outputs; differentiable.

    Args:
        x: [T, I] on every rank, or under sequence parallel this rank's rows [R, I].
        again: how the backward makes `x` again; without it `x` is kept.

    Returns:
        [T, O / tp]; under sequence parallel [tp R, O / tp].
    """
    if place.tp.size == 1:
        return linear(x, weight, bias, again=again)
    out = None if place.splits_rows else packed_linear(x, weight, bias)
    return _ColumnLinear.apply(x, weight, bias, again, place) if out is None else out
