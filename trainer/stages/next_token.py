"""Next-token loss: the stage of pretraining and of supervised fine-tuning.

The two differ only in which tokens carry a target, and that is settled in the data.
Legend: T tokens of a micro-batch, N documents, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class NextToken:
    """Cross-entropy of the next token, summed over supervised tokens.

    Args:
        num_channels: number of channels of the run.
    """

    contract = (
        "loss = sum over supervised tokens of -log p(token | its document so far) / number of supervised tokens,\n"
        "       both taken over the whole global batch: all ranks, all micro-batches, counted before the backward.\n"
        "       A document never sees another one; its first token has no loss."
    )

    def __init__(self, num_channels: int):
        self.num_channels = num_channels

    def count(self, micro_batches: Sequence[Any]) -> float:
        """This rank's share of the loss's denominator: its supervised tokens."""
        return float(sum(batch.num_targets for batch in micro_batches))

    def forward(self, model: nn.Module, batch: Any, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``weight`` times the summed loss of one micro-batch, and its sums by channel.

        Returns:
            (loss, sums_C2): a differentiable scalar; float64 sum of token losses and number of tokens by channel.
        """
        loss, loss_T = model(**batch.inputs, targets_T=batch.targets_T, loss_weight=weight)
        valid_T = batch.targets_T != -100
        terms_T2 = torch.stack([loss_T.double(), valid_T.double()], dim=1)
        sums_C2 = torch.zeros(self.num_channels, 2, dtype=torch.float64, device=loss_T.device)
        return loss, sums_C2.index_add_(0, batch.channel_T, terms_T2)
