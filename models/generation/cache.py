"""Keys and values of the tokens of live rows. A row has a slot; live rows are those of the first slots, without a gap.

Each layer keeps `[S, G, C, K]`: key/value heads as they are (G, not H), rotated. A layer with a sliding window has no
more places than its window: a token overwrites the one that no later query sees, and since rotation is in the keys
their order does not matter. Latent attention keeps one latent and one rotated key part a token, both as one "head".

Legend: `S` slots; `B` live rows; `C` places for tokens of one slot.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.blocks.mla import LatentAttention
from models.decoder import Decoder, Layer
from parallel.matmul import compute_dtype

_ROUND = 64
"""Places are made in steps of so many."""


@dataclass(frozen=True)
class Piece:
    """Rows `start:stop` against their first `longest` places; -inf in the mask [rows, 1, 1, longest] where a row has
    fewer, no mask where all have as many."""

    start: int
    stop: int
    longest: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Plan:
    """Of one step and one window: the place where each row's new token goes, and who meets what."""

    place_B: torch.Tensor
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Prefix:
    """The cache of one row, for others that begin alike: keys and values [G, places, K] of each layer."""

    tokens: int
    layers: list[tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class LayerCache:
    """One layer's part. Without `values` (latents) the first `value_dim` columns of the keys are the values."""

    groups: int
    key_dim: int
    value_dim: int
    window: int | None
    latent: bool
    keys: torch.Tensor
    values: torch.Tensor | None

    @staticmethod
    def of(layer: Layer) -> "LayerCache":
        """An empty one for this layer, on its device."""
        attn = layer.attn
        latent = isinstance(attn, LatentAttention)
        if isinstance(attn, LatentAttention):
            s = attn.heads.sizes
            groups, key, value, window = 1, s.kv_rank + s.rope_dim, s.kv_rank, None
        else:
            groups, key, value, window = attn.heads.groups, attn.heads.dim, attn.heads.dim, attn.heads.window
        keys = attn.out.weight.new_empty(0, groups, 0, key)
        return LayerCache(groups, key, value, window, latent, keys, None if latent else torch.empty_like(keys))

    def held(self, tokens: int) -> int:
        """Places that so many tokens fill."""
        return tokens if self.window is None else min(tokens, self.window)

    def places(self, first: int, tokens: int) -> list[tuple[int, int]]:
        """Ranges of places that hold tokens `first` and later of a row with so many tokens."""
        if self.window is None or tokens <= self.window:
            return [(first, tokens)]
        start, stop = max(first, tokens - self.window) % self.window, tokens % self.window
        return [(start, stop)] if start < stop else [(0, stop), (start, self.window)]

    def tensors(self) -> list[torch.Tensor]:
        """Keys, and values where they are apart."""
        return [self.keys] if self.values is None else [self.keys, self.values]

    def resize(self, rows: int, tokens: int, dtype: torch.dtype) -> None:
        """Give it other sizes; what still fits is kept."""
        made = []
        for old in self.tensors():
            new = _room(old, (rows, self.groups, self.held(tokens), old.shape[-1]), dtype)
            some, places = min(rows, old.shape[0]), min(new.shape[2], old.shape[2])
            new[:some, :, :places] = old[:some, :, :places]
            made.append(new)
        self.keys, self.values = made[0], None if self.values is None else made[1]

    def put(self, slot: int, keys_TGK: torch.Tensor, values_TGK: torch.Tensor | None) -> None:
        """Write a whole prompt into a slot; of a window only its last tokens."""
        total = keys_TGK.shape[0]
        first = total - self.held(total)
        # The last tokens of a window are a turned ring: what stands at its begin comes after what stands at its end.
        turn = 0 if self.window is None else first % self.window
        for own, new in zip(self.tensors(), (keys_TGK, values_TGK), strict=False):
            assert new is not None
            own[slot, :, : total - first] = (new[first:].roll(turn, 0) if turn else new[first:]).transpose(0, 1)

    def append(self, place_B: torch.Tensor, keys_BGK: torch.Tensor, values_BGK: torch.Tensor | None) -> None:
        """Write one token of each live row."""
        rows = torch.arange(place_B.shape[0], device=place_B.device)
        for own, new in zip(self.tensors(), (keys_BGK, values_BGK), strict=False):
            assert new is not None
            own[rows, :, place_B] = new.to(own.dtype)

    def attend(self, q_BHK: torch.Tensor, pieces: Sequence[Piece], scale: float) -> torch.Tensor:
        """One query a row and head against the row's tokens -> [B, H, value_dim]; fp32 softmax.

        The query heads of a group meet their keys in one small product, so keys and values are read once and not
        repeated. Keys go first: of a large first operand MKL makes better use (a fifth less time at 3 queries).
        """
        q = (q_BHK * scale).unflatten(1, (self.groups, -1)).transpose(-1, -2)
        found = []
        for p in pieces:
            keys = self.keys[p.start : p.stop, :, : p.longest]
            values = (
                keys[..., : self.value_dim] if self.values is None else self.values[p.start : p.stop, :, : p.longest]
            )
            scores = torch.matmul(keys, q[p.start : p.stop]).transpose(-1, -2).float()
            if p.mask is not None:
                scores += p.mask
            found.append(torch.matmul(scores.softmax(-1).to(values.dtype), values))
        return (found[0] if len(found) == 1 else torch.cat(found)).flatten(1, 2)


class Cache:
    """The cache of a model's layers; `rows` slots of `tokens` places each."""

    def __init__(self, model: Decoder, max_tokens: int) -> None:
        """`max_tokens`: most places of all slots together."""
        self.layers = [LayerCache.of(layer) for layer in _layers(model)]
        self.ahead = 0 if model.virtual is None else model.virtual.ahead
        """Virtual tokens that every slot begins with; whoever counts a row's tokens leaves them out."""
        self.max_tokens, self.rows, self.tokens = max_tokens, 0, 0

    def fit(self, rows: int, tokens: int) -> None:
        """Make room for the first `rows` slots with `tokens` places; the rows there are kept.

        Grows by half where that stays below `max_tokens`, so that a growing row is copied few times.
        """
        tokens += self.ahead
        if rows <= self.rows and tokens <= self.tokens:
            return
        wide = max(rows, self.rows)
        more = max(tokens, self.tokens + self.tokens // 2) if tokens > self.tokens else self.tokens
        more = -(-more // _ROUND) * _ROUND
        if wide * more > self.max_tokens:
            wide, more = rows, max(tokens, min(more, self.max_tokens // rows))
        for layer in self.layers:
            layer.resize(wide, more, compute_dtype(layer.keys))
        self.rows, self.tokens = wide, more

    def take(self, slot: int, tokens: int) -> Prefix:
        """A copy of the first `tokens` tokens of a slot, which must be all it has."""
        every = self.ahead + tokens
        parts = [[x[slot, :, : layer.held(every)].clone() for x in layer.tensors()] for layer in self.layers]
        return Prefix(tokens, [(part[0], part[1] if len(part) > 1 else None) for part in parts])

    def give(self, slot: int, prefix: Prefix) -> None:
        """Begin a slot with such a copy."""
        for layer, parts in zip(self.layers, prefix.layers, strict=True):
            for own, new in zip(layer.tensors(), parts, strict=False):
                assert new is not None
                own[slot, :, : new.shape[1]] = new

    def move(self, source: int, target: int, tokens: int, first: int = 0) -> None:
        """Copy a row's `tokens` tokens to another slot, which has the same ones before token `first` already."""
        first, tokens = self.ahead + first if first else 0, self.ahead + tokens
        for layer in self.layers:
            for start, stop in layer.places(first, tokens):
                for own in layer.tensors():
                    own[target, :, start:stop] = own[source, :, start:stop]

    def plans(self, lengths: Sequence[int], device: torch.device) -> dict[int | None, Plan]:
        """For each window, the plan of a step after which the rows have `lengths` tokens, virtual ones among them."""
        return {
            window: Plan(
                torch.tensor([(n - 1) if window is None else (n - 1) % window for n in lengths], device=device),
                pieces_of([n if window is None else min(n, window) for n in lengths], device),
            )
            for window in {layer.window for layer in self.layers}
        }


def pieces_of(lengths: Sequence[int], device: torch.device) -> tuple[Piece, ...]:
    """Neighbouring rows together as long as the places that are looked at in vain stay few."""
    cuts, total, longest = [0], 0, 0
    for row, length in enumerate(lengths):
        total, longest = total + length, max(longest, length)
        if (row + 1 - cuts[-1]) * longest > 1.25 * total + 512:
            cuts, total, longest = [*cuts, row], length, length
    pieces = []
    for start, stop in zip(cuts, [*cuts[1:], len(lengths)], strict=True):
        own = lengths[start:stop]
        longest, mask = max(own), None
        if min(own) < longest:
            unseen = torch.arange(longest, device=device) >= torch.tensor(own, device=device)[:, None]
            mask = torch.zeros(unseen.shape, device=device).masked_fill_(unseen, float("-inf"))[:, None, None]
        pieces.append(Piece(start, stop, longest, mask))
    return tuple(pieces)


def _room(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros. On a CPU a page of them takes memory when something is written there, so room that no row comes to use
    costs nothing."""
    size = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or size == 0:
        return like.new_zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


def _layers(model: Decoder) -> list[Layer]:
    return [layer for layer in model.layers.values() if isinstance(layer, Layer)]
