"""Process pools for parallel tests: started once a session, reused by every test, gloo on loopback.

Between two jobs the processes are stopped (SIGSTOP): each gloo group has threads that wake a hundred times a second,
and those of fifteen idle processes took half of a machine of two cores.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing as mp
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT_S = 300
AFTER_FAILURE_S = 10
_PR_SET_PDEATHSIG = 1


class Pool:
    """``size`` processes with a default process group, each waiting for a function to run."""

    def __init__(self, size: int, folder: Path):
        self.size = size
        self.alive = True
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            context = _context(rank, size)
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, str(folder / "store"), theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """``function(*args, **kwargs)`` on every rank at once; the results in rank order.

        ``function`` lives in an importable module (``tests.cases``), not inside a test file.
        """
        self._signal(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, args, kwargs)))
        results: dict[int, Any] = {}
        failed: list[str] = []
        end = time.monotonic() + TIMEOUT_S
        while len(results) < self.size and (left := end - time.monotonic()) > 0:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            for pipe in wait(waiting, left):
                rank = self.pipes.index(pipe)  # pyright: ignore[reportArgumentType]
                good, value = pickle.loads(self.pipes[rank].recv_bytes())
                results[rank] = value
                if not good:
                    failed.append(f"rank {rank}:\n{value}")
                    # The others may wait for ever in a collective that this one has left.
                    end = min(end, time.monotonic() + AFTER_FAILURE_S)
        missing = [rank for rank in range(self.size) if rank not in results]
        if missing:
            self.kill()
            failed.append(f"no answer from ranks {missing}; the pool was ended")
        self._signal(signal.SIGSTOP)
        assert not failed, "\n".join(failed)
        return [results[rank] for rank in range(self.size)]

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        """End processes that no longer answer."""
        self.alive = False
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        """End the processes."""
        if not self.alive:
            return
        self._signal(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def server() -> Any:
    """Makes processes that are forked from one that has imported everything: imports take five seconds of a core."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


def _context(rank: int, size: int) -> Any:
    """The last of several hashes words in its own way, as every process of a launcher does: what depends on the order
    of a set must not look alike on all ranks."""
    return mp.get_context("spawn") if rank == size - 1 > 0 else server()


def die_with_parent() -> None:
    """End with the process that started this one: a stopped one would outlive tests that were killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _work(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    die_with_parent()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.new_group = _groups_made_once(dist.new_group)
    import tests.cases  # noqa: F401  (all that the jobs need)

    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage at every partitioned module, a second each with all libraries looked at
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (job := pickle.loads(pipe.recv_bytes())) is not None:
        function, args, kwargs = job
        try:
            answer = True, function(*args, **kwargs)
        except Exception:
            answer = False, traceback.format_exc()
        _forget_engines()
        # By value: torch would send each tensor as a shared file, and every one of them stays an open descriptor here.
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


def _forget_engines() -> None:
    """Unhook DeepSpeed's engines: hooks in C++ keep them and their models for ever, unseen by the collector."""
    from deepspeed import DeepSpeedEngine

    for engine in [each for each in gc.get_objects() if issubclass(type(each), DeepSpeedEngine)]:
        engine.destroy()
    gc.collect()
    gc.freeze()  # what is still there will stay


def _groups_made_once(new_group: Callable[..., Any]) -> Callable[..., Any]:
    """`new_group` that gives the same ranks the same group again: layouts by the hundred have few different ones.

    Groups asked for with other options than a timeout are new ones.
    """
    made: dict[tuple[int, ...], Any] = {}

    def group_of(ranks: list[int] | None = None, timeout: Any = None, **options: Any) -> Any:
        if options or ranks is None:
            return new_group(ranks, timeout, **options)
        if tuple(ranks) not in made:
            made[tuple(ranks)] = new_group(ranks, timeout)
        return made[tuple(ranks)]

    return group_of
