"""Tensor-parallel layers. With an axis of size one they are the plain layers. Parameters carry how they are cut."""

import torch
from torch import nn
from torch.nn import functional as F

from parallel.collectives import copy_to, reduce_from
from parallel.matmul import Again, linear
from parallel.sharding import REPLICATED, Place, Shard, set_layout


def parameter(shape: tuple[int, ...], shard: Shard, init: str, place: Place, partial: bool = False) -> nn.Parameter:
    """An empty parameter holding this rank's part of a whole tensor of `shape`, with its records set.

    `partial`: every tp rank sees only some of the tokens or heads that make up this parameter's gradient.
    """
    param = nn.Parameter(torch.empty(shard.local_shape(shape, place.cut)))
    set_layout(param, shard, init, partial and place.tp.size > 1)
    return param


class ColumnLinear(nn.Module):
    """Linear layer cut along its outputs: x [T, in] on every rank -> [T, out / size], this rank's outputs.

    `parts` are the sizes of the fused chunks of the outputs (q|k|v, gate|up); each chunk is cut by itself. `units` are
    the numbers of heads in each chunk, where it is made of heads: one with fewer heads than ranks is replicated.
    """

    def __init__(
        self, inputs: int, parts: tuple[int, ...], bias: bool, init: str, place: Place, units: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.place = place
        shard = Shard(0, parts, units)
        self.weight = parameter((sum(parts), inputs), shard, init, place)
        self.bias = parameter((sum(parts),), shard, "zeros", place) if bias else None

    def forward(self, x: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        return linear(copy_to(x, self.place.tp), self.weight, self.bias, again=again)


class RowLinear(nn.Module):
    """Linear layer cut along its inputs: x [T, in / size] -> [T, out], summed over the axis, plus `residual`."""

    def __init__(self, inputs: int, outputs: int, bias: bool, init: str, place: Place) -> None:
        super().__init__()
        self.place = place
        self.weight = parameter((outputs, inputs), Shard(1, (inputs,)), init, place)
        self.bias = parameter((outputs,), REPLICATED, "zeros", place) if bias else None

    def forward(self, x: torch.Tensor, residual: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        if self.place.tp.size == 1:
            return linear(x, self.weight, self.bias, residual, again)
        # Bias and residual are on every rank: they join after the sum, once.
        out = reduce_from(linear(x, self.weight, again=again), self.place.tp)
        return residual + (out if self.bias is None else out + self.bias)


class VocabEmbedding(nn.Module):
    """Token embedding cut along the vocabulary: [T] -> [T, D]. Rows of other ranks count as zero; all are summed."""

    def __init__(self, vocab: int, dim: int, init: str, place: Place) -> None:
        super().__init__()
        self.place = place
        self.weight = parameter((vocab, dim), Shard(0, (vocab,), pad=True), init, place)

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        if self.place.tp.size == 1:
            return F.embedding(tokens_T, self.weight)
        rows = self.weight.shape[0]
        local_T = tokens_T - self.place.tp.rank * rows
        foreign_T = (local_T < 0) | (local_T >= rows)
        hidden_TD = F.embedding(local_T.masked_fill(foreign_T, 0), self.weight)
        return reduce_from(hidden_TD.masked_fill(foreign_T[:, None], 0.0), self.place.tp)
