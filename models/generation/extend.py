"""A decoder's forward over several new tokens of each row, which are not in the cache until they are committed.

New tokens see the cached ones and, causally, each other. Their keys and values stay apart, in a `Tail`: a row may take
some of them and drop the rest, and nothing that a sliding window still needs has been overwritten by dropped ones.

Legend: `B` rows; `N` new tokens of the row that has most; `M` columns of the tail, N and what it had before; `T` new
tokens of all rows one after another; `G` key/value heads; `L` heads of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from models.blocks.router import Tokens
from models.decoder import Decoder, Layer
from models.generation.cache import Cache, LayerCache
from models.generation.forward import Turn, attended, embedded, feed_forward, logits_of, normed_states, rms_norm
from models.generation.pieces import pieces_of
from models.generation.shown import read_last


@dataclass(frozen=True)
class Tail:
    """What follows the cached tokens of the first rows: for each layer keys and values [B, G, M, K]."""

    cached: tuple[int, ...]
    """Tokens of each row in the cache, virtual ones among them."""
    counts: tuple[int, ...]
    """Columns of each row that are tokens; those after them hold nothing."""
    layers: tuple[tuple[torch.Tensor, ...], ...]

    @property
    def columns(self) -> int:
        return max(self.counts)


@dataclass(frozen=True)
class _Piece:
    """Rows `start:stop` against their first `longest` places; the mask [rows, 1, 1, 1 or N, longest] is 0 or -inf."""

    start: int
    stop: int
    longest: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Meeting:
    """Who meets what in the layers of one window."""

    row_T: torch.Tensor
    column_T: torch.Tensor
    """Where each new token stands in [B, N]."""
    rows: int
    columns: int
    pieces: tuple[_Piece, ...]
    own_NM: torch.Tensor
    """0 or -inf, of new tokens against the tail's."""


@torch.no_grad()
def extend(
    model: Decoder, tokens: Sequence[Sequence[int]], cached: Sequence[int], cache: Cache, tail: Tail | None = None
) -> tuple[torch.Tensor, Tail]:
    """Run new tokens of the first rows without writing them to the cache.

    Args:
        tokens: of each row, at least one. After a `tail` of unequal counts, or for more than one token after any, there
            would be gaps: then all rows must have equally many.
        cached: how many tokens of each row the cache has.
        tail: what an earlier call gave; the new tokens follow those in it.

    Returns:
        The logits after every new token, fp32 [T, V], row by row; and the tail with them.
    """
    device, counts = cache.layers[0].keys.device, [len(own) for own in tokens]
    cached = [cache.ahead + n for n in cached]
    before = 0 if tail is None else tail.columns
    assert min(counts) > 0 and (tail is None or len({*tail.counts}) == len({*counts}) == 1), "a gap in the tail"
    positions = [n + before + i for n, count in zip(cached, counts, strict=True) for i in range(count)]
    # Dynamic scaling turns a token by the length at which it comes, however many come together.
    after = [position + 1 for position in positions]
    shifts = [cache.shifted(slot) for slot, count in enumerate(counts) for _ in range(count)]
    places = torch.tensor([n + by for n, by in zip(positions, shifts, strict=True)], device=device)
    cos, sin = model.rope.tables(places, after, [1] * len(after))
    tokens_T = torch.tensor(list(chain.from_iterable(tokens)), device=device)
    routed = Tokens.of(tokens_T, range(len(after) + 1), None, model.place)
    meetings = {
        window: _meeting(cached, counts, before, window, device) for window in {own.window for own in cache.layers}
    }
    hidden, made = embedded(model, tokens_T), []
    turn = Turn.of(cos, sin, hidden)
    shown = cache.shown(len(counts))
    for index, ((number, layer), own) in enumerate(zip(model.layers.items(), cache.layers, strict=True)):
        assert isinstance(layer, Layer)
        hidden = read_last(model, number, hidden, shown, counts)
        normed, old = rms_norm(layer.attn_norm, hidden), () if tail is None else tail.layers[index]
        meet = _Meet(own, old, meetings[own.window])
        found = attended(layer.attn, normed, turn, meet)
        made.append(meet.tail)
        hidden = feed_forward(layer, layer.attn.out(found, hidden), routed)
    logits = logits_of(model, normed_states(model, hidden))
    return logits, Tail(tuple(cached), tuple(before + n for n in counts), tuple(made))


def commit(cache: Cache, tail: Tail, counts: Sequence[int]) -> None:
    """Write the first `counts` tokens of each row's tail; the cache has room for them."""
    windows = {own.window for own in cache.layers}
    places = {window: _places(tail, counts, window, cache.layers[0].keys.device) for window in windows}
    for own, parts in zip(cache.layers, tail.layers, strict=True):
        row, column, place = places[own.window]
        for held, new in zip(own.tensors(), parts, strict=True):
            held[row, :, place] = new[row, :, column]


def _places(tail: Tail, counts: Sequence[int], window: int | None, device: torch.device) -> torch.Tensor:
    """Row, column and place of each token that is written [3, tokens]; of a window's only the last."""
    found = [
        (row, column, start + column if window is None else (start + column) % window)
        for row, (start, count) in enumerate(zip(tail.cached, counts, strict=True))
        for column in range(0 if window is None else max(0, count - window), count)
    ]
    return torch.tensor(found, dtype=torch.int64, device=device).reshape(-1, 3).t()


def _meeting(
    cached: Sequence[int], counts: Sequence[int], before: int, window: int | None, device: torch.device
) -> _Meeting:
    rows, columns = len(counts), max(counts)
    row_T = torch.arange(rows).repeat_interleave(torch.tensor(counts))
    column_T = torch.cat([torch.arange(n) for n in counts])
    distance_NM = torch.arange(before, before + columns)[:, None] - torch.arange(before + columns)
    own_NM = _mask((distance_NM < 0) | (distance_NM >= (window or columns + before)))
    pieces = []
    for piece in pieces_of([n if window is None else min(n, window) for n in cached], device):
        mask = None if piece.mask is None else piece.mask[:, None]
        if window is not None:
            mask = _window_mask(cached[piece.start : piece.stop], before, columns, piece.longest, window).to(device)
        pieces.append(_Piece(piece.start, piece.stop, piece.longest, mask))
    return _Meeting(row_T.to(device), column_T.to(device), rows, columns, tuple(pieces), own_NM.to(device))


def _window_mask(cached: Sequence[int], before: int, columns: int, longest: int, window: int) -> torch.Tensor:
    """What new tokens see of a window's places, 0 or -inf [rows, 1, 1, N, longest]."""
    last_B = torch.tensor(cached)[:, None] - 1
    position_BC = last_B - (last_B - torch.arange(longest)) % window  # the last token that was put there
    query_BN = last_B + 1 + before + torch.arange(columns)
    seen = (position_BC >= 0)[:, None] & (position_BC[:, None] > query_BN[:, :, None] - window)
    return _mask(~seen)[:, None, None]


def _mask(hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


class _Meet:
    """One layer's new tokens against its cache and its tail, which grows by them."""

    def __init__(self, own: LayerCache, tail: tuple[torch.Tensor, ...], meeting: _Meeting) -> None:
        self.own, self.tail, self.meeting = own, tail, meeting

    def __call__(self, q_THK: torch.Tensor, new: tuple[torch.Tensor, ...], scale: float) -> torch.Tensor:
        self.tail = _grown(self.own, self.tail, new, self.meeting)
        return _attend(self.own, q_THK, self.tail, self.meeting, scale)


def _grown(
    own: LayerCache, old: tuple[torch.Tensor, ...], new: tuple[torch.Tensor, ...], meeting: _Meeting
) -> tuple[torch.Tensor, ...]:
    """The tail of one layer with new keys and values, each [T, G, K], in the cache's dtype."""
    made = [_spread(x.to(own.keys.dtype), meeting).transpose(1, 2) for x in new]
    return tuple(torch.cat([a, b], 2) for a, b in zip(old, made, strict=True)) if old else tuple(made)


def _spread(x_T: torch.Tensor, meeting: _Meeting) -> torch.Tensor:
    """[T, ...] -> [B, N, ...], zero where a row has fewer tokens."""
    if x_T.shape[0] == meeting.rows * meeting.columns:
        return x_T.unflatten(0, (meeting.rows, meeting.columns))
    out = x_T.new_zeros(meeting.rows, meeting.columns, *x_T.shape[1:])
    out[meeting.row_T, meeting.column_T] = x_T
    return out


def _attend(
    own: LayerCache, q_THK: torch.Tensor, tail: tuple[torch.Tensor, ...], meeting: _Meeting, scale: float
) -> torch.Tensor:
    """New tokens against cache and tail -> [T, H, value_dim]; fp32 softmax."""
    q = _spread(q_THK * scale, meeting).unflatten(2, (own.groups, -1)).permute(0, 2, 3, 1, 4)  # [B, G, L, N, K]
    out = q.new_empty(*q.shape[:4], own.value_dim)
    new_keys, new_values = tail[0], tail[-1][..., : own.value_dim]
    for p in meeting.pieces:
        some = q[p.start : p.stop]
        flat = some.flatten(2, 3)
        old_keys, old_values = (x[p.start : p.stop, :, : p.longest] for x in (own.tensors()[0], own.tensors()[-1]))
        scores = [
            torch.matmul(flat, keys.transpose(-1, -2)).float().unflatten(2, some.shape[2:4])
            for keys in (old_keys, new_keys[p.start : p.stop])
        ]
        if p.mask is not None:
            scores[0] += p.mask
        scores[1] += meeting.own_NM
        weights = torch.cat(scores, -1).softmax(-1).to(new_values.dtype).flatten(2, 3)
        found = torch.matmul(weights[..., : p.longest], old_values[..., : own.value_dim])
        found += torch.matmul(weights[..., p.longest :], new_values[p.start : p.stop])
        out[p.start : p.stop] = found.unflatten(2, some.shape[2:4])
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)[meeting.row_T, meeting.column_T]
