"""The reference of a run that learns from preferences: where its weights come from, and whether they stay in memory.

It is what the run starts from, also after a resume, or the folder that ``stage.reference`` names. Its log-probabilities
are taken anew in every step, or once before the first and kept beside the token cache.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from convert.source import Source
from data.batch import MicroBatch, Row
from data.mismatched import mismatched_batches
from data.peers import Peers
from data.pipeline import TrainingData
from data.precomputed import DOCUMENT, precomputed
from parallel.engine import Engine
from parallel.frozen import Frozen
from parallel.groups import Groups
from trainer import adapters, folders
from trainer.build import make_frozen
from trainer.comparing import Comparing
from trainer.config import RunConfig, reference_model
from trainer.context import local_part
from trainer.itself import frozen_start, itself, start_in_words
from trainer.logging.log import Log
from trainer.loop import on_device
from trainer.matching import Matching
from trainer.preparation import Preparation, Scorer, reference_forward
from trainer.stages import DpoConfig, Stage
from trainer.stages.clip import Clip
from trainer.stages.dpo import Dpo
from trainer.stages.kto import Kto
from trainer.stages.qformer import QFormerStage

AT_ONCE = 16
"""Micro-batches scored together when all are scored once."""


def find_reference(cfg: RunConfig, groups: Groups, data: TrainingData, log: Log) -> tuple[Scorer | None, TrainingData]:
    """The reference, if the stage has one and asks it in every step, and the data, with its log-probabilities if it was
    asked once. To be called by all ranks together.

    Raises:
        ValueError: the reference's tensors are not its model's, or what it says is not finite.
    """
    stage = cfg.stage
    if not isinstance(stage, DpoConfig) or not stage.needs_reference:
        return None, data
    if not stage.precompute_reference:
        log.note(f"reference: {_described(cfg)}")
        return None if _is_itself(cfg, stage) else _frozen(cfg, groups), data
    started, asked = time.monotonic(), 0

    def score(batches: Iterator[MicroBatch], total: int) -> np.ndarray:
        nonlocal asked
        asked = total
        return _score_once(cfg, groups, batches, total)

    data = precomputed(
        data,
        "reference",
        _made_by(cfg),
        score,
        rank=groups.dp.rank,
        world=groups.dp.size,
        micro_batch_rows=cfg.data.micro_batch_rows,
        peers=Peers(groups.rank, groups.world, groups.all_gather),
    )
    how = f"computed in {time.monotonic() - started:.1f} s and kept" if asked else "found"
    log.note(f"reference: {_described(cfg)}; its log-probabilities were {how} beside the token cache")
    return None, data


def preparation(
    cfg: RunConfig, groups: Groups, stage: Stage, engine: Engine, reference: Scorer | None, data: TrainingData
) -> Callable[[list[MicroBatch], Sequence[Row] | None], list[Any]]:
    """What adds to the micro-batches of a step what the stage reads of them; nothing for most stages."""

    def others(rows: Sequence[Row] | None) -> list[MicroBatch]:
        found = mismatched_batches(data, rows, groups.dp.rank, groups.dp.size, cfg.data.micro_batch_rows)
        return [_here(batch, cfg, groups) for batch in found]

    if isinstance(stage, Dpo | Kto):
        asked = isinstance(cfg.stage, DpoConfig) and cfg.stage.needs_reference and not cfg.stage.precompute_reference
        if asked and reference is None:
            reference = itself(cfg, engine)
            folders.forget()
        return Preparation(stage, groups, engine, reference, others)
    if isinstance(stage, Clip):
        return Comparing(stage, groups, engine)
    if isinstance(stage, QFormerStage):
        return Matching(stage, groups, engine, cfg.run.seed)
    return lambda batches, rows: batches


def _is_itself(cfg: RunConfig, stage: DpoConfig) -> bool:
    """Whether the reference is the model that is trained, without its adapter or with what that began as."""
    return stage.reference is None and cfg.adapter is not None and cfg.adapter.can_be_off


def _frozen(cfg: RunConfig, groups: Groups) -> Frozen:
    """What the run starts from, whatever it was resumed from, or the model that was named."""
    folder, offload = _named(cfg), cfg.engine.offload_optimizer
    if folder is None:
        made = frozen_start(cfg, groups, offload)
    else:
        model = reference_model(cfg)
        source = Source(folders.opened(folder), model, cfg.run.seed)
        source.check()
        made = make_frozen(model, cfg.engine, groups, source, cfg.parallel, cfg.data.seq_len, offload)
    folders.forget()
    return made


def _named(cfg: RunConfig) -> str | None:
    return cfg.stage.reference if isinstance(cfg.stage, DpoConfig) else None


def _described(cfg: RunConfig) -> str:
    return _named(cfg) or start_in_words(cfg)


def _made_by(cfg: RunConfig) -> str:
    """All that decides the reference's log-probabilities beside the tokens; files are told by their sizes and times."""
    folder = _named(cfg) or cfg.init_from
    weights: object = ("seed", cfg.run.seed)
    if folder is not None:
        root = Path(folders.opened(folder).path)
        files = sorted(file for file in (root.rglob("*") if root.is_dir() else [root]) if file.is_file())
        stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        weights = hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest()
    begun = adapters.record(cfg) if _named(cfg) is None and adapters.start_of(cfg) is not None else None
    return repr((weights, reference_model(cfg), cfg.engine.precision, *([] if begun is None else [begun])))


def _score_once(cfg: RunConfig, groups: Groups, batches: Iterator[MicroBatch], total: int) -> np.ndarray:
    """The reference's log-probability of every document, float64 [total], the same on every rank; the reference is in
    memory until then only."""
    reference, forward = _frozen(cfg, groups), reference_forward(groups.cp)
    sums = torch.zeros(total, dtype=torch.float64, device=groups.device)
    while window := [_here(batch, cfg, groups) for batch in islice(batches, AT_ONCE)]:
        found = reference.score(window, forward)
        if groups.tp.rank or groups.cp.rank:
            continue  # they have the same numbers
        for batch, sums_N in zip(window, found, strict=False):  # nothing from ranks without the head
            number_N = batch.doc_facts[DOCUMENT].long()
            sums[number_N[number_N >= 0]] = sums_N[number_N >= 0]
    if groups.world > 1:
        dist.all_reduce(sums)
    return sums.cpu().numpy()


def _here(batch: MicroBatch, cfg: RunConfig, groups: Groups) -> MicroBatch:
    return on_device(local_part(batch, groups.cp, cfg.parallel.context), groups.device)
