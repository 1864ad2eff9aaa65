"""Processes for a verification: forked after the imports, so that eight start as fast as one."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from parallel.groups import LauncherRanks, build_groups
from parallel.watch import peer_gone
from trainer.config import RunConfig
from trainer.verify.record import Record, record
from trainer.verify.shrink import Small

LIMIT_S = 300.0
"""Seconds all processes together may take."""
CAUSE_FIRST_S = 3.0
"""Seconds the others have to say something after the first failed."""


class Failed(Exception):
    """A process of the layout ended with an error; the text says which and how."""


@dataclass(frozen=True)
class _Job:
    cfg: RunConfig
    rank: int
    world: int
    folder: Path


@dataclass(frozen=True)
class _Error:
    job: _Job
    text: str
    mistake: bool = False
    """The user's, in the config."""
    peer_gone: bool = False
    """It only says that another process is not there any more."""


def records(small: Small) -> tuple[Record, list[Record]]:
    """Run the shrunk config in one process and in its layout; what each process recorded.

    Raises:
        Failed: a process could not finish.
        ValueError: a process found a mistake in the config.
    """
    with TemporaryDirectory(prefix="verify_") as folder:
        jobs = [_Job(small.alone, 0, 1, Path(folder))]
        jobs += [_Job(small.cfg, rank, small.world, Path(folder)) for rank in range(small.world)]
        found = _gather(jobs)
    return found[0], found[1:]


def _gather(jobs: list[_Job]) -> list[Record]:
    context = mp.get_context("fork")
    pipes: dict[Connection, int] = {}
    processes = []
    sys.stdout.flush()
    for number, job in enumerate(jobs):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes[ours] = number
        processes.append(process)
    try:
        return _answers(jobs, pipes)
    finally:
        for process in processes:
            process.kill()


def _answers(jobs: list[_Job], pipes: dict[Connection, int]) -> list[Record]:
    found: dict[int, Record] = {}
    errors: list[_Error] = []
    end = time.monotonic() + LIMIT_S
    silent = dict(pipes)
    while silent and (ready := wait(list(silent), max(0.0, end - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            number = silent.pop(pipe)
            try:
                answer = pickle.loads(pipe.recv_bytes())
            except EOFError:
                answer = _Error(jobs[number], "ended without a word (killed? out of memory?)")
            if isinstance(answer, _Error):
                errors.append(answer)
                end = min(end, time.monotonic() + CAUSE_FIRST_S)
            else:
                found[number] = answer
    if errors:
        raise _first_cause(errors)
    if silent:
        who = ", ".join(_who(jobs[number]) for number in silent.values())
        raise Failed(f"no answer within {LIMIT_S:.0f} s from {who}")
    return [found[number] for number in range(len(jobs))]


def _first_cause(errors: list[_Error]) -> Exception:
    """What to tell: the user's mistake, else the first error that is not just another process's absence."""
    first = min(errors, key=lambda error: (not error.mistake, error.peer_gone))
    if first.mistake:
        return ValueError(first.text)
    return Failed(f"{_who(first.job)} failed:\n{first.text}")


def _who(job: _Job) -> str:
    return f"rank {job.rank} of {job.world}" if job.world > 1 else "the one process it is compared with"


def _work(job: _Job, pipe: Connection) -> None:
    answer: Record | _Error
    try:
        with _silence(job.folder / f"output_{job.world}_{job.rank}"):
            answer = _recorded(job)
    except ValueError as error:
        answer = _Error(job, str(error), mistake=True)
    except Exception as error:
        answer = _Error(job, traceback.format_exc(), peer_gone=peer_gone(error))
    pipe.send_bytes(pickle.dumps(answer))  # by value; torch's own way shares memory, which ends with the process
    os._exit(0)  # threads of the process group may still run; nothing is left to tidy


def _recorded(job: _Job) -> Record:
    torch.set_num_threads(1)
    if job.world > 1:
        store = f"file://{job.folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=job.rank, world_size=job.world)
    ranks = LauncherRanks(job.rank, job.world, job.rank)
    return record(job.cfg, build_groups(ranks, job.cfg.run.hang_timeout, job.cfg.parallel))


@contextmanager
def _silence(file: Path) -> Iterator[None]:
    """Send what libraries print to a file: the page belongs to the verdict."""
    kept = [os.dup(1), os.dup(2)]
    with file.open("wb") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
