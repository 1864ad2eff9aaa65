"""CLIP (Radford et al. 2021): a tower whose class token is compared with the last token of a causal text encoder."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from models.config import ModelConfig, Problem
from models.dual.checks import pair_problems
from models.dual.folders import sections_in, sections_of, text_of, text_rules
from models.llava import images_of, tower_of
from models.rules import Rename, Rule, Scalar, Tie, Unused
from models.vision.config import PooledConfig, VisionConfig
from models.vision.rules import tower_rules

TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
"""What a text_config leaves out because transformers fills it in."""


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `clip`."""
    sections = sections_in(config)
    tower = dataclasses.replace(
        tower_of({"vision_config": sections["vision_config"] | {"model_type": "clip_vision_model"}}),
        feature_layer=-1,
        final_norm=True,
        keep_class=True,
    )
    crops = (config.get("preprocessor_config") or {"do_center_crop": True}).get("do_center_crop")
    images = images_of(config, mode="fixed", fit="crop" if crops else "squash")
    pooled = PooledConfig(width=config.get("projection_dim") or 512)
    text = TEXT | sections["text_config"]
    return text_of("clip", text, VisionConfig("clip", tower, pooled, images))


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `clip`."""
    assert cfg.vision is not None and isinstance(cfg.vision.connector, PooledConfig)
    width = cfg.vision.connector.width
    # transformers takes an eos_token_id of 2 as asking for the highest id of each text, where no tokenizer says better.
    sections = {"text_config": {"eos_token_id": 2, "projection_dim": width}, "vision_config": {"projection_dim": width}}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": width,
        "logit_scale_init_value": 2.6592,
    } | {name: own | sections[name] for name, own in sections_of(cfg).items()}


def rules(cfg: ModelConfig) -> Iterator[Rule | Tie | Unused]:
    """Every tensor of the model."""
    assert cfg.vision is not None
    yield from tower_rules(cfg.vision.tower, "vision_model.")
    yield Rename("connector.body.proj.weight", "visual_projection.weight")
    yield from text_rules(cfg)
    yield Rename("head.weight", "text_projection.weight")
    yield Scalar("temperature.scale", "logit_scale")


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings that CLIP's checkpoints cannot express."""
    return pair_problems(cfg, {"feature_layer": -1, "final_norm": True, "keep_class": True})
