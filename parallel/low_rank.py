"""The linear function of a frozen weight with adapters of low rank beside it: x W^T + s (x A^T) B^T.

Tokens go through A, then through B; the product B A is never made. A fused weight (q|k|v) has an adapter for each of
its parts or for some: their As lie one after another, [n r, I], and so do their Bs, [outputs of these parts, r].

Under tensor parallel A of a column layer is whole on every rank and B is cut like the outputs; of a row layer A is cut
like the inputs and B is whole, and what the ranks have of the outputs is summed together with the layer's own. The
gradient of the whole one is a part on each rank. The weight itself gets no gradient and keeps no input.
Source: Hu et al. 2021, LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from parallel.collectives import start_all_reduce, start_gather_rows, start_scatter_rows
from parallel.dropout import Kept
from parallel.later import weight_gradient_now_or_later
from parallel.matmul import Again, compute_dtype, packed_linear, plus, product_nt, weight_gradient
from parallel.sharding import SINGLE, Place


@runtime_checkable
class Packed(Protocol):
    """A weight kept in fewer bits."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [O, I], made anew."""
        ...


@dataclass(frozen=True)
class Beside:
    """How the adapters of one layer go with its outputs on this rank."""

    scale: float
    spans: tuple[tuple[int, int], ...]
    """Columns [start, stop) of the outputs here that each adapter adds to."""

    def ranks(self, h: torch.Tensor) -> Sequence[torch.Tensor]:
        """The columns [T, r] of each adapter in [T, n r]."""
        return h.chunk(len(self.spans), 1)

    def rows(self, b: torch.Tensor) -> Sequence[torch.Tensor]:
        """The rows [O_i, r] of each adapter in B."""
        return b.split([stop - start for start, stop in self.spans])

    def add(self, out: torch.Tensor, h: torch.Tensor, b: torch.Tensor) -> None:
        """out += s h B^T, each adapter in its columns."""
        for (start, stop), h_i, b_i in zip(self.spans, self.ranks(h), self.rows(b), strict=True):
            out[:, start:stop].addmm_(h_i, b_i.t(), alpha=self.scale)

    def back(self, grad: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """s grad B: the gradient of h, [T, n r]."""
        found = [
            torch.mm(grad[:, start:stop], b_i) for (start, stop), b_i in zip(self.spans, self.rows(b), strict=True)
        ]
        return (found[0] if len(found) == 1 else torch.cat(found, 1)).mul_(self.scale)

    def b_gradient(self, grad: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """s grad^T h: the gradient of B."""
        found = [
            torch.mm(grad[:, start:stop].t(), h_i) for (start, stop), h_i in zip(self.spans, self.ranks(h), strict=True)
        ]
        return (found[0] if len(found) == 1 else torch.cat(found)).mul_(self.scale)


def dense(weight: torch.Tensor | Packed, dtype: torch.dtype) -> torch.Tensor:
    """A weight in the type of a product."""
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else weight.dense(dtype)


class _FrozenLinear(torch.autograd.Function):
    """See `frozen_linear`. Parameters are kept as they are, never a view or a cast of them: ZeRO-3 takes them away
    between forward and backward. Of the input the rows that came are kept, or what `again` needs to make them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        residual: torch.Tensor | None,
        weight: torch.Tensor | Packed,
        bias: torch.Tensor | None,
        beside: Beside,
        again: Again | None,
        place: Place,
        kept: Kept | None,
    ) -> torch.Tensor:
        dtype = compute_dtype(x)
        ctx.dtype, ctx.x_dtype, ctx.place, ctx.beside = dtype, x.dtype, place, beside
        ctx.weight, ctx.a, ctx.b, ctx.again = weight, a, b, again.fn if again else None
        ctx.kept_scale = kept.scale if kept is not None else None
        x = x.to(dtype)
        rows = start_gather_rows(x, place.tp).wait() if place.splits_rows else x
        with torch.autocast(x.device.type, enabled=False):
            out = product_nt(rows, dense(weight, dtype))
            if a is not None and b is not None:
                h = product_nt(rows if kept is None else kept.of(x), a.to(dtype))
                if kept is not None and place.splits_rows:  # the mask is that of own rows
                    h = start_gather_rows(h, place.tp).wait()
                beside.add(out, h, b.to(dtype))
                # Not an attribute: what a layer keeps that is made again is freed until then.
                mask = kept.mask if kept is not None else None
                ctx.save_for_backward(h, mask, *(again.tensors if again else (x,)))
            out = plus(out, bias, residual)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_x, need_a, need_b, need_r = ctx.needs_input_grad[:4]
        place, beside, dtype = ctx.place, ctx.beside, ctx.dtype
        a: torch.Tensor | None = ctx.a
        h, mask, *kept = ctx.saved_tensors if a is not None else (grad, None)
        stays = None if mask is None else Kept(mask, ctx.kept_scale)
        grad_c, by_rows = grad.to(dtype), place.splits_rows
        waiting = grad_a = grad_b = grad_h = None
        with torch.autocast(grad.device.type, enabled=False):
            if a is not None:
                grad_h = beside.back(grad_c, ctx.b.to(dtype))
                # Of own rows A's gradient needs no input of others; this message is thin.
                grad_h = start_scatter_rows(grad_h, place.tp).wait() if by_rows else grad_h
            if need_x:
                grad_x = product_nt(grad_c, dense(ctx.weight, dtype).t())
                if a is not None and grad_h is not None and not by_rows:
                    _add_back(grad_x, grad_h, a.to(dtype), stays)
                waiting = (start_scatter_rows if by_rows else start_all_reduce)(grad_x, place.tp)
            if need_a and grad_h is not None:
                grad_a = weight_gradient_now_or_later(ctx.a, partial(_a_gradient, ctx, grad_h, kept, stays))
            if need_b:
                grad_b = weight_gradient_now_or_later(ctx.b, partial(_b_gradient, ctx, grad_c, h))
            grad_x = waiting.wait() if waiting else None
            if grad_x is not None and a is not None and grad_h is not None and by_rows:
                _add_back(grad_x, grad_h, a.to(dtype), stays)
        grad_x = None if grad_x is None else grad_x.to(ctx.x_dtype)
        return grad_x, grad_a, grad_b, grad if need_r else None, None, None, None, None, None, None


def _add_back(grad_x: torch.Tensor, grad_h: torch.Tensor, a: torch.Tensor, kept: Kept | None) -> None:
    """grad_x += the input's gradient through the adapter."""
    if kept is None:
        grad_x.addmm_(grad_h, a)
    else:
        grad_x.add_(kept.of(torch.mm(grad_h, a)))


def _a_gradient(ctx: Any, grad_h: torch.Tensor, kept: Sequence[torch.Tensor], stays: Kept | None) -> torch.Tensor:
    with torch.autocast(grad_h.device.type, enabled=False):
        x = ctx.again(*kept).to(ctx.dtype) if ctx.again else kept[0]
        return weight_gradient(grad_h, x if stays is None else stays.of(x)).to(ctx.a.dtype)


def _b_gradient(ctx: Any, grad: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        return ctx.beside.b_gradient(grad, h).to(ctx.b.dtype)


def frozen_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Packed,
    pair: tuple[torch.Tensor, torch.Tensor] | None,
    beside: Beside,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    again: Again | None = None,
    place: Place = SINGLE,
    kept: Kept | None = None,
) -> torch.Tensor:
    """`x W^T + s (x A^T) B^T + bias + residual`; differentiable by x, A, B and residual.

    Args:
        x: [T, I]; of a column layer under sequence parallel this rank's rows.
        pair: A [n r, I] and B [O, r] as they lie here; None for the weight alone.
        again: how the backward makes `x` again; without it `x` is kept where A is trained.
        kept: dropout on what goes into A, of `x` as it came.
        place: of a column layer, whose input is whole or gathered from the ranks' rows; otherwise nothing is exchanged.

    Returns:
        [T, O] of this rank, under sequence parallel all rows.
    """
    if isinstance(weight, torch.Tensor) and not place.splits_rows:
        out = packed_linear(x, weight, bias, residual)
        if out is not None:  # generation
            if pair is not None:
                beside.add(out, product_nt(x, pair[0]), pair[1])
            return out
    a, b = pair or (None, None)
    return _FrozenLinear.apply(x, a, b, residual, weight, bias, beside, again, place, kept)
