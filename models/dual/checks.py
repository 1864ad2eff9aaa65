"""Settings that models which compare pictures and texts cannot have, as (key, value, reason, way out)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from models.config import ModelConfig, Problem
from models.vision.config import PooledConfig

ONLY_DECODERS = (
    "rope",
    "tied_embeddings",
    "qkv_bias",
    "attention_out_bias",
    "mlp_bias",
    "qk_norm",
    "sliding_window",
    "full_attention_layers",
    "moe",
    "mla",
    "head",
)
"""Settings that a text encoder does not read: it has learnt positions, and biases everywhere."""
FORMATS = {"clip": "clip", "siglip": "siglip", "bert": "blip2_itm"}
"""The `vision.format` of each family. A Q-Former may also read any other tower: loom."""


def pair_problems(cfg: ModelConfig, tower: Mapping[str, object]) -> list[Problem]:
    """What CLIP and SigLIP both need.

    Args:
        tower: the only value of some of the tower's settings.
    """
    vision, family = cfg.vision, cfg.family
    assert vision is not None
    found = _decoders_own(cfg)
    if cfg.num_kv_heads != cfg.num_heads:
        reason = "every head of a text encoder has keys of its own"
        found.append(("num_kv_heads", cfg.num_kv_heads, reason, f"model.num_kv_heads={cfg.num_heads}"))
    if cfg.num_heads * cfg.head_dim != cfg.hidden_size:
        reason = f"heads of a text encoder share model.hidden_size={cfg.hidden_size} out"
        size = cfg.hidden_size // cfg.num_heads
        found.append(("head_dim", cfg.head_dim, reason, f"model.head_dim={size}"))
    if not isinstance(vision.connector, PooledConfig):
        way = "model.vision.connector.name=pooled, or a decoder's model.family"
        reason = f"gives many features of a picture, and {family} compares one vector"
        return [*found, ("vision.connector.name", vision.connector.name, reason, way)]
    wanted = {"tower.kind": family} | {f"tower.{key}": value for key, value in tower.items()}
    for path, only in (wanted | {"images.mode": "fixed", "images.newline": False}).items():
        section, _, key = path.partition(".")
        value = getattr(getattr(vision, section), key)
        if value != only:
            told = str(only).lower() if isinstance(only, bool) else only
            found.append((f"vision.{path}", value, f"is always {told} in {family}", f"model.vision.{path}={told}"))
    return found


def _decoders_own(cfg: ModelConfig) -> list[Problem]:
    """Settings of decoders that are not as where nothing is said."""
    found: list[Problem] = []
    for field in dataclasses.fields(ModelConfig):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        value = getattr(cfg, field.name)
        if field.name in ONLY_DECODERS and value != default:
            shown = "a section" if dataclasses.is_dataclass(value) else value
            reason = f"is a decoder's: the text encoder of {cfg.family} has learnt positions, and biases everywhere"
            found.append((field.name, shown, reason, f"leave model.{field.name} out"))
    return found


def misplaced(cfg: ModelConfig) -> list[Problem]:
    """A text encoder without eyes, or eyes of another kind than the text side is."""
    vision = cfg.vision
    if vision is None:
        if not cfg.compares:
            return []
        reason = f"a model of family {cfg.family} compares texts with pictures"
        return [("vision", None, reason, "a section model.vision (see conf/model/tiny_clip.yaml)")]
    if cfg.compares and vision.format != FORMATS[cfg.family] and (cfg.family, vision.format) != ("bert", "loom"):
        reason = f"a model of family {cfg.family} is no {vision.format}"
        way = f"model.vision.format={FORMATS[cfg.family]}" + (" or loom" if cfg.family == "bert" else "")
        return [("vision.format", vision.format, reason, way)]
    if not cfg.compares and vision.format in FORMATS.values():
        reason = f"is a text encoder beside a tower, and model.family={cfg.family} is a decoder"
        family = next(name for name, form in FORMATS.items() if form == vision.format)
        return [("vision.format", vision.format, reason, f"model.family={family}, or model.vision.format=loom")]
    if not cfg.compares and isinstance(vision.connector, PooledConfig):
        reason = f"makes one vector of a picture to compare, and model.family={cfg.family} is a decoder"
        return [("vision.connector.name", vision.connector.name, reason, "model.vision.connector.name=mlp")]
    return []
