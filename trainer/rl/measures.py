"""What a rollout shows, overall and by channel: rewards, groups, lengths, endings, divergence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.rl.advantages import Groups
from trainer.rl.experience import Experience
from trainer.rl.value_loss import explained_variance
from trainer.rollout.types import Rollout


def rollout_metrics(rollouts: Sequence[Rollout], channels: Sequence[str], prefix: str) -> dict[str, float]:
    """Numbers of all rollouts, those left out of the update too.

    Args:
        prefix: ``rollout`` gives ``rollout/reward`` and ``channel/<name>/reward``; ``eval`` ``eval/<name>/reward``.
    """
    found: dict[str, float] = {}
    by_channel = {name: [each for each in rollouts if each.prompt.channel_name == name] for name in channels}
    for name, some in {"": list(rollouts), **by_channel}.items():
        if some:
            key = prefix if not name else f"channel/{name}" if prefix == "rollout" else f"{prefix}/{name}"
            found |= {f"{key}/{what}": value for what, value in _of(some).items()}
    return found


def _of(rollouts: Sequence[Rollout]) -> dict[str, float]:
    reward_S = np.array([each.reward for each in rollouts])
    groups = Groups.of(reward_S, np.array([each.prompt.number for each in rollouts]))
    known_S = reward_S[groups.scored_S]
    length_S = np.array([each.new_tokens for each in rollouts])
    found = {
        "reward": float(known_S.mean()) if len(known_S) else 0.0,
        "reward_std": float(known_S.std()) if len(known_S) else 0.0,
        "group_std": float(groups.std_G.mean()),
        "flat_groups": float(groups.flat_G.mean()),
        "length": float(length_S.mean()),
        "length_max": float(length_S.max()),
        "truncated": float(np.mean([each.finish == "length" for each in rollouts])),
        "empty": float(np.mean(length_S == 0)),
        "failed_rewards": float(np.mean([bool(each.errors) for each in rollouts])),
        "bad_rewards": float(np.mean(~groups.scored_S)),
    }
    for part in sorted({part for each in rollouts for part in each.rewards}):
        values = [each.rewards[part] for each in rollouts if part in each.rewards]
        found[f"reward/{part}"] = float(np.mean(values))
    return found


def experience_metrics(experience: Experience, channels: Sequence[str]) -> dict[str, float]:
    """Of what is learnt from: the divergence in the reward, and how well the critic foretold the returns."""
    found: dict[str, float] = {}
    samples, kl_L = experience.samples, experience.kl_L
    if kl_L is not None:
        channel_L = np.repeat(samples.channel_S, samples.lengths_S)
        found["train/kl"] = float(kl_L.mean())
        for index, name in enumerate(channels):
            if (channel_L == index).any():
                found[f"channel/{name}/kl"] = float(kl_L[channel_L == index].mean())
    if experience.critic_L:
        found["critic/explained_variance"] = explained_variance(
            experience.critic_L["return"], experience.critic_L["value"]
        )
    return found
