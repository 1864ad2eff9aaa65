"""What config.json and the tensors of all models that compare have in common: CLIP's, which SigLIP took over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from models.config import ModelConfig
from models.dual.text import layer_config
from models.hf_config import required
from models.llava import ACTIVATIONS
from models.rules import Rename, Rule, Unused
from models.vision.config import VisionConfig
from models.vision.rules import BOTH, clip_layers

SECTIONS = ("text_config", "vision_config")


def sections_in(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What config.json says of the two encoders; older ones say it in `text_config_dict` once more, which counts."""
    return {name: dict(config.get(f"{name}_dict") or config.get(name) or {}) for name in SECTIONS}


def text_of(family: Any, text: Mapping[str, Any], vision: VisionConfig) -> ModelConfig:
    """The model whose text encoder a text_config, nothing left out, describes.

    Raises:
        ValueError: a size is missing, or its activation is not the tower's.
    """
    if ACTIVATIONS.get(text["hidden_act"]) != vision.tower.activation:
        theirs = next(name for name, ours in ACTIVATIONS.items() if ours == vision.tower.activation)
        raise ValueError(
            f"config.json asks for hidden_act={text['hidden_act']!r} in text_config and {theirs!r} in vision_config; "
            "the encoders here have one for both"
        )
    heads = required(text, "num_attention_heads")
    return ModelConfig(
        family=family,
        vocab_size=required(text, "vocab_size"),
        hidden_size=required(text, "hidden_size"),
        intermediate_size=required(text, "intermediate_size"),
        num_layers=required(text, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=required(text, "hidden_size") // heads,
        max_seq_len=required(text, "max_position_embeddings"),
        norm_eps=float(text["layer_norm_eps"]),
        init_std=float(text.get("initializer_range", 0.02)),
        vision=vision,
    )


def sections_of(cfg: ModelConfig) -> dict[str, dict[str, Any]]:
    """The sections of config.json that describe the two encoders."""
    vision = cfg.vision
    assert vision is not None
    tower = vision.tower
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == tower.activation)
    text = {
        "model_type": f"{cfg.family}_text_model",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "max_position_embeddings": cfg.max_seq_len,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_act": activation,
        "initializer_range": cfg.init_std,
    }
    eyes = {
        "model_type": f"{cfg.family}_vision_model",
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "patch_size": tower.patch_size,
        "image_size": tower.image_size,
        "layer_norm_eps": tower.norm_eps,
        "hidden_act": activation,
    }
    return {"text_config": text, "vision_config": eyes}


def text_rules(cfg: ModelConfig) -> Iterator[Rule | Unused]:
    """The text encoder's tensors, without what makes its last vector one of the common space."""
    hf = "text_model."
    yield Rename("embed.weight", f"{hf}embeddings.token_embedding.weight")
    yield Rename("positions.weight", f"{hf}embeddings.position_embedding.weight")
    yield from clip_layers(layer_config(cfg), "", hf)
    for kind in BOTH:
        yield Rename(f"norm.{kind}", f"{hf}final_layer_norm.{kind}")
    yield Unused(f"{hf}embeddings.position_ids", "numbers from 0 on, in older checkpoints")
