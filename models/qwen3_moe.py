"""Qwen3-MoE: Qwen3's layers with experts, no shared one.

Source: Yang et al. 2025, https://arxiv.org/abs/2505.09388, section 2.
"""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, Problem
from models.hf_config import shared_fields, shared_keys
from models.mixtral import expert_problems
from models.qwen2_moe import qwen_moe_fields, qwen_moe_keys
from models.rules import llama_rules as rules

__all__ = ["from_hf_config", "problems", "rules", "to_hf_config"]


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `qwen3_moe`.

    Raises:
        ValueError: a key is missing, or asks for something the decoder does not compute.
    """
    bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        family="qwen3_moe",
        qk_norm=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        sliding_window=config.get("sliding_window") if config.get("use_sliding_window") else None,
        moe=qwen_moe_fields(config),
        **shared_fields({"num_key_value_heads": 4} | dict(config)),
    )


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `qwen3_moe`."""
    assert cfg.moe is not None
    head = "Qwen3MoeForCausalLM" if cfg.head == "lm" else "Qwen3MoeForSequenceClassification"
    own: dict[str, Any] = {"attention_bias": cfg.qkv_bias, "use_sliding_window": cfg.sliding_window is not None}
    own |= {"sliding_window": cfg.sliding_window}
    return {"model_type": "qwen3_moe", "architectures": [head]} | shared_keys(cfg) | own | qwen_moe_keys(cfg.moe)


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings a Qwen3-MoE checkpoint cannot express."""
    moe = cfg.moe
    assert moe is not None
    found: list[Problem] = []
    if not cfg.qk_norm:
        found.append(("qk_norm", False, "Qwen3-MoE always norms q and k", "model.qk_norm=true"))
    if cfg.qkv_bias != cfg.attention_out_bias:
        reason = "Qwen3-MoE has one switch for the biases of q, k, v and out"
        way = f"model.attention_out_bias={str(cfg.qkv_bias).lower()}"
        found.append(("attention_out_bias", cfg.attention_out_bias, reason, way))
    if cfg.full_attention_layers:
        reason = "Qwen3-MoE has one window for all layers"
        found.append(("full_attention_layers", cfg.full_attention_layers, reason, "model.full_attention_layers=0"))
    return found + expert_problems(moe, "Qwen3-MoE", {"shared_size": 0, "shared_gate": False})
