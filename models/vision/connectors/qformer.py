"""Q-Former: a BERT whose input are learnt queries and whose layers, every so many, read the features of a tile.

Source: Li et al. 2023, BLIP-2, section 3.1; Devlin et al. 2019 (post-norm layers).
Legend: B tiles, Q queries of a tile, W its width, D' the tower's, D the decoder's.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.vision.config import QFormerConfig, VisionConfig
from models.vision.connectors.cross import CrossAttention, of_each_tile
from models.vision.layers import FeedForward, LayerNorm, Linear
from parallel.layers import parameter
from parallel.sharding import REPLICATED, Place


class QFormerLayer(nn.Module):
    """Queries see each other, then perhaps the features, then a feed-forward; a norm behind each."""

    def __init__(self, cfg: QFormerConfig, index: int, features: int, place: Place) -> None:
        super().__init__()
        width, head_dim = cfg.hidden_size, cfg.hidden_size // cfg.num_heads
        reads = index % cfg.cross_every == 0
        self.attn = CrossAttention(width, width, cfg.num_heads, head_dim, place)
        self.attn_norm, self.mlp_norm = (LayerNorm(width, cfg.norm_eps, place) for _ in range(2))
        self.cross = CrossAttention(width, features, cfg.num_heads, head_dim, place) if reads else None
        self.cross_norm = LayerNorm(width, cfg.norm_eps, place) if reads else None
        self.mlp = FeedForward(width, cfg.intermediate_size, "gelu", place)

    def forward(self, x: torch.Tensor, features: torch.Tensor, tiles: int) -> torch.Tensor:
        """[B Q, W] and [B S, D'] -> [B Q, W]"""
        x = self.attn_norm(self.attn(x, x, x, tiles))
        if self.cross is not None and self.cross_norm is not None:
            x = self.cross_norm(self.cross(x, features, x, tiles))
        return self.mlp_norm(self.mlp(x, x))


class QFormer(nn.Module):
    """[B S, D'] -> [B Q, D]: the layers, and a linear layer to the decoder's width; of a width of 0 there is none."""

    def __init__(self, cfg: VisionConfig, width: int, place: Place, recompute: bool) -> None:
        super().__init__()
        own, features = cfg.connector, cfg.tower.hidden_size
        assert isinstance(own, QFormerConfig)
        self.recompute = recompute
        self.queries = parameter((1, own.queries, own.hidden_size), REPLICATED, "normal", place)  # as its checkpoints
        self.norm = LayerNorm(own.hidden_size, own.norm_eps, place)
        self.layers = nn.ModuleList(QFormerLayer(own, i, features, place) for i in range(own.num_layers))
        self.proj = Linear(own.hidden_size, width, True, place) if width else None

    def forward(self, features: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        x = self.read(features, len(grids))
        return x if self.proj is None else self.proj(x)

    def read(self, features: torch.Tensor, tiles: int) -> torch.Tensor:
        """What the queries of each tile have read, [B Q, W]."""
        x = of_each_tile(self.norm(self.queries[0]), tiles)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, features, tiles, use_reentrant=False, preserve_rng_state=False)
                assert isinstance(x, torch.Tensor)
            else:
                x = layer(x, features, tiles)
        return x
