"""What the pools run to update a policy or a critic once, in any layout."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np
import torch

from data.batch import Document, MicroBatch, Row, collate, split_rows
from models.init import InitSource
from parallel.config import EngineConfig, ParallelConfig
from parallel.groups import ALL_DATA, Groups
from tests.cases import NAMES, TINY, here, uneven_rows, whole
from trainer import channels
from trainer.build import make_engine
from trainer.context import local_part
from trainer.optim import OptimConfig
from trainer.stages.grpo import GrpoConfig
from trainer.stages.policy import Policy
from trainer.stages.ppo import Critic, PpoConfig


def with_facts(document: Document) -> Document:
    """Numbers of each token, the same whatever rank the document comes to: about as far from the tiny model's own
    log-probabilities (-log 97 each) as ratios need to be clipped on both sides."""
    random = np.random.default_rng(zlib.crc32(document.tokens_L.tobytes()))
    near = [-np.log(TINY.vocab_size) + 0.3 * random.normal(size=len(document.tokens_L)) for _ in range(3)]
    facts = {"advantage": random.normal(size=len(document.tokens_L)), "old": near[0], "generated": near[1]}
    facts |= {"reference": near[2], "value": near[0] + 4.6, "return": near[1] + 4.6}
    return dataclasses.replace(document, token_facts=facts)


def batches_of(groups: Groups, layout: ParallelConfig, micro_rows: int) -> list[MicroBatch]:
    rows = [[with_facts(doc) for doc in row] for row in uneven_rows(1)]
    light = [Row((i,), tuple(len(doc.tokens_L) for doc in row)) for i, row in enumerate(rows)]
    mine = split_rows(light, groups.dp.rank, groups.dp.size, micro_rows)
    whole_ones = [collate([doc for row in part for doc in rows[row.pieces[0]]]) for part in mine]
    return [local_part(batch, groups.cp, layout.context) for batch in whole_ones]


def update(
    settings: dict[str, Any], zero: Any = 1, layout: ParallelConfig = ALL_DATA, micro_rows: int = 2
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of one update: of a critic where the settings are empty, else of a policy."""
    groups = here(layout)
    cfg = TINY if settings else dataclasses.replace(TINY, head="scalar")
    engine = make_engine(
        cfg, EngineConfig(zero=zero), OptimConfig(lr=0.0, clip=0.0), groups, InitSource(cfg, seed=3), layout
    )
    stage: Any = Critic(PpoConfig(), len(NAMES))
    if settings:
        stage = Policy(GrpoConfig(**settings), len(NAMES), 24, 0.8, groups.cp)
    batches = batches_of(groups, layout, micro_rows)
    (count,) = groups.sum([stage.count(batches)])
    result = engine.train_step(batches, stage.forward, count, 0.0)
    metrics = channels.metrics(result.metrics, NAMES, groups.all_gather, "train", stage.columns)
    return metrics, whole(engine, groups, "exp_avg")
