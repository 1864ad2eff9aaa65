"""What a stage is: which tokens, pairs or samples it learns from, its loss over one micro-batch, what it reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from trainer.channels import Column


class Stage(Protocol):
    """The loss of a stage. It knows neither the layout nor how the loss is scaled."""

    contract: str
    """What the loss is, in the words the run prints at its start."""
    columns: tuple[Column, ...]
    """What the terms of `forward` are, K of them."""

    def count(self, micro_batches: Sequence[Any]) -> float:
        """This rank's share of the loss's denominator: ranks with different tokens (dp x cp) are summed.

        What every cp rank counts alike (pairs, documents) is to be divided by their number.
        """
        ...

    def forward(self, model: nn.Module, batch: Any, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`weight` times the summed loss of one micro-batch (a differentiable scalar), and its terms.

        Returns:
            (loss, terms_CK): terms are float64, detached, by channel; what cp ranks compute alike counts on one.
        """
        ...
