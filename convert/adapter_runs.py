"""A run that trained an adapter, opened: its base with the adapter folded in, or the adapter alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from convert.adapters import AdapterWeights, Fresh, config_of, fingerprint, merged, trained
from convert.loom_files import Checkpoint, find_checkpoint, open_loom, words_of
from convert.opened import Opened
from convert.opening import open_weights
from models.config import ModelConfig


def adapter_of(checkpoint: Checkpoint, model: ModelConfig) -> AdapterWeights:
    """What the run trained.

    Raises:
        ValueError: it was written by another version of Loom.
    """
    try:
        cfg = config_of(checkpoint.state["adapter"]["config"])
        return trained(checkpoint, checkpoint.names(), model, cfg)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{checkpoint.folder} was written by another version of Loom: {error}") from error


def base_of(checkpoint: Checkpoint, model: ModelConfig) -> Opened:
    """What it was trained beside.

    Raises:
        ValueError: it is gone, or holds other weights by now.
    """
    about = checkpoint.state["adapter"]
    if about["base"] is None:
        return Opened(checkpoint.folder, "loom", model, Fresh(model, about["seed"]), None)
    path = Path(about["base"])
    help_ = (
        "put it back as it was, or make full weights from another copy of it with python convert/merge_adapter.py "
        f"--base DIR --adapter {checkpoint.folder} --out DIR"
    )
    if not path.is_dir():
        raise ValueError(f"{checkpoint.folder} holds an adapter, and its base {path} is not there any more: {help_}")
    base = open_weights(path)
    if fingerprint(base) != about["fingerprint"]:
        raise ValueError(
            f"{checkpoint.folder} holds an adapter, and its base {path} has other weights than it was trained with: "
            f"{help_}"
        )
    return base


def open_adapter_run(checkpoint: Checkpoint, model: ModelConfig) -> Opened:
    """The full model of a run that trained an adapter.

    Raises:
        ValueError: its base is gone, or holds other weights by now.
    """
    base = base_of(checkpoint, model)
    opened = merged(base, model, adapter_of(checkpoint, model))
    files, template = words_of(checkpoint)
    return dataclasses.replace(
        opened, path=checkpoint.folder, format="loom", files=files or base.files, layout=None, chat_template=template
    )


def is_adapter_run(path: Path) -> bool:
    """Whether a folder is a run, or a checkpoint of one, that trained an adapter."""
    found = find_checkpoint(path)
    return found is not None and Checkpoint(found).state.get("adapter") is not None


__all__ = ["adapter_of", "base_of", "is_adapter_run", "open_adapter_run", "open_loom"]
