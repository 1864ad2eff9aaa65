"""Parts of a model that can be switched off: adapters, without which it is the model that they were put on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


class Switch(nn.Module):
    """While `on` is false, the layer it belongs to computes what it did before training."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True


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
