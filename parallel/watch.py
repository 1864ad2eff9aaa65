"""Ends a job whose ranks do not come together any more, with a page that says who waits where.

A thread on each rank looks once a second at its own rank and at its neighbour, and talks to the other ranks through the
launcher's key-value store, on a connection of its own: collectives may be what hangs. There is trouble when

- a collective or a message has waited longer than `run.hang_timeout`,
- the process of a rank is gone, or its machine gives no sign of life,
- a connection to another rank broke.

The rank that finds it writes it into the store; every rank answers with what it is doing; one of them prints the page;
then all leave with exit code `EXIT_LOST`. A launcher that sends SIGTERM because one process died is made to wait for
that page. One process alone has no thread.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, NoReturn

from parallel import stacks
from parallel.board import FAILED_S, Board
from parallel.doing import doing, progress, recorded, waiting_in
from parallel.doorbell import doorbell, signals_back, signals_to, who_rang
from parallel.group_names import named_groups
from parallel.groups import Groups

EXIT_LOST = 3
"""Exit code of a job that a lost rank or a hanging collective has ended; starting it again may help."""

EXIT_TERMINATED = 128 + signal.SIGTERM

PEER_GONE = re.compile(
    r"[Cc]onnection (closed|reset)|Broken pipe|NCCL.*(remote|abort)|process group.*abort|[Tt]imed out"
)
"""What a collective says when another rank has left."""

TERM_S = 0.7
"""Seconds after SIGTERM in which a rank looks for one that died."""

WAKE = b"\0"


def peer_gone(error: BaseException) -> bool:
    """Whether a collective raised this because another rank is not there any more."""
    return isinstance(error, RuntimeError) and PEER_GONE.search(str(error)) is not None


@contextmanager
def watching(groups: Groups, timeout_s: float) -> Iterator[None]:
    """Watch this rank and, with those of the others, the job. All ranks enter and leave together, in their main thread.

    Args:
        timeout_s: seconds a collective may wait. The process group's own limit should be longer, or it speaks first.
    """
    if groups.world == 1:
        yield
        return
    watch = Watch(groups, timeout_s)
    try:
        yield
    except Exception as error:
        if peer_gone(error):
            watch.broke(error)
        watch.leave(f"{type(error).__name__}: {error}")
        raise
    except BaseException as error:
        watch.leave(type(error).__name__)
        raise
    else:
        watch.leave("")


class Watch:
    """The thread of one rank, and what it knows."""

    def __init__(self, groups: Groups, timeout_s: float):
        self.rank, self.world, self.timeout_s = groups.rank, groups.world, timeout_s
        self.every_s = max(0.05, min(1.0, timeout_s / 10))
        named = named_groups(groups)
        self.names = {key: (each.name, each.ranks) for key, each in named.items()}
        self.groups = [each.group for each in named.values()]
        self.board = Board(groups.rank, groups.world)
        self.neighbour = (self.rank + 1) % self.world
        self.pulse = Pulse(timeout_s)
        self.broken: BaseException | None = None
        self.closing = False
        self.woken, self.wake = doorbell()
        self.previous = signals_to(self.wake.fileno())
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()

    # ---- called by the main thread -----------------------------------------------------------------------------------

    def broke(self, error: BaseException) -> None:
        """A connection broke in the main thread: the job ends, and with it this call."""
        self.broken = error
        self.wake.send(WAKE)
        self.thread.join()

    def leave(self, why: str) -> None:
        """This rank goes its own way from here; `why` says what failed, empty where nothing did."""
        self.closing = True
        self.wake.send(WAKE)
        self.thread.join()
        signals_back(self.previous)
        self.board.leave(why.splitlines()[0] if why else "")
        self.woken.close()
        self.wake.close()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            # Not select(): it cannot hear a descriptor above 1,023, and a large job has more.
            rung = who_rang(self.woken) if wait([self.woken], self.every_s) else b""
            if self.closing:
                return
            if signal.SIGTERM in rung:
                self._terminated()
            why = self._trouble()
            if why:
                self._stop(why)

    def _trouble(self) -> str:
        """Why the job cannot go on; empty when it can."""
        if self.broken:
            return f"rank {self.rank} lost its connection to another rank."
        waited = self._waited()
        if waited:
            allowed = f"run.hang_timeout={self.timeout_s:g} allows no more"
            return f"rank {self.rank} waited {waited:.1f} s for other ranks, and {allowed}."
        self.board.beat()
        return self.board.trouble() or self._neighbour_gone()

    def _waited(self) -> float:
        """Seconds this rank has waited, once they are too many; 0 before."""
        calls = tuple(group._get_sequence_number_for_group() for group in self.groups)
        return self.pulse.waited(progress(), calls, stacks.position(), self._really_waits)

    def _really_waits(self) -> bool:
        """Whether something has been open for too long: takes long to find out, and is asked only where it may be."""
        open_ = max((call.seconds or 0.0 for call in recorded(self.names)[0]), default=0.0)
        return open_ > self.timeout_s or waiting_in(stacks.main_thread(), self.names) is not None

    def _neighbour_gone(self) -> str:
        """Each rank looks after the next one that has not come to its end.

        Without the store that cannot be known; then a process that has ended is trouble to a rank in a collective.
        """
        if self.board.deaf:
            dead = self.board.dead()
            return f"rank {dead[0]} is gone." if dead and self._in_collective() else ""
        while self.neighbour != self.rank and (left := self.board.left(self.neighbour)) == "":
            self.neighbour = (self.neighbour + 1) % self.world
        if self.neighbour == self.rank:
            return ""
        gone = self.board.gone(self.neighbour, FAILED_S if left else self.timeout_s)
        return f"rank {self.neighbour} is gone." if gone else ""

    def _terminated(self) -> None:
        """SIGTERM: from a user, or from a launcher because a rank died. Only the second is worth a page."""
        until = time.monotonic() + TERM_S
        while time.monotonic() < until:
            gone = self._all_gone()
            why = f"rank {gone[0]} is gone." if gone else self._trouble()
            if why:
                self._stop(why)
            time.sleep(0.1)
        os._exit(EXIT_TERMINATED)

    def _in_collective(self) -> bool:
        return bool(recorded(self.names)[0])

    def _all_gone(self) -> list[int]:
        gone = [r for r in range(self.world) if self.board.left(r) != "" and self.board.gone(r, float("inf"))]
        return [] if self.board.deaf else gone

    def _stop(self, why: str) -> NoReturn:
        """Answer, see to it that the page is printed once, and leave."""
        mine = doing(self.rank, self.board.process.host, self.names, self.broken)
        verdict = self.board.agree(why, mine, patience_s=2 * self.every_s + 4.0)
        if verdict.answered[0] == self.rank:
            sys.stderr.write(f"\n{verdict.text}\n\n")  # in one piece: other ranks may write to the same terminal
            sys.stderr.flush()
            self.board.printed()
        self.board.go(verdict)
        os._exit(1 if verdict.failed else EXIT_LOST)


class Pulse:
    """Tells a rank that waits from one that works, from what changes between two looks."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self.groups: dict[str, tuple[int, float]] = {}
        """Group -> (its last collective that ended, since when it waits for the next)."""
        self.still: tuple[Any, float] = ((), 0.0)

    def waited(
        self, seen: tuple[tuple[str, int, int], ...], calls: tuple[int, ...], at: Any, really: Callable[[], bool]
    ) -> float:
        """Seconds of the longest wait, once it is longer than allowed; 0 before.

        Args:
            seen: (group, collectives called, collectives ended) of the flight recorder. Of two that end at the same
                moment it may note the first one last, and is then wrong until the next one ends.
            calls: operations each group has started, messages included, which the flight recorder leaves out.
            at: where the main thread stands.
            really: looks closer, when nothing has moved for too long.
        """
        now, longest = time.monotonic(), 0.0
        for group, called, ended in seen:
            before, since = self.groups.get(group, (None, now))
            if called <= ended or ended != before:
                since = now
            self.groups[group] = ended, since
            longest = max(longest, now - since)
        state, since = self.still
        if state != (seen, calls, at):
            since = now
            self.still = (seen, calls, at), now
        longest = max(longest, now - since)
        if longest <= self.timeout_s:
            return 0.0
        if really():
            return longest
        self.groups.clear()
        self.still = (), now
        return 0.0
