"""Where in the picture the patches of its tiles, and the features made of them, lie: maths on sizes, without pixels.

A region is (left, top, right, bottom) in pixels of the whole picture. What a crop cuts off has none; what a border adds
lies outside of the picture. Legend: S spots, what a weight can lie on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.pictures.geometry import best_canvas, best_resolution, fitted
from data.pictures.types import PictureConfig, Plan


@dataclass(frozen=True)
class Window:
    """The part of a picture that a tile shows: pixel (u, v) of the tile is (left + u across, top + v down) there."""

    left: float
    top: float
    across: float
    down: float


def spot_regions(width: int, height: int, planned: Plan, cfg: PictureConfig) -> np.ndarray:
    """Of every feature of a picture's tiles; where features have no place (learnt queries have read the tiles), of
    every patch instead, row by row. Tile after tile.

    Returns:
        fp64 [S, 4]; not a number for a class token, which has no place.
    """
    block, extra = (cfg.block, cfg.extra) if cfg.per_tile is None else (1, 0)
    parts = []
    for window, (rows, cols) in zip(windows(width, height, planned, cfg), planned.grids, strict=True):
        parts += [np.full((extra, 4), np.nan), _boxes(window, rows // block, cols // block, cfg.patch * block)]
    return np.concatenate(parts)


def windows(width: int, height: int, planned: Plan, cfg: PictureConfig) -> list[Window]:
    """What each tile shows of a picture of `width` x `height` pixels."""
    if cfg.mode == "native":
        rows, cols = planned.grids[0]
        return [_squashed(width, height, cols * cfg.patch, rows * cfg.patch)] * len(planned.grids)
    assert cfg.tile is not None
    side = cfg.tile
    if cfg.mode == "fixed":
        return [_fixed(width, height, side, cfg.fit)]
    whole = _squashed(width, height, side, side)
    if cfg.mode == "tiles":
        cols, rows = best_canvas(width, height, cfg)
        tiles = _cut(_squashed(width, height, cols * side, rows * side), rows, cols, side)
        return [*tiles, whole] if cfg.thumbnail and len(tiles) > 1 else tiles
    high, wide = best_resolution(width, height, cfg.grids)
    inner_wide, inner_high = fitted(width, height, wide, high)
    inner = _squashed(width, height, inner_wide, inner_high)
    canvas = _moved(inner, -((wide - inner_wide) // 2), -((high - inner_high) // 2))
    return [whole, *_cut(canvas, high // side, wide // side, side)]


def _fixed(width: int, height: int, side: int, fit: str) -> Window:
    if fit == "squash":
        return _squashed(width, height, side, side)
    if fit == "pad":
        longer = max(width, height)
        square = _squashed(longer, longer, side, side)
        return Window(-((longer - width) // 2), -((longer - height) // 2), square.across, square.down)
    wide, high = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    return _moved(_squashed(width, height, wide, high), (wide - side) // 2, (high - side) // 2)


def _squashed(width: int, height: int, wide: int, high: int) -> Window:
    """All of the picture in `wide` x `high` pixels."""
    return Window(0.0, 0.0, width / wide, height / high)


def _moved(window: Window, right: int, down: int) -> Window:
    """The window without so many of its own pixels at the left and the top."""
    return Window(window.left + right * window.across, window.top + down * window.down, window.across, window.down)


def _cut(canvas: Window, rows: int, cols: int, side: int) -> list[Window]:
    return [_moved(canvas, col * side, row * side) for row in range(rows) for col in range(cols)]


def _boxes(window: Window, rows: int, cols: int, side: int) -> np.ndarray:
    """[rows cols, 4]: regions of squares of `side` pixels of a tile, row by row."""
    row, col = np.indices((rows, cols)).reshape(2, -1) * side
    left, top = window.left + col * window.across, window.top + row * window.down
    return np.stack([left, top, left + side * window.across, top + side * window.down], axis=1)
