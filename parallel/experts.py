"""Tokens to experts and back: rows sorted by expert, exchanged over the ranks that share the experts, and products of
each expert's rows with its own weights.

Every rank takes part in every collective, also with no row to send or to receive. Each of the two moves is one gather
of rows on the way in and one sum of rows on the way out; the other way round in the backward.

Sources: Lepikhin et al. 2020 (GShard, the all-to-all); Gale et al. 2022 (MegaBlocks, no token dropped).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from parallel.collectives import start_all_reduce, start_gather_rows, start_scatter_rows
from parallel.later import weight_gradient_now_or_later
from parallel.matmul import product_nt, weight_gradient
from parallel.sharding import Axis, Place

GROUPED_ALIGN = 8
"""The grouped kernel wants rows of a multiple of 16 bytes."""


@dataclass(frozen=True)
class Dispatch:
    """Where each row goes. M rows leave this rank, M' come to it, and each stands for one token at one expert."""

    rows: int
    """Rows of the hidden states here, T; tokens and, under sequence parallel, padding after them."""
    slot_M: torch.Tensor
    """int64: the choice (token x k + j) behind each row, rows sorted by expert."""
    token_M: torch.Tensor
    """int64: the token of each row."""
    bag_M: torch.Tensor
    """int64: the rows of the first token, then of the second, ..."""
    bag_start_T: torch.Tensor
    """int64: where each token's rows begin in `bag_M`."""
    count_e: torch.Tensor
    """int64: rows of each expert that lives here."""
    ep: Axis
    sent: list[int]
    """Rows to each rank of `ep`."""
    received: list[int]
    by_expert_M: torch.Tensor | None
    """int64 [M']: rows that came, in the order of their experts; None where they come in it."""

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each expert that lives here, on the host."""
        return self.count_e.tolist()

    @cached_property
    def stops_e(self) -> torch.Tensor:
        """int32: where each expert's rows end."""
        return self.count_e.cumsum(0).to(torch.int32)

    @staticmethod
    @torch.no_grad()
    def plan(
        expert_Tk: torch.Tensor, kept_Tk: torch.Tensor | None, num_experts: int, rows: int, ep: Axis
    ) -> "Dispatch":
        """Sort the choices by expert and tell the other ranks how many rows they will get.

        Args:
            expert_Tk: int64, the experts of each token.
            kept_Tk: which of them take the token; None = all.
            rows: rows of the hidden states, at least the tokens.
            ep: the ranks that share the experts, in consecutive blocks.
        """
        tokens, k = expert_Tk.shape
        expert_M, slot_M, per_token = expert_Tk.flatten(), None, None
        if kept_Tk is not None:
            slot_M = kept_Tk.flatten().nonzero().squeeze(1)
            expert_M, per_token = expert_M[slot_M], kept_Tk.sum(1)
        order_M = torch.argsort(expert_M, stable=True)
        bag_M = torch.empty_like(order_M)
        bag_M[order_M] = torch.arange(len(order_M), device=order_M.device)
        start_T = torch.full((rows,), len(order_M), device=order_M.device)  # padding has no rows
        if per_token is None:
            torch.arange(0, tokens * k, k, out=start_T[:tokens])
        else:
            start_T[:tokens] = per_token.cumsum(0) - per_token
        slot_M = order_M if slot_M is None else slot_M[order_M]
        count_E = torch.zeros(num_experts, dtype=torch.int64, device=order_M.device)
        count_E.index_add_(0, expert_M, torch.ones_like(expert_M))
        exchange = _exchange_counts(count_E, ep)
        return Dispatch(rows, slot_M, slot_M // k, bag_M, start_T, ep=ep, **exchange)

    def to_experts(self, row_M: torch.Tensor) -> torch.Tensor:
        """Rows [M, ...] to where their experts live: [M', ...], in the order of the experts."""
        if self.ep.size == 1:
            return row_M
        came = _all_to_all(row_M, self.sent, self.received, self.ep)
        return came if self.by_expert_M is None else came.index_select(0, self.by_expert_M)

    def from_experts(self, row_M: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_experts`."""
        if self.ep.size == 1:
            return row_M
        if self.by_expert_M is not None:
            back = torch.empty_like(row_M)
            row_M = back.index_copy_(0, self.by_expert_M, row_M)
        return _all_to_all(row_M, self.received, self.sent, self.ep)

    def sum_of_tokens(self, row_M: torch.Tensor) -> torch.Tensor:
        """[M, D] -> [T, D]: the sum of each token's rows, read once each."""
        return F.embedding_bag(self.bag_M, row_M, self.bag_start_T, mode="sum")


def _exchange_counts(count_E: torch.Tensor, ep: Axis) -> dict[str, Any]:
    if ep.size == 1:
        return {"count_e": count_E, "sent": [], "received": [], "by_expert_M": None}
    came_E = torch.empty_like(count_E)
    dist.all_to_all_single(came_E, count_E, group=ep.group)
    came_Re = came_E.view(ep.size, -1)
    local = came_Re.shape[1]
    both = torch.stack([count_E.view(ep.size, -1).sum(1), came_Re.sum(1)]).tolist()
    by_expert_M = None
    if local > 1:
        label_M = torch.arange(local, device=count_E.device).repeat(ep.size).repeat_interleave(came_E)
        by_expert_M = torch.argsort(label_M, stable=True)
    return {"count_e": came_Re.sum(0), "sent": both[0], "received": both[1], "by_expert_M": by_expert_M}


def _all_to_all(row_M: torch.Tensor, sent: list[int], received: list[int], axis: Axis) -> torch.Tensor:
    came = row_M.new_empty(sum(received), *row_M.shape[1:])
    dist.all_to_all_single(came, row_M.contiguous(), received, sent, group=axis.group)
    return came


class _Scatter(torch.autograd.Function):
    """x [T, D] and weights [T, k] -> the rows of the experts here [M', D] and their weights [M']."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, weight_Tk: torch.Tensor, plan: Dispatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.plan, ctx.shape = plan, weight_Tk.shape
        rows = plan.to_experts(x_TD.index_select(0, plan.token_M))
        return rows, plan.to_experts(weight_Tk.flatten().index_select(0, plan.slot_M))

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor, grad_weight: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan = ctx.plan
        grad_x = plan.sum_of_tokens(plan.from_experts(grad_rows))
        grad_Tk = grad_weight.new_zeros(ctx.shape)
        grad_Tk.view(-1).index_copy_(0, plan.slot_M, plan.from_experts(grad_weight))
        return grad_x, grad_Tk, None


class _Gather(torch.autograd.Function):
    """Rows [M', D] back to their tokens, added up: [T, D], plus `base`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, base_TD: torch.Tensor | None, plan: Dispatch) -> torch.Tensor:
        ctx.plan, ctx.dtype = plan, rows.dtype
        out = plan.sum_of_tokens(plan.from_experts(rows))
        if base_TD is None:
            return out
        return out.add_(base_TD) if base_TD.dtype == out.dtype else base_TD + out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows = grad.to(ctx.dtype).index_select(0, ctx.plan.token_M)
        return ctx.plan.to_experts(rows), grad if ctx.needs_input_grad[1] else None, None


def scatter_to_experts(
    x_TD: torch.Tensor, weight_Tk: torch.Tensor, plan: Dispatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the experts that live here [M', D], sorted by expert, and their weights [M'] (all-to-all)."""
    return _Scatter.apply(x_TD, weight_Tk, plan)


def gather_from_experts(rows: torch.Tensor, base_TD: torch.Tensor | None, plan: Dispatch) -> torch.Tensor:
    """The sum of each token's rows [T, D] (all-to-all), plus `base_TD`."""
    return _Gather.apply(rows, base_TD, plan)


class _EnterTwice(torch.autograd.Function):
    """All rows, twice: what is done with the first differs between tp ranks, so its gradients are summed; what is done
    with the second is the same on each of them, so each has its whole gradient."""

    @staticmethod
    def forward(ctx: Any, x_RD: torch.Tensor, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.place = place
        ctx.set_materialize_grads(False)
        whole = start_gather_rows(x_RD, place.tp).wait() if place.splits_rows else x_RD
        return whole.view_as(whole), whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, cut: torch.Tensor | None, alike: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        tp, rows = ctx.place.tp, ctx.place.splits_rows
        grad = None if alike is None else alike.chunk(tp.size)[tp.rank] if rows else alike
        if cut is None:
            return grad, None
        pending = start_scatter_rows(cut, tp) if rows else start_all_reduce(cut.contiguous().clone(), tp)
        total = pending.wait()
        return total if grad is None else total.add_(grad), None


def enter_twice(x_RD: torch.Tensor, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """Before a block of which a part is cut over tp and a part is the same on every rank (a router): hidden rows as
    they lie between layers -> all rows for the first part, and all rows for the second."""
    return (x_RD, x_RD) if place.tp.size == 1 else _EnterTwice.apply(x_RD, place)


# ---- every row with the weights of its expert ------------------------------------------------------------------------


def has_grouped_kernel(rows: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether one kernel multiplies the rows of all experts: bf16 on a GPU. Elsewhere experts go one by one."""
    aligned = all(size % GROUPED_ALIGN == 0 for weight in weights for size in weight.shape[1:])
    return rows.device.type == "cuda" and rows.dtype is torch.bfloat16 and rows.shape[0] > 0 and aligned


def pieces(rows: torch.Tensor, plan: Dispatch, grouped: bool) -> Sequence[torch.Tensor]:
    """The rows of each expert, views; a single piece where the grouped kernel cuts them itself."""
    return (rows,) if grouped else rows.split(plan.counts)


def grouped_products(
    rows: Sequence[torch.Tensor], weight_eNK: torch.Tensor, plan: Dispatch, grouped: bool
) -> list[torch.Tensor]:
    """`rows @ weight[expert].T` piece by piece: [m, K] -> [m, N]."""
    if grouped:
        return [F.grouped_mm(rows[0], weight_eNK.transpose(1, 2), offs=plan.stops_e)]
    return [
        product_nt(piece, weight) if len(piece) else piece.new_empty(0, weight.shape[0])
        for piece, weight in zip(rows, weight_eNK.unbind(), strict=True)
    ]


def grouped_weight_gradient(
    weight_eNK: torch.Tensor,
    grads: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    plan: Dispatch,
    grouped: bool,
) -> torch.Tensor:
    """`grad.T @ rows` of each expert, in the weight's dtype; zeros for an expert without rows."""
    if grouped:
        return F.grouped_mm(grads[0].t(), rows[0], offs=plan.stops_e).to(weight_eNK.dtype)
    out = torch.empty_like(weight_eNK)
    for into, grad, piece in zip(out.unbind(), grads, rows, strict=True):
        into.copy_(weight_gradient(grad, piece)) if len(piece) else into.zero_()
    return out


def experts_gradient(
    weight: torch.Tensor,
    grads: Sequence[torch.Tensor],
    rows: Callable[[], Sequence[torch.Tensor]],
    plan: Dispatch,
    grouped: bool,
) -> torch.Tensor | None:
    """`grouped_weight_gradient` for the leaf `weight` now, or None where the pipeline puts it off; `rows` gives its
    input when it is wanted."""

    def compute() -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return grouped_weight_gradient(weight, grads, rows(), plan, grouped)

    return weight_gradient_now_or_later(weight, compute)
