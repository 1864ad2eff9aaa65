"""What LLaMA, Qwen2, Mistral, Yi and Baichuan share: the same decoder with other names, and config.json key by key.

Facts come from each model's own code (transformers 5.23; Baichuan's and Yi's modelling files as published).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.reshaped import Recipe, Taken, Zeros

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT = "self_attn.o_proj"
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_dropout",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "torch_dtype",
    "dtype",
)
"""Keys that mean the same in every one of these families."""

NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
UNDERSTOOD = {
    "architectures",
    "model_type",
    "auto_map",
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "quantization_config",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "pretraining_tp",
    "transformers_version",
    "_name_or_path",
    "_model_name_or_path",
}
"""Keys that are read, or say nothing about the model; others are left out, and that is told."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder."""

    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    labels: int | None
    """Outputs of a classifier; None: a language model."""


@dataclass(frozen=True)
class Plan:
    """One folder to be made of another."""

    theirs: Mapping[str, tuple[int, ...]]
    """Every tensor that the source must hold, with its shape."""
    recipes: Mapping[str, Recipe]
    """How every tensor of the result is made."""
    config: Mapping[str, Any]
    zero: Sequence[str] = ()
    """Tensors of the source that the result has no place for: right only where they hold nothing but zeros."""
    notes: Sequence[str] = ()
    """What the user is told."""


def sizes(config: Mapping[str, Any], kv_heads: int | None = None) -> Sizes:
    """The sizes that a config.json says.

    Args:
        kv_heads: what the family takes where `num_key_value_heads` is not there.

    Raises:
        ValueError: a key is missing or senseless, or the weights are quantised.
    """
    for key in NEEDED:
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise ValueError(f"config.json has {key}={config.get(key)!r}; a number above 0 is needed")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ValueError(f"config.json says the weights are quantised ({method}); convert them to bf16 first")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    classifier = any("SequenceClassification" in name for name in config.get("architectures") or [])
    return Sizes(
        vocab=config["vocab_size"],
        hidden=hidden,
        ffn=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or kv_heads or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        tied=bool(config.get("tie_word_embeddings", False)) and not classifier,
        labels=_labels(config) if classifier else None,
    )


def _labels(config: Mapping[str, Any]) -> int:
    # transformers writes id2label and takes two labels where nothing is said.
    return len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)


def decoder_shapes(size: Sizes, biased: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a decoder as LLaMA, Qwen2 and Mistral call them.

    Args:
        biased: modules of a layer that have a bias.
    """
    q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    matrices = {
        **dict(zip(QKV, ((q, size.hidden), (kv, size.hidden), (kv, size.hidden)), strict=True)),
        OUT: (size.hidden, q),
        **dict(zip(MLP, ((size.ffn, size.hidden), (size.ffn, size.hidden), (size.hidden, size.ffn)), strict=True)),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocab, size.hidden)}
    for i in range(size.layers):
        layer = f"model.layers.{i}."
        shapes[f"{layer}input_layernorm.weight"] = (size.hidden,)
        for name, shape in matrices.items():
            if name == MLP[0]:
                shapes[f"{layer}post_attention_layernorm.weight"] = (size.hidden,)
            shapes[f"{layer}{name}.weight"] = shape
            if name in biased:
                shapes[f"{layer}{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (size.hidden,)
    if size.labels is not None:
        shapes["score.weight"] = (size.labels, size.hidden)
    elif not size.tied:
        shapes["lm_head.weight"] = (size.vocab, size.hidden)
    return shapes


def renamed(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Recipe]:
    """Every tensor as it is, under its own name."""
    return {name: Taken(name) for name in shapes}


def added_zeros(size: Sizes, modules: Collection[str]) -> dict[str, Recipe]:
    """Biases of zeros for these modules of every layer."""
    shapes = decoder_shapes(size, modules)
    return {
        name: Zeros(shape, name.removesuffix("bias") + "weight")
        for name, shape in shapes.items()
        if name.endswith(".bias")
    }


def repeated(size: Sizes, name: str) -> bool:
    """Whether a tensor of the source only repeats another, or follows from config.json: not read, not written."""
    return name.endswith("rotary_emb.inv_freq") or (size.tied and name == "lm_head.weight")


def carried(config: Mapping[str, Any], size: Sizes, family: str) -> dict[str, Any]:
    """The keys of config.json that `family` shares with the source: sizes, special tokens, rotary embedding.

    Raises:
        ValueError: heads are rotated in part only.
    """
    class_name = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[family]
    head = "ForCausalLM" if size.labels is None else "ForSequenceClassification"
    kept = {key: config[key] for key in CARRIED if key in config}
    own = {"model_type": family, "architectures": [class_name + head], "num_key_value_heads": size.kv_heads}
    return own | kept | {"num_key_value_heads": size.kv_heads, "tie_word_embeddings": size.tied} | _rope(config)


def left_out(config: Mapping[str, Any]) -> list[str]:
    """What to tell about keys of config.json that mean nothing here and are not carried over."""
    keys = sorted(key for key in config if key not in CARRIED and key not in UNDERSTOOD and config[key] is not None)
    return [f"left out of config.json: {', '.join(keys)}"] if keys else []


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which transformers 4 and 5 both read."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if float(given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("config.json asks for a partial_rotary_factor; LLaMA's family turns whole heads only")
    theta = float(given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    plain = (given.get("rope_type") or given.get("type") or "default") == "default"
    return {"rope_theta": theta, "rope_scaling": None if plain else given}
