"""Mixture of experts: a router, experts of which each token uses a few, and perhaps one that every token uses.

No token is dropped unless a capacity is set. With expert parallel the rows travel to the ranks of their experts and
back; with tensor parallel every expert is cut like a dense feed-forward and the partial results are summed once, those
of the shared expert with them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from models.blocks.mlp import swiglu, swiglu_product
from models.blocks.router import Router, Tokens
from models.config import ModelConfig, MoEConfig
from parallel.collectives import copy_to, leave
from parallel.experts import (
    Dispatch,
    enter_twice,
    experts_gradient,
    gather_from_experts,
    grouped_products,
    has_grouped_kernel,
    pieces,
    scatter_to_experts,
)
from parallel.layers import ColumnLinear, RowLinear, parameter
from parallel.matmul import Again, compute_dtype, linear
from parallel.sharding import REPLICATED, Place, Shard


class _ExpertMLP(torch.autograd.Function):
    """rows [M, D], sorted by expert -> weight x down(silu(gate) * up) of each row's expert, [M, D].

    The weight multiplies the product of size F, not the output of size D: then the output need not be kept. Kept are
    gate | up and the rows, or what `again` needs to gather them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight_M: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        plan: Dispatch,
        again: Again | None,
    ) -> torch.Tensor:
        ctx.dtypes, rows = (compute_dtype(rows), rows.dtype), rows.to(compute_dtype(rows))
        ctx.grouped = has_grouped_kernel(rows, gate_up, down)
        ctx.plan, ctx.again, ctx.params = plan, again.fn if again else None, (gate_up, down)
        with torch.autocast(rows.device.type, enabled=False):
            parts = pieces(rows, plan, ctx.grouped)
            halves = grouped_products(parts, gate_up.to(rows.dtype), plan, ctx.grouped)
            scales = pieces(weight_M[:, None], plan, ctx.grouped)
            inner = [swiglu_product(half).mul_(scale) for half, scale in zip(halves, scales, strict=True)]
            out = grouped_products(inner, down.to(rows.dtype), plan, ctx.grouped)
        ctx.num_halves = len(halves)
        ctx.save_for_backward(gate_up, down, weight_M, *halves, *(again.tensors if again else (rows,)))
        return out[0] if len(out) == 1 else torch.cat(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, down, weight_M, *kept = ctx.saved_tensors
        halves, kept = kept[: ctx.num_halves], kept[ctx.num_halves :]
        plan, grouped, (dtype, rows_dtype) = ctx.plan, ctx.grouped, ctx.dtypes
        with torch.autocast(grad.device.type, enabled=False):
            grads = pieces(grad.to(dtype), plan, grouped)
            inner_grads = grouped_products(grads, down.to(dtype).transpose(1, 2), plan, grouped)
            scales = pieces(weight_M[:, None], plan, grouped)
            done = [backward_inside(*each) for each in zip(halves, inner_grads, scales, strict=True)]
            half_grads, inner, weight_grads = (list(part) for part in zip(*done, strict=True))
            grad_rows = None
            if ctx.needs_input_grad[0]:
                out = grouped_products(half_grads, gate_up.to(dtype).transpose(1, 2), plan, grouped)
                grad_rows = (out[0] if len(out) == 1 else torch.cat(out)).to(rows_dtype)
        gate_up_leaf, down_leaf = ctx.params
        grad_gate_up = grad_down = None
        if ctx.needs_input_grad[3]:
            grad_down = experts_gradient(down_leaf, grads, lambda: inner, plan, grouped)
        if ctx.needs_input_grad[2]:
            again = ctx.again or _same
            rows = partial(_pieces_again, again, kept, dtype, plan, grouped)
            grad_gate_up = experts_gradient(gate_up_leaf, half_grads, rows, plan, grouped)
        grad_weight = torch.cat(weight_grads).to(weight_M.dtype)
        return grad_rows, grad_weight, grad_gate_up, grad_down, None, None


def _pieces_again(
    again: Callable[..., torch.Tensor], kept: list[torch.Tensor], dtype: torch.dtype, plan: Dispatch, grouped: bool
) -> Sequence[torch.Tensor]:
    return pieces(again(*kept).to(dtype), plan, grouped)


def backward_inside(
    half: torch.Tensor, inner_grad: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Through scale x silu(gate) * up: the gradient of gate | up, the product itself, the gradient of the scale.

    Overwrites `inner_grad`.
    """
    gate, up = half.chunk(2, -1)
    half_grad = torch.empty_like(half)
    grad_gate, grad_up = half_grad.chunk(2, -1)
    silu = torch.ops.aten.silu.out(gate, out=grad_up)
    inner = silu * up
    scale_grad = torch.linalg.vecdot(inner_grad, inner)
    inner_grad.mul_(scale)
    grad_up.mul_(inner_grad)
    torch.ops.aten.silu_backward.grad_input(inner_grad.mul_(up), gate, grad_input=grad_gate)
    return half_grad, inner.mul_(scale), scale_grad


class Experts(nn.Module):
    """The experts that live here, stacked: gate_up [E, 2F, D] and down [E, D, F], cut over ep and, along F, over tp."""

    def __init__(self, hidden: int, moe: MoEConfig, place: Place) -> None:
        super().__init__()
        number, ffn = moe.num_experts, moe.expert_size
        self.place, self.number = place, number
        across, along = Shard(1, (ffn, ffn), experts=True), Shard(2, (ffn,), experts=True)
        self.gate_up = parameter((number, 2 * ffn, hidden), across, "normal", place)
        self.down = parameter((number, hidden, ffn), along, "normal_residual", place)

    def forward(
        self,
        x_TD: torch.Tensor,
        weight_Tk: torch.Tensor,
        plan: Dispatch,
        base_TD: torch.Tensor | None,
        again: Again | None,
    ) -> torch.Tensor:
        """The weighted sum of its experts' outputs for each token [T, D], plus `base_TD`; partial over tp."""
        rows, weight_M = scatter_to_experts(x_TD, weight_Tk, plan)
        kept = None
        if plan.ep.size == 1:  # the rows are a gather away from x, which is kept by others anyway
            source = again or Again(_same, (x_TD.detach(),))
            kept = Again(lambda *t: source.fn(*t).index_select(0, plan.token_M), source.tensors)
        return gather_from_experts(self.inside(rows, weight_M, plan, kept), base_TD, plan)

    def inside(self, rows: torch.Tensor, weight_M: torch.Tensor, plan: Dispatch, again: Again | None) -> torch.Tensor:
        """The rows [M, D] that came to the experts here, each through its own, times its weight. `again` makes them
        again."""
        return _ExpertMLP.apply(rows, weight_M, self.gate_up, self.down, plan, again)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


class SharedExpert(nn.Module):
    """The expert every token uses, with or without a gate; partial over tp."""

    def __init__(self, cfg: ModelConfig, moe: MoEConfig, place: Place, selective: bool) -> None:
        super().__init__()
        ffn = moe.shared_size
        self.place, self.selective = place, selective
        # Of these layers the weights are used only: rows enter and leave once for all experts together.
        self.gate_up = ColumnLinear(cfg.hidden_size, (ffn, ffn), False, "normal", place)
        self.down = RowLinear(ffn, cfg.hidden_size, False, "normal_residual", place)
        self.gate = parameter((1, cfg.hidden_size), REPLICATED, "normal", place) if moe.shared_gate else None

    def forward(
        self, x_TD: torch.Tensor, alike_TD: torch.Tensor, base_TD: torch.Tensor | None, again: Again | None
    ) -> torch.Tensor:
        """base + gate x down(silu(gate) * up). `alike_TD` is `x_TD` for what is the same on every tp rank."""
        gate_up = linear(x_TD, self.gate_up.weight, again=again)
        product = swiglu(gate_up)
        remake = Again(swiglu_product, (gate_up.detach(),)) if self.selective else None
        if self.gate is None:
            return linear(product, self.down.weight, residual=base_TD, again=remake)
        out = linear(product, self.down.weight, again=remake)
        out = out * copy_to(linear(alike_TD, self.gate, again=again).sigmoid(), self.place.tp)
        return out if base_TD is None else base_TD + out


class MoE(nn.Module):
    """normed [R, D] -> residual + experts(normed), in place of a dense feed-forward."""

    def __init__(self, cfg: ModelConfig, place: Place, selective: bool) -> None:
        super().__init__()
        assert cfg.moe is not None
        self.place = place
        self.router = Router(cfg.hidden_size, cfg.moe, place)
        self.experts = Experts(cfg.hidden_size, cfg.moe, place)
        self.shared = SharedExpert(cfg, cfg.moe, place, selective) if cfg.moe.shared_size else None

    def forward(
        self, normed_RD: torch.Tensor, residual_RD: torch.Tensor, again: Again | None, tokens: Tokens
    ) -> torch.Tensor:
        tp = self.place.tp
        x_TD, alike_TD = enter_twice(normed_RD, self.place)
        again = None if self.place.splits_rows else again  # it makes this rank's rows only
        choice = self.router(_first(alike_TD, tokens.count), again, tokens)
        plan = Dispatch.plan(choice.expert_Tk, choice.kept_Tk, self.experts.number, x_TD.shape[0], self.place.ep)
        out = residual_RD if tp.size == 1 else None
        if self.shared is not None:
            out = self.shared(x_TD, alike_TD, out, again)
        out = self.experts(x_TD, copy_to(choice.weight_Tk, tp), plan, out, again)
        if tp.size == 1:
            return out
        out = leave(out, self.place)
        return out.add_(residual_RD) if out.dtype == residual_RD.dtype else residual_RD + out


def _first(x_TD: torch.Tensor, count: int) -> torch.Tensor:
    return x_TD if x_TD.shape[0] == count else x_TD[:count]
