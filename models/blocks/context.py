"""Attention when the ranks of the cp axis share the tokens: Ulysses and ring.

Legend: t rows (tokens) here, T of all ranks; H query heads, G key/value heads, K head size; B rows of a block of keys
on its way round. Rows stand in the order of the micro-batch, so a rank's own part of a document is causal as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from models.blocks.kernels import attend, attend_backward
from models.blocks.pieces import QUERY_BLOCK, pieces_of
from parallel.context import (
    Kind,
    Passing,
    Placement,
    Range,
    gather_heads,
    lengths_here,
    rows_of,
    scatter_heads,
    token_ranges,
)
from parallel.sharding import Axis


@dataclass(frozen=True)
class Meeting:
    """Queries `q_start:q_stop` of the rows here against rows `k_start:k_stop` of a block of keys, in one kernel call.

    Each query sees all the keys, or by `mask` (fp32, 0 or -inf), or causally the ones of its own among `docs` equally
    long documents. `first`: nothing is known of these queries yet.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool = False
    mask: torch.Tensor | None = None
    docs: int = 1
    first: bool = False


@dataclass(frozen=True)
class Ring:
    """What one rank does in ring attention over a micro-batch."""

    axis: Axis
    own: tuple[Meeting, ...]
    """Against the keys here; every query is in exactly one meeting that is `first`."""
    foreign: tuple[tuple[Meeting, ...], ...]
    """Against the blocks of the ranks 1, 2, … before this one."""
    blocks: tuple[int, ...]
    """Rows of each rank's block: those of documents that several ranks share. Empty where there are none."""
    sent: torch.Tensor | None
    """The rows of this rank's block, None for all."""

    @property
    def disjoint(self) -> bool:
        """Whether the own meetings touch every key once."""
        return all(meeting.causal for meeting in self.own)


@dataclass(frozen=True)
class Context:
    """How the tokens of a micro-batch lie on the ranks of the cp axis."""

    axis: Axis
    kind: Kind
    placement: Placement
    borders: tuple[int, ...]
    rings: dict[int | None, Ring] = field(default_factory=dict)
    """ring: the plan for each window."""

    @staticmethod
    def of(
        axis: Axis, kind: Kind, borders: tuple[int, ...], windows: set[int | None], device: torch.device
    ) -> "Context":
        """The plan of packed documents, from their borders alone."""
        placement = token_ranges(borders, axis.size, kind)
        rings = {w: ring_plan(borders, placement, axis, w, device) for w in windows} if kind == "ring" else {}
        return Context(axis, kind, placement, borders, rings)

    @property
    def rows(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return rows_of(self.placement)

    @property
    def lengths_here(self) -> list[int]:
        """How many tokens of each document are here."""
        return lengths_here(self.borders, self.placement[self.axis.rank])


def ulysses_attention(
    parts: Sequence[torch.Tensor], context: Context, attention: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Whole documents for a share of the heads: `attention` maps [T, width here] to [T, H / size x K].

    `parts` are q, k, v [t, heads, size], rotated; `width here` is their share, side by side (see `scatter_heads`).
    Returns [t, H x K]. On the wire a layer and rank, forward and again backward, in elements with T / size rows:
    (size - 1) / size x T / size x K x (2 H + 2 max(G, size)). Kept for the backward: what `attention` keeps.
    """
    every = scatter_heads(parts, context.axis, context.rows)
    return gather_heads(attention(every), context.axis, context.rows)


def ring_attention(
    q_tHK: torch.Tensor, k_tGK: torch.Tensor, v_tGK: torch.Tensor, ring: Ring, scale: float | None = None
) -> torch.Tensor:
    """Keys and values go round, queries stay; results are joined by log-sum-exp. Rotated [t, heads, K] -> [t, H, K].

    On the wire a layer and rank, in elements, for blocks of B rows: (size - 1) x 2 B G K forward; twice that backward
    (the blocks again, and their gradients, which are fp32). Kept for the backward: q, k, v, the output and one number
    a query and head; while it runs two blocks, in the backward also three of gradients.
    """
    return _RingAttention.apply(q_tHK, k_tGK, v_tGK, ring, scale)


# ---- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of the micro-batch, which lie from `row` on."""

    start: int
    stop: int
    row: int

    @property
    def rows(self) -> tuple[int, int]:
        return self.row, self.row + self.stop - self.start


def ring_plan(
    borders: Sequence[int], placement: Placement, axis: Axis, window: int | None, device: torch.device
) -> Ring:
    """Which queries of this rank meet which keys, rank by rank round the ring."""
    lengths = [lengths_here(borders, ranges) for ranges in placement]
    shared = {doc for doc in range(len(borders) - 1) if sum(held[doc] > 0 for held in lengths) > 1}
    rank, size = axis.rank, axis.size
    mine = _spans(borders, placement[rank], None)
    pairs = WindowMeetings(window, device)
    if window is None:
        local = list(accumulate(lengths[rank], initial=0))
        own = [
            Meeting(p.q_start, p.q_stop, p.k_start, p.q_stop, causal=True, docs=p.docs, first=True)
            for p in pieces_of(local, None, device)
        ]
    else:
        own = [
            meeting for spans in mine.values() for i, q in enumerate(spans) for k in reversed(spans[: i + 1])
            for meeting in pairs.windowed(q, k)
        ]  # fmt: skip
    foreign = []
    for step in range(1, size):
        theirs = _spans(borders, placement[(rank - step) % size], shared)
        meet = _behind if window is None else pairs.each
        foreign.append(tuple(m for doc in theirs if doc in mine for m in meet(mine[doc], theirs[doc])))
    blocks = tuple(sum(held[doc] for doc in shared) for held in lengths)
    sent = [row for doc, spans in mine.items() if doc in shared for span in spans for row in range(*span.rows)]
    every = len(sent) == sum(lengths[rank])
    rows = None if every else torch.tensor(sent, dtype=torch.int64, device=device)
    return Ring(axis, tuple(own), tuple(foreign), blocks if shared else (), rows)


def _spans(borders: Sequence[int], ranges: Sequence[Range], only: set[int] | None) -> dict[int, list[Span]]:
    """The ranges by document, with the rows they have where only the documents `only` are laid one after another."""
    spans: dict[int, list[Span]] = {}
    doc, row = 0, 0
    for start, stop in ranges:
        while borders[doc + 1] <= start:
            doc += 1
        if only is None or doc in only:
            spans.setdefault(doc, []).append(Span(start, stop, row))
            row += stop - start
    return spans


def _behind(mine: list[Span], theirs: list[Span]) -> list[Meeting]:
    """Full attention within a document: each query sees their keys before it, which are their first rows."""
    meetings: list[Meeting] = []
    for span in mine:
        seen = [other for other in theirs if other.stop <= span.start]
        if not seen:
            continue
        (q_start, q_stop), k_start, k_stop = span.rows, theirs[0].row, seen[-1].rows[1]
        last = meetings[-1] if meetings else None
        if last is not None and (last.q_stop, last.k_stop) == (q_start, k_stop):
            meetings[-1] = Meeting(last.q_start, q_stop, k_start, k_stop)
        else:
            meetings.append(Meeting(q_start, q_stop, k_start, k_stop))
    return meetings


class WindowMeetings:
    """Meetings under a sliding window, span by span; equal masks are made once."""

    def __init__(self, window: int | None, device: torch.device) -> None:
        self.window, self.device = window, device
        self.made: dict[tuple[int, int, int], torch.Tensor] = {}

    def each(self, mine: list[Span], theirs: list[Span]) -> list[Meeting]:
        """All meetings of two ranks' parts of a document."""
        return [meeting for q in mine for k in theirs for meeting in self.windowed(q, k)]

    def windowed(self, q: Span, k: Span) -> list[Meeting]:
        """Queries in blocks, against the keys their windows reach. A block's last queries may reach none: left out."""
        window = self.window
        assert window is not None
        own = q.start == k.start
        if k.start > q.start or (not own and k.stop + window - 1 <= q.start):
            return []
        meetings, block = [], max(window, QUERY_BLOCK)
        for start in range(q.start, q.stop, block):
            stop = min(start + block, q.stop)
            first, last = max(k.start, start - window + 1), min(k.stop, stop)
            stop = min(stop, last - 1 + window)
            if first >= last or start >= stop:
                continue
            far = stop - 1 - first < window
            causal = own and first == start and far
            mask = None if causal or (far and not own) else self._mask(start - first, stop - start, last - first)
            rows = (q.row + start - q.start, q.row + stop - q.start, k.row + first - k.start, k.row + last - k.start)
            meetings.append(Meeting(*rows, causal, mask, first=own))
        return meetings

    def _mask(self, ahead: int, queries: int, keys: int) -> torch.Tensor:
        """[queries, keys]; the first query is `ahead` tokens after the first key."""
        key = (ahead, queries, keys)
        if key not in self.made:
            distance = torch.arange(ahead, ahead + queries)[:, None] - torch.arange(keys)
            seen = (distance >= 0) & (distance < (self.window or 0))
            self.made[key] = torch.zeros(queries, keys).masked_fill_(~seen, float("-inf")).to(self.device)
        return self.made[key]


# ---- the computation -------------------------------------------------------------------------------------------------

_KEYS, _GRADS = 1, 2
"""Tags of what goes round."""


def _heads(rows: torch.Tensor, start: int, stop: int, docs: int) -> torch.Tensor:
    """[rows, heads, K] -> [docs, heads, rows of a document, K], a view."""
    return rows[start:stop].unflatten(0, (docs, -1)).transpose(1, 2)


def _wide(x: torch.Tensor) -> torch.dtype:
    """What blocks are added up in: fp32 also for half precision."""
    return torch.promote_types(x.dtype, torch.float32)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ring: Ring, scale: float | None
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=_wide(q), device=q.device)
        log_sum_tH = torch.empty(q.shape[:2], dtype=_wide(q), device=q.device)
        passing = _start(_block(k, v, ring), ring, 1, _KEYS)
        _join(out, log_sum_tH, q, k, v, ring.own, scale)
        for step in range(1, ring.axis.size if ring.blocks else 1):
            assert passing is not None
            block = passing.wait()
            passing = _start(block, ring, step + 1, _KEYS)
            _join(out, log_sum_tH, q, block[0], block[1], ring.foreign[step - 1], scale)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sum_tH)
        ctx.ring, ctx.scale = ring, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, log_sum_tH = ctx.saved_tensors
        ring: Ring = ctx.ring
        make = torch.empty if ring.disjoint else torch.zeros
        dq, dk, dv = (make(x.shape, dtype=_wide(x), device=x.device) for x in (q, k, v))
        kept = (grad, q, out, log_sum_tH, ctx.scale)
        passing = _start(_block(k, v, ring), ring, 1, _KEYS)
        _add_gradients(kept, k, v, (dq, dk, dv), ring.own, fresh=ring.disjoint)
        grads_passing = None
        for step in range(1, ring.axis.size if ring.blocks else 1):
            assert passing is not None
            block = passing.wait()
            passing = _start(block, ring, step + 1, _KEYS)
            block_grad = torch.zeros(block.shape, dtype=_wide(block), device=block.device)
            _add_gradients(kept, block[0], block[1], (dq, *block_grad), ring.foreign[step - 1], fresh=False)
            if grads_passing is not None:
                block_grad += grads_passing.wait()
            grads_passing = _start(block_grad, ring, step + 1, _GRADS, last=ring.axis.size)
        if grads_passing is not None:
            home = grads_passing.wait()[:, : ring.blocks[ring.axis.rank]]
            for total, part in zip((dk, dv), home, strict=True):
                total.add_(part) if ring.sent is None else total.index_add_(0, ring.sent, part)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _block(k: torch.Tensor, v: torch.Tensor, ring: Ring) -> torch.Tensor | None:
    """The keys and values other ranks need, [2, B, G, K]; at least one row, so that every rank takes part."""
    if not ring.blocks:
        return None
    rows = (k, v) if ring.sent is None else (k[ring.sent], v[ring.sent])
    return torch.stack(rows) if ring.blocks[ring.axis.rank] else k.new_zeros(2, 1, *k.shape[1:])


def _start(tensor: torch.Tensor | None, ring: Ring, step: int, tag: int, last: int | None = None) -> Passing | None:
    """Pass on what came from the rank `step - 1` before and take what belongs to the one `step` before."""
    axis = ring.axis
    if tensor is None or step >= (axis.size if last is None else last + 1):
        return None
    rows = max(ring.blocks[(axis.rank - step) % axis.size], 1)
    return Passing(tensor, tensor.new_empty(2, rows, *tensor.shape[2:]), axis, tag)


def _join(
    out: torch.Tensor,
    log_sum_tH: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    meetings: tuple[Meeting, ...],
    scale: float | None,
) -> None:
    """Attend to a block of keys and join the result with that of the blocks before."""
    for m in meetings:
        keys, values = (_heads(x, m.k_start, m.k_stop, m.docs) for x in (k, v))
        got, got_sum = attend(_heads(q, m.q_start, m.q_stop, m.docs), keys, values, m.causal, m.mask, scale)
        got, got_sum = (x.transpose(1, 2).flatten(0, 1) for x in (got, got_sum))
        so_far, sums = out[m.q_start : m.q_stop], log_sum_tH[m.q_start : m.q_stop]
        if m.first:
            so_far.copy_(got)
            sums.copy_(got_sum)
        else:
            so_far.lerp_(got.to(out.dtype), torch.sigmoid(got_sum - sums)[:, :, None])
            torch.logaddexp(sums, got_sum, out=sums)


def _add_gradients(
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float | None],
    k: torch.Tensor,
    v: torch.Tensor,
    grads: tuple[torch.Tensor, ...],
    meetings: tuple[Meeting, ...],
    fresh: bool,
) -> None:
    """Add what the meetings with a block of keys give to the gradients of q and of the block (`fresh`: write it)."""
    grad, q, out, log_sum_tH, scale = kept
    for m in meetings:
        here, there = (m.q_start, m.q_stop, m.docs), (m.k_start, m.k_stop, m.docs)
        sums = log_sum_tH[m.q_start : m.q_stop].unflatten(0, (m.docs, -1)).transpose(1, 2)
        parts = attend_backward(
            _heads(grad, *here), _heads(q, *here), _heads(k, *there), _heads(v, *there), _heads(out, *here), sums,
            m.causal, m.mask, scale,
        )  # fmt: skip
        for total, part, (start, stop, _) in zip(grads, parts, (here, there, there), strict=True):
            rows = part.transpose(1, 2).flatten(0, 1)
            total[start:stop].copy_(rows) if fresh else total[start:stop].add_(rows)
