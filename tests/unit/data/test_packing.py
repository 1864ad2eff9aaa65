from __future__ import annotations

import bisect

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import best_fit, group_by_row


def one_by_one(lengths: list[int], seq_len: int) -> list[int]:
    """Reference: room left in each row after placing every piece in the fullest row that fits, longest first."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else seq_len
        bisect.insort(rooms, room - length)
    return rooms


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=200), st.integers(40, 97))
def test_same_rows_as_placing_one_by_one(lengths: list[int], seq_len: int) -> None:
    rows_P = best_fit(np.array(lengths, dtype=np.int64), seq_len)
    assert len(rows_P) == len(lengths)
    used = np.bincount(rows_P, weights=lengths) if lengths else np.zeros(0)
    assert (used > 0).all() and (used <= seq_len).all()
    assert sorted(seq_len - used) == one_by_one(lengths, seq_len)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=100), st.randoms())
def test_number_of_rows_does_not_depend_on_the_order(lengths: list[int], random) -> None:
    shuffled = list(lengths)
    random.shuffle(shuffled)
    assert best_fit(np.array(lengths), 16).max() == best_fit(np.array(shuffled), 16).max()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=100))
def test_every_piece_is_in_exactly_one_row(lengths: list[int]) -> None:
    pieces, starts = group_by_row(best_fit(np.array(lengths), 16))
    assert sorted(pieces) == list(range(len(lengths)))
    assert starts[0] == 0 and starts[-1] == len(lengths) and (np.diff(starts) > 0).all()


def test_rows_are_full_on_skewed_lengths() -> None:
    """Log-normal lengths, median 120, as in chat data: nothing to speak of is left empty."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(120), 1.0, 20_000), 1, 2048).astype(np.int64)
    rows = best_fit(lengths, 2048)
    assert lengths.sum() / ((rows.max() + 1) * 2048) > 0.995


def test_hand_example() -> None:
    assert best_fit(np.array([3, 7, 5, 5, 2]), 10).tolist() == [0, 0, 1, 1, 2]
