"""Turn a checkpoint of another family into a LLaMA with the same logits.

python convert/to_llama.py --hf Qwen2.5-7B --out Qwen2.5-7B-llama
python convert/to_llama.py --hf Baichuan2-7B-Base --out Baichuan2-7B-llama --dtype bf16 --verify

Reads Qwen2 and Qwen2.5, Mistral, Yi, Baichuan 7B and Baichuan2 7B. What LLaMA cannot compute (sliding windows, ALiBi,
q/k norms, experts) is refused. Code that comes with a checkpoint is never run.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.between import add_folders, prepared
from convert.cli import add_common, parser_of, told
from convert.foreign import read_object
from convert.llama_like import OUT, QKV, Plan, added_zeros, carried, decoder_shapes, renamed, sizes
from convert.reshaped import Normalised, Taken
from convert.rewriting import Job, rewrite

REFUSED = {
    "qwen3": "Qwen3 normalises queries and keys after their projections; LLaMA has no such norms",
    "mixtral": "Mixtral is a mixture of experts; LLaMA is dense",
    "qwen2_moe": "Qwen2-MoE is a mixture of experts; LLaMA is dense",
    "qwen3_moe": "Qwen3-MoE is a mixture of experts with q/k norms; LLaMA is dense and has none",
    "deepseek_v2": "DeepSeek-V2 has latent attention and experts; LLaMA has neither",
    "deepseek_v3": "DeepSeek-V3 has latent attention and experts; LLaMA has neither",
    "gemma": "Gemma scales its embedding, adds 1 to norm weights and uses GELU",
    "gemma2": "Gemma 2 caps its logits and has norms that LLaMA lacks",
    "phi3": "Phi-3 fuses its matrices and may have sliding windows and its own rotary scaling; it is not known here",
}


def plan(config: Mapping[str, Any], folder: Path, norm_head: bool | None) -> Plan:
    """How a folder with this config.json becomes a LLaMA.

    Raises:
        ValueError: it cannot, or it is one already.
    """
    kind = str(config.get("model_type", "")).lower()
    if kind == "llama":
        raise ValueError(f"{folder} is a LLaMA already: use it as it is. Nothing was written.")
    if kind in REFUSED:
        raise ValueError(f"{folder} cannot become a LLaMA: {REFUSED[kind]}")
    if kind == "baichuan":
        return _baichuan(config, folder, norm_head)
    if kind not in PLANS:
        known = ", ".join(sorted([*PLANS, "baichuan"]))
        raise ValueError(f"{folder} is of model_type {config.get('model_type')!r}; known are {known}")
    size = sizes(config)
    if size.hidden % size.heads:
        reason = (
            f"LLaMA needs a hidden_size that is a multiple of the heads, here they are {size.hidden} and {size.heads}"
        )
        raise ValueError(f"{folder} cannot become a LLaMA: {reason}")
    return PLANS[kind](config)


def _qwen2(config: Mapping[str, Any]) -> Plan:
    """Qwen2 and Qwen2.5: biases on q, k and v, none on the way out."""
    reach = config.get("sliding_window")
    layers = config.get("num_hidden_layers", 0)
    types = config.get("layer_types")
    sliding = "sliding_attention" in types if types is not None else config.get("max_window_layers", 28) < layers
    if config.get("use_sliding_window") and sliding:
        _check_window(reach, config)
    size = sizes(config)
    shapes = decoder_shapes(size, QKV)
    zeros = added_zeros(size, [OUT])
    theirs = renamed(shapes)
    recipes = {name: theirs.get(name) or zeros[name] for name in decoder_shapes(size, [*QKV, OUT])}
    own = {"attention_bias": True, "mlp_bias": False, "head_dim": size.head_dim}
    notes = ["biases of q, k and v kept (attention_bias); LLaMA wants one on o_proj too: zeros were added"]
    return Plan(shapes, recipes, carried(config, size, "llama") | own, notes=notes)


def _mistral(config: Mapping[str, Any]) -> Plan:
    """Mistral: LLaMA but for its window."""
    _check_window(config.get("sliding_window", 4096), config)  # transformers takes 4096 where nothing is said
    size = sizes(config, kv_heads=8)
    shapes = decoder_shapes(size)
    own = {"attention_bias": False, "mlp_bias": False, "head_dim": size.head_dim}
    return Plan(shapes, renamed(shapes), carried(config, size, "llama") | own)


def _yi(config: Mapping[str, Any]) -> Plan:
    """Yi as first published: LLaMA with two norms called otherwise."""
    if config.get("rope_theta") is None and not config.get("rope_parameters"):
        raise ValueError("config.json has no rope_theta; Yi's is 5000000, or 10000000 for the 200K models: add it")
    size = sizes(config)
    shapes = decoder_shapes(size)
    names = {name: _yi_name(name) for name in shapes}
    own = {"attention_bias": False, "mlp_bias": False, "head_dim": size.head_dim}
    theirs = {names[name]: shape for name, shape in shapes.items()}
    recipes = {name: Taken(names[name]) for name in shapes}
    return Plan(theirs, recipes, carried(config, size, "llama") | own)


def _yi_name(name: str) -> str:
    return name.replace(".input_layernorm.", ".ln1.").replace(".post_attention_layernorm.", ".ln2.")


def _baichuan(config: Mapping[str, Any], folder: Path, norm_head: bool | None) -> Plan:
    """Baichuan 7B and Baichuan2 7B: q, k and v in one matrix; the head of the second has rows of length 1."""
    code = "".join(f.read_text(encoding="utf-8", errors="replace") for f in sorted(folder.glob("modeling_*.py")))
    if ("alibi" in code and "RotaryEmbedding" not in code) or "max_position_embeddings" not in config:
        raise ValueError(
            f"{folder} cannot become a LLaMA: Baichuan 13B and Baichuan2 13B tell positions by ALiBi, LLaMA by rotation"
        )
    if config.get("rope_scaling") or config.get("rope_parameters") or config.get("rope_theta", 10000.0) != 10000.0:
        raise ValueError("config.json changes the rotary embedding, which Baichuan's own code does not read: remove it")
    size = sizes(config)
    if size.kv_heads != size.heads or size.head_dim * size.heads != size.hidden or size.tied:
        raise ValueError("config.json has num_key_value_heads, head_dim or tied embeddings; no Baichuan model has them")
    normalised = norm_head if norm_head is not None else _has_norm_head(config, code)
    shapes = decoder_shapes(size)
    recipes = renamed(shapes)
    theirs: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        part = next((i for i, module in enumerate(QKV) if f"{module}.weight" in name), None)
        if part is None:
            theirs[name] = shape
            continue
        packed = name.replace(QKV[part], "self_attn.W_pack")
        theirs[packed] = (3 * size.hidden, size.hidden)
        recipes[name] = Taken(packed, part * size.hidden, (part + 1) * size.hidden)
    if normalised:
        recipes["lm_head.weight"] = Normalised("lm_head.weight")
    own = {"attention_bias": False, "mlp_bias": False, "head_dim": size.head_dim}
    told = "the rows of the head were divided by their length (NormHead)" if normalised else "the head is kept as it is"
    return Plan(theirs, recipes, carried(config, size, "llama") | own, notes=[told])


def _has_norm_head(config: Mapping[str, Any], code: str) -> bool:
    """Whether the head's rows are normalised: by the model's code, or by what tells Baichuan 1 and 2 apart."""
    if code:
        return "NormHead" in code
    if config["vocab_size"] == 125696 or "z_loss_weight" in config:
        return True
    if config["vocab_size"] == 64000 or "BaiChuanForCausalLM" in (config.get("architectures") or []):
        return False
    raise ValueError(
        f"cannot tell whether this is a Baichuan (vocabulary 64000) or a Baichuan2 (125696): vocab_size is "
        f"{config['vocab_size']} and its modeling_baichuan.py is not there. Add --norm-head yes for Baichuan2, no for "
        "the first."
    )


def _check_window(window: int | None, config: Mapping[str, Any]) -> None:
    if window is not None and window < config.get("max_position_embeddings", 0):
        raise ValueError(
            f"this model cannot become a LLaMA: it attends to the last {window} tokens only (sliding_window), and "
            f"LLaMA to all. Up to {window} tokens there is no difference: set max_position_embeddings to {window} in "
            f"a copy of its config.json (it is {config['max_position_embeddings']}) if that is enough."
        )


PLANS: dict[str, Callable[[Mapping[str, Any]], Plan]] = {"qwen2": _qwen2, "mistral": _mistral, "yi": _yi}


def job(args: argparse.Namespace) -> tuple[Job, list[str]]:
    """What a command line asks for, checked against the source; nothing is written yet.

    Raises:
        ValueError: it cannot be done.
    """
    config = read_object(args.hf / "config.json")
    norm_head = None if args.norm_head is None else args.norm_head == "yes"
    made = plan(config, args.hf, norm_head)
    options = {"--norm-head": args.norm_head}
    return prepared(args, config, made, options)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line.

    Raises:
        ValueError: the model cannot become a LLaMA, or the files are not as they should be.
    """
    parser = parser_of(__doc__)
    add_folders(parser)
    add_common(parser)
    parser.add_argument(
        "--norm-head",
        choices=("yes", "no"),
        help="Baichuan only: whether the head's rows are normalised (yes for Baichuan2); found out where possible",
    )
    rewrite(*job(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(told(main))
