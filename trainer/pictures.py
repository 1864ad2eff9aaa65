"""What the data have to know of a model that sees."""

from __future__ import annotations

from data.pictures.types import PictureConfig
from models.config import ModelConfig
from models.vision.config import TowerConfig


def picture_config(model: ModelConfig) -> PictureConfig | None:
    """How pictures are prepared for the model; None if it sees none."""
    vision = model.vision
    if vision is None:
        return None
    tower, images = vision.tower, vision.images
    return PictureConfig(
        mode=images.mode,
        fit=images.fit,
        tile=tower.image_size,
        patch=tower.patch_size,
        frames=tower.frames,
        block=vision.connector.block,
        per_tile=0 if model.compares else vision.features_per_tile,
        extra=int(tower.has_class and tower.keep_class),
        mean=images.mean,
        std=images.std,
        resample=images.resample,
        grids=images.grids,
        newline=images.newline,
        min_tiles=images.min_tiles,
        max_tiles=images.max_tiles,
        thumbnail=images.thumbnail,
        min_pixels=images.min_pixels,
        max_pixels=images.max_pixels,
        token=images.token,
        begin=images.begin,
        end=images.end,
        rotary=bool(model.rope.sections),
        one_token=vision.cross is not None,
        video_token=images.video_token,
        video_min_pixels=images.video_min_pixels,
        video_max_pixels=images.video_max_pixels,
        tokens_per_second=images.tokens_per_second,
        patch_cost=_weights(tower) / (model.num_layers * _layer_weights(model)),
    )


def _weights(tower: TowerConfig) -> float:
    """Weights that a patch goes through."""
    dim = tower.hidden_size
    return tower.num_layers * dim * (4 * dim + 2 * tower.intermediate_size)


def _layer_weights(model: ModelConfig) -> float:
    """Weights of a decoder layer that a token goes through."""
    feed_forward = 3 * model.intermediate_size
    if model.moe is not None:
        feed_forward = 3 * (model.moe.top_k * model.moe.expert_size + model.moe.shared_size)
    return model.hidden_size * (sum(model.qkv_parts) + model.qkv_parts[0] + feed_forward)
