"""Llama (also SmolLM2 and other models of this type): plain decoder, biases only where the config asks for them."""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, Problem
from models.hf_config import shared_fields, shared_keys
from models.rules import llama_rules as rules

__all__ = ["from_hf_config", "problems", "rules", "to_hf_config"]


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `llama`."""
    bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        family="llama",
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        **shared_fields(config),
    )


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `llama`."""
    head = "LlamaForCausalLM" if cfg.head == "lm" else "LlamaForSequenceClassification"
    own = {"attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias}
    return {"model_type": "llama", "architectures": [head]} | shared_keys(cfg) | own


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings a Llama checkpoint cannot express."""
    found: list[Problem] = []
    if cfg.qkv_bias != cfg.attention_out_bias:
        reason = "Llama has one switch for the biases of q, k, v and out"
        found.append(
            (
                "attention_out_bias",
                cfg.attention_out_bias,
                reason,
                f"model.attention_out_bias={str(cfg.qkv_bias).lower()}",
            )
        )
    if cfg.qk_norm:
        found.append(("qk_norm", True, "Llama has no q/k norm", "model.qk_norm=false, or model.family=qwen3"))
    if cfg.sliding_window is not None:
        way = "model.sliding_window=null, or model.family=qwen2"
        found.append(("sliding_window", cfg.sliding_window, "Llama has no sliding window", way))
    if cfg.hidden_size % cfg.num_heads:
        reason = f"Llama needs a multiple of num_heads={cfg.num_heads}"
        near = max(1, round(cfg.hidden_size / cfg.num_heads)) * cfg.num_heads
        found.append(("hidden_size", cfg.hidden_size, reason, f"model.hidden_size={near}"))
    return found
