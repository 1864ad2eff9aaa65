"""Megatron's shards of a model in memory: the product's conversion without files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from convert.boxes import Columns, Meta, Pieces, Tensors, put
from convert.from_hf import hf_shapes
from convert.megatron.layout import Layout, Rank
from convert.megatron.shards import locals_of
from models import ModelConfig

States = dict[Rank, list[dict[str, torch.Tensor]]]
"""For each rank its chunks' tensors by name."""


@dataclass(frozen=True)
class Held:
    """A tensor in memory, read and written by rows."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def _flat(self) -> torch.Tensor:
        return self.tensor.view(-1, self.tensor.shape[-1]) if self.tensor.dim() > 1 else self.tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        assert 0 <= start <= stop <= len(self._flat())
        return self._flat()[start:stop].clone()

    def put(self, start: int, rows: torch.Tensor) -> None:
        into = self._flat()[start : start + len(rows)]
        assert into.shape == rows.shape
        into.copy_(rows)


class Memory:
    """Hugging Face tensors in memory. Is `Tensors`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.metas = {name: Meta(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        rows = Held(self.tensors[hf]).rows(start, stop)
        return rows if columns is None else rows[:, slice(*columns)]


def numbered(cfg: ModelConfig) -> dict[str, torch.Tensor]:
    """Hugging Face tensors in which every element of the model is another number (as int32, exact)."""
    found, first = {}, 1
    for name, shape in hf_shapes(cfg).items():
        count = torch.Size(shape).numel()
        found[name] = torch.arange(first, first + count, dtype=torch.int32).view(shape)
        first += count
    return found


def row_count(shape: tuple[int, ...]) -> int:
    """All dims but the last, counted as one; a vector's rows are its elements."""
    return math.prod(shape[:-1] or shape)


def empty_states(cfg: ModelConfig, layout: Layout, metas: Mapping[str, Meta]) -> tuple[States, Pieces[Held]]:
    """Zeros for every tensor of every rank, and what lies where in them."""
    states: States = {rank: [{} for _ in range(layout.vpp)] for rank in layout.ranks()}
    pieces = []
    for local in locals_of(cfg, layout):
        held = Held(torch.zeros(local.shape, dtype=local.whole.dtype(metas)))
        chunk = states[local.rank][local.chunk]
        assert local.name not in chunk, f"{local.name} twice"
        chunk[local.name] = held.tensor
        pieces.append((held, local.boxes))
    return states, Pieces(metas, pieces)


def cut_up(tensors: Tensors, cfg: ModelConfig, layout: Layout, block: int = 1 << 30) -> tuple[States, Pieces[Held]]:
    """Every rank's tensors from Hugging Face's, `block` rows at a time."""
    states, pieces = empty_states(cfg, layout, tensors.metas)
    for name, meta in tensors.metas.items():
        count = row_count(meta.shape)
        for start in range(0, count, block):
            put(pieces, name, start, tensors.rows(name, start, min(start + block, count)))
    return states, pieces


def put_together(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Every Hugging Face tensor, whole."""
    found = {}
    for name, meta in tensors.metas.items():
        count = row_count(meta.shape)
        found[name] = tensors.rows(name, 0, count).view(meta.shape)
    return found
