"""SIGTERM as a bell that wakes a thread, which then decides how the process ends; the main thread may be deep in a
collective, where Python's own handlers do not run."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from typing import Any

CREDENTIALS = struct.Struct("iII")
"""Process, user and group of who sent a message; Linux tells them."""


def doorbell() -> tuple[socket.socket, socket.socket]:
    """Two ends: the thread sleeps on the first, the second wakes it."""
    woken, wake = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    wake.setblocking(False)
    if hasattr(socket, "SO_PASSCRED"):
        woken.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return woken, wake


def who_rang(woken: socket.socket) -> bytes:
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


def signals_to(wake: int) -> int | None:
    """Have SIGTERM wake the thread instead of ending the process at once; what it woke before.

    Where the program has a handler of its own, or this is not the main thread, nothing is changed (None).
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return None
    signal.signal(signal.SIGTERM, _TermNoted())
    return signal.set_wakeup_fd(wake, warn_on_full_buffer=False)


def signals_back(previous: int | None) -> None:
    """Undo `signals_to`."""
    if previous is not None:
        signal.set_wakeup_fd(previous)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave_parent_asleep() -> None:
    """In a forked process: its signals wake it alone."""
    if isinstance(signal.getsignal(signal.SIGTERM), _TermNoted):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_parent_asleep)
