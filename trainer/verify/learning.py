"""The stage of a run on made-up rows, and what it has to know before a step: a reference, other answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from data.batch import MicroBatch, Row
from parallel.engine import Engine
from parallel.groups import Groups
from parallel.materialise import TensorSource
from trainer.build import make_frozen
from trainer.comparing import Comparing
from trainer.config import RunConfig
from trainer.context import local_part
from trainer.loop import on_device
from trainer.matching import Matching
from trainer.preparation import Preparation
from trainer.stages import DpoConfig, PolicyConfig, Stage, build_stage
from trainer.stages.clip import Clip
from trainer.stages.dpo import Dpo
from trainer.stages.kto import Kto
from trainer.stages.policy import Policy
from trainer.stages.qformer import QFormerStage
from trainer.verify.rows import MadeUpRows


def stage_of(cfg: RunConfig, groups: Groups) -> Stage:
    """The loss of the run; that of ppo and grpo is the policy's update."""
    channels = len(MadeUpRows.channels)
    if isinstance(cfg.stage, PolicyConfig):
        return Policy(cfg.stage, channels, cfg.data.seq_len, cfg.rollout.temperature, groups.cp)
    return build_stage(cfg.stage, channels, groups.cp)


def preparation(
    cfg: RunConfig, groups: Groups, stage: Stage, engine: Engine, rows: MadeUpRows, reference: TensorSource
) -> Callable[[list[MicroBatch], Sequence[Row] | None], list[Any]]:
    """What the step loop does to micro-batches before a step; the reference, where there is one, has weights of its
    own."""
    if isinstance(stage, Clip):
        return Comparing(stage, groups, engine)
    if isinstance(stage, QFormerStage):
        return Matching(stage, groups, engine, cfg.run.seed)
    if not isinstance(stage, Dpo | Kto):
        return lambda batches, step: batches
    assert isinstance(cfg.stage, DpoConfig)
    frozen = make_frozen(cfg.model, cfg.engine, groups, reference, cfg.parallel) if cfg.stage.needs_reference else None

    def others(step: Sequence[Row] | None) -> list[MicroBatch]:
        found = rows.mismatched_batches(step, groups.dp.rank, groups.dp.size, cfg.data.micro_batch_rows)
        return [on_device(local_part(batch, groups.cp, cfg.parallel.context), groups.device) for batch in found]

    return Preparation(stage, groups, engine, frozen, others)
