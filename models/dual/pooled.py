"""One vector of a picture from the features of its tile, as the connector of a model that compares.

Legend: B tiles, S features of a tile, D' hidden size of the tower, W width of the common space.
"""

from __future__ import annotations

import torch
from torch import nn

from models.vision.config import PooledConfig, VisionConfig
from models.vision.connectors.cross import of_each_tile
from models.vision.layers import FeedForward, LayerNorm, Linear, attend
from parallel.layers import RowLinear, parameter
from parallel.sharding import REPLICATED, Place, Shard
from parallel.tensor_linear import column_linear


class ClassPool(nn.Module):
    """The class token through a linear layer (Radford et al. 2021, CLIP): [B S, D'] -> [B, W]."""

    def __init__(self, cfg: VisionConfig, place: Place) -> None:
        super().__init__()
        assert isinstance(cfg.connector, PooledConfig) and cfg.tower.keep_class
        self.proj = Linear(cfg.tower.hidden_size, cfg.connector.width, False, place)

    def forward(self, features: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        return self.proj(features.unflatten(0, (len(grids), -1))[:, 0])


class Probing(nn.Module):
    """Attention of one learnt query to the features of each tile: [1, D'] and [B S, D'] -> [B, D'].

    q, k and v are one parameter, as in its checkpoints; the query needs the first third of it, the features the rest.
    """

    def __init__(self, width: int, heads: int, place: Place) -> None:
        super().__init__()
        self.place, self.heads = place, heads // place.tp.size
        shard = Shard(0, (width,) * 3, (heads,) * 3)
        self.qkv = parameter((3 * width, width), shard, "normal", place)
        self.qkv_bias = parameter((3 * width,), shard, "zeros", place)
        self.out = RowLinear(width, width, True, "normal", place)

    def forward(self, probe: torch.Tensor, features: torch.Tensor, tiles: int) -> torch.Tensor:
        third = self.qkv.shape[0] // 3
        q = column_linear(probe, self.qkv[:third], self.qkv_bias[:third], self.place)
        kv = column_linear(features, self.qkv[third:], self.qkv_bias[third:], self.place)
        k, v = kv.unflatten(1, (2, self.heads, -1)).unbind(1)
        attended = attend(of_each_tile(q, tiles).unflatten(1, (self.heads, -1)), k, v, tiles)
        return self.out(attended, attended.new_zeros(tiles, self.qkv.shape[1]))


class AttentionPool(nn.Module):
    """What a learnt query reads of a tile, and a feed-forward (Zhai et al. 2023, SigLIP): [B S, D'] -> [B, D']."""

    def __init__(self, cfg: VisionConfig, place: Place) -> None:
        super().__init__()
        tower = cfg.tower
        self.probe = parameter((1, 1, tower.hidden_size), REPLICATED, "normal", place)  # as its checkpoints have it
        self.attn = Probing(tower.hidden_size, tower.num_heads, place)
        self.norm = LayerNorm(tower.hidden_size, tower.norm_eps, place)
        self.mlp = FeedForward(tower.hidden_size, tower.intermediate_size, tower.activation, place)

    def forward(self, features: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        x = self.attn(self.probe[0], features, len(grids))
        return self.mlp(self.norm(x), x)


def build_pooling(cfg: VisionConfig, width: int, place: Place, recompute: bool) -> nn.Module:
    """What the tower's kind asks for. The text side's width does not matter, and there is little to make again."""
    return ClassPool(cfg, place) if cfg.tower.has_class else AttentionPool(cfg, place)
