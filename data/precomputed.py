"""Numbers of documents that are computed once and kept beside their tokens: a reference's log-probabilities.

    data = precomputed(data, "reference", made_by, score, rank=..., world=..., micro_batch_rows=..., peers=...)

From then on every micro-batch has `doc_facts["reference"]`, in training and in evaluations. The numbers of a source lie
in the folder of its token cache, one file for each `made_by` and data.seq_len; a file under its name is complete. A
source whose file is there is not scored again, whatever the layout, the seed or the other sources of the run are.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial

import numpy as np

from data.batch import MicroBatch, split_ragged
from data.cache_files import TokenCache
from data.disk import not_shared, writing
from data.order import Pieces, packed_once
from data.peers import Peers
from data.pipeline import TrainingData

VERSION = 1
"""Part of every file's name: raise it whenever the numbers' order or meaning changes."""

DOCUMENT = "document"
"""Fact of the documents to score: the index of their number, -1 for what fills up."""

Score = Callable[[Iterator[MicroBatch], int], np.ndarray]
"""(this rank's micro-batches, D) -> float64 [D], the same on every rank: of each document of any rank its number at the
index that the micro-batch's fact `document` says; what stands elsewhere is not read. All ranks get equally many
micro-batches, in a fixed order; they are made one by one as they are asked for."""


def precomputed(
    data: TrainingData,
    name: str,
    made_by: str,
    score: Score,
    *,
    rank: int,
    world: int,
    micro_batch_rows: int,
    peers: Peers,
) -> TrainingData:
    """The data with the fact `name` of every document, held-out ones included. To be called by all ranks together.

    Args:
        data: preference pairs or judged answers.
        made_by: everything that decides the numbers beside the tokens: the model's weights, precision, temperature.
        score: computes the numbers that are not there yet; it is not called if all are.
        rank: of this process among those that share the rows out (data parallel ranks).
        world: how many there are.
        micro_batch_rows: rows of one micro-batch.
        peers: all ranks.

    Raises:
        ValueError: a number is not finite, or the folder of the caches cannot be written.
    """
    assert data.kind in ("preference", "unpaired"), "numbers of texts that are cut into pieces would have no document"
    paths = peers.from_first(lambda: [_path(cache, name, made_by, data.order.seq_len) for cache in data.caches])
    missing = peers.from_first(lambda: [i for i, path in enumerate(paths) if not _complete(path, data.caches[i])])
    if missing:
        index = _indices(data.caches)
        values_D = score(_batches(data, index, missing, rank, world, micro_batch_rows), _total(data.caches))
        peers.from_first(lambda: _save(data, name, paths, missing, index, values_D))
    read: list[np.ndarray] = []
    peers.run(lambda: read.extend(_read(path) for path in paths))
    return data.with_numbers(name, read)


def _path(cache: TokenCache, name: str, made_by: str, seq_len: int) -> str:
    parts = repr((VERSION, name, made_by, seq_len))  # what is longer than seq_len is cut or dropped
    digest = hashlib.blake2b(parts.encode("utf-8"), digest_size=16).hexdigest()
    return os.path.join(cache.folder, f"{name}-{digest}.npy")


def _complete(path: str, cache: TokenCache) -> bool:
    """Whether the numbers of the cache are there; a damaged file is written again."""
    try:
        return np.load(path, mmap_mode="r").shape == (cache.num_samples, _per_sample(cache))
    except (OSError, ValueError):
        return False


def _read(path: str) -> np.ndarray:
    if not os.path.isfile(path):
        raise not_shared(os.path.dirname(os.path.dirname(path)))
    return np.load(path, mmap_mode="r")


def _indices(caches: list[TokenCache]) -> list[np.ndarray]:
    """The index of every document, float64 [samples, documents] of each cache: facts are numbers."""
    sizes = [cache.num_samples * _per_sample(cache) for cache in caches]
    starts = np.cumsum([0, *sizes])
    return [
        np.arange(start, start + size, dtype=np.float64).reshape(-1, _per_sample(cache))
        for start, size, cache in zip(starts, sizes, caches, strict=False)
    ]


def _total(caches: list[TokenCache]) -> int:
    return sum(cache.num_samples * _per_sample(cache) for cache in caches)


def _per_sample(cache: TokenCache) -> int:
    return 2 if cache.kind == "preference" else 1


def _batches(
    data: TrainingData, index: list[np.ndarray], missing: list[int], rank: int, world: int, micro_batch_rows: int
) -> Iterator[MicroBatch]:
    """This rank's share of the missing sources' samples, each sample once over all ranks, equally many for each."""
    pieces = _in_order(data, missing)
    numbered = data.with_numbers(DOCUMENT, index)
    rows = packed_once(pieces, data.order.seq_len, data.order.packing)
    for part in split_ragged(rows, rank, world, micro_batch_rows):
        yield numbered.micro_batch_of(pieces, part)


def _in_order(data: TrainingData, sources: list[int]) -> Pieces:
    """Pieces to train on and held-out ones of some sources, source after source, sample after sample."""
    both = (data.order.pieces, data.held_out)
    joined = {field.name: np.concatenate([getattr(part, field.name) for part in both]) for field in fields(Pieces)}
    order = np.lexsort((joined["sample_P"], joined["source_P"]))
    order = order[np.isin(joined["source_P"][order], sources)]
    return Pieces(**{name: values[order] for name, values in joined.items()})


def _save(
    data: TrainingData, name: str, paths: list[str], missing: list[int], index: list[np.ndarray], values_D: np.ndarray
) -> None:
    assert values_D.dtype == np.float64 and values_D.shape == (_total(data.caches),), "one number a document"
    pieces = _in_order(data, missing)
    for source in missing:
        cache = data.caches[source]
        samples = pieces.sample_P[pieces.source_P == source]
        numbers = np.full((cache.num_samples, _per_sample(cache)), np.nan)
        numbers[samples] = values_D[index[source][samples].astype(np.int64)]
        wrong = samples[~np.isfinite(numbers[samples]).all(axis=1)]
        if len(wrong):
            row = cache.place(int(wrong[0]), "")
            raise ValueError(
                f"the {name} of {len(wrong)} of {len(samples)} samples is not a finite number, first of that in "
                f"{row.file}:{row.line}: {numbers[wrong[0]].tolist()}; the model that made it cannot be used"
            )
        writing(os.path.dirname(cache.folder), partial(_write, paths[source], numbers))


def _write(path: str, numbers: np.ndarray) -> None:
    folder, file = os.path.split(path)
    part = os.path.join(folder, f".{file}-{uuid.uuid4().hex}")
    try:
        with open(part, "wb") as stream:
            np.save(stream, numbers)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
