"""A run that trained an adapter, opened: its base with the adapter folded in, or the adapter alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from convert.adapters import AdapterWeights, Fresh, Merged, config_of, fingerprint, merged, trained
from convert.loom_files import Checkpoint, find_checkpoint, model_of, open_loom, words_of
from convert.opened import Opened
from convert.opening import open_weights
from convert.virtual import is_virtual
from models.adapters.attach import attach
from models.adapters.virtual import VirtualSource
from models.adapters.virtual_config import PrefixConfig, PromptConfig
from models.config import ModelConfig
from models.decoder import Decoder
from parallel.materialise import TensorSource


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


def open_beside(path: Path, files: Path | None = None) -> tuple[Opened, AdapterWeights | None]:
    """What `open_weights` opens; of a run that trained virtual tokens, which no weights can hold, its base and them.

    Raises:
        ValueError: as of `open_weights`.
    """
    found = find_checkpoint(path)
    about = None if found is None else Checkpoint(found).state.get("adapter")
    if found is None or about is None or not is_virtual(config_of(about["config"])):
        return open_weights(path, files), None
    checkpoint = Checkpoint(found)
    model = model_of(checkpoint)
    base, adapter = base_of(checkpoint, model), adapter_of(checkpoint, model)
    own, template = words_of(checkpoint)
    beside = Merged(base.tensors, model, dataclasses.replace(adapter, tensors={}))  # a scalar head, if there is one
    opened = Opened(found, "loom", model, beside, files or own or base.files, chat_template=template)
    return opened, adapter


def with_virtual(model: Decoder, source: TensorSource, adapter: AdapterWeights | None) -> TensorSource:
    """Put the virtual tokens of a run on a model on the meta device: where all its weights come from then."""
    if adapter is None:
        return source
    assert isinstance(adapter.cfg, PromptConfig | PrefixConfig)
    attach(model, adapter.cfg)
    start = {key.module: tensor for key, tensor in adapter.tensors.items()}
    return VirtualSource(source, model.cfg, adapter.cfg, 0, start=start)


def is_adapter_run(path: Path) -> bool:
    """Whether a folder is a run, or a checkpoint of one, that trained an adapter."""
    found = find_checkpoint(path)
    return found is not None and Checkpoint(found).state.get("adapter") is not None


__all__ = ["adapter_of", "base_of", "is_adapter_run", "open_adapter_run", "open_loom"]
