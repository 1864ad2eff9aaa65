"""Gradients between their reduction and the update: what the layout still owes them, and their one global norm.

DeepSpeed has averaged the gradients over the ranks with different tokens, and with ZeRO each rank holds pieces of them.
Here the parts that tp ranks hold of a replicated parameter's gradient are summed, and the norm is taken so that every
element of the whole model counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import nn

from parallel.groups import Groups
from parallel.sharding import Axis, is_partial, shard_of


@dataclass(frozen=True)
class GradientPiece:
    """A flat range of one parameter's gradient, as a view that the update will read."""

    param: nn.Parameter
    start: int
    grad: torch.Tensor


def shared_ranges(param: nn.Parameter, tp: Axis) -> list[tuple[int, int, int, int]]:
    """Ranges of a flattened parameter that lie on several, not all, tp ranks (key/value heads fewer than ranks).

    Returns:
        (start, stop, copies, unit): elements, on how many ranks they lie, and the number of the head they belong to.
    """
    shard = shard_of(param)
    if not shard.units or shard.dim != 0:
        return []
    shape = local_shape(param)
    row = torch.Size(shape[1:]).numel()
    stops = list(accumulate(shard.local_parts(tp.size)))
    found = []
    for i, stop in enumerate(stops):
        copies = shard.copies(i, tp.size)
        if copies > 1:
            start = stops[i - 1] if i else 0
            found.append((start * row, stop * row, copies, tp.rank // copies))
    return found


def local_shape(param: nn.Parameter) -> tuple[int, ...]:
    """The shape of this rank's part of a parameter, also where ZeRO-3 holds only a slice of it."""
    return tuple(getattr(param, "ds_shape", param.shape))


def _overlap(piece: GradientPiece, start: int, stop: int) -> torch.Tensor:
    low, high = max(piece.start, start), min(piece.start + piece.grad.numel(), stop)
    return piece.grad[low - piece.start : max(high, low) - piece.start]


def sum_over_tp(pieces: Sequence[GradientPiece], tp: Axis) -> None:
    """Sum, in one message, what each tp rank has of the gradients of parameters that several of them hold.

    All tp ranks of a data-parallel place hold the same ranges of the same parameters, so their messages match. Heads
    that lie on some of the ranks go into the place of their number in a message that all ranks sum.
    """
    if tp.size == 1:
        return
    parts: list[tuple[torch.Tensor, int, int]] = []  # view, slots, own slot
    for piece in pieces:
        if is_partial(piece.param):
            parts.append((piece.grad, 1, 0))
        for start, stop, copies, unit in shared_ranges(piece.param, tp):
            parts.append((_overlap(piece, start, stop), tp.size // copies, unit))
    total = sum(view.numel() * slots for view, slots, _ in parts)
    if not total:
        return
    message = parts[0][0].new_zeros(total)
    places = []
    at = 0
    for view, slots, own in parts:
        places.append(message.narrow(0, at + own * view.numel(), view.numel()))
        places[-1].copy_(view)
        at += view.numel() * slots
    dist.all_reduce(message, group=tp.group)
    for (view, _, _), place in zip(parts, places, strict=True):
        view.copy_(place)


def _counted(piece: GradientPiece, tp: Axis) -> Iterator[tuple[torch.Tensor, float]]:
    """Views of a piece with the share of each that this rank counts, so that all tp ranks together count it once."""
    if shard_of(piece.param).dim is None:
        yield piece.grad, 1.0 / tp.size
        return
    at, end = piece.start, piece.start + piece.grad.numel()
    for start, stop, copies, _ in shared_ranges(piece.param, tp):
        if at < min(start, end):
            yield _overlap(piece, at, start), 1.0
        shared = _overlap(piece, start, stop)
        if shared.numel():
            yield shared, 1.0 / copies
        at = max(at, stop)
    if at < end:
        yield _overlap(piece, at, end), 1.0


def global_norm(
    pieces: Sequence[GradientPiece], groups: Groups, holders: Callable[[nn.Parameter], int]
) -> torch.Tensor:
    """The 2-norm of the whole model's gradient, fp32 scalar, the same bits on every rank.

    Args:
        pieces: this rank's.
        holders: how many data-parallel ranks hold the same pieces of a parameter; 0 leaves the parameter out.
    """
    views, shares = [], []
    for piece in pieces:
        copies = holders(piece.param)
        if copies:
            for view, share in _counted(piece, groups.tp):
                views.append(view)
                shares.append(share / copies)
    total = torch.zeros((), dtype=torch.float64, device=groups.device)
    if views:
        norms = torch.stack(torch._foreach_norm(views)).double()
        total = (norms.square() * torch.tensor(shares, dtype=torch.float64, device=groups.device)).sum()
    if groups.world > 1:
        dist.all_reduce(total)
    return total.sqrt().float()
