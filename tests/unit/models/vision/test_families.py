"""Families that see: config.json both ways, names of older checkpoints, what a format cannot say, our own format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.from_hf import open_hf, whole_shapes
from convert.megatron.layout import Layout
from convert.megatron.layout import problems as layout_problems
from convert.same_model import differing
from convert.source import Source
from convert.to_hf import export
from models import FAMILIES, build, family_of, problems
from parallel.materialise import materialise
from parallel.sharding import SINGLE
from scripts.params import load_model

TINY = ("llava", "llava_next", "internvl", "blip2", "qwen2_vl", "qwen2_5_vl", "perceiver", "flamingo")
QWEN2_VL_2B: dict[str, Any] = {  # as published, the decoder's keys beside the tower's
    "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0, "hidden_act": "silu",
    "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960, "max_position_embeddings": 32768,
    "max_window_layers": 28, "model_type": "qwen2_vl", "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
                      "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "preprocessor_config": {"min_pixels": 3136, "max_pixels": 12845056, "merge_size": 2},
}  # fmt: skip


def test_a_published_config_is_the_yaml() -> None:
    assert differing(FAMILIES["qwen2_vl"].from_hf_config(QWEN2_VL_2B), load_model("qwen2_vl_2b", [])) == []


@pytest.mark.parametrize("name", TINY)
def test_folder_and_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    cfg = load_model(f"tiny_{name}", ["vision.images.token_id=500"])
    tensors = {each: torch.randn(shape) for each, shape in whole_shapes(cfg).items()}
    export(tmp_path / "out", cfg, tensors.items())
    opened = open_hf(tmp_path / "out")
    assert differing(opened.cfg, cfg) == []
    source = Source(opened, opened.cfg, 0)
    model = build(opened.cfg)
    materialise(model, source, SINGLE.cut, torch.device("cpu"))
    assert all(torch.equal(param, tensors[each]) for each, param in model.named_parameters())


def test_names_of_other_versions() -> None:
    qwen: Any = FAMILIES["qwen2_vl"]
    for name in ("visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"):
        assert qwen.canonical(name) == "visual.blocks.0.norm1.weight"
    for name in ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"):
        assert qwen.canonical(name) == "model.layers.0.mlp.up_proj.weight"
    intern: Any = FAMILIES["internvl"]
    for name in ("language_model.model.norm.weight", "model.language_model.norm.weight"):
        assert intern.canonical(name) == "language_model.model.norm.weight"


def test_a_decoder_that_is_not_here_is_told() -> None:
    config = {"model_type": "blip-2", "text_config": {"model_type": "opt"}, "vision_config": {}, "qformer_config": {}}
    with pytest.raises(ValueError, match=r"model_type='opt', which is not a decoder here .*model=blip2_vicuna_7b"):
        FAMILIES["blip-2"].from_hf_config(config)


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("qwen2_vl", "rope.sections=[]", "rope.sections"),
        ("qwen2_vl", "rope.sections=[2,2,2]", "rope.sections"),
        ("qwen2_vl", "vision.tower.intermediate_size=40", "vision.tower.intermediate_size"),
        ("qwen2_5_vl", "vision.connector.rms_norm=false", "vision.connector.rms_norm"),
        ("qwen2_5_vl", "vision.tower.window_size=null", "vision.tower.window_size"),
        ("internvl", "vision.images.mode=fixed", "vision.images.mode"),
        ("blip2", "vision.tower.keep_class=false", "vision.tower.keep_class"),
    ],
)
def test_what_a_format_cannot_express_is_refused(name: str, change: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"model.{key} = "):
        load_model(f"tiny_{name}", [change])


def test_megatron_has_no_layout_for_eyes() -> None:
    cfg = load_model("tiny_llava", [])
    assert "the model sees" in layout_problems(Layout(), cfg)[0]
    assert not problems(cfg) and not layout_problems(Layout(), dataclasses.replace(cfg, vision=None))
    assert family_of(cfg) is FAMILIES["llava"]
