"""Virtual tokens, which every document begins with: learnt embeddings (Lester et al. 2021, prompt tuning), or learnt
keys and values of each layer (Li & Liang 2021, prefix tuning). Its own tokens stand after them.

Legend: `P` virtual tokens; `T` tokens as given; `L` rows of the documents with their virtual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from models.blocks.branches import Branches
from parallel.layers import parameter
from parallel.sharding import REPLICATED, Place, Shard, idle
from parallel.switch import Lengthens, Switch


class Given(NamedTuple):
    """The documents a decoder is called with; see its `forward`."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor | Sequence[int]
    targets_T: torch.Tensor | None = None
    channel_T: torch.Tensor | None = None
    branches: Branches | None = None


@dataclass(frozen=True)
class Longer:
    """Documents with room for their virtual tokens. Where another one holds the beginning, it holds these too."""

    given: Given
    """Of L rows: without a target and with the token 0 where they are virtual."""
    virtual_L: torch.Tensor
    """int64: which virtual token a row is, -1 for the others."""
    own_T: torch.Tensor
    """int64: the rows of the tokens that were given."""

    def cut(self, out: Any) -> Any:
        """What a decoder gives for L rows, for the T given tokens; numbers stay as they are."""
        if isinstance(out, tuple):
            return tuple(self.cut(each) for each in out)
        return out if out.ndim == 0 else out[self.own_T]


def lengthened(given: Given, count: int) -> Longer:
    """The documents, each that holds its own beginning `count` rows longer; an empty one stays empty."""
    device, total = given.tokens_T.device, given.tokens_T.shape[0]
    old = _borders(given.cu_seqlens)
    lengths, more = _lengths(old), _more(old, given.branches, count)
    borders = (0, *accumulate(n + extra for n, extra in zip(lengths, more, strict=True)))
    before = torch.tensor(list(accumulate(more)), dtype=torch.int64).repeat_interleave(torch.tensor(lengths))
    own_T = (torch.arange(total) + before).to(device)
    firsts = [start for start, extra in zip(borders, more, strict=False) if extra]
    rows = (torch.tensor(firsts, dtype=torch.int64)[:, None] + torch.arange(count)).flatten().to(device)
    which = torch.arange(count, device=device).repeat(len(firsts))

    def spread(of_T: torch.Tensor, elsewhere: int) -> torch.Tensor:
        return of_T.new_full((borders[-1],), elsewhere).index_copy_(0, own_T, of_T)

    channel = given.channel_T
    if channel is not None:
        doc_starts = [start for start, extra in zip(old, more, strict=False) if extra]
        channel = spread(channel, 0).index_copy_(0, rows, channel[doc_starts].repeat_interleave(count))
    longer = Given(
        spread(given.tokens_T, 0),
        spread(given.positions_T + count, 0).index_copy_(0, rows, which.to(given.positions_T.dtype)),
        borders,
        None if given.targets_T is None else spread(given.targets_T, -100),
        channel,
        None if given.branches is None else [(holder, n + count if n else 0) for holder, n in given.branches],
    )
    virtual_L = torch.full((borders[-1],), -1, dtype=torch.int64, device=device).index_copy_(0, rows, which)
    return Longer(longer, virtual_L, own_T)


def _borders(cu_seqlens: torch.Tensor | Sequence[int]) -> list[int]:
    return cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else list(cu_seqlens)


def _lengths(borders: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(borders)]


def _more(borders: Sequence[int], branches: Branches | None, count: int) -> list[int]:
    """Virtual tokens of each document."""
    held = [0] * (len(borders) - 1) if branches is None else [tokens for _, tokens in branches]
    return [count if n and not tokens else 0 for n, tokens in zip(_lengths(borders), held, strict=True)]


class VirtualTokens(Switch):
    """How many there are; each chunk of a model knows it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    @property
    def ahead(self) -> int:
        """The position of a document's first token."""
        return self.count if self.on else 0


class Prompt(VirtualTokens, Lengthens):
    """Embeddings before those of a document's tokens; the parameter lies in the chunk that embeds.

    A chunk behind it trains nothing, but optimizer and DeepSpeed want a parameter: it has an idle one.
    """

    def __init__(self, count: int, hidden_size: int, place: Place, embeds: bool) -> None:
        super().__init__(count)
        self.embeddings = self.idle = None
        if embeds:
            self.embeddings = parameter((count, hidden_size), REPLICATED, "adapter", place, place.splits_rows)
        else:
            self.idle = idle(parameter((1, 1), REPLICATED, "zeros", place))
        self.place = place

    def forward(self, hidden_RD: torch.Tensor, virtual_L: torch.Tensor) -> torch.Tensor:
        """Put the embeddings in their rows; under sequence parallel those of this rank."""
        if self.embeddings is None:
            assert self.idle is not None
            return hidden_RD + 0.0 * self.idle
        if self.place.splits_rows:
            tp, rows = self.place.tp, hidden_RD.shape[0]
            virtual_L = nn.functional.pad(virtual_L, (0, rows * tp.size - virtual_L.shape[0]), value=-1)
            virtual_L = virtual_L[tp.rank * rows : (tp.rank + 1) * rows]
        rows = self.embeddings[virtual_L.clamp(min=0)].to(hidden_RD.dtype)
        return torch.where((virtual_L >= 0)[:, None], rows, hidden_RD)

    def extra_rows(self, inputs: Mapping[str, Any]) -> int:
        """By how many rows the documents of a micro-batch get longer."""
        return sum(_more(_borders(inputs["cu_seqlens"]), inputs.get("branches"), self.ahead))


class Prefix(VirtualTokens):
    """Keys and values before those of a document's tokens, in each layer (`LayerPrefix`)."""


class LayerPrefix(nn.Module):
    """One layer's keys and values of the virtual tokens, as a cache has them: normed and rotated. Cut by heads."""

    def __init__(self, count: int, kv_heads: int, head_dim: int, place: Place) -> None:
        super().__init__()
        self.head_dim = head_dim
        size, cut = kv_heads * head_dim, Shard(0, (kv_heads * head_dim,), (kv_heads,))
        self.keys = parameter((size, count), cut, "adapter", place)
        self.values = parameter((size, count), cut, "adapter", place)

    def forward(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [P, G, K] in the dtype of `like`."""
        keys, values = (x.t().unflatten(1, (-1, self.head_dim)).to(like.dtype) for x in (self.keys, self.values))
        return keys, values
