"""Runs contenders in turns on one machine and compares what a CPU-second buys.

Tokens per CPU-second of all processes of a contender is a measure that a shared machine disturbs little, and turns
A B C A B C … let what disturbance there is fall on everyone. Wall time means something on a quiet machine only.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median

from scripts.bench.turns import Ready, Schedule, Turn

ROOT = Path(__file__).resolve().parents[2]

POLL_S = 0.2
START_TIMEOUT_S = 180.0
TURN_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Contender:
    """One way of training: a module that reports through ``scripts.bench.turns``, and its number of processes."""

    name: str
    module: str
    args: tuple[str, ...] = ()
    processes: int = 1


@dataclass
class Record:
    """What a contender did: for each round, the turn of every process."""

    contender: Contender
    rounds: list[list[Turn]] = field(default_factory=list)

    def tokens_per_cpu_s(self) -> list[float]:
        """Per round: tokens of all processes / CPU-seconds of all processes."""
        return [sum(t.tokens for t in turns) / sum(t.cpu_s for t in turns) for turns in self.rounds]

    def tokens_per_wall_s(self) -> list[float]:
        """Per round: tokens of all processes / seconds of the slowest."""
        return [sum(t.tokens for t in turns) / max(t.wall_s for t in turns) for turns in self.rounds]

    def peak_mib(self) -> float:
        """Largest resident size of any one process."""
        return max(t.peak_mib for turns in self.rounds for t in turns)

    def loss(self) -> float:
        """Loss of the last step, mean over processes."""
        return sum(t.loss for t in self.rounds[-1]) / len(self.rounds[-1])


class Running:
    """A contender's processes, and the line to each of them.

    Raises:
        RuntimeError: the contender died or fell silent; the message ends with what it printed last.
    """

    def __init__(self, contender: Contender, data: Path, schedule: Schedule, scratch: Path):
        self.contender = contender
        address = str(scratch / f"{contender.name.replace(' ', '_').replace('/', '_')}.sock")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(address)
        self._socket.listen()
        self._log = Path(address).with_suffix(".log")
        command = [*_launch(contender), *contender.args, "--address", address, "--data", str(data)]
        command += ["--warmup", schedule.warmup, "--rounds", schedule.rounds, "--steps", schedule.steps]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=child_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._lines: list[Connection] = []

    def join(self) -> None:
        """Wait until every process has called and has finished its warm-up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(self._lines) < self.contender.processes:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self._failure("did not start")
            if wait([self._socket], POLL_S):
                connection, _ = self._socket.accept()
                self._lines.append(Connection(connection.detach()))
        answers = [self._hear(line, START_TIMEOUT_S) for line in self._lines]
        assert all(isinstance(answer, Ready) for answer in answers), answers

    def turn(self) -> list[Turn]:
        """Let the contender make one turn's steps."""
        for line in self._lines:
            line.send("go")
        answers = [self._hear(line, TURN_TIMEOUT_S) for line in self._lines]
        turns = [answer for answer in answers if isinstance(answer, Turn)]
        assert len(turns) == len(answers), answers
        return sorted(turns, key=lambda turn: turn.rank)

    def stop(self) -> None:
        """End the contender's processes: those this harness started, by their own group."""
        for line in self._lines:
            line.close()
        self._socket.close()
        try:
            self._process.wait(timeout=1 if self._process.poll() is None else None)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 15)
            self._process.wait()

    def _hear(self, line: Connection, timeout: float) -> Ready | Turn:
        if not wait([line], timeout):
            raise self._failure(f"was silent for {timeout:.0f} s")
        try:
            return line.recv()
        except (EOFError, ConnectionResetError):
            raise self._failure("ended in the middle of a turn") from None

    def _failure(self, what: str) -> RuntimeError:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
        return RuntimeError(f"contender '{self.contender.name}' {what}. The end of its output:\n{tail}")


def compete(contenders: Sequence[Contender], data: Path, schedule: Schedule) -> list[Record]:
    """Start all contenders, then give each a turn in every round.

    Raises:
        RuntimeError: a contender failed.
    """
    records = [Record(contender) for contender in contenders]
    with tempfile.TemporaryDirectory(prefix="loom-bench-") as scratch, ExitStack() as stack:
        running = []
        for contender in contenders:
            say(f"starting {contender.name}")
            running.append(stack.enter_context(_started(contender, data, schedule, Path(scratch))))
        for number in range(schedule.rounds):
            say(f"round {number + 1} of {schedule.rounds}")
            for record, one in zip(records, running, strict=True):
                record.rounds.append(one.turn())
    say("")
    return records


def table(records: Sequence[Record], over: Sequence[str] = ()) -> str:
    """The comparison; ratios are to the first contender, taken round by round, and their median is shown.

    Args:
        over: further contenders that wall times are compared with, each in a column of its own.
    """
    base = records[0]
    others = {name: next(r for r in records if r.contender.name == name).tokens_per_wall_s() for name in over}
    width = {name: len(name) + 8 for name in over}
    lines = [
        f"{'contender':<22}{'procs':>6}{'tokens/CPU-s':>14}{'[min .. max]':>16}{'ratio':>8}{'wall ratio':>12}"
        + "".join(f"{'wall / ' + name:>{width[name]}}" for name in over)
        + f"{'peak MiB':>10}{'loss':>9}"
    ]
    for record in records:
        rates = record.tokens_per_cpu_s()
        ratio = median_ratio(rates, base.tokens_per_cpu_s())
        wall = median_ratio(record.tokens_per_wall_s(), base.tokens_per_wall_s())
        spread = f"[{min(rates):.0f} .. {max(rates):.0f}]"
        lines.append(
            f"{record.contender.name:<22}{record.contender.processes:>6}{median(rates):>14.0f}{spread:>16}"
            f"{ratio:>8.3f}{wall:>12.3f}"
            + "".join(
                f"{median_ratio(record.tokens_per_wall_s(), theirs):>{width[name]}.3f}"
                for name, theirs in others.items()
            )
            + f"{record.peak_mib():>10.0f}{record.loss():>9.4f}"
        )
    return "\n".join(lines)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of ours / theirs of the same round."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def append_results(path: Path, bench: str, schedule: Schedule, records: Sequence[Record]) -> None:
    """Add one JSON line with every turn, so that a later reader can compute other statistics."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {
        "bench": bench,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "schedule": asdict(schedule),
        "load_average": os.getloadavg(),
        "contenders": [
            {**asdict(r.contender), "rounds": [[asdict(turn) for turn in turns] for turns in r.rounds]} for r in records
        ],
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def child_environment() -> dict[str, str]:
    """This process's environment with one thread per process; waiting threads sleep instead of spinning."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


def say(text: str) -> None:
    """One line of progress on standard error, over the last one where that is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def _launch(contender: Contender) -> list[str]:
    if contender.processes == 1:
        return [sys.executable, "-m", contender.module]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return [*torchrun, str(contender.processes), "-m", contender.module]


@contextmanager
def _started(contender: Contender, data: Path, schedule: Schedule, scratch: Path) -> Iterator[Running]:
    running = Running(contender, data, schedule, scratch)
    try:
        running.join()
        yield running
    finally:
        running.stop()
