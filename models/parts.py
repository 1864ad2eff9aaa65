"""The parts of a model that are trained by themselves: vision tower, connector, decoder; and the last layers of either.

Which part a parameter belongs to is said by its name: `vision.`, `connector.`, and everything else is the decoder's.
What is not trained is frozen before an engine sees it: no gradient, no optimizer state, no message, no place in a
checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from models.balance import Trained
from models.building import Model
from models.config import ModelConfig
from parallel.layers import parameter
from parallel.sharding import REPLICATED, SINGLE, idle, is_kept, name_of

Problem = tuple[str, object, str, str]
EMBEDDING = "embed.weight"
ENDS = ("norm", "head", "temperature")
"""What stands behind the layers of a tower, a decoder or a text encoder."""


@dataclass(frozen=True)
class PartConfig:
    """How a part of a model is trained."""

    train: bool = True
    """Whether it is trained; a part that is not stays as it begins and is not saved."""
    lr_scale: float = 1.0
    """Its learning rate is optim.lr times this."""


@dataclass(frozen=True)
class LayeredPartConfig(PartConfig):
    """How a part that has layers is trained."""

    last_layers: int | None = None
    """Only so many of its last layers that run are trained, with the norm and the head behind them; null trains all of
    it. A head that is tied to the embedding stays as it begins."""


@dataclass(frozen=True)
class PartsConfig:
    """Which parts of a model are trained, and how fast."""

    vision: LayeredPartConfig = field(default_factory=LayeredPartConfig)
    """The vision tower of a model that sees."""
    connector: PartConfig = field(default_factory=PartConfig)
    """What stands between tower and decoder, and the layers that read features (model.vision.cross)."""
    decoder: LayeredPartConfig = field(default_factory=LayeredPartConfig)
    """The language model: embedding, layers, norm and head."""

    def problems(self) -> list[Problem]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        found: list[Problem] = []
        for name, part in vars(self).items():
            if part.lr_scale <= 0:
                way = f"optim.parts.{name}.train=false for a part that is not trained"
                found.append((f"parts.{name}.lr_scale", part.lr_scale, "must be above 0", way))
            last = getattr(part, "last_layers", None)
            if last is not None and last < 1:
                way = f"optim.parts.{name}.train=false, or last_layers=null for all of it"
                found.append((f"parts.{name}.last_layers", last, "must be at least 1", way))
        return found

    def part_of(self, name: str) -> PartConfig:
        """The part that the parameter of a name belongs to."""
        first = name.partition(".")[0]
        return {"vision": self.vision, "connector": self.connector}.get(first, self.decoder)

    @property
    def everything(self) -> bool:
        """Whether nothing is frozen."""
        return all(part.train and getattr(part, "last_layers", None) is None for part in vars(self).values())

    def trains(self, name: str, cfg: ModelConfig) -> bool:
        """Whether a parameter is trained."""
        part = self.part_of(name)
        last = getattr(part, "last_layers", None)
        if not part.train or last is None:
            return part.train
        if part is self.decoder:
            words, count = name.split("."), cfg.num_layers
        else:
            assert cfg.vision is not None
            words, count = name.split(".")[1:], cfg.vision.tower.num_layers + 1 + cfg.vision.tower.feature_layer
        return int(words[1]) >= count - last if words[0] == "layers" else words[0] in ENDS


ALL = PartsConfig()


def part_problems(parts: PartsConfig, cfg: ModelConfig) -> list[Problem]:
    """What does not go together with a model, as (key, value, reason, way out)."""
    found: list[Problem] = []
    if cfg.vision is None:
        found += [
            (f"parts.{name}", "the section", "the model has no such part: model.vision is null", "leave it as it is")
            for name in ("vision", "connector")
            if getattr(parts, name) != getattr(ALL, name)
        ]
    sizes = {"decoder": cfg.num_layers}
    if cfg.vision is not None:
        sizes["vision"] = cfg.vision.tower.num_layers + 1 + cfg.vision.tower.feature_layer
    for name, count in sizes.items():
        last = getattr(parts, name).last_layers
        if last is not None and last > count:
            reason = f"the part has {count} layers that run"
            found.append((f"parts.{name}.last_layers", last, reason, f"optim.parts.{name}.last_layers={count} or null"))
    names = ("vision", "connector", "decoder") if cfg.vision is not None else ("decoder",)
    if not any(getattr(parts, name).train for name in names):
        found.append(
            (f"parts.{names[-1]}.train", False, "nothing is left to train", f"optim.parts.{names[0]}.train=true")
        )
    return found


def freeze(model: Model, parts: PartsConfig, whole_inputs: bool = False) -> None:
    """Leave of a model on the meta device, or a chunk of one, only what is trained, and write on each parameter how
    fast it learns.

    Args:
        whole_inputs: have the first modules that are trained ask for the gradient of their input. DeepSpeed's ZeRO-3
            takes the gradients of a module when that of its input is there, and too early where none is made.
    """
    for inner, param in model.named_parameters():
        name = name_of(param, inner)
        if not parts.trains(name, model.cfg):
            param.requires_grad_(False)
            vars(param)["kept"] = is_kept(param) and parts.part_of(name).train
        vars(param)["lr_scale"] = parts.part_of(name).lr_scale
    if whole_inputs and not parts.everything:
        for module in _first_trained(model):
            module.register_forward_pre_hook(_ask)


def lr_scale_of(param: torch.Tensor) -> float:
    """What the learning rate of a parameter is multiplied by."""
    return param.__dict__.get("lr_scale", 1.0)


def trained_of(cfg: ModelConfig, parts: PartsConfig) -> Trained | None:
    """What of a model is trained, as its balancing over pipeline stages asks for it; None = everything."""
    if parts.everything:
        return None
    layers = tuple(parts.trains(f"layers.{i}.", cfg) for i in range(cfg.num_layers))
    sees = cfg.vision is not None and (parts.vision.train or parts.connector.train)
    tied = cfg.tied_embeddings and cfg.head == "lm"
    head = parts.trains(EMBEDDING if tied else "head.weight", cfg)
    return Trained(layers, sees or parts.trains(EMBEDDING, cfg), head, parts.vision.train)


def give_idle(model: Model) -> None:
    """Give a chunk an idle parameter: optimizer and DeepSpeed want one where nothing is trained."""
    with torch.device("meta"):
        model.register_parameter("idle", idle(parameter((1, 1), REPLICATED, "zeros", SINGLE)))


def _first_trained(model: Model) -> list[nn.Module]:
    """The modules whose input nothing trained has made: of the tower, the connector, the layers, the end."""
    rows: list[list[nn.Module]] = []
    if model.vision is not None and model.connector is not None:
        inner: Any = model.vision
        rows += [
            [*inner.layers, *([inner.norm] if getattr(inner, "norm", None) is not None else [])],
            [model.connector],
        ]
    behind = [module for module in (model.norm, model.head) if module is not None]
    gated = {} if model.connector is None else model.connector.gated
    layers = [[*([gated[i]] if i in gated else []), layer] for i, layer in model.layers.items()]
    rows.append([*chain.from_iterable(layers), *behind])
    found = []
    for row in rows:
        first = next((module for module in row if any(p.requires_grad for p in module.parameters())), None)
        found += [first] if first is not None else []
    return found


def _ask(module: nn.Module, given: tuple[Any, ...]) -> None:
    hidden = given[0]
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()
