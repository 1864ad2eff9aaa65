"""DeepSeek-V2 and V3: published config.json files, exports that transformers loads, what is left out and refused."""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from convert.from_hf import open_hf, whole_shapes
from convert.source import Source
from convert.to_hf import export
from models import FAMILIES, ModelConfig, build, config_from_hf_folder, problems
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import WHOLE
from scripts.params import load_model

TINY = {name: load_model(f"tiny_{name}", []) for name in ("deepseek_v2", "deepseek_v3")}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def weights(cfg: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Fresh weights, with a correction bias that decides something."""
    source = InitSource(cfg, 0)
    for name in whole_shapes(cfg):
        tensor = source.tensor(name)
        yield name, torch.linspace(-0.5, 0.5, len(tensor)).flip(0) if name.endswith("router.bias") else tensor


@pytest.mark.parametrize(("name", "config"), [("deepseek_v2_lite", V2_LITE), ("deepseek_v3", V3)])
def test_published_config_is_the_yaml(name: str, config: dict[str, Any]) -> None:
    """All but how V3 was balanced: `bias_rate` stands in no config.json, and `balance_loss` follows the paper."""
    cfg = load_model(name, [])
    assert cfg.moe is not None
    cfg = dataclasses.replace(
        cfg, moe=dataclasses.replace(cfg.moe, bias_rate=0.0, balance_loss=config["aux_loss_alpha"])
    )
    assert FAMILIES[cfg.family].from_hf_config(config) == cfg
    assert problems(cfg) == []


@pytest.mark.parametrize("family", TINY)
def test_export_loads_with_equal_logits_and_comes_back_exactly(tmp_path: Path, family: str) -> None:
    """fp32, 1e-5; weights bit by bit."""
    cfg = dataclasses.replace(TINY[family], init_std=0.1)
    folder = export(tmp_path / "hf", cfg, weights(cfg))
    assert config_from_hf_folder(folder) == cfg
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    theirs, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = build(cfg)
    materialise(ours, Source(open_hf(folder), cfg), WHOLE, torch.device("cpu"))
    tokens = torch.randint(0, cfg.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = theirs(tokens[None]).logits[0], ours(tokens, torch.arange(40), [0, 40], output="head")
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for (name, before), (other, after) in zip(weights(cfg), Source(open_hf(folder), cfg).weights(), strict=True):
        assert name == other and torch.equal(before, after), name


def test_prediction_layers_are_left_out_with_a_word_and_nothing_else_is(tmp_path: Path) -> None:
    cfg = TINY["deepseek_v3"]
    file = export(tmp_path / "hf", cfg, weights(cfg)) / "model.safetensors"
    stored = load_file(file)
    extra = {"model.layers.3.eh_proj.weight": torch.zeros(2), "model.layers.3.mlp.gate.weight": torch.zeros(2)}
    save_file(stored | extra, file)
    with pytest.warns(UserWarning, match=r"2 tensors model\.layers\.3\.\* are left out \(multi-token prediction"):
        open_hf(tmp_path / "hf")
    save_file(stored | {"model.layers.30.eh_proj.weight": torch.zeros(2)}, file)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="1 tensors have no place in the model"):
        warnings.simplefilter("error")
        open_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    ("config", "changes", "told"),
    [
        (V2_LITE, {"topk_method": "noaux_tc"}, "topk_method"),
        (V2_LITE, {"norm_topk_prob": True}, "normed expert weights"),
        (V2_LITE, {"mlp_bias": True}, "mlp_bias"),
        (V2_LITE, {"kv_lora_rank": None}, "kv_lora_rank"),
        (V2_LITE, {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
        (V3, {"scoring_func": "softmax"}, "scoring_func"),
        (V3, {"rope_interleave": False}, "rope_interleave"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (V3, {"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\); convert them to bf16"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, config: Any, changes: dict[str, Any], told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=told):
        config_from_hf_folder(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("deepseek_v2", {"score": "sigmoid"}, "moe.score"),
        ("deepseek_v2", {"normalize": True}, "moe.normalize"),
        ("deepseek_v2", {"correction_bias": True}, "moe.correction_bias"),
        ("deepseek_v2", {"shared_size": 0}, "moe.shared_size"),
        ("deepseek_v2", {"shared_size": 48}, "moe.shared_size"),
        ("deepseek_v2", {"shared_gate": True}, "moe.shared_gate"),
        ("deepseek_v3", {"score": "softmax"}, "moe.score"),
        ("deepseek_v3", {"group_score": "max"}, "moe.group_score"),
        ("deepseek_v3", {"groups": 16}, "moe.groups"),
        ("deepseek_v3", {"first_dense": 3}, "moe.first_dense"),
    ],
)
def test_experts_a_checkpoint_cannot_express_are_told(family: str, changes: dict[str, Any], key: str) -> None:
    cfg = TINY[family]
    assert cfg.moe is not None and problems(cfg) == []
    changed = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, **changes))
    assert [problem[0] for problem in problems(changed)] == [key]


def test_attention_and_widths_a_checkpoint_cannot_express_are_told() -> None:
    for changes, key in (({"mla": None, "head_dim": 16}, "mla"), ({"hidden_size": 66}, "hidden_size")):
        assert [problem[0] for problem in problems(dataclasses.replace(TINY["deepseek_v2"], **changes))] == [key]
