"""Floating-point operations of towers and connectors; what a step needs of them is said in `models/flops.py`.

Legend: tokens of a tile are its patches, and a class token where there is one; its features what the tower gives of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.vision.config import (
    MergerConfig,
    PerceiverConfig,
    PooledConfig,
    ProjectorConfig,
    QFormerConfig,
    ResamplerConfig,
    ShuffleConfig,
    TowerConfig,
    VisionConfig,
)
from models.vision.tower_native import tile_of

Grids = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Work:
    """The products of a module's forward, in FLOPs."""

    weights: float
    """With weights."""
    attention: float = 0.0
    """Of queries with keys, and of what comes out with values."""
    raw: float = 0.0
    """The share of `weights` in products with the module's input as it comes in, not through a norm of the module: the
    gradient of that input is needed by what lies below alone."""
    trained: bool = True


def vision_work(cfg: VisionConfig, width: int, grids: Grids, trains: Callable[[str], bool]) -> list[Work]:
    """What tower and connector compute on tiles, in the order of the forward.

    Args:
        width: hidden size of the decoder.
        grids: rows and columns of patches of each tile.
        trains: whether the parameters whose names begin so are trained.
    """
    if not grids:
        return []
    works = _tower(cfg.tower, cfg.connector.block, grids, trains)
    tiles, extra = len(grids), int(cfg.tower.has_class and cfg.tower.keep_class)
    features = sum(rows * cols for rows, cols in grids) + extra * tiles
    connector = _connector(cfg, width, tiles, features)
    return [*works, Work(*connector, trained=trains("connector."))]


def gated_work(cfg: VisionConfig, width: int, tokens: int, grids: Grids) -> Work | None:
    """What one of the layers that read features computes for so many tokens; None where there are none.

    Each token is taken to read a tile's features: how many pictures the tiles are, and where, is not known here.
    """
    cross = cfg.cross
    if cross is None:
        return None
    inner, tiles = cross.num_heads * cross.head_dim, len(grids)
    features = tiles * (cfg.features_per_tile or 0)
    if cfg.features_per_tile is None:
        extra = int(cfg.tower.has_class and cfg.tower.keep_class) * tiles
        features = sum(rows * cols for rows, cols in grids) // cfg.connector.block**2 + extra
    weights = 4.0 * width * (tokens * (inner + cross.intermediate_size) + features * inner)
    return Work(weights, 4.0 * inner * tokens * features / max(tiles, 1))


def _tower(cfg: TowerConfig, block: int, grids: Grids, trains: Callable[[str], bool]) -> list[Work]:
    dim = cfg.hidden_size
    patches = sum(rows * cols for rows, cols in grids)
    first = 2.0 * patches * 3 * cfg.frames * cfg.patch_size**2 * dim
    tokens = [rows * cols + int(cfg.has_class) for rows, cols in grids]
    feed_forward = (3 if cfg.kind == "qwen2_5_vl" else 2) * dim * cfg.intermediate_size
    weights = 2.0 * sum(tokens) * (4 * dim * dim + feed_forward)
    whole = in_windows = 4.0 * dim * sum(length * length for length in tokens)
    if cfg.window_size is not None:
        side = cfg.window_size // (cfg.patch_size * block)
        windows = [length for grid in grids for length in tile_of(*grid, block, side).windows]
        in_windows = 4.0 * dim * sum(length * length for length in windows)
    works = [Work(first, raw=first, trained=trains("vision.patch"))]
    for layer in range(cfg.runs):
        full = cfg.window_size is None or layer in cfg.full_layers
        works.append(Work(weights, whole if full else in_windows, trained=trains(f"vision.layers.{layer}.")))
    return works


def _connector(cfg: VisionConfig, width: int, tiles: int, features: int) -> tuple[float, float, float]:
    """Products with weights, of attention, and those with the features as they come in, of `features` in `tiles`."""
    own, dim = cfg.connector, cfg.tower.hidden_size
    if isinstance(own, ProjectorConfig):
        first = 2.0 * features * dim * width
        return first + (2.0 * features * width**2 if own.name == "mlp" else 0.0), 0.0, first
    if isinstance(own, ShuffleConfig | MergerConfig):
        blocks, together = features / own.block**2, dim * own.block**2
        inner = width if isinstance(own, ShuffleConfig) else together
        return 2.0 * blocks * (together * inner + inner * width), 0.0, 0.0
    if isinstance(own, QFormerConfig):
        return _qformer(own, dim, width, tiles, features)
    if isinstance(own, PerceiverConfig):
        queries = tiles * own.queries
        inner, keys = own.num_heads * own.head_dim, features + queries
        layer = 2.0 * dim * (2 * inner * (queries + keys) + 2 * own.ffn_ratio * dim * queries)
        return (
            own.num_layers * layer + 2.0 * queries * dim * width,
            4.0 * own.num_layers * own.queries * keys * inner,
            0.0,
        )
    if isinstance(own, PooledConfig):
        return _pooled(cfg.tower, own.width, tiles, features)
    assert isinstance(own, ResamplerConfig)
    queries = tiles * own.queries
    first = 2.0 * features * dim * width
    square = own.queries + 2 * features + 2 * queries  # learnt queries are projected once for all tiles
    return first + 2.0 * square * width**2, 4.0 * own.queries * features * width, first


def _pooled(tower: TowerConfig, width: int, tiles: int, features: int) -> tuple[float, float, float]:
    """A class token through a linear layer; else one query a tile, and a feed-forward of what it reads."""
    dim = tower.hidden_size
    if tower.has_class:
        return 2.0 * tiles * dim * width, 0.0, 0.0
    each = 2.0 * dim * (2 * dim + 2 * tower.intermediate_size)
    return 4.0 * features * dim**2 + tiles * each, 4.0 * features * dim, 0.0


def _qformer(cfg: QFormerConfig, dim: int, width: int, tiles: int, features: int) -> tuple[float, float, float]:
    inner, queries = cfg.hidden_size, tiles * cfg.queries
    reading = -(-cfg.num_layers // cfg.cross_every)
    layer = 2.0 * queries * inner * (4 * inner + 2 * cfg.intermediate_size)
    keys = 2.0 * features * dim * 2 * inner
    cross = 2.0 * queries * 2 * inner**2 + keys
    pairs = cfg.num_layers * tiles * cfg.queries**2 + reading * cfg.queries * features
    weights = cfg.num_layers * layer + reading * cross + 2.0 * queries * inner * width
    return weights, 4.0 * inner * pairs, reading * keys
