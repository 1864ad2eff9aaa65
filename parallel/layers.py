"""Tensor-parallel layers. With an axis of size one they are the plain layers. Parameters carry how they are cut.

Hidden states between the layers are `[R, D]`: all T rows on every tp rank, or under sequence parallel R = ceil(T / tp)
rows of this rank, of which the last rank's end in padding. Inside a block, between a column and a row layer, there are
always all rows, padding included.
"""

import torch
from torch import nn
from torch.nn import functional as F

from parallel.collectives import leave
from parallel.matmul import Again, linear
from parallel.sharding import REPLICATED, Place, Shard, set_layout
from parallel.tensor_linear import column_linear


def parameter(shape: tuple[int, ...], shard: Shard, init: str, place: Place, partial: bool = False) -> nn.Parameter:
    """An empty parameter holding this rank's part of a whole tensor of `shape`, with its records set.

    `partial`: every tp rank sees only some of the tokens or heads that make up this parameter's gradient.
    """
    param = nn.Parameter(torch.empty(shard.local_shape(shape, place.cut)))
    set_layout(param, shard, init, partial and place.tp.size > 1)
    return param


class ColumnLinear(nn.Module):
    """Linear layer cut along its outputs: x [R, in] -> all rows of this rank's outputs, [T, out / size].

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
        return column_linear(x, self.weight, self.bias, self.place, again)


class RowLinear(nn.Module):
    """Linear layer cut along its inputs: x, all rows [T, in / size] -> sum over the axis + `residual`, [R, out]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, init: str, place: Place) -> None:
        super().__init__()
        self.place = place
        self.weight = parameter((outputs, inputs), Shard(1, (inputs,)), init, place)
        self.bias = parameter((outputs,), REPLICATED, "zeros", place, place.splits_rows) if bias else None

    def forward(self, x: torch.Tensor, residual: torch.Tensor, again: Again | None = None) -> torch.Tensor:
        if self.place.tp.size == 1:
            return linear(x, self.weight, self.bias, residual, again)
        # Bias and residual are not cut: they join after the sum, once. The sum is apart from the product, so that a
        # layer made again in the backward ends with its last product and does not repeat the collective behind it.
        out = leave(linear(x, self.weight, again=again), self.place)
        if self.bias is not None:
            out = out + self.bias
        return out.add_(residual) if out.dtype == residual.dtype else residual + out


class VocabEmbedding(nn.Module):
    """Token embedding cut along the vocabulary: all tokens [T] -> [R, D]. A row of another rank counts as zero."""

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
        return leave(hidden_TD.masked_fill_(foreign_T[:, None], 0.0), self.place)
