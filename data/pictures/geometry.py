"""How a picture of a given size is cut, and which features stand at its tokens: maths on sizes, without pixels.

Sources: Liu et al. 2024 (LLaVA-NeXT, the best of several grids); Chen et al. 2024 (InternVL 1.5, dynamic tiling);
Wang et al. 2024 (Qwen2-VL, native resolution). Roundings are those of transformers' image processors.
"""

from __future__ import annotations

import math

import numpy as np

from data.pictures.errors import PictureError
from data.pictures.types import NEWLINE, PictureConfig, Plan

MAX_RATIO = 200
"""Sides longer than so many times the other are refused, as Qwen2-VL does: one side would be less than a patch, or the
other grow without bound."""


def plan(width: int, height: int, cfg: PictureConfig, frames: int = 1) -> Plan:
    """What becomes of a picture of `width` x `height` pixels, or of a video of so many `frames` of that size.

    Only native mode takes several frames, `cfg.frames` a patch; elsewhere each frame is a picture of its own.

    Raises:
        PictureError: no plan for such a size.
    """
    assert frames == 1 or cfg.mode == "native", "frames are pictures of their own"
    planned = _plan(width, height, cfg, frames)
    return Plan(planned.grids, planned.order_F, (1, 1, 1), True) if cfg.one_token else planned


def _plan(width: int, height: int, cfg: PictureConfig, frames: int) -> Plan:
    """With a token for each feature."""
    grids = tile_grids(width, height, cfg, frames)
    sizes = [features_of(grid, cfg) for grid in grids]
    if cfg.mode == "native":
        rows, cols = grids[0]
        return Plan(grids, np.arange(sum(sizes)), (len(grids), rows // cfg.block, cols // cfg.block))
    if cfg.mode == "anyres" and _is_grid(cfg):
        order_F = _unpadded(width, height, cfg)
    else:
        order_F = np.arange(sum(sizes))
    rows, cols = (side // cfg.block for side in grids[0])
    whole = len(grids) == 1 and _is_grid(cfg)
    return Plan(grids, order_F, (1, rows, cols) if whole else (1, 1, len(order_F)))


def tile_grids(width: int, height: int, cfg: PictureConfig, frames: int = 1) -> tuple[tuple[int, int], ...]:
    """Rows and columns of patches of each tile; in native mode there is one for every `cfg.frames` frames.

    Raises:
        PictureError: no plan for such a size.
    """
    check_size(width, height)
    if cfg.mode == "native":
        wide, high = native_size(width, height, cfg)
        return ((high // cfg.patch, wide // cfg.patch),) * -(-frames // cfg.frames)
    assert cfg.tile is not None
    tiles = 1
    if cfg.mode == "anyres":
        high, wide = best_resolution(width, height, cfg.grids)
        tiles += (high // cfg.tile) * (wide // cfg.tile)
    elif cfg.mode == "tiles":
        cols, rows = best_canvas(width, height, cfg)
        tiles = cols * rows + int(cfg.thumbnail and cols * rows > 1)
    return ((cfg.tile // cfg.patch, cfg.tile // cfg.patch),) * tiles


def check_size(width: int, height: int) -> None:
    """Raises:
    PictureError: an empty picture, or a far too long one.
    """
    if min(width, height) < 1:
        raise PictureError(f"the picture is empty: {width} x {height} pixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise PictureError(f"the picture is too long: {width} x {height} pixels, one side over {MAX_RATIO} x the other")


def features_of(grid: tuple[int, int], cfg: PictureConfig) -> int:
    """Features of a tile of `grid` rows and columns of patches."""
    if cfg.per_tile is not None:
        return cfg.per_tile
    return grid[0] * grid[1] // cfg.block**2 + cfg.extra


def native_size(width: int, height: int, cfg: PictureConfig) -> tuple[int, int]:
    """Width and height nearest to the picture's own that are whole blocks of patches, between min_pixels and max_pixels
    in all."""
    factor = cfg.patch * cfg.block
    wide, high = (round(side / factor) * factor for side in (width, height))
    if wide * high > cfg.max_pixels:
        shrink = math.sqrt(height * width / cfg.max_pixels)
        wide, high = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
    elif wide * high < cfg.min_pixels:
        grow = math.sqrt(cfg.min_pixels / (height * width))
        wide, high = (math.ceil(side * grow / factor) * factor for side in (width, height))
    return wide, high


def best_resolution(width: int, height: int, grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Of (height, width) pairs the one in which most of its pixels survive, then that with the least border."""
    best, most, least = None, 0, math.inf
    for high, wide in grids:
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        if kept > most or (kept == most and high * wide - kept < least):
            best, most, least = (high, wide), kept, high * wide - kept
    assert best is not None, "no grids to choose from"
    return best


def fitted(width: int, height: int, wide: int, high: int) -> tuple[int, int]:
    """Width and height of a picture that is scaled in proportion to lie in `wide` x `high`."""
    across, down = wide / width, high / height
    if across < down:
        return wide, min(math.ceil(height * across), high)
    return min(math.ceil(width * down), wide), high


def best_canvas(width: int, height: int, cfg: PictureConfig) -> tuple[int, int]:
    """Columns and rows of tiles whose aspect ratio is nearest to the picture's; of equals the largest whose area is
    less than twice the picture's."""
    assert cfg.tile is not None
    most = cfg.max_tiles
    canvases = [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1) if c * r >= cfg.min_tiles]
    best, nearest = (1, 1), math.inf
    for cols, rows in sorted(canvases, key=lambda canvas: canvas[0] * canvas[1]):
        distance = abs(width / height - cols / rows)
        if distance < nearest:
            best, nearest = (cols, rows), distance
        elif distance == nearest and width * height > 0.5 * cfg.tile**2 * cols * rows:
            best = (cols, rows)
    return best


def _is_grid(cfg: PictureConfig) -> bool:
    """Whether the features of a tile are blocks of its patches, row by row, and nothing else."""
    return cfg.per_tile is None and cfg.extra == 0


def _unpadded(width: int, height: int, cfg: PictureConfig) -> np.ndarray:
    """anyres: the small whole, then all tiles as one grid, row by row, without the border that fills them up."""
    assert cfg.tile is not None
    high, wide = best_resolution(width, height, cfg.grids)
    down, across, side = high // cfg.tile, wide // cfg.tile, cfg.tile // cfg.patch // cfg.block
    area = side * side
    tiles = area + np.arange(down * across * area).reshape(down, across, side, side)
    grid = tiles.transpose(0, 2, 1, 3).reshape(down * side, across * side)
    rows, cols = grid.shape
    if width / height > cols / rows:
        border = (rows - int(round(height * (cols / width), 7))) // 2
        grid = grid[border : rows - border]
    else:
        border = (cols - int(round(width * (rows / height), 7))) // 2
        grid = grid[:, border : cols - border]
    if cfg.newline:
        grid = np.concatenate([grid, np.full((len(grid), 1), NEWLINE)], axis=1)
    return np.concatenate([np.arange(area), grid.reshape(-1)])
