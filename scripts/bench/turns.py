"""A contender's side of the benchmark: it trains when it is its turn and says what the turn cost.

All contenders stay alive for the whole benchmark and wait, without using the processor, while another one works. So
each is started and warmed up once, and turns can be short and many, which is what makes ratios hold on a busy machine.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass
from multiprocessing.connection import Client

KIB_PER_MIB = 1024


@dataclass(frozen=True)
class Schedule:
    """How many steps a contender makes: ``warmup`` that do not count, then ``rounds`` turns of ``steps``."""

    warmup: int
    rounds: int
    steps: int

    @property
    def total(self) -> int:
        """All steps of one contender."""
        return self.warmup + self.rounds * self.steps


@dataclass(frozen=True)
class Turn:
    """What one process did in one turn."""

    rank: int
    tokens: int
    """This process's share of the tokens worked on: over all processes each counts once; padding does not."""
    cpu_s: float
    """CPU-seconds of all threads of this process."""
    wall_s: float
    peak_mib: float
    """Largest resident size of this process since its start."""
    loss: float
    """Loss of the turn's last step."""


@dataclass(frozen=True)
class Ready:
    """This process has finished its warm-up."""

    rank: int


class Turns:
    """Counts steps and hands the turn back when it is over.

    Args:
        address: socket of the harness; None = run alone and print each turn.
        schedule: the steps to make.
        rank: of this process within its contender.
    """

    def __init__(self, address: str | None, schedule: Schedule, rank: int = 0):
        self.schedule, self.rank = schedule, rank
        self._harness = Client(address) if address else None
        self._done = 0
        self._open()

    def step(self, tokens: int, loss: float) -> None:
        """One optimizer step on ``tokens`` tokens has just finished. Blocks until the next turn where a turn ends."""
        self._done += 1
        self._tokens += tokens
        past = self._done - self.schedule.warmup
        if past < 0 or past % self.schedule.steps:
            return
        if past == 0:
            self._say(Ready(self.rank))
        else:
            cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB_PER_MIB
            self._say(Turn(self.rank, self._tokens, cpu, wall, peak, loss))
        if self._harness and self._done < self.schedule.total:
            self._harness.recv()
        self._open()

    def _open(self) -> None:
        self._tokens = 0
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def _say(self, message: Ready | Turn) -> None:
        if self._harness:
            self._harness.send(message)
        else:
            print(message, flush=True)


def parse_args(parser: argparse.ArgumentParser | None = None) -> tuple[argparse.Namespace, Schedule]:
    """The options every contender takes, added to its own."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--address", help="socket of the harness; without it the contender runs alone")
    parser.add_argument("--data", required=True, help="folder written by scripts/bench/workload.py")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    return args, Schedule(args.warmup, args.rounds, args.steps)
