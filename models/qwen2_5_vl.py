"""Qwen2.5-VL (Bai et al. 2025): Qwen2-VL whose tower looks at windows, with RMSNorms and gated feed-forwards."""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, Problem
from models.hf_config import required
from models.qwen2_vl import (
    canonical,
    decoder_keys,
    merger_of,
    pictures_of,
    rules,
    shared_problems,
    tower_keys,
    with_decoder,
)
from models.vision.config import TowerConfig, VisionConfig

__all__ = ["canonical", "from_hf_config", "problems", "rules", "to_hf_config"]

SIZES = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 4,
}
"""What a vision_config leaves out because transformers fills it in."""


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `qwen2_5_vl`."""
    given = SIZES | dict(required(config, "vision_config"))
    tower = TowerConfig(
        kind="qwen2_5_vl",
        hidden_size=given["hidden_size"],
        intermediate_size=given["intermediate_size"],
        num_layers=given["depth"],
        num_heads=given["num_heads"],
        patch_size=given["patch_size"],
        norm_eps=1e-6,
        activation=given.get("hidden_act", "silu"),
        frames=given.get("temporal_patch_size", 2),
        window_size=given["window_size"],
        full_layers=tuple(given["fullatt_block_indexes"]),
    )
    merger = merger_of(given, rms_norm=True)
    images = pictures_of(config, tokens_per_second=given["tokens_per_second"])
    return with_decoder(config, VisionConfig("qwen2_5_vl", tower, merger, images))


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `qwen2_5_vl`."""
    assert cfg.vision is not None
    tower = cfg.vision.tower
    own = {
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "out_hidden_size": cfg.hidden_size,
        "hidden_act": tower.activation,
        "window_size": tower.window_size,
        "fullatt_block_indexes": list(tower.full_layers),
        "tokens_per_second": cfg.vision.images.tokens_per_second,
    }
    head = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    return decoder_keys(cfg) | head | {"vision_config": own | tower_keys(cfg)}


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings that Qwen2.5-VL's checkpoints cannot express."""
    assert cfg.vision is not None
    found = shared_problems(cfg, rms_norm=True)
    if cfg.vision.images.tokens_per_second is None:
        reason = "Qwen2.5-VL counts the time of videos in seconds"
        found.append(("vision.images.tokens_per_second", None, reason, "model.vision.images.tokens_per_second=2"))
    if not found and cfg.vision.tower.window_size is None:
        side = 8 * cfg.vision.tower.patch_size
        way = f"model.vision.tower.window_size={side} or model.vision.format=loom"
        found.append(("vision.tower.window_size", None, "Qwen2.5-VL looks at windows", way))
    return found
