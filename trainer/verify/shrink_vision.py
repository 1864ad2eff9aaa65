"""What a model sees with, made small: as many heads, so that a layout cuts it in the same way, of size 8."""

from __future__ import annotations

import dataclasses
from typing import Any

from models.config import ModelConfig
from models.vision.config import (
    ImageConfig,
    PerceiverConfig,
    PooledConfig,
    QFormerConfig,
    ResamplerConfig,
    TowerConfig,
    VisionConfig,
)

LAYERS, HEAD = 2, 8
PATCH, QUERIES = 4, 3
WIDTH = 16
"""Of the space where pictures and texts are compared."""


def shrunk_vision(vision: VisionConfig, decoder_heads: int) -> VisionConfig:
    """A small tower and connector of the same kinds.

    Args:
        decoder_heads: of the small decoder, whose width they divide.
    """
    tower, connector = vision.tower, vision.connector
    hidden, layers = min(tower.hidden_size, HEAD * tower.num_heads), min(tower.num_layers, LAYERS)
    small = dataclasses.replace(
        tower,
        hidden_size=hidden,
        intermediate_size=max(tower.intermediate_size // tower.hidden_size, 1) * hidden,
        num_layers=layers,
        feature_layer=max(tower.feature_layer, -layers),
        full_layers=(layers - 1,) if tower.full_layers else (),
        patch_size=PATCH,
        image_size=None if tower.native else 2 * PATCH * connector.block,
        window_size=None if tower.window_size is None else 2 * PATCH * connector.block,
    )
    changed: dict[str, Any] = {}
    if isinstance(connector, QFormerConfig | PerceiverConfig):
        changed |= {"num_layers": min(connector.num_layers, LAYERS), "queries": min(connector.queries, QUERIES)}
    if isinstance(connector, QFormerConfig):
        width = min(connector.hidden_size, HEAD * connector.num_heads)
        changed |= {"hidden_size": width, "intermediate_size": 2 * width}
    if isinstance(connector, PooledConfig):
        changed["width"] = hidden if connector.width == tower.hidden_size else min(connector.width, WIDTH)
    if isinstance(connector, ResamplerConfig):
        changed |= {"num_heads": decoder_heads, "side": min(connector.side, 2)}
    images = _shrunk_images(vision.images, tower, small, connector.block)
    cross = vision.cross
    if cross is not None:
        inner = 2 * HEAD * cross.num_heads
        cross = dataclasses.replace(cross, head_dim=min(cross.head_dim, HEAD), intermediate_size=inner)
    reader = dataclasses.replace(connector, **changed)
    return dataclasses.replace(vision, tower=small, connector=reader, images=images, cross=cross)


def with_equal_sides(model: ModelConfig) -> ModelConfig:
    """A Q-Former in its first stage whose queries have the sizes of its text side, as they share their layers."""
    assert model.vision is not None
    shared = {key: getattr(model, key) for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads")}
    connector = dataclasses.replace(model.vision.connector, **shared)
    return dataclasses.replace(model, vision=dataclasses.replace(model.vision, connector=connector))


def _shrunk_images(images: ImageConfig, tower: TowerConfig, small: TowerConfig, block: int) -> ImageConfig:
    """Pictures of few features, cut into tiles as those of the config are."""
    feature = (PATCH * block) ** 2  # pixels
    grids = images.grids
    if tower.image_size is not None and small.image_size is not None:
        old, new = tower.image_size, small.image_size
        grids = tuple((max(high // old, 1) * new, max(wide // old, 1) * new) for high, wide in grids)
    most = max(min(images.max_tiles, 4), images.min_tiles)
    return dataclasses.replace(images, grids=grids, max_tiles=most, min_pixels=feature, max_pixels=9 * feature)


def shrunk_sections(pairs: int) -> tuple[int, int, int]:
    """Pairs of a small head that turn by time, by row and by column."""
    side = max((pairs - 1) // 3, 1)
    return pairs - 2 * side, side, side
