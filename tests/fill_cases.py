"""What the pools run to test how a model is filled, whole and partitioned."""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
import weakref
from typing import Any

import torch

from models import build
from models.init import InitSource
from parallel.config import EngineConfig
from parallel.ds_config import ds_config
from parallel.materialise import TensorSource, materialise
from tests.cases import TINY, here
from tests.engine_cases import tiny_engine
from trainer.optim import decay_groups


class CountedSource(TensorSource):
    """Whole tensors whose memory is watched: the most bytes that were alive when another one was asked for.

    Args:
        allowed: bytes above which a moment is given for what was sent to be let go; None = none is.
    """

    def __init__(self, source: Any, allowed: int | None = None):
        self.source, self.allowed = source, allowed
        self.alive: dict[str, int] = {}
        self.most, self.asked = 0, 0

    def wait_for(self, most: int) -> None:
        """Gloo's thread lets go of what it sent last a moment after the call is done; DeepSpeed leaves cycles, and when
        Python finds those depends on the tests before."""
        gc.collect()
        end = time.monotonic() + 2.0
        while sum(self.alive.values()) > most and time.monotonic() < end:
            time.sleep(0.01)
            gc.collect()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, on an array that tells when the last tensor on it is gone."""
        array = self.source.tensor(name).numpy().copy()
        self.wait_for(sys.maxsize if self.allowed is None else self.allowed - array.nbytes)
        self.asked += 1
        self.alive[name] = array.nbytes
        weakref.finalize(array, self.alive.pop, name)
        self.most = max(self.most, sum(self.alive.values()))
        return torch.from_numpy(array)


def alive_while_filling(partition: bool) -> dict[str, int]:
    """Bytes of whole tensors alive at most, and at the end, while the tiny model (with biases) is filled."""
    groups = here()
    tiny_engine(0, groups)  # an engine sets DeepSpeed up, as it does in a run before it fills a model
    cfg = dataclasses.replace(TINY, qkv_bias=True, attention_out_bias=True, mlp_bias=True)
    model = build(cfg, groups.place())
    sizes = {name: 4 * p.numel() for name, p in model.named_parameters()}
    leaves = [sum(4 * p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    source = CountedSource(InitSource(cfg, 3), max(leaves) if partition else None)
    config = ds_config(EngineConfig(zero=3), 0.0, groups.device.type) if partition else None
    materialise(model, source, groups.place().cut, groups.device, config)
    source.wait_for(0 if partition else sys.maxsize)
    left = sum(source.alive.values())
    whole_parts = sum(p.numel() for p in model.parameters())
    return {
        "most": source.most, "left": left, "leaf": max(leaves), "model": sum(sizes.values()),
        "asked": source.asked, "parameters": len(sizes), "elements_here": whole_parts,
    }  # fmt: skip


def decay_shapes(partition: bool) -> list[tuple[float, list[tuple[int, ...]]]]:
    """(decay, whole shapes) of the two optimizer groups, from a model that is partitioned or not."""
    groups = here()
    tiny_engine(0, groups)  # sets DeepSpeed up
    model = build(TINY, groups.place())
    config = ds_config(EngineConfig(zero=3), 0.0, groups.device.type) if partition else None
    materialise(model, InitSource(TINY, 3), groups.place().cut, groups.device, config)
    pair: list[dict[str, Any]] = [dict(group) for group in decay_groups(model, 0.1)]
    return [
        (float(g["weight_decay"]), sorted(tuple(getattr(p, "ds_shape", p.shape)) for p in g["params"])) for g in pair
    ]
