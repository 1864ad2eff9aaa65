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
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from parallel import stacks
from parallel.board import FAILED_S, Board
from parallel.doing import doing, progress, waiting_in
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
        self.woken, self.wake = _doorbell()
        self.previous = _signals_to(self.wake.fileno())
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
        _signals_back(self.previous)
        self.board.leave(why.splitlines()[0] if why else "")
        self.woken.close()
        self.wake.close()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            ready, *_ = select.select([self.woken], [], [], self.every_s)
            rung = _who_rang(self.woken) if ready else b""
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
        return self.pulse.waited(progress(), calls, stacks.position(), self._waits)

    def _waits(self) -> bool:
        return waiting_in(stacks.main_thread(), self.names) is not None

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
        return any(called > ended for _, called, ended in progress())

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
        self, seen: tuple[tuple[str, int, int], ...], calls: tuple[int, ...], at: Any, waits: Callable[[], bool]
    ) -> float:
        """Seconds of the longest wait, once it is longer than allowed; 0 before.

        Args:
            seen: (group, collectives called, collectives ended) of the flight recorder.
            calls: operations each group has started, messages included, which the flight recorder leaves out.
            at: where the main thread stands.
            waits: whether the main thread waits in a call; asked only when nothing has moved for too long.
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
            self.still = (seen, calls, at), now
        elif now - since > max(longest, self.timeout_s) and waits():
            longest = now - since
        return longest if longest > self.timeout_s else 0.0


CREDENTIALS = struct.Struct("iII")
"""Process, user and group of who sent a message; Linux tells them."""


def _doorbell() -> tuple[socket.socket, socket.socket]:
    """Two ends: the thread sleeps on the first, the second wakes it."""
    woken, wake = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    wake.setblocking(False)
    if hasattr(socket, "SO_PASSCRED"):
        woken.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return woken, wake


def _who_rang(woken: socket.socket) -> bytes:
    """The signals that came. A forked process shares the other end for a moment; what came to it does not count."""
    said, extra, *_ = woken.recvmsg(64, socket.CMSG_SPACE(CREDENTIALS.size))
    for _, _, sender in extra:
        if CREDENTIALS.unpack(sender)[0] != os.getpid():
            return b""
    return said


class _TermNoted:
    """SIGTERM's handler: the thread has been woken, and decides. In a forked process it ends that one."""

    def __init__(self) -> None:
        self.process = os.getpid()

    def __call__(self, *_: Any) -> None:
        if os.getpid() != self.process:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)


def _signals_to(wake: int) -> int | None:
    """Have SIGTERM wake the thread instead of ending the process at once; what it woke before.

    Where the program has a handler of its own, or this is not the main thread, nothing is changed (None).
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return None
    signal.signal(signal.SIGTERM, _TermNoted())
    return signal.set_wakeup_fd(wake, warn_on_full_buffer=False)


def _signals_back(previous: int | None) -> None:
    if previous is not None:
        signal.set_wakeup_fd(previous)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave_parent_asleep() -> None:
    """In a forked process: its signals wake it alone."""
    if isinstance(signal.getsignal(signal.SIGTERM), _TermNoted):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_parent_asleep)
