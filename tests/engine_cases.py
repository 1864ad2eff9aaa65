"""What the pools run to test the engine from the outside, on the tiny model of ``tests.cases``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from data.batch import Document, MicroBatch, collate
from models.init import InitSource
from parallel.config import EngineConfig
from parallel.engine import Engine
from parallel.groups import Groups
from tests.cases import NAMES, TINY, here, my_micro_batches, whole
from trainer import channels
from trainer.build import make_engine
from trainer.optim import OptimConfig
from trainer.stages.next_token import NextToken

STAGE = NextToken(len(NAMES))
OPTIM = OptimConfig(lr=1e-2, clip=0.0, eps=1e-4)
Forward = Callable[[nn.Module, Any, float], Any]


def tiny_engine(zero: Any, groups: Groups, clip: float = 0.0, **cfg: Any) -> Engine:
    """The tiny model with the weights of seed 3."""
    optim = OptimConfig(lr=OPTIM.lr, clip=clip, eps=OPTIM.eps)
    return make_engine(TINY, EngineConfig(zero=zero, **cfg), optim, groups, InitSource(TINY, seed=3))


def gradient(engine: Engine, groups: Groups) -> dict[str, torch.Tensor]:
    """What AdamW saw in the first step: its first moment is then (1 - beta1) times the gradient."""
    return {name: moment / (1 - OPTIM.betas[0]) for name, moment in whole(engine, groups, "exp_avg").items()}


def documents(step: int, learn: bool) -> MicroBatch:
    """Two documents of channel 0, all or nothing of them supervised."""
    random = np.random.default_rng([11, step])
    lengths = (17, 5)
    docs = [Document(random.integers(0, TINY.vocab_size, size=n), np.full(n, learn), 0) for n in lengths]
    return collate(docs)


def step_on(engine: Engine, batches: list[MicroBatch], groups: Groups, forward: Forward = STAGE.forward) -> Any:
    """One step on these micro-batches, counted over all ranks."""
    (count,) = groups.sum([STAGE.count(batches)])
    return engine.train_step(batches, forward, count, OPTIM.lr)


def mute_micro_batch(zero: Any) -> dict[str, Any]:
    """Rank 0 has three supervised micro-batches, any other rank (1 to 3 of two) one and two without a target."""
    groups = here()
    engine = tiny_engine(zero, groups)
    if groups.world == 1:
        batches = [documents(0, True), documents(1, True), documents(2, True), documents(3, True)]
    elif groups.rank == 0:
        batches = [documents(0, True), documents(1, True), documents(2, True)]
    else:
        batches = [documents(7, False), documents(3, True), documents(8, False)]
    result = step_on(engine, batches, groups)
    losses = torch.stack(groups.all_gather(torch.stack(result.metrics).sum(0))).sum(0)
    return {"sums": losses, "gradient": gradient(engine, groups), "norm": result.grad_norm}


def nothing_to_learn(zero: Any) -> tuple[str, bool]:
    """A global batch without any target: what is said, and whether the weights stayed."""
    groups = here()
    engine = tiny_engine(zero, groups)
    before = whole(engine, groups, "master")
    try:
        step_on(engine, [documents(groups.rank, False)], groups)
    except ValueError as error:
        after = whole(engine, groups, "master")
        return str(error), all(torch.equal(before[name], after[name]) for name in before)
    return "no error", False


def state(engine: Engine, groups: Groups) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and both moments."""
    return {kind: whole(engine, groups, kind) for kind in ("master", "exp_avg", "exp_avg_sq")}


def poison_on(rank: int, factor: float) -> Forward:
    """A forward whose loss is multiplied by ``factor`` (inf or nan) on one rank."""

    def forward(model: nn.Module, batch: Any, weight: float) -> Any:
        loss, terms = STAGE.forward(model, batch, weight)
        return (loss * factor if here().rank == rank else loss), terms

    return forward


def bad_step(zero: Any, precision: str, factor: float, offload: bool = False) -> dict[str, Any]:
    """A good step, one that is not finite on the last rank alone, and (where it was skipped) another good one."""
    groups = here()
    engine = tiny_engine(zero, groups, precision=precision, offload_optimizer=offload)
    step_on(engine, my_micro_batches(0, groups, 2), groups)
    before, steps, scale = state(engine, groups), engine.optimizer_steps, engine.loss_scale.value
    out: dict[str, Any] = {"error": "", "skipped": False}
    try:
        poisoned = poison_on(groups.world - 1, factor)
        out["skipped"] = step_on(engine, my_micro_batches(1, groups, 2), groups, poisoned).skipped
    except ValueError as error:
        out["error"] = str(error)
    after = state(engine, groups)
    out["unchanged"] = all(
        torch.equal(before[kind][name], after[kind][name]) for kind in before for name in after[kind]
    )
    out["steps"] = (steps, engine.optimizer_steps)
    out["scale"] = (scale, engine.loss_scale.value)
    step_on(engine, my_micro_batches(2, groups, 2), groups)
    out["next"], out["next_steps"] = whole(engine, groups, "master"), engine.optimizer_steps
    return out


def good_steps(zero: Any, precision: str, steps: list[int], scale: float) -> dict[str, torch.Tensor]:
    """Weights after these steps of the data alone, the second half at another loss scale."""
    groups = here()
    engine = tiny_engine(zero, groups, precision=precision)
    for number in steps:
        step_on(engine, my_micro_batches(number, groups, 2), groups)
        engine.loss_scale.value = scale
    return whole(engine, groups, "master")


def clipped(zero: Any, clip: float) -> dict[str, Any]:
    """The norm that a step reports and the gradient that AdamW saw."""
    groups = here()
    engine = tiny_engine(zero, groups, clip)
    result = step_on(engine, my_micro_batches(0, groups, 2), groups)
    return {"norm": result.grad_norm, "gradient": gradient(engine, groups), "steps": engine.optimizer_steps}


def accumulated(zero: Any, times: int) -> tuple[dict[str, torch.Tensor], int]:
    """Weights and AdamW's step count after two steps of ``times`` micro-batches on each rank."""
    groups = here()
    engine = tiny_engine(zero, groups)
    for number in range(2):
        step_on(engine, my_micro_batches(number, groups, 8 // (times * groups.world)), groups)
    return whole(engine, groups, "master"), engine.optimizer_steps


def moved(zero: Any, rates: list[float]) -> list[dict[str, torch.Tensor]]:
    """How far the weights go in one step at each of these learning rates."""
    groups, found = here(), []
    for rate in rates:
        engine = tiny_engine(zero, groups)
        before = whole(engine, groups, "master")
        batches = my_micro_batches(0, groups, 2)
        engine.train_step(batches, STAGE.forward, groups.sum([STAGE.count(batches)])[0], rate)
        found.append({name: after - before[name] for name, after in whole(engine, groups, "master").items()})
    return found


def evaluated(zero: Any) -> dict[str, Any]:
    """Metrics of an evaluation and of the training forward on the same micro-batches, and what it left behind."""
    groups = here()
    batches = my_micro_batches(0, groups, 2)
    engine = tiny_engine(zero, groups)
    modes = []

    def watched(model: nn.Module, batch: Any, weight: float) -> Any:
        modes.append((torch.is_grad_enabled(), engine.model.training))
        return STAGE.forward(model, batch, weight)

    terms = engine.evaluate(batches, watched)
    out: dict[str, Any] = {"modes": set(modes), "grads": sum(p.grad is not None for p in engine.model.parameters())}
    out["whole"] = sum(p.numel() for p in engine.model.parameters()) if zero == 3 else 0
    out["training"] = engine.model.training
    result = step_on(engine, batches, groups)
    out["metrics"] = (torch.stack(terms), torch.stack(result.metrics))
    out["after"] = torch.stack(engine.evaluate(batches, STAGE.forward))
    plain = tiny_engine(zero, groups)
    step_on(plain, batches, groups)
    a, b = whole(engine, groups, "master"), whole(plain, groups, "master")
    out["same"] = all(torch.equal(a[name], b[name]) for name in a)
    return out


def covered(zero: Any, hidden_size: int) -> list[tuple[str, int, torch.Tensor, dict[str, int]]]:
    """This rank's fragments of fresh weights: name, start, master, elements of each state."""
    groups = here()
    cfg = dataclasses.replace(TINY, hidden_size=hidden_size)
    engine = make_engine(cfg, EngineConfig(zero=zero), OPTIM, groups, InitSource(cfg, seed=3))
    return [
        (f.name, f.start, f.master.detach().clone(), {k: v.numel() for k, v in f.states.items()})
        for f in engine.fragments()
    ]


def wire(zero: Any, steps: int = 3) -> dict[str, Any]:
    """Collectives of the last step: kind -> [calls, bytes of the tensors, bytes moved], and the parameters' bytes."""
    from scripts.bench.wire_worker import CountCollectives

    groups = here()
    engine = tiny_engine(zero, groups)
    size = sum(4 * getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    for number in range(steps - 1):
        step_on(engine, my_micro_batches(number, groups, 2), groups)
    batches = my_micro_batches(steps, groups, 4)
    count = groups.sum([STAGE.count(batches)])[0]
    with CountCollectives() as counter:
        engine.train_step(batches, STAGE.forward, count, OPTIM.lr)
    return {"parameters": size, "kinds": dict(counter.kinds), "micro_batches": len(batches)}


def summed(mine: list[list[float]]) -> list[float]:
    """The sum over ranks of one list of numbers a rank."""
    groups = here()
    return groups.sum(mine[groups.rank])


def merged_channels() -> dict[str, float]:
    """Metrics of three tokens of the first channel on rank 0 (loss 2 each) and one of the third on rank 1 (loss 6)."""
    groups = here()
    sums = torch.zeros(len(NAMES), 2, dtype=torch.float64)
    sums[2 * groups.rank] = torch.tensor([6.0, 3.0 if groups.rank == 0 else 1.0])
    return channels.metrics([sums], NAMES, groups.all_gather, "train")
