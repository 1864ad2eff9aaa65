"""The order of training rows: it depends on the seed and the data only, never on ranks or micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data.batch import Row
from data.packing import best_fit, group_by_row

VERSION = 1
"""Part of the fingerprint of the data: raise it whenever the same seed gives other rows."""

DRAW, SHUFFLE, ROWS = range(3)
"""What a random stream is for: each use of the seed has its own."""


@dataclass(frozen=True)
class Pieces:
    """Parts of samples that fit in a row, of all sources in order; one entry an array a piece [P]."""

    source_P: np.ndarray
    """Which cache."""
    sample_P: np.ndarray
    """Which sample of it."""
    start_P: np.ndarray
    """First token of the sample."""
    length_P: np.ndarray
    """Tokens."""
    targets_P: np.ndarray
    """Learnt tokens that have a token before them."""
    channel_P: np.ndarray
    """Index into TrainingData.channels."""
    patches_P: np.ndarray
    """Patches of its pictures."""

    def __len__(self) -> int:
        return len(self.sample_P)


@dataclass(frozen=True)
class Epoch:
    """Rows of one pass: `pieces[starts[r]:starts[r + 1]]` are the pieces of row r."""

    pieces: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass
class RowOrder:
    """Rows 0, 1, 2, ... without end: epoch after epoch, without a gap.

    In epoch e every sample appears as often as the whole part of its source's weight says, and a share of the samples,
    as large as the rest of the weight, drawn with (seed, e), once more; the pieces are shuffled with (seed, e), packed,
    and the rows shuffled.
    """

    pieces: Pieces
    weights: tuple[float, ...]
    """Of each source."""
    seed: int
    seq_len: int
    packing: str
    patch_cost: float = 0.0
    """Work of a patch of a picture, in tokens."""
    _epochs: dict[int, Epoch] = field(default_factory=dict, repr=False)
    _first_rows: list[int] = field(default_factory=lambda: [0], repr=False)

    def rows(self, position: int, count: int) -> list[Row]:
        """Rows position .. position + count - 1."""
        found: list[Row] = []
        number, at = self._find(position)
        while len(found) < count:
            epoch = self.epoch(number)
            stop = min(len(epoch), at + count - len(found))
            found += [self._row(epoch, index) for index in range(at, stop)]
            number, at = number + 1, 0
        return found

    def epoch(self, number: int) -> Epoch:
        """Epoch `number`, counted from 0; the last two asked for are kept."""
        if number not in self._epochs:
            self._epochs = {n: kept for n, kept in self._epochs.items() if n == number - 1}
            self._epochs[number] = self._make_epoch(number)
        return self._epochs[number]

    def _find(self, position: int) -> tuple[int, int]:
        """(epoch, row in it) of a position. Whole weights give all epochs equally many rows: nothing is replayed."""
        if all(weight == int(weight) for weight in self.weights):
            return divmod(position, len(self.epoch(0)) if not self._epochs else len(next(iter(self._epochs.values()))))
        while self._first_rows[-1] <= position:
            self._first_rows.append(self._first_rows[-1] + len(self.epoch(len(self._first_rows) - 1)))
        number = int(np.searchsorted(self._first_rows, position, side="right")) - 1
        return number, position - self._first_rows[number]

    def _make_epoch(self, number: int) -> Epoch:
        drawn = np.concatenate([self.draw(number, source) for source in range(len(self.weights))])
        assert len(drawn), "the gate lets no empty mixture pass"
        drawn = self._stream(number, SHUFFLE).permutation(drawn)
        if self.packing == "none":
            return Epoch(drawn, np.arange(len(drawn) + 1))
        grouped, starts = group_by_row(best_fit(self.pieces.length_P[drawn], self.seq_len))
        order = self._stream(number, ROWS).permutation(len(starts) - 1)
        sizes = np.diff(starts)[order]
        new_starts = np.concatenate([[0], np.cumsum(sizes)])
        within = np.arange(len(drawn)) - np.repeat(new_starts[:-1], sizes)
        return Epoch(drawn[grouped[np.repeat(starts[:-1][order], sizes) + within]], new_starts)

    def draw(self, number: int, source: int) -> np.ndarray:
        """Pieces of one source in one epoch, as often as its weight says."""
        mine = np.flatnonzero(self.pieces.source_P == source)
        whole = int(self.weights[source])
        rest = self.weights[source] - whole
        drawn = [mine] * whole
        if rest > 0:
            samples = np.unique(self.pieces.sample_P[mine])
            some = self._stream(number, DRAW, source).permutation(samples)[: round(rest * len(samples))]
            drawn.append(mine[np.isin(self.pieces.sample_P[mine], some)])
        return np.concatenate([np.zeros(0, dtype=np.int64), *drawn])

    def _stream(self, number: int, *use: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, number, *use])))

    def _row(self, epoch: Epoch, index: int) -> Row:
        pieces = epoch.pieces[epoch.starts[index] : epoch.starts[index + 1]]
        return row_of(self.pieces, pieces, self.patch_cost)


def row_of(pieces: Pieces, chosen: np.ndarray, patch_cost: float) -> Row:
    """The chosen pieces as a row."""
    looked = float(pieces.patches_P[chosen].sum()) * patch_cost
    return Row(tuple(chosen.tolist()), tuple(pieces.length_P[chosen].tolist()), looked)


def packed_once(pieces: Pieces, seq_len: int, packing: str, patch_cost: float = 0.0) -> list[Row]:
    """All pieces once, in rows that do not depend on a seed."""
    rows_P = best_fit(pieces.length_P, seq_len) if packing == "best_fit" else np.arange(len(pieces))
    grouped, starts = group_by_row(rows_P)
    members = [grouped[starts[index] : starts[index + 1]] for index in range(len(starts) - 1)]
    return [row_of(pieces, part, patch_cost) for part in members]
