"""From scores to what the update learns from: which samples, with which numbers. numpy on every rank alike.

Legend as in `trainer/rl/samples.py`: S samples, L learnt tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainer.rl.advantages import sums
from trainer.rl.credit import compared, criticised, shaped_reward
from trainer.rl.kl import estimate
from trainer.rl.samples import Samples
from trainer.stages.grpo import GrpoConfig
from trainer.stages.policy_config import PolicyConfig
from trainer.stages.ppo import PpoConfig


@dataclass(frozen=True)
class Scores:
    """What models say of each learnt token; None where nobody was asked."""

    old_L: np.ndarray | None = None
    """Log-probabilities of the policy before the update."""
    reference_L: np.ndarray | None = None
    """Those of the reference."""
    value_L: np.ndarray | None = None
    """The critic's value before the token."""


@dataclass(frozen=True)
class Experience:
    """The samples of a step, ready to be learnt from."""

    samples: Samples
    learns_S: np.ndarray
    """bool [S]: takes part in the update."""
    policy_L: Mapping[str, np.ndarray]
    """Facts of the policy's update by name, float64 [L]."""
    critic_L: Mapping[str, np.ndarray]
    """Facts of the critic's update; none without a critic."""
    kl_L: np.ndarray | None
    """The divergence that is in the reward, nats."""

    def advantages(self) -> dict[tuple[int, int], float]:
        """Mean advantage of each sample that is learnt from, by the number of its prompt and its own."""
        means_S = sums(self.policy_L["advantage"], self.samples.lengths_S) / self.samples.lengths_S
        return {
            (each.prompt.number, each.sample): float(mean)
            for each, mean, learns in zip(self.samples.rollouts, means_S, self.learns_S, strict=True)
            if learns
        }


def experience(cfg: PolicyConfig, samples: Samples, scores: Scores, max_new_tokens: int) -> Experience:
    """Advantages and all else that an update needs.

    Args:
        max_new_tokens: most tokens of a sample, for what is done about long ones.
    """
    reward_S = shaped_reward(cfg, samples.reward_S, samples.lengths_S, max_new_tokens)
    kept_S = ~samples.truncated_S if cfg.overlong == "filter" else np.ones(len(samples), dtype=bool)
    kl_L = None
    if cfg.kl == "reward":
        assert scores.old_L is not None and scores.reference_L is not None
        kl_L = estimate(cfg.kl_estimator, scores.old_L, scores.reference_L)
    if isinstance(cfg, PpoConfig):
        assert scores.value_L is not None
        credit = criticised(cfg, reward_S, samples.lengths_S, scores.value_L, kl_L, kept_S)
    else:
        assert isinstance(cfg, GrpoConfig)
        credit = compared(cfg, reward_S, samples.group_S, samples.lengths_S, kl_L, kept_S)
    policy_L = {"advantage": credit.advantage_L, "generated": samples.generated_L}
    if cfg.moves:
        assert scores.old_L is not None
        policy_L["old"] = scores.old_L
    if cfg.kl == "loss":
        assert scores.reference_L is not None
        policy_L["reference"] = scores.reference_L
    critic_L: dict[str, np.ndarray] = {}
    if credit.return_L is not None and scores.value_L is not None:
        critic_L = {"return": credit.return_L, "value": scores.value_L}
    return Experience(samples, kept_S & credit.scored_S, policy_L, critic_L, kl_L)


def needs_old(cfg: PolicyConfig) -> bool:
    """Whether the policy is asked about the samples before the update: it moves within the step, or its divergence from
    the reference is in the reward."""
    return cfg.moves or cfg.kl == "reward"
