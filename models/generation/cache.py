"""Keys and values of the tokens of live rows. A row has a slot; live rows are those of the first slots, without a gap.

Each layer keeps `[S, G, C, K]`: key/value heads as they are (G, not H), rotated. A layer with a sliding window has no
more places than its window: a token overwrites the one that no later query sees, and since rotation is in the keys
their order does not matter. Latent attention keeps one latent and one rotated key part a token, both as one "head".

A prompt of several rows may be held apart, once, where no window cuts it; their slots then begin behind it.

Legend: `S` slots; `B` live rows; `C` places for tokens of one slot.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.blocks.mla import LatentAttention
from models.decoder import Decoder, Layer
from models.generation.pieces import Piece, attend_both, pieces_of
from models.generation.shown import Joined, Shown
from parallel.matmul import compute_dtype

_ROUND = 64
"""Places are made in steps of so many."""
_LONG = 8192
"""Numbers in one head's keys from which on they had better be the first operand: MKL takes a fifth less time then."""


@dataclass(frozen=True)
class Plan:
    """Of one step and one window: where each head of each row's new token goes, and who meets what."""

    place_BG: torch.Tensor
    """Among the places of all slots and heads, one after another."""
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, eq=False)
class Prefix:
    """The cache of one row, for others that begin alike: keys, and values where they are apart, [G, places, K] of each
    layer."""

    tokens: int
    """Virtual ones among them."""
    layers: list[list[torch.Tensor]]
    apart: bool = False
    """Layers without a window do not copy it into slots."""
    shift: int = 0
    """As of its slot, see `Cache.shift`."""
    shown: Shown | None = None
    """As of its slot, see `Cache.show`."""


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
    common: tuple[torch.Tensor, ...] = ()
    """Of prompts that are held apart, [N, G, places, K] each."""

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

    def plan(
        self,
        tokens: Sequence[int],
        device: torch.device,
        prompt_B: Sequence[int | None] | None = None,
        prompt_tokens: Sequence[int] = (),
    ) -> Plan:
        """Of a step after which the slots of the rows have so many tokens; the rest as in `pieces_of`."""
        window, room = self.window, self.keys.shape[2]
        place_B = torch.tensor([(n - 1) if window is None else (n - 1) % window for n in tokens])
        head_BG = torch.arange(len(tokens) * self.groups).view(-1, self.groups)
        place_BG = (head_BG * room + place_B[:, None]).flatten().to(device)
        return Plan(place_BG, pieces_of([self.held(n) for n in tokens], device, prompt_B, prompt_tokens))

    def append(self, place_BG: torch.Tensor, keys_BGK: torch.Tensor, values_BGK: torch.Tensor | None) -> None:
        """Write one token of each live row."""
        for own, new in zip(self.tensors(), (keys_BGK, values_BGK), strict=False):
            assert new is not None
            size = new.shape[-1]
            own.view(-1, size).index_copy_(0, place_BG, new.to(own.dtype).reshape(-1, size))

    def attend(self, q_BHK: torch.Tensor, pieces: Sequence[Piece], scale: float) -> torch.Tensor:
        """One query a row and head against the row's tokens -> [B, H, value_dim]; fp32 softmax.

        The query heads of a group meet their keys in one small product, so keys and values are read once and not
        repeated.
        """
        q = (q_BHK * scale).unflatten(1, (self.groups, -1))
        found = [self._found(q[p.start : p.stop], p) for p in pieces]
        return (found[0] if len(found) == 1 else torch.cat(found)).flatten(1, 2)

    def _found(self, q_BGLK: torch.Tensor, p: Piece) -> torch.Tensor:
        keys, values = self._parts(self.tensors(), p.start, p.stop, p.longest)
        scores = _scores(q_BGLK, keys)
        if p.mask is not None:
            scores += p.mask
        if p.common is None:
            return torch.matmul(scores.softmax(-1).to(values.dtype), values)
        theirs = self._parts(self.common, p.common.start, p.common.stop, p.common.longest)
        return attend_both(q_BGLK, scores, values, p.common, *theirs)

    def _parts(
        self, tensors: Sequence[torch.Tensor], start: int, stop: int, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first places of some of the first dim."""
        keys = tensors[0][start:stop, :, :longest]
        if len(tensors) == 1:
            return keys, keys[..., : self.value_dim]
        return keys, tensors[1][start:stop, :, :longest]


class Cache:
    """The cache of a model's layers; `rows` slots of `tokens` places each."""

    def __init__(self, model: Decoder, max_tokens: int) -> None:
        """`max_tokens`: most places of all slots together."""
        self.layers = [LayerCache.of(layer) for layer in _layers(model)]
        self.ahead = 0 if model.virtual is None else model.virtual.ahead
        """Virtual tokens that every slot begins with; whoever counts a row's tokens leaves them out."""
        self.max_tokens, self.rows, self.tokens = max_tokens, 0, 0
        self._apart: dict[int, Prefix] = {}
        """The prompts of slots that begin behind them."""
        self._shifts: dict[int, int] = {}
        self._shown: dict[int, Shown] = {}
        self._joined: tuple[list[Shown | None], Joined | None] = ([], None)
        self._common: list[Prefix] = []
        """Those that the layers have together now."""

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

    def clear(self, slots: Sequence[int]) -> None:
        """Whole prompts will be put into these slots."""
        for slot in slots:
            self._apart.pop(slot, None)
            self._shifts.pop(slot, None)
            self._shown.pop(slot, None)

    def shift(self, slots: Sequence[int], by: Sequence[int]) -> None:
        """Later tokens of these slots have their places plus this as positions: pictures have their own (M-RoPE)."""
        self._shifts.update(zip(slots, by, strict=True))

    def shifted(self, slot: int) -> int:
        """What was said so of a slot."""
        return self._shifts.get(slot, 0)

    def show(self, slot: int, shown: Shown | None) -> None:
        """Later tokens of this slot read this picture, which does not stand among them; None: none."""
        if shown is not None:
            self._shown[slot] = shown

    def shown(self, rows: int) -> Joined | None:
        """What the first rows read; made when it is another than that of the last call."""
        wanted = [self._shown.get(slot) for slot in range(rows)]
        if wanted != self._joined[0]:
            self._joined = wanted, Joined.of(wanted)
        return self._joined[1]

    def take(self, slot: int, tokens: int, apart: bool = False) -> Prefix:
        """A copy of the first `tokens` tokens of a slot, which must be all it has and no prompt held apart.

        `apart`: slots that are given it have it together.
        """
        every = self.ahead + tokens
        parts = [[x[slot, :, : layer.held(every)].clone() for x in layer.tensors()] for layer in self.layers]
        return Prefix(every, parts, apart, self.shifted(slot), self._shown.get(slot))

    def give(self, slot: int, prefix: Prefix) -> None:
        """Begin a slot with such a copy."""
        self.clear([slot])
        self.shift([slot], [prefix.shift])
        self.show(slot, prefix.shown)
        if prefix.apart:
            self._apart[slot] = prefix
        for layer, parts in zip(self.layers, prefix.layers, strict=True):
            if prefix.apart and layer.window is None:
                continue
            for own, new in zip(layer.tensors(), parts, strict=True):
                own[slot, :, : new.shape[1]] = new

    def move(self, source: int, target: int, tokens: int, first: int = 0) -> None:
        """Copy a row's `tokens` tokens to another slot, which has the same ones before token `first` already."""
        first, tokens = self.ahead + first if first else 0, self.ahead + tokens
        self.clear([target])
        self.shift([target], [self.shifted(source)])
        self.show(target, self._shown.get(source))
        prefix = self._apart.get(source)
        if prefix is not None:
            assert first == 0
            self._apart[target] = prefix
        for layer in self.layers:
            behind = prefix.tokens if prefix is not None and layer.window is None else 0
            for start, stop in layer.places(first, tokens - behind):
                for own in layer.tensors():
                    own[target, :, start:stop] = own[source, :, start:stop]

    def plans(self, lengths: Sequence[int], device: torch.device) -> dict[int | None, Plan]:
        """For each window, the plan of a step after which the rows have `lengths` tokens, virtual ones among them."""
        prefixes = [self._apart.get(slot) for slot in range(len(lengths))]
        self._gather([prefix for prefix in dict.fromkeys(prefixes) if prefix is not None])
        number = {prefix: i for i, prefix in enumerate(self._common)}
        prompt_B = [None if prefix is None else number[prefix] for prefix in prefixes]
        own = [n - (prefix.tokens if prefix else 0) for n, prefix in zip(lengths, prefixes, strict=True)]
        return {
            layer.window: (
                layer.plan(own, device, prompt_B, [prefix.tokens for prefix in self._common])
                if layer.window is None
                else layer.plan(lengths, device)
            )
            for layer in {layer.window: layer for layer in self.layers}.values()
        }

    def _gather(self, prefixes: list[Prefix]) -> None:
        """Have these prompts together in the layers that hold them apart."""
        if prefixes == self._common:
            return
        longest = max((prefix.tokens for prefix in prefixes), default=0)
        for index, layer in enumerate(self.layers):
            layer.common = ()
            if prefixes and layer.window is None:
                layer.common = tuple(
                    _stacked([prefix.layers[index][part] for prefix in prefixes], longest)
                    for part in range(len(layer.tensors()))
                )
        self._common = prefixes


def _scores(q_BGLK: torch.Tensor, keys_BGCK: torch.Tensor) -> torch.Tensor:
    """Queries against keys, fp32 [B, G, L, C]."""
    if keys_BGCK.shape[2] * keys_BGCK.shape[3] < _LONG:
        return torch.matmul(q_BGLK, keys_BGCK.transpose(-1, -2)).float()
    return torch.matmul(keys_BGCK, q_BGLK.transpose(-1, -2)).transpose(-1, -2).float()


def _stacked(parts: Sequence[torch.Tensor], places: int) -> torch.Tensor:
    """[G, places of its own, K] of each prompt -> [N, G, places, K]."""
    heads, _, size = parts[0].shape
    out = _room(parts[0], (len(parts), heads, places, size), parts[0].dtype)
    for own, part in zip(out, parts, strict=True):
        own[:, : part.shape[1]] = part
    return out


def _room(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros. On a CPU a page of them takes memory when something is written there, so room that no row comes to use
    costs nothing."""
    size = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or size == 0:
        return like.new_zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


def _layers(model: Decoder) -> list[Layer]:
    return [layer for layer in model.layers.values() if isinstance(layer, Layer)]
