"""Whether two configs describe one computation, whatever they say about how it is trained."""

import dataclasses
from typing import Any

from models.blocks.rope import attention_factor, score_factor
from models.config import ModelConfig, RopeConfig

TRAINING = {"init_std"} | {
    f"moe.{key}" for key in ("bias_rate", "balance_loss", "balance_over", "z_loss", "capacity")
}  # fmt: skip
"""Fields that say how a model is trained, by their path."""


def differing(a: ModelConfig, b: ModelConfig) -> list[str]:
    """The fields (`rope.factor`, `moe.top_k`, ...) by which two models compute different things."""
    ours, theirs = deciding(a), deciding(b)
    return [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Every field of a config and of its sections by its path: `{"rope.theta": 10000.0, ...}`; a missing section is
    one None."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        nested = dataclasses.is_dataclass(value)
        found |= flat(value, f"{prefix}{field.name}.") if nested else {prefix + field.name: value}
    return found


def deciding(cfg: ModelConfig) -> dict[str, Any]:
    """The fields that decide what is computed, equal for configs that compute the same."""
    found = {key: value for key, value in flat(cfg).items() if key not in TRAINING and not key.startswith("rope.")}
    if cfg.sliding_window is None:
        del found["full_attention_layers"]
    if cfg.moe is not None and cfg.moe.groups == 1:
        del found["moe.groups_kept"], found["moe.group_score"]
    return found | {f"rope.{key}": value for key, value in _rope(cfg, cfg.rope).items()}


def _rope(cfg: ModelConfig, rope: RopeConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"theta": rope.theta, "scaling": rope.scaling, "sections": rope.sections}
    if rope.scaling == "none":
        return found
    found["factor"] = rope.factor
    if rope.scaling != "linear":
        found["original_max_seq_len"] = rope.original_max_seq_len or cfg.max_seq_len
    if rope.scaling == "yarn":
        # Different settings give the same factors; rounded, because they come out of logarithms.
        found |= {key: getattr(rope, key) for key in ("beta_fast", "beta_slow", "truncate")}
        found["attention_factor"] = round(attention_factor(rope), 9)
        found["mscale_all_dim"] = round(score_factor(rope), 9) if cfg.mla else None
    if rope.scaling == "llama3":
        found |= {key: getattr(rope, key) for key in ("low_freq_factor", "high_freq_factor")}
    return found
