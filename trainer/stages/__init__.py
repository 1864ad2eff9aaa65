"""Stages by name. A new stage is one file here, its two names below and one YAML in conf/stage."""

from __future__ import annotations

from parallel.sharding import ALONE, Axis
from trainer.stages.base import Stage
from trainer.stages.dpo import Dpo, DpoConfig
from trainer.stages.kto import Kto
from trainer.stages.next_token import NextToken, NextTokenConfig
from trainer.stages.reward import Reward, RewardConfig

__all__ = ["DpoConfig", "NextTokenConfig", "RewardConfig", "Stage", "StageConfig", "build_stage"]

StageConfig = NextTokenConfig | RewardConfig | DpoConfig
"""The stage section: one of these, by its name."""


def build_stage(cfg: StageConfig, num_channels: int, cp: Axis = ALONE) -> Stage:
    """The stage that ``stage.name`` asks for.

    Args:
        num_channels: number of channels of the run.
        cp: ranks that share the tokens of a document.
    """
    if isinstance(cfg, RewardConfig):
        return Reward(cfg, num_channels, cp)
    if isinstance(cfg, DpoConfig):
        return (Kto if cfg.loss == "kto" else Dpo)(cfg, num_channels, cp)
    return NextToken(num_channels)
