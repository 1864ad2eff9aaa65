"""Reading the checkpoints of Loom's runs, at whatever layout and ZeRO stage they were written.

    checkpoints/
      latest                       name of the newest complete checkpoint
      step_0000100/
        state.json                 step, model, …, and of every tensor how it is cut and where its pieces lie
        rank_00000.safetensors     "<kind>/<name>@<cut>:<start>" -> 1-D piece; kind is param, exp_avg or exp_avg_sq

A piece is a flat fp32 range of the part of a parameter that one cut gives. `trainer.checkpoint` writes them.
"""

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from convert.boxes import Meta, Pieces, boxes
from convert.from_hf import hf_shapes, weight_rules, whole_shapes
from convert.opened import Opened
from convert.stored import StoredTensor, read_header
from models.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from models.seeing import vision_of
from parallel.materialise import TensorSource
from parallel.sharding import Cut, Shard

FORMAT = 2
STATE = "state.json"


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints below ``folder``, oldest first."""
    complete = [path for path in folder.glob("step_*") if path.name[5:].isdigit() and (path / STATE).is_file()]
    return sorted(complete, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name[5:])


def find_latest(folder: Path) -> Path | None:
    """The newest complete checkpoint: the one ``latest`` names, or the newest on disk if that one is gone."""
    marker = folder / "latest"
    if marker.is_file():
        named = folder / marker.read_text().strip()
        if (named / STATE).is_file():
            return named
    complete = checkpoints_in(folder)
    return complete[-1] if complete else None


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a checkpoint, a folder of them or a run's folder means; None where there is none."""
    if (path / STATE).is_file():
        return path
    return find_latest(path) or find_latest(path / "checkpoints")


@dataclass(frozen=True)
class Saved:
    """How one tensor lies in a checkpoint."""

    shape: tuple[int, ...]
    shard: Shard
    cuts: tuple[Cut, ...]
    pieces: tuple[tuple[int, int, int, int], ...]
    """(rank, cut, start, numel)"""

    @staticmethod
    def of(entry: dict[str, Any]) -> "Saved":
        """From the entry in ``state.json``."""
        about = dict(entry["shard"])
        about |= {key: tuple(about[key]) for key in ("parts", "units")}
        shard = Shard(**about)
        pieces = tuple((rank, cut, start, numel) for rank, cut, start, numel in entry["pieces"])
        return Saved(tuple(entry["shape"]), shard, tuple(shard.cuts(entry["tp"], entry["ep"])), pieces)

    @cached_property
    def by_cut(self) -> dict[int, list[tuple[int, int, int]]]:
        """The pieces of each cut in their order, as (start, numel, rank)."""
        found: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for rank, cut, start, numel in self.pieces:
            found[cut].append((start, numel, rank))
        return {cut: sorted(pieces) for cut, pieces in found.items()}


class Checkpoint(TensorSource):
    """A saved checkpoint, read by range. Also a source of whole weights.

    Raises:
        ValueError: the folder is no checkpoint, or of another format.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.state: dict[str, Any] = json.loads((folder / STATE).read_text())
            found = self.state["format"]
        except (OSError, ValueError, TypeError, KeyError) as error:  # no file, no text, no JSON, another's JSON
            raise ValueError(
                f"{folder} is not a Loom checkpoint: {STATE}: {error}. Name a complete step_* folder of a run."
            ) from error
        if found != FORMAT:
            raise ValueError(
                f"{folder} has checkpoint format {found}; this version of Loom reads {FORMAT}. Take the version that "
                "wrote it; a run starts again with run.resume=never."
            )
        self.tensors = {name: Saved.of(entry) for name, entry in self.state["tensors"].items()}
        ranks = {rank for saved in self.tensors.values() for rank, *_ in saved.pieces}
        gone = [path.name for rank in sorted(ranks) if not (path := self._path(rank)).is_file()]
        if gone:
            raise ValueError(
                f"{folder} is not whole: {', '.join(gone[:5])} missing. "
                "Take another checkpoint of the run; a run resumes from it with run.resume=PATH."
            )
        self._headers: dict[int, dict[str, StoredTensor]] = {}
        self._last: tuple[tuple[str, str], torch.Tensor] | None = None

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.safetensors"

    def _piece(self, rank: int, key: str) -> StoredTensor:
        path = self._path(rank)
        try:
            if rank not in self._headers:
                self._headers[rank] = read_header(path)
            return self._headers[rank][key]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"cannot read {path}: {error}. Take an earlier checkpoint; a run resumes from it with run.resume=PATH."
            ) from error

    def names(self) -> list[str]:
        """Parameter names, in the model's order."""
        return list(self.tensors)

    def random_state(self, rank: int) -> torch.Tensor:
        """The state of a rank's random numbers."""
        return self._piece(rank, "rng").read()

    def forget(self) -> None:
        """Give back what is kept between reads."""
        self._headers.clear()
        self._last = None

    def flat(self, kind: str, name: str, cut: int, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened part that the cut of this number gives, fp32."""
        out = torch.empty(numel, dtype=torch.float32)
        pieces, held = self.tensors[name].by_cut[cut], 0
        for at, size, rank in pieces[max(bisect_right(pieces, (start, torch.inf)) - 1, 0) :]:
            low, high = max(start, at), min(start + numel, at + size)
            if at >= start + numel:
                break
            if low < high:
                piece = self._piece(rank, f"{kind}/{name}@{cut}:{at}")
                out[low - start : high - start] = piece.rows(low - at, high - at)
                held += high - low
        if held != numel:
            raise ValueError(
                f"{self.folder}: {STATE} names no piece for {numel - held} elements of {name}; it is damaged"
            )
        return out

    def read_range(self, kind: str, name: str, cut: Cut, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened part that ``cut`` gives of a tensor, fp32.

        Where the checkpoint is cut alike, no more than these is read.
        """
        saved = self.tensors[name]
        own = saved.shard.own(cut)
        if own in saved.cuts:
            return self.flat(kind, name, saved.cuts.index(own), start, numel)
        return saved.shard.slice(self.whole(kind, name), own).reshape(-1)[start : start + numel]

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """One whole tensor, fp32; the last one is kept for the next range of it."""
        if self._last is None or self._last[0] != (kind, name):
            saved = self.tensors[name]
            parts = {}
            for i, cut in enumerate(saved.cuts):
                shape = torch.Size(saved.shard.local_shape(saved.shape, cut))
                parts[cut] = self.flat(kind, name, i, 0, shape.numel()).view(shape)
            self._last = (kind, name), saved.shard.merge(parts)
        return self._last[1]

    def tensor(self, name: str) -> torch.Tensor:
        """The whole weight, fp32."""
        return self.whole("param", name)

    def part(self, name: str, shard: Shard, cut: Cut) -> torch.Tensor:
        """What ``cut`` gives of a weight, fp32."""
        shape = torch.Size(shard.local_shape(self.tensors[name].shape, cut))
        return self.read_range("param", name, cut, 0, shape.numel()).view(shape)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every whole weight, one at a time."""
        return ((name, self.tensor(name)) for name in self.names())


@dataclass(frozen=True)
class Part:
    """What one cut gives of a weight, read from the pieces it was saved in. Is `Lying`."""

    checkpoint: Checkpoint
    name: str
    cut: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Weights are kept in fp32."""
        return torch.float32

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop): [stop - start, columns], or [stop - start] of a vector."""
        wide = self.shape[-1] if len(self.shape) > 1 else 1
        flat = self.checkpoint.flat("param", self.name, self.cut, start * wide, (stop - start) * wide)
        return flat.view(-1, wide) if len(self.shape) > 1 else flat


def open_loom(path: str | Path) -> Opened:
    """The checkpoint ``path`` means: itself, or the latest complete one of a run. `Opened.path` says which.

    Raises:
        ValueError: there is none, it is damaged, or of another version.
    """
    found = find_checkpoint(Path(path))
    if found is None:
        raise ValueError(
            f"{path} holds no complete checkpoint. Name a run folder (runs/NAME) or one of its checkpoints/step_* "
            "folders."
        )
    checkpoint = Checkpoint(found)
    cfg = model_of(checkpoint)
    if checkpoint.state.get("adapter") is not None:
        from convert.adapter_runs import open_adapter_run  # which opens the base, perhaps a run as well

        return open_adapter_run(checkpoint, cfg)
    if checkpoint.state.get("parts") is not None:
        from convert.part_runs import open_part_run  # the same

        return open_part_run(checkpoint, cfg)
    rules, shapes = weight_rules(cfg)[0], whole_shapes(cfg)
    unequal = [name for name in {**shapes, **checkpoint.tensors} if not _has(checkpoint, name, shapes.get(name))]
    if unequal:
        raise ValueError(
            f"{found} was written by another version of Loom: {len(unequal)} tensors are missing, have another shape "
            f"or have no place in the model, first {', '.join(unequal[:5])}. Export it with the version that wrote it."
        )
    pieces = [
        (Part(checkpoint, name, i, saved.shard.local_shape(saved.shape, cut)),
         boxes(rules[name].segments(saved.shape), saved.shape, saved.shard, cut))
        for name, saved in checkpoint.tensors.items()
        for i, cut in enumerate(saved.cuts)
    ]  # fmt: skip
    metas = {hf: Meta(torch.float32, shape) for hf, shape in hf_shapes(cfg).items()}
    files, template = words_of(checkpoint)
    return Opened(found, "loom", cfg, Pieces(metas, pieces), files, chat_template=template)


def words_of(checkpoint: Checkpoint) -> tuple[Path | None, Path | None]:
    """The folder of the tokenizer a run used, if it is still there, and the file of its chat template."""
    named, template = checkpoint.state.get("tokenizer"), checkpoint.state.get("chat_template")
    return Path(named) if named and Path(named).is_dir() else None, Path(template) if template else None


def _has(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None) -> bool:
    return name in checkpoint.tensors and checkpoint.tensors[name].shape == shape


def _section(cls: type) -> Callable[[dict[str, Any]], Any]:
    return lambda given: cls(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    )


def model_of(checkpoint: Checkpoint) -> ModelConfig:
    """The model as the run saved it beside its weights."""
    inner = {"rope": _section(RopeConfig), "moe": _section(MoEConfig), "mla": _section(MLAConfig), "vision": vision_of}
    try:
        given = dict(checkpoint.state["model"])
        given |= {key: inner[key](given[key]) for key in inner if given.get(key) is not None}
        return ModelConfig(**given)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{checkpoint.folder} was written by another version of Loom, its model is not readable: {error}. "
            "Export it with the version that wrote it."
        ) from error
