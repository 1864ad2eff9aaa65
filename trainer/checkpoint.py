"""Checkpoints that belong to the model: flat fp32 pieces of named parameters and their AdamW states.

Saving and resuming stand here; `convert.loom_files` reads them.

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
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from convert.loom_files import FORMAT, STATE, Checkpoint, Saved, checkpoints_in, find_latest, step_of
from parallel.engine import Engine
from parallel.groups import Groups


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


def _prune(folder: Path, step: int, keep_last: int) -> None:
    """Remove checkpoints before ``step`` beyond the last few.

    Later steps are of a run that lay here before this one started over or went back; they are left alone, for counted
    among the last few they would push out what was just written.
    """
    done = [path for path in checkpoints_in(folder) if step_of(path) <= step]
    for old in done[:-keep_last]:
        doomed = old.with_name(old.name + ".deleting")
        try:
            os.replace(old, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.warn(f"the old checkpoint {old} could not be removed: {error}", stacklevel=2)


def restore(saved: Checkpoint, engine: Engine, groups: Groups) -> None:
    """Fill this rank's optimizer states; the weights came through ``part`` when the engine was built."""
    for piece in engine.fragments(once=False):
        for kind, view in piece.states.items():
            view.copy_(saved.read_range(kind, piece.name, piece.cut, piece.start, view.numel()))
    engine.optimizer_steps = saved.state["optimizer_steps"]
    engine.loss_scale.restore(saved.state["loss_scale"])
    if saved.state["world"] == groups.world:
        torch.set_rng_state(saved.random_state(groups.rank))
    saved.forget()
