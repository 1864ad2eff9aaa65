"""Rows of all ranks beside those of this one, of which each rank has any number: for losses that compare samples.

`Shares.gather` is differentiable: what every rank's loss makes of this rank's rows is summed over the ranks on the way
back, so that gradients are those of the sum of all ranks' losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional as F

from parallel.collectives import start_gather_rows, start_scatter_rows
from parallel.sharding import Axis


@dataclass(frozen=True)
class Shares:
    """How many rows each rank of an axis has."""

    axis: Axis
    sizes: tuple[int, ...]

    @staticmethod
    def of(rows: int, axis: Axis, device: torch.device) -> Shares:
        """To be called by all ranks of the axis together, each with its own number of rows."""
        told = torch.tensor([rows], dtype=torch.int64, device=device)
        return Shares(axis, tuple(start_gather_rows(told, axis).wait().tolist()))

    @property
    def first(self) -> int:
        """Where this rank's rows begin among all."""
        return sum(self.sizes[: self.axis.rank])

    @property
    def mine(self) -> int:
        """Rows of this rank."""
        return self.sizes[self.axis.rank]

    @property
    def total(self) -> int:
        """Rows of all ranks."""
        return sum(self.sizes)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows [N, ...] -> those of all ranks [M, ...], in rank order; its gradients are summed."""
        assert len(x) == self.mine, f"{len(x)} rows, and {self.mine} were told"
        return x if self.axis.size == 1 else _Gather.apply(x, self)

    def sum_mine(self, x: torch.Tensor) -> torch.Tensor:
        """The way back: rows of all ranks [M, ...], summed over the ranks, as this rank's own [N, ...]."""
        if self.axis.size == 1:
            return x
        most = max(self.sizes)
        padded = torch.cat([_filled(part, most) for part in x.split(self.sizes)])
        return start_scatter_rows(padded, self.axis).wait()[: self.mine]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shares: Shares) -> torch.Tensor:
        ctx.shares = shares
        most = max(shares.sizes)
        padded = start_gather_rows(_filled(x, most), shares.axis).wait()
        starts = accumulate([most] * (len(shares.sizes) - 1), initial=0)
        return torch.cat([padded[at : at + size] for at, size in zip(starts, shares.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.shares.sum_mine(grad), None


def _filled(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Zero rows at the end until there are so many."""
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x))).contiguous()
