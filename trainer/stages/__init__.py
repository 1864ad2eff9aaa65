"""Stages by name. A new stage is one file here, its two names below and one YAML in conf/stage."""

from __future__ import annotations

from parallel.sharding import ALONE, Axis
from trainer.stages.base import Stage
from trainer.stages.clip import Clip, ClipConfig
from trainer.stages.dpo import Dpo, DpoConfig
from trainer.stages.grpo import GrpoConfig
from trainer.stages.kto import Kto
from trainer.stages.next_token import NextToken, NextTokenConfig
from trainer.stages.policy_config import PolicyConfig
from trainer.stages.ppo import PpoConfig
from trainer.stages.qformer import QFormerStage, QFormerStageConfig
from trainer.stages.reward import Reward, RewardConfig

__all__ = [
    "ClipConfig",
    "DpoConfig",
    "GrpoConfig",
    "NextTokenConfig",
    "PolicyConfig",
    "PpoConfig",
    "QFormerStageConfig",
    "RewardConfig",
    "Stage",
    "StageConfig",
    "build_stage",
]

StageConfig = NextTokenConfig | RewardConfig | DpoConfig | PpoConfig | GrpoConfig | ClipConfig | QFormerStageConfig
"""The stage section: one of these, by its name."""


def build_stage(cfg: StageConfig, num_channels: int, cp: Axis = ALONE) -> Stage:
    """The stage that ``stage.name`` asks for, of those that learn from data (ppo and grpo: `trainer/rl/run.py`).

    Args:
        num_channels: number of channels of the run.
        cp: ranks that share the tokens of a document.
    """
    if isinstance(cfg, RewardConfig):
        return Reward(cfg, num_channels, cp)
    if isinstance(cfg, ClipConfig):
        return Clip(cfg, num_channels)
    if isinstance(cfg, QFormerStageConfig):
        return QFormerStage(cfg, num_channels)
    if isinstance(cfg, DpoConfig):
        return (Kto if cfg.loss == "kto" else Dpo)(cfg, num_channels, cp)
    return NextToken(num_channels)
