"""A run's checkpoints: the one to go on from, and what is kept beside the weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.routing import RouterBook
from parallel.engine import Engine
from parallel.groups import Groups
from trainer import checkpoint, folders, parts
from trainer.adapters import other_adapter, record
from trainer.config import RunConfig
from trainer.loop import Progress


def to_resume(cfg: RunConfig, run_dir: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from; None for a fresh run.

    Raises:
        ValueError: it holds another model.
    """
    if cfg.run.resume == "never":
        return None
    folder = checkpoint.find_latest(run_dir / "checkpoints") if cfg.run.resume == "auto" else Path(cfg.run.resume)
    if folder is None:
        return None
    try:
        saved = checkpoint.Checkpoint(folder)
    except ValueError as error:
        others = [str(path) for path in checkpoint.checkpoints_in(folder.parent) if path != folder]
        hint = f" The others of this run: {', '.join(others)}." if others else ""
        raise ValueError(f"{error}{hint}") from error
    theirs, ours = _flat(saved.state["model"]), _flat(plain(cfg.model))
    differ = [f"{key}: {theirs.get(key)} -> {value}" for key, value in ours.items() if theirs.get(key) != value]
    if differ:
        raise ValueError(
            f"cannot resume from {folder}: it holds another model ({'; '.join(differ)}). "
            "Take another run.name, or run.resume=never to start this run again."
        )
    other = other_adapter(cfg, saved.state.get("adapter")) or parts.other_parts(cfg, saved.state.get("parts"))
    if other is not None:
        raise ValueError(
            f"cannot resume from {folder}: {other}. Take another run.name, or run.resume=never to start this run again."
        )
    return saved


def _flat(model: dict[str, Any]) -> dict[str, Any]:
    """What a model is, as `model.moe.top_k: 2`; how its routers are trained may change between runs."""
    flat: dict[str, Any] = {}
    for key, value in model.items():
        inner = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
        flat |= {f"model.{name}": each for name, each in inner.items()}
    trained_as = {f"model.moe.{name}" for name in folders.ROUTER_TRAINING}
    return {key: value for key, value in flat.items() if key not in trained_as}


def plain(section: Any) -> dict[str, Any]:
    """A dataclass as JSON has it: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(section)))


def save(
    cfg: RunConfig,
    model: ModelConfig,
    run_dir: Path,
    engine: Engine,
    routers: RouterBook,
    groups: Groups,
    fingerprint: str,
    progress: Progress,
    keep_last: int | None = None,
) -> Path:
    """Write a checkpoint together. Returns its folder.

    Args:
        model: what ``engine`` trains.
        fingerprint: of the data, to tell whether a resumed run goes on with the same.
        keep_last: None = run.keep_last.
    """
    state = {
        "routers": groups.gather_stages(routers.state()) if model.moe is not None else [],
        "position": progress.position,
        "world": groups.world,
        "model": plain(model),
        "adapter": record(cfg) if model == cfg.model else None,
        "parts": parts.record(cfg) if model == cfg.model else None,
        "data": fingerprint,
        "tokenizer": str(Path(cfg.data.tokenizer or "").absolute()),  # read again by who starts from it elsewhere
        "chat_template": cfg.data.chat_template and str(Path(cfg.data.chat_template).absolute()),
    }
    kept = cfg.run.keep_last if keep_last is None else keep_last
    return checkpoint.save(run_dir / "checkpoints", progress.step, engine, state, groups, kept)
