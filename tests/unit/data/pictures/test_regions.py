"""Regions of patches and features against pixels: a picture whose colours tell where they are goes the usual way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.pictures.geometry import plan
from data.pictures.patches import patches_of
from data.pictures.regions import spot_regions
from data.pictures.types import PictureConfig

SIZES = [(640, 480), (480, 640), (300, 1100), (1200, 260), (224, 224), (97, 103)]
NATIVE: dict[str, Any] = {"mode": "native", "tile": None, "block": 2, "frames": 2, "patch": 7}
CASES: dict[str, dict[str, Any]] = {
    "crop": {"fit": "crop"},
    "squash": {"fit": "squash"},
    "pad": {"fit": "pad", "tile": 112},
    "anyres": {"mode": "anyres", "grids": ((28, 56), (56, 28), (56, 56), (84, 28)), "newline": True},
    "tiles": {"mode": "tiles", "max_tiles": 6},
    "tiles, no whole": {"mode": "tiles", "max_tiles": 6, "thumbnail": False},
    "native": NATIVE | {"min_pixels": 28 * 28, "max_pixels": 84 * 84},
    "native, enlarged": NATIVE | {"min_pixels": 2000 * 2000, "max_pixels": 3000 * 3000},
}


def told(image: Image.Image, cfg: PictureConfig) -> np.ndarray:
    """Red and green of each point of each patch, 0 to 1, in the tower's order: [P, 2, patch, patch]."""
    patches = patches_of(image, plan(*image.size, cfg), cfg).numpy()
    colours = patches.reshape(len(patches), 3, cfg.frames, cfg.patch, cfg.patch)[:, :2, 0]
    return colours * np.array(cfg.std[:2])[:, None, None] + np.array(cfg.mean[:2])[:, None, None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_patches_show_what_lies_in_their_regions(config, case: str, size: tuple[int, int]) -> None:
    cfg = config(resample="bilinear", **CASES[case])
    width, height = size
    cfg_of_patches = config(resample="bilinear", **CASES[case] | {"per_tile": 1})  # learnt queries: spots are patches
    down, across = np.mgrid[:height, :width]
    place = [(across + 0.5) / width, (down + 0.5) / height, np.full((height, width), 1.0)]
    image = Image.fromarray(np.rint(np.stack(place, 2) * 255).astype(np.uint8))
    planned = plan(width, height, cfg)
    regions = spot_regions(width, height, planned, cfg_of_patches)
    seen = told(image, cfg)
    if cfg.mode == "native":  # regions of patches are row by row, the tower takes them block by block
        rows, cols = planned.grids[0]
        seen = seen.reshape(rows // 2, cols // 2, 2, 2, *seen.shape[1:]).transpose(0, 2, 1, 3, 4, 5, 6)
        seen = seen.reshape(rows * cols, 2, cfg.patch, cfg.patch)
    assert len(regions) == len(seen)
    rim = max(size) / 112 if case == "pad" else 0  # where the filter mixes a border's colour in
    inner = (regions[:, :2] >= rim).all(1) & (regions[:, 2:] <= [width - rim, height - rim]).all(1)
    assert inner.sum() >= 4
    centre = (regions[:, :2] + regions[:, 2:]) / 2 / [width, height]
    # Colours are whole numbers of 1/255, and the picture's rim is repeated by the filter.
    assert np.abs(seen.mean((2, 3)) - centre)[inner].max() < 0.012
    first, last = seen[:, 0].mean(1)[:, [0, -1]].T  # the first and last column of a patch: half a point from its edges
    half = (regions[:, 2] - regions[:, 0]) / cfg.patch / 2 / width
    assert np.abs(first - (regions[:, 0] / width + half))[inner].max() < 0.02
    assert np.abs(last - (regions[:, 2] / width - half))[inner].max() < 0.02


@pytest.mark.parametrize("case", ["tiles", "native", "pad"])
def test_a_feature_lies_where_the_patches_of_its_block_lie(config, case: str) -> None:
    cfg = config(**CASES[case] | {"block": 2})
    planned = plan(300, 200, cfg)
    patches = spot_regions(300, 200, planned, config(**CASES[case] | {"block": 2, "per_tile": 1}))
    found, at = [], 0
    for rows, cols in planned.grids:
        tile = patches[at : at + rows * cols].reshape(rows, cols, 4)
        at += rows * cols
        for row in range(0, rows, 2):
            for col in range(0, cols, 2):
                block = tile[row : row + 2, col : col + 2].reshape(4, 4)
                found.append([*block[:, :2].min(0), *block[:, 2:].max(0)])
    np.testing.assert_allclose(spot_regions(300, 200, planned, cfg), found, rtol=0, atol=1e-9)


def test_by_hand(config) -> None:
    crop = spot_regions(56, 112, plan(56, 112, config()), config())  # 28 x 56 pixels, of which the middle 28 x 28
    assert crop[0].tolist() == [0, 28, 14, 42] and crop[-1].tolist() == [42, 70, 56, 84]
    pad = config(fit="pad")
    border = spot_regions(56, 28, plan(56, 28, pad), pad)
    assert border[0].tolist() == [0, -14, 14, 0] and border[4].tolist() == [0, 0, 14, 14]
    kept = config(extra=1)
    assert np.isnan(spot_regions(28, 28, plan(28, 28, kept), kept)[0]).all()
