"""Made-up training rows that a layout cannot treat evenly: documents of 1 token to a whole row, few targets in some,
channels that most rows do not have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.batch import Document, MicroBatch, Row, collate, empty_micro_batch, split_ragged, split_rows
from data.config import DataConfig

CHANNELS = ("most", "some", "rare")
EVAL_ROWS = 3
_EVAL_SEED = 2**20


class MadeUpRows:
    """Stands in for ``data.pipeline.TrainingData``.

    Args:
        cfg: the data section; its sources are not read.
        vocab: ids are below it.
        all_learn: every token is learnt, as in pretraining; else some, as in fine-tuning.
    """

    channels = CHANNELS

    def __init__(self, cfg: DataConfig, vocab: int, all_learn: bool) -> None:
        self.cfg, self.vocab, self.all_learn = cfg, vocab, all_learn

    def global_batch(self, position: int, rows: int) -> list[Row]:
        """The rows of one step, the same at every layout."""
        numbers = range(position, position + rows)
        return [Row((n,), tuple(len(doc.tokens_L) for doc in self.row(n))) for n in numbers]

    def micro_batches(self, rows: Sequence[Row], rank: int, world: int, micro_batch_rows: int) -> list[MicroBatch]:
        """A rank's micro-batches, dealt out by the rule of training."""
        return [self._micro_batch(part) for part in split_rows(rows, rank, world, micro_batch_rows)]

    def eval_batches(self, rank: int, world: int, micro_batch_rows: int) -> list[MicroBatch]:
        """A rank's share of the held-out rows; they do not divide evenly."""
        mine = split_ragged(self.global_batch(_EVAL_SEED, EVAL_ROWS), rank, world, micro_batch_rows)
        return [self._micro_batch(part) if part else empty_micro_batch() for part in mine]

    def _micro_batch(self, rows: Sequence[Row]) -> MicroBatch:
        return collate([doc for row in rows for doc in self.row(row.pieces[0])])

    def row(self, number: int) -> list[Document]:
        """Row ``number`` of the run, as long as data.seq_len or shorter."""
        random = np.random.default_rng([11, number])
        return [
            Document(random.integers(0, self.vocab, size=n), self._learns(n, random), self._channel(number))
            for n in self._lengths(number, random)
        ]

    def _lengths(self, number: int, random: np.random.Generator) -> list[int]:
        space = self.cfg.seq_len
        if self.cfg.packing == "none" or number % 4 == 1:
            return [space if number % 4 == 1 else int(random.integers(2, space + 1))]
        lengths = []
        while space > 2 and len(lengths) < 6:
            lengths.append(int(random.integers(1, space)))
            space -= lengths[-1]
        return lengths

    def _learns(self, length: int, random: np.random.Generator) -> np.ndarray:
        learn = np.ones(length, dtype=bool)
        if not self.all_learn:
            learn[: random.integers(1, max(length - 1, 2))] = False
            learn[random.random(length) < 0.2] = False
            learn[-1] = True
        return learn

    def _channel(self, number: int) -> int:
        return 2 if number % 7 == 3 else 1 if number % 3 == 2 else 0
