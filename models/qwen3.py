"""Qwen3 (dense): RMSNorm on each query and key head before rotation, a head size of its own, no biases by default."""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, Problem
from models.hf_config import shared_fields, shared_keys, window_fields, window_keys
from models.rules import llama_rules as rules

__all__ = ["from_hf_config", "problems", "rules", "to_hf_config"]


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `qwen3`."""
    bias = bool(config.get("attention_bias", False))
    shared = shared_fields({"head_dim": 128} | dict(config))  # Qwen3's own default, not hidden_size / heads
    return ModelConfig(
        family="qwen3", qk_norm=True, qkv_bias=bias, attention_out_bias=bias, **shared, **window_fields(config)
    )


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `qwen3`."""
    head = "Qwen3ForCausalLM" if cfg.head == "lm" else "Qwen3ForSequenceClassification"
    own = {"attention_bias": cfg.qkv_bias}
    return {"model_type": "qwen3", "architectures": [head]} | shared_keys(cfg) | own | window_keys(cfg)


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings a Qwen3 checkpoint cannot express."""
    found: list[Problem] = []
    if not cfg.qk_norm:
        found.append(("qk_norm", False, "Qwen3 always norms q and k", "model.qk_norm=true, or model.family=qwen2"))
    if cfg.mlp_bias:
        found.append(("mlp_bias", True, "Qwen3 has no bias in the feed-forward", "model.mlp_bias=false"))
    if cfg.qkv_bias != cfg.attention_out_bias:
        reason = "Qwen3 has one switch for the biases of q, k, v and out"
        found.append(
            (
                "attention_out_bias",
                cfg.attention_out_bias,
                reason,
                f"model.attention_out_bias={str(cfg.qkv_bias).lower()}",
            )
        )
    return found
