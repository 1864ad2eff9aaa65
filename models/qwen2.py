"""Qwen2 and Qwen2.5: biases on q, k, v (always) and nowhere else; optional sliding window from some layer on."""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, Problem
from models.hf_config import shared_fields, shared_keys, window_fields, window_keys
from models.rules import llama_rules as rules

__all__ = ["from_hf_config", "problems", "rules", "to_hf_config"]

FIXED = {"qkv_bias": True, "attention_out_bias": False, "mlp_bias": False, "qk_norm": False}


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `qwen2`."""
    return ModelConfig(family="qwen2", qkv_bias=True, **shared_fields(config), **window_fields(config))


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `qwen2`."""
    head = "Qwen2ForCausalLM" if cfg.head == "lm" else "Qwen2ForSequenceClassification"
    return {"model_type": "qwen2", "architectures": [head]} | shared_keys(cfg) | window_keys(cfg)


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings a Qwen2 checkpoint cannot express."""
    return [
        (key, getattr(cfg, key), f"is always {str(value).lower()} in Qwen2", f"model.{key}={str(value).lower()}")
        for key, value in FIXED.items()
        if getattr(cfg, key) != value
    ]
