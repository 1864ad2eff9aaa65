"""Rows of Hugging Face tensors in cut, fused and stacked ones, against slices of whole tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.boxes import Box, Meta, Pieces, boxes, placed, put, scattered
from models.rules import Segment
from parallel.sharding import Cut, Shard
from tests.megatron_shards import Held


def whole_of(segments: list[Segment], tensors: dict[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Segments one after another, then zeros: what `boxes` cuts."""
    rows = [tensors[s.hf].reshape(-1, *tensors[s.hf].shape[-1:])[s.start : s.stop] if len(shape) > 1 else
            tensors[s.hf][s.start : s.stop] for s in segments]  # fmt: skip
    joined = torch.cat(rows)
    padded = torch.zeros(math.prod(shape[:-1] or shape), *joined.shape[1:], dtype=joined.dtype)
    padded[: len(joined)] = joined
    return padded.view(shape)


@st.composite
def stacked(draw: st.DrawFn) -> tuple[list[Segment], dict[str, torch.Tensor], tuple[int, ...], Shard, Cut]:
    """A fused tensor, perhaps a vector, perhaps stacked over experts, perhaps padded, and a part of it."""
    tp, ep = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    experts = draw(st.sampled_from([1, ep, 2 * ep])) if ep > 1 else 1
    vector = experts == 1 and ep == 1 and draw(st.booleans())
    parts = tuple(tp * n for n in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    columns = () if vector else (tp * draw(st.integers(1, 3)),)
    rows = sum(parts)
    lead = (experts,) if ep > 1 and experts >= ep else ()
    shape = (*lead, rows, *columns)
    by_columns = not vector and draw(st.booleans())
    kinds = [Shard(), Shard(len(lead), parts)] + ([Shard(len(lead) + 1, columns)] if by_columns else [])
    shard = draw(st.sampled_from(kinds))
    shard = Shard(shard.dim, shard.parts, experts=bool(lead))
    # The rows in order, from tensors cut anywhere; without a lead the last ones may be padding.
    total = rows * (experts if lead else 1)
    used = total if lead else draw(st.integers(1, total))
    cuts = sorted(draw(st.sets(st.integers(1, used), max_size=4)) | {used})
    segments, tensors, first = [], {}, 0
    for number, stop in enumerate(cuts):
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        count = stop - first
        name = f"t{number}"
        values = torch.arange(
            100 * number + 1, 100 * number + 1 + (before + count + after) * math.prod(columns or (1,))
        )
        tensors[name] = values.view(-1, *columns)
        segments.append(Segment(name, before, before + count))
        first = stop
    cut = Cut(tp, draw(st.integers(0, tp - 1)), ep if lead else 1, draw(st.integers(0, ep - 1)) if lead else 0)
    return segments, tensors, shape, shard, cut


@settings(max_examples=200, deadline=None)
@given(stacked())
def test_boxes_hold_what_the_cut_does(case: tuple[list[Segment], dict[str, torch.Tensor], tuple[int, ...], Shard, Cut]):
    segments, tensors, shape, shard, cut = case
    expected = shard.slice(whole_of(segments, tensors, shape), cut)
    found = Held(torch.zeros(expected.shape, dtype=torch.int64))
    for box in boxes(segments, shape, shard, cut):
        rows = Held(tensors[box.hf]).rows(box.start, box.stop)
        if box.columns:
            rows = rows[:, slice(*box.columns)]
        found.put(box.at, rows)
    assert torch.equal(found.tensor, expected)


def test_placed_ranges_meet_segments_in_any_order() -> None:
    segments = [Segment("a", 2, 5), Segment("b", 0, 2)]
    assert placed(segments, [(4, 5, 0), (1, 4, 1)], (0, 3)) == [
        Box("a", 3, 5, 1, (0, 3)),
        Box("b", 1, 2, 0, (0, 3)),
        Box("b", 0, 1, 3, (0, 3)),
    ]


META = {"m": Meta(torch.int64, (6, 4)), "v": Meta(torch.int64, (5,))}
MATRIX, VECTOR = torch.arange(24).view(6, 4), torch.arange(100, 105)


def in_pieces() -> tuple[Pieces[Held], dict[str, torch.Tensor]]:
    """A matrix in four blocks of two tensors, the first block twice; a vector in two pieces."""
    left, right, copy, vector = torch.zeros(7, 2), torch.zeros(6, 2), torch.zeros(3, 2), torch.zeros(6)
    tensors = {"left": left, "right": right, "copy": copy, "vector": vector}
    tensors = {name: tensor.long() for name, tensor in tensors.items()}
    held = {name: Held(tensor) for name, tensor in tensors.items()}
    pieces = [
        (held["left"], [Box("m", 3, 6, 0, (0, 2)), Box("m", 0, 3, 4, (0, 2))]),
        (held["right"], [Box("m", 0, 3, 0, (2, 4)), Box("m", 3, 6, 3, (2, 4))]),
        (held["copy"], [Box("m", 0, 3, 0, (0, 2))]),
        (held["vector"], [Box("v", 2, 5, 0), Box("v", 0, 2, 4)]),
    ]
    return Pieces(META, pieces), tensors


def test_scattering_fills_every_place_and_copy() -> None:
    pieces, tensors = in_pieces()
    for start in (4, 0, 2):  # blocks in any order
        put(pieces, "m", start, MATRIX[start : start + 2])
    put(pieces, "v", 0, VECTOR)
    assert torch.equal(tensors["left"], torch.cat([MATRIX[3:, :2], torch.zeros(1, 2), MATRIX[:3, :2]]).long())
    assert torch.equal(tensors["right"], MATRIX[:, 2:])
    assert torch.equal(tensors["copy"], MATRIX[:3, :2])
    assert tensors["vector"].tolist() == [102, 103, 104, 0, 100, 101]


@pytest.mark.parametrize("columns", [None, (0, 4), (1, 3), (2, 4), (3, 4), (0, 1)])
@pytest.mark.parametrize("rows", [(0, 6), (2, 4), (3, 6), (5, 5)])
def test_gathering_any_rows_and_columns(rows: tuple[int, int], columns: tuple[int, int] | None) -> None:
    pieces, _ = in_pieces()
    put(pieces, "m", 0, MATRIX)
    put(pieces, "v", 0, VECTOR)
    assert torch.equal(pieces.rows("m", *rows, columns), MATRIX[slice(*rows)][:, slice(*(columns or (0, 4)))])
    low, high = min(rows[0], 5), min(rows[1], 5)
    assert torch.equal(pieces.rows("v", low, high), VECTOR[low:high])


def test_of_copies_the_first_is_read() -> None:
    pieces, tensors = in_pieces()
    put(pieces, "m", 0, MATRIX)
    tensors["copy"].fill_(-1)
    assert torch.equal(pieces.rows("m", 0, 6), MATRIX)


def test_only_what_overlaps_is_scattered() -> None:
    pieces, tensors = in_pieces()
    found = [
        (at, rows.tolist())
        for lying, at, rows in scattered(pieces, "m", 3, MATRIX[3:4])
        if lying.tensor is tensors["left"]
    ]
    assert found == [(0, [[12, 13]])]


def test_rows_that_lie_nowhere_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match="m: 8 of 24 elements have a place"):
        Pieces({"m": META["m"]}, [(Held(torch.zeros(2, 4)), [Box("m", 0, 2, 0)])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_bit_pattern_passes_unchanged(dtype: torch.dtype) -> None:
    """NaNs with payloads, negative zeros, subnormals."""
    bits = torch.randint(0, 256, (6, 4 * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensor = bits.view(dtype)
    held = [Held(torch.zeros(6, 2, dtype=dtype)) for _ in range(2)]
    pieces = Pieces({"m": Meta(dtype, (6, 4))}, [(held[i], [Box("m", 0, 6, 0, (2 * i, 2 * i + 2))]) for i in range(2)])
    put(pieces, "m", 0, tensor)
    assert torch.equal(pieces.rows("m", 0, 6).view(torch.uint8), bits)
