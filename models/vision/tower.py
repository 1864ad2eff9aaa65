"""Vision transformers whose tiles have one size and learnt positions: CLIP, SigLIP, InternViT.

Legend: B tiles, L tokens of a tile (its patches, and a class token before them where there is one), S features of a
tile, D hidden size of the tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.vision.config import TowerConfig
from models.vision.layers import FeedForward, LayerNorm, attend
from parallel.layers import ColumnLinear, RowLinear, parameter
from parallel.matmul import linear
from parallel.sharding import REPLICATED, Place, keep


class Block(nn.Module):
    """Pre-norm attention over a tile and feed-forward, [B L, D] -> [B L, D]."""

    def __init__(self, cfg: TowerConfig, place: Place) -> None:
        super().__init__()
        self.heads = cfg.num_heads // place.tp.size
        dim, bias = cfg.hidden_size, cfg.qkv_bias
        self.attn_norm, self.mlp_norm = (_norm(cfg, place) for _ in range(2))
        self.qkv = ColumnLinear(dim, (dim, dim, dim), bias, "normal", place, (cfg.num_heads,) * 3)
        self.out = RowLinear(dim, dim, True, "normal_residual", place)
        self.mlp = FeedForward(dim, cfg.intermediate_size, cfg.activation, place)

    def forward(self, x: torch.Tensor, tiles: int) -> torch.Tensor:
        q, k, v = self.qkv(self.attn_norm(x)).unflatten(1, (3, self.heads, -1)).unbind(1)
        x = self.out(attend(q, k, v, tiles), x)
        return self.mlp(self.mlp_norm(x), x)


def _norm(cfg: TowerConfig, place: Place) -> nn.Module:
    return LayerNorm(cfg.hidden_size, cfg.norm_eps, place)


class Tower(nn.Module):
    """Patches of equally large tiles in, features out."""

    def __init__(self, cfg: TowerConfig, place: Place, recompute: bool = False) -> None:
        super().__init__()
        self.cfg, self.recompute = cfg, recompute
        dim, side = cfg.hidden_size, cfg.patch_size
        self.patch = parameter((dim, 3, side, side), REPLICATED, "normal", place)
        self.patch_bias = None if cfg.kind == "clip" else parameter((dim,), REPLICATED, "zeros", place)
        self.class_token = parameter((dim,), REPLICATED, "normal", place) if cfg.has_class else None
        tokens = cfg.grid**2 + int(cfg.has_class)
        self.positions = parameter((tokens, dim), REPLICATED, "normal", place)
        self.pre_norm = LayerNorm(dim, cfg.norm_eps, place) if cfg.kind == "clip" else None
        self.layers = nn.ModuleList(Block(cfg, place) for _ in range(cfg.num_layers))
        self.norm = LayerNorm(dim, cfg.norm_eps, place)
        self.runs = cfg.num_layers + 1 + cfg.feature_layer
        for idle in (*self.layers[self.runs :], *(() if self._norms else (self.norm,))):
            for param in idle.parameters():
                keep(param)

    @property
    def _norms(self) -> bool:
        return self.cfg.kind == "siglip" and self.cfg.feature_layer == -1

    def forward(self, patches_PX: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Features of all tiles, tile after tile.

        Args:
            patches_PX: fp32 [P, X], row by row.
            grids: rows and columns of each tile.

        Returns:
            [B S, D]
        """
        tiles, side = len(grids), self.cfg.grid
        blank = grids == ((1, 1),)  # see `models.vision.eyes`
        assert blank or set(grids) == {(side, side)}, f"tiles {set(grids)} for positions of {side} x {side}"
        x = linear(patches_PX, self.patch.flatten(1), self.patch_bias).unflatten(0, (tiles, -1))
        positions = self.positions
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(tiles, 1, -1), x], 1)
        x = x + (positions[: x.shape[1]] if blank else positions)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        x = self._layers(x.flatten(0, 1), tiles)
        if self._norms:
            x = self.norm(x)
        if self.cfg.has_class and not self.cfg.keep_class:
            x = x.unflatten(0, (tiles, -1))[:, 1:].flatten(0, 1)
        return x

    def _layers(self, x: torch.Tensor, tiles: int) -> torch.Tensor:
        for layer in self.layers[: self.runs]:
            if self.recompute and torch.is_grad_enabled():
                again: Any = checkpoint(layer, x, tiles, use_reentrant=False, preserve_rng_state=False)
                x = again
            else:
                x = layer(x, tiles)
        return x
