"""Whole parameters of a model while it is trained, one at a time, in whatever layout that is."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from parallel.engine import Engine
from parallel.live_weights import LivePiece, live_pieces
from parallel.sharding import REPLICATED, Cut, Shard

Range = tuple[int, Cut, int, int]
"""Who gives it (rank in the group), of which cut, first element of the flattened part, elements."""


class WholeWeights:
    """Gives every rank any parameter or buffer whole, after the updates there were.

    Those who hold a part of it send it once. All ranks of the group ask for the same names in the same order.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, groups = engine, engine.groups
        dealt_out = engine.cfg.zero == 3 or groups.ep.size > 1
        self._column = not dealt_out
        self._axis_group = groups.model.group if self._column else dist.group.WORLD
        self._rank = groups.model.rank if self._column else groups.rank
        self._size = groups.model.size if self._column else groups.world
        self._mine: dict[tuple[str, int], LivePiece] = {}
        self._ranges = self._told()

    def begin(self) -> None:
        """Look up what this rank gives; to be called after updates, before the first tensor is asked for."""
        self._mine = {(each.name, each.start): each for each in self._pieces()}

    def end(self) -> None:
        """Let go of it."""
        self._mine = {}

    def tensor(self, name: str, shape: tuple[int, ...], shard: Shard = REPLICATED) -> torch.Tensor:
        """One parameter, fp32, [``shape``] when whole; ``shard`` is the record of its cut."""
        ranges, device = self._ranges[name], self.engine.groups.device
        cuts = list(dict.fromkeys(cut for _, cut, _, _ in ranges))
        whole = torch.empty(shape, device=device)
        for cut in cuts:
            part = whole if len(cuts) == 1 else torch.empty(shard.local_shape(shape, cut), device=device)
            for giver, _, start, numel in (each for each in ranges if each[1] == cut):
                values = part.view(-1)[start : start + numel]
                if giver == self._rank:
                    values.copy_(self._mine[name, start].values)
                if self._size > 1:
                    dist.broadcast(values, group=self._axis_group, group_src=giver)
            if len(cuts) > 1:
                shard.put(whole, cut, part)
        return whole

    def _told(self) -> dict[str, list[Range]]:
        """Of every parameter and buffer who gives which range of it; cuts and ranges in order."""
        mine = [(each.name, each.cut, each.start, each.values.numel()) for each in self._pieces()]
        everyone: list[Any] = [mine]
        if self._size > 1:
            everyone = [None] * self._size
            dist.all_gather_object(everyone, mine, group=self._axis_group)
        found: dict[str, list[Range]] = {}
        for giver, given in enumerate(everyone):
            for name, cut, start, numel in given:
                found.setdefault(name, []).append((giver, cut, start, numel))
        return {
            name: sorted(ranges, key=lambda r: (r[1].ep_rank, r[1].tp_rank, r[2])) for name, ranges in found.items()
        }

    def _pieces(self) -> list[LivePiece]:
        return list(live_pieces(self.engine, self._column))
