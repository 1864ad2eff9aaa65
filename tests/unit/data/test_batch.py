from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import Document, Row, collate, empty_micro_batch, shared_tokens, split_ragged, split_rows


def document(tokens: list[int], learn: list[int], channel: int = 0) -> Document:
    return Document(np.array(tokens), np.array(learn, dtype=bool), channel)


def test_hand_example() -> None:
    batch = collate([document([7], [1], 2), document([1, 2, 3], [1, 0, 1], 1), document([4, 5, 6, 8], [0, 1, 1, 1], 0)])
    assert batch.tokens_T.tolist() == [4, 5, 6, 8, 1, 2, 3, 7]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.targets_T.tolist() == [5, 6, 8, -100, -100, 3, -100, -100]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert batch.doc_channel_N.tolist() == [0, 1, 2]
    assert (batch.max_seqlen, batch.num_targets) == (4, 4)
    kinds = [batch.tokens_T, batch.positions_T, batch.targets_T, batch.cu_seqlens, batch.doc_channel_N]
    assert [str(tensor.dtype) for tensor in kinds] == ["torch.int64"] * 3 + ["torch.int32", "torch.int64"]


def test_empty_micro_batch_has_a_token_and_no_target() -> None:
    batch = empty_micro_batch()
    assert (len(batch.tokens_T), batch.num_targets, batch.cu_seqlens.tolist()) == (1, 0, [0, 1])


rows_strategy = st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=5), min_size=12, max_size=12)


def as_rows(lengths: list[list[int]]) -> list[Row]:
    return [Row((number,) * len(row), tuple(row)) for number, row in enumerate(lengths)]


@settings(max_examples=60, deadline=None)
@given(rows_strategy, st.sampled_from([(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)]))
def test_any_layout_holds_every_row_once(lengths: list[list[int]], layout: tuple[int, int]) -> None:
    world, micro = layout
    rows = as_rows(lengths)
    parts = [split_rows(rows, rank, world, micro) for rank in range(world)]
    assert {len(part) for part in parts} == {12 // (world * micro)}
    assert all(len(group) == micro for part in parts for group in part)
    assert sorted(row.pieces[0] for part in parts for group in part for row in group) == list(range(12))


@settings(max_examples=60, deadline=None)
@given(rows_strategy, st.integers(0, 12), st.sampled_from([(1, 5), (2, 3), (5, 2), (7, 1), (16, 1)]))
def test_ragged_split_gives_all_ranks_equally_many(lengths, count: int, layout: tuple[int, int]) -> None:
    world, micro = layout
    rows = as_rows(lengths)[:count]
    parts = [split_ragged(rows, rank, world, micro) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(group) <= micro for part in parts for group in part)
    assert sorted(row.pieces[0] for part in parts for group in part for row in group) == list(range(count))


def test_micro_batches_are_balanced_by_cost() -> None:
    """One row in four is long: dealt in order, one rank would get all of them."""
    rows = [Row((n,), (2000 if n % 4 == 0 else 100 + n,)) for n in range(32)]
    costs = [sum(row.cost for group in split_rows(rows, rank, 4, 4) for row in group) for rank in range(4)]
    assert max(costs) / min(costs) < 1.02


def test_rows_that_do_not_divide_name_the_key() -> None:
    with pytest.raises(ValueError, match=r"data\.global_batch_rows=10 .* 2 x 4 = 8; set data\.global_batch_rows=16"):
        split_rows([Row((0,), (1,))] * 10, 0, 2, 4)


def test_facts_follow_their_document_and_stand_where_the_token_is_predicted() -> None:
    """The longest document comes first; a number of token i stands at i - 1, and only where i is learnt."""
    short = Document(np.array([5, 6, 7]), np.array([True, True, False]), 1, {"side": 1.0}, {"old": np.array([9, 2, 3])})
    long = Document(
        np.arange(4), np.array([False, False, True, True]), 0, {"side": 0.0}, {"old": np.array([9.0, 9, -1.5, -2.5])}
    )
    batch = collate([short, long])
    assert batch.doc_facts["side"].tolist() == [0.0, 1.0]
    assert batch.token_facts["old"].tolist() == [0.0, -1.5, -2.5, 0.0, 2.0, 0.0, 0.0]
    assert batch.targets_N.tolist() == [2, 1] and batch.num_targets == 3
    assert batch.doc_T.tolist() == [0, 0, 0, 0, 1, 1, 1] and batch.channel_T.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_an_empty_micro_batch_has_the_facts_of_the_others() -> None:
    batch = empty_micro_batch(("side",), ("old",))
    assert batch.doc_facts["side"].tolist() == [0.0] and batch.token_facts["old"].tolist() == [0.0]
    assert batch.num_targets == 0


def test_what_documents_begin_with_is_there_once() -> None:
    """Prompt 1 2 3 with three answers, and another document. The 3 predicts each answer's first token: it stays."""
    answers = [[4, 5], [7, 8, 9], [4, 6]]
    documents = []
    for own in answers:
        tokens = np.array([1, 2, 3, *own])
        places = np.arange(len(tokens))
        documents.append(Document(tokens, places >= 3, 0, {"group": 0.0}, {"weight": places * 1.0}))
    learnt = np.array([False, True, True])
    documents.append(Document(np.array([1, 2, 3]), learnt, 1, {"group": 1.0}, {"weight": np.zeros(3)}))
    batch = collate(documents, share="group")
    assert batch.tokens_T.tolist() == [1, 2, 3, 7, 8, 9, 3, 4, 5, 3, 4, 6, 1, 2, 3]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 2, 3, 4, 0, 1, 2]
    no = -100
    assert batch.targets_T.tolist() == [no, no, 7, 8, 9, no, 4, 5, no, 4, 6, no, 2, 3, no]
    assert batch.cu_seqlens.tolist() == [0, 6, 9, 12, 15]
    assert batch.branches == ((0, 0), (0, 2), (0, 2), (3, 0)) and batch.inputs["branches"] == batch.branches
    assert batch.token_facts["weight"].tolist() == [0, 0, 3, 4, 5, 0, 3, 4, 0, 3, 4, 0, 0, 0, 0]
    assert batch.max_seqlen == 6 and batch.targets_N.tolist() == [3, 2, 2, 2]
    assert "branches" not in collate(documents).inputs
    assert "branches" not in collate(documents[2:], share="group").inputs, "nothing is shared"


@pytest.mark.parametrize(
    ("holder", "other", "learnt", "shared"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 5], 3, 2),
        ([1, 2, 3, 4], [1, 2, 3, 5], 2, 1),
        ([1, 2, 3, 4], [1, 9, 3, 5], 3, 1),
        ([1, 2, 3, 4], [1, 2, 3, 4], 4, 3),
        ([1, 2], [1, 2, 3, 4], 4, 2),
        ([1, 2, 3], [1, 2, 3], 0, 0),
    ],
)
def test_shared_tokens(holder: list[int], other: list[int], learnt: int, shared: int) -> None:
    """Up to the first difference and the token before the first learnt one; a token is always left."""
    first, second = (Document(np.array(ids), np.arange(len(ids)) >= learnt, 0) for ids in (holder, other))
    assert shared_tokens(first, second) == shared
