"""Advantages by hand: groups, leave-one-out, GAE, whitening, rewards that are no numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from trainer.rl import advantages
from trainer.rl.advantages import Groups
from trainer.rl.credit import compared, criticised, shaped_reward
from trainer.stages.grpo import GrpoConfig
from trainer.stages.ppo import PpoConfig

REWARD = np.array([1.0, 0.0, 0.0, 1.0, 3.0, 5.0])
GROUP = np.array([7, 7, 7, 7, 2, 2])
ONE = np.ones(6, dtype=int)


def test_group_advantage_by_hand() -> None:
    groups = Groups.of(REWARD, GROUP)
    # The first group: mean 1/2, variance 4 x 1/4 / 3. The second: mean 4, variance 2.
    by_std = [0.5 / (math.sqrt(1 / 3) + 1e-4)] * 2 + [1 / (math.sqrt(2) + 1e-4)]
    expected = [by_std[0], -by_std[0], -by_std[0], by_std[0], -by_std[2], by_std[2]]
    assert advantages.group_advantage(REWARD, groups) == pytest.approx(expected)
    centred = [0.5, -0.5, -0.5, 0.5, -1, 1]
    assert advantages.group_advantage(REWARD, groups, "none") == pytest.approx(centred)
    whole = math.sqrt(sum((r - 10 / 6) ** 2 for r in REWARD) / 5) + 1e-4
    assert advantages.group_advantage(REWARD, groups, "batch") == pytest.approx(np.array(centred) / whole)


def test_leave_one_out_by_hand() -> None:
    groups = Groups.of(REWARD, GROUP)
    expected = [1 - 1 / 3, 0 - 2 / 3, 0 - 2 / 3, 1 - 1 / 3, 3 - 5, 5 - 3]
    assert advantages.leave_one_out(REWARD, groups) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.1, 0.0, -3.7])
def test_an_all_equal_group_gives_exactly_nothing(value: float) -> None:
    """0.1 three times has a mean that is not 0.1 in binary."""
    reward = np.array([value] * 3 + [1.0, 2.0])
    groups = Groups.of(reward, np.array([0, 0, 0, 1, 1]))
    assert groups.flat_G.tolist() == [True, False]
    assert groups.has_signal_S.tolist() == [False] * 3 + [True] * 2
    for rule in (advantages.group_advantage, advantages.leave_one_out):
        for scale in ("group", "batch", "none"):
            found = rule(reward, groups, scale)
            assert found[:3].tolist() == [0.0] * 3
            assert (found[3:] != 0).all()


@pytest.mark.parametrize("kind", ["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_stays_with_its_sample(kind: Any, bad: float) -> None:
    cfg = GrpoConfig(advantage=kind, scale="none" if kind == "rloo" else "group")
    reward, lengths = np.append(REWARD, bad), np.array([2, 1, 3, 1, 2, 1, 4])
    found = compared(cfg, reward, np.append(GROUP, 7), lengths)
    without = compared(cfg, REWARD, GROUP, lengths[:-1])
    assert found.scored_S.tolist() == [True] * 6 + [False]
    assert found.advantage_L[:-4] == pytest.approx(without.advantage_L, rel=1e-12)
    assert found.advantage_L[-4:].tolist() == [0.0] * 4


def test_a_sample_alone_is_compared_with_nobody() -> None:
    groups = Groups.of(np.array([1.0, math.nan, 2.0, 4.0]), np.array([0, 0, 1, 1]))
    assert groups.flat_G.tolist() == [True, False]
    assert advantages.leave_one_out(np.array([1.0, math.nan, 2.0, 4.0]), groups).tolist() == [0, 0, -2, 2]


def test_gae_by_hand() -> None:
    reward, value, lengths = np.array([0.0, 0.0, 1.0, -1.0]), np.array([0.5, 0.25, 0.5, 2.0]), np.array([3, 0, 1])
    gamma, lam = 0.9, 0.5
    last = 1.0 - 0.5
    middle = 0.9 * 0.5 - 0.25 + 0.45 * last
    first = 0.9 * 0.25 - 0.5 + 0.45 * middle
    found = advantages.gae(reward, value, lengths, gamma, lam)
    assert found == pytest.approx([first, middle, last, -1 - 2.0])
    after = advantages.gae(reward, value, lengths, gamma, lam, np.array([2.0, 0.0, 0.0]))
    assert after[2] == pytest.approx(1 + 0.9 * 2.0 - 0.5)
    assert after[3] == found[3]


def test_gae_at_its_ends() -> None:
    """lambda 1: the return minus the value, whatever the values in between; lambda 0: one token's surprise."""
    random = np.random.default_rng(0)
    lengths = np.array([4, 1, 7])
    reward, value = random.normal(size=12), random.normal(size=12)
    returns = advantages.to_go(reward, lengths, 0.9)
    assert returns[4] == pytest.approx(reward[4])
    assert returns[0] == pytest.approx(sum(0.9**t * reward[t] for t in range(4)))
    assert advantages.gae(reward, value, lengths, 0.9, 1.0) == pytest.approx(returns - value)
    assert advantages.gae(reward, value, lengths, 0.9, 0.0)[5] == pytest.approx(reward[5] + 0.9 * value[6] - value[5])


def test_whitening_is_over_what_counts() -> None:
    values, counts = np.array([1.0, 2.0, math.nan, 6.0, 100.0]), np.array([True, True, False, True, False])
    found = advantages.whiten(values, counts)
    deviation = math.sqrt((4 + 1 + 9) / 2 + 1e-8)
    assert found == pytest.approx([-2 / deviation, -1 / deviation, 0, 3 / deviation, 0])
    assert advantages.whiten(np.array([3.0]), None).tolist() == [0.0]
    assert advantages.whiten(np.full(5, 0.1)).tolist() == pytest.approx([0.0] * 5, abs=1e-10)


def test_reinforce_pp_by_hand() -> None:
    """The reward at the last token, each token's divergence from it on; whitened over all tokens."""
    cfg = GrpoConfig(advantage="reinforce_pp", kl="reward", kl_estimator="k1", kl_coef=0.5)
    found = compared(cfg, np.array([1.0, 0.0]), np.array([0, 1]), np.array([2, 1]), np.array([0.2, 0.4, -0.2]))
    plain = np.array([1 - 0.1 - 0.2, 1 - 0.2, 0.1])
    assert found.advantage_L == pytest.approx((plain - plain.mean()) / math.sqrt(plain.var(ddof=1) + 1e-8))


def test_reinforce_pp_baseline_takes_the_mean_of_the_group_first() -> None:
    cfg = GrpoConfig(advantage="reinforce_pp_baseline")
    lengths = np.array([1, 2, 1, 1, 1, 3])
    found = compared(cfg, REWARD, GROUP, lengths)
    plain = np.repeat([0.5, -0.5, -0.5, 0.5, -1, 1], lengths)
    assert found.advantage_L == pytest.approx((plain - plain.mean()) / math.sqrt(plain.var(ddof=1) + 1e-8))


def test_divergence_in_the_reward_of_a_group_is_summed_over_the_sample() -> None:
    cfg = GrpoConfig(advantage="rloo", scale="none", kl="reward", kl_estimator="k1", kl_coef=0.1)
    found = compared(cfg, np.array([1.0, 0.0]), np.array([4, 4]), np.array([2, 1]), np.array([0.3, 0.2, -0.5]))
    assert found.advantage_L == pytest.approx([0.95 - 0.05, 0.95 - 0.05, 0.05 - 0.95])


def test_ppo_by_hand() -> None:
    cfg = PpoConfig(gamma=1.0, lam=1.0, kl_coef=0.5, whiten=False)
    reward, lengths = np.array([2.0, math.nan, -1.0]), np.array([2, 2, 1])
    value, kl = np.array([0.5, 1.0, 9.0, 9.0, 0.0]), np.array([0.2, 0.4, 5.0, 5.0, 0.0])
    found = criticised(cfg, reward, lengths, value, kl)
    assert found.advantage_L == pytest.approx([2 - 0.3 - 0.5, 2 - 0.2 - 1.0, 0, 0, -1])
    assert found.return_L == pytest.approx([1.7, 1.8, 9, 9, -1])
    white = criticised(PpoConfig(gamma=1.0, lam=1.0, kl_coef=0.5), reward, lengths, value, kl)
    assert white.return_L == pytest.approx(found.return_L)
    assert white.advantage_L == pytest.approx(advantages.whiten(found.advantage_L, np.array([1, 1, 0, 0, 1], bool)))


def test_samples_that_are_not_learnt_from_stay_out_of_the_whitening() -> None:
    cfg = PpoConfig(kl="none", gamma=1.0, lam=1.0)
    kept = np.array([True, True, False])
    found = criticised(cfg, np.array([1.0, 2.0, 50.0]), np.array([1, 1, 1]), np.zeros(3), kept_S=kept)
    assert found.advantage_L == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5), 0], abs=1e-6)


def test_the_punishment_of_long_samples() -> None:
    """DAPO's: 20 % of 10 tokens are the buffer, so 8 are free and 9 cost half."""
    cfg = GrpoConfig(overlong="penalty", overlong_buffer=0.2, overlong_coef=2.0)
    assert shaped_reward(cfg, np.ones(4), np.array([3, 8, 9, 10]), 10) == pytest.approx([1, 1, 0, -1])
    assert shaped_reward(GrpoConfig(), np.ones(2), np.array([3, 10]), 10).tolist() == [1.0, 1.0]


def test_nothing_sampled_is_no_trouble() -> None:
    none = np.zeros(0)
    kinds: list[Any] = ["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
    for kind in kinds:
        found = compared(GrpoConfig(advantage=kind), none, none, none.astype(int))
        assert found.advantage_L.shape == found.scored_S.shape == (0,)
    assert criticised(PpoConfig(), np.ones(2), np.zeros(2, dtype=int), none, none).advantage_L.shape == (0,)
