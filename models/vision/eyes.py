"""What a decoder sees with: tower and connector, and how features come to stand among the tokens, or to be read by
layers of their own (`models.vision.gated`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from models.vision.config import VisionConfig
from models.vision.connectors import build_connector
from models.vision.gated import Reading, Runs, gated_layers
from models.vision.tower import Tower, build_tower
from parallel.collectives import copy_to
from parallel.layers import parameter
from parallel.sharding import REPLICATED, Place


class Pictures(Protocol):
    """The pictures of a micro-batch."""

    @property
    def patches_PX(self) -> torch.Tensor:
        """fp32 [P, X], normalised, tiles one after another."""
        ...

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of patches of each tile."""
        ...

    @property
    def slots_F(self) -> torch.Tensor:
        """int64 [F]: tokens that stand for a feature; where features are read by layers of their own, one for all of
        a picture."""
        ...

    @property
    def order_F(self) -> torch.Tensor:
        """int64 [F]: which feature stands there; -1 is the learnt one that ends a row."""
        ...


class Connection(nn.Module):
    """The connector, and behind its features the one that ends a row, where there is one: [B S, D'] -> [I (+ 1), D].

    It holds the layers that read features, too, for they are trained with it; the decoder runs them.
    """

    def __init__(self, cfg: VisionConfig, width: int, place: Place, recompute: bool, layers: int = 0) -> None:
        super().__init__()
        plain = Place(tp=place.tp)
        self.body = build_connector(cfg, width, plain, recompute)
        self.newline = parameter((width,), REPLICATED, "normal", plain) if cfg.images.newline else None
        self.gated = gated_layers(cfg.cross, width, layers, place)

    def forward(self, features: torch.Tensor, grids: tuple[tuple[int, int], ...]) -> torch.Tensor:
        x = self.body(features, grids)
        return x if self.newline is None else torch.cat([x, self.newline.to(x.dtype)[None]])


def build_eyes(
    cfg: VisionConfig, width: int, place: Place, recompute: bool, layers: int = 0
) -> tuple[Tower, Connection]:
    """Tower and connector for a decoder of hidden size `width` with so many `layers`. Both see all pictures on every tp
    rank."""
    tower = build_tower(cfg.tower, cfg.connector.block, Place(tp=place.tp), recompute)
    return tower, Connection(cfg, width, place, recompute, layers)


def look(
    like: torch.Tensor, tower: nn.Module, connector: nn.Module, pictures: Pictures | None, cfg: VisionConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All features [I (+ 1), D], on the device of `like`; the tokens that stand for some and which, int64 [F] each.

    A micro-batch without a picture looks at one blank patch block and uses nothing of what comes out: every rank runs
    the same modules whatever its data (ZeRO-3 gathers them in step), and gradients are there and zero.
    """
    if pictures is None:
        side, numbers = cfg.connector.block, 3 * cfg.tower.frames * cfg.tower.patch_size**2
        patches_PX, grids = like.new_zeros(side * side, numbers, dtype=torch.float32), ((side, side),)
        slots_F = order_F = torch.zeros(0, dtype=torch.int64, device=like.device)
    else:
        patches_PX, grids, slots_F, order_F = pictures.patches_PX, pictures.grids, pictures.slots_F, pictures.order_F
    features_ID = connector(tower(patches_PX, grids), grids)
    return features_ID, slots_F, torch.where(order_F < 0, features_ID.shape[0] - 1, order_F)


def read(
    like: torch.Tensor, tower: nn.Module, connector: nn.Module, pictures: Pictures | None, cfg: VisionConfig,
    borders: Sequence[int],
) -> Reading:  # fmt: skip
    """What the tokens of documents with these borders read of their pictures."""
    runs = Runs.of([] if pictures is None else pictures.slots_F.tolist(), borders)
    features_ID, _, order_F = look(like, tower, connector, pictures, cfg)
    return Reading(features_ID if pictures is None else features_ID.index_select(0, order_F), runs)


def see(hidden_RD: torch.Tensor, tower: nn.Module, connector: nn.Module, pictures: Pictures | None, cfg: VisionConfig,
        place: Place) -> torch.Tensor:  # fmt: skip
    """The embedded tokens with features in the places that stand for them."""
    features_ID, slots_F, order_F = look(hidden_RD, tower, connector, pictures, cfg)
    if place.splits_rows:  # each tp rank goes on with those of its own rows
        features_ID = copy_to(features_ID, place.tp)
        rows = hidden_RD.shape[0]
        mine_F = slots_F // rows == place.tp.rank
        slots_F, order_F = slots_F[mine_F] - place.tp.rank * rows, order_F[mine_F]
    return hidden_RD.index_copy(0, slots_F, features_ID.index_select(0, order_F).to(hidden_RD.dtype))
