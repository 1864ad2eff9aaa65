"""Next-token loss: the stage of pretraining and of supervised fine-tuning.

The two differ only in which tokens carry a target, and that is settled in the data.
Legend: T tokens of a micro-batch, N documents, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from trainer.channels import Column, by_channel


@dataclass(frozen=True)
class NextTokenConfig:
    """Pretraining and supervised fine-tuning."""

    name: Literal["pretrain", "sft"] = "sft"
    """Which training stage to run."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that carry loss: only the assistant's (chat) or completion's, or every token."""

    @property
    def learns_from(self) -> Literal["text"]:
        """The kind of data."""
        return "text"

    def problems(self) -> list[tuple[str, object, str, str]]:
        """Nothing can be wrong in itself."""
        return []


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

    columns = (Column("loss", over="tokens"), Column("tokens"))

    def __init__(self, num_channels: int):
        self.num_channels = num_channels

    def count(self, micro_batches: Sequence[Any]) -> float:
        """This rank's share of the loss's denominator: its supervised tokens."""
        return float(sum(batch.num_targets for batch in micro_batches))

    def forward(self, model: nn.Module, batch: Any, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``weight`` times the summed loss of one micro-batch, and its sums by channel.

        Returns:
            (loss, terms_C2): a differentiable scalar; float64 sum of token losses and number of tokens by channel.
        """
        loss, loss_T = model(**batch.inputs, targets_T=batch.targets_T, loss_weight=weight)
        terms = (loss_T, batch.targets_T != -100)
        return loss, by_channel(terms, batch.channel_T, self.num_channels)
