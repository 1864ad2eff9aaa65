"""All families by the name that a config.json has for them: decoders alone, those that see, and those that compare.

A model that sees has two: `family` is its decoder's, `vision.format` that of the whole.
"""

from collections.abc import Mapping
from typing import Any

from models import blip2, blip2_itm, clip, internvl, llava, llava_next, qwen2_5_vl, qwen2_vl, seeing, siglip
from models.config import ModelConfig, Problem
from models.dual.checks import misplaced
from models.text_families import TEXT_FAMILIES, Family

SEEING: dict[str, Family] = {
    "llava": llava,
    "llava_next": llava_next,
    "internvl": internvl,
    "blip-2": blip2,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "clip": clip,
    "siglip": siglip,
    "blip2_itm": blip2_itm,
    "loom_vlm": seeing,
}
"""clip, siglip: pairs of encoders; their `family` has the same name."""
FAMILIES: dict[str, Family] = TEXT_FAMILIES | SEEING


def family_in(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, whose type has to be among FAMILIES."""
    return blip2_itm if blip2_itm.is_pair(config) else FAMILIES[config["model_type"]]


def family_of(cfg: ModelConfig) -> Family:
    """The family whose checkpoints hold the whole model."""
    if cfg.vision is None:
        return TEXT_FAMILIES[cfg.family]
    if cfg.family == "bert":
        return blip2_itm
    return SEEING[MODEL_TYPES.get(cfg.vision.format, cfg.vision.format)]


MODEL_TYPES = {"blip2": "blip-2", "loom": "loom_vlm"}
"""What config.json calls a `vision.format` where it does not have the same name."""


def problems(cfg: ModelConfig) -> list[Problem]:
    """Every setting that cannot work, as (key, value, reason, way out); the family is asked once the sizes are good."""
    found = cfg.size_problems() or misplaced(cfg)
    if not found and not cfg.compares:
        found = _expert_problems(cfg) or TEXT_FAMILIES[cfg.family].problems(cfg)
    return found or ([] if cfg.vision is None else family_of(cfg).problems(cfg))


DENSE = {"llama": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
"""Families without experts, and those like them that have some."""


def _expert_problems(cfg: ModelConfig) -> list[Problem]:
    if cfg.family in DENSE and cfg.moe is not None:
        way = f"model.moe=null, or model.family={DENSE[cfg.family]}"
        return [("moe", "a section", f"{cfg.family} has no experts", way)]
    if cfg.family in DENSE.values() and cfg.moe is None:
        dense = next(name for name, sparse in DENSE.items() if sparse == cfg.family)
        way = f"model.moe.num_experts=8 and the other keys of model.moe, or model.family={dense}"
        return [("moe", None, f"{cfg.family} is a mixture of experts", way)]
    return []
