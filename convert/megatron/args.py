"""A model and its layout as Megatron's arguments (the `args` inside a checkpoint), both ways.

Written is what Megatron restores with --use-checkpoint-args, what it compares when it loads, and what it does not
restore but a reader has to know. What its arguments cannot say lies beside them under the key `loom`, by the path of
the field (`{"rope.scaling": "dynamic"}`), which Megatron does not look at; most models need none.
Source: Megatron-LM's `checkpointing.py` (`load_args_from_checkpoint`, `check_checkpoint_args`) and
`argument_utils.py` (`core_transformer_config_from_args`), read at 0.20; Megatron-core's `transformer_config.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from convert.megatron.args_from import describe
from convert.megatron.given import HELP, Given
from convert.megatron.layout import Layout
from convert.megatron.rope_args import rope_args
from convert.megatron.stage_args import stage_args
from convert.same_model import differing, flat
from models import problems
from models.config import ModelConfig, MoEConfig

OWN = "loom"
"""The key of what Megatron's arguments cannot say."""


def to_args(cfg: ModelConfig, layout: Layout, dtype: torch.dtype, iteration: int = 0) -> dict[str, Any]:
    """Megatron's arguments for a model, plain values and torch.dtype only.

    Args:
        dtype: of the weights (a router's correction bias is fp32 whatever it is).
        iteration: the training step the checkpoint is of.
    """
    args = _model_args(cfg) | _expert_args(cfg, layout) | _latent_args(cfg) | rope_args(cfg)
    args |= stage_args(layout, cfg.num_layers) | _file_args(cfg, layout, dtype, iteration)
    ours, theirs = flat(cfg), flat(describe(Given(args))[0])
    own = {key: value for key, value in ours.items() if theirs[key] != value}
    return args | ({OWN: own} if own else {})


def from_args(args: Mapping[str, Any]) -> tuple[ModelConfig, Layout]:
    """The model and layout of a Megatron checkpoint, from the content of its `args`.

    The layout's names (`implementation`, `experts`) are left at their defaults: they are seen in the tensors. A
    checkpoint that was not written here does not say how many rows of the vocabulary are padding: there `vocab_size` is
    the padded one.

    Raises:
        ValueError: a value is missing, or asks for something no family here computes; all of them in one message.
    """
    given = Given(args)
    cfg, layout = describe(given)
    if not given.problems:
        cfg = _with(cfg, args.get(OWN) or {})
        for key, value, reason, _ in problems(cfg):
            given.problems.append(f"{key}={value!r} (read as {cfg.family}): {reason}; {HELP}")
    given.check()
    return cfg, layout


def differences(cfg: ModelConfig) -> list[str]:
    """What Megatron would compute otherwise than this model, one sentence each; the weights are exact all the same."""
    said, _ = describe(Given(to_args(cfg, Layout(), torch.float32)))
    moe, found = cfg.moe, []
    for key in differing(cfg, said):
        if key in ("family", "head"):
            continue
        if key == "mlp_bias":
            found.append(
                "Megatron has biases in all linear layers or in q, k and v only, so --add-bias-linear gives it "
                "some that this model does not have; they are written as zeros"
            )
            continue
        value, theirs = flat(cfg).get(key), flat(said).get(key)
        found.append(f"{key} is {value} in this model; Megatron's arguments cannot say that, and it computes {theirs}")
    if moe is not None and moe.groups > 1:
        best = moe.top_k // moe.groups_kept
        if best != (2 if moe.group_score == "top2_sum" else 1):
            counts = "its best expert" if moe.group_score == "max" else "its two best experts"
            found.append(
                f"a group of experts counts {counts} in {cfg.family}; in Megatron the sum of its best "
                f"moe_router_topk // moe_router_group_topk = {best}, so some tokens go to other experts"
            )
    if cfg.rope.scaling == "llama3" and cfg.rope.factor != 8.0:
        found.append(
            f"Megatron-LM (0.20) does not hand on --rope-scaling-factor {cfg.rope.factor:g} and computes with 8; "
            "Megatron-Bridge does"
        )
    return found


def _model_args(cfg: ModelConfig) -> dict[str, Any]:
    full, layers = min(cfg.full_attention_layers, cfg.num_layers), cfg.num_layers
    window = cfg.sliding_window
    mixed = window is not None and full > 0
    return {
        "num_layers": cfg.num_layers,
        "encoder_num_layers": cfg.num_layers,
        "hidden_size": cfg.hidden_size,
        "ffn_hidden_size": cfg.intermediate_size,
        "num_attention_heads": cfg.num_heads,
        "group_query_attention": cfg.num_kv_heads != cfg.num_heads,
        "num_query_groups": cfg.num_kv_heads,
        "kv_channels": cfg.mla.value_dim if cfg.mla else cfg.head_dim,
        "seq_length": cfg.max_seq_len,
        "max_position_embeddings": cfg.max_seq_len,
        "normalization": "RMSNorm",
        # Megatron-LM called it so before 0.20, and --norm-epsilon sets the other one since.
        "norm_epsilon": cfg.norm_eps,
        "layernorm_epsilon": cfg.norm_eps,
        "apply_layernorm_1p": False,
        "layernorm_zero_centered_gamma": False,
        "qk_layernorm": cfg.qk_norm or cfg.mla is not None,
        "add_bias_linear": cfg.attention_out_bias or cfg.mlp_bias,
        "add_qkv_bias": cfg.qkv_bias,
        "swiglu": True,
        "squared_relu": False,
        "quick_geglu": False,
        "openai_gelu": False,
        "untie_embeddings_and_output_weights": not cfg.tied_embeddings,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": cfg.init_std,
        # Tokens to the left of a query, itself not counted.
        "window_size": (window - 1, 0) if window is not None and full < layers else None,
        "window_attn_skip_freq": [0] * full + [1] * (layers - full) if mixed and full < layers else None,
        "mtp_num_layers": None,
    }


def _expert_args(cfg: ModelConfig, layout: Layout) -> dict[str, Any]:
    moe = cfg.moe
    if moe is None:
        return {"num_experts": None, "moe_grouped_gemm": False}
    grouped = moe.groups > 1
    return {
        "num_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.expert_size,
        "moe_layer_freq": [0] * moe.first_dense + [1] * (cfg.num_layers - moe.first_dense) if moe.first_dense else 1,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.score,
        # Softmax over the chosen experts is softmax over all of them made to sum to 1.
        "moe_router_pre_softmax": moe.score == "sigmoid" or not moe.normalize,
        "moe_router_topk_scaling_factor": moe.scale if moe.scale != 1.0 else None,
        "moe_router_num_groups": moe.groups if grouped else None,
        "moe_router_group_topk": moe.groups_kept if grouped else None,
        "moe_router_enable_expert_bias": moe.correction_bias,
        "moe_router_bias_update_rate": moe.bias_rate if moe.correction_bias else 1e-3,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": _balancing(moe),
        "moe_aux_loss_coeff": moe.balance_loss,
        "moe_z_loss_coeff": moe.z_loss or None,
        "moe_expert_capacity_factor": moe.capacity,
        "moe_shared_expert_intermediate_size": moe.shared_size or None,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_grouped_gemm": layout.experts == "grouped",
        "moe_token_dispatcher_type": "alltoall",
    }


def _balancing(moe: MoEConfig) -> str:
    if moe.balance_over == "sequence":
        return "seq_aux_loss"
    return "global_aux_loss" if moe.balance_loss else "none"


def _latent_args(cfg: ModelConfig) -> dict[str, Any]:
    if cfg.mla is None:
        return {"multi_latent_attention": False}
    return {
        "multi_latent_attention": True,
        "q_lora_rank": cfg.mla.q_rank,
        "kv_lora_rank": cfg.mla.kv_rank,
        "qk_head_dim": cfg.mla.nope_dim,
        "qk_pos_emb_head_dim": cfg.mla.rope_dim,
        "v_head_dim": cfg.mla.value_dim,
    }


def _file_args(cfg: ModelConfig, layout: Layout, dtype: torch.dtype, iteration: int) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.tp,
        "transformer_impl": layout.implementation,
        "vocab_size": cfg.vocab_size,
        "padded_vocab_size": layout.padded_vocab(cfg.vocab_size),
        "make_vocab_size_divisible_by": layout.vocab_multiple,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": None,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "iteration": iteration,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _with(cfg: ModelConfig, own: Mapping[str, Any]) -> ModelConfig:
    """The config with fields replaced by their path.

    Raises:
        ValueError: there is no such field.
    """
    unknown = sorted(set(own) - set(flat(cfg)))
    if unknown:
        raise ValueError(
            f"args[{OWN!r}] of the Megatron checkpoint names {', '.join(unknown)}, which this model does not have; "
            "the checkpoint was written by a newer version: use that one"
        )
    for path, value in own.items():
        section, _, key = path.rpartition(".")
        new = dataclasses.replace(getattr(cfg, section), **{key: value}) if section else value
        cfg = dataclasses.replace(cfg, **{section or key: new})
    return cfg
