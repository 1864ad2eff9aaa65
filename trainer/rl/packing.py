"""Samples as this rank's micro-batches: rows filled best-fit, dealt out by work, as many as the schedule wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data.batch import Document, MicroBatch, Row, collate, split_ragged
from data.packing import best_fit, group_by_row
from parallel.config import ParallelConfig
from parallel.groups import Groups
from parallel.schedules import next_micro_batches
from trainer.context import local_part
from trainer.loop import on_device

SAMPLE = "sample"
"""The fact that says which sample a document is; -1 in a micro-batch that only fills up."""


@dataclass(frozen=True)
class Packer:
    """Makes micro-batches for the layout of a run."""

    seq_len: int
    """Tokens of a row."""
    micro_batch_rows: int
    """Rows of a micro-batch."""
    groups: Groups
    layout: ParallelConfig

    def micro_batches(self, documents: Sequence[Document]) -> list[MicroBatch]:
        """This rank's part: the micro-batches of all dp ranks hold every document once, each rank has equally many.

        Args:
            documents: at least one, of at most ``seq_len`` tokens, all with the same facts.
        """
        dp, rows = self.groups.dp, self._rows(documents)
        count = -(-len(rows) // (dp.size * self.micro_batch_rows))
        if self.layout.pp > 1:
            count = next_micro_batches(self.layout.schedule, self.layout.pp, count)
        mine = split_ragged(_split(rows, count * dp.size), dp.rank, dp.size, self.micro_batch_rows, count)
        assert len(mine) == count, "more rows than were counted"
        whole = [
            collate([documents[i] for row in part for i in row.pieces] or [_nothing(documents[0])]) for part in mine
        ]
        parts = [local_part(batch, self.groups.cp, self.layout.context) for batch in whole]
        return [on_device(batch, self.groups.device) for batch in parts]

    def _rows(self, documents: Sequence[Document]) -> list[Row]:
        lengths = np.array([len(each.tokens_L) for each in documents], dtype=np.int64)
        grouped, starts = group_by_row(best_fit(lengths, self.seq_len))
        members = [grouped[a:b] for a, b in pairwise(starts)]
        return [Row(tuple(part.tolist()), tuple(lengths[part].tolist())) for part in members]


def _split(rows: list[Row], wanted: int) -> list[Row]:
    """So many rows at least, as long as some hold several documents: rows are cut where that evens them out.

    What fills up a micro-batch without a document has no loss, but routers would see its token.
    """
    rows = list(rows)
    while len(rows) < wanted and any(len(row.pieces) > 1 for row in rows):
        largest = max((row for row in rows if len(row.pieces) > 1), key=lambda row: row.num_tokens)
        rows.remove(largest)
        rows += [Row(largest.pieces[part], largest.lengths[part]) for part in (slice(0, None, 2), slice(1, None, 2))]
    return rows


def _nothing(like: Document) -> Document:
    """One token that is not learnt, with the same facts."""
    facts = dict.fromkeys(like.facts, 0.0) | ({SAMPLE: -1.0} if SAMPLE in like.facts else {})
    token = np.zeros(1, dtype=np.int64)
    return dataclasses.replace(
        like,
        tokens_L=token,
        learn_L=token.astype(bool),
        channel=0,
        facts=facts,
        token_facts={name: np.zeros(1) for name in like.token_facts},
    )
