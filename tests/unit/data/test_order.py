from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data.order import Pieces, RowOrder


def make_order(
    weights: tuple[float, ...] = (1.0,), seed: int = 0, packing: str = "best_fit", num: int = 60
) -> RowOrder:
    """`num` samples a source with lengths 1..8; sample 0 of each is two pieces."""
    sources = np.repeat(np.arange(len(weights)), num + 1)
    samples = np.tile(np.r_[0, np.arange(num)], len(weights))
    lengths = 1 + (np.arange(len(sources)) * 7) % 8
    zero = np.zeros(len(sources), dtype=np.int64)
    return RowOrder(Pieces(sources, samples, zero, lengths, lengths, zero, zero), weights, seed, 8, packing)


def pieces_of(order: RowOrder, start: int, stop: int) -> list[int]:
    return [piece for row in order.rows(start, stop - start) for piece in row.pieces]


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_each_epoch_holds_every_piece_once_and_epochs_follow_without_a_gap(packing: str) -> None:
    order = make_order(packing=packing)
    size = len(order.epoch(0))
    for number in range(3):
        assert sorted(pieces_of(order, number * size, (number + 1) * size)) == list(range(61))
    first, second = (pieces_of(order, n * size, (n + 1) * size) for n in range(2))
    assert first != second
    across = [row.pieces for row in order.rows(size - 2, 4)]
    assert across == [row.pieces for row in order.rows(size - 2, 2)] + [row.pieces for row in order.rows(size, 2)]


@pytest.mark.parametrize("weights", [(1.0,), (2.0, 1.0), (1.5, 0.3)])
def test_any_start_gives_the_same_rows(weights: tuple[float, ...]) -> None:
    """As after a resume: a fresh order asked for a late position at once."""
    through = [row for start in range(0, 400, 10) for row in make_order(weights).rows(start, 10)]
    order = make_order(weights)
    walked = [row for start in range(0, 400, 10) for row in order.rows(start, 10)]
    assert through == walked
    assert make_order(weights).rows(333, 5) == walked[333:338]
    assert make_order(weights, seed=1).rows(0, 10) != walked[:10]


def test_weights_repeat_whole_and_draw_the_rest_anew() -> None:
    order = make_order((2.25, 0.5, 0.0))
    chosen = []
    for number in range(2):
        count = Counter(order.epoch(number).pieces.tolist())
        first, second = ([count[p] for p in range(s * 61, s * 61 + 61)] for s in range(2))
        samples_of_first = first[1:]  # piece 0 and 1 are both sample 0
        assert first[0] == first[1]
        assert Counter(samples_of_first) == {2: 45, 3: 15}
        assert Counter(second[1:]) == {0: 30, 1: 30}
        assert not any(count[piece] for piece in range(122, 183))
        chosen.append(tuple(second))
    assert chosen[0] != chosen[1]


def test_no_row_is_longer_than_seq_len() -> None:
    order = make_order((1.5, 2.0))
    assert all(row.num_tokens <= 8 for row in order.rows(0, 300))


def test_the_order_is_pinned() -> None:
    """Changing it changes every run that resumes: raise order.VERSION then, so that its fingerprint tells."""
    rows = make_order(num=6).rows(0, 4)
    assert [row.pieces for row in rows] == [(2, 0), (3,), (5,), (4, 6)]
