"""A step of reinforcement learning: write, judge, ask the models, learn. It knows steps, not models.

One step is one rollout and all its updates. Every rank holds all samples of a step and computes rewards and advantages
alike; only texts, scores and gradients are shared out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from parallel.groups import Groups
from parallel.step_clock import idle_share
from trainer.config import RunConfig
from trainer.logging.log import Log
from trainer.logging.perf import peak_memory_gib
from trainer.loop import Progress
from trainer.rl.collecting import Collected, Collector
from trainer.rl.experience import Experience, Scores, experience, needs_old
from trainer.rl.learner import Learner, Learnt, parts
from trainer.rl.measures import experience_metrics, rollout_metrics
from trainer.rl.samples import Model, Samples, Scorer, value_before
from trainer.rl.served import ServedWeights
from trainer.rollout.records import Records
from trainer.stages.policy_config import PolicyConfig


@dataclass
class Clock:
    """Seconds of a step's parts."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count the time inside for a part."""
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


@dataclass(frozen=True)
class RlTrainer:
    """Everything a step needs. ``save`` writes a checkpoint of the given progress."""

    cfg: RunConfig
    stage: PolicyConfig
    groups: Groups
    policy: Learner
    critic: Learner | None
    reference: Model | None
    collector: Collector
    scorer: Scorer
    log: Log
    save: Callable[[Progress], None]
    total_steps: int
    records: Records | None = None
    """Writes rollouts down; None = nowhere."""

    def run(self, progress: Progress) -> None:
        """Train from ``progress`` to the last step; evaluates and saves at the end whatever the intervals say."""
        every = self.cfg.run
        if progress.step == 0:
            self._evaluate(0)
        while progress.step < self.total_steps:
            metrics = self.step(progress)
            last = progress.step == self.total_steps
            if progress.step % self.cfg.log.every == 0 or last:
                self.log.step(progress.step, metrics)
            else:
                self.log.advance(progress.step)
            if last or (every.eval_every and progress.step % every.eval_every == 0):
                self._evaluate(progress.step)
            if last or (every.save_every and progress.step % every.save_every == 0):
                self.save(progress)

    def step(self, progress: Progress) -> dict[str, float]:
        """One rollout and its updates. Returns all of its numbers."""
        clock = Clock()
        began = time.perf_counter()
        with clock.of("rollout"):
            collected = self.collector.collect(progress.position, progress.step)
        metrics = rollout_metrics(collected.rollouts, self.collector.channels, "rollout")
        metrics |= collected.metrics
        samples = self.collector.samples(collected.kept)
        policy, critic, advantages = Learnt(), Learnt(), {}
        if len(samples):
            with clock.of("score"):
                found = experience(self.stage, samples, self.scores(samples), self.cfg.rollout.max_new_tokens)
            advantages = found.advantages()
            metrics |= experience_metrics(found, self.collector.channels)
            with clock.of("update"):
                self.update(found, progress.step, policy, critic)
        metrics |= self.policy.metrics(policy, self.collector.channels)
        metrics["train/lr"] = self.policy.optim.lr_at(progress.step, self.total_steps)
        if self.critic is not None:
            metrics |= self.critic.metrics(critic, self.collector.channels)
        weights = self.collector.weights
        if isinstance(weights, ServedWeights) and (said := weights.far_off(metrics)):
            self.log.note(said)
        if self.records is not None:
            self.records.write(progress.step + 1, collected.rollouts, advantages)
        metrics |= self._speed(clock, time.perf_counter() - began, collected, samples, policy, critic)
        progress.step += 1
        progress.position += collected.prompts
        return metrics

    def scores(self, samples: Samples) -> Scores:
        """What the models say of the samples; only those are asked whose word is needed."""
        stage, temperature = self.stage, self.cfg.rollout.temperature
        old_L = reference_L = value_L = None
        if needs_old(stage):
            old_L = self.scorer.log_probs(self.policy.engine, samples, temperature)
        if self.reference is not None:
            reference_L = self.scorer.log_probs(self.reference, samples, temperature)
        if self.critic is not None:
            value_L = value_before(self.scorer.values(self.critic.engine, samples), samples)
        return Scores(old_L, reference_L, value_L)

    def update(self, found: Experience, step: int, policy: Learnt, critic: Learnt) -> None:
        """All updates of a step."""
        which = np.flatnonzero(found.learns_S)
        for epoch in range(self.stage.epochs):
            for some in parts(which, self.stage.mini_batches, self.cfg.run.seed, step, epoch):
                lr = self.policy.optim.lr_at(step, self.total_steps)
                self.policy.learn(found.samples, some.tolist(), found.policy_L, lr, policy)
                if self.critic is not None:
                    lr = self.critic.optim.lr_at(step, self.total_steps)
                    self.critic.learn(found.samples, some.tolist(), found.critic_L, lr, critic)

    def _evaluate(self, step: int) -> None:
        rollouts = self.collector.evaluate(step)
        if rollouts:
            if self.records is not None:
                self.records.write(step, rollouts, evaluation=True)
            self.log.evaluation(step, rollout_metrics(rollouts, self.collector.channels, "eval"))

    def _speed(
        self, clock: Clock, seconds: float, collected: Collected, samples: Samples, policy: Learnt, critic: Learnt
    ) -> dict[str, float]:
        """Tokens a second of each part, all devices together, and what share of a step each takes."""
        written, asked = collected.written, self._asked * int(samples.borders_S1[-1]) if len(samples) else 0
        tokens = {"generate": written.tokens, "score": asked, "update": policy.tokens + critic.tokens}
        spent = {**clock.seconds, "generate": written.seconds, "weights": collected.weights_s}
        spent["rewards"] = spent.pop("rollout") - written.seconds - collected.weights_s
        found = {f"perf/{part}_share": took / seconds for part, took in spent.items()}
        for part, count in tokens.items():
            if spent.get(part):
                found[f"perf/{part}_tokens_per_s"] = count / spent[part]
        found |= {
            "perf/tokens_per_s": written.tokens / seconds,
            "perf/step_time": seconds,
            "perf/generate_idle": written.idle,
            "perf/memory_gib": peak_memory_gib(self.groups.device),
        }
        if self.groups.pp.size > 1 and policy.norms:
            times = self.groups.gather_stages(self.policy.engine.pipeline.last_step())
            found["perf/pipeline_idle"] = idle_share(times)
        return found

    @property
    def _asked(self) -> int:
        """Models that are asked about every sample before the update."""
        models = (needs_old(self.stage), self.reference is not None, self.critic is not None)
        return sum(models) + self.collector.has_reward_model
