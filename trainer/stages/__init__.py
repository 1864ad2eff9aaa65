"""Stages by name. A new stage is one file here, one line below and one YAML in conf/stage."""

from __future__ import annotations

from trainer.stages.base import StageConfig
from trainer.stages.next_token import NextToken

STAGES = {"pretrain": NextToken, "sft": NextToken}


def build_stage(cfg: StageConfig, num_channels: int) -> NextToken:
    """The stage that ``stage.name`` asks for."""
    return STAGES[cfg.name](num_channels)
