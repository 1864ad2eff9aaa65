"""Whole tensors of Megatron checkpoints by name, with the readers that torch and safetensors bring."""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from convert.megatron.layout import Layout
from models.config import ModelConfig


class Ranks:
    """A checkpoint of one file a rank."""

    def __init__(self, folder: Path, cfg: ModelConfig, layout: Layout, pickled: bool) -> None:
        self.folder, self.layout, self._pickled = folder, layout, pickled
        counts = layout.layers or (cfg.num_layers // layout.chunks,) * layout.chunks
        self._at = [(chunk, here) for chunk, count in enumerate(counts) for here in range(count)]
        """Of each layer its chunk and its number there."""
        ends = {
            here for chunk, count in enumerate(counts) for here in (sum(counts[:chunk]), sum(counts[: chunk + 1]) - 1)
        }
        self.layers = sorted(layer for layer in ends if 0 <= layer < cfg.num_layers)
        self._experts = cfg.moe.num_experts if cfg.moe else 1

    def of(self, name: str, layer: int | None = None) -> list[torch.Tensor]:
        """What each tensor-parallel rank has under a name (below the layer)."""
        if layer is None:
            return self._read(name, 0 if name.startswith("embedding.") else self.layout.chunks - 1, 0)
        chunk, here = self._at[layer]
        return self._read(f"decoder.layers.{here}.{name}", chunk, 0)

    def expert(self, name: str, layer: int, expert: int) -> list[torch.Tensor]:
        """The same of an expert's linear layer."""
        (chunk, at), (ep, here) = self._at[layer], divmod(expert, self._experts // self.layout.ep)
        grouped = self.layout.experts == "grouped"
        below = f"{name}.weight{here}" if grouped else f"local_experts.{here}.{name}.weight"
        return self._read(f"decoder.layers.{at}.mlp.experts.{below}", chunk, ep)

    def has_head(self) -> bool:
        """Whether the last stage has an output_layer.weight."""
        last = self.layout.chunks - 1
        file, prefix = self._file(0, last % self.layout.pp, 0), self._prefix(last)
        if self._pickled:
            return "output_layer.weight" in _load(file)[prefix]
        with safe_open(file, framework="pt") as opened:
            return f"{prefix}output_layer.weight" in opened.keys()  # noqa: SIM118 -- no mapping

    def wants_head(self, tied: bool) -> bool:
        """A tied one is repeated where the last stage is not the first."""
        return not tied or self.layout.chunks > 1

    def _file(self, tp: int, pp: int, ep: int) -> Path:
        folder = f"mp_rank_{tp:02d}" + f"_{pp:03d}" * (self.layout.pp > 1) + f"_{ep:03d}" * (self.layout.ep > 1)
        return self.folder / folder / ("model_optim_rng.pt" if self._pickled else "model_optim_rng.safetensors")

    def _prefix(self, chunk: int) -> str:
        number = chunk // self.layout.pp
        if self._pickled:
            return f"model{number}" if self.layout.vpp > 1 else "model"
        return f"model{number}/" if self.layout.vpp > 1 else ""

    def _read(self, name: str, chunk: int, ep: int) -> list[torch.Tensor]:
        found = []
        for tp in range(self.layout.tp):
            file = self._file(tp, chunk % self.layout.pp, ep)
            if self._pickled:
                found.append(_load(file)[self._prefix(chunk)][name].clone())
            else:
                with safe_open(file, framework="pt") as opened:
                    found.append(opened.get_tensor(self._prefix(chunk) + name))
        return found


def _load(file: Path) -> dict[str, Any]:
    """A rank's file, its values mapped. Opened for each tensor, so that mapped memory does not add up."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


class Global:
    """A checkpoint of torch.distributed.checkpoint: tensors are whole; equal layers and experts are stacked."""

    def __init__(self, folder: Path, cfg: ModelConfig) -> None:
        self._folder = folder
        self._about = FileSystemReader(folder).read_metadata().state_dict_metadata
        first_sparse = cfg.moe.first_dense if cfg.moe else 0
        self.layers = sorted({0, max(first_sparse - 1, 0), first_sparse, cfg.num_layers - 1})
        self._stacked = "decoder.layers.self_attention.linear_proj.weight" in self._about

    def of(self, name: str, layer: int | None = None) -> list[torch.Tensor]:
        """The tensor of a name (below the layer), alone in a list."""
        if layer is None:
            return [self._read(name, ())]
        if self._stacked:
            return [self._read(f"decoder.layers.{name}", (layer,))]
        return [self._read(f"decoder.layers.{layer}.{name}", ())]

    def expert(self, name: str, layer: int, expert: int) -> list[torch.Tensor]:
        """The same of an expert's linear layer."""
        below = f"mlp.experts.experts.{name}.weight"
        if self._stacked:
            return [self._read(f"decoder.layers.{below}", (layer, expert))]
        return [self._read(f"decoder.layers.{layer}.{below}", (expert,))]

    def has_head(self) -> bool:
        """Whether there is an output_layer.weight."""
        return "output_layer.weight" in self._about

    def wants_head(self, tied: bool) -> bool:
        """A tied one is not there twice."""
        return not tied

    def _read(self, name: str, index: tuple[int, ...]) -> torch.Tensor:
        """What stands at an index of the first dims."""
        about = self._about.get(name)
        if not isinstance(about, TensorStorageMetadata):
            raise ValueError(f"the checkpoint has no tensor {name}, which Megatron asks for")
        rest = about.size[len(index) :]
        out = torch.empty((*(1 for _ in index), *rest), dtype=about.properties.dtype)
        planner = _Part(name, torch.Size((*index, *(0 for _ in rest))), out)
        load({name: out}, storage_reader=FileSystemReader(self._folder), planner=planner, no_dist=True)
        return out.view(rest)


class _Part(DefaultLoadPlanner):
    """Reads a part of one tensor."""

    def __init__(self, name: str, offsets: torch.Size, out: torch.Tensor) -> None:
        super().__init__()
        self._name, self._offsets, self._out = name, offsets, out

    def create_local_plan(self) -> LoadPlan:
        """The one part."""
        assert self.metadata is not None
        about = self.metadata.state_dict_metadata[self._name]
        assert isinstance(about, TensorStorageMetadata)
        chunk = ChunkStorageMetadata(self._offsets, self._out.size())
        return LoadPlan(create_read_items_for_chunk_list(self._name, about, [chunk]))

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Where it goes."""
        return self._out
