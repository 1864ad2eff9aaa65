"""How much better than expected each sampled token was. numpy float64 over all rollouts of a step, alike on every rank.

Legend: S samples (rollouts), G groups (the samples of one prompt), L learnt tokens of all samples, one sample after
another in the order of S; what a task wrote in between is left out. Log-probabilities and KL in nats.

A reward that is not finite belongs to no statistic and gives its sample the advantage 0: it never spreads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Scale = Literal["group", "batch", "none"]

GROUP_EPS = 1e-4
"""Added to a standard deviation of rewards (as TRL does): groups that differ by little are not blown up."""
WHITEN_EPS = 1e-8
"""Added to the variance of advantages over the batch."""


@dataclass(frozen=True)
class Groups:
    """The samples of each prompt, and what their rewards say."""

    member_S: np.ndarray
    """int [S]: group of each sample, 0 .. G-1."""
    scored_S: np.ndarray
    """bool [S]: the reward is a finite number."""
    count_G: np.ndarray
    """float64 [G]: scored samples."""
    mean_G: np.ndarray
    """float64 [G]: their mean reward; 0 where none is scored."""
    std_G: np.ndarray
    """float64 [G]: their standard deviation (divided by count - 1); 0 for fewer than two."""
    flat_G: np.ndarray
    """bool [G]: no signal: the rewards are all equal, or fewer than two are scored."""

    @staticmethod
    def of(reward_S: np.ndarray, group_S: np.ndarray) -> Groups:
        """Statistics of ``reward_S`` by group; ``group_S`` holds any whole numbers, equal within a group."""
        reward_S = np.asarray(reward_S, dtype=np.float64)
        member_S = np.unique(np.asarray(group_S), return_inverse=True)[1].reshape(-1)
        scored_S = np.isfinite(reward_S)
        known_S = np.where(scored_S, reward_S, 0.0)
        size = int(member_S.max(initial=-1)) + 1
        count_G = np.bincount(member_S, scored_S, size)
        mean_G = np.bincount(member_S, known_S, size) / np.maximum(count_G, 1)
        off_S = np.where(scored_S, known_S - mean_G[member_S], 0.0)
        std_G = np.sqrt(np.bincount(member_S, off_S**2, size) / np.maximum(count_G - 1, 1))
        low_G, high_G = np.full(size, np.inf), np.full(size, -np.inf)
        np.minimum.at(low_G, member_S[scored_S], reward_S[scored_S])
        np.maximum.at(high_G, member_S[scored_S], reward_S[scored_S])
        return Groups(member_S, scored_S, count_G, mean_G, std_G, (count_G < 2) | (low_G == high_G))

    @property
    def has_signal_S(self) -> np.ndarray:
        """bool [S]: the sample is scored and its group tells better from worse."""
        return self.scored_S & ~self.flat_G[self.member_S]


def group_advantage(reward_S: np.ndarray, groups: Groups, scale: Scale = "group") -> np.ndarray:
    """Reward minus the mean of its group, float64 [S] (GRPO: Shao et al. 2024, arXiv:2402.03300).

    Args:
        scale: what that is divided by: the standard deviation of the group (GRPO) or of all rewards of the batch (Liu
            et al. 2025, arXiv:2508.08221), or nothing (Dr. GRPO: Liu et al. 2025, arXiv:2503.20783).

    Groups without signal have exactly 0.
    """
    centred_S = _known(reward_S, groups) - groups.mean_G[groups.member_S]
    return np.where(groups.has_signal_S, centred_S, 0.0) / _scale(scale, reward_S, groups)


def leave_one_out(reward_S: np.ndarray, groups: Groups, scale: Scale = "none") -> np.ndarray:
    """Reward minus the mean of the others of its group, float64 [S] (RLOO: Ahmadian et al. 2024, arXiv:2402.14740).

    ``scale`` as for `group_advantage`.
    """
    count_S = groups.count_G[groups.member_S]
    known_S = _known(reward_S, groups)
    others_S = (groups.mean_G[groups.member_S] * count_S - known_S) / np.maximum(count_S - 1, 1)
    return np.where(groups.has_signal_S, known_S - others_S, 0.0) / _scale(scale, reward_S, groups)


def _known(reward_S: np.ndarray, groups: Groups) -> np.ndarray:
    return np.where(groups.scored_S, np.asarray(reward_S, dtype=np.float64), 0.0)


def _scale(scale: Scale, reward_S: np.ndarray, groups: Groups) -> np.ndarray | float:
    if scale == "none":
        return 1.0
    if scale == "group":
        return groups.std_G[groups.member_S] + GROUP_EPS
    known = np.asarray(reward_S, dtype=np.float64)[groups.scored_S]
    return (float(known.std(ddof=1)) if len(known) > 1 else 0.0) + GROUP_EPS


def spread(value_S: np.ndarray, lengths_S: np.ndarray) -> np.ndarray:
    """Each sample's number at every learnt token of it, [L]."""
    return np.repeat(np.asarray(value_S, dtype=np.float64), lengths_S)


def at_last_token(value_S: np.ndarray, lengths_S: np.ndarray) -> np.ndarray:
    """Each sample's number at its last learnt token, 0 at the others, float64 [L]; samples without tokens lose it."""
    lengths_S = np.asarray(lengths_S)
    out_L = np.zeros(int(lengths_S.sum()))
    has_S = lengths_S > 0
    out_L[np.cumsum(lengths_S)[has_S] - 1] = np.asarray(value_S, dtype=np.float64)[has_S]
    return out_L


def sums(value_L: np.ndarray, lengths_S: np.ndarray) -> np.ndarray:
    """Sum over the learnt tokens of each sample, float64 [S]."""
    sample_L = np.repeat(np.arange(len(lengths_S)), lengths_S)
    return np.bincount(sample_L, value_L, len(lengths_S))


def to_go(reward_L: np.ndarray, lengths_S: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """Discounted sum of a token's reward and of those after it in the same sample, float64 [L]."""
    zeros_L = np.zeros_like(np.asarray(reward_L, dtype=np.float64))
    return gae(reward_L, zeros_L, lengths_S, gamma, lam=1.0)


def gae(
    reward_L: np.ndarray,
    value_L: np.ndarray,
    lengths_S: np.ndarray,
    gamma: float,
    lam: float,
    value_after_S: np.ndarray | None = None,
) -> np.ndarray:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438), float64 [L].

        delta_t = reward_t + gamma * value_(t+1) - value_t
        advantage_t = delta_t + gamma * lam * advantage_(t+1)

    ``value_L`` is the value before each token is written. A sample ends with its last learnt token: nothing comes
    after it.

    Args:
        value_after_S: value after the last token, for samples that would have gone on; None = 0 for all of them.
    """
    lengths_S = np.asarray(lengths_S)
    # Samples side by side, aligned at their last token: the recursion then runs once over the longest sample.
    longest = int(lengths_S.max(initial=0))
    place_SL = np.arange(longest) >= longest - lengths_S[:, None]
    reward_SL, value_SL = np.zeros(place_SL.shape), np.zeros((len(lengths_S), longest + 1))
    reward_SL[place_SL] = reward_L
    value_SL[:, :-1][place_SL] = value_L
    value_SL[:, -1] = 0.0 if value_after_S is None else value_after_S
    delta_SL = reward_SL + gamma * value_SL[:, 1:] - value_SL[:, :-1]
    advantage_SL = np.zeros_like(reward_SL)
    after_S = np.zeros(len(lengths_S))
    for token in reversed(range(longest)):
        after_S = delta_SL[:, token] + gamma * lam * after_S
        advantage_SL[:, token] = after_S
    return advantage_SL[place_SL]


def whiten(value_L: np.ndarray, counts_L: np.ndarray | None = None) -> np.ndarray:
    """Numbers of the whole batch with mean 0 and variance 1 over those that count; the others become 0, float64 [L].

    Args:
        counts_L: bool [L], None = all count.
    """
    value_L = np.asarray(value_L, dtype=np.float64)
    counts_L = np.ones(len(value_L), dtype=bool) if counts_L is None else counts_L
    counted = value_L[counts_L]
    if len(counted) < 2:
        return np.zeros_like(value_L)
    scale = 1 / np.sqrt(counted.var(ddof=1) + WHITEN_EPS)
    return np.where(counts_L, (np.where(counts_L, value_L, 0.0) - counted.mean()) * scale, 0.0)


def overlong_penalty(length_S: np.ndarray, limit: int, buffer: int) -> np.ndarray:
    """Soft punishment of long samples (DAPO: Yu et al. 2025, arXiv:2503.14476, eq. 13), float64 [S] in [-1, 0].

    0 up to ``limit - buffer`` tokens, then falling evenly to -1 at ``limit``.
    """
    over_S = np.asarray(length_S, dtype=np.float64) - (limit - buffer)
    return -np.clip(over_S / buffer, 0.0, 1.0)
