"""Process pools for parallel tests: started once a session, reused by every test, gloo on loopback."""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 300


class Pool:
    """``size`` processes with a default process group, each waiting for a function to run."""

    def __init__(self, size: int, folder: Path):
        context = mp.get_context("spawn")
        self.size = size
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, str(folder / "store"), theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """``function(*args, **kwargs)`` on every rank at once; the results in rank order.

        ``function`` lives in an importable module (``tests.cases``), not inside a test file.
        """
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        results, failed = [], []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} of {self.size} did not answer within {TIMEOUT_S} s"
            good, value = pipe.recv()
            (results if good else failed).append(value if good else f"rank {rank}:\n{value}")
        assert not failed, "\n".join(failed)
        return results

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _work(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (job := pipe.recv()) is not None:
        function, args, kwargs = job
        try:
            pipe.send((True, function(*args, **kwargs)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
