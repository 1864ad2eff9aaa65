"""From rewards to the advantage of each learnt token, as the stage section asks: one call a step, on every rank alike.

Legend: S samples, L learnt tokens of all samples one after another (`trainer/rl/advantages.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.rl import advantages
from trainer.rl.advantages import Groups
from trainer.stages.grpo import GrpoConfig
from trainer.stages.policy_config import PolicyConfig
from trainer.stages.ppo import PpoConfig


@dataclass(frozen=True)
class Credit:
    """What the tokens of a rollout are learnt with. float64."""

    advantage_L: np.ndarray
    """0 for samples without a finite reward."""
    return_L: np.ndarray | None
    """What the critic should have said before each token; None without a critic."""
    scored_S: np.ndarray
    """bool: the reward is a finite number."""
    signal_S: np.ndarray
    """bool: scored, and where samples of a prompt are compared, not all alike."""


def shaped_reward(cfg: PolicyConfig, reward_S: np.ndarray, new_tokens_S: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """Rewards with the punishment of long samples, float64 [S]."""
    reward_S = np.asarray(reward_S, dtype=np.float64)
    if cfg.overlong != "penalty":
        return reward_S
    buffer = max(1, round(cfg.overlong_buffer * max_new_tokens))
    return reward_S + cfg.overlong_coef * advantages.overlong_penalty(new_tokens_S, max_new_tokens, buffer)


def compared(
    cfg: GrpoConfig,
    reward_S: np.ndarray,
    group_S: np.ndarray,
    lengths_S: np.ndarray,
    kl_L: np.ndarray | None = None,
    kept_S: np.ndarray | None = None,
) -> Credit:
    """Advantages from samples that are compared with each other.

    Args:
        reward_S: of each sample, shaped; a number that is not finite takes its sample out.
        group_S: number of the sample's prompt.
        lengths_S: learnt tokens of each sample.
        kl_L: with kl=reward the estimate of each token's divergence; else None.
        kept_S: bool, samples that are learnt from (None = all). The others still belong to the statistics of their
            groups, but not to those over tokens.
    """
    reward_S, cost_L, lengths_S = _sound(cfg, reward_S, lengths_S, kl_L)
    if cfg.advantage in ("grpo", "rloo"):
        reward_S = reward_S - advantages.sums(cost_L, lengths_S)
        groups = Groups.of(reward_S, group_S)
        compare = advantages.group_advantage if cfg.advantage == "grpo" else advantages.leave_one_out
        advantage_S = compare(reward_S, groups, cfg.scale)
        return Credit(advantages.spread(advantage_S, lengths_S), None, groups.scored_S, groups.has_signal_S)
    groups = Groups.of(reward_S, group_S)
    scored_S = groups.scored_S
    if cfg.compares:
        reward_S = advantages.group_advantage(reward_S, groups, "none")
    return_L = advantages.to_go(_token_rewards(reward_S, scored_S, cost_L, lengths_S), lengths_S)
    advantage_L = advantages.whiten(return_L, _counted(scored_S, kept_S, lengths_S))
    return Credit(advantage_L, None, scored_S, groups.has_signal_S if cfg.compares else scored_S)


def criticised(
    cfg: PpoConfig,
    reward_S: np.ndarray,
    lengths_S: np.ndarray,
    value_L: np.ndarray,
    kl_L: np.ndarray | None = None,
    kept_S: np.ndarray | None = None,
) -> Credit:
    """Advantages and returns from a critic's values: GAE over the tokens' rewards, the sample's own at its last token.

    Args:
        value_L: the critic's value before each learnt token.
        reward_S, lengths_S, kl_L, kept_S: as for `compared`.
    """
    reward_S, cost_L, lengths_S = _sound(cfg, reward_S, lengths_S, kl_L)
    value_L = np.asarray(value_L, dtype=np.float64)
    scored_S = np.isfinite(reward_S)
    reward_L = _token_rewards(reward_S, scored_S, cost_L, lengths_S)
    scored_L = np.repeat(scored_S, lengths_S)
    advantage_L = np.where(scored_L, advantages.gae(reward_L, value_L, lengths_S, cfg.gamma, cfg.lam), 0.0)
    return_L = advantage_L + value_L
    if cfg.whiten:
        advantage_L = advantages.whiten(advantage_L, _counted(scored_S, kept_S, lengths_S))
    return Credit(advantage_L, return_L, scored_S, scored_S)


def _sound(
    cfg: PolicyConfig, reward_S: np.ndarray, lengths_S: np.ndarray, kl_L: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rewards [S], weighted divergence [L], lengths [S]); a sample with a number that is not finite has reward nan."""
    reward_S, lengths_S = np.asarray(reward_S, dtype=np.float64), np.asarray(lengths_S)
    cost_L = np.zeros(int(lengths_S.sum())) if kl_L is None else cfg.kl_coef * np.asarray(kl_L, dtype=np.float64)
    sound_S = np.isfinite(reward_S) & np.isfinite(advantages.sums(cost_L, lengths_S))
    return np.where(sound_S, reward_S, np.nan), np.where(np.repeat(sound_S, lengths_S), cost_L, 0.0), lengths_S


def _token_rewards(reward_S: np.ndarray, scored_S: np.ndarray, cost_L: np.ndarray, lengths_S: np.ndarray) -> np.ndarray:
    return advantages.at_last_token(np.where(scored_S, reward_S, 0.0), lengths_S) - cost_L


def _counted(scored_S: np.ndarray, kept_S: np.ndarray | None, lengths_S: np.ndarray) -> np.ndarray:
    return np.repeat(scored_S if kept_S is None else scored_S & kept_S, lengths_S)
