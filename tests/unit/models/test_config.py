"""Sizes that cannot work are named with a way out, and config.json is read and written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from models import FAMILIES, ModelConfig, RopeConfig, config_from_hf_folder, problems

GOOD = ModelConfig("llama", 512, 64, 176, 2, 4, 2, 16, 256)


@pytest.mark.parametrize(
    ("change", "key", "way"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads", "model.num_kv_heads=2"),
        ({"head_dim": 15}, "head_dim", "model.head_dim=16"),
        ({"num_layers": 0}, "num_layers", "model.num_layers=1 or more"),
        ({"norm_eps": 0.0}, "norm_eps", "model.norm_eps=1e-5"),
        ({"init_std": -1.0}, "init_std", "model.init_std=0.02"),
        ({"rope": RopeConfig(theta=0.5)}, "rope.theta", "model.rope.theta=10000"),
        ({"rope": RopeConfig(factor=2.0)}, "rope.factor", "model.rope.scaling=yarn"),
        ({"rope": RopeConfig(scaling="yarn", factor=0.5)}, "rope.factor", "model.rope.factor=1"),
        ({"rope": RopeConfig(scaling="llama3", low_freq_factor=4)}, "rope.high_freq_factor", "high_freq_factor=4"),
        ({"rope": RopeConfig(original_max_seq_len=0)}, "rope.original_max_seq_len", "null"),
        ({"qk_norm": True}, "qk_norm", "model.family=qwen3"),
        ({"sliding_window": 8}, "sliding_window", "model.family=qwen2"),
        ({"qkv_bias": True}, "attention_out_bias", "model.attention_out_bias=true"),
        ({"hidden_size": 66}, "hidden_size", "model.hidden_size=64"),
        ({"family": "qwen2"}, "qkv_bias", "model.qkv_bias=true"),
        ({"family": "qwen3"}, "qk_norm", "model.qk_norm=true"),
        ({"family": "qwen3", "qk_norm": True, "mlp_bias": True}, "mlp_bias", "model.mlp_bias=false"),
        ({"family": "qwen2", "qkv_bias": True, "sliding_window": 0}, "sliding_window", "model.sliding_window=null"),
    ],
)
def test_impossible_sizes_are_named(change: dict[str, Any], key: str, way: str) -> None:
    found = problems(dataclasses.replace(GOOD, **change))
    assert [problem[0] for problem in found] == [key]
    assert way in found[0][3]


def test_good_sizes_have_no_problems() -> None:
    assert problems(GOOD) == []


def test_every_way_out_of_a_kv_head_problem_works() -> None:
    for kv_heads in (3, 5, 7, 12):
        problem = problems(dataclasses.replace(GOOD, num_kv_heads=kv_heads))[0]
        fixed = dataclasses.replace(GOOD, num_kv_heads=int(problem[3].split("=")[1]))
        assert problems(fixed) == []


ROPES = [
    RopeConfig(500000.0),
    RopeConfig(scaling="linear", factor=4.0, original_max_seq_len=256),
    RopeConfig(scaling="dynamic", factor=2.0, original_max_seq_len=256),
    RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=64, attention_factor=1.3, truncate=False),
    RopeConfig(scaling="llama3", factor=8.0, original_max_seq_len=64, low_freq_factor=1.0, high_freq_factor=4.0),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.scaling)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_config_json_round_trip(tmp_path: Path, rope: RopeConfig, head: str) -> None:
    for cfg in (
        dataclasses.replace(GOOD, qkv_bias=True, attention_out_bias=True, mlp_bias=True),
        dataclasses.replace(GOOD, family="qwen2", qkv_bias=True, sliding_window=9, full_attention_layers=1),
        dataclasses.replace(GOOD, family="qwen3", qk_norm=True, head_dim=32, tied_embeddings=True),
    ):
        cfg = dataclasses.replace(cfg, rope=rope, head=head)
        (tmp_path / "config.json").write_text(json.dumps(FAMILIES[cfg.family].to_hf_config(cfg)))
        assert config_from_hf_folder(tmp_path) == cfg


def hf_json(**change: object) -> str:
    return json.dumps({k: v for k, v in (FAMILIES["llama"].to_hf_config(GOOD) | change).items() if v != "absent"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "no JSON object"),
        ('{"model_type": "mamba"}', "model_type='mamba'; the families here are llama, qwen2, qwen3"),
        (hf_json(hidden_size="absent"), "has no 'hidden_size'"),
        (hf_json(hidden_act="gelu"), "hidden_act='gelu'"),
        (hf_json(rope_scaling={"rope_type": "longrope", "factor": 2.0}), "rotary scaling 'longrope'"),
        (hf_json(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (hf_json(hidden_size="64"), "hidden_size"),
    ],
)
def test_unusable_config_json_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=told.replace("[", r"\[")) as caught:
        config_from_hf_folder(tmp_path)
    assert "config.json" in str(caught.value)


def test_missing_folder_and_missing_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        config_from_hf_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        config_from_hf_folder(tmp_path)


def test_mixed_layer_types_are_refused(tmp_path: Path) -> None:
    cfg = dataclasses.replace(GOOD, family="qwen2", qkv_bias=True, sliding_window=9)
    types = ["sliding_attention", "full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["qwen2"].to_hf_config(cfg) | {"layer_types": types}))
    with pytest.raises(ValueError, match="mixes layer_types"):
        config_from_hf_folder(tmp_path)


def test_both_spellings_of_the_rotary_embedding_are_read(tmp_path: Path) -> None:
    old = json.loads(hf_json(rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0}))
    new = json.loads(hf_json(rope_theta="absent"))
    new["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}
    found = []
    for config in (old, new):
        (tmp_path / "config.json").write_text(json.dumps(config))
        found.append(config_from_hf_folder(tmp_path).rope)
    assert found[0] == found[1] == RopeConfig(5000.0, "linear", 2.0, 256)
