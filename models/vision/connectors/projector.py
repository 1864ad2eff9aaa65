"""One or two linear layers on each feature. Source: Liu et al. 2023, LLaVA and LLaVA-1.5."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from models.vision.config import ProjectorConfig, VisionConfig
from models.vision.layers import Linear
from parallel.sharding import Place


class Projector(nn.Module):
    """[I, D'] -> [I, D]."""

    def __init__(self, cfg: VisionConfig, width: int, place: Place, recompute: bool) -> None:
        super().__init__()
        own = cfg.connector
        assert isinstance(own, ProjectorConfig)
        self.first = Linear(cfg.tower.hidden_size, width, own.bias, place)
        self.second = Linear(width, width, own.bias, place) if own.name == "mlp" else None

    def forward(self, features: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        x = self.first(features)
        return x if self.second is None else self.second(F.gelu(x))
