"""What the pools run to test saving and restoring, on the tiny model of ``tests.cases``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from parallel.config import EngineConfig
from parallel.engine import Engine
from parallel.groups import Groups
from tests.cases import TINY, here, my_micro_batches
from tests.engine_cases import OPTIM, STAGE, poison_on, state, step_on, tiny_engine
from trainer import checkpoint
from trainer.build import make_engine


class Blocked:
    """An engine one of whose ranks finds a folder where its file should go."""

    def __init__(self, engine: Engine, building: Path):
        self._engine, self._building = engine, building

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def fragments(self, once: bool = True) -> Any:
        """The engine's; the path of rank 1's file is taken first."""
        if here().rank == 1:
            (self._building / "rank_00001.safetensors").mkdir()
        return self._engine.fragments(once)


def save_with_a_blocked_rank(folder: str, zero: Any) -> dict[str, Any]:
    """Save step 1, fail on rank 1 in step 2, save step 3."""
    groups, path = here(), Path(folder)
    engine = tiny_engine(zero, groups)
    first = checkpoint.save(path, 1, engine, _state(groups, 1), groups, 2)
    groups.barrier()
    before = {file.name: file.read_bytes() for file in first.iterdir()}
    groups.barrier()
    out: dict[str, Any] = {"error": ""}
    try:
        blocked: Any = Blocked(engine, path / "step_0000002.building")
        checkpoint.save(path, 2, blocked, _state(groups, 2), groups, 2)
    except ValueError as error:
        out["error"] = str(error)
    groups.barrier()
    out["names"] = sorted(file.name for file in path.iterdir())
    out["same"] = {file.name: file.read_bytes() for file in first.iterdir()} == before
    out["latest"] = str(checkpoint.find_latest(path))
    groups.barrier()
    out["third"] = str(checkpoint.save(path, 3, engine, _state(groups, 3), groups, 2))
    return out


def _state(groups: Groups, step: int) -> dict[str, Any]:
    return {"position": 8 * step, "world": groups.world, "model": {}, "data": ""}


def trained(folder: str, zero: Any, steps: int) -> dict[str, Any]:
    """Train ``steps`` fp16 steps, of which the data's odd ones overflow, save, and tell the whole state."""
    groups = here()
    engine = tiny_engine(zero, groups, precision="fp16")
    for number in range(steps):
        forward = poison_on(0, float("inf")) if number % 2 else STAGE.forward
        step_on(engine, my_micro_batches(number, groups, 2), groups, forward)
    torch.manual_seed(40 + groups.rank)
    checkpoint.save(Path(folder), steps, engine, _state(groups, steps), groups, 2)
    return _everything(engine, groups)


def restored(folder: str, zero: Any, precision: Any) -> dict[str, Any]:
    """An engine built from the latest checkpoint, in the state that it was restored to."""
    groups = here()
    found = checkpoint.find_latest(Path(folder))
    assert found is not None
    torch.manual_seed(0)
    saved = checkpoint.Checkpoint(found)
    engine = make_engine(TINY, EngineConfig(zero=zero, precision=precision), OPTIM, groups, saved)
    checkpoint.restore(saved, engine, groups)
    return _everything(engine, groups)


def _everything(engine: Engine, groups: Groups) -> dict[str, Any]:
    draw = torch.rand(3).tolist()
    return state(engine, groups) | {
        "steps": engine.optimizer_steps, "scale": engine.loss_scale.state(), "draw": draw
    }  # fmt: skip
