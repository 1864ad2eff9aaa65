"""Where the weights of a model with adapters come from: the base's from its folder, the adapters' fresh or saved."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from typing import Protocol

import torch

from models.adapters.config import AdapterConfig, LoraConfig
from models.adapters.names import Key, Parameter, parameters
from models.adapters.targets import Layer, layers_of
from models.config import ModelConfig
from models.decoder import build
from parallel.materialise import TensorSource
from parallel.nf4 import Nf4
from parallel.sharding import Cut, Shard


class Saved(TensorSource, Protocol):
    """What an adapter run saved: the trained tensors."""

    @property
    def tensors(self) -> Container[str]:
        """Their names."""
        ...


class AdapterSource(TensorSource):
    """Weights of a model with adapters by our names. Everything is made whole, then cut, so no layout changes it.

    Args:
        base: the weights that stay as they are.
        saved: what an earlier run trained.
        start: an adapter to start from, by its layers' names.
        seed: what fresh adapters are drawn by, each by its layer's name.
    """

    def __init__(
        self,
        base: TensorSource,
        model: ModelConfig,
        cfg: AdapterConfig,
        seed: int,
        saved: Saved | None = None,
        start: Mapping[Key, torch.Tensor] | None = None,
    ) -> None:
        self.base, self.cfg, self.seed, self.saved, self.start = base, cfg, seed, saved, start
        layers = layers_of(build(model), getattr(cfg, "targets", ()))
        self._own = {param.name: param for param in parameters(layers, cfg)}
        self._weights = {layer.weight: layer for layer in layers if layer.chosen}
        self._pissa: tuple[str, dict[str, torch.Tensor]] | None = None

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor of a parameter or buffer."""
        if self.saved is not None and name in self.saved.tensors:
            return self.saved.tensor(name)
        if name in self._own:
            return self._fresh(self._own[name])
        if name in self._weights and self._takes_apart:
            return self._rest(self._weights[name])
        return self.base.tensor(name)

    def part(self, name: str, shard: Shard, cut: Cut) -> torch.Tensor:
        """What `cut` gives of it."""
        if self.saved is not None and name in self.saved.tensors:
            return self.saved.part(name, shard, cut)
        if name in self._own or (name in self._weights and self._takes_apart):
            return shard.slice(self.tensor(name), cut).clone()
        return self.base.part(name, shard, cut)

    @property
    def _takes_apart(self) -> bool:
        return isinstance(self.cfg, LoraConfig) and self.cfg.init == "pissa"

    def _fresh(self, param: Parameter) -> torch.Tensor:
        if self.start is not None:
            return param.joined(self.start)
        layer, kind = param.layer, param.kind
        if kind == "factor":
            return torch.ones(sum(param.sizes))
        if kind == "magnitude":
            weight = self.base.tensor(layer.weight).float()
            weight = Nf4.of(weight).dense(torch.float32) if self._lora.base == "nf4" else weight
            return torch.cat([torch.linalg.vector_norm(weight[slice(*layer.rows(i))], dim=1) for i in layer.chosen])
        if self._takes_apart:
            return self._principal(layer)[kind[-1]]
        if layer.experts:
            outputs, rank = layer.parts[0].outputs, self._lora.rank
            if kind == "b":
                return torch.zeros(layer.experts, outputs, rank)
            return drawn(param.keys[0].module, (layer.experts, rank, layer.inputs), self.seed)
        if kind == "b":
            return torch.zeros(sum(param.sizes), self._lora.rank)
        return torch.cat(
            [
                drawn(key.module, (size, layer.inputs), self.seed)
                for key, size in zip(param.keys, param.sizes, strict=True)
            ]
        )

    @property
    def _lora(self) -> LoraConfig:
        assert isinstance(self.cfg, LoraConfig), f"{self.cfg} has no adapters of low rank"
        return self.cfg

    def _principal(self, layer: Layer) -> dict[str, torch.Tensor]:
        """PiSSA's A and B of a layer; the last ones are kept, for the weight and its adapters are asked for in turn."""
        if self._pissa is None or self._pissa[0] != layer.path:
            weight = self.base.tensor(f"{layer.path}.weight").float()
            pairs = [principal(weight[slice(*layer.rows(i))], self._lora.rank, self._lora.scale) for i in layer.chosen]
            a, b = (torch.cat(factors) for factors in zip(*pairs, strict=True))
            self._pissa = layer.path, {"a": a, "b": b}
        return self._pissa[1]

    def _rest(self, layer: Layer) -> torch.Tensor:
        """PiSSA: the weight without what its adapters began with."""
        name = f"{layer.path}.adapter.low_rank.start_"
        a, b = self.tensor(f"{name}a"), self.tensor(f"{name}b")
        weight = self.base.tensor(f"{layer.path}.weight").float().clone()
        at = 0
        for number, i in enumerate(layer.chosen):
            start, stop = layer.rows(i)
            factor = a[number * self._lora.rank : (number + 1) * self._lora.rank]
            weight[start:stop].addmm_(b[at : at + stop - start], factor, alpha=-self._lora.scale)
            at += stop - start
        return weight


def drawn(module: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A fresh A: uniform within 1 / sqrt(inputs), as `peft` draws it; by seed and layer alone."""
    digest = hashlib.sha256(f"{seed}:{module}.lora_A".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = shape[-1] ** -0.5
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


def principal(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, I] and B [O, r] with s B A the best approximation of `weight` of this rank, both of equal size.

    The signs, which a decomposition leaves open, are such that the largest element of each row of A is positive.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    largest = vh[:rank].gather(1, vh[:rank].abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return vh[:rank] * sign * root[:, None], u[:, :rank] * sign.t() * root
