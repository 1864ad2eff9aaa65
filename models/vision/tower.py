"""Vision transformers by kind, and those whose tiles have one size and learnt positions: CLIP, SigLIP, InternViT and
BLIP-2's.

Legend: B tiles, L tokens of a tile (its patches, and a class token before them where there is one), S features of a
tile, D hidden size of the tower.
"""

from __future__ import annotations

import torch
from torch import nn

from models.blocks.pieces import Piece
from models.vision.config import TowerConfig
from models.vision.layers import LayerNorm
from models.vision.tower_layers import Seen, keep_all, make_layers, run_layers
from models.vision.tower_native import NativeTower
from parallel.layers import parameter
from parallel.matmul import linear
from parallel.sharding import REPLICATED, Place


class TileTower(nn.Module):
    """Patches of equally large tiles in, features out."""

    def __init__(self, cfg: TowerConfig, place: Place, recompute: bool = False) -> None:
        super().__init__()
        self.cfg, self.recompute = cfg, recompute
        dim, side = cfg.hidden_size, cfg.patch_size
        ones = (1, 1) if cfg.kind in ("intern", "blip2") else ()  # dims that their checkpoints have besides
        self.patch = parameter((dim, 3, side, side), REPLICATED, "normal", place)
        self.patch_bias = None if cfg.kind == "clip" else parameter((dim,), REPLICATED, "zeros", place)
        self.class_token = parameter((*ones, dim), REPLICATED, "normal", place) if cfg.has_class else None
        tokens = cfg.grid**2 + int(cfg.has_class)
        self.positions = parameter((*ones[:1], tokens, dim), REPLICATED, "normal", place)
        self.pre_norm = LayerNorm(dim, cfg.norm_eps, place) if cfg.kind == "clip" else None
        self.layers = make_layers(cfg, place)
        self.norm = LayerNorm(dim, cfg.norm_eps, place) if cfg.has_norm else None
        if self.norm is not None and not cfg.norms_features:
            keep_all(self.norm)

    def forward(self, patches_PX: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Features of all tiles, tile after tile.

        Args:
            patches_PX: fp32 [P, X], row by row.
            grids: rows and columns of each tile: those of the config, or a single smaller one (see
                `models.vision.eyes`), which takes the first positions.

        Returns:
            [B S, D]
        """
        tiles, side, wanted = len(grids), self.cfg.grid, set(grids)
        blank = tiles == 1 and max(grids[0]) < side
        assert blank or wanted == {(side, side)}, f"tiles {wanted} for positions of {side} x {side}"
        x = linear(patches_PX, self.patch.flatten(1), self.patch_bias).unflatten(0, (tiles, -1))
        if self.class_token is not None:
            first = self.class_token.to(x.dtype).view(1, 1, -1).expand(tiles, 1, -1)
            x = torch.cat([first, x], 1)
        x = x + self.positions.flatten(0, -2)[: x.shape[1]]
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        rows = tiles * x.shape[1]
        seen = Seen((Piece(0, rows, 0, tiles),))
        x = run_layers(self.layers, x.flatten(0, 1), [seen] * self.cfg.runs, self.recompute)
        if self.cfg.has_class and not self.cfg.keep_class:
            x = x.unflatten(0, (tiles, -1))[:, 1:].flatten(0, 1)
        return self.norm(x) if self.norm is not None and self.cfg.norms_features else x


Tower = TileTower | NativeTower


def build_tower(cfg: TowerConfig, block: int, place: Place, recompute: bool = False) -> Tower:
    """The tower that the config names.

    Args:
        block: side of the blocks of patches that become one feature; the patches of a block are neighbours where tiles
            have sizes of their own.
        recompute: layers are run anew in the backward instead of being remembered.
    """
    return NativeTower(cfg, block, place, recompute) if cfg.native else TileTower(cfg, place, recompute)
