"""What rows read of pictures that do not stand among their tokens (`models.vision.gated`): keys and values of the last.

Legend: `F` features of a picture; `H` heads of this rank; `K` head size; `B` rows; `M` features of the picture of a row
that has most; `N` new tokens of the row that has most; `T` new tokens of all rows one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from models.decoder import Decoder
from models.vision.gated import GatedLayer, Reading

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Shown:
    """Of one picture: keys and values [F, H, K] of each gated layer, by the number of the layer behind."""

    layers: Mapping[str, Pair]


@dataclass(frozen=True, eq=False)
class Joined:
    """The pictures of several rows: keys and values [B, H, M, K] of each gated layer."""

    layers: Mapping[str, Pair]
    mask: torch.Tensor | None
    """0 or -inf [B, 1, 1, M]; None where all rows have equally many features."""
    seen_B: torch.Tensor
    """1, or 0 for a row without a picture, [B, 1, 1, 1]."""

    @staticmethod
    def of(rows: Sequence[Shown | None]) -> Joined | None:
        """None where no row has a picture."""
        first = next((row for row in rows if row is not None), None)
        if first is None:
            return None
        layers, counts = {}, [1] * len(rows)
        for number, (keys, _) in first.layers.items():
            blank = keys.new_zeros(1, *keys.shape[1:])
            pairs = [(blank, blank) if row is None else row.layers[number] for row in rows]
            counts = [len(k) for k, _ in pairs]
            keys, values = (pad_sequence([pair[i] for pair in pairs], True).transpose(1, 2) for i in (0, 1))
            layers[number] = keys.contiguous(), values.contiguous()
        device = next(iter(first.layers.values()))[0].device
        mask, most = None, max(counts)
        if min(counts) < most:
            hidden_BM = torch.arange(most) >= torch.tensor(counts)[:, None]
            mask = torch.zeros(hidden_BM.shape).masked_fill_(hidden_BM, float("-inf"))[:, None, None].to(device)
        seen_B = torch.tensor([float(row is not None) for row in rows], device=device).view(-1, 1, 1, 1)
        return Joined(layers, mask, seen_B)

    def found(self, number: str, q_THK: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """What new tokens, so many of each row, find in the layer before layer `number`, [T, H K]."""
        keys, values = self.layers[number]
        if min(counts) == max(counts):
            q_BNHK = q_THK.unflatten(0, (len(counts), -1))
        else:
            q_BNHK = pad_sequence(list(q_THK.split(list(counts))), True)
        mask = None if self.mask is None else self.mask.to(q_THK.dtype)
        out = F.scaled_dot_product_attention(q_BNHK.transpose(1, 2), keys, values, attn_mask=mask)
        out = (out * self.seen_B.to(out.dtype)).transpose(1, 2).flatten(2)
        if min(counts) == max(counts):
            return out.flatten(0, 1)
        return torch.cat([row[:count] for row, count in zip(out, counts, strict=True)])


def gated_of(model: Decoder) -> Mapping[str, GatedLayer]:
    """A decoder's gated layers, by the number of the layer behind."""
    layers = {} if model.connector is None else model.connector.gated
    return cast(Mapping[str, GatedLayer], layers)


def read_last(
    model: Decoder, number: str, hidden: torch.Tensor, joined: Joined | None, counts: Sequence[int]
) -> torch.Tensor:
    """New tokens, so many of each row, through the gated layer before layer `number`, if there is one."""
    layers = gated_of(model)
    if number not in layers:
        return hidden
    if joined is None:
        return layers[number].around(hidden, lambda q_THK: torch.zeros_like(q_THK).flatten(1))
    return layers[number].around(hidden, lambda q_THK: joined.found(number, q_THK, counts))


def read_prompts(
    model: Decoder, number: str, hidden: torch.Tensor, reading: Reading | None, keys: dict[str, Pair]
) -> torch.Tensor:
    """The same of whole prompts; its keys and values of all pictures are put into `keys`."""
    layers = gated_of(model)
    if reading is None or number not in layers:
        return read_last(model, number, hidden, None, ())
    k_FHK, v_FHK = keys[number] = layers[number].keys_values(reading.features_FD)
    return layers[number].around(hidden, lambda q_THK: reading(q_THK, k_FHK, v_FHK))


def last_picture(reading: Reading, stop: int, keys: Mapping[str, Pair]) -> Shown | None:
    """What the token before `stop` reads, and those that follow it."""
    first, last = reading.runs.read_by(stop - 1)
    if first == last:
        return None
    return Shown({number: (k[first:last].clone(), v[first:last].clone()) for number, (k, v) in keys.items()})
