"""Samples are drawn by the generator, gradients taken by the trainer: two programs whose probabilities differ a little.

How much is measured at every step; where it matters each token's loss is weighted by trainer / generator, held in
bounds: cut off at them (truncated importance sampling) or 0 outside of them (masked). Both are of the policy before the
update; how far the update has moved it since is the ratio's business (`trainer/rl/policy_loss.py`).

Legend: T tokens of a micro-batch here, N documents. Log-probabilities in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from data.batch import MicroBatch
from parallel.sharding import Axis
from trainer.rl.kl import clamp_above, estimate
from trainer.sequences import document_sums

Correction = Literal["none", "truncate", "mask"]
Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class Mismatch:
    """What a micro-batch shows of it, detached; 1 and 0 where nothing is learnt."""

    weight_T: torch.Tensor
    """What each token's loss is multiplied by."""
    ratio_T: torch.Tensor
    """trainer / generator: of the token, or of its whole document."""
    cut_T: torch.Tensor
    """bool: out of bounds."""
    k1_T: torch.Tensor
    """log generator - log trainer: averages to KL(generator || trainer)."""
    k3_T: torch.Tensor
    """The same, never negative."""


@torch.no_grad()
def measure(
    trainer_T: torch.Tensor,
    generator_T: torch.Tensor,
    batch: MicroBatch,
    cp: Axis,
    correction: Correction = "none",
    level: Level = "token",
    low: float = 0.0,
    high: float = 2.0,
) -> Mismatch:
    """The mismatch of a micro-batch and the weights that correct for it.

    Args:
        trainer_T: log-probability of each target by the trainer, before the update; 0 where there is none.
        generator_T: the generator's; a number that is not finite counts as the trainer's own.
        correction: bounds [low, high] on the ratio; see the top of this file. ``none``: the bounds mark, all weights 1.
        level: ratio of the token, or the product over the learnt tokens of its document (unbiased, but wider).
    """
    generator_T = torch.where(torch.isfinite(generator_T), generator_T, trainer_T)
    log_ratio_T = trainer_T - generator_T
    if level == "sequence":
        log_ratio_T = document_sums(log_ratio_T, batch, cp)[batch.doc_T]
    ratio_T = torch.exp(clamp_above(log_ratio_T))
    cut_T = ((ratio_T < low) | (ratio_T > high)) & (batch.targets_T >= 0)
    if correction == "truncate":
        weight_T = ratio_T.clamp(low, high)
    elif correction == "mask":
        weight_T = ratio_T.masked_fill(cut_T, 0.0)
    else:
        weight_T = torch.ones_like(ratio_T)
    k1_T = generator_T - trainer_T
    return Mismatch(weight_T, ratio_T, cut_T, k1_T, estimate("k3", generator_T, trainer_T))
