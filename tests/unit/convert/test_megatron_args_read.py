"""Megatron's arguments as others write them: what model and layout they mean, and what is refused."""

import dataclasses
from typing import Any

import pytest

from convert.megatron.args import from_args
from convert.megatron.layout import Layout
from models import RopeConfig
from scripts.params import load_model

# What Megatron-LM's command line leaves in its args; values as in its published launch scripts.
COMMON = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "use_rotary_position_embeddings": True,
    "untie_embeddings_and_output_weights": True,
    "tokenizer_type": "HuggingFaceTokenizer",
    "num_experts": None,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "window_size": None,
    "mtp_num_layers": None,
    "moe_router_load_balancing_type": "aux_loss",
}
LLAMA_3_8B = COMMON | {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "group_query_attention": True,
    "num_query_groups": 8,
    "kv_channels": 128,
    "max_position_embeddings": 8192,
    "rotary_base": 500000,
    "padded_vocab_size": 128512,
    "vocab_size": None,
    "tensor_model_parallel_size": 4,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": None,
    "norm_epsilon": 1e-05,
}
DEEPSEEK_V3 = COMMON | {
    "num_layers": 61,
    "hidden_size": 7168,
    "ffn_hidden_size": 18432,
    "num_attention_heads": 128,
    "group_query_attention": False,
    "num_query_groups": 1,
    "kv_channels": 128,
    "max_position_embeddings": 163840,
    "multi_latent_attention": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "qk_layernorm": True,
    "rotary_scaling_factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "layernorm_epsilon": 1e-06,
    "padded_vocab_size": 129280,
    "num_experts": 256,
    "moe_layer_freq": [0] * 3 + [1] * 58,
    "moe_ffn_hidden_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_router_load_balancing_type": ["seq_aux_loss"],
    "moe_router_topk": 8,
    "moe_router_pre_softmax": True,
    "moe_aux_loss_coeff": [1e-4],
    "moe_router_group_topk": 4,
    "moe_router_num_groups": 8,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 1e-3,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 31,
    "expert_model_parallel_size": 64,
    "expert_tensor_parallel_size": 2,
    "pipeline_model_parallel_layout": "Et*3|(tt|)*29L",
}


def test_args_of_llama_3_as_megatron_saves_them() -> None:
    cfg, layout = from_args(LLAMA_3_8B)
    assert cfg == load_model("llama3_8b", ["vocab_size=128512"])
    assert layout == Layout(tp=4, pp=2)


def test_args_of_deepseek_v3_as_megatron_saves_them() -> None:
    cfg, layout = from_args(DEEPSEEK_V3)
    assert cfg == load_model("deepseek_v3", [])
    assert (layout.tp, layout.pp, layout.vpp, layout.ep) == (2, 31, 1, 64)
    assert layout.layers == (3, *(2,) * 29, 0)


QWEN = {"add_qkv_bias": True, "norm_epsilon": 1e-6, "rotary_base": 1000000, "max_position_embeddings": 32768}
SIZES = LLAMA_3_8B | {"num_layers": 4}


@pytest.mark.parametrize(
    ("args", "family"),
    [
        (SIZES, "llama"),
        (SIZES | {"add_bias_linear": True}, "llama"),
        (SIZES | QWEN, "qwen2"),
        (SIZES | {"qk_layernorm": True}, "qwen3"),
        (SIZES | {"num_experts": 8}, "mixtral"),
        (SIZES | {"num_experts": 8, "qk_layernorm": True}, "qwen3_moe"),
        (
            SIZES
            | QWEN
            | {"num_experts": 8, "moe_shared_expert_intermediate_size": 64, "moe_shared_expert_gate": True},
            "qwen2_moe",
        ),
    ],
)
def test_the_family_is_seen(args: dict[str, Any], family: str) -> None:
    assert from_args(args)[0].family == family


def test_missing_keys_have_megatrons_defaults() -> None:
    """A key/value head for each query head, tied embeddings, biases, epsilon 1e-5, theta 10000, a padded vocabulary."""
    keys = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "padded_vocab_size")
    args = {key: LLAMA_3_8B[key] for key in (*keys, "normalization", "swiglu", "position_embedding_type")}
    cfg, layout = from_args(args)
    assert (cfg.num_kv_heads, cfg.head_dim, cfg.norm_eps, cfg.rope.theta) == (32, 128, 1e-5, 10000.0)
    assert cfg.tied_embeddings and cfg.qkv_bias and cfg.attention_out_bias and cfg.mlp_bias
    assert cfg.intermediate_size == 10880 and layout == Layout()
    assert from_args(args | {"num_query_groups": 1, "group_query_attention": False})[0].num_kv_heads == 32
    assert from_args(args | {"disable_bias_linear": True, "num_query_groups": 4})[0].num_kv_heads == 4


def test_names_of_transformer_config_are_read_too() -> None:
    """As Megatron-Bridge keeps them in run_config.yaml."""
    names = {
        "norm_epsilon": "layernorm_epsilon",
        "swiglu": "gated_linear_unit",
        "decoder_first_pipeline_num_layers": "num_layers_in_first_pipeline_stage",
    }
    args = {names.get(key, key): value for key, value in LLAMA_3_8B.items()}
    del args["group_query_attention"], args["untie_embeddings_and_output_weights"], args["padded_vocab_size"]
    args |= {
        "share_embeddings_and_output_weights": False,
        "vocab_size": 128256,
        "num_layers_in_first_pipeline_stage": 20,
    }
    args |= {"activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False}}
    cfg, layout = from_args(args | {"rope_scaling": True, "rope_scaling_factor": 8.0})
    rope = RopeConfig(500000.0, "llama3", 8.0, 8192)
    assert cfg == dataclasses.replace(load_model("llama3_8b", []), rope=rope) and layout.layers == (20, 12)


STAGES: list[tuple[int, dict[str, Any], tuple[int, int, tuple[int, ...]]]] = [
    (12, {"num_layers_per_virtual_pipeline_stage": 3}, (2, 2, ())),
    (12, {"virtual_pipeline_model_parallel_size": 3}, (2, 3, ())),
    (12, {"decoder_first_pipeline_num_layers": 5}, (2, 1, (5, 7))),
    (12, {"decoder_last_pipeline_num_layers": 4, "virtual_pipeline_model_parallel_size": 2}, (2, 2, (4, 2, 4, 2))),
    (11, {"account_for_embedding_in_pipeline_split": True}, (2, 1, (5, 6))),
    (
        10,
        {
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
            "virtual_pipeline_model_parallel_size": 2,
        },
        (2, 2, (2, 3, 3, 2)),
    ),
    (6, {"pipeline_model_parallel_layout": [["embedding", "decoder"], ["decoder"] * 5 + ["loss"]]}, (2, 1, (1, 5))),
    (6, {"pipeline_model_parallel_layout": "E|t*3|tt|t,L"}, (2, 2, (0, 3, 2, 1))),
]


@pytest.mark.parametrize(("layers", "given", "expected"), STAGES)
def test_stages_of_every_spelling(
    layers: int, given: dict[str, Any], expected: tuple[int, int, tuple[int, ...]]
) -> None:
    _, layout = from_args(LLAMA_3_8B | {"num_layers": layers} | given)
    assert (layout.pp, layout.vpp, layout.layers) == expected


@pytest.mark.parametrize(("vocab", "padded", "tp"), [(50257, 50304, 1), (50257, 51200, 4), (50257, 50258, 2)])
def test_a_vocabulary_padded_by_others_keeps_its_rows(vocab: int, padded: int, tp: int) -> None:
    args = {"padded_vocab_size": padded, "vocab_size": vocab, "tensor_model_parallel_size": tp}
    cfg, layout = from_args(LLAMA_3_8B | args)
    assert (cfg.vocab_size, layout.padded_vocab(vocab)) == (vocab, padded)
    cfg, layout = from_args(LLAMA_3_8B | args | {"vocab_size": None})
    assert cfg.vocab_size == padded == layout.padded_vocab(cfg.vocab_size)


def test_a_tokenizer_without_words_does_not_say_the_vocabulary() -> None:
    args = LLAMA_3_8B | {"vocab_size": 128255, "tokenizer_type": "NullTokenizer"}
    assert from_args(args)[0].vocab_size == 128512


@pytest.mark.parametrize(("every", "window"), [(None, 128), (8, 128), (1, None), ([0, 0, 1, 1], 128)])
def test_windows_of_every_spelling(every: Any, window: int | None) -> None:
    """A number counts layers from one, and each that it divides sees everything."""
    args = SIZES | QWEN | {"window_size": (127, 0), "window_attn_skip_freq": every}
    cfg, _ = from_args(args)
    assert (cfg.sliding_window, cfg.full_attention_layers) == (window, 2 if isinstance(every, list) else 0)
    assert from_args(args | {"window_size": [-1, 0]})[0].sliding_window is None


def test_a_single_expert_keeps_its_sigmoid() -> None:
    """Megatron divides by the sum of the scores only where there are several."""
    args = DEEPSEEK_V3 | {"moe_router_num_groups": None, "moe_router_group_topk": None}
    moe = from_args(args | {"moe_router_topk": 1})[0].moe
    assert moe is not None and not moe.normalize and moe.groups == 1


REFUSED: dict[str, Any] = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "squared_relu": True,
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "apply_layernorm_1p": True,
    "mtp_num_layers": 1,
    "expert_tensor_parallel_size": 1,
    "moe_layer_freq": [1, 0, 1, 0],
    "window_attn_skip_freq": 2,
    "moe_router_load_balancing_type": "sinkhorn",
    "num_attention_heads": "32",
    "hidden_size": None,
    "padded_vocab_size": 128257,
}
EXPERTS = SIZES | {"num_experts": 8, "window_size": (127, 0), "use_rotary_position_embeddings": False}


@pytest.mark.parametrize("key", REFUSED)
def test_what_no_family_computes_is_refused_by_name(key: str) -> None:
    assert from_args(EXPERTS)[0].family == "mixtral"
    with pytest.raises(ValueError, match="1 problem:") as caught:
        from_args(EXPERTS | {key: REFUSED[key]})
    assert f"{key}={REFUSED[key]!r}: " in str(caught.value) and str(caught.value).count(";") >= 1


def test_everything_refused_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=f"{len(REFUSED)} problems") as caught:
        from_args(EXPERTS | REFUSED)
    assert all(f"{key}=" in str(caught.value) for key in REFUSED)


def test_a_model_between_the_families_is_refused() -> None:
    with pytest.raises(ValueError, match=r"read as llama.*sliding window"):
        from_args(SIZES | {"window_size": (127, 0)})
    with pytest.raises(ValueError, match="experts have no biases"):
        from_args(SIZES | {"num_experts": 8, "add_bias_linear": True})
