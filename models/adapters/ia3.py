"""Linear layers with learnt factors on their outputs (column layers) or inputs (row layers)."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import nn

from models.adapters.targets import Layer, Linear, take_over
from models.blocks.mla import DownLinear
from parallel.layers import ColumnLinear, RowLinear, parameter
from parallel.matmul import Again
from parallel.sharding import REPLICATED, Place, Shard, shard_of
from parallel.switch import Switch


class Factors(Switch):
    """The factors of one layer, cut as what they multiply. `layer.chosen` is not empty."""

    def __init__(self, layer: Layer, base: Linear, place: Place) -> None:
        super().__init__()
        shard = shard_of(base.weight)
        if isinstance(base, RowLinear):
            self.factor = parameter((layer.inputs,), Shard(0, (layer.inputs,)), "adapter", place)
            self.ends, self.chosen = [0, self.factor.shape[0]], (0,)
            return
        self.ends = list(accumulate(layer.outputs_here(shard, place.tp.size), initial=0))
        self.chosen = layer.chosen
        of = Shard(0, layer.runs, layer.units) if shard.dim == 0 else REPLICATED
        self.factor = parameter((sum(layer.runs),), of, "adapter", place, shard.dim is None and place.splits_rows)

    def of_all(self) -> torch.Tensor:
        """The factor of every output here (of a row layer: input), 1 where none is learnt."""
        sizes = [stop - start for start, stop in zip(self.ends, self.ends[1:], strict=False)]
        learnt = iter(self.factor.split([sizes[i] for i in self.chosen]))
        return torch.cat([next(learnt) if i in self.chosen else self.factor.new_ones(n) for i, n in enumerate(sizes)])


class ScaledColumn(ColumnLinear):
    """`ColumnLinear` whose outputs are multiplied, the bias with them."""

    adapter: Factors

    def __init__(self, base: ColumnLinear, factors: Factors) -> None:
        take_over(self, base, factors)
        self.place = base.place

    def forward(self, x: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        out = super().forward(x, again)
        return out * self.adapter.of_all().to(out.dtype) if self.adapter.on else out


class ScaledDown(DownLinear):
    """`DownLinear` whose outputs are multiplied, the bias with them."""

    adapter: Factors

    def __init__(self, base: DownLinear, factors: Factors) -> None:
        take_over(self, base, factors)

    def forward(self, x: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        out = super().forward(x, again)
        return out * self.adapter.of_all().to(out.dtype) if self.adapter.on else out


class ScaledRow(RowLinear):
    """`RowLinear` whose inputs are multiplied."""

    adapter: Factors

    def __init__(self, base: RowLinear, factors: Factors) -> None:
        take_over(self, base, factors)
        self.place = base.place

    def forward(self, x: torch.Tensor, residual: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        return super().forward(x * self.adapter.factor.to(x.dtype) if self.adapter.on else x, residual)


def scaled(base: Linear, factors: Factors) -> nn.Module:
    """The layer with factors that takes the place of a plain one."""
    if isinstance(base, ColumnLinear):
        return ScaledColumn(base, factors)
    return ScaledRow(base, factors) if isinstance(base, RowLinear) else ScaledDown(base, factors)
