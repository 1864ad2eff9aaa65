"""Attention drawn over the picture that is looked at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from scripts.inspect_texts import Shown

CANVAS = 224
"""Points of the longer side of what is drawn."""
ACROSS = 9


def painted(
    weights_S: np.ndarray, regions_S4: np.ndarray, size: tuple[int, int], canvas: tuple[int, int]
) -> np.ndarray:
    """Weights as densities: each is spread evenly over its region, and regions that overlap (a small whole and the
    tiles of it) add up. What lies outside of the picture, in a border, is lost.

    Args:
        regions_S4: left, top, right, bottom in pixels; not a number where a weight has no place.
        size: width and height of the picture.
        canvas: columns and rows of the result.

    Returns:
        fp64 [rows, columns]; its sum is the weight that lies in the picture.
    """
    placed_S = ~np.isnan(regions_S4[:, 0])
    left, top, right, bottom = regions_S4[placed_S].T
    across = _shares(left, right, size[0], canvas[0])
    down = _shares(top, bottom, size[1], canvas[1])
    return (down * weights_S[placed_S, None]).T @ across


def _shares(begin_S: np.ndarray, end_S: np.ndarray, length: int, cells: int) -> np.ndarray:
    """[S, cells]: the part of each range that lies in each cell of 0 to `length`."""
    edges = np.linspace(0.0, length, cells + 1)
    inside = np.minimum(end_S[:, None], edges[None, 1:]) - np.maximum(begin_S[:, None], edges[None, :-1])
    return np.maximum(inside, 0.0) / (end_S - begin_S)[:, None]


def sheet(shown: Shown, maps: Sequence[tuple[str, np.ndarray, float]]) -> Figure:
    """The picture, and beside it the picture under each map.

    Args:
        maps: name, weights on the spots, and weight on the whole picture.
    """
    image = shown.image
    scale = CANVAS / max(image.size)
    wide, high = (max(round(side * scale), 1) for side in image.size)
    smooth = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    pixels = np.asarray(image.resize((wide, high), smooth), dtype=np.float64) / 255
    across = min(len(maps) + 1, ACROSS)
    down = -(-(len(maps) + 1) // across)
    tall, broad = (1.45 * side / max(wide, high) for side in (high, wide))
    size = (max(broad, 0.9) * across, (tall + 0.22) * down)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False)
    gap = {"wspace": 0.06, "hspace": 0.22 / tall}
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=1 - 0.2 / size[1], **gap)
    places = list(axes.flat)
    for place in places:
        place.axis("off")
    places[0].imshow(pixels)
    places[0].set_title("picture", fontsize=8)
    for place, (name, weights_S, total) in zip(places[1:], maps, strict=False):
        density = painted(weights_S, shown.regions_S4, image.size, (wide, high))
        place.imshow(overlaid(pixels, density))
        place.set_title(f"{name}: {total:.0%}", fontsize=8)
    return figure


def overlaid(pixels: np.ndarray, density: np.ndarray) -> np.ndarray:
    """The picture in dim grey, coloured by how much weight lies where: [rows, columns, 3], from 0 to 1."""
    most = density.max()
    strength = density / most if most > 0 else density
    grey = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None] * 0.75
    colours = colormaps["inferno"](0.85 * strength)[..., :3]
    return (1 - 0.65 * strength[..., None] ** 0.5) * grey + 0.65 * strength[..., None] ** 0.5 * colours
