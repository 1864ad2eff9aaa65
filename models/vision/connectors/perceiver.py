"""Perceiver resampler. Source: Alayrac et al. 2022, Flamingo, section 2.1 and appendix A.1.1; Xue et al. 2024, BLIP-3.

Legend: B tiles, S features of a tile, Q latents, D' width of the tower and of the latents, D of the decoder.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.vision.config import PerceiverConfig, VisionConfig
from models.vision.connectors.cross import CrossAttention, of_each_tile
from models.vision.layers import LayerNorm, Linear
from parallel.layers import ColumnLinear, RowLinear, parameter
from parallel.sharding import REPLICATED, Place


class PerceiverLayer(nn.Module):
    """Latents read features and latents, then a feed-forward; both on top of what they were."""

    def __init__(self, dim: int, cfg: PerceiverConfig, place: Place) -> None:
        super().__init__()
        self.norm_features, self.norm_latents, self.norm = (LayerNorm(dim, cfg.norm_eps, place) for _ in range(3))
        self.attn = CrossAttention(dim, dim, cfg.num_heads, cfg.head_dim, place, False)
        self.up = ColumnLinear(dim, (cfg.ffn_ratio * dim,), False, "normal", place)
        self.down = RowLinear(cfg.ffn_ratio * dim, dim, False, "normal_residual", place)

    def forward(self, latents: torch.Tensor, features: torch.Tensor, tiles: int) -> torch.Tensor:
        """[B Q, D'] and [B S, D'] -> [B Q, D']"""
        own = self.norm_latents(latents)
        seen = [x.unflatten(0, (tiles, -1)) for x in (self.norm_features(features), own)]
        latents = self.attn(own, torch.cat(seen, 1).flatten(0, 1), latents, tiles)
        return self.down(F.gelu(self.up(self.norm(latents))), latents)


class Perceiver(nn.Module):
    """[B S, D'] -> [B Q, D]: the layers, a norm, and a linear layer to the decoder's width."""

    def __init__(self, cfg: VisionConfig, width: int, place: Place, recompute: bool) -> None:
        super().__init__()
        own, dim = cfg.connector, cfg.tower.hidden_size
        assert isinstance(own, PerceiverConfig)
        self.recompute = recompute
        self.latents = parameter((own.queries, dim), REPLICATED, "normal", place)
        self.layers = nn.ModuleList(PerceiverLayer(dim, own, place) for _ in range(own.num_layers))
        self.norm = LayerNorm(dim, own.norm_eps, place)
        self.proj = Linear(dim, width, True, place)

    def forward(self, features: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        tiles = len(grids)
        latents = of_each_tile(self.latents, tiles)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                latents = checkpoint(layer, latents, features, tiles, use_reentrant=False, preserve_rng_state=False)
                assert isinstance(latents, torch.Tensor)
            else:
                latents = layer(latents, features, tiles)
        return self.proj(self.norm(latents))
