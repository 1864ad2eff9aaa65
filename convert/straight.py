"""Rows that lie in one file as they will lie in another: the kernel copies them, and they never come into the process.

Three quarters of most conversions are such rows (all but what is cut by columns, or changes its dtype); copied so they
cost what `cp` costs, half of what reading and writing does.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from convert.boxes import Box, Lying, Tensors
from convert.stored import StoredTensor, opened

CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""What a kernel or file system says that does not copy between these two files."""


@dataclass(frozen=True)
class Run:
    """Rows [start, stop) of a Hugging Face tensor that lie from row `at` on in a file's tensor, in full width."""

    start: int
    stop: int
    stored: StoredTensor
    at: int


@runtime_checkable
class Placed(Protocol):
    """Tensors whose places are known: a folder, `Pieces`."""

    def places(self, hf: str) -> Sequence[tuple[Box, Lying]]:
        """Where one tensor is read from, each row once."""
        ...


def runs(source: Tensors, hf: str, start: int, stop: int) -> list[Run] | None:
    """Rows of a tensor as runs that follow one another; None where some of them do not lie in a file in full width."""
    if not isinstance(source, Placed):
        return None
    wide = source.metas[hf].shape[-1] if len(source.metas[hf].shape) > 1 else None
    found: list[Run] = []
    reached = start
    for box, lying in sorted(source.places(hf), key=lambda piece: piece[0].start):
        low, high = max(start, box.start), min(stop, box.stop)
        if low >= high:
            continue
        stored = lying if isinstance(lying, StoredTensor) else getattr(lying, "stored", None)
        if low != reached or not isinstance(stored, StoredTensor) or box.columns not in (None, (0, wide)):
            return None
        found.append(Run(low, high, stored, box.at + low - box.start))
        reached = high
    return found if reached == stop else None


def copy_runs(found: Sequence[Run], start: int, stop: int, target: StoredTensor, at: int) -> bool:
    """Copy rows [start, stop) out of some runs into a file's tensor, from its row `at` on.

    Returns:
        Whether it was done; if not (another dtype, file systems that cannot), nothing is known of these rows there.

    Raises:
        ValueError: the disk is full.
    """
    if any(run.stored.dtype != target.dtype or run.stored.row_shape != target.row_shape for run in found):
        return False
    for run in found:
        low, high = max(start, run.start), min(stop, run.stop)
        if low < high and not _copy(run.stored, run.at + low - run.start, target, at + low - start, high - low):
            return False
    return True


def _copy(source: StoredTensor, first: int, target: StoredTensor, at: int, rows: int) -> bool:
    each = source.row_bytes
    read, write, left = source.start + first * each, target.start + at * each, rows * each
    assert write + left <= target.stop, f"{rows} rows from {at} on do not fit into {target}"
    with opened(source.file, os.O_RDONLY) as out, opened(target.file, os.O_WRONLY) as into:
        while left:
            try:
                done = os.copy_file_range(out, into, left, read, write)
            except OSError as err:
                if err.errno in CANNOT:
                    return False
                target.not_full(err)
                raise
            if not done:  # the file ended, as reading will tell; or one of the systems that say so instead of no
                return False
            read, write, left = read + done, write + done, left - done
    return True
