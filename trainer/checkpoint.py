"""Checkpoints that belong to the model: flat fp32 pieces of named parameters and their AdamW states.

    checkpoints/
      latest                       name of the newest complete checkpoint
      step_0000100/
        state.json                 step, data position, loss scale, shapes, cuts, where every piece lies
        rank_00000.safetensors     "<kind>/<name>@<cut>:<start>" -> 1-D piece; kind is param, exp_avg or exp_avg_sq

Every element is written once, by the rank that owns it, whatever the layout (key/value heads that lie on several tp
ranks, by each of those). A piece is a flat range of the part of a parameter that one cut gives; any other layout reads
the ranges it needs, tensor by tensor. A folder appears under its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from parallel.engine import Engine
from parallel.groups import Groups
from parallel.sharding import Cut, Shard

FORMAT = 2
STATE = "state.json"


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints below ``folder``, oldest first."""
    complete = [path for path in folder.glob("step_*") if path.name[5:].isdigit() and (path / STATE).is_file()]
    return sorted(complete, key=_step_of)


def _step_of(checkpoint: Path) -> int:
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


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(folder: Path, step: int, engine: Engine, state: dict[str, Any], groups: Groups, keep_last: int) -> Path:
    """Write a checkpoint together; every rank calls this.

    Args:
        folder: the run's checkpoint folder.
        state: JSON values to keep beside the tensors (data position, …).
        keep_last: checkpoints up to this step that stay; older ones are removed after the new one is complete.

    Raises:
        ValueError: some rank could not write (disk full, no permission); nothing already saved is touched.
    """
    final = folder / f"step_{step:07d}"
    building = folder / f"step_{step:07d}.building"
    if groups.is_main:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    groups.barrier()
    outcome = groups.all_gather(_write_rank(building, engine, groups))
    problems = [message for message, _ in outcome if message]
    if not problems and groups.is_main:
        problems = _complete(building, final, step, engine, state, [pieces for _, pieces in outcome])
    problems = groups.all_gather(problems)[0]
    if problems:
        if groups.is_main:
            shutil.rmtree(building, ignore_errors=True)
        last = find_latest(folder)
        earlier = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise ValueError(
            f"checkpoint of step {step} could not be written to {folder}: {problems[0]}. "
            f"Nothing saved before was touched; {earlier}. "
            "Free space or set run.dir to another disk, then start again with the same run.name to resume."
        )
    if groups.is_main:
        _prune(folder, step, keep_last)
    groups.barrier()
    return final


def _write_rank(building: Path, engine: Engine, groups: Groups) -> tuple[str, list[dict[str, Any]]]:
    """Write this rank's pieces. Returns (problem or "", where each piece belongs)."""
    tensors: dict[str, torch.Tensor] = {"rng": torch.get_rng_state()}
    pieces = []
    for piece in engine.fragments():
        cut = piece.shard.cuts(piece.cut.tp, piece.cut.ep).index(piece.cut)
        described = {"shape": piece.whole, "shard": dataclasses.asdict(piece.shard), "cut": cut}
        place = {"name": piece.name, "start": piece.start, "numel": piece.master.numel()}
        pieces.append(place | described | {"tp": piece.cut.tp, "ep": piece.cut.ep})
        for kind, tensor in {"param": piece.master, **piece.states}.items():
            tensors[f"{kind}/{piece.name}@{cut}:{piece.start}"] = tensor.detach().cpu()
    path = building / f"rank_{groups.rank:05d}.safetensors"
    try:
        save_file(tensors, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        return f"rank {groups.rank}: {error}", []
    return "", pieces


def _complete(building: Path, final: Path, step: int, engine: Engine, state: dict[str, Any], pieces: list) -> list[str]:
    """Write state.json and give the folder its name. Returns problems."""
    names = _index(pieces)
    training = {"optimizer_steps": engine.optimizer_steps, "loss_scale": engine.loss_scale.state()}
    aside = final.with_name(final.name + ".deleting")
    moved = False  # the run went back and came to this step anew: on a failure the earlier one returns
    try:
        write_atomic(
            building / STATE, json.dumps({"format": FORMAT, "step": step, **state, **training, "tensors": names})
        )
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            os.replace(final, aside)
            moved = True
        os.replace(building, final)
        write_atomic(final.parent / "latest", final.name + "\n")
    except OSError as error:
        if moved:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)
        return [str(error)]
    shutil.rmtree(aside, ignore_errors=True)
    return []


def _index(pieces: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Of every tensor its whole shape, how it is cut, and its pieces as [rank, cut, start, numel]."""
    names: dict[str, Any] = {}
    for rank, owned in enumerate(pieces):
        for piece in owned:
            about = {key: piece[key] for key in ("shape", "shard", "tp", "ep")}
            entry = names.setdefault(piece["name"], about | {"pieces": []})
            assert all(entry[key] == value for key, value in about.items()), f"ranks disagree about {piece['name']}"
            entry["pieces"].append([rank, piece["cut"], piece["start"], piece["numel"]])
    for name, entry in names.items():
        saved = Saved.of(entry)
        for i, cut in enumerate(saved.cuts):
            whole = torch.Size(saved.shard.local_shape(saved.shape, cut)).numel()
            held = sum(numel for _, at, _, numel in entry["pieces"] if at == i)
            assert held == whole, f"{name}: the ranks hold {held} of {whole} elements of {cut}"
    return names


@dataclass(frozen=True)
class Saved:
    """How one tensor lies in a checkpoint."""

    shape: tuple[int, ...]
    shard: Shard
    cuts: tuple[Cut, ...]
    pieces: tuple[tuple[int, int, int, int], ...]
    """(rank, cut, start, numel)"""

    @staticmethod
    def of(entry: dict[str, Any]) -> Saved:
        """From the entry in ``state.json``."""
        about = dict(entry["shard"])
        about |= {key: tuple(about[key]) for key in ("parts", "units")}
        shard = Shard(**about)
        pieces = tuple((rank, cut, start, numel) for rank, cut, start, numel in entry["pieces"])
        return Saved(tuple(entry["shape"]), shard, tuple(shard.cuts(entry["tp"], entry["ep"])), pieces)


def _prune(folder: Path, step: int, keep_last: int) -> None:
    """Remove checkpoints before ``step`` beyond the last few.

    Later steps are of a run that lay here before this one started over or went back; they are left alone, for counted
    among the last few they would push out what was just written.
    """
    done = [path for path in checkpoints_in(folder) if _step_of(path) <= step]
    for old in done[:-keep_last]:
        doomed = old.with_name(old.name + ".deleting")
        try:
            os.replace(old, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.warn(f"the old checkpoint {old} could not be removed: {error}", stacklevel=2)


class Checkpoint:
    """A saved checkpoint, read by range. Also a ``TensorSource`` of whole weights.

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
                f"{folder} has checkpoint format {found}; this version of Loom reads {FORMAT}. Resume with the version "
                "that wrote it, or set run.resume=never."
            )
        self.tensors = {name: Saved.of(entry) for name, entry in self.state["tensors"].items()}
        ranks = {rank for saved in self.tensors.values() for rank, *_ in saved.pieces}
        gone = [path.name for rank in sorted(ranks) if not (path := self._path(rank)).is_file()]
        if gone:
            raise ValueError(
                f"{folder} is not whole: {', '.join(gone[:5])} missing. "
                "Resume from another checkpoint with run.resume=PATH."
            )
        self._files: dict[int, Any] = {}
        self._last: tuple[tuple[str, str], torch.Tensor] | None = None

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.safetensors"

    def _open(self, rank: int) -> Any:
        if rank not in self._files:
            path = self._path(rank)
            try:
                self._files[rank] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"cannot read {path}: {error}. Resume from an earlier checkpoint with run.resume=PATH."
                ) from error
        return self._files[rank]

    def names(self) -> list[str]:
        """Parameter names, in the model's order."""
        return list(self.tensors)

    def _range(self, kind: str, name: str, cut: int, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened part that a cut gives, fp32."""
        out = torch.empty(numel, dtype=torch.float32)
        for rank, of, at, size in self.tensors[name].pieces:
            low, high = max(start, at), min(start + numel, at + size)
            if of == cut and low < high:
                piece = self._open(rank).get_slice(f"{kind}/{name}@{cut}:{at}")
                out[low - start : high - start] = piece[low - at : high - at]
        return out

    def read_range(self, kind: str, name: str, cut: Cut, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of the flattened part that ``cut`` gives of a tensor, fp32.

        Where the checkpoint is cut alike, no more than these is read.
        """
        saved = self.tensors[name]
        own = saved.shard.own(cut)
        if own in saved.cuts:
            return self._range(kind, name, saved.cuts.index(own), start, numel)
        return saved.shard.slice(self.whole(kind, name), own).reshape(-1)[start : start + numel]

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """One whole tensor, fp32; the last one is kept for the next range of it."""
        if self._last is None or self._last[0] != (kind, name):
            saved = self.tensors[name]
            parts = {}
            for i, cut in enumerate(saved.cuts):
                shape = torch.Size(saved.shard.local_shape(saved.shape, cut))
                parts[cut] = self._range(kind, name, i, 0, shape.numel()).view(shape)
            self._last = (kind, name), saved.shard.merge(parts)
        return self._last[1]

    def tensor(self, name: str) -> torch.Tensor:
        """The whole weight, fp32."""
        return self.whole("param", name)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every whole weight, one at a time."""
        return ((name, self.tensor(name)) for name in self.names())

    def restore(self, engine: Engine, groups: Groups) -> None:
        """Fill this rank's optimizer states; the weights came through ``tensor`` when the engine was built."""
        for piece in engine.fragments(once=False):
            for kind, view in piece.states.items():
                view.copy_(self.read_range(kind, piece.name, piece.cut, piece.start, view.numel()))
        engine.optimizer_steps = self.state["optimizer_steps"]
        engine.loss_scale.restore(self.state["loss_scale"])
        if self.state["world"] == groups.world:
            torch.set_rng_state(self._open(groups.rank).get_tensor("rng"))
        self._files.clear()
        self._last = None
