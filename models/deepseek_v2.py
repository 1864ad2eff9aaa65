"""DeepSeek-V2 (also V2-Lite): multi-head latent attention, shared experts, experts chosen group by group.

Source: DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434. What V2 and V3 read and write alike lies here too.
"""

from collections.abc import Mapping
from typing import Any

from models.config import MLAConfig, ModelConfig, MoEConfig, Problem
from models.hf_config import required, shared_fields, shared_keys
from models.rules import llama_rules as rules

__all__ = ["from_hf_config", "problems", "rules", "to_hf_config"]

METHODS = ("greedy", "group_limited_greedy")


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `deepseek_v2`.

    Raises:
        ValueError: it asks for something that is not computed here.
    """
    method = config.get("topk_method", "greedy")
    if method not in METHODS:
        raise ValueError(f"config.json has topk_method={method!r}; DeepSeek-V2 knows {' and '.join(METHODS)}")
    if config.get("scoring_func", "softmax") != "softmax" or config.get("norm_topk_prob"):
        raise ValueError("config.json wants sigmoid or normed expert weights; DeepSeek-V2 has neither (V3 has)")
    if config.get("mlp_bias"):
        raise ValueError("config.json has mlp_bias=true; the experts here have no biases")
    limited = method == "group_limited_greedy"
    groups = {"groups": required(config, "n_group"), "groups_kept": required(config, "topk_group")} if limited else {}
    moe = moe_fields(config, normalize=False, scale=float(config.get("routed_scaling_factor", 1.0)), **groups)
    return ModelConfig(family="deepseek_v2", moe=moe, **deepseek_fields(config))


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `deepseek_v2`."""
    head = "DeepseekV2ForCausalLM" if cfg.head == "lm" else "DeepseekV2ForSequenceClassification"
    own: dict[str, Any] = {"model_type": "deepseek_v2", "architectures": [head], "mlp_bias": False}
    limited = cfg.moe is not None and cfg.moe.groups > 1
    own |= {"topk_method": METHODS[limited], "scoring_func": "softmax"}
    return own | deepseek_keys(cfg)


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings a DeepSeek-V2 checkpoint cannot express."""
    fixed = {"score": "softmax", "normalize": False, "group_score": "max", "correction_bias": False}
    found = deepseek_problems(cfg, "DeepSeek-V2", fixed)
    if cfg.moe is not None and cfg.moe.groups == 1 and cfg.moe.groups_kept != 1:
        found.append(("moe.groups_kept", cfg.moe.groups_kept, "there is one group", "model.moe.groups_kept=1"))
    if cfg.hidden_size % cfg.num_heads:
        near = max(1, round(cfg.hidden_size / cfg.num_heads)) * cfg.num_heads
        reason = f"DeepSeek-V2 needs a multiple of num_heads={cfg.num_heads}"
        found.append(("hidden_size", cfg.hidden_size, reason, f"model.hidden_size={near}"))
    return found


def deepseek_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that V2 and V3 read in the same way, without the experts.

    Raises:
        ValueError: a key is missing, or asks for something that is not computed here.
    """
    bias = bool(config.get("attention_bias", False))
    mla = MLAConfig(
        kv_rank=required(config, "kv_lora_rank"),
        nope_dim=required(config, "qk_nope_head_dim"),
        rope_dim=required(config, "qk_rope_head_dim"),
        value_dim=required(config, "v_head_dim"),
        q_rank=config.get("q_lora_rank"),
    )
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type") or given.get("type")
    if given.get("mscale_all_dim") and kind not in (None, "default", "yarn"):
        raise ValueError(f"config.json has mscale_all_dim with rotary scaling {kind!r}; it is computed with yarn only")
    # A head_dim in the file is that of the rotated part; ours is that of a whole query head.
    shared = shared_fields(dict(config) | {"head_dim": mla.nope_dim + mla.rope_dim})
    return {"mla": mla, "qkv_bias": bias, "attention_out_bias": bias} | shared


def moe_fields(config: Mapping[str, Any], **own: Any) -> MoEConfig | None:
    """The experts of a config.json, or None where every layer is dense; `own` are the fields V2 and V3 read apart."""
    first_dense = config.get("first_k_dense_replace", 0)
    if first_dense >= required(config, "num_hidden_layers"):
        return None
    if config.get("moe_layer_freq", 1) != 1:
        raise ValueError(f"config.json has moe_layer_freq={config['moe_layer_freq']}; only 1 is implemented")
    size = required(config, "moe_intermediate_size")
    return MoEConfig(
        num_experts=required(config, "n_routed_experts"),
        top_k=required(config, "num_experts_per_tok"),
        expert_size=size,
        shared_size=size * required(config, "n_shared_experts"),
        first_dense=first_dense,
        balance_loss=float(config.get("aux_loss_alpha", 0.0)),
        balance_over="sequence" if config.get("seq_aux") else "global",
        **own,
    )


def deepseek_keys(cfg: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that V2 and V3 write in the same way."""
    mla, moe = cfg.mla, cfg.moe
    assert mla is not None
    keys = shared_keys(cfg) | {
        "head_dim": mla.rope_dim,
        "attention_bias": cfg.qkv_bias,
        "kv_lora_rank": mla.kv_rank,
        "q_lora_rank": mla.q_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "first_k_dense_replace": cfg.num_layers,
        "moe_layer_freq": 1,
    }
    if moe is None:
        return keys
    return keys | {
        "first_k_dense_replace": moe.first_dense,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_size,
        "n_shared_experts": moe.shared_size // moe.expert_size,
        "n_group": moe.groups,
        "topk_group": moe.groups_kept,
        "routed_scaling_factor": moe.scale,
        "norm_topk_prob": moe.normalize,
        "aux_loss_alpha": moe.balance_loss,
        "seq_aux": moe.balance_over == "sequence",
    }


def deepseek_problems(cfg: ModelConfig, family: str, fixed: Mapping[str, object]) -> list[Problem]:
    """Settings neither V2 nor V3 checkpoints can express, and those of `fixed` (of model.moe) that differ."""
    found: list[Problem] = []
    if cfg.mla is None:
        found.append(
            ("mla", None, f"{family} has latent attention", "model.mla.kv_rank=512 and the other sizes of mla")
        )
    if cfg.mlp_bias:
        found.append(("mlp_bias", True, f"{family} has no bias in the feed-forward", "model.mlp_bias=false"))
    if cfg.qkv_bias != cfg.attention_out_bias:
        reason = f"{family} has one switch for the biases around the attention"
        way = f"model.attention_out_bias={str(cfg.qkv_bias).lower()}"
        found.append(("attention_out_bias", cfg.attention_out_bias, reason, way))
    moe = cfg.moe
    if moe is None:
        return found
    if moe.shared_size < moe.expert_size or moe.shared_size % moe.expert_size:
        near = max(1, round(moe.shared_size / moe.expert_size)) * moe.expert_size
        reason = f"{family} counts shared experts of expert_size={moe.expert_size}, at least one"
        found.append(("moe.shared_size", moe.shared_size, reason, f"model.moe.shared_size={near}"))
    if moe.shared_gate:
        found.append(("moe.shared_gate", True, f"{family} has no gate there", "model.moe.shared_gate=false"))
    for key, value in fixed.items():
        if getattr(moe, key) != value:
            shown = str(value).lower()
            found.append(
                (f"moe.{key}", getattr(moe, key), f"is always {shown} in {family}", f"model.moe.{key}={shown}")
            )
    return found
