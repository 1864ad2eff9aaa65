"""Adapters as tensors beside a base: what a run trained or `peft` wrote, and the full weights they make together."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from convert.boxes import Columns, Meta, Tensors
from convert.from_hf import hf_shapes, weight_rules
from convert.opened import Opened
from convert.virtual import not_merged, virtual_keys
from models.adapters.config import AdapterConfig, BitfitConfig, Ia3Config, LoraConfig
from models.adapters.names import Key, parameters
from models.adapters.targets import Layer, layers_of
from models.adapters.virtual_config import PrefixConfig, PromptConfig
from models.config import ModelConfig
from models.decoder import build
from models.init import InitSource
from models.rules import Stack
from parallel.materialise import TensorSource

CONFIGS: dict[str, type[AdapterConfig]] = {
    "lora": LoraConfig,
    "ia3": Ia3Config,
    "bitfit": BitfitConfig,
    "prompt": PromptConfig,
    "prefix": PrefixConfig,
}
SAMPLED = 256
"""Tensors of a base that its fingerprint looks at."""


@dataclass(frozen=True)
class AdapterWeights:
    """A whole adapter.

    Args:
        cfg: what it is.
        tensors: by users' layers: A [r, I], B [O, r], a magnitude or factors as vectors.
        others: whole Hugging Face tensors that were trained beside it (biases, a scalar head).
    """

    cfg: AdapterConfig
    tensors: Mapping[Key, torch.Tensor]
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)


def config_of(saved: Mapping[str, Any]) -> AdapterConfig:
    """The adapter section as a run saved it.

    Raises:
        ValueError: of another version of Loom.
    """
    try:
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()
        }
        return CONFIGS[given["name"]](**given)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its adapter is of another version of Loom: {error}") from error


def trained(source: TensorSource, names: list[str], model: ModelConfig, cfg: AdapterConfig) -> AdapterWeights:
    """What an adapter run saved, whole. `names`: the tensors it saved."""
    own = {param.name: param for param in parameters(adapted_layers(model, cfg), cfg)}
    virtual = virtual_keys(model, cfg) if isinstance(cfg, PromptConfig | PrefixConfig) else {}
    rules = weight_rules(model)[0]
    tensors: dict[Key, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    for name in names:
        if name in own:
            tensors |= own[name].taken_apart(source.tensor(name))
        elif name in virtual:
            tensors[virtual[name]] = source.tensor(name)
        else:
            others |= rules[name].to_hf(source.tensor(name))
    return AdapterWeights(cfg, tensors, others)


def adapted_layers(model: ModelConfig, cfg: AdapterConfig) -> list[Layer]:
    """The linear layers of a model that have adapters."""
    return [layer for layer in layers_of(build(model), getattr(cfg, "targets", ())) if layer.chosen]


class Merged(Tensors):
    """Full weights: those of a base with an adapter folded in, made row by row as they are read. fp32 where changed."""

    def __init__(self, base: Tensors, model: ModelConfig, adapter: AdapterWeights) -> None:
        self.base, self.adapter = base, adapter
        layers = adapted_layers(model, adapter.cfg)
        self._inputs = {part.module for layer in layers if layer.row for part in layer.adapted}
        self._changed = {key.module for key in adapter.tensors}
        self._experts = expert_slices(model, layers)
        shapes = hf_shapes(model)
        self._metas = {
            hf: Meta(self._dtype(hf), shapes[hf]) for hf in shapes if hf in base.metas or hf in adapter.others
        }

    @property
    def metas(self) -> Mapping[str, Meta]:
        """Every tensor there is, in the order of the model."""
        return self._metas

    def _dtype(self, hf: str) -> torch.dtype:
        changed = hf.rpartition(".")[0] in self._changed or hf in self._experts or hf in self.adapter.others
        return torch.float32 if changed else self.base.metas[hf].dtype

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, all columns or some."""
        if hf in self.adapter.others:
            whole = self.adapter.others[hf].float()
            found = whole.reshape(-1, whole.shape[-1])[start:stop] if whole.ndim > 1 else whole[start:stop]
            return found if columns is None else found[:, slice(*columns)]
        if hf in self._experts:
            found = self._one_expert(hf, start, stop)
            return found if columns is None else found[:, slice(*columns)]
        module, _, kind = hf.rpartition(".")
        if module not in self._changed:
            return self.base.rows(hf, start, stop, columns)
        values = self.base.rows(hf, start, stop).float()
        if isinstance(self.adapter.cfg, LoraConfig):
            values = self._low_rank(self.adapter.cfg, module, values, start, stop) if kind == "weight" else values
        else:
            factor = self.adapter.tensors[Key(module, "factor")].float()
            if module not in self._inputs:
                values = values * (factor[start:stop] if kind == "bias" else factor[start:stop, None])
            elif kind == "weight":
                values = values * factor
        return values if columns is None else values[:, slice(*columns)]

    def _one_expert(self, hf: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of one tensor of one expert."""
        assert isinstance(self.adapter.cfg, LoraConfig)
        (module, expert, first), values = self._experts[hf], self.base.rows(hf, start, stop).float()
        a, b = (self.adapter.tensors[Key(module, kind)][expert].float() for kind in ("a", "b"))
        return torch.addmm(values, b[first + start : first + stop], a, alpha=self.adapter.cfg.scale)

    def _low_rank(self, cfg: LoraConfig, module: str, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        held = {
            kind: self.adapter.tensors.get(Key(module, kind)) for kind in ("a", "b", "start_a", "start_b", "magnitude")
        }
        a, b, start_a, start_b, magnitude = held.values()
        assert a is not None and b is not None, f"{module} has half an adapter"
        values = torch.addmm(values, b[start:stop].float(), a.float(), alpha=cfg.scale)
        if start_a is not None and start_b is not None:
            values.addmm_(start_b[start:stop], start_a, alpha=-cfg.scale)
        if magnitude is not None:
            norm = torch.linalg.vector_norm(values, dim=1)
            values *= (magnitude[start:stop].float() / norm)[:, None]
        return values


def expert_slices(model: ModelConfig, layers: Iterable[Layer]) -> dict[str, tuple[str, int, int]]:
    """Of every Hugging Face tensor of an expert with an adapter: the stacked parameter's name, the expert's number, and
    where its rows begin in the expert's part of it."""
    rules, found = weight_rules(model)[0], {}
    for layer in layers:
        rule = rules.get(layer.weight)
        if isinstance(rule, Stack):
            for expert, names in enumerate(rule.hf):
                firsts = accumulate(rule.sizes, initial=0)
                found |= {hf: (layer.parts[0].module, expert, first) for hf, first in zip(names, firsts, strict=False)}
    return found


class Fresh(Tensors):
    """Fresh weights under Hugging Face names: the base of a run that started from none."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self._source, rules = InitSource(model, seed), weight_rules(model)[0]
        self._of = {hf: (ours, rule) for ours, rule in rules.items() for hf in rule.sources}
        self._metas = {hf: Meta(torch.float32, shape) for hf, shape in hf_shapes(model).items()}

    @property
    def metas(self) -> Mapping[str, Meta]:
        """Every tensor there is, in the order of the model."""
        return self._metas

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, all columns or some."""
        ours, rule = self._of[hf]
        whole = rule.to_hf(self._source.tensor(ours))[hf]
        found = whole.reshape(-1, whole.shape[-1])[start:stop] if whole.ndim > 1 else whole.reshape(-1)[start:stop]
        return (found if columns is None else found[:, slice(*columns)]).clone()


def merged(base: Opened, model: ModelConfig, adapter: AdapterWeights) -> Opened:
    """A base with an adapter folded in, as any other checkpoint.

    Raises:
        ValueError: the adapter was made for another model, or is one that no weights can hold.
    """
    if isinstance(adapter.cfg, PromptConfig | PrefixConfig):
        raise not_merged(adapter.cfg)
    check_shapes(adapter, base.cfg, base.path)
    return dataclasses.replace(base, cfg=model, tensors=Merged(base.tensors, model, adapter))


def check_shapes(adapter: AdapterWeights, model: ModelConfig, path: Path) -> None:
    """See that an adapter belongs to a model.

    Raises:
        ValueError: it was made for another one; `path` says what does not fit.
    """
    shapes = {name.removesuffix(".weight"): shape for name, shape in hf_shapes(model).items()}
    for layer in adapted_layers(model, adapter.cfg):
        if layer.experts:
            shapes[layer.parts[0].module] = (layer.experts, layer.parts[0].outputs, layer.inputs)
    for key, tensor in adapter.tensors.items():
        found = shapes.get(key.module)
        wanted = None if found is None else _shape(adapter.cfg, key, found)
        if found is None or (wanted is not None and tuple(tensor.shape) != wanted):
            has = "has no such layer" if found is None else f"has a weight of shape {list(found)} there"
            raise ValueError(
                f"the adapter does not belong to the model ({path}): {key.module} ({key.kind}) has shape "
                f"{list(tensor.shape)}, and the model {has}"
            )


def _shape(cfg: AdapterConfig, key: Key, weight: tuple[int, ...]) -> tuple[int, ...] | None:
    if isinstance(cfg, LoraConfig):
        *number, outputs, inputs = weight
        sides = {"a": (*number, cfg.rank, inputs), "b": (*number, outputs, cfg.rank), "magnitude": (outputs,)}
        return sides.get(key.kind.removeprefix("start_"))
    return None


def fingerprint(opened: Opened) -> str:
    """What a base is told by: names and shapes of its tensors, and the first and the last row of many of them."""
    digest = hashlib.sha256()
    metas = opened.tensors.metas
    digest.update(repr([(hf, meta.shape) for hf, meta in metas.items()]).encode())
    step = -(-len(metas) // SAMPLED)
    for hf in list(metas)[::step]:
        rows = torch.Size(metas[hf].shape[:-1] if len(metas[hf].shape) > 1 else metas[hf].shape).numel()
        for row in {0, rows - 1}:
            digest.update(opened.tensors.rows(hf, row, row + 1).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def gone(base: Path) -> ValueError:
    """What to raise where the base of an adapter run is not there."""
    return ValueError(
        f"the base of this adapter run, {base}, is not there any more: put it back, or make full weights from another "
        "copy of it with python convert/merge_adapter.py --base DIR --adapter RUN --out DIR"
    )
