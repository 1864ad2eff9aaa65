"""Weights from one place to another: block by block, several at once, never a whole model and seldom a whole tensor.

What a block is copied by is `convert.boxes`: gathered out of the source, scattered into the sink. Reading, writing and
torch's copies release the interpreter's lock, so threads are enough.
"""

import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from convert.boxes import Meta, Pieces, Tensors, Writable, put

BLOCK_BYTES = 2 * 2**20
"""Of one block. It passes through a core's cache: with 8 MiB the same work takes twice the time."""

MOST_WORKERS = 8

Item = TypeVar("Item")


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of one Hugging Face tensor."""

    hf: str
    start: int
    stop: int
    bytes: int


def blocks(hf: str, meta: Meta, most: int = BLOCK_BYTES) -> Iterator[Block]:
    """A tensor as blocks of at most `most` bytes (one row at least). A tensor without elements has none."""
    rows = math.prod(meta.shape[:-1] if len(meta.shape) > 1 else meta.shape)
    row_bytes = (meta.shape[-1] if len(meta.shape) > 1 else 1) * meta.dtype.itemsize
    each = max(1, most // max(1, row_bytes))
    if row_bytes:
        for start in range(0, rows, each):
            stop = min(rows, start + each)
            yield Block(hf, start, stop, (stop - start) * row_bytes)


def total_bytes(metas: Mapping[str, Meta]) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(meta.shape) * meta.dtype.itemsize for meta in metas.values())


def default_workers() -> int:
    """As many as this process may use cores, 2 to 8."""
    return min(MOST_WORKERS, max(2, len(os.sched_getaffinity(0))))


def copy(
    source: Tensors,
    sink: Pieces[Writable],
    workers: int = 1,
    done: Collection[str] = (),
    finished: Callable[[str], None] = lambda hf: None,
    moved: Callable[[int], object] = lambda size: None,
    most: int = BLOCK_BYTES,
) -> None:
    """Copy every tensor of `sink` from `source`, converted to the dtype that the sink's `metas` say.

    Memory: about three blocks a worker. On a failure or Ctrl-C the blocks under way are written to their end.

    Args:
        workers: blocks copied at once.
        done: tensors that need no copying.
        finished: told the name of each tensor whose last row is written; called by any thread, one at a time.
        moved: told the bytes of each block (in the sink's dtype); called as `finished` is.
        most: bytes of a block.

    Raises:
        ValueError: a file ended early, or the disk is full.
    """
    lock = threading.Lock()

    def one(block: Block) -> None:
        rows = source.rows(block.hf, block.start, block.stop).to(sink.metas[block.hf].dtype)
        put(sink, block.hf, block.start, rows)
        with lock:
            moved(block.bytes)
            left[block.hf] -= block.bytes
            if not left[block.hf]:
                finished(block.hf)

    wanted = {hf: meta for hf, meta in sink.metas.items() if hf not in set(done)}
    left = {hf: total_bytes({hf: meta}) for hf, meta in wanted.items()}
    each_at_once((block for hf, meta in wanted.items() for block in blocks(hf, meta, most)), one, workers)


def each_at_once(items: Iterator[Item], work: Callable[[Item], object], workers: int) -> None:
    """Call `work` with every item, in order, `workers` at a time. The first exception stops all; it is raised here."""
    lock, stop = threading.Lock(), threading.Event()

    def run() -> None:
        try:
            while not stop.is_set():
                with lock:
                    item = next(items, None)
                if item is None:
                    return
                work(item)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers, thread_name_prefix="copy") as pool:
        running = [pool.submit(run) for _ in range(workers)]
        try:
            for worker in running:
                worker.result()
        finally:
            stop.set()  # on Ctrl-C this thread is here alone; the others end their block


def converted(metas: Mapping[str, Meta], dtype: torch.dtype | None, exact: Collection[str] = ()) -> dict[str, Meta]:
    """`metas` as they are written: floats as `dtype` (None: as they are); tensors in `exact` as fp32 then."""
    if dtype is None:
        return dict(metas)
    return {
        hf: Meta(torch.float32 if hf in exact else dtype, meta.shape) if meta.dtype.is_floating_point else meta
        for hf, meta in metas.items()
    }
