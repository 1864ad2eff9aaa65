"""Connectors that make one feature of a block of patches.

Sources: Chen et al. 2024, How far are we to GPT-4V (InternVL-1.5: pixel shuffle); Wang et al. 2024, Qwen2-VL (patch
merger).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from models.vision.config import MergerConfig, ShuffleConfig, VisionConfig
from models.vision.layers import LayerNorm, Linear, RMSNorm
from parallel.sharding import Place


class PixelShuffle(nn.Module):
    """Patches row by row, [B S, D'] -> norm and two layers on each block's patches together, [I, D]."""

    def __init__(self, cfg: VisionConfig, width: int, place: Place, recompute: bool) -> None:
        super().__init__()
        own = cfg.connector
        assert isinstance(own, ShuffleConfig)
        self.block = own.block
        together = cfg.tower.hidden_size * own.block**2
        self.norm = LayerNorm(together, 1e-5, place)
        self.first = Linear(together, width, True, place)
        self.second = Linear(width, width, True, place)

    def forward(self, features: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        (rows, columns), side = grids[0], self.block
        assert len(set(grids)) == 1, "a tower with learnt positions has tiles of one size"
        cut = features.view(len(grids), rows // side, side, columns // side, side, -1)
        blocks = cut.transpose(2, 3).reshape(-1, side * side * features.shape[1])
        return self.second(F.gelu(self.first(self.norm(blocks))))


class PatchMerger(nn.Module):
    """Patches block by block, [P, D'] -> norm of each, then two layers on each block's patches together, [I, D]."""

    def __init__(self, cfg: VisionConfig, width: int, place: Place, recompute: bool) -> None:
        super().__init__()
        own, dim = cfg.connector, cfg.tower.hidden_size
        assert isinstance(own, MergerConfig)
        self.together = dim * own.block**2
        self.norm = (RMSNorm if own.rms_norm else LayerNorm)(dim, 1e-6, place)
        self.first = Linear(self.together, self.together, True, place)
        self.second = Linear(self.together, width, True, place)

    def forward(self, features: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        return self.second(F.gelu(self.first(self.norm(features).view(-1, self.together))))
