"""What the pools run to count the bytes of a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from models import ModelConfig
from models.init import InitSource
from parallel.config import EngineConfig, ParallelConfig
from parallel.engine import Engine
from parallel.group_names import name_of_axis
from parallel.groups import Groups
from parallel.traffic import Traffic
from parallel.traffic_formula import expected
from scripts.bench.wire_sizes import micro_of, part_of, step_of
from tests.cases import NAMES, TINY, here, my_parts
from trainer.build import make_engine
from trainer.optim import OptimConfig
from trainer.stages.next_token import NextToken

STAGE = NextToken(len(NAMES))


def engine_of(cfg: ModelConfig, layout: ParallelConfig, groups: Groups, **engine: Any) -> Engine:
    """An engine with fresh weights, on which one step was done: some things are sent once only."""
    optim = OptimConfig(lr=1e-3, clip=1.0)
    made = make_engine(cfg, EngineConfig(**engine), optim, groups, InitSource(cfg, seed=3), layout)
    step(made, my_parts(0, groups, layout, 2), groups)
    return made


def step(engine: Engine, batches: list[Any], groups: Groups) -> None:
    """One optimizer step."""
    (count,) = groups.sum([STAGE.count(batches)])
    engine.train_step(batches, STAGE.forward, count, 1e-3)


Bytes = dict[tuple[str, str], float]
"""(kind, group) -> bytes."""


def counted(
    layout: ParallelConfig, cfg: ModelConfig = TINY, extra: bool = False, **engine: Any
) -> tuple[Bytes, Bytes, list[str]]:
    """What this rank sends in a step, what the formula wants, and the formula's terms in words.

    `extra`: seven numbers are summed over tp that no formula knows of.
    """
    groups = here(layout)
    made, batches = engine_of(cfg, layout, groups, **engine), my_parts(1, groups, layout, 2)
    (count,) = groups.sum([STAGE.count(batches)])
    with Traffic(groups) as traffic:
        made.train_step(batches, STAGE.forward, count, 1e-3)
        if extra:
            dist.all_reduce(torch.zeros(7), group=groups.tp.group)
    sent = {key: float(row.bytes) for key, row in traffic.rows.items() if key[0] not in ("recv", "barrier")}
    received = sum(row.bytes for (kind, _), row in traffic.rows.items() if kind == "recv")
    both = groups.all_gather((received, sum(n for (kind, _), n in sent.items() if kind == "send")))
    assert sum(got for got, _ in both) == sum(gave for _, gave in both), "what is sent is received"
    micros = [micro_of(batch, layout, groups) for batch in batches]
    terms = expected(part_of(cfg, layout, made, groups), micros, step_of(layout, made.cfg, groups))
    wanted: Bytes = {}
    for term in terms:
        key = (term.kind, name_of_axis(groups, term.axis))
        wanted[key] = wanted.get(key, 0.0) + term.bytes
    return sent, wanted, [str(term) for term in terms]


def called() -> dict[tuple[str, str], tuple[int, int]]:
    """One call of each kind on four ranks, tp two by two: (kind, group) -> (calls, bytes)."""
    groups = here(ParallelConfig(tp=2))
    tp, data = groups.tp, groups.data
    with Traffic(groups) as traffic:
        dist.all_reduce(torch.zeros(10), group=tp.group)
        dist.all_reduce(torch.zeros(1, dtype=torch.int64), group=tp.group)
        dist.all_gather_single(torch.zeros(24), torch.zeros(6))
        dist.reduce_scatter_single(torch.zeros(2), torch.zeros(8))
        dist.all_to_all_single(torch.zeros(4), torch.zeros(4), group=data.group)
        dist.broadcast(torch.zeros(1), 0)
        dist.reduce(torch.zeros(3), 0)
        ends = {"group": tp.group, "group_peer": 1 - tp.rank}
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, torch.zeros(5), **ends), dist.P2POp(dist.irecv, torch.zeros(5), **ends)]
        ):
            work.wait()
        dist.barrier()
    dist.all_reduce(torch.zeros(1000))
    return {key: (row.calls, row.bytes) for key, row in traffic.rows.items()}
