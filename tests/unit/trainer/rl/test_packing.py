"""Micro-batches of samples: every document once, as many micro-batches everywhere as the schedule wants."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import Document
from parallel.config import ParallelConfig
from parallel.sharding import Axis
from trainer.rl.packing import SAMPLE, Packer


def _documents(lengths: list[int]) -> list[Document]:
    return [
        Document(np.arange(n), np.arange(n) > 0, 0, {SAMPLE: float(i)}, {"advantage": np.full(n, i)})
        for i, n in enumerate(lengths)
    ]


def _packed(lengths: list[int], dp: int, rows: int = 1, **layout: Any) -> list[list[Any]]:
    """The micro-batches of each dp rank."""
    found = []
    for rank in range(dp):
        groups: Any = SimpleNamespace(dp=Axis(dp, rank), cp=Axis(), device=torch.device("cpu"))
        found.append(Packer(16, rows, groups, ParallelConfig(**layout)).micro_batches(_documents(lengths)))
    return found


@pytest.mark.parametrize(
    ("lengths", "dp", "rows", "layout", "each"),
    [
        ([16, 9, 7, 5, 5, 5], 1, 1, {}, 3),
        ([16, 9, 7, 5, 5, 5], 2, 1, {}, 2),
        ([3, 3, 3, 3], 4, 2, {}, 1),
        ([3, 3, 3, 3, 3], 1, 4, {"pp": 4}, 4),
        ([4] * 9, 1, 1, {"pp": 2, "schedule": "interleaved"}, 3),
    ],
)
def test_every_document_once_and_no_rank_without_one(
    lengths: list[int], dp: int, rows: int, layout: dict[str, Any], each: int
) -> None:
    found = _packed(lengths, dp, rows, **layout)
    assert [len(batches) for batches in found] == [each] * dp
    samples = [int(s) for batches in found for batch in batches for s in batch.doc_facts[SAMPLE].tolist()]
    assert sorted(samples) == list(range(len(lengths)))  # a filler would be -1
    assert all(len(batch.tokens_T) <= 16 * rows for batches in found for batch in batches)


def test_where_documents_are_fewer_than_ranks_something_without_a_target_fills_up() -> None:
    found = _packed([5], 2)
    (batch,), (filler,) = found if found[0][0].num_targets else found[::-1]
    assert batch.num_targets == 4 and batch.token_facts["advantage"].shape == (5,)
    assert filler.num_targets == 0 and filler.doc_facts[SAMPLE].tolist() == [-1.0]
    assert filler.token_facts.keys() == batch.token_facts.keys()
