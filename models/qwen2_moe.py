"""Qwen2-MoE (also Qwen1.5-MoE): Qwen2's layers with experts and a gated shared expert.

Source: Yang et al. 2024, https://arxiv.org/abs/2407.10671, section 2.2.2. What both Qwen families of experts read and
write alike lies here too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from models.config import ModelConfig, MoEConfig, Problem
from models.hf_config import required, shared_fields, shared_keys
from models.mixtral import expert_problems
from models.rules import ExpertNames, Rule, Tie, llama_rules

__all__ = ["from_hf_config", "problems", "rules", "to_hf_config"]

FIXED = {"attention_out_bias": False, "mlp_bias": False, "qk_norm": False}
NAMES = ExpertNames(shared="shared_expert")


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `qwen2_moe`.

    Raises:
        ValueError: a key is missing, or asks for something the decoder does not compute.
    """
    if config.get("use_sliding_window"):
        raise ValueError("config.json has use_sliding_window=true; Qwen2-MoE is implemented with full attention only")
    moe = qwen_moe_fields(config, shared_size=required(config, "shared_expert_intermediate_size"), shared_gate=True)
    return ModelConfig(
        family="qwen2_moe", qkv_bias=bool(config.get("qkv_bias", True)), moe=moe, **shared_fields(config)
    )


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `qwen2_moe`."""
    assert cfg.moe is not None
    head = "Qwen2MoeForCausalLM" if cfg.head == "lm" else "Qwen2MoeForSequenceClassification"
    own: dict[str, Any] = {"qkv_bias": cfg.qkv_bias, "use_sliding_window": False, "sliding_window": None}
    own |= {"shared_expert_intermediate_size": cfg.moe.shared_size, "max_window_layers": cfg.num_layers}
    return {"model_type": "qwen2_moe", "architectures": [head]} | shared_keys(cfg) | own | qwen_moe_keys(cfg.moe)


def rules(cfg: ModelConfig) -> Iterator[Rule | Tie]:
    """Where each weight lies in a checkpoint."""
    return llama_rules(cfg, NAMES)


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings a Qwen2-MoE checkpoint cannot express."""
    moe = cfg.moe
    assert moe is not None
    found: list[Problem] = [
        (key, getattr(cfg, key), f"is always {str(value).lower()} in Qwen2-MoE", f"model.{key}={str(value).lower()}")
        for key, value in FIXED.items()
        if getattr(cfg, key) != value
    ]
    if cfg.sliding_window is not None:
        reason = "Qwen2-MoE is implemented with full attention only"
        found.append(("sliding_window", cfg.sliding_window, reason, "model.sliding_window=null"))
    if not moe.shared_size:
        reason = "Qwen2-MoE always has a shared expert"
        found.append(("moe.shared_size", 0, reason, f"model.moe.shared_size={4 * moe.expert_size}"))
    return found + expert_problems(moe, "Qwen2-MoE", {"shared_gate": True})


def qwen_moe_fields(config: Mapping[str, Any], **own: Any) -> MoEConfig:
    """The experts of a config.json of either Qwen family.

    Raises:
        ValueError: a key is missing, or the layers with experts are not all from some layer on.
    """
    dense = sorted(config.get("mlp_only_layers") or [])
    if config.get("decoder_sparse_step", 1) != 1 or dense != list(range(len(dense))):
        raise ValueError(
            f"config.json mixes dense layers and experts (decoder_sparse_step={config.get('decoder_sparse_step', 1)}, "
            f"mlp_only_layers={dense}); implemented are dense layers first and experts in all others"
        )
    return MoEConfig(
        num_experts=_experts(config),
        top_k=required(config, "num_experts_per_tok"),
        expert_size=required(config, "moe_intermediate_size"),
        first_dense=len(dense),
        normalize=bool(config.get("norm_topk_prob", False)),
        balance_loss=float(config.get("router_aux_loss_coef", 0.0)),
        **own,
    )


def _experts(config: Mapping[str, Any]) -> int:
    # transformers 5 writes Qwen3-MoE's number of experts under another name than 4 did.
    return config.get("num_local_experts") or required(config, "num_experts")


def qwen_moe_keys(moe: MoEConfig) -> dict[str, Any]:
    """The keys of config.json for the experts of either Qwen family."""
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_size,
        "mlp_only_layers": list(range(moe.first_dense)),
        "decoder_sparse_step": 1,
        "norm_topk_prob": moe.normalize,
        "router_aux_loss_coef": moe.balance_loss,
    }
