"""Pairs of answers within a micro-batch, and what stages that learn from them report.

Legend: N documents of a micro-batch, P its pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data.batch import MicroBatch
from trainer.channels import Column

PAIR_COLUMNS = (
    Column("loss", over="pairs"),
    Column("accuracy", over="pairs"),
    Column("margin", over="pairs"),
    Column("chosen_reward", over="pairs"),
    Column("rejected_reward", over="pairs"),
    Column("pairs"),
)
"""Accuracy: share of pairs whose chosen answer has the larger reward; margin: by how much it is larger."""


def num_pairs(batch: MicroBatch) -> int:
    """Pairs of a micro-batch; the one that fills up has a single document and none."""
    return len(batch.doc_channel_N) // 2


def pair_documents(batch: MicroBatch) -> torch.Tensor:
    """Which documents are pairs: int64 [P, 2], the chosen answer first."""
    count = num_pairs(batch)
    if not count:
        return torch.zeros(0, 2, dtype=torch.int64, device=batch.doc_channel_N.device)
    order_N = (2 * batch.doc_facts["pair"] + batch.doc_facts["side"]).argsort()
    return order_N.view(count, 2)


def pair_terms(
    loss_P: torch.Tensor, chosen_P: torch.Tensor, rejected_P: torch.Tensor, *more: torch.Tensor
) -> Sequence[torch.Tensor]:
    """The columns `PAIR_COLUMNS` of each pair from its loss and rewards; `more` follow."""
    margin_P = chosen_P - rejected_P
    return (loss_P, chosen_P > rejected_P, margin_P, chosen_P, rejected_P, torch.ones_like(margin_P), *more)
