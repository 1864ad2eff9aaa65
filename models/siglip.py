"""SigLIP (Zhai et al. 2023): what a learnt query reads of a picture, and the last place of a padded text, compared."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from models.config import ModelConfig, Problem
from models.dual.checks import pair_problems
from models.dual.folders import sections_in, sections_of, text_of, text_rules
from models.llava import images_of, tower_of
from models.rules import Rename, Rule, Tie, Unused
from models.vision.config import PooledConfig, VisionConfig
from models.vision.rules import BOTH, tower_rules

TEXT: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "pad_token_id": 1,
}
"""What a text_config leaves out because transformers fills it in."""
EYES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
"""What preprocessor_config.json says where it says nothing."""


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `siglip`.

    Raises:
        ValueError: its encoders give vectors of different widths, or the tower has no head.
    """
    sections = sections_in(config)
    text, eyes = TEXT | sections["text_config"], sections["vision_config"]
    if not eyes.get("vision_use_head", True):
        raise ValueError("config.json says vision_use_head=false: without the head there is nothing to compare")
    tower = tower_of({"vision_config": eyes | {"model_type": "siglip_vision_model"}})
    tower = dataclasses.replace(tower, feature_layer=-1, final_norm=True)
    width = text.get("projection_size") or text["hidden_size"]
    if width != tower.hidden_size:
        raise ValueError(f"config.json compares texts of width {width} with pictures of width {tower.hidden_size}")
    prepared = EYES | (config.get("preprocessor_config") or {})
    fit = "crop" if prepared.get("do_center_crop") else "squash"
    images = images_of({**config, "preprocessor_config": prepared}, mode="fixed", fit=fit)
    pooled = PooledConfig(width=width, pad_id=text["pad_token_id"])
    return text_of("siglip", text, VisionConfig("siglip", tower, pooled, images))


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `siglip`."""
    assert cfg.vision is not None and isinstance(cfg.vision.connector, PooledConfig)
    pooled, sections = cfg.vision.connector, sections_of(cfg)
    sections["text_config"] |= {"projection_size": pooled.width, "pad_token_id": pooled.pad_id}
    return {"model_type": "siglip", "architectures": ["SiglipModel"]} | sections


def rules(cfg: ModelConfig) -> Iterator[Rule | Tie | Unused]:
    """Every tensor of the model."""
    assert cfg.vision is not None
    yield from tower_rules(cfg.vision.tower, "vision_model.", pooled=True)
    ours, hf = "connector.body.", "vision_model.head."
    yield Rename(f"{ours}probe", f"{hf}probe")
    yield Rename(f"{ours}attn.qkv", f"{hf}attention.in_proj_weight")
    yield Rename(f"{ours}attn.qkv_bias", f"{hf}attention.in_proj_bias")
    both = {"attn.out": "attention.out_proj", "norm": "layernorm", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    for own, theirs in both.items():
        for kind in BOTH:
            yield Rename(f"{ours}{own}.{kind}", f"{hf}{theirs}.{kind}")
    yield from text_rules(cfg)
    for kind in BOTH:
        yield Rename(f"head.{kind}", f"text_model.head.{kind}")
    yield Rename("temperature.scale", "logit_scale")
    yield Rename("temperature.bias", "logit_bias")


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings that SigLIP's checkpoints cannot express."""
    found = pair_problems(cfg, {"feature_layer": -1, "final_norm": True})
    assert cfg.vision is not None
    pooled, width = cfg.vision.connector, cfg.vision.tower.hidden_size
    if not isinstance(pooled, PooledConfig):
        return found
    if pooled.width != width:
        reason = "the pooling of siglip ends in the tower's own width"
        found.append(("vision.connector.width", pooled.width, reason, f"model.vision.connector.width={width}"))
    if pooled.pad_id >= cfg.vocab_size:
        reason = f"is no token of a vocabulary of model.vocab_size={cfg.vocab_size}"
        found.append(("vision.connector.pad_id", pooled.pad_id, reason, "model.vision.connector.pad_id=0"))
    return found
