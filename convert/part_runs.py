"""A run that trained parts of a model, opened: what it started from, with what it trained in its place.

Its checkpoint holds what was trained, and says where the rest lies and what that is told by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from convert.adapters import Fresh, fingerprint
from convert.boxes import Columns, Meta, Tensors
from convert.composed import composed
from convert.from_hf import hf_shapes, weight_rules
from convert.loom_files import Checkpoint, words_of
from convert.opened import Opened
from convert.opening import open_weights
from models.config import ModelConfig
from parallel.materialise import TensorSource
from parallel.sharding import Cut, Shard


@dataclass(frozen=True)
class Over(TensorSource):
    """The weights of a checkpoint, and of a base where it holds none."""

    saved: Checkpoint
    base: TensorSource

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor of parameter or buffer `name`."""
        return (self.saved if name in self.saved.tensors else self.base).tensor(name)

    def part(self, name: str, shard: Shard, cut: Cut) -> torch.Tensor:
        """What `cut` gives of it."""
        return (self.saved if name in self.saved.tensors else self.base).part(name, shard, cut)


class Trained(Tensors):
    """Whole weights by Hugging Face names: those of a checkpoint, and of a base where it holds none."""

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig, base: Tensors) -> None:
        self.checkpoint, self.base = checkpoint, base
        self._rules = weight_rules(model)[0]
        self._of = {hf: name for name in checkpoint.tensors for hf in self._rules[name].sources}
        self._metas = {
            hf: Meta(torch.float32, shape) if hf in self._of else base.metas[hf]
            for hf, shape in hf_shapes(model).items()
            if hf in self._of or hf in base.metas
        }
        self._last: tuple[str, dict[str, torch.Tensor]] | None = None

    @property
    def metas(self) -> Mapping[str, Meta]:
        """Every tensor there is, in the order of the model."""
        return self._metas

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, all columns or some."""
        if hf not in self._of:
            return self.base.rows(hf, start, stop, columns)
        name = self._of[hf]
        if self._last is None or self._last[0] != name:
            self._last = name, self._rules[name].to_hf(self.checkpoint.tensor(name))
        whole = self._last[1][hf]
        found = whole.reshape(-1, whole.shape[-1])[start:stop] if whole.ndim > 1 else whole.reshape(-1)[start:stop]
        return found if columns is None else found[:, slice(*columns)]


def base_of(checkpoint: Checkpoint, model: ModelConfig) -> Opened:
    """What a run that trained parts started from.

    Raises:
        ValueError: it is gone, or holds other weights by now.
    """
    about = checkpoint.state["parts"]
    if about["base"] is None:
        return Opened(checkpoint.folder, "loom", model, Fresh(model, about["seed"]), None)
    help_ = "put it back as it was; a run with optim.parts keeps only what it trained"
    if isinstance(about["base"], dict):
        return _checked(checkpoint, composed(model, about["base"], about["seed"]), help_)
    path = Path(about["base"])
    if not path.is_dir():
        raise ValueError(
            f"{checkpoint.folder} holds parts of a model, and {path}, where the rest lay, is gone: {help_}"
        )
    return _checked(checkpoint, open_weights(path), help_)


def _checked(checkpoint: Checkpoint, base: Opened, help_: str) -> Opened:
    if fingerprint(base) != checkpoint.state["parts"]["fingerprint"]:
        raise ValueError(
            f"{checkpoint.folder} holds parts of a model, and the rest in {base.path} is not what it was trained with: "
            f"{help_}"
        )
    return base


def open_part_run(checkpoint: Checkpoint, model: ModelConfig) -> Opened:
    """The whole model of a run that trained parts of it.

    Raises:
        ValueError: the rest of it is gone, or something else by now; or another version of Loom wrote it.
    """
    rules = weight_rules(model)[0]
    unknown = [name for name in checkpoint.tensors if name not in rules]
    if unknown:
        raise ValueError(
            f"{checkpoint.folder} was written by another version of Loom: {len(unknown)} tensors have no place in the "
            f"model, first {', '.join(unknown[:5])}. Export it with the version that wrote it."
        )
    base = base_of(checkpoint, model)
    files, template = words_of(checkpoint)
    tensors = Trained(checkpoint, model, base.tensors)
    return Opened(checkpoint.folder, "loom", model, tensors, files or base.files, chat_template=template)
