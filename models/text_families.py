"""The families of decoders by name. A new one is a file beside this, an entry here, and a YAML in conf/model."""

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


TEXT_FAMILIES: dict[str, Family] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
}
