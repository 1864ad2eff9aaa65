"""The families by name. A new one is a file beside this, an entry here, and a YAML in conf/model."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from models import deepseek_v2, deepseek_v3, llama, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe
from models.config import ModelConfig, Problem
from models.rules import Rule, Tie, Unused


class Family(Protocol):
    """What a family file gives."""

    @staticmethod
    def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
        """Our sizes from the content of a config.json."""
        ...

    @staticmethod
    def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
        """The content of a config.json from our sizes."""
        ...

    @staticmethod
    def rules(cfg: ModelConfig) -> Iterator[Rule | Tie | Unused]:
        """Where each weight lies in a Hugging Face checkpoint."""
        ...

    @staticmethod
    def problems(cfg: ModelConfig) -> list[Problem]:
        """Settings this family's checkpoints cannot express."""
        ...


FAMILIES: dict[str, Family] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
}


def problems(cfg: ModelConfig) -> list[Problem]:
    """Every setting that cannot work, as (key, value, reason, way out); the family is asked once the sizes are good."""
    return cfg.size_problems() or _expert_problems(cfg) or FAMILIES[cfg.family].problems(cfg)


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
