"""Dropout whose masks do not depend on the layout: what is dropped follows from the seed, the step, the layer, the
token and its place in its document, never from an order in which numbers were drawn.

So every rank, micro-batch and recomputation finds the same mask, without a generator's state to keep. Two documents of
a step that have the same token at the same place share that row's mask.
Source: Srivastava et al. 2014; counters in place of state as in Salmon et al. 2011 (Random123).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from parallel.sharding import Place

LANES, LANE = 4, 16
"""One hash gives so many values of so many bits."""
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""Odd constants of splitmix64 as signed numbers."""


def mixed(value: torch.Tensor) -> torch.Tensor:
    """A hash of each int64 (splitmix64's finalizer); `value` is overwritten."""
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        value ^= (value >> shift) & ((1 << (64 - shift)) - 1)
        if factor is not None:
            value *= factor
    return value


def token_keys(tokens_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """int64 [T]: what tells a token apart in every layout."""
    return mixed((positions_T << 32) + tokens_T)


@dataclass(frozen=True)
class Kept:
    """Which elements of an input stay, bool, and what those are multiplied with."""

    mask: torch.Tensor
    scale: float

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The input after dropout."""
        return x * self.mask * self.scale


def keep_mask(key_R: torch.Tensor, columns: range, share: float) -> torch.Tensor:
    """bool [R, columns]: which elements stay; `share` of them do not, to within 2^-16.

    Args:
        key_R: of each row.
        columns: their numbers in the whole input.
    """
    first, last = columns.start // LANES, -(-columns.stop // LANES)
    hashes = mixed(key_R[:, None] + torch.arange(first, last, device=key_R.device) * _GOLDEN)
    drawn = hashes.view(torch.int16)[:, columns.start - first * LANES :][:, : len(columns)]
    return drawn >= round(share * 2**LANE) - 2 ** (LANE - 1)


class Dropout(nn.Module):
    """The dropout on the input of one layer's adapter.

    Args:
        share: of the elements that are dropped.
        name: of the layer, by which its masks differ from other layers'.
        columns: of the whole input, those that are here.
        own_rows: whether the input has this rank's rows only, where rows are cut over tp.
    """

    def __init__(self, share: float, seed: int, name: str, columns: range, own_rows: bool, place: Place) -> None:
        super().__init__()
        self.share, self.seed, self.name, self.columns = share, seed, name, columns
        self.own_rows, self.place = own_rows, place
        self.step = 0
        """Updates before this one; the engine sets it."""
        self.key_T: torch.Tensor | None = None
        """`token_keys` of the micro-batch; set when its layer is entered, also to be made again."""

    def kept(self, x: torch.Tensor) -> Kept | None:
        """What stays of an input [R, I]; None where all does: outside of training."""
        if not self.training or not torch.is_grad_enabled():
            return None
        assert self.key_T is not None and self.share > 0
        digest = hashlib.sha256(f"{self.seed}:{self.step}:{self.name}".encode()).digest()
        key_R = mixed(self.key_T ^ int.from_bytes(digest[:8], "big", signed=True))
        tp = self.place.tp
        if self.place.splits_rows:
            key_R = torch.cat([key_R, key_R.new_zeros(-len(key_R) % tp.size)])
            key_R = key_R.chunk(tp.size)[tp.rank] if self.own_rows else key_R
        return Kept(keep_mask(key_R, self.columns, self.share), 1 / (1 - self.share))
