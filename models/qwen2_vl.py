"""Qwen2-VL (Wang et al. 2024): pictures in their own size, a patch merger, and a Qwen2 that turns by time, row, column.

Its config.json has the decoder's keys beside the tower's (as published) or under `text_config` (transformers 5); the
first is written, which either version reads.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from models import qwen2
from models.config import ModelConfig, Problem
from models.hf_config import required
from models.llava import ACTIVATIONS, images_of, token_of
from models.rules import Rename, Rule, Tie, Unused
from models.seeing import always
from models.vision.config import MergerConfig, TowerConfig, VisionConfig
from models.vision.rules import tower_rules

SECTIONS = (16, 24, 24)
"""Where config.json says none."""
SIZES = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14, "hidden_act": "quick_gelu"}
"""What a vision_config leaves out because transformers fills it in."""
TIME = "images.tokens_per_second"
TOKENS = {"token": "<|image_pad|>", "begin": "<|vision_start|>", "end": "<|vision_end|>"}
TOKENS["video_token"] = "<|video_pad|>"


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `qwen2_vl`."""
    given = SIZES | dict(required(config, "vision_config"))
    tower = TowerConfig(
        kind="qwen2_vl",
        hidden_size=given["embed_dim"],
        intermediate_size=int(given["embed_dim"] * given["mlp_ratio"]),
        num_layers=given["depth"],
        num_heads=given["num_heads"],
        patch_size=given["patch_size"],
        norm_eps=1e-6,
        activation=ACTIVATIONS[given["hidden_act"]],
        frames=given.get("temporal_patch_size", 2),
    )
    return with_decoder(config, VisionConfig("qwen2_vl", tower, merger_of(given), pictures_of(config)))


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `qwen2_vl`."""
    assert cfg.vision is not None
    tower, activations = cfg.vision.tower, {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    own = {
        "embed_dim": tower.hidden_size,
        "hidden_size": cfg.hidden_size,
        "mlp_ratio": tower.intermediate_size // tower.hidden_size,
        "hidden_act": activations[tower.activation],
    }
    head = {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
    return decoder_keys(cfg) | head | {"vision_config": own | tower_keys(cfg)}


def rules(cfg: ModelConfig) -> Iterator[Rule | Tie | Unused]:
    """Every tensor of the model."""
    vision = cfg.vision
    assert vision is not None and isinstance(vision.connector, MergerConfig)
    yield from tower_rules(vision.tower, "visual.")
    for ours, hf in (("norm", "ln_q"), ("first", "mlp.0"), ("second", "mlp.2")):
        for kind in ("weight",) if ours == "norm" and vision.connector.rms_norm else ("weight", "bias"):
            yield Rename(f"connector.body.{ours}.{kind}", f"visual.merger.{hf}.{kind}")
    yield from qwen2.rules(cfg)


def canonical(name: str) -> str:
    """A tensor's name as `rules` has it, the published one; versions of transformers in between write others."""
    if name.startswith(("model.visual.", "model.language_model.")):
        name = name.removeprefix("model.")
    return name.replace("language_model.", "model.", 1) if name.startswith("language_model.") else name


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings that Qwen2-VL's checkpoints cannot express."""
    assert cfg.vision is not None
    tower, found = cfg.vision.tower, shared_problems(cfg, rms_norm=False) + always(cfg, {TIME: None})
    if not found and tower.intermediate_size % tower.hidden_size:
        reason = f"is a multiple of tower.hidden_size={tower.hidden_size} in Qwen2-VL"
        near = max(round(tower.intermediate_size / tower.hidden_size), 1) * tower.hidden_size
        way = f"model.vision.tower.intermediate_size={near} or model.vision.format=loom"
        found.append(("vision.tower.intermediate_size", tower.intermediate_size, reason, way))
    return found


# ---- what Qwen2-VL and Qwen2.5-VL share -----------------------------------------------------------------------------


def with_decoder(config: Mapping[str, Any], vision: VisionConfig) -> ModelConfig:
    """The decoder, whose keys lie under `text_config` or beside the tower's, with a tower and a connector."""
    nested: Mapping[str, Any] = config.get("text_config") or {}
    beside = {key: value for key, value in config.items() if key != "architectures"}
    text: dict[str, Any] = {"rms_norm_eps": 1e-5} | dict(nested if "hidden_size" in nested else beside)
    rope: dict[str, Any] = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    sections = tuple(rope.pop("mrope_section", SECTIONS))
    for key in ("rope_type", "type"):
        if rope.get(key) == "mrope":
            rope[key] = "default"
    rope.setdefault("rope_theta", text.get("rope_theta", 1000000.0))
    cfg = qwen2.from_hf_config(text | {"rope_parameters": rope})
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    rope_config = dataclasses.replace(cfg.rope, sections=sections)
    return dataclasses.replace(cfg, rope=rope_config, tied_embeddings=tied, vision=vision)


def merger_of(given: Mapping[str, Any], rms_norm: bool = False) -> MergerConfig:
    """The connector, of which vision_config tells."""
    return MergerConfig(block=given.get("spatial_merge_size", 2), rms_norm=rms_norm)


def pictures_of(config: Mapping[str, Any], **own: Any) -> Any:
    """How pictures are prepared; least and most pixels as preprocessor_config.json has them in either spelling."""
    given = config.get("preprocessor_config") or {}
    size = given.get("size") or {}
    told = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    told |= {key: given[key] for key in told if given.get(key)}
    moving = config.get("video_preprocessor_config") or {}
    size = moving.get("size") or {}
    told |= {"video_min_pixels": size.get("shortest_edge"), "video_max_pixels": size.get("longest_edge")}
    told |= {f"video_{key}": moving[key] for key in ("min_pixels", "max_pixels") if moving.get(key)}
    told |= {"video_token_id": config.get("video_token_id"), **own}
    return images_of(config, mode="native", **TOKENS, **{key: value for key, value in told.items() if value})


def decoder_keys(cfg: ModelConfig) -> dict[str, Any]:
    """The keys of config.json beside the tower's."""
    keys = qwen2.to_hf_config(dataclasses.replace(cfg, vision=None))
    scaling = keys.get("rope_scaling") or {"type": "mrope"}
    keys["rope_scaling"] = scaling | {"mrope_section": list(cfg.rope.sections)}
    assert cfg.vision is not None
    video = cfg.vision.images.video_token_id
    return keys | {"image_token_id": token_of(cfg)} | ({} if video is None else {"video_token_id": video})


def tower_keys(cfg: ModelConfig) -> dict[str, Any]:
    """The keys of vision_config that both have."""
    assert cfg.vision is not None and isinstance(cfg.vision.connector, MergerConfig)
    tower = cfg.vision.tower
    return {
        "model_type": f"{cfg.vision.format}_vision",
        "depth": tower.num_layers,
        "num_heads": tower.num_heads,
        "in_channels": 3,
        "patch_size": tower.patch_size,
        "spatial_merge_size": cfg.vision.connector.block,
        "temporal_patch_size": tower.frames,
    }


def shared_problems(cfg: ModelConfig, rms_norm: bool) -> list[Problem]:
    """Settings that neither can express."""
    vision, found = cfg.vision, []
    assert vision is not None
    if cfg.family != "qwen2":
        found.append(("family", cfg.family, f"the decoder of {vision.format} is a qwen2", "model.vision.format=loom"))
    if not cfg.rope.sections:
        pairs = cfg.head_dim // 2
        row = max((pairs - pairs // 4) // 2, 1)
        reason = f"{vision.format} turns by time, row and column"
        found.append(("rope.sections", [], reason, f"model.rope.sections=[{pairs - 2 * row},{row},{row}]"))
    if cfg.head_dim * cfg.num_heads != cfg.hidden_size:
        reason = f"is hidden_size / num_heads in {vision.format}"
        found.append(("head_dim", cfg.head_dim, reason, f"model.hidden_size={cfg.head_dim * cfg.num_heads}"))
    fixed = {"tower.kind": vision.format, "tower.feature_layer": -1, "tower.norm_eps": 1e-6, "images.mode": "native"}
    return found + always(cfg, fixed | {"connector.name": "patch_merger", "connector.rms_norm": rms_norm})
