"""Mixtral: Llama's layers with experts everywhere, no biases, one sliding window for all layers.

Source: Jiang et al. 2024, https://arxiv.org/abs/2401.04088.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from models.config import ModelConfig, MoEConfig, Problem
from models.hf_config import required, shared_fields, shared_keys
from models.rules import ExpertNames, Rule, Tie, llama_rules

__all__ = ["expert_problems", "from_hf_config", "problems", "rules", "to_hf_config"]

NAMES = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `mixtral`.

    `router_aux_loss_coef` is our `balance_loss`, whose scale differs: transformers averages over the layers and counts
    a token once for each expert it goes to, we add up the layers and count it once (as DeepSeek and Megatron do).

    Raises:
        ValueError: a key is missing, or asks for something the decoder does not compute.
    """
    if config.get("router_jitter_noise"):
        raise ValueError("config.json asks for router_jitter_noise; routing here is without noise")
    shared = shared_fields({"rms_norm_eps": 1e-5, "num_key_value_heads": 8} | dict(config))
    moe = MoEConfig(
        num_experts=required(config, "num_local_experts"),
        top_k=config.get("num_experts_per_tok", 2),
        expert_size=shared["intermediate_size"],
        balance_loss=float(config.get("router_aux_loss_coef", 0.0)),
    )
    return ModelConfig(family="mixtral", sliding_window=config.get("sliding_window"), moe=moe, **shared)


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `mixtral`."""
    moe = cfg.moe
    assert moe is not None
    head = "MixtralForCausalLM" if cfg.head == "lm" else "MixtralForSequenceClassification"
    own = {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.balance_loss,
        "sliding_window": cfg.sliding_window,
    }
    return {"model_type": "mixtral", "architectures": [head]} | shared_keys(cfg) | own


def rules(cfg: ModelConfig) -> Iterator[Rule | Tie]:
    """Where each weight lies in a checkpoint."""
    return llama_rules(cfg, NAMES)


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings a Mixtral checkpoint cannot express."""
    moe = cfg.moe
    assert moe is not None
    found: list[Problem] = [
        (key, getattr(cfg, key), "Mixtral has no such thing", f"model.{key}=false")
        for key in ("qkv_bias", "attention_out_bias", "mlp_bias", "qk_norm")
        if getattr(cfg, key)
    ]
    if cfg.full_attention_layers:
        reason = "Mixtral has one window for all layers"
        found.append(("full_attention_layers", cfg.full_attention_layers, reason, "model.full_attention_layers=0"))
    if moe.expert_size != cfg.intermediate_size:
        reason = f"Mixtral has one feed-forward size, model.intermediate_size={cfg.intermediate_size}"
        found.append(("moe.expert_size", moe.expert_size, reason, f"model.moe.expert_size={cfg.intermediate_size}"))
    return found + expert_problems(
        moe, "Mixtral", {"shared_size": 0, "shared_gate": False, "first_dense": 0, "normalize": True}
    )


def expert_problems(moe: MoEConfig, family: str, fixed: Mapping[str, object]) -> list[Problem]:
    """Settings of `model.moe` that the checkpoints of Mixtral and of the Qwen families cannot express, and those that
    differ from `fixed`."""
    fixed = {"score": "softmax", "scale": 1.0, "groups": 1, "groups_kept": 1, "correction_bias": False} | dict(fixed)
    found: list[Problem] = []
    for key, value in fixed.items():
        if getattr(moe, key) != value:
            shown = str(value).lower()
            reason, way = f"is always {shown} in {family}", f"model.moe.{key}={shown}"
            found.append((f"moe.{key}", getattr(moe, key), reason, way))
    return found
