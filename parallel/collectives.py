"""Tensor-parallel collectives, and the forward/backward pairs made of them; on an axis of size one each does nothing.

| function          | forward                     | backward                    |
|-------------------|-----------------------------|-----------------------------|
| `copy_to`         | identity                    | sum over the axis           |
| `reduce_from`     | sum over the axis           | identity                    |
| `gather_from`     | concatenate the last dim    | own slice of the last dim   |
| `gather_rows`     | concatenate the rows        | sum, own rows of it         |
| `scatter_rows`    | sum, own rows of it         | concatenate the rows        |
| `join_rows`       | concatenate the rows        | own rows                    |

`enter` and `leave` choose for a `Place`: rows are whole on every rank, or cut over the axis (sequence parallel).

Sources: Shoeybi et al. 2019, Megatron-LM, section 3 (the operators f and g); Korthikanti et al. 2022, Reducing
Activation Recomputation in Large Transformer Models, section 4.2.2 (the operators on rows).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from parallel.sharding import Axis, Place


@dataclass(frozen=True)
class Pending:
    """A collective under way. `wait` gives its result; it is called once."""

    work: Any
    result: Callable[[], torch.Tensor]

    def wait(self) -> torch.Tensor:
        """Block (a CPU) or order the stream behind it (a GPU)."""
        if self.work is not None:
            self.work.wait()
        return self.result()


def start_all_reduce(tensor: torch.Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Pending:
    """Begin to reduce a contiguous tensor in place over the axis."""
    work = dist.all_reduce(tensor, op=op, group=axis.group, async_op=True) if axis.size > 1 else None
    return Pending(work, lambda: tensor)


def start_gather_rows(x: torch.Tensor, axis: Axis) -> Pending:
    """Begin to concatenate the rows of all ranks: [R, ...] -> [size R, ...].

    Gloo's all-gather makes the whole tensor once more in a thread of its own, which has a heap of its own, kept for
    ever (76 MiB at 4,096 tokens of 256); on a CPU every rank sends each other rank a copy of its rows.
    """
    if axis.size == 1:
        return Pending(None, lambda: x)
    whole = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    if x.device.type == "cpu":
        copies = torch.cat([x] * axis.size)
        return Pending(dist.all_to_all_single(whole, copies, group=axis.group, async_op=True), lambda: whole)
    return Pending(dist.all_gather_single(whole, x.contiguous(), group=axis.group, async_op=True), lambda: whole)


def start_scatter_rows(x: torch.Tensor, axis: Axis) -> Pending:
    """Begin to sum over the axis and keep this rank's rows: [size R, ...] -> [R, ...]. `x` must stay as it is.

    Gloo's reduce-scatter is an all-reduce inside, which moves the bytes twice; on a CPU every rank sends each other
    rank its rows and adds up what comes in, in rank order.
    """
    if axis.size == 1:
        return Pending(None, lambda: x)
    assert x.shape[0] % axis.size == 0, f"{x.shape[0]} rows are not padded to {axis.size} ranks"
    x = x.contiguous()
    if x.device.type == "cpu":
        parts = torch.empty_like(x)
        work = dist.all_to_all_single(parts, x, group=axis.group, async_op=True)
        return Pending(work, lambda: parts.unflatten(0, (axis.size, -1)).sum(0))
    own = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    return Pending(dist.reduce_scatter_single(own, x, group=axis.group, async_op=True), lambda: own)


def all_reduce(tensor: torch.Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce a contiguous `tensor` in place over the axis and return it. Not differentiable."""
    return start_all_reduce(tensor, axis, op).wait()


def pad_rows(x: torch.Tensor, size: int) -> torch.Tensor:
    """Zero rows at the end until `size` divides their number."""
    missing = -x.shape[0] % size
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x


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
        ctx.mark_dirty(x)
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        parts = start_gather_rows(x, axis).wait().unflatten(0, (axis.size, -1))  # [size, ..., last]
        return parts.movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.chunk(ctx.axis.size, -1)[ctx.axis.rank].contiguous(), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return start_gather_rows(x, axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return start_scatter_rows(grad, ctx.axis).wait(), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return start_scatter_rows(x, axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return start_gather_rows(grad, ctx.axis).wait(), None


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return start_gather_rows(x, axis).wait()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.chunk(ctx.axis.size)[ctx.axis.rank].contiguous(), None


def copy_to(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Enter a column-parallel layer: the same tensor on every rank, whose gradients are summed."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Leave a row-parallel layer: partial results of all ranks summed. Overwrites `x`, which must be contiguous."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def gather_from(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Join the last dim over the axis (logits of a vocabulary-parallel head)."""
    return x if axis.size == 1 else _GatherFrom.apply(x, axis)


def gather_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Enter a column-parallel layer with cut rows: [R, ...] -> [size R, ...]; each rank goes on in another way."""
    return x if axis.size == 1 else _GatherRows.apply(x, axis)


def scatter_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Leave a row-parallel layer with cut rows: partial results [size R, ...] summed, this rank's rows [R, ...]."""
    return x if axis.size == 1 else _ScatterRows.apply(x, axis)


def join_rows(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Cut rows [R, ...] made whole [size R, ...] for a computation that is the same on every rank (a loss)."""
    return x if axis.size == 1 else _JoinRows.apply(x, axis)


def enter(x: torch.Tensor, place: Place) -> torch.Tensor:
    """Before something that is cut over tp: hidden rows as they lie between layers -> all rows, padding included."""
    return gather_rows(x, place.tp) if place.splits_rows else copy_to(x, place.tp)


def leave(x: torch.Tensor, place: Place) -> torch.Tensor:
    """Behind something that is cut over tp: its partial results, all rows -> the sum, as rows lie between layers.

    Without sequence parallel `x` is overwritten.
    """
    return scatter_rows(x, place.tp) if place.splits_rows else reduce_from(x, place.tp)
