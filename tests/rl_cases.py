"""What the pools run for reinforcement learning: the policy's weights in the generator, and whole steps."""

from __future__ import annotations

from typing import Any

import torch

import models
from models import ModelConfig
from models.init import InitSource
from models.routing import RouterBook
from parallel.config import EngineConfig, ParallelConfig
from parallel.groups import neighbours
from parallel.sharding import Place, shard_of
from tests.cases import NAMES, here, my_parts, whole
from trainer.optim import OptimConfig
from trainer.rl.weights import GeneratorWeights
from trainer.build import make_engine
from trainer.stages.next_token import NextToken


def moved_weights(model: ModelConfig, layout: ParallelConfig, zero: Any, tp: int, drop: bool = False) -> dict[str, Any]:
    """Train two steps, fill the generator before and after: how many of its tensors differ from what was trained."""
    groups = here(layout)
    optim = OptimConfig(lr=1e-2, eps=1e-4)
    engine = make_engine(model, EngineConfig(zero=zero), optim, groups, InitSource(model, seed=3), layout)
    place = Place(tp=neighbours(groups, tp, 300))
    weights = GeneratorWeights(engine, models.build(model, place))
    stage, routers = NextToken(len(NAMES)), RouterBook(engine.chunks, len(NAMES))
    out: dict[str, Any] = {"shared": weights.shared, "differ": [], "names": 0}
    weights.fill()
    first = {name: param.detach().clone() for name, param in weights.model.named_parameters()}
    for step in range(2):
        batches = my_parts(step, groups, layout, 1)
        count, tokens = groups.sum([stage.count(batches), float(sum(len(batch.tokens_T) for batch in batches))])
        routers.begin(groups.data.size / tokens)
        engine.train_step(batches, stage.forward, count, 1e-2)
        routers.finish(groups.sum_tensor)
    if drop:
        weights.drop()
        out["dropped"] = sum(p.numel() for p in weights.model.parameters())
    weights.fill()
    trained = whole(engine, groups, "master")
    held = dict(weights.model.named_parameters()) | dict(weights.model.named_buffers())
    assert held.keys() == trained.keys()
    for name, tensor in held.items():
        if name in first:
            shard = shard_of(tensor)
            expected = shard.slice(trained[name].view(shard.whole_shape(tensor.shape)), place.cut)
            assert weights.shared or not torch.equal(first[name], expected), f"{name} was not trained"
        else:
            expected = trained[name].view(tensor.shape)
        if not torch.equal(tensor, expected):
            out["differ"].append(name)
    out["names"] = len(held)
    return out
