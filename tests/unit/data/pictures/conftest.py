"""What the tests of pictures share: settings, and pictures of noise and shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.pictures.types import PictureConfig

BASE = PictureConfig(
    mode="fixed", fit="crop", tile=28, patch=7, frames=1, block=1, per_tile=None, extra=0,
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), resample="bicubic",
    grids=(), newline=False, min_tiles=1, max_tiles=12, thumbnail=True, min_pixels=3136, max_pixels=1003520,
    token="<image>", begin="", end="", rotary=False,
)  # fmt: skip


@pytest.fixture(scope="session")
def config():
    def make(**changes: Any) -> PictureConfig:
        return replace(BASE, **changes)

    return make


@pytest.fixture(scope="session")
def picture():
    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        draw = np.random.default_rng(seed)
        coarse = Image.fromarray(draw.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
        noise = draw.integers(-20, 21, (height, width, 3))
        return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))

    return make
