"""What the ranks' watches tell each other, on the launcher's key-value store: never through a collective.

| key             | says                                                       |
|-----------------|------------------------------------------------------------|
| `here/<rank>`   | which process on which machine the rank is                 |
| `beat/<rank>`   | a count that grows while the rank's watch lives            |
| `left/<rank>`   | "=" and why the rank went its own way, nothing if all well |
| `trouble`       | who found that the job cannot go on, and why               |
| `answer/<rank>` | what the rank is doing                                     |
| `page`          | the rank that prints, and the page                         |
| `printed`       | that it is on the terminal: all may leave                  |
| `off/<rank>`    | that the rank does; rank 0, which may keep the store, last |
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from parallel.doing import Call, Doing
from parallel.hang_page import page

Answer = TypeVar("Answer")

STORE_S = 5.0
"""Seconds the store may take to answer."""

FAILED_S = 10.0
"""Seconds that a rank which failed has to say so, before the others end."""

STATES = {
    "T": "stopped (SIGSTOP)",
    "t": "stopped by a debugger",
    "D": "waiting for a disk or a network file system",
    "R": "running native code that does not let its interpreter go on",
    "S": "asleep in native code that does not let its interpreter go on",
}


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of one machine, so that others on the machine can look whether it lives."""

    host: str
    pid: int
    born: str
    """When it started, in the kernel's count: a number may be given to another process later."""
    space: str
    """The machine's boot and the name space that numbers its processes; empty where neither can be known."""

    @staticmethod
    def this() -> Process:
        """The process that asks."""
        pid = os.getpid()
        _, born = _kernel_says(pid)
        boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        known = f"{boot.read_text().strip()} {os.readlink(space)}" if boot.exists() and space.is_symlink() else ""
        return Process(socket.gethostname(), pid, born, known if born else "")

    def state(self, asking: Process) -> str | None:
        """Its state in the kernel's letter, "" once it has ended, None where that cannot be seen from here."""
        if not self.space or self.space != asking.space:
            return None
        state, born = _kernel_says(self.pid)
        return "" if born != self.born or state in "ZX" else state


def _kernel_says(pid: int) -> tuple[str, str]:
    """State and start time of a process; empty words for none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is to be said at the end of a job, and by whom."""

    text: str
    answered: list[int]
    """The ranks that are there; the first of them speaks."""
    failed: bool = False
    """Whether a rank failed and has said why itself, so that there is nothing to find out."""


class Board:
    """One rank's view of what is written there. When the store is gone, nothing more is heard and `deaf` is true."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world, self.deaf = rank, world, False
        self.process = Process.this()
        store: Any = dist.distributed_c10d._get_default_store()
        store = store.clone()  # its own connection: the main thread may wait on the other one
        store.set_timeout(timedelta(seconds=STORE_S))
        entered = store.add(f"watch/entered/{rank}", 1)
        self.store = dist.PrefixStore(f"watch/{entered}", store)
        self.others: dict[int, Process] = {}
        self.beats: dict[int, tuple[str, float]] = {}
        self.count = 0
        self._put(f"here/{rank}", json.dumps(dataclasses.asdict(self.process)))

    # ---- the store ---------------------------------------------------------------------------------------------------

    def _ask(self, question: Callable[[], Answer], otherwise: Answer) -> Answer:
        if self.deaf:
            return otherwise
        try:
            return question()
        except dist.DistError:  # the process that keeps it has left
            self.deaf = True
            return otherwise

    def _put(self, key: str, value: str) -> None:
        self._ask(lambda: self.store.set(key, value), None)

    def _read(self, key: str) -> str | None:
        return self._ask(lambda: self.store.get(key).decode() if self.store.check([key]) else None, None)

    # ---- while all is well -------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """This rank lives. One more of the others is looked up each time, to know it should the store be lost."""
        self.count += 1
        self._put(f"beat/{self.rank}", str(self.count))
        if self.count < self.world:
            self._state((self.rank + self.count) % self.world)

    def leave(self, why: str) -> None:
        """This rank goes its own way."""
        self._put(f"left/{self.rank}", f"={why}")

    def left(self, rank: int) -> str | None:
        """Why a rank went its own way, "" when all was well, None while it is there."""
        said = self._read(f"left/{rank}")
        return said if said is None else said[1:]

    def trouble(self) -> str:
        """Why the job cannot go on, as some rank found; empty when it can."""
        said = self._read("trouble")
        return json.loads(said)[1] if said else ""

    def gone(self, rank: int, silent_s: float) -> bool:
        """Whether the process of a rank has ended, or (where that cannot be seen) has been silent for so long."""
        state = self._state(rank)
        if state is not None:
            return state == ""
        if self.deaf or rank not in self.others:
            return False
        beat, now = self._read(f"beat/{rank}") or "", time.monotonic()
        before, since = self.beats.get(rank, (None, now))
        if beat != before:
            since = now
        self.beats[rank] = beat, since
        return now - since > silent_s

    def dead(self) -> list[int]:
        """Ranks, of those this one has heard of, whose processes on this machine have ended, well or not."""
        return [rank for rank in sorted(self.others) if self._state(rank) == ""]

    def _state(self, rank: int) -> str | None:
        if rank not in self.others:
            said = self._read(f"here/{rank}")
            if said is None:
                return None
            self.others[rank] = Process(**json.loads(said))
        return self.others[rank].state(self.process)

    # ---- in trouble --------------------------------------------------------------------------------------------------

    def agree(self, why: str, mine: Doing, patience_s: float) -> Verdict:
        """Put this rank's answer up; what is to be said, and by whom.

        The rank whose trouble was first on the board makes the page of all answers. A rank that hears nothing makes
        its own.
        """
        self._put(f"answer/{self.rank}", json.dumps(dataclasses.asdict(mine)))
        told = json.dumps([self.rank, why])
        first = self._ask(lambda: self.store.compare_set("trouble", "", told).decode(), "")
        if first == told:
            self._put("page", json.dumps(dataclasses.asdict(self._collect(why, patience_s))))
        said = self._wait_for("page", 2 * patience_s)
        if said is None:
            nobody = f"could not be asked: the store on {_store_host(self.store)} does not answer"
            others = [rank for rank in range(self.world) if rank != self.rank]
            dead = {rank: self._why_absent(rank) for rank in self.dead()}
            return Verdict(page(why, {self.rank: mine}, dict.fromkeys(others, nobody) | dead), [self.rank])
        return Verdict(**json.loads(said))

    def printed(self) -> None:
        """The page is on the terminal."""
        self._put("printed", "1")

    def go(self, verdict: Verdict) -> None:
        """Wait until this rank may leave: when the page is printed, and for rank 0 when the others have read it."""
        if self.deaf:
            time.sleep(
                STORE_S / 2
            )  # the others, who look at this process now, should not take it for the one that died
        self._wait_for("printed", STORE_S)
        self._put(f"off/{self.rank}", "1")
        for rank in verdict.answered if self.rank == 0 else ():
            self._wait_for(f"off/{rank}", STORE_S)

    def _wait_for(self, key: str, seconds: float) -> str | None:
        until = time.monotonic() + seconds
        while (said := self._read(key)) is None and not self.deaf and time.monotonic() < until:
            time.sleep(0.05)
        return said

    def _collect(self, why: str, patience_s: float) -> Verdict:
        """The page of what all ranks answer."""
        until = time.monotonic() + patience_s
        answers: dict[int, Doing] = {}
        absent: dict[int, str] = {}
        open_ = set(range(self.world))
        while open_ and time.monotonic() < until:
            for rank in sorted(open_):
                said = self._read(f"answer/{rank}")
                if said is not None:
                    answers[rank] = _doing(json.loads(said))
                elif self._state(rank) == "" or self.left(rank) is not None:
                    absent[rank] = self._why_absent(rank)
            open_ -= answers.keys() | absent.keys()
            time.sleep(0.02 if open_ else 0.0)
        absent |= {rank: self._why_absent(rank) for rank in open_}
        for rank in open_:
            if self._state(rank):  # on this machine and deaf to us, so also to its launcher's SIGTERM
                os.kill(self.others[rank].pid, signal.SIGKILL)
        there = sorted(answers)
        failed = {rank: self.left(rank) for rank in absent if self.left(rank)}
        if failed:
            while time.monotonic() < until and any(self._state(rank) for rank in failed):
                time.sleep(0.05)  # a launcher takes the first that ends for the cause
            ranks = "; ".join(f"rank {rank} failed: {error}" for rank, error in failed.items())
            return Verdict(f"stopped, because {ranks}", there, failed=True)
        dead = [rank for rank in absent if self._state(rank) == ""]
        return Verdict(page(f"rank {dead[0]} is gone." if dead else why, answers, absent), there)

    def _why_absent(self, rank: int) -> str:
        left, state, process = self.left(rank), self._state(rank), self.others.get(rank)
        if left is not None:
            return f"failed: {left}" if left else "had come to its end and left"
        if process is None:
            return "gave no answer and was never heard of"
        who = f"process {process.pid} on {process.host}"
        if state == "":
            return f"gone: its {who} ended without a word. If nobody killed it, the kernel's log may say why (memory?)"
        if state is None:
            return f"no answer from its {who}"
        return f"no answer from its {who}, which is {STATES.get(state, f'in state {state}')}"


def _doing(said: dict[str, Any]) -> Doing:
    return Doing(**{**said, "calls": [Call(**call) for call in said["calls"]]})


def _store_host(store: Any) -> str:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return f"{store.host}:{store.port}" if hasattr(store, "host") else "the launcher"
