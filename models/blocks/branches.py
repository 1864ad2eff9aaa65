"""Documents that begin alike, with the tokens they have in common computed once.

One document holds the beginning; another one that begins with the same tokens has only those after it, at positions
that go on, and its queries meet the holder's keys as well as its own. Both results are joined by log-sum-exp, as those
of the ranks of a ring are: this is a ring of one rank. Hidden states of the beginning get the gradients of all. A
learnt prefix is a beginning of all documents that none holds: its keys and values are behind those of the tokens.
"""

from collections.abc import Sequence
from itertools import pairwise, repeat

import torch

from models.blocks.context import Context, Meeting, Ring, Span, WindowMeetings
from models.blocks.pieces import pieces_of
from parallel.sharding import ALONE

Branches = Sequence[tuple[int, int]]
"""For each document who holds its beginning, and how many tokens that is; 0 = it has all of them itself."""


def branch_context(
    borders: tuple[int, ...],
    branches: Branches | None,
    windows: set[int | None],
    device: torch.device,
    prefix: int = 0,
) -> Context:
    """Who meets whom, for documents whose own tokens lie between `borders`. `prefix`: keys behind those of all tokens
    that every document begins with."""
    branches = tuple(repeat((0, 0), len(borders) - 1)) if branches is None else branches
    assert len(branches) == len(borders) - 1, f"{len(branches)} beginnings of {len(borders) - 1} documents"
    for holder, tokens in branches:
        assert branches[holder][1] == 0 or tokens == 0, f"document {holder} holds nothing: it is a branch itself"
        assert tokens <= borders[holder + 1] - borders[holder], f"document {holder} has no {tokens} tokens"
    rings = {}
    for window in windows:
        if window is None:
            meetings = _all(borders, branches, device)
            meetings += (Meeting(0, borders[-1], borders[-1], borders[-1] + prefix),) * bool(prefix)
        else:
            meetings = _windowed(borders, branches, window, device, prefix)
        rings[window] = Ring(ALONE, meetings, (), (), None)
    return Context(ALONE, "ring", (((0, borders[-1]),),), borders, rings)


def _all(borders: Sequence[int], branches: Branches, device: torch.device) -> tuple[Meeting, ...]:
    """Every query sees its document's own keys before it and its whole beginning; neighbours share a kernel call."""
    meetings = [
        Meeting(p.q_start, p.q_stop, p.k_start, p.q_stop, causal=True, docs=p.docs, first=True)
        for p in pieces_of(borders, None, device)
    ]
    for (start, stop), (holder, tokens) in zip(pairwise(borders), branches, strict=True):
        if not tokens:
            continue
        k_start, k_stop, last = borders[holder], borders[holder] + tokens, meetings[-1]
        if not last.first and (last.q_stop, last.k_start, last.k_stop) == (start, k_start, k_stop):
            meetings[-1] = Meeting(last.q_start, stop, k_start, k_stop)
        else:
            meetings.append(Meeting(start, stop, k_start, k_stop))
    return tuple(meetings)


def _windowed(
    borders: Sequence[int], branches: Branches, window: int, device: torch.device, prefix: int
) -> tuple[Meeting, ...]:
    """The same under a sliding window: distances are those between positions in the document."""
    pairs = WindowMeetings(window, device)
    meetings: list[Meeting] = []
    for (start, stop), (holder, tokens) in zip(pairwise(borders), branches, strict=True):
        first = prefix + tokens
        own = Span(first, first + stop - start, start)
        meetings += pairs.windowed(own, own)
        if tokens:
            meetings += pairs.windowed(own, Span(prefix, first, borders[holder]))
        if prefix:
            meetings += pairs.windowed(own, Span(0, prefix, borders[-1]))
    return tuple(meetings)
