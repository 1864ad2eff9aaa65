"""Tensor-parallel collectives as forward/backward pairs. With an axis of size one each is the identity.

| function          | forward                    | backward                   |
|-------------------|----------------------------|----------------------------|
| `copy_to`         | identity                   | sum over the axis          |
| `reduce_from`     | sum over the axis          | identity                   |
| `gather_from`     | concatenate the last dim   | own slice of the last dim  |

Source: Shoeybi et al. 2019, Megatron-LM, section 3 (the conjugate operators f and g).
"""

from typing import Any

import torch
import torch.distributed as dist

from parallel.sharding import Axis


def all_reduce(tensor: torch.Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce `tensor` in place over the axis and return it. Not differentiable."""
    if axis.size > 1:
        dist.all_reduce(tensor, op=op, group=axis.group)
    return tensor


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
        dist.all_gather(parts, x.contiguous(), group=axis.group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.chunk(ctx.axis.size, -1)[ctx.axis.rank].contiguous(), None


def copy_to(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Enter a column-parallel layer: the same tensor on every rank, whose gradients are summed."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Leave a row-parallel layer: partial results of all ranks summed."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def gather_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Join the last dim over the axis (logits of a vocabulary-parallel head)."""
    return x if axis.size == 1 else _GatherFrom.apply(x, axis)
