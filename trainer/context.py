"""Context parallel: this rank's part of a micro-batch that all cp ranks read whole."""

from __future__ import annotations

import dataclasses

from data.batch import MicroBatch
from parallel.context import Kind, places, token_ranges
from parallel.sharding import Axis


def local_part(batch: MicroBatch, cp: Axis, kind: Kind) -> MicroBatch:
    """The tokens of the micro-batch that lie on this rank of the cp axis; all ranks together have each once.

    Documents are told whole (`cu_seqlens`, `max_seqlen`, `doc_channel_N`), `place_T` says which tokens are here. A rank
    may be left without targets, or without tokens where there are fewer than ranks.
    """
    if cp.size == 1:
        return batch
    ranges = token_ranges(batch.cu_seqlens.tolist(), cp.size, kind)[cp.rank]
    place_T = places(ranges).to(batch.tokens_T.device)
    return dataclasses.replace(
        batch,
        tokens_T=batch.tokens_T[place_T],
        positions_T=batch.positions_T[place_T],
        targets_T=batch.targets_T[place_T],
        token_facts={name: fact_T[place_T] for name, fact_T in batch.token_facts.items()},
        place_T=place_T,
    )
