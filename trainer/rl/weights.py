"""The weights of the policy in the generator's layout: moved tensor by tensor from whatever layout it is trained in.

A generator is a whole model, cut over tp alone (its own tp, which need not be training's). Where each rank already
holds its cut of it (no pipeline, no ZeRO-3, no expert parallel, the same tp) the generator reads the weights that are
trained and nothing is copied. Elsewhere those who hold a part of a parameter send it once, and every rank cuts its own
from the whole; in memory there is one whole parameter (and one part of it) above the generator's own weights.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from models.decoder import Decoder
from parallel.engine import Engine
from parallel.materialise import fill_
from parallel.nf4 import four_bits
from parallel.sharding import shard_of
from trainer.rl.whole import WholeWeights


class TrainedItself:
    """The model that is trained is the generator's: nothing to do. For layouts in which it can generate."""

    shared = True

    def __init__(self, engine: Engine) -> None:
        assert isinstance(engine.model, Decoder)
        self.model = engine.model

    def fill(self) -> None:
        """Nothing."""

    def drop(self) -> None:
        """Nothing."""


def generates(engine: Engine, tp: int) -> bool:
    """Whether the model that is trained can be used as it is by a generator on so many tp ranks."""
    groups = engine.groups
    whole = groups.pp.size == groups.cp.size == groups.ep.size == 1 and engine.cfg.zero != 3
    if not whole or groups.tp.size != tp or engine.cfg.precision != "fp32" or in_four_bits(engine):
        return False
    return isinstance(engine.model, Decoder) and not engine.model.place.splits_rows


def in_four_bits(engine: Engine) -> bool:
    """Whether the model that is trained has weights in 4 bits; a generator has them in full."""
    return any(four_bits(param) is not None for _, param in engine.named_parameters())


class GeneratorWeights:
    """Keeps a decoder for generation on the weights of a model that is trained.

    Args:
        engine: trains the policy.
        model: the whole policy on the meta device, cut over the generator's tp (`place.tp`).
        dtype: of the generator's weights; another one than fp32 is always a copy.
    """

    def __init__(self, engine: Engine, model: Decoder, dtype: torch.dtype = torch.float32) -> None:
        self.engine, self.model, self.dtype = engine, model.requires_grad_(False).eval(), dtype
        groups = engine.groups
        dealt_out = engine.cfg.zero == 3 or groups.ep.size > 1
        same_cut = groups.tp.size == model.place.tp.size and groups.tp.rank == model.place.tp.rank
        same_cut = same_cut and not in_four_bits(engine)
        self.shared = dtype == torch.float32 and groups.pp.size == 1 and not dealt_out and same_cut
        """Whether the generator reads the very weights that are trained."""
        self._shapes = {name: shard_of(p).whole_shape(p.shape) for name, p in model.named_parameters()}
        self._whole = None if self.shared else WholeWeights(engine)
        self._filled_at: int | None = None

    def fill(self) -> None:
        """Bring the generator's weights up to date; a collective call of all ranks. Nothing to do if no step was taken
        since the last time."""
        if self._filled_at == self.engine.optimizer_steps:
            return
        if self._whole is None:
            trained = dict(self.engine.named_parameters()) | dict(self.engine.state.buffers)
            self._take({name: tensor.detach() for name, tensor in trained.items()})
        else:
            self._move(self._whole)
        self._filled_at = self.engine.optimizer_steps

    def drop(self) -> None:
        """Give the memory of a copy back until the next `fill`."""
        if self.shared:
            return
        for param in self.model.parameters():
            if not param.is_meta:
                param.data = param.data.new_empty(0)
        self._filled_at = None

    def _take(self, trained: dict[str, torch.Tensor]) -> None:
        for name, param in self.model.named_parameters():
            self._put(param, trained[name])
        for name, _ in list(self.model.named_buffers()):
            self._put_buffer(name, trained[name])

    def _put(self, param: nn.Parameter, values: torch.Tensor) -> None:
        if param.is_meta:
            fill_(param, values, self.engine.groups.device)  # keeps the record of its cut
        if param.data_ptr() != values.data_ptr() or param.dtype != values.dtype:
            param.data = values

    def _put_buffer(self, name: str, values: torch.Tensor) -> None:
        module = self.model.get_submodule(name.rpartition(".")[0])
        setattr(module, name.rpartition(".")[2], values)

    def _move(self, whole: WholeWeights) -> None:
        self.drop()
        cut = self.model.place.cut
        whole.begin()
        for name, param in self.model.named_parameters():
            shard, shape = shard_of(param), self._shapes[name]
            part = shard.slice(whole.tensor(name, shape, shard), cut)
            # A view would keep all of the whole.
            part = part.clone() if part.numel() < math.prod(shape) else part
            self._put(param, part.to(self.dtype))
        for name, buffer in list(self.model.named_buffers()):
            self._put_buffer(name, whole.tensor(name, tuple(buffer.shape)))
        whole.end()
