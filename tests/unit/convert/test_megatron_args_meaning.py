"""What Megatron-core itself makes of the arguments: its config, rotary frequencies, routing, windows and stages."""

import dataclasses
import importlib
import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional

from convert.megatron.args import differences, to_args
from convert.megatron.layout import Layout
from models import ModelConfig
from models.blocks.rope import attention_factor, frequencies, score_factor
from models.blocks.router import choose
from scripts.params import load_model
from tests.unit.convert.test_megatron_args import NAMES, ROPES, TINY, changed


def core(module: str) -> Any:
    return importlib.import_module(f"megatron.core.{module}")


def megatron_config(args: dict[str, Any]) -> Any:
    """As Megatron-LM's core_transformer_config_from_args makes it: the arguments that are fields, then renamed ones."""
    config = core("transformer.transformer_config")
    kind = config.MLATransformerConfig if args["multi_latent_attention"] else config.TransformerConfig
    given = {field.name: args[field.name] for field in dataclasses.fields(kind) if field.name in args}
    given |= {
        "num_moe_experts": args["num_experts"],
        "num_layers_in_first_pipeline_stage": args["decoder_first_pipeline_num_layers"],
        "num_layers_in_last_pipeline_stage": args["decoder_last_pipeline_num_layers"],
        "num_query_groups": args["num_query_groups"] if args["group_query_attention"] else None,
        "activation_func": functional.silu,
        "gated_linear_unit": args["swiglu"],
        "pipeline_dtype": args["params_dtype"],
        "use_cpu_initialization": True,
    }
    if args["rope_type"] is None:
        given.pop("rope_type", None)
    return kind(**given)


@pytest.mark.parametrize("name", NAMES)
def test_transformer_config_takes_every_field(name: str) -> None:
    cfg = load_model(name, [])
    tp, ep = 1 if cfg.num_heads % 2 else 2, 2 if cfg.moe else 1
    for layout in (Layout(), Layout(tp=tp, pp=2, layers=(cfg.num_layers - 1, 1), ep=ep)):
        config = megatron_config(to_args(cfg, layout, torch.bfloat16))
        assert config.num_query_groups == (cfg.num_heads if cfg.mla else cfg.num_kv_heads)
        assert config.layernorm_epsilon == cfg.norm_eps and config.gated_linear_unit and not config.add_bias_linear
        assert config.add_qkv_bias == cfg.qkv_bias and config.qk_layernorm == (cfg.qk_norm or cfg.mla is not None)
        if cfg.moe:
            assert (config.num_moe_experts, config.moe_ffn_hidden_size) == (cfg.moe.num_experts, cfg.moe.expert_size)
            assert config.moe_shared_expert_gate == cfg.moe.shared_gate


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_deepseek_v3"])
@pytest.mark.parametrize("rope", ROPES)
def test_megatrons_rotary_embedding_has_our_frequencies(
    rope: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 rounding apart, with its factor on cos and sin, and that on the scores, wherever no difference is told."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    cfg = dataclasses.replace(load_model(family, []), rope=ROPES[rope])
    theirs, factor, scores = rotary(to_args(cfg, Layout(), torch.float32))
    dim = cfg.mla.rope_dim if cfg.mla else cfg.head_dim
    trained = cfg.rope.original_max_seq_len or cfg.max_seq_len
    ours = frequencies(cfg.rope, dim, trained, cfg.max_seq_len if rope != "dynamic" else 4 * trained)
    alike = torch.allclose(theirs, ours, rtol=1e-5, atol=0) and abs(factor - attention_factor(cfg.rope)) < 1e-6
    if cfg.mla:
        alike = alike and abs(scores - score_factor(cfg.rope)) < 1e-6
    assert alike == (not differences(cfg))


def rotary(args: dict[str, Any]) -> tuple[torch.Tensor, float, float]:
    """Frequencies, factor on cos and sin, factor on the scores: as GPTModel and MultiLatentAttention make them."""
    embeddings = core("models.common.embeddings.rotary_pos_embedding")
    yarn = core("models.common.embeddings.yarn_rotary_pos_embedding")
    config = megatron_config(args)
    mla = args["multi_latent_attention"]
    if (args["rope_type"] if mla else args["position_embedding_type"]) == "rope":
        extra = {} if mla else {
            "rotary_interleaved": config.rotary_interleaved,
            "seq_len_interpolation_factor": args["rotary_seq_len_interpolation_factor"],
            "rope_scaling": args["use_rope_scaling"],
            "rope_scaling_factor": args["rope_scaling_factor"],
        }  # fmt: skip
        dim = config.qk_pos_emb_head_dim if mla else config.kv_channels
        made = embeddings.RotaryEmbedding(
            dim, rotary_percent=args["rotary_percent"], rotary_base=args["rotary_base"], **extra
        )
        position = made.get_freqs_non_repeated(2)[1]
        return position, 1.0, yarn._yarn_get_mscale(args["rotary_scaling_factor"], args["mscale_all_dim"]) ** 2
    prefix = "" if mla else "yarn_"
    keys = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    extra = {key: args[prefix + key] for key in keys}
    if not mla:
        extra["correction_range_round_to_int"] = args["yarn_correction_range_round_to_int"]
    made = yarn.YarnRotaryEmbedding(
        config.qk_pos_emb_head_dim if mla else config.kv_channels,
        rotary_base=args["rotary_base"],
        scaling_factor=args[f"{prefix}rotary_scaling_factor"],
        **extra,
    )
    angles, factor = made.get_emb(2)
    scores = yarn._yarn_get_mscale(args["rotary_scaling_factor"], args["mscale_all_dim"]) ** 2
    return angles[1, 0, 0].chunk(2)[0], factor, scores


ROUTERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TINY if load_model(name, []).moe},
    "not normed": ("tiny_qwen3_moe", {"moe.normalize": False}),
    "groups": ("tiny_deepseek_v2", {"moe.groups": 4, "moe.groups_kept": 3, "moe.scale": 16.0}),
    "other groups": ("tiny_deepseek_v2", {"moe.groups": 4, "moe.groups_kept": 2, "moe.top_k": 4}),
    "sigmoid not normed": ("tiny_deepseek_v3", {"moe.normalize": False}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_megatrons_router_sends_tokens_where_ours_does(name: str) -> None:
    """The same experts with the same weights, wherever no difference is told."""
    cfg = changed(*ROUTERS[name])
    moe, config = cfg.moe, megatron_config(to_args(cfg, Layout(), torch.float32))
    assert moe is not None
    draw = torch.Generator().manual_seed(3)
    logit_TE = torch.randn(200, moe.num_experts, generator=draw)
    bias_E = torch.randn(moe.num_experts, generator=draw) if moe.correction_bias else None
    route = core("transformer.moe.moe_utils").topk_routing_with_score_function
    theirs_TE, _ = route(
        logit_TE,
        config.moe_router_topk,
        config.moe_router_pre_softmax,
        config.moe_router_num_groups,
        config.moe_router_group_topk,
        config.moe_router_topk_scaling_factor,
        config.moe_router_score_function,
        bias_E if config.moe_router_enable_expert_bias else None,
    )
    score_TE = logit_TE.softmax(1) if moe.score == "softmax" else logit_TE.sigmoid()
    expert_Tk = choose(score_TE, moe, bias_E)
    weight_Tk = score_TE.gather(1, expert_Tk)
    if moe.normalize:
        weight_Tk = weight_Tk / weight_Tk.sum(1, keepdim=True)
    ours_TE = torch.zeros_like(logit_TE).scatter(1, expert_Tk, weight_Tk * moe.scale)
    assert torch.allclose(theirs_TE, ours_TE, atol=1e-6) == (not differences(cfg))


@pytest.mark.parametrize("full", [0, 1, 3, 4])
def test_megatrons_windows_are_ours(full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None, **kind: make(*shape, **kind))
    cfg = changed("tiny_qwen2", {"full_attention_layers": full, "sliding_window": 5})
    args = to_args(cfg, Layout(), torch.float32)
    utils = core("transformer.utils")
    age = torch.arange(12)[:, None] - torch.arange(12)
    for layer in range(cfg.num_layers):
        slides = utils.is_layer_window_attention(args["window_size"], args["window_attn_skip_freq"], layer + 1)
        window = cfg.window(layer)
        assert slides == (window is not None)
        if window is not None:
            hidden = utils.get_sliding_window_causal_mask(12, 12, args["window_size"])
            assert torch.equal(~hidden.reshape(12, 12).bool(), (age >= 0) & (age < window))


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2)])
def test_megatrons_stages_have_our_layers(pp: int, vpp: int) -> None:
    """For every way to deal 4 layers out, those with empty chunks included."""
    cfg = load_model("tiny_llama", ["num_layers=4"])
    block, kind = core("transformer.transformer_block"), core("transformer.enums").LayerType.decoder
    for layers in itertools.product(range(5), repeat=pp * vpp):
        if sum(layers) != 4:
            continue
        layout = Layout(pp=pp, vpp=vpp, layers=layers)
        config = megatron_config(to_args(cfg, layout, torch.float32))
        custom = config.pipeline_model_parallel_layout
        for chunk, count in enumerate(layers):
            rank, own = layout.rank_of(chunk)
            if custom is not None:
                theirs = custom.layout[rank][own].count(kind)
            else:
                theirs = block.get_num_layers_to_build(config, vp_stage=own, pp_rank=rank)
            assert theirs == count, (layers, chunk)


def test_dense_layers_before_experts() -> None:
    cfg: ModelConfig = load_model("tiny_deepseek_v3", [])
    config = megatron_config(to_args(cfg, Layout(), torch.float32))
    assert [bool(sparse) for sparse in config.moe_layer_freq] == [cfg.is_moe(n) for n in range(cfg.num_layers)]
