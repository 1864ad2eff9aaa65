"""InternVL (Chen et al. 2024) as transformers has it: an InternViT, pixel shuffle, any decoder; a picture is as many
tiles as its aspect ratio asks for."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from models.config import ModelConfig, Problem
from models.hf_config import required
from models.llava import ACTIVATIONS, canonical, images_of, token_of, with_eyes
from models.rules import Rename, Rule, Tie, Unused
from models.seeing import always, renamed, text_config
from models.text_families import TEXT_FAMILIES
from models.vision.config import ImageConfig, ShuffleConfig, TowerConfig, VisionConfig
from models.vision.rules import tower_rules

__all__ = ["canonical", "from_hf_config", "problems", "rules", "to_hf_config"]

SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "attention_bias": False,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
    "use_mean_pooling": True,
}
"""What a vision_config leaves out because transformers fills it in."""
TOKENS = {"token": "<IMG_CONTEXT>", "begin": "<img>", "end": "</img>"}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `internvl`."""
    if config.get("vision_feature_select_strategy", "default") != "default":
        raise ValueError("config.json keeps the class token among the patches, which cannot be joined in blocks then")
    if config.get("projector_hidden_act", "gelu") != "gelu":
        raise ValueError(f"config.json asks for projector_hidden_act={config['projector_hidden_act']!r}; gelu can be")
    connector = ShuffleConfig(block=round(1 / config.get("downsample_ratio", 0.5)))
    cfg = with_eyes(config, VisionConfig("internvl", tower_of(config), connector, _images(config)))
    tied = config.get("tie_word_embeddings")
    return cfg if tied is None else dataclasses.replace(cfg, tied_embeddings=bool(tied))


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `internvl`."""
    vision = cfg.vision
    assert vision is not None and isinstance(vision.connector, ShuffleConfig)
    tower, block = vision.tower, vision.connector.block
    assert tower.image_size is not None
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "text_config": text_config(cfg),
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.num_layers,
            "num_attention_heads": tower.num_heads,
            "patch_size": [tower.patch_size] * 2,
            "image_size": [tower.image_size] * 2,
            "layer_norm_eps": tower.norm_eps,
            "hidden_act": activations[tower.activation],
            "attention_bias": tower.qkv_bias,
            "use_qk_norm": tower.qk_norm,
            "norm_type": "rms_norm" if tower.rms_norm else "layer_norm",
            "use_mean_pooling": not tower.final_norm,
        },
        "image_token_id": token_of(cfg),
        "image_seq_length": (tower.grid // block) ** 2,
        "downsample_ratio": 1 / block,
        "vision_feature_layer": tower.feature_layer,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": cfg.tied_embeddings,
    }


def rules(cfg: ModelConfig) -> Iterator[Rule | Tie | Unused]:
    """Every tensor of the model."""
    assert cfg.vision is not None
    yield from tower_rules(cfg.vision.tower, "vision_tower.")
    for ours, hf in (("norm", "layer_norm"), ("first", "linear_1"), ("second", "linear_2")):
        for kind in ("weight", "bias"):
            yield Rename(f"connector.body.{ours}.{kind}", f"multi_modal_projector.{hf}.{kind}")
    yield from (renamed(rule, "language_model.") for rule in TEXT_FAMILIES[cfg.family].rules(cfg))


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings that InternVL's checkpoints cannot express."""
    return always(cfg, {"tower.kind": "intern", "connector.name": "pixel_shuffle", "images.mode": "tiles"})


def tower_of(config: Mapping[str, Any]) -> TowerConfig:
    """The tower of `vision_config` and where its features are taken."""
    given, layer = SIZES | dict(required(config, "vision_config")), config.get("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise ValueError(f"config.json takes the features of several layers, vision_feature_layer={layer}; one can be")
    if given.get("use_absolute_position_embeddings") is False:
        raise ValueError("config.json has use_absolute_position_embeddings=false; the tower here has learnt positions")
    return TowerConfig(
        kind="intern",
        hidden_size=given["hidden_size"],
        intermediate_size=given["intermediate_size"],
        num_layers=given["num_hidden_layers"],
        num_heads=given["num_attention_heads"],
        patch_size=_side(given["patch_size"]),
        image_size=_side(given["image_size"]),
        norm_eps=float(given["layer_norm_eps"]),
        activation=ACTIVATIONS[given["hidden_act"]],
        feature_layer=layer if layer < 0 else layer - given["num_hidden_layers"] - 1,
        final_norm=not given["use_mean_pooling"],
        qkv_bias=given["attention_bias"],
        qk_norm=given["use_qk_norm"],
        rms_norm=given["norm_type"] == "rms_norm",
    )


def _images(config: Mapping[str, Any]) -> ImageConfig:
    given = config.get("preprocessor_config") or {}
    keys = {"min_tiles": "min_patches", "max_tiles": "max_patches"}
    own = {ours: int(given[theirs]) for ours, theirs in keys.items() if given.get(theirs)}
    own |= {key: value for key, value in IMAGENET.items() if not given.get(f"image_{key}")}
    return images_of(config, mode="tiles", thumbnail=True, **TOKENS, **own)


def _side(size: Any) -> int:
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise ValueError(f"config.json has tiles or patches of {size} pixels; squares can be")
    return int(sides.pop())
