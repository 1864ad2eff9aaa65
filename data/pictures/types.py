"""The types of pictures that cross between rooms.

Legend: P patches, X numbers of a patch, F tokens that a feature stands for, T tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch

NEWLINE = -1
"""In `order`: the learnt feature that ends a row."""


@dataclass(frozen=True)
class PictureConfig:
    """What has to be known of a model to prepare pictures for it; made from `model.vision` by the trainer. The fields
    that are not told here mean what they mean there."""

    mode: Literal["fixed", "anyres", "tiles", "native"]
    fit: Literal["crop", "squash", "pad"]
    tile: int | None
    """Pixels of a tile's side; None in native mode."""
    patch: int
    """Pixels of a patch's side."""
    frames: int
    """Pictures of one patch."""
    block: int
    """Side of the blocks of patches that become one feature. In native mode the patches of a block are neighbours."""
    per_tile: int | None
    """Features of a tile, where its size does not matter."""
    extra: int
    """Features of a tile besides those of its patches (a class token that is kept)."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["bilinear", "bicubic", "lanczos", "nearest"]
    grids: tuple[tuple[int, int], ...]
    newline: bool
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    min_pixels: int
    max_pixels: int
    token: str
    begin: str
    end: str
    rotary: bool
    """Positions are three numbers a token: time, row and column (M-RoPE)."""
    one_token: bool = False
    """One token stands for all features of a picture."""
    patch_cost: float = field(default=0.0, repr=False, compare=False)
    """Work of a patch, in tokens of the decoder: what pictures weigh when rows are dealt out, no result."""
    video_token: str = ""
    video_min_pixels: int = 100352
    video_max_pixels: int = 602112
    tokens_per_second: int | None = None
    video_frames: int = 8
    """Frames of a video at most (`data.video_frames`)."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Texts of the tokens that stand for a feature: of pictures, and of videos where theirs is another."""
        return tuple(dict.fromkeys((self.token, self.video_token or self.token)))

    @cached_property
    def of_video(self) -> PictureConfig:
        """What a video's frames are prepared by: several together in native mode, elsewhere as pictures of one tile."""
        if self.mode == "native":
            limits = {"min_pixels": self.video_min_pixels, "max_pixels": self.video_max_pixels}
            return replace(self, token=self.video_token or self.token, **limits)
        if self.mode == "anyres":
            return replace(self, mode="fixed", fit="squash", newline=False)
        return replace(self, min_tiles=1, max_tiles=1)

    @property
    def placeless(self) -> bool:
        """No token stands for a picture: it is compared with the text, not read within it."""
        return self.per_tile == 0


@dataclass(frozen=True)
class Plan:
    """What becomes of a picture of a given size. Depends on nothing else, so tokens are counted without its pixels."""

    grids: tuple[tuple[int, int], ...]
    """Rows and columns of patches of each tile."""
    order_F: np.ndarray
    """int64 [F]: which of the picture's features, counted over its tiles, stands at each of its tokens; or NEWLINE."""
    shape: tuple[int, int, int]
    """Time, rows and columns of the tokens, where they are a grid (native mode)."""
    one_token: bool = False
    """See `PictureConfig`."""

    @property
    def tokens(self) -> int:
        """Tokens that stand for the picture, without `begin` and `end`."""
        return 1 if self.one_token else len(self.order_F)

    @property
    def slots_F(self) -> np.ndarray:
        """int64 [F]: of each feature the token that stands for it, counted from the picture's first."""
        return np.zeros_like(self.order_F) if self.one_token else np.arange(len(self.order_F))


@dataclass(frozen=True)
class Pictures:
    """The pictures of a micro-batch."""

    patches_PX: torch.Tensor
    """fp32 [P, X], X = colours x frames x patch x patch, normalised; tiles one after another, row by row (native mode:
    block by block)."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of patches of each tile; on the host."""
    slots_F: torch.Tensor
    """int64 [F]: the tokens of the micro-batch that stand for a feature, ascending; with `PictureConfig.one_token` the
    same for all of a picture."""
    order_F: torch.Tensor
    """int64 [F]: which feature stands there, counted over all tiles; or NEWLINE."""

    def to(self, device: torch.device) -> Pictures:
        """The same with its tensors on `device`."""
        tensors = (x.to(device, non_blocking=True) for x in (self.patches_PX, self.slots_F, self.order_F))
        patches_PX, slots_F, order_F = tensors
        return Pictures(patches_PX, self.grids, slots_F, order_F)

    @staticmethod
    def join(parts: Sequence[Pictures], starts: Sequence[int], features: Sequence[int]) -> Pictures:
        """Those of several documents as one.

        Args:
            parts: of each document.
            starts: where each document begins among the tokens.
            features: how many features the tiles of each have.
        """
        first = np.concatenate([[0], np.cumsum(features)])
        order = [
            torch.where(p.order_F < 0, p.order_F, p.order_F + int(at)) for p, at in zip(parts, first, strict=False)
        ]
        return Pictures(
            torch.cat([part.patches_PX for part in parts]),
            tuple(grid for part in parts for grid in part.grids),
            torch.cat([part.slots_F + start for part, start in zip(parts, starts, strict=True)]),
            torch.cat(order),
        )
