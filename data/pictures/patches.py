"""Pixels of a picture as the patches a vision tower takes.

Values are those of transformers' processors with the Pillow back end, bit for bit: resized in 8 bits, times 1/255 in
double precision, then minus mean and divided by std in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from data.pictures.errors import PictureError
from data.pictures.geometry import best_canvas, best_resolution, fitted, tile_grids
from data.pictures.types import PictureConfig, Plan

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def patches_of(image: Image.Image | Sequence[Image.Image], plan: Plan, cfg: PictureConfig) -> torch.Tensor:
    """The patches of an RGB picture, or of the frames of a video in native mode.

    Returns:
        fp32 [P, X]: colours x frames x patch x patch, tile after tile, row by row; in native mode block by block.

    Raises:
        PictureError: the picture has another size than the one that was planned for.
    """
    frames = [image] if isinstance(image, Image.Image) else list(image)
    if tile_grids(*frames[0].size, cfg, len(frames)) != plan.grids:
        width, height = frames[0].size
        raise PictureError(f"the picture has changed: now {len(frames)} x {width} x {height} pixels")
    tiles = _native(frames, plan, cfg) if cfg.mode == "native" else [[tile] for tile in _tiles(frames[0], cfg)]
    counts = [rows * cols for rows, cols in plan.grids]
    out = np.empty((sum(counts), 3, cfg.frames, cfg.patch, cfg.patch), np.float32)
    block = cfg.block if cfg.mode == "native" else 1
    starts = np.cumsum([0, *counts])
    for number, (grid, pictures) in enumerate(zip(plan.grids, tiles, strict=True)):
        part = out[starts[number] : starts[number + 1]]
        for place in range(cfg.frames):
            if place < len(pictures):
                _cut(pictures[place], grid, block, part[:, :, place], cfg)
            else:  # a picture, or the last frame, fills its patches
                part[:, :, place] = part[:, :, len(pictures) - 1]
    return torch.from_numpy(out.reshape(len(out), -1))


def _cut(pixels: np.ndarray, grid: tuple[int, int], block: int, out: np.ndarray, cfg: PictureConfig) -> None:
    """Pixels uint8 [H, W, 3] as patches into out [P, 3, p, p]; what is behind the last one is left out."""
    (rows, cols), side = grid, out.shape[-1]
    shape = (rows // block, block, side, cols // block, block, side, 3)
    view = pixels[: rows * side, : cols * side].reshape(shape).transpose(0, 3, 1, 4, 6, 2, 5)
    target = out.reshape(shape[0], shape[3], block, block, 3, side, side, copy=False)
    np.multiply(view, 1 / 255, out=target, dtype=np.float64, casting="unsafe")
    target -= np.array(cfg.mean, np.float32)[:, None, None]
    target /= np.array(cfg.std, np.float32)[:, None, None]


def _native(frames: list[Image.Image], plan: Plan, cfg: PictureConfig) -> list[list[np.ndarray]]:
    rows, cols = plan.grids[0]
    pixels = [_resized(frame, cols * cfg.patch, rows * cfg.patch, cfg) for frame in frames]
    return [pixels[at : at + cfg.frames] for at in range(0, len(pixels), cfg.frames)]


def _tiles(image: Image.Image, cfg: PictureConfig) -> list[np.ndarray]:
    """Pixels of each tile, uint8 [tile, tile, 3]."""
    assert cfg.tile is not None
    side = cfg.tile
    if cfg.mode == "fixed":
        return [_fixed(image, cfg)]
    if cfg.mode == "tiles":
        cols, rows = best_canvas(*image.size, cfg)
        tiles = _split(_resized(image, cols * side, rows * side, cfg), side)
        return [*tiles, _resized(image, side, side, cfg)] if cfg.thumbnail and len(tiles) > 1 else tiles
    high, wide = best_resolution(*image.size, cfg.grids)
    inner = _resized(image, *fitted(*image.size, wide, high), cfg)
    whole = np.zeros((high, wide, 3), np.uint8)
    top, left = (high - inner.shape[0]) // 2, (wide - inner.shape[1]) // 2
    whole[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return [_resized(image, side, side, cfg), *_split(whole, side)]


def _fixed(image: Image.Image, cfg: PictureConfig) -> np.ndarray:
    assert cfg.tile is not None
    side, (width, height) = cfg.tile, image.size
    if cfg.fit == "squash":
        return _resized(image, side, side, cfg)
    if cfg.fit == "pad":
        longer = max(width, height)
        square = Image.new("RGB", (longer, longer), tuple(int(colour * 255) for colour in cfg.mean))
        square.paste(image, ((longer - width) // 2, (longer - height) // 2))
        return _resized(square, side, side, cfg)
    if width <= height:
        pixels = _resized(image, side, int(side * height / width), cfg)
    else:
        pixels = _resized(image, int(side * width / height), side, cfg)
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def _split(pixels: np.ndarray, side: int) -> list[np.ndarray]:
    high, wide = pixels.shape[:2]
    return [pixels[y : y + side, x : x + side] for y in range(0, high, side) for x in range(0, wide, side)]


def _resized(image: Image.Image, width: int, height: int, cfg: PictureConfig) -> np.ndarray:
    return np.asarray(image.resize((width, height), FILTERS[cfg.resample]))
