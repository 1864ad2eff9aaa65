"""Megatron's arguments, whoever wrote them, as a model of one of the families here.

Read are Megatron-LM's names and, where they differ, those of Megatron-core's TransformerConfig (what Megatron-Bridge
keeps in run_config.yaml). A key that is missing has Megatron's default. Source: Megatron-LM's `arguments.py` and
Megatron-core's `transformer_config.py`, read at 0.16.1 and 0.20.
"""

from dataclasses import replace
from typing import Any, Literal

from convert.megatron.given import Given
from convert.megatron.layout import VOCAB_MULTIPLE, Layout
from convert.megatron.rope_args import rope_from
from convert.megatron.stage_args import stages_from
from models.config import MLAConfig, ModelConfig, MoEConfig

UNKNOWN: dict[str, tuple[object, str]] = {
    "squared_relu": (False, "the feed-forward is SwiGLU only"),
    "quick_geglu": (False, "the feed-forward is SwiGLU only"),
    "activation_func_clamp_value": (None, "the feed-forward is SwiGLU without bounds"),
    "glu_linear_offset": (0.0, "the feed-forward is SwiGLU without an offset"),
    "apply_layernorm_1p": (False, "norm weights are meant as they are, not as 1 + weight"),
    "layernorm_zero_centered_gamma": (False, "norm weights are meant as they are, not as 1 + weight"),
    "apply_residual_connection_post_layernorm": (False, "norms come before each block, residuals around both"),
    "mtp_num_layers": (0, "multi-token prediction is not converted"),
    "qk_l2_norm": (False, "no family here norms q and k without a weight"),
    "attention_output_gate": (False, "no family here has a gate after the attention"),
    "softmax_type": ("vanilla", "no family here has another softmax"),
    "softmax_scale": (None, "scores are divided by the root of the head size"),
    "experimental_attention_variant": (None, "no family here has it"),
    "linear_attention_freq": (None, "no family here has linear attention"),
    "no_rope_freq": (None, "every layer here has rotary embedding"),
    "heterogeneous_layers_config_path": (None, "all layers here have the same sizes"),
    "heterogeneous_layers_config_encoded_json": (None, "all layers here have the same sizes"),
    "hybrid_layer_pattern": (None, "no family here has state-space layers"),
    "hybrid_override_pattern": (None, "no family here has state-space layers"),
    "spec": (None, "a layer specification of one's own"),
    "enable_mhc_connections": (False, "no family here has hyper-connections"),
    "use_mup": (False, "no family here scales activations by width"),
    "moe_latent_size": (None, "experts here read the hidden state"),
    "moe_apply_probs_on_input": (False, "experts' outputs are weighed, not their inputs"),
    "moe_router_topk_limited_devices": (None, "it is older than moe_router_num_groups"),
}
"""Arguments that change what is computed: the only value that is known here, and why."""
NOT_SET = (None, False, 0, 0.0)
BALANCING = {"aux_loss": "global", "global_aux_loss": "global", "seq_aux_loss": "sequence", "none": "global"}


def describe(given: Given) -> tuple[ModelConfig, Layout]:
    """The model and the layout that Megatron's arguments describe; what no family here computes is noted in `given`."""
    _refuse_unknown(given)
    cfg = _model(given)
    return cfg, _layout(given, cfg)


def _refuse_unknown(given: Given) -> None:
    norm = given.get("normalization", default="LayerNorm")
    if norm != "RMSNorm":
        given.refuse("normalization", norm, "the decoder has RMSNorm only")
    activation = given.get("activation_func")
    silu = activation is None or "silu" in str(activation)
    if not (given.get("swiglu") or (given.get("gated_linear_unit") and silu)):
        key = "activation_func" if activation is not None else "swiglu"
        given.refuse(key, given.get(key, default=False), "the feed-forward is SwiGLU only")
    for key, (known, reason) in UNKNOWN.items():
        value = given.get(key, default=known)
        if value != known and not (known in NOT_SET and value in NOT_SET):
            given.refuse(key, value, reason)


def _model(given: Given) -> ModelConfig:
    layers, hidden = given.count("num_layers"), given.count("hidden_size")
    heads = given.count("num_attention_heads")
    # Megatron's own default with --swiglu.
    size = given.count("ffn_hidden_size", default=int(4 * hidden * 2 / 3 / 64) * 64 or None)
    max_seq_len = given.count("max_position_embeddings", "seq_length")
    bias = not given.get("disable_bias_linear") and bool(given.get("add_bias_linear", default=True))
    mla = _latent(given) if given.get("multi_latent_attention") else None
    moe = _experts(given, layers, size, mla) if given.get("num_experts", "num_moe_experts") else None
    window, full = _window(given, layers)
    shared = given.get("share_embeddings_and_output_weights")
    cfg = ModelConfig(
        family="llama",
        vocab_size=_vocab(given),
        hidden_size=hidden,
        intermediate_size=size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if mla else _kv_heads(given, heads),
        head_dim=mla.nope_dim + mla.rope_dim if mla else given.count("kv_channels", default=hidden // heads or None),
        max_seq_len=max_seq_len,
        norm_eps=given.number("norm_epsilon", "layernorm_epsilon", default=1e-5),
        rope=rope_from(given, mla is not None, max_seq_len),
        tied_embeddings=bool(shared) if shared is not None else not given.get("untie_embeddings_and_output_weights"),
        qkv_bias=bias or bool(given.get("add_qkv_bias")),
        attention_out_bias=bias,
        mlp_bias=bias,
        qk_norm=bool(given.get("qk_layernorm")) and mla is None,
        sliding_window=window,
        full_attention_layers=full,
        moe=moe,
        mla=mla,
        init_std=given.number("init_method_std", default=0.02),
    )
    return replace(cfg, family=_family(cfg))


def _family(
    cfg: ModelConfig,
) -> Literal["llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]:
    moe = cfg.moe
    if cfg.mla is not None:
        return "deepseek_v3" if moe is not None and moe.score == "sigmoid" else "deepseek_v2"
    if moe is not None:
        return "qwen2_moe" if moe.shared_gate else "qwen3_moe" if cfg.qk_norm else "mixtral"
    if cfg.qk_norm:
        return "qwen3"
    return "qwen2" if cfg.qkv_bias and not cfg.attention_out_bias else "llama"


def _vocab(given: Given) -> int:
    """Rows without padding, where they are known: Megatron itself keeps the padded number only."""
    padded = given.count("padded_vocab_size", "vocab_size")
    own = given.get("vocab_size")
    # A tokenizer without words counts its end of document apart.
    known = type(own) is int and 1 <= own <= padded and given.get("tokenizer_type") != "NullTokenizer"
    return own if known else padded


def _kv_heads(given: Given, heads: int) -> int:
    grouped = given.get("group_query_attention")
    # Megatron-LM ignores the number without the switch; TransformerConfig has no switch.
    if grouped is None:
        return given.count("num_query_groups", default=heads)
    return given.count("num_query_groups", default=1) if grouped else heads


def _window(given: Given, layers: int) -> tuple[int | None, int]:
    """Tokens a query sees, and how many layers from the first see all."""
    window: Any = given.get("window_size")
    left = window[0] if isinstance(window, (tuple, list)) and window else -1
    if left < 0:
        return None, 0
    every: Any = given.get("window_attn_skip_freq")
    if isinstance(every, int):
        every = [number % every != 0 for number in range(1, layers + 1)]
    pattern = [bool(slides) for slides in every] if every is not None else [True] * layers
    full = pattern.count(False)
    if pattern != [False] * full + [True] * (layers - full):
        reason = "only layers with full attention followed by layers with a sliding window are computed here"
        given.refuse("window_attn_skip_freq", given.get("window_attn_skip_freq"), reason)
    return (left + 1, full) if full < layers else (None, 0)


def _latent(given: Given) -> MLAConfig:
    rank = given.get("q_lora_rank")
    return MLAConfig(
        kv_rank=given.count("kv_lora_rank"),
        nope_dim=given.count("qk_head_dim", default=128),
        rope_dim=given.count("qk_pos_emb_head_dim", default=64),
        value_dim=given.count("v_head_dim", default=128),
        q_rank=None if rank is None else given.count("q_lora_rank"),
    )


def _experts(given: Given, layers: int, size: int, mla: MLAConfig | None) -> MoEConfig:
    count = given.count("num_experts", "num_moe_experts")
    top_k = given.count("moe_router_topk", default=2)
    score = given.get("moe_router_score_function", default="softmax")
    if score not in ("softmax", "sigmoid"):
        given.refuse("moe_router_score_function", score, "routers here score with softmax or sigmoid")
    sigmoid = score == "sigmoid"
    bias = bool(given.get("moe_router_enable_expert_bias"))
    groups = given.get("moe_router_num_groups")
    capacity = given.get("moe_expert_capacity_factor")
    loss, over = _balancing(given)
    return MoEConfig(
        num_experts=count,
        top_k=top_k,
        expert_size=given.count("moe_ffn_hidden_size", default=size),
        shared_size=given.count("moe_shared_expert_intermediate_size", default=0, least=0),
        shared_gate=bool(given.get("moe_shared_expert_gate")),
        first_dense=_first_dense(given, layers),
        score="sigmoid" if sigmoid else "softmax",
        # Sigmoid scores are always divided by their sum where there are several, softmax taken last sums to 1.
        normalize=top_k > 1 if sigmoid else not given.get("moe_router_pre_softmax"),
        scale=given.number("moe_router_topk_scaling_factor", default=1.0),
        groups=given.count("moe_router_num_groups") if groups else 1,
        groups_kept=given.count("moe_router_group_topk") if groups else 1,
        group_score="top2_sum" if sigmoid and mla else "max",
        correction_bias=bias,
        bias_rate=given.number("moe_router_bias_update_rate", default=1e-3) if bias else 0.0,
        balance_loss=loss,
        balance_over="sequence" if over == "sequence" else "global",
        z_loss=given.number("moe_z_loss_coeff", default=0.0),
        capacity=None if capacity is None else given.number("moe_expert_capacity_factor", default=1.0),
    )


def _balancing(given: Given) -> tuple[float, str]:
    """Factor of the balancing loss and over what it is taken; of several losses the first."""
    kind: Any = given.get("moe_router_load_balancing_type", default="aux_loss")
    factor: Any = given.get("moe_aux_loss_coeff", default=0.0)
    kind = kind[0] if isinstance(kind, (list, tuple)) and kind else kind
    factor = factor[0] if isinstance(factor, (list, tuple)) and factor else factor
    if kind not in BALANCING:
        given.refuse("moe_router_load_balancing_type", kind, "routers here choose by their scores alone")
        return 0.0, "global"
    return (0.0 if kind == "none" else float(factor)), BALANCING[kind]


def _first_dense(given: Given, layers: int) -> int:
    every: Any = given.get("moe_layer_freq", default=1)
    if type(every) is int and every >= 1:
        every = [number % every == 0 for number in range(layers)]
    pattern = [bool(sparse) for sparse in every] if isinstance(every, (list, tuple)) else []
    dense = pattern.count(False)
    if len(pattern) != layers or pattern != [False] * dense + [True] * (layers - dense):
        reason = f"only dense layers followed by layers with experts, {layers} in all, are computed here"
        given.refuse("moe_layer_freq", given.get("moe_layer_freq"), reason)
    return dense


def _layout(given: Given, cfg: ModelConfig) -> Layout:
    tp = given.count("tensor_model_parallel_size", default=1)
    pp, vpp, layers = stages_from(given, cfg.num_layers)
    ep = given.count("expert_model_parallel_size", default=1) if cfg.moe else 1
    within = given.count("expert_tensor_parallel_size", default=tp)
    if cfg.moe and within != tp:
        reason = f"experts are cut over other ranks than the rest (tensor_model_parallel_size={tp})"
        given.refuse("expert_tensor_parallel_size", within, reason, f"save it again from Megatron with {tp}")
    multiple = given.count("make_vocab_size_divisible_by", default=VOCAB_MULTIPLE)
    padded = given.get("padded_vocab_size")
    if padded is not None and Layout(tp=tp, vocab_multiple=multiple).padded_vocab(cfg.vocab_size) != padded:
        multiple = padded // tp  # padded by another program, or for another number of ranks
        if padded % tp:
            given.refuse("padded_vocab_size", padded, f"is not divisible by tensor_model_parallel_size={tp}")
    return Layout(tp=tp, pp=pp, vpp=vpp, ep=ep, layers=layers, vocab_multiple=max(1, multiple))
