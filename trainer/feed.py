"""Micro-batches for one step after another; those of the next are made while the present one is computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
    """Calls ``make(position)`` for positions that go up by ``step``.

    Args:
        make: depends on the position only.
        ahead: make the next one in a thread as soon as one is taken; worth it where files are read (pictures).
    """

    def __init__(self, make: Callable[[int], T], step: int, ahead: bool) -> None:
        self._make, self._step = make, step
        self._thread = ThreadPoolExecutor(1, "feed") if ahead else None
        self._next: tuple[int, Future[T]] | None = None
        self._waited_s = 0.0

    def take(self, position: int, more: bool = True) -> T:
        """What belongs to ``position``; ``more``: the next position will be asked for too.

        Raises:
            whatever ``make`` raises for this position.
        """
        began = time.perf_counter()
        found = self._made(position, more)
        self._waited_s += time.perf_counter() - began
        return found

    def waited(self) -> float | None:
        """Seconds that ``take`` lasted since this was last asked; None where nothing is made ahead."""
        seconds, self._waited_s = self._waited_s, 0.0
        return None if self._thread is None else seconds

    def _made(self, position: int, more: bool) -> T:
        if self._thread is None:
            return self._make(position)
        mine = self._next[1] if self._next is not None and self._next[0] == position else None
        found = self._make(position) if mine is None else mine.result()
        after = position + self._step
        self._next = (after, self._thread.submit(self._make, after)) if more else None
        return found
