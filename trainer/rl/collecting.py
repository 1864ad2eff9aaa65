"""The rollouts of a step: the policy's weights into the generator, texts, rewards, and which groups are kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from data.batch import Document
from data.prompts import Prompt
from parallel.frozen import Frozen
from trainer.rl.advantages import Groups
from trainer.rl.credit import shaped_reward
from trainer.rl.samples import Samples, Scorer
from trainer.rl.served import ServedAuthor, ServedWeights
from trainer.rl.sights import Sights
from trainer.rl.weights import GeneratorWeights, TrainedItself
from trainer.rl.writer import Author, Written
from trainer.rollout.config import REWARD_MODEL, RolloutConfig
from trainer.rollout.rewards import with_parts
from trainer.rollout.types import Rollout, Writer
from trainer.stages.grpo import GrpoConfig
from trainer.stages.policy_config import PolicyConfig


class Prompts(Protocol):
    """The prompts of a run."""

    @property
    def channels(self) -> tuple[str, ...]:
        """The run's channels."""
        ...

    def prompts(self, position: int, count: int) -> list[Prompt]:
        """The next ones, `position` prompts after the begin of training; epochs follow each other without a gap."""
        ...

    def shown(self, prompts: Sequence[Prompt]) -> list[Document]:
        """Prompts that show something as documents with their pictures."""
        ...

    held_out: Any
    """Those that are never learnt from: a list of `Prompt`."""


class Asks(Protocol):
    """What makes rollouts of prompts: all samples of a prompt beside each other, with the rule rewards."""

    def collect(
        self, prompts: Sequence[Prompt], writer: Writer, step: int, evaluation: bool = False
    ) -> list[Rollout]: ...


@dataclass
class Collected:
    """The rollouts of a step."""

    rollouts: list[Rollout] = field(default_factory=list)
    """All of them."""
    kept: list[Rollout] = field(default_factory=list)
    """Those to learn from."""
    prompts: int = 0
    """Prompts taken."""
    metrics: dict[str, float] = field(default_factory=dict)
    written: Written = field(default_factory=Written)
    weights_s: float = 0.0
    """Seconds in which weights were moved."""


@dataclass(frozen=True)
class Collector:
    """Makes rollouts with the policy as it stands.

    Args:
        offload: give the memory of the generator's copy of the weights back when it has written.
        sights: gives what prompts show; None = the policy sees nothing.
    """

    stage: PolicyConfig
    cfg: RolloutConfig
    prompts: Prompts
    asks: Asks
    author: Author | ServedAuthor
    weights: GeneratorWeights | TrainedItself | ServedWeights
    scorer: Scorer
    reward_model: Frozen | None
    offload: bool
    sights: Sights | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """The run's channels."""
        return self.prompts.channels

    def collect(self, position: int, step: int) -> Collected:
        """The rollouts of a step from the prompts at ``position`` on.

        With dynamic sampling groups whose rewards are all alike give way to those of further prompts.
        """
        found = Collected()
        self._begin(found)
        rounds, wanted = self._rounds, self.cfg.prompts_per_step
        groups = tried = 0
        while groups < wanted and tried < rounds:
            prompts = self.prompts.prompts(position + found.prompts, wanted - groups)
            rollouts = self._judged(self.asks.collect(prompts, self.author, step))
            kept = self._with_signal(rollouts) if rounds > 1 or self._dynamic else rollouts
            found.rollouts += rollouts
            found.kept += kept
            found.prompts += len(prompts)
            groups, tried = len({each.prompt.number for each in found.kept}), tried + 1
        if self._dynamic:
            found.metrics = {"rollout/rounds": float(tried), "rollout/kept_groups": float(groups)}
        self._end(found)
        return found

    def evaluate(self, step: int) -> list[Rollout]:
        """Rollouts of the held-out prompts, after ``step``."""
        if not self.prompts.held_out:
            return []
        found = Collected()
        self._begin(found)
        found.rollouts = self._judged(self.asks.collect(self.prompts.held_out, self.author, step, evaluation=True))
        self._end(found)
        return found.rollouts

    def samples(self, rollouts: Sequence[Rollout]) -> Samples:
        """Those rollouts in which the policy wrote something."""
        some = [each for each in rollouts if each.new_tokens]
        return Samples(some, np.array([each.prompt.channel for each in some], dtype=np.int64), self.sights)

    @property
    def has_reward_model(self) -> bool:
        """Whether a model gives a part of the reward."""
        return self.reward_model is not None

    @property
    def _dynamic(self) -> bool:
        return isinstance(self.stage, GrpoConfig) and self.stage.dynamic_sampling

    @property
    def _rounds(self) -> int:
        return self.stage.sampling_rounds if isinstance(self.stage, GrpoConfig) and self._dynamic else 1

    def _begin(self, found: Collected) -> None:
        began = time.perf_counter()
        self.weights.fill()
        found.weights_s = time.perf_counter() - began
        self.author.reset()
        if self.sights is not None:
            self.sights.forget()

    def _end(self, found: Collected) -> None:
        found.written = self.author.written
        if self.offload:
            self.weights.drop()

    def _judged(self, rollouts: list[Rollout]) -> list[Rollout]:
        """With the reward model's part."""
        samples = self.samples(rollouts)
        if self.reward_model is None or not len(samples):
            return rollouts
        scores = iter(self.scorer.last_values(self.reward_model, samples).tolist())
        return [
            with_parts(each, {REWARD_MODEL: next(scores) if each.new_tokens else 0.0}, self.cfg) for each in rollouts
        ]

    def _with_signal(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The groups in which some samples are better than others."""
        reward_S = np.array([each.reward for each in rollouts])
        length_S = np.array([each.new_tokens for each in rollouts])
        group_S = np.array([each.prompt.number for each in rollouts])
        groups = Groups.of(shaped_reward(self.stage, reward_S, length_S, self.cfg.max_new_tokens), group_S)
        flat_S = groups.flat_G[groups.member_S]
        return [each for each, flat in zip(rollouts, flat_S, strict=True) if not flat]
