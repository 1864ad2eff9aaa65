"""Ranks that work for unequal times, brought together every few seconds.

What takes long here is no computation (a reward that asks a judge, a server that writes texts or reads weights), so a
rank that waits for another may wait for longer than `run.hang_timeout` allows. With rounds no rank ever waits for
longer than one: waiting for who is busy does not look like waiting for who is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from data.peers import Peers

ROUND_S = 5.0
"""Seconds between two rounds."""

Result = TypeVar("Result")


class Rounds:
    """Work that every rank does for itself, with rounds until the last has done.

    Args:
        peers: all ranks; each calls `run` alike.
        every_s: seconds between two rounds, well below what a collective may wait.
    """

    def __init__(self, peers: Peers, every_s: float = ROUND_S) -> None:
        self.peers, self.every_s = peers, every_s
        self._last: float | None = None
        """Time of the last round; None outside of `run`."""

    def run(self, work: Callable[[], Result]) -> list[Result]:
        """Do `work`, which calls `tick` now and then, on every rank, and return all results in rank order.

        Raises:
            ValueError: some rank's work raised it (see `Peers.run`).
        """
        return self.peers.run(lambda: self._until_all_are_done(work))

    def tick(self) -> None:
        """Take part in a round where one is due; outside of `run` nothing."""
        if self._last is not None and time.monotonic() - self._last >= self.every_s:
            self._together(done=False)

    def wait(self, futures: Sequence[Future[Any]]) -> None:
        """Wait for what other threads do."""
        left = set(futures)
        while left:
            _, left = wait(left, self.every_s)
            self.tick()

    def _until_all_are_done(self, work: Callable[[], Result]) -> Result:
        self._last = time.monotonic()
        try:
            result = work()
        except Exception:
            self._wait_for_the_others()
            raise
        self._wait_for_the_others()
        return result

    def _wait_for_the_others(self) -> None:
        while not self._together(done=True):
            pass
        self._last = None

    def _together(self, done: bool) -> bool:
        """One round; whether every rank has done."""
        found = all(self.peers.all_gather(done))
        self._last = time.monotonic()
        return found
