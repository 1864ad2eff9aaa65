"""A file of prompts through several copies of a model: what scripts/infer.py does."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.groups import LauncherRanks
from trainer.inference import joining
from trainer.inference.claims import Claims
from trainer.inference.crew import Crew
from trainer.inference.index import BadLine, Index
from trainer.inference.joining import InferenceConfig, Opened
from trainer.inference.results import Made
from trainer.inference.sessions import Owner, Session
from trainer.inference.worker import Task
from trainer.inference.workplace import Workplace

WAIT_S = 0.5
SHOWN = 5
"""Bad lines that are named in a message."""


@dataclass(frozen=True)
class Summary:
    """What came of it, on all machines."""

    out: Path
    rows: int
    """Written."""
    bad: int
    first_bad: tuple[BadLine, ...]
    bad_file: Path
    new_rows: int
    """Of this session, as the next two."""
    tokens: int
    seconds: float
    """Since the first worker was ready."""

    def __str__(self) -> str:
        lines = [f"wrote {self.out}: {self.rows:,} rows"]
        if self.new_rows:
            speed = self.tokens / max(self.seconds, 1e-9)
            lines[0] += f"; {self.tokens:,} new tokens here in {self.seconds:,.1f} s, {speed:,.0f} a second"
        if self.bad:
            lines.append(f"passed over {self.bad:,} bad row(s), told in {self.bad_file}:")
            lines += [f"  line {each.line}: {each.reason}" for each in self.first_bad]
            lines += [f"  and {self.bad - SHOWN:,} more"] * (self.bad > SHOWN)
        return "\n".join(lines)


class BatchInference:
    """The whole run on one machine. Several may work on one output, each with its own workers.

    Args:
        cfg: what to do.
        ranks: what a launcher said: with torchrun, one process a machine.
        say: is given lines for the user.
    """

    def __init__(
        self, cfg: InferenceConfig, ranks: LauncherRanks | None = None, say: Callable[[str], None] = print
    ) -> None:
        self.cfg, self.ranks, self.say = cfg, ranks or LauncherRanks(), say
        self.place = Workplace(cfg.out)

    def run(self) -> Summary | None:
        """Do it; started again after whatever end, it goes on with what is left.

        Returns:
            None if all was done before.

        Raises:
            ValueError: something given cannot be used, or all workers have died.
        """
        opened = joining.check(self.cfg, self.ranks)
        if not joining.join(self.cfg, opened, self.place, self.ranks.world):
            self.say(f"{self.cfg.out} is complete already, made with the same settings; --restart makes it anew")
            return None
        session = Session.begin()
        sessions = self.place.sessions(session.name)
        sessions.beat(session)
        try:
            self._work(opened, session, self.place.index())
            return self._finish(session)
        except FileNotFoundError:
            if self.place.folder.exists():
                raise
            return self._finished_elsewhere(session)
        except OSError as error:
            raise ValueError(
                f"{error.filename or self.place.folder}: {error.strerror}; what is done is kept in "
                f"{self.place.folder}, and the same command goes on with it"
            ) from error
        finally:
            sessions.leave()

    def _work(self, opened: Opened, session: Session, index: Index) -> None:
        left = len(Made.read(self.place.parts(), len(index)).missing())
        bad = len(self.place.bad())
        if left < len(index):
            self.say(f"going on with {self.place.folder}: {len(index) - left:,} of {len(index):,} rows are done")
        if bad:
            self.say(f"{bad:,} bad row(s) are passed over")
        if left:
            crew = Crew(self._tasks(opened, session, left), session, self.place, len(index), self.say)
            crew.run(len(index) - left)

    def _tasks(self, opened: Opened, session: Session, left: int) -> list[Task]:
        """One for each process."""
        cfg = self.cfg
        ranks = 1 if cfg.backend == "vllm" else cfg.tp
        threads = max(1, torch.get_num_threads() // (cfg.workers * ranks))
        share = math.ceil(left / (cfg.workers * self.ranks.world))
        return [
            Task(cfg, session.name, worker, rank, threads, share)
            for worker in range(cfg.workers)
            for rank in range(ranks)
        ]

    def _finish(self, session: Session) -> Summary:
        """Put the output together, unless another machine does."""
        claims = Claims(self.place.folder / "final", 1, self.place.sessions(session.name), Owner(session.name))
        while claims.claim() is None:
            time.sleep(WAIT_S)
            if not self.place.folder.exists():
                return self._finished_elsewhere(session)
        index, bad = self.place.index(), self.place.bad()
        made = Made.read(self.place.parts(), len(index))
        if lost := len(made.missing()):
            self.place.reopen(made.missing(), index)
            raise ValueError(f"{lost:,} row(s) were lost (did a machine lose power?); start the same command again")
        results = self.place.folder / "results.jsonl"
        with results.open("wb") as stream:
            rows = made.copy(stream, bad)
            stream.flush()
            os.fsync(stream.fileno())
        bad.sort(key=lambda each: each.line)
        cfg = self.cfg
        about = {"rows": rows, "bad_rows": len(bad), "model": cfg.model.path, "data": str(cfg.data)}
        self.place.publish(results, bad, about | {"identity": self.place.saved["identity"]})
        self.place.remove()
        return self._summary(session, rows, len(bad), bad[:SHOWN])

    def _finished_elsewhere(self, session: Session) -> Summary:
        if not self.cfg.out.exists() or not self.place.about_file.exists():
            raise ValueError(f"{self.place.folder} was taken away while it was worked on; start the same command again")
        about = json.loads(self.place.about_file.read_text(encoding="utf-8"))
        return self._summary(session, about["rows"], about["bad_rows"], [])

    def _summary(self, session: Session, rows: int, bad: int, first: list[BadLine]) -> Summary:
        done = (session.rows, session.tokens, session.seconds)
        return Summary(self.cfg.out, rows, bad, tuple(first), self.place.bad_file, *done)
