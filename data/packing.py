"""Which pieces share a row: best-fit decreasing over a whole epoch, in seconds for millions of pieces."""

from __future__ import annotations

import numpy as np


def best_fit(lengths_P: np.ndarray, seq_len: int) -> np.ndarray:
    """Put every piece in the fullest row that still has room for it, longest pieces first (best-fit decreasing).

    Lengths are small integers, so pieces of one length are placed together: rows are kept by the room they have left,
    and a row with room r takes r // length pieces at once, which is what placing them one by one would do (after one
    piece that row is the fullest that fits). The number of rows depends on the lengths only, not on their order;
    pieces of equal length take their places in the order given.

    Args:
        lengths_P: tokens of each piece, 1 .. seq_len.
        seq_len: room of a row.

    Returns:
        Row of each piece, int64 [P]; rows count from 0 without gaps.
    """
    rows_P = np.zeros(len(lengths_P), dtype=np.int64)
    if not len(lengths_P):
        return rows_P
    assert lengths_P.min() >= 1 and lengths_P.max() <= seq_len, "a piece must fit in a row"
    order_P = np.argsort(-lengths_P.astype(np.int64), kind="stable")
    sorted_P = lengths_P[order_P]
    borders = np.flatnonzero(np.diff(sorted_P)) + 1
    placed_P = np.zeros(len(lengths_P), dtype=np.int64)
    open_rows = _OpenRows(seq_len)
    for start, stop in zip(np.r_[0, borders], np.r_[borders, len(sorted_P)], strict=True):
        length, at = int(sorted_P[start]), int(start)
        while at < stop:
            rows, room = open_rows.take_fullest(length, int(stop) - at)
            each = room // length
            taken = min(len(rows) * each, int(stop) - at)
            placed_P[at : at + taken] = np.repeat(rows, each)[:taken]
            full, rest = divmod(taken, each)
            open_rows.put(rows[:full], room - each * length)
            if rest:
                open_rows.put(rows[full:], room - rest * length)
            at += taken
    rows_P[order_P] = placed_P
    return rows_P


class _OpenRows:
    """Rows by the room they have left, and a bit set of the rooms that occur (a Python integer: shifts are fast)."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len
        self._by_room: dict[int, list[np.ndarray]] = {}
        self._rooms = 0
        self._count = 0

    def take_fullest(self, length: int, pieces: int) -> tuple[np.ndarray, int]:
        """Rows with the least room >= length, as many as `pieces` pieces can use, and that room; new rows if none."""
        fitting = self._rooms >> length
        if fitting == 0:
            need = -(-pieces // (self._seq_len // length))
            self._count += need
            return np.arange(self._count - need, self._count), self._seq_len
        room = length + (fitting & -fitting).bit_length() - 1
        need = -(-pieces // (room // length))
        parts = self._by_room[room]
        rows = parts.pop()
        if len(rows) > need:
            parts.append(rows[need:])
            rows = rows[:need]
        if not parts:
            del self._by_room[room]
            self._rooms &= ~(1 << room)
        return rows, room

    def put(self, rows: np.ndarray, room: int) -> None:
        if len(rows) and room > 0:
            self._by_room.setdefault(room, []).append(rows)
            self._rooms |= 1 << room


def group_by_row(rows_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of each row: `pieces[starts[r]:starts[r + 1]]` are those of row r, in the order given."""
    pieces_P = np.argsort(rows_P, kind="stable")
    num_rows = int(rows_P.max()) + 1 if len(rows_P) else 0
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows_P, minlength=num_rows))]).astype(np.int64)
    return pieces_P, starts
