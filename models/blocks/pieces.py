"""The plan of packed attention: which queries meet which keys, one piece a kernel call."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

QUERY_BLOCK = 256
"""Queries taken together under a sliding window shorter than their document."""


@dataclass(frozen=True)
class Piece:
    """Queries `q_start:q_stop` against keys `k_start:q_stop`.

    Without a mask: `docs` documents of equal length, causal, with `k_start == q_start`. With a mask (fp32
    [queries, keys], 0 or -inf): part of one document under a sliding window.
    """

    q_start: int
    q_stop: int
    k_start: int
    docs: int = 1
    mask: torch.Tensor | None = None


def pieces_of(borders: Sequence[int], window: int | None, device: torch.device) -> tuple[Piece, ...]:
    """Cut packed documents (`borders` as in cu_seqlens) into pieces that cover every query once.

    Neighbouring documents of equal length share a piece. A document longer than `window` goes in blocks of queries, so
    that its cost and its masks grow with length x window, not with length squared.
    """
    pieces: list[Piece] = []
    masks: dict[tuple[int, int], torch.Tensor] = {}
    for start, stop in pairwise(borders):
        length = stop - start
        if length == 0:
            continue
        if window is not None and length > window:
            pieces += _windowed(start, stop, window, masks, device)
            continue
        last = pieces[-1] if pieces else None
        if last is not None and last.mask is None and (last.q_stop - last.q_start) == last.docs * length:
            pieces[-1] = Piece(last.q_start, stop, last.k_start, last.docs + 1)
        else:
            pieces.append(Piece(start, stop, start))
    return tuple(pieces)


def _windowed(
    start: int, stop: int, window: int, masks: dict[tuple[int, int], torch.Tensor], device: torch.device
) -> list[Piece]:
    block = max(window, QUERY_BLOCK)
    pieces = []
    for q_start in range(start, stop, block):
        q_stop = min(q_start + block, stop)
        k_start = max(start, q_start - window + 1)
        shape = (q_stop - q_start, q_stop - k_start)
        if shape not in masks:
            distance = (torch.arange(shape[0], device=device) + q_start - k_start)[:, None] - torch.arange(
                shape[1], device=device
            )
            seen = (distance >= 0) & (distance < window)
            masks[shape] = torch.zeros(shape, device=device).masked_fill_(~seen, float("-inf"))
        pieces.append(Piece(q_start, q_stop, k_start, mask=masks[shape]))
    return pieces
