"""How a parameter is cut over a parallel axis: the record every parameter carries, which cuts and joins.

A fused parameter (q|k|v rows, gate|up rows) is several chunks along one dim; each chunk is cut by itself, so that
rank r holds `[q_r | k_r | v_r]` and a layer works on its own heads without moving a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One parallel axis as seen from this process: how many ranks, which one this is, and their process group."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


SINGLE = Axis()
"""No cutting: one rank holds everything."""


@dataclass(frozen=True)
class Shard:
    """How the whole tensor is cut. `dim=None`: every rank holds all of it.

    `parts` are the sizes, in the whole tensor, of the fused chunks along `dim`; their sum is the whole size.
    """

    dim: int | None = None
    parts: tuple[int, ...] = ()

    def local_shape(self, whole: Sequence[int], size: int) -> tuple[int, ...]:
        """The shape one of `size` ranks holds of a whole tensor of shape `whole`."""
        if self.dim is None:
            return tuple(whole)
        assert sum(self.parts) == whole[self.dim], f"parts {self.parts} do not fill dim {self.dim} of {tuple(whole)}"
        assert all(part % size == 0 for part in self.parts), f"parts {self.parts} do not divide by {size}"
        local = list(whole)
        local[self.dim] //= size
        return tuple(local)

    def whole_shape(self, local: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole tensor, from the shape one rank holds."""
        if self.dim is None:
            return tuple(local)
        shape = list(local)
        shape[self.dim] = sum(self.parts)
        return tuple(shape)

    def slice(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        """Rank `rank`'s part (of `size`) of a whole tensor. A view where one chunk is cut, a copy where several are."""
        if self.dim is None or size == 1:
            return whole
        self.local_shape(whole.shape, size)
        pieces = [part.chunk(size, self.dim)[rank] for part in whole.split(list(self.parts), self.dim)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def merge(self, by_rank: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join the parts of all ranks, in rank order, into the whole tensor; the inverse of `slice`."""
        if self.dim is None or len(by_rank) == 1:
            return by_rank[0]
        local_parts = [part // len(by_rank) for part in self.parts]
        chunks = [local.split(local_parts, self.dim) for local in by_rank]
        return torch.cat([chunk[i] for i in range(len(local_parts)) for chunk in chunks], self.dim)


REPLICATED = Shard()


def set_layout(param: torch.nn.Parameter, shard: Shard, init: str) -> None:
    """Write on a parameter how it is cut (`param.shard`) and how it is drawn (`param.init`, see `models/init.py`)."""
    for key, value in (("shard", shard), ("init", init)):
        setattr(param, key, value)


def shard_of(param: torch.Tensor) -> Shard:
    """The cut recorded on a parameter. A parameter without a record is our mistake."""
    return param.__dict__["shard"]


def init_of(param: torch.Tensor) -> str:
    """The name of the rule a parameter is drawn by."""
    return param.__dict__["init"]
