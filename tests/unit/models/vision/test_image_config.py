"""Settings of pictures that cannot work are told with a way out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from models.vision.config import (
    ImageConfig,
    MergerConfig,
    Problem,
    ProjectorConfig,
    QFormerConfig,
    TowerConfig,
    VisionConfig,
)

CLIP = TowerConfig("clip", 32, 64, 2, 4, 14, 336)
QWEN = TowerConfig("qwen2_vl", 32, 64, 2, 4, 14, frames=2)
GRIDS = ((336, 672), (672, 336), (672, 672))
SOME = "grids=[[336,672],[672,336],[672,672]]"

BAD: list[tuple[dict[str, Any], str, object, str, str]] = [
    ({"token": ""}, "token", "", "no text stands for a picture", "token=<image>"),
    ({"std": (0.5, 0.0, 0.5)}, "std", [0.5, 0.0, 0.5], "above 0", "std=[0.5,0.5,0.5]"),
    ({"mode": "tiles", "min_tiles": 7, "max_tiles": 6}, "min_tiles", 7, "and max_tiles=6", "min_tiles=1"),
    ({"mode": "tiles", "min_tiles": 0}, "min_tiles", 0, "between 1 and", "min_tiles=1"),
    ({"mode": "tiles", "max_tiles": 0}, "max_tiles", 0, "at least 1", "max_tiles=12"),
    ({"mode": "anyres"}, "grids", [], "mode=anyres chooses among them", SOME),
    ({"mode": "anyres", "grids": ((336, 600),)}, "grids", [[336, 600]], "[336, 600] is not made of whole tiles", SOME),
    ({"mode": "anyres", "grids": ((0, 336),)}, "grids", [[0, 336]], "image_size=336 pixels", SOME),
    ({"newline": True}, "newline", True, "mode=fixed has none", "newline=false"),
]


def told(cfg: VisionConfig) -> list[Problem]:
    return cfg.problems(64)


@pytest.mark.parametrize("change, key, value, reason, way", BAD)
def test_problems(change: dict[str, Any], key: str, value: object, reason: str, way: str) -> None:
    ((found, shown, why, out),) = told(VisionConfig("loom", CLIP, ProjectorConfig(), ImageConfig(**change)))
    assert (found, shown, out) == (f"vision.images.{key}", value, f"model.vision.images.{way}")
    assert reason in why


def test_pixels_of_native_pictures() -> None:
    cfg = VisionConfig("loom", QWEN, MergerConfig(), ImageConfig(mode="native"))
    assert told(cfg) == []
    ((key, value, _, _),) = told(replace(cfg, images=ImageConfig(mode="native", min_pixels=9_999_999)))
    assert (key, value) == ("vision.images.min_pixels", 9_999_999)


def test_a_row_can_only_end_where_features_lie_in_rows() -> None:
    images = ImageConfig(mode="anyres", grids=GRIDS, newline=True)
    good = VisionConfig("loom", CLIP, ProjectorConfig(), images)
    assert told(good) == []
    for cfg, reason in [
        (replace(good, connector=QFormerConfig()), "the connector qformer gives queries"),
        (replace(good, tower=replace(CLIP, keep_class=True)), "keep_class=true puts a token among them"),
    ]:
        ((key, value, why, out),) = told(cfg)
        assert (key, value, out) == ("vision.images.newline", True, "model.vision.images.newline=false")
        assert reason in why
