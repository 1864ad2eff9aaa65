"""The policy's loss over sampled tokens: clipped surrogates, and how tokens become one number.

Legend: T tokens of a micro-batch here, N documents (samples), X either. Log-probabilities in nats; where nothing is
learnt log-probabilities and advantages are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from data.batch import MicroBatch
from parallel.sharding import Axis
from trainer.rl.kl import clamp_above
from trainer.sequences import document_sums

Ratio = Literal["token", "sequence", "sequence_token"]
Loss = Literal["clipped", "cispo"]
Aggregation = Literal["sequence_mean", "token_mean", "constant"]


@dataclass(frozen=True)
class Clip:
    """Bounds of the ratio: from 1 - low to 1 + high."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    """Largest ratio that counts for a negative advantage, above 1 + high."""


@dataclass(frozen=True)
class PolicyLoss:
    """A micro-batch's loss, not yet divided by the count of the batch."""

    total: torch.Tensor
    """Differentiable scalar; under context parallel each rank's own, right in its gradient only."""
    loss_T: torch.Tensor
    """Detached loss of each token, before aggregation."""
    ratio_T: torch.Tensor
    """Detached policy / old policy, of the token or of its document."""


def surrogate(ratio_X: torch.Tensor, advantage_X: torch.Tensor, clip: Clip) -> torch.Tensor:
    """The clipped objective, to be made large [X] (PPO: Schulman et al. 2017, arXiv:1707.06347).

    min(ratio A, clip(ratio) A): no gain from going further than the bounds. With ``clip.dual`` never below dual x A for
    a negative A (Ye et al. 2020, arXiv:1912.09729): a token that became far more likely does not rule the step.
    """
    held_X = ratio_X.clamp(1 - clip.low, 1 + clip.high)
    if clip.dual is not None:
        ratio_X = ratio_X.clamp(max=clip.dual)
    return torch.min(ratio_X * advantage_X, held_X * advantage_X)


def cispo(ratio_T: torch.Tensor, advantage_T: torch.Tensor, log_prob_T: torch.Tensor, clip: Clip) -> torch.Tensor:
    """Log-probability times advantage times the clipped ratio as a mere weight, to be made large [T].

    CISPO (MiniMax 2025, arXiv:2506.13585): no token loses its gradient, however far its ratio is.
    """
    return ratio_T.detach().clamp(1 - clip.low, 1 + clip.high) * advantage_T * log_prob_T


def document_ratio(log_prob_T: torch.Tensor, old_T: torch.Tensor, batch: MicroBatch, cp: Axis) -> torch.Tensor:
    """exp of the mean log-ratio over the learnt tokens of each document, [N]: the geometric mean of its tokens' ratios.

    GSPO (Zheng et al. 2025, arXiv:2507.18071). Differentiable; the same on all cp ranks.
    """
    mean_N = document_sums(log_prob_T - old_T, batch, cp) / batch.targets_N.clamp(min=1)
    return torch.exp(clamp_above(mean_N))


def token_scale(aggregation: Aggregation, batch: MicroBatch, max_new_tokens: int) -> torch.Tensor:
    """What a token's loss is multiplied by before all are added and divided by the count of the batch, [T].

    sequence_mean: 1 / learnt tokens of its document, then / documents (GRPO); token_mean: 1, then / tokens (DAPO);
    constant: 1 / max_new_tokens, then / documents (Dr. GRPO).
    """
    if aggregation == "sequence_mean":
        return (1 / batch.targets_N.clamp(min=1).float())[batch.doc_T]
    scale = 1.0 if aggregation == "token_mean" else 1 / max_new_tokens
    return torch.full(batch.targets_T.shape, scale, device=batch.targets_T.device)


def policy_loss(
    log_prob_T: torch.Tensor,
    old_T: torch.Tensor,
    advantage_T: torch.Tensor,
    scale_T: torch.Tensor,
    batch: MicroBatch,
    cp: Axis,
    loss: Loss,
    ratio: Ratio,
    clip: Clip,
) -> PolicyLoss:
    """The aggregated loss of a micro-batch.

    Args:
        log_prob_T: of the policy now, differentiable.
        old_T: of the policy that the advantages belong to.
        advantage_T: of each learnt token, weights against the mismatch included.
        scale_T: see `token_scale`; equal within a document.
        ratio: of the token; of the document (GSPO); or the document's in value with the token's own gradient
            (GSPO-token), for advantages that differ within a document.
    """
    if ratio == "sequence" and loss == "clipped":
        return _by_document(log_prob_T, old_T, advantage_T, scale_T, batch, cp, clip)
    if ratio == "token":
        ratio_T = torch.exp(clamp_above(log_prob_T - old_T))
    else:
        ratio_T = document_ratio(log_prob_T, old_T, batch, cp).detach()[batch.doc_T]
        ratio_T = ratio_T * torch.exp(log_prob_T - log_prob_T.detach())
    if loss == "cispo":
        loss_T = -cispo(ratio_T, advantage_T, log_prob_T, clip)
    else:
        loss_T = -surrogate(ratio_T, advantage_T, clip)
    return PolicyLoss((loss_T * scale_T).sum(), loss_T.detach(), ratio_T.detach())


def _by_document(
    log_prob_T: torch.Tensor,
    old_T: torch.Tensor,
    advantage_T: torch.Tensor,
    scale_T: torch.Tensor,
    batch: MicroBatch,
    cp: Axis,
    clip: Clip,
) -> PolicyLoss:
    """All tokens of a document share a ratio, so their positive and their negative advantages are summed first.

    Every cp rank has the loss of the whole document: a token's gradient goes through the tokens of all ranks.
    """
    ratio_N = document_ratio(log_prob_T, old_T, batch, cp)
    gain_N = document_sums(advantage_T.clamp(min=0), batch, cp)
    cost_N = document_sums(advantage_T.clamp(max=0), batch, cp)
    loss_N = -surrogate(ratio_N, gain_N, clip) - surrogate(ratio_N, cost_N, clip)
    scale_N = torch.zeros_like(loss_N).scatter_(0, batch.doc_T, scale_T)
    ratio_T = ratio_N.detach()[batch.doc_T]
    loss_T = -surrogate(ratio_T, advantage_T, clip)
    return PolicyLoss((loss_N * scale_N).sum(), loss_T.detach(), ratio_T)
