"""What a pool runs for the named kinds of GRPO: two steps of each, with what went into every update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch

from parallel.config import ParallelConfig
from tests.cases import TINY, whole
from tests.rl_cases import SomeAsks, rl_config, trainer_of
from trainer.rl import loop
from trainer.rl.experience import Experience
from trainer.rl.policy_loss import PolicyLoss, policy_loss
from trainer.rollout.types import Rollout
from trainer.stages import policy
from trainer.stages.grpo import GrpoConfig

NEW = 8
"""rollout.max_new_tokens."""


class Uneven(SomeAsks):
    """Samples of prompts with an even number are all worth the same."""

    def collect(self, *args: Any, **kwargs: Any) -> list[Rollout]:
        made = super().collect(*args, **kwargs)
        for each in made:
            if each.prompt.number % 2 == 0:
                object.__setattr__(each, "reward", 1.0)
        return made


def two_steps(stages: Mapping[str, GrpoConfig]) -> dict[str, dict[str, Any]]:
    """Each preset for two steps of four prompts with four samples."""
    return {name: _two_steps(stage) for name, stage in stages.items()}


def _two_steps(stage: GrpoConfig) -> dict[str, Any]:
    cfg = rl_config(stage, TINY, ParallelConfig(), 1, 2, max_new_tokens=NEW)
    trainer, progress = trainer_of(cfg)
    object.__setattr__(trainer.collector, "asks", Uneven(cfg.rollout))
    out: dict[str, Any] = {"metrics": [], "steps": [], "ratios": [], "calls": set()}
    before, experience = whole(trainer.policy.engine, trainer.groups, "master"), loop.experience

    def watched(*args: Any) -> Experience:
        found, samples = experience(*args), args[1]
        step = {"advantage_L": found.policy_L["advantage"], "lengths_S": samples.lengths_S, "group_S": samples.group_S}
        out["steps"].append({**step, "reward_S": np.array([each.reward for each in samples.rollouts])})
        return found

    def seen(*args: Any) -> PolicyLoss:
        found, batch = policy_loss(*args), args[4]
        out["calls"].add((args[6], args[7], args[8].low, args[8].high))
        for doc in range(len(batch.targets_N)):
            out["ratios"].append(found.ratio_T[(batch.doc_T == doc) & (batch.targets_T >= 0)].tolist())
        return found

    with mock.patch.object(loop, "experience", watched), mock.patch.object(policy, "policy_loss", seen):
        out["metrics"] = [trainer.step(progress) for _ in range(2)]
    after = whole(trainer.policy.engine, trainer.groups, "master")
    out["moved"] = sum(not torch.equal(before[name], after[name]) for name in before) / len(before)
    out["position"] = progress.position
    return out
