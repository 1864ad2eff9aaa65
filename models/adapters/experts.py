"""Stacked experts with adapters of low rank. They take the place of the plain ones and share their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from models.adapters.config import LoraConfig
from models.adapters.targets import Layer
from models.blocks.mlp import swiglu_product
from models.blocks.moe import Experts, backward_inside
from parallel.experts import Dispatch
from parallel.layers import parameter
from parallel.low_rank import Packed
from parallel.low_rank_experts import frozen_experts
from parallel.matmul import Again
from parallel.nf4 import Nf4, pack_
from parallel.sharding import Place, Shard, shard_of
from parallel.switch import Switch

KINDS = ("gate_up", "down")


class ExpertPair(nn.Module):
    """The adapters of one stacked weight: `a` [E, r, I] and `b` [E, O, r], dealt out and cut as it is."""

    def __init__(self, weight: nn.Parameter, layer: Layer, rank: int, place: Place) -> None:
        super().__init__()
        shard, number = shard_of(weight), layer.experts
        whole = Shard(experts=True)
        of_a, of_b = (
            (Shard(2, shard.parts, experts=True), whole) if layer.row else (whole, Shard(1, shard.parts, experts=True))
        )
        # Whole over tp, a parameter's gradient is a part: ranks see other outputs or other inputs.
        self.a = parameter((number, rank, layer.inputs), of_a, "adapter", place, not layer.row)
        self.b = parameter((number, sum(part.outputs for part in layer.parts), rank), of_b, "adapter", place, layer.row)


class ExpertAdapter(Switch):
    """What adapted experts have beside their weights: a pair for gate|up, for down, or for both."""

    def __init__(self, pairs: Mapping[str, ExpertPair], cfg: LoraConfig) -> None:
        super().__init__()
        self.scale, self.nf4 = cfg.scale, cfg.base == "nf4"
        for kind, pair in pairs.items():
            self.add_module(kind, pair)
        self.packed: dict[str, Nf4] = {}

    def pair(self, kind: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B of `gate_up` or `down`, or None where there are none or they are switched off."""
        found = getattr(self, kind, None) if self.on else None
        return None if found is None else (found.a, found.b)


class AdaptedExperts(Experts):
    """`Experts` with adapters."""

    adapter: ExpertAdapter

    def __init__(self, base: Experts, adapter: ExpertAdapter) -> None:
        nn.Module.__init__(self)
        self.place, self.number = base.place, base.number
        self.gate_up, self.down, self.adapter = base.gate_up, base.down, adapter

    def pack(self) -> None:
        """Called when the weights were filled: puts them into 4 bits where they are to be."""
        if self.adapter.nf4:
            for kind in KINDS:
                self.adapter.packed[kind] = pack_(getattr(self, kind))

    def _weight(self, kind: str) -> torch.Tensor | Packed:
        return self.adapter.packed.get(kind) or getattr(self, kind)

    def inside(self, rows: torch.Tensor, weight_M: torch.Tensor, plan: Dispatch, again: Again | None) -> torch.Tensor:
        """As `Experts.inside`."""
        pair, scale = self.adapter.pair, self.adapter.scale
        halves = frozen_experts(rows, self._weight("gate_up"), pair("gate_up"), scale, plan, again)
        inner = _WeightedSwiglu.apply(halves, weight_M)
        remake = Again(_weighted_swiglu, (halves.detach(), weight_M.detach()))
        return frozen_experts(inner, self._weight("down"), pair("down"), scale, plan, remake)


def _weighted_swiglu(halves: torch.Tensor, weight_M: torch.Tensor) -> torch.Tensor:
    return swiglu_product(halves).mul_(weight_M[:, None])


class _WeightedSwiglu(torch.autograd.Function):
    """gate | up [M, 2F] and weights [M] -> weight x silu(gate) * up [M, F]. Keeps what came, which others keep too."""

    @staticmethod
    def forward(ctx: Any, halves: torch.Tensor, weight_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(halves, weight_M)
        return _weighted_swiglu(halves, weight_M)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        halves, weight_M = ctx.saved_tensors
        grad_halves, _, grad_weight = backward_inside(halves, grad.clone(), weight_M[:, None])
        return grad_halves, grad_weight.to(weight_M.dtype)


def adapted_experts(base: Experts, layers: Mapping[str, Layer], cfg: LoraConfig) -> AdaptedExperts:
    """The experts with adapters that take the place of plain ones.

    Args:
        layers: the layers of these experts that have an adapter, by `gate_up` and `down`.
    """
    pairs = {
        kind: ExpertPair(getattr(base, kind), layer, cfg.rank, base.place)
        for kind, layer in layers.items()
        if layer.chosen
    }
    return AdaptedExperts(base, ExpertAdapter(pairs, cfg))
