"""The worker processes of this machine: started, listened to, shown, and ended whatever happens."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from tqdm import tqdm

from trainer.inference.claims import Claims
from trainer.inference.sessions import BEAT_S, Owner, Session
from trainer.inference.worker import Count, Failed, Finished, Ready, Task, main
from trainer.inference.workplace import Workplace

LOOK_S = 0.5
WINDOW_S = 30.0
"""Over which the speed is taken that is shown."""
PATIENCE_S = 5.0
"""A process that was told to end is killed after so long."""


@dataclass
class Member:
    """A process, and what it has said."""

    task: Task
    process: SpawnProcess
    pipe: Connection
    ready: bool = False
    finished: bool = False
    gone: bool = False
    failed: Failed | None = None


class Crew:
    """All of them.

    Args:
        tasks: of every process; those of one worker's tp ranks have its number.
        session: theirs; is kept up to date.
        rows: in the whole file.
        say: is given lines for the user.
    """

    def __init__(
        self, tasks: Sequence[Task], session: Session, place: Workplace, rows: int, say: Callable[[str], None]
    ) -> None:
        self.tasks, self.session, self.place, self.rows, self.say = tasks, session, place, rows, say
        self.sessions = place.sessions(session.name)
        self.claims = Claims(place.folder / "claims", place.chunks, self.sessions, Owner(session.name))
        self.members: list[Member] = []
        self._others = {each.name: (each.rows, each.rows, each.tokens) for each in self.sessions.others()}
        """Of other machines' sessions: rows when this one began, rows and tokens now."""
        self._speeds: deque[tuple[float, int]] = deque()
        self._began: float | None = None
        self._beat_at = 0.0

    def run(self, done: int) -> None:
        """Until all rows have results.

        Args:
            done: rows that had them before.

        Raises:
            ValueError: the model cannot be loaded, or all workers have died.
        """
        slow = 10.0 if not sys.stderr.isatty() else 0.1
        bar = tqdm(total=self.rows, initial=done, unit="row", mininterval=slow, smoothing=0.05, dynamic_ncols=True)
        with tempfile.TemporaryDirectory(prefix="infer-") as folder, bar:
            try:
                self._start(Path(folder))
                while not all(member.gone for member in self.members):
                    wait(self._heard(), LOOK_S)
                    for member in self.members:
                        self._listen(member)
                    for member in [each for each in self.members if not each.gone and not each.process.is_alive()]:
                        self._ended(member, bar)
                    self._beat()
                    self._show(bar, done)
            except KeyboardInterrupt:
                bar.close()
                self.say(f"stopped; what is done is kept in {self.place.folder}, and the same command goes on with it")
                raise
            finally:
                self._stop(self.members)

    def _start(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        for task in self.tasks:
            task = replace(task, store=str(folder / f"worker{task.worker}"))
            ours, theirs = context.Pipe()
            process = context.Process(target=main, args=(task, theirs), name=f"worker {task.worker}.{task.rank}")
            process.start()
            theirs.close()
            self.members.append(Member(task, process, ours))

    def _heard(self) -> list[Connection | int]:
        live = [member for member in self.members if not member.gone]
        return [*(member.pipe for member in live), *(member.process.sentinel for member in live)]

    def _listen(self, member: Member) -> None:
        """Take what a process has said."""
        try:
            while not member.gone and member.pipe.poll():
                self._take(member, member.pipe.recv())
        except (EOFError, ConnectionError):  # it has ended: its sentinel tells
            return

    def _take(self, member: Member, said: object) -> None:
        if isinstance(said, Ready):
            member.ready = True
            self._began = self._began or time.monotonic()
        elif isinstance(said, Count):
            self.session.rows += said.rows
            self.session.tokens += said.tokens
            self.session.seconds = time.monotonic() - (self._began or time.monotonic())
        elif isinstance(said, Finished):
            member.finished = True
        elif isinstance(said, Failed):
            member.failed = said
            if said.mistake and not member.ready:
                raise ValueError(said.reason)

    def _ended(self, member: Member, bar: tqdm) -> None:
        """A process is no more; if it was not done, its rows are the others'."""
        self._listen(member)
        member.gone = True
        member.pipe.close()
        if member.finished:
            return
        worker = member.task.worker
        team = [each for each in self.members if each.task.worker == worker]
        self._stop(team)
        for each in team:
            each.gone = True
        self.session.dead.append(worker)
        self.sessions.beat(self.session)
        why = self._why(member)
        if all(each.gone for each in self.members):
            if not self.claims.open():
                return
            raise ValueError(
                f"all workers have died, the last of them: {why}. What is done is kept in {self.place.folder}, and the "
                "same command goes on with it"
            )
        bar.write(f"{why}; its rows go to the others", file=sys.stderr)

    def _why(self, member: Member) -> str:
        name = f"worker {member.task.worker}"
        if member.failed is not None:
            return f"{name} failed: {member.failed.reason}"
        code = member.process.exitcode or 0
        if code < 0:
            memory = " (too little memory? fewer workers need less)" if -code == signal.SIGKILL else ""
            return f"{name} was ended by {signal.Signals(-code).name}{memory}"
        return f"{name} ended with code {code}"

    def _stop(self, members: Sequence[Member]) -> None:
        """End processes."""
        for member in members:
            if member.process.is_alive():
                member.process.terminate()
        until = time.monotonic() + PATIENCE_S
        for member in members:
            member.process.join(max(0.0, until - time.monotonic()))
            if member.process.is_alive():
                member.process.kill()
                member.process.join()

    def _beat(self) -> None:
        if time.monotonic() < self._beat_at:
            return
        self._beat_at = time.monotonic() + BEAT_S
        self.sessions.beat(self.session)
        for each in self.sessions.others():
            begin = self._others.get(each.name, (0, 0, 0))[0]
            self._others[each.name] = (begin, each.rows, each.tokens)

    def _show(self, bar: tqdm, done: int) -> None:
        if self._began is None:
            bar.set_postfix_str("loading", refresh=False)
            return
        if not self._speeds:  # the time left is told from here on
            bar.start_t = bar.last_print_t = time.time()
        others = self._others.values()
        rows = done + self.session.rows + sum(now - begin for begin, now, _ in others)
        tokens, now = self.session.tokens + sum(each for _, _, each in others), time.monotonic()
        while len(self._speeds) > 1 and now - self._speeds[0][0] > WINDOW_S:
            self._speeds.popleft()
        self._speeds.append((now, tokens))
        then, before = self._speeds[0]
        live = len({each.task.worker for each in self.members if not each.gone})
        parts = [f"{(tokens - before) / max(now - then, 1e-9):,.0f} tokens/s"]
        parts += [f"{live} worker(s)"] * (live > 0) + [f"{len(self._others)} other session(s)"] * bool(self._others)
        bar.set_postfix_str(", ".join(parts), refresh=False)
        bar.update(min(rows, self.rows) - bar.n)
