"""Models that see whose parts were never put together elsewhere: Loom's own names and config.json, of type `loom_vlm`.

The decoder's tensors are called as its family calls them behind `language_model.`, the tower's as its own behind
`vision_tower.`, a Q-Former's as BLIP-2's, other connectors' as here. The parts of a config.json that all models that
see share stand here too.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch

from models.config import ModelConfig, Problem
from models.hf_config import required
from models.rules import Concat, Rename, Rule, Stack, Tie, Unused
from models.text_families import TEXT_FAMILIES
from models.vision import config as parts
from models.vision.config import CrossConfig, ImageConfig, TowerConfig, VisionConfig
from models.vision.eyes import Connection
from models.vision.qformer_rules import qformer_rules
from models.vision.rules import tower_rules
from parallel.sharding import SINGLE

LOOM = "loom_vlm"
"""The model_type of their config.json."""
R = TypeVar("R", bound=Rule | Tie | Unused)
CONNECTORS = (
    parts.ProjectorConfig,
    parts.ShuffleConfig,
    parts.MergerConfig,
    parts.QFormerConfig,
    parts.PerceiverConfig,
    parts.ResamplerConfig,
    parts.PooledConfig,
)


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `loom_vlm`."""
    return dataclasses.replace(decoder_of(config), vision=vision_in(config))


def vision_in(config: Mapping[str, Any]) -> VisionConfig:
    """What such a config.json says of tower, connector and pictures."""
    keys = {"tower": "vision_config", "connector": "connector_config", "images": "images"}
    given = {"format": "loom", "cross": config.get("cross_config")}
    return vision_of(given | {ours: required(config, theirs) for ours, theirs in keys.items()})


def vision_of(given: Mapping[str, Any]) -> VisionConfig:
    """The section as JSON has it, lists in place of tuples."""
    theirs = given["connector"]
    connector = next(each for each in CONNECTORS if theirs.get("name") in _names(each))
    return VisionConfig(
        format=given["format"],
        tower=TowerConfig(**_tuples(given["tower"])),
        connector=connector(**theirs),
        images=ImageConfig(**_tuples(given["images"])),
        cross=None if given.get("cross") is None else CrossConfig(**given["cross"]),
    )


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `loom_vlm`."""
    assert cfg.vision is not None
    return {"model_type": LOOM, "text_config": text_config(cfg)} | vision_out(cfg.vision)


def vision_out(vision: VisionConfig) -> dict[str, Any]:
    """Tower, connector and pictures as sections of such a config.json."""
    sections: dict[str, Any] = {
        "vision_config": vision.tower,
        "connector_config": vision.connector,
        "images": vision.images,
    }
    if vision.cross is not None:
        sections["cross_config"] = vision.cross
    return {name: dataclasses.asdict(section) for name, section in sections.items()}


def rules(cfg: ModelConfig) -> Iterator[Rule | Tie | Unused]:
    """Every tensor of the model."""
    vision = cfg.vision
    assert vision is not None
    yield from tower_rules(vision.tower, "vision_tower.")
    known = list(qformer_rules(vision.connector)) if isinstance(vision.connector, parts.QFormerConfig) else []
    named = {rule.ours for rule in known}
    yield from known
    yield from (Rename(name, name) for name in connector_names(cfg) if name not in named)
    yield from (renamed(rule, "language_model.") for rule in TEXT_FAMILIES[cfg.family].rules(cfg))


def problems(cfg: ModelConfig) -> list[Problem]:
    """Nothing that our own names cannot express."""
    return []


# ---- what all models that see share ---------------------------------------------------------------------------------


def decoder_of(config: Mapping[str, Any]) -> ModelConfig:
    """The decoder that `text_config` describes.

    Raises:
        ValueError: there is none, or its family is not here.
    """
    text = dict(required(config, "text_config"))
    family = text.get("model_type", "llama")
    if family not in TEXT_FAMILIES:
        known = ", ".join(TEXT_FAMILIES)
        raise ValueError(f"config.json has a text_config of model_type={family!r}; the decoders here are {known}")
    return TEXT_FAMILIES[family].from_hf_config(text)


def text_config(cfg: ModelConfig) -> dict[str, Any]:
    """The decoder as a section of config.json."""
    return TEXT_FAMILIES[cfg.family].to_hf_config(dataclasses.replace(cfg, vision=None))


def connector_names(cfg: ModelConfig) -> list[str]:
    """Names of the connector's parameters."""
    assert cfg.vision is not None
    with torch.device("meta"):
        connection = Connection(cfg.vision, cfg.hidden_size, SINGLE, False, cfg.num_layers)
    return [f"connector.{name}" for name, _ in connection.named_parameters()]


def always(cfg: ModelConfig, fixed: Mapping[str, Any]) -> list[Problem]:
    """The settings that are not as all checkpoints of the model's format have them.

    Args:
        fixed: the only value of each setting, by its path within `model.vision`.
    """
    vision, found = cfg.vision, []
    assert vision is not None
    for path, only in fixed.items():
        section, key = path.split(".")
        value = getattr(getattr(vision, section), key, only)
        if value != only:
            told = str(only).lower() if isinstance(only, bool) else only
            way = f"model.vision.{path}={told} or model.vision.format=loom"
            found.append((f"vision.{path}", value, f"is always {told} in {vision.format}", way))
    return found


def renamed(rule: R, prefix: str) -> R:
    """A decoder's rule for a checkpoint in which its tensors begin with `prefix`."""
    if isinstance(rule, Unused):
        return dataclasses.replace(rule, prefix=prefix + rule.prefix)
    if isinstance(rule, Concat):
        return dataclasses.replace(rule, hf=tuple(prefix + name for name in rule.hf))
    if isinstance(rule, Stack):
        return dataclasses.replace(rule, hf=tuple(tuple(prefix + name for name in each) for each in rule.hf))
    return dataclasses.replace(rule, hf=prefix + rule.hf)


def _names(connector: type) -> tuple[str, ...]:
    from typing import get_args, get_type_hints

    return get_args(get_type_hints(connector)["name"])


def _tuples(section: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of JSON as tuples, also within lists."""

    def tuples(value: Any) -> Any:
        return tuple(tuples(each) for each in value) if isinstance(value, list | tuple) else value

    return {key: tuples(value) for key, value in section.items()}
