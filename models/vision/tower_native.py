"""Vision transformers whose tiles have any size, and queries and keys that turn by their places: Qwen2-VL, Qwen2.5-VL.

Patches of a merged feature are neighbours (block order), here and in what comes out. Where layers see windows, the
patches are put in window order before the first layer and back behind the last: a window is then a range of rows, and
so is a whole tile, whose own order nobody sees, because places come by turning.

Sources: Wang et al. 2024 (Qwen2-VL); Bai et al. 2025 (Qwen2.5-VL); Su et al. 2021 (RoFormer).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from models.blocks.pieces import pieces_of
from models.vision.config import TowerConfig
from models.vision.tower_layers import Seen, make_layers, run_layers
from parallel.layers import parameter
from parallel.matmul import linear
from parallel.sharding import REPLICATED, Place

THETA = 10000.0


class _Permuted(torch.autograd.Function):
    """Rows in another order; the gradient is gathered too, where torch would add it up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order_P: torch.Tensor, back_P: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back_P)
        return x.index_select(0, order_P)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back_P,) = ctx.saved_tensors
        return grad.index_select(0, back_P), None, None


@dataclass(frozen=True)
class Tile:
    """The patches of a tile in block order: where they stand, and how windows would have them."""

    places_P2: torch.Tensor
    """int64 [P, 2]: row and column of each patch."""
    order_P: torch.Tensor
    """int64 [P]: the patches window by window, equally large ones together."""
    windows: tuple[int, ...]
    """Patches of each window, in that order."""


@lru_cache(maxsize=4096)
def tile_of(rows: int, columns: int, block: int, window: int | None) -> Tile:
    """The plan of a tile of rows x columns patches.

    Args:
        block: side of the blocks whose patches are neighbours.
        window: side of a window in blocks; those at the lower and right border may be smaller. None: one window.
    """
    assert rows % block == 0 and columns % block == 0, f"{rows} x {columns} patches in blocks of {block}"
    high, wide = rows // block, columns // block
    here = torch.device("cpu")
    places = torch.cartesian_prod(torch.arange(rows, device=here), torch.arange(columns, device=here))
    places_P2 = places.view(high, block, wide, block, 2).transpose(1, 2).reshape(-1, 2)
    if window is None:
        return Tile(places_P2, torch.arange(rows * columns, device=here), (rows * columns,))
    in_P = (places_P2 // (block * window) * torch.tensor([-(-wide // window), 1], device=here)).sum(1)
    sizes = in_P.bincount()
    by_size = sizes.argsort(descending=True, stable=True)
    rank_of = torch.empty_like(by_size)
    rank_of[by_size] = torch.arange(len(by_size), device=here)
    return Tile(places_P2, rank_of[in_P].argsort(stable=True), tuple(sizes[by_size].tolist()))


@dataclass(frozen=True)
class Plan:
    """How the tiles of a forward are run."""

    order_P: torch.Tensor | None
    """int64 [P]: patches as the layers have them, where that is not the order they come in."""
    whole: Seen
    """Patches see their tile."""
    windows: Seen
    """Patches see their window."""


class NativeTower(nn.Module):
    """Patches of tiles of any size in, features out, both in block order."""

    def __init__(self, cfg: TowerConfig, block: int, place: Place, recompute: bool = False) -> None:
        super().__init__()
        self.cfg, self.block, self.recompute = cfg, block, recompute
        side = cfg.patch_size
        self.window = None if cfg.window_size is None else cfg.window_size // (side * block)
        self.patch = parameter((cfg.hidden_size, 3, cfg.frames, side, side), REPLICATED, "normal", place)
        self.layers = make_layers(cfg, place)

    def forward(self, patches_PX: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Features of all tiles, tile after tile.

        Args:
            patches_PX: fp32 [P, X], in block order.
            grids: rows and columns of each tile (of a video, each `frames` frames are a tile).

        Returns:
            [P, D]
        """
        plan = self._plan(grids, patches_PX.device)
        if plan.order_P is not None:
            patches_PX = patches_PX.index_select(0, plan.order_P)
        x = linear(patches_PX, self.patch.flatten(1))
        runs = range(self.cfg.runs)
        full = runs if self.window is None else self.cfg.full_layers
        x = run_layers(self.layers, x, [plan.whole if i in full else plan.windows for i in runs], self.recompute)
        if plan.order_P is None:
            return x
        back_P = torch.empty_like(plan.order_P)
        back_P[plan.order_P] = torch.arange(len(back_P), device=back_P.device)
        return _Permuted.apply(x, back_P, plan.order_P)

    def _plan(self, grids: tuple[tuple[int, int], ...], device: torch.device) -> Plan:
        tiles = [tile_of(*grid, self.block, self.window) for grid in grids]
        lengths = [len(tile.order_P) for tile in tiles]
        places_P2 = torch.cat([tile.places_P2 for tile in tiles])
        sequence = list(range(len(tiles)))
        order_P = None
        if self.window is not None:
            sequence.sort(key=lambda i: -lengths[i])  # equally large tiles share a kernel call
            starts = [0, *accumulate(lengths)]
            order_P = torch.cat([tiles[i].order_P + starts[i] for i in sequence])
            places_P2 = places_P2[order_P]
            order_P = order_P.to(device, non_blocking=True)
        turned = self._turns(places_P2, device)
        whole, windows = (
            Seen(pieces_of([0, *accumulate(each)], None, device), *turned)
            for each in ([lengths[i] for i in sequence], [n for i in sequence for n in tiles[i].windows])
        )
        return Plan(order_P, whole, windows)

    def _turns(self, places_P2: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each patch, fp32 [P, K / 2]: a quarter of a head's pairs by row, a quarter by column."""
        half = self.cfg.head_dim // 2
        frequency = 1.0 / THETA ** (torch.arange(0, half, 2, device="cpu", dtype=torch.float32) / half)
        angles = torch.arange(int(places_P2.max()) + 1, device="cpu", dtype=torch.float32)[:, None] * frequency
        cos, sin = (table[places_P2].flatten(1).to(device, non_blocking=True) for table in (angles.cos(), angles.sin()))
        return cos, sin
