"""Training starts from any opened checkpoint: a rank reads the rows and columns that are its own, and no others."""

from collections.abc import Iterator

import torch

from convert.boxes import boxes
from convert.from_hf import fitting, lacking, weight_rules, whole_shapes
from convert.opened import Opened
from models.config import ModelConfig
from models.init import InitSource
from parallel.materialise import TensorSource
from parallel.sharding import REPLICATED, WHOLE, Cut, Shard

BLOCK_BYTES = 64 * 2**20
"""Most bytes of a stored tensor that are in memory beside the parameter they go into."""


class Source(TensorSource):
    """Weights by Loom's parameter names from an opened checkpoint, fp32 on the CPU.

    What it lacks and need not have (a scalar head of a language model becoming a reward model; see
    `convert.from_hf.lacking`) is drawn from `seed`.

    Args:
        opened: the checkpoint; no more is read of it than what is asked for.
        cfg: the model to be filled; what changes no tensor (rope, a scalar head) may differ from the checkpoint's.
        seed: of what is fresh.
    """

    def __init__(self, opened: Opened, cfg: ModelConfig, seed: int = 0) -> None:
        self.opened, self.cfg = opened, cfg
        self._shapes, self._rules = whole_shapes(cfg), weight_rules(cfg)[0]
        lacks = lacking(cfg, opened.tensors.metas)
        self._lacks = {name for name, rule in self._rules.items() if lacks.intersection(rule.sources)}
        self._fresh = InitSource(cfg, seed) if self._lacks else None

    def check(self) -> None:
        """Compare every name and shape with the model, reading no value.

        Raises:
            ValueError: tensors are missing, have another shape, or belong to another model; names the first five.
        """
        path = self.opened.path
        fitting(path, self.cfg, {hf: meta.shape for hf, meta in self.opened.tensors.metas.items()})

    @property
    def fresh_head(self) -> bool:
        """Whether the scalar head starts from fresh weights, because the checkpoint has none."""
        return "head.weight" in self._lacks

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor of our parameter or buffer `name`."""
        return self.part(name, REPLICATED, WHOLE)

    def part(self, name: str, shard: Shard, cut: Cut) -> torch.Tensor:
        """What `cut` gives of it. Rows that are padding are zeros."""
        if self._fresh is not None and name in self._lacks:
            return self._fresh.part(name, shard, cut)
        whole = self._shapes[name]
        out = torch.zeros(shard.local_shape(whole, cut))
        rows = out.view(-1, out.shape[-1]) if out.ndim > 1 else out
        for box in boxes(self._rules[name].segments(whole), whole, shard, cut):
            meta = self.opened.tensors.metas[box.hf]
            wide = meta.shape[-1] if len(meta.shape) > 1 else 1
            step = max(BLOCK_BYTES // (wide * meta.dtype.itemsize), 1)
            for start in range(box.start, box.stop, step):
                stop, at = min(start + step, box.stop), box.at + start - box.start
                rows[at : at + stop - start] = self.opened.tensors.rows(box.hf, start, stop, box.columns)
        return out

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every whole tensor under its name, one at a time."""
        return ((name, self.tensor(name)) for name in self._shapes)
