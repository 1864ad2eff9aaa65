"""Functions that may hang or crash, run in processes that can be ended: each job has its outcome whatever happens."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from trainer.rollout.worker import Call, Outcome

LOADING_S = 120.0
"""Seconds that importing a function's file may take."""
MOST_STUCK = 8
"""Jobs of one function in one batch that may take too long: those behind them are not tried any more, so that a
function that always hangs cannot hold up the other ranks for ever."""
_ROOT = str(Path(__file__).resolve().parents[2])
_BEGIN = f"import sys; sys.path.insert(0, {_ROOT!r}); from trainer.rollout.worker import main; main()"
"""Not `-m`: a worker stays in the folder in which the run was started, for functions that read files."""


@dataclass(frozen=True)
class Job:
    """A function and what it is given before the arguments of the config."""

    call: Call
    given: tuple[Any, ...] | None
    """None: the function is only loaded."""
    timeout: float
    """Seconds; loading its file does not count."""


class _Worker:
    """One process, one job at a time."""

    def __init__(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-c", _BEGIN, str(theirs.fileno())]
            # Only the connection is handed on: no socket of a process group, no file of the run.
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self.jobs: Connection = ours
        self.loaded: set[str] = set()
        self.number: int | None = None
        """Of the job it is at."""
        self.loading = False
        self.until = 0.0

    def begin(self, number: int, job: Job) -> None:
        """Give it a job. A function that it has not yet is loaded first, on other time."""
        self.number = number
        self.loading = job.call.function not in self.loaded
        self.until = time.monotonic() + (LOADING_S if self.loading else job.timeout)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is gone: `outcome` finds out
            self.jobs.send((job.call, None if self.loading else job.given))

    def outcome(self) -> Outcome:
        """What came of the job; to be asked for when there is something on the connection."""
        try:
            found = self.jobs.recv()
        except (EOFError, ConnectionResetError):
            code = self.process.wait()
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            return Outcome(None, f"the process that ran it ended {how}")
        assert isinstance(found, Outcome)
        return found

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """Whatever it is doing."""
        self.jobs.close()
        self.process.kill()
        self.process.wait()


class Crew:
    """Some worker processes; they start when there is work, and one that was ended is replaced.

    Args:
        size: how many.
        tick: called while they work, every so many seconds at least.
    """

    def __init__(self, size: int, tick: Callable[[], None] = lambda: None, every_s: float = 1.0) -> None:
        self.size, self.tick, self.every_s = size, tick, every_s
        self._workers: list[_Worker] = []

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Their outcomes, in their order. Never raises for what a function does."""
        outcomes: dict[int, Outcome] = {}
        waiting = deque(range(len(jobs)))
        stuck: Counter[Call] = Counter()
        try:
            while len(outcomes) < len(jobs):
                self._hand_out(jobs, waiting, outcomes, stuck)
                self._take_in(jobs, outcomes, stuck)
                self.tick()
        except BaseException:
            self.close()  # interrupted: what they are at belongs to nobody any more
            raise
        return [outcomes[number] for number in range(len(jobs))]

    def load(self, calls: Sequence[Call]) -> list[Outcome]:
        """Load functions, so that a file that cannot be imported is told of at once."""
        return self.run([Job(call, None, LOADING_S) for call in calls])

    def close(self) -> None:
        """End the processes."""
        while self._workers:
            self._workers.pop().end()

    def _hand_out(
        self, jobs: Sequence[Job], waiting: deque[int], outcomes: dict[int, Outcome], stuck: Counter[Call]
    ) -> None:
        while waiting:
            job = jobs[waiting[0]]
            if stuck[job.call] >= MOST_STUCK:
                error = f"not tried: {MOST_STUCK} others of this step took longer than {job.timeout:g} s"
                outcomes[waiting.popleft()] = Outcome(None, error)
                continue
            worker = next((each for each in self._workers if each.number is None), None)
            if worker is None:
                if len(self._workers) == self.size:
                    return
                self._workers.append(worker := _Worker())
            worker.begin(waiting.popleft(), job)

    def _take_in(self, jobs: Sequence[Job], outcomes: dict[int, Outcome], stuck: Counter[Call]) -> None:
        """Wait for something to happen, and see to it."""
        busy = [worker for worker in self._workers if worker.number is not None]
        if not busy:
            return
        left = min(max(min(worker.until for worker in busy) - time.monotonic(), 0.0), self.every_s)
        ready = wait([worker.jobs for worker in busy], left)
        for worker in busy:
            assert worker.number is not None
            number, job = worker.number, jobs[worker.number]
            if worker.jobs in ready:
                outcome = worker.outcome()
                if worker.loading and not outcome.error and worker.alive:
                    worker.loaded.add(job.call.function)
                    if job.given is not None:
                        worker.begin(number, job)
                        continue
            elif time.monotonic() >= worker.until:
                what, limit = ("importing its file", LOADING_S) if worker.loading else ("it", job.timeout)
                outcome = Outcome(None, f"{what} took longer than {limit:g} s")
                stuck[job.call] += 1
                worker.end()
            else:
                continue
            outcomes[number], worker.number = outcome, None
            if not worker.alive:
                worker.end()
                self._workers.remove(worker)
