"""PPO: a critic says what to expect after every token (Schulman et al. 2017; for language models Ziegler et al. 2019).

The policy's update is that of `trainer/stages/policy.py`; here are PPO's settings and the critic's update.
Legend: T tokens of a micro-batch, C channels, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from trainer.channels import Column, by_channel
from trainer.rl.kl import Estimator
from trainer.rl.policy_loss import Aggregation
from trainer.rl.value_loss import value_loss
from trainer.stages.policy_config import PolicyConfig, Problem


@dataclass(frozen=True)
class PpoConfig(PolicyConfig):
    """Proximal policy optimisation with a critic."""

    name: Literal["ppo"] = "ppo"
    """Which training stage to run."""
    aggregation: Aggregation = "token_mean"
    """How tokens become one loss: the mean over samples of each one's mean (GRPO), the mean over all tokens (DAPO), or
    the sum over tokens / (samples x rollout.max_new_tokens) (Dr. GRPO)."""
    kl: Literal["none", "loss", "reward"] = "reward"
    """Where the divergence from the reference is held down: nowhere, in the loss, or in the reward of each token."""
    kl_estimator: Estimator = "k1"
    """Estimator of the divergence. In the loss k2 has the right gradient on average, k3 that of KL(reference ||
    policy); in the reward k1 has the right one."""
    kl_coef: float = 0.05
    """Weight of the divergence (beta)."""
    mini_batches: int = 4
    """Updates for each pass: the samples are cut into so many parts."""
    gamma: float = 1.0
    """Discount of what comes one token later."""
    lam: float = 0.95
    """GAE's lambda: 1 = the whole rest of the sample counts (wide), 0 = the critic's word after one token (narrow)."""
    whiten: bool = True
    """Advantages of the whole batch are given mean 0 and variance 1."""
    value_clip: float | None = 0.2
    """How far a value may go from that at the rollout before its gradient only pulls it back; null = no bound."""
    critic: str | None = None
    """What the critic starts from: a reward model or critic; null = rollout.reward_model if there is one, else the
    policy's start with a fresh head."""
    critic_adapter: bool = False
    """Train an adapter of the critic's own, as the section adapter says, and its head; false trains all of the
    critic."""
    critic_lr: float | None = None
    """Peak learning rate of the critic; null = optim.lr."""

    def problems(self) -> list[Problem]:
        """Values wrong in themselves, as (key, value, reason, way out)."""
        rules = [
            ("gamma", 0 <= self.gamma <= 1, "lies in 0 .. 1", "stage.gamma=1"),
            ("lam", 0 <= self.lam <= 1, "lies in 0 .. 1", "stage.lam=0.95"),
            (
                "value_clip",
                self.value_clip is None or 0 < self.value_clip < float("inf"),
                "must be above 0",
                "stage.value_clip=0.2 or stage.value_clip=null",
            ),
            ("critic_lr", self.critic_lr is None or self.critic_lr > 0, "must be above 0", "stage.critic_lr=null"),
        ]
        own = [(f"stage.{key}", getattr(self, key), why, way) for key, good, why, way in rules if not good]
        return super().problems() + own


class Critic:
    """The update of a critic: a value before each learnt token against the return from there on.

    A micro-batch's `token_facts`: ``return``; ``value``, the critic's own at the rollout.

    Args:
        cfg: the stage section.
        num_channels: number of channels of the run.
    """

    columns = (
        Column("loss", over="tokens"),
        Column("value", over="tokens"),
        Column("return", over="tokens"),
        Column("clipped", over="tokens"),
        Column("tokens"),
    )

    def __init__(self, cfg: PpoConfig, num_channels: int):
        self.cfg, self.num_channels = cfg, num_channels
        bound = (
            "" if cfg.value_clip is None else f", at least that of a value held {cfg.value_clip:g} around the old one"
        )
        self.contract = f"critic loss = (value - return)^2 / 2{bound}; the mean over all learnt tokens."

    def count(self, micro_batches: Sequence[Any]) -> float:
        """This rank's share of the loss's denominator: its learnt tokens."""
        return float(sum(batch.num_targets for batch in micro_batches))

    def forward(self, model: nn.Module, batch: Any, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``weight`` times the summed loss of one micro-batch, and its terms.

        Returns:
            (loss, terms_CK): a differentiable scalar; float64 by channel, see `columns`.
        """
        learnt_T = batch.targets_T >= 0
        value_X = model(**batch.inputs, output="head")[: len(learnt_T)][learnt_T]
        facts_X = {name: fact_T[learnt_T] for name, fact_T in batch.token_facts.items()}
        loss_X, held_X = value_loss(value_X, facts_X["value"], facts_X["return"], self.cfg.value_clip)
        terms = (loss_X, value_X, facts_X["return"], held_X, torch.ones_like(loss_X))
        return weight * loss_X.sum(), by_channel(terms, batch.channel_T[learnt_T], self.num_channels)
