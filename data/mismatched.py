"""Answers to other prompts: what a policy's distance to its reference is estimated on when answers come unpaired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from data.batch import Document, MicroBatch, Row, collate, empty_micro_batch, split_ragged
from data.documents import documents_of
from data.packing import best_fit, group_by_row
from data.pipeline import TrainingData


def mismatched_batches(
    data: TrainingData, rows: Sequence[Row] | None, rank: int, world: int, micro_batch_rows: int
) -> list[MicroBatch]:
    """This rank's share of the answers to other prompts within some rows, each once over all ranks; equally many
    micro-batches on every rank. Prompts keep their pictures; an answer that shows one is in none of them.

    Args:
        data: judged answers.
        rows: the rows of a step; None = everything that is held out.
    """
    pieces = data.order.pieces if rows is not None else data.held_out
    chosen = range(len(pieces)) if rows is None else [piece for row in rows for piece in row.pieces]
    seq_len = data.order.seq_len
    documents = documents_of(data.caches, {}, pieces, list(chosen))
    found = _exchanged(documents, seq_len)
    look = data.look
    if look is None or not len(chosen):
        return dealt([doc for _, doc in found], seq_len, rank, world, micro_batch_rows)
    places = [(data.caches[pieces.source_P[piece]], int(pieces.sample_P[piece])) for piece in chosen]
    shows = [
        bool((cache.pictures.of(sample)["start"] >= int(np.argmax(doc.learn_L))).any())
        for (cache, sample), doc in zip(places, documents, strict=True)
    ]
    kept = [(n, doc) for n, doc in found if not shows[n] and not shows[(n + 1) % len(shows)]]

    def shown(numbers: Sequence[int]) -> list[Document]:
        return look([(kept[i][1], *places[kept[i][0]], 0) for i in numbers])

    return dealt([doc for _, doc in kept], seq_len, rank, world, micro_batch_rows, shown)


def dealt(
    found: Sequence[Document],
    seq_len: int,
    rank: int,
    world: int,
    micro_batch_rows: int,
    shown: Callable[[Sequence[int]], list[Document]] | None = None,
) -> list[MicroBatch]:
    """This rank's share of some documents, packed best-fit; equally many micro-batches on every rank.

    ``shown``: the documents of these numbers with their pictures.
    """
    lengths = np.array([len(doc.tokens_L) for doc in found], dtype=np.int64)
    grouped, starts = group_by_row(best_fit(lengths, seq_len))
    members = [grouped[start:stop] for start, stop in pairwise(starts)]
    light = [Row(tuple(part.tolist()), tuple(lengths[part].tolist())) for part in members]
    mine = split_ragged(light, rank, world, micro_batch_rows)
    numbers = [[number for row in part for number in row.pieces] for part in mine]
    documents = [[found[n] for n in part] if shown is None else shown(part) for part in numbers]
    return [collate(part) if part else empty_micro_batch() for part in documents]


def mismatched(documents: Sequence[Document], seq_len: int) -> list[Document]:
    """Each document's prompt with the answer of the next one, in a circle; without facts, its own channel.

    A prompt ends where the first learnt token stands. What would be longer than ``seq_len`` loses the answer's end, and
    one whose prompt fills the row is left out.
    """
    return [doc for _, doc in _exchanged(documents, seq_len)]


def _exchanged(documents: Sequence[Document], seq_len: int) -> list[tuple[int, Document]]:
    """The same, each with the number of the document that gives the prompt."""
    starts = [int(np.argmax(doc.learn_L)) for doc in documents]
    found = []
    for number, (doc, start) in enumerate(zip(documents, starts, strict=True)):
        other = (number + 1) % len(documents)
        answer, learn = documents[other].tokens_L[starts[other] :], documents[other].learn_L[starts[other] :]
        if start >= seq_len:
            continue
        tokens_L = np.concatenate([doc.tokens_L[:start], answer])[:seq_len]
        learn_L = np.concatenate([doc.learn_L[:start], learn])[:seq_len]
        found.append((number, replace(doc, tokens_L=tokens_L, learn_L=learn_L, facts={}, token_facts={})))
    return found
