"""Patches against transformers' own image processors (Pillow back end), bit for bit, and the counts of tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from data.pictures.errors import PictureError
from data.pictures.geometry import plan
from data.pictures.patches import patches_of

SIZES = [(64, 48), (48, 64), (31, 200), (200, 31), (28, 28), (5, 3), (301, 299), (56, 28), (1, 1), (1000, 700)]
PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
GRIDS = [list(grid) for grid in PINPOINTS]


def flat(pixels: np.ndarray | torch.Tensor, patch: int) -> torch.Tensor:
    """Tiles [B, 3, H, W] as a convolution of step `patch` sees them, row by row: [P, X]."""
    columns = torch.nn.functional.unfold(torch.as_tensor(np.asarray(pixels)), patch, stride=patch)
    return columns.transpose(1, 2).flatten(0, 1)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_one_tile(config, picture, fit: str, resample: str) -> None:
    cfg = config(fit=fit, resample=resample)
    code = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[resample]
    theirs = {
        "crop": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28, resample=code),
        "squash": SiglipImageProcessorPil(
            size={"height": 28, "width": 28}, image_mean=cfg.mean, image_std=cfg.std, resample=code
        ),
        "pad": LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=28, do_pad=True, resample=code),
    }[fit]
    for size in SIZES:
        image = picture(*size)
        steps = plan(*size, cfg)
        assert steps.grids == ((4, 4),) and steps.order_F.tolist() == list(range(16)) and steps.shape == (1, 4, 4)
        same(patches_of(image, steps, cfg), flat(theirs(image)["pixel_values"], 7))


def test_a_border_that_is_no_patch_is_left_out_as_by_a_convolution(config, picture) -> None:
    cfg = config(tile=30)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=30)
    image = picture(90, 50)
    same(patches_of(image, plan(90, 50, cfg), cfg), flat(theirs(image)["pixel_values"], 7))


def test_anyres(config, picture) -> None:
    cfg = config(mode="anyres", grids=PINPOINTS, newline=True)
    theirs = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=28, image_grid_pinpoints=GRIDS)
    for size in SIZES:
        image = picture(*size)
        steps = plan(*size, cfg)
        same(patches_of(image, steps, cfg), flat(theirs(image)["pixel_values"][0], 7))


@pytest.mark.parametrize("thumbnail", [True, False])
def test_tiles(config, picture, thumbnail: bool) -> None:
    cfg = config(mode="tiles", block=2, min_tiles=1, max_tiles=6, thumbnail=thumbnail)
    theirs = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    for size in SIZES:
        image = picture(*size)
        steps = plan(*size, cfg)
        tiles = np.stack(theirs(image)["pixel_values"])
        if not thumbnail and len(tiles) > 1:
            tiles = tiles[:-1]
        assert steps.tokens == len(tiles) * 4
        same(patches_of(image, steps, cfg), flat(tiles, 7))


@pytest.mark.parametrize("block", [1, 2])
def test_native(config, picture, block: int) -> None:
    cfg = config(mode="native", tile=None, frames=2, block=block, min_pixels=28 * 28, max_pixels=9000)
    theirs = Qwen2VLImageProcessorPil(patch_size=7, merge_size=block, min_pixels=28 * 28, max_pixels=9000)
    for size in SIZES:
        image = picture(*size)
        steps = plan(*size, cfg)
        found = theirs(image)
        time, rows, cols = found["image_grid_thw"][0].tolist()
        assert steps.shape == (time, rows // block, cols // block)
        assert steps.tokens == rows * cols // block**2
        same(patches_of(image, steps, cfg), torch.as_tensor(found["pixel_values"]))


def test_frames_of_a_video_share_patches_in_native_mode(config, picture) -> None:
    """As Qwen's: two frames a patch, the last one twice where their number is odd."""
    cfg = config(mode="native", tile=None, frames=2, block=2, max_pixels=4000)
    frames = [picture(60, 44, seed) for seed in range(3)]
    steps = plan(60, 44, cfg, frames=3)
    rows, cols = steps.grids[0]
    assert steps.grids == ((rows, cols),) * 2 and steps.shape == (2, rows // 2, cols // 2)
    stills = [patches_of(frame, plan(60, 44, cfg), cfg).unflatten(1, (3, 2, 49)) for frame in frames]
    pairs = [torch.stack([stills[a][:, :, 0], stills[b][:, :, 0]], 2) for a, b in ((0, 1), (2, 2))]
    same(patches_of(frames, steps, cfg), torch.cat(pairs).flatten(1))


def test_a_picture_of_another_size_than_planned_for_is_told(config, picture) -> None:
    cfg = config(mode="native", tile=None, frames=2, block=2)
    with pytest.raises(PictureError, match="has changed: now 1 x 100 x 300 pixels"):
        patches_of(picture(100, 300), plan(300, 100, cfg), cfg)


@pytest.mark.parametrize("newline", [True, False])
def test_order_of_anyres_is_that_in_which_llava_next_packs_its_features(config, newline: bool) -> None:
    cfg = config(mode="anyres", grids=PINPOINTS, newline=newline)
    vision = SimpleNamespace(image_size=28, patch_size=7)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=GRIDS))
    for width, height in [*SIZES, (3, 600), (600, 3), (640, 480), (337, 1000), (119, 87)]:
        steps = plan(width, height, cfg)
        count = len(steps.grids) * 16
        features = torch.arange(count, dtype=torch.float64).view(-1, 16, 1)
        line = torch.tensor([-1.0]) if newline else None
        packed, _ = LlavaNextModel.pack_image_features(
            cast(Any, model), [features], torch.tensor([[height, width]]), "default", line
        )
        assert packed[0].flatten().tolist() == steps.order_F.tolist()


sides = st.integers(1, 4000)


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.sampled_from(["fixed", "anyres", "tiles", "native"]), st.sampled_from([1, 2]), st.booleans())
def test_features_and_tokens_agree_at_any_size(config, width, height, mode, block: int, newline: bool) -> None:
    """A feature stands at one token at most, outside anyres at exactly one; as many as transformers counts."""
    cfg = config(mode=mode, block=block, grids=PINPOINTS, newline=newline, frames=2 if mode == "native" else 1)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(PictureError, match="too long"):
            plan(width, height, cfg)
        return
    steps = plan(width, height, cfg)
    patches = sum(rows * cols for rows, cols in steps.grids)
    if mode == "anyres":
        real = [feature for feature in steps.order_F.tolist() if feature >= 0]
        assert len(set(real)) == len(real) and min(real) >= 0 and max(real) < patches // block**2
    else:
        assert steps.order_F.tolist() == list(range(patches // block**2))
    assert np.prod(steps.shape) == steps.tokens
    if mode == "native":
        theirs = Qwen2VLImageProcessorPil(patch_size=7, merge_size=block, min_pixels=3136, max_pixels=1003520)
        assert patches == theirs.get_number_of_image_patches(height, width)
    if mode == "tiles":
        theirs = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True)
        assert len(steps.grids) == theirs.get_number_of_image_patches(height, width)


def test_queries_and_a_class_token_count_as_they_are(config) -> None:
    """A connector with 5 queries has 5 features a tile, whatever is in it; a class token is one more than patches."""
    queries = plan(56, 28, config(mode="tiles", per_tile=5))
    assert len(queries.grids) == 3 and queries.order_F.tolist() == list(range(15)) and queries.shape == (1, 1, 15)
    kept = plan(56, 28, config(extra=1))
    assert kept.order_F.tolist() == list(range(17)) and kept.shape == (1, 1, 17)
