"""BLIP-2 (Li et al. 2023): its own vision transformer, a Q-Former of learnt queries, a linear layer, and any decoder
that is here (the published ones have OPT and Flan-T5, which are not)."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.config import ModelConfig, Problem
from models.hf_config import required
from models.llava import ACTIVATIONS, canonical, images_of, token_of, with_eyes
from models.rules import Rule, Tie, Unused
from models.seeing import always, renamed, text_config
from models.text_families import TEXT_FAMILIES
from models.vision.config import QFormerConfig, TowerConfig, VisionConfig
from models.vision.qformer_rules import both, qformer_rules
from models.vision.rules import tower_rules

__all__ = ["canonical", "from_hf_config", "problems", "rules", "to_hf_config"]

SIZES: dict[str, Any] = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
QFORMER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "cross_attention_frequency": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
"""What both leave out because transformers fills it in."""


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `blip-2`.

    Raises:
        ValueError: its decoder is not here (OPT, T5).
    """
    decoder = (config.get("text_config") or {}).get("model_type", "opt")
    if decoder not in TEXT_FAMILIES:
        known = ", ".join(TEXT_FAMILIES)
        raise ValueError(
            f"config.json has a text_config of model_type={decoder!r}, which is not a decoder here ({known}). Its "
            "tower and Q-Former can be put before another: model=blip2_vicuna_7b has them"
        )
    if (config.get("qformer_config") or {}).get("use_qformer_text_input"):
        raise ValueError("config.json has use_qformer_text_input=true (InstructBLIP); the queries here read no words")
    tower, connector = parts_of(config)
    images = images_of(config, mode="fixed", fit="squash")
    return with_eyes(config, VisionConfig("blip2", tower, connector, images))


def parts_of(config: Mapping[str, Any]) -> tuple[TowerConfig, QFormerConfig]:
    """Tower and Q-Former of any config.json of type `blip-2`."""
    given, asked = SIZES | dict(required(config, "vision_config")), QFORMER | dict(required(config, "qformer_config"))
    if asked["hidden_act"] != "gelu":
        raise ValueError(f"config.json asks for a Q-Former with hidden_act={asked['hidden_act']!r}; gelu can be")
    tower = TowerConfig(
        kind="blip2",
        hidden_size=given["hidden_size"],
        intermediate_size=given["intermediate_size"],
        num_layers=given["num_hidden_layers"],
        num_heads=given["num_attention_heads"],
        patch_size=given["patch_size"],
        image_size=given["image_size"],
        norm_eps=float(given["layer_norm_eps"]),
        activation=ACTIVATIONS[given["hidden_act"]],
        final_norm=True,
        keep_class=True,
        qkv_bias=given["qkv_bias"],
    )
    connector = QFormerConfig(
        queries=config.get("num_query_tokens", 32),
        hidden_size=asked["hidden_size"],
        intermediate_size=asked["intermediate_size"],
        num_layers=asked["num_hidden_layers"],
        num_heads=asked["num_attention_heads"],
        cross_every=asked["cross_attention_frequency"],
        norm_eps=float(asked["layer_norm_eps"]),
        width=config.get("image_text_hidden_size", 256),
    )
    return tower, connector


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `blip-2`."""
    assert cfg.vision is not None
    return {
        "model_type": "blip-2",
        "architectures": ["Blip2ForConditionalGeneration"],
        "text_config": text_config(cfg),
        "image_token_index": token_of(cfg),
    } | sections_of(cfg.vision)


def sections_of(vision: VisionConfig) -> dict[str, Any]:
    """What all config.json of type `blip-2` say of tower and Q-Former."""
    tower, qformer = vision.tower, vision.connector
    assert isinstance(qformer, QFormerConfig)
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.num_layers,
            "num_attention_heads": tower.num_heads,
            "patch_size": tower.patch_size,
            "image_size": tower.image_size,
            "layer_norm_eps": tower.norm_eps,
            "hidden_act": activations[tower.activation],
            "qkv_bias": tower.qkv_bias,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": qformer.hidden_size,
            "intermediate_size": qformer.intermediate_size,
            "num_hidden_layers": qformer.num_layers,
            "num_attention_heads": qformer.num_heads,
            "cross_attention_frequency": qformer.cross_every,
            "layer_norm_eps": qformer.norm_eps,
            "encoder_hidden_size": tower.hidden_size,
        },
        "num_query_tokens": qformer.queries,
        "image_text_hidden_size": qformer.width,
    }


def rules(cfg: ModelConfig) -> Iterator[Rule | Tie | Unused]:
    """Every tensor of the model."""
    vision = cfg.vision
    assert vision is not None and isinstance(vision.connector, QFormerConfig)
    yield from tower_rules(vision.tower, "vision_model.")
    yield from qformer_rules(vision.connector)
    yield from both("connector.body.proj", "language_projection")
    yield from (renamed(rule, "language_model.") for rule in TEXT_FAMILIES[cfg.family].rules(cfg))


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings that BLIP-2's checkpoints cannot express."""
    fixed = {"tower.kind": "blip2", "tower.feature_layer": -1, "tower.final_norm": True, "tower.keep_class": True}
    return always(cfg, fixed | {"connector.name": "qformer", "images.mode": "fixed"})
