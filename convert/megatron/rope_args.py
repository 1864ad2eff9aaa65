"""The rotary embedding in Megatron's arguments, both ways.

Megatron knows it plain, position interpolation (linear), Llama 3's with fixed bounds, and yarn; the last has one set of
names for latent attention and one for the rest. Source: Megatron-core's `rotary_pos_embedding.py`,
`yarn_rotary_pos_embedding.py` and `multi_latent_attention.py`; Megatron-LM's `argument_utils.py`
(`_apply_yarn_config_from_args`).
"""

import math
from typing import Any

from convert.megatron.given import Given
from models.blocks.rope import attention_factor
from models.config import ModelConfig, RopeConfig

LLAMA3_LEN = 8192
"""The original length Megatron takes with --use-rope-scaling; the bounds are 1 and 4."""
YARN_LEN = 4096


def whole_if_so(value: float) -> int | float:
    """10000 rather than 10000.0: some of Megatron's numbers are ints on its command line."""
    return int(value) if float(value).is_integer() else value


def rope_args(cfg: ModelConfig) -> dict[str, Any]:
    """What Megatron reads of the rotary embedding. A scaling it does not know is left out."""
    rope = cfg.rope
    yarn = rope.scaling == "yarn"
    general = yarn and not cfg.mla
    found: dict[str, Any] = {
        "position_embedding_type": "yarn" if general else "rope",
        # Megatron takes this one for an order to use plain rope.
        "use_rotary_position_embeddings": not general,
        "add_position_embedding": True,
        "rotary_base": whole_if_so(rope.theta),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": whole_if_so(rope.factor) if rope.scaling == "linear" else None,
        "use_rope_scaling": rope.scaling == "llama3",
        "rope_scaling_factor": rope.factor if rope.scaling == "llama3" else 8.0,
        "rope_type": ("yarn" if yarn else "rope") if cfg.mla else None,
        "rotary_scaling_factor": rope.factor if yarn else 1.0,
    }
    mscale, all_dim = _mscales(rope) if yarn else (1.0, 0.0)
    found |= {"mscale": mscale, "mscale_all_dim": all_dim}
    if not yarn:
        return found
    trained = rope.original_max_seq_len or cfg.max_seq_len
    if cfg.mla:
        return found | {
            "original_max_position_embeddings": trained,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }
    return found | {
        "yarn_original_max_position_embeddings": trained,
        "yarn_rotary_scaling_factor": rope.factor,
        "yarn_beta_fast": rope.beta_fast,
        "yarn_beta_slow": rope.beta_slow,
        "yarn_mscale": mscale,
        "yarn_mscale_all_dim": all_dim,
        "yarn_correction_range_round_to_int": rope.truncate,
    }


def _mscales(rope: RopeConfig) -> tuple[float, float]:
    """Megatron's mscale m and mscale_all_dim a. With f(x) = 0.1 x log(factor) + 1, cos and sin are multiplied with
    f(m) / f(a), and latent attention multiplies its scores with f(a) squared."""
    all_dim = rope.mscale_all_dim or 0.0
    if rope.factor <= 1:
        return 1.0, 0.0
    if rope.attention_factor is None and rope.mscale and all_dim:
        return rope.mscale, all_dim
    if rope.attention_factor is None and not all_dim:
        return 1.0, 0.0
    slope = 0.1 * math.log(rope.factor)
    return (attention_factor(rope) * (slope * all_dim + 1.0) - 1.0) / slope, all_dim


def rope_from(given: Given, mla: bool, max_seq_len: int) -> RopeConfig:
    """The rotary embedding of Megatron's arguments; what is not computed here is noted in `given`."""
    theta = given.number("rotary_base", default=10000.0)
    kind = given.get("position_embedding_type", default="learned_absolute")
    if given.get("use_rotary_position_embeddings"):
        kind = "rope"
    if kind not in ("rope", "yarn"):
        given.refuse("position_embedding_type", kind, "the decoder has rotary position embeddings only")
    if given.number("rotary_percent", default=1.0) != 1.0:
        given.refuse("rotary_percent", given.get("rotary_percent"), "the decoder turns whole heads only")
    if given.get("rotary_interleaved"):
        given.refuse("rotary_interleaved", True, "the decoder turns halves of a head, not neighbours")
    if mla:
        yarn = given.get("rope_type", default="yarn") == "yarn"
        return _yarn(given, theta, "") if yarn else RopeConfig(theta)
    if kind == "yarn":
        return _yarn(given, theta, "yarn_")
    stretch = given.number("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor", default=1.0)
    if given.get("use_rope_scaling", "rope_scaling"):
        if stretch != 1.0:
            key = given.named("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor")
            given.refuse(key, stretch, "two scalings of the rotary embedding at once (use_rope_scaling is the other)")
        return RopeConfig(theta, "llama3", given.number("rope_scaling_factor", default=8.0), LLAMA3_LEN)
    return RopeConfig(theta, "linear", stretch, max_seq_len) if stretch != 1.0 else RopeConfig(theta)


def _yarn(given: Given, theta: float, prefix: str) -> RopeConfig:
    factor = given.number(f"{prefix}rotary_scaling_factor", "rotary_scaling_factor", default=1.0)
    if factor <= 1:
        return RopeConfig(theta)
    m = given.number(f"{prefix}mscale", "mscale", default=1.0)
    all_dim = given.number(f"{prefix}mscale_all_dim", "mscale_all_dim", default=0.0)
    slope = 0.1 * math.log(factor)
    both = bool(m and all_dim)
    plain = m == 1.0 and not all_dim
    return RopeConfig(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_seq_len=given.count(f"{prefix}original_max_position_embeddings", default=YARN_LEN),
        beta_fast=given.number(f"{prefix}beta_fast", default=32.0),
        beta_slow=given.number(f"{prefix}beta_slow", default=1.0),
        attention_factor=None if both or plain else (slope * m + 1.0) / (slope * all_dim + 1.0),
        mscale=m if both else None,
        mscale_all_dim=all_dim or None,
        truncate=bool(given.get("yarn_correction_range_round_to_int", default=True)) if prefix else True,
    )
