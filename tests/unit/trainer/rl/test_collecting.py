"""Which rollouts a step learns from: dynamic sampling, empty texts, the reward model's part."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from data.prompts import Prompt
from trainer.rl.collecting import Collector
from trainer.rl.samples import Samples
from trainer.rl.writer import Written
from trainer.rollout.config import RolloutConfig
from trainer.rollout.types import Rollout
from trainer.stages.grpo import GrpoConfig

CFG = RolloutConfig(prompts_per_step=3, samples=2, max_new_tokens=8, reward_model="somewhere")


class Asked:
    """Prompts by number; those that are no multiple of `good` have two equal rewards."""

    channels = ("all",)
    held_out: tuple[Prompt, ...] = ()

    def __init__(self, good: int) -> None:
        self.good, self.taken = good, []

    def prompts(self, position: int, count: int) -> list[Prompt]:
        self.taken.append((position, count))
        return [Prompt(n, 0, "all", (1, 2), "", None, {}) for n in range(position, position + count)]

    def shown(self, prompts: Sequence[Prompt]) -> list[Any]:
        return []

    def collect(self, prompts: Sequence[Prompt], writer: Any, step: int, evaluation: bool = False) -> list[Rollout]:
        return [_rollout(p, s, float(s if p.number % self.good == 0 else 1)) for p in prompts for s in (0, 1)]


def _rollout(prompt: Prompt, sample: int, reward: float, new: int = 3) -> Rollout:
    learn = (False, False, *[True] * new)
    parts = (prompt.tokens + (7,) * new, learn, (0.0,) * len(learn))
    return Rollout(prompt, sample, *parts, "", "stop", (), {"rule": reward}, reward)


def _collector(stage: GrpoConfig, asked: Asked, reward_model: Any = None, scorer: Any = None) -> Collector:
    author = SimpleNamespace(reset=lambda: None, written=Written())
    weights = SimpleNamespace(fill=lambda: None, drop=lambda: None)
    parts: Any = (author, weights, scorer, reward_model)
    return Collector(stage, CFG, asked, asked, *parts, offload=False)


def test_without_dynamic_sampling_flat_groups_stay() -> None:
    asked = Asked(good=2)
    found = _collector(GrpoConfig(), asked).collect(10, 0)
    assert asked.taken == [(10, 3)] and found.prompts == 3 and len(found.kept) == 6


def test_groups_without_signal_give_way_to_further_prompts() -> None:
    asked = Asked(good=2)
    found = _collector(GrpoConfig(dynamic_sampling=True), asked).collect(11, 0)
    # 11, 12, 13 give one group; 14, 15 one more; 16 the third
    assert asked.taken == [(11, 3), (14, 2), (16, 1)]
    assert found.prompts == 6 and {each.prompt.number for each in found.kept} == {12, 14, 16}
    assert len(found.rollouts) == 12
    assert found.metrics == {"rollout/rounds": 3.0, "rollout/kept_groups": 3.0}


def test_dynamic_sampling_gives_up_after_its_rounds() -> None:
    asked = Asked(good=1000)
    found = _collector(GrpoConfig(dynamic_sampling=True, sampling_rounds=2), asked).collect(1, 0)
    assert asked.taken == [(1, 3), (4, 3)] and found.prompts == 6 and found.kept == []


def test_a_soft_punishment_of_length_is_a_signal() -> None:
    """Equal rewards, unlike lengths: with the punishment the group tells better from worse."""
    stage = GrpoConfig(dynamic_sampling=True, sampling_rounds=1, overlong="penalty", overlong_buffer=0.5)
    asked = Asked(good=1)
    prompt = Prompt(0, 0, "all", (1, 2), "", None, {})
    asked.collect = lambda *_, **__: [_rollout(prompt, 0, 1.0, 3), _rollout(prompt, 1, 1.0, 8)]
    assert len(_collector(stage, asked).collect(0, 0).kept) == 2


def test_empty_texts_are_no_samples_and_the_reward_models_part_is_added() -> None:
    prompt = Prompt(0, 0, "all", (1, 2), "", None, {})
    asked = Asked(good=1)
    asked.collect = lambda *_, **__: [_rollout(prompt, 0, 1.0), _rollout(prompt, 1, 0.5, new=0)]
    scored: list[int] = []

    def last_values(model: Any, samples: Samples) -> np.ndarray:
        scored.append(len(samples))
        return np.full(len(samples), 2.0)

    collector = _collector(GrpoConfig(), asked, object(), SimpleNamespace(last_values=last_values))
    found = collector.collect(0, 0)
    assert scored == [1]
    assert [each.rewards for each in found.rollouts] == [
        {"rule": 1.0, "reward_model": 2.0},
        {"rule": 0.5, "reward_model": 0.0},
    ]
    # of the section's own parts only the reward model is named, so it alone counts
    assert [each.reward for each in found.rollouts] == [2.0, 0.0]
    assert len(collector.samples(found.kept)) == 1
