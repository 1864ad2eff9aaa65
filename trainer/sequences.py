"""Sums over whole documents, of which a rank may have a part of the tokens only (context parallel)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from data.batch import MicroBatch
from parallel.sharding import Axis


class _SumOverRanks(torch.autograd.Function):
    """Every rank goes on with the same sum and computes the same loss from it, so the gradient of that loss is also
    the gradient of what this rank put in: nothing is to be summed on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total, group=axis.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def sum_over(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`x` summed over the ranks that share documents, the same on each; see `document_sums` for its gradient."""
    return _SumOverRanks.apply(x, axis) if axis.size > 1 else x


def document_sums(x_T: torch.Tensor, batch: MicroBatch, cp: Axis) -> torch.Tensor:
    """The sum of each document's tokens, all of them, also those of other cp ranks: [T] -> [N] on every cp rank.

    Differentiable. All cp ranks compute the same from the sums, and each sends the whole gradient to its own tokens: a
    loss made of the sums is right as it is, while what is counted of it must be counted on one rank.
    """
    sums_N = x_T.new_zeros(len(batch.doc_channel_N)).index_add(0, batch.doc_T, x_T)
    return sum_over(sums_N, cp)
