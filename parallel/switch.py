"""Parts of a model that can be switched off: adapters, without which it is the model that they were put on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


class Switch(nn.Module):
    """While `on` is false, the layer it belongs to computes what it did before training."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True


class Lengthens(Switch):
    """One that puts rows between those of the tokens while it is on; each chunk of a model has it."""

    def extra_rows(self, inputs: Mapping[str, Any]) -> int:
        """How many it puts in where the model is called with these."""
        raise NotImplementedError


@contextmanager
def switched_off(models: Iterable[nn.Module]) -> Iterator[None]:
    """Everything that can be switched off in these models is, while it lasts."""
    switches = [module for model in models for module in model.modules() if isinstance(module, Switch)]
    before = [switch.on for switch in switches]
    try:
        for switch in switches:
            switch.on = False
        yield
    finally:
        for switch, on in zip(switches, before, strict=True):
            switch.on = on
