"""Where context parallel puts each token: every one once, evenly, and with even causal work."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.context import Placement, Range, context_problems, lengths_here, places, rows_of, token_ranges

PACKS = st.lists(st.integers(1, 60) | st.integers(1, 900), min_size=1, max_size=40)
SIZES = st.integers(1, 9)


def borders_of(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def causal_pairs(borders: Sequence[int], ranges: Sequence[Range]) -> int:
    """Query-key pairs of the tokens in `ranges`, counted token by token."""
    first = {token: start for start, stop in pairwise(borders) for token in range(start, stop)}
    return sum(token - first[token] + 1 for a, b in ranges for token in range(a, b))


def imbalance(values: Sequence[int]) -> float:
    """The largest over the average, less one."""
    return max(values) * len(values) / sum(values) - 1


@settings(deadline=None, max_examples=200)
@given(PACKS, SIZES, st.sampled_from(["ulysses", "ring"]))
def test_every_token_once_in_order_and_evenly(lengths: list[int], size: int, kind: Any) -> None:
    borders = borders_of(lengths)
    placement = token_ranges(borders, size, kind)
    assert len(placement) == size
    for ranges in placement:
        tokens = places(ranges).tolist()
        assert tokens == sorted(tokens) and all(a < b for a, b in ranges)
    assert sorted(token for ranges in placement for token in places(ranges).tolist()) == list(range(borders[-1]))
    assert max(rows_of(placement)) - min(rows_of(placement)) <= 1
    here = [lengths_here(borders, ranges) for ranges in placement]
    assert [sum(of_doc) for of_doc in zip(*here, strict=True)] == lengths
    assert tuple(sum(held) for held in here) == rows_of(placement)


@settings(deadline=None, max_examples=100)
@given(PACKS, SIZES)
def test_ring_ranges_keep_to_a_document(lengths: list[int], size: int) -> None:
    """And a rank has at most two of each: one before and one behind the middle."""
    borders = borders_of(lengths)
    for ranges in token_ranges(borders, size, "ring"):
        held = [next(i for i, stop in enumerate(borders[1:]) if a < stop) for a, _ in ranges]
        assert all(b <= borders[doc + 1] for doc, (_, b) in zip(held, ranges, strict=True))
        assert max([0, *(held.count(doc) for doc in held)]) <= 2


@settings(deadline=None, max_examples=50)
@given(st.integers(400, 3000), st.integers(2, 8))
def test_one_long_document_is_even_work(length: int, size: int) -> None:
    """Causal pairs within 4 % (one run of tokens a rank is off by 50 to nearly 100 %)."""
    pairs = [causal_pairs([0, length], ranges) for ranges in token_ranges([0, length], size, "ring")]
    assert imbalance(pairs) <= 0.04
    in_runs = [causal_pairs([0, length], ranges) for ranges in token_ranges([0, length], size, "ulysses")]
    assert imbalance(in_runs) >= 0.45


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 500), min_size=8, max_size=40), st.sampled_from([2, 4]))
def test_a_mix_is_even_work(short: list[int], size: int) -> None:
    """One document of half the pack and many shorter ones: causal pairs within 25 %, tokens within one."""
    borders = borders_of([*short, max(sum(short), 400)])
    pairs = [causal_pairs(borders, ranges) for ranges in token_ranges(borders, size, "ring")]
    assert imbalance(pairs) <= 0.25


def shared(borders: Sequence[int], placement: Placement) -> int:
    """Documents that several ranks have a part of."""
    here = [lengths_here(borders, ranges) for ranges in placement]
    return sum(sum(length > 0 for length in of_doc) > 1 for of_doc in zip(*here, strict=True))


def test_by_hand() -> None:
    assert token_ranges([0, 10], 2, "ulysses") == (((0, 5),), ((5, 10),))
    assert token_ranges([0, 12], 3, "ring") == (((0, 2), (10, 12)), ((2, 4), (8, 10)), ((4, 8),))
    assert token_ranges([0, 1], 2, "ring") == ((), ((0, 1),))
    assert token_ranges([0, 16, 32, 36, 40], 2, "ring") == (((0, 16), (32, 36)), ((16, 32), (36, 40)))


def test_whole_documents_go_nowhere() -> None:
    """Equal documents, as many as ranks or more, and many short ones are not cut, up to what evens the ranks out."""
    equal = borders_of([64] * 8)
    assert shared(equal, token_ranges(equal, 4, "ring")) == 0
    short = borders_of([*range(10, 60)])
    assert shared(short, token_ranges(short, 4, "ring")) <= 3


HEADS = [
    (8, 8, 1, 4, None),
    (8, 2, 1, 4, None),
    (32, 8, 4, 4, None),
    (32, 4, 8, 4, None),
    (12, 12, 1, 8, 6),
    (12, 6, 1, 4, 3),
    (14, 2, 1, 4, 2),
    (8, 8, 8, 2, 1),
]


@pytest.mark.parametrize(("heads", "groups", "tp", "cp", "way_out"), HEADS)
def test_ulysses_needs_heads(heads: int, groups: int, tp: int, cp: int, way_out: int | None) -> None:
    assert context_problems(heads, groups, tp, cp, "ring") == []
    told = context_problems(heads, groups, tp, cp, "ulysses")
    assert [(key, value, way) for key, value, _, way in told] == (
        [("parallel.cp", cp, f"parallel.context=ring, or parallel.cp={way_out}")] if way_out else []
    )
    assert context_problems(heads, groups, tp, way_out or cp, "ulysses") == []


def test_ring_has_a_back_end_of_its_own() -> None:
    (told,) = context_problems(8, 8, 1, 2, "ring", "flash_attn")
    assert told[0] == "engine.attention" and "parallel.context=ulysses" in told[3]
    assert context_problems(8, 8, 1, 2, "ulysses", "flash_attn") == context_problems(8, 8, 1, 1, "ring", "eager") == []
