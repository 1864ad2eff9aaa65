"""DeepSeek-V3 (also R1): V2's layers, with sigmoid scores and a correction bias instead of a large balancing loss.

Source: DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437. The multi-token prediction layers of the published
checkpoints (`model.layers.61.*`) are neither trained nor exported: they serve speculative decoding, and transformers
leaves them out too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from models.config import ModelConfig, Problem
from models.deepseek_v2 import deepseek_fields, deepseek_keys, deepseek_problems, moe_fields
from models.rules import Rule, Tie, Unused, llama_rules

__all__ = ["from_hf_config", "problems", "rules", "to_hf_config"]


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our sizes from the content of a config.json of type `deepseek_v3`.

    Raises:
        ValueError: it asks for something that is not computed here.
    """
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("rope_interleave", True)):
        if config.get(key, value) != value:
            raise ValueError(f"config.json has {key}={config[key]!r}; implemented for DeepSeek-V3 is {value!r}")
    moe = moe_fields(
        {"first_k_dense_replace": 3} | dict(config),
        score="sigmoid",
        normalize=bool(config.get("norm_topk_prob", True)),
        scale=float(config.get("routed_scaling_factor", 2.5)),
        groups=config.get("n_group") or 1,
        groups_kept=config.get("topk_group") or 1,
        group_score="top2_sum",
        correction_bias=True,
    )
    return ModelConfig(family="deepseek_v3", moe=moe, **deepseek_fields(config))


def to_hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The content of a config.json of type `deepseek_v3`."""
    head = "DeepseekV3ForCausalLM" if cfg.head == "lm" else "DeepseekV3ForSequenceClassification"
    own: dict[str, Any] = {"model_type": "deepseek_v3", "architectures": [head]}
    own |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True}
    return own | deepseek_keys(cfg) | {"num_nextn_predict_layers": 0}


def rules(cfg: ModelConfig) -> Iterator[Rule | Tie | Unused]:
    """Where each weight lies in a checkpoint; layers after the last are for multi-token prediction."""
    yield from llama_rules(cfg)
    yield Unused(f"model.layers.{cfg.num_layers}.", "multi-token prediction, not trained here")


def problems(cfg: ModelConfig) -> list[Problem]:
    """Settings a DeepSeek-V3 checkpoint cannot express."""
    fixed = {"score": "sigmoid", "group_score": "top2_sum", "correction_bias": True}
    found = deepseek_problems(cfg, "DeepSeek-V3", fixed)
    moe = cfg.moe
    if moe is not None and moe.num_experts < 2 * moe.groups:
        reason = f"a group counts its two best of moe.num_experts={moe.num_experts} experts"
        found.append(("moe.groups", moe.groups, reason, f"model.moe.groups={max(1, moe.num_experts // 2)} or fewer"))
    return found
