"""LLaVA-1.5 (Liu et al. 2023): a CLIP or SigLIP tower, two linear layers, any decoder; one tile a picture."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from models.config import ModelConfig, Problem
from models.hf_config import required
from models.rules import Rename, Rule, Tie, Unused
from models.seeing import decoder_of, renamed, text_config
from models.text_families import TEXT_FAMILIES
from models.vision.config import ImageConfig, ProjectorConfig, TowerConfig, VisionConfig
from models.vision.rules import tower_rules

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
}
"""What a text_config of a Llama leaves out because transformers fills it in: LLaVA-1.5's own does so."""

CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
SIGLIP = CLIP | {"patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
TOWERS: dict[str, tuple[Literal["clip", "siglip"], dict[str, Any]]] = {
    "clip_vision_model": ("clip", CLIP),
    "siglip_vision_model": ("siglip", SIGLIP),
}
ACTIVATIONS: dict[str, Literal["quick_gelu", "gelu", "gelu_tanh"]] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `llava`."""
    tower = tower_of(config)
    crops = (config.get("preprocessor_config") or {"do_center_crop": tower.kind == "clip"}).get("do_center_crop")
    images = images_of(config, mode="fixed", fit="crop" if crops else "squash")
    return with_eyes(config, VisionConfig("llava", tower, projector_of(config), images))


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `llava`."""
    architecture = "LlavaForConditionalGeneration"
    return {"model_type": "llava", "architectures": [architecture], "image_token_index": token_of(cfg)} | keys_of(cfg)


def rules(cfg: ModelConfig) -> Iterator[Rule | Tie | Unused]:
    """Every tensor of the model."""
    vision = cfg.vision
    assert vision is not None and isinstance(vision.connector, ProjectorConfig)
    yield from tower_rules(vision.tower, "vision_tower.")
    for ours, hf in (("first", "linear_1"), ("second", "linear_2")):
        for kind in ("weight", "bias") if vision.connector.bias else ("weight",):
            yield Rename(f"connector.body.{ours}.{kind}", f"multi_modal_projector.{hf}.{kind}")
    if vision.images.newline:
        yield Rename("connector.newline", "image_newline")
    yield from (renamed(rule, "language_model.") for rule in TEXT_FAMILIES[cfg.family].rules(cfg))


def canonical(name: str) -> str:
    """A tensor's name as `rules` has it: older and newer versions of transformers write others."""
    name = name.removeprefix("model.") if not name.startswith(("model.layers", "model.embed", "model.norm")) else name
    name = name.replace("vision_tower.vision_model.", "vision_tower.")
    if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_head")):
        name = name.replace("language_model.", "language_model.model.", 1)
    return f"language_model.{name}" if name.startswith("lm_head.") else name


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings that LLaVA's checkpoints cannot express."""
    assert cfg.vision is not None
    found: list[Problem] = []
    other = "model.vision.format=loom"
    vision, mode = cfg.vision, {"llava": "fixed", "llava_next": "anyres"}[cfg.vision.format]
    if not isinstance(vision.connector, ProjectorConfig) or vision.connector.name != "mlp":
        reason = f"the connector of {vision.format} is mlp"
        found.append(
            ("vision.connector.name", vision.connector.name, reason, f"model.vision.connector.name=mlp or {other}")
        )
    if vision.tower.kind not in ("clip", "siglip"):
        reason = f"the tower of {vision.format} is clip or siglip"
        found.append(("vision.tower.kind", vision.tower.kind, reason, other))
    if vision.images.mode != mode:
        reason = f"{vision.format} takes pictures as {mode}"
        found.append(("vision.images.mode", vision.images.mode, reason, f"model.vision.images.mode={mode} or {other}"))
    return found


# ---- what LLaVA and LLaVA-NeXT share --------------------------------------------------------------------------------


def with_eyes(config: Mapping[str, Any], vision: VisionConfig) -> ModelConfig:
    """The decoder of `text_config` with a tower and a connector."""
    text = dict(required(config, "text_config"))
    if text.get("model_type", "llama") == "llama":
        text = LLAMA | text
    return dataclasses.replace(decoder_of({"text_config": text}), vision=vision)


def tower_of(config: Mapping[str, Any]) -> TowerConfig:
    """The tower of `vision_config` and where its features are taken.

    Raises:
        ValueError: a tower that is not here.
    """
    given = required(config, "vision_config")
    name = given.get("model_type", "clip_vision_model")
    if name not in TOWERS:
        raise ValueError(f"config.json has a vision_config of model_type={name!r}; known are {', '.join(TOWERS)}")
    kind, filled = TOWERS[name]
    sizes, layer = filled | dict(given), config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ValueError(f"config.json takes the features of several layers, vision_feature_layer={layer}; one can be")
    return TowerConfig(
        kind=kind,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        patch_size=sizes["patch_size"],
        image_size=sizes["image_size"],
        norm_eps=float(sizes["layer_norm_eps"]),
        activation=ACTIVATIONS[sizes["hidden_act"]],
        feature_layer=layer if layer < 0 else layer - sizes["num_hidden_layers"] - 1,
        keep_class=config.get("vision_feature_select_strategy", "default") == "full" and kind == "clip",
    )


def projector_of(config: Mapping[str, Any]) -> ProjectorConfig:
    """The two layers."""
    if config.get("projector_hidden_act", "gelu") != "gelu":
        raise ValueError(f"config.json asks for projector_hidden_act={config['projector_hidden_act']!r}; gelu can be")
    return ProjectorConfig("mlp", bool(config.get("multimodal_projector_bias", True)))


def images_of(config: Mapping[str, Any], **own: Any) -> ImageConfig:
    """How pictures are prepared: what preprocessor_config.json says where it is there, else as CLIP does."""
    given = config.get("preprocessor_config") or {}
    told: dict[str, Any] = {}
    for key, name in (("mean", "image_mean"), ("std", "image_std")):
        if given.get(name):
            told[key] = tuple(float(each) for each in given[name])
    if given.get("resample") in RESAMPLE:
        told["resample"] = RESAMPLE[given["resample"]]
    token = config.get("image_token_index", config.get("image_token_id"))
    return ImageConfig(**{"token": "<image>", "token_id": token} | told | own)


def token_of(cfg: ModelConfig) -> int:
    """The id of the token that stands for features."""
    assert cfg.vision is not None
    found = cfg.vision.images.token_id
    return cfg.vocab_size - 1 if found is None else found


def keys_of(cfg: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that both write."""
    vision = cfg.vision
    assert vision is not None and isinstance(vision.connector, ProjectorConfig)
    tower = vision.tower
    names = {kind: name for name, (kind, _) in TOWERS.items()}
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    tokens = tower.grid**2 + int(tower.has_class and tower.keep_class)
    return {
        "text_config": text_config(cfg),
        "vision_config": {
            "model_type": names[tower.kind],
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.num_layers,
            "num_attention_heads": tower.num_heads,
            "patch_size": tower.patch_size,
            "image_size": tower.image_size,
            "layer_norm_eps": tower.norm_eps,
            "hidden_act": activations[tower.activation],
            **({"vision_use_head": False} if tower.kind == "siglip" else {}),
        },
        "vision_feature_layer": tower.feature_layer,
        "vision_feature_select_strategy": "full" if tower.keep_class or not tower.has_class else "default",
        "multimodal_projector_bias": vision.connector.bias,
        "projector_hidden_act": "gelu",
        "image_seq_length": tokens,
        "tie_word_embeddings": cfg.tied_embeddings,
    }
