"""Experts that cannot work are named with a way out that works; config.json of the families with experts both ways."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from models import FAMILIES, ModelConfig, config_from_hf_folder, problems
from models.config import MoEConfig
from scripts.params import load_model

SIZES = (512, 64, 96, 3, 4, 2, 16, 256)
MOE = MoEConfig(num_experts=8, top_k=2, expert_size=96)
MIXTRAL = ModelConfig("mixtral", *SIZES, moe=MOE)
QWEN2 = ModelConfig(
    "qwen2_moe", *SIZES, qkv_bias=True,
    moe=MoEConfig(8, 2, 32, shared_size=48, shared_gate=True, first_dense=1, normalize=False, balance_loss=0.5),
)  # fmt: skip
QWEN3 = ModelConfig("qwen3_moe", *SIZES, qk_norm=True, moe=MoEConfig(8, 2, 32, first_dense=2))
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"num_experts": 0}, "moe.num_experts", "1 or more"),
    ({"top_k": 9}, "moe.top_k", "model.moe.top_k=8"),
    ({"groups": 3}, "moe.groups", "model.moe.groups=2"),
    ({"groups": 4, "groups_kept": 5}, "moe.groups_kept", "model.moe.groups_kept=4"),
    ({"groups": 8, "groups_kept": 1}, "moe.top_k", "model.moe.top_k=1"),
    ({"groups": 8, "groups_kept": 2, "group_score": "top2_sum"}, "moe.groups", "model.moe.groups=4"),
    ({"scale": 0.0}, "moe.scale", "model.moe.scale=1"),
    ({"capacity": 0.0}, "moe.capacity", "null"),
    ({"bias_rate": 0.1}, "moe.bias_rate", "model.moe.correction_bias=true"),
    ({"shared_gate": True}, "moe.shared_gate", "model.moe.shared_gate=false"),
    ({"balance_loss": -1.0}, "moe.balance_loss", "model.moe.balance_loss=0"),
    ({"first_dense": 3}, "moe.first_dense", "model.moe.first_dense=0"),
    ({"expert_size": 40}, "moe.expert_size", "model.moe.expert_size=96"),
    ({"normalize": False}, "moe.normalize", "model.moe.normalize=true"),
    ({"score": "sigmoid"}, "moe.score", "model.moe.score=softmax"),
    ({"shared_size": 10}, "moe.shared_size", "model.moe.shared_size=0"),
]


@pytest.mark.parametrize(("change", "key", "way"), WRONG)
def test_impossible_experts_are_named(change: dict[str, Any], key: str, way: str) -> None:
    found = problems(dataclasses.replace(MIXTRAL, moe=dataclasses.replace(MOE, **change)))
    assert [problem[0] for problem in found] == [key]
    assert way in found[0][3]


@pytest.mark.parametrize(
    ("cfg", "change", "key", "way"),
    [
        (MIXTRAL, {"moe": None}, "moe", "model.family=llama"),
        (MIXTRAL, {"family": "llama"}, "moe", "model.family=mixtral"),
        (MIXTRAL, {"qkv_bias": True}, "qkv_bias", "model.qkv_bias=false"),
        (MIXTRAL, {"full_attention_layers": 1}, "full_attention_layers", "model.full_attention_layers=0"),
        (MIXTRAL, {"mlp_bias": True}, "mlp_bias", "model.mlp_bias=false"),
        (QWEN2, {"qk_norm": True}, "qk_norm", "model.qk_norm=false"),
        (QWEN2, {"sliding_window": 8}, "sliding_window", "model.sliding_window=null"),
        (QWEN2, {"moe": MOE}, "moe.shared_size", "model.moe.shared_size="),
        (QWEN3, {"qk_norm": False}, "qk_norm", "model.qk_norm=true"),
        (QWEN3, {"qkv_bias": True}, "attention_out_bias", "model.attention_out_bias=true"),
    ],
)
def test_what_a_family_cannot_express_is_named(cfg: ModelConfig, change: dict[str, Any], key: str, way: str) -> None:
    assert problems(cfg) == []
    found = problems(dataclasses.replace(cfg, **change))
    assert found[0][0] == key and way in found[0][3]


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("cfg", [MIXTRAL, QWEN2, QWEN3], ids=lambda cfg: cfg.family)
def test_config_json_round_trip(tmp_path: Path, cfg: ModelConfig, head: Any) -> None:
    cfg = dataclasses.replace(cfg, head=head)
    window = {} if cfg.family == "qwen2_moe" else {"sliding_window": 9}
    for each in (cfg, dataclasses.replace(cfg, **window, tied_embeddings=True)):
        (tmp_path / "config.json").write_text(json.dumps(FAMILIES[cfg.family].to_hf_config(each)))
        assert config_from_hf_folder(tmp_path) == each


@pytest.mark.parametrize("cfg", [MIXTRAL, QWEN2, QWEN3], ids=lambda cfg: cfg.family)
def test_what_transformers_writes_is_read(tmp_path: Path, cfg: ModelConfig) -> None:
    keys = FAMILIES[cfg.family].to_hf_config(cfg)
    AutoConfig.for_model(keys.pop("model_type"), **keys).save_pretrained(tmp_path)
    assert config_from_hf_folder(tmp_path) == cfg


@pytest.mark.parametrize(
    ("cfg", "change", "told"),
    [
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN3, {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        (QWEN3, {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        (QWEN3, {"num_experts": None}, "num_experts"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, cfg: ModelConfig, change: dict[str, Any], told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[cfg.family].to_hf_config(cfg) | change))
    with pytest.raises(ValueError, match=told):
        config_from_hf_folder(tmp_path)


def test_training_settings_of_a_yaml_can_be_changed_by_key() -> None:
    cfg = load_model("tiny_mixtral", ["moe.capacity=1.5", "moe.z_loss=0.001", "moe.balance_over=sequence"])
    assert cfg.moe is not None
    assert (cfg.moe.capacity, cfg.moe.z_loss, cfg.moe.balance_over) == (1.5, 0.001, "sequence")
    with pytest.raises(ValueError, match=r"did you mean model\.moe\.top_k"):
        load_model("tiny_mixtral", ["moe.topk=1"])
