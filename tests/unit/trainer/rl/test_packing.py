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
from trainer.rl.packing import GROUP, SAMPLE, Packer


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


def _answers(groups: dict[int, tuple[int, list[int]]]) -> list[Document]:
    """Prompts of so many tokens (the same within a group) and answers of so many."""
    found = []
    for group, (asked, answers) in groups.items():
        for length in answers:
            tokens = np.concatenate([np.full(asked, group), 100 + np.arange(length)])
            facts = {SAMPLE: float(len(found)), GROUP: float(group)}
            learn = np.arange(len(tokens)) >= asked
            found.append(Document(tokens, learn, 0, facts, {"advantage": learn * 1.0}))
    return found


def _shared(documents: list[Document], seq_len: int, dp: int = 1) -> list[list[Any]]:
    found = []
    for rank in range(dp):
        groups: Any = SimpleNamespace(dp=Axis(dp, rank), cp=Axis(), device=torch.device("cpu"))
        found.append(Packer(seq_len, 1, groups, ParallelConfig(), share=True).micro_batches(documents))
    return found


@pytest.mark.parametrize("dp", [1, 2])
def test_a_row_holds_as_many_answers_as_it_has_room_for_beside_their_prompt(dp: int) -> None:
    """A prompt of 6 with answers of 4, 4, 3, 3: 10 + 5 tokens, then the prompt again with the others, 9 + 4, beside a
    whole document of 3. The second prompt's answers are 11 + 4: a prompt's last token stays with each answer."""
    documents = _answers({0: (6, [3, 4, 3, 4]), 1: (5, [6, 3]), 2: (2, [1])})
    found = [batch for batches in _shared(documents, 16, dp) for batch in batches]
    samples = sorted(int(s) for batch in found for s in batch.doc_facts[SAMPLE].tolist())
    assert samples == list(range(7))
    assert dp == 2 or sorted(len(batch.tokens_T) for batch in found) == [15, 15, 16]
    assert all(len(batch.tokens_T) <= 16 for batch in found)
    learnt = sum(int((batch.targets_T >= 0).sum()) for batch in found)
    assert learnt == 24 and sum(float(batch.token_facts["advantage"].sum()) for batch in found) == 24


def test_answers_without_a_common_prompt_are_packed_as_without_sharing() -> None:
    documents = _answers({i: (3, [n]) for i, n in enumerate((13, 6, 4, 2, 2, 2))})
    alone: Any = SimpleNamespace(dp=Axis(), cp=Axis(), device=torch.device("cpu"))
    plain = Packer(16, 1, alone, ParallelConfig()).micro_batches(documents)
    shared = _shared(documents, 16)[0]
    assert [batch.tokens_T.tolist() for batch in shared] == [batch.tokens_T.tolist() for batch in plain]
    assert not any(batch.branches for batch in shared)
