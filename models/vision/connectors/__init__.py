"""Connectors by name: from a tower's features to rows of the decoder's hidden states. Each is a file and an entry here.

A connector is made with (VisionConfig, width of the decoder, Place, recompute) and called with the tower's features of
all tiles [B S, D'] and the tiles' grids; it gives [I, D], tile after tile. `pooled` gives one vector of each tile, for
models that compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from models.dual.pooled import build_pooling
from models.vision.config import VisionConfig
from models.vision.connectors.blocks import PatchMerger, PixelShuffle
from models.vision.connectors.perceiver import Perceiver
from models.vision.connectors.projector import Projector
from models.vision.connectors.qformer import QFormer
from models.vision.connectors.resampler import Resampler
from parallel.sharding import Place

CONNECTORS: dict[str, Callable[..., nn.Module]] = {
    "linear": Projector,
    "mlp": Projector,
    "pixel_shuffle": PixelShuffle,
    "patch_merger": PatchMerger,
    "qformer": QFormer,
    "perceiver": Perceiver,
    "resampler": Resampler,
    "pooled": build_pooling,
}


def build_connector(cfg: VisionConfig, width: int, place: Place, recompute: bool) -> Any:
    """The connector that the config names."""
    return CONNECTORS[cfg.connector.name](cfg, width, place, recompute)
