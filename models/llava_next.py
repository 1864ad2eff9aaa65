"""LLaVA-NeXT (Liu et al. 2024): LLaVA whose pictures become tiles, the best of several grids and a small whole."""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.hf_config import required
from models.llava import canonical, images_of, keys_of, problems, projector_of, rules, token_of, tower_of, with_eyes
from models.vision.config import VisionConfig

__all__ = ["canonical", "from_hf_config", "problems", "rules", "to_hf_config"]


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `llava_next`."""
    grids = tuple((int(height), int(width)) for height, width in required(config, "image_grid_pinpoints"))
    images = images_of(config, mode="anyres", grids=grids, newline=True)
    return with_eyes(config, VisionConfig("llava_next", tower_of(config), projector_of(config), images))


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `llava_next`."""
    assert cfg.vision is not None
    own = {"image_grid_pinpoints": [list(grid) for grid in cfg.vision.images.grids], "image_token_index": token_of(cfg)}
    return {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]} | own | keys_of(cfg)
