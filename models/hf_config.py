"""The parts of a Hugging Face config.json that all families share, both ways.

Both spellings of the rotary embedding are read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5). The first is written: either version reads it.
"""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, RopeConfig

_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_LLAMA3 = ("low_freq_factor", "high_freq_factor")
_SCALINGS = {"none": (), "linear": (), "dynamic": (), "yarn": _YARN, "llama3": _LLAMA3}


def required(config: Mapping[str, Any], key: str) -> Any:
    """A key that a config.json must have.

    Raises:
        ValueError: it has not.
    """
    if config.get(key) is None:
        raise ValueError(f"config.json has no {key!r}: it is not the config of a complete model of this family")
    return config[key]


def _size(config: Mapping[str, Any], key: str) -> int:
    value = required(config, key)
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json has {key}={value!r}; it must be a whole number above 0")
    return value


def shared_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that every family reads in the same way.

    Raises:
        ValueError: a key is missing, or asks for something the decoder does not compute.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"config.json asks for hidden_act={activation!r}; the decoder has silu (SwiGLU) only")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ValueError(f"config.json says the weights are quantised ({method}); convert them to bf16 first")
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    architectures = config.get("architectures") or []
    return {
        "vocab_size": _size(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _size(config, "intermediate_size"),
        "num_layers": _size(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "max_seq_len": _size(config, "max_position_embeddings"),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "rope": rope_from_hf(config),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "init_std": float(config.get("initializer_range", 0.02)),
        "head": "scalar" if any("SequenceClassification" in name for name in architectures) else "lm",
    }


def rope_from_hf(config: Mapping[str, Any]) -> RopeConfig:
    """The rotary embedding of a config.json in either spelling.

    Raises:
        ValueError: a scaling that is not implemented.
    """
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    scaling = "none" if kind == "default" else kind
    if scaling not in _SCALINGS:
        known = ", ".join(_SCALINGS)
        raise ValueError(f"config.json asks for rotary scaling {kind!r}; implemented are {known}")
    if float(given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("config.json asks for a partial_rotary_factor; the decoder turns whole heads only")
    if scaling == "none":
        return RopeConfig(theta=theta)
    trained = given.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    # transformers measures dynamic scaling from max_position_embeddings and ignores the original length.
    original = config["max_position_embeddings"] if scaling == "dynamic" else trained
    factor = given.get("factor") or config["max_position_embeddings"] / original
    extra = {key: given[key] for key in _SCALINGS[scaling] if given.get(key) is not None}
    return RopeConfig(theta=theta, scaling=scaling, factor=float(factor), original_max_seq_len=original, **extra)


def shared_keys(cfg: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that every family writes in the same way."""
    rope = cfg.rope
    keys: dict[str, Any] = {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": rope.theta,
        "tie_word_embeddings": cfg.tied_embeddings,
        "initializer_range": cfg.init_std,
    }
    if rope.scaling != "none":
        trained = rope.original_max_seq_len or cfg.max_seq_len
        scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
        if rope.scaling == "dynamic":
            keys["max_position_embeddings"] = trained
        elif rope.scaling != "linear":
            scaling["original_max_position_embeddings"] = trained
        fields = {key: getattr(rope, key) for key in _SCALINGS[rope.scaling]}
        keys["rope_scaling"] = scaling | {key: value for key, value in fields.items() if value is not None}
    if cfg.head == "scalar":
        keys["num_labels"] = 1
    return keys


def window_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding window of a Qwen config.json: layers from `max_window_layers` on have it.

    Raises:
        ValueError: `layer_types` is not some full layers followed by sliding ones.
    """
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    layers = required(config, "num_hidden_layers")
    full = min(config.get("max_window_layers", layers), layers)
    types = config.get("layer_types")
    if window is not None and types is not None:
        full = types.count("full_attention")
        if types != ["full_attention"] * full + ["sliding_attention"] * (layers - full):
            raise ValueError("config.json mixes layer_types; only full layers followed by sliding ones are implemented")
    return {"sliding_window": window, "full_attention_layers": full if window is not None else 0}


def window_keys(cfg: ModelConfig) -> dict[str, Any]:
    """The keys of config.json for the sliding window of a Qwen model."""
    if cfg.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": cfg.num_layers}
    full = min(cfg.full_attention_layers, cfg.num_layers)
    return {"use_sliding_window": True, "sliding_window": cfg.sliding_window, "max_window_layers": full}
