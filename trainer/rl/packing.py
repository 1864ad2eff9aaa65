"""Samples as this rank's micro-batches: rows filled best-fit, dealt out by work, as many as the schedule wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data.batch import Document, MicroBatch, Row, collate, shared_tokens, split_ragged
from data.packing import best_fit, group_by_row
from parallel.config import ParallelConfig
from parallel.groups import Groups
from parallel.schedules import next_micro_batches
from trainer.context import local_part
from trainer.loop import on_device

SAMPLE = "sample"
"""The fact that says which sample a document is; -1 in a micro-batch that only fills up."""
GROUP = "group"
"""The fact that says which prompt a document answers."""


Shown = Callable[[Sequence[Document]], list[Document]]
"""Documents with what they show."""


@dataclass(frozen=True)
class Packer:
    """Makes micro-batches for the layout of a run."""

    seq_len: int
    """Tokens of a row."""
    micro_batch_rows: int
    """Rows of a micro-batch."""
    groups: Groups
    layout: ParallelConfig
    share: bool = False
    """Answers to one prompt that come into one micro-batch have it in common once."""

    def micro_batches(self, documents: Sequence[Document], shown: Shown | None = None) -> list[MicroBatch]:
        """This rank's part: the micro-batches of all dp ranks hold every document once, each rank has equally many.

        Args:
            documents: at least one, of at most ``seq_len`` tokens, all with the same facts.
            shown: gives documents their pictures; asked for those of this rank alone.
        """
        dp, rows = self.groups.dp, self._rows(documents)
        count = -(-len(rows) // (dp.size * self.micro_batch_rows))
        if self.layout.pp > 1:
            count = next_micro_batches(self.layout.schedule, self.layout.pp, count)
        mine = split_ragged(_split(rows, count * dp.size), dp.rank, dp.size, self.micro_batch_rows, count)
        assert len(mine) == count, "more rows than were counted"
        chosen = [[documents[i] for row in part for i in row.pieces] for part in mine]
        seen = chosen if shown is None else [shown(part) for part in chosen]
        whole = [collate(part or [_nothing(documents[0])], GROUP if self.share else None) for part in seen]
        parts = [local_part(batch, self.groups.cp, self.layout.context) for batch in whole]
        return [on_device(batch, self.groups.device) for batch in parts]

    def _rows(self, documents: Sequence[Document]) -> list[Row]:
        if self.share:
            units = [unit for group in _groups(documents) for unit in _units(documents, group, self.seq_len)]
        else:
            units = [Row((number,), (len(each.tokens_L),)) for number, each in enumerate(documents)]
        grouped, starts = group_by_row(best_fit(np.array([unit.num_tokens for unit in units]), self.seq_len))
        members = [[units[i] for i in grouped[a:b]] for a, b in pairwise(starts)]
        return [
            Row(tuple(i for unit in part for i in unit.pieces), tuple(n for unit in part for n in unit.lengths))
            for part in members
        ]


def _groups(documents: Sequence[Document]) -> list[list[int]]:
    """The numbers of the answers to each prompt, the longest first, as `collate` has them."""
    groups: dict[float, list[int]] = {}
    for number in sorted(range(len(documents)), key=lambda number: -len(documents[number].tokens_L)):
        groups.setdefault(documents[number].facts[GROUP], []).append(number)
    return list(groups.values())


def _units(documents: Sequence[Document], group: Sequence[int], seq_len: int) -> list[Row]:
    """As many answers to a prompt side by side as a row holds: the first whole, of the others what is their own."""
    units: list[Row] = []
    for number in group:
        whole, last = len(documents[number].tokens_L), units[-1] if units else None
        own = whole if last is None else whole - shared_tokens(documents[last.pieces[0]], documents[number])
        if last is not None and last.num_tokens + own <= seq_len:
            units[-1] = Row((*last.pieces, number), (*last.lengths, own))
        else:
            units.append(Row((number,), (whole,)))
    return units


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
