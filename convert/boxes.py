"""Every file format as rows of Hugging Face tensors: where each row of a cut, fused, stacked tensor comes from.

A **segment** is rows of one Hugging Face tensor; a whole tensor of Loom or Megatron is its segments one after another.
A **box** is what one rank's part of it holds of one Hugging Face tensor. A **piece** is a box in a tensor that lies in
a file. Reading gathers pieces and writing scatters into them, so both directions of every conversion are one list,
and no bit can change: nothing is computed.

Rows: all dims but the last counted as one (a vector's rows are its elements).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch

from models.rules import Segment
from parallel.sharding import Cut, Shard

Columns = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """Rows [start, stop) and `columns` (None: all) of a Hugging Face tensor, lying from row `at` on in a local one."""

    hf: str
    start: int
    stop: int
    at: int
    columns: Columns | None = None


def boxes(segments: Iterable[Segment], whole: Sequence[int], shard: Shard, cut: Cut) -> list[Box]:
    """What the part that `cut` gives of a tensor of shape `whole` holds. Rows that no box names are padding."""
    columns, held = _held(whole, shard, cut)
    return placed(segments, held, columns)


def placed(segments: Iterable[Segment], held: Iterable[tuple[int, int, int]], columns: Columns | None) -> list[Box]:
    """The boxes of a part that holds some ranges of rows of a tensor, (start, stop, first row in the part) each."""
    ranges = list(held)
    found: list[Box] = []
    first = 0
    for segment in segments:
        last = first + segment.stop - segment.start
        for start, stop, at in ranges:
            low, high = max(first, start), min(last, stop)
            if low < high:
                begin = segment.start + low - first
                found.append(Box(segment.hf, begin, begin + high - low, at + low - start, columns))
        first = last
    return found


def _held(whole: Sequence[int], shard: Shard, cut: Cut) -> tuple[Columns | None, list[tuple[int, int, int]]]:
    """The columns a cut gives, and its rows as (start, stop, first local row)."""
    experts = whole[0] if shard.experts else 1
    here = experts // cut.ep if shard.experts else 1
    each = math.prod(whole[:-1] if len(whole) > 1 else whole) // experts
    first_expert = cut.ep_rank * here if shard.experts else 0
    row_dim = max(len(whole) - 2, 0)
    columns: Columns | None = None
    if shard.dim is None or cut.tp == 1:
        ranges, sizes = [(0, each)], [each]
    elif shard.dim == row_dim:
        ranges, sizes = shard.ranges(cut.tp, cut.tp_rank), list(shard.local_parts(cut.tp))
    else:
        assert shard.dim == len(whole) - 1 and len(shard.parts) == 1, f"{shard} cuts {tuple(whole)} in no way known"
        ((start, stop),) = shard.ranges(cut.tp, cut.tp_rank)
        columns, ranges, sizes = (start, stop), [(0, each)], [each]
    held, at = [], 0
    for expert in range(first_expert, first_expert + here):
        for (start, stop), size in zip(ranges, sizes, strict=True):
            held.append((expert * each + start, expert * each + stop, at))
            at += size
    return columns, held


class Lying(Protocol):
    """A tensor that can be read by rows: `StoredTensor`, or a part of one of Loom's checkpoints."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop): [stop - start, columns], or [stop - start] of a vector."""
        ...


@runtime_checkable
class Strips(Protocol):
    """One of which some columns can be read alone."""

    def strip(self, start: int, stop: int, columns: Columns) -> torch.Tensor:
        """Some columns of rows [start, stop)."""
        ...


class Writable(Lying, Protocol):
    """One that can be written by rows too."""

    def put(self, start: int, rows: torch.Tensor) -> None:
        """Write rows from `start` on, converted to its dtype."""
        ...


@dataclass(frozen=True)
class Meta:
    """Dtype and shape of a Hugging Face tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Tensors(Protocol):
    """Weights under Hugging Face names, read by rows: a folder, a Megatron checkpoint, a checkpoint of a run."""

    @property
    def metas(self) -> Mapping[str, Meta]:
        """Every tensor there is, in the order of the model."""
        ...

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor in its own dtype and memory, all columns or some."""
        ...


T_co = TypeVar("T_co", bound=Lying, covariant=True)


class Pieces(Generic[T_co]):
    """Hugging Face tensors that lie in boxes of other tensors. Is `Tensors`.

    Args:
        metas: every Hugging Face tensor.
        pieces: what lies where. Several copies of the same rows may be there; the first is read, all are written.

    Raises:
        AssertionError: rows of a tensor lie nowhere.
    """

    def __init__(self, metas: Mapping[str, Meta], pieces: Iterable[tuple[T_co, Iterable[Box]]]) -> None:
        self.metas = metas
        self._of: dict[str, list[tuple[Box, T_co]]] = defaultdict(list)
        for lying, held in pieces:
            for box in held:
                self._of[box.hf].append((box, lying))
        self._first = {hf: _without_copies(found) for hf, found in self._of.items()}
        for hf, meta in metas.items():
            held = sum((b.stop - b.start) * _width(b, meta.shape) for b, _ in self._first.get(hf, []))
            assert held == math.prod(meta.shape), f"{hf}: {held} of {math.prod(meta.shape)} elements have a place"

    def of(self, hf: str) -> Sequence[tuple[Box, T_co]]:
        """Every piece of one tensor, copies included."""
        return self._of[hf]

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, gathered."""
        meta = self.metas[hf]
        wide = meta.shape[-1] if len(meta.shape) > 1 else None
        left, right = columns or (0, wide or 0)
        for box, lying in self._first[hf]:
            if columns is None and box.columns in (None, (0, wide)) and box.start <= start and stop <= box.stop:
                return lying.rows(box.at + start - box.start, box.at + stop - box.start).to(meta.dtype)  # not twice
        out = torch.empty((stop - start, right - left) if wide is not None else (stop - start,), dtype=meta.dtype)
        for box, lying in self._first[hf]:
            low, high = max(start, box.start), min(stop, box.stop)
            if low >= high:
                continue
            into = out[low - start : high - start]
            begin, end = box.columns or (0, wide or 0)
            a, b = max(left, begin), min(right, end)
            if wide is not None and a >= b:
                continue
            first, last = box.at + low - box.start, box.at + high - box.start
            if wide is None or (a, b) == (begin, end):
                found = lying.rows(first, last)
            elif isinstance(lying, Strips):
                found = lying.strip(first, last, (a - begin, b - begin))
            else:
                found = lying.rows(first, last)[:, a - begin : b - begin]
            (into if wide is None else into[:, a - left : b - left]).copy_(found)
        return out


def put(pieces: Pieces[Writable], hf: str, start: int, rows: torch.Tensor) -> None:
    """Write rows of a Hugging Face tensor, from `start` on, into every piece that holds some of them."""
    for lying, at, found in scattered(pieces, hf, start, rows):
        lying.put(at, found)


def scattered(
    pieces: Pieces[T_co], hf: str, start: int, rows: torch.Tensor
) -> Iterator[tuple[T_co, int, torch.Tensor]]:
    """The parts of some rows of a Hugging Face tensor, each with the tensor it lies in and its first row there."""
    stop = start + rows.shape[0]
    for box, lying in pieces.of(hf):
        low, high = max(start, box.start), min(stop, box.stop)
        if low < high:
            found = rows[low - start : high - start]
            if box.columns is not None:
                found = found[:, slice(*box.columns)]
            yield lying, box.at + low - box.start, found


def _width(box: Box, shape: tuple[int, ...]) -> int:
    if box.columns is not None:
        return box.columns[1] - box.columns[0]
    return shape[-1] if len(shape) > 1 else 1


def _without_copies(found: list[tuple[Box, T_co]]) -> list[tuple[Box, T_co]]:
    """Of boxes that hold the same elements only the first. Boxes overlap wholly or not at all."""
    seen: dict[tuple[int, int, Columns | None], tuple[Box, T_co]] = {}
    for box, lying in found:
        seen.setdefault((box.start, box.stop, box.columns), (box, lying))
    return list(seen.values())
