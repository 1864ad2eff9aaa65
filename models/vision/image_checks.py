"""Values of `model.vision.images` that cannot work, as (key, value, reason, way out)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.vision.config import Problem, VisionConfig


def image_problems(cfg: VisionConfig) -> list[Problem]:
    """Those of the pictures; keys within the section `images`. The tower has none of its own."""
    images = cfg.images
    found: list[Problem] = []
    if not images.token:
        found.append(("token", images.token, "no text stands for a picture", "token=<image>"))
    if min(images.std) <= 0:
        found.append(("std", list(images.std), "is divided by, so it must be above 0", "std=[0.5,0.5,0.5]"))
    if images.mode == "tiles":
        found += _bounds("min_tiles", images.min_tiles, images.max_tiles, 12)
    elif images.mode == "native":
        found += _bounds("min_pixels", images.min_pixels, images.max_pixels, 1003520)
        found += _bounds("video_min_pixels", images.video_min_pixels, images.video_max_pixels, 602112)
    elif images.mode == "anyres":
        found += _grid_problems(cfg)
    if images.tokens_per_second is not None and images.tokens_per_second <= 0:
        found.append(("tokens_per_second", images.tokens_per_second, "must be above 0", "tokens_per_second=2"))
    return found + _newline_problems(cfg)


def _bounds(lower: str, least: int, most: int, usual: int) -> list[Problem]:
    upper = lower.replace("min_", "max_")
    if most < 1:
        return [(upper, most, "must be at least 1", f"{upper}={usual}")]
    if not 1 <= least <= most:
        return [(lower, least, f"must be between 1 and {upper}={most}", f"{lower}=1")]
    return []


def _grid_problems(cfg: VisionConfig) -> list[Problem]:
    side = cfg.tower.image_size
    if side is None:
        return []
    some = str([[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]).replace(" ", "")
    if not cfg.images.grids:
        return [("grids", [], "mode=anyres chooses among them", f"grids={some}")]
    wrong = [list(grid) for grid in cfg.images.grids if min(grid) < side or any(length % side for length in grid)]
    if wrong:
        reason = f"{wrong[0]} is not made of whole tiles of vision.tower.image_size={side} pixels"
        return [("grids", [list(grid) for grid in cfg.images.grids], reason, f"grids={some}")]
    return []


def _newline_problems(cfg: VisionConfig) -> list[Problem]:
    """A feature that ends each row, where no row of features is."""
    if not cfg.images.newline:
        return []
    reason = None
    if cfg.images.mode != "anyres":
        reason = f"ends rows of tiles, and mode={cfg.images.mode} has none"
    elif cfg.features_per_tile is not None:
        reason = f"ends rows of patches, and the connector {cfg.connector.name} gives queries"
    elif cfg.tower.has_class and cfg.tower.keep_class:
        reason = "ends rows of patches, and vision.tower.keep_class=true puts a token among them that is in no row"
    return [] if reason is None else [("newline", True, reason, "newline=false")]
