"""Who sees whom when learnt queries and texts go through the same attention.

Rows lie one after another without padding, those of all queries and those of all texts; only within an attention does
each text stand on a line of its own, as long as the longest.

Legend: B sequences, Q queries of a sequence, L places of a line, T rows of texts, H heads of this rank, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Lines:
    """Where the rows of packed texts stand when each text has a line."""

    place_T: torch.Tensor
    """int64 [T]: of B lines of L places, one after another."""
    real_BL: torch.Tensor
    """bool [B, L]: where a token stands."""

    @staticmethod
    def of(borders: Sequence[int], device: torch.device) -> Lines:
        """Those of texts that lie between these borders, [B + 1] from 0 to T."""
        lengths = [stop - start for start, stop in pairwise(borders)]
        longest = max(lengths)
        length_B1 = torch.tensor(lengths, device=device)[:, None]
        real_BL = torch.arange(longest, device=device) < length_B1
        return Lines(real_BL.flatten().nonzero().squeeze(1), real_BL)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H, K] -> [B, L, H, K], zero where no token stands."""
        whole = x.new_zeros(self.real_BL.numel(), *x.shape[1:])
        return whole.index_copy(0, self.place_T, x).unflatten(0, tuple(self.real_BL.shape))

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, H, K] -> [T, H, K]"""
        return x.flatten(0, 1).index_select(0, self.place_T)


@dataclass(frozen=True)
class Sight:
    """Sequences of queries, of a text, or of both, each of which sees all of itself."""

    queries: slice | None = None
    """Rows of the queries that look."""
    texts: slice | None = None
    """Rows of the texts that look."""
    lines: Lines | None = None
    """Of these texts."""
    shown: slice | None = None
    """Rows of queries that the texts see besides, which look elsewhere."""
    causal: bool = False
    """A token sees none of the text behind it."""

    def mask(self, device: torch.device, each: int) -> torch.Tensor | None:
        """bool [B, 1, rows that look, rows that are seen] of each sequence; None where all see all.

        Args:
            each: queries of a sequence.
        """
        if self.lines is None:
            return None
        seen_BL, (count, longest) = self.lines.real_BL, self.lines.real_BL.shape
        ahead = each if self.queries is not None or self.shown is not None else 0
        seen = torch.cat([seen_BL.new_ones(count, ahead), seen_BL], 1)[:, None, None]
        if not self.causal:
            return seen
        past = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        return seen & torch.cat([past.new_ones(longest, ahead), past], 1)


def look(
    q: tuple[torch.Tensor, torch.Tensor],
    k: tuple[torch.Tensor, torch.Tensor],
    v: tuple[torch.Tensor, torch.Tensor],
    sights: Sequence[Sight],
    each: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all rows of queries and texts, as the sights say.

    Args:
        q, k, v: of the rows of queries and of texts, [rows, H, K] each. The sights take them in order, all of them.
        each: queries of a sequence.

    Returns:
        Of queries and of texts, [rows, H K].
    """
    outs: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for sight in sights:
        found = _of_sequences(sight, q, k, v, each).transpose(1, 2)
        if sight.queries is not None:
            outs[0].append(found[:, :each].flatten(0, 1))
        if sight.lines is not None:
            text = found[:, each:] if sight.queries is not None else found
            outs[1].append(sight.lines.packed(text))
    joined = [torch.cat(parts) if parts else rows[:0] for parts, rows in zip(outs, q, strict=True)]
    return joined[0].flatten(1), joined[1].flatten(1)


def _of_sequences(
    sight: Sight,
    q: tuple[torch.Tensor, torch.Tensor],
    k: tuple[torch.Tensor, torch.Tensor],
    v: tuple[torch.Tensor, torch.Tensor],
    each: int,
) -> torch.Tensor:
    """[B, H, rows that look, K]"""

    def rows(x: tuple[torch.Tensor, torch.Tensor], queries: slice | None) -> torch.Tensor:
        parts = [] if queries is None else [x[0][queries].unflatten(0, (-1, each))]
        if sight.texts is not None and sight.lines is not None:
            parts.append(sight.lines.spread(x[1][sight.texts]))
        return torch.cat(parts, 1).transpose(1, 2)

    seen = sight.queries if sight.queries is not None else sight.shown
    mask = sight.mask(q[0].device, each)
    return F.scaled_dot_product_attention(rows(q, sight.queries), rows(k, seen), rows(v, seen), attn_mask=mask)
