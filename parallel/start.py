"""What the trained parameters of an engine began as, to be put back for a while: a model is its own reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from parallel.engine import Engine
from parallel.materialise import TensorSource
from parallel.sharding import is_idle, shard_of


class Start:
    """The values that this rank's trained parameters had when the run began, in the engine's own cut.

    A copy of what is trained and of nothing else, so meant for adapters. Optimizer state is not touched: ZeRO keeps its
    masters beside the weights that the model computes with, and only those are exchanged.

    Args:
        source: gives the start of every trained parameter, also where the engine's own came from a checkpoint.
    """

    def __init__(self, engine: Engine, source: TensorSource) -> None:
        self.engine, cut = engine, engine.groups.place().cut
        self._params = [(n, p) for n, p in engine.named_parameters() if p.requires_grad and not is_idle(p)]
        self._others = [self._own(p, source.part(name, shard_of(p), cut)) for name, p in self._params]

    @contextmanager
    def back(self) -> Iterator[None]:
        """While it lasts, the model is the one that the run began with. To be entered by all ranks together."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for (_, param), other in zip(self._params, self._others, strict=True):
            live = self._live(param)
            kept = live.clone()
            live.copy_(other)
            other.copy_(kept)

    def _live(self, param: nn.Parameter) -> torch.Tensor:
        """What the model computes with, or under ZeRO-3 gathers: a flat range without its padding."""
        if self.engine.cfg.zero != 3:
            return param.detach()
        held: Any = param
        assert held.ds_status.name == "NOT_AVAILABLE", "between steps ZeRO-3 keeps nothing gathered"
        start, stop = self._range(held)
        return held.ds_tensor.detach().view(-1)[: stop - start]

    def _own(self, param: nn.Parameter, local: torch.Tensor) -> torch.Tensor:
        """This rank's share of a local part, as `_live` has it."""
        live = self._live(param)
        if self.engine.cfg.zero == 3:
            local = local.reshape(-1)[slice(*self._range(param))]
        assert local.shape == live.shape, f"a start of shape {tuple(local.shape)} for {tuple(live.shape)}"
        return local.to(live.device, live.dtype, copy=True)

    def _range(self, param: Any) -> tuple[int, int]:
        share, whole = param.ds_tensor.ds_numel, param.ds_numel
        start = min(self.engine.groups.data.rank * share, whole)
        return start, min(start + share, whole)  # the last rank's share ends in padding
