"""Layers that read the features of pictures, before every so many of a decoder's: Flamingo's gated xattn-dense.

Attention of tokens to features, then a feed-forward, each times tanh of a learnt number that begins at 0, so that at
the start the decoder computes what it computed without them. A token reads all features of the last picture before it
in its own document, the token that stands for one those of that one; and nothing where there is none.

Source: Alayrac et al. 2022, Flamingo, section 2.2 and appendix A.1; norms are of the decoder's kind, and features are
normed, so that any connector may stand before. Legend: F features of all pictures, one after another in the order of
their tokens; H heads of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from models.blocks.norm import RMSNorm
from models.vision import layers
from models.vision.config import CrossConfig
from parallel.collectives import pad_rows
from parallel.layers import ColumnLinear, RowLinear, parameter
from parallel.sharding import REPLICATED, Place


@dataclass(frozen=True)
class Runs:
    """Packed tokens as runs that read the same picture: a run ends where another picture or another document begins."""

    tokens: tuple[int, ...]
    """Of each run; together all tokens."""
    features: tuple[int, ...]
    """That the tokens of each run read; 0 = none. Together all features."""

    @staticmethod
    def of(slots: Sequence[int], borders: Sequence[int]) -> Runs:
        """
        Args:
            slots: of each feature the token that stands for its picture, ascending.
            borders: of documents, as in cu_seqlens.
        """
        counts: dict[int, int] = {}
        for slot in slots:
            counts[slot] = counts.get(slot, 0) + 1
        starts = sorted({*counts, *borders})
        runs: list[tuple[int, int]] = []
        for start, stop in pairwise(starts):
            count = counts.get(start, 0)
            if runs and not count and not runs[-1][1]:  # nothing to read, as before
                runs[-1] = runs[-1][0] + stop - start, 0
            else:
                runs.append((stop - start, count))
        tokens, features = zip(*runs, strict=True)
        return Runs(tokens, features)

    def read_by(self, token: int) -> tuple[int, int]:
        """The features [first, last) that a token reads."""
        first = at = 0
        for tokens, features in zip(self.tokens, self.features, strict=True):
            at += tokens
            if token < at:
                return first, first + features
            first += features
        raise AssertionError(f"there are {at} tokens")


@dataclass(frozen=True)
class Reading:
    """What all gated layers of one forward share."""

    features_FD: torch.Tensor
    """Of the pictures; where there are none those of a blank one, which nobody reads."""
    runs: Runs

    def __call__(self, q_THK: torch.Tensor, k_FHK: torch.Tensor, v_FHK: torch.Tensor) -> torch.Tensor:
        """What the tokens find, [T, H K]; 0 where there is nothing to read."""
        counts = [count for count in self.runs.features if count]
        if not counts:  # all take part, so that there are gradients, of 0
            nothing = attended(q_THK[:1], k_FHK, v_FHK)
            return torch.zeros_like(q_THK).flatten(1) + nothing.masked_fill(torch.ones_like(nothing).bool(), 0.0)
        pictures = iter(zip(k_FHK.split(counts), v_FHK.split(counts), strict=True))
        found = [
            attended(q, *next(pictures)) if count else torch.zeros_like(q).flatten(1)
            for q, count in zip(q_THK.split(self.runs.tokens), self.runs.features, strict=True)
        ]
        return torch.cat(found)


def attended(q_THK: torch.Tensor, k_FHK: torch.Tensor, v_FHK: torch.Tensor) -> torch.Tensor:
    """Each token against all the features, [T, H K]."""
    return layers.attend(q_THK, k_FHK, v_FHK, 1)


class GatedLayer(nn.Module):
    """Hidden [R, D] -> [R, D]; rows as they lie between the decoder's layers."""

    def __init__(self, cfg: CrossConfig, width: int, place: Place) -> None:
        super().__init__()
        inner, heads = cfg.num_heads * cfg.head_dim, cfg.num_heads
        self.place, self.heads = place, heads // place.tp.size
        plain = Place(tp=place.tp)  # every tp rank has all features
        self.attn_norm, self.mlp_norm = (RMSNorm(width, cfg.norm_eps, place, place.splits_rows) for _ in range(2))
        self.features_norm = layers.RMSNorm(width, cfg.norm_eps, plain)
        self.q = ColumnLinear(width, (inner,), False, "normal", place, (heads,))
        self.kv = ColumnLinear(width, (inner, inner), False, "normal", plain, (heads, heads))
        self.out = RowLinear(inner, width, False, "normal_residual", place)
        self.up = ColumnLinear(width, (cfg.intermediate_size,), False, "normal", place)
        self.down = RowLinear(cfg.intermediate_size, width, False, "normal_residual", place)
        # They multiply what is cut over tp, before it is summed: a rank's gradient of them is a part.
        self.attn_gate, self.mlp_gate = (parameter((1,), REPLICATED, "zeros", place, True) for _ in range(2))

    def forward(self, hidden_RD: torch.Tensor, reading: Reading) -> torch.Tensor:
        k_FHK, v_FHK = self.keys_values(reading.features_FD)
        tokens = sum(reading.runs.tokens)
        return self.around(hidden_RD, lambda q_THK: reading(q_THK[:tokens], k_FHK, v_FHK))

    def keys_values(self, features_FD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read of features, [F, H, K] each."""
        k_FHK, v_FHK = self.kv(self.features_norm(features_FD)).unflatten(1, (2, self.heads, -1)).unbind(1)
        return k_FHK, v_FHK

    def around(self, hidden_RD: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The layer, whose queries [T, H, K], perhaps with padding rows, find [T, H K] by `read`."""
        found = read(self.q(self.attn_norm(hidden_RD)[0]).unflatten(1, (self.heads, -1)))
        if self.place.splits_rows:
            found = pad_rows(found, self.place.tp.size)
        hidden_RD = self.out(_gated(found, self.attn_gate), hidden_RD)
        inner = F.gelu(self.up(self.mlp_norm(hidden_RD)[0]))
        return self.down(_gated(inner, self.mlp_gate), hidden_RD)


def _gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x * gate.tanh().to(x.dtype)


def gated_layers(cfg: CrossConfig | None, width: int, layers: int, place: Place) -> nn.ModuleDict:
    """Those of a decoder of so many layers of hidden size `width`, by the number of the layer behind; none for None."""
    before = range(0) if cfg is None else cfg.before(layers)
    return nn.ModuleDict({str(i): GatedLayer(cfg, width, place) for i in before if cfg is not None})
