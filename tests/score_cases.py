"""What the pools run to score documents forward only, in any layout, by the trained and by a frozen model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from data.batch import MicroBatch
from models.init import InitSource
from parallel.config import EngineConfig, ParallelConfig
from parallel.groups import ALL_DATA
from tests.cases import TINY, here, my_parts, whole
from trainer.build import make_engine, make_frozen
from trainer.optim import OptimConfig
from trainer.sequences import document_sums


def document_scores(
    zero: Any, layout: ParallelConfig = ALL_DATA, head: Any = "lm", frozen: bool = True
) -> list[tuple[list[int], list[float]]]:
    """(document's tokens told by its length and targets, its sum) of every document that this rank scores."""
    groups = here(layout)
    cfg = dataclasses.replace(TINY, head=head)
    engine_cfg, source = EngineConfig(zero=zero), InitSource(cfg, seed=3)
    if frozen:
        scorer: Any = make_frozen(cfg, engine_cfg, groups, source, layout)
    else:
        scorer = make_engine(cfg, engine_cfg, OptimConfig(), groups, source, layout)

    def forward(model: Any, batch: MicroBatch, weight: float) -> tuple[None, list[float]]:
        if head == "scalar":
            score_T = model(**batch.inputs, output="head")
        else:
            score_T, entropy_T = model(**batch.inputs, targets_T=batch.targets_T, output="log_probs", temperature=0.7)
            score_T = score_T + 0.1 * entropy_T
        return None, document_sums(score_T.detach(), batch, groups.cp).tolist()

    batches = my_parts(0, groups, layout, 2)
    found = scorer.score(batches, forward)
    keys = [list(zip(batch.cu_seqlens.diff().tolist(), batch.targets_N.tolist(), strict=True)) for batch in batches]
    parts = zip(keys, found, strict=True) if found else []  # a pipeline's first ranks score nothing
    return [([*key], [value]) for part, sums in parts for key, value in zip(part, sums, strict=True)]


def gradient_of_sums(layout: ParallelConfig = ALL_DATA) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a loss that bends each document's sum of log-probabilities."""
    groups = here(layout)
    engine = make_engine(TINY, EngineConfig(), OptimConfig(lr=0.0, clip=0.0), groups, InitSource(TINY, seed=3), layout)

    def forward(model: Any, batch: MicroBatch, weight: float) -> tuple[torch.Tensor, float]:
        log_T, _ = model(**batch.inputs, targets_T=batch.targets_T, output="log_probs")
        loss = torch.nn.functional.softplus(document_sums(log_T, batch, groups.cp) / 50).sum()
        return weight * loss, float(loss.detach()) / groups.cp.size

    batches = my_parts(0, groups, layout, 2)
    documents = sum(len(batch.doc_channel_N) for batch in batches) / groups.cp.size
    (count,) = groups.sum([documents])
    result = engine.train_step(batches, forward, count, 0.0)
    losses = groups.all_gather(result.metrics)
    moments = whole(engine, groups, "exp_avg")
    return sum(sum(part) for part in losses), moments
