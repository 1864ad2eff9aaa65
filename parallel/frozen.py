"""A model that is never trained, in the layout of the run: a reference, a reward model. Forward only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from parallel.config import EngineConfig, ParallelConfig
from parallel.deepspeed_setup import import_deepspeed, start
from parallel.ds_config import ds_config
from parallel.engine import Forward, forward_only, in_precision
from parallel.groups import ALL_DATA, Groups
from parallel.materialise import TensorSource, materialise


class Frozen:
    """This rank's part of a model without gradients, optimizer or updates. Arguments as of ``Engine``.

    ZeRO-3 shards its weights as those of the trained model; the other stages leave them whole on every data-parallel
    rank, for they have nothing else to shard.

    Args:
        offload: on a GPU the weights lie in host memory between two ``score``s.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        source: TensorSource,
        cfg: EngineConfig,
        groups: Groups,
        layout: ParallelConfig = ALL_DATA,
        hidden_size: int = 0,
        layer_types: Sequence[type[nn.Module]] = (),
        offload: bool = False,
    ):
        self.groups, self.offload = groups, offload and groups.device.type != "cpu" and cfg.zero != 3
        config = ds_config(cfg, 0.0, groups.device.type)
        home = torch.device("cpu") if self.offload else groups.device
        zero3 = (config, groups.data.group) if cfg.zero == 3 else ()
        if zero3:
            import_deepspeed()
        for chunk in chunks:
            chunk.requires_grad_(False)
            materialise(chunk, source, groups.place().cut, home, *zero3)
        runnable = [in_precision(chunk.eval(), cfg, groups.device) for chunk in chunks]
        self.module = runnable[0] if len(runnable) == 1 else nn.ModuleList(runnable)
        self._run: Any = self._sharded(config, layer_types) if zero3 else self.module
        self.pipeline: Any = None
        if groups.pp.size > 1:
            from parallel.pipeline import Pipeline  # brings torch's pipelines in, more than a second to import

            self.pipeline = Pipeline(runnable, layout, groups.pp, groups.device, hidden_size)

    def _sharded(self, config: dict[str, Any], layer_types: Sequence[type[nn.Module]]) -> Any:
        """DeepSpeed's engine without an optimizer, which gathers layers as they run."""
        deepspeed = import_deepspeed()
        if layer_types:
            deepspeed.utils.set_z3_leaf_modules(self.module, list(layer_types))
        engine = start(self.module, None, config, self.groups, False)
        engine.eval()
        return engine

    @torch.no_grad()
    def score(self, micro_batches: Sequence[Any], forward: Forward) -> list[Any]:
        """As ``Engine.score``."""
        if self.offload:
            self._move(self.groups.device)
        found = forward_only(self._run, self.pipeline, micro_batches, forward)
        if self.offload:
            self._move(torch.device("cpu"))
        return found

    def _move(self, device: torch.device) -> None:
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.data = tensor.data.to(device)
