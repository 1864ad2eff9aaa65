"""The folder of a run: its name agreed on by all ranks, cleared of what a crash left, and held by one job at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from parallel.groups import Groups
from trainer.config import RunConfig

LOCK = ".lock"
"""Locked by the main rank as long as it lives; the kernel lets go of it however the process ends."""


@contextmanager
def run_folder(cfg: RunConfig, groups: Groups) -> Iterator[Path]:
    """The run folder, for as long as this job trains in it; half-written checkpoints of a crash are removed.

    Raises:
        ValueError: it cannot be written, or another job is still training in it.
    """
    name = cfg.run.name or f"{cfg.stage.name}-{cfg.model.family}-{datetime.now():%Y%m%d-%H%M%S}"
    run_dir = Path(cfg.run.dir) / groups.all_gather(name)[0]
    if not groups.is_main:
        groups.barrier()
        yield run_dir
        return
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(
            f"run.dir={cfg.run.dir}: cannot write there: {error}. Set run.dir to a writable folder."
        ) from error
    try:
        _hold(lock, run_dir)
        for pattern in ("*.building", "*.deleting", "*.tmp"):
            for leftover in (run_dir / "checkpoints").glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
        groups.barrier()
        yield run_dir
    finally:
        os.close(lock)


def _hold(lock: int, run_dir: Path) -> None:
    """Take the lock. A launcher that was killed may leave its processes training; a second job beside them would
    remove their half-written checkpoints and mix two curves in one file."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        raise ValueError(
            f"run.name={run_dir.name}: {holder} is still training in {run_dir}. Wait for it, end it "
            "(a killed launcher leaves its processes behind), or take another run.name."
        ) from error
    except OSError as error:
        warnings.warn(f"{run_dir}: this file system has no locks ({error}); start only one job in it", stacklevel=2)
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        raise ValueError(f"run.dir: cannot write to {run_dir}: {error}. Free space or change run.dir.") from error
