"""Attention of learnt queries to the features of a tile, cut over tp by heads.

Legend: B tiles, Q queries of a tile, M keys of a tile, W width of the queries, D' of the keys, H heads of this rank.
"""

from __future__ import annotations

import torch
from torch import nn

from models.vision.layers import attend
from parallel.layers import ColumnLinear, RowLinear
from parallel.sharding import Place


class CrossAttention(nn.Module):
    """out(attention(q(queries), k|v(keys))) + residual."""

    def __init__(
        self, width: int, keys: int, heads: int, head_dim: int, place: Place, bias: bool = True
    ) -> None:  # fmt: skip
        super().__init__()
        inner = heads * head_dim
        self.heads = heads // place.tp.size
        self.q = ColumnLinear(width, (inner,), bias, "normal", place, (heads,))
        self.kv = ColumnLinear(keys, (inner, inner), bias, "normal", place, (heads, heads))
        self.out = RowLinear(inner, width, bias, "normal_residual", place)

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, residual: torch.Tensor, tiles: int
    ) -> torch.Tensor:  # fmt: skip
        """
        Args:
            queries: [B Q, W]
            keys: [B M, D']
            residual: [B Q, W]
            tiles: B

        Returns:
            [B Q, W]
        """
        q = self.q(queries).unflatten(1, (self.heads, -1))
        k, v = self.kv(keys).unflatten(1, (2, self.heads, -1)).unbind(1)
        return self.out(attend(q, k, v, tiles), residual)


def of_each_tile(queries: torch.Tensor, tiles: int) -> torch.Tensor:
    """The learnt queries [Q, W] once for each tile, [B Q, W]."""
    return queries.expand(tiles, -1, -1).flatten(0, 1)
