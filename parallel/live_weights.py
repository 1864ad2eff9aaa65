"""The weights of a model while it is trained, as the flat ranges that each rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from parallel.engine import Engine
from parallel.nf4 import Nf4, four_bits
from parallel.sharding import REPLICATED, WHOLE, Cut, is_idle, shard_of
from parallel.state import is_tied_copy


@dataclass(frozen=True)
class LivePiece:
    """A range of one parameter's (or buffer's) local part. ``start`` counts elements of the flattened part, which is
    what the parameter's `shard` gives at `cut`."""

    name: str
    cut: Cut
    start: int
    held: torch.Tensor | Nf4
    """A 1-D view that follows the training, or what is kept in 4 bits."""

    @property
    def values(self) -> torch.Tensor:
        """The elements, 1-D; of a weight in 4 bits made anew."""
        return self.held.dense(torch.float32).view(-1) if isinstance(self.held, Nf4) else self.held


def live_pieces(engine: Engine, column: bool) -> Iterator[LivePiece]:
    """The pieces that this rank gives, so that every element of the model comes once.

    Key/value heads that lie on several tp ranks come from each of them.

    Args:
        column: once of the ranks of every `groups.model` (which together hold the whole model unless ZeRO-3 or expert
            parallel deals it out further); else once of all ranks.
    """
    groups, zero3 = engine.groups, engine.cfg.zero == 3
    for name, param in engine.named_parameters():
        shard = shard_of(param)
        if is_tied_copy(param) or is_idle(param) or (shard.dim is None and groups.tp.rank > 0):
            continue
        cut = shard.own(groups.place().cut)
        if zero3:
            partition: Any = vars(param)["ds_tensor"]
            share, whole = partition.ds_numel, vars(param)["ds_numel"]
            start = groups.data.rank * share
            if start < whole:  # the last rank's share ends in padding
                yield LivePiece(name, cut, start, partition.detach().view(-1)[: whole - start])
        elif column or (groups.expert_data if shard.experts and groups.ep.size > 1 else groups.data).rank == 0:
            yield LivePiece(name, cut, 0, four_bits(param) or param.detach().view(-1))
    if groups.tp.rank == 0 and (column or groups.data.rank == 0):
        for name, buffer in engine.state.buffers:
            yield LivePiece(name, REPLICATED.own(WHOLE), 0, buffer.view(-1))
