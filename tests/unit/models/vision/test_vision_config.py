"""Sizes of towers that cannot work are told with a way out, and layouts that do not divide their heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from data.config import DataConfig
from models import ModelConfig
from models.vision.config import (
    ImageConfig,
    MergerConfig,
    ProjectorConfig,
    QFormerConfig,
    ResamplerConfig,
    ShuffleConfig,
    TowerConfig,
    VisionConfig,
)
from parallel.config import EngineConfig, ParallelConfig
from tests.tower_cases import CASES
from trainer.layout_rules import Layout, broken

CLIP, INTERN, QWEN2, QWEN2_5 = (CASES[name].cfg for name in ("clip", "intern", "qwen2_vl", "qwen2_5_vl"))
SIGLIP = TowerConfig("siglip", 1152, 4304, 27, 16, 14, 384, 1e-6, "gelu_tanh")


@pytest.mark.parametrize("name", CASES)
def test_good_towers_have_no_problem(name: str) -> None:
    case = CASES[name]
    assert case.cfg.problems(case.block) == []


def test_pixels_behind_the_last_patch_are_no_problem() -> None:
    """SigLIP reads 27 x 27 patches of 14 pixels from a picture of 384."""
    assert SIGLIP.problems(1) == [] and SIGLIP.grid == 27


BAD: list[tuple[TowerConfig, int, dict[str, Any], str, str, str]] = [
    (CLIP, 1, {"num_layers": 0, "feature_layer": -1}, "num_layers", "at least 1", "num_layers=1 or more"),
    (CLIP, 1, {"norm_eps": 0.0}, "norm_eps", "above 0", "norm_eps=1e-6"),
    (CLIP, 1, {"num_heads": 5}, "num_heads", "hidden_size=32 is not shared out evenly", "num_heads=4"),
    (CLIP, 1, {"image_size": None}, "image_size", "tiles of one size", "image_size=112"),
    (CLIP, 1, {"image_size": 5}, "image_size", "holds no patch", "image_size=7"),
    (INTERN, 2, {"image_size": 35}, "image_size", "5 patches a side, and the connector joins", "image_size=28"),
    (CLIP, 1, {"feature_layer": -4}, "feature_layer", "to the first, -3", "feature_layer=-1"),
    (CLIP, 1, {"feature_layer": 2}, "feature_layer", "from the last layer, -1", "feature_layer=-1"),
    (CLIP, 1, {"final_norm": True}, "final_norm", "feature_layer=-2 takes another's", "final_norm=false"),
    (CLIP, 1, {"qk_norm": True}, "qk_norm", "clip has no such thing (intern has it)", "qk_norm=false"),
    (CLIP, 1, {"qkv_bias": False}, "qkv_bias", "intern, blip2 have it", "qkv_bias=true"),
    (CLIP, 1, {"frames": 2}, "frames", "qwen2_vl, qwen2_5_vl have it", "frames=1"),
    (SIGLIP, 1, {"keep_class": True}, "keep_class", "clip, intern, blip2 have it", "keep_class=false"),
    (QWEN2, 2, {"window_size": 28}, "window_size", "qwen2_5_vl has it", "window_size=null"),
    (QWEN2, 2, {"full_layers": (1,)}, "full_layers", "qwen2_5_vl has it", "full_layers=[]"),
    (QWEN2, 2, {"final_norm": True}, "final_norm", "clip, siglip, intern, blip2 have it", "final_norm=false"),
    (QWEN2, 2, {"image_size": 28}, "image_size", "sizes of their own", "image_size=null"),
    (QWEN2, 2, {"num_heads": 16}, "num_heads", "half by row, half by column", "a multiple of 4"),
    (QWEN2_5, 2, {"activation": "gelu"}, "activation", "silu", "activation=silu"),
    (QWEN2_5, 2, {"window_size": 30}, "window_size", "= 14 pixels", "window_size=28"),
    (QWEN2_5, 2, {"full_layers": (1, 3)}, "full_layers", "from 0 to 2", "full_layers=[]"),
]


@pytest.mark.parametrize("cfg, block, change, key, reason, way", BAD)
def test_problems(cfg: TowerConfig, block: int, change: dict[str, Any], key: str, reason: str, way: str) -> None:
    ((found, value, why, out),) = replace(cfg, **change).problems(block)
    assert (found, value) == (key, list(change[key]) if key == "full_layers" and cfg is QWEN2_5 else change[key])
    assert reason in why and out.endswith(way)


@pytest.mark.parametrize(
    "tower, mode, way",
    [(CLIP, "native", "fixed, anyres or tiles"), (QWEN2, "fixed", "native")],
)
def test_native_pictures_are_for_native_towers(tower: TowerConfig, mode: Any, way: str) -> None:
    connector = MergerConfig() if tower.native else ProjectorConfig()
    cfg = model(tower, connector, mode)
    ((key, value, reason, out),) = cfg.size_problems()
    assert (key, value, out) == ("vision.images.mode", mode, f"model.vision.images.mode={way}")
    assert f"kind {tower.kind}" in reason


def test_a_towers_problem_is_told_with_its_whole_key() -> None:
    bad = model(replace(CLIP, num_heads=5), ProjectorConfig(), "fixed")
    ((key, _, _, way),) = bad.size_problems()
    assert (key, way) == ("vision.tower.num_heads", "model.vision.tower.num_heads=4")


@pytest.mark.parametrize("connector", [ShuffleConfig(), ResamplerConfig(num_heads=4)])
def test_a_class_token_is_no_place_of_a_picture(connector: Any) -> None:
    assert model(CLIP, connector, "fixed").size_problems() == []
    ((key, value, reason, way),) = model(replace(CLIP, keep_class=True), connector, "fixed").size_problems()
    assert (key, value, way) == ("vision.tower.keep_class", True, "model.vision.tower.keep_class=false")
    assert f"the connector {connector.name} asks where" in reason


def test_tensor_parallel_shares_out_the_heads_of_the_tower() -> None:
    cfg = model(CLIP, QFormerConfig(), "fixed")
    data = DataConfig(sources=(), seq_len=8, micro_batch_rows=1, global_batch_rows=8)
    for tp, told in ((4, False), (8, True)):
        parallel = ParallelConfig(tp=tp)
        faults = [f for f in broken(Layout(cfg, parallel, EngineConfig(), data), tp) if f.key == "parallel.tp"]
        assert bool(faults) == told
        words = "model.vision.tower.num_heads=4, model.vision.connector.num_heads=12"
        assert not told or words in faults[0].reason


def model(tower: TowerConfig, connector: Any, mode: Any) -> ModelConfig:
    vision = VisionConfig("loom", tower, connector, ImageConfig(mode=mode))
    return ModelConfig("llama", 64, 32, 64, 2, 8, 8, 4, 64, vision=vision)
