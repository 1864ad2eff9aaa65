"""Which tensors an adapter consists of, by our names and by those of the layers users know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from models.adapters.config import AdapterConfig, Ia3Config, LoraConfig
from models.adapters.targets import Layer, Part

Kind = Literal["a", "b", "magnitude", "start_a", "start_b", "factor", "virtual"]


@dataclass(frozen=True)
class Key:
    """One tensor of an adapter as users have it."""

    module: str
    """The linear layer, or the parameter of stacked experts, by its name in the Hugging Face model."""
    kind: Kind


@dataclass(frozen=True)
class Parameter:
    """One of our adapter parameters: tensors of users' layers one after another, `sizes` rows each."""

    name: str
    layer: Layer
    kind: Kind
    keys: tuple[Key, ...]
    sizes: tuple[int, ...]

    def joined(self, tensors: Mapping[Key, torch.Tensor]) -> torch.Tensor:
        """The whole parameter."""
        return torch.cat([tensors[key] for key in self.keys])

    def taken_apart(self, whole: torch.Tensor) -> dict[Key, torch.Tensor]:
        """What each of users' layers has of it."""
        return dict(zip(self.keys, whole.split(self.sizes), strict=True))


def parameters(layers: Iterable[Layer], cfg: AdapterConfig) -> Iterator[Parameter]:
    """Every adapter parameter of these layers."""
    for layer in layers:
        if not layer.chosen:
            continue
        if isinstance(cfg, LoraConfig):
            for kind in _kinds(cfg):
                yield _parameter(f"{layer.adapter}.{kind}", layer, kind, cfg.rank)
        elif isinstance(cfg, Ia3Config):
            yield _parameter(f"{layer.path}.adapter.factor", layer, "factor", 0)


def _kinds(cfg: LoraConfig) -> Iterator[Kind]:
    yield from ("a", "b")
    if cfg.dora:
        yield "magnitude"
    if cfg.init == "pissa":
        yield from ("start_a", "start_b")


def _parameter(name: str, layer: Layer, kind: Kind, rank: int) -> Parameter:
    def rows(part: Part) -> int:
        if layer.experts:
            return layer.experts
        if kind in ("a", "start_a"):
            return rank
        return layer.inputs if kind == "factor" and layer.row else part.outputs

    keys = tuple(Key(part.module, kind) for part in layer.adapted)
    return Parameter(name, layer, kind, keys, tuple(rows(part) for part in layer.adapted))
